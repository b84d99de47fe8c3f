"""The encoder by fused kernels, in Triton's interpreter, and how a run chooses between them and cuDNN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from a2mc_fast.kernels import common, gru, verify

from a2mc_fast.config import Config, EncoderConfig, preset
from a2mc_fast.data import Clips
from a2mc_fast.encoders import recurrence
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import Recurrence, frozen, weights_held
from a2mc_fast.encoders.recurrence import choose_recurrence
from a2mc_fast.run import checkpoint, snapshot
from a2mc_fast.run.beside import key_rides
from a2mc_fast.run.parts import Parts
from a2mc_fast.trainer import Trainer
from tests.conftest import SMALL

MakeClips = Callable[..., Clips]
CPU = torch.device("cpu")


def encoder(**options: Any) -> BiGRU:
    return BiGRU(SMALL, persons=1, hidden=16, layers=2, **options)


def small(**options: Any) -> Config:
    """A run of toy size."""
    config = preset("demo")
    return replace(
        config,
        views=replace(config.views, frames=4),
        encoder=EncoderConfig(hidden=8, layers=1, projection=16, **options),
        bank=replace(config.bank, size=24, warmup_steps=1),
        optim=replace(config.optim, batch_size=4),
        attack=replace(config.attack, classes=3),
    )


@pytest.mark.parametrize(
    "time_mode, pool",
    [
        ("forward_pair", "last"),
        ("forward_pair", "mean+last"),
        ("bidirectional", "last"),
        ("bidirectional", "mean"),
        ("bidirectional", "mean+last+std"),
    ],
)
def test_the_fused_encoder_is_the_same_encoder(time_mode: str, pool: str) -> None:
    model = encoder(time_mode=time_mode, pool=pool)
    names, state = [*model.state_dict()], {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(8, 4, 3, 5, 1)
    results: dict[str, list[Tensor]] = {}
    for form in ("torch", "fused"):
        model.recurrence = form  # type: ignore[assignment]
        model.load_state_dict(state)
        feature = model(x)
        gradients = torch.autograd.grad(feature.pow(3).sum(), list(model.parameters()))
        with frozen(model):
            leaf = x.clone().requires_grad_()
            (attack,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf)
        with torch.no_grad():
            alone = model(x)
        results[form] = [feature, alone, attack, *gradients]
    assert [*model.state_dict()] == names
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_weights_are_copied_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    make = gru.make_operands

    def counted(*args: Any, backward: bool) -> gru.Operands:
        made.append(backward)
        return make(*args, backward=backward)

    monkeypatch.setattr(gru, "make_operands", counted)
    model = encoder()
    model.recurrence = "fused"
    x = torch.randn(2, 2, 3, 5, 1)
    with weights_held(model):
        with torch.no_grad():
            model(x)
        assert made == [False] * 2  # a copy per layer
        first = model(x)
        assert made == [False] * 2 + [True] * 2
        with frozen(model), torch.no_grad():
            model(x)
        second = model(x)
        assert len(made) == 4 and torch.equal(first, second)
        with torch.no_grad():
            torch._foreach_mul_(list(model.directions.parameters()), 0.5)
        model.weights_changed()
        changed = model(x)
        assert len(made) == 6 and not torch.equal(changed, first)
        # what was computed before the change has its own copies
        first.sum().backward()
    assert model.held is None
    assert torch.equal(model(x), changed) and len(made) == 8


def test_a_run_by_fused_kernels_is_the_run_by_torch(
    make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With weights that move far in a step; once they have, nothing that was made of them is left. That the
    key's pass rides with the attack's changes no bit."""
    states = []
    for form in ("cudnn", "fused", "fused, the key's pass alone"):
        config = small(recurrence=form[:5], pool="mean+last+std", feature_norm=True)
        monkeypatch.setattr("a2mc_fast.run.parts.key_rides", lambda _, rides=form == "fused": rides)
        config = replace(
            config,
            optim=replace(config.optim, lr=1.0, milestones=(), ema=0.5),
        )
        trainer = Trainer(config, make_clips([10, 12, 9] * 8))
        parts = Parts(trainer)
        assert trainer.model.key.encoder.recurrence == ("torch" if form == "cudnn" else "fused")
        left: list[int] = []
        update = trainer.model.update_banks

        def noted(*args: Any, update: Any = update, left: list[int] = left, run: Trainer = trainer) -> Any:
            left.append(len(run.model.query.encoder.held or ()))
            return update(*args)

        trainer.model.update_banks = noted  # type: ignore[method-assign]
        losses = [trainer.step(step)["loss"] for step in range(3)]
        assert left == [0, 0]
        assert parts.ran["recurrent layers"] == ("torch" if form == "cudnn" else "fused")
        states.append({"losses": torch.stack(losses)} | dict(trainer.model.state_dict()))
    # what it was is kept with the run
    checkpoint.write(tmp_path / "one", snapshot.state(trainer, 3, {}))
    assert checkpoint.load(tmp_path / "one").recurrence == "fused"
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(states[2][name], states[1][name]), name


def test_a_cpu_runs_torch_and_says_so_when_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_recurrence(small(), encoder(), CPU, 4) == ("torch", "")
    assert choose_recurrence(small(recurrence="cudnn"), encoder(), CPU, 4) == ("torch", "")
    assert choose_recurrence(small(recurrence="fused"), encoder(), CPU, 4) == ("fused", "")
    monkeypatch.setattr(common, "INTERPRET", False)
    with pytest.raises(ValueError, match=r"--encoder\.recurrence fused needs a GPU: leave it at auto"):
        choose_recurrence(small(recurrence="fused"), encoder(), CPU, 4)
    with pytest.raises(ValueError, match=r"encoder\.recurrence fused is for the BiGRU: leave it at auto"):
        EncoderConfig(name="stgcn", recurrence="fused")


ONE_LAUNCH = "fused kernels with all time steps in one launch"


@pytest.mark.parametrize(
    "wrong, fused, resident, chosen, words",
    [
        ("", 2.0, 2.5, "fused", f"by fused kernels: 2.0 ms of a step, 2.5 by {ONE_LAUNCH}, 3.0 by cuDNN"),
        ("", 2.5, 2.0, "resident", f"by {ONE_LAUNCH}: 2.0 ms of a step, 2.5 by fused kernels, 3.0 by cuDNN"),
        ("resident", 2.0, 1.0, "fused", "recurrent layers by fused kernels: 2.0 ms of a step, 3.0 by cuDNN"),
        ("", 4.0, 5.0, "torch", f"by cuDNN: 3.0 ms of a step, 4.0 by fused kernels, 5.0 by {ONE_LAUNCH}"),
        (
            "both",
            1.0,
            1.0,
            "torch",
            "recurrent layers by cuDNN, because the fused kernels cannot be used here: "
            "a GRU's states is off by 9.0% from float64",
        ),
    ],
)
def test_the_faster_right_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, wrong: str, fused: float, resident: float, chosen: str, words: str
) -> None:
    asked: list[tuple[Any, ...]] = []

    def mismatch(
        device: torch.device, hidden: int, clips: Any, dtype: torch.dtype, *, form: str, **_: Any
    ) -> str:
        asked.append((hidden, clips, dtype, form))
        broken = wrong == "both" or wrong == form
        return "a GRU's states is off by 9.0% from float64" if broken else ""

    times = {"torch": 3.0, "fused": fused, "resident": resident}
    monkeypatch.setattr(verify, "recurrence_mismatch", mismatch)
    monkeypatch.setattr(recurrence, "milliseconds", lambda *args: times[args[-1]])
    config = replace(small(), precision="fp16")
    got, said = choose_recurrence(config, encoder(), torch.device("cuda"), 4)
    assert got == chosen and said.endswith(words)
    kinds = [torch.float16, torch.float32]
    asks = [(16, (4, 12), dtype, form) for form in ("fused", "resident") for dtype in kinds]
    assert asked == [ask for ask in asks if wrong not in ("both", ask[3]) or ask[2] == kinds[0]]


@pytest.mark.parametrize("form", [*get_args(Recurrence), None])
def test_the_key_rides_with_every_form_of_the_kernels(form: Any) -> None:
    def rides(precision: str) -> bool:
        branch = SimpleNamespace(encoder=SimpleNamespace(recurrence=form))
        return key_rides(
            SimpleNamespace(query=branch, key=branch, config=SimpleNamespace(precision=precision))
        )  # type: ignore[arg-type]

    assert rides("bf16") is (form not in ("torch", None)) and not rides("fp16")


OTHERS = "until now it was the other, so from here on the run's last bits are not those it would have had"


@pytest.mark.parametrize(
    "device, before, reason, chosen, words",
    [
        ("cuda", "torch", "", "torch", "recurrent layers by cuDNN, as until now"),
        ("cuda", "fused", "", "fused", "recurrent layers by fused kernels, as until now"),
        ("cuda", "resident", "", "resident", f"recurrent layers by {ONE_LAUNCH}, as until now"),
        ("cuda", "fused", "broken", "torch", f"kernels cannot be used here: broken; {OTHERS}"),
        (
            "cpu",
            "fused",
            "",
            "torch",
            f"by torch, not by fused kernels, which need a GPU and triton; {OTHERS}",
        ),
        ("cpu", "torch", "", "torch", ""),
    ],
)
def test_a_run_that_goes_on_keeps_what_it_had(
    monkeypatch: pytest.MonkeyPatch, device: str, before: Any, reason: str, chosen: str, words: str
) -> None:
    """Whatever is faster there; where it cannot, it says that the bits change."""
    monkeypatch.setattr(verify, "recurrence_mismatch", lambda *_, **__: reason)
    got, note = choose_recurrence(small(), encoder(), torch.device(device), 4, before)
    assert got == chosen and note.endswith(words) and bool(note) == bool(words)


def test_what_is_timed_is_what_a_step_computes() -> None:
    """The key's pass, the attack's and the query's, by both forms, with no trace left."""
    model = encoder()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen: list[tuple[int, bool, bool]] = []
    recur = model.recur

    def noted(sequence: Tensor, dtype: torch.dtype) -> Tensor:
        weight = next(model.directions.parameters())
        seen.append((len(sequence), torch.is_grad_enabled(), weight.requires_grad))
        return recur(sequence, dtype)

    model.recur = noted  # type: ignore[method-assign]
    config = replace(small(), precision="fp32")
    for form in ("torch", "fused"):
        model.recurrence = form  # type: ignore[assignment]
        seen.clear()
        with weights_held(model):
            recurrence.step_passes(config, model, torch.randn(2, 3, 15), torch.randn(6, 3, 15), form)()  # type: ignore[arg-type]
        # by the fused kernels the key's pass rides with the attack's
        alone = [(2, False, True), (2, True, False)] if form == "torch" else []
        assert seen == [*alone, (6, True, True)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
