"""The pass over the bank that both operations begin with: softmax sums of every term, in Triton.

Every term of A²MC (Eq. 9-11) is a softmax over {u·f0, λ a + (1-λ) s_k for each λ and bank row k} / τ, where
s_k = u·m_k and a = u·f is the inner product of the query u with the feature f mixed into the bank
(`reference` has the algebra). So the pass knows only rows (u, a), up to four per clip, called jobs here:

    basic   u = f3, a = f3·f3        weak    u = f1, a = f1·f1        strong  u = f2, a = f2·f2
    target  u = f3, a = f3·f2        the distribution that L2 pulls f2 to

and is laid out like flash attention: a program owns a tile of rows of one job and a slab of bank rows, keeps
a running maximum `top` of s, and sums the exponentials e, their (1-λ)-weighted sum w, and w @ bank. Whoever
reads the sums adds the slabs in a fixed order. Nothing of size [N, K] leaves the registers, and no float is
added atomically: two runs give the same bits.

Exponents are base 2: scale = log2(e) / τ. The largest logit of all banks is `level(top)`, so no exponential
exceeds one, whatever τ and the lengths of the rows. All are kept times 2^SHIFT, that fp16 may hold w: it has
the ten bits of tf32, and tensor cores take it in either order of rows and columns. The sums at a second
temperature, that of the ascent, cost its exponentials alone.
Legend: N batch · K bank rows · D feature dim · S slabs · J jobs.
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

from .common import Call, feature_width, resident_programs, starts_early, wait_for_the_last
from .problem import Contrast, Features

BASIC, WEAK, STRONG = 0, 1, 2
LOW = tl.constexpr(-1e30)  # below every similarity, yet its multiples are finite
LN2 = tl.constexpr(math.log(2))
# what a slab keeps of each row, beside the mean of the bank under w: top, a, sum of e, sum of w, and sum of e
# at the second temperature
PLANES = tl.constexpr(5)
SHIFT = tl.constexpr(10)  # see `common.MOST_SHARES`


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
    ("tf32", 32): Tile(64, 64, 32, 4, 3, 255),
    ("tf32", 64): Tile(64, 32, 64, 4, 3),
    ("tf32", 128): Tile(64, 32, 128, 4, 3),
    ("tf32", 256): Tile(32, 16, 256, 4, 2),
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
    """Sums over the banks of 2^(logit - offset): plain e, and weighted by 1-λ w.

    All arguments broadcast with s. The logits are taken relative to scale * top, which keeps the digits of
    large ones.
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
def even_exponentials(s, top, a, offset, scale, LARGEST: tl.constexpr, COUNT: tl.constexpr):
    """e and w of `mixed_exponentials` for λ = LARGEST/COUNT, 2 LARGEST/COUNT, ..., LARGEST <= 1/2.

    The exponentials of one similarity are then a geometric series, so two of them give all by Horner's
    scheme. It starts at the largest where a > top, else at the plain bank: that one may underflow while the
    last does not, but only where s - top < -126 / scale, which leaves the last below 2^-63.
    """
    x, rise = (s - top) * scale, (a - top) * scale
    far = a > top
    start = tl.where(far, 1.0 - LARGEST, 1.0)  # 1-λ where the series starts
    step = tl.where(far, -LARGEST / COUNT, LARGEST / COUNT)
    first = tl.exp2(x * start + (tl.where(far, LARGEST * rise, 0.0) - offset))
    # bounded, lest zero meets infinity
    ratio = tl.exp2(tl.minimum(step * rise - step * x, 120.0 / COUNT))
    e, w = 1.0, start - step * COUNT
    for i in tl.static_range(COUNT - 1, -1, -1):
        e = e * ratio + 1.0
        w = w * ratio + (start - step * i)
    return first * e, first * w


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
def job_feature(job, FEATURES: tl.constexpr, basic_ptr, weak_ptr, strong_ptr):
    """Where the feature of one job begins, given each job's."""
    chosen_ptr = basic_ptr
    for j in tl.static_range(len(FEATURES)):
        if job == j:
            if FEATURES[j] == 1:
                chosen_ptr = weak_ptr
            elif FEATURES[j] == 2:
                chosen_ptr = strong_ptr
    return chosen_ptr


@triton.jit
def exponentials(s, top, a, reach, scale, MIX: tl.constexpr, LARGEST: tl.constexpr, EVEN: tl.constexpr):
    """e and w of a tile of similarities [N, K], times 2^SHIFT, from the rows' top, a and level [N]."""
    offset = (reach - top) * scale - SHIFT
    if EVEN:
        e, w = even_exponentials(s, top[:, None], a[:, None], offset[:, None], scale, LARGEST, len(MIX))
    else:
        e, w = mixed_exponentials(s, top[:, None], a[:, None], offset[:, None], scale, MIX)
    return e, w


@triton.jit
def bank_pass_kernel(
    basic_ptr,
    weak_ptr,
    strong_ptr,
    bank_ptr,
    stats_ptr,  # [S, J, PLANES, N]
    means_ptr,  # [S, J, N, D] w @ bank / sum of w, with SUMS
    N,
    K,
    slab,  # bank rows per program
    scale,
    second,  # the scale of the second temperature, with SECOND
    D: tl.constexpr,
    QUERY: tl.constexpr,  # which feature each job's u is
    PARTNER: tl.constexpr,  # and which is mixed into its bank
    MIX: tl.constexpr,
    LARGEST: tl.constexpr,
    EVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SUMS: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_the_last(EARLY)
    job = tl.program_id(0)
    query_ptr = job_feature(job, QUERY, basic_ptr, weak_ptr, strong_ptr)
    partner_ptr = job_feature(job, PARTNER, basic_ptr, weak_ptr, strong_ptr)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n[:, None] < N) & (d[None, :] < D)
    at = n[:, None] * D + d[None, :]
    query = tl.load(query_ptr + at, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(partner_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.sum(query * partner, 1)

    top = tl.full((BLOCK_N,), LOW, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    total_2 = tl.zeros((BLOCK_N,), tl.float32)
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
            rows *= inverse[:, None]
        # before the exponentials, which need the registers
        if PRECISION == "tf32":
            rows = rows.to(tl.float16)
        s = tl.where(valid[None, :], s, LOW)
        higher = tl.maximum(top, tl.max(s, 1))
        reach = level(higher, a, LARGEST)
        fall = level(top, a, LARGEST) - reach
        if SECOND:
            e, _ = exponentials(s, higher, a, reach, second, MIX, LARGEST, EVEN)
            total_2 = total_2 * tl.exp2(fall * second) + tl.sum(e, 1)
        keep = tl.exp2(fall * scale)
        e, w = exponentials(s, higher, a, reach, scale, MIX, LARGEST, EVEN)
        total = total * keep + tl.sum(e, 1)
        if SUMS:
            mass = mass * keep + tl.sum(w, 1)
            sums = tl.dot(w.to(rows.dtype), rows, sums * keep[:, None], input_precision=PRECISION)
        top = higher
        rows_ptr += BLOCK_K * D

    place = tl.program_id(2).to(tl.int64) * len(QUERY) + job
    stats_ptr += place * PLANES * N + n
    tl.store(stats_ptr, top, mask=n < N)
    tl.store(stats_ptr + N, a, mask=n < N)
    tl.store(stats_ptr + 2 * N, total, mask=n < N)
    if SUMS:
        tl.store(stats_ptr + 3 * N, mass, mask=n < N)
        means = (sums / mass[:, None]).to(means_ptr.dtype.element_ty)
        tl.store(means_ptr + place * N * D + at, means, mask=inside)
    if SECOND:
        tl.store(stats_ptr + 4 * N, total_2, mask=n < N)


class BankPass(NamedTuple):
    """A planned pass and what it leaves behind."""

    call: Call
    stats: Tensor  # [S, J, PLANES, N]
    means: Tensor  # [S, J, N, D], one element if not asked for


def shared_arguments(features: Features, settings: Contrast) -> dict[str, Any]:
    """What all kernels are told of contiguous features [N, D]: the jobs are the features given, then with
    `settings.distill` the target."""
    own, like, mix = present(features), features.basic, settings.mix
    target = has_target(features, settings)
    return {
        "basic_ptr": like,
        "weak_ptr": like if features.weak is None else features.weak,
        "strong_ptr": like if features.strong is None else features.strong,
        "N": len(like),
        "scale": _scale(settings.temperature),
        "D": like.shape[1],
        "QUERY": own + (BASIC,) * target,
        "PARTNER": own + (STRONG,) * target,
        "MIX": tuple(mix),
        "LARGEST": max(mix, default=0.0),
        "EVEN": evenly_spaced(mix),
        "EARLY": starts_early(like.device),
    }


def plan_pass(features: Features, bank: Tensor, settings: Contrast, *, with_sums: bool) -> BankPass:
    """Plan `bank_pass_kernel` for contiguous features [N, D] and bank [K, D]."""
    shared = shared_arguments(features, settings)
    (n, d), k = features.basic.shape, len(bank)
    tile = _TILES[settings.precision, feature_width(d)]
    jobs, blocks = len(shared["QUERY"]), triton.cdiv(n, tile.rows)
    splits = max(1, resident_programs(bank.device) // (jobs * blocks))
    slab = triton.cdiv(triton.cdiv(k, splits), tile.bank) * tile.bank
    splits = triton.cdiv(k, slab)
    stats = bank.new_empty(splits, jobs, PLANES.value, n)
    kind = torch.float32 if settings.precision == "ieee" else torch.float16
    means = bank.new_empty((splits, jobs, n, d) if with_sums else (1,), dtype=kind)
    arguments = shared | {
        "bank_ptr": bank,
        "stats_ptr": stats,
        "means_ptr": means,
        "K": k,
        "slab": slab,
        "second": _scale(settings.climb) if settings.climb else 0.0,
        "NORMALIZE": settings.normalize,
        "SUMS": with_sums,
        "SECOND": settings.climb > 0,
        "PRECISION": settings.precision,
        "BLOCK_N": tile.rows,
        "BLOCK_K": tile.bank,
        "BLOCK_D": feature_width(d),
        "DEPTH": tile.depth,
    }
    return BankPass(Call(bank_pass_kernel, (jobs, blocks, splits), arguments, *tile[3:]), stats, means)


def _scale(temperature: float) -> float:
    return 1 / (temperature * LN2.value)


def present(features: Features) -> tuple[int, ...]:
    """Which of BASIC, WEAK and STRONG are given."""
    return (BASIC,) + (WEAK,) * (features.weak is not None) + (STRONG,) * (features.strong is not None)


def has_target(features: Features, settings: Contrast) -> bool:
    """Whether f2's distribution is pulled to f3's."""
    return settings.distill and features.strong is not None


def evenly_spaced(mix: Sequence[float]) -> bool:
    """Whether `even_exponentials` knows these shares."""
    largest = max(mix, default=1.0)
    even = ((i + 1) * largest / len(mix) for i in range(len(mix)))
    return len(mix) > 1 and largest <= 0.5 and all(abs(x - y) < 1e-9 for x, y in zip(sorted(mix), even))
