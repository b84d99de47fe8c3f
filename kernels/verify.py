"""Whether the kernels are right on this device: both operations against float64 on a small problem.

A run that would use them asks once, before its first step, so that a chip or a Triton release that nobody has
tried costs a slower run and never a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .bank_ascent import bank_ascent
from .common import resident_programs
from .mixing_contrast import mixing_contrast
from .problem import Contrast, Features, Step

_CLIPS = 67  # two tiles, and a part of one
# tf32 rounds similarities to 5e-4, which the ascent's temperature turns into some percent of a weight
_TOLERANCE = 0.05


def mismatch(device: torch.device, dim: int, loss: Contrast, ascent: Contrast) -> str:
    """Why the kernels cannot be used on `device` for features of width `dim`; "" if they agree with float64.

    The tolerance is wide: it tells a broken kernel from a right one, and not one rounding from another.
    """
    generator = torch.Generator().manual_seed(0)

    def gaussian(count: int) -> Tensor:
        return torch.randn(count, dim, generator=generator).to(device)

    features = Features(*(F.normalize(gaussian(_CLIPS), dim=1) for _ in range(4)))
    # several tiles of bank rows for each program
    bank = gaussian(12 * resident_programs(device) + 5)
    try:
        for compared in (_compare_losses(features, bank, loss), _compare_ascent(features, bank, ascent)):
            for name, got, truth in compared:
                error = ((got.double() - truth).norm() / truth.norm()).item()
                if not error <= _TOLERANCE:
                    return f"{name} is off by {error:.1%} from float64"
    # whatever the compiler or the driver raises means the same: not on this device
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return ""


def _compare_losses(
    features: Features, bank: Tensor, settings: Contrast
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Losses and the gradients of their sum: name, the kernels' result, float64."""
    results = []
    for form, dtype in ((mixing_contrast, torch.float32), (reference.mixing_contrast, torch.float64)):
        key, *anchors = (x.to(dtype, copy=True).requires_grad_() for x in features if x is not None)
        with torch.enable_grad():
            total = torch.stack(form(Features(key, *anchors), bank.to(dtype), settings))
            results.append([total.detach(), *torch.autograd.grad(total.sum(), anchors)])
    names = ("the loss", "the gradient of basic", "the gradient of weak", "the gradient of strong")
    yield from zip(names, *results, strict=True)


def _compare_ascent(
    features: Features, bank: Tensor, settings: Contrast
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Velocity and rows after one step from rest: name, the kernels' result, float64."""
    results = []
    for form, dtype in ((bank_ascent, torch.float32), (reference.bank_ascent, torch.float64)):
        rows = bank.to(dtype, copy=True)
        velocity = torch.zeros_like(rows)
        given = Features(*(x.to(dtype) for x in features if x is not None))
        form(rows, velocity, given, settings, Step())
        results.append([velocity, rows])
    yield from zip(("the bank's velocity", "the stepped bank"), *results, strict=True)
