"""L1, L2, L3 of A²MC (Eq. 9-11) and their gradients with respect to the anchors, in one pass over the bank.

`bank_pass` reads the bank. `combine_kernel` adds its slabs in a fixed order and forms losses and gradients.
With the (1-λ)-weighted sums w come the probabilities of the mixed features, because sum(λ e) = e - w, and the
mean of f2's similarity under the target, because sum_k w_k (m_k·f2) = (w @ bank)·f2. Beside them it leaves
what normalises the softmaxes that the bank climbs.

Losses and gradients are those of the batch mean. Legend: N batch · K bank rows · D feature dim · S slabs ·
J jobs · T terms present, in the order basic, weak, strong.
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

from .bank_pass import LN2, LOW, PLANES, SHIFT, has_target, level, plan_pass, present
from .common import Call, check_problem, feature_width, launch_all, require, wait_for_the_last
from .problem import Contrast, Contrasted, Features, contrast_from
from .row_softmax import ROW_PLANES, merged_stats, store_softmax

_CHUNK = 32  # slabs that are read at once; 64 spill on sm_80 at a width of 64


@triton.jit
def _slab_sums(
    stats_ptr, means_ptr, n, job, a, reach, N, S, scale,
    D: tl.constexpr, JOBS: tl.constexpr, LARGEST: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row's sums over the slabs, in units of 2^(scale * reach) -> (e - w, w @ bank [D])."""
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, CHUNK)
    row = tl.zeros((BLOCK_D,), tl.float32)
    share = 0.0
    for begin in range(0, S, CHUNK):
        s = begin + c
        place = s.to(tl.int64) * JOBS + job
        at = stats_ptr + place * PLANES * N + n
        top = tl.load(at, mask=s < S, other=LOW)
        factor = tl.exp2((level(top, a, LARGEST) - reach) * scale - SHIFT)
        total = tl.load(at + 2 * N, mask=s < S, other=0.0)
        mass = tl.load(at + 3 * N, mask=s < S, other=0.0)
        share += tl.sum((total - mass) * factor, 0)
        inside = (s[:, None] < S) & (d[None, :] < D)
        means = tl.load(means_ptr + (place * N + n)[:, None] * D + d[None, :], mask=inside, other=0.0)
        row += tl.sum(means.to(tl.float32) * (mass * factor)[:, None], 0)
    return share, row


@triton.jit
def _distribution(
    query, key, stats_ptr, means_ptr, n, job, N, S, scale,
    D: tl.constexpr, JOBS: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Means under one row's softmax -> (log2 of the partition without scale * reach, reach, u·f0, a,
    probability of the positive, sum of λ times the probability, sum of w / z times the bank rows [D])."""
    positive = tl.sum(query * key, 0)
    _, a, reach, high, first, z = merged_stats(
        stats_ptr, n, job, positive, N, S, scale, 2, JOBS, LARGEST, BLOCK_S
    )
    to_probability = tl.exp2(-high) / z
    share, row = _slab_sums(
        stats_ptr, means_ptr, n, job, a, reach, N, S, scale, D, JOBS, LARGEST, BLOCK_D, CHUNK
    )
    log = tl.log2(z) + high
    return log, reach, positive, a, first / z, share * to_probability, row * to_probability


@triton.jit
def combine_kernel(
    basic_ptr,
    weak_ptr,
    strong_ptr,
    key_ptr,
    stats_ptr,  # [S, J, PLANES, N]
    means_ptr,  # [S, J, N, D]
    losses_ptr,  # [3, N]
    gradients_ptr,  # [T, N, D] of the mean over clips
    softmax_ptr,  # [J, ROW_PLANES, N] of the ascent, with CLIMB
    N,
    S,
    scale,
    second,  # the scale of the ascent's temperature
    D: tl.constexpr,
    TERMS: tl.constexpr,  # which feature each term's anchor is
    QUERY: tl.constexpr,  # which feature each job's query is
    DISTILL: tl.constexpr,  # whether the strong term has a target, which is the last job
    CLIMB: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_the_last(EARLY)
    n = tl.program_id(1).to(tl.int64)
    JOBS: tl.constexpr = len(TERMS) + DISTILL
    d = tl.arange(0, BLOCK_D)
    at = n * D + d
    key = tl.load(key_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    # one branch per term, because the strong one differs
    for term in tl.static_range(len(TERMS)):
        if tl.program_id(0) == term:
            anchor_ptr = basic_ptr if TERMS[term] == 0 else weak_ptr if TERMS[term] == 1 else strong_ptr
            anchor = tl.load(anchor_ptr + at, mask=d < D, other=0.0).to(tl.float32)
            lse, reach, positive, a, first, share, row = _distribution(
                anchor, key, stats_ptr, means_ptr, n, term, N, S, scale,
                D, JOBS, LARGEST, BLOCK_S, BLOCK_D, CHUNK,
            )  # fmt: skip
            if DISTILL and TERMS[term] == 2:
                teacher = tl.load(basic_ptr + at, mask=d < D, other=0.0).to(tl.float32)
                _, _, _, _, first_t, share_t, row_t = _distribution(
                    teacher, key, stats_ptr, means_ptr, n, len(TERMS), N, S, scale,
                    D, JOBS, LARGEST, BLOCK_S, BLOCK_D, CHUNK,
                )  # fmt: skip
                mean = first_t * positive + share_t * a + tl.sum(row_t * anchor, 0)
                gradient = (first - first_t) * key + (row - row_t) + 2.0 * (share - share_t) * anchor
            else:
                mean = positive
                gradient = (first - 1.0) * key + row + 2.0 * share * anchor
            # the mean logit of the target, or the positive, is what the log-partition is compared with
            loss = (lse + (reach - mean) * scale) * LN2
            tl.store(losses_ptr + (n + TERMS[term] * N), loss)
            out = gradients_ptr + (n + term * N) * D + d
            tl.store(out, gradient * (scale * LN2 / N), mask=d < D)
    if CLIMB:
        for job in tl.static_range(JOBS):
            if tl.program_id(0) == len(TERMS) + job:
                query_ptr = basic_ptr if QUERY[job] == 0 else weak_ptr if QUERY[job] == 1 else strong_ptr
                query = tl.load(query_ptr + at, mask=d < D, other=0.0).to(tl.float32)
                store_softmax(
                    softmax_ptr, stats_ptr, query, key, n, job, N, S, second, 4, JOBS, LARGEST, BLOCK_S
                )


def plan(features: Features, bank: Tensor, settings: Contrast) -> tuple[list[Call], Tensor, Tensor, Tensor]:
    """The launches for contiguous inputs, and what they fill: losses [3, N], gradients [T, N, D], and with a
    `climb` the ascent's sums [J, ROW_PLANES, N]."""
    terms = present(features)
    bank_pass = plan_pass(features, bank, settings, with_sums=True)
    n, d = features.key.shape
    losses = bank.new_empty(3, n) if len(terms) == 3 else bank.new_zeros(3, n)
    gradients = bank.new_empty(len(terms), n, d)
    known = bank_pass.call.arguments
    sums = _sums(features, bank, settings)
    names = ("basic_ptr", "weak_ptr", "strong_ptr", "stats_ptr", "means_ptr", "N", "scale", "second", "D")
    combine = {name: known[name] for name in (*names, "QUERY", "LARGEST", "EARLY")} | {
        "key_ptr": features.key,
        "losses_ptr": losses,
        "gradients_ptr": gradients,
        "softmax_ptr": sums,
        "S": len(bank_pass.stats),
        "TERMS": terms,
        "DISTILL": has_target(features, settings),
        "CLIMB": settings.climb > 0,
        "BLOCK_S": triton.next_power_of_2(len(bank_pass.stats)),
        "BLOCK_D": feature_width(d),
        "CHUNK": _CHUNK,
    }
    # one warp, if it can hold a row, adds its columns without meeting others
    warps = 1 if feature_width(d) <= 128 else 4
    grid = len(terms) + len(sums), n
    calls = [bank_pass.call, Call(combine_kernel, grid, combine, num_warps=warps)]
    return calls, losses, gradients, sums


def _sums(features: Features, bank: Tensor, settings: Contrast) -> Tensor:
    """Room for what the ascent needs of the loss; empty without a `climb`."""
    jobs = len(present(features)) + has_target(features, settings)
    shape = (jobs, ROW_PLANES.value, len(features.key)) if settings.climb else (0,)
    return bank.new_empty(shape)


@torch.library.custom_op("a2mc::mixing_contrast", mutates_args=())
def _op(
    key: Tensor, basic: Tensor, weak: Tensor | None, strong: Tensor | None, bank: Tensor,
    settings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean losses [3] and their gradients [T, N, D], of the terms present, both float32, and with a `climb`
    the ascent's sums [J, ROW_PLANES, N]."""
    calls, losses, gradients, sums = plan(Features(key, basic, weak, strong), bank, contrast_from(settings))
    launch_all(calls, bank.device)
    return losses.mean(1), gradients, sums


@_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *features, bank, settings = inputs
    given = Features(*features)
    gradients = bank.new_empty(len(present(given)), *given.key.shape)
    return bank.new_empty(3), gradients, _sums(given, bank, contrast_from(settings))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[1].dtype
    ctx.terms = present(Features(*inputs[:4]))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    own = grad if len(ctx.terms) == len(grad) else torch.stack([grad[term] for term in ctx.terms])
    scaled = (own[:, None, None] * gradients).to(ctx.dtype)
    anchors: list[Tensor | None] = [None] * 3
    for term, gradient in zip(ctx.terms, scaled, strict=True):
        if ctx.needs_input_grad[1 + term]:
            anchors[term] = gradient
    return None, *anchors, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def mixing_contrast(features: Features, bank: Tensor, settings: Contrast) -> Contrasted:
    """Batch means of L3, L1, L2, and the sums for the ascent: features [N, D], bank [K, D] float32.

    Differentiable in basic, weak and strong, not in key and bank: the bank's ascent is `bank_ascent`. A term
    whose feature is None is zero.
    """
    check_problem("mixing_contrast", features, bank, settings)
    require(
        not (bank.requires_grad and torch.is_grad_enabled()),
        "mixing_contrast: bank requires grad, which this operation does not give: detach it, or use "
        "reference.mixing_contrast",
    )
    require(
        settings.normalize or not settings.climb,
        "mixing_contrast: the ascent's sums are of unit rows: set normalize, too",
    )
    ready = [None if f is None else f.contiguous() for f in (features.key.detach(), *features[1:])]
    losses, _, sums = _op(*ready, bank.contiguous(), settings.numbers())
    return Contrasted(losses, sums.detach() if settings.climb else None)
