"""Data sets that others have converted already: AGCN/ISC `.npy`, CTR-GCN `.npz`, PYSKL/MMAction2 `.pkl`,
own `.npz`.

AGCN arrays are pre-normalised and taken as they are. The others are not: CTR-GCN only subtracts a constant,
PYSKL stores the camera's coordinates in half precision, the own-data archive holds metres as recorded; all
three go through the pre-normalisation. Bodies are chosen by spread for PYSKL alone, the others have ordered
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from a2mc_fast.data import ntu, pku
from a2mc_fast.data.normalize import choose_bodies
from a2mc_fast.data.npy import Archive, map_npy
from a2mc_fast.data.pack import Recording, Skip, Source, existing_file, existing_folder
from a2mc_fast.data.rules import MAX_LABEL, MAX_PROTOCOLS, NAME_RULE, is_name
from a2mc_fast.data.unpickle import as_array, as_numbers, as_texts, load_pickle
from a2mc_fast.errors import InputError, require
from a2mc_fast.skeleton import NTU25, Skeleton

_JOINTS = NTU25.num_joints
_FEW = 1000  # clips


class _Row(NamedTuple):
    """One job: a clip of an AGCN array."""

    path: Path
    row: int
    name: str
    label: int
    frames: int
    train_in: tuple[str, ...]


def open_agcn(folder: str | Path, protocol: str = "") -> Source:
    """A protocol folder with {train,val}_data_joint.npy, _label.pkl and _num_frame.npy, or the folder above
    several.

    Of several protocol folders the clips are read from the first, the others give their splits by the names
    of the clips. A protocol is called after its folder (xsetup becomes xset), unless `protocol` names the
    only one. Without _num_frame.npy a clip keeps all frames of the array. Clips come in the order of their
    names.
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
    labels = {part: _agcn_labels(folders[0] / f"{part}_label.pkl") for part in ("train", "val")}
    training: dict[str, frozenset[str]] = {}
    notes: list[str] = []
    every = {name for names, _ in labels.values() for name in names}
    for place in folders:
        name = protocol or {"xsetup": "xset"}.get(place.name, place.name)
        training[name] = frozenset(_agcn_labels(place / "train_label.pkl")[0])
        if other := training[name] - every:
            notes.append(
                f"{len(other):,} training clips of {place} are not in {folders[0]} and were left out"
            )
    rows: dict[str, _Row] = {}
    skipped: list[Skip] = []
    persons = 0
    for part, (names, classes) in labels.items():
        data = folders[0] / f"{part}_data_joint.npy"
        shape, dtype = (array := map_npy(data)).shape, array.dtype
        require(
            dtype.kind == "f" and len(shape) == 5 and shape[1] == 3 and shape[3] == _JOINTS and shape[4] > 0,
            f"{data} is {dtype} {list(shape)}, expected floats [N, 3, T, {_JOINTS}, M]",
        )
        require(
            shape[0] == len(names), f"{data} holds {shape[0]:,} clips, {part}_label.pkl names {len(names):,}"
        )
        require(persons in (0, shape[4]), f"{data} has {shape[4]} persons, the training array {persons}")
        persons = shape[4]
        frames = _agcn_frames(folders[0] / f"{part}_num_frame.npy", *shape[:3:2])
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
        read=_read_agcn,
        protocols=tuple(training),
        persons=persons,
        normalized=True,
        unit="clips",
        skipped=tuple(skipped),
        notes=tuple(notes),
    )


def _agcn_labels(path: Path) -> tuple[list[str], list[int]]:
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


def _agcn_frames(path: Path, count: int, longest: int) -> np.ndarray:
    """Frames of each clip, [N] int64; a recording longer than its array was cut."""
    if not path.exists():
        return np.full(count, longest)
    frames = np.array(map_npy(path))
    require(
        frames.shape == (count,) and frames.dtype.kind in "iu",
        f"{path} is {frames.dtype} {list(frames.shape)}, expected {count:,} integers",
    )
    return np.clip(frames.astype(np.int64), 0, longest)


def _read_agcn(job: _Row) -> Iterable[Recording]:
    joints = _mapped(job.path)[job.row, :, : job.frames]  # [C, T, V, M]
    yield _recording(job.name, job.label, joints.transpose(1, 3, 2, 0), job.train_in)


_mapped = lru_cache(maxsize=2)(map_npy)  # one mapping per process and array, not one per clip


_CTRGCN_PROTOCOLS = {"CS": "xsub", "CV": "xview", "CSub": "xsub", "CSet": "xset"}


class _Clip(NamedTuple):
    """One job: a clip whose joints have been read from an archive or a pickle."""

    name: str
    label: int
    joints: Any
    train_in: tuple[str, ...]


def open_ctrgcn(file: str | Path, protocol: str = "") -> Source:
    """An archive with x_train, x_test [N, T, 150] and one-hot y_train, y_test, such as NTU60_CS.npz.

    The protocol is told by the ending of the file's name (CS, CV, CSub, CSet) or by `protocol`. The archive
    has no names; clips are called after their set and place. A clip ends with its last frame that is not
    null.
    """
    path = Path(file)
    archive = Archive(path)
    archive.need("x_train", "y_train", "x_test", "y_test")
    protocol = protocol or _CTRGCN_PROTOCOLS.get(path.stem.rpartition("_")[2], "")
    require(bool(protocol), f"the name of {path} does not tell the protocol; give it with --protocol xsub")
    labels = {part: _one_hot(archive, f"y_{part}") for part in ("train", "test")}
    sizes: dict[str, tuple[int, ...]] = {}
    for part in labels:
        with archive.rows(f"x_{part}") as rows:
            shape, dtype = rows.shape, rows.dtype
        require(
            dtype.kind == "f" and len(shape) == 3 and shape[1] > 0 and shape[2] == 2 * _JOINTS * 3,
            f"{path}: x_{part} is {dtype} {list(shape)}, expected floats [N, T, {2 * _JOINTS * 3}]",
        )
        sizes[part] = shape
    for part, shape in sizes.items():
        require(
            shape[0] == len(labels[part]),
            f"{path}: x_{part} holds {shape[0]:,} clips, y_{part} {len(labels[part]):,}",
        )

    def clips() -> Iterator[_Clip]:
        for part, (count, *_) in sizes.items():
            with archive.rows(f"x_{part}") as rows:
                for row in range(count):
                    joints = rows.take(1)[0]
                    used = np.flatnonzero((joints != 0).any(1))
                    joints = joints[: used[-1] + 1 if len(used) else 0].reshape(-1, 2, _JOINTS, 3)
                    train_in = (protocol,) if part == "train" else ()
                    yield _Clip(f"{part}_{row:05d}", int(labels[part][row]), joints, train_in)

    return Source(
        name="ctrgcn",
        jobs=clips(),
        total=sum(shape[0] for shape in sizes.values()),
        read=_read_clip,
        protocols=(protocol,),
        unit="clips",
    )


def _one_hot(archive: Archive, name: str) -> np.ndarray:
    """Classes [N] from one-hot rows [N, classes]."""
    rows = archive.array(name, "fiub", ndim=2)
    require(
        rows.shape[1] > 0 and bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all()),
        f"{archive.path}: the rows of {name} are not one-hot",
    )
    return rows.argmax(1)


def open_pyskl(file: str | Path) -> Source:
    """A pickle with `annotations` (frame_dir, label, keypoint [M, T, 25, 3]) and `split` (xsub_train,
    xsub_val, ...).

    Clips come in the order of their names. One that no training list names is a test clip.
    """
    path = Path(file)
    content = load_pickle(existing_file(path, "a PYSKL pickle"))
    good = isinstance(content, dict) and isinstance(content.get("annotations"), list)
    require(
        good and isinstance(content.get("split"), dict), f"{path} is not a dict of 'split' and 'annotations'"
    )
    size = path.stat().st_size
    require(
        len(content["split"]) <= 2 * MAX_PROTOCOLS,
        f"{path} has {len(content['split']):,} splits, {2 * MAX_PROTOCOLS} are the most",
    )
    listed: dict[str, frozenset[str]] = {}
    entries = 0
    for key, names in content["split"].items():
        try:
            listed[str(key)] = frozenset(chosen := as_texts(names))
        except ValueError as error:
            raise InputError(f"{path}: the split {key} is not a list of names ({error})") from None
        entries += len(chosen)  # each takes a byte of the file or more, unless splits share a list
        require(entries <= size, f"{path}: its splits share lists and would name {entries:,} clips; refused")
    training = {key.removesuffix("_train"): names for key, names in listed.items() if key.endswith("_train")}
    require(
        bool(training), f"{path} has no split called ..._train, only: {', '.join(sorted(listed)) or 'none'}"
    )
    jobs: dict[str, _Clip] = {}
    skipped: list[Skip] = []
    taken = 0
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("frame_dir"), str):
            skipped.append(Skip(f"annotation {number}", "unreadable", "no dict with a name in 'frame_dir'"))
            continue
        name, label = annotation["frame_dir"], annotation.get("label")
        if not is_name(name):
            skipped.append(Skip(name, "name not understood", NAME_RULE))
        elif not isinstance(label, int | np.integer):
            skipped.append(Skip(name, "no label"))
        elif name in jobs:
            skipped.append(Skip(name, "listed twice"))
        else:
            train_in = tuple(protocol for protocol, names in training.items() if name in names)
            try:
                jobs[name] = _Clip(name, int(label), joints := as_array(annotation.get("keypoint")), train_in)
            except ValueError as error:
                skipped.append(Skip(name, "no skeleton data", f"keypoint: {error}"))
                continue
            taken += joints.nbytes
            require(
                taken <= 16 * size,
                f"{path}: its clips share arrays and would take over {16 * size:,} bytes; refused",
            )
    known = frozenset().union(*listed.values())
    unlisted = len(jobs.keys() - known)
    return Source(
        name="pyskl",
        jobs=[jobs[name] for name in sorted(jobs)],
        total=len(jobs),
        read=_read_pyskl,
        protocols=tuple(training),
        unit="clips",
        skipped=tuple(skipped),
        notes=(f"{unlisted:,} clips are in no split and count as test",) if unlisted else (),
    )


def _read_pyskl(job: _Clip) -> Iterable[Recording | Skip]:
    joints = job.joints
    # an empty array may have axes of any length, and bodies would be added to them
    if joints.dtype.kind != "f" or joints.ndim != 4 or joints.shape[3] != 3 or not joints.size:
        yield Skip(job.name, "no skeleton data", f"keypoint is {joints.dtype} {list(joints.shape)}")
        return
    joints = choose_bodies(joints.astype(np.float32).transpose(1, 0, 2, 3))  # [T, M, V, C]
    yield _recording(job.name, job.label, joints, job.train_in)


def open_npz(file: str | Path) -> Source:
    """The clip archive for own data.

    joints float [F, M, V, 3] metres (all clips one after another), lengths and labels [N], the skeleton as
    parents, mirror, center, axis_z and axis_x, split_NAME bool [N] for each protocol; names, subjects,
    cameras, setups, class_names and joint_names are optional.
    """
    path = Path(file)
    archive = Archive(path)
    archive.need("joints", "lengths", "labels", "parents", "mirror", "center", "axis_z", "axis_x")
    skeleton = _own_skeleton(archive)
    lengths, labels = (archive.array(key, "iu", ndim=1).tolist() for key in ("lengths", "labels"))
    count = len(lengths)
    with archive.rows("joints") as frames:
        shape, dtype = frames.shape, frames.dtype
    require(
        dtype.kind == "f" and len(shape) == 4 and shape[1] > 0 and shape[3] == 3,
        f"{path}: joints is {dtype} {list(shape)}, expected floats [F, M, V, 3]",
    )
    require(
        shape[2] == skeleton.num_joints,
        f"{path}: joints has {shape[2]} joints, parents {skeleton.num_joints}",
    )
    require(min(lengths, default=0) >= 0, f"{path}: a length is negative")
    # empty clips are skipped one by one, but they take no space in the file
    require(
        count <= 2 * shape[0] + _FEW,
        f"{path}: lengths holds {count:,} clips, joints {shape[0]:,} frames in all",
    )
    require(
        sum(lengths) == shape[0],
        f"{path}: lengths sum to {sum(lengths):,}, joints holds {shape[0]:,} frames",
    )
    columns = {
        key: archive.array(key, "iu", ndim=1) if key in archive else np.full(count, -1)
        for key in ("subjects", "cameras", "setups")
    }
    masks = {
        key.removeprefix("split_"): archive.array(key, "b", ndim=1)
        for key in sorted(archive)
        if key.startswith("split_")
    }
    names = _texts(archive, "names", count) or tuple(f"clip {number}" for number in range(count))
    class_names = _texts(archive, "class_names", MAX_LABEL + 1)
    sizes = {key: len(values) for key, values in {**columns, **masks}.items()}
    for key, size in {"labels": len(labels), "names": len(names), **sizes}.items():
        require(size == count, f"{path}: {key} has {size:,} entries for {count:,} clips")

    def clips() -> Iterator[Recording]:
        with archive.rows("joints") as frames:
            for number, (name, length, label) in enumerate(zip(names, lengths, labels)):
                yield Recording(
                    name=name,
                    label=label,
                    joints=frames.take(length),
                    subject=int(columns["subjects"][number]),
                    camera=int(columns["cameras"][number]),
                    setup=int(columns["setups"][number]),
                    train_in=tuple(protocol for protocol, mask in masks.items() if mask[number]),
                )

    return Source(
        name="npz",
        jobs=clips(),
        total=count,
        read=_as_it_is,
        protocols=tuple(masks),
        persons=shape[1],
        skeleton=skeleton,
        unit="clips",
        class_names=class_names,
    )


def _own_skeleton(archive: Archive) -> Skeleton:
    parents, mirror = (tuple(archive.array(key, "iu", ndim=1).tolist()) for key in ("parents", "mirror"))
    axes = [tuple(archive.array(key, "iu", ndim=1).tolist()) for key in ("axis_z", "axis_x")]
    require(
        all(len(axis) == 2 for axis in axes), f"{archive.path}: axis_z and axis_x must be two joints each"
    )
    try:
        return Skeleton(
            parents=parents,
            mirror=mirror,
            center=int(archive.array("center", "iu", ndim=0)),
            axis_z=axes[0],
            axis_x=axes[1],
            joint_names=_texts(archive, "joint_names", len(parents)),
        )
    except InputError as error:
        raise InputError(f"{archive.path}: {str(error).removeprefix(f'{archive.path}: ')}") from None


def _texts(archive: Archive, key: str, most: int) -> tuple[str, ...]:
    return tuple(archive.texts(key, most)) if key in archive else ()


def _as_it_is(result: Recording) -> Iterable[Recording]:
    yield result


def _read_clip(job: _Clip) -> Iterable[Recording]:
    yield _recording(job.name, job.label, job.joints, job.train_in)


def _recording(name: str, label: int, joints: np.ndarray, train_in: tuple[str, ...]) -> Recording:
    """A recording with whatever its name tells about subject, camera and set-up."""
    if ids := ntu.parse_name(name):
        who = {"subject": ids.subject, "camera": ids.camera, "setup": ids.setup}
    elif video := pku.parse_name(name.rpartition("_")[0], "pku2"):
        who = {"subject": video.subject, "camera": video.camera}
    else:
        who = {}
    return Recording(name=name, label=label, joints=joints, train_in=train_in, **who)
