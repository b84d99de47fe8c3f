"""Launch sizes of the kernels: those in use beside others, and beside launches that start late, when the one
before has ended, or early, so that a new chip or compiler can be asked.

`pytest bench/bench_sizes.py -s` times the time steps of a pair of directions, forward and backward, with a
launch per step and with one for all, those of narrow layers by warps, and loss, gradients and ascent in a
row. On a CPU only a rehearsal runs it, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from a2mc_fast.kernels import bank_ascent, bank_pass, gru_plan, gru_small, mixing_contrast
from a2mc_fast.kernels.common import Call, launch_all
from a2mc_fast.kernels.problem import Contrast, Features, Step
from torch import Tensor

from bench.harness import CUDA, DEVICE, TOY, compare, compiled_all, sized
from bench.records import Recorder

pytestmark = pytest.mark.skipif(not (CUDA or TOY), reason="the kernels need a GPU")
FRAMES, DTYPE = sized(64, 64, 2), torch.bfloat16 if CUDA else torch.float32
Sizes = tuple[int, ...]
# direction in time, form, networks, clips, units; the others: rows, units, depth, warps, stages
STEPS: list[tuple[gru_plan.Kind, gru_plan.Form, int, int, int, list[Sizes]]] = [
    ("forward", "fused", 1, 192, 1024, [(64, 64, 64, 8, 6), (128, 32, 64, 8, 7)]),
    ("forward", "fused", 2, 64, 1024, [(64, 32, 128, 4, 3)]),
    ("forward", "resident", 1, 64, 1024, [(64, 16, 128, 4, 4)]),
    ("forward", "resident", 2, 64, 256, [(64, 16, 128, 4, 4)]),
    ("backward", "fused", 1, 64, 1024, [(64, 16, 64, 4, 4)]),
    ("backward", "fused", 1, 192, 1024, [(64, 64, 128, 8, 6)]),
]  # fmt: skip
# of the pass over the bank: clips, rows, depth, warps, stages
PASS: list[Sizes] = [(64, 64, 128, 8, 2), (64, 32, 128, 8, 2), (64, 32, 128, 4, 2), (64, 64, 128, 4, 2)]
STARTS = {"late": False, "early": CUDA}


def started(calls: list[Call], form: Sizes | str | None) -> list[Call]:
    """The launches, starting as a form named in `STARTS` says."""
    if form not in STARTS:
        return calls
    return [call._replace(arguments={**call.arguments, "EARLY": STARTS[form]}) for call in calls]


def numbers(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return (torch.rand(shape, device=DEVICE) / 10 - 0.05).to(dtype)


def name(form: Sizes | str | None) -> str:
    return form if isinstance(form, str) else " ".join(map(str, form or ["ours"]))


def time_steps(
    kind: gru_plan.Kind, how: gru_plan.Form, groups: int, n: int, h: int, tile: Sizes | str | None
) -> Callable[[], object]:
    """A pass over all frames with these launch sizes, or as in use (None), but for how launches start."""
    gates, weight = numbers(groups, FRAMES, n, 2, 3 * h), numbers(groups, 2, 3 * h, h)
    bias, states = numbers(groups, 2, 2, 3 * h, dtype=torch.float32), numbers(groups, FRAMES, n, 2 * h)
    back, inner = weight.transpose(2, 3).contiguous(), numbers(groups, FRAMES, n, 2, h)

    def calls() -> list[Call]:
        if kind == "forward":
            return gru_plan.plan_forward(
                gates, weight, bias, reverse=False, followed=1, slots=FRAMES, precision="tf32",
                form=how,
            ).calls  # fmt: skip
        return gru_plan.plan_backward(
            states, None, back, states, gates, inner, reverse=False, slots=FRAMES, with_bias=n > 64,
            precision="tf32",
        ).calls  # fmt: skip

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(tile, tuple):
                other = gru_plan.Tile(*tile)
                patch.setattr(gru_plan, "_RESIDENT", other)
                patch.setattr(gru_plan, "_TILES", dict.fromkeys(gru_plan._TILES, other))
            launch_all(started(calls(), tile), gates.device)

    return run


@pytest.mark.parametrize("kind, how, groups, n, h, tiles", STEPS)
def test_time_steps(
    record: Recorder, kind: gru_plan.Kind, how: gru_plan.Form, groups: int, n: int, h: int, tiles: list[Sizes]
) -> None:
    n, h = (2, 16) if TOY else (n, h)
    asked = (None, *([] if how == "resident" else STARTS), *tiles)
    forms = {name(tile): time_steps(kind, how, groups, n, h, tile) for tile in asked}
    for form in forms.values():
        form()
    compiled_all()
    case = kind + ", one launch" * (how == "resident") + ", two networks" * (groups == 2)
    record(*compare("launch sizes of time steps", {"N": n, "T": FRAMES, "H": h}, forms, case=case))


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("groups, n, h", [(2, 64, 64), (1, 192, 64), (1, 192, 128)])
def test_narrow_layers(record: Recorder, kind: str, groups: int, n: int, h: int) -> None:
    """All steps in one launch, of the warps in use and of half as many."""
    n, h = (2, 16) if TOY else (n, h)
    gates, weight = numbers(groups, FRAMES, n, 2, 3 * h), numbers(groups, 2, 3 * h, h)
    bias, states = numbers(groups, 2, 2, 3 * h, dtype=torch.float32), numbers(groups, FRAMES, n, 2 * h)
    back, inner = weight.transpose(2, 3).contiguous(), numbers(groups, FRAMES, n, 2, h)
    how: dict[str, Any] = {"reverse": False, "precision": "tf32" if CUDA else "ieee"}

    def run(warps: int | None) -> None:
        if kind == "forward":
            calls = gru_small.plan_small_forward(
                gates, weight, bias, followed=1, slots=FRAMES, **how
            ).calls  # fmt: skip
        else:
            calls = gru_small.plan_small_backward(
                states, None, back, states, gates, inner, with_weights=groups == 1, **how
            ).calls  # fmt: skip
        launch_all([call._replace(num_warps=warps or call.num_warps) for call in calls], gates.device)

    forms = {"ours": lambda: run(None), "4 warps": lambda: run(4)}
    for form in forms.values():
        form()
    compiled_all()
    case = f"{kind}, narrow" + ", two networks" * (groups == 2)
    record(*compare("launch sizes of time steps", {"N": n, "T": FRAMES, "H": h}, forms, case=case))


def test_loss_and_ascent(record: Recorder) -> None:
    n, k, d = sized((64, 16384, 128), (64, 16384, 128), (2, 40, 128))

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, device=DEVICE), dim=1)

    features, rows, mix = Features(*(unit(n) for _ in range(4))), 2 * unit(k), (0.4, 0.3, 0.2, 0.1)
    velocity, place = torch.zeros_like(rows), ("tf32", 128)

    def calls() -> list[Call]:
        """Pass over the bank, combination, and the two launches of the ascent."""
        loss = Contrast(mix, 0.07, normalize=True, climb=0.03)
        first, _, _, sums = mixing_contrast.plan(features, rows, loss)
        return first + bank_ascent.plan(rows, velocity, features, Contrast(mix, 0.03), Step(), sums)[0]

    def run(form: Sizes | str | None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(form, tuple):
                patch.setitem(bank_pass._TILES, place, bank_pass.Tile(*form))
            launch_all(started(calls(), form), rows.device)

    forms = {name(form): lambda form=form: run(form) for form in (None, "late", *PASS)}
    once = calls()
    launch_all(once, rows.device)  # each part alone then reads what those before it left
    for part, own in {"pass": once[:1], "combine": once[1:2], "ascent": once[2:]}.items():
        forms[part] = lambda own=own: launch_all(own, rows.device)
    for form in forms.values():
        form()
    compiled_all()
    record(*compare("launch sizes of loss and ascent", {"N": n, "K": k, "mix": len(mix)}, forms))
