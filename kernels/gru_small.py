"""All time steps of a narrow pair of GRUs in one launch, forward or backward, in Triton.

Up to `most_units` hidden units one program carries all of them through all steps, so that it waits for no
other: its clips' state stays in registers and the weights on the chip, and what the next step reads is on its
way while a step is computed. The formulas are those of `gru_steps`, and so is the legend.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET, Call, starts_early, wait_for_the_last, width
from .gru_plan import Backward, Forward
from .gru_steps import tanh, weights_of

_ROWS = 16  # clips per program: the fewest that a product takes, for all that counts is how long a step takes
_WARPS = 8


def most_units(dtype: torch.dtype, precision: str) -> int:
    """Hidden units up to which these kernels hold the weights: products of full float32 run without tensor
    cores, from more registers than there are."""
    if dtype == torch.float32 and precision == "ieee":
        return 128 if INTERPRET else 0
    return 256 // dtype.itemsize


@triton.jit
def read(pointer, inside):
    """A tile that a later step uses; as stored, for it waits in registers."""
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def operand(x, like, UPCAST: tl.constexpr):
    """A float32 tile as a product's left side, rounded as if it had been stored."""
    rounded = x.to(like)
    return rounded.to(tl.float32) if UPCAST else rounded


@triton.jit
def small_forward_kernel(
    gates_ptr,  # [G, T, N, 2, 3H] W_ih x of r, z and n; in groups that are followed the gates replace them
    weight_ptr,  # [G, 2, 3H, H]
    bias_ptr,  # [G, 2, 2, 3H] float32: of the input, of the state
    states_ptr,  # [G, S, N, 2H]
    inner_ptr,  # [P, T, N, 2, H] c of n
    final_ptr,  # [G, N, 2H] states after the last step
    T, N, S,
    H: tl.constexpr, REVERSE: tl.constexpr, FOLLOWED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_last(EARLY)
    pair = tl.program_id(1)
    group, direction = (pair // 2).to(tl.int64), pair % 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H)
    inside = (n[:, None] < N) & (j[None, :] < H)
    known = j[None, :] < H
    kind = states_ptr.dtype.element_ty
    weight_ptr += pair.to(tl.int64) * 3 * H * H + j[None, :] * H + k[:, None]
    wr = weights_of(weight_ptr, 0, k, known, H, False, UPCAST)
    wz = weights_of(weight_ptr + H * H, 0, k, known, H, False, UPCAST)
    wn = weights_of(weight_ptr + 2 * H * H, 0, k, known, H, False, UPCAST)
    bias_ptr += group * 12 * H + direction * 3 * H + j
    of_state = bias_ptr + 6 * H
    bias_r = tl.load(bias_ptr, mask=j < H, other=0.0) + tl.load(of_state, mask=j < H, other=0.0)
    bias_z = tl.load(bias_ptr + H, mask=j < H, other=0.0) + tl.load(of_state + H, mask=j < H, other=0.0)
    bias_n = tl.load(bias_ptr + 2 * H, mask=j < H, other=0.0)
    bias_c = tl.load(of_state + 2 * H, mask=j < H, other=0.0)

    frame = 0
    ahead = 1
    if REVERSE:
        frame = tl.where(direction == 1, T - 1, 0)
        ahead = tl.where(direction == 1, -1, 1)
    gate = n[:, None] * 6 * H + direction * 3 * H + j[None, :]
    own = n[:, None] * 2 * H + direction * H + j[None, :]
    at = gates_ptr + (group * T + frame) * N * 6 * H
    input_r, input_z, input_n = (
        read(at + gate, inside),
        read(at + H + gate, inside),
        read(at + 2 * H + gate, inside),
    )
    h = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for t in range(T):
        # the last step reads its own again
        next_frame = tl.where(t < T - 1, frame + ahead, frame)
        then = gates_ptr + (group * T + next_frame) * N * 6 * H
        next_r = read(then + gate, inside)
        next_z = read(then + H + gate, inside)
        next_n = read(then + 2 * H + gate, inside)
        a = operand(h, kind, UPCAST)
        r = tl.sigmoid(tl.dot(a, wr, input_precision=PRECISION) + bias_r[None, :] + input_r.to(tl.float32))
        z = tl.sigmoid(tl.dot(a, wz, input_precision=PRECISION) + bias_z[None, :] + input_z.to(tl.float32))
        c = tl.dot(a, wn, input_precision=PRECISION) + bias_c[None, :]
        new = tanh(input_n.to(tl.float32) + bias_n[None, :] + r * c)
        h = new + z * (h - new)
        tl.store(states_ptr + (group * S + frame % S) * N * 2 * H + own, h.to(kind), mask=inside)
        if group < FOLLOWED:
            tl.store(at + gate, r.to(kind), mask=inside)
            tl.store(at + H + gate, z.to(kind), mask=inside)
            tl.store(at + 2 * H + gate, new.to(kind), mask=inside)
            tl.store(inner_ptr + (group * T + frame) * N * 2 * H + own, c.to(kind), mask=inside)
        input_r, input_z, input_n = next_r, next_z, next_n
        frame, at = next_frame, then
    tl.store(final_ptr + group * N * 2 * H + own, h.to(kind), mask=inside)


@triton.jit
def small_backward_kernel(
    grad_ptr,  # [G, T, N, 2H] gradient of the states, with ALL
    grad_final_ptr,  # [G, N, 2H] that of the final ones, with FINAL
    weight_ptr,  # [G, 2, H, 3H] transposed
    states_ptr,  # [G, T, N, 2H]
    gates_ptr,  # [G, T, N, 2, 3H]
    inner_ptr,  # [G, T, N, 2, H]
    input_ptr,  # [G, T, N, 2, 3H] gradients of a
    state_ptr,  # [G, T, N, 2, 3H] and of c, with WEIGHTS
    bias_ptr,  # [G, blocks of clips, 2, 4H] float32 sums over clips, frames; with WEIGHTS
    T, N,
    H: tl.constexpr, REVERSE: tl.constexpr, ALL: tl.constexpr, FINAL: tl.constexpr, WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_last(EARLY)
    pair = tl.program_id(1)
    group, direction = (pair // 2).to(tl.int64), pair % 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j, k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H)
    inside = (n[:, None] < N) & (j[None, :] < H)
    known = j[None, :] < H
    kind = input_ptr.dtype.element_ty
    weight_ptr += pair.to(tl.int64) * 3 * H * H + j[None, :] * 3 * H + k[:, None]
    wr = weights_of(weight_ptr, 0, k, known, H, False, UPCAST)
    wz = weights_of(weight_ptr + H, 0, k, known, H, False, UPCAST)
    wn = weights_of(weight_ptr + 2 * H, 0, k, known, H, False, UPCAST)

    frame = T - 1
    back = -1
    if REVERSE:
        frame = tl.where(direction == 1, 0, T - 1)
        back = tl.where(direction == 1, 1, -1)
    gate = n[:, None] * 6 * H + direction * 3 * H + j[None, :]
    own = n[:, None] * 2 * H + direction * H + j[None, :]
    gates_ptr += group * T * N * 6 * H + gate
    states_ptr += group * T * N * 2 * H + own
    inner_ptr += group * T * N * 2 * H + own
    grad_ptr += group * T * N * 2 * H + own
    input_ptr += group * T * N * 6 * H + gate
    state_ptr += group * T * N * 6 * H + gate
    row = N * 2 * H
    place = frame.to(tl.int64) * row
    r, z, new = (
        read(gates_ptr + 3 * place, inside),
        read(gates_ptr + 3 * place + H, inside),
        read(gates_ptr + 3 * place + 2 * H, inside),
    )
    c = read(inner_ptr + place, inside)
    # the state before the first step is zero
    h = read(states_ptr + place + back * row, inside & (n[:, None] < tl.where(T > 1, N, 0)))
    dh = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if FINAL:
        dh += tl.load(grad_final_ptr + group * row + own, mask=inside, other=0.0).to(tl.float32)
    if ALL:
        grad = read(grad_ptr + place, inside)
    # of every clip by itself: adding up clips would have threads meet at every step
    sum_r = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    sum_z, sum_n, sum_c = sum_r, sum_r, sum_r
    for step in range(T):
        # the last step reads its own again
        then = tl.where(step < T - 1, place + back * row, place)
        next_r = read(gates_ptr + 3 * then, inside)
        next_z = read(gates_ptr + 3 * then + H, inside)
        next_new = read(gates_ptr + 3 * then + 2 * H, inside)
        next_c = read(inner_ptr + then, inside)
        next_h = read(states_ptr + then + back * row, inside & (n[:, None] < tl.where(step < T - 2, N, 0)))
        if ALL:
            next_grad = read(grad_ptr + then, inside)
            dh += grad.to(tl.float32)
        gate_r, gate_z, candidate = r.to(tl.float32), z.to(tl.float32), new.to(tl.float32)
        dn = dh * (1.0 - gate_z) * (1.0 - candidate * candidate)
        dz = dh * (h.to(tl.float32) - candidate) * gate_z * (1.0 - gate_z)
        dr = dn * c.to(tl.float32) * gate_r * (1.0 - gate_r)
        dc = dn * gate_r
        tl.store(input_ptr + 3 * place, dr.to(kind), mask=inside)
        tl.store(input_ptr + 3 * place + H, dz.to(kind), mask=inside)
        tl.store(input_ptr + 3 * place + 2 * H, dn.to(kind), mask=inside)
        if WEIGHTS:
            tl.store(state_ptr + 3 * place, dr.to(kind), mask=inside)
            tl.store(state_ptr + 3 * place + H, dz.to(kind), mask=inside)
            tl.store(state_ptr + 3 * place + 2 * H, dc.to(kind), mask=inside)
            sum_r += dr
            sum_z += dz
            sum_n += dn
            sum_c += dc
        dh = tl.dot(operand(dr, kind, UPCAST), wr, dh * gate_z, input_precision=PRECISION)
        dh = tl.dot(operand(dz, kind, UPCAST), wz, dh, input_precision=PRECISION)
        dh = tl.dot(operand(dc, kind, UPCAST), wn, dh, input_precision=PRECISION)
        r, z, new, c, h = next_r, next_z, next_new, next_c, next_h
        if ALL:
            grad = next_grad
        place = then
    if WEIGHTS:
        block = group * tl.num_programs(0) + tl.program_id(0)
        bias_ptr += (block * 2 + direction) * 4 * H + j
        tl.store(bias_ptr, tl.sum(sum_r, 0), mask=j < H)
        tl.store(bias_ptr + H, tl.sum(sum_z, 0), mask=j < H)
        tl.store(bias_ptr + 2 * H, tl.sum(sum_n, 0), mask=j < H)
        tl.store(bias_ptr + 3 * H, tl.sum(sum_c, 0), mask=j < H)


def plan_small_forward(
    gates: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool, followed: int, slots: int, precision: str
) -> Forward:
    """What `gru_plan.plan_forward` plans, of at most `most_units`."""
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
        "T": steps,
        "N": n,
        "S": slots,
        "H": h,
        "REVERSE": reverse,
        "FOLLOWED": followed,
        "PRECISION": precision,
        "UPCAST": INTERPRET and gates.dtype == torch.bfloat16,
        "BLOCK_N": _ROWS,
        "BLOCK_H": width(h),
        "EARLY": starts_early(gates.device),
    }
    grid = triton.cdiv(n, _ROWS), 2 * groups
    return Forward([Call(small_forward_kernel, grid, arguments, _WARPS, 1)], states, final, inner)


def plan_small_backward(
    grad: Tensor | None, grad_final: Tensor | None, weight: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, *, reverse: bool, with_weights: bool, precision: str,
) -> Backward:  # fmt: skip
    """What `gru_plan.plan_backward` plans, of at most `most_units`; `state` is empty unless the weights'
    gradients are wanted."""
    groups, steps, n, _, h = *gates.shape[:4], weight.shape[-2]
    blocks = triton.cdiv(n, _ROWS)
    of_input, of_state = torch.empty_like(gates), gates.new_empty(gates.shape if with_weights else 0)
    bias = gates.new_empty(groups, blocks if with_weights else 0, 2, 4 * h, dtype=torch.float32)
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
        "T": steps,
        "N": n,
        "H": h,
        "REVERSE": reverse,
        "ALL": grad is not None,
        "FINAL": grad_final is not None,
        "WEIGHTS": with_weights,
        "PRECISION": precision,
        "UPCAST": INTERPRET and gates.dtype == torch.bfloat16,
        "BLOCK_N": _ROWS,
        "BLOCK_H": width(h),
        "EARLY": starts_early(gates.device),
    }
    call = Call(small_backward_kernel, (blocks, 2 * groups), arguments, _WARPS, 1)
    return Backward([call], of_input, of_state, bias)
