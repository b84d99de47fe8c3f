"""Partitions of a skeleton's adjacency, as graph convolutions read them: y[..., w] = sum_v x[..., v] A[v, w].

Entry [v, w] is what joint w takes from joint v, so bone (joint, parent) is the entry [parent, joint] in one
direction and [joint, parent] in the other. Every column is divided by its degree. (ST-GCN sec. 3.3, CTR-GCN)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import Skeleton

Partition = Literal["hop_clipped", "tree"]


def spatial_partitions(skeleton: Skeleton, kind: Partition = "hop_clipped") -> Tensor:
    """Self-loops, neighbours away from the root, neighbours towards it. -> [3, V, V] float32

    The columns of the sum add to one. `tree` compares true distances to the root. `hop_clipped` is what
    public ST-GCN code computes: it measures distance for the root's own neighbours alone, all others are
    equally far, so a bone between two of those lies in the second partition in both directions.
    """
    if kind not in ("hop_clipped", "tree"):
        raise InputError(f"unknown partition {kind!r}; choose one of hop_clipped, tree")
    away, towards = _outward(skeleton), _inward(skeleton)
    if kind == "hop_clipped":
        parents = torch.tensor(skeleton.parents)
        grandparents = parents[parents]
        # whose parent is the root or its neighbour; the root is its own parent
        near = parents[grandparents] == grandparents
        away, towards = away + towards * ~near, towards * near
    partitions = torch.stack((torch.eye(skeleton.num_joints), away, towards))
    return partitions / partitions.sum((0, 1))


def directed_partitions(skeleton: Skeleton) -> Tensor:
    """Self-loops, each joint's parent, each joint's children; columns of each add to one or are empty.

    -> [3, V, V] float32 (CTR-GCN)
    """
    partitions = torch.stack((torch.eye(skeleton.num_joints), _inward(skeleton), _outward(skeleton)))
    return partitions / partitions.sum(1, keepdim=True).clamp_min(1)


def _inward(skeleton: Skeleton) -> Tensor:
    """One entry [parent, joint] per bone. -> [V, V]"""
    entries = torch.zeros(skeleton.num_joints, skeleton.num_joints)
    for joint, parent in skeleton.bones:
        entries[parent, joint] = 1
    return entries


def _outward(skeleton: Skeleton) -> Tensor:
    """One entry [joint, parent] per bone. -> [V, V]"""
    return _inward(skeleton).T
