"""AGCN's and ISC's arrays: a folder for each protocol, with one array and two lists for either of its sets.

{train,val}_data_joint.npy is float [N, 3, T, V, M], _label.pkl the pickled pair (names, classes from 0),
_num_frame.npy int [N]. Labels [N] or [N, 1] in _label.npy are without names. Arrays of 25 joints are metres,
pre-normalised, and taken as they are; so are AimCLR's {train,val}_position.npy. ST-GCN's {train,val}_data.npy
are the camera's coordinates and go through the pre-normalisation, as arrays of OpenPose's 18 joints do
(Kinetics: x, y and confidence).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from a2mc_fast.data.names import named
from a2mc_fast.data.npy import map_npy
from a2mc_fast.data.skeletons import SKELETONS
from a2mc_fast.data.source import Recording, Source, existing, filled, until_null
from a2mc_fast.data.unpickle import as_numbers, as_texts, load_pickle
from a2mc_fast.errors import InputError, require

_DATA = ("data_joint", "position", "data")  # the last as the camera gave it
_SKELETONS = {25: "ntu25", 18: "openpose18"}


def open_agcn(folder: str | Path, protocol: str = "") -> Source:
    """A protocol folder, or the folder above several, clips in the order of their names.

    Of several the clips are read from the first, the others give their splits by the names of the clips. A
    protocol is called after its folder (xsetup becomes xset), unless `protocol` names the only one.
    """
    folder = existing(folder, "a folder of AGCN arrays", folder=True)
    folders = [p for p in (folder, *sorted(folder.iterdir())) if _label_file(p, "train").is_file()]
    require(
        bool(folders),
        f"neither {folder} nor a folder in it holds train_label.pkl; expected {{train,val}}_data_joint.npy, "
        "{train,val}_label.pkl and {train,val}_num_frame.npy",
    )
    named_alike = all(_label_file(place, "train").suffix == ".pkl" for place in folders)
    require(
        len(folders) == 1 or (not protocol and named_alike),
        f"{folder} holds {len(folders)} protocols; "
        + ("--protocol names only one" if protocol else "without train_label.pkl only one can be read"),
    )
    _mapped.cache_clear()  # a file may have been written anew
    labels = {part: _labels(folders[0], part) for part in ("train", "val")}
    every = frozenset(name for names, _ in labels.values() for name in names)
    training = {
        protocol or {"xsetup": "xset"}.get(place.name, place.name): frozenset(_labels(place, "train")[0])
        for place in folders
    }
    notes = [
        f"{len(other):,} training clips of {place} are not in {folders[0]} and were left out"
        for place, names in zip(folders, training.values())
        if (other := names - every)
    ]
    kind = next((kind for kind in _DATA if (folders[0] / f"train_{kind}.npy").exists()), _DATA[0])
    jobs: list[Recording] = []
    size: list[int] = []
    for part, (names, classes) in labels.items():
        data = folders[0] / f"{part}_{kind}.npy"
        longest, *size = _array_size(data, len(names), tuple(size))
        frames = _frames(folders[0] / f"{part}_num_frame.npy", len(names), longest)
        for row, (name, label) in enumerate(zip(names, classes)):
            train_in = tuple(p for p, members in training.items() if name in members)
            jobs.append(named(name, label=label, joints=(data, row, int(frames[row])), train_in=train_in))
    joints, persons = size
    return Source(
        name="agcn",
        jobs=sorted(jobs, key=lambda job: job.name),
        total=len(jobs),
        read=_read,
        protocols=tuple(training),
        persons=persons,
        skeleton=SKELETONS[_SKELETONS[joints]],
        normalized=joints == 25 and kind != "data",
        notes=tuple(notes),
    )


def _array_size(path: Path, count: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """(T, V, M) of an array, which must hold `count` clips and, unless it is empty, have (V, M) `size`."""
    shape, dtype = (array := map_npy(path)).shape, array.dtype
    require(
        dtype.kind == "f" and len(shape) == 5 and shape[1] == 3 and shape[3] in _SKELETONS and shape[4] > 0,
        f"{path} is {dtype} {list(shape)}, expected floats [N, 3, T, {' or '.join(map(str, _SKELETONS))}, M]",
    )
    require(shape[0] == count, f"{path} holds {shape[0]:,} clips, its labels name {count:,}")
    require(
        size in ((), shape[3:]),
        f"{path} has {shape[3]} joints, {shape[4]} persons, the training array {', '.join(map(str, size))}",
    )
    return shape[2:]


def _label_file(folder: Path, part: str) -> Path:
    """The pickled pair (names, labels), or where only that is there, labels alone."""
    pickled, plain = (folder / f"{part}_label.{ending}" for ending in ("pkl", "npy"))
    return plain if plain.exists() and not pickled.exists() else pickled


def _labels(folder: Path, part: str) -> tuple[list[str], list[int]]:
    """Names without extension, and classes from 0, of a label file."""
    path = _label_file(folder, part)
    if path.suffix == ".npy":
        plain = map_npy(path)
        whole = plain.dtype.kind in "iu" and plain.shape in ((plain.size,), (plain.size, 1))
        require(whole, f"{path} is {plain.dtype} {list(plain.shape)}, expected integers [N]")
        return [f"{part}_{row:05d}" for row in range(plain.size)], plain.ravel().tolist()
    content = load_pickle(existing(path, "the names and labels of an AGCN array"))
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


def _read(job: Recording) -> Iterable[Recording]:
    path, row, frames = job.joints
    joints = _mapped(path)[row].transpose(1, 3, 2, 0)  # [T, M, V, C]
    yield filled(job, joints[:frames] if frames >= 0 else until_null(joints), joints.shape[2] == 18)


_mapped = lru_cache(maxsize=2)(map_npy)  # one mapping per process and array, not one per clip
