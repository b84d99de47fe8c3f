"""Mixing contrast (A²MC sec. III-D, Eq. 8-11) and, as its case without mixing, InfoNCE (Eq. 1).

    L  = L1 + L2 + L3
    L1 = contrast(f1, f0)    weak view: its positive f0 against the bank and the bank mixed with f1
    L2 = distill(f2 | f3)    strong view: its distribution pulled to that of f3 on the same columns
    L3 = contrast(f3, f0)    basic view: like L1

f0 key, f1 weak, f2 strong, f3 basic; all are unit rows. The banks mixed with shares λ of the positive are
never formed: with s = u·m every mixed logit is (λ u·f + (1-λ) s) / τ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import a2mc_fast.kernels as kernels
from a2mc_fast.errors import require
from a2mc_fast.kernels import reference
from a2mc_fast.kernels.problem import Contrast, Features, check_arguments

PAPER_MIX = (0.4, 0.3, 0.2, 0.1)

Backend = Literal["auto", "triton", "torch"]
"""The fused Triton kernels, or plain torch; auto is Triton on a GPU, for what the kernels can do."""


class Losses(NamedTuple):
    """Scalars, batch means; a term that is off is zero."""

    total: Tensor
    weak: Tensor  # L1
    strong: Tensor  # L2
    basic: Tensor  # L3

    @classmethod
    def of(cls, parts: Tensor) -> Losses:
        """From the parts [3], in the order of the features: basic, weak, strong."""
        basic, weak, strong = parts.unbind()
        return cls(parts.sum(), weak, strong, basic)


def mixing_contrast(
    key: Tensor,
    basic: Tensor,
    weak: Tensor | None,
    strong: Tensor | None,
    bank: Tensor,
    *,
    mix: Sequence[float] = PAPER_MIX,
    temperature: float = 0.07,
    backend: Backend = "auto",
) -> Losses:
    """The loss and its parts, batch means. Features [N, D] and bank [K, D], unit rows.

    Differentiable in basic, weak and strong, with backend torch in bank too; key is a constant. Without
    `weak` or `strong` their terms are off. Raises `ValueError` for shapes and ranges.
    """
    features, settings = Features(key, basic, weak, strong), Contrast(tuple(mix), temperature)
    check_arguments("mixing_contrast", features, bank, settings)
    for name, feature in features._asdict().items():
        if feature is not None and not feature.is_floating_point():
            raise TypeError(f"mixing_contrast: {name} must be floating point, got {feature.dtype}")
    require(backend in ("auto", "triton", "torch"), f"mixing_contrast: unknown backend {backend!r}")
    if backend == "auto":
        fused = bank.is_cuda and not bank.requires_grad and bank.shape[1] <= 256
        backend = "triton" if fused else "torch"
    form = kernels.mixing_contrast if backend == "triton" else reference
    return Losses.of(form.mixing_contrast(features, bank, settings).losses)


@torch.no_grad()
def spread(basic: Tensor) -> dict[str, Tensor]:
    """How far apart the clips of a batch lie: what shows features that collapse. basic [N, D]

    Their mean cosine similarity with one another, and the effective rank of their covariance C,
    (tr C)² / tr C²: the number of directions, were all of them as strong.
    """
    f = basic.detach()
    gram = f @ f.T
    similarity = (gram.sum() - gram.trace()) / (len(f) * (len(f) - 1))
    centred = f - f.mean(0)
    covariance = centred @ centred.T  # [N, N], whose eigenvalues are those of C
    tiny = torch.finfo(f.dtype).tiny
    rank = covariance.trace() ** 2 / covariance.square().sum().clamp_min(tiny)
    return {"feature_similarity": similarity, "feature_rank": rank}
