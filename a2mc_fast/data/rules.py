"""The one rule of what a clip must be to be trained on, and the only place that enforces it.

The README beside states it. `prepare` skips a clip that breaks it and names it in the report: `check_clip`,
`check_poses`. `Clips` refuses the whole set: `check_set`, `check_ranges`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from a2mc_fast.errors import InputError, require

Reason = Literal[
    "unreadable", "name not understood", "listed twice", "excluded by the list", "no label",
    "no skeleton data", "label out of range", "no frames", "wrong joint count", "not finite",
    "beyond 1,000 m", "no body", "no centre", "no axes",
]  # fmt: skip
"""Why a recording is left out, as the report says it."""

MAX_COORDINATE = 1e3  # metres; anything beyond is not a pose
MAX_LABEL = 65_535  # the class layer and every count per class are made for the largest label
FEW_CLASSES = 2000  # so many classes a set may have however few its clips are
MAX_NAME = 255  # characters, as in a file's name
MAX_PROTOCOLS = 64
NAME_RULE = f"a name is 1 to {MAX_NAME} printable characters"

Range = TypeVar("Range", float, Any)  # one clip's, or a tensor of many frames'


class UnusableError(InputError):
    """One recording cannot be used; the rest of its source can."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: Reason = reason
        self.detail = detail


def is_name(text: Any) -> bool:
    """Whether `text` is a string that may be called a name: no control characters, no broken Unicode."""
    return isinstance(text, str) and 0 < len(text) <= MAX_NAME and text.isprintable()


def within_bounds(lowest: Range, highest: Range) -> Range:
    """Whether coordinates between these two are finite and not too far away; false for NaN."""
    return (lowest >= -MAX_COORDINATE) & (highest <= MAX_COORDINATE)


def somebody(lowest: Range, highest: Range) -> Range:
    """Whether coordinates between these two are those of a body, not zeros."""
    return (lowest != 0) | (highest != 0)


def most_classes(clips: int, class_names: int = 0) -> int:
    """How many classes a set of so many clips may have, with so many class names or none."""
    return min(class_names or MAX_LABEL + 1, max(FEW_CLASSES, clips), MAX_LABEL + 1)


def check_clip(name: str, label: int, classes: int) -> None:
    """Raise `UnusableError` unless a clip may be called `name` and have this label, of `classes` in all."""
    if not is_name(name):
        raise UnusableError("name not understood", NAME_RULE)
    if not -1 <= label < classes:
        raise UnusableError("label out of range", f"expected 0 to {classes - 1:,}, or -1 if unknown")


def check_poses(joints: np.ndarray, num_joints: int) -> None:
    """Raise `UnusableError` unless joints [T, M, V, 3] are poses with `num_joints`."""
    if not len(joints):
        raise UnusableError("no frames")
    if joints.shape[2:] != (num_joints, 3):
        raise UnusableError("wrong joint count", f"{joints.shape[2]} joints, expected {num_joints}")
    lowest, highest = float(joints.min()), float(joints.max())
    if not np.isfinite(lowest + highest):  # minimum and maximum are NaN if any value is
        frame, _, joint, _ = np.argwhere(~np.isfinite(joints))[0]
        raise UnusableError("not finite", f"frame {frame:,}, joint {joint}")
    if not within_bounds(lowest, highest):
        raise UnusableError("beyond 1,000 m", f"a coordinate of {max(-lowest, highest):.3g} m")
    if not somebody(lowest, highest):
        raise UnusableError("no body", "every coordinate is zero")


def check_set(
    where: str,
    lengths: Sequence[int],
    labels: Sequence[int],
    names: Sequence[str],
    class_names: Sequence[str],
    protocols: Collection[str],
) -> None:
    """Raise `InputError`, beginning with `where`, unless clips and protocols of a set keep to the rule."""
    for number, length in enumerate(lengths):
        require(length > 0, f"{where}: clip {number} has no frames")
    lowest, highest = min(labels), max(labels)
    require(lowest >= -1, f"{where}: labels must be -1 (unknown) or from 0, got {lowest}")
    require(highest <= MAX_LABEL, f"{where}: label {highest} is beyond {MAX_LABEL:,}")
    clips, named = len(labels), len(class_names)
    unnamed = class_names and highest >= named
    require(not unnamed, f"{where}: label {highest} has no name, there are {named} class names")
    most = most_classes(clips, named)
    require(
        highest < most,
        f"{where}: label {highest:,} among {clips:,} clips, of which {most:,} classes are the most; "
        "number the classes from 0 without gaps",
    )
    seen: set[str] = set()
    for name in names:
        require(name not in seen, f"{where}: two clips are called {name}")
        seen.add(name)
    for name in (*names, *protocols):
        require(is_name(name), f"{where}: {name!r:.80} cannot be a name: {NAME_RULE}")
    count = len(protocols)
    require(count <= MAX_PROTOCOLS, f"{where}: {count} protocols, {MAX_PROTOCOLS} are the most")


def check_ranges(where: str, names: Sequence[str], outside: Sequence[int], there: Sequence[int]) -> None:
    """Raise `InputError`, naming the first, unless no frame of a clip is beyond `within_bounds`, and somebody
    is there in one. outside and there are such frames of each clip."""
    far = [name for name, count in zip(names, outside) if count]
    empty = [name for name, count in zip(names, there) if not count]
    for bad, reason in (
        (far, "holds coordinates that are not finite or beyond 1,000 m"),
        (empty, "is all zeros"),
    ):
        if bad:
            raise InputError(
                f"{where}: {bad[0]} {reason} ({len(bad)} such clips); "
                "`python -m a2mc_fast.prepare` skips and lists them"
            )
