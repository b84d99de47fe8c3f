"""Which set of clips this is, whatever its file is called: a checksum of each part of its content.

An identity is one word, the checksums of `PARTS` with hyphens between. Names are not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from a2mc_fast.skeleton import TREE, Skeleton

PARTS = ("frames", "lengths", "labels", "splits", "skeleton")
_ROWS = 1 << 15  # frames that a thread reads at once, 20 MB of NTU
_THREADS = 4


def identity(
    joints: Tensor, lengths: Tensor, labels: Tensor, splits: Mapping[str, Tensor], skeleton: Skeleton
) -> str:
    """That of a set. joints [F, M, V, C] as a packed file holds them, on any device."""
    tree = (getattr(skeleton, name) for name in TREE)
    texts = (
        str(lengths.tolist()),
        str(labels.tolist()),
        str([(name, mask.nonzero().flatten().tolist()) for name, mask in sorted(splits.items())]),
        str((*tree, skeleton.rotation, skeleton.max_frames)),
    )
    return "-".join(checksum.hex() for checksum in (_of_all(joints), *(_of(t.encode()) for t in texts)))


def _of_all(joints: Tensor) -> bytes:
    def part(first: int) -> bytes:
        return _of(joints[first : first + _ROWS].cpu().contiguous().numpy().data)

    with ThreadPoolExecutor(_THREADS) as pool:
        return _of(b"".join((str(joints.shape).encode(), *pool.map(part, range(0, len(joints), _ROWS)))))


def _of(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def differing(one: str, other: str) -> list[str]:
    """The parts in which two identities differ; all, if one of them is none."""
    a, b = one.split("-"), other.split("-")
    if len(a) == len(b) == len(PARTS):
        return [name for number, name in enumerate(PARTS) if a[number] != b[number]]
    return list(PARTS) * (one != other)


def copies(frames: Tensor, lengths: Tensor, train: Tensor, test: Tensor) -> Tensor:
    """Which test clips equal a training clip bit for bit. -> bool [len(test)]

    frames [F, ...] are all clips' frames one after another, lengths [N]; train and test are clip numbers.
    """
    parts = frames.cpu().contiguous().split(lengths.tolist())
    digests = [_of(part.numpy().tobytes()) for part in parts]
    known = {digests[clip] for clip in train.tolist()}
    return torch.tensor([digests[clip] in known for clip in test.tolist()], dtype=torch.bool)
