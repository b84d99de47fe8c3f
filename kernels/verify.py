"""Whether the kernels give the right results on this device: both operations against float64 on a small problem.

A run that would use them asks once, before its first step, so that a chip or a Triton release that nobody has
tried costs a slower run and never a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .bank_ascent import bank_ascent
from .mixing_contrast import mixing_contrast

_CLIPS, _ROWS = 40, 3000  # neither a multiple of a tile
# tf32 rounds similarities to about 5e-4, which the ascent's temperature turns into some percent of a weight
_TOLERANCE = 0.05
_STEP = {"lr": 3.0, "momentum": 0.9, "weight_decay": 1e-4}


def mismatch(
    device: torch.device,
    dim: int,
    mix: Sequence[float],
    temperatures: tuple[float, float],
    *,
    distill: bool = True,
    live_target: bool = False,
) -> str:
    """Why the kernels cannot be used on `device` for features of width `dim`, or "" if they agree with float64.

    `temperatures` are those of the loss and of the ascent.
    """
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, dim, generator=generator)

    key, basic, weak, strong = (
        torch.nn.functional.normalize(rows(_CLIPS), dim=1).to(device) for _ in range(4)
    )
    bank = rows(_ROWS).to(device)
    try:
        for name, got, truth in (
            *_loss(key, basic, weak, strong, bank, mix, temperatures[0], distill, live_target),
            *_ascent(key, basic, weak, strong, bank, mix, temperatures[1], distill, live_target),
        ):
            error = ((got.double() - truth).norm() / truth.norm()).item()
            if not error <= _TOLERANCE:
                return f"{name} is off by {error:.1%} from float64"
    # whatever the compiler or driver raises means the same: not on this device
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


Comparison = tuple[str, Tensor, Tensor]  # name, kernel's result, float64


def _loss(
    key: Tensor,
    basic: Tensor,
    weak: Tensor,
    strong: Tensor,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
    distill: bool,
    live_target: bool,
) -> list[Comparison]:
    """Losses and the gradients of their sum."""
    anchors = [x.clone().requires_grad_() for x in (basic, weak, strong)]
    with torch.enable_grad():
        losses = mixing_contrast(
            key, *anchors, bank, mix, temperature, distill=distill, live_target=live_target, normalize=True
        )
        gradients = torch.autograd.grad(sum(part.sum() for part in losses), anchors)  # type: ignore[arg-type]
        exact = [x.double().requires_grad_() for x in (basic, weak, strong)]
        terms = reference.mixing_contrast(
            key.double(), *exact, bank.double(), mix, temperature,
            distill=distill, live_target=live_target, normalize=True,
        )  # fmt: skip
        truths = torch.autograd.grad(sum(part.sum() for part in terms), exact)  # type: ignore[arg-type]
    names = ("the basic gradient", "the weak gradient", "the strong gradient")
    return [
        ("the loss", torch.stack(losses).detach(), torch.stack(terms).detach()),
        *zip(names, gradients, truths, strict=True),
    ]


def _ascent(
    key: Tensor,
    basic: Tensor,
    weak: Tensor,
    strong: Tensor,
    bank: Tensor,
    mix: Sequence[float],
    temperature: float,
    distill: bool,
    live_target: bool,
) -> list[Comparison]:
    """The velocity after one step from rest."""
    rows, velocity = bank.clone(), torch.zeros_like(bank)
    bank_ascent(
        rows, velocity, key, basic, weak, strong, mix, temperature,
        **_STEP, distill=distill, live_target=live_target,
    )  # fmt: skip
    exact, exact_velocity = bank.double(), torch.zeros_like(bank, dtype=torch.float64)
    unit = torch.nn.functional.normalize(exact, dim=1).requires_grad_()
    doubles = (x.double() for x in (basic, weak, strong))
    with torch.enable_grad():
        terms = reference.mixing_contrast(
            key.double(), *doubles, unit, mix, temperature, distill=distill, live_target=live_target
        )
        (gradient,) = torch.autograd.grad(sum(part.mean() for part in terms), unit)  # type: ignore[arg-type]
    reference.bank_step(exact, exact_velocity, gradient, **_STEP)
    return [("the bank's velocity", velocity, exact_velocity)]
