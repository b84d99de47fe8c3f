"""A branch of A²MC: the stream it sees, its encoder, and a projection head for each level of the feature."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast.config import Config
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.build import build_encoder
from a2mc_fast.encoders.common import per_view, projection_head
from a2mc_fast.skeleton import Skeleton, bone_stream, motion_stream


class Branch(nn.Module):
    """An encoder and the projection head of each of its levels."""

    parents: Tensor  # [V]

    def __init__(self, config: Config, skeleton: Skeleton, persons: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("parents", torch.tensor(skeleton.parents), persistent=False)
        e = config.encoder
        self.compiled: Callable[[Tensor], Tensor] | None = None
        """What runs in the place of the encoder's `encode`: the same, compiled. The trainer sets it."""
        self.encoder = build_encoder(
            e.name, skeleton, persons=persons, frames=config.views.frames, **e.options
        )
        columns, hidden = range(self.encoder.feature_dim), self.encoder.head_hidden
        self.heads = nn.ModuleDict(
            {
                name: projection_head(len(columns[part]), e.projection, hidden)
                for name, part in self.encoder.levels.items()
            }
        )

    def feature(self, x: Tensor, views: int = 1, *, wide: bool = False) -> Tensor:
        """The encoder's feature, used downstream. x [views N, T, C, V, M] joints -> [views N, feature_dim]

        `wide` computes it in float32 where fp16 is set, for gradients that it cannot hold.
        """
        with autocast(self.config, x.device, wide):
            stream = self._stream(x)
            # one view's pass is what is compiled: three in a graph would take a compiler three times as long
            return per_view(self.compiled, stream, views) if self.compiled else self.encoder(stream, views)

    def feature_beside(self, x: Tensor, other: Branch, constant: Tensor) -> tuple[Tensor, Tensor]:
        """`feature` of clips x, wide, and in the same launches another branch's of a constant."""
        mine, others = self.encoder, other.encoder
        assert isinstance(mine, BiGRU) and isinstance(others, BiGRU)
        with autocast(self.config, x.device, True):
            return mine.beside(self._stream(x), others, other._stream(constant))

    def _stream(self, x: Tensor) -> Tensor:
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


def autocast(config: Config, device: torch.device, wide: bool) -> AbstractContextManager[None]:
    """The encoder's arithmetic: bf16, or fp16 unless `wide`, on a GPU; else none, as for fp32 and tf32."""
    lower = {"bf16": torch.bfloat16} if wide else {"bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type != "cuda" or config.precision not in lower:
        return nullcontext()
    return torch.autocast("cuda", lower[config.precision])


def set_arithmetic(config: Config) -> None:
    """Have torch multiply float32 on a GPU as the run asks, and repeat its results to the bit."""
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    # what lower precisions leave in float32 of convolutions and recurrent layers may be rounded, too
    torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    torch.backends.cudnn.deterministic = True
