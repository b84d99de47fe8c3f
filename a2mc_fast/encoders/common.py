"""What the encoders share: batch statistics per view, inference mode for normalisation alone, the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Encoder(nn.Module):
    """A backbone: forward(x [views N, C, T, V, M], views=1) -> [views N, feature_dim].

    Several views may come one after another in the batch; each is normalised by its own batch statistics.
    """

    feature_dim: int

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        raise NotImplementedError


def norm_per_view(norm: nn.Module, x: Tensor, views: int) -> Tensor:
    """Apply `norm` to each of `views` equal parts of the leading dimension, as separate forward passes
    would."""
    if views == 1:
        return norm(x)
    return torch.cat([norm(part) for part in x.chunk(views)])


@contextmanager
def norms_in_eval(module: nn.Module) -> Iterator[None]:
    """BatchNorm and dropout in inference mode, everything else as it is.

    cuDNN has no backward pass for recurrent layers in inference mode, so a GRU must stay in training mode
    while its input is attacked; it has no dropout, so its result is the same.
    """
    changed = [m for m in module.modules() if m.training and isinstance(m, _BatchNorm | nn.Dropout)]
    for m in changed:
        m.training = False
    try:
        yield
    finally:
        for m in changed:
            m.training = True


def projection_head(feature_dim: int, dim: int) -> nn.Sequential:
    """MoCo-v2's MLP head: [N, feature_dim] -> [N, dim], no normalisation."""
    return nn.Sequential(nn.Linear(feature_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, dim))
