"""AGCN's and ISC's arrays: a folder for each protocol, with one array and two lists for either of its sets.

{train,val}_data_joint.npy is float [N, 3, T, 25, M] metres, _label.pkl the pickled pair (names, classes from
0), _num_frame.npy int [N]. The arrays are pre-normalised and taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from a2mc_fast.data.names import who
from a2mc_fast.data.npy import map_npy
from a2mc_fast.data.source import Recording, Skip, Source, existing_file, existing_folder
from a2mc_fast.data.unpickle import as_numbers, as_texts, load_pickle
from a2mc_fast.errors import InputError, require

_JOINTS = 25


class _Row(NamedTuple):
    """One job: a clip of an array."""

    path: Path
    row: int
    name: str
    label: int
    frames: int
    """-1 if the clip ends with its last frame that is not null."""
    train_in: tuple[str, ...]


def open_agcn(folder: str | Path, protocol: str = "") -> Source:
    """A protocol folder with {train,val}_data_joint.npy, _label.pkl and _num_frame.npy, or the folder above
    several.

    Of several protocol folders the clips are read from the first, the others give their splits by the names
    of the clips. A protocol is called after its folder (xsetup becomes xset), unless `protocol` names the
    only one. Without _num_frame.npy a clip ends with its last frame that is not null. Clips come in the
    order of their names.
    """
    folder = existing_folder(Path(folder), "a folder of AGCN arrays")
    folders = [p for p in (folder, *sorted(folder.iterdir())) if (p / "train_label.pkl").is_file()]
    require(
        bool(folders),
        f"neither {folder} nor a folder in it holds train_label.pkl; expected {{train,val}}_data_joint.npy, "
        "{train,val}_label.pkl and {train,val}_num_frame.npy",
    )
    require(
        not protocol or len(folders) == 1,
        f"{folder} holds {len(folders)} protocols; --protocol names only one",
    )
    _mapped.cache_clear()  # a file may have been written anew
    labels = {part: _labels(folders[0] / f"{part}_label.pkl") for part in ("train", "val")}
    every = frozenset(name for names, _ in labels.values() for name in names)
    training = {
        protocol or {"xsetup": "xset"}.get(place.name, place.name): frozenset(
            _labels(place / "train_label.pkl")[0]
        )
        for place in folders
    }
    notes = [
        f"{len(other):,} training clips of {place} are not in {folders[0]} and were left out"
        for place, names in zip(folders, training.values())
        if (other := names - every)
    ]
    rows: dict[str, _Row] = {}
    skipped: list[Skip] = []
    persons = 0
    for part, (names, classes) in labels.items():
        data = folders[0] / f"{part}_data_joint.npy"
        longest, persons = _array_size(data, len(names), persons)
        frames = _frames(folders[0] / f"{part}_num_frame.npy", len(names), longest)
        for row, (name, label) in enumerate(zip(names, classes)):
            if name in rows:
                skipped.append(Skip(name, "listed twice", str(data)))
                continue
            train_in = tuple(p for p, members in training.items() if name in members)
            rows[name] = _Row(data, row, name, label, int(frames[row]), train_in)
    return Source(
        name="agcn",
        jobs=[rows[name] for name in sorted(rows)],
        total=len(rows),
        read=_read,
        protocols=tuple(training),
        persons=persons,
        normalized=True,
        unit="clips",
        skipped=tuple(skipped),
        notes=tuple(notes),
    )


def _array_size(path: Path, count: int, persons: int) -> tuple[int, int]:
    """(T, M) of an array, which must hold `count` clips and, unless that is 0, `persons`."""
    shape, dtype = (array := map_npy(path)).shape, array.dtype
    require(
        dtype.kind == "f" and len(shape) == 5 and shape[1] == 3 and shape[3] == _JOINTS and shape[4] > 0,
        f"{path} is {dtype} {list(shape)}, expected floats [N, 3, T, {_JOINTS}, M]",
    )
    label = path.name.replace("data_joint.npy", "label.pkl")
    require(shape[0] == count, f"{path} holds {shape[0]:,} clips, {label} names {count:,}")
    require(persons in (0, shape[4]), f"{path} has {shape[4]} persons, the training array {persons}")
    return shape[2], shape[4]


def _labels(path: Path) -> tuple[list[str], list[int]]:
    """Names without extension, and classes from 0, of a label file: the pickled pair (names, labels)."""
    content = load_pickle(existing_file(path, "the names and labels of an AGCN array"))
    try:
        names, labels = content
        names, labels = as_texts(names), as_numbers(labels)
        if len(names) != len(labels):
            raise ValueError(f"{len(names):,} names, {len(labels):,} labels")
        if not all(label % 1 == 0 for label in labels):  # infinity and NaN leave NaN
            raise ValueError("a label is not a whole number")
        # PKU-MMD's names are "A01N02-L.txt_5"
        return [re.sub(r"\.(skeleton|txt)", "", name) for name in names], [int(label) for label in labels]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a pair of names and whole-numbered labels ({error})") from None


def _frames(path: Path, count: int, longest: int) -> np.ndarray:
    """Frames of each clip, [N] int64, -1 where not given; a recording longer than its array was cut."""
    if not path.exists():
        return np.full(count, -1)
    frames = np.array(map_npy(path))
    require(
        frames.shape == (count,) and frames.dtype.kind in "iu",
        f"{path} is {frames.dtype} {list(frames.shape)}, expected {count:,} integers",
    )
    return np.clip(frames.astype(np.int64), 0, longest)


def _read(job: _Row) -> Iterable[Recording]:
    joints = _mapped(job.path)[job.row]  # [C, T, V, M]
    if job.frames < 0:
        used = np.flatnonzero((joints != 0).any((0, 2, 3)))
        joints = joints[:, : used[-1] + 1 if len(used) else 0]
    else:
        joints = joints[:, : job.frames]
    subject, camera, setup = who(job.name)
    yield Recording(
        name=job.name,
        label=job.label,
        joints=joints.transpose(1, 3, 2, 0),
        subject=subject,
        camera=camera,
        setup=setup,
        train_in=job.train_in,
    )


_mapped = lru_cache(maxsize=2)(map_npy)  # one mapping per process and array, not one per clip
