"""What only a GPU can show: the captured step equals the launched one, runs repeat to the bit, none waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch._inductor.config

from a2mc_fast.config import BankConfig, Config, EncoderConfig, LossConfig, RunConfig, preset
from a2mc_fast.data import Clips
from a2mc_fast.encoders.bigru import recurrent_dtype
from a2mc_fast.run.parts import Parts
from a2mc_fast.trainer import Trainer

pytestmark = pytest.mark.gpu

MakeClips = Callable[..., Clips]
WARMUP, STEPS = 6, 14  # enough for both phases to be captured and replayed
ENCODERS = {
    # not whichever is faster: two runs might differ
    "bigru": EncoderConfig(hidden=32, layers=2, recurrence="fused"),
    "cudnn": EncoderConfig(hidden=32, layers=2, recurrence="cudnn"),
    "stgcn": EncoderConfig(name="stgcn", channels=4),
    "dsta": EncoderConfig(name="dsta", size="small"),
    "scd": EncoderConfig(name="scd", width=64),
}


def equipped(
    make_clips: MakeClips, encoder: str = "bigru", precision: str = "fp32", **run: str
) -> tuple[Trainer, Parts]:
    config = preset("demo")
    config = replace(
        config,
        precision=precision,  # type: ignore[arg-type]
        views=replace(config.views, frames=16),
        encoder=ENCODERS[encoder],
        loss=LossConfig(),
        bank=BankConfig(size=512, lr=12.0, warmup_steps=WARMUP),
        optim=replace(config.optim, batch_size=16, lr=0.05, milestones=(18,), ramp_steps=0),
        attack=replace(config.attack, classes=4),
        run=RunConfig(**run),  # type: ignore[arg-type]
    )
    made = Trainer(config, on_gpu(make_clips, config))
    return made, Parts(made)


def trainer(make_clips: MakeClips, encoder: str = "bigru", precision: str = "fp32", **run: str) -> Trainer:
    return equipped(make_clips, encoder, precision, **run)[0]


def on_gpu(make_clips: MakeClips, config: Config) -> Clips:
    clips = make_clips([20, 30, 40, 25] * 32, classes=4)
    return Clips.pack(
        clips.frames.permute(0, 3, 2, 1).contiguous(),
        clips.lengths.numpy(),
        clips.labels.numpy(),
        clips.skeleton,
        splits={name: mask.numpy() for name, mask in clips.splits.items()},
        device="cuda",
    )


def losses(run: Trainer) -> list[float]:
    return [run.step(step)["loss"].item() for step in range(STEPS)]


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """What torch compiles of one function in a process is limited."""
    torch.compiler.reset()


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_replayed_steps_equal_launched_ones(
    make_clips: MakeClips, encoder: str, compile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # compiled dropout draws from a generator of its own otherwise
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)
    plain = losses(trainer(make_clips, encoder, compile="off", graph="off", backend="torch"))
    fast = losses(trainer(make_clips, encoder, compile=compile))
    # rounding grows from step to step
    assert fast == pytest.approx(plain, rel=2e-2, abs=1e-3)
    assert fast[:3] == pytest.approx(plain[:3], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_low_precision_follows_full_precision(make_clips: MakeClips, precision: str) -> None:
    assert losses(trainer(make_clips, precision=precision)) == pytest.approx(
        losses(trainer(make_clips)), rel=5e-2
    )


def test_bf16_is_bf16_in_recurrent_layers_and_the_attack_reaches_every_frame(make_clips: MakeClips) -> None:
    dtypes = {"bigru": torch.bfloat16, "cudnn": recurrent_dtype_under(torch.bfloat16)}
    for encoder, supported in dtypes.items():
        run = trainer(make_clips, encoder, "bf16")
        x = run.views.whole(run.schedule.train_index[:8])
        assert run.model.query.feature(x).dtype == supported
        for precision in ("bf16", "fp16"):
            rho = trainer(make_clips, encoder, precision).model.attack(x)
            assert (rho.abs().amax((0, 2, 3, 4)) > 0).all(), (encoder, precision)


def recurrent_dtype_under(dtype: torch.dtype) -> torch.dtype:
    with torch.autocast("cuda", dtype):
        return recurrent_dtype()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_two_runs_give_the_same_bits(make_clips: MakeClips, encoder: str) -> None:
    first, second = (trainer(make_clips, encoder, "bf16") for _ in range(2))
    assert losses(first) == losses(second)
    other = second.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_no_step_waits_for_the_device(make_clips: MakeClips, graph: str) -> None:
    run = trainer(make_clips, graph=graph)
    for step in range(WARMUP + 5):
        run.step(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(WARMUP + 5, STEPS):
            run.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_allocate_nothing(make_clips: MakeClips) -> None:
    run = trainer(make_clips)
    for step in range(WARMUP + 5):
        run.step(step)
    before = torch.cuda.memory_allocated()
    for step in range(WARMUP + 5, STEPS):
        run.step(step)
    assert torch.cuda.memory_allocated() == before


def test_the_kernels_are_verified_and_chosen(make_clips: MakeClips) -> None:
    run, parts = equipped(make_clips)
    assert run.model.backend == "triton", parts.notes
    assert parts.ran["random numbers"] == "Triton kernel", parts.notes


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_recurrent_layers_are_verified_and_timed(
    make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setitem(ENCODERS, "auto", EncoderConfig(hidden=32, layers=2))
    assert " ms of a step, " in equipped(make_clips, "auto", precision)[1].notes[-1]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_nothing_is_refused(make_clips: MakeClips, encoder: str) -> None:
    """Every part is compiled, and the step captured, as a log of a healthy run says."""
    run, parts = equipped(make_clips, encoder, "bf16", compile="on", graph="on")
    losses(run)
    encoders = () if encoder in ("bigru", "cudnn") else ("query encoder", "key encoder")
    small = ("perturbation", "spread of features", "search for faults")
    names = ("views", "losses", *small, *encoders)
    assert [parts.ran[name] for name in names] == ["compiled"] * len(names)
    assert parts.ran["step"] == "captured"


def test_a_step_that_cannot_be_captured_is_launched(
    make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(trainer(make_clips, "stgcn", graph="off"))
    (run, parts), said = equipped(make_clips, "stgcn"), []
    parts.say = said.append
    update = run.model.update_key
    # a capture cannot wait for the device
    monkeypatch.setattr(
        run.model, "update_key", lambda ema: (torch.cuda.current_stream().synchronize(), update(ema))
    )
    assert losses(run) == expected
    assert len(said) == 2 and parts.ran["step"].startswith("launched: "), said
