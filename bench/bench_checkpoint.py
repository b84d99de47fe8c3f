"""What saving costs the training: the stall of a save, and the share of an epoch, at the default interval.

`pytest bench/bench_checkpoint.py -s` runs on the machine's GPU at the paper's size, or at the demo's size for
two CPU cores. The share is that of an epoch that ends with a save: its stall, and the check at each log line.
Epochs with and without them also run in turn, for the processor time of all threads. The
large state has the size of the paper's, on either machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from a2mc_fast import checkpoint
from a2mc_fast.config import Config, RunConfig, demo, preset
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.runlog import RunLog
from a2mc_fast.saver import Saver
from a2mc_fast.trainer import Trainer

CUDA = torch.cuda.is_available()


def setting(out: Path) -> Config:
    """The paper's run on a GPU, the demo on a CPU; both on the built-in set."""
    base = replace(preset("ntu60-xsub"), data="", synthetic=demo().synthetic) if CUDA else demo()
    return replace(base, run=RunConfig(out=str(out), threads=1, progress=False))


@pytest.fixture
def one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer(tmp_path: Path, one_core: None) -> Trainer:
    """After its warm-up has begun and every buffer exists."""
    config = setting(tmp_path / "run")
    device = "cuda" if CUDA else "cpu"
    made = Trainer(config, synthetic_clips(clips=config.synthetic.clips, device=device))
    for step in range(3):
        made.step(config.warmup_steps + step)
    return made


def seconds(work: object, *args: object) -> float:
    """Wall time of a call, the device included."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(*args)  # type: ignore[operator]
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def test_share_of_an_epoch(benchmark: BenchmarkFixture, trainer: Trainer, tmp_path: Path) -> None:
    """Epochs with and without saving in turn: what the guards, the save and the thread behind it cost."""
    config, per_epoch = trainer.config, trainer.steps_per_epoch
    first, epochs = config.warmup_steps + 3, 6

    def epoch(number: int, log: RunLog, saver: Saver | None) -> None:
        values: dict[str, Tensor] = {}
        for step in range(first + number * per_epoch, first + (number + 1) * per_epoch):
            values = trainer.step(step)
            if saver and step % config.run.log_every == 0:
                log.check(trainer, values)
            elif step % config.run.log_every == 0:
                torch.stack(list(values.values())).tolist()  # the log's own read, of which the check is part
        if saver:
            log.check(trainer, values)
            saver.save(trainer.state(step + 1, {"seconds": 0.0}))

    folder = tmp_path / "run"
    with RunLog(folder, config, trainer.total_steps, None) as log, Saver(folder, before=log.sync) as saver:
        saver.save(trainer.state(0, {}))
        saver.wait()
        plain: list[tuple[float, float]] = []  # elapsed seconds, processor seconds
        saved: list[tuple[float, float]] = []
        for number in range(epochs):
            order = ((plain, None), (saved, saver))
            for times, how in order if number % 2 else order[::-1]:
                used = time.process_time()
                took = seconds(epoch, number, log, how)
                saver.wait()
                times.append((took, time.process_time() - used))
        stalls = []
        for number in range(20):
            saver.wait()
            state = trainer.state(number, {"seconds": 0.0})
            stalls.append(seconds(saver.save, state))
        check = statistics.median(seconds(log.check, trainer, trainer.step(first)) for _ in range(9))
        # the default: one save per epoch, one check per log line
        cost = statistics.median(stalls) + check * (1 + per_epoch / config.run.log_every)
        elapsed = statistics.median(p[0] for p in plain)
        processor = statistics.median((s[1] - p[1]) / p[1] for s, p in zip(saved, plain))
        share = cost / elapsed
        benchmark.pedantic(lambda: saver.save(trainer.state(1, {})), setup=saver.wait, rounds=20)
    benchmark.extra_info.update(
        {
            "steps per epoch": per_epoch,
            "milliseconds per step": 1e3 * elapsed / per_epoch,
            "stall of a save, milliseconds": 1e3 * statistics.median(stalls),
            "share of an epoch": share,
            "processor time more, the thread's included": processor,
            "check, milliseconds": 1e3 * check,
            "bytes": (folder / checkpoint.FILE).stat().st_size,
        }
    )
    for name, value in benchmark.extra_info.items():
        print(f"\n  {name:<44} {value:.5g}", end="")
    print()
    assert share < 0.01


def test_a_large_state(benchmark: BenchmarkFixture, one_core: None, tmp_path: Path) -> None:
    """The stall of saving 600 MB, against a save in the foreground and against copying alone."""
    device = "cuda" if CUDA else "cpu"
    tensors = {f"model.{i}": torch.randn(1024, 1464, device=device) for i in range(100)}
    state = checkpoint.State({"step": 1}, tensors)
    saver = Saver(tmp_path)
    saver.save(state)
    saver.wait()
    stalls, whole = [], []
    for _ in range(3):
        stalls.append(seconds(saver.save, state))
        whole.append(stalls[-1] + seconds(saver.wait))
    at_once = min(seconds(checkpoint.write, tmp_path / "x.safetensors", state) for _ in range(2))
    copying = min(seconds(lambda: [tensor.cpu().clone() for tensor in tensors.values()]) for _ in range(2))
    benchmark.pedantic(lambda: saver.save(state), setup=saver.wait, rounds=3)
    saver.wait()
    benchmark.extra_info.update(
        {
            "bytes": (tmp_path / checkpoint.FILE).stat().st_size,
            "stall, seconds": min(stalls),
            "until on the disk, seconds": min(whole),
            "written at once, seconds": at_once,
            "copied into new memory, seconds": copying,
        }
    )
    for name, value in benchmark.extra_info.items():
        print(f"\n  {name:<44} {value:.5g}", end="")
    print()
    assert min(stalls) < at_once / 3
