"""PKU-MMD, part I and II, from text: a folder of skeleton files, a folder of label files and the official
splits.

A skeleton file has one line per frame: 2 bodies x 25 joints x (x, y, z) = 150 numbers in metres, zeros for an
absent body. A label file has one line per action, "class,start,end,confidence" with classes from 1. An
action's clip is rows [start:end) counted from 0, as in CMD and ISC (AimCLR counts from 1 and includes the
end). The bodies keep their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from a2mc_fast.data.rules import UnusableError
from a2mc_fast.data.source import Recording, Skip, Source, existing, read_bytes, wrong_values
from a2mc_fast.errors import InputError, require

Part = Literal["pku1", "pku2"]
_CLASSES = 51
_NUMBERS = 2 * 25 * 3  # per line of a skeleton file
_MAX_BYTES = 128 << 20  # a video of 10,000 frames takes under 20 MB of text
_MAX_OVERLAP = 8  # the clips of a video together have at most this many times its frames
_CAMERAS = {"L": 1, "M": 2, "R": 3}
_NAMES: dict[Part, re.Pattern[str]] = {
    "pku1": re.compile(r"(?P<video>\d{1,6})-(?P<view>[LMR])", re.ASCII),
    "pku2": re.compile(r"A(?P<video>\d{1,6})N(?P<subject>\d{1,6})-(?P<view>[LMR])", re.ASCII),
}
_SPLIT_FILES = {
    "xsub": ("cross-subject.txt", "cross_subject.txt", "cross_subject_v2.txt"),
    "xview": ("cross-view.txt", "cross_view.txt", "cross_view_v2.txt"),
}
_TEST_SUBJECTS = (2, 3, 7)  # part II

EXPECTED: dict[Part, dict[str, int]] = {
    "pku1": {"videos": 1_076, "clips": 21_545, "xsub train": 18_841, "xsub test": 2_704},
    "pku2": {"videos": 1_009, "clips": 6_945, "xsub train": 5_332, "xsub test": 1_613},
}
"""Published numbers of videos and clips. (Liu et al. 2017)"""
BEYOND = "the label goes on after the end of the video; cut there"


class Ids(NamedTuple):
    """What the name of a video tells: camera 1, 2, 3 for L, M, R; subject -1 in part I."""

    camera: int
    subject: int


def parse_name(name: str, part: Part) -> Ids | None:
    """The numbers in "0002-L" (part I) or "A01N02-L" (part II), with or without ".txt"; None for others."""
    match = _NAMES[part].fullmatch(name.strip().removesuffix(".txt"))
    if match is None:
        return None
    return Ids(_CAMERAS[match["view"]], int(match.groupdict().get("subject", -1)))


def open_pku(
    folder: str | Path,
    part: Part,
    *,
    skeletons: str | Path | None = None,
    labels: str | Path | None = None,
    splits: Mapping[str, str | Path | None] | None = None,
) -> Source:
    """The labelled actions of all videos, in the order of the videos' names.

    `skeletons` and `labels` are the folders of text files, by default the subfolders whose names contain
    "skel" and "label". `splits` maps xsub and xview to official split files, by default those in `folder`
    under their official names; without any, part II is split by performer and view, which gives the same
    sets.
    """
    folder = existing(folder, "the folder of PKU-MMD", folder=True)
    skeleton_folder = Path(skeletons) if skeletons else _subfolder(folder, "skel", "--skeletons")
    label_folder = Path(labels) if labels else _subfolder(folder, "label", "--labels")
    videos, marked = (
        {file.stem: file for file in existing(place, f"a folder of {what} files", folder=True).glob("*.txt")}
        for place, what in ((skeleton_folder, "skeleton"), (label_folder, "label"))
    )
    require(bool(videos), f"{skeleton_folder} holds no .txt files with skeletons")
    require(bool(marked), f"{label_folder} holds no .txt files with labels")
    training, notes = _training_videos(folder, part, splits or {}, frozenset(videos))
    jobs: list[Recording] = []
    skipped: list[Skip] = []
    for name in sorted(videos | marked):
        ids = parse_name(name, part)
        if ids is None:
            skipped.append(Skip(name, "name not understood", f"not a video of {part}"))
        elif name not in marked:
            skipped.append(Skip(name, "no label", f"no {label_folder / name}.txt"))
        elif name not in videos:
            skipped.append(Skip(name, "no skeleton data", f"no {skeleton_folder / name}.txt"))
        else:
            train_in = tuple(protocol for protocol, names in training.items() if name in names)
            files = videos[name], marked[name]
            jobs.append(Recording(name=name, joints=files, train_in=train_in, **ids._asdict()))
    return Source(
        name=part,
        jobs=jobs,
        total=len(jobs),
        read=read_video,
        protocols=tuple(training),
        unit="videos",
        skipped=tuple(skipped),
        notes=tuple(notes),
        expected=EXPECTED[part],
    )


def read_video(video: Recording) -> Iterable[Recording | Skip]:
    """The actions of one video, named by video and label row (from 0)."""
    skeleton_file, label_file = video.joints
    frames = parse_frames(read_bytes(skeleton_file, _MAX_BYTES))
    # as latin1, no other script's digits are numbers
    labels = read_bytes(label_file, _MAX_BYTES).decode("latin1").rstrip().split("\n")
    if len(labels) > len(frames):
        raise UnusableError("unreadable", f"{len(labels):,} labels for {len(frames):,} frames")
    room = _MAX_OVERLAP * len(frames)
    for row, line in enumerate(labels):
        if not line.strip():
            continue
        clip = f"{video.name}_{row}"
        try:
            # some write 8.0,1.0,120.0,2.0
            numbers = [float(value) for value in (line.split(",") if "," in line else line.split())]
            action, start, end = map(int, numbers[:3])
            # more values are those of two lines that became one
            if len(numbers) > 4 or numbers[:3] != [action, start, end]:
                raise ValueError
        except (ValueError, OverflowError):
            yield Skip(clip, "unreadable", f"label line {row + 1} is not class,start,end,confidence")
            continue
        if not 1 <= action <= _CLASSES:
            yield Skip(clip, "label out of range", f"class {action}, expected 1 to {_CLASSES}")
        elif start < 0:
            yield Skip(clip, "unreadable", f"starts at row {start}")
        elif start < len(frames) and end - start > 2 * (len(frames) - start):
            detail = f"rows {start:,} to {end:,} of a video of {len(frames):,} frames"
            yield Skip(clip, "unreadable", detail)
        elif (room := room - len(frames[start : max(start, end)])) < 0:
            detail = f"the actions before have {_MAX_OVERLAP} times the {len(frames):,} frames of the video"
            yield Skip(clip, "unreadable", detail)
        else:
            joints, beyond = frames[start : max(start, end)], end - len(frames)
            remarks = {BEYOND: beyond} if beyond > 0 else {}
            yield replace(video, name=clip, label=action - 1, joints=joints, remarks=remarks)


def parse_frames(text: bytes) -> np.ndarray:
    """A skeleton file: float32 [T, 2, 25, 3] metres. Raises `UnusableError` for anything else."""
    # in this encoding, what numpy takes for blanks is stripped, and a line of them is empty
    lines = text.decode("latin1").rstrip().split("\n")
    if lines == [""]:
        raise UnusableError("no frames")
    for number, line in enumerate(lines, 1):
        if not line.strip():  # without it, the labels would name other frames from here on
            raise UnusableError("unreadable", f"line {number:,} is empty")
    try:
        values = np.loadtxt(lines, comments=None, ndmin=2)
    except ValueError as error:
        count = len(lines[0].split())
        for number, line in enumerate(lines, 1):
            if wrong := wrong_values(line.split(), count, "the first line", range(count)):
                raise UnusableError("unreadable", f"line {number:,} {wrong}") from None
        raise UnusableError("unreadable", str(error).splitlines()[0]) from None
    if values.shape[1] != _NUMBERS:
        raise UnusableError("wrong joint count", f"{values.shape[1]} numbers per line, expected {_NUMBERS}")
    return values.reshape(-1, 2, 25, 3).astype(np.float32)


def read_split(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """(training, validation) video names of an official split file: title, names, title, names."""
    text = existing(path, "a split file of PKU-MMD").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    require(
        len(lines) == 4,
        f"{path} has {len(lines)} lines, expected title, training videos, title, validation videos",
    )
    train, validation = (
        frozenset(name.strip().removesuffix(".txt") for name in line.split(",") if name.strip())
        for line in lines[1::2]
    )
    return train, validation


def _training_videos(
    folder: Path, part: Part, given: Mapping[str, str | Path | None], videos: frozenset[str]
) -> tuple[dict[str, frozenset[str]], list[str]]:
    """Protocol -> names of its training videos, and what the user should know about them."""
    training: dict[str, frozenset[str]] = {}
    notes: list[str] = []
    for protocol, usual in _SPLIT_FILES.items():
        # the first of these in the folder or one level below
        places = (place for name in usual for place in (folder / name, *sorted(folder.glob(f"*/{name}"))))
        path = given.get(protocol) or next((place for place in places if place.is_file()), None)
        if path is None:
            continue
        train, validation = read_split(Path(path))
        require(
            bool((train | validation) & videos),
            f"{path} names none of the {len(videos):,} videos of {part}; is it the split of the other part?",
        )
        training[protocol] = train
        if absent := (train | validation) - videos:
            notes.append(f"{len(absent):,} of {len(train | validation):,} videos in {path} were not found")
        if unlisted := videos - train - validation:
            notes.append(f"{len(unlisted):,} videos are not in {path} and count as test")
    if part == "pku2":
        ids = {name: found for name in videos if (found := parse_name(name, part))}
        by_name = {
            "xsub": frozenset(n for n, i in ids.items() if i.subject not in _TEST_SUBJECTS),
            "xview": frozenset(n for n, i in ids.items() if i.camera != _CAMERAS["L"]),
        }
        notes += [
            f"no split file for {protocol}; split by the performer and view in the names"
            for protocol in by_name
            if protocol not in training
        ]
        training = by_name | training
    if not training:
        raise InputError(
            f"{folder} has no split files, and the names of part I do not tell performers; give the official "
            "cross-subject.txt with --xsub-file or cross-view.txt with --xview-file"
        )
    return training, notes


def _subfolder(folder: Path, word: str, flag: str) -> Path:
    found = sorted(p for p in folder.iterdir() if p.is_dir() and word in p.name.lower())
    require(
        len(found) == 1,
        f"{folder} has {len(found)} subfolders called *{word}*, expected one; give it with {flag}",
    )
    return found[0]
