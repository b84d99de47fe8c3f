"""Fixtures shared by the tests, and on what they run: the CPU, or with --gpu those that need a GPU, on it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# workers of pytest-xdist have other arguments, but the environment of the process that started them
_FLAG = "A2MC_FAST_GPU_TESTS"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[_FLAG] = str(int("--gpu" in sys.argv))
GPU = os.environ[_FLAG] == "1"
if not GPU:
    # before torch looks for a GPU and Triton is imported, and for the processes that tests start too
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from a2mc_fast.data import Clips
from a2mc_fast.skeleton import NTU25, Skeleton

# a GPU is made up where torch knows of none; a build for real ones has its own ideas
collect_ignore = ["test_offline_gpu.py"] if torch.version.cuda else []

SMALL = Skeleton(
    parents=(0, 0, 1, 1, 1), mirror=(0, 1, 2, 4, 3), center=1, axis_z=(0, 1), axis_x=(3, 4), joint_names=()
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that need a GPU, and no others")


def pytest_configure(config: pytest.Config) -> None:
    if GPU and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch sees no GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = "offline" in config.getoption("markexpr")

    def belongs(item: pytest.Item) -> bool:
        if item.get_closest_marker("offline") and not asked:
            return False
        only_there = item.get_closest_marker("gpu") is not None
        return only_there or item.get_closest_marker("anywhere") is not None if GPU else not only_there

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = [item for item in items if belongs(item)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On a lent GPU say at once why a test failed: the run may be ended before its summary."""
    if GPU and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} {report.when}:\n{report.longreprtext[-1500:]}", flush=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def memory_starts_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a lane which a kernel leaves unwritten shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = new_empty(self, *args, **kwargs)
        module = sys._getframe(1).f_globals.get("__name__", "")
        return out.fill_(math.nan) if module.startswith("a2mc_fast.kernels") else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


CLASSES = ["sit", "stand", "wave", "jump"]


def write_archive(path: Path) -> None:
    """A clip archive of 40 random recordings of two persons, four classes, protocol xsub."""
    lengths = np.arange(40) % 9 + 20
    joints = np.random.default_rng(0).standard_normal((lengths.sum(), 2, SMALL.num_joints, 3))
    np.savez(
        path,
        joints=joints.astype(np.float32),
        lengths=lengths,
        labels=np.arange(40) % 4,
        parents=SMALL.parents,
        mirror=SMALL.mirror,
        center=SMALL.center,
        axis_z=SMALL.axis_z,
        axis_x=SMALL.axis_x,
        split_xsub=np.arange(40) // 4 % 4 != 3,
        class_names=np.array(CLASSES),
    )


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
