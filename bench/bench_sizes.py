"""Launch sizes of the kernels: those in use beside others, and beside launches that start when the one before
has ended, so that a new chip or compiler can be asked.

`pytest bench/bench_sizes.py -s` times the time steps of a pair of directions, forward and backward, with a
launch per step and with one for all, and loss, gradients and ascent in a row. On a CPU only a rehearsal runs
it, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from a2mc_fast.kernels import bank_ascent, bank_pass, gru_plan, mixing_contrast
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
    ("forward", "resident", 1, 64, 1024, [(64, 16, 256, 4, 2)]),
    ("forward", "resident", 2, 64, 256, [(64, 16, 256, 4, 2)]),
    ("backward", "fused", 1, 64, 1024, [(64, 16, 64, 4, 4)]),
    ("backward", "fused", 1, 192, 1024, [(64, 64, 128, 8, 6), (128, 32, 128, 8, 5)]),
]  # fmt: skip
ASCENT: list[Sizes] = [(64, 32, 128, 8, 1), (64, 32, 128, 4, 1)]
LATE: Sizes = ()  # those in use, without an early start


_options = Call.options.fget


def late_options(call: Call) -> dict[str, Any]:
    assert _options
    return {**_options(call), "launch_pdl": False}


def numbers(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return (torch.rand(shape, device=DEVICE) / 10 - 0.05).to(dtype)


def name(tile: Sizes | None) -> str:
    return "ours" if tile is None else " ".join(map(str, tile)) or "late"


def time_steps(
    kind: gru_plan.Kind, how: gru_plan.Form, groups: int, n: int, h: int, tile: Sizes | None
) -> Callable[[], object]:
    """A pass over all frames with these launch sizes; None: as in use."""
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
            if tile == LATE:
                patch.setattr(Call, "options", property(late_options))
            elif tile:
                patch.setattr(gru_plan, "_RESIDENT", gru_plan.Tile(*tile))
                patch.setattr(gru_plan, "_TILES", dict.fromkeys(gru_plan._TILES, gru_plan.Tile(*tile)))
            launch_all(calls(), gates.device)

    return run


@pytest.mark.parametrize("kind, how, groups, n, h, tiles", STEPS)
def test_time_steps(
    record: Recorder, kind: gru_plan.Kind, how: gru_plan.Form, groups: int, n: int, h: int, tiles: list[Sizes]
) -> None:
    n, h = (2, 16) if TOY else (n, h)
    asked = (None, *([] if how == "resident" else [LATE]), *tiles)
    forms = {name(tile): time_steps(kind, how, groups, n, h, tile) for tile in asked}
    for form in forms.values():
        form()
    compiled_all()
    case = kind + ", one launch" * (how == "resident") + ", two networks" * (groups == 2)
    record(*compare("launch sizes of time steps", {"N": n, "T": FRAMES, "H": h}, forms, case=case))


def test_loss_and_ascent(record: Recorder) -> None:
    n, k, d = sized((64, 16384, 128), (64, 16384, 128), (2, 40, 128))

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, device=DEVICE), dim=1)

    features, rows, mix = Features(*(unit(n) for _ in range(4))), 2 * unit(k), (0.4, 0.3, 0.2, 0.1)
    velocity, place = torch.zeros_like(rows), ("tf32", 128)

    def run(tile: Sizes | None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if tile == LATE:
                patch.setattr(Call, "options", property(late_options))
            elif tile:
                patch.setitem(bank_ascent._TILES, place, bank_pass.Tile(*tile))
            loss = Contrast(mix, 0.07, normalize=True, climb=0.03)
            calls, _, _, sums = mixing_contrast.plan(features, rows, loss)
            ascent, _ = bank_ascent.plan(rows, velocity, features, Contrast(mix, 0.03), Step(), sums)
            launch_all([*calls, *ascent], rows.device)

    forms = {name(tile): lambda tile=tile: run(tile) for tile in (None, LATE, *ASCENT)}
    for form in forms.values():
        form()
    compiled_all()
    record(*compare("launch sizes of the ascent", {"N": n, "K": k, "mix": len(mix)}, forms))
