"""From a reader's recordings to packed `Clips`: every recording is checked, normalised and kept, or named
and skipped. Jobs are read in worker processes, in order, and frames wait in an unnamed file, so memory holds
only the jobs in flight.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections import Counter, defaultdict, deque
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

FILLED = "joints that are not a number were taken for missing"


@dataclass(frozen=True)
class Handling:
    """What is done with every recording before it is normalised: `prepare`'s flags of these names."""

    scale: float = 1.0
    persons: int = 0
    confidence: float = LEAST
    nan_is_missing: bool = False


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
    shortened: int  # clips cut to the frame limit
    remarks: Mapping[str, Remark]  # what is said of some clips, by the readers and the normalisation


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
    skipped, lengths, shortened, flat = list(source.skipped), [], 0, True
    kept: dict[str, Recording] = {}
    remarks: defaultdict[str, Remark] = defaultdict(Remark)
    classes = most_classes(source.total, len(source.class_names))
    source = replace(source, persons=handling.persons or source.persons)
    # what workers need of it
    work = _Work(replace(source, jobs=(), skipped=(), notes=(), class_names=()), handling, classes)
    quiet = None if progress else True
    bar = tqdm(total=source.total, unit=f" {source.unit}", desc=source.name, disable=quiet)
    with tempfile.TemporaryFile(dir=folder) as waiting, bar:
        for jobs, results in _in_order(work, source.jobs, workers):
            bar.update(jobs)
            for result, frames in results:
                if isinstance(result, Skip):
                    skipped.append(result)
                    continue
                if result.name in kept:
                    skipped.append(Skip(result.name, "listed twice"))
                    continue
                waiting.write(np.ascontiguousarray(result.joints).data)
                lengths.append(len(result.joints))
                shortened += frames > len(result.joints)
                flat = flat and not result.joints[..., 2].any()
                for what, concerned in result.remarks.items():
                    remarks[what].clips += 1
                    remarks[what].frames += concerned
                kept[result.name] = replace(result, joints=None)  # they have been written out
        if not kept:
            why = [f"the first skipped: {most_frequent(skipped[:1])}"] if skipped else source.notes[:1]
            none = f"{source.name}: no usable recording, {len(skipped):,} skipped"
            raise InputError("; ".join((none, *why)))
        waiting.flush()
        shape = (sum(lengths), source.persons, source.skeleton.num_joints, 3)
        joints = np.memmap(waiting, np.float32, "c", shape=shape)
        skeleton = replace(source.skeleton, rotation="none") if flat else source.skeleton
        clips = _packed(replace(source, skeleton=skeleton), joints, lengths, list(kept.values()), command)
    return Collected(clips=clips, skipped=tuple(skipped), shortened=shortened, remarks=remarks)


def _packed(
    source: Source, joints: np.ndarray, lengths: list[int], kept: list[Recording], command: str
) -> Clips:
    known = {
        name: np.array([getattr(clip, name.removesuffix("s")) for clip in kept], np.int64)
        for name in ("subjects", "cameras", "setups")
    }
    return Clips.pack(
        joints,
        lengths,
        [clip.label for clip in kept],
        source.skeleton,
        splits={p: np.array([p in clip.train_in for clip in kept]) for p in source.protocols},
        names=[clip.name for clip in kept],
        class_names=source.class_names,
        extra={name: values for name, values in known.items() if values.max() >= 0},
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

    source: Source  # without its jobs
    handling: Handling
    classes: int  # how many there may be

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
            how = {"ranked": source.ranked, "normalize": not source.normalized}
            made = usable(joints, source.skeleton, source.persons, **how)
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
    # interrupts are the parent's
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=ignore) as pool:
        try:
            while True:
                for batch in islice(batches, _AHEAD * workers - len(flying)):
                    flying.append((len(batch), pool.submit(work, batch)))
                if not flying:
                    return
                size, future = flying.popleft()
                yield size, future.result()
        except BrokenProcessPool:
            raise InputError(
                "a worker process ended unexpectedly, perhaps for lack of memory; try --workers 1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
