"""A branch of A²MC: the stream it sees, its encoder, and a projection head for each level of the feature.

An `Encoder` takes clips [N, T, C, V, M]; several views may come one after another along N, and each is
normalised by its own batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast.skeleton import Skeleton, bone_stream, motion_stream

if TYPE_CHECKING:
    from a2mc_fast.config import Config

Recurrence = Literal["torch", "fused", "resident"]
"""Recurrent layers by torch, which is cuDNN on a GPU, or by a form of the fused kernels."""


class FeatureNorm(nn.BatchNorm1d):
    """BatchNorm of features [N, F] without weights, for what reads them has its own. A clip alone, which has
    no batch statistics, is normalised by the running ones."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


class Encoder(nn.Module):
    """A backbone: forward(x [views N, T, C, V, M], views=1) -> [views N, feature_dim].

    It defines `encode` for one view, which torch.compile may take, or `forward` itself where one pass is to
    serve all views, as recurrent layers do, which would break a compiler's graph.
    """

    feature_dim: int
    levels: Mapping[str, slice] = MappingProxyType({"feature": slice(None)})
    """Parts of the feature that are contrasted, each with a projection head and a bank of its own."""
    pairs: tuple[tuple[str, str], ...] = (("feature", "feature"),)
    """(query level, key level): the loss is summed over them, each against the key level's bank."""
    head_hidden: int | None = None
    """Hidden units of each level's head; None = as wide as the level."""
    recurrence: Recurrence | None = None
    """How its recurrent layers are computed, if it has any: chosen once it is on its device."""
    held: dict[Any, Any] | None = None
    """What was made of the weights for several passes, within `weights_held`."""
    feature_norm: FeatureNorm | None
    """What its branch normalises the feature by, if the run asks for it."""

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


class Branch(nn.Module):
    """An encoder and the projection head of each of its levels."""

    parents: Tensor  # [V]

    def __init__(self, config: Config, skeleton: Skeleton, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("parents", torch.tensor(skeleton.parents), persistent=False)
        self.encoder = encoder
        encoder.feature_norm = FeatureNorm(encoder.feature_dim) if config.encoder.feature_norm else None
        columns, dim = range(encoder.feature_dim), config.encoder.projection
        self.heads = nn.ModuleDict(
            {
                name: projection_head(len(columns[part]), dim, encoder.head_hidden)
                for name, part in encoder.levels.items()
            }
        )

    def feature(self, x: Tensor, views: int = 1, *, wide: bool = False) -> Tensor:
        """The encoder's feature, used downstream. x [views N, T, C, V, M] joints -> [views N, feature_dim]

        `wide` computes it in float32 where fp16 is set, for gradients that it cannot hold.
        """
        with autocast(self.config, x.device, wide):
            return self.normed(self.encoder(self.stream(x), views), views)

    def normed(self, feature: Tensor, views: int = 1) -> Tensor:
        """The feature of what the encoder gave, each view normalised by itself. -> like feature"""
        if self.encoder.feature_norm is None:
            return feature
        wide = feature.to(torch.promote_types(feature.dtype, torch.float32))
        return per_view(self.encoder.feature_norm, wide, views)

    def stream(self, x: Tensor) -> Tensor:
        """What the encoder sees of joints. x [N, T, C, V, M] -> like x"""
        if self.config.stream == "motion":
            return motion_stream(x)
        return bone_stream(x, self.parents) if self.config.stream == "bone" else x

    def forward(self, x: Tensor, views: int = 1) -> dict[str, Tensor]:
        """The contrasted features by level. x [views N, T, C, V, M] -> float32 unit rows [views N, D] each"""
        return self.projected(self.feature(x, views))

    def projected(self, feature: Tensor) -> dict[str, Tensor]:
        """The contrasted features by level. feature [N, feature_dim] -> float32 unit rows [N, D] each"""
        with autocast(self.config, feature.device, wide=False):
            rows = {level: head(feature[:, self.encoder.levels[level]]) for level, head in self.heads.items()}
        return {level: F.normalize(row.float(), dim=1) for level, row in rows.items()}


def projection_head(feature_dim: int, dim: int, hidden: int | None = None) -> nn.Sequential:
    """MoCo-v2's MLP head: [N, feature_dim] -> [N, dim], no normalisation; `hidden` as wide as the input."""
    hidden = hidden or feature_dim
    return nn.Sequential(nn.Linear(feature_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def per_view(function: Callable[[Tensor], Tensor], x: Tensor, views: int) -> Tensor:
    """Apply `function` to each of `views` equal parts of the leading dimension."""
    if views == 1:
        return function(x)
    return torch.cat([function(part) for part in x.chunk(views)])


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


def autocast(config: Config, device: torch.device, wide: bool) -> AbstractContextManager[None]:
    """The encoder's arithmetic: bf16, or fp16 unless `wide`, on a GPU; else none, as for fp32 and tf32."""
    lower = {"bf16": torch.bfloat16} if wide else {"bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type != "cuda" or config.precision not in lower:
        return nullcontext()
    return torch.autocast("cuda", lower[config.precision])
