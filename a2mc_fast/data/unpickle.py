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

from a2mc_fast.data.npy import damaged, texts
from a2mc_fast.data.pack import existing_file
from a2mc_fast.errors import InputError, require

_MAX_ARGUMENTS = 8
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
    """A numpy array of a pickle. `ValueError` for all else."""
    if isinstance(value, _Array) and value.content is not None:
        return value.content
    raise ValueError(f"{type(value).__name__.strip('_')} where an array was expected")


def as_texts(value: Any) -> list[str]:
    """The strings of a list, or of an array [N]. `ValueError` for all else."""
    if isinstance(value, list | tuple):
        if not all(isinstance(text, str) for text in value):
            raise ValueError("not all are strings")
        return list(value)
    return texts(as_array(value))


def as_numbers(value: Any) -> list[int | float]:
    """The numbers of a list, or of an array [N]. `ValueError` for all else."""
    if isinstance(value, list | tuple):
        if not all(isinstance(number, int | float | np.integer | np.floating) for number in value):
            raise ValueError("not all are numbers")
        return [n.item() if isinstance(n, np.generic) else n for n in value]
    array = as_array(value)
    if array.dtype.kind not in "fiub" or array.ndim != 1:
        raise ValueError(f"{array.dtype} {list(array.shape)} where numbers were expected")
    return array.tolist()


class _DType:
    """Stands for a numpy dtype; knows numbers and strings only."""

    def __init__(self, code: str, *_: object) -> None:
        if not _DTYPE.fullmatch(code):
            raise ValueError(f"an array of {code[:20]!r}")
        self.plain = np.dtype(code)

    def restore(self, state: Any) -> int:
        """state = (version, byte order, subarray, names, fields, item size, ...) -> bytes copied."""
        order, structure = state[1], state[2:5]
        if any(part is not None for part in structure):
            raise ValueError("an array of structures")
        if order != "|":
            self.plain = self.plain.newbyteorder(order)
        return 0


class _Array:
    """Stands for a numpy array, which a pickle makes empty and fills afterwards."""

    def __init__(self, *_: object) -> None:
        self.content: np.ndarray | None = None

    def restore(self, state: Any) -> int:
        """state = (version, shape, dtype, whether in Fortran order, bytes) -> bytes copied."""
        _, shape, dtype, fortran, data = state
        copied = len(data) if isinstance(data, str) else 0
        if copied:  # Python 2 wrote bytes as text
            data = data.encode("latin1")
        self.content = _array(data, dtype, shape, "F" if fortran else "C")
        return copied


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
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
        raise ValueError("text in another encoding than latin1")
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
    """Execute the program. Raises whatever a damaged one leads to.

    Time and memory are bounded by a multiple of the file's size: nothing that is in the file once is copied
    again and again, and no index or key is of a kind of which colliding ones are easily found.
    """
    stack, memo = _Stack(), dict[Any, Any]()
    room = 2 * len(
        content
    )  # bytes that may be copied; a plain pickle makes every text, number and array once
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
                    if not 0 <= argument < len(content):
                        raise ValueError("an entry of the memo that is never reached")
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
                    module, attribute = stack.take(2)
                    if not (isinstance(module, str) and isinstance(attribute, str)):
                        raise TypeError("a class whose name is no text")
                    stack.append(_allowed(f"{module} {attribute}", path))
                case "REDUCE":
                    function, arguments = stack.take(2)
                    if not any(function is ours for ours in _ALLOWED.values()):
                        raise TypeError(f"a call of {type(function).__name__}")
                    if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
                        raise TypeError("a call with too many arguments")
                    result = function(*arguments)
                    if isinstance(result, bytes | np.generic):
                        room -= len(result) if isinstance(result, bytes) else result.nbytes
                    stack.append(result)
                case "BUILD":
                    (state,) = stack.take(1)
                    if not isinstance(stack[-1], _DType | _Array):
                        raise TypeError(f"state for {type(stack[-1]).__name__}")
                    room -= stack[-1].restore(state)
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case _:
                    raise ValueError(f"the instruction {name}, which plain data do not need")
            if room < 0:
                raise ValueError("copies of one text")
    raise EOFError("the file ends early")


def _allowed(name: str, path: Path) -> Any:
    if name not in _ALLOWED:
        raise InputError(
            f"{path} asks for {name.replace(' ', '.')[:80]}; only lists, dicts, numbers, strings and numpy "
            "arrays are read, and nothing was executed"
        )
    return _ALLOWED[name]


def _filled(target: Any, items: Any) -> Any:
    """Fill a dict. Keys are strings or short numbers: hashing nested tuples overruns the C stack, and hashing
    long numbers takes long each time."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float):
            raise TypeError(f"a dict key of type {type(key).__name__}")
        if isinstance(key, int) and key.bit_length() > 32:
            raise ValueError("a dict key of more than 32 bits")
        dict.__setitem__(target, key, value)
    return target
