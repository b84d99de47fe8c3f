"""The readers against tiny data sets written here, the public conversion in plain loops, hostile files."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a2mc_fast.data.agcn import open_agcn
from a2mc_fast.data.ctrgcn import open_ctrgcn
from a2mc_fast.data.npz import open_npz
from a2mc_fast.data.ntu import PROTOCOLS, open_ntu, parse_name, parse_skeleton, read_skeleton
from a2mc_fast.data.pack import Collected, Remark, collect
from a2mc_fast.data.pku import BEYOND, open_pku
from a2mc_fast.data.pyskl import open_pyskl
from a2mc_fast.data.source import Recording, Skip, Source
from a2mc_fast.data.unpickle import as_array, load_pickle
from a2mc_fast.errors import InputError
from a2mc_fast.skeleton import NTU25
from tests.test_normalize import full_clip, slow_choice, slow_normalize

# -- writers of tiny data sets


def skeleton_text(joints: np.ndarray, newline: str = "\r\n") -> str:
    """A .skeleton file of joints [T, B, 25, 3]; a body that is null in a frame is not in its list."""
    lines = [str(len(joints))]
    for frame in joints:
        bodies = [body for body in frame if body.any()]
        lines.append(str(len(bodies)))
        for number, body in enumerate(bodies):
            lines += [f"7205759403793{number:04d} 0 1 1 0 1 0 0.02764709 -0.05745083 2", "25"]
            rest = "277.4419 191.8218 1036.233 519.1677 -0.2059419 0.05349901 0.9692109 -0.1239193 2"
            lines += [f"{x:.7g} {y:.7g} {z:.7g} {rest}" for x, y, z in body]
    return newline.join(lines) + newline


def packed(joints: np.ndarray) -> np.ndarray:
    """What such a file tells of joints [T, B, 25, 3]: the bodies of each frame, moved to the front."""
    out = np.zeros_like(joints)
    for t, frame in enumerate(joints):
        for slot, body in enumerate(body for body in frame if body.any()):
            out[t, slot] = body
    return out


def write_ntu(folder: Path, clips: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, joints in clips.items():
        (folder / f"{name}.skeleton").write_text(skeleton_text(joints))
    return folder


def write_pku(folder: Path, videos: dict[str, np.ndarray], labels: dict[str, str]) -> Path:
    (folder / "skeleton").mkdir(parents=True)
    (folder / "label").mkdir()
    for name, joints in videos.items():
        rows = joints.reshape(len(joints), -1)
        text = "\n".join(" ".join(f"{x:.6g}" for x in row) for row in rows)
        (folder / "skeleton" / f"{name}.txt").write_text(text + "\n")
    for name, lines in labels.items():
        (folder / "label" / f"{name}.txt").write_text(lines)
    return folder


def write_split(path: Path, train: str, validation: str) -> Path:
    path.write_text(f"Training videos:\n{train}\nValidataion videos:\n{validation}\n")
    return path


def write_agcn(folder: Path, names: dict[str, list[str]], clips: dict[str, np.ndarray], frames: Any) -> Path:
    folder.mkdir(parents=True)
    for part, members in names.items():
        np.save(folder / f"{part}_data_joint.npy", np.stack([clips[name] for name in members]))
        labels = [int(name[17:20]) - 1 for name in members]
        with (folder / f"{part}_label.pkl").open("wb") as file:
            pickle.dump(([f"{name}.skeleton" for name in members], labels), file)
        np.save(folder / f"{part}_num_frame.npy", np.array([frames[name] for name in members]))
    return folder


def own_archive(**changes: Any) -> dict[str, Any]:
    """The arrays of a small own-data archive: three clips of 4, 6 and 5 frames, five joints, one person."""
    archive: dict[str, Any] = {
        "joints": full_clip(0, 15, 1, 5),
        "lengths": np.array([4, 6, 5]),
        "labels": np.array([0, 1, -1]),
        "parents": np.array([0, 0, 1, 2, 1]),
        "mirror": np.array([0, 1, 2, 4, 3]),
        "center": np.array(2),
        "axis_z": np.array([1, 2]),
        "axis_x": np.array([3, 4]),
        "split_xsub": np.array([True, False, True]),
        "split_odd": np.array([False, True, True]),
        "subjects": np.array([5, 6, 7]),
        "class_names": np.array(["wave", "jump"]),
        "joint_names": np.array(list("abcde")),
    }
    return {key: value for key, value in {**archive, **changes}.items() if value is not None}


def read_all(source: Source) -> tuple[dict[str, Recording], dict[str, Skip]]:
    """Everything a source yields, by name."""
    results = [result for job in source.jobs for result in source.read(job)]
    skipped = [*source.skipped, *(r for r in results if isinstance(r, Skip))]
    return {r.name: r for r in results if isinstance(r, Recording)}, {s.name: s for s in skipped}


def clip_joints(made: Collected, number: int) -> np.ndarray:
    """Joints [T, M, V, 3] of one packed clip."""
    first = int(made.clips.offsets[number])
    frames = made.clips.frames[first : first + int(made.clips.lengths[number])]
    return frames.permute(0, 3, 2, 1).numpy()


# -- NTU


def test_ntu_equals_the_public_conversion(tmp_path: Path) -> None:
    names = ["S001C001P001R001A001", "S002C002P003R002A050", "S003C003P008R001A060", "S017C001P020R002A010"]
    clips = {name: full_clip(i, 12 + i, 1 + i, 25) for i, name in enumerate(names)}
    for joints in clips.values():
        joints[2] = 0  # frames without any body exist
        joints[:5, -1] = 0  # the last body comes late
        joints[7, 0] = 0  # the first is lost for a moment, so another takes its place in the list
    made = collect(open_ntu(write_ntu(tmp_path / "ntu", clips), "ntu60"))
    assert made.clips.names == tuple(sorted(names)) and not made.skipped
    for number, name in enumerate(made.clips.names):
        expected = slow_normalize(slow_choice(packed(clips[name])), NTU25, limit=32)
        np.testing.assert_allclose(clip_joints(made, number), expected, atol=1e-4)


def test_skeleton_text_in_any_line_ending_gives_all_bodies() -> None:
    joints = full_clip(1, 3, 5, 25)
    joints[1, 2:] = 0
    for newline in ("\n", "\r\n"):
        bodies = parse_skeleton(skeleton_text(joints, newline).encode())
        np.testing.assert_allclose(bodies, joints[:, :4], rtol=1e-6)  # a fifth body is not read
    with pytest.raises(InputError, match="no body"):
        parse_skeleton(b"2\n0\n0\n")


def test_read_skeleton_gives_one_recording(tmp_path: Path) -> None:
    joints = full_clip(1, 3, 1, 25)
    (tmp_path / "x.skeleton").write_text(skeleton_text(joints))
    read = read_skeleton(tmp_path / "x.skeleton")
    assert read.dtype == np.float32 and read.shape == (3, 2, 25, 3)
    np.testing.assert_allclose(read[:, :1], joints, rtol=1e-6)
    assert not read[:, 1].any()


def first_joint(text: str, x_y_z: str) -> str:
    """The text with other coordinates of the first joint."""
    return re.sub(r"(\r\n25\r\n)\S+ \S+ \S+", rf"\g<1>{x_y_z}", text, count=1)


def other_frames(text: str, frames: int) -> str:
    """The text with another number of frames in its first line."""
    return f"{frames}\r\n{text.partition(chr(10))[2]}"


BROKEN_TEXT: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "unreadable"),
    "no frames": (lambda text: "0\n", "no frames"),
    "bodies never": (lambda text: "3\n0\n0\n0\n", "no body"),
    "cut in the middle": (lambda text: text[: len(text) // 2], "unreadable"),
    "cut before the last line": (lambda text: "\r\n".join(text.split("\r\n")[:-2]), "unreadable"),
    "prose": (lambda text: "This is not a recording.\n" * 40, "unreadable"),
    "a word for a number": (
        lambda text: text.replace("277.4419 ", "abc ", 1).replace(" ", " x ", 30),
        "unreadable",
    ),
    "twenty joints": (lambda text: text.replace("\r\n25\r\n", "\r\n20\r\n"), "wrong joint count"),
    "not a number": (lambda text: first_joint(text, "nan 0 1"), "not finite"),
    "infinite": (lambda text: first_joint(text, "0 -inf 1"), "not finite"),
    "far away": (lambda text: first_joint(text, "1001 0 1"), "beyond 1,000 m"),
    "eleven values": (lambda text: first_joint(text, "0.5 0.5"), "unreadable"),
    "thirteen values": (lambda text: first_joint(text, "0.5 0.5 3 3"), "unreadable"),
    "eleven, then thirteen": (
        lambda text: re.sub(r" (\S+)\r\n(\S+ \S+ \S+ )", r"\r\n\1 \2", first_joint(text, "0 0 3"), count=1),
        "unreadable",
    ),
    "thirteen, and nine of the body": (
        lambda text: first_joint(text.replace(" -0.05745083 2\r\n", " -0.05745083\r\n", 1), "0 0 3 3"),
        "unreadable",
    ),
    "twelve by a space that is none": (lambda text: first_joint(text, "0.5\xa00.5 3"), "unreadable"),
    "more frames than it says": (lambda text: other_frames(text, 2), "unreadable"),
    "fewer frames than it says": (lambda text: other_frames(text, 4), "unreadable"),
    "a negative number of bodies": (lambda text: text.replace("\r\n1\r\n", "\r\n-1\r\n", 1), "unreadable"),
    "a billion frames": (lambda text: "1000000000\n1\n", "unreadable"),
}


def test_broken_ntu_files_are_skipped_with_their_reason(tmp_path: Path) -> None:
    good = skeleton_text(full_clip(1, 3, 1, 25))
    names = {key: f"S001C001P001R001A{i + 2:03d}" for i, key in enumerate(BROKEN_TEXT)}
    folder = write_ntu(tmp_path / "ntu", {"S001C001P001R001A001": full_clip(1, 3, 1, 25)})
    for key, (damage, _) in BROKEN_TEXT.items():
        (folder / f"{names[key]}.skeleton").write_text(damage(good), newline="")
    (folder / "notes.skeleton").write_text(good)
    made = collect(open_ntu(folder, "ntu60"))
    assert made.clips.names == ("S001C001P001R001A001",)
    reasons = {skip.name: skip.reason for skip in made.skipped}
    assert reasons.pop("notes.skeleton") == "name not understood"
    assert reasons == {names[key]: reason for key, (_, reason) in BROKEN_TEXT.items()}


def test_ntu_names_and_protocols() -> None:
    ids = parse_name("S018C002P103R001A120.skeleton")
    assert ids == (18, 2, 103, 1, 120)
    assert parse_name("S018C002P103R001A120.avi") is None
    held = {name for name, trains in PROTOCOLS["ntu120"].items() if trains(ids)}
    assert held == {"xsub", "xset", "xview"}
    everyone = [ids._replace(subject=subject) for subject in range(1, 107)]
    assert sum(map(PROTOCOLS["ntu60"]["xsub"], everyone[:40])) == 20
    assert sum(map(PROTOCOLS["ntu120"]["xsub"], everyone)) == 53
    assert sum(map(PROTOCOLS["ntu120"]["xset"], (ids._replace(setup=s) for s in range(1, 33)))) == 16
    assert [c for c in (1, 2, 3) if PROTOCOLS["ntu60"]["xview"](ids._replace(camera=c))] == [2, 3]


def test_ntu_folder_with_both_sets_exclusions_and_duplicates(tmp_path: Path) -> None:
    names = ["S001C001P001R001A001", "S001C002P003R001A060", "S001C003P002R001A061", "S018C001P041R001A005"]
    folder = write_ntu(tmp_path / "ntu", {name: full_clip(i, 2, 1, 25) for i, name in enumerate(names)})
    write_ntu(folder / "more", {names[0]: full_clip(0, 2, 1, 25)})
    listed = tmp_path / "missing.txt"
    listed.write_text(
        f"The following samples have missing skeletons:\n{names[1]}.skeleton\nS009C009P009R009A009\n"
    )
    source = open_ntu(folder, "ntu60", listed)
    made = collect(source)
    assert made.clips.names == (names[0],) and source.notes == (
        "2 files do not belong to ntu60 and were left out",
    )
    assert {s.name: s.reason for s in made.skipped} == {
        names[0]: "listed twice",
        names[1]: "excluded by the list",
    }
    only = read_all(source)[0][names[0]]
    assert (only.label, only.subject, only.camera, only.setup, only.train_in) == (0, 1, 1, 1, ("xsub",))
    kept, _ = read_all(open_ntu(folder, "ntu120"))
    assert {name: r.train_in for name, r in kept.items()} == {
        names[0]: ("xsub",),
        names[1]: ("xview",),
        names[2]: ("xsub", "xview"),
        names[3]: ("xset",),
    }


def with_ids(frames: list[list[tuple[str, np.ndarray]]]) -> bytes:
    """A .skeleton file of (id, body [25, 3]) for each body of each frame."""
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for name, body in bodies:
            lines += [f"{name} 0 1 1 0 1 0 0.02 -0.05 2", "25"]
            lines += [f"{x:.7g} {y:.7g} {z:.7g} 1 2 3 4 5 6 7 8 2" for x, y, z in body]
    return "\n".join(lines).encode() + b"\n"


def test_persons_follow_the_body_id() -> None:
    a, b, c = (full_clip(i, 1, 1, 25)[0, 0] for i in range(3))
    frames = [[("7", a), ("8", b)], [("8", b), ("7", a)], [("8", b)], [("8", b), ("9", c)], [("9", c)]]
    read = parse_skeleton(with_ids(frames))
    assert read.shape == (5, 2, 25, 3)
    for frame, (first, second) in enumerate([(a, b), (a, b), (None, b), (c, b), (c, None)]):
        for place, body in enumerate((first, second)):
            np.testing.assert_allclose(read[frame, place], 0 if body is None else body, rtol=1e-6)
    # one person whom the sensor loses and finds again under another id
    assert parse_skeleton(with_ids([[("7", a)], [], [("9", c)]])).shape[1] == 1
    # without ids the place in the list counts
    read = parse_skeleton(with_ids([[("0", a), ("0", b)], [("0", b)]]))
    np.testing.assert_allclose(read[1, 0], b, rtol=1e-6)
    # five at once: the fifth is not read, and four places are all there are
    crowd = [[(str(i), a) for i in range(5)], [(str(i), b) for i in range(4, 9)]]
    assert parse_skeleton(with_ids(crowd)).shape[1] == 4


def test_messages_name_frame_and_joint() -> None:
    text = with_ids([[("7", full_clip(0, 1, 1, 25)[0, 0])]] * 3).decode().split("\n")
    row = 1 + 3 * 1 + 2 * 27 + 2 + 4  # of joint 4 in frame 2
    text[row] = text[row].partition(" ")[2]
    with pytest.raises(InputError, match="frame 2, joint 4 has 11 values, expected 12"):
        parse_skeleton("\n".join(text).encode())
    text[row] = "0.1 O.2 " + text[row].partition(" ")[2]
    with pytest.raises(InputError, match=r"frame 2, joint 4 has 'O\.2' where a number belongs"):
        parse_skeleton("\n".join(text).encode())
    text[1 + 28 + 2] = "x"
    with pytest.raises(InputError, match=r"from line 32 on: invalid literal .* 'x'"):
        parse_skeleton("\n".join(text).encode())


def test_every_cut_of_the_last_line_is_noticed() -> None:
    text = skeleton_text(full_clip(0, 2, 1, 25), "\n").encode()
    whole = parse_skeleton(text)
    for end in range(text.rstrip().rindex(b"\n"), len(text) - 2):
        with pytest.raises(InputError, match="unreadable"):
            parse_skeleton(text[:end])
    np.testing.assert_array_equal(parse_skeleton(text.rstrip()), whole)


def test_of_two_copies_the_whole_one_counts(tmp_path: Path) -> None:
    joints = full_clip(0, 4, 1, 25)
    folder = write_ntu(tmp_path / "ntu", {NTU_NAMES[0]: joints})
    write_ntu(folder / "again", {NTU_NAMES[0]: joints})
    first = folder / "again" / f"{NTU_NAMES[0]}.skeleton"
    first.write_text(first.read_text()[:-500])
    made = collect(open_ntu(folder, "ntu60"))
    assert made.clips.names == (NTU_NAMES[0],) and made.clips.lengths.tolist() == [4]
    assert [(s.name, s.reason) for s in made.skipped] == [(NTU_NAMES[0], "unreadable")]
    content = pyskl_content()
    broken = {**content["annotations"][0], "keypoint": np.full((1, 8, 25, 3), np.nan, np.float32)}
    content["annotations"] = [{**broken, "total_frames": 8}, *content["annotations"]]
    (tmp_path / "ntu.pkl").write_bytes(pickle.dumps(content))
    made = collect(open_pyskl(tmp_path / "ntu.pkl"))
    assert made.clips.names == tuple(NTU_NAMES) and [s.reason for s in made.skipped] == ["not finite"]


# -- PKU-MMD


def test_pku_clips_labels_and_fallback_split(tmp_path: Path) -> None:
    videos = {name: full_clip(i, 20, 2, 25) for i, name in enumerate(["A01N02-L", "A02N04-M", "A03N07-R"])}
    videos["A02N04-M"][:, 1] = 0
    labels = {
        "A01N02-L": "51,2,9,2\n3,5,30,1\n4,18,99,1\n",
        "A02N04-M": "1,0,20,2\n\n52,1,2,1\n7,20,25,1\n8,9,9,1\nx,1,2,1\n8,-3,9,1\n",
        "A03N07-R": "2,0,5,1\n",
        "A09N09-R": "2,0,5,1\n",
    }
    folder = write_pku(
        tmp_path / "pku", videos | {"A08N08-L": videos["A01N02-L"], "other": videos["A01N02-L"]}, labels
    )
    (folder / "skeleton" / "A03N07-R.txt").write_text("1 2 3\n4 5 6\n")
    source = open_pku(folder, "pku2")
    made = collect(source)
    assert made.clips.names == ("A01N02-L_0", "A01N02-L_1", "A02N04-M_0")
    assert made.clips.labels.tolist() == [50, 2, 0] and made.clips.lengths.tolist() == [7, 15, 20]
    assert made.clips.extra["subjects"].tolist() == [2, 2, 4] and made.clips.extra["cameras"].tolist() == [
        1,
        1,
        2,
    ]
    assert {name: mask.tolist() for name, mask in made.clips.splits.items()} == {
        "xsub": [False, False, True],
        "xview": [False, False, True],
    }
    for number, rows in enumerate((slice(2, 9), slice(5, 20), slice(0, 20))):
        clip = videos[made.clips.names[number][:8]][rows]  # bodies keep their order
        np.testing.assert_allclose(
            clip_joints(made, number), slow_normalize(clip, NTU25, limit=24), atol=1e-4
        )
    assert made.remarks == {BEYOND: Remark(clips=1, frames=10)}
    assert {skip.name: skip.reason for skip in made.skipped} == {
        "A01N02-L_2": "unreadable",
        "A02N04-M_2": "label out of range",
        "A02N04-M_3": "no frames",
        "A02N04-M_4": "no frames",
        "A02N04-M_5": "unreadable",
        "A02N04-M_6": "unreadable",
        "A03N07-R": "wrong joint count",
        "A08N08-L": "no label",
        "A09N09-R": "no skeleton data",
        "other": "name not understood",
    }
    assert sum("split by the performer and view" in note for note in source.notes) == 2


@pytest.mark.parametrize("empty", ["", " \x1f\xa0"], ids=ascii)
def test_pku_video_with_an_empty_line(tmp_path: Path, empty: str) -> None:
    """All later rows would be of other frames than the labels mean."""
    videos = {name: full_clip(i, 20, 2, 25) for i, name in enumerate(["A01N01-M", "A01N02-M"])}
    folder = write_pku(tmp_path / "pku", videos, dict.fromkeys(videos, "3,10,15,1\n4,15,20,1\n"))
    path = folder / "skeleton" / "A01N02-M.txt"
    lines = path.read_text().split("\n")
    path.write_bytes(("\n".join([*lines[:5], empty, *lines[6:]]) + "\n\n").encode("latin1"))
    made = collect(open_pku(folder, "pku2"))
    assert made.clips.names == ("A01N01-M_0", "A01N01-M_1")
    assert [(s.name, s.reason, s.detail) for s in made.skipped] == [
        ("A01N02-M", "unreadable", "line 6 is empty")
    ]


def test_pku_official_split_files(tmp_path: Path) -> None:
    videos = {name: full_clip(i, 4, 2, 25) for i, name in enumerate(["0002-L", "0002-M", "0003-R"])}
    folder = write_pku(tmp_path / "pku", videos, dict.fromkeys(videos, "1,0,4,1\n"))
    with pytest.raises(InputError, match="--xsub-file"):
        open_pku(folder, "pku1")
    write_split(folder / "cross-subject.txt", "0002-L, 0002-M,", "0003-R, 0004-L")
    elsewhere = write_split(tmp_path / "views", "0002-M", "0002-L")
    source = open_pku(folder, "pku1", splits={"xview": elsewhere})
    assert collect(source).clips.splits["xsub"].tolist() == [True, True, False]
    assert {name: r.train_in for name, r in read_all(source)[0].items()} == {
        "0002-L_0": ("xsub",),
        "0002-M_0": ("xsub", "xview"),
        "0003-R_0": (),
    }
    assert any("1 of 4 videos" in note for note in source.notes)
    assert any("1 videos are not in" in note for note in source.notes)


def test_pku_split_of_another_part_or_form(tmp_path: Path) -> None:
    videos = {"A01N02-L": full_clip(0, 4, 2, 25)}
    folder = write_pku(tmp_path / "pku", videos, {"A01N02-L": "1,0,4,1\n"})
    other = write_split(tmp_path / "other.txt", "0002-L", "0003-L")
    with pytest.raises(InputError, match="names none of the 1 videos"):
        open_pku(folder, "pku2", splits={"xsub": other})
    other.write_text("A01N02-L\n")
    with pytest.raises(InputError, match="has 1 lines"):
        open_pku(folder, "pku2", splits={"xsub": other})
    (folder / "label2").mkdir()
    with pytest.raises(InputError, match="--labels"):
        open_pku(folder, "pku2")


# -- arrays of other projects

NTU_NAMES = ["S001C001P001R001A001", "S001C002P001R001A002", "S001C003P003R001A003", "S002C001P003R001A004"]


def agcn_folders(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    clips = {name: full_clip(i, 30, 2, 25).transpose(3, 0, 2, 1) for i, name in enumerate(NTU_NAMES)}
    frames = dict(zip(NTU_NAMES, (7, 30, 400, 12)))
    a, b, c, d = NTU_NAMES
    write_agcn(tmp_path / "agcn" / "xsub", {"train": [b, a], "val": [d, c]}, clips, frames)
    write_agcn(tmp_path / "agcn" / "xsetup", {"train": [c, d, b], "val": [a]}, clips, frames)
    return tmp_path / "agcn", clips


def test_agcn_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    folder, clips = agcn_folders(tmp_path)
    made = collect(open_agcn(folder))
    assert made.clips.names == tuple(NTU_NAMES) and made.clips.labels.tolist() == [0, 1, 2, 3]
    assert made.clips.lengths.tolist() == [7, 30, 30, 12]
    assert made.clips.extra["subjects"].tolist() == [1, 1, 3, 3]
    # the first folder in order, xsetup, gives the clips, both give their split
    assert {name: mask.tolist() for name, mask in made.clips.splits.items()} == {
        "xset": [False, True, True, True],
        "xsub": [True, True, False, False],
    }
    for number, name in enumerate(NTU_NAMES):
        expected = clips[name].transpose(1, 3, 2, 0)[: made.clips.lengths[number]]
        np.testing.assert_array_equal(clip_joints(made, number), expected)


def test_agcn_single_protocol_without_frame_counts_and_float_labels(tmp_path: Path) -> None:
    folder, _ = agcn_folders(tmp_path)
    (folder / "xsub" / "train_num_frame.npy").unlink()
    names = ["A01N02-L.txt_5", "A02N03-R.txt_0"]  # as PKU-MMD's are
    (folder / "xsub" / "train_label.pkl").write_bytes(pickle.dumps((names, np.array([3.0, 4.0]))))
    kept, _ = read_all(open_agcn(folder / "xsub", protocol="mine"))
    assert list(kept) == ["A01N02-L_5", "A02N03-R_0", *NTU_NAMES[2:]]
    first = kept["A01N02-L_5"]
    assert (first.label, len(first.joints), first.train_in, first.subject, first.camera) == (
        3,
        30,
        ("mine",),
        2,
        1,
    )


def test_agcn_without_frame_counts_ends_with_the_padding(tmp_path: Path) -> None:
    folder, clips = agcn_folders(tmp_path)
    padded = np.stack([clips[name] for name in (NTU_NAMES[1], NTU_NAMES[0])])
    padded[0, :, 5:] = padded[1, :, 20:] = 0
    padded[1, :, 3] = 0  # a gap stays
    np.save(folder / "xsub" / "train_data_joint.npy", padded)
    (folder / "xsub" / "train_num_frame.npy").unlink()
    made = collect(open_agcn(folder / "xsub"))
    assert made.clips.names == tuple(NTU_NAMES) and made.clips.lengths.tolist() == [20, 5, 30, 12]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "train_data_joint.npy").unlink(), "does not exist"),
        (lambda f: (f / "val_label.pkl").unlink(), "does not exist"),
        (lambda f: (f / "train_label.pkl").unlink(), "holds train_label.pkl"),
        (
            lambda f: np.save(f / "train_data_joint.npy", np.zeros((2, 3, 4, 20, 2), np.float32)),
            "expected floats .N, 3, T, 25",
        ),
        (
            lambda f: np.save(f / "train_data_joint.npy", np.zeros((9, 3, 4, 25, 2), np.float32)),
            "name 2",
        ),
        (
            lambda f: np.save(f / "val_data_joint.npy", np.zeros((2, 3, 4, 25, 1), np.float32)),
            "1 persons, the",
        ),
        (lambda f: np.save(f / "val_data_joint.npy", np.array([None, {}])), "holds object"),
        (lambda f: np.save(f / "val_num_frame.npy", np.array([1.5, 2])), "expected 2 integers"),
        (lambda f: (f / "train_label.pkl").write_bytes(pickle.dumps(["a", "b"])), "not a pair"),
        (lambda f: (f / "train_label.pkl").write_bytes(pickle.dumps((["a"], [1.5]))), "not a pair"),
    ],
)
def test_damaged_agcn_folder(tmp_path: Path, damage: Callable[[Path], Any], sentence: str) -> None:
    folder, _ = agcn_folders(tmp_path)
    damage(folder / "xsub")
    with pytest.raises(InputError, match=sentence):
        open_agcn(folder / "xsub")


def ctrgcn_arrays() -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """An archive's arrays, and its clips [T, 2, 25, 3] in order: two to train on, one to test."""
    clips = [full_clip(i, 10 + i, 2, 25) for i in range(3)]
    clips[1][:, 1] = 0
    rows = np.zeros((3, 300, 150), np.float32)
    for row, clip in zip(rows, clips):
        row[: len(clip)] = clip.reshape(len(clip), 150)
    hot = np.eye(60)[[4, 59, 0]]
    return {"x_train": rows[:2], "y_train": hot[:2], "x_test": rows[2:], "y_test": hot[2:]}, clips


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ctrgcn_archive(tmp_path: Path, save: Callable[..., None]) -> None:
    arrays, clips = ctrgcn_arrays()
    save(tmp_path / "NTU60_CV.npz", **arrays)
    made = collect(open_ctrgcn(tmp_path / "NTU60_CV.npz"))
    assert made.clips.names == ("train_00000", "train_00001", "test_00000")
    assert made.clips.labels.tolist() == [4, 59, 0] and made.clips.lengths.tolist() == [10, 11, 12]
    assert made.clips.splits["xview"].tolist() == [True, True, False]
    for number, clip in enumerate(clips):
        np.testing.assert_allclose(
            clip_joints(made, number), slow_normalize(clip, NTU25, limit=16), atol=1e-4
        )


def pyskl_content() -> dict[str, Any]:
    clips = [full_clip(i, 8 + i, 1 + i % 2, 25).transpose(1, 0, 2, 3).astype(np.float16) for i in range(4)]
    annotations: list[Any] = [
        {"frame_dir": name, "label": i, "keypoint": clip, "total_frames": clip.shape[1]}
        for i, (name, clip) in enumerate(zip(NTU_NAMES, clips))
    ]
    return {
        "split": {"xsub_train": NTU_NAMES[:2], "xsub_val": NTU_NAMES[2:3], "xview_train": NTU_NAMES[1:2]},
        "annotations": annotations[::-1],
    }


@pytest.mark.parametrize("protocol", range(6))
def test_pyskl_pickle(tmp_path: Path, protocol: int) -> None:
    content = pyskl_content()
    keypoints = {a["frame_dir"]: a["keypoint"] for a in content["annotations"]}
    bad = {"label": 1, "keypoint": np.zeros((1, 4, 25, 2), np.float32), "frame_dir": "flat"}
    content["annotations"] += [
        {**bad, "keypoint": None, "frame_dir": "none"},
        bad,
        "?",
        {**bad, "label": "x"},
    ]
    content["annotations"] += [{**bad, "frame_dir": "17", "keypoint": np.ones((1, 4, 17, 3), np.float32)}]
    (tmp_path / "ntu.pkl").write_bytes(pickle.dumps(content, protocol))
    source = open_pyskl(tmp_path / "ntu.pkl")
    made = collect(source)
    assert made.clips.names == tuple(NTU_NAMES) and made.clips.labels.tolist() == [0, 1, 2, 3]
    assert made.clips.splits["xsub"].tolist() == [True, True, False, False]
    assert made.clips.splits["xview"].tolist() == [False, True, False, False]
    assert source.notes == ("3 clips are in no split and count as test",)
    for number, name in enumerate(NTU_NAMES):
        clip = slow_choice(keypoints[name].astype(np.float32).transpose(1, 0, 2, 3))
        np.testing.assert_allclose(
            clip_joints(made, number), slow_normalize(clip, NTU25, limit=12), atol=1e-4
        )
    assert sorted((skip.name, skip.reason) for skip in made.skipped) == [
        ("17", "wrong joint count"),
        ("annotation 6", "unreadable"),
        ("flat", "no label"),
        ("flat", "no skeleton data"),
        ("none", "no skeleton data"),
    ]


def test_pyskl_keypoints_in_another_order_are_skipped(tmp_path: Path) -> None:
    """Frames taken for persons would give clips of one or two frames."""
    content = pyskl_content()
    for annotation in content["annotations"][:2]:
        annotation["keypoint"] = annotation["keypoint"].transpose(1, 0, 2, 3)
    del content["annotations"][0]["total_frames"]
    (tmp_path / "ntu.pkl").write_bytes(pickle.dumps(content))
    made = collect(open_pyskl(tmp_path / "ntu.pkl"))
    assert made.clips.names == tuple(NTU_NAMES[:2]) and made.clips.lengths.tolist() == [8, 9]
    assert [(s.name, s.detail) for s in made.skipped] == [
        (NTU_NAMES[2], "keypoint is float16 [10, 1, 25, 3], expected [M, total_frames, V, 3]"),
        (NTU_NAMES[3], "keypoint is float16 [11, 2, 25, 3], expected [M, T, V, 3]"),
    ]


@pytest.mark.parametrize("labels", [[1, 2, 1], [1, -1, 2]])
def test_labels_that_count_from_one(tmp_path: Path, labels: list[int]) -> None:
    """The last class would be lost, and every other called by its neighbour's name."""
    np.savez(tmp_path / "own.npz", **own_archive(labels=np.array(labels)))
    with pytest.raises(InputError, match=r"labels go from 1 to 2 for 2 class names.*subtract 1"):
        open_npz(tmp_path / "own.npz")
    np.savez(tmp_path / "own.npz", **own_archive(labels=np.array(labels), class_names=None))
    assert open_npz(tmp_path / "own.npz").notes == ("no clip has label 0: do the labels count from 1?",)


def test_own_archive(tmp_path: Path) -> None:
    arrays = own_archive()
    np.savez(tmp_path / "own.npz", **arrays)
    made = collect(open_npz(tmp_path / "own.npz"))
    clips = made.clips
    assert clips.names == ("clip 0", "clip 1", "clip 2") and clips.lengths.tolist() == [4, 6, 5]
    assert clips.labels.tolist() == [0, 1, -1] and clips.class_names == ("wave", "jump")
    assert clips.splits["xsub"].tolist() == [True, False, True] and set(clips.splits) == {"xsub", "odd"}
    assert clips.extra["subjects"].tolist() == [5, 6, 7] and set(clips.extra) == {"subjects"}
    assert clips.skeleton.joint_names == tuple("abcde") and clips.skeleton.axis_x == (3, 4)
    for number, (start, end) in enumerate(((0, 4), (4, 10), (10, 15))):
        expected = slow_normalize(arrays["joints"][start:end], clips.skeleton, limit=8)
        np.testing.assert_allclose(clip_joints(made, number), expected, atol=1e-5)


def test_bad_clips_of_an_own_archive_are_skipped(tmp_path: Path) -> None:
    joints = full_clip(0, 15, 1, 5)
    joints[5, 0, 1, 2] = np.nan
    joints[10:] = 0
    arrays = own_archive(
        joints=np.concatenate([joints, full_clip(1, 4, 1, 5)]),
        lengths=np.array([4, 6, 5, 0, 3, 1]),
        labels=np.array([0, 0, 0, 0, 0, 2]),
        subjects=None,
        split_xsub=np.ones(6, bool),
        split_odd=None,
    )
    np.savez_compressed(tmp_path / "own.npz", **arrays)
    source = open_npz(tmp_path / "own.npz")
    made = collect(replace(source, skeleton=replace(source.skeleton, max_frames=2)))
    assert made.clips.names == ("clip 0", "clip 4") and made.shortened == 2
    assert {skip.name: skip.reason for skip in made.skipped} == {
        "clip 1": "not finite",
        "clip 2": "no body",
        "clip 3": "no frames",
        "clip 5": "label out of range",
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mirror": None, "center": None}, "has no mirror, center"),
        ({"joints": np.zeros((15, 1, 5, 4), np.float32)}, "expected floats"),
        ({"axes": np.array(["x", "y"])}, "axes is x, y for joints .15, 1, 5, 3.; expected x, y or x, y, z"),
        ({"joints": np.zeros((15, 1, 6, 3), np.float32)}, "6 joints, parents 5"),
        ({"joints": np.array([None] * 15)}, "object"),
        ({"joints": np.asfortranarray(full_clip(0, 15, 1, 5))}, "ascontiguousarray"),
        ({"lengths": np.array([4, 6, 4])}, "lengths sum to 14"),
        ({"lengths": np.array([4, 12, -1])}, "negative"),
        ({"labels": np.array([0.5, 1, 2])}, "expected 1 axes of integers"),
        ({"labels": np.array([0, 1])}, "labels has 2 entries for 3 clips"),
        ({"mirror": np.array([0, 1, 2, 3, 3])}, "mirror must swap"),
        ({"axis_z": np.array([1, 2, 3])}, "two joints each"),
        ({"split_xsub": np.array([1, 0, 1])}, "booleans"),
        ({"names": np.array(["a", "b"])}, "names has 2 entries"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_own_archive_of_another_form(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    np.savez(tmp_path / "own.npz", **own_archive(**changes))
    with pytest.raises(InputError, match=sentence):
        collect(open_npz(tmp_path / "own.npz"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"y_test": None}, "has no y_test"),
        ({"x_test": np.zeros((1, 300, 225), np.float32)}, "expected floats .N, T, 150"),
        ({"y_test": np.ones((1, 60))}, "not one-hot"),
        ({"y_test": np.eye(60)}, "holds 1 clips, y_test 60"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_ctrgcn_archive_of_another_form(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    arrays = {k: v for k, v in {**ctrgcn_arrays()[0], **changes}.items() if v is not None}
    np.savez(tmp_path / "NTU60_CS.npz", **arrays)
    with pytest.raises(InputError, match=sentence):
        open_ctrgcn(tmp_path / "NTU60_CS.npz")
    np.savez(tmp_path / "mine.npz", **ctrgcn_arrays()[0])
    with pytest.raises(InputError, match="--protocol"):
        open_ctrgcn(tmp_path / "mine.npz")


# -- hostile files


class Malicious:
    """Unpickles into a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(flag: Path) -> dict[str, bytes]:
    """Pickles that would run something, allocate a lot or break the machine, were they executed."""
    deep = b"\x80\x04" + b")" + b"\x85" * 200_000
    return {
        "os.system": pickle.dumps(Malicious(os.system, f"touch {flag}")),
        "eval": pickle.dumps(Malicious(eval, f"open({str(flag)!r}, 'w')"), 0),
        "inside a dict": pickle.dumps({"annotations": [Malicious(os.mkdir, str(flag))], "split": {}}, 2),
        "numpy loader": b"cnumpy\nload\n(V/etc/passwd\ntR.",
        "submodule": b"cnumpy\nf2py.os.system\n(Vtouch x\ntR.",
        "object array": pickle.dumps(np.array([None, {}], dtype=object)),
        "instance": b"(inumpy\nndarray\n.",
        "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "huge array": b"cnumpy\nndarray\n((I1000000000000\ntVf8\ntR(I1\n(I1000000000000\nt"
        b"cnumpy\ndtype\n(Vf8\ntRI00\nVx\ntb.",
        "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge memo": b"\x80\x02Nr\xff\xff\xff\x7f",
        "deep key": deep + b"q\x00}h\x00Ns.",
        "call of a number": b"I1\n)R.",
        "state for a list": b"]}b.",
        "empty stack": b"00.",
        "no mark": b"e.",
        "missing memo": b"h\x05.",
        "endless": b"(" * 1000,
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pabc\n.",
    }


@pytest.mark.parametrize("name", list(payloads(Path())))
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    flag = tmp_path / "ran"
    path = tmp_path / "data.pkl"
    path.write_bytes(payloads(flag)[name])
    tracemalloc.start()
    with pytest.raises(InputError, match=r"asks for|is damaged"):
        load_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not flag.exists()
    assert peak < 64 << 20


def test_malicious_pickle_is_told_by_its_class(tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Malicious(os.system, "true")))
    with pytest.raises(InputError, match=r"asks for posix\.system; only lists"):
        open_pyskl(tmp_path / "data.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_come_back_unchanged(tmp_path: Path, protocol: int) -> None:
    content = {
        "text": ["é", "", "x" * 300],
        "numbers": (1, -2, 2**40, 10**30, 1.5, True, None),
        "nested": {"a": {1: []}, 2.5: ()},
        "bytes": b"\x00\xff" * 200,
        "scalar": np.float32(2.5),
    }
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "turned": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
        "big": np.arange(4, dtype=">i4"),
        "words": np.array(["ab", "c"]),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), np.int64),
        "point": np.array(3.5),
    }
    shared = content["text"]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({**content, "again": shared, **arrays}, protocol))
    read = load_pickle(tmp_path / "a.pkl")
    assert {key: read[key] for key in content} == content and read["again"] is read["text"]
    for name, array in arrays.items():
        back = as_array(read[name])
        np.testing.assert_array_equal(back, array)
        assert back.dtype == array.dtype


def npy_claiming(shape: tuple[int, ...]) -> bytes:
    """A .npy file whose header claims `shape` but which holds a few bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(64)


def formats(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Source]]]:
    """One small valid file or folder of each format; the file named first is the one to damage."""
    ntu = write_ntu(folder / "ntu", {NTU_NAMES[0]: full_clip(0, 2, 1, 25)})
    pku = write_pku(folder / "pku", {"A01N02-L": full_clip(0, 4, 2, 25)}, {"A01N02-L": "1,0,4,1\n"})
    write_split(pku / "cross_subject_v2.txt", "A01N02-L", "A02N02-L")
    agcn_folders(folder)
    agcn = folder / "agcn" / "xsub"
    np.savez_compressed(folder / "NTU60_CS.npz", **ctrgcn_arrays()[0])
    np.savez(folder / "own.npz", **own_archive())
    (folder / "ntu.pkl").write_bytes(pickle.dumps(pyskl_content()))
    return {
        "ntu": (ntu / f"{NTU_NAMES[0]}.skeleton", lambda path: open_ntu(path.parent, "ntu60")),
        "exclude list": (folder / "list.txt", lambda path: open_ntu(ntu, "ntu60", path)),
        "pku skeleton": (pku / "skeleton" / "A01N02-L.txt", lambda path: open_pku(pku, "pku2")),
        "pku label": (pku / "label" / "A01N02-L.txt", lambda path: open_pku(pku, "pku2")),
        "pku split": (pku / "cross_subject_v2.txt", lambda path: open_pku(pku, "pku2")),
        "agcn data": (agcn / "train_data_joint.npy", lambda path: open_agcn(agcn)),
        "agcn labels": (agcn / "train_label.pkl", lambda path: open_agcn(agcn)),
        "agcn frames": (agcn / "train_num_frame.npy", lambda path: open_agcn(agcn)),
        "ctrgcn": (folder / "NTU60_CS.npz", open_ctrgcn),
        "npz": (folder / "own.npz", open_npz),
        "pyskl": (folder / "ntu.pkl", open_pyskl),
    }


NOISE = np.random.default_rng(0)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) * 3 // 8],
    "random": lambda data: NOISE.bytes(5000),
    "start, then random": lambda data: data[: len(data) // 3] + NOISE.bytes(5000),
    "zeros": lambda data: bytes(5000),
    "line feeds": lambda data: b"\n" * 5000,
    "a terabyte claimed": lambda data: npy_claiming((1 << 38, 1)),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize(
    "kind", ["ntu", "exclude list", "pku skeleton", "pku label", "pku split", "agcn data", "agcn labels",
             "agcn frames", "ctrgcn", "npz", "pyskl"],
)  # fmt: skip
def test_damaged_file_is_one_sentence(tmp_path: Path, kind: str, damage: str) -> None:
    path, opener = formats(tmp_path)[kind]
    path.write_bytes(DAMAGES[damage](path.read_bytes() if path.exists() else b""))
    with pytest.raises(InputError) as failure:
        collect(opener(path))
    assert len(str(failure.value).splitlines()) == 1 and len(str(failure.value)) < 500


@pytest.mark.parametrize("kind", ["ctrgcn", "npz", "pyskl", "agcn labels", "agcn data"])
def test_flipped_bytes_never_escape(tmp_path: Path, kind: str) -> None:
    path, opener = formats(tmp_path)[kind]
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        data = bytearray(good)
        for place in rng.integers(0, min(len(data), 4000), 3):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            collect(opener(path))
        except InputError:
            refused += 1
    assert refused > 0


def test_archive_that_claims_or_unpacks_too_much(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, **own_archive(joints=None))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("joints.npy", npy_claiming((1 << 40, 1, 5, 3)))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"claims \["):
        collect(open_npz(path))
    np.savez_compressed(
        tmp_path / "bomb.npz", joints=np.zeros((20_000_000, 1, 1, 3), np.uint8), other=np.zeros(1 << 24)
    )
    tracemalloc.reset_peak()
    with pytest.raises(InputError, match="would unpack to"):
        open_npz(tmp_path / "bomb.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_clips_that_share_one_array_or_video_are_not_multiplied(tmp_path: Path) -> None:
    content = pyskl_content()
    one = content["annotations"][0]
    content["annotations"] = [{**one, "frame_dir": f"clip {i}"} for i in range(400)]
    (tmp_path / "shared.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="share arrays"):
        open_pyskl(tmp_path / "shared.pkl")
    folder = write_pku(tmp_path / "pku", {"A01N02-L": full_clip(0, 4, 2, 25)}, {"A01N02-L": "1,0,4,1\n" * 5})
    with pytest.raises(InputError, match="5 labels for 4 frames"):
        collect(open_pku(folder, "pku2"))


# -- collecting


def test_order_and_result_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    names = [f"S001C001P{i:03d}R001A{1 + i % 60:03d}" for i in range(1, 61)]
    folder = write_ntu(tmp_path / "ntu", {name: full_clip(i, 2, 1, 25) for i, name in enumerate(names)})
    (folder / f"{names[5]}.skeleton").write_text("")
    one, three = (collect(open_ntu(folder, "ntu60"), workers=workers) for workers in (1, 3))
    assert one.clips.names == three.clips.names == tuple(n for n in names if n != names[5])
    assert one.skipped == three.skipped and [s.name for s in one.skipped] == [names[5]]
    assert one.clips.frames.equal(three.clips.frames)


def test_source_without_usable_recording_says_so(tmp_path: Path) -> None:
    folder = write_ntu(tmp_path / "ntu", {NTU_NAMES[0]: np.zeros((2, 1, 25, 3))})
    with pytest.raises(InputError, match=r"no usable recording, 1 skipped; the first skipped: S001.*no body"):
        collect(open_ntu(folder, "ntu60"))
    folder = write_ntu(tmp_path / "new", {"S018C001P041R001A005": full_clip(0, 2, 1, 25)})
    with pytest.raises(InputError, match="0 skipped; 1 files do not belong to ntu60"):
        collect(open_ntu(folder, "ntu60"))
