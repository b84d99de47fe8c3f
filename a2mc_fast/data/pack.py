"""From a reader's recordings to packed `Clips`: every recording is checked, normalised and kept, or named
and skipped.

A reader describes what it found as a `Source`; `collect` reads its jobs in worker processes, in order, and
lets the frames wait in an unnamed file, so memory holds only the jobs in flight.
"""

from __future__ import annotations

import multiprocessing
import signal
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from a2mc_fast.data.clips import Clips
from a2mc_fast.data.normalize import MAX_FRAMES, normalize_clip
from a2mc_fast.data.rules import MAX_COORDINATE, MAX_LABEL, MAX_NAME, NAME_RULE, Reason, is_label, is_name
from a2mc_fast.errors import InputError, one_line, os_reason, require
from a2mc_fast.skeleton import NTU25, Skeleton

_BATCH = 16  # jobs sent to a worker at once: keeps the cost of a message small beside the ~2 ms of a file
_AHEAD = 3  # batches in flight per worker
_WRITTEN = np.empty((0, 0, 0, 3), np.float32)  # stands in a recording for joints that have been written out


class UnusableError(InputError):
    """One recording cannot be used; the rest of its source can."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One clip as a reader yields it."""

    name: str
    label: int
    """Class from 0, or -1 where unknown."""
    joints: np.ndarray
    """[T, M, V, 3] float32, metres; an absent person is all zeros."""
    subject: int = -1
    camera: int = -1
    setup: int = -1
    train_in: tuple[str, ...] = ()
    """The protocols whose training set holds this clip; in all others it is a test clip."""


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


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a reader found: jobs in their final order, and how to read one."""

    name: str
    jobs: Iterable[Any]
    """Whatever `read` takes; must pass between processes."""
    total: int
    """Number of jobs."""
    read: Callable[[Any], Iterable[Recording | Skip]]
    protocols: tuple[str, ...]
    persons: int = 2
    """M of every clip."""
    skeleton: Skeleton = NTU25
    normalized: bool = False
    """Whether the joints have been through the pre-normalisation already."""
    unit: str = "files"
    """What a job is."""
    class_names: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    """Recordings left out before any was read."""
    notes: tuple[str, ...] = ()
    """What the user should know about the input, one sentence each."""
    expected: Mapping[str, int] = field(default_factory=dict)
    """Published counts of the whole data set: `unit`, "clips", and "PROTOCOL train" and "PROTOCOL test"."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The result of `collect`."""

    clips: Clips
    skipped: tuple[Skip, ...]
    shortened: int
    """Clips cut to the frame limit."""


def collect(
    source: Source,
    *,
    workers: int = 1,
    limit: int = MAX_FRAMES,
    folder: Path | None = None,
    command: str = "",
    progress: bool = False,
) -> Collected:
    """Read every job of `source` and pack the usable clips, in the order of the jobs.

    Of several clips with one name the first is kept. `folder` holds the frames until all are read (600 bytes
    per frame of NTU, the system's folder for temporary files by default). Raises `InputError` if no recording
    is usable.
    """
    skipped, kept, lengths, shortened = list(source.skipped), [], [], 0
    taken: set[str] = set()
    work = _Work(
        source.read, source.skeleton, source.persons, limit, source.normalized, len(source.class_names)
    )
    bar = tqdm(
        total=source.total, unit=f" {source.unit}", desc=source.name, disable=None if progress else True
    )
    with tempfile.TemporaryFile(dir=folder) as waiting, bar:
        for jobs, results in _in_order(work, source.jobs, workers):
            bar.update(jobs)
            for result, frames in results:
                if isinstance(result, Skip):
                    skipped.append(result)
                    continue
                if result.name in taken:
                    skipped.append(Skip(result.name, "listed twice"))
                    continue
                taken.add(result.name)
                waiting.write(np.ascontiguousarray(result.joints).data)
                lengths.append(len(result.joints))
                shortened += frames > limit
                kept.append(replace(result, joints=_WRITTEN))
        if not kept:
            why = [f"the first skipped: {_say(skip)}" for skip in skipped[:1]] or source.notes[:1]
            raise InputError(
                "; ".join((f"{source.name}: no usable recording, {len(skipped):,} skipped", *why))
            )
        waiting.flush()
        shape = (sum(lengths), source.persons, source.skeleton.num_joints, 3)
        clips = Clips.pack(
            np.memmap(waiting, np.float32, "c", shape=shape),
            lengths,
            [r.label for r in kept],
            source.skeleton,
            splits={p: np.array([p in r.train_in for r in kept]) for p in source.protocols},
            names=[r.name for r in kept],
            class_names=source.class_names,
            extra=_known(
                subjects=[r.subject for r in kept],
                cameras=[r.camera for r in kept],
                setups=[r.setup for r in kept],
            ),
            source=source.name,
            command=command,
            where=source.name,
        )
    return Collected(clips=clips, skipped=tuple(skipped), shortened=shortened)


def existing_folder(folder: Path, kind: str) -> Path:
    """`folder`, if it is one; `InputError` says what was expected there."""
    require(folder.exists(), f"{folder} does not exist; expected {kind}")
    require(folder.is_dir(), f"{folder} is not a folder; expected {kind}")
    return folder


def existing_file(file: Path, kind: str) -> Path:
    """`file`, if it is one; `InputError` says what was expected there."""
    require(file.exists(), f"{file} does not exist; expected {kind}")
    require(file.is_file(), f"{file} is not a file; expected {kind}")
    return file


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


@dataclass(frozen=True)
class _Work:
    """What a worker does with a batch of jobs."""

    read: Callable[[Any], Iterable[Recording | Skip]]
    skeleton: Skeleton
    persons: int
    limit: int
    normalized: bool
    classes: int
    """Number of class names, 0 where there are none."""

    def __call__(self, jobs: list[Any]) -> list[tuple[Recording | Skip, int]]:
        """Each result with the number of frames it was recorded with."""
        with np.errstate(all="ignore"):  # what overflows or is not a number is skipped by name instead
            return [self._finish(result) for job in jobs for result in self.read(job)]

    def _finish(self, result: Recording | Skip) -> tuple[Recording | Skip, int]:
        if isinstance(result, Skip):
            return result, 0
        if not is_name(result.name):
            return Skip(result.name, "name not understood", NAME_RULE), 0
        if not is_label(result.label, self.classes):
            highest = self.classes - 1 if self.classes else MAX_LABEL
            return Skip(result.name, "label out of range", f"expected 0 to {highest:,}, or -1 if unknown"), 0
        frames = len(result.joints)
        try:
            joints = np.asarray(result.joints, np.float32)
            self._check(joints)
            if self.normalized:
                joints = joints[: self.limit]
            else:
                joints = normalize_clip(joints, self.skeleton, limit=self.limit)
            self._check(joints)  # the cut may have removed every body, centring may have left the bounds
        except UnusableError as error:
            return Skip(result.name, error.reason, error.detail), 0
        return replace(result, joints=joints), frames

    def _check(self, joints: np.ndarray) -> None:
        """Raise `UnusableError` unless joints [T, M, V, 3] are poses of this skeleton."""
        if not len(joints):
            raise UnusableError("no frames")
        if joints.shape[2:] != (self.skeleton.num_joints, 3):
            raise UnusableError(
                "wrong joint count", f"{joints.shape[2]} joints, expected {self.skeleton.num_joints}"
            )
        if joints.shape[1] != self.persons:
            raise UnusableError(
                "wrong number of persons", f"{joints.shape[1]} persons, expected {self.persons}"
            )
        lowest, highest = float(joints.min()), float(joints.max())
        if not np.isfinite(lowest + highest):  # minimum and maximum are NaN if any value is
            raise UnusableError("not finite")
        if max(-lowest, highest) > MAX_COORDINATE:
            raise UnusableError("beyond 1,000 m", f"a coordinate of {max(-lowest, highest):.3g} m")
        if lowest == highest == 0:
            raise UnusableError("no body", "every coordinate is zero")


def _in_order(work: _Work, jobs: Iterable[Any], workers: int) -> Iterator[tuple[int, Any]]:
    """(number of jobs, their results) batch by batch, in the order of the jobs for any number of workers."""
    remaining = iter(jobs)
    batches = iter(lambda: list(islice(remaining, _BATCH if workers > 1 else 1)), [])
    if workers <= 1:
        yield from ((len(batch), work(batch)) for batch in batches)
        return
    # forked workers share the imported modules; where fork is missing they import them again
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    flying: deque[tuple[int, Future[Any]]] = deque()
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_leave_interrupts_to_the_parent
    ) as pool:
        try:
            for batch in batches:
                flying.append((len(batch), pool.submit(work, batch)))
                if len(flying) >= _AHEAD * workers:
                    size, future = flying.popleft()
                    yield size, future.result()
            while flying:
                size, future = flying.popleft()
                yield size, future.result()
        except BrokenProcessPool:
            raise InputError(
                "a worker process ended unexpectedly, perhaps for lack of memory; try --workers 1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _known(**values: list[int]) -> dict[str, np.ndarray]:
    """The columns in which anything is known."""
    return {name: np.asarray(v, np.int64) for name, v in values.items() if any(x >= 0 for x in v)}


def _say(skip: Skip) -> str:
    return f"{skip.name}, {skip.reason}" + (f" ({skip.detail})" if skip.detail else "")
