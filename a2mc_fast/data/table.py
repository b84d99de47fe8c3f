"""A recording as a table (.csv): one line per frame, or per person and frame.

Joints are told by their names, which are those of the skeleton; else by their order. An empty value is a
joint that was not detected, and columns of other names are passed over. The README beside names the columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from a2mc_fast.data.folders import open_recordings
from a2mc_fast.data.rules import UnusableError
from a2mc_fast.data.skeletons import SKELETONS, skeleton_of
from a2mc_fast.data.source import Recording, Source, filled, read_bytes, wrong_values
from a2mc_fast.errors import InputError, require
from a2mc_fast.skeleton import Skeleton

_MAX_BYTES = 128 << 20
_MAX_PERSONS = 8
_GAPS = 4  # times the lines: so many frames they may span, and a hundred
_AXIS = {
    "x": 0, "y": 1, "z": 2, "c": 3, "v": 3, "p": 3, "confidence": 3, "score": 3, "visibility": 3,
    "likelihood": 3,
}  # fmt: skip
_BEHIND = re.compile(rf"(.+)[ _.-]({'|'.join(_AXIS)})", re.IGNORECASE)  # nose_x
_BEFORE = re.compile(rf"({'|'.join(_AXIS)})[ _.-]?(\d+)", re.IGNORECASE)  # x1
BY_ORDER = "the joints' names are not the skeleton's; columns were taken in their order"


def open_table(path: str | Path, skeleton_name: str = "") -> Source:
    """A .csv file, or a folder of them; see `folders`. The skeleton is told by the names of the joints in the
    first of them, unless it is named."""
    path = Path(path)
    require(path.exists(), f"{path} does not exist; expected a .csv file or a folder of them")
    paths = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
    require(bool(paths), f"{path} holds no .csv files")
    return open_recordings("csv", path, paths, _skeleton(paths[0], skeleton_name), _read)


def _skeleton(path: Path, name: str) -> Skeleton:
    if name:
        return skeleton_of(name)
    try:
        names = set(_columns(_lines(path)[0]).joints)
    except UnusableError as error:
        raise InputError(f"{path}: {error.detail}") from None
    for skeleton in SKELETONS.values():
        if set(skeleton.joint_names) == names:
            return skeleton
    raise InputError(
        f"{path}: its {len(names)} joints are not named like a built-in skeleton's; tell which it is with "
        f"--skeleton {' or '.join(SKELETONS)}"
    )


class _Columns(NamedTuple):
    """Where a table has what; -1 for nowhere."""

    joints: list[str]
    places: np.ndarray  # [V, 4]: the columns of x, y, z and confidence
    frame: int
    person: int


def _columns(header: Sequence[str]) -> _Columns:
    found: dict[str, list[int]] = {}
    other = {"frame": -1, "person": -1}
    for column, title in enumerate(header):
        if title.lower() in other:
            other[title.lower()] = column
            continue
        if match := _BEHIND.fullmatch(title):
            name, axis = match[1], match[2]
        elif match := _BEFORE.fullmatch(title):
            name, axis = match[2], match[1]
        else:
            continue
        places = found.setdefault(re.sub(r"[ _.-]+", " ", name).strip().lower(), [-1] * 4)
        if places[_AXIS[axis.lower()]] >= 0:
            raise UnusableError("unreadable", f"two columns give {axis} of joint {name}")
        places[_AXIS[axis.lower()]] = column
    table = np.array(list(found.values())).reshape(-1, 4)
    has = table >= 0
    if not len(table) or not has[:, :2].all() or any(column.any() != column.all() for column in has.T):
        raise UnusableError(
            "unreadable", "the first line must name columns JOINT_x, JOINT_y of every joint, and JOINT_z and "
            "JOINT_confidence of all or none",
        )  # fmt: skip
    return _Columns(list(found), table, other["frame"], other["person"])


def _lines(path: Path) -> list[list[str]]:
    """The values of every line that is not empty, the first one's among them."""
    text = read_bytes(path, _MAX_BYTES).decode("utf-8-sig", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UnusableError("unreadable", "empty")
    separator = max(",;\t", key=lines[0].count)
    return [[value.strip(' "') for value in line.split(separator)] for line in lines]


def _read(job: Recording, skeleton: Skeleton) -> Iterable[Recording]:
    header, *lines = _lines(job.joints)
    columns = _columns(header)
    if len(columns.joints) != skeleton.num_joints:
        detail = f"{len(columns.joints)} joints, expected {skeleton.num_joints}"
        raise UnusableError("wrong joint count", detail)
    order, remarks = list(range(skeleton.num_joints)), {BY_ORDER: len(lines)}
    if set(columns.joints) == set(skeleton.joint_names):
        order, remarks = [columns.joints.index(name) for name in skeleton.joint_names], {}
    elif all(name.isdigit() for name in columns.joints):
        order, remarks = sorted(order, key=lambda joint: int(columns.joints[joint])), {}
    places = columns.places[order]
    values = _numbers(lines, len(header), [*places[places >= 0].tolist(), columns.frame, columns.person])
    frame, person = _rows(values, columns)
    axes = np.flatnonzero(places[0] >= 0)
    out = np.zeros((frame.max() + 1, person.max() + 1, len(places), len(axes)), np.float32)
    out[frame, person] = values[:, places[:, axes]]
    yield filled(job, out, axes[-1] == 3, remarks=remarks)


def _numbers(lines: list[list[str]], width: int, needed: Sequence[int]) -> np.ndarray:
    """The values of all lines, [L, width]; not a number where one is empty or not `needed`."""
    if not lines:
        raise UnusableError("no frames")
    columns = sorted(set(needed) - {-1})
    values = np.full((len(lines), width), np.nan)
    for number, line in enumerate(lines):
        if wrong := wrong_values(line, width, "the first line", columns):
            raise UnusableError("unreadable", f"line {number + 2:,} {wrong}")
        values[number, columns] = [float(line[column] or "nan") for column in columns]
    return values


def _rows(values: np.ndarray, columns: _Columns) -> tuple[np.ndarray, np.ndarray]:
    """Frame and person of every line, from 0; lines without a frame's number are one frame each."""
    frame = np.arange(len(values))
    if columns.frame >= 0:
        frame = _whole(values[:, columns.frame], "frame")
        frame = frame - frame.min()
        if frame.max() > _GAPS * len(values) + 100:
            raise UnusableError("unreadable", f"{len(values):,} lines of {frame.max() + 1:,} frames")
    person = np.zeros(len(values), int)
    if columns.person >= 0:
        if columns.frame < 0:
            raise UnusableError("unreadable", "a column person, but none called frame")
        known, person = np.unique(_whole(values[:, columns.person], "person"), return_inverse=True)
        if len(known) > _MAX_PERSONS:
            raise UnusableError("unreadable", f"{len(known):,} persons, {_MAX_PERSONS} are the most")
    if len(np.unique(np.stack((frame, person)), axis=1).T) != len(values):
        raise UnusableError("unreadable", "two lines are of one frame and person")
    return frame, person


def _whole(values: np.ndarray, name: str) -> np.ndarray:
    if not ((values % 1 == 0) & (np.abs(values) < 1e15)).all():  # false for what is not a number
        raise UnusableError("unreadable", f"the column {name} has an entry that is no whole number")
    return values.astype(np.int64)
