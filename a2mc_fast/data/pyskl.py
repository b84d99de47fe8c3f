"""PYSKL's and MMAction2's pickles, such as ntu60_3danno.pkl, read without executing anything in them.

A pickle is a dict of `annotations`, a list of dicts with frame_dir (the name), label, keypoint [M, T, V, 3]
(the camera's coordinates in half precision, metres) or [M, T, V, 2] (pixels, with keypoint_score [M, T, V])
and total_frames (T), and `split`, lists of names called xsub_train, train or train1, and so on; older ones
are the list of annotations alone. The clips go through the pre-normalisation, and the two bodies that spread
most are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from a2mc_fast.data.names import named
from a2mc_fast.data.rules import MAX_PROTOCOLS, UnusableError
from a2mc_fast.data.skeletons import skeleton_of
from a2mc_fast.data.source import Recording, Skip, Source, existing
from a2mc_fast.data.unpickle import as_array, as_texts, load_pickle
from a2mc_fast.errors import InputError, require

_CROWD = 8  # persons; more of them than frames are frames
_TRAIN = re.compile(r"(.*?)_?train(\d*)")
_SKELETONS = {(25, 3): "ntu25", (17, 2): "coco17", (18, 2): "openpose18", (26, 2): "halpe26"}
"""What V joints of C coordinates are, unless told otherwise."""
_MAX_SHARED = 16  # clips may share arrays, but not take more than this many times the file


def open_pyskl(file: str | Path, skeleton_name: str = "") -> Source:
    """The annotations of a pickle, in the order of their names. One that no training list names is a test
    clip. The skeleton is told by the most frequent number of joints and coordinates, unless it is named."""
    path = Path(file)
    content = load_pickle(existing(path, "a PYSKL pickle"))
    if isinstance(content, list):
        content = {"annotations": content}
    good = isinstance(content, dict) and isinstance(content.get("annotations"), list)
    require(
        good and isinstance(content.get("split", {}), dict),
        f"{path} is not a dict of 'split' and 'annotations', nor a list of annotations",
    )
    listed = _splits(path, content.get("split", {}))
    training = {
        (found[1] or "split") + found[2]: names
        for key, names in listed.items()
        if (found := _TRAIN.fullmatch(key))
    }
    require(
        bool(training) or not listed,
        f"{path} has no split called ..._train or train, only: {', '.join(sorted(listed))}",
    )
    jobs, skipped = _annotated(path, content["annotations"], training)
    arrays = [job.joints[0] for job in jobs]
    kinds = Counter(keypoints.shape[2:] for keypoints in arrays if keypoints.ndim == 4)
    joints, axes = kinds.most_common(1)[0][0] if kinds else (25, 3)
    name = skeleton_name or _SKELETONS.get((joints, axes), "")
    require(bool(name), f"{path}: which {joints} joints ({axes}-D) are these? Tell it with --skeleton")
    unlisted = len({job.name for job in jobs} - frozenset().union(*listed.values())) if listed else 0
    notes = [f"{unlisted:,} clips are in no split and count as test"] if unlisted else []
    if axes == 2 and not skeleton_name:
        notes.append(f"2-D keypoints of {joints} joints, taken for {name}; --skeleton names another skeleton")
    return Source(
        name="pyskl",
        jobs=sorted(jobs, key=lambda job: job.name),
        total=len(jobs),
        read=partial(_read, axes=axes),
        ranked=True,
        protocols=tuple(training),
        skeleton=skeleton_of(name),
        skipped=tuple(skipped),
        notes=tuple(notes),
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
) -> tuple[list[Recording], list[Skip]]:
    """The clips, to be read from keypoints, scores and total_frames, and what is none."""
    jobs: list[Recording] = []
    skipped: list[Skip] = []
    taken, room = 0, _MAX_SHARED * path.stat().st_size
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("frame_dir"), str):
            skipped.append(Skip(f"annotation {number}", "unreadable", "no dict with a name in 'frame_dir'"))
            continue
        name, label = annotation["frame_dir"], annotation.get("label")
        if not isinstance(label, int | np.integer):
            skipped.append(Skip(name, "no label"))
            continue
        score = annotation.get("keypoint_score")
        try:
            keypoints = as_array(annotation.get("keypoint"))
            scores = None if score is None else as_array(score)
        except ValueError as error:
            skipped.append(Skip(name, "no skeleton data", f"keypoint: {error}"))
            continue
        train_in = tuple(protocol for protocol, names in training.items() if name in names)
        joints = keypoints, scores, annotation.get("total_frames")
        jobs.append(named(name, label=int(label), joints=joints, train_in=train_in))
        taken += keypoints.nbytes + (0 if scores is None else scores.nbytes)
        require(taken <= room, f"{path}: its clips share arrays and would take over {room:,} bytes; refused")
    return jobs, skipped


def _read(job: Recording, axes: int) -> Iterable[Recording]:
    keypoints, scores, total = job.joints
    kind = f"keypoint is {keypoints.dtype} {list(keypoints.shape)}"
    # an empty array may have axes of any length, and bodies would be added to them
    if keypoints.dtype.kind != "f" or keypoints.ndim != 4 or keypoints.shape[3] != axes or not keypoints.size:
        raise UnusableError("no skeleton data", f"{kind}, expected floats [M, T, V, {axes}]")
    scores = scores if axes == 2 else None
    if scores is not None and (scores.dtype.kind != "f" or scores.shape != keypoints.shape[:3]):
        detail = f"keypoint_score is {scores.dtype} {list(scores.shape)}, {kind}"
        raise UnusableError("no skeleton data", detail)
    persons, frames = keypoints.shape[:2]
    if isinstance(total, int | np.integer):
        if frames != total:
            raise UnusableError("no skeleton data", f"{kind}, expected [M, total_frames, V, {axes}]")
    elif persons > max(frames, _CROWD):
        raise UnusableError("no skeleton data", f"{kind}, expected [M, T, V, {axes}]")
    joints = keypoints.astype(np.float32).transpose(1, 0, 2, 3)  # [T, M, V, C]
    yield replace(job, joints=joints, confidence=None if scores is None else scores.transpose(1, 0, 2))
