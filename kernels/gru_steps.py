"""Time steps of a pair of GRUs in Triton: the product with the state's weights and the gates in one kernel.

One program owns some clips and some hidden units of one direction, and with them the units' three gates, so a
step is one product of [clips, H] with three [H, units] and what follows it in registers:

    r, z = sigmoid(a + c),  n = tanh(a + r c),  h <- (1 - z) n + z h      a = W_ih x + b_ih, c = W_hh h + b_hh

The state is carried in float32; operands are of the type of the states, sums are float32. Backwards in time,
with dh the gradient of a step's state, h' the state before it, and q = (dr, dz, dn r) the gradient of c,

    dn = dh (1 - z) (1 - n²),  dz = dh (h' - n) z (1 - z),  dr = dn c r (1 - r),  dh' = dh z + q W_hh

The body is a loop over time steps. A launch of one step needs nothing of its neighbours and runs anywhere:
the next one sees all states of the last.
Direction 1 of a `reverse` pair walks from the last frame to the first; positions are those of the frames.
Legend: G groups, each a pair of directions with weights of its own · T frames · N batch · H hidden units ·
S slots: all T frames, or 2 where a frame is not read again, frame p in slot p mod S.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET, Call, width


class Tile(NamedTuple):
    """Sizes of one kernel."""

    rows: int  # clips per program
    units: int  # hidden units per program
    depth: int  # columns of the product per iteration
    warps: int
    stages: int


# by pass and by clips up to which the sizes are meant, for 16-bit operands; wider ones have half the depth
_TILES = {
    ("forward", 64): Tile(64, 16, 64, 4, 4),
    ("forward", 192): Tile(64, 32, 64, 4, 4),
    ("backward", 64): Tile(64, 16, 64, 4, 4),
    ("backward", 192): Tile(64, 64, 128, 8, 3),
}
# products of full float32 run without tensor cores, from registers
_FULL = Tile(32, 32, 32, 4, 2)


@triton.jit
def tanh(x):
    # of -|x|, so that no exponential overflows
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def tile_of(pointer, stride, n, j, inside):
    """What a program owns of rows with `stride`, [BLOCK_N, BLOCK_H] as float32."""
    return tl.load(pointer + n[:, None] * stride + j[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def finish_step(
    ar, az, an, h, gates_ptr, bias_ptr, states_ptr, inner_ptr, n, j, inside,
    group, direction, frame, T, N, S, H: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A step from the products of the state h [clips, units]; stores what is kept of it -> the next state."""
    bias_ptr += group * 12 * H + direction * 3 * H + j
    of_state = bias_ptr + 6 * H
    known = j < H
    bias_r = tl.load(bias_ptr, mask=known, other=0.0) + tl.load(of_state, mask=known, other=0.0)
    bias_z = tl.load(bias_ptr + H, mask=known, other=0.0) + tl.load(of_state + H, mask=known, other=0.0)
    bias_n = tl.load(bias_ptr + 2 * H, mask=known, other=0.0)
    bias_c = tl.load(of_state + 2 * H, mask=known, other=0.0)
    at_ptr = gates_ptr + ((group * T + frame) * N * 2 + direction) * 3 * H
    r = tl.sigmoid(ar + bias_r[None, :] + tile_of(at_ptr, 6 * H, n, j, inside))
    z = tl.sigmoid(az + bias_z[None, :] + tile_of(at_ptr + H, 6 * H, n, j, inside))
    c = an + bias_c[None, :]
    new = tanh(tile_of(at_ptr + 2 * H, 6 * H, n, j, inside) + bias_n[None, :] + r * c)
    h = new + z * (h - new)
    own = n[:, None] * 2 * H + j[None, :]
    kind = states_ptr.dtype.element_ty
    slot = (group * S + frame % S) * N * 2 * H + direction * H
    tl.store(states_ptr + slot + own, h.to(kind), mask=inside)
    if KEEP:
        out = at_ptr + n[:, None] * 6 * H + j[None, :]
        tl.store(out, r.to(kind), mask=inside)
        tl.store(out + H, z.to(kind), mask=inside)
        tl.store(out + 2 * H, new.to(kind), mask=inside)
        inner = ((group * T + frame) * N * 2 + direction) * H
        tl.store(inner_ptr + inner + own, c.to(kind), mask=inside)
    return h


# a launch per step must not compile anew for its number
@triton.jit(do_not_specialize=["first"])
def forward_kernel(
    gates_ptr,  # [G, T, N, 2, 3H] W_ih x of r, z and n; with KEEP the gates take their places
    weight_ptr,  # [G, 2, 3H, H]
    bias_ptr,  # [G, 2, 2, 3H] float32: of the input, of the state
    states_ptr,  # [G, S, N, 2H]
    inner_ptr,  # [G, T, N, 2, H] c of n, with KEEP
    final_ptr,  # [G, N, 2H] states after the last step
    carry_ptr,  # [G, N, 2, H] float32 states between launches
    first, T, N, S,
    STEPS: tl.constexpr,  # per launch
    H: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group, direction = (tl.program_id(2) // 2).to(tl.int64), tl.program_id(2) % 2
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    inside = n[:, None] < N
    if H % BLOCK_H:
        inside = inside & (j[None, :] < H)
    weight_ptr += (group * 2 + direction) * 3 * H * H + j[None, :] * H + k[:, None]
    carry_ptr += group * N * 2 * H + direction * H
    h = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if first > 0:
        h = tile_of(carry_ptr, 2 * H, n, j, inside)
    for t in range(first, first + STEPS):
        frame, before = t, t - 1
        if REVERSE:
            frame = tl.where(direction == 1, T - 1 - t, frame)
            before = tl.where(direction == 1, T - t, before)
        ar = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        az = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        an = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        # the state before the first step is zero
        rows_ptr = states_ptr + (group * S + before % S) * N * 2 * H + direction * H
        rows_ptr += n[:, None] * 2 * H + k[None, :]
        for begin in range(0, tl.where(t > 0, H, 0), BLOCK_K):
            if H % BLOCK_K == 0 and H % BLOCK_H == 0:
                a = tl.load(rows_ptr + begin, mask=n[:, None] < N, other=0.0, cache_modifier=".cg")
                wr = tl.load(weight_ptr + begin)
                wz = tl.load(weight_ptr + H * H + begin)
                wn = tl.load(weight_ptr + 2 * H * H + begin)
            else:
                here = (n[:, None] < N) & (k[None, :] < H - begin)
                known = (j[None, :] < H) & (k[:, None] < H - begin)
                a = tl.load(rows_ptr + begin, mask=here, other=0.0, cache_modifier=".cg")
                wr = tl.load(weight_ptr + begin, mask=known, other=0.0)
                wz = tl.load(weight_ptr + H * H + begin, mask=known, other=0.0)
                wn = tl.load(weight_ptr + 2 * H * H + begin, mask=known, other=0.0)
            if UPCAST:  # the interpreter's product of bfloat16 is wrong
                a = a.to(tl.float32)
                wr, wz, wn = wr.to(tl.float32), wz.to(tl.float32), wn.to(tl.float32)
            ar = tl.dot(a, wr, ar, input_precision=PRECISION)
            az = tl.dot(a, wz, az, input_precision=PRECISION)
            an = tl.dot(a, wn, an, input_precision=PRECISION)
        h = finish_step(
            ar, az, an, h, gates_ptr, bias_ptr, states_ptr, inner_ptr, n, j, inside,
            group, direction, frame, T, N, S, H, KEEP,
        )  # fmt: skip
    own = n[:, None] * 2 * H + j[None, :]
    if first + STEPS == T:
        out = final_ptr + group * N * 2 * H + direction * H + own
        tl.store(out, h.to(final_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(carry_ptr + own, h, mask=inside)


# a launch per step must not compile anew for its number
@triton.jit(do_not_specialize=["first"])
def backward_kernel(
    grad_ptr,  # [G, T, N, 2H] gradient of the states, with ALL
    grad_final_ptr,  # [G, N, 2H] that of the final ones, with FINAL
    weight_ptr,  # [G, 2, H, 3H] transposed
    states_ptr,  # [G, T, N, 2H]
    gates_ptr,  # [G, T, N, 2, 3H]
    inner_ptr,  # [G, T, N, 2, H]
    input_ptr,  # [G, T, N, 2, 3H] gradients of a
    state_ptr,  # [G, S, N, 2, 3H] and of c
    bias_ptr,  # [G, B, 2, 4H] float32 sums over clips and frames: r, z, n of a, n of c; with BIAS
    carry_ptr,  # [G, N, 2, H] float32 dh between launches
    first,
    T,
    N,
    S,
    STEPS: tl.constexpr,  # per launch
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    ALL: tl.constexpr,
    FINAL: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Step `first` is the one of the last frame, counted backwards in time."""
    group, direction = (tl.program_id(2) // 2).to(tl.int64), tl.program_id(2) % 2
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    inside = n[:, None] < N
    if H % BLOCK_H:
        inside = inside & (j[None, :] < H)
    own = n[:, None] * 2 * H + j[None, :]
    weight_ptr += (group * 2 + direction) * 3 * H * H + j[None, :] * 3 * H + k[:, None]
    carry_ptr += group * N * 2 * H + direction * H
    bias_ptr += ((group * tl.num_programs(1) + tl.program_id(1)) * 2 + direction) * 4 * H + j
    dh = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    sum_r = tl.zeros((BLOCK_H,), tl.float32)
    sum_z = tl.zeros((BLOCK_H,), tl.float32)
    sum_n = tl.zeros((BLOCK_H,), tl.float32)
    sum_c = tl.zeros((BLOCK_H,), tl.float32)
    if first > 0:
        dh = tile_of(carry_ptr, 2 * H, n, j, inside)
        if BIAS:
            sum_r = tl.load(bias_ptr, mask=j < H, other=0.0)
            sum_z = tl.load(bias_ptr + H, mask=j < H, other=0.0)
            sum_n = tl.load(bias_ptr + 2 * H, mask=j < H, other=0.0)
            sum_c = tl.load(bias_ptr + 3 * H, mask=j < H, other=0.0)
    for step in range(first, first + STEPS):
        t = T - 1 - step
        frame, before, after = t, t - 1, t + 1
        if REVERSE:
            frame = tl.where(direction == 1, step, frame)
            before = tl.where(direction == 1, step + 1, before)
            after = tl.where(direction == 1, step - 1, after)
        # nothing comes from behind the last frame
        rows_ptr = state_ptr + ((group * S + after % S) * N * 2 + direction) * 3 * H
        rows_ptr += n[:, None] * 6 * H + k[None, :]
        for begin in range(0, tl.where(step > 0, 3 * H, 0), BLOCK_K):
            if 3 * H % BLOCK_K == 0 and H % BLOCK_H == 0:
                a = tl.load(rows_ptr + begin, mask=n[:, None] < N, other=0.0, cache_modifier=".cg")
                w = tl.load(weight_ptr + begin)
            else:
                here = (n[:, None] < N) & (k[None, :] < 3 * H - begin)
                known = (j[None, :] < H) & (k[:, None] < 3 * H - begin)
                a = tl.load(rows_ptr + begin, mask=here, other=0.0, cache_modifier=".cg")
                w = tl.load(weight_ptr + begin, mask=known, other=0.0)
            if UPCAST:
                a, w = a.to(tl.float32), w.to(tl.float32)
            dh = tl.dot(a, w, dh, input_precision=PRECISION)
        if FINAL:
            out = grad_final_ptr + group * N * 2 * H + direction * H + own
            dh += tl.load(out, mask=inside & (n[:, None] < tl.where(step > 0, 0, N)), other=0.0).to(
                tl.float32
            )
        place = ((group * T + frame) * N * 2 + direction) * H
        if ALL:
            dh += tile_of(grad_ptr + place, 2 * H, n, j, inside)
        r = tile_of(gates_ptr + place * 3, 6 * H, n, j, inside)
        z = tile_of(gates_ptr + place * 3 + H, 6 * H, n, j, inside)
        new = tile_of(gates_ptr + place * 3 + 2 * H, 6 * H, n, j, inside)
        c = tile_of(inner_ptr + place, 2 * H, n, j, inside)
        earlier = ((group * T + before) * N * 2 + direction) * H
        not_first = inside & (n[:, None] < tl.where(t > 0, N, 0))
        h = tile_of(states_ptr + earlier, 2 * H, n, j, not_first)
        dn = dh * (1.0 - z) * (1.0 - new * new)
        dz = dh * (h - new) * z * (1.0 - z)
        dr = dn * c * r * (1.0 - r)
        dh = dh * z
        kind = input_ptr.dtype.element_ty
        gate = n[:, None] * 6 * H + j[None, :]
        out = input_ptr + place * 3 + gate
        tl.store(out, dr.to(kind), mask=inside)
        tl.store(out + H, dz.to(kind), mask=inside)
        tl.store(out + 2 * H, dn.to(kind), mask=inside)
        out = state_ptr + ((group * S + frame % S) * N * 2 + direction) * 3 * H + gate
        tl.store(out, dr.to(kind), mask=inside)
        tl.store(out + H, dz.to(kind), mask=inside)
        tl.store(out + 2 * H, (dn * r).to(kind), mask=inside)
        if BIAS:
            sum_r += tl.sum(dr, 0)
            sum_z += tl.sum(dz, 0)
            sum_n += tl.sum(dn, 0)
            sum_c += tl.sum(dn * r, 0)
    if first + STEPS < T:
        tl.store(carry_ptr + own, dh, mask=inside)
    if BIAS:
        tl.store(bias_ptr, sum_r, mask=j < H)
        tl.store(bias_ptr + H, sum_z, mask=j < H)
        tl.store(bias_ptr + 2 * H, sum_n, mask=j < H)
        tl.store(bias_ptr + 3 * H, sum_c, mask=j < H)


def tile_for(
    kind: Literal["forward", "backward"], n: int, h: int, dtype: torch.dtype, precision: str
) -> Tile:
    """The launch sizes for N clips and H units."""
    tile = _TILES[kind, 64 if n <= 64 else 192]
    if dtype == torch.float32:
        tile = _FULL if precision == "ieee" else tile._replace(depth=tile.depth // 2)
    return tile._replace(
        rows=min(tile.rows, width(n)), units=min(tile.units, width(h)), depth=min(tile.depth, width(h))
    )


def _launches(kernel: Any, arguments: dict[str, Any], tile: Tile, groups: int) -> list[Call]:
    """One launch per time step."""
    grid = (triton.cdiv(arguments["H"], tile.units), triton.cdiv(arguments["N"], tile.rows), 2 * groups)
    common = arguments | {
        "STEPS": 1,
        "UPCAST": INTERPRET and arguments["states_ptr"].dtype == torch.bfloat16,
        "BLOCK_N": tile.rows,
        "BLOCK_H": tile.units,
        "BLOCK_K": tile.depth,
    }
    steps = range(arguments["T"])
    return [Call(kernel, grid, common | {"first": t}, tile.warps, tile.stages) for t in steps]


class Forward(NamedTuple):
    """The launches of a forward pass, and what they fill."""

    calls: list[Call]
    states: Tensor  # [G, T, N, 2H], or with slots=2 those of the last two frames
    final: Tensor  # [G, N, 2H]
    inner: Tensor  # [G, T, N, 2, H], empty unless kept


def plan_forward(
    gates: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool, keep: bool, slots: int, precision: str
) -> Forward:
    """Forward over gates [G, T, N, 2, 3H], the input's products, which the gates replace with `keep`.

    weight [G, 2, 3H, H] of the same type, bias [G, 2, 2, 3H] float32.
    """
    groups, steps, n, _, h = *gates.shape[:4], weight.shape[-1]
    states, final = gates.new_empty(groups, slots, n, 2 * h), gates.new_empty(groups, n, 2 * h)
    inner = gates.new_empty(groups, steps if keep else 0, n, 2, h)
    arguments = {
        "gates_ptr": gates,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "states_ptr": states,
        "inner_ptr": inner,
        "final_ptr": final,
        "carry_ptr": gates.new_empty(groups, n, 2, h, dtype=torch.float32),
        "T": steps,
        "N": n,
        "S": slots,
        "H": h,
        "REVERSE": reverse,
        "KEEP": keep,
        "PRECISION": precision,
    }
    tile = tile_for("forward", n, h, gates.dtype, precision)
    return Forward(_launches(forward_kernel, arguments, tile, groups), states, final, inner)


class Backward(NamedTuple):
    """The launches of a backward pass, and what they fill."""

    calls: list[Call]
    input: Tensor  # [G, T, N, 2, 3H] gradients of W_ih x
    state: Tensor  # [G, T, N, 2, 3H] and of W_hh h, or with slots=2 those of the first two frames
    bias: Tensor  # [G, B, 2, 4H] float32, to be summed over B; empty unless asked for


def plan_backward(
    grad: Tensor | None, grad_final: Tensor | None, weight: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, *, reverse: bool, slots: int, with_bias: bool, precision: str,
) -> Backward:  # fmt: skip
    """Backward from the gradients of all states [G, T, N, 2H], of the final ones [G, N, 2H], or of both.

    weight [G, 2, H, 3H] is transposed; states, gates and inner are what a forward pass with `keep` left.
    """
    groups, steps, n, _, h = *gates.shape[:4], weight.shape[-2]
    tile = tile_for("backward", n, h, gates.dtype, precision)
    blocks = triton.cdiv(n, tile.rows) if with_bias else 0
    of_input, of_state = gates.new_empty(gates.shape), gates.new_empty(groups, slots, n, 2, 3 * h)
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
        "carry_ptr": gates.new_empty(groups, n, 2, h, dtype=torch.float32),
        "T": steps,
        "N": n,
        "S": slots,
        "H": h,
        "REVERSE": reverse,
        "ALL": grad is not None,
        "FINAL": grad_final is not None,
        "BIAS": with_bias,
        "PRECISION": precision,
    }
    return Backward(_launches(backward_kernel, arguments, tile, groups), of_input, of_state, bias)
