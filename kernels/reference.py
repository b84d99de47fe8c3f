"""Plain-torch form of every fused operation: the CPU path, the benchmark baseline and the tests' oracle.

The mixed banks of A²MC (Eq. 8) hold λ f + (1-λ) m for every bank row m, so with the similarity s = u·m each
of their logits is (λ u·f + (1-λ) s) / τ. One matrix product per anchor gives all of them, and the sums over
the 1 + len(mix) banks need one pass over s. Nothing of size N·K·len(mix) is stored; the largest buffers are
[N, K].

Every function takes any floating dtype: float64 in gives float64 truth out.
Legend: N batch · K bank rows · D feature dim · J = 1 + len(mix) banks (the plain one first) · τ temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import Ascent, Contrast, Contrasted, Features, Step

_BLOCK = 4096  # bank rows per pass: a [64, 4096] float32 block stays in a core's second-level cache


class _Softmax(NamedTuple):
    """Softmax of one anchor's logits over its positive and its J banks, per row."""

    lse: Tensor  # [N] log-partition
    positive: Tensor  # [N] probability of the positive
    bank: Tensor  # [J, N] probability of each bank
    weight: Tensor  # [N, K] sum over banks of (1-λ) times the probability: τ times d lse / d s


def _scales(mix: Sequence[float]) -> list[float]:
    """1 - λ of each bank, the plain one first."""
    return [1.0, *(1.0 - share for share in mix)]


def _offsets(own: Tensor, mix: Sequence[float]) -> Tensor:
    """λ u·f of each bank, the plain one first. own [N] -> [J, N]"""
    # by scalars: a tensor of shares would have to come from the host, which a CUDA graph cannot hold
    return torch.stack([share * own for share in (0.0, *mix)])


def _mean_share(bank: Tensor, mix: Sequence[float]) -> Tensor:
    """Mean of λ under the probabilities of the banks. [J, N] -> [N]"""
    return torch.stack([share * p for share, p in zip((0.0, *mix), bank, strict=True)]).sum(0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products. [N, D], [N, D] -> [N]"""
    return (a * b).sum(1)


def _softmax(
    similarity: Tensor,
    positive: Tensor,
    offset: Tensor,
    mix: Sequence[float],
    inv_tau: float,
) -> _Softmax:
    """Softmax over {positive, offset_j + (1-λ_j) s_k} / τ in one pass over s.

    similarity [N, K], positive [N], offset [J, N] (λ_j u·f, zero for the plain bank).
    """
    scales = _scales(mix)
    top = similarity.amax(1)
    # (1-λ) > 0, so the largest logit of each bank sits where s is largest: the shift is known before the pass
    highest = torch.stack([offset[j] + scale * top for j, scale in enumerate(scales)]).amax(0)
    shift = torch.maximum(positive, highest) * inv_tau
    bias = offset * inv_tau - shift
    bank = torch.zeros_like(offset)
    weight = torch.zeros_like(similarity)
    for rows, out in zip(similarity.split(_BLOCK, 1), weight.split(_BLOCK, 1), strict=True):
        for j, scale in enumerate(scales):
            exponential = torch.add(bias[j].unsqueeze(1), rows, alpha=scale * inv_tau).exp_()
            bank[j] += exponential.sum(1)
            out.add_(exponential, alpha=scale)
    first = torch.exp(positive * inv_tau - shift)
    total = first + bank.sum(0)
    return _Softmax(shift + total.log(), first / total, bank / total, weight.div_(total.unsqueeze(1)))


class _Contrast(torch.autograd.Function):
    """Cross-entropy of the positive against the bank and its mixed copies (A²MC Eq. 10; Eq. 1 without `mix`).

    anchor, key [N, D], bank [K, D] -> [N]. The anchor's gradient is formed in the forward pass, while the
    weights are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        key: Tensor,
        bank: Tensor,
        mix: tuple[float, ...],
        inv_tau: float,
    ) -> Tensor:
        positive, own = _dot(anchor, key), _dot(anchor, anchor)
        p = _softmax(anchor @ bank.T, positive, _offsets(own, mix), mix, inv_tau)
        gradient = None
        if ctx.needs_input_grad[0]:
            # d(λ f·f)/df = 2λ f: the own feature is mixed in, and nothing is detached
            gradient = (p.weight @ bank).addcmul_((p.positive - 1).unsqueeze(1), key)
            gradient.addcmul_(_mean_share(p.bank, mix).unsqueeze(1), anchor, value=2).mul_(inv_tau)
        ctx.save_for_backward(gradient, anchor, p.weight if ctx.needs_input_grad[2] else None)
        ctx.inv_tau = inv_tau
        return p.lse - positive * inv_tau

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, anchor, weight = ctx.saved_tensors
        return *_backward(grad, gradient, anchor, weight, ctx.inv_tau), None, None


class _Distill(torch.autograd.Function):
    """Cross-entropy of the anchor's similarity distribution under the teacher's (A²MC Eq. 11), both over the
    banks mixed with the anchor. As `_Contrast`."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        teacher: Tensor,
        key: Tensor,
        bank: Tensor,
        mix: tuple[float, ...],
        inv_tau: float,
    ) -> Tensor:
        positive, own = _dot(anchor, key), _dot(anchor, anchor)
        similarity = anchor @ bank.T
        p = _softmax(similarity, positive, _offsets(own, mix), mix, inv_tau)
        # the target is evaluated on the same columns, those mixed with the anchor
        t = _softmax(teacher @ bank.T, _dot(teacher, key), _offsets(_dot(teacher, anchor), mix), mix, inv_tau)
        share = _mean_share(t.bank, mix)
        mean_logit = t.positive * positive + share * own + _dot(t.weight, similarity)
        difference = p.weight.sub_(t.weight)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = difference @ bank
            gradient.addcmul_((p.positive - t.positive).unsqueeze(1), key)
            more = (_mean_share(p.bank, mix) - share).unsqueeze(1)
            gradient.addcmul_(more, anchor, value=2).mul_(inv_tau)
        ctx.save_for_backward(gradient, anchor, difference if ctx.needs_input_grad[3] else None)
        ctx.inv_tau = inv_tau
        return p.lse - mean_logit * inv_tau

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, anchor, weight = ctx.saved_tensors
        to_anchor, _, to_bank = _backward(grad, gradient, anchor, weight, ctx.inv_tau)
        return to_anchor, None, None, to_bank, None, None


def _backward(
    grad: Tensor, gradient: Tensor | None, anchor: Tensor, weight: Tensor | None, inv_tau: float
) -> tuple[Tensor | None, None, Tensor | None]:
    """Chain rule shared by both losses: (anchor, key, bank)."""
    to_anchor = None if gradient is None else grad.unsqueeze(1) * gradient
    to_bank = None if weight is None else weight.T @ ((grad * inv_tau).unsqueeze(1) * anchor)
    return to_anchor, None, to_bank


def losses_per_clip(
    features: Features, bank: Tensor, settings: Contrast
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """L3, L1 and L2 of A²MC: features [N, D], bank [K, D] -> (basic, weak, strong), each [N], None where the
    feature is. Differentiable in anchors and bank; key and teacher are constants."""
    key, basic, weak, strong = features
    rows = torch.nn.functional.normalize(bank, dim=1) if settings.normalize else bank
    rest = (key.detach(), rows, tuple(settings.mix), 1.0 / settings.temperature)
    first: Tensor = _Contrast.apply(basic, *rest)
    second = None if weak is None else _Contrast.apply(weak, *rest)
    if strong is None:
        return first, second, None
    if settings.distill:
        return first, second, _Distill.apply(strong, basic.detach(), *rest)
    return first, second, _Contrast.apply(strong, *rest)


def mixing_contrast(features: Features, bank: Tensor, settings: Contrast) -> Contrasted:
    """Batch means of L3, L1 and L2, zero where a feature is None: features [N, D], bank [K, D]."""
    parts = losses_per_clip(features, bank, settings)
    off = features.basic.new_zeros(())
    return Contrasted(torch.stack([off if part is None else part.mean() for part in parts]))


def bank_ascent(
    rows: Tensor, velocity: Tensor, features: Features, settings: Contrast, step: Step,
    sums: Tensor | None = None,
) -> Ascent:  # fmt: skip
    """One step up the batch mean of L1 + L2 + L3 (A²MC Eq. 7), in place. rows, velocity [K, D], features
    [N, D]; `sums` are for the kernels."""
    unit = torch.nn.functional.normalize(rows, dim=1).requires_grad_()
    with torch.enable_grad():
        basic, *others = losses_per_clip(features, unit, settings._replace(normalize=False))
        value = step.weight * (basic + sum(part for part in others if part is not None)).mean()
        (gradient,) = torch.autograd.grad(value, unit)
    with torch.no_grad():
        norm, movement = bank_step(rows, velocity, gradient, step)
        return Ascent(norm, movement, 1 - torch.exp(-basic).mean())


def bank_step(rows: Tensor, velocity: Tensor, gradient: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Step rows and velocity along a gradient, in place.

    rows, velocity [K, D]; gradient [K, D] of the loss with respect to the unit rows. It is carried through
    the normalisation, so it is tangential. Returns, as tensors, the mean row norm before the step and the
    mean distance that a unit row moved.
    """
    norm = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    unit = rows / norm
    tangent = (gradient - unit * _dot(unit, gradient).unsqueeze(1)) / norm
    # v <- momentum v - dL/dW + decay W, then W <- W - lr v: ascent, written as AdCo's descent on -L
    velocity.mul_(step.momentum).sub_(tangent).add_(rows, alpha=step.weight_decay)
    rows.sub_(velocity, alpha=step.lr)
    moved = torch.nn.functional.normalize(rows, dim=1) - unit
    return norm.mean(), moved.norm(dim=1).mean()


def gru_pair(sequence: Tensor, parameters: Sequence[Tensor], *, reverse: bool = False) -> Tensor:
    """Two GRUs over a sequence [T, N, W], the second one backwards in time if `reverse` -> states [T, N, 2H].

    The parameters are W_ih, W_hh, b_ih and b_hh, each of both directions in turn, as torch.nn.GRU has them.
    """
    outputs = []
    for direction in range(2):
        w_ih, w_hh, b_ih, b_hh = parameters[direction::2]
        order = sequence.flip(0) if reverse and direction else sequence
        states = [sequence.new_zeros(sequence.shape[1], w_hh.shape[1])]
        for x in order @ w_ih.T + b_ih:
            (ar, az, an), (cr, cz, cn) = x.chunk(3, 1), (states[-1] @ w_hh.T + b_hh).chunk(3, 1)
            z, n = torch.sigmoid(az + cz), torch.tanh(an + torch.sigmoid(ar + cr) * cn)
            states.append(n + z * (states[-1] - n))
        output = torch.stack(states[1:])
        outputs.append(output.flip(0) if reverse and direction else output)
    return torch.cat(outputs, 2)
