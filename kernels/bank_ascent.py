"""One ascent step of the bank on the whole loss (A²MC Eq. 7), without storing its gradient.

`bank_pass_kernel` and `row_softmax_kernel` find, per clip and term, what normalises the softmax over the
positive and all K rows; where the loss has met the same rows, it has left that. Then each program
of `ascent_kernel` owns a block of bank rows W: with unit rows m = W / |W|,

    g = dL/dm = 1/(N τ) sum_n [w1_n f1_n + (w2_n - wT_n) f2_n + w3_n f3_n]   w: (1-λ)-weighted probabilities
    v <- momentum v - (g - m (m·g)) / |W| + decay W,    W <- W - lr v        (AdCo's descent on -L)

(wT is L2's target, f3's distribution over the banks mixed with f2.) Rows and velocity are stepped in place.
`summary_kernel` averages what the log shows, in a fixed order, on the device.
Legend: N batch · K bank rows · D feature dim · J jobs, as in `bank_pass` · B blocks of bank rows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bank_pass import (
    Tile,
    has_target,
    inverse_norm,
    job_feature,
    plan_pass,
    present,
    product,
    shared_arguments,
)
from .common import Call, before_hopper, check_problem, feature_width, launch_all, require, wait_for_the_last
from .problem import Ascent, Contrast, Features, Step, contrast_from
from .row_softmax import ROW_PLANES, UP, plan_softmax, row_weights

# the step itself holds rows, velocity and gradient in registers, which is what limits the blocks
_TILES = {
    ("tf32", 32): Tile(64, 64, 32, 8, 1),
    ("tf32", 64): Tile(32, 64, 64, 4, 1),
    ("tf32", 128): Tile(64, 64, 128, 8, 1),
    ("tf32", 256): Tile(32, 32, 256, 8, 1),
    ("ieee", 32): Tile(32, 32, 32, 8, 1, 255),
    ("ieee", 64): Tile(32, 32, 32, 8, 1, 255),
    ("ieee", 128): Tile(32, 32, 32, 8, 1, 255),
    ("ieee", 256): Tile(16, 16, 16, 8, 1, 255),
}


@triton.jit
def ascent_kernel(
    basic_ptr,
    weak_ptr,
    strong_ptr,
    rows_ptr,
    velocity_ptr,
    softmax_ptr,  # [J, ROW_PLANES, N]
    partial_ptr,  # [2, B]: sums of row norms and of movements
    N,
    K,
    scale,
    gain,  # weight of the sum over clips and terms in the objective, over τ, and over 2^UP
    lr,
    momentum,
    weight_decay,
    D: tl.constexpr,
    OWN: tl.constexpr,  # which features there are, each with a job
    DISTILL: tl.constexpr,  # whether there is one more, the target, whose similarities are those of the first
    MIX: tl.constexpr,
    LARGEST: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_the_last(EARLY)
    block = tl.program_id(0)
    start = block.to(tl.int64) * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    own = k < K - start
    inside = own[:, None] & (d[None, :] < D)
    # from here on offsets are 32-bit: addresses take registers
    rows_ptr += start * D
    velocity_ptr += start * D
    at = k[:, None] * D + d[None, :]
    rows = tl.load(rows_ptr + at, mask=inside, other=0.0)
    inverse = inverse_norm(rows)
    # lest the compiler takes the reading behind the loop for this one, and holds the rows
    tl.debug_barrier()
    gradient = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        tile = n[:, None] * D + d[None, :]
        here = (n[:, None] < N) & (d[None, :] < D)
        first = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        # a loop at run time, because the registers of all jobs at once would spill
        for job in range(len(OWN)):
            feature_ptr = job_feature(job, OWN, basic_ptr, weak_ptr, strong_ptr)
            # clips beyond N have zero features, so their weights do not matter
            feature = tl.load(feature_ptr + tile, mask=here, other=0.0).to(tl.float32)
            if PRECISION == "ieee":
                s = product(rows_ptr + k * D, own, feature_ptr + n * D, n < N, D, DEPTH)
            else:
                s = tl.dot(rows, tl.trans(feature), input_precision=PRECISION)
            s *= inverse[:, None]
            w = row_weights(s, softmax_ptr, job, n, N, scale, MIX, LARGEST, EVEN)
            if DISTILL:
                # the target pulls away from f2, whose job is the last, as strongly as f3's distribution says
                first = tl.where(job == 0, s, first)
                if job == len(OWN) - 1:
                    w -= row_weights(first, softmax_ptr, len(OWN), n, N, scale, MIX, LARGEST, EVEN)
            if PRECISION == "tf32":
                w, feature = w.to(tl.float16), feature.to(tl.float16)
            gradient = tl.dot(w, feature, gradient, input_precision=PRECISION)
    # read again: cheaper than registers held through the products
    rows = tl.load(rows_ptr + at, mask=inside, other=0.0)
    # rows beyond K have a gradient too, because their similarities are zero like any other's
    inverse = tl.where(own, inverse_norm(rows), 0.0)
    along = tl.sum(rows * gradient, 1) * inverse
    # minus the tangent, decay and momentum, with one factor per row for each of their vectors
    pull = gain * inverse
    velocity = rows * (weight_decay + pull * along * inverse)[:, None] - gradient * pull[:, None]
    velocity += tl.load(velocity_ptr + at, mask=inside, other=0.0) * momentum
    tl.store(velocity_ptr + at, velocity, mask=inside)
    tl.store(rows_ptr + at, rows - velocity * lr, mask=inside)

    # distance between the unit rows from the parts of the step along and across the row: differences of
    # nearly equal unit rows would need another tile of registers
    norm = tl.sqrt(tl.sum(rows * rows, 1))
    radial = tl.sum(rows * velocity, 1) * inverse
    across = tl.maximum(tl.sum(velocity * velocity, 1) - radial * radial, 0.0) * lr * lr
    ahead = norm - lr * radial
    squared = tl.maximum(across + ahead * ahead, 1e-24)
    cosine = ahead / tl.sqrt(squared)
    distance = tl.sqrt(2.0 * tl.where(cosine > 0, across / squared / (1.0 + cosine), 1.0 - cosine))
    distance = tl.where(own, distance, 0.0)
    tl.store(partial_ptr + block, tl.sum(norm, 0))
    tl.store(partial_ptr + tl.num_programs(0) + block, tl.sum(distance, 0))


@triton.jit
def summary_kernel(
    partial_ptr,  # [2, B]
    positive_ptr,  # [N] probability of the positive
    summary_ptr,  # [3]: mean row norm, mean movement, mean probability of the negatives
    N,
    K,
    B,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_the_last(EARLY)
    at = tl.arange(0, BLOCK)
    norm, distance = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, B, BLOCK):
        b = begin + at
        norm += tl.load(partial_ptr + b, mask=b < B, other=0.0)
        distance += tl.load(partial_ptr + B + b, mask=b < B, other=0.0)
    negative = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, N, BLOCK):
        n = begin + at
        negative += 1.0 - tl.load(positive_ptr + n, mask=n < N, other=1.0)
    tl.store(summary_ptr, tl.sum(norm, 0) / K)
    tl.store(summary_ptr + 1, tl.sum(distance, 0) / K)
    tl.store(summary_ptr + 2, tl.sum(negative, 0) / N)


def plan(
    rows: Tensor, velocity: Tensor, features: Features, settings: Contrast, step: Step,
    softmax: Tensor | None = None,
) -> tuple[list[Call], Tensor]:  # fmt: skip
    """The launches for contiguous inputs, and the summary [3] that they fill."""
    shared, calls = shared_arguments(features, settings), []
    if softmax is None:
        bank_pass = plan_pass(features, rows, settings._replace(normalize=True, climb=0), with_sums=False)
        normalise, softmax = plan_softmax(shared, features.key, bank_pass.stats)
        calls = [bank_pass.call, normalise]
    (n, d), k = features.key.shape, len(rows)
    tile = _TILES[settings.precision, feature_width(d)]
    if settings.precision == "tf32" and before_hopper(rows.device):  # where operands take registers
        tile = tile._replace(rows=32, bank=32 if feature_width(d) <= 128 else 16, warps=8, registers=255)
    elif settings.precision == "tf32" and not shared["EVEN"]:  # as each exponential by itself does
        tile = tile._replace(rows=32, bank=32, warps=4 if feature_width(d) <= 128 else tile.warps)
    blocks = triton.cdiv(k, tile.bank)
    partial, summary = rows.new_empty(2, blocks), rows.new_empty(3)
    ascend = {name: shared[name] for name in shared if name not in ("QUERY", "PARTNER")} | {
        "OWN": present(features),
        "rows_ptr": rows,
        "velocity_ptr": velocity,
        "softmax_ptr": softmax,
        "partial_ptr": partial,
        "K": k,
        "gain": step.weight / (n * settings.temperature * 2**UP.value),
        "lr": step.lr,
        "momentum": step.momentum,
        "weight_decay": step.weight_decay,
        "DISTILL": has_target(features, settings),
        "PRECISION": settings.precision,
        "BLOCK_N": tile.rows,
        "BLOCK_K": tile.bank,
        "BLOCK_D": feature_width(d),
        "DEPTH": tile.depth,
    }
    summarise = {
        "partial_ptr": partial,
        "positive_ptr": softmax[0, ROW_PLANES.value - 1],  # of the basic feature
        "summary_ptr": summary,
        "N": n,
        "K": k,
        "B": blocks,
        "BLOCK": 256,
        "EARLY": shared["EARLY"],
    }
    calls += [
        Call(ascent_kernel, (blocks,), ascend, *tile[3:]),
        Call(summary_kernel, (1,), summarise),
    ]
    return calls, summary


@torch.library.custom_op("a2mc::bank_ascent", mutates_args=("rows", "velocity"))
def _op(
    rows: Tensor, velocity: Tensor,
    key: Tensor, basic: Tensor, weak: Tensor | None, strong: Tensor | None,
    settings: Sequence[float], step: Sequence[float], sums: Tensor | None,
) -> Tensor:  # fmt: skip
    """Steps rows and velocity in place -> [3]: what is in an `Ascent`."""
    features = Features(key, basic, weak, strong)
    calls, summary = plan(rows, velocity, features, contrast_from(settings), Step(*step), sums)
    launch_all(calls, rows.device)
    return summary


@_op.register_fake
def _(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(3)


@torch.no_grad()
def bank_ascent(
    rows: Tensor, velocity: Tensor, features: Features, settings: Contrast, step: Step,
    sums: Tensor | None = None,
) -> Ascent:  # fmt: skip
    """Step raw rows and velocity [K, D] float32 in place, up the batch mean of L1 + L2 + L3.

    Features [N, D]; a term whose feature is None takes no part. It is the unit rows that count, whatever
    `settings.normalize` says. `sums` are those of a loss of the same features, rows and settings whose
    `climb` was this temperature; without them the rows are read once more.
    """
    check_problem("bank_ascent", features, rows, settings)
    require(
        velocity.shape == rows.shape and velocity.dtype == rows.dtype and velocity.device == rows.device,
        f"bank_ascent: velocity must be like the rows {list(rows.shape)}, got {list(velocity.shape)} "
        f"{velocity.dtype} on {velocity.device}",
    )
    require(
        rows.is_contiguous() and velocity.is_contiguous(),
        "bank_ascent: rows and velocity are stepped in place and must be contiguous",
    )
    jobs = len(shared_arguments(features, settings)["QUERY"])
    require(
        sums is None or sums.shape == (jobs, ROW_PLANES.value, len(features.key)),
        "bank_ascent: the sums are of another loss: its features must be these",
    )
    ready = [None if f is None else f.contiguous() for f in features]
    summary = _op(rows, velocity, *ready, settings.numbers(), list(map(float, step)), sums)
    return Ascent(*summary.unbind())
