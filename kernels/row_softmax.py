"""What normalises each clip's softmax, from the sums that `bank_pass` left of every slab, in a fixed order.

Legend: N batch · D feature dim · S slabs · J jobs, as in `bank_pass`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .bank_pass import LOW, PLANES, SHIFT, even_exponentials, job_feature, level, mixed_exponentials
from .common import Call, feature_width, wait_for_the_last

ROW_PLANES = tl.constexpr(4)  # top, a, offset that normalises the exponentials, positive's probability
UP = tl.constexpr(15)  # weights are kept times 2^UP, that fp16 may hold those of rows far from a clip


@triton.jit
def merged_stats(
    stats_ptr, n, job, positive, N, S, scale,
    TOTAL: tl.constexpr, JOBS: tl.constexpr, LARGEST: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row's softmax over its positive and all slabs -> (top, a, reach, high, first, z).

    n is int64, TOTAL the plane of the sums of e. In units of 2^(scale * reach + high), `first` is the
    positive's exponential and z the partition.
    """
    s = tl.arange(0, BLOCK_S)
    at = stats_ptr + (s.to(tl.int64) * JOBS + job) * PLANES * N + n
    a = tl.load(stats_ptr + (n + job * PLANES * N + N))
    tops = tl.load(at, mask=s < S, other=LOW)
    top = tl.max(tops, 0)
    reach = level(top, a, LARGEST)
    factor = tl.exp2((level(tops, a, LARGEST) - reach) * scale - SHIFT)
    total = tl.sum(tl.load(at + TOTAL * N, mask=s < S, other=0.0) * factor, 0)
    gap = (positive - reach) * scale
    high = tl.maximum(gap, 0.0)
    first = tl.exp2(gap - high)
    return top, a, reach, high, first, first + total * tl.exp2(-high)


@triton.jit
def store_softmax(
    softmax_ptr, stats_ptr, query, key, n, job, N, S, scale,
    TOTAL: tl.constexpr, JOBS: tl.constexpr, LARGEST: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What normalises one row's softmax, from its query and key [D]; see `merged_stats`."""
    top, a, reach, high, first, z = merged_stats(
        stats_ptr, n, job, tl.sum(query * key, 0), N, S, scale, TOTAL, JOBS, LARGEST, BLOCK_S
    )
    out = softmax_ptr + job * ROW_PLANES * N + n
    tl.store(out, top)
    tl.store(out + N, a)
    tl.store(out + 2 * N, (reach - top) * scale + high + tl.log2(z) - UP)
    tl.store(out + 3 * N, first / z)


@triton.jit
def row_softmax_kernel(
    basic_ptr,
    weak_ptr,
    strong_ptr,
    key_ptr,
    stats_ptr,  # [S, J, PLANES, N]
    softmax_ptr,  # [J, ROW_PLANES, N]
    N,
    S,
    scale,
    D: tl.constexpr,
    QUERY: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_the_last(EARLY)
    job, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_ptr = job_feature(job, QUERY, basic_ptr, weak_ptr, strong_ptr)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    store_softmax(softmax_ptr, stats_ptr, query, key, n, job, N, S, scale, 2, len(QUERY), LARGEST, BLOCK_S)


@triton.jit
def row_weights(
    s, softmax_ptr, job, n, N, scale, MIX: tl.constexpr, LARGEST: tl.constexpr, EVEN: tl.constexpr
):
    """Probabilities of bank rows [K] for clips n [N] from their similarities s [K, N], weighted by 1-λ, times
    2^UP."""
    at = softmax_ptr + job * ROW_PLANES * N + n
    top = tl.load(at, mask=n < N, other=0.0)
    a = tl.load(at + N, mask=n < N, other=0.0)
    offset = tl.load(at + 2 * N, mask=n < N, other=0.0)
    if EVEN:
        _, w = even_exponentials(s, top[None, :], a[None, :], offset[None, :], scale, LARGEST, len(MIX))
    else:
        _, w = mixed_exponentials(s, top[None, :], a[None, :], offset[None, :], scale, MIX)
    return w


def plan_softmax(shared: dict[str, Any], key: Tensor, stats: Tensor) -> tuple[Call, Tensor]:
    """Plan `row_softmax_kernel` after a pass at the ascent's temperature -> (call, softmax
    [J, ROW_PLANES, N])."""
    (n, d), jobs = key.shape, len(shared["QUERY"])
    softmax = stats.new_empty(jobs, ROW_PLANES.value, n)
    arguments = {name: shared[name] for name in shared if name not in ("PARTNER", "MIX", "EVEN")} | {
        "key_ptr": key,
        "stats_ptr": stats,
        "softmax_ptr": softmax,
        "S": len(stats),
        "BLOCK_S": triton.next_power_of_2(len(stats)),
        "BLOCK_D": feature_width(d),
    }
    return Call(row_softmax_kernel, (jobs, n), arguments, num_warps=1), softmax
