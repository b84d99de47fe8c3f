"""The targeted semantic attack (A²MC sec. III-B, Eq. 5-6): move a clip towards the boundary of its class.

The class distribution of the clip is flattened by one Adam step on its coordinates. From a fresh state that
step is close to lr times the gradient's sign, so each gradient is first scaled to unit length per person and
frame: the last-step BiGRU passes hardly any gradient to early frames, which would otherwise stay as they are.
Clips are [N, C, T, V, M], metres.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from a2mc_fast.augment import present

Scope = Literal["person_frame", "frame", "person", "sample", "joint", "none"]
Objective = Literal["softmax", "logits", "entropy", "cross_entropy"]

# dimensions of [N, C, T, V, M] that one norm spans
_SPANS: dict[str, tuple[int, ...]] = {
    "person_frame": (1, 3),
    "frame": (1, 3, 4),
    "person": (1, 2, 3),
    "sample": (1, 2, 3, 4),
    "joint": (1,),
}
_ADAM_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-8


def semantic_attack(
    classify: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    lr: float = 0.1,
    radius: float = 0.5,
    scope: Scope = "person_frame",
    grad_norm: Scope = "person_frame",
    objective: Objective = "softmax",
    direction: Literal["descend", "ascend"] = "descend",
    reduction: Literal["sum", "mean"] = "sum",
    ranks: int = 1,
    steps: int = 1,
    mask_absent: bool = True,
) -> Tensor:
    """The perturbation rho, detached, of the same shape as x.

    `classify` maps clips to class logits [N, C]; its parameters receive no gradient. The norm of rho is at
    most `radius` metres within each `scope`; it is exactly zero where a person is absent and, after one step,
    where the gradient is exactly zero. `reduction` mean is that over the clips of all `ranks`.
    """
    x = x.detach()
    sign = -1.0 if direction == "descend" else 1.0
    rho = torch.zeros_like(x)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        with torch.enable_grad():
            attacked = (x + rho).requires_grad_()
            loss = attack_loss(classify(attacked), objective)
            loss = loss.sum() if reduction == "sum" else loss.mean() / ranks
            (gradient,) = torch.autograd.grad(loss, attacked)  # of the input only: no weight gradients
        gradient = _unit(gradient, grad_norm)
        first.lerp_(gradient, 1 - _ADAM_BETAS[0])
        second.lerp_(gradient.square(), 1 - _ADAM_BETAS[1])
        mean, spread = first / (1 - _ADAM_BETAS[0] ** step), second / (1 - _ADAM_BETAS[1] ** step)
        rho = rho + sign * lr * mean / (spread.sqrt() + _ADAM_EPS)
        if mask_absent:
            rho = rho * present(x)
        rho = _project(rho, radius, scope)
    return rho


def attack_loss(logits: Tensor, objective: Objective = "softmax") -> Tensor:
    """What the attack descends, per clip. logits [N, C] -> [N].

    softmax: squared distance of the class distribution to 1/C (Eq. 5); logits: the same without the softmax;
    entropy: the distribution's negative entropy; cross_entropy: minus that of the predicted class.
    """
    if objective == "entropy":
        log_p = logits.log_softmax(1)
        return (log_p.exp() * log_p).sum(1)
    if objective == "cross_entropy":
        return -F.cross_entropy(logits, logits.argmax(1), reduction="none")
    scores = logits.softmax(1) if objective == "softmax" else logits
    return (scores - 1 / logits.shape[1]).square().sum(1)


def _unit(gradient: Tensor, scope: Scope) -> Tensor:
    """Scale to unit length within the scope; rows that are exactly zero stay so."""
    if scope == "none":
        return gradient
    span = _SPANS[scope]
    # gradients of 1e-18 square to nothing in float32, so they are brought to order one first
    largest = gradient.abs().amax(span, keepdim=True)
    scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return scaled / torch.linalg.vector_norm(scaled, dim=span, keepdim=True).clamp_min(1e-30)


def _project(rho: Tensor, radius: float, scope: Scope) -> Tensor:
    """Scale down to a norm of at most `radius` within the scope."""
    norm = torch.linalg.vector_norm(rho, dim=_SPANS[scope], keepdim=True)
    return rho * (radius / norm.clamp_min(radius))
