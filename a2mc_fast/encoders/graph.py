"""Partitions of a skeleton's adjacency, as graph convolutions read them: y[..., w] = sum_v x[..., v] A[v, w].

Entry [v, w] is what joint w takes from joint v, so bone (joint, parent) is the entry [parent, joint] in one
direction and [joint, parent] in the other. Every column is divided by its degree. (ST-GCN sec. 3.3, CTR-GCN)
"""

from __future__ import annotations

import torch
from torch import Tensor

from a2mc_fast.skeleton import Skeleton


def spatial_partitions(skeleton: Skeleton) -> Tensor:
    """Self-loops, neighbours away from the root, neighbours towards it. -> [3, V, V] float32

    The columns of the sum add to one. Public ST-GCN code, and so this, measures distance for the root's own
    neighbours alone: all others are equally far, and a bone between two of those lies in the second partition
    in both directions.
    """
    away, towards = _outward(skeleton), _inward(skeleton)
    parents = torch.tensor(skeleton.parents)
    grandparents = parents[parents]
    # whose parent is the root or its neighbour; the root is its own parent
    near = parents[grandparents] == grandparents
    partitions = torch.stack((torch.eye(skeleton.num_joints), away + towards * ~near, towards * near))
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
