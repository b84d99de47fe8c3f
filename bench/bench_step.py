"""The whole training step of every encoder: time by phase, clips per second, arithmetic, memory; and the same
step as public code takes it.

`pytest bench/bench_step.py -s` runs on the machine's GPU at the paper's size, or at a size for one CPU core.
The phases are those that the trainer names, read from a profile of launched steps; the step itself is timed
as it trains, captured as a CUDA graph on a GPU. The baseline is a trainer written the way public skeleton
code is: views made clip by clip in numpy, the GRU called frame by frame, every mixed bank stored, a wait for
the device in each step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from a2mc_fast.config import BankConfig, Config, EncoderConfig, LossConfig, RunConfig, demo, preset
from a2mc_fast.data import Clips
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.run.machine import peak_memory
from a2mc_fast.run.parts import Parts
from a2mc_fast.trainer import Trainer
from bench.baselines import feeder_pair, literal_mixing_contrast
from bench.count import parameters_and_macs
from bench.harness import (
    CUDA,
    DEVICE,
    compiled_all,
    copy_bandwidth,
    milliseconds,
    product_rate,
    seconds,
    sized,
    synchronize,
)
from bench.records import Record, Recorder

PHASES = ("views", "attack", "key", "query", "loss", "backward", "optimizer", "bank")
# forward passes that a step costs per clip: key 1; three query views forward and, twice as much, backward;
# the attack forward and, for the input alone, backward
PASSES = 1 + 3 * 3 + 2
ENCODERS = {
    "bigru": EncoderConfig(hidden=sized(1024, 64, 8), layers=sized(3, 1, 1)),
    "stgcn": EncoderConfig(name="stgcn", channels=sized(16, 8, 8)),
    "dsta": EncoderConfig(name="dsta", size="full" if CUDA else "small"),
    "scd": EncoderConfig(name="scd", width=sized(2048, 64, 16)),
}
STEPS = sized(200, 3, 1)


def setting(case: str) -> Config:
    """The paper's run on a GPU; on a CPU narrow encoders, small batches and a small bank. Or preset `own`."""
    builtin = replace(demo().synthetic, clips=1000)
    if case == "own":
        config = replace(preset("own"), data="", synthetic=builtin)
        return config if CUDA else _narrow(config, config.encoder, frames=8, batch=2)
    if CUDA:
        return replace(preset("ntu60-xsub"), data="", synthetic=builtin, encoder=ENCODERS[case])
    recurrent = case == "bigru"
    frames, batch = sized((0, 0), (64, 64) if recurrent else (16, 4), (8, 2))
    paper = replace(demo(), loss=LossConfig(), bank=BankConfig(lr=12.0))
    return _narrow(paper, ENCODERS[case], frames, batch)


def _narrow(config: Config, encoder: EncoderConfig, frames: int, batch: int) -> Config:
    return replace(
        config,
        views=replace(config.views, frames=frames),
        encoder=encoder,
        bank=replace(config.bank, size=1024),
        optim=replace(config.optim, batch_size=batch),
        run=RunConfig(threads=1),
    )


def seconds_per_step(trainer: Trainer, first: int, count: int) -> float:
    """Mean of `count` steps after some that warm up, compile and capture."""
    warm = 5 if CUDA else 1
    for step in range(first, first + warm):
        trainer.step(step)
    return seconds(lambda: [trainer.step(first + warm + step) for step in range(count)]) / count


def phases(trainer: Trainer, first: int, count: int) -> dict[str, float]:
    """Milliseconds per step of every named phase, of steps whose operations the host launches."""
    trainer.captured = lambda body: body
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


def new_trainer(data: Clips, case: str) -> tuple[Trainer, Parts]:
    config = setting(case)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    trainer = Trainer(config, data)
    return trainer, Parts(trainer)


@pytest.mark.parametrize("case", [*ENCODERS, "own"])
def test_step_by_phase(record: Recorder, data: Clips, case: str) -> None:
    trainer, parts = new_trainer(data, case)
    config = trainer.config
    batch, first = config.optim.batch_size, config.warmup_steps
    trainer.step(0)
    trainer.step(first)
    compiled_all()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    warming = seconds_per_step(trainer, 0, min(STEPS, 50))
    seconds_ = seconds_per_step(trainer, first, STEPS)
    with parts.uncompiled():  # else the counting would be compiled, too, and the profile be of what that left
        parameters, macs = parameters_and_macs(trainer.model.query.encoder, config.views.frames)
    rate = 2 * macs * PASSES * batch / seconds_
    limit = product_rate(torch.bfloat16 if CUDA else torch.float32)
    found = Record(
        what="training step",
        case=case,
        sizes={"N": batch, "K": config.bank.size, "T": config.views.frames},
        ms=1e3 * seconds_,
        per_second=batch / seconds_,
        # a CPU process only knows the peak of all it has done
        MiB=peak_memory(trainer.device) / 2**20 if CUDA else None,
        numbers={
            "warm-up step, ms": 1e3 * warming,
            "TFLOP/s": rate / 1e12,
            "share of a large product's rate": rate / limit,
            "a large product's TFLOP/s": limit / 1e12,
            "parameters, millions": parameters / 1e6,
            "GMACs per clip": macs / 1e9,
        },
    )
    record(found)
    found = replace(found, phases=phases(trainer, first, sized(3, 2, 1)))
    record(found)
    print(f"\n{case}: {found.ms:.2f} ms per step, {found.per_second:,.0f} clips/s, {found.sizes}")
    print(f"  {parts.ran}", *parts.notes, sep="\n  ")
    for name, value in found.numbers.items():
        print(f"  {name:<34} {value:10.3f}")
    spent = sum(found.phases.values())
    for name, ms in sorted(found.phases.items(), key=lambda item: -item[1]):
        print(f"  {name:<34} {ms:10.2f} ms  {ms / spent:6.1%}")
    around = 1 - sum(found.phases[name] for name in ("attack", "key", "query", "backward")) / spent
    print(f"  around the encoder: {around:.1%}")


def test_optimizer_and_key_update(record: Recorder) -> None:
    """SGD with momentum and decay, then the key encoder's moving average, over the BiGRU's parameters.

    Fused SGD reads weight, gradient and momentum and writes two of them, the average reads two and writes
    one: 32 bytes per parameter. One kernel for both would still move 28, so it could gain at most 1.14 times.
    """
    sizes = [49_457_580 // sized(1, 16, 4096) // 8] * 8
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

    ms, p20, p80 = milliseconds(step)
    reached = 32 * sum(sizes) / (1e-3 * ms) / copy_bandwidth()
    print(f"\n{sum(sizes) / 1e6:.1f} M parameters: {ms:.3f} ms, {reached:.0%} of a copy's bandwidth")
    numbers = {"share of a copy's bandwidth": reached}
    record(
        Record(
            what="optimizer and key update", sizes={"parameters": sum(sizes)}, ms=ms, p20=p20, p80=p80,
            numbers=numbers,
        )
    )  # fmt: skip


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
        index = self.trainer.schedule.batch(step)
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


def test_against_a_public_style_trainer(record: Recorder, data: Clips) -> None:
    trainer, _ = new_trainer(data, "bigru")
    config, first = trainer.config, trainer.config.warmup_steps
    public, count = PublicTrainer(trainer), sized(3, 3, 1)
    trainer.step(first)
    compiled_all()
    public.step(first)
    ours = seconds_per_step(trainer, first, sized(50, 10, 1))
    theirs = seconds(lambda: [public.step(first + step) for step in range(count)]) / count
    sizes = {"N": config.optim.batch_size, "K": config.bank.size, "T": config.views.frames}
    for form, time in (("ours", ours), ("public", theirs)):
        record(Record(what="whole step and a public trainer's", form=form, sizes=sizes, ms=1e3 * time))
    print(
        f"\nours {1e3 * ours:.1f} ms, public style {1e3 * theirs:.0f} ms per step: {theirs / ours:.1f} times"
    )
