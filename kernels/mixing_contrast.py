"""L1, L2, L3 of A²MC (Eq. 9-11) and their gradients with respect to the anchors, in one pass over the bank.

Every term is a softmax over {u·f0, λ a + (1-λ) s_k for each λ and bank row k} / τ, where s_k = u·m_k and
a = u·f is the inner product of the query u with the feature f mixed into the bank (`reference` has the
algebra). So the pass knows only rows (u, a), up to four per clip, called jobs here:

    weak    u = f1, a = f1·f1        strong  u = f2, a = f2·f2        basic   u = f3, a = f3·f3
    target  u = f3, a = f3·f2        the distribution that L2 pulls f2 to

and is laid out like flash attention: a program owns a tile of rows of one job and a slab of bank rows, keeps
a running maximum `top` of s, and sums the exponentials e, their (1-λ)-weighted sum w, and w @ bank. A second,
small kernel adds the slabs in a fixed order and forms losses and gradients. With w come the probabilities of
the mixed features, because sum(λ e) = e - w, and the mean of f2's similarity under the target, because
sum_k w_k (m_k·f2) = (w @ bank)·f2. Nothing of size [N, K] leaves the registers, and no float is added
atomically: two runs give the same bits.

Exponents are base 2: scale = log2(e) / τ. The largest logit of all banks is `level(top)`, so no exponential
exceeds one, whatever τ and the lengths of the rows.
Legend: N batch · K bank rows · D feature dim · S slabs · J jobs · T terms present, in the order weak, strong,
basic.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .common import INTERPRET, Call, Precision, check_problem, launch_all, require, resident_programs, width

WEAK, STRONG, BASIC = 0, 1, 2
LOW = tl.constexpr(-1e30)  # below every similarity, yet its multiples are finite
LN2 = tl.constexpr(math.log(2))
PLANES = tl.constexpr(4)  # top, a, sum of e, sum of w: what a slab keeps of each row, beside w @ bank


class Tile(NamedTuple):
    """Sizes of one kernel for one width of D."""

    rows: int  # clips per program, or per iteration where a program owns bank rows
    bank: int  # bank rows per iteration, or per program
    depth: int  # columns of a product of full float32, which would not fit in registers at once
    warps: int
    stages: int
    registers: int | None = None  # see Call.maxnreg


# with tf32, two programs of the pass fit on a multiprocessor at any width
_TILES = {
    ("tf32", 16): Tile(64, 64, 16, 4, 3),
    ("tf32", 32): Tile(64, 64, 32, 4, 3),
    ("tf32", 64): Tile(64, 64, 64, 4, 3),
    ("tf32", 128): Tile(64, 32, 128, 4, 2),
    ("tf32", 256): Tile(32, 32, 256, 4, 2),
    ("ieee", 16): Tile(32, 32, 16, 8, 1, 255),
    ("ieee", 32): Tile(32, 32, 32, 8, 1, 255),
    ("ieee", 64): Tile(32, 32, 32, 8, 1, 255),
    ("ieee", 128): Tile(32, 32, 32, 8, 1, 255),
    ("ieee", 256): Tile(32, 32, 16, 8, 1, 255),
}


@triton.jit
def level(top, a, LARGEST: tl.constexpr):
    """Largest logit of all banks, times τ, if the largest similarity is `top`: linear in λ, so at an end."""
    return top + tl.maximum(LARGEST * (a - top), 0.0)


@triton.jit
def mixed_exponentials(s, top, a, offset, scale, MIX: tl.constexpr):
    """Sum e over the banks of 2^(logit - offset), and w with each weighted by 1-λ. All broadcast with s.

    The logits are taken relative to scale * top, which keeps the digits of large ones.
    """
    x = (s - top) * scale
    e = tl.exp2(x - offset)
    w = e
    for j in tl.static_range(len(MIX)):
        mixed = tl.exp2(x * (1.0 - MIX[j]) + (scale * MIX[j] * (a - top) - offset))
        e += mixed
        w += mixed * (1.0 - MIX[j])
    return e, w


@triton.jit
def inverse_norm(rows):
    """1 / |row| of rows [K, D]. Lengths below 1e-12 count as that, as in torch's normalize."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12)


@triton.jit
def product(left_ptr, left_in, right_ptr, right_in, D: tl.constexpr, DEPTH: tl.constexpr):
    """Full float32 inner products of rows that start at left_ptr [M] and right_ptr [P] -> [M, P].

    Goes over the columns in steps, because without tensor cores each thread holds whole operand rows.
    """
    out = tl.zeros((left_in.shape[0], right_in.shape[0]), tl.float32)
    for begin in range(0, D, DEPTH):
        d = begin + tl.arange(0, DEPTH)
        left = tl.load(left_ptr[:, None] + d[None, :], mask=left_in[:, None] & (d[None, :] < D), other=0.0)
        right = tl.load(right_ptr[:, None] + d[None, :], mask=right_in[:, None] & (d[None, :] < D), other=0.0)
        out = tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), out, input_precision="ieee")
    return out


@triton.jit
def bank_pass_kernel(
    weak_ptr,
    strong_ptr,
    basic_ptr,
    bank_ptr,
    stats_ptr,  # [S, J, PLANES, N]
    sums_ptr,  # [S, J, N, D], unused unless SUMS
    N,
    K,
    slab,  # bank rows per program
    scale,
    D: tl.constexpr,
    QUERY: tl.constexpr,  # which feature each job's u is
    PARTNER: tl.constexpr,  # and which is mixed into its bank
    MIX: tl.constexpr,
    LARGEST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr,
):
    job = tl.program_id(0)
    query_ptr, partner_ptr = basic_ptr, basic_ptr
    for j in tl.static_range(len(QUERY)):
        if job == j:
            if QUERY[j] == 0:
                query_ptr = weak_ptr
            elif QUERY[j] == 1:
                query_ptr = strong_ptr
            if PARTNER[j] == 0:
                partner_ptr = weak_ptr
            elif PARTNER[j] == 1:
                partner_ptr = strong_ptr

    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n[:, None] < N) & (d[None, :] < D)
    at = n[:, None] * D + d[None, :]
    query = tl.load(query_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.sum(query * tl.load(partner_ptr + at, mask=inside, other=0.0).to(tl.float32), 1)

    top = tl.full((BLOCK_N,), LOW, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start = tl.program_id(2).to(tl.int64) * slab
    count = tl.minimum(K - start, slab).to(tl.int32)
    k = tl.arange(0, BLOCK_K)
    rows_ptr = bank_ptr + start * D + k * D
    for first in range(0, count, BLOCK_K):
        valid = k < count - first
        rows = tl.load(rows_ptr[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
        if PRECISION == "ieee":
            s = product(query_ptr + n * D, n < N, rows_ptr, valid, D, DEPTH)
        else:
            s = tl.dot(query, tl.trans(rows), input_precision=PRECISION)
        if NORMALIZE:
            inverse = inverse_norm(rows)
            s *= inverse[None, :]
        s = tl.where(valid[None, :], s, LOW)
        higher = tl.maximum(top, tl.max(s, 1))
        reach = level(higher, a, LARGEST)
        keep = tl.exp2((level(top, a, LARGEST) - reach) * scale)
        offset = (reach - higher) * scale
        e, w = mixed_exponentials(s, higher[:, None], a[:, None], offset[:, None], scale, MIX)
        total = total * keep + tl.sum(e, 1)
        if SUMS:
            mass = mass * keep + tl.sum(w, 1)
            if NORMALIZE:
                w *= inverse[None, :]
            sums = tl.dot(w, rows, sums * keep[:, None], input_precision=PRECISION)
        top = higher
        rows_ptr += BLOCK_K * D

    place = tl.program_id(2).to(tl.int64) * len(QUERY) + job
    stats_ptr += place * PLANES * N + n
    tl.store(stats_ptr, top, mask=n < N)
    tl.store(stats_ptr + N, a, mask=n < N)
    tl.store(stats_ptr + 2 * N, total, mask=n < N)
    if SUMS:
        tl.store(stats_ptr + 3 * N, mass, mask=n < N)
        tl.store(sums_ptr + place * N * D + at, sums, mask=inside)


@triton.jit
def merged_stats(
    stats_ptr, n, job, positive, N, S, scale, JOBS: tl.constexpr, LARGEST: tl.constexpr, BLOCK_S: tl.constexpr
):
    """One row's softmax over its positive and all slabs -> (top, a, reach, high, first, z).

    n is int64. In units of 2^(scale * reach + high), `first` is the positive's exponential and z the
    partition.
    """
    s = tl.arange(0, BLOCK_S)
    at = stats_ptr + (s.to(tl.int64) * JOBS + job) * PLANES * N + n
    a = tl.load(stats_ptr + (n + job * PLANES * N + N))
    tops = tl.load(at, mask=s < S, other=LOW)
    top = tl.max(tops, 0)
    reach = level(top, a, LARGEST)
    factor = tl.exp2((level(tops, a, LARGEST) - reach) * scale)
    total = tl.sum(tl.load(at + 2 * N, mask=s < S, other=0.0) * factor, 0)
    gap = (positive - reach) * scale
    high = tl.maximum(gap, 0.0)
    first = tl.exp2(gap - high)
    return top, a, reach, high, first, first + total * tl.exp2(-high)


@triton.jit
def _distribution(
    query, key, stats_ptr, sums_ptr, n, job, N, S, scale,
    D: tl.constexpr, JOBS: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Means under one row's softmax -> (log2 of the partition without scale * reach, reach, u·f0, a,
    probability of the positive, sum of λ times the probability, sum of w / z times the bank rows [D])."""
    positive = tl.sum(query * key, 0)
    _, a, reach, high, first, z = merged_stats(
        stats_ptr, n, job, positive, N, S, scale, JOBS, LARGEST, BLOCK_S
    )
    to_probability = tl.exp2(-high) / z
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, CHUNK)
    row = tl.zeros((BLOCK_D,), tl.float32)
    share = 0.0
    for begin in range(0, S, CHUNK):
        s = begin + c
        place = s.to(tl.int64) * JOBS + job
        at = stats_ptr + place * PLANES * N + n
        top = tl.load(at, mask=s < S, other=LOW)
        factor = tl.exp2((level(top, a, LARGEST) - reach) * scale)
        total = tl.load(at + 2 * N, mask=s < S, other=0.0)
        mass = tl.load(at + 3 * N, mask=s < S, other=0.0)
        share += tl.sum((total - mass) * factor, 0)
        inside = (s[:, None] < S) & (d[None, :] < D)
        sums = tl.load(sums_ptr + (place * N + n)[:, None] * D + d[None, :], mask=inside, other=0.0)
        row += tl.sum(sums * factor[:, None], 0)
    return tl.log2(z) + high, reach, positive, a, first / z, share * to_probability, row * to_probability


@triton.jit
def combine_kernel(
    weak_ptr,
    strong_ptr,
    basic_ptr,
    key_ptr,
    stats_ptr,  # [S, J, PLANES, N]
    sums_ptr,  # [S, J, N, D]
    losses_ptr,  # [T, N]
    gradients_ptr,  # [T, N, D]
    N,
    S,
    scale,
    D: tl.constexpr,
    TERMS: tl.constexpr,  # which feature each term's anchor is
    DISTILL: tl.constexpr,  # whether the strong term has a target, which is the last job
    LARGEST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    JOBS: tl.constexpr = len(TERMS) + DISTILL
    d = tl.arange(0, BLOCK_D)
    at = n * D + d
    key = tl.load(key_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    # one branch per term, because the strong one differs
    for term in tl.static_range(len(TERMS)):
        if tl.program_id(0) == term:
            anchor_ptr = weak_ptr if TERMS[term] == 0 else strong_ptr if TERMS[term] == 1 else basic_ptr
            anchor = tl.load(anchor_ptr + at, mask=d < D, other=0.0).to(tl.float32)
            lse, reach, positive, a, first, share, row = _distribution(
                anchor, key, stats_ptr, sums_ptr, n, term, N, S, scale,
                D, JOBS, LARGEST, BLOCK_S, BLOCK_D, CHUNK,
            )  # fmt: skip
            if DISTILL and TERMS[term] == 1:
                teacher = tl.load(basic_ptr + at, mask=d < D, other=0.0).to(tl.float32)
                _, _, _, _, first_t, share_t, row_t = _distribution(
                    teacher, key, stats_ptr, sums_ptr, n, len(TERMS), N, S, scale,
                    D, JOBS, LARGEST, BLOCK_S, BLOCK_D, CHUNK,
                )  # fmt: skip
                mean = first_t * positive + share_t * a + tl.sum(row_t * anchor, 0)
                gradient = (first - first_t) * key + (row - row_t) + 2.0 * (share - share_t) * anchor
            else:
                mean = positive
                gradient = (first - 1.0) * key + row + 2.0 * share * anchor
            # the mean logit of the target, or the positive, is what the log-partition is compared with
            loss = (lse + (reach - mean) * scale) * LN2
            tl.store(losses_ptr + (n + term * N), loss)
            out = gradients_ptr + (n + term * N) * D + d
            tl.store(out, gradient * (scale * LN2), mask=d < D)


class BankPass(NamedTuple):
    """A planned pass and what it leaves behind."""

    call: Call
    stats: Tensor  # [S, J, PLANES, N]
    sums: Tensor  # [S, J, N, D], one element if not asked for
    terms: tuple[int, ...]  # WEAK, STRONG, BASIC: the features present
    distill: bool  # whether the last job is the target of the strong term


def plan_pass(
    weak: Tensor | None,
    strong: Tensor | None,
    basic: Tensor | None,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
    *,
    distill: bool,
    normalize: bool,
    with_sums: bool,
    precision: str,
) -> BankPass:
    """Plan `bank_pass_kernel` for contiguous features [N, D] and bank [K, D]."""
    features = (weak, strong, basic)
    terms = tuple(i for i, feature in enumerate(features) if feature is not None)
    distill = distill and STRONG in terms
    like = next(feature for feature in features if feature is not None)
    (n, d), k = like.shape, len(bank)
    tile = _TILES[precision, width(d)]
    jobs, blocks = len(terms) + distill, triton.cdiv(n, tile.rows)
    splits = max(1, resident_programs(bank.device) // (jobs * blocks))
    slab = triton.cdiv(triton.cdiv(k, splits), tile.bank) * tile.bank
    splits = triton.cdiv(k, slab)
    stats = bank.new_empty(splits, jobs, PLANES.value, n)
    sums = bank.new_empty((splits, jobs, n, d) if with_sums else (1,))
    arguments = {
        **dict(zip(("weak_ptr", "strong_ptr", "basic_ptr"), (like if f is None else f for f in features))),
        "bank_ptr": bank,
        "stats_ptr": stats,
        "sums_ptr": sums,
        "N": n,
        "K": k,
        "slab": slab,
        "scale": 1 / (temperature * LN2.value),
        "D": d,
        "QUERY": terms + (BASIC,) * distill,
        "PARTNER": terms + (STRONG,) * distill,
        "MIX": tuple(mix),
        "LARGEST": max(mix, default=0.0),
        "NORMALIZE": normalize,
        "SUMS": with_sums,
        "PRECISION": precision,
        "BLOCK_N": tile.rows,
        "BLOCK_K": tile.bank,
        "BLOCK_D": width(d),
        "DEPTH": tile.depth,
    }
    call = Call(bank_pass_kernel, (jobs, blocks, splits), arguments, *tile[3:])
    return BankPass(call, stats, sums, terms, distill)


def plan(
    key: Tensor,
    basic: Tensor,
    weak: Tensor | None,
    strong: Tensor | None,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
    distill: bool,
    normalize: bool,
    precision: str,
) -> tuple[list[Call], Tensor, Tensor]:
    """The launches for contiguous inputs, and what they fill: losses [T, N], gradients [T, N, D]."""
    first = plan_pass(
        weak, strong, basic, bank, mix, temperature,
        distill=distill, normalize=normalize, with_sums=True, precision=precision,
    )  # fmt: skip
    n, d = key.shape
    losses, gradients = bank.new_empty(len(first.terms), n), bank.new_empty(len(first.terms), n, d)
    shared = ("weak_ptr", "strong_ptr", "basic_ptr", "stats_ptr", "sums_ptr", "N", "scale", "D", "LARGEST")
    arguments = {
        **{name: first.call.arguments[name] for name in shared},
        "key_ptr": key,
        "losses_ptr": losses,
        "gradients_ptr": gradients,
        "S": len(first.stats),
        "TERMS": first.terms,
        "DISTILL": first.distill,
        "BLOCK_S": triton.next_power_of_2(len(first.stats)),
        "BLOCK_D": width(d),
        "CHUNK": 32,
    }
    return [first.call, Call(combine_kernel, (len(first.terms), n), arguments)], losses, gradients


@torch.library.custom_op("a2mc::mixing_contrast", mutates_args=())
def _op(
    key: Tensor,
    basic: Tensor,
    weak: Tensor | None,
    strong: Tensor | None,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
    distill: bool,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Losses [T, N] and their gradients [T, N, D], both float32, of the terms present."""
    calls, losses, gradients = plan(
        key, basic, weak, strong, bank, mix, temperature, distill, normalize, precision
    )
    launch_all(calls, bank.device)
    return losses, gradients


@_op.register_fake
def _(
    key: Tensor, basic: Tensor, weak: Tensor | None, strong: Tensor | None, bank: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    terms = 3 - (weak is None) - (strong is None)
    return bank.new_empty(terms, basic.shape[0]), bank.new_empty(terms, *basic.shape)


def _on_cpu(
    key: Tensor,
    basic: Tensor,
    weak: Tensor | None,
    strong: Tensor | None,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
    distill: bool,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The operation in plain torch, without kernels."""
    rows = torch.nn.functional.normalize(bank, dim=1) if normalize else bank
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for term, feature in enumerate((weak, strong, basic)):
        if feature is None:
            continue
        anchor = feature.detach().float().requires_grad_()
        with torch.enable_grad():
            loss = (
                reference.distillation(anchor, basic.float(), key.float(), rows, mix, temperature)
                if term == STRONG and distill
                else reference.contrast(anchor, key.float(), rows, mix, temperature)
            )
        # no operation after the loss: below the dispatcher only autograd functions are recorded
        gradients += torch.autograd.grad(loss, anchor, torch.ones_like(loss))
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(gradients)


if not INTERPRET:  # interpreted, CPU tensors go through the kernels
    _op.register_kernel("cpu")(_on_cpu)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[1].dtype
    ctx.present = (inputs[2] is not None, inputs[3] is not None)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    has_weak, has_strong = ctx.present

    def anchor(position: int, term: int) -> Tensor | None:
        if not ctx.needs_input_grad[position]:
            return None
        return (grad[term].unsqueeze(1) * gradients[term]).to(ctx.dtype)

    basic = anchor(1, has_weak + has_strong)
    weak = anchor(2, 0) if has_weak else None
    strong = anchor(3, int(has_weak)) if has_strong else None
    return None, basic, weak, strong, *[None] * 6


_op.register_autograd(_backward, setup_context=_setup_context)


def mixing_contrast(
    key: Tensor,
    basic: Tensor,
    weak: Tensor | None,
    strong: Tensor | None,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
    *,
    distill: bool = True,
    live_target: bool = False,
    normalize: bool = False,
    precision: Precision = "tf32",
) -> tuple[Tensor, Tensor, Tensor]:
    """L1, L2, L3 per clip: features [N, D], bank [K, D] float32 -> (weak, strong, basic), each [N] float32.

    Differentiable in basic, weak and strong, not in key and bank: the bank's ascent is `bank_ascent`. A term
    whose feature is None is zero. `distill` False makes L2 a contrast like L1; `normalize` contrasts the unit
    rows of the bank. L2's target is detached.
    """
    features = {"key": key, "basic": basic, "weak": weak, "strong": strong}
    check_problem("mixing_contrast", features, bank, mix, temperature, precision)
    require(
        not (bank.requires_grad and torch.is_grad_enabled()),
        "mixing_contrast: bank requires grad, which this operation does not give: detach it, or use "
        "reference.mixing_contrast",
    )
    losses, _ = _op(
        key.detach().contiguous(),
        basic.contiguous(),
        None if weak is None else weak.contiguous(),
        None if strong is None else strong.contiguous(),
        bank.contiguous(),
        list(mix),
        temperature,
        distill,
        normalize,
        precision,
    )
    given = iter(losses.unbind())
    first, second = (losses.new_zeros(len(basic)) if x is None else next(given) for x in (weak, strong))
    return first, second, next(given)
