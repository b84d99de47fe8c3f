"""What the encoders share: their interface, batch statistics per view, a frozen state, the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """A backbone: forward(x [views N, T, C, V, M], views=1) -> [views N, feature_dim].

    Several views may come one after another in the batch; each is normalised by its own batch statistics. An
    encoder defines `encode` for one view, which torch.compile may take, or `forward` itself where one pass is
    to serve all views, as recurrent layers do, which would break a compiler's graph.
    """

    feature_dim: int
    levels: Mapping[str, slice] = MappingProxyType({"feature": slice(None)})
    """Parts of the feature that are contrasted, each with a projection head and a bank of its own."""
    pairs: tuple[tuple[str, str], ...] = (("feature", "feature"),)
    """(query level, key level): the loss is summed over them, each against the key level's bank."""
    head_hidden: int | None = None
    """Hidden units of each level's head; None = as wide as the level."""
    held: dict[Any, Any] | None = None
    """What was made of the weights for several passes, within `weights_held`."""

    def weights_changed(self) -> None:
        """Within `weights_held`: what was made of the weights is out of date."""
        if self.held is not None:
            self.held.clear()

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        """One pass per view, so every BatchNorm sees that view alone."""
        return per_view(self.encode, x, views)

    def encode(self, x: Tensor) -> Tensor:
        """x [N, T, C, V, M] -> [N, feature_dim]"""
        raise NotImplementedError


def persons_apart(x: Tensor) -> Tensor:
    """Each person as a clip of its own, channels last in memory. x [N, T, C, V, M] -> [N M, T, V, C]"""
    return x.permute(0, 4, 1, 3, 2).flatten(0, 1).contiguous()


def per_view(function: Callable[[Tensor], Tensor], x: Tensor, views: int) -> Tensor:
    """Apply `function` to each of `views` equal parts of the leading dimension."""
    if views == 1:
        return function(x)
    return torch.cat([function(part) for part in x.chunk(views)])


class EveryFrame(nn.Conv2d):
    """A 1×1 convolution of every stride-th frame. x [B, C, T, V] -> [B, out, ceil(T / stride), V]

    The frames are picked before it, because oneDNN's backward pass of a strided 1×1 convolution writes past
    its memory for some narrow widths.
    """

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__(width, out, 1)
        self.every = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.every])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient; all but recurrent layers are in inference mode.

    cuDNN has no backward pass for recurrent layers in inference mode, so a GRU is in training mode while its
    input is attacked; it has no dropout, so its result is the same.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    modes = {m: m.training for m in module.modules()}
    for p in weights:
        p.requires_grad_(False)
    for m in modes:
        m.training = isinstance(m, nn.RNNBase)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        for m, training in modes.items():
            m.training = training


@contextmanager
def weights_held(*encoders: Encoder) -> Iterator[None]:
    """Within one step, what an encoder makes of its weights serves all passes until `weights_changed`.

    A captured step makes it, too, and nothing outlives the step that a replay would not write anew.
    """
    for encoder in encoders:
        encoder.held = {}
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.held = None


def projection_head(feature_dim: int, dim: int, hidden: int | None = None) -> nn.Sequential:
    """MoCo-v2's MLP head: [N, feature_dim] -> [N, dim], no normalisation; `hidden` as wide as the input."""
    hidden = hidden or feature_dim
    return nn.Sequential(nn.Linear(feature_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
