"""The whole training step of every encoder: time by phase, clips per second, arithmetic, memory; and the same
step as public code takes it.

`pytest bench/bench_step.py -s` runs on the machine's GPU at the paper's size, or at a size for one CPU core.
The phases are those that the trainer names, read from a profile of launched steps; the step itself is timed
as it trains, captured as a CUDA graph on a GPU. The baseline is a trainer written the way public skeleton
code is: views made clip by clip in numpy, the GRU called frame by frame, every mixed bank stored, a wait for
the device in each step.
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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from a2mc_fast.config import Config, EncoderConfig, RunConfig, demo, preset
from a2mc_fast.data import Clips
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.encoders.count import parameters_and_macs
from a2mc_fast.run.machine import peak_memory
from a2mc_fast.trainer import Trainer
from bench.baselines import feeder_pair, literal_mixing_contrast
from bench.harness import CUDA, DEVICE, copy_bandwidth, milliseconds, product_rate

PHASES = ("views", "attack", "key", "query", "loss", "backward", "optimizer", "bank")
# forward passes that a step costs per clip: key 1; three query views forward and, twice as much, backward;
# the attack forward and, for the input alone, backward
PASSES = 1 + 3 * 3 + 2
ENCODERS = {
    "bigru": EncoderConfig() if CUDA else EncoderConfig(hidden=64, layers=1),
    "stgcn": EncoderConfig(name="stgcn", channels=16 if CUDA else 4),
    "dsta": EncoderConfig(name="dsta", size="full" if CUDA else "small"),
    "scd": EncoderConfig(name="scd", width=2048 if CUDA else 64),
}


def setting(encoder: str) -> Config:
    """The paper's run on a GPU; on a CPU narrow encoders, small batches and a small bank."""
    if CUDA:
        return replace(preset("ntu60-xsub"), data="", synthetic=demo().synthetic, encoder=ENCODERS[encoder])
    config = demo()
    recurrent = encoder == "bigru"
    frames = 64 if recurrent else 16
    return replace(
        config,
        views=replace(config.views, frames=frames, min_frames=frames),
        encoder=ENCODERS[encoder],
        bank=replace(config.bank, size=1024),
        optim=replace(config.optim, batch_size=64 if recurrent else 4),
        run=RunConfig(threads=1),
    )


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_per_step(trainer: Trainer, first: int, count: int) -> float:
    """Mean of `count` steps after some that warm up, compile and capture."""
    warm = 5 if CUDA else 1
    for step in range(first, first + warm):
        trainer.step(step)
    synchronize()
    start = time.perf_counter()
    for step in range(first + warm, first + warm + count):
        trainer.step(step)
    synchronize()
    return (time.perf_counter() - start) / count


def phases(trainer: Trainer, first: int, count: int) -> dict[str, float]:
    """Milliseconds per step of every named phase, of steps whose operations the host launches."""
    trainer.launch_steps()
    trainer.step(first)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    # autograd's own thread would take the backward passes out of their phases
    with torch.autograd.set_multithreading_enabled(False), profile(activities=activities) as measured:
        for step in range(first, first + count):
            trainer.step(step)
        synchronize()
    total = {
        event.key: event
        for event in measured.key_averages()
        if event.key in PHASES and event.device_type == DeviceType.CPU
    }
    spent = {name: total[name].device_time_total if CUDA else total[name].cpu_time_total for name in PHASES}
    return {name: micros / 1e3 / count for name, micros in spent.items()}


@pytest.fixture(scope="module")
def data() -> Clips:
    return synthetic_clips(clips=1000, device=DEVICE)


def new_trainer(data: Clips, encoder: str) -> Trainer:
    config = setting(encoder)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return Trainer(config, data)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_step_by_phase(benchmark: BenchmarkFixture, data: Clips, encoder: str) -> None:
    trainer = new_trainer(data, encoder)
    config = trainer.config
    first, count = config.warmup_steps, 20 if CUDA else 3
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = benchmark.pedantic(seconds_per_step, (trainer, first, count), rounds=1)
    # a CPU process only knows the peak of all it has done
    memory = {"MiB": peak_memory(trainer.device) / 2**20} if CUDA else {}
    table = phases(trainer, first, 5 if CUDA else 2)
    batch = config.optim.batch_size
    parameters, macs = parameters_and_macs(trainer.model.query.encoder, config.views.frames)
    rate = 2 * macs * PASSES * batch / seconds
    limit = product_rate(torch.bfloat16 if CUDA else torch.float32)
    print(
        f"\n{encoder}, {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs per clip, batch {batch}, "
        f"K {config.bank.size}\n{1e3 * seconds:.1f} ms per step, {batch / seconds:,.0f} clips/s, "
        f"{rate / 1e12:.3f} TFLOP/s ({rate / limit:.0%} of a large product's)"
        + "".join(f", {value:,.0f} {unit}" for unit, value in memory.items())
    )
    for name, milliseconds_ in sorted(table.items(), key=lambda item: -item[1]):
        print(f"  {name:<11} {milliseconds_:8.2f} ms  {milliseconds_ / sum(table.values()):6.1%}")
    around = 1 - sum(table[name] for name in ("attack", "key", "query", "backward")) / sum(table.values())
    print(f"  around the encoder: {around:.1%}")
    benchmark.extra_info.update(
        {
            "phases": table,
            "milliseconds": 1e3 * seconds,
            "clips per second": batch / seconds,
            "TFLOP/s": rate / 1e12,
            # of the rate that a large product reaches on this machine
            "MFU": rate / limit,
            "batch": batch,
            **memory,
        }
    )


def test_optimizer_and_key_update(benchmark: BenchmarkFixture) -> None:
    """SGD with momentum and decay, then the key encoder's moving average, over the BiGRU's parameters.

    Fused SGD reads weight, gradient and momentum and writes two of them, the average reads two and writes
    one: 32 bytes per parameter. One kernel for both would still move 28, so it could gain at most 1.14 times.
    """
    sizes = [49_457_580 // (1 if CUDA else 16) // 8] * 8
    weights = [torch.randn(n, device=DEVICE, requires_grad=True) for n in sizes]
    average = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    rate = torch.tensor(0.01, device=DEVICE)
    optimizer.param_groups[0]["lr"] = rate

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(average, weights, 1e-3)

    measured = milliseconds(step)
    reached = 32 * sum(sizes) / (1e-3 * measured.median) / copy_bandwidth()
    print(
        f"\n{sum(sizes) / 1e6:.1f} M parameters: {measured.median:.3f} ms, "
        f"{reached:.0%} of a copy's bandwidth"
    )
    benchmark.extra_info.update({"ms": measured.median, "share of a copy's bandwidth": reached})
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)


class PublicTrainer:
    """One step of the method as public skeleton code writes it. The attack costs it what it costs ours."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model, self.data = trainer, trainer.model, trainer.clips
        self.device, self.lengths = trainer.device, trainer.clips.lengths.tolist()
        skeleton = self.data.skeleton
        self.padded = np.zeros(
            (len(self.data), 3, 300, skeleton.num_joints, self.data.num_persons), np.float32
        )
        for item, start, length in zip(self.padded, self.data.offsets.tolist(), self.lengths, strict=True):
            item[:, :length] = self.data.frames[start : start + length].permute(1, 0, 2, 3).cpu().numpy()
        self.random = np.random.default_rng(0)

    def views(self, index: list[int]) -> tuple[Tensor, Tensor]:
        """Two views of every clip, [N, T, V*C*M] each, from the loader to the device."""
        frames = self.trainer.config.views.frames
        pairs = [feeder_pair(self.padded[i], self.lengths[i], frames, self.random) for i in index]
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
            slow.data.mul_(0.999).add_(fast.data, alpha=0.001)
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


def test_against_a_public_style_trainer(benchmark: BenchmarkFixture, data: Clips) -> None:
    trainer = new_trainer(data, "bigru")
    first = trainer.config.warmup_steps
    ours = seconds_per_step(trainer, first, 20 if CUDA else 10)
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
