"""The clip archive (`.npz`) for own data of any skeleton, as the README beside describes it.

The clips go through the pre-normalisation, all persons are kept in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Any

from a2mc_fast.data.npy import Archive
from a2mc_fast.data.rules import MAX_LABEL
from a2mc_fast.data.skeletons import SKELETONS, skeleton_of
from a2mc_fast.data.source import Recording, Source, filled
from a2mc_fast.errors import InputError, require
from a2mc_fast.skeleton import TREE, Skeleton

_FEW = 1000  # clips
_AXES = {("x", "y"): 2, ("x", "y", "z"): 3, ("x", "y", "confidence"): 3}


def open_npz(file: str | Path, skeleton_name: str = "") -> Source:
    """The clips of an archive, in its order, of the built-in skeleton of this name or the archive's own."""
    path = Path(file)
    archive = Archive(path)
    archive.need("joints", "lengths", "labels")
    skeleton = skeleton_of(skeleton_name) if skeleton_name else _skeleton(archive)
    lengths, labels = (archive.array(key, "iu", ndim=1).tolist() for key in ("lengths", "labels"))
    count = len(lengths)
    axes = _texts(archive, "axes", 3)
    persons = _check_joints(archive, lengths, axes, skeleton_name or "parents", skeleton.num_joints)
    names = _texts(archive, "names", count) or tuple(f"clip {number}" for number in range(count))
    numbers = {
        key: archive.array(key, "iu", ndim=1).tolist() if key in archive else [-1] * count
        for key in ("subjects", "cameras", "setups")
    }
    masks = {
        key.removeprefix("split_"): archive.array(key, "b", ndim=1).tolist()
        for key in sorted(archive)
        if key.startswith("split_")
    }
    for key, values in numbers.items():
        require(max(values, default=0) < 1 << 63, f"{path}: {key} holds a number of 64 bits")
    class_names = _texts(archive, "class_names", MAX_LABEL + 1)
    for key, entries in {"labels": labels, "names": names, **numbers, **masks}.items():
        require(len(entries) == count, f"{path}: {key} has {len(entries):,} entries for {count:,} clips")
    known = [label for label in labels if label >= 0]
    from_one = bool(known) and min(known) == 1
    require(
        not from_one or max(known) != len(class_names),
        f"{path}: labels go from 1 to {len(class_names)} for {len(class_names)} class names, but count "
        "from 0; subtract 1 from the labels",
    )
    clips = (
        Recording(
            name=name,
            label=label,
            joints=length,
            subject=subject,
            camera=camera,
            setup=setup,
            train_in=tuple(compress(masks, trains)),
        )
        for name, label, length, subject, camera, setup, *trains in zip(
            names, labels, lengths, *numbers.values(), *masks.values()
        )
    )
    return Source(
        name="npz",
        jobs=_read(archive, clips, axes[2:] == ("confidence",)),
        total=count,
        protocols=tuple(masks),
        persons=persons,
        skeleton=skeleton,
        class_names=class_names,
        notes=("no clip has label 0: do the labels count from 1?",) if from_one else (),
    )


def _check_joints(
    archive: Archive, lengths: list[int], axes: tuple[str, ...], told_by: str, count: int
) -> int:
    """M of the joints, which must be `count` of these axes, and as many frames as the clips have."""
    path = archive.path
    with archive.rows("joints") as rows:
        shape, dtype = rows.shape, rows.dtype
    require(
        dtype.kind == "f" and len(shape) == 4 and shape[1] > 0 and shape[3] in (2, 3),
        f"{path}: joints is {dtype} {list(shape)}, expected floats [F, M, V, 3], or [F, M, V, 2] if 2-D",
    )
    require(shape[2] == count, f"{path}: joints has {shape[2]} joints, {told_by} {count}")
    require(
        not axes or _AXES.get(axes) == shape[3],
        f"{path}: axes is {', '.join(axes)} for joints {list(shape)}; expected x, y or x, y, z or x, y, "
        "confidence",
    )
    require(min(lengths, default=0) >= 0, f"{path}: a length is negative")
    # empty clips are skipped one by one, but they take no space in the file
    clips, frames, total = len(lengths), shape[0], sum(lengths)
    most = 2 * frames + _FEW
    require(clips <= most, f"{path}: lengths holds {clips:,} clips, joints {frames:,} frames in all")
    require(total == frames, f"{path}: lengths sum to {total:,}, joints holds {frames:,} frames")
    return shape[1]


def _read(archive: Archive, clips: Iterable[Recording], confident: bool) -> Iterator[Recording]:
    """Clips of which so far the number of frames is known, with their joints."""
    with archive.rows("joints") as frames:
        for clip in clips:
            yield filled(clip, frames.take(clip.joints), confident)


def _skeleton(archive: Archive) -> Skeleton:
    missing = [key for key in TREE if key not in archive]
    require(
        not missing,
        f"{archive.path} has no {', '.join(missing)}; give them, or --skeleton {' or '.join(SKELETONS)}",
    )
    tree: dict[str, Any] = {
        key: tuple(archive.array(key, "iu", ndim=1).tolist()) for key in TREE if key != "center"
    }
    tree["center"] = int(archive.array("center", "iu", ndim=0))
    names = _texts(archive, "joint_names", len(tree["parents"]))
    try:
        return Skeleton(**tree, joint_names=names)
    except InputError as error:
        raise InputError(f"{archive.path}: {error}") from None


def _texts(archive: Archive, key: str, most: int) -> tuple[str, ...]:
    return tuple(archive.texts(key, most)) if key in archive else ()
