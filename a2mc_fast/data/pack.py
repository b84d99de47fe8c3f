"""From a reader's recordings to packed `Clips`: every recording is checked, normalised and kept, or named
and skipped.

A reader describes what it found as a `Source`; `collect` reads its jobs in worker processes, in order, and
lets the frames wait in an unnamed file, so memory holds only the jobs in flight.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from a2mc_fast.data.clips import Clips
from a2mc_fast.data.keypoints import LEAST, as_joints
from a2mc_fast.data.normalize import usable
from a2mc_fast.data.rules import UnusableError, check_clip, most_classes
from a2mc_fast.data.source import Recording, Skip, Source
from a2mc_fast.errors import InputError

_BATCH = 16  # jobs sent to a worker at once: keeps the cost of a message small beside the ~2 ms of a file
_AHEAD = 3  # batches in flight per worker
_WRITTEN = np.empty((0, 0, 0, 3), np.float32)  # stands in a recording for joints that have been written out


FILLED = "joints that are not a number were taken for missing"


@dataclass(frozen=True, kw_only=True)
class Handling:
    """What is done with every recording before it is normalised."""

    scale: float = 1.0
    """Coordinates times this are metres."""
    persons: int = 0
    """M of every clip; 0 for that of the source."""
    confidence: float = LEAST
    """2-D keypoints below it are missing."""
    nan_is_missing: bool = False
    """Whether a joint that is not a number counts as missing, instead of losing its clip."""


@dataclass
class Remark:
    """How often a remark applies."""

    clips: int = 0
    frames: int = 0


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The result of `collect`."""

    clips: Clips
    skipped: tuple[Skip, ...]
    shortened: int
    """Clips cut to the frame limit."""
    remarks: Mapping[str, Remark]
    """What is to be said of some of the clips, in the words of the readers and the normalisation."""


def collect(
    source: Source,
    handling: Handling = Handling(),
    *,
    workers: int = 1,
    folder: Path | None = None,
    command: str = "",
    progress: bool = False,
) -> Collected:
    """Read every job of `source` and pack the usable clips, in the order of the jobs.

    Of several clips with one name the first usable one is kept. If all clips are flat, the set says that they
    are not turned. `folder` holds the frames until all are read (600 bytes per frame of NTU, the system's
    folder for temporary files by default). Raises `InputError` if no recording is usable.
    """
    skipped, kept, lengths, shortened = list(source.skipped), [], [], 0
    taken: set[str] = set()
    remarks: dict[str, Remark] = {}
    flat = True
    classes = most_classes(source.total, len(source.class_names))
    source = replace(source, persons=handling.persons or source.persons)
    # what workers need of it
    work = _Work(replace(source, jobs=(), skipped=(), notes=(), class_names=()), handling, classes)
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
                shortened += frames > len(result.joints)
                flat = flat and not result.joints[..., 2].any()
                for what, concerned in result.remarks.items():
                    remark = remarks.setdefault(what, Remark())
                    remark.clips += 1
                    remark.frames += concerned
                kept.append(replace(result, joints=_WRITTEN))
        if not kept:
            why = [f"the first skipped: {most_frequent(skipped[:1])}"] if skipped else source.notes[:1]
            raise InputError(
                "; ".join((f"{source.name}: no usable recording, {len(skipped):,} skipped", *why))
            )
        waiting.flush()
        shape = (sum(lengths), source.persons, source.skeleton.num_joints, 3)
        joints = np.memmap(waiting, np.float32, "c", shape=shape)
        skeleton = replace(source.skeleton, rotation="none") if flat else source.skeleton
        clips = _packed(replace(source, skeleton=skeleton), joints, lengths, kept, command)
    return Collected(clips=clips, skipped=tuple(skipped), shortened=shortened, remarks=remarks)


def _packed(
    source: Source, joints: np.ndarray, lengths: Sequence[int], kept: Sequence[Recording], command: str
) -> Clips:
    return Clips.pack(
        joints,
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


def most_frequent(skipped: Sequence[Skip]) -> str:
    """The first recording that was skipped for the most frequent reason, with what may help."""
    ((reason, _),) = Counter(skip.reason for skip in skipped).most_common(1)
    example = str(next(skip for skip in skipped if skip.reason == reason))
    if reason == "beyond 1,000 m":
        example += (
            ": are these millimetres or pixels? --scale 0.001 makes metres of millimetres; 2-D keypoints are "
            "joints [F, M, V, 2], or have axes x, y, confidence"
        )
    return example


@dataclass(frozen=True)
class _Work:
    """What a worker does with a batch of jobs."""

    source: Source
    """Without its jobs."""
    handling: Handling
    classes: int
    """How many there may be."""

    def __call__(self, jobs: list[Any]) -> list[tuple[Recording | Skip, int]]:
        """Each result with the number of frames it was recorded with."""
        with np.errstate(all="ignore"):  # what overflows or is not a number is skipped by name instead
            return [self._finish(result) for job in jobs for result in self.source.results(job)]

    def _finish(self, result: Recording | Skip) -> tuple[Recording | Skip, int]:
        if isinstance(result, Skip):
            return result, 0
        try:
            check_clip(result.name, result.label, self.classes)
            joints, remarks = self._metres(result)
            source = self.source
            made = usable(
                joints,
                source.skeleton,
                source.persons,
                ranked=source.ranked,
                normalize=not source.normalized,
            )
        except UnusableError as error:
            return Skip(result.name, error.reason, error.detail), 0
        remarks = {**result.remarks, **remarks, **made.remarks}
        return replace(result, joints=made.joints, confidence=None, remarks=remarks), len(result.joints)

    def _metres(self, recording: Recording) -> tuple[np.ndarray, dict[str, int]]:
        """Joints [T, M, V, 3] in metres, and what is to be said of them."""
        joints = np.asarray(recording.joints, np.float32)
        if joints.shape[-1] == 2:
            joints = as_joints(joints, recording.confidence, self.handling.confidence)
        elif recording.confidence is not None:
            joints = np.where(
                recording.confidence[..., None] >= self.handling.confidence, joints, np.float32(0)
            )
        if self.handling.scale != 1:
            joints = joints * np.float32(self.handling.scale)
        lost = np.asarray(np.isnan(joints).any(-1))
        if not self.handling.nan_is_missing or not lost.any():
            return joints, {}
        frames = len(np.unique(np.nonzero(lost)[0]))
        return np.where(lost[..., None], np.float32(0), joints), {FILLED: frames}


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
