"""Hostile files: attacks on time, memory and code one by one, properties of every reader, a short fuzz.

`python -m tests.fuzz` is the same fuzzer with as many inputs as wanted; `bench/results/fuzz.json` is its
record.
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from a2mc_fast.config import Config, demo, to_dict
from a2mc_fast.data import Clips
from a2mc_fast.data.agcn import open_agcn
from a2mc_fast.data.ctrgcn import open_ctrgcn
from a2mc_fast.data.npy import Archive, map_npy
from a2mc_fast.data.npz import open_npz
from a2mc_fast.data.ntu import open_ntu, parse_skeleton
from a2mc_fast.data.pack import Collected, collect
from a2mc_fast.data.pku import open_pku, parse_frames
from a2mc_fast.data.pyskl import open_pyskl
from a2mc_fast.data.rules import MAX_PROTOCOLS, UnusableError
from a2mc_fast.data.source import Recording, Source
from a2mc_fast.data.unpickle import as_array, load_pickle
from a2mc_fast.errors import InputError, one_line
from a2mc_fast.evaluation.tables import read_results
from a2mc_fast.files import read_json, typed
from a2mc_fast.prepare import main
from a2mc_fast.ranks.joining import join
from tests import fuzz, slow_readers
from tests.conftest import SMALL
from tests.test_normalize import full_clip
from tests.test_readers import (
    NTU_NAMES,
    agcn_folders,
    npy_claiming,
    own_archive,
    pyskl_content,
    skeleton_text,
    write_ntu,
    write_pku,
)

SECONDS = 30.0  # an attack that works takes minutes, one that fails some hundredths of a second
settings.register_profile(
    "bounded", derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("bounded")


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Fail beyond thirty seconds of computing, or beyond 64 MiB + 64 bytes per byte of a file of `size`
    bytes."""
    tracemalloc.start()
    try:
        with fuzz.timed(SECONDS, 10 * SECONDS):
            yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= (64 << 20) + 64 * size, f"{peak:,} bytes for a file of {size:,}"


# -- the fuzzer, and that it notices


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damaged_files_do_no_harm(reader: str) -> None:
    count = 25 if reader == "flags" else 100  # each of which trains
    summary = fuzz.fuzz(reader, count, seed=1)
    assert not summary.breaches
    assert summary.count == summary.accepted + summary.skipped + summary.refused == count
    assert summary.accepted >= 3 and summary.skipped + summary.refused >= 0.25 * count


def _hang(path: Path) -> None:
    while True:
        time.sleep(0.01)


def _busy(path: Path) -> None:
    while True:
        path.name.upper()


def _greedy(path: Path) -> None:
    bytearray(400 << 20)[::4096] = bytes(range(256)) * 400


def _talkative(path: Path) -> None:
    raise ValueError("two\nlines")


def _boundless(path: Path) -> None:
    try:
        np.ones(1 << 43)
    except MemoryError as error:
        raise InputError(f"damaged ({error})") from None


@pytest.mark.parametrize(
    ("read", "breach"),
    [
        (_hang, "Hang at"),
        (_busy, "Hang at"),
        (_greedy, "memory beyond its bound"),
        (_talkative, "ValueError at test_hostile"),
        (_boundless, "memory asked for and not given"),
        (lambda path: subprocess.run(["true"]), "forbidden: subprocess.Popen"),
        (lambda path: pickle.loads(b"cos\nsystem\n."), "forbidden: pickle.find_class"),
        (lambda path: Path("/tmp/a2mc-fuzz-outside").write_bytes(b""), "forbidden: open"),
        (lambda path: Clips.load(path.with_name("nan")), "accepted, but AssertionError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_fuzzer_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any], breach: str
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "PATIENCE", 1.0 if read is _hang else fuzz.PATIENCE)
    gc.collect()  # what earlier tests left would hide growth if it went while a file is read
    clips = Clips.pack(np.ones((3, 1, 5, 3), np.float32), [3], [0], SMALL)
    clips.frames[0, 0, 0, 0] = np.nan
    monkeypatch.setattr(Clips, "load", lambda path: clips)
    summary = fuzz.Summary("stub", 0)
    with fuzz.limited(2 << 30):
        seen = fuzz._one(fuzz.Target(tmp_path / "x", fuzz.damage_bytes, read), b"x", tmp_path, summary)
    assert any(text.startswith(breach) for text in seen), seen
    Path("/tmp/a2mc-fuzz-outside").unlink(missing_ok=True)


@pytest.mark.parametrize("reader", ["skeleton", "pku-skeleton", "pku-label"])
def test_the_fuzzer_notices_values_that_are_not_the_text_s(
    monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    skeleton, actions = slow_readers.skeleton, slow_readers.actions
    monkeypatch.setattr(slow_readers, "skeleton", lambda text: np.roll(skeleton(text), 1, 2))
    monkeypatch.setattr(
        slow_readers,
        "actions",
        lambda *texts: {line: (label, x[1:], more) for line, (label, x, more) in actions(*texts).items()},
    )
    seen = fuzz.fuzz(reader, 10, seed=1).breaches
    assert seen and all("Arrays are not equal" in text for text in seen)


# -- attacks through pickles

MEGABYTE = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x00"
LAUGHS = (
    b"]q\x00" + b"](h\x00h\x00eq\x00" * 60
)  # a list of two times the same list of two times the same list
PICKLES: dict[str, tuple[bytes, str]] = {
    "a class named by nested lists": (LAUGHS + b"h\x00\x93.", "name is no text"),
    "an encoding of nested lists": (
        LAUGHS + b"c_codecs\nencode\nX\x01\x00\x00\x00ah\x00\x86R.", "another encoding",
    ),
    "one text as bytes a thousand times": (
        MEGABYTE + b"c_codecs\nencode\nq\x01]"
        + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86Ra" * 1000 + b".",
        "copies of one text",
    ),
    "one text as a thousand arrays": (
        MEGABYTE + b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85Rq\x01]"
        + b"cnumpy\nndarray\n)R(K\x01J\x00\x00\x10\x00\x85h\x01I00\nh\x00tba" * 1000 + b".",
        "copies of one text",
    ),
    "one scalar a thousand times": (
        b"cnumpy.core.multiarray\nscalar\nq\x02cnumpy\ndtype\nX\x07\x00\x00\x00S999999\x85Rq\x01B"
        + struct.pack("<I", 999_999) + b"x" * 999_999 + b"q\x00]" + b"h\x02h\x01h\x00\x86Ra" * 1000 + b".",
        "copies of one text",
    ),
    "a call with a million arguments": (
        b"(" + b"K\x01" * 500_000 + b"tq\x00" + b"cnumpy\nndarray\nh\x00R" * 3000 + b".",
        "too many arguments",
    ),
    "colliding memo": (
        b"]" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 30_000)) + b".", "never reached",
    ),
    "long keys": (
        b"}\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b"q\x00Ns" + b"h\x00Ns" * 30_000 + b".",
        "more than 32 bits",
    ),
    "deep lists": (b"]" * 20_000 + b"a" * 19_999 + b"}b.", "state for list"),
    "deep tuples": (b")" + b"\x85" * 30_000 + b"Q.", "BINPERSID"),
    "a torch storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(X\x07\x00\x00\x00storageQtR.",
        "asks for torch._utils._rebuild_tensor",
    ),
    "a pickle in a pickle": (
        b"cpickle\nloads\n" + pickle.dumps(b"N.", 3)[2:-1] + b"\x85R.", "asks for pickle.loads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_attack(tmp_path: Path, name: str) -> None:
    program, sentence = PICKLES[name]
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x03" + program)
    with bounded(len(program)), pytest.raises(InputError, match=sentence):
        load_pickle(path)


def test_endless_sharing_is_read_without_copies(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    lists: Any = []
    for _ in range(60):
        lists = [lists, lists]
    content = {**pyskl_content(), "more": lists}
    path.write_bytes(pickle.dumps(content))
    with bounded(path.stat().st_size):
        assert len(collect(open_pyskl(path)).clips) == 4


def _annotation(**changes: Any) -> dict[str, Any]:
    return {
        "frame_dir": "new",
        "label": 1,
        "keypoint": full_clip(0, 4, 1, 25).transpose(1, 0, 2, 3),
        **changes,
    }


def _shared_names() -> dict[str, Any]:
    names = [f"{number}" for number in range(20_000)]
    return {**pyskl_content(), "split": {f"{part}_train": names for part in range(100)}}


PYSKL: dict[str, tuple[Callable[[], Any], str]] = {
    "shared names": (_shared_names, "share lists"),
    "many splits": (
        lambda: {**pyskl_content(), "split": {f"{i}_train": [] for i in range(10_000)}}, "splits",
    ),
    "names and one long": (
        lambda: {**pyskl_content(), "split": {"xsub_train": ["x" * 100_000] + ["a"] * 100_000}}, "",
    ),
    "a matrix of names": (
        lambda: {**pyskl_content(), "split": {"xsub_train": np.array([["a"]])}}, "xsub_train is not a list",
    ),
    "a point for names": (
        lambda: {**pyskl_content(), "split": {"xsub_train": np.array("a")}}, "xsub_train is not a list",
    ),
    "an endless array of nothing": (
        lambda: {**pyskl_content(), "split": {"xsub_train": np.zeros((1 << 40, 0), "U1")}},
        "damaged|not a list",
    ),
    "unprintable protocol": (
        lambda: {**pyskl_content(), "split": {"\ud800\x1b_train": []}}, "cannot be a name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PYSKL)
def test_pyskl_attack(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pkl"
    make, sentence = PYSKL[name]
    path.write_bytes(pickle.dumps(make()))
    with bounded(path.stat().st_size):
        if sentence:
            with pytest.raises(InputError, match=sentence):
                collect(open_pyskl(path))
        else:
            assert len(collect(open_pyskl(path)).clips) == 4


def test_pyskl_clips_that_break_the_rule_are_skipped(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"keypoint": np.zeros((0, 1 << 40, 25, 3), np.float32)}, "no skeleton data"),
        ({"keypoint": np.zeros((2, 1 << 40, 0, 3), np.float32)}, "no skeleton data"),
        ({"label": 10**6000}, "label out of range"),
        ({"label": 65_536}, "label out of range"),
        ({"label": -2}, "label out of range"),
        ({"label": 10**18}, "label out of range"),
        ({"keypoint": np.full((1, 4, 25, 3), 1e308)}, "not finite"),
        ({"keypoint": np.full((1, 4, 25, 3), np.inf, np.float16)}, "not finite"),
        ({"frame_dir": ""}, "name not understood"),
        ({"frame_dir": "a\x1b[31mb"}, "name not understood"),
        ({"frame_dir": "\ud800"}, "name not understood"),
        ({"frame_dir": "x" * 100_000}, "name not understood"),
    ]
    content = pyskl_content()
    for number, (changes, _) in enumerate(bad):
        content["annotations"].append(_annotation(**{"frame_dir": f"new {number:02d}", **changes}))
    digits = "A01N" + "2" * 40 + "-L_0"  # once read as the number of a performer
    content["annotations"] += [_annotation(frame_dir=digits), _annotation(frame_dir=digits)]
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    with bounded(path.stat().st_size):
        made = collect(open_pyskl(path))
    assert made.clips.names == (digits, *NTU_NAMES)
    assert sorted(skip.reason for skip in made.skipped) == sorted([r for _, r in bad] + ["listed twice"])
    assert all(skip.name.isprintable() and len(skip.name) <= 255 for skip in made.skipped)


# -- attacks through archives and arrays


def archive(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def own_members(**changes: Any) -> dict[str, bytes]:
    made = {**own_archive(), **changes}
    return {k: v if isinstance(v, bytes) else npy(v) for k, v in made.items()}


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archive_packed_without_bound(tmp_path: Path, method: int) -> None:
    path = archive(tmp_path / "x.npz", method, **own_members(class_names=npy(np.zeros(50_000_000, "u1"))))
    small = path.read_bytes().replace(struct.pack("<I", 50_000_128), struct.pack("<I", 200))
    path.write_bytes(small)  # and it claims to be small
    with bounded(len(small)), pytest.raises(InputError, match="a method that numpy does not write"):
        open_npz(path)


HOSTILE_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "too many joints": (
        {"parents": np.zeros(200_000, "i4"), "mirror": np.arange(200_000, dtype="i4")},
        "1 to 1,000 joints",
    ),
    "a terabyte of names": ({"names": npy_claiming((1 << 38,))}, "claims"),
    "letters that are none": ({"names": np.full(3, 0xFFFFFFFF, "u4").view("U1")}, "no characters"),
    "64-bit labels": ({"labels": np.full(3, 2**64 - 1, "u8")}, "no usable recording"),
    "64-bit subjects": ({"subjects": np.full(3, 2**64 - 1, "u8")}, "subjects holds a number of 64 bits"),
    "64-bit names": ({"names": np.full(3, 2**64 - 1, "u8")}, "names is uint64"),
    "64-bit lengths": ({"lengths": np.array([2**64 - 1, 1, 15], "u8")}, "lengths sum"),
    "lengths that overflow": ({"lengths": np.array([2**62] * 3)}, "lengths sum"),
    "no clips": (
        {"lengths": np.zeros(0, int), "labels": np.zeros(0, int), "joints": np.zeros((0, 1, 5, 3))},
        "entries",
    ),
    "a million empty clips": (
        {"lengths": np.zeros(10**6, "i1"), "labels": np.zeros(10**6, "i1"), "joints": np.zeros((0, 1, 5, 3))},
        "would unpack",
    ),
    "a hundred thousand empty clips": (
        {"lengths": np.zeros(10**5, "i1"), "labels": np.zeros(10**5, "i1"), "joints": np.zeros((0, 1, 5, 3))},
        "frames in all",
    ),
    "more names than clips": ({"names": np.full(200_000, "\u0101")}, "names has 200,000 entries"),
    "more names than joints": (
        {"joint_names": np.full(200_000, "\u0101")}, "joint_names has 200,000 entries",
    ),
    "objects": ({"labels": np.array([None, "x", 3])}, "object"),
    "text for joints": ({"joints": np.full((15, 1, 5, 3), "nan")}, "expected floats"),
    "a structure": ({"joints": np.zeros(15, "f4,i4")}, "holds"),
    "unprintable protocol": ({"split_\x1b": np.ones(3, bool)}, "cannot be a name"),
    "too many protocols": ({f"split_{i}": np.ones(3, bool) for i in range(MAX_PROTOCOLS)}, "protocols"),
    "too many arrays": ({f"x{i}": b"" for i in range(1001)}, "refused"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_own_archive_attack(tmp_path: Path, name: str) -> None:
    changes, sentence = HOSTILE_ARRAYS[name]
    path = archive(tmp_path / "x.npz", **own_members(**changes))
    # members may unpack to 100 times the file and 1 MiB
    with bounded(path.stat().st_size), pytest.raises(InputError, match=sentence):
        collect(open_npz(path))


def test_axes_whose_product_python_would_not_print(tmp_path: Path) -> None:
    header = (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 4000 + b"," + b"9" * 4000 + b")}\n"
    )
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with bounded(len(header)), pytest.raises(InputError, match="a shape that no array has"):
        map_npy(path)
    path.write_bytes(npy_claiming((1 << 38, 1)))
    with bounded(200), pytest.raises(InputError, match="claims"):
        map_npy(path)


def test_names_given_twice_in_an_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", **own_members())
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning):
        file.writestr("joints.npy", npy(np.zeros(3)))
    with pytest.raises(InputError, match="arrays under"):
        open_npz(path)


def test_member_paths_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.npz"
    archive(
        path,
        **own_members(),
        **{"../evil": b"x", "/tmp/a2mc-evil": b"x", "split_../evil": npy(np.ones(3, bool))},
    )
    made = collect(open_npz(path))
    assert "../evil" in made.clips.splits  # a protocol may be called so; it is no path
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.npz"]
    assert not Path("/tmp/a2mc-evil.npy").exists()


def test_flags_that_are_neither_true_nor_false(tmp_path: Path) -> None:
    """torch takes a byte of 255 for true and so, depending on the operation, its negation."""
    odd = npy(np.array([1, 255, 0], np.uint8).view(bool))
    made = collect(
        open_npz(archive(tmp_path / "x.npz", **own_members(split_xsub=odd, split_odd=npy(np.ones(3, bool)))))
    )
    assert [part.tolist() for part in made.clips.split("xsub")] == [[0, 1], [2]]
    flags = Archive(tmp_path / "x.npz").array("split_xsub", "b", ndim=1)
    assert flags.view(np.uint8).tolist() == [1, 1, 0]
    made.clips.save(tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    start, end = json.loads(whole[8 : 8 + header])["split_xsub"]["data_offsets"]
    place = 8 + header + start
    (tmp_path / "x.safetensors").write_bytes(whole[:place] + b"\xff\x02\x00" + whole[place + end - start :])
    again = Clips.load(tmp_path / "x.safetensors")
    assert again.splits["xsub"].view(torch.uint8).tolist() == [1, 1, 0]


def agcn(tmp_path: Path) -> Path:
    return agcn_folders(tmp_path)[0] / "xsub"


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("train_data_joint.npy", np.full((2, 3, 4, 25, 2), "a"), "expected floats"),
        ("train_data_joint.npy", np.zeros((2, 3, 1 << 40, 25, 0), "f4"), "expected floats"),
        ("train_data_joint.npy", np.zeros((2, 3, 4, 25, 2), "c8"), "holds complex64"),
        ("train_label.pkl", (["a", "b"], [10**30, 0.5]), "not a whole number"),
        ("train_label.pkl", (["a", "b"], [math.inf, math.nan]), "not a whole number"),
        ("train_label.pkl", (["a" * 200_000, *["b"] * 200_000], [1]), "200,001 names, 1 labels"),
        ("train_label.pkl", (np.array(["a", "b"]), np.zeros((1 << 40, 0))), "damaged|not a pair"),
        ("train_label.pkl", (["a", 1], [1, 2]), "not all are strings"),
        ("train_num_frame.npy", np.zeros((1 << 40, 0), int), "expected 2 integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_agcn_attack(tmp_path: Path, file: str, content: Any, sentence: str) -> None:
    path = agcn(tmp_path) / file
    path.write_bytes(npy(content) if isinstance(content, np.ndarray) else pickle.dumps(content))
    with bounded(path.stat().st_size), pytest.raises(InputError, match=sentence):
        collect(open_agcn(path.parent))


def test_agcn_labels_out_of_range_are_skipped(tmp_path: Path) -> None:
    folder = agcn(tmp_path)
    (folder / "train_label.pkl").write_bytes(pickle.dumps((["a", "b"], [10**400, 1e300])))
    np.save(folder / "val_num_frame.npy", np.array([-1, 2**62]))
    made = collect(open_agcn(folder))
    assert len(made.clips) == 1
    assert sorted(s.reason for s in made.skipped) == ["label out of range"] * 2 + ["no frames"]


def test_an_array_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    folder = agcn(tmp_path)
    first = collect(open_agcn(folder)).clips.frames
    np.save(folder / "train_data_joint.npy", np.ones((2, 3, 30, 25, 2), np.float32))
    assert not torch.equal(collect(open_agcn(folder)).clips.frames, first)


@pytest.mark.parametrize("joints", [np.full((2, 4, 150), "a"), np.zeros((2, 0, 150))], ids=["text", "empty"])
def test_ctrgcn_of_text_or_nothing(tmp_path: Path, joints: np.ndarray) -> None:
    hot = np.eye(2)
    np.savez(
        tmp_path / "NTU60_CS.npz",
        x_train=joints,
        y_train=hot,
        x_test=np.ones((2, 4, 150)),
        y_test=hot,
    )
    with pytest.raises(InputError, match="expected floats"):
        open_ctrgcn(tmp_path / "NTU60_CS.npz")


# -- attacks through text


def test_frames_without_bodies_take_no_memory(tmp_path: Path) -> None:
    folder = write_ntu(
        tmp_path / "ntu", {NTU_NAMES[0]: full_clip(0, 1, 4, 25), NTU_NAMES[1]: full_clip(0, 1, 4, 25)}
    )
    text = (folder / f"{NTU_NAMES[1]}.skeleton").read_text()
    (folder / f"{NTU_NAMES[1]}.skeleton").write_text(text.replace("1", "300001", 1) + "0\n" * 300_000)
    with bounded(700_000):
        made = collect(open_ntu(folder, "ntu60"))
    assert made.clips.names == (NTU_NAMES[0],) and "more than 20,000 frames" in made.skipped[0].detail


def test_labels_that_all_name_the_whole_video(tmp_path: Path) -> None:
    folder = write_pku(
        tmp_path / "pku", {"A01N02-L": full_clip(0, 1, 2, 25)}, {"A01N02-L": "1,0,4000,1\n" * 4000}
    )
    (folder / "skeleton" / "A01N02-L.txt").write_text((" ".join(map(str, range(150))) + "\n") * 4000)
    with bounded(2_000_000):
        made = collect(open_pku(folder, "pku2"))
    assert len(made.clips) == 8 and len(made.skipped) == 3992
    assert "8 times the 4,000 frames" in made.skipped[0].detail


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling"])
def test_what_is_no_file_is_skipped_at_once(tmp_path: Path, kind: str) -> None:
    folder = write_ntu(tmp_path / "ntu", {NTU_NAMES[0]: full_clip(0, 2, 1, 25)})
    pku = write_pku(
        tmp_path / "pku",
        {"A01N02-L": full_clip(0, 4, 2, 25)},
        dict.fromkeys(["A01N02-L", "A01N03-L"], "1,0,4,1\n"),
    )
    places = [folder / f"{NTU_NAMES[1]}.skeleton", pku / "skeleton" / "A01N03-L.txt"]
    for place in places:
        match kind:
            case "pipe":
                os.mkfifo(place)
            case "device":
                place.symlink_to("/dev/zero")
            case "folder":
                place.mkdir()
            case _:
                place.symlink_to("nowhere")
    for source in (open_ntu(folder, "ntu60"), open_pku(pku, "pku2")):
        with bounded(0):
            made = collect(source)
        assert len(made.clips) == 1 and [s.reason for s in made.skipped] == ["unreadable"]


# -- attacks through packed clips and JSON


RESULT = {
    "format": "a2mc-evaluation/1",
    "run": "r",
    **dict.fromkeys(("protocol", "data", "split", "stream", "encoder"), "x"),
}


def packed_tensors(**changes: Any) -> dict[str, torch.Tensor]:
    made = {
        "joints": torch.ones(15, 1, 5, 3),
        "lengths": torch.tensor([4, 6, 5]),
        "labels": torch.tensor([0, 1, -1]),
        "parents": torch.tensor(SMALL.parents),
        "mirror": torch.tensor(SMALL.mirror),
        "center": torch.tensor(1),
        "axis_z": torch.tensor([0, 1]),
        "axis_x": torch.tensor([3, 4]),
        "split_xsub": torch.ones(3, dtype=torch.bool),
    }
    return {**made, **changes}


@pytest.mark.parametrize(
    ("changes", "header", "sentence"),
    [
        ({"parents": torch.zeros(1 << 40, 0, dtype=torch.long)}, {}, "parents must be integers"),
        ({"parents": torch.zeros(100_000, dtype=torch.long)}, {}, "1 to 1,000 joints"),
        ({"center": torch.tensor([1, 2])}, {}, "center one"),
        ({"axis_x": torch.tensor([1])}, {}, "two joints each"),
        ({"lengths": torch.tensor([2**62, 2**62, 15 - 2**63])}, {}, "clip 2 has no frames"),
        ({"lengths": torch.tensor([2**63 - 1, 2**63 - 1, 17])}, {}, "lengths sum"),
        ({"lengths": torch.tensor([4.5, 5.5, 5.0])}, {}, "lengths must be integers"),
        ({"lengths": torch.tensor([4, 6, 5], dtype=torch.bfloat16)}, {}, "lengths must be integers"),
        ({"lengths": torch.tensor([[4, 6, 5]])}, {}, "lengths must be integers"),
        ({"labels": torch.tensor([0, 1, 10**18])}, {}, "beyond 65,535"),
        ({"labels": torch.tensor([0, 1, 2**64 - 1], dtype=torch.uint64)}, {}, "64 bits"),
        ({"joints": torch.ones(15, 1, 5, 3, dtype=torch.float16)}, {}, "float32"),
        ({"subjects": torch.tensor([1.0, 2, 3])}, {}, "subjects must be integers"),
        ({f"split_{i}": torch.ones(3, dtype=torch.bool) for i in range(65)}, {}, "protocols"),
        ({}, {"names": "[" * 100_000}, "names is not JSON"),
        ({}, {"names": "9" * 5000}, "names is not JSON"),
        ({}, {"names": "[1, 2, 3]"}, r"names\[0\] must be str, got 1"),
        ({}, {"names": '"abc"'}, "names must be a list"),
        ({}, {"names": '{"a": 1, "b": 2, "c": 3}'}, "names must be a list"),
        ({}, {"names": '["a", "b", "a"]'}, "two clips are called a"),
        ({}, {"names": '["a", "b", "\\u001b[31m"]'}, "cannot be a name"),
        ({}, {"names": '["a", "b", "\\ud800"]'}, "cannot be a name"),
        ({}, {"joint_names": "[[]]"}, r"joint_names\[0\] must be str, got \[\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_packed_clips_attack(
    tmp_path: Path, changes: dict[str, Any], header: dict[str, str], sentence: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(packed_tensors(), path, {"format": "a2mc-clips/1"})
    assert len(Clips.load(path)) == 3
    save_file(packed_tensors(**changes), path, {"format": "a2mc-clips/1", **header})
    with bounded(path.stat().st_size), pytest.raises(InputError, match=sentence):
        Clips.load(path)


@pytest.mark.parametrize(
    "text",
    ["", "[", "[" * 100_000, "9" * 5000, '{"a": ' * 50_000, "\ufeff{}",
     '{"bank": {"lr": 1' + "0" * 400 + "}}", '{"bank": {"lr": NaN}}', '{"views": {"noise_std": Infinity}}',
     '{"optim": {"lr": -1e999}}', '{"seed": 1e3}',
     '{"views": []}', '{"loss": {"mix": {"0": 1}}}', '{"loss": {"mix": [[]]}}', '{"stream": []}', "null",
     '{"seed": true}', '{"\\ud800": 1}', '{"data": null}'],
)  # fmt: skip
def test_hostile_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with bounded(len(text)), pytest.raises(InputError):
        typed(read_json(tmp_path / "config.json"), Config, "config")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stream": None}, "stream must be str, got None"),
        ({"top1": float("inf")}, "is not JSON: the number Infinity is not finite"),
        ({"top1": 10**400}, "top1 must be a finite number"),
        ({"top1": 100.5}, r"top1 must be in \[0, 100\], got 100.5"),
        ({"top1": "50"}, "top1 must be float, got '50'"),
        ({"fractions": [{"top1_last": 5.0}]}, r"fractions\[0\] has no fraction"),
        ({"fractions": 3}, "fractions must be a list"),
        ({"untrained": {"fractions": [{"fraction": 0.5}] * 2}}, "other shares of labels"),
        ({"untrained": []}, "untrained must be an object"),
        ({"confusion": [["1"]]}, r"confusion\[0\]\[0\] must be int, got '1'"),
        ({"class_names": [None]}, r"class_names\[0\] must be str"),
        ({"config": []}, "config must be an object"),
    ],
    ids=str,
)  # fmt: skip
def test_hostile_result(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RESULT))
    assert [result["run"] for result in read_results(tmp_path)] == ["r"]
    path.write_text(json.dumps({**RESULT, **changes}))
    with bounded(path.stat().st_size), pytest.raises(InputError, match=sentence):
        list(read_results(path))


def test_what_is_no_file_is_no_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with bounded(0), pytest.raises(InputError, match="is not a file"):
            read_json(path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with bounded(1 << 20), pytest.raises(InputError, match="has more than 32 MiB"):
        read_json(tmp_path / "large")


def test_paths_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/in\xff\x1b")
    Path(folder).mkdir()
    np.savez(f"{folder}/own.npz", **own_archive())
    out = tmp_path / "out.safetensors"
    main(["npz", f"{folder}/own.npz", str(out)])
    assert "clips     3" in capsys.readouterr().out
    command = Clips.load(out).command
    assert command.isprintable() and "in\\udcff\\x1b/own.npz" in command
    assert json.loads(out.with_suffix(".report.json").read_text())["clips"] == 3
    command = ["prepare", "npz", f"{folder}/own.npz", f"{folder}/out.safetensors"]
    told = ascii_terminal(*command)
    assert b"in\\udcff\\x1b/out.safetensors" in told
    assert len(Clips.load(f"{folder}/out.safetensors")) == 3


def ascii_terminal(*command: str) -> bytes:
    """What a command prints where nothing but ASCII can be shown."""
    done = subprocess.run(
        [sys.executable, "-m", f"a2mc_fast.{command[0]}", *command[1:]],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr and (done.stdout + done.stderr).isascii()
    return done.stdout


def test_names_that_a_terminal_lacks(tmp_path: Path) -> None:
    shares = [{"fraction": 0.5, "top1_last": 50.0, "top1_last_std": 1.0}]
    result = {**RESULT, "run": "r\xfcn\x1b[2J\x07", "data": "\udcff", "fractions": shares}
    (tmp_path / "r.json").write_text(json.dumps(result))
    told = ascii_terminal("evaluate", "compare", str(tmp_path / "r.json"), "--out", str(tmp_path / "t.csv"))
    assert "\x1b" not in (tmp_path / "t.csv").read_text()
    assert b"r\\xfcn\\x1b[2J\\x07" in told and b"50.00 \\xb1 1.00" in told and b"\\udcff" in told


def test_an_environment_that_torchrun_would_not_make(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "x")
        with pytest.raises(InputError, match=f"{name}=x: expected a number"), join(demo(), torch.device):
            pass
        monkeypatch.delenv(name)


# -- properties

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(-(2**31), 2**31), inner, max_size=4)
    ),
    max_leaves=20,
)
arrays = hnp.arrays(
    st.sampled_from(["<f2", "<f4", ">f4", "<f8", "<i8", "|u1", "|b1", "<U3"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@given(plain, st.integers(0, 5))
def test_any_plain_pickle_comes_back(
    tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(path) == value


@given(arrays, st.integers(0, 5))
def test_any_array_comes_back(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, protocol: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.pkl").write_bytes(pickle.dumps([array], protocol))
    np.save(folder / "a.npy", array)
    np.savez(folder / "a.npz", x=array)
    from_pickle = as_array(load_pickle(folder / "a.pkl")[0])
    mapped = map_npy(folder / "a.npy")
    with Archive(folder / "a.npz").rows("x") as rows:
        unpacked = rows.all()
    for back in (from_pickle, mapped, unpacked):
        assert back.shape == array.shape and back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


@given(
    st.lists(st.sampled_from(fuzz.OPCODES + fuzz.TOKENS), max_size=40).map(b"".join) | st.binary(max_size=300)
)
@example(b"")
def test_any_program_is_refused_or_plain(tmp_path_factory: pytest.TempPathFactory, program: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(b"\x80\x02" + program)
    watch = fuzz.guard()
    watch.seen.clear()
    watch.folder = str(path.parent)
    try:
        load_pickle(path)
    except InputError:
        pass
    finally:
        watch.folder = None
    assert not watch.seen


lines = st.lists(
    st.sampled_from(["0", "1", "2", "25", "-1", "1e308", "nan", "", "1 2 3", "x", "9" * 30, "1 2 inf 4"]),
    max_size=60,
)


@given(lines)
def test_any_text_is_bodies_or_unusable(text: list[str]) -> None:
    try:
        bodies = parse_skeleton("\n".join(text).encode())
        assert bodies.shape[2:] == (25, 3) and 1 <= bodies.shape[1] <= 4
    except UnusableError as error:
        assert error.reason in ("unreadable", "no frames", "no body", "wrong joint count")
    try:
        assert parse_frames("\n".join(text).encode()).shape[1:] == (2, 25, 3)
    except UnusableError as error:
        assert error.reason in ("unreadable", "no frames", "wrong joint count")


poses = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.just(25), st.just(3)),
    elements=st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3),
    fill=st.just(1.0),
)


@given(poses)
def test_any_recording_comes_back(joints: np.ndarray) -> None:
    np.testing.assert_allclose(parse_skeleton(skeleton_text(joints).encode()), joints[:, :4], rtol=1e-6)


shapes = st.lists(st.integers(0, 2**70) | st.integers(0, 4), max_size=40).map(tuple)


@pytest.mark.filterwarnings("error")
@given(shapes, st.sampled_from(["<f4", "|b1", "<U0", "|S0", "<U7", "|O", "f4,f4"]), st.integers(0, 100))
def test_an_array_is_never_larger_than_its_file(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: str, held: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "claim.npy"
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(held))
    try:
        array = map_npy(path)
    except InputError:
        return
    assert array.shape == shape and array.nbytes == held


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
leaves = [
    (room, name) for room, fields in to_dict(Config()).items() if isinstance(fields, dict) for name in fields
]


@settings(max_examples=200)
@given(st.sampled_from(leaves), json_values | st.sampled_from(fuzz.SCALARS))
def test_any_configuration_is_refused_or_comes_back(place: tuple[str, str], value: Any) -> None:
    content = to_dict(Config())
    content[place[0]][place[1]] = value
    try:
        config = typed(content, Config, "config")
    except InputError:
        return
    assert typed(json.loads(json.dumps(to_dict(config), allow_nan=False)), Config, "config") == config


recordings = st.builds(
    lambda name, label, shape, value: Recording(
        name=name, label=label, joints=np.full(shape, value, np.float32)
    ),
    st.sampled_from(["a", "b", "", "x" * 255, "x" * 256, "\x00", "é", "\ud800"]),
    st.sampled_from([-2, -1, 0, 1, 2, 65_535, 65_536, 10**30]),
    st.sampled_from([(1, 1, 5, 3), (4, 1, 5, 3), (0, 1, 5, 3), (2, 1, 4, 3)]),
    st.sampled_from([1.0, -1.0, 0.0, 1e3, 1001.0, np.nan, np.inf]),
)


@settings(max_examples=300)
@given(recordings, st.sampled_from([(), ("sit", "stand")]))
def test_what_prepare_skips_loading_refuses(recording: Recording, class_names: tuple[str, ...]) -> None:
    """One rule for both."""
    source = Source(
        name="test",
        jobs=[recording],
        total=1,
        read=lambda job: [job],
        protocols=("p",),
        persons=1,
        skeleton=SMALL,
        normalized=True,
        class_names=class_names,
    )

    def accepted(make: Callable[[], Clips | Collected]) -> bool:
        try:
            make()
        except (InputError, OverflowError):  # a label of 10^30 is no array of integers at all
            return False
        return True

    joints, label = recording.joints, recording.label
    alone = accepted(
        lambda: Clips.pack(
            joints, [len(joints)], [label], SMALL, names=[recording.name], class_names=class_names
        )
    )
    assert accepted(lambda: collect(source)) == alone


def test_names_that_come_twice(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **own_archive(names=np.array(["a", "b", "a"])))
    made = collect(open_npz(tmp_path / "x.npz"))
    assert made.clips.names == ("a", "b") and made.clips.lengths.tolist() == [4, 6]
    assert [(s.name, s.reason) for s in made.skipped] == [("a", "listed twice")]
    with pytest.raises(InputError, match="two clips are called a"):
        Clips.pack(np.ones((2, 1, 5, 3), np.float32), [1, 1], [0, 0], SMALL, names=["a", "a"])


def test_names_that_are_none_are_skipped(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **own_archive(names=np.array(["a", "", "c\x1b"])))
    made = collect(open_npz(tmp_path / "x.npz"))
    assert made.clips.names == ("a",)
    assert [(s.name, s.reason) for s in made.skipped] == [
        ("", "name not understood"),
        ("c\\x1b", "name not understood"),
    ]


@given(st.text(max_size=2000) | st.text(alphabet="\x00\ud800\u202e\n", max_size=600))
def test_messages_are_one_printable_line(text: str) -> None:
    message = str(InputError(text))
    assert len(message) <= fuzz.MESSAGE and message.isprintable()
    assert message == one_line(message)
    assert message == text or len(text) > 500 or not text.isprintable()
