"""The clip archive (`.npz`) for own data of any skeleton, as the README beside describes it.

The clips go through the pre-normalisation, all persons are kept in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a2mc_fast.data.npy import Archive
from a2mc_fast.data.rules import MAX_LABEL
from a2mc_fast.data.skeletons import SKELETONS, skeleton_of
from a2mc_fast.data.source import Recording, Source
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
    with archive.rows("joints") as frames:
        shape, dtype = frames.shape, frames.dtype
    require(
        dtype.kind == "f" and len(shape) == 4 and shape[1] > 0 and shape[3] in (2, 3),
        f"{path}: joints is {dtype} {list(shape)}, expected floats [F, M, V, 3], or [F, M, V, 2] if 2-D",
    )
    require(
        shape[2] == skeleton.num_joints,
        f"{path}: joints has {shape[2]} joints, {skeleton_name or 'parents'} {skeleton.num_joints}",
    )
    axes = _texts(archive, "axes", 3)
    require(
        not axes or _AXES.get(axes) == shape[3],
        f"{path}: axes is {', '.join(axes)} for joints {list(shape)}; expected x, y or x, y, z or x, y, "
        "confidence",
    )
    _check_lengths(path, lengths, shape[0])
    about = _About(
        names=_texts(archive, "names", count) or tuple(f"clip {number}" for number in range(count)),
        lengths=lengths,
        labels=labels,
        confidence=axes[2:] == ("confidence",),
        columns={
            key: archive.array(key, "iu", ndim=1) if key in archive else np.full(count, -1)
            for key in ("subjects", "cameras", "setups")
        },
        masks={
            key.removeprefix("split_"): archive.array(key, "b", ndim=1)
            for key in sorted(archive)
            if key.startswith("split_")
        },
    )
    for key, values in about.columns.items():
        require(int(values.max(initial=0)) < 1 << 63, f"{path}: {key} holds a number of 64 bits")
    class_names = _texts(archive, "class_names", MAX_LABEL + 1)
    for key, size in about.sizes().items():
        require(size == count, f"{path}: {key} has {size:,} entries for {count:,} clips")
    known = [label for label in labels if label >= 0]
    from_one = bool(known) and min(known) == 1
    require(
        not from_one or max(known) != len(class_names),
        f"{path}: labels go from 1 to {len(class_names)} for {len(class_names)} class names, but count "
        "from 0; subtract 1 from the labels",
    )
    return Source(
        name="npz",
        jobs=_clips(archive, about),
        total=count,
        protocols=tuple(about.masks),
        persons=shape[1],
        skeleton=skeleton,
        class_names=class_names,
        notes=("no clip has label 0: do the labels count from 1?",) if from_one else (),
    )


@dataclass(frozen=True, kw_only=True)
class _About:
    """What an archive says of its N clips, joints apart."""

    names: Sequence[str]
    lengths: Sequence[int]
    labels: Sequence[int]
    confidence: bool
    """Whether the third coordinate is one."""
    columns: Mapping[str, np.ndarray]
    """subjects, cameras and setups, [N]; -1 where unknown."""
    masks: Mapping[str, np.ndarray]
    """Protocol -> [N] bool."""

    def sizes(self) -> dict[str, int]:
        """The number of entries of each array."""
        counted: dict[str, Sized] = {"labels": self.labels, "names": self.names, **self.columns, **self.masks}
        return {key: len(values) for key, values in counted.items()}


def _check_lengths(path: Path, lengths: Sequence[int], frames: int) -> None:
    require(min(lengths, default=0) >= 0, f"{path}: a length is negative")
    # empty clips are skipped one by one, but they take no space in the file
    require(
        len(lengths) <= 2 * frames + _FEW,
        f"{path}: lengths holds {len(lengths):,} clips, joints {frames:,} frames in all",
    )
    require(
        sum(lengths) == frames,
        f"{path}: lengths sum to {sum(lengths):,}, joints holds {frames:,} frames",
    )


def _clips(archive: Archive, about: _About) -> Iterator[Recording]:
    with archive.rows("joints") as frames:
        for number, (name, length, label) in enumerate(zip(about.names, about.lengths, about.labels)):
            joints = frames.take(length)
            yield Recording(
                name=name,
                label=label,
                joints=joints[..., :2] if about.confidence else joints,
                confidence=joints[..., 2] if about.confidence else None,
                subject=int(about.columns["subjects"][number]),
                camera=int(about.columns["cameras"][number]),
                setup=int(about.columns["setups"][number]),
                train_in=tuple(protocol for protocol, mask in about.masks.items() if mask[number]),
            )


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
