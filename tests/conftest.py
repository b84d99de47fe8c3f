"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; it must be told before they are imported
    os.environ["TRITON_INTERPRET"] = "1"

from a2mc_fast.data import Clips
from a2mc_fast.skeleton import NTU25, Skeleton

SMALL = Skeleton(
    parents=(0, 0, 1, 1, 1), mirror=(0, 1, 2, 4, 3), center=1, axis_z=(0, 1), axis_x=(3, 4), joint_names=()
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_clips() -> Callable[..., Clips]:
    """Random clips: make_clips(lengths, persons=2, skeleton=NTU25)."""

    def make(lengths: list[int], persons: int = 2, skeleton: Skeleton = NTU25, classes: int = 2) -> Clips:
        generator = np.random.default_rng(0)
        shape = (sum(lengths), persons, skeleton.num_joints, 3)
        labels = np.arange(len(lengths)) % classes
        split = np.arange(len(lengths)) // classes % 4 != 3
        joints = generator.standard_normal(shape, dtype=np.float32)
        return Clips.pack(joints, lengths, labels, skeleton, splits={"xsub": split})

    return make
