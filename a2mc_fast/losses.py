"""Mixing contrast (A²MC sec. III-D, Eq. 8-11) and, as its case without mixing, InfoNCE (Eq. 1).

    L  = L1 + L2 + L3
    L1 = contrast(f1, f0)    weak view: its positive f0 against the bank and the bank mixed with f1
    L2 = distill(f2 | f3)    strong view: its distribution pulled to that of f3 on the same columns
    L3 = contrast(f3, f0)    basic view: like L1

f0 key, f1 weak, f2 strong, f3 basic; all are unit rows. The banks mixed with shares λ of the positive are
never formed: with s = u·m every mixed logit is (λ u·f + (1-λ) s) / τ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from a2mc_fast.errors import require
from a2mc_fast.kernels import reference

PAPER_MIX = (0.4, 0.3, 0.2, 0.1)


Backend = Literal["auto", "triton", "torch"]
"""The fused Triton kernels, or plain torch; auto is Triton on a GPU, for what the kernels can do."""


class Losses(NamedTuple):
    """Scalars, or [N] per clip; a term that is off is zero."""

    total: Tensor
    weak: Tensor  # L1
    strong: Tensor  # L2
    basic: Tensor  # L3


def mixing_contrast(
    key: Tensor,
    basic: Tensor,
    weak: Tensor | None,
    strong: Tensor | None,
    bank: Tensor,
    *,
    mix: Sequence[float] = PAPER_MIX,
    temperature: float = 0.07,
    strong_target: Literal["distribution", "one_hot"] = "distribution",
    normalize: bool = False,
    reduction: Literal["mean", "none"] = "mean",
    backend: Backend = "auto",
    products: Literal["tf32", "ieee"] = "tf32",
) -> Losses:
    """The loss and its parts. Features [N, D] and bank [K, D], unit rows; raw bank rows with `normalize`.

    Differentiable in basic, weak, strong and bank; key is a constant. Without `weak` or `strong` their terms
    are off. `strong_target` one_hot makes L2 a contrast like L1. The Triton kernels give no gradient to
    the bank and multiply float32 as `products` says. Raises `ValueError` for shapes and values.
    """
    _check(key, basic, weak, strong, bank, mix, temperature)
    require(backend in ("auto", "triton", "torch"), f"mixing_contrast: unknown backend {backend!r}")
    soft = strong_target == "distribution"
    if backend == "auto":
        fused = bank.is_cuda and not bank.requires_grad and bank.shape[1] <= 256
        backend = "triton" if fused else "torch"
    if backend == "triton":
        from a2mc_fast.kernels.mixing_contrast import mixing_contrast as fused_terms

        terms: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(fused_terms, precision=products)
    else:
        terms = reference.mixing_contrast
    parts = terms(
        key,
        basic,
        weak,
        strong,
        bank,
        mix,
        temperature,
        distill=soft,
        normalize=normalize,
    )
    return _reduced(parts, reduction)


def _reduced(parts: tuple[Tensor, Tensor, Tensor], reduction: Literal["mean", "none"]) -> Losses:
    """L1, L2 and L3 with their sum, per clip or as batch means."""
    losses = Losses(sum(parts[1:], parts[0]), *parts)
    return losses if reduction == "none" else Losses(*(part.mean() for part in losses))


def info_nce(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float = 0.07,
    normalize: bool = False,
    backend: Backend = "auto",
    products: Literal["tf32", "ieee"] = "tf32",
) -> Tensor:
    """InfoNCE of the query against its key and the bank (Eq. 1), per clip. [N, D], [N, D], [K, D] -> [N]"""
    return mixing_contrast(
        key,
        query,
        None,
        None,
        bank,
        mix=(),
        temperature=temperature,
        normalize=normalize,
        reduction="none",
        backend=backend,
        products=products,
    ).basic


def _check(
    key: Tensor,
    basic: Tensor,
    weak: Tensor | None,
    strong: Tensor | None,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
) -> None:
    """Shapes, dtypes and ranges only: no tensor value is read."""
    features = {"key": key, "basic": basic, "weak": weak, "strong": strong}
    shape = basic.shape
    require(
        basic.ndim == 2 and bank.ndim == 2 and shape[1] == bank.shape[1] and len(bank) > 0 and len(basic) > 0,
        f"mixing_contrast: expected features [N, D] and bank [K, D], got "
        f"{list(shape)} and {list(bank.shape)}",
    )
    for name, feature in features.items():
        if feature is not None:
            require(
                feature.shape == shape,
                f"mixing_contrast: {name} is {list(feature.shape)}, basic is {list(shape)}",
            )
            if not torch.is_floating_point(feature):
                raise TypeError(f"mixing_contrast: {name} must be floating point, got {feature.dtype}")
    require(temperature > 0, f"mixing_contrast: temperature must be > 0, got {temperature}")
    in_range = all(0 < share < 1 for share in mix)
    require(in_range, f"mixing_contrast: mix must lie in (0, 1), got {tuple(mix)}")
