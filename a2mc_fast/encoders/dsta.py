"""DSTA-Net: attention over joints, then a convolution or attention over frames, eight times.

Scores are squashed by tanh instead of a softmax, and a learnt map of joints is added to them. Every person is
a clip of its own, [N M, C, T, V] stored channels last. S heads, `inter` channels per head and query or key.
(Shi et al. 2020; the configurations of its public code and of HiCLR)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast.encoders.branch import Encoder
from a2mc_fast.encoders.graph import EveryFrame, persons_apart
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import Skeleton

_HEADS = 3
_SLOPE = 0.1
_TEMPORAL_KERNEL = 7

Blocks = tuple[tuple[int, int, int, int], ...]
# width in, width out, inter, temporal stride
_SIZES: dict[str, Blocks] = {
    "full": (
        (64, 64, 16, 1),
        (64, 64, 16, 1),
        (64, 128, 32, 2),
        (128, 128, 32, 1),
        (128, 256, 64, 2),
        (256, 256, 64, 1),
        (256, 256, 64, 1),
        (256, 256, 64, 1),
    ),
    "small": (
        (32, 32, 16, 1),
        (32, 32, 16, 1),
        (32, 64, 16, 2),
        (64, 64, 16, 1),
        (64, 128, 32, 2),
        (128, 128, 32, 1),
        (128, 128, 32, 1),
        (128, 256, 32, 1),
    ),
}


class DSTANet(Encoder):
    """x [N, T, C, V, M] -> [N, 256], the mean over persons, frames and joints."""

    feature_dim = 256

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        persons: int = 2,
        frames: int = 64,
        size: Literal["full", "small"] = "full",
    ) -> None:
        super().__init__()
        if size not in _SIZES:
            raise InputError(f"unknown size {size!r}; choose one of {', '.join(_SIZES)}")
        first = _SIZES[size][0][0]
        self.input_map = nn.Sequential(nn.Conv2d(3, first, 1), nn.BatchNorm2d(first), nn.LeakyReLU(_SLOPE))
        blocks: list[nn.Module] = []
        for width, out, inter, stride in _SIZES[size]:
            plain = (width, stride) == (out, 1)
            blocks.append(SpatialAttention(skeleton.num_joints, width, out, inter, plain))
            blocks.append(TemporalConvolution(out, stride, plain))
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def encode(self, x: Tensor) -> Tensor:
        n, persons = x.shape[0], x.shape[4]
        x = self.input_map(persons_apart(x).permute(0, 3, 1, 2))
        return self.blocks(x).unflatten(0, (n, persons)).mean((1, 3, 4))


class SpatialAttention(nn.Module):
    """x [B, C, T, V] -> [B, out, T, V]: attend and project, feed forward, each beside a shortcut.

    Every joint attends to every joint, pooled over time. Queries and keys read x plus a fixed code of its
    joint, values read x alone.
    """

    code: Tensor  # [C, 1, V]

    def __init__(self, joints: int, width: int, out: int, inter: int, plain: bool) -> None:
        super().__init__()
        self.query_key = nn.Conv2d(width, 2 * _HEADS * inter, 1)
        self.scale = nn.Parameter(torch.ones(_HEADS, 1, 1))
        self.project = _conv_norm(_HEADS * width, out)
        self.feed_forward = _conv_norm(out, out)
        self.project_shortcut = nn.Identity() if plain else _conv_norm(width, out)
        self.feed_forward_shortcut = nn.Identity() if plain else _conv_norm(width, out)
        self.joint_map = nn.Parameter(torch.full((_HEADS, joints, joints), 1 / joints))
        self.register_buffer("code", position_code(joints, width)[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.project_shortcut(x) + self.project(self._attend(x)), _SLOPE)
        return F.leaky_relu(self.feed_forward_shortcut(x) + self.feed_forward(y), _SLOPE)

    def _attend(self, x: Tensor) -> Tensor:
        """The values mixed by each head. x [B, C, T, V] -> [B, S C, T, V]"""
        b, _, t, v = x.shape
        query, key = self.query_key(x + self.code.to(x.dtype)).unflatten(1, (2, _HEADS, -1)).unbind(1)
        scores = torch.einsum("bsctu,bsctv->bsuv", query, key) / (query.shape[2] * t)
        attention = scores.tanh() * self.scale + self.joint_map
        # per frame [V S, V] @ [V, C]: heads come out beside the channels, as the projection reads them
        mixing = attention.permute(0, 3, 1, 2).reshape(b, 1, v * _HEADS, v)
        return (mixing @ x.permute(0, 2, 3, 1)).reshape(b, t, v, -1).permute(0, 3, 1, 2)


class TemporalConvolution(nn.Module):
    """x [B, C, T, V] -> [B, C, T', V]: a convolution over seven frames beside a shortcut."""

    def __init__(self, width: int, stride: int, plain: bool) -> None:
        super().__init__()
        self.convolution = _conv_norm(width, width, stride, _TEMPORAL_KERNEL)
        self.shortcut = nn.Identity() if plain else _conv_norm(width, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.shortcut(x) + self.convolution(x), _SLOPE)


def _conv_norm(width: int, out: int, stride: int = 1, kernel: int = 1) -> nn.Sequential:
    """Convolution over `kernel` frames and BatchNorm."""
    convolution: nn.Module = EveryFrame(width, out, stride)
    if kernel > 1:
        convolution = nn.Conv2d(width, out, (kernel, 1), (stride, 1), (kernel // 2, 0))
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


def position_code(count: int, width: int) -> Tensor:
    """Sines and cosines of each position, in turn, wavelengths from 2 pi to 20,000 pi. -> [width, count]"""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000) / width))
    angle = frequency[:, None] * torch.arange(count)
    return torch.stack((angle.sin(), angle.cos()), 1).flatten(0, 1)
