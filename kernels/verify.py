"""Whether the kernels are right on this device: each operation against float64 on a small problem.

A run that would use them asks once, before its first step, so that a chip or a Triton release that nobody has
tried costs a slower run and never a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .bank_ascent import bank_ascent
from .common import resident_programs
from .gru import gru_pair
from .gru_plan import Form
from .mixing_contrast import mixing_contrast
from .problem import Contrast, Features, Precision, Step

_CLIPS = 67  # two tiles, and a part of one
# tf32 rounds similarities to 5e-4, which the ascent's temperature turns into some percent of a weight
_TOLERANCE = 0.05
_FRAMES, _WIDTH = 4, 24


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
    return _first_mismatch(
        chain(_compare_losses(features, bank, loss), _compare_ascent(features, bank, ascent))
    )


def recurrence_mismatch(
    device: torch.device,
    hidden: int,
    clips: Sequence[int],
    dtype: torch.dtype,
    *,
    reverse: bool = False,
    precision: Precision = "tf32",
    form: Form = "fused",
) -> str:
    """Why `gru_pair` cannot be used on `device` for batches of these sizes; "" if it agrees with float64."""
    problems = ((n, wanted) for n in clips for wanted in ("all", "input", "nothing"))
    how = {"reverse": reverse, "precision": precision, "form": form}
    compare = partial(_compare_recurrence, device, hidden, dtype, how)
    return _first_mismatch(chain.from_iterable(compare(*problem) for problem in problems))


def _first_mismatch(results: Iterator[tuple[str, Tensor, Tensor]]) -> str:
    """Of results by name, beside float64's: the first beyond the tolerance, or what was raised; or ""."""
    try:
        for name, got, truth in results:
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
            losses = form(Features(key, *anchors), bank.to(dtype), settings).losses
            results.append([losses.detach(), *torch.autograd.grad(losses.sum(), anchors)])
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


def _compare_recurrence(
    device: torch.device, hidden: int, dtype: torch.dtype, how: dict[str, Any], n: int, wanted: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """States and gradients of a pair: all of them, the input's from the final states, or no gradients."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator).to(device) - 1

    scale = 2 * hidden**-0.5
    shapes = [(3 * hidden, _WIDTH)] * 2 + [(3 * hidden, hidden)] * 2 + [(3 * hidden,)] * 4
    weights = [scale * uniform(*shape) for shape in shapes]
    x, final = uniform(_FRAMES, n, _WIDTH).to(dtype), wanted == "input"
    results = []
    for kind in (dtype, torch.float64):
        leaf = x.to(kind, copy=True).requires_grad_(wanted != "nothing")
        copies = [w.to(torch.float32 if kind == dtype else kind) for w in weights]
        parameters = [w.requires_grad_(wanted == "all") for w in copies]
        with torch.enable_grad():
            if kind == dtype:
                states = gru_pair(leaf, parameters, final=final, **how)
            else:
                states = reference.gru_pair(leaf, parameters, reverse=how["reverse"])
                last = states[0, :, hidden:] if how["reverse"] else states[-1, :, hidden:]
                states = torch.cat((states[-1, :, :hidden], last), 1) if final else states
        leaves = [w for w in (leaf, *parameters) if w.requires_grad]
        direction = torch.linspace(-1, 1, states.numel(), device=device).view(states.shape).to(dtype)
        gradients = torch.autograd.grad(states, leaves, direction.to(kind)) if leaves else ()
        results.append([states.detach(), *gradients])
    names = ["a GRU's states", "the gradient of a GRU's input"]
    names += [
        f"the gradient of a GRU's {kind}" for kind in ("W_ih", "W_hh", "b_ih", "b_hh") for _ in range(2)
    ]
    yield from zip(names[: len(results[0])], *results, strict=True)
