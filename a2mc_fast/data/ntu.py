"""NTU RGB+D 60 and 120 from their raw `.skeleton` text files.

A file holds the number of frames; per frame the number of bodies; per body a line of ten values beginning
with the body's id, the number of joints and one line of twelve values per joint, the first three being x, y,
z in metres. The README beside tells how bodies become persons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from a2mc_fast.data.normalize import choose_bodies
from a2mc_fast.data.rules import UnusableError
from a2mc_fast.data.source import Recording, Skip, Source, existing, read_bytes, wrong_values
from a2mc_fast.errors import require

Dataset = Literal["ntu60", "ntu120"]
_JOINTS = 25
_VALUES = 12  # in the line of a joint
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
        "files": 56_880, "clips": 56_578, "xsub train": 40_091, "xsub test": 16_487, "xview train": 37_646,
        "xview test": 18_932,
    },
    "ntu120": {
        "files": 114_480, "clips": 113_945, "xsub train": 63_026, "xsub test": 50_919, "xset train": 54_468,
        "xset test": 59_477,
    },
}  # fmt: skip
"""Published files, and clips without the samples with missing skeletons."""
_LARGEST: dict[Dataset, tuple[int, int]] = {"ntu60": (17, 60), "ntu120": (32, 120)}
"""Set-up and action; NTU-120 holds all of NTU-60."""


def parse_name(name: str) -> Ids | None:
    """The numbers in "S001C002P003R002A013" or "S001C002P003R002A013.skeleton"; None for other names."""
    match = _NAME.fullmatch(name.strip().removesuffix(".skeleton"))
    return Ids(*map(int, match.groups())) if match else None


def parse_skeleton(text: bytes) -> np.ndarray:
    """Every body of a `.skeleton` file by its place: float64 [T, B <= 4, 25, 3] metres.

    Raises `UnusableError` for text that is not a `.skeleton` file, is cut off, goes on after its frames, or
    has another number of joints or of values.
    """
    lines = text.decode("latin1").split("\n")  # numpy reads text faster than bytes
    rows: list[str] = []  # the joint lines of all bodies
    bodies: list[list[str]] = []  # the ids in each frame
    cursor = line = 0
    try:
        frames = int(lines[0])
        if frames > _MAX_FRAMES:  # a frame without bodies is two bytes of text but 2,400 of array
            raise UnusableError("unreadable", f"more than {_MAX_FRAMES:,} frames")
        cursor = 1
        for _ in range(frames):
            line = cursor
            if (count := int(lines[line])) < 0:
                raise ValueError(f"{count} bodies")
            cursor += 1
            bodies.append([])
            for _ in range(count):
                line = cursor + 1
                joints = int(lines[line])
                if joints != _JOINTS:
                    raise UnusableError("wrong joint count", f"{joints} joints, expected {_JOINTS}")
                bodies[-1] += lines[cursor].split(None, 1)[:1] or [""]
                start, cursor = cursor + 2, cursor + 2 + _JOINTS
                rows += lines[start:cursor]
        if cursor > len(lines):
            raise IndexError
    except IndexError:
        raise UnusableError("unreadable", f"ends after line {len(lines)}, in the middle of a frame") from None
    except UnusableError:
        raise
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UnusableError(
            "unreadable", f"not a .skeleton file from line {line + 1:,} on: {reason}"
        ) from None
    for number, rest in enumerate(lines[cursor:], cursor + 1):
        if rest.strip():
            raise UnusableError("unreadable", f"goes on in line {number:,}, after the last of its frames")
    if not rows:
        raise UnusableError(*(("no body", "no frame has a body") if frames > 0 else ("no frames",)))
    try:
        # numpy's text reader takes a third less time than splitting and converting in Python; the last column
        # is read because it must be there
        values = np.loadtxt(rows, usecols=(0, 1, 2, _VALUES - 1), comments=None, ndmin=2)[:, :3]
    except ValueError as error:
        _check_values(rows, bodies)
        raise UnusableError("unreadable", str(error).splitlines()[0]) from None
    # every line has enough values, so if they have the usual number, parted by blanks, none has too many
    blank = np.frombuffer(" ".join(("", *rows)).encode("latin1"), np.uint8) <= ord(" ")
    found = np.count_nonzero(blank[:-1] > blank[1:])
    if not text.isascii() or found != len(rows) * _VALUES or len(values) != len(rows):
        _check_values(rows, bodies)
    return _placed(bodies, values.reshape(-1, _JOINTS, 3))


def _check_values(rows: list[str], bodies: list[list[str]]) -> None:
    """Raise `UnusableError` unless the joint lines have twelve values, x, y and z numbers."""
    for number, row in enumerate(rows):
        if wrong := wrong_values(row.split(), _VALUES, "expected", range(3)):
            frames = [frame for frame, ids in enumerate(bodies) for _ in ids]
            where = f"frame {frames[number // _JOINTS]:,}, joint {number % _JOINTS}"
            raise UnusableError("unreadable", f"{where} {wrong}")


def _placed(bodies: list[list[str]], values: np.ndarray) -> np.ndarray:
    """The bodies of all frames, values [B of all frames, V, 3], at their places: [T, B <= 4, V, 3]."""
    present = [set(ids) for ids in bodies]
    known = all(len(names) == len(ids) for names, ids in zip(present, bodies))
    holders: list[str] = []  # the id that had each place last
    slots: list[tuple[int, int, int]] = []  # (frame, place, row of values)
    row = 0
    for frame, ids in enumerate(bodies):
        for position, name in enumerate(ids):
            place = _place(holders, name, present[frame]) if known else position
            if place < _MAX_BODIES:
                slots.append((frame, place, row))
            row += 1
    frame, place, chosen = np.array(slots).T
    out = np.zeros((len(bodies), place.max() + 1, *values.shape[1:]))
    out[frame, place] = values[chosen]
    return out


def _place(holders: list[str], name: str, present: set[str]) -> int:
    """The place of a body among those present, which is written down in `holders`."""
    if name in holders:
        return holders.index(name)
    free = next((place for place, holder in enumerate(holders) if holder not in present), len(holders))
    if free < _MAX_BODIES:
        holders[free : free + 1] = [name]
    return free


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
    folder = existing(folder, "a folder of .skeleton files", folder=True)
    paths = sorted(folder.rglob("*.skeleton"), key=lambda path: (path.stem, path))
    require(bool(paths), f"{folder} holds no .skeleton files (such as S001C001P001R001A001.skeleton)")
    excluded = _read_list(Path(exclude)) if exclude is not None else frozenset()
    jobs: list[Recording] = []
    skipped: list[Skip] = []
    others, (setups, actions) = 0, _LARGEST[dataset]
    for path in paths:
        ids = parse_name(path.stem)
        if ids is None or ids.action == 0:
            skipped.append(Skip(path.name, "name not understood", "expected SsssCcccPpppRrrrAaaa.skeleton"))
        elif ids.setup > setups or ids.action > actions:
            others += 1
        elif path.stem in excluded:
            skipped.append(Skip(path.stem, "excluded by the list"))
        else:
            jobs.append(
                Recording(
                    name=path.stem,
                    label=ids.action - 1,
                    joints=path,
                    subject=ids.subject,
                    camera=ids.camera,
                    setup=ids.setup,
                    train_in=tuple(name for name, trains in PROTOCOLS[dataset].items() if trains(ids)),
                )
            )
    return Source(
        name=dataset,
        jobs=jobs,
        total=len(jobs),
        read=_read,
        ranked=True,
        unit="files",
        protocols=tuple(PROTOCOLS[dataset]),
        skipped=tuple(skipped),
        notes=(f"{others:,} files do not belong to {dataset} and were left out",) if others else (),
        expected=EXPECTED[dataset],
    )


def _read(job: Recording) -> Iterable[Recording]:
    yield replace(job, joints=parse_skeleton(read_bytes(job.joints, _MAX_BYTES)).astype(np.float32))


def _read_list(path: Path) -> frozenset[str]:
    """The recordings named in a list, without extension; other lines (titles) are passed over."""
    text = existing(path, "a list of recordings to exclude").read_text(encoding="utf-8", errors="replace")
    names = frozenset(
        line.strip().removesuffix(".skeleton") for line in text.splitlines() if parse_name(line)
    )
    require(bool(names), f"{path} names no recording; expected lines such as S001C002P005R002A008")
    return names
