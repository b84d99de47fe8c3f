"""OpenPose's output (--write_json): for each recording a folder with one JSON file per frame.

A frame's `people` have pose_keypoints_2d, x, y and confidence of every joint, in no lasting order. A body
takes the place of the body that was last nearest to it; at most eight places are kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2mc_fast.data.folders import open_recordings
from a2mc_fast.data.rules import UnusableError
from a2mc_fast.data.skeletons import skeleton_of
from a2mc_fast.data.source import Recording, Source, existing, filled, read_bytes
from a2mc_fast.errors import InputError, require
from a2mc_fast.files import parse_json
from a2mc_fast.skeleton import Skeleton

_KEY = "pose_keypoints_2d"
_MAX_BODIES = 8
_LARGEST = 1e6  # pixels
_MAX_FRAMES = 20_000
_MAX_BYTES = 4 << 20  # a frame of a hundred bodies with faces and hands


def open_openpose(folder: str | Path, skeleton_name: str = "") -> Source:
    """A folder of frames, or folders of them; see `folders`. BODY_25 unless another skeleton is named."""
    folder = existing(folder, "a folder of OpenPose's JSON files", folder=True)
    paths = sorted(
        Path(place) for place, _, files in os.walk(folder) if any(file.endswith(".json") for file in files)
    )
    require(bool(paths), f"neither {folder} nor a folder in it holds .json files of frames")
    skeleton = skeleton_of(skeleton_name or "openpose25")
    return open_recordings("openpose", folder, paths, skeleton, _read, ranked=True)


def _read(job: Recording, skeleton: Skeleton) -> Iterable[Recording]:
    files = sorted(job.joints.glob("*.json"), key=_frame_number)
    if len(files) > _MAX_FRAMES:
        raise UnusableError("unreadable", f"more than {_MAX_FRAMES:,} frames")
    placed = track([_bodies(file, skeleton.num_joints) for file in files], skeleton.num_joints)
    yield filled(job, placed, True)


def _frame_number(file: Path) -> tuple[int, str]:
    """The last number in a name such as walk_000000000017_keypoints.json, of up to 18 digits."""
    digits = re.findall(r"\d{1,18}", file.stem)
    return int(digits[-1]) if digits else -1, file.name


def _bodies(file: Path, joints: int) -> np.ndarray:
    """The bodies of a frame, float32 [B, V, 3]: x, y, confidence."""
    try:
        content = parse_json(read_bytes(file, _MAX_BYTES), file.name)
    except InputError as error:
        told = f"{file.name}: {error.detail}" if isinstance(error, UnusableError) else str(error)
        raise UnusableError("unreadable", told) from None
    people = content.get("people") if isinstance(content, dict) else None
    if not isinstance(people, list):
        raise UnusableError("unreadable", f"{file.name} has no list of people")
    found = [body for person in people if (body := _body(person, file.name, joints)) is not None]
    return np.array(found, np.float32).reshape(-1, joints, 3)


def _body(person: Any, where: str, joints: int) -> np.ndarray | None:
    values = person.get(_KEY) if isinstance(person, dict) else None
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise UnusableError("unreadable", f"{where}: a person without numbers in {_KEY}")
    if not values:
        return None
    if len(values) != 3 * joints:
        detail = f"{where}: {len(values) / 3:g} joints, expected {joints}; --skeleton names another skeleton"
        raise UnusableError("wrong joint count", detail)
    # a whole number may have hundreds of digits
    return np.array([float(value) if abs(value) < _LARGEST else np.nan for value in values]).reshape(-1, 3)


def track(frames: Sequence[np.ndarray], joints: int) -> np.ndarray:
    """Bodies [B, V, 3] of each frame at lasting places: float32 [T, M, V, 3], zeros where nobody is.

    Places and bodies that are nearest are paired first; bodies beyond the places open new ones.
    """
    places: list[np.ndarray] = []  # where the body of each place was last
    slots: list[tuple[int, int, np.ndarray]] = []
    for number, bodies in enumerate(frames):
        centers = [_center(body) for body in bodies]
        pairs = sorted(
            (float(((place - center) ** 2).sum()), p, b)
            for p, place in enumerate(places)
            for b, center in enumerate(centers)
        )
        taken: dict[int, int] = {}  # body -> place
        for _, p, b in pairs:
            if b not in taken and p not in taken.values():
                taken[b] = p
        for b, body in enumerate(bodies):
            if b not in taken and len(places) < _MAX_BODIES:
                taken[b] = len(places)
                places.append(centers[b])
            if b in taken:
                places[taken[b]] = centers[b]
                slots.append((number, taken[b], body))
    out = np.zeros((len(frames), max(len(places), 1), joints, 3), np.float32)
    for number, p, body in slots:
        out[number, p] = body
    return out


def _center(body: np.ndarray) -> np.ndarray:
    """Mean of the joints that were seen, [2]."""
    seen = body[body[:, 2] > 0, :2]
    return seen.mean(0) if len(seen) else np.zeros(2)
