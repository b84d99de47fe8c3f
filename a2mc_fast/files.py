"""Files that are whole or absent, and what JSON says as types of our own.

Files are written to a temporary neighbour, synced, then renamed over the target. `typed` checks what JSON
gives against a type and gives it that type, down to the numbers' ranges. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from safetensors import SafetensorError, safe_open

from a2mc_fast.errors import InputError, Range, require

_LARGEST_JSON = 32 << 20  # bytes, of which Python makes up to 24 times as much
_LARGEST = sys.float_info.max


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; on success it replaces `target`, on any error it is removed.

    A crash leaves the old file or the new one, never a part. What a killed process leaves, a hidden `.tmp`
    folder, the next writer of `target` removes. An `OSError` names `target`.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    folder = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    temporary = folder / target.name
    with _refusals(target, folder):
        folder.mkdir()
        held = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(held, fcntl.LOCK_EX)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            mode = temporary.stat().st_mode
            yield temporary
            # safetensors puts a file of its own in place of the one it is given, for nobody else to read
            os.chmod(temporary, mode)
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


@contextmanager
def _refusals(target: Path, folder: Path) -> Iterator[None]:
    """What the system refuses within `folder`, as an `OSError` about `target`."""
    try:
        yield
    except SafetensorError as error:
        if (refused := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(target)) from None
    except OSError as error:
        if error.errno is None or not str(error.filename or folder).startswith(str(folder)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from None


def remove_leftovers(target: Path) -> None:
    """Delete what killed processes left of a file. What another one is writing just now is locked."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        with suppress(OSError):
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; `InputError` if it is damaged, or larger than any that this package writes."""
    return parse_json(read_bytes(path, _LARGEST_JSON), str(path))


def read_bytes(path: Path, largest: int) -> bytes:
    """A file's content; `InputError` for more bytes, and for what is no file: a device would never end."""
    path = Path(path)
    require(path.is_file() or not path.exists(), f"{path} is not a file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    require(len(content) <= largest, f"{path} has more than {largest >> 20} MiB, which is no such file")
    return content


def parse_json(text: str | bytes, where: str) -> Any:
    """The content of JSON text, all numbers finite; `InputError` begins with `where` if it is none."""

    def finite(number: str) -> float:  # Python's parser would let NaN and infinities through
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"the number {number:.40} is not finite")
        return value

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits, too deep
        raise InputError(f"{where} is not JSON: {error}") from None


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; `InputError`, naming `where` it is, for anything else.

    Dataclasses refuse fields that they do not have, TypedDicts leave them out; numbers are finite and in
    their `Range`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return _record(value, hint, where)
    if hint is Any:
        return value
    if origin is Annotated:
        value = typed(value, args[0], where)
        for extra in args[1:]:
            inside = not isinstance(extra, Range) or value in extra
            require(inside, f"{where} must be in {getattr(extra, 'interval', '')}, got {value!r}")
        return value
    if origin is Literal:
        require(value in args, f"{where} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        refused = []
        for kind in args:
            try:
                return value if value is None and kind is types.NoneType else typed(value, kind, where)
            except InputError as error:
                refused.append(error)
        raise refused[0]
    if origin in (list, tuple):
        return _sequence(value, hint, where)
    if origin is dict:
        require(isinstance(value, dict), f"{where} must be an object, got {type(value).__name__}")
        return {name: typed(item, args[1], f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        # false for NaN too, and for whole numbers of any size
        require(abs(value) <= _LARGEST, f"{where} must be a finite number, got {value!r:.40}")
        return float(value)
    matches = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(matches, f"{where} must be {hint.__name__}, got {value!r}")
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Type of every field of a dataclass or TypedDict, and whether it must be there."""
    if dataclasses.is_dataclass(kind):
        # its own checks know the ranges
        hints = typing.get_type_hints(kind)
        return {f.name: (hints[f.name], f.default is f.default_factory) for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in hints.items() if typing.get_origin(hint) is NotRequired}
    return {n: (typing.get_args(h)[0] if n in optional else h, n not in optional) for n, h in hints.items()}


def _record(value: Any, kind: Any, where: str) -> Any:
    require(isinstance(value, dict), f"{where} must be an object, got {type(value).__name__}")
    hints = _hints(kind)
    missing = [name for name, (_, needed) in hints.items() if needed and name not in value]
    require(not missing, f"{where} has no {', '.join(missing)}")
    if dataclasses.is_dataclass(kind):
        unknown = sorted(set(value) - set(hints))
        require(not unknown, f"{where} has unknown fields: {', '.join(unknown)}")
    fields = {n: typed(value[n], hint, f"{where}.{n}") for n, (hint, _) in hints.items() if n in value}
    return kind(**fields)


def _sequence(value: Any, hint: Any, where: str) -> Any:
    require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
    origin: Any = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is tuple and args[-1] is not Ellipsis:
        require(len(value) == len(args), f"{where} must hold {len(args)} values, got {len(value)}")
        return tuple(typed(item, arg, where) for item, arg in zip(value, args))
    if args[0] in (int, str) and all(type(item) is args[0] for item in value):
        return origin(value)  # a matrix has millions
    return origin(typed(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))


def read_tensors(path: Path, form: str, what: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Header and tensors of a safetensors file of the format `form`, such as "a2mc-clips/1".

    `InputError` if it is damaged, if it is not `what` it should be, or of another version.
    """
    try:
        with path.open("rb") as file:
            # the library opens names that are UTF-8 and no others
            is_text = str(path).encode("utf-8", "ignore").decode() == str(path)
            place = str(path) if is_text else f"/dev/fd/{file.fileno()}"
            with safe_open(place, framework="pt", device="cpu") as opened:
                header: dict[str, str] = opened.metadata() or {}
                written, kind = header.get("format", "").strip('"'), form.partition("/")[0]
                require(written.startswith(f"{kind}/"), f"{path} is not {what} ({form})")
                require(
                    written == form,
                    f"{path} has the format {written}, and this version of a2mc_fast reads {form} alone: "
                    "make it again, or use the version that wrote it",
                )
                return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from None


def format_of(path: Path) -> str:
    """What a safetensors file of ours says it holds, as "a2mc-clips/1"; "" where there is no such file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return (opened.metadata() or {}).get("format", "").strip('"')
    except (SafetensorError, OSError):
        return ""


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
