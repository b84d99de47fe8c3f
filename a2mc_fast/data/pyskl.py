"""PYSKL's and MMAction2's pickles, such as ntu60_3danno.pkl, read without executing anything in them.

A pickle is a dict of `annotations`, a list of dicts with frame_dir (the name), label, keypoint [M, T, 25, 3]
(the camera's coordinates in half precision, metres) and total_frames (T), and `split`, lists of names called
xsub_train, xsub_val and so on. The clips go through the pre-normalisation, and bodies are chosen by spread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from a2mc_fast.data.names import who
from a2mc_fast.data.normalize import choose_bodies
from a2mc_fast.data.rules import MAX_PROTOCOLS
from a2mc_fast.data.source import Recording, Skip, Source, existing_file
from a2mc_fast.data.unpickle import as_array, as_texts, load_pickle
from a2mc_fast.errors import InputError, require

_CROWD = 8  # persons; more of them than frames are frames
_MAX_SHARED = 16  # clips may share arrays, but not take more than this many times the file


class _Clip(NamedTuple):
    """One job: a clip and its keypoints [M, T, V, C]."""

    name: str
    label: int
    keypoints: np.ndarray
    frames: int | None
    """T, if the annotation says so."""
    train_in: tuple[str, ...]


def open_pyskl(file: str | Path) -> Source:
    """The annotations of a pickle, in the order of their names. One that no training list names is a test
    clip."""
    path = Path(file)
    content = load_pickle(existing_file(path, "a PYSKL pickle"))
    good = isinstance(content, dict) and isinstance(content.get("annotations"), list)
    require(
        good and isinstance(content.get("split"), dict), f"{path} is not a dict of 'split' and 'annotations'"
    )
    listed = _splits(path, content["split"])
    training = {key.removesuffix("_train"): names for key, names in listed.items() if key.endswith("_train")}
    require(
        bool(training), f"{path} has no split called ..._train, only: {', '.join(sorted(listed)) or 'none'}"
    )
    jobs, skipped = _annotated(path, content["annotations"], training)
    unlisted = len(jobs.keys() - frozenset().union(*listed.values()))
    return Source(
        name="pyskl",
        jobs=[jobs[name] for name in sorted(jobs)],
        total=len(jobs),
        read=_read,
        protocols=tuple(training),
        unit="clips",
        skipped=tuple(skipped),
        notes=(f"{unlisted:,} clips are in no split and count as test",) if unlisted else (),
    )


def _splits(path: Path, content: Mapping[Any, Any]) -> dict[str, frozenset[str]]:
    """The names in each of the lists."""
    require(
        len(content) <= 2 * MAX_PROTOCOLS,
        f"{path} has {len(content):,} splits, {2 * MAX_PROTOCOLS} are the most",
    )
    listed: dict[str, frozenset[str]] = {}
    entries, size = 0, path.stat().st_size
    for key, names in content.items():
        try:
            listed[str(key)] = frozenset(chosen := as_texts(names))
        except ValueError as error:
            raise InputError(f"{path}: the split {key} is not a list of names ({error})") from None
        entries += len(chosen)  # each takes a byte of the file or more, unless splits share a list
        require(entries <= size, f"{path}: its splits share lists and would name {entries:,} clips; refused")
    return listed


def _annotated(
    path: Path, annotations: Iterable[Any], training: Mapping[str, Collection[str]]
) -> tuple[dict[str, _Clip], list[Skip]]:
    """The clips by name, and what is none."""
    jobs: dict[str, _Clip] = {}
    skipped: list[Skip] = []
    taken, room = 0, _MAX_SHARED * path.stat().st_size
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("frame_dir"), str):
            skipped.append(Skip(f"annotation {number}", "unreadable", "no dict with a name in 'frame_dir'"))
            continue
        name, label = annotation["frame_dir"], annotation.get("label")
        if not isinstance(label, int | np.integer):
            skipped.append(Skip(name, "no label"))
        elif name in jobs:
            skipped.append(Skip(name, "listed twice"))
        else:
            train_in = tuple(protocol for protocol, names in training.items() if name in names)
            try:
                keypoints = as_array(annotation.get("keypoint"))
            except ValueError as error:
                skipped.append(Skip(name, "no skeleton data", f"keypoint: {error}"))
                continue
            frames = annotation.get("total_frames")
            frames = int(frames) if isinstance(frames, int | np.integer) else None
            jobs[name] = _Clip(name, int(label), keypoints, frames, train_in)
            taken += keypoints.nbytes
            require(
                taken <= room, f"{path}: its clips share arrays and would take over {room:,} bytes; refused"
            )
    return jobs, skipped


def _read(job: _Clip) -> Iterable[Recording | Skip]:
    keypoints = job.keypoints
    kind = f"keypoint is {keypoints.dtype} {list(keypoints.shape)}"
    # an empty array may have axes of any length, and bodies would be added to them
    if keypoints.dtype.kind != "f" or keypoints.ndim != 4 or keypoints.shape[3] != 3 or not keypoints.size:
        yield Skip(job.name, "no skeleton data", kind)
        return
    persons, frames = keypoints.shape[:2]
    if job.frames is not None and frames != job.frames:
        yield Skip(job.name, "no skeleton data", f"{kind}, expected [M, total_frames, V, 3]")
        return
    if job.frames is None and persons > max(frames, _CROWD):
        yield Skip(job.name, "no skeleton data", f"{kind}, expected [M, T, V, 3]")
        return
    joints = choose_bodies(keypoints.astype(np.float32).transpose(1, 0, 2, 3))  # [T, M, V, C]
    subject, camera, setup = who(job.name)
    yield Recording(
        name=job.name,
        label=job.label,
        joints=joints,
        subject=subject,
        camera=camera,
        setup=setup,
        train_in=job.train_in,
    )
