"""Pickles from strangers: lists, tuples, dicts, numbers, strings and numpy arrays, and nothing else.

A pickle is a program for a small stack machine that may call any function of Python. This is such a machine
with the plain instructions only. What a file may call is replaced by the few functions below, which rebuild
arrays from bytes that are in the file; so no length that a file claims is believed, and nothing of it is
executed.
"""

from __future__ import annotations

import mmap
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from a2mc_fast.data.npy import damaged
from a2mc_fast.data.pack import existing_file
from a2mc_fast.errors import InputError, require

_DTYPE = re.compile(r"[<>|=]?([fiu][1248]|b1|[US]\d{1,6})", re.ASCII)
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE", "BINBYTES",
    "BINBYTES8", "SHORT_BINBYTES", "BYTEARRAY8",
}  # fmt: skip
"""Instructions that push the value written beside them."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def load_pickle(path: Path) -> Any:
    """The content of a pickle. Arrays in it are to be taken out with `as_array`.

    Raises `InputError` naming the class, if the file asks for one that is not allowed; nothing of it is
    executed.
    """
    existing_file(path, "a pickle")
    with path.open("rb") as file:
        require(path.stat().st_size > 0, f"{path} is empty")
        # a mapped file returns no more than there is, whatever length is asked for
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, damaged(path, "a pickle"):
            return _run(content, path)


def as_array(value: Any) -> np.ndarray:
    """A numpy array of a pickle, or a list of numbers or strings as one. `ValueError` for all else."""
    if isinstance(value, _Array) and value.content is not None:
        return value.content
    if isinstance(value, list | tuple) and all(isinstance(v, str | int | float | np.generic) for v in value):
        return np.array(value)
    raise ValueError(f"{type(value).__name__.strip('_')} where an array was expected")


class _DType:
    """Stands for a numpy dtype; knows numbers and strings only."""

    def __init__(self, code: str, *_: object) -> None:
        if not _DTYPE.fullmatch(code):
            raise ValueError(f"an array of {code[:20]!r}")
        self.plain = np.dtype(code)

    def restore(self, state: Any) -> None:
        """state = (version, byte order, subarray, names, fields, item size, alignment, ...)."""
        order, structure = state[1], state[2:5]
        if any(part is not None for part in structure):
            raise ValueError("an array of structures")
        if order != "|":
            self.plain = self.plain.newbyteorder(order)


class _Array:
    """Stands for a numpy array, which a pickle makes empty and fills afterwards."""

    def __init__(self, *_: object) -> None:
        self.content: np.ndarray | None = None

    def restore(self, state: Any) -> None:
        """state = (version, shape, dtype, whether in Fortran order, bytes)."""
        _, shape, dtype, fortran, data = state
        self.content = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(data, str):  # Python 2 wrote bytes as text
        data = data.encode("latin1")
    if not (isinstance(data, bytes | bytearray) and isinstance(dtype, _DType)):
        raise TypeError("an array without bytes or dtype")
    return np.frombuffer(data, dtype.plain).reshape(shape, order=order)


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    array = _Array()
    if order == "K":  # numpy 2.3 and later: the memory's shape, then the order of the axes
        array.content = _array(data, dtype, shape, "C").transpose(axes)
    else:
        array.content = _array(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError(f"text encoded as {encoding[:20]!r}")
    return str.encode(text, "latin1")


_ALLOWED = {
    "numpy ndarray": _Array,
    "numpy dtype": _DType,
    "_codecs encode": _bytes,
    "__builtin__ bytes": _bytes,  # how old protocols write b""
    **{
        f"numpy.{core}.{name}": ours
        for core in ("core", "_core")
        for name, ours in (
            ("multiarray _reconstruct", _Array),
            ("multiarray scalar", _scalar),
            ("numeric _frombuffer", _frombuffer),
        )
    },
}
"""What a pickle may name, and what it gets instead."""


class _Stack(list[Any]):
    """The machine's stack; `marks` are the heights to which the collecting instructions go back."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[int] = []

    def to_mark(self) -> list[Any]:
        """Take off everything above the last mark."""
        mark = self.marks.pop()
        taken = self[mark:]
        del self[mark:]
        return taken

    def take(self, count: int) -> tuple[Any, ...]:
        """Take off the upper `count` values."""
        if count > len(self):
            raise IndexError("the stack is empty")
        taken = tuple(self[-count:])
        del self[-count:]
        return taken


def _run(content: mmap.mmap, path: Path) -> Any:
    """Execute the program. Raises whatever a damaged one leads to."""
    stack, memo = _Stack(), dict[Any, Any]()
    argument: Any
    for instruction, argument, _ in pickletools.genops(content):  # type: ignore[arg-type]  # mmap reads too
        name = instruction.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        else:
            match name:
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    stack.marks.append(len(stack))
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(stack.take(int(name[-1])))
                case "TUPLE":
                    stack.append(tuple(stack.to_mark()))
                case "LIST":
                    stack.append(stack.to_mark())
                case "DICT":
                    stack.append(_filled({}, stack.to_mark()))
                case "APPEND":
                    (value,) = stack.take(1)
                    list.append(stack[-1], value)
                case "APPENDS":
                    values = stack.to_mark()
                    list.extend(stack[-1], values)
                case "SETITEM":
                    pair = stack.take(2)
                    _filled(stack[-1], pair)
                case "SETITEMS":
                    items = stack.to_mark()
                    _filled(stack[-1], items)
                case "GLOBAL":
                    stack.append(_allowed(argument, path))
                case "STACK_GLOBAL":
                    stack.append(_allowed("{} {}".format(*stack.take(2)), path))
                case "REDUCE":
                    function, arguments = stack.take(2)
                    if not any(function is ours for ours in _ALLOWED.values()):
                        raise TypeError(f"a call of {type(function).__name__}")
                    stack.append(function(*arguments))
                case "BUILD":
                    (state,) = stack.take(1)
                    if not isinstance(stack[-1], _DType | _Array):
                        raise TypeError(f"state for {type(stack[-1]).__name__}")
                    stack[-1].restore(state)
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case _:
                    raise ValueError(f"the instruction {name}, which plain data do not need")
    raise EOFError("the file ends early")


def _allowed(name: str, path: Path) -> Any:
    if name not in _ALLOWED:
        raise InputError(
            f"{path} asks for {name.replace(' ', '.')[:80]}; only lists, dicts, numbers, strings and numpy "
            "arrays are read, and nothing was executed"
        )
    return _ALLOWED[name]


def _filled(target: Any, items: Any) -> Any:
    """Fill a dict. Keys are strings or numbers, for hashing deeply nested tuples overruns the C stack."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float):
            raise TypeError(f"a dict key of type {type(key).__name__}")
        dict.__setitem__(target, key, value)
    return target
