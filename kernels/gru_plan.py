"""The launches of a pair of GRUs: their sizes, and what they fill; one per time step, or forward one for all.

Legend: as in `gru_steps`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from .common import INTERPRET, Call, starts_early, width
from .gru_resident import PATIENCE, fault
from .gru_steps import APART, backward_kernel, forward_kernel

Kind = Literal["forward", "backward"]
Form = Literal["fused", "resident"]
"""A launch per time step; or forward all steps in one launch, and backward as the first."""


class Tile(NamedTuple):
    """Sizes of one kernel."""

    rows: int  # clips per program, at a time
    units: int  # hidden units per program
    depth: int  # columns of the product per iteration
    warps: int
    stages: int  # tiles of the product that are on their way at once


# by pass and by clips up to which the sizes are meant, for 16-bit operands; wider ones have half the depth
_TILES = {
    ("forward", 64): Tile(64, 16, 64, 4, 4),
    ("forward", 192): Tile(64, 32, 64, 4, 4),
    ("backward", 64): Tile(64, 16, 128, 4, 4),
    ("backward", 192): Tile(64, 32, 128, 4, 4),
}
_EARLY_TO = 64  # clips: the programs of more leave no room for the next launch's, which then only wait
# products of full float32 run without tensor cores, from registers
_FULL = Tile(32, 32, 32, 4, 2)
# of all steps in one launch: at H 1024 a program's weights take 128 KiB of shared memory
_RESIDENT = Tile(64, 16, 256, 4, 2)
_PROGRAMS = 128  # of one launch, where clips can be divided among more: an H100 has 132 multiprocessors


class Sizes(NamedTuple):
    """How a pass is divided among programs."""

    tile: Tile
    blocks: int  # of clips, among which all are divided


def sizes_for(
    kind: Kind, groups: int, n: int, h: int, dtype: torch.dtype, precision: str, *, resident: bool = False
) -> Sizes:
    """The launch sizes for N clips and H units; `resident`: of a forward pass in one launch."""
    tile = _RESIDENT if resident else _TILES[kind, 64 if n <= 64 else 192]
    if dtype == torch.float32 and not resident:
        tile = _FULL if precision == "ieee" else tile._replace(depth=tile.depth // 2)
    rows, units = min(tile.rows, width(n)), min(tile.units, width(h))
    most = max(1, _PROGRAMS // (2 * groups * triton.cdiv(h, units)))
    while rows > 16 and triton.cdiv(n, rows // 2) <= most:
        rows //= 2
    blocks = triton.cdiv(n, rows)
    tile = tile._replace(rows=rows, units=units, depth=min(tile.depth, width(h)))
    return Sizes(tile, min(blocks, most) if resident else blocks)


def _arguments(arguments: dict[str, Any], tile: Tile) -> dict[str, Any]:
    """Those that both kernels share beside their own."""
    (groups, steps, n, _, _), h, states = (
        arguments["gates_ptr"].shape,
        arguments["H"],
        arguments["states_ptr"],
    )
    return arguments | {
        "carry_ptr": states.new_empty(groups, n, 2, h, dtype=torch.float32),
        "T": steps,
        "N": n,
        "UPCAST": INTERPRET and states.dtype == torch.bfloat16,
        "BLOCK_N": tile.rows,
        "BLOCK_H": tile.units,
        "BLOCK_K": tile.depth,
        "EARLY": n <= _EARLY_TO and starts_early(states.device) and not arguments.get("RESIDENT"),
    }


class Forward(NamedTuple):
    """The launches of a forward pass, and what they fill."""

    calls: list[Call]
    states: Tensor  # [G, T, N, 2H], or with slots=2 those of the last two frames
    final: Tensor  # [G, N, 2H]
    inner: Tensor  # [P, T, N, 2, H]


def plan_forward(
    gates: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool, followed: int, slots: int, precision: str,
    form: Form = "fused", apart: bool = False,
) -> Forward:  # fmt: skip
    """Forward over gates [G, T, N, 2, 3H], the input's products, which the gates replace in the groups
    `followed`. Those of the form resident are one launch, or one for each group where they run `apart`.

    weight [G, 2, 3H, H] of the same type, bias [G, 2, 2, 3H] float32.
    """
    groups, steps, n, _, h = *gates.shape[:4], weight.shape[-1]
    states, final = gates.new_empty(groups, slots, n, 2 * h), gates.new_empty(groups, n, 2 * h)
    inner = gates.new_empty(followed, steps, n, 2, h)
    each, resident = 1 if apart else groups, form == "resident"
    tile, blocks = sizes_for("forward", each, n, h, gates.dtype, precision, resident=resident)
    counters = 2 * groups, blocks, APART.value
    arguments = _arguments(
        {
            "gates_ptr": gates,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "states_ptr": states,
            "inner_ptr": inner,
            "final_ptr": final,
            "counter_ptr": gates.new_zeros(*counters, dtype=torch.int32) if resident else gates,
            "fault_ptr": fault(gates.device) if resident else gates,
            "patience": PATIENCE,
            "S": slots,
            "H": h,
            "REVERSE": reverse,
            "FOLLOWED": followed,
            "RESIDENT": resident,
            "PRECISION": precision,
            "STEPS": steps if resident else 1,
            "TOGETHER": tile.stages if resident else 1,
        },
        tile,
    )
    starts = [(t, 0) for t in range(steps)]
    if resident:
        starts = [(0, 2 * group) for group in range(0, groups, each)]
    call = Call(
        forward_kernel, (triton.cdiv(h, tile.units), blocks, 2 * each), arguments, tile.warps,
        1 if resident else tile.stages, cooperative=resident,
    )  # fmt: skip
    calls = [call._replace(arguments=arguments | {"step": step, "origin": origin}) for step, origin in starts]
    return Forward(calls, states, final, inner)


class Backward(NamedTuple):
    """The launches of a backward pass, and what they fill."""

    calls: list[Call]
    input: Tensor  # [G, T, N, 2, 3H] gradients of W_ih x
    state: Tensor  # [G, T, N, 2, 3H] and of W_hh h, or with slots=2 those of the first two frames
    bias: Tensor  # [G, blocks, 2, 4H] float32, to be summed over the blocks; empty unless asked for


def plan_backward(
    grad: Tensor | None, grad_final: Tensor | None, weight: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, *, reverse: bool, slots: int, with_bias: bool, precision: str,
) -> Backward:  # fmt: skip
    """Backward from the gradients of all states [G, T, N, 2H], of the final ones [G, N, 2H], or of both.

    weight [G, 2, H, 3H] is transposed; states, gates and inner are what a forward pass left of the groups it
    was told to follow.
    """
    groups, steps, n, _, h = *gates.shape[:4], weight.shape[-2]
    tile, blocks = sizes_for("backward", groups, n, h, gates.dtype, precision)
    of_input, of_state = gates.new_empty(gates.shape), gates.new_empty(groups, slots, n, 2, 3 * h)
    bias = gates.new_empty(groups, blocks if with_bias else 0, 2, 4 * h, dtype=torch.float32)
    arguments = _arguments(
        {
            "grad_ptr": states if grad is None else grad,
            "grad_final_ptr": states if grad_final is None else grad_final,
            "weight_ptr": weight,
            "states_ptr": states,
            "gates_ptr": gates,
            "inner_ptr": inner,
            "input_ptr": of_input,
            "state_ptr": of_state,
            "bias_ptr": bias,
            "S": slots,
            "H": h,
            "REVERSE": reverse,
            "ALL": grad is not None,
            "FINAL": grad_final is not None,
            "BIAS": with_bias,
            "PRECISION": precision,
        },
        tile,
    )
    grid = (triton.cdiv(h, tile.units), blocks, 2 * groups)
    calls = [
        Call(backward_kernel, grid, arguments | {"step": step}, tile.warps, tile.stages)
        for step in range(steps)
    ]
    return Backward(calls, of_input, of_state, bias)
