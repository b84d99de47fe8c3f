"""Classes of clips and recordings by a trained classifier, in a file: what `a2mc_fast.predict` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from a2mc_fast.config.settings import Device
from a2mc_fast.data import Clips
from a2mc_fast.data.keypoints import as_joints
from a2mc_fast.data.npy import Archive, map_npy
from a2mc_fast.data.rules import MAX_LABEL
from a2mc_fast.data.units import doubt, measure
from a2mc_fast.errors import InputError, require, tell
from a2mc_fast.evaluation.inference import ClipClassifier, load_classifier, most_probable, packed, prepared
from a2mc_fast.evaluation.protocols import classes_of
from a2mc_fast.evaluation.settings import Classifying
from a2mc_fast.evaluation.tables import write_csv
from a2mc_fast.files import write_json
from a2mc_fast.run.machine import pick_device
from a2mc_fast.run.opened import check_skeleton

_TOGETHER = 256  # clips classified at a time
_NAMED = 20  # of those left out
Piece = tuple[dict[str, Any], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A recording as it was read, or a clip of a packed file."""

    name: str
    joints: np.ndarray
    """[T, M, V, 3] metres."""
    label: str = ""
    """Its class, where the data tell it."""
    normalized: bool = False


def predict(
    run: Path,
    data: Path,
    out: Path,
    *,
    protocol: Classifying,
    window: int,
    stride: int,
    top: int,
    device: Device,
) -> None:
    """Write the classes of all clips of `data`, and say how many are those of their labels."""
    classifier = load_classifier(run, protocol)
    encoder = classifier.encoder
    classifier.to(pick_device(replace(encoder.config, run=replace(encoder.config.run, device=device))))
    most = encoder.skeleton.max_frames
    require(window <= most, f"--window {window}: the clips it was trained on were cut to {most} frames")
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    pieces = _pieces(classifier, data, window, stride, refused)
    while some := list(islice(pieces, _TOGETHER)):
        clips = packed(encoder, [joints for _, joints in some])
        if not rows and (doubted := doubt(measure(clips), "times")):
            tell(doubted, error=True)
        found = most_probable(classifier, clips, top)
        rows += [{**about, "classes": classes} for (about, _), classes in zip(some, found)]
    require(bool(rows), f"nothing in {data} can be used, {len(refused):,} skipped: {', '.join(refused[:1])}")
    for reason in refused[:_NAMED]:
        tell(f"skipped {reason}", error=True)
    if more := refused[_NAMED:]:
        tell(f"skipped {len(more):,} more", error=True)
    _write(out, rows)
    known = [row for row in rows if row["label"]]
    right = sum(row["label"] == row["classes"][0][0] for row in known)
    share = f", top-1 {100 * right / len(known):.2f} % of {len(known)} with a label" if known else ""
    tell(f"wrote {out}: {len(rows)} {'windows' if window else 'clips'}, {len(refused)} skipped{share}")


def _pieces(
    classifier: ClipClassifier, data: Path, window: int, stride: int, refused: list[str]
) -> Iterator[Piece]:
    """What a row says of each clip or window, and its joints ready for the encoder; adds to `refused`."""
    most = classifier.encoder.skeleton.max_frames
    for raw in recordings(classifier, data, refused):
        frames = len(raw.joints)
        if frames > most and not window:
            tell(f"{raw.name}: {most} of {frames} frames are looked at; --window {most} looks at all")
        for start, stop in windows(frames, window, stride) if window else [(0, min(frames, most))]:
            joints = raw.joints[start:stop]
            try:
                # a window is turned by its own first frame, as clips that were trained on are
                normalize = not raw.normalized or bool(window)
                yield (
                    {"name": raw.name, "start": start, "stop": stop, "label": raw.label},
                    prepared(classifier.encoder, joints, normalize=normalize),
                )
            except InputError as error:
                refused.append(f"{raw.name}, frames {start} to {stop}: {error}")


def windows(frames: int, window: int, stride: int = 0) -> list[tuple[int, int]]:
    """(first frame, one after the last) of windows that cover a recording; stride 0 is half a window.

    The last one ends with the recording, and a recording that is shorter than a window is one.
    """
    last = max(frames - window, 0)
    starts = [*range(0, last, stride or max(1, window // 2)), last]
    return [(start, min(start + window, frames)) for start in starts]


def recordings(classifier: ClipClassifier, data: Path, refused: list[str]) -> Iterator[Raw]:
    """The clips of a packed file, or the recordings of a .npz or .npy file, or of all such in a folder.

    Files of a folder that cannot be read are added to `refused`.
    """
    if data.suffix == ".safetensors":
        clips, encoder = Clips.load(data), classifier.encoder
        check_skeleton(encoder.source_path, encoder.skeleton, encoder.persons, clips, str(data))
        parts = clips.frames.permute(0, 3, 2, 1).split(clips.lengths.tolist())
        for name, label, joints in zip(clips.names, classes_of(clips), parts):
            yield Raw(name=name, joints=joints.numpy(), label=label, normalized=True)
    elif data.is_dir():
        files = sorted(file for file in data.iterdir() if file.suffix in (".npz", ".npy"))
        require(bool(files), f"{data} holds no .npz or .npy file")
        for file in files:
            try:
                found = list(_of_file(file))
            except InputError as error:
                refused.append(str(error))
                continue
            yield from found
    else:
        yield from _of_file(data)


def _of_file(path: Path) -> Iterator[Raw]:
    """The recording of a .npy file, or of a .npz file without `lengths`; or the clips of an archive."""
    if path.suffix == ".npy":
        yield Raw(name=path.stem, joints=_by_person(_numbers(map_npy(path), path)))
        return
    require(
        path.suffix == ".npz",
        f"{path}: give packed clips (.safetensors), a recording (.npz or .npy with joints [T, M, V, 3]) or a "
        "folder of them",
    )
    archive = Archive(path)
    with archive.rows("joints") as rows:
        joints = _numbers(rows.all(), path)
    confidence = "axes" in archive and archive.texts("axes", 3)[2:] == ["confidence"]
    if "lengths" not in archive:
        yield Raw(name=path.stem, joints=_by_person(joints, confidence))
        return
    lengths = archive.array("lengths", "iu", ndim=1).tolist()
    require(
        min(lengths, default=0) >= 0 and sum(lengths) == len(joints),
        f"{path}: lengths sum to {sum(lengths):,}, joints holds {len(joints):,} frames",
    )
    count = len(lengths)
    names = (
        archive.texts("names", count) if "names" in archive else [f"{path.stem} {n}" for n in range(count)]
    )
    labels = archive.array("labels", "iu", ndim=1).tolist() if "labels" in archive else [-1] * count
    require(
        len(names) == len(labels) == count,
        f"{path}: {count} lengths, {len(names)} names, {len(labels)} labels",
    )
    known = archive.texts("class_names", MAX_LABEL + 1) if "class_names" in archive else []
    for name, label, part in zip(names, labels, np.split(joints, np.cumsum(lengths)[:-1])):
        text = known[label] if 0 <= label < len(known) else f"class {label}" if label >= 0 else ""
        yield Raw(name=name, joints=_by_person(part, confidence), label=text)


def _numbers(joints: np.ndarray, path: Path) -> np.ndarray:
    """The joints of a file; `InputError` for what can be none."""
    require(
        joints.dtype.kind in "fiu" and joints.ndim in (3, 4),
        f"{path}: joints must be numbers [T, M, V, 3], got {joints.dtype} {list(joints.shape)}",
    )
    return joints


def _by_person(joints: np.ndarray, confidence: bool = False) -> np.ndarray:
    """Joints [T, M, V, 3], also where one person's came as [T, V, 3]; 2-D keypoints in metres, too."""
    joints = joints[:, None] if joints.ndim == 3 else joints
    return as_joints(joints[..., :2], joints[..., 2]) if confidence else joints


def _write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as the suffix says, .json or .csv, whole or not at all."""
    if out.suffix == ".json":
        write_json(out, [{**row, "classes": dict(row["classes"])} for row in rows])
        return
    head = ("name", "start", "stop", "label")
    ranks = range(1, len(rows[0]["classes"]) + 1)
    best = [f"{what}_{rank}" for rank in ranks for what in ("class", "probability")]
    lines = []
    for row in rows:
        listed = [value for name, share in row["classes"] for value in (name, f"{share:.4f}")]
        lines.append((*(row[name] for name in head), *listed))
    write_csv(out, [(*head, *best), *lines])
