"""The whole training step: time by phase, clips per second, and the same step as public code takes it.

`pytest bench/bench_step.py -s` runs on the machine's GPU, or at a size for two CPU cores. The phases are
those that `Trainer.step` names, read from a profile. The baseline is a trainer written the way public
skeleton code is: views made clip by clip in numpy, the GRU called frame by frame, every mixed bank stored, a
wait for the device in each step.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from a2mc_fast.config import Config, EncoderConfig, RunConfig, demo, preset
from a2mc_fast.data import Clips
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.model import Branch
from a2mc_fast.trainer import Trainer
from bench.baselines import feeder_pair, literal_mixing_contrast

PHASES = ("views", "attack", "key update", "features", "loss", "backward", "optimizer", "bank")
CUDA = torch.cuda.is_available()


def setting() -> Config:
    """The paper's run on a GPU; on a CPU a narrow encoder and a small bank."""
    if CUDA:
        return replace(preset("ntu60-xsub"), data="", synthetic=demo().synthetic)
    config = demo()
    return replace(
        config,
        views=replace(config.views, frames=64, min_frames=64),
        encoder=EncoderConfig(hidden=64, layers=1),
        bank=replace(config.bank, size=1024),
        run=RunConfig(threads=1),
    )


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_per_step(trainer: Trainer, first: int, count: int) -> float:
    """Mean of `count` steps after three that warm up."""
    for step in range(first, first + 3):
        trainer.step(step)
    synchronize()
    start = time.perf_counter()
    for step in range(first + 3, first + 3 + count):
        trainer.step(step)
    synchronize()
    return (time.perf_counter() - start) / count


def phases(trainer: Trainer, first: int, count: int) -> dict[str, float]:
    """Milliseconds per step of every named phase."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=activities) as measured:
        for step in range(first, first + count):
            trainer.step(step)
        synchronize()
    total = {event.key: event for event in measured.key_averages() if event.key in PHASES}
    spent = {name: total[name].device_time_total if CUDA else total[name].cpu_time_total for name in PHASES}
    return {name: micros / 1e3 / count for name, micros in spent.items()}


@pytest.fixture(scope="module")
def data() -> Clips:
    return synthetic_clips(clips=1000, device="cuda" if CUDA else "cpu")


@pytest.fixture
def trainer(data: Clips) -> Trainer:
    config = setting()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return Trainer(config, data)


def test_step_by_phase(benchmark: BenchmarkFixture, trainer: Trainer) -> None:
    first, count = trainer.config.warmup_steps, 20 if CUDA else 10
    seconds = benchmark.pedantic(seconds_per_step, (trainer, first, count), rounds=1)
    table = phases(trainer, first, 5)
    batch = trainer.config.optim.batch_size
    print(f"\n{1e3 * seconds:.1f} ms per step, {batch / seconds:,.0f} clips/s")
    for name, milliseconds in sorted(table.items(), key=lambda item: -item[1]):
        print(f"  {name:<11} {milliseconds:8.2f} ms  {milliseconds / sum(table.values()):6.1%}")
    benchmark.extra_info.update({"milliseconds": 1e3 * seconds, "clips per second": batch / seconds, **table})


class PublicTrainer:
    """One step of the method as public skeleton code writes it. The attack costs it what it costs ours."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model, self.data = trainer, trainer.model, trainer.clips
        self.device = trainer.device
        skeleton = self.data.skeleton
        self.padded = np.zeros(
            (len(self.data), 3, 300, skeleton.num_joints, self.data.num_persons), np.float32
        )
        for item, start, length in zip(
            self.padded, self.data.offsets.tolist(), self.data.lengths.tolist(), strict=True
        ):
            item[:, :length] = self.data.frames[start : start + length].permute(1, 0, 2, 3).cpu().numpy()
        self.random = np.random.default_rng(0)

    def views(self, index: list[int]) -> tuple[Tensor, Tensor]:
        """Two views of every clip, [N, T, V*C*M] each, from the loader to the device."""
        frames = self.trainer.config.views.frames
        pairs = [feeder_pair(self.padded[i], int(self.data.lengths[i]), frames, self.random) for i in index]
        first, second = (
            torch.from_numpy(np.stack(side)).to(self.device) for side in zip(*pairs, strict=True)
        )
        return first, second

    def encode(self, branch: Branch, sequence: Tensor) -> Tensor:
        """The encoder called once per frame with its hidden state carried, then the head."""
        encoder = branch.encoder
        assert isinstance(encoder, BiGRU) and encoder.input_norm is not None
        sequence = encoder.input_norm(sequence.transpose(1, 2)).transpose(1, 2)
        pairs = encoder._pairs()
        states: list[Tensor | None] = [None] * (2 * len(pairs))
        output = sequence[:, :1]
        for frame in range(sequence.shape[1]):
            output = sequence[:, frame : frame + 1]
            for layer, pair in enumerate(pairs):
                halves = []
                for side, gru in enumerate(pair):
                    half, states[2 * layer + side] = gru(output, states[2 * layer + side])
                    halves.append(half)
                output = torch.cat(halves, 2)
        return F.normalize(branch.heads["feature"](output[:, -1]), dim=1)

    def step(self, step: int) -> float:
        """One step; returns the loss, as such code prints it every time."""
        model = self.model
        index = self.trainer.batch(step)
        clips = index.tolist()
        x0, x3 = self.views(clips)
        model.attack(self.trainer.views.whole(index))
        x1, x2 = self.views(clips)
        for slow, fast in zip(model.key.parameters(), model.query.parameters(), strict=True):
            slow.data = 0.999 * slow.data + 0.001 * fast.data
        with torch.no_grad():
            key = self.encode(model.key, x0)
        basic, weak, strong = (self.encode(model.query, x) for x in (x3, x1, x2))
        mix, tau = self.trainer.config.loss.mix, self.trainer.config.loss.temperature
        first, second, third = literal_mixing_contrast(
            key, basic, weak, strong, model.bank().unit(), mix, tau
        )
        loss = first + second + third
        self.trainer.optimizer.zero_grad()
        loss.backward()
        self.trainer.optimizer.step()
        unit = model.bank().unit().requires_grad_()
        basic, weak, strong = basic.detach(), weak.detach(), strong.detach()
        first, second, third = literal_mixing_contrast(key, basic, weak, strong, unit, mix, 0.03)
        (gradient,) = torch.autograd.grad(first + second + third, unit)
        model.bank().rows += 1e-3 * gradient
        return loss.item()


def test_against_a_public_style_trainer(benchmark: BenchmarkFixture, trainer: Trainer) -> None:
    first = trainer.config.warmup_steps
    ours = seconds_per_step(trainer, first, 10)
    public = PublicTrainer(trainer)
    public.step(first)
    synchronize()

    def steps() -> None:
        for step in range(first, first + 3):
            public.step(step)
        synchronize()

    benchmark.pedantic(steps, rounds=1)
    assert benchmark.stats is not None
    theirs = benchmark.stats.stats.median / 3
    print(
        f"\nours {1e3 * ours:.0f} ms, public style {1e3 * theirs:.0f} ms per step: {theirs / ours:.1f} times"
    )
    benchmark.extra_info.update(ours=ours, public_style=theirs, ratio=theirs / ours)
