"""Whole runs, each a process of its own: the main job, equal bits, and a real data file.

`pytest bench/bench_runs.py -s` runs the first two; BENCH_DATA=clips.safetensors names a packed file for the
last. Under BENCH_TOY the runs are a few steps long and their accuracy says nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from a2mc_fast.data import Clips
from a2mc_fast.files import read_json
from a2mc_fast.run.checkpoint import FILE
from bench.harness import TOY, sized
from bench.records import Record, Recorder

ROOT = Path(__file__).parent.parent
SMALL = ["--optim.batch-size", "16", "--views.frames", "16"] if TOY else []
SHORT = ["--synthetic.clips", "200", "--bank.warmup-steps", "4", "--optim.epochs", "1", *SMALL]
LIMIT = 300  # seconds; whoever started this process has a shorter one


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """A training run that writes to `folder`; its output goes to `folder`.txt."""
    command = [sys.executable, "-m", "a2mc_fast.train", *flags, "--run.out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with folder.with_suffix(".txt").open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, text=True)


def end(run: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """Wait for a run, show what it said, and hand back its result.json."""
    code = run.wait(LIMIT)
    print(folder.with_suffix(".txt").read_text())
    assert code == 0, f"the run ended with exit code {code}"
    return read_json(folder / "result.json")


def accuracy(what: str, case: str, result: dict[str, Any]) -> Record:
    """A run's speed and kNN accuracy."""
    gain = result["knn_top1"] - result["knn_top1_untrained"]
    return Record(
        what=what,
        case=case,
        per_second=result["clips_per_second"],
        MiB=result["peak_memory_bytes"] / 2**20,
        numbers={
            "steps": result["steps"],
            "seconds": result["seconds"],
            "kNN top-1, %": result["knn_top1"],
            "untrained, %": result["knn_top1_untrained"],
            "gain, points": gain,
        },
    )


def test_main_job(record: Recorder, tmp_path: Path) -> None:
    """`python -m a2mc_fast.train` learns."""
    short = TOY
    found = accuracy(
        "main job", "demo", end(start(tmp_path / "demo", *(SHORT if short else [])), tmp_path / "demo")
    )
    record(found)
    assert TOY or found.numbers["gain, points"] > 0


def test_equal_bits(record: Recorder, tmp_path: Path) -> None:
    """Two runs, and a third that is stopped in its training phase and resumed, end in the same bits."""
    warm, epochs = sized(("500", "300"), ("40", "4"), ("4", "4"))
    clips = sized("600", "600", "200")
    flags = [
        "demo",
        "--synthetic.clips",
        clips,
        "--bank.warmup-steps",
        warm,
        "--optim.epochs",
        epochs,
        *SMALL,
    ]
    flags += ["--run.eval-every", "0", "--run.log-every", "1", "--precision", "bf16"]
    names = ("one", "two", "stopped")
    runs = {name: start(tmp_path / name, *flags) for name in names}
    metrics, stopped = tmp_path / "stopped" / "metrics.jsonl", runs["stopped"]
    while stopped.poll() is None and not (
        metrics.exists() and metrics.read_bytes().count(b"\n") > int(warm) + 3
    ):
        time.sleep(0.005)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(LIMIT)
    said = (tmp_path / "stopped.txt").read_text()
    assert "stopped after step" in said, f"the run was not stopped on its way:\n{said}"
    for name in names:
        again = start(tmp_path / name, *flags, "--resume") if name == "stopped" else runs[name]
        end(again, tmp_path / name)
    one, two, resumed = (load_file(tmp_path / name / FILE) for name in names)
    differing = {
        what: sum(not torch.equal(tensor, other[name]) for name, tensor in one.items())
        for what, other in (("two runs", two), ("after a resume", resumed))
    }
    for what, count in differing.items():
        record(Record(what="equal bits", case=what, numbers={"tensors": len(one), "that differ": count}))
    assert not any(differing.values()), differing


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ["own", "own-b1"])
def test_real_data(record: Recorder, tmp_path: Path, method: str, seed: int) -> None:
    """Full method and MoCo baseline on a packed file; each run also measures the untrained encoder."""
    if "BENCH_DATA" not in os.environ:
        pytest.fail("BENCH_DATA=FILE names the packed clips")
    data = os.environ["BENCH_DATA"]
    splits = list(Clips.load(data, torch.device("cpu")).splits)
    split = "xsub" if "xsub" in splits else splits[0]
    flags = [method, "--data", data, "--split", split, "--seed", str(seed)]
    if TOY:
        flags += SHORT[2:]
    run = start(tmp_path / "run", *flags)
    record(accuracy(f"{Path(data).stem}, {split}", f"{method}, seed {seed}", end(run, tmp_path / "run")))
