"""Partitions of a skeleton's adjacency, as graph convolutions read them: y[..., w] = sum_v x[..., v] A[v, w].

Entry [v, w] is what joint w takes from joint v, so bone (joint, parent) is the entry [parent, joint] in one
direction and [joint, parent] in the other. Every column is divided by its degree. A skeleton is given by its
joints' parents; the root is its own. (ST-GCN sec. 3.3, CTR-GCN)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def spatial_partitions(parents: Sequence[int]) -> Tensor:
    """Self-loops, neighbours away from the root, neighbours towards it. -> [3, V, V] float32

    The columns of the sum add to one. Public ST-GCN code, and so this, measures distance for the root's own
    neighbours alone: all others are equally far, and a bone between two of those lies in the second partition
    in both directions.
    """
    towards, parent = _inward(parents), torch.tensor(parents)
    grandparent = parent[parent]
    # whose parent is the root or its neighbour; the root is its own parent
    near = parent[grandparent] == grandparent
    partitions = torch.stack((torch.eye(len(parents)), towards.T + towards * ~near, towards * near))
    return partitions / partitions.sum((0, 1))


def directed_partitions(parents: Sequence[int]) -> Tensor:
    """Self-loops, each joint's parent, each joint's children; columns of each add to one or are empty.

    -> [3, V, V] float32 (CTR-GCN)
    """
    inward = _inward(parents)
    partitions = torch.stack((torch.eye(len(parents)), inward, inward.T))
    return partitions / partitions.sum(1, keepdim=True).clamp_min(1)


def _inward(parents: Sequence[int]) -> Tensor:
    """One entry [parent, joint] per bone. -> [V, V]"""
    entries = torch.zeros(len(parents), len(parents))
    for joint, parent in enumerate(parents):
        entries[parent, joint] = joint != parent
    return entries


def persons_apart(x: Tensor) -> Tensor:
    """Each person as a clip of its own, channels last in memory. x [N, T, C, V, M] -> [N M, T, V, C]"""
    return x.permute(0, 4, 1, 3, 2).flatten(0, 1).contiguous()


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
