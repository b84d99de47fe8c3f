"""The training step as a GPU will run it: nothing in it waits for the device or comes from the host, numbers
that are not finite are caught on the device, and levels of a feature meet their banks in pairs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from a2mc_fast.config import BankConfig, Config, EncoderConfig, RunConfig, preset
from a2mc_fast.data import Clips
from a2mc_fast.encoders import build
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.losses import PAPER_MIX, mixing_contrast
from a2mc_fast.model import A2MC
from a2mc_fast.ranks import ALONE, World
from a2mc_fast.run.parts import Parts
from a2mc_fast.trainer import Schedule, Trainer, first_fault
from tests.conftest import SMALL

MakeClips = Callable[..., Clips]


def small(name: str = "demo", **changes: Any) -> Config:
    """A preset at toy size."""
    config = replace(preset(name), **changes)
    return replace(
        config,
        views=replace(config.views, frames=8),
        encoder=EncoderConfig(hidden=8, layers=1, projection=16),
        loss=replace(config.loss, mix=config.loss.mix and PAPER_MIX),
        bank=replace(config.bank, size=24, warmup_steps=2, refresh=0),
        optim=replace(config.optim, batch_size=4),
    )


FUSED = EncoderConfig(hidden=8, layers=2, projection=16, recurrence="fused")


class NoConstants(TorchFunctionMode):
    """Refuses tensors made from Python data, which a CUDA graph would have to fetch from the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in ("tensor", "new_tensor"), f"{name}{args[-1:]} in the step"
        assert name != "as_tensor" or isinstance(args[0], Tensor), f"as_tensor{args} in the step"
        return func(*args, **(kwargs or {}))


class OnTheDevice(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values read by the host, tensors on another device, and shapes
    that depend on values."""

    REFUSED = (
        "_local_scalar_dense",
        "lift_fresh",
        "nonzero",
        "is_nonzero",
        "equal",
        "masked_select",
        "unique",
    )

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.REFUSED), f"{func} in the step"
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                assert leaf.device.type == self.device, f"{func} reads a tensor on {leaf.device}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def elsewhere(make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], Trainer]:
    """A trainer whose every tensor is on the meta device, which has shapes and no values: like a GPU, it is
    not the host, and unlike on a GPU, waiting for a value is an error."""

    class SGD(torch.optim.SGD):  # torch's fused SGD knows no meta tensors
        def __init__(self, *args: Any, fused: bool, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        def step(self, closure: Any = None) -> None:
            assert self.found_inf.device.type == "meta"  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.optim, "SGD", SGD)

    def make(config: Config, world: World = ALONE) -> Trainer:
        clips = make_clips([10, 12, 9] * 8)
        train, test = clips.split("xsub")
        for name in ("frames", "lengths", "labels"):
            setattr(clips, name, getattr(clips, name).to("meta"))
        clips.__post_init__()
        monkeypatch.setattr(clips, "split", lambda name: (train.to("meta"), test.to("meta")))
        classes = replace(config.attack, classes=3)
        trainer = Trainer(replace(config, attack=classes), clips, world)
        Parts(trainer)
        return trainer

    return make


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(run=RunConfig(backend="triton")),
        small("demo-b1"),
        small("demo-b3"),
        small("demo-a3"),
        small(stream="motion"),
        replace(small(), encoder=FUSED),
    ],
    ids=["full", "triton", "b1", "b3", "a3", "motion", "fused"],
)
def test_the_step_stays_on_the_device(config: Config, elsewhere: Callable[[Config], Trainer]) -> None:
    trainer = elsewhere(config)
    # what is written from the host comes before the step proper
    run = trainer._warmup_step, trainer._train_step
    for body in run:
        with NoConstants(), OnTheDevice("meta"):
            values = body()
        assert values["loss"].shape == () and values["loss"].device.type == "meta"


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(run=RunConfig(backend="triton")),
        small("demo-b3"),
    ],
    ids=["torch", "triton", "fifo"],
)
def test_what_ranks_say_in_the_step_stays_on_the_device(
    config: Config, elsewhere: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name: said.append(name))
    monkeypatch.setattr(World, "start_alike", lambda *_: None)
    monkeypatch.setattr(Clips, "identity", "")
    monkeypatch.setattr(World, "any", lambda _, flag: flag)
    trainer = elsewhere(config, World(1, 2, torch.device("meta"), alone=False))
    for body in (trainer._warmup_step, trainer._train_step):
        with NoConstants(), OnTheDevice("meta"):
            values = body()
        assert values["loss"].shape == () and values["loss"].device.type == "meta"
        assert "all_reduce" in said


def test_a_value_read_in_the_step_is_noticed(elsewhere: Callable[[Config], Trainer]) -> None:
    trainer = elsewhere(small())
    update = trainer.model.update_key
    trainer.model.update_key = lambda ema: update(ema) if trainer.schedule.time > 0 else None  # type: ignore[method-assign]
    with (
        pytest.raises((AssertionError, RuntimeError), match=r"in the step|meta tensors"),
        OnTheDevice("meta"),
    ):
        trainer._train_step()


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that a step may change, copied."""
    result = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.query.named_parameters():
        result[f"optimizer.{name}"] = trainer.optimizer.state[parameter]["momentum_buffer"].clone()
    return result


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_weights_stand_still_from_the_first_step_that_is_not_finite(
    where: str, make_clips: MakeClips
) -> None:
    trainer = Trainer(small(), make_clips([10, 12, 9] * 8))
    for step in range(4):
        trainer.step(step)
    assert trainer.fault.tolist() == [-1]
    before = state(trainer)
    if where == "loss":
        with torch.no_grad():
            trainer.clips.frames[:] = float("nan")
    else:
        weight = next(iter(trainer.model.query.parameters()))
        weight.register_hook(lambda gradient: gradient * float("inf"))
    for step in range(4, 7):
        trainer.step(step)
        assert trainer.fault.tolist() == [4]
    after = state(trainer)
    for name, _ in trainer.model.query.named_parameters():
        assert torch.equal(before[f"query.{name}"], after[f"query.{name}"]), name
        assert torch.equal(before[f"optimizer.{name}"], after[f"optimizer.{name}"]), name


class TwoHalves(BiGRU):
    """A feature of three levels: its halves and the whole, contrasted crosswise."""

    @functools.wraps(BiGRU.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        width = self.feature_dim // 2
        self.levels = {"t": slice(0, width), "s": slice(width, 2 * width), "i": slice(None)}

    pairs = (("t", "i"), ("s", "i"), ("i", "t"), ("i", "s"))


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build._ENCODERS, "bigru", TwoHalves)


def test_the_loss_is_summed_over_pairs_of_levels(halves: None) -> None:
    """Each query level against its key level's own bank, as the sum of one loss per pair."""
    model = A2MC(small(), SMALL, 1, 3)
    assert list(model.query.heads) == ["t", "s", "i"] and set(model.banks) == {"i", "t", "s"}
    assert model.main == "i" and model.bank() is model.banks["i"]
    x = [torch.randn(4, 8, 3, 5, 1) for _ in range(4)]
    model.query.eval(), model.key.eval()
    losses, _ = model.losses(model.features(*x))
    with torch.no_grad():
        f0, (f3, f1, f2) = model.key(x[0]), (model.query(v) for v in x[1:])
    expected = [
        mixing_contrast(f0[key], f3[query], f1[query], f2[query], F.normalize(model.bank(key).rows, dim=1))
        for query, key in model.query.encoder.pairs
    ]
    assert len({round(float(part.total), 4) for part in expected}) == 4
    for got, *parts in zip(losses, *expected, strict=True):
        torch.testing.assert_close(got, torch.stack(parts).sum())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_bank_climbs_the_pairs_that_meet_at_it(halves: None, backend: str) -> None:
    """One step of momentum and decay per bank, with the sum of its pairs' gradients."""
    bank = BankConfig(size=24, lr=2.0 * 16384 / 24)
    config = replace(small(), bank=bank)
    model = A2MC(config, SMALL, 1, 3)
    model.backend = backend  # type: ignore[assignment]
    x = [torch.randn(4, 8, 3, 5, 1) for _ in range(4)]
    model.query.eval(), model.key.eval()
    with torch.no_grad():
        f0, (f3, f1, f2) = model.key(x[0]), (model.query(v) for v in x[1:])
    expected = {}
    for level in model.banks:
        rows = model.bank(level).rows.double().requires_grad_()
        unit, total = F.normalize(rows, dim=1), torch.zeros((), dtype=torch.float64)
        for query, key in model.query.encoder.pairs:
            if key == level:
                features = [f.double() for f in (f0[key], f3[query], f1[query], f2[query])]
                total = total + mixing_contrast(*features, unit, temperature=0.03).total
        (gradient,) = torch.autograd.grad(total, rows)
        expected[level] = (rows - 2.0 * (1e-4 * rows - gradient)).detach().float()
    model.update_banks(model.features(*x), {})
    for level, rows in expected.items():
        torch.testing.assert_close(model.bank(level).rows, rows, rtol=1e-4, atol=1e-5)


def test_a_run_with_several_levels_warms_up_and_trains(halves: None, make_clips: MakeClips) -> None:
    trainer = Trainer(small(), make_clips([10, 12, 9] * 8))
    unit = [trainer.model.bank(level).rows[:8].clone() for level in ("t", "s", "i")]
    for step in range(5):
        values = trainer.step(step)
    assert all(value.isfinite() for value in values.values()) and "bank_norm" in values
    rows = [trainer.model.bank(level).rows[:8] for level in ("t", "s", "i")]
    assert not any(torch.equal(a, b) for a, b in zip(unit, rows))
    assert not torch.equal(rows[0], rows[1])


def test_keys_take_the_place_of_the_oldest_rows(make_clips: MakeClips) -> None:
    """After the ascent the next rows of the bank are the first keys of the batch, and the others are not."""
    config = small()
    trainer = Trainer(replace(config, bank=replace(config.bank, refresh=3)), make_clips([12] * 32))
    for step in range(2):
        trainer.step(step)
    start = int(trainer.model.bank().position)
    seen: list[Tensor] = []
    update = trainer.model.update_banks

    def watched(features: Any, sums: Any) -> Any:
        seen.append(features["feature"].key)
        return update(features, sums)

    trainer.model.update_banks = watched  # type: ignore[method-assign]
    trainer.step(2)
    rows = trainer.model.bank().rows
    written = [int(i) % len(rows) for i in range(start, start + 3)]
    torch.testing.assert_close(rows[written], seen[0][:3])
    assert not torch.isclose(rows[(start + 3) % len(rows)], seen[0][3]).all()


def test_the_learning_rate_rises_then_falls_as_a_cosine(make_clips: MakeClips) -> None:
    config = small()
    optim = replace(config.optim, lr=0.4, milestones=(), ramp_steps=3, epochs=3)
    schedule = Schedule(replace(config, optim=optim), make_clips([12] * 32))
    rates = [schedule.learning_rate(step) for step in range(schedule.total_steps)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[3] and rates[-1] < 0.01
    assert rates[3:] == sorted(rates[3:], reverse=True)
    middle = schedule.total_steps // 2
    assert schedule.learning_rate(middle) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize(
    "total, norms, before, found",
    [
        (1.0, [1.0, 2.0], -1, -1), (math.nan, [1.0, 2.0], -1, 7), (1.0, [1.0, math.inf], -1, 7),
        (math.inf, None, -1, 7), (1.0, [1.0, 2.0], 3, 3), (math.nan, [1.0, math.nan], 3, 3),
    ],
)  # fmt: skip
def test_the_first_fault_stays_the_first(
    total: float, norms: list[float] | None, before: int, found: int
) -> None:
    seen = None if norms is None else torch.tensor(norms)
    fault, faulty = first_fault(torch.tensor(total), seen, torch.tensor([before]), torch.tensor(7))
    assert fault.tolist() == [found] and faulty.tolist() == [float(found >= 0)]
