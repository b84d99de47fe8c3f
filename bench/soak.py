"""Soak: a run of thousands of steps that is killed and resumed all along, beside one that nobody disturbs.

`python -m bench.soak [--steps 3000] [--out bench/results/soak.json]` trains a tiny encoder on the built-in
set. At random moments the process gets SIGKILL or SIGTERM, then it is resumed. In the end the two runs
must hold the same bits, and while they ran their open files, and the undisturbed one's resident memory, must
not have grown from the second quarter of the readings in /proc to the last.
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
from a2mc_fast.files import write_json
from a2mc_fast.run.checkpoint import FILE, load_last_good
from a2mc_fast.run.machine import machine

CLOCK = {"seconds", "clips_per_second", "memory_bytes"}
_READINGS = 16  # a process with fewer says nothing about growth
_server = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Soak:
    """How long, and how rough."""

    steps: int = 3000
    """Training steps."""
    longest: float = 12.0
    """Seconds after which a process is disturbed at the latest."""
    seed: int = 0
    """Of the moments."""
    out: str = ""
    """JSON file to write; empty = none."""


def flags(folder: Path, steps: int) -> list[str]:
    """A tiny run on the built-in set: 10 steps an epoch, evaluated, saved and logged often."""
    text = (
        f"--run.out {folder} --synthetic.clips 240 --views.frames 8 --encoder.hidden 8 "
        f"--encoder.projection 16 --bank.size 64 --bank.warmup-steps 20 --optim.epochs {steps // 10} "
        "--optim.batch-size 16 --optim.lr 0.02 --run.log-every 3 "
        "--run.eval-every 20 --run.keep-last 3 "
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


class Watch:
    """Resident bytes and open files of a process, read from when its first save has made every buffer."""

    def __init__(self, process: BaseProcess, folder: Path) -> None:
        self.process, self.file = process, folder / FILE
        self._before = self._saved()
        self.bytes: list[int] = []
        self.files: list[int] = []

    def _saved(self) -> int:
        return self.file.stat().st_mtime_ns if self.file.exists() else 0

    def read(self) -> None:
        if self._saved() == self._before or self.process.exitcode is not None:
            return
        folder = Path(f"/proc/{self.process.pid}")
        try:
            pages = int((folder / "statm").read_text().split()[1])
            self.files.append(len(list((folder / "fd").iterdir())))
            self.bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, IndexError):  # it has just ended
            pass

    def growth(self) -> tuple[int, int]:
        """Bytes and files by which it grew from its second to its last quarter."""
        quarter = len(self.bytes) // 4
        early, late = slice(quarter, 2 * quarter), slice(-quarter, None)
        memory = statistics.median(self.bytes[late]) - statistics.median(self.bytes[early])
        # a file that is being written comes and goes; a leak raises the least
        return int(memory), min(self.files[late]) - min(self.files[early])


def disturbed(folder: Path, options: Soak, calm: Watch) -> dict[str, Any]:
    """The run that is killed and resumed until it ends, beside one that is only watched. -> counts"""
    moments = random.Random(options.seed)
    args, output = flags(folder, options.steps), folder.parent / "disturbed.txt"
    counts = {"SIGKILL": 0, "SIGTERM": 0}
    files, most = [], 0
    code: int | None = None
    while code != 0:
        resume = ["--resume"] if (folder / "config.json").exists() else []
        process = start([*args, *resume], output)
        watch = Watch(process, folder)
        end = time.monotonic() + moments.uniform(0, options.longest)
        while process.exitcode is None and time.monotonic() < end:
            process.join(0.2)
            watch.read()
            calm.read()
        number = moments.choice((signal.SIGKILL, signal.SIGTERM))
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)
        process.join()
        code = process.exitcode
        allowed = {0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM}
        assert code in allowed, output.read_text()[-2000:]
        if code != 0:
            counts[number.name] += 1
            if folder.exists():
                assert load_last_good(folder)[1] == "", "a checkpoint is damaged"
        most = max([most, *watch.bytes])
        if len(watch.files) >= _READINGS:
            files.append(watch.growth()[1])
    while calm.process.exitcode is None:
        calm.process.join(0.2)
        calm.read()
    memory, opened = calm.growth()
    return {
        **counts,
        "undisturbed_growth_bytes": memory,
        "undisturbed_growth_files": opened,
        "disturbed_processes_measured": len(files),
        "disturbed_growth_files": max(files, default=0),
        "peak_resident_bytes": max([most, *calm.bytes]),
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
        counts = disturbed(rough, options, Watch(process, whole))
        assert process.exitcode == 0, Path(name, "whole.txt").read_text()[-2000:]
        tensors = [load_file(folder / FILE) for folder in (whole, rough)]
        equal = tensors[0].keys() == tensors[1].keys() and all(
            torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items()
        )
        assert equal, "the states differ"
        assert timeless(whole) == timeless(rough), "the metrics differ"
        left = sorted(path.name for path in rough.iterdir())
        assert left == sorted(path.name for path in whole.iterdir()), left
    assert max(counts["undisturbed_growth_files"], counts["disturbed_growth_files"]) <= 0, counts
    assert counts["undisturbed_growth_bytes"] < 8 << 20, counts
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
