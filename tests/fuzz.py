"""A bounded, seeded fuzzer for everything that is read from files.

`python -m tests.fuzz --reader pyskl --count 20000 --seed 0` damages small good files, some byte by byte, some
within their structure (a zip's members, a pickle's objects, a header's JSON), and gives each to its reader.
What must hold for every input: the reader returns valid data or raises `InputError` or `OSError` with one
printable line; it takes bounded time and memory; it runs nothing and writes nothing outside its folder. Each
breach is kept as a file and counted. `--reader all` runs every reader in a process of its own; `--out` adds
the summaries to a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import numpy as np
import safetensors.torch
import torch

from a2mc_fast.config import Config, demo, to_dict
from a2mc_fast.data import Clips
from a2mc_fast.data.agcn import open_agcn
from a2mc_fast.data.ctrgcn import open_ctrgcn
from a2mc_fast.data.npz import open_npz
from a2mc_fast.data.ntu import open_ntu, parse_skeleton
from a2mc_fast.data.openpose import open_openpose
from a2mc_fast.data.pack import Collected, collect
from a2mc_fast.data.pku import BEYOND, open_pku
from a2mc_fast.data.pyskl import open_pyskl
from a2mc_fast.data.rules import UnusableError
from a2mc_fast.data.source import Recording, Source
from a2mc_fast.data.table import open_table
from a2mc_fast.errors import InputError
from a2mc_fast.evaluation.comparison import compare
from a2mc_fast.evaluation.inference import ClipClassifier, prepared
from a2mc_fast.evaluation.prediction import recordings
from a2mc_fast.evaluation.scores import About, Scores, details, weighted_sum
from a2mc_fast.evaluation.tables import FORMAT
from a2mc_fast.files import read_json, typed, write_json
from a2mc_fast.model import A2MC
from a2mc_fast.plots.confusion import read_confusion
from a2mc_fast.plots.study import read_study
from a2mc_fast.run import checkpoint, weights
from a2mc_fast.run.log import RunLog
from a2mc_fast.run.metrics import read_metrics
from a2mc_fast.run.parts import Parts
from a2mc_fast.trainer import Trainer
from tests import slow_readers
from tests.test_normalize import full_clip
from tests.test_readers import (
    NTU_NAMES,
    own_archive,
    pyskl_content,
    write_agcn,
    write_ntu,
    write_pku,
    write_split,
)

SECONDS = 5.0  # of computing, per input of some kilobytes; the slowest take some hundredths
PATIENCE = 60.0  # seconds by the clock, of a machine that may have other things to do
SLACK, FACTOR = 48 << 20, 64  # bytes of memory that an input may add: SLACK + FACTOR times its size
MESSAGE = 600  # characters
Data = bytes
Mutator = Callable[[random.Random, Data], Data]

# -- damage to bytes

NUMBERS = (
    b"0", b"-0", b"-1", b"1", b"2", b"3", b"24", b"25", b"26", b"255", b"300", b"65536", b"2147483648",
    b"4294967296", b"1000000000000", b"1000000000000000000", b"9223372036854775807", b"-9223372036854775808",
    b"18446744073709551616", b"nan", b"inf", b"-inf", b"1e308", b"-1e308", b"1e999", b"1e-320", b"0.5",
    b"1_0", b"0x1f", b"1j", b"", b"True", b"None", b"null", b"9" * 400, b"9" * 5000, "\u0663".encode(),
)  # fmt: skip
TOKENS = (
    b"\x00", b"\xff", b"\xff\xfe", b"\r", b"\n", b"\n\n\n\n", b" ", b",", b"\t", b'"', b"'", b"\\",
    b"{", b"}", b"[", b"]", b"(", b")", b"[" * 3000, b"(" * 500, b"{" * 3000, b"-" * 9000,
    b"../../../../tmp/x",
    b"/etc/passwd", b"|O", b"<f4", b"<f8", b">f2", b"<U9", b"<M8", b"|S0", b"<U0", b"|V8", b"NaN",
    b"Infinity", b"-Infinity",
    b"\xed\xa0\x80", b"\\ud800", b"\x1b[31m", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY",
)  # fmt: skip
OPCODES = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cposix\nsystem\n(Vtouch ran\ntR", b"cnumpy\nndarray\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"(", b")", b"]",
    b"}", b"0", b"1", b"2", b"e", b"a", b"s", b"u", b"t", b"l", b"d", b"R", b"b", b"o", b"\x81", b"\x92",
    b"\x93",
    b"\x94", b"h\x00", b"h\x01", b"h\x05", b"q\x00", b"Pid\n", b"Q", b"\x82\x01", b"N", b"\x88", b"\x85",
    b"\x86", b"\x87", b"I1\n", b"K\x05", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x00",
    b"\x8a\x10" + b"\x7f" * 16, b"Fnan\n", b"G" + struct.pack(">d", 1e308), b"X\x01\x00\x00\x00a",
    b"\x8c\x02ok", b"C\x01x",
    b"B\xff\xff\xff\x7f", b"\x8d" + struct.pack("<Q", 1 << 40), b"\x96" + struct.pack("<Q", 1 << 62),
    b"r\xff\xff\xff\x7f",
    b".", b"p99999999999999999999\n", b"g7\n", b"I" + b"7" * 5000 + b"\n",
    b"\x8b\x10\x27\x00\x00" + b"\x01" * 10_000,
)  # fmt: skip
NUMBER = re.compile(rb"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def set_integer(rng: random.Random, data: bytearray) -> None:
    size = rng.choice((2, 4, 8))
    place = rng.randrange(len(data))
    value = rng.choice((0, 1, 0xFF, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
    data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))


def set_float(rng: random.Random, data: bytearray) -> None:
    place, form = rng.randrange(len(data)), rng.choice("efd")
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 6e4, -0.0, 1e-7))
    packed = struct.pack(f"<{form}", 1e308 if form == "d" and rng.random() < 0.3 else value)
    data[place : place + len(packed)] = packed


def set_number(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
    if found := NUMBER.search(data, start):
        data[found.start() : found.end()] = rng.choice(NUMBERS)


def insert(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.choice(TOKENS + NUMBERS + OPCODES)


def delete(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data))
    del data[place : place + rng.choice((1, 2, 4, 30, len(data) // 3))]


def repeat(rng: random.Random, data: bytearray) -> None:
    place, size = rng.randrange(len(data)), rng.choice((1, 8, 100, 1000))
    data[place:place] = data[place : place + size] * rng.choice((1, 2, 20))


def move(rng: random.Random, data: bytearray) -> None:
    place, size = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64))
    part = data[place : place + size]
    del data[place : place + size]
    place = rng.randrange(len(data) + 1)
    data[place:place] = part


def swap_bytes(rng: random.Random, data: bytearray) -> None:
    place, size = rng.randrange(len(data)), rng.choice((2, 4, 8, 64))
    data[place : place + size] = data[place : place + size][::-1]


def drop_line(rng: random.Random, data: bytearray) -> None:
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    lines[number : number + 1] = rng.choice(([], [lines[number]] * 2, [bytearray()]))
    data[:] = b"\n".join(lines)


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def noise(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data))
    part = rng.randbytes(rng.choice((1, 16, 200)))
    data[place : place + len(part)] = part


DAMAGES = (
    flip, flip, set_byte, set_integer, set_float, set_number, set_number, set_number, insert, insert, delete,
    repeat, move, swap_bytes, drop_line, cut, noise,
)  # fmt: skip
LARGEST = 100_000  # bytes of an input; larger ones are cut


def damage_bytes(rng: random.Random, data: Data) -> Data:
    """One to six kinds of damage in a row."""
    if rng.random() < 0.005:
        return rng.choice((b"", b"\n", b"\x00" * 100, rng.randbytes(300), b"\n" * 3000, b"0\n" * 3000))
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if out:
            rng.choice(DAMAGES)(rng, out)
    return bytes(out[:LARGEST])


# -- damage to values

TEXTS = (
    "", "x", NTU_NAMES[0], "A01N02-L_0", "A" + "9" * 5000 + "N1-L_0", "A1N" + "9" * 20 + "-L_3", "../../x",
    "/etc/x", "\ud800", "a\nb", "\x1b[31m", "\x00", "é", "x" * 3000, "xsub_train", "\u202e", "none", "nan",
    "NaN",
)  # fmt: skip
SCALARS = (
    0, 1, -1, -2, 2, 3, 25, 59, 255, 65535, 65536, 2**31, 2**40, 10**18, 2**63 - 1, 2**63, -(2**63), 10**400,
    True, False, None, 0.0, -0.0, 0.5, 1.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
DTYPES = ("<f2", "<f4", ">f4", "<f8", "<i8", "<u8", "<i4", "|u1", "|b1", "<U3", "|S3", "<c8", ">i8", "<i2")


def odd_array(rng: random.Random) -> np.ndarray:
    """An array of some type and shape, often with values that are none."""
    shape = tuple(rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 15, 25, 150)) for _ in range(rng.randrange(6)))
    while np.prod(shape, dtype=float) > 20_000:
        shape = shape[:-1]
    dtype, size = np.dtype(rng.choice(DTYPES)), int(np.prod(shape))
    array = np.frombuffer(rng.randbytes(size * dtype.itemsize), dtype).reshape(shape)
    return np.asfortranarray(array) if rng.random() < 0.2 else array


def odd_value(rng: random.Random, arrays: bool) -> Any:
    """A value that is hardly what is expected."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(SCALARS)
    if kind < 0.7:
        return rng.choice(TEXTS)
    if kind < 0.85 and arrays:
        return odd_array(rng)
    if kind < 0.95:
        return [rng.choice(SCALARS + TEXTS) for _ in range(rng.choice((0, 1, 2, 3, 5, 500)))]
    if kind < 0.98:
        return {rng.choice(TEXTS): rng.choice(SCALARS)}
    deep: Any = []
    for _ in range(rng.choice((3, 60, 200))):
        deep = [deep]
    return deep


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested dicts and lists."""
    found: list[tuple[Any, Any]] = []
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            found += places(tree[key])
    return found


def damage_tree(rng: random.Random, tree: Any, arrays: bool) -> Any:
    """Change one to three values, keys or lengths of nested dicts and lists, in place."""
    root = [tree]
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = places(root)
        if len(found) > 1 and rng.random() < 0.99:
            del found[0]  # the root
        container, key = rng.choice(found)
        value, action = container[key], rng.random()
        if container is root:
            root[0] = odd_value(rng, arrays)
        elif action < 0.1:
            del container[key]
        elif action < 0.2 and isinstance(container, list):
            container += [value] * rng.choice((1, 2, 50))
        elif action < 0.3 and isinstance(container, dict):
            container[rng.choice((*TEXTS, *map(str, container)))] = container.pop(key)
        elif action < 0.5 and isinstance(value, np.ndarray) and value.size:
            container[key] = damaged_array(rng, value)
        else:
            container[key] = odd_value(rng, arrays)
    return root[0]


def damaged_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """The array with one value, its type, its shape or its order changed."""
    out = array.copy()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        match rng.randrange(8):
            case 4 | 5 | 6 | 7 if array.dtype.kind in "fiu":
                value = rng.choice((0, -1, 1, 1001, 1e9, np.nan, np.inf, -np.inf))
                with contextlib.suppress(ValueError, OverflowError):
                    out.flat[rng.randrange(out.size)] = value
            case 0 if array.dtype.kind in "fiub":
                out = out.astype(rng.choice(DTYPES[:9]))
            case 2:
                out = out.reshape(-1) if rng.random() < 0.5 else np.swapaxes(out, 0, -1) if out.ndim else out
            case 3 if out.ndim:
                out = out[: rng.randrange(len(out) + 1)]
            case _:
                out = np.concatenate([np.atleast_1d(out)] * 2)
    return np.asfortranarray(out) if rng.random() < 0.1 else out


# -- damage within a structure


def in_pickle(rng: random.Random, data: Data) -> Data:
    """The pickled content with odd values, in any protocol; sometimes damaged afterwards."""
    if rng.random() < 0.45:
        return damage_bytes(rng, data)
    content = pickle.loads(data)
    pair = isinstance(content, tuple)
    content = damage_tree(rng, list(content) if pair else content, arrays=True)
    out = pickle.dumps(tuple(content) if isinstance(content, list) else content, rng.randrange(6))
    return damage_bytes(rng, out) if rng.random() < 0.2 else out[:LARGEST]


def _arrays(data: Data) -> dict[str, Any]:
    with np.load(io.BytesIO(data)) as archive:
        return dict(archive)


def in_archive(rng: random.Random, data: Data) -> Data:
    """A `.npz` file with other arrays, damaged members, or damage to the archive itself."""
    if rng.random() < 0.3:
        return damage_bytes(rng, data)
    arrays = _arrays(data)
    if rng.random() < 0.4:  # of the right form, but with other values
        chosen = rng.choice([name for name, array in arrays.items() if array.dtype.kind in "fiu"])
        arrays[chosen] = damaged_array(rng, arrays[chosen])
    elif rng.random() < 0.6:
        damaged = damage_tree(rng, arrays, arrays=True)
        arrays = damaged if isinstance(damaged, dict) else {"joints": damaged}
    stream = io.BytesIO()
    hurt = rng.choice(list(arrays)) if arrays and rng.random() < 0.4 else None
    methods = [zipfile.ZIP_DEFLATED] * 9 + [zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(stream, "w", rng.choice(methods), compresslevel=1) as archive,
    ):
        warnings.simplefilter("ignore")  # a name given twice is intended
        for name, array in arrays.items():
            member = io.BytesIO()
            # RuntimeError: an array of objects with more dimensions than a pickle of it takes
            with contextlib.suppress(ValueError, OverflowError, RuntimeError):
                np.save(member, array)
            content = damage_bytes(rng, member.getvalue()) if name == hurt else member.getvalue()
            safe = name.encode("utf-8", "replace").decode().replace("\0", "?")
            for _ in range(2 if rng.random() < 0.002 else 1):
                archive.writestr(f"{safe}.npy", content)
    out = stream.getvalue()
    return damage_bytes(rng, out) if rng.random() < 0.1 else out[:LARGEST]


def _json(value: Any) -> Data:
    return json.dumps(value, default=str).encode()


def in_json(rng: random.Random, data: Data) -> Data:
    """JSON with odd values; sometimes damaged afterwards."""
    if rng.random() < 0.3 or not data.startswith((b"{", b"[")):
        return damage_bytes(rng, data)
    out = _json(damage_tree(rng, json.loads(data), arrays=False))
    return damage_bytes(rng, out) if rng.random() < 0.2 else out[:LARGEST]


def in_lines(rng: random.Random, data: Data) -> Data:
    """JSON lines, one of them with odd values, or damaged bytes."""
    lines = data.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    lines[number] = in_json(rng, lines[number][:-1]) + b"\n"
    return b"".join(lines)


def in_safetensors(rng: random.Random, data: Data) -> Data:
    """A safetensors file with another header, or other bytes."""
    size = int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8 : 8 + size]), data[8 + size :]
    # written in another order by each process, and one seed is to give the same inputs
    meta = header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    if rng.random() < 0.3:
        return damage_bytes(rng, _safetensors(header, content))
    choice = rng.random()
    if choice < 0.35:  # a value of the header that is JSON itself
        key = rng.choice(list(meta))
        meta[key] = in_json(rng, meta[key].encode()).decode("utf-8", "replace")
    elif choice < 0.8:
        header = damage_tree(rng, header, arrays=False)
    else:
        content = damage_bytes(rng, content)
    if rng.random() < 0.15 and isinstance(header, dict):  # a tensor seen as another type of the same width
        for info in header.values():
            if isinstance(info, dict) and rng.random() < 0.3 and "dtype" in info:
                wide = {"F32": ("I32", "U32"), "I64": ("F64", "U64"), "BOOL": ("U8", "I8", "F8_E4M3")}
                info["dtype"] = rng.choice(wide.get(str(info["dtype"]), ("F32",)))
    return _safetensors(header, content)[:LARGEST]


def _safetensors(header: Any, content: Data) -> Data:
    text = _json(header)
    return len(text).to_bytes(8, "little") + text + content


def in_checkpoint(rng: random.Random, data: Data) -> Data:
    """A checkpoint with another header or other bytes, most often with the checksum that belongs to them."""
    out = in_safetensors(rng, data)
    with contextlib.suppress(Exception):  # where it is no safetensors file there is no checksum to set right
        tensors = safetensors.torch.load(out)
        size = int.from_bytes(out[:8], "little")
        header = json.loads(out[8 : 8 + size])
        text = header["__metadata__"]
        if rng.random() < 0.9:
            text["checksum"] = checkpoint._checksum(text, tensors)
        out = _safetensors(header, out[8 + size :])
    return out


# -- flags

LARGEST_COUNT = 5  # of counts: what takes more time and memory than an input may is no fault
FLAGS = [
    (room, name, hint)
    for room, kind in typing.get_type_hints(Config).items()
    # how and where a run is computed is no matter of its steps, and DSTA-Net as published takes 60 MB
    if dataclasses.is_dataclass(kind) and room not in ("run", "synthetic")
    for name, hint in typing.get_type_hints(kind, include_extras=True).items()
    if name not in ("recurrence", "size")
]


def drawn(rng: random.Random, hint: Any) -> Any:
    """A value that a flag of this type may have."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return rng.choice(args)
    if typing.get_origin(hint) is tuple:
        return [drawn(rng, args[0]) for _ in range(rng.randrange(4))]
    if typing.get_origin(hint) is not Annotated:
        return rng.random() < 0.5 if hint is bool else rng.choice(("bigru", "stgcn"))
    low, high = args[1].ends
    if args[0] is int:
        return rng.randint(math.ceil(low), int(min(high, LARGEST_COUNT)))
    return rng.choice((low, high, rng.uniform(low, high), low + (high - low) * 10 ** rng.uniform(-12, 0)))


def in_flags(rng: random.Random, data: Data) -> Data:
    """Other settings, one in ten of a value that is hardly one."""
    content = json.loads(data)
    for room, name, hint in rng.sample(FLAGS, rng.choice((1, 2, 4, 8))):
        content[room][name] = odd_value(rng, arrays=False) if rng.random() < 0.1 else drawn(rng, hint)
    return _json(content)


def _train(path: Path, clips: Clips) -> None:
    """Two steps, of the warm-up and of the method, as `train` takes and logs them."""
    config = typed(json.loads(path.read_bytes()), Config, str(path))
    trainer = Trainer(config, clips)
    Parts(trainer)
    log = RunLog(path.parent, config, trainer.schedule.total_steps, None, main=False)
    for step in range(2):
        values = trainer.step(step)
        log.advance()
        log.metrics(trainer, values)


# -- the readers


@dataclass(frozen=True)
class Target:
    """A reader: its good file, what damages it and what reads it."""

    path: Path
    damage: Mutator
    read: Callable[[Path], Any]
    check: Callable[[], None] = lambda: None
    """Fails where what was read is not what a slow reader reads."""


def _collected(opener: Callable[[Path], Source], folder: Path) -> Callable[[Path], Collected]:
    return lambda path: collect(opener(path), folder=folder)


def _check_skeleton(path: Path) -> None:
    """What is read of a `.skeleton` file is what it says."""
    with contextlib.suppress(UnusableError):
        bodies = parse_skeleton(path.read_bytes())
        expected = slow_readers.skeleton(path.read_bytes())
        np.testing.assert_array_equal(bodies, expected[:, : bodies.shape[1]])
        assert not expected[:, bodies.shape[1] :].any(), "a body is missing"


def _check_pku(folder: Path, name: str) -> None:
    """What is read of a video are the actions that its files say, or it is said why not."""
    source = open_pku(folder, "pku2")
    found = list(source.results(next(job for job in source.jobs if job.name == name)))
    if [one.name for one in found] == [name]:
        return
    labels = (folder / f"label/{name}.txt").read_bytes()
    written = labels.decode("latin1").split("\n")
    expected = slow_readers.actions((folder / f"skeleton/{name}.txt").read_bytes(), labels)
    lines = [number for number, line in enumerate(written) if line.strip()]
    assert [one.name for one in found] == [f"{name}_{number}" for number in lines]
    for number, one in zip(lines, found):
        if isinstance(one, Recording):
            label, joints, missing = expected[number]
            assert (one.label, one.remarks.get(BEYOND, 0)) == (label, missing)
            np.testing.assert_array_equal(one.joints, joints)


def _write_checkpoint(path: Path, clips: Clips) -> None:
    small = demo()
    config = replace(
        small, encoder=replace(small.encoder, hidden=2, projection=3), bank=replace(small.bank, size=64)
    )
    model = A2MC(config, clips.skeleton, clips.num_persons, 2)
    optimizer = torch.optim.SGD(model.query.parameters(), 0.1, momentum=0.9)
    saved = checkpoint.Checkpoint(
        step=3, config=config, skeleton=clips.skeleton, persons=clips.num_persons, classes=2,
        data=clips.identity, progress={"seconds": 1.5, "loss": 2.0}, scaler={},
        tensors=checkpoint.tensors_of(model, optimizer),
    )  # fmt: skip
    checkpoint.write(path, saved)


def _write_scores(path: Path) -> None:
    about = About(
        protocol="linear", run="runs/x", data="x", split="xsub", stream="joint", encoder="bigru",
        class_names=["a", "b"], identity="i",
    )  # fmt: skip
    labels, clips = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 5])
    Scores(
        scores=torch.arange(6.0).view(3, 2), labels=labels, clips=clips, names=("x", "y", "z"), about=about
    ).save(path)


def _ensemble(path: Path) -> dict[str, Any]:
    """What `evaluate ensemble` does with two files of scores."""
    one = Scores.load(path)
    return details(weighted_sum([one, one], (0.6, 0.4)).argmax(1), one.labels, one.scores.shape[1])


def _shown(path: Path) -> None:
    """What `evaluate compare` and `plots confusion` read of a result."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compare([path])
    assert said.getvalue().replace("\n", "").isprintable()
    read_confusion(path)


def _classified(path: Path, clips: Clips) -> None:
    """What `predict` does with the recordings of an archive before they are classified."""
    encoder: Any = SimpleNamespace(skeleton=clips.skeleton, persons=clips.num_persons)
    for raw in recordings(cast(ClipClassifier, None), path, []):
        prepared(encoder, raw.joints)


SHARE = {"fraction": 0.1, "top1_last": 5.0, "top1_last_std": 1.0}
RESULT = {
    **dict.fromkeys(("protocol", "run", "data", "split", "stream", "encoder"), "x"),
    "format": FORMAT, "preset": "demo", "steps": 8, "top1": 50.0, "top1_macro": 50.0,
    "class_names": ["a", "b"], "confusion": [[1, 0], [1, 0]], "fractions": [SHARE],
    "untrained": {"fractions": [SHARE]}, "config": {"seed": 0, "optim": {"lr": 1.0}},
}  # fmt: skip


RUN = {"seed": 0, "run": "x", "top1_knn": 30.0, "top1_linear_last": 40.0}
STUDY = {
    "format": "a2mc-study/1",
    "sets": [{"data": "x", "split": "xsub", "rows": {"full": {**RUN, "runs": [RUN, RUN]}}}] * 2,
}


def _without(path: Path, key: str) -> None:
    """Take an entry out of a safetensors file's header."""
    with safetensors.safe_open(path, "pt") as file:
        text = file.metadata()
    del text[key]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, text)


def target_of(reader: str, folder: Path) -> Target:
    """A reader, with its good files written below `folder`."""
    names = NTU_NAMES
    ntu = write_ntu(folder / "ntu", {names[0]: full_clip(0, 2, 2, 25), names[1]: full_clip(1, 1, 1, 25)})
    videos = {"A01N02-L": full_clip(0, 5, 2, 25), "A02N04-M": full_clip(1, 3, 2, 25)}
    labels = {"A01N02-L": "51,2,4,2\n3,0,5,1\n", "A02N04-M": "1,0,3,2\n"}
    pku = write_pku(folder / "pku", videos, labels)
    split = write_split(pku / "cross_subject_v2.txt", "A01N02-L, A03N02-R", "A02N04-M")
    (folder / "list.txt").write_text(f"missing skeletons\n{names[1]}.skeleton\nS009C009P009R009A009\n")
    agcn = folder / "agcn"
    arrays = {name: full_clip(i, 4, 2, 25).transpose(3, 0, 2, 1) for i, name in enumerate(names)}
    frames = dict(zip(names, (2, 4, 9, 1)))
    write_agcn(agcn, {"train": list(names[:2]), "val": list(names[2:])}, arrays, frames)
    with (agcn / "train_label.pkl").open("wb") as file:  # names as a list, classes as an array
        pickle.dump(([f"{name}.skeleton" for name in names[:2]], np.array([0, 1])), file)
    rows = {part: full_clip(i, 8, 2, 25).reshape(2, 4, 150) for i, part in enumerate(("train", "test"))}
    hot = np.eye(4, dtype=np.float32)[[1, 3]]
    both = {f"{axis}_{part}": rows[part] if axis == "x" else hot for axis in "xy" for part in rows}
    np.savez(folder / "NTU60_CS.npz", **both)
    np.savez(folder / "own.npz", **own_archive(names=np.array(["a", "b", "c"])))
    content = pyskl_content()
    for annotation in content["annotations"]:
        annotation |= {"keypoint": annotation["keypoint"][:, :3], "total_frames": 3}
    (folder / "ntu.pkl").write_bytes(pickle.dumps(content))
    frames_2d = folder / "frames"
    frames_2d.mkdir(exist_ok=True)
    values = [float(n) for n in range(1, 76)]
    (frames_2d / "v_0_keypoints.json").write_text(json.dumps({"people": [{"pose_keypoints_2d": values}] * 2}))
    rows = ["frame,person," + ",".join(f"{axis}{joint}" for joint in range(21) for axis in "xyv")]
    rows += [f"{t},{m}," + ",".join(f"{n + 60}" for n in range(63)) for t in range(3) for m in range(2)]
    (folder / "hand.csv").write_text("\n".join(rows))
    clips = collect(open_npz(folder / "own.npz")).clips
    clips.save(folder / "clips.safetensors")
    _without(folder / "clips.safetensors", "identity")  # else every damage would be refused for it
    if reader == "checkpoint":
        _write_checkpoint(folder / "checkpoint.safetensors", clips)
    write_json(folder / "config.json", to_dict(Config()))
    small = demo()
    small = replace(
        small,
        views=replace(small.views, frames=4),
        encoder=replace(small.encoder, hidden=2, projection=3, channels=2, width=8, size="small"),
        bank=replace(small.bank, size=8, warmup_steps=1),
        optim=replace(small.optim, batch_size=2, epochs=2),
    )
    write_json(folder / "flags.json", to_dict(small))
    write_json(folder / "study.json", STUDY)
    write_json(folder / "knn.json", RESULT)
    _write_scores(folder / "linear.scores.safetensors")
    logged = ({"step": 0, "knn_top1": 5.0}, {"step": 2, "stage": "train", "lr": 0.1, "loss": 3.0})
    (folder / "metrics.jsonl").write_bytes(b"".join(_json(line) + b"\n" for line in logged))

    def ready(path: Path, damage: Mutator, opener: Callable[[Path], Source]) -> Target:
        return Target(path, damage, _collected(opener, folder))

    def video(kind: str) -> Target:
        path = pku / kind / "A01N02-L.txt"
        target = ready(path, damage_bytes, lambda path: open_pku(pku, "pku2"))
        return replace(target, check=lambda: _check_pku(pku, path.stem))

    first = ntu / f"{names[0]}.skeleton"
    train = agcn / "train_data_joint.npy"
    targets = {
        "skeleton": replace(
            ready(first, damage_bytes, lambda path: open_ntu(ntu, "ntu60")),
            check=lambda: _check_skeleton(first),
        ),
        "exclude-list": ready(folder / "list.txt", damage_bytes, lambda path: open_ntu(ntu, "ntu60", path)),
        "pku-skeleton": video("skeleton"),
        "pku-label": video("label"),
        "pku-split": ready(split, damage_bytes, lambda path: open_pku(pku, "pku2")),
        "agcn-data": ready(train, damage_npy, lambda path: open_agcn(agcn)),
        "agcn-frames": ready(agcn / "train_num_frame.npy", damage_npy, lambda path: open_agcn(agcn)),
        "agcn-labels": ready(agcn / "train_label.pkl", in_pickle, lambda path: open_agcn(agcn)),
        "ctrgcn": ready(folder / "NTU60_CS.npz", in_archive, open_ctrgcn),
        "npz": ready(folder / "own.npz", in_archive, open_npz),
        "pyskl": ready(folder / "ntu.pkl", in_pickle, open_pyskl),
        "openpose": ready(frames_2d / "v_0_keypoints.json", in_json, lambda path: open_openpose(path.parent)),
        "csv": ready(folder / "hand.csv", damage_bytes, lambda path: open_table(path, "hand21")),
        "clips": Target(folder / "clips.safetensors", in_safetensors, Clips.load),
        "config": Target(
            folder / "config.json", in_json, lambda path: typed(read_json(path), Config, str(path))
        ),
        "flags": Target(folder / "flags.json", in_flags, lambda path: _train(path, clips)),
        "metrics": Target(folder / "metrics.jsonl", in_lines, lambda path: read_metrics(path.parent)),
        "checkpoint": Target(
            folder / "checkpoint.safetensors",
            in_checkpoint,
            lambda path: weights.whole(checkpoint.load(path)),
        ),
        "result": Target(folder / "knn.json", in_json, _shown),
        "study": Target(folder / "study.json", in_json, read_study),
        "predict": Target(folder / "own.npz", in_archive, lambda path: _classified(path, clips)),
        "scores": Target(folder / "linear.scores.safetensors", in_safetensors, _ensemble),
    }
    return targets[reader]


def damage_npy(rng: random.Random, data: Data) -> Data:
    """A `.npy` file with another array or damaged bytes, most often in its header."""
    if rng.random() < 0.5:
        array = np.load(io.BytesIO(data))
        stream = io.BytesIO()
        np.save(stream, damaged_array(rng, array) if rng.random() < 0.7 else odd_array(rng))
        return stream.getvalue()[:LARGEST]
    if rng.random() < 0.5:
        return damage_bytes(rng, data[:128]) + data[128:]
    return damage_bytes(rng, data)


READERS = (
    "skeleton", "exclude-list", "pku-skeleton", "pku-label", "pku-split", "agcn-data", "agcn-frames",
    "agcn-labels", "ctrgcn", "npz", "pyskl", "openpose", "csv", "clips", "config", "flags", "checkpoint",
    "metrics", "result", "study", "scores", "predict",
)  # fmt: skip


# -- what must hold


class Hang(BaseException):
    """No `Exception`, lest a reader takes it for damage."""


class _Guard:
    """Watches for whatever a reader has no business doing, while `folder` is set."""

    FORBIDDEN = (
        "os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty", "os.kill",
        "pickle.find_class", "socket.connect", "socket.bind", "ctypes.dlopen",
    )  # fmt: skip
    WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        writes = event in self.WRITES or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        outside = writes and not str(arguments[0]).startswith((self.folder, "/proc/self/"))
        # codecs are imported when they are first used
        imports = event == "import" and not str(arguments[0]).startswith("encodings.")
        if event in self.FORBIDDEN or outside or imports:
            self.seen.append(f"{event} {arguments!r:.100}")


_guard: _Guard | None = None


def guard() -> _Guard:
    """The one guard of this process; an audit hook cannot be taken off again."""
    global _guard
    _guard = _guard or _Guard()
    return _guard


def _alarm(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def timed(computing: float, clock: float) -> Iterator[None]:
    """`Hang` after so many seconds of computing, or by the clock, which a busy machine makes many."""
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, computing), signal.SIGALRM: (signal.ITIMER_REAL, clock)}
    handlers = {each: signal.signal(each, _alarm) for each in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for each, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(each, handlers[each])


@contextlib.contextmanager
def limited(extra: int) -> Iterator[None]:
    """Address space of this process limited to `extra` bytes more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _resident(field: bytes) -> int:
    with open("/proc/self/status", "rb") as file:
        return int(file.read().split(field)[1].split()[0]) << 10


def _reset_peak() -> int:
    """Forget the peak of resident memory; returns what is resident now, bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _resident(b"VmRSS:")


@dataclass
class Summary:
    """What a run of one reader found."""

    reader: str
    seed: int
    count: int = 0
    accepted: int = 0
    skipped: int = 0
    """Read, but with recordings skipped and reported."""
    refused: int = 0
    unhandled: int = 0
    breaches: dict[str, int] = field(default_factory=dict)
    """What must not happen -> how often: exceptions of other kinds, time, memory, forbidden calls."""
    seconds: float = 0.0
    worst_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    """Largest growth of resident memory during one input."""
    largest_input: int = 0


def check_clips(clips: Clips, folder: Path | None) -> None:
    """What a reader accepted is a valid data set; with a folder, one that survives saving and loading."""
    assert (
        len(clips) > 0 and bool(torch.isfinite(clips.frames).all()) and float(clips.frames.abs().max()) <= 1e3
    )
    assert int(clips.lengths.min()) > 0 and int(clips.lengths.sum()) == len(clips.frames)
    assert int(clips.labels.min()) >= -1 and clips.num_classes <= max(2000, len(clips))
    assert len(set(clips.names)) == len(clips.names) == len(clips)
    if folder is None:
        return
    clips.save(folder / "again.safetensors")
    again = Clips.load(folder / "again.safetensors")
    assert again.names == clips.names and torch.equal(again.frames, clips.frames)
    for name in clips.splits:
        assert sorted(torch.cat(again.split(name)).tolist()) == list(range(len(clips)))


def fuzz(reader: str, count: int, seed: int, keep: Path | None = None) -> Summary:
    """Damage the reader's good file `count` times. Breaches are counted, and their inputs kept in `keep`."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent, prefix="fuzz-") as name:
        folder = Path(name)
        target = target_of(reader, folder)
        good = target.path.read_bytes()
        target.read(target.path)  # warms up, and a good file must be good
        summary = Summary(reader, seed)
        start = time.perf_counter()
        with limited(2 << 30), warnings.catch_warnings():
            warnings.simplefilter("error")
            for number in range(count):
                data = target.damage(random.Random(f"{seed} {reader} {number}"), good)
                breach = _one(target, data, folder, summary)
                for what in breach:
                    summary.breaches[what] = summary.breaches.get(what, 0) + 1
                if breach and keep is not None and summary.breaches[breach[0]] <= 3:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{reader}-{seed}-{number}").write_bytes(data)
        summary.seconds = round(time.perf_counter() - start, 1)
    summary.worst_seconds = round(summary.worst_seconds, 4)
    summary.peak_memory_mb = round(summary.peak_memory_mb, 1)
    return summary


def _one(target: Target, data: Data, folder: Path, summary: Summary) -> list[str]:
    """Read one input, update the summary and name what should not have happened."""
    target.path.unlink(missing_ok=True)  # a mapping of the last one keeps its own content
    target.path.write_bytes(data)
    breaches: list[str] = []
    result: Any = None
    watch = guard()
    watch.seen.clear()
    before = _reset_peak()
    start = time.process_time()
    watch.folder = str(folder)
    try:
        with timed(SECONDS, PATIENCE):
            result = target.read(target.path)
        if isinstance(result, Collected) and result.skipped:
            summary.skipped += 1
        else:
            summary.accepted += 1
    except (InputError, OSError) as error:
        summary.refused += 1
        text = str(error)
        if len(text) > MESSAGE or not text.isprintable():
            breaches.append("message too long or not printable")
        if "MemoryError" in text or "Unable to allocate" in text:
            breaches.append("memory asked for and not given")
    except (Exception, Hang) as error:
        summary.unhandled += 1
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else "?"
        breaches.append(f"{type(error).__name__} at {where}")
    finally:
        watch.folder = None
    seconds = time.process_time() - start
    grown = _resident(b"VmHWM:") - before
    summary.count += 1
    summary.worst_seconds = max(summary.worst_seconds, seconds)
    summary.peak_memory_mb = max(summary.peak_memory_mb, grown / 1e6)
    summary.largest_input = max(summary.largest_input, len(data))
    if grown > SLACK + FACTOR * len(data):
        breaches.append("memory beyond its bound")
    breaches += [f"forbidden: {event}" for event in watch.seen]
    if isinstance(result, Collected | Clips):
        try:
            clips = result.clips if isinstance(result, Collected) else result
            check_clips(clips, folder if summary.accepted % 8 == 0 else None)
            with np.errstate(over="ignore"):
                target.check()
        except Exception as error:
            breaches.append(f"accepted, but {type(error).__name__}: {error!s:.80}")
    return breaches


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reader", choices=(*READERS, "all"), default="all")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that caused a breach")
    parser.add_argument("--out", type=Path, help="JSON file that the summaries are added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.reader == "all":
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--count",
            str(options.count),
            "--seed",
            str(options.seed),
        ]
        command += ["--keep", str(options.keep)] if options.keep else []
        command += ["--out", str(options.out)] if options.out else []
        codes = [subprocess.run([*command, "--reader", reader]).returncode for reader in READERS]
        sys.exit(max(codes))
    summary = fuzz(options.reader, options.count, options.seed, options.keep)
    print(json.dumps(asdict(summary)), flush=True)
    if options.out:
        record(options.out, summary)
    sys.exit(1 if summary.breaches else 0)


def record(path: Path, summary: Summary) -> None:
    """Put the summary into the JSON file, in place of an earlier one of the same reader."""
    from a2mc_fast.run.machine import machine

    content = read_json(path) if path.exists() else {}
    runs = {run["reader"]: run for run in content.get("runs", [])}
    date = datetime.now(UTC).date().isoformat()
    runs[summary.reader] = {**asdict(summary), "date": date, **machine()}
    ordered = [runs[reader] for reader in READERS if reader in runs]
    bounds = {"seconds": SECONDS, "memory": f"{SLACK >> 20} MiB + {FACTOR} x size", "message": MESSAGE}
    write_json(path, {"bounds": bounds, "runs": ordered})


if __name__ == "__main__":
    main()
