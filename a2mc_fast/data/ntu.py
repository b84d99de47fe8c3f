"""NTU RGB+D 60 and 120 from their raw `.skeleton` text files.

A file holds the number of frames; per frame the number of bodies; per body a line of ten values, the number
of joints and one line of twelve values per joint, the first three being x, y, z in metres. As in the public
conversion a body is known by its position in the frame's list, at most four are read, and the two that spread
most are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from a2mc_fast.data.normalize import choose_bodies
from a2mc_fast.data.rules import UnusableError
from a2mc_fast.data.source import Recording, Skip, Source, existing_file, existing_folder, read_bytes
from a2mc_fast.errors import require

Dataset = Literal["ntu60", "ntu120"]
_JOINTS = 25
_MAX_BODIES = 4  # bodies read per frame
_MAX_BYTES = 64 << 20  # a recording of 300 frames with four bodies takes under 4 MB of text
_MAX_FRAMES = 20_000  # eleven minutes; that many with four bodies would not fit into _MAX_BYTES
_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})", re.ASCII)


class Ids(NamedTuple):
    """The numbers in an NTU name, SsssCcccPpppRrrrAaaa."""

    setup: int
    camera: int
    subject: int
    repetition: int
    action: int


_XSUB_60 = frozenset({1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38})
_XSUB_120 = _XSUB_60 | {
    45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89, 91, 92,
    93, 94, 95, 97, 98, 100, 103,
}  # fmt: skip

PROTOCOLS: dict[Dataset, dict[str, Callable[[Ids], bool]]] = {
    "ntu60": {"xsub": lambda n: n.subject in _XSUB_60, "xview": lambda n: n.camera in (2, 3)},
    "ntu120": {
        "xsub": lambda n: n.subject in _XSUB_120,
        "xset": lambda n: n.setup % 2 == 0,
        # not an official protocol of NTU-120, but as well defined as that of NTU-60
        "xview": lambda n: n.camera in (2, 3),
    },
}
"""Which recordings each protocol trains on; the others are its test set. (Shahroudy 2016, Liu 2019)"""

EXPECTED: dict[Dataset, dict[str, int]] = {
    "ntu60": {
        "files": 56_880,
        "clips": 56_578,
        "xsub train": 40_091,
        "xsub test": 16_487,
        "xview train": 37_646,
        "xview test": 18_932,
    },
    "ntu120": {
        "files": 114_480,
        "clips": 113_945,
        "xsub train": 63_026,
        "xsub test": 50_919,
        "xset train": 54_468,
        "xset test": 59_477,
    },
}
"""Published files, and clips without the samples with missing skeletons."""


def parse_name(name: str) -> Ids | None:
    """The numbers in "S001C002P003R002A013" or "S001C002P003R002A013.skeleton"; None for other names."""
    match = _NAME.fullmatch(name.strip().removesuffix(".skeleton"))
    return Ids(*map(int, match.groups())) if match else None


def train_protocols(ids: Ids, dataset: Dataset) -> tuple[str, ...]:
    """The protocols that train on this recording."""
    return tuple(name for name, trains_on in PROTOCOLS[dataset].items() if trains_on(ids))


def parse_skeleton(text: bytes) -> np.ndarray:
    """Every body of a `.skeleton` file by its position in the frame: float64 [T, B <= 4, 25, 3] metres.

    Raises `UnusableError` for text that is not a `.skeleton` file, is cut off or has another number of
    joints.
    """
    lines = text.split(b"\n")
    rows: list[bytes] = []  # the joint lines of all bodies
    slots: list[tuple[int, int]] = []  # (frame, body) of each 25 of them
    cursor = 0
    try:
        frames = int(lines[0])
        if frames > _MAX_FRAMES:  # a frame without bodies is two bytes of text but 2,400 of array
            raise UnusableError("unreadable", f"more than {_MAX_FRAMES:,} frames")
        cursor = 1
        for frame in range(frames):
            bodies = int(lines[cursor])
            cursor += 1
            for body in range(bodies):
                joints = int(lines[cursor + 1])
                if joints != _JOINTS:
                    raise UnusableError("wrong joint count", f"{joints} joints, expected {_JOINTS}")
                start, cursor = cursor + 2, cursor + 2 + _JOINTS
                if body < _MAX_BODIES:
                    rows += lines[start:cursor]
                    slots.append((frame, body))
        if cursor > len(lines):
            raise IndexError
        # numpy's text reader takes a third less time than splitting and converting in Python
        values = np.loadtxt(rows, usecols=(0, 1, 2), comments=None, ndmin=2) if rows else np.empty((0, 3))
        values = values.reshape(len(slots), _JOINTS, 3)
    except IndexError:
        raise UnusableError("unreadable", f"ends after line {len(lines)}, in the middle of a frame") from None
    except UnusableError:
        raise
    except ValueError as error:
        reason = str(error).split(";")[0].splitlines()[0]
        raise UnusableError(
            "unreadable", f"not a .skeleton file from line {cursor + 1} on: {reason}"
        ) from None
    if not slots:
        raise UnusableError(*(("no body", "no frame has a body") if frames > 0 else ("no frames",)))
    frame, body = np.array(slots).T
    out = np.zeros((frames, body.max() + 1, _JOINTS, 3))
    out[frame, body] = values
    return out


def read_skeleton(path: str | Path) -> np.ndarray:
    """The two bodies of a `.skeleton` file that spread most: float32 [T, 2, 25, 3], metres, camera frame.

    Raises `UnusableError` (an `InputError`) for a file without usable content.
    """
    return choose_bodies(parse_skeleton(read_bytes(Path(path), _MAX_BYTES))).astype(np.float32)


def open_ntu(folder: str | Path, dataset: Dataset, exclude: str | Path | None = None) -> Source:
    """The recordings of a folder and its subfolders, in the order of their names.

    Of a folder that also holds NTU-120, "ntu60" takes its own part only. `exclude` is the published list of
    samples with missing skeletons: one name per line, with or without extension.
    """
    folder = existing_folder(Path(folder), "a folder of .skeleton files")
    paths = sorted(folder.rglob("*.skeleton"), key=lambda path: (path.stem, path))
    require(bool(paths), f"{folder} holds no .skeleton files (such as S001C001P001R001A001.skeleton)")
    excluded = _read_list(Path(exclude)) if exclude is not None else frozenset()
    jobs: list[Path] = []
    skipped: list[Skip] = []
    others = 0
    for path in paths:
        ids = parse_name(path.stem)
        if ids is None or ids.action == 0:
            skipped.append(Skip(path.name, "name not understood", "expected SsssCcccPpppRrrrAaaa.skeleton"))
        elif not _belongs(ids, dataset):
            others += 1
        elif path.stem in excluded:
            skipped.append(Skip(path.stem, "excluded by the list"))
        elif jobs and jobs[-1].stem == path.stem:
            skipped.append(Skip(path.stem, "listed twice", str(path.relative_to(folder))))
        else:
            jobs.append(path)
    return Source(
        name=dataset,
        jobs=jobs,
        total=len(jobs),
        read=partial(_read, dataset=dataset),
        protocols=tuple(PROTOCOLS[dataset]),
        skipped=tuple(skipped),
        notes=(f"{others:,} files do not belong to {dataset} and were left out",) if others else (),
        expected=EXPECTED[dataset],
    )


def _read(path: Path, dataset: Dataset) -> Iterable[Recording | Skip]:
    ids = parse_name(path.stem)
    assert ids is not None  # open_ntu lists no other names
    try:
        joints = read_skeleton(path)
    except UnusableError as error:
        yield Skip(path.stem, error.reason, error.detail)
    else:
        yield Recording(
            name=path.stem,
            label=ids.action - 1,
            joints=joints,
            subject=ids.subject,
            camera=ids.camera,
            setup=ids.setup,
            train_in=train_protocols(ids, dataset),
        )


def _belongs(ids: Ids, dataset: Dataset) -> bool:
    """NTU-60 is set-ups 1-17 with actions 1-60, NTU-120 is everything up to set-up 32 and action 120."""
    setups, actions = (17, 60) if dataset == "ntu60" else (32, 120)
    return ids.setup <= setups and ids.action <= actions


def _read_list(path: Path) -> frozenset[str]:
    """The recordings named in a list, without extension; other lines (titles) are passed over."""
    lines = existing_file(path, "a list of recordings to exclude").read_text(
        encoding="utf-8", errors="replace"
    )
    names = frozenset(
        line.strip().removesuffix(".skeleton") for line in lines.splitlines() if parse_name(line)
    )
    require(bool(names), f"{path} names no recording; expected lines such as S001C002P005R002A008")
    return names
