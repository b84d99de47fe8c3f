"""Soak: a run of thousands of steps that is killed and resumed all along, beside one that nobody disturbs.

`python -m bench.soak [--steps 3000] [--out bench/results/soak.json]` trains a tiny encoder on the built-in
set. At random moments the process gets SIGKILL or SIGTERM, then it is resumed. While it runs, its resident
memory and open files are read from /proc. In the end the two runs must hold the same bits, and no process
may have grown: the middle of the last quarter of its readings against that of the second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

from a2mc_fast import train
from a2mc_fast.checkpoint import FILE, load_last_good
from a2mc_fast.files import write_json
from a2mc_fast.runlog import machine

CLOCK = {"seconds", "clips_per_second", "memory_bytes"}
_READINGS = 40  # a process with fewer says nothing about growth
_server = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Soak:
    """How long, and how rough."""

    steps: int = 3000
    """Training steps."""
    longest: float = 12.0
    """Seconds after which a process is disturbed at the latest."""
    calm: float = 0.15
    """Share of processes that are left alone four times as long, to see whether they grow."""
    seed: int = 0
    """Of the moments."""
    out: str = ""
    """JSON file to write; empty = none."""


def flags(folder: Path, steps: int) -> list[str]:
    """A tiny run on the built-in set: 10 steps an epoch, evaluated, saved and logged often."""
    text = (
        f"--run.out {folder} --synthetic.clips 240 --views.frames 8 --views.min-frames 8 --encoder.hidden 8 "
        f"--encoder.projection 16 --bank.size 64 --bank.warmup-steps 20 --optim.epochs {steps // 10} "
        "--optim.batch-size 16 --optim.lr 0.02 --attack.classifier pseudo_labels --run.log-every 3 "
        "--run.eval-every 20 --run.keep-last 3 --run.keep-every 50 --run.no-progress"
    )
    return ["demo", *text.split()]


def work(args: list[str], output: str) -> None:
    """A training process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    train.main(args)


def start(args: list[str], output: Path) -> BaseProcess:
    process = _server.Process(target=work, args=(args, str(output)))
    process.start()
    return process


def reading(process: BaseProcess) -> tuple[int, int] | None:
    """Resident bytes and open files of a process; None when it has ended."""
    folder = Path(f"/proc/{process.pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(list((folder / "fd").iterdir()))
    except (OSError, IndexError):
        return None


def growth(readings: list[tuple[int, int]]) -> tuple[float, int]:
    """Bytes and files by which a process grew from its second to its last quarter."""
    quarter = len(readings) // 4
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]
    memory = statistics.median(r[0] for r in late) - statistics.median(r[0] for r in early)
    # a file that is being written comes and goes; a leak raises the least
    return memory, min(r[1] for r in late) - min(r[1] for r in early)


def disturbed(folder: Path, options: Soak) -> dict[str, Any]:
    """The run that is killed and resumed until it ends. -> counts"""
    moments = random.Random(options.seed)
    args, output = flags(folder, options.steps), folder.parent / "disturbed.txt"
    counts = {"SIGKILL": 0, "SIGTERM": 0}
    grown: list[tuple[float, int]] = []
    most = 0
    code: int | None = None
    while code != 0:
        resume = ["--resume"] if (folder / "config.json").exists() else []
        process = start([*args, *resume], output)
        calm = moments.random() < options.calm
        end = time.monotonic() + moments.uniform(0, options.longest) * (4 if calm else 1)
        readings = []
        while process.exitcode is None and time.monotonic() < end:
            process.join(0.2)
            readings.append(reading(process))
        number = moments.choice((signal.SIGKILL, signal.SIGTERM))
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)
        process.join()
        code = process.exitcode
        allowed = {0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM}
        assert code in allowed, output.read_text()[-2000:]
        if code != 0:
            counts[number.name] += 1
            assert (folder / "config.json").exists() or not any(folder.glob("*")), "a part of a file"
            if folder.exists():
                assert load_last_good(folder)[1] == "", "a checkpoint is damaged"
        seen = [r for r in readings if r is not None]
        most = max([most, *(r[0] for r in seen)])
        if len(seen) >= _READINGS:
            grown.append(growth(seen))
    return {
        **counts,
        "processes_measured": len(grown),
        "largest_growth_bytes": int(max(g[0] for g in grown)),
        "largest_growth_files": max(g[1] for g in grown),
        "peak_resident_bytes": most,
    }


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def soak(options: Soak) -> dict[str, Any]:
    """Both runs, compared. Raises `AssertionError` where a promise is broken."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        whole, rough = Path(name, "whole"), Path(name, "rough")
        process = start(flags(whole, options.steps), Path(name, "whole.txt"))
        counts = disturbed(rough, options)
        process.join()
        assert process.exitcode == 0, Path(name, "whole.txt").read_text()[-2000:]
        tensors = [load_file(folder / FILE) for folder in (whole, rough)]
        equal = tensors[0].keys() == tensors[1].keys() and all(
            torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items()
        )
        assert equal, "the states differ"
        assert timeless(whole) == timeless(rough), "the metrics differ"
        left = sorted(path.name for path in rough.iterdir())
        assert left == sorted(path.name for path in whole.iterdir()), left
    assert counts["largest_growth_files"] <= 0, counts
    assert counts["largest_growth_bytes"] < 16 << 20, counts
    return {
        "steps": options.steps + 20,
        **counts,
        "tensors_equal": len(tensors[0]),
        "seconds": round(time.monotonic() - begun),
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
    }


if __name__ == "__main__":
    _server.set_forkserver_preload(["a2mc_fast.trainer", "a2mc_fast.train", "torch._dynamo"])
    chosen = tyro.cli(Soak, description="Kill and resume a run all along; it must end with the same bits.")
    found = soak(chosen)
    print(json.dumps(found, indent=2))
    if chosen.out:
        write_json(Path(chosen.out), found)
