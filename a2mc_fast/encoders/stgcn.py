"""ST-GCN as CrosSCLR, AimCLR and HiCLR pretrain it: ten blocks of graph and temporal convolution.

Every person is a clip of its own, [N M, C, T, V] stored channels last: the graph convolution is then one
batched matrix product per frame without a copy, and the convolutions need no change of layout.
(Yan et al. 2018; widths, dropout and initialisation as in the contrastive codes)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from a2mc_fast.encoders.branch import Encoder
from a2mc_fast.encoders.graph import EveryFrame, persons_apart, spatial_partitions
from a2mc_fast.skeleton import Skeleton

_TEMPORAL_KERNEL = 9
_DROPOUT = 0.5
_INIT_STD = 0.02
_PUBLIC = 16  # the narrowest base width of the public codes, which the constants above are of


class STGCN(Encoder):
    """x [N, T, C, V, M] -> [N, F], the mean over frames, joints and persons; an absent person counts.

    F is 256, or 16 times a base width below 16, the public codes'. So narrow a network, which is for small
    sets, drops nothing, and its convolutions start at He's scale and not at a deviation of 0.02: behind them
    is a BatchNorm, so the rate counts relative to the weights, and the first steps would undo what small
    random ones tell apart.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        persons: int = 2,
        frames: int = 64,
        channels: int = 16,
    ) -> None:
        super().__init__()
        self.feature_dim = min(256, 16 * channels)
        partitions = spatial_partitions(skeleton.parents)
        self.input_norm = nn.BatchNorm1d(3 * skeleton.num_joints)
        # time is halved wherever the base width doubles
        widths = [channels] * 4 + [2 * channels] * 3 + [4 * channels] * 2 + [self.feature_dim]
        strides = [1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
        self.blocks = nn.Sequential(
            GraphBlock(partitions, 3, channels, dropout=0, residual=False),
            *(
                GraphBlock(partitions, width, out, stride, dropout=_DROPOUT if channels >= _PUBLIC else 0)
                for width, out, stride in zip(widths, widths[1:], strides[1:])
            ),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                std = _INIT_STD if channels >= _PUBLIC else math.sqrt(2 / module.weight[0].numel())
                nn.init.normal_(module.weight, 0, std)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, _INIT_STD)

    def encode(self, x: Tensor) -> Tensor:
        n, persons = x.shape[0], x.shape[4]
        x = persons_apart(x)  # [N M, T, V, C]
        # one statistic per joint and axis, shared by the persons
        x = self.input_norm(x.flatten(2).flatten(0, 1)).view(x.shape).permute(0, 3, 1, 2)
        return self.blocks(x).unflatten(0, (n, persons)).mean((1, 3, 4))


class GraphBlock(nn.Module):
    """Convolution over the graph, then over time, around them a residual. x [B, C, T, V] -> [B, out, T', V]

    y[b, c, t, w] = sum_kv spread(x)[b, k, c, t, v] * (partitions * importance)[k, v, w]
    """

    partitions: Tensor  # [3, V, V]

    def __init__(
        self,
        partitions: Tensor,
        width: int,
        out: int,
        stride: int = 1,
        *,
        dropout: float,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("partitions", partitions, persistent=False)
        self.importance = nn.Parameter(torch.ones_like(partitions))
        self.spread = nn.Conv2d(width, len(partitions) * out, 1)
        self.temporal = nn.Sequential(
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, (_TEMPORAL_KERNEL, 1), (stride, 1), (_TEMPORAL_KERNEL // 2, 0)),
            nn.BatchNorm2d(out),
            nn.Dropout(dropout),
        )
        self.residual: nn.Module | None = None
        if residual and (width, stride) == (out, 1):
            self.residual = nn.Identity()
        elif residual:
            self.residual = nn.Sequential(EveryFrame(width, out, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.temporal(self._graph_convolution(x))
        return (y if self.residual is None else y + self.residual(x)).relu()

    def _graph_convolution(self, x: Tensor) -> Tensor:
        """x [B, C, T, V] -> [B, out, T, V], in storage [B, T, V, out]"""
        b, _, t, v = x.shape
        kinds = len(self.partitions)
        # storage [B, T, V, 3, out]: per frame a matrix [V 3, out], multiplied by one [V, V 3] for all
        spread = self.spread(x).permute(0, 2, 3, 1).reshape(b * t, v * kinds, -1)
        edges = (self.partitions * self.importance).permute(2, 1, 0).reshape(v, v * kinds)
        return torch.bmm(edges.expand(b * t, -1, -1), spread).view(b, t, v, -1).permute(0, 3, 1, 2)
