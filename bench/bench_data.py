"""Reading and normalising `.skeleton` files: files per second and core, ours and as public code does it.

`pytest bench/bench_data.py` writes recordings of about 90 frames with one or two bodies to a temporary
folder, checks that both ways give the same joints, and times both in one process. The baseline does what
public conversions do: a line at a time, a dict of floats per joint, and a matrix product per joint and frame
of a 300-frame array.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest

from a2mc_fast.data.normalize import normalize_clip
from a2mc_fast.data.ntu import read_skeleton
from a2mc_fast.skeleton import NTU25
from bench.harness import seconds
from bench.records import Record, Recorder

FILES = 24
_BODY = ("bodyID", "clipedEdges", "leftConfidence", "leftState", "rightConfidence", "rightState",
         "restricted", "leanX", "leanY", "trackingState")  # fmt: skip
_JOINT = ("x", "y", "z", "depthX", "depthY", "colorX", "colorY", "w", "qx", "qy", "qz", "trackingState")
_REST = "277.4419 191.8218 1036.233 519.1677 -0.2059419 0.05349901 0.9692109 -0.1239193 2"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of 80 to 100 frames, every third with a second body, as in NTU RGB+D."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("skeletons")
    paths = []
    for number in range(FILES):
        frames, bodies = int(rng.integers(80, 101)), 2 if number % 3 == 0 else 1
        still = rng.normal(0, 0.4, (bodies, 25, 3)) + [0, 0, 3]
        lines = [str(frames)]
        for pose in still + rng.normal(0, 0.05, (frames, bodies, 25, 3)):
            lines.append(str(bodies))
            for body in pose:
                lines += ["72057594037931101 0 1 1 1 1 0 0.02764709 -0.05745083 2", "25"]
                lines += [f"{x:.7g} {y:.7g} {z:.7g} {_REST}" for x, y, z in body]
        paths.append(folder / f"S001C001P001R001A{number + 1:03d}.skeleton")
        paths[-1].write_text("\r\n".join(lines) + "\r\n", newline="")
    return paths


def ours(path: Path) -> np.ndarray:
    """[T, 2, 25, 3], one file."""
    return normalize_clip(read_skeleton(path), NTU25)


def public(path: Path) -> np.ndarray:
    """The same in the manner of public code."""
    return public_normalize(public_read(path))


def public_read(path: Path) -> np.ndarray:
    with path.open() as file:
        frames = [_public_frame(file) for _ in range(int(file.readline()))]
    data = np.zeros((4, len(frames), 25, 3))
    for t, bodies in enumerate(frames):
        for slot, body in enumerate(bodies):
            for number, joint in enumerate(body["joints"]):
                if slot < 4 and number < 25:
                    data[slot, t, number, :] = [joint["x"], joint["y"], joint["z"]]
    energy = []
    for body_data in data:
        kept = body_data[body_data.sum(-1).sum(-1) != 0]
        energy.append(sum(kept[:, :, c].std() for c in range(3)) if len(kept) else 0.0)
    return data[np.argsort(energy)[::-1][:2]]


def _public_frame(file: TextIO) -> list[dict[str, Any]]:
    bodies = []
    for _ in range(int(file.readline())):
        body: dict[str, Any] = {key: float(value) for key, value in zip(_BODY, file.readline().split())}
        body["joints"] = [
            {key: float(value) for key, value in zip(_JOINT, file.readline().split())}
            for _ in range(int(file.readline()))
        ]
        bodies.append(body)
    return bodies


def public_normalize(data: np.ndarray) -> np.ndarray:
    """data [2, T, 25, 3] -> [T, 2, 25, 3]."""
    length = data.shape[1]
    clip = np.zeros((2, 300, 25, 3), np.float32)
    clip[:, :length] = data
    for person in clip:
        if person.sum() == 0:
            continue
        if person[0].sum() == 0:
            kept = person[person.sum(-1).sum(-1) != 0].copy()
            person *= 0
            person[: len(kept)] = kept
        for t, frame in enumerate(person):
            if frame.sum() == 0 and person[t:].sum() == 0:
                rest = 300 - t
                person[t:] = np.concatenate([person[:t]] * math.ceil(rest / t), 0)[:rest]
                break
    middle = clip[0][:, 1:2].copy()
    for person in clip:
        if person.sum() != 0:
            person[:] = (person - middle) * (person.sum(-1) != 0).reshape(300, 25, 1)
    for (start, end), target in (((0, 1), [0, 0, 1]), ((4, 8), [1, 0, 0])):
        matrix = _public_rotation(clip[0, 0, end] - clip[0, 0, start], target)
        for person in clip:
            if person.sum() == 0:
                continue
            for frame in person:
                if frame.sum() == 0:
                    continue
                for number, joint in enumerate(frame):
                    frame[number] = np.dot(matrix, joint)
    return clip[:, :length].transpose(1, 0, 2, 3)


def _public_rotation(vector: np.ndarray, target: list[int]) -> np.ndarray:
    axis = np.cross(vector, target)
    angle = np.arccos(np.clip(np.dot(vector / np.linalg.norm(vector), target), -1, 1))
    if np.abs(axis).sum() < 1e-6 or angle < 1e-6:
        return np.eye(3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@pytest.fixture(scope="module")
def agreed(recordings: list[Path]) -> Iterator[list[Path]]:
    """The recordings, after both ways gave the same joints for each."""
    for path in recordings:
        np.testing.assert_allclose(ours(path), public(path), atol=1e-4)
    yield recordings


def compare_rates(
    record: Recorder, what: str, ways: dict[str, Callable[[Path], Any]], paths: list[Path]
) -> None:
    """Files per second of each way; the public way takes over a second for all files."""

    def read(way: Callable[[Path], Any], some: list[Path]) -> list[Any]:
        return [way(path) for path in some]

    for form, way in ways.items():
        some = paths if form == "ours" else paths[:6]
        rate = len(some) / statistics.median(seconds(read, way, some) for _ in range(5))
        record(Record(what=what, form=form, per_second=rate))
        print(f"\n{what}, {form}: {rate:,.0f} files/s")


def test_read_and_normalize(record: Recorder, agreed: list[Path]) -> None:
    compare_rates(record, "reading and normalising .skeleton files", {"ours": ours, "public": public}, agreed)


def test_read(record: Recorder, agreed: list[Path]) -> None:
    compare_rates(record, "reading .skeleton files", {"ours": read_skeleton, "public": public_read}, agreed)
