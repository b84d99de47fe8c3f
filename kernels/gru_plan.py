"""The launches of a pair of GRUs: their sizes, and what they fill; one per time step, or one for all.

Legend: as in `gru_steps`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from .common import INTERPRET, Call, width
from .gru_resident import PATIENCE, fault
from .gru_steps import APART, backward_kernel, forward_kernel

Kind = Literal["forward", "backward"]


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
    ("backward", 64): Tile(64, 16, 64, 4, 4),
    ("backward", 192): Tile(64, 64, 128, 8, 3),
}
# products of full float32 run without tensor cores, from registers
_FULL = Tile(32, 32, 32, 4, 2)
# of all steps in one launch: at H 1024 a program's weights take 128 and 192 KiB of shared memory
_RESIDENT = {"forward": Tile(64, 16, 128, 4, 2), "backward": Tile(32, 32, 128, 8, 2)}
_PROGRAMS = 128  # of one launch, where clips can be divided among more: an H100 has 132 multiprocessors


class Sizes(NamedTuple):
    """How a pass is divided among programs."""

    tile: Tile
    blocks: int  # of clips, among which all are divided


def sizes_for(
    kind: Kind, groups: int, n: int, h: int, dtype: torch.dtype, precision: str, resident: bool
) -> Sizes:
    """The launch sizes for N clips and H units."""
    tile = _RESIDENT[kind] if resident else _TILES[kind, 64 if n <= 64 else 192]
    if dtype == torch.float32 and not resident:
        tile = _FULL if precision == "ieee" else tile._replace(depth=tile.depth // 2)
    tile = tile._replace(
        rows=min(tile.rows, width(n)), units=min(tile.units, width(h)), depth=min(tile.depth, width(h))
    )
    blocks = triton.cdiv(n, tile.rows)
    if resident:
        blocks = min(blocks, max(1, _PROGRAMS // (2 * groups * triton.cdiv(h, tile.units))))
    return Sizes(tile, blocks)


def _launches(
    kernel: Any, arguments: dict[str, Any], sizes: Sizes, resident: bool, apart: bool = False
) -> list[Call]:
    """One launch per time step; or one for all steps, of all groups or, `apart`, of each."""
    (groups, steps, n, _, _), h = arguments["gates_ptr"].shape, arguments["H"]
    tile, states = sizes.tile, arguments["states_ptr"]
    grid = (triton.cdiv(h, tile.units), sizes.blocks, 2 * groups)
    carry = states.new_empty(groups, n, 2, h, dtype=torch.float32)
    common = arguments | {
        "carry_ptr": carry,
        "counter_ptr": carry,
        "fault_ptr": carry,
        "T": steps,
        "N": n,
        "patience": PATIENCE,
        "STEPS": 1,
        "RESIDENT": resident,
        "UPCAST": INTERPRET and states.dtype == torch.bfloat16,
        "BLOCK_N": tile.rows,
        "BLOCK_H": tile.units,
        "BLOCK_K": tile.depth,
        "TOGETHER": tile.stages if resident else 1,
    }
    if not resident:
        return [Call(kernel, grid, common | {"first": t}, tile.warps, tile.stages) for t in range(steps)]
    common |= {
        "counter_ptr": states.new_zeros(2 * groups, sizes.blocks, APART.value, dtype=torch.int32),
        "fault_ptr": fault(states.device),
        "STEPS": steps,
    }
    if not apart:
        return [Call(kernel, grid, common | {"first": 0}, tile.warps, 1, cooperative=True)]
    grid = (*grid[:2], 2)
    each = [common | {"first": 0, "origin": 2 * group} for group in range(groups)]
    return [Call(kernel, grid, one, tile.warps, 1, cooperative=True) for one in each]


class Forward(NamedTuple):
    """The launches of a forward pass, and what they fill."""

    calls: list[Call]
    states: Tensor  # [G, T, N, 2H], or with slots=2 those of the last two frames
    final: Tensor  # [G, N, 2H]
    inner: Tensor  # [P, T, N, 2, H]


def plan_forward(
    gates: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool, followed: int, slots: int, precision: str,
    resident: bool = False, apart: bool = False,
) -> Forward:  # fmt: skip
    """Forward over gates [G, T, N, 2, 3H], the input's products, which the gates replace in the groups
    `followed`. `resident`: all steps in one launch, or in one for each group where the groups run `apart`.

    weight [G, 2, 3H, H] of the same type, bias [G, 2, 2, 3H] float32.
    """
    groups, steps, n, _, h = *gates.shape[:4], weight.shape[-1]
    states, final = gates.new_empty(groups, slots, n, 2 * h), gates.new_empty(groups, n, 2 * h)
    inner = gates.new_empty(followed, steps, n, 2, h)
    arguments = {
        "gates_ptr": gates,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "states_ptr": states,
        "inner_ptr": inner,
        "final_ptr": final,
        "S": slots,
        "H": h,
        "REVERSE": reverse,
        "FOLLOWED": followed,
        "PRECISION": precision,
        "origin": 0,
    }
    sizes = sizes_for("forward", 1 if apart else groups, n, h, gates.dtype, precision, resident)
    return Forward(_launches(forward_kernel, arguments, sizes, resident, apart), states, final, inner)


class Backward(NamedTuple):
    """The launches of a backward pass, and what they fill."""

    calls: list[Call]
    input: Tensor  # [G, T, N, 2, 3H] gradients of W_ih x
    state: Tensor  # [G, T, N, 2, 3H] and of W_hh h, or with slots=2 those of the first two frames
    bias: Tensor  # [G, blocks, 2, 4H] float32, to be summed over the blocks; empty unless asked for


def plan_backward(
    grad: Tensor | None, grad_final: Tensor | None, weight: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, *, reverse: bool, slots: int, with_bias: bool, precision: str, resident: bool = False,
) -> Backward:  # fmt: skip
    """Backward from the gradients of all states [G, T, N, 2H], of the final ones [G, N, 2H], or of both.

    weight [G, 2, H, 3H] is transposed; states, gates and inner are what a forward pass left of the groups it
    was told to follow.
    """
    groups, _, n, _, h = *gates.shape[:4], weight.shape[-2]
    sizes = sizes_for("backward", groups, n, h, gates.dtype, precision, resident)
    of_input, of_state = gates.new_empty(gates.shape), gates.new_empty(groups, slots, n, 2, 3 * h)
    blocks = sizes.blocks if with_bias else 0
    bias = gates.new_empty(groups, blocks, 2, 4 * h, dtype=torch.float32)
    arguments = {
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
    }
    return Backward(_launches(backward_kernel, arguments, sizes, resident), of_input, of_state, bias)
