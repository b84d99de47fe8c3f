"""The targeted semantic attack (A²MC sec. III-B, Eq. 5-6): move a clip towards the boundary of its class.

The class distribution of the clip is flattened by one Adam step on its coordinates. From a fresh state that
step is close to lr times the gradient's sign, so each gradient is first scaled to unit length per person and
frame: the last-step BiGRU passes hardly any gradient to early frames, which would otherwise stay as they are.
Clips are [N, T, C, V, M], metres.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ADAM_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-8
_ONE_PERSON_IN_A_FRAME = (2, 3)  # dimensions of [N, T, C, V, M] that one norm spans


def perturbation(gradient: Tensor, x: Tensor, lr: float, radius: float) -> Tensor:
    """rho of clips x from the loss's gradient there (Eq. 6)."""
    gradient = _unit(gradient)
    # a fresh Adam's step, literally: moments that start at zero, and their bias taken out again
    fresh, fresh_square = 1 - _ADAM_BETAS[0], 1 - _ADAM_BETAS[1]
    mean, spread = gradient * fresh / fresh, gradient.square() * fresh_square / fresh_square
    rho = -lr * mean / (spread.sqrt() + _ADAM_EPS) * present(x)
    norm = torch.linalg.vector_norm(rho, dim=_ONE_PERSON_IN_A_FRAME, keepdim=True)
    return rho * (radius / norm.clamp_min(radius))


def semantic_attack(
    classify: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    lr: float = 0.1,
    radius: float = 0.5,
    perturb: Callable[..., Tensor] = perturbation,
) -> Tensor:
    """The perturbation rho, detached, of the same shape as x.

    `classify` maps clips to class logits [N, C]; its parameters receive no gradient. The norm of rho is at
    most `radius` metres per person and frame; it is exactly zero where a person is absent and where the
    gradient is exactly zero. `perturb` is `perturbation`, or that compiled.
    """
    with torch.enable_grad():
        attacked = x.detach().requires_grad_()
        loss = attack_loss(classify(attacked)).sum()
        (gradient,) = torch.autograd.grad(loss, attacked)  # of the input only: no weight gradients
    return perturb(gradient, x, lr, radius)


def attack_loss(logits: Tensor) -> Tensor:
    """What the attack descends: squared distance of the class distribution to 1/C (Eq. 5). [N, C] -> [N]"""
    return (logits.softmax(1) - 1 / logits.shape[1]).square().sum(1)


def _unit(gradient: Tensor) -> Tensor:
    """Scale to unit length per person and frame; what is exactly zero stays so."""
    # gradients of 1e-18 square to nothing in float32, so they are brought to order one first
    largest = gradient.abs().amax(_ONE_PERSON_IN_A_FRAME, keepdim=True)
    scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    norm = torch.linalg.vector_norm(scaled, dim=_ONE_PERSON_IN_A_FRAME, keepdim=True)
    return scaled / norm.clamp_min(1e-30)


def present(x: Tensor) -> Tensor:
    """Whether a person has any coordinate that is not zero. x [N, T, C, V, M] -> bool [N, T, 1, 1, M]"""
    return (x != 0).any(3, keepdim=True).any(2, keepdim=True)
