"""What a reader hands over: a `Source` of jobs, each of which is read to recordings or to named skips."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from a2mc_fast.data.rules import MAX_NAME, Reason, UnusableError
from a2mc_fast.errors import one_line, os_reason, require
from a2mc_fast.skeleton import NTU25, Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One clip as a reader yields it, and as a job, before its joints are read.

    joints are float32 [T, M, V, 3], metres, an absent person all zeros, or 2-D keypoints [T, M, V, 2]; of a
    job, whatever its source reads them from.
    """

    name: str
    label: int = -1  # class from 0, or -1 where unknown
    joints: Any
    confidence: np.ndarray | None = None  # [T, M, V], where it is known, as of 2-D keypoints
    subject: int = -1
    camera: int = -1
    setup: int = -1
    train_in: tuple[str, ...] = ()  # the protocols that train on this clip; in all others it is a test clip
    remarks: Mapping[str, int] = field(default_factory=dict)
    """What is to be said of the clip, in words that many clips may share -> frames concerned."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A recording left out, and why."""

    name: str
    reason: Reason
    detail: str = ""

    def __post_init__(self) -> None:
        # both quote the file, and the report is bounded and printable whatever that holds
        object.__setattr__(self, "name", one_line(self.name, MAX_NAME))
        object.__setattr__(self, "detail", one_line(self.detail))

    def __str__(self) -> str:
        return f"{self.name}, {self.reason}" + (f" ({self.detail})" if self.detail else "")


def as_it_is(job: Recording) -> Iterable[Recording]:
    """The `read` of a source whose jobs are recordings already."""
    yield job


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a reader found: jobs in their final order, and how to read one."""

    name: str
    jobs: Iterable[Recording]  # they must pass between processes
    total: int  # number of jobs
    read: Callable[[Recording], Iterable[Recording | Skip]] = as_it_is
    """What a job holds. Raises `UnusableError` if it cannot be read."""
    protocols: tuple[str, ...]
    persons: int = 2  # M of every clip; of a recording with more those that spread most are kept
    ranked: bool = False  # whether those that spread most come first, as where bodies have no order
    skeleton: Skeleton = NTU25
    normalized: bool = False  # whether the joints have been through the pre-normalisation already
    unit: str = "clips"  # what a job is
    class_names: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()  # recordings left out before any was read
    notes: tuple[str, ...] = ()  # what the user should know about the input, one sentence each
    expected: Mapping[str, int] = field(default_factory=dict)
    """Published counts of the whole data set: `unit`, "clips", and "PROTOCOL train" and "PROTOCOL test"."""

    def results(self, job: Recording) -> Iterator[Recording | Skip]:
        """What a job holds; where it cannot be read, why."""
        try:
            yield from self.read(job)
        except UnusableError as error:
            yield Skip(job.name, error.reason, error.detail)


def filled(job: Recording, values: np.ndarray, confident: bool, **others: Any) -> Recording:
    """The job with joints [T, M, V, C]; the last of the values is a confidence if they are `confident`."""
    if confident:
        others["confidence"], values = values[..., -1], values[..., :-1]
    return replace(job, joints=values, **others)


def until_null(joints: np.ndarray) -> np.ndarray:
    """The clip up to its last frame that is not null. joints [T, M, V, C]"""
    return joints[: np.flatnonzero((joints != 0).any((1, 2, 3))).max(initial=-1) + 1]


def wrong_values(values: Sequence[str], count: int, against: str, columns: Iterable[int] = ()) -> str:
    """What is wrong with a line of text: the number of its values, or one in `columns` that is no number. An
    empty value is one that is missing."""
    if len(values) != count:
        return f"has {len(values)} values, {against} {count}"
    for column in columns:
        try:
            float(values[column] or "nan")
        except ValueError:
            return f"has {values[column][:20]!r} where a number belongs"
    return ""


def existing(path: str | Path, kind: str, *, folder: bool = False) -> Path:
    """`path`, if it is a file, or a folder; `InputError` says what `kind` of one was expected there."""
    path = Path(path)
    require(path.exists(), f"{path} does not exist; expected {kind}")
    right, word = (path.is_dir(), "folder") if folder else (path.is_file(), "file")
    require(right, f"{path} is not a {word}; expected {kind}")
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a recording's file. `UnusableError` if there is none or it is beyond `limit` bytes."""
    try:
        info = path.stat()
        # a pipe or a device could keep us waiting, or never end
        if not stat.S_ISREG(info.st_mode):
            raise UnusableError("unreadable", "not a file")
        if info.st_size > limit:
            raise UnusableError("unreadable", f"{info.st_size:,} bytes are too many for one recording")
        with path.open("rb") as file:
            return file.read(info.st_size)
    except OSError as error:
        raise UnusableError("unreadable", os_reason(error)) from None
