"""ST-GCN as CrosSCLR, AimCLR and HiCLR pretrain it: ten blocks of graph and temporal convolution.

Every person is a clip of its own, [N M, C, T, V] stored channels last: the graph convolution is then one
batched matrix product per frame without a copy, and the convolutions need no change of layout.
(Yan et al. 2018; widths, dropout and initialisation as in the contrastive codes)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from a2mc_fast.encoders.branch import Encoder
from a2mc_fast.encoders.graph import EveryFrame, persons_apart, spatial_partitions
from a2mc_fast.skeleton import Skeleton

_TEMPORAL_KERNEL = 9
_DROPOUT = 0.5
_INIT_STD = 0.02


class STGCN(Encoder):
    """x [N, T, C, V, M] -> [N, 256], the mean over frames, joints and persons; an absent person counts."""

    feature_dim = 256

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        persons: int = 2,
        frames: int = 64,
        channels: int = 16,
    ) -> None:
        super().__init__()
        partitions = spatial_partitions(skeleton.parents)
        self.input_norm = nn.BatchNorm1d(3 * skeleton.num_joints)
        # time is halved wherever the base width doubles
        widths = [channels] * 4 + [2 * channels] * 3 + [4 * channels] * 2 + [self.feature_dim]
        strides = [1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
        self.blocks = nn.Sequential(
            GraphBlock(partitions, 3, channels, residual=False),
            *(
                GraphBlock(partitions, width, out, stride)
                for width, out, stride in zip(widths, widths[1:], strides[1:])
            ),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, _INIT_STD)
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
        self, partitions: Tensor, width: int, out: int, stride: int = 1, residual: bool = True
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
            nn.Dropout(_DROPOUT if residual else 0),
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
