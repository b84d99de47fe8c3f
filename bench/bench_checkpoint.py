"""What saving costs the training: the stall of a save, and the share of an epoch, at the default interval.

`pytest bench/bench_checkpoint.py -s` runs on the machine's GPU at the paper's size, or at the demo's size on
one core. The stall is what the training loop waits for; the thread behind it has a core of its own, or, on a
machine without a free one, takes its processor time from the training. The large state has the size of the
paper's, on either machine.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from a2mc_fast.config import Config, RunConfig, demo, preset
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.run import checkpoint, snapshot
from a2mc_fast.run.log import RunLog
from a2mc_fast.run.parts import Parts
from a2mc_fast.run.saver import Saver
from a2mc_fast.skeleton import NTU25
from a2mc_fast.trainer import Trainer
from bench.harness import CUDA, seconds
from bench.records import Record, Recorder


def setting(out: Path) -> Config:
    """The paper's run on a GPU, the demo on a CPU; both on the built-in set."""
    base = replace(preset("ntu60-xsub"), data="", synthetic=demo().synthetic) if CUDA else demo()
    return replace(base, run=RunConfig(out=str(out), threads=1))


@pytest.fixture
def trainer(tmp_path: Path, one_core: None) -> Trainer:
    """After its warm-up has begun and every buffer exists."""
    config = setting(tmp_path / "run")
    device = "cuda" if CUDA else "cpu"
    made = Trainer(config, synthetic_clips(clips=config.synthetic.clips, device=device))
    Parts(made)
    for step in range(3):
        made.step(config.warmup_steps + step)
    return made


def test_share_of_an_epoch(record: Recorder, trainer: Trainer, tmp_path: Path) -> None:
    """At the default intervals: a save per epoch and a check per log line, against the epoch's steps."""
    config, per_epoch, folder = trainer.config, trainer.schedule.steps_per_epoch, tmp_path / "run"
    median = statistics.median
    folder.mkdir()
    total = trainer.schedule.total_steps
    with RunLog(folder, config, total, None) as log, Saver(folder, before=log.sync) as saver:
        first, values = config.warmup_steps + 3, trainer.step(config.warmup_steps + 2)
        step = median(seconds(trainer.step, first + number) for number in range(per_epoch))
        check = median(seconds(log.check, trainer, values) for _ in range(20))
        saver.save(snapshot.state(trainer, 0, {}))
        stalls, written = [], []
        for number in range(20):
            saver.wait()
            stalls.append(seconds(lambda n: saver.save(snapshot.state(trainer, n, {})), number))
        saver.wait()
        for number in range(20):
            used = time.thread_time()
            checkpoint.write(folder / "x.safetensors", snapshot.state(trainer, number, {}))
            written.append(time.thread_time() - used)
    stall = median(stalls) + check * (1 + per_epoch / config.run.log_every)
    share = stall / (step * per_epoch)
    keep(
        record,
        "saving after every epoch",
        1e3 * median(stalls),
        {
            "steps per epoch": per_epoch,
            "step, ms": 1e3 * step,
            "check, ms": 1e3 * check,
            "thread's processor time, ms": 1e3 * median(written),
            "bytes": (folder / checkpoint.FILE).stat().st_size,
            "share of an epoch": share,
            "share with the thread's processor time": share + median(written) / (step * per_epoch),
        },
    )
    assert share < 0.01


def keep(record: Recorder, what: str, stall: float, numbers: dict[str, float]) -> None:
    """Record and print what a save cost; `stall` in milliseconds."""
    record(Record(what=what, ms=stall, numbers=numbers))
    print(f"\n  {what:<40} {stall:.5g} ms")
    for name, value in numbers.items():
        print(f"  {name:<40} {value:.5g}")


def test_a_large_state(record: Recorder, one_core: None, tmp_path: Path) -> None:
    """The stall of saving 600 MB, against a save in the foreground and against copying alone."""
    device = "cuda" if CUDA else "cpu"
    tensors = {f"model.{i}": torch.randn(1024, 1464, device=device) for i in range(100)}
    state = checkpoint.Checkpoint(
        step=1, config=demo(), skeleton=NTU25, persons=2, classes=1, data="", progress={}, scaler={},
        tensors=tensors,
    )  # fmt: skip
    saver = Saver(tmp_path)
    saver.save(state)
    saver.wait()
    stalls, whole = [], []
    for _ in range(3):
        stalls.append(seconds(saver.save, state))
        whole.append(stalls[-1] + seconds(saver.wait))
    at_once = min(seconds(checkpoint.write, tmp_path / "x.safetensors", state) for _ in range(2))
    copying = min(seconds(lambda: [tensor.cpu().clone() for tensor in tensors.values()]) for _ in range(2))
    keep(
        record,
        "saving a large state",
        1e3 * min(stalls),
        {
            "bytes": (tmp_path / checkpoint.FILE).stat().st_size,
            "until on the disk, ms": 1e3 * min(whole),
            "written at once, ms": 1e3 * at_once,
            "copied into new memory, ms": 1e3 * copying,
        },
    )
    assert min(stalls) < at_once / 3
