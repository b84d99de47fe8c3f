"""Whether the kernels are right on this device: both operations against float64 on a small problem.

A run that would use them asks once, before its first step, so that a chip or a Triton release that nobody has
tried costs a slower run and never a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .bank_ascent import bank_ascent
from .common import Precision, resident_programs
from .mixing_contrast import mixing_contrast

_CLIPS = 67  # two tiles, and a part of one
# tf32 rounds similarities to 5e-4, which the ascent's temperature turns into some percent of a weight
_TOLERANCE = 0.05
_LR, _DECAY = 3.0, 1e-4


class _Problem(NamedTuple):
    features: tuple[Tensor, ...]  # key, basic, weak, strong [N, D]
    bank: Tensor  # [K, D], rows of any length
    mix: Sequence[float]
    temperatures: tuple[float, float]
    distill: bool
    precision: Precision


def mismatch(
    device: torch.device,
    dim: int,
    mix: Sequence[float],
    temperatures: tuple[float, float],
    *,
    distill: bool = True,
    precision: Precision = "tf32",
) -> str:
    """Why the kernels cannot be used on `device` for features of width `dim`; "" if they agree with float64.

    `temperatures` are those of the loss and of the ascent. The tolerance is wide: it tells a broken kernel
    from a right one, and not one rounding from another.
    """
    generator = torch.Generator().manual_seed(0)

    def gaussian(count: int) -> Tensor:
        return torch.randn(count, dim, generator=generator).to(device)

    features = tuple(F.normalize(gaussian(_CLIPS), dim=1) for _ in range(4))
    # several tiles of bank rows for each program
    bank = gaussian(12 * resident_programs(device) + 5)
    problem = _Problem(features, bank, mix, temperatures, distill, precision)
    try:
        for compare in (_compare_losses, _compare_ascent):
            for name, got, truth in compare(problem):
                error = ((got.double() - truth).norm() / truth.norm()).item()
                if not error <= _TOLERANCE:
                    return f"{name} is off by {error:.1%} from float64"
    # whatever the compiler or the driver raises means the same: not on this device
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return ""


def _compare_losses(p: _Problem) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Losses and the gradients of their sum: name, the kernels' result, float64."""
    results = []
    fused = partial(mixing_contrast, precision=p.precision)
    for form, dtype in ((fused, torch.float32), (reference.mixing_contrast, torch.float64)):
        key, *anchors = (x.to(dtype, copy=True).requires_grad_() for x in p.features)
        basic, weak, strong = anchors
        with torch.enable_grad():
            losses = form(
                key, basic, weak, strong, p.bank.to(dtype), p.mix, p.temperatures[0],
                distill=p.distill, normalize=True,
            )  # fmt: skip
            total = torch.stack(losses)
            results.append([total.detach(), *torch.autograd.grad(total.sum(), anchors)])
    names = ("the loss", "the gradient of basic", "the gradient of weak", "the gradient of strong")
    yield from zip(names, *results, strict=True)


def _compare_ascent(p: _Problem) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The velocity after one step from rest."""
    key, basic, weak, strong = p.features
    rows, velocity = p.bank.clone(), torch.zeros_like(p.bank)
    bank_ascent(
        rows, velocity, key, basic, weak, strong, p.mix, p.temperatures[1],
        lr=_LR, momentum=0.9, weight_decay=_DECAY, distill=p.distill, precision=p.precision,
    )  # fmt: skip

    exact, truth = p.bank.double(), torch.zeros_like(p.bank, dtype=torch.float64)
    key, basic, weak, strong = (x.double() for x in p.features)
    with torch.enable_grad():
        unit = F.normalize(exact, dim=1).requires_grad_()
        losses = reference.mixing_contrast(
            key, basic, weak, strong, unit, p.mix, p.temperatures[1], distill=p.distill
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum() / len(key), unit)
    reference.bank_step(exact, truth, gradient, lr=_LR, momentum=0.9, weight_decay=_DECAY)
    yield "the bank's velocity", velocity, truth
    yield "the stepped bank", rows, exact
