"""Pickles from strangers: lists, tuples, dicts, numbers, strings and numpy arrays, and nothing else; sets
come as lists.

A pickle is a program for a small stack machine that may call any function of Python. This is such a machine
with the plain instructions only. What a file may call is replaced by the few functions below, which rebuild
arrays from bytes that are in the file; so no length that a file claims is believed, and nothing of it is
executed.
"""

from __future__ import annotations

import mmap
import pickletools
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from a2mc_fast.data.npy import damaged, texts
from a2mc_fast.errors import require

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
    """The content of a pickle; arrays in it are to be taken out with `as_array`. Raises `InputError` naming
    the class, if the file asks for one that is not allowed."""
    with path.open("rb") as file:
        require(path.stat().st_size > 0, f"{path} is empty")
        # a mapped file returns no more than there is, whatever length is asked for
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, damaged(path, "a pickle"):
            return _Machine(content, path).run()


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
    # K, of numpy 2.3 and later: the memory's shape, then the order of the axes
    array, made = _array(data, dtype, shape, "C" if order == "K" else order), _Array()
    made.content = array.transpose(axes) if order == "K" else array
    return made


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError("text in another encoding than latin1")
    return str.encode(text, "latin1")


def _elements(values: Any = ()) -> list[Any]:
    if values == ():
        return []
    if not isinstance(values, list):
        raise TypeError("a set of something else than a list")
    return values  # not a copy


_SETS = [f"{module} {kind}" for module in ("__builtin__", "builtins") for kind in ("set", "frozenset")]
_ALLOWED = {
    "numpy ndarray": _Array,
    "numpy dtype": _DType,
    "_codecs encode": _bytes,
    "__builtin__ bytes": _bytes,  # how old protocols write b""
    **dict.fromkeys(_SETS, _elements),
    **{f"numpy.{core}.multiarray _reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _frombuffer for core in ("core", "_core")},
}
"""What a pickle may name, and what it gets instead."""


class _Machine:
    """The stack machine: `run` executes a program, each method below one instruction.

    Time and memory are bounded by a multiple of the file's size: nothing that is in the file once is copied
    again and again, and no index or key is of a kind of which colliding ones are easily found.
    """

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content, self.path = content, path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        """Heights of the stack to which the collecting instructions go back."""
        self.memo: dict[Any, Any] = {}
        # bytes that may be copied; a plain pickle makes every text, number and array once
        self.room = 2 * len(content)

    def run(self) -> Any:
        """What the program leaves on the stack. Raises whatever a damaged one leads to."""
        steps: dict[str, Callable[[Any], None]] = {
            "MEMOIZE": lambda _: self.put(len(self.memo)),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self.put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda i: self.stack.append(self.memo[i])),
            "MARK": lambda _: self.marks.append(len(self.stack)),
            **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda _: self.stack.append([])),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            **{f"TUPLE{n}": partial(lambda n, _: self.stack.append(self.take(n)), n) for n in (1, 2, 3)},
            "TUPLE": lambda _: self.stack.append(tuple(self.to_mark())),
            **dict.fromkeys(("LIST", "FROZENSET"), lambda _: self.stack.append(self.to_mark())),
            "DICT": lambda _: self.stack.append(_filled({}, self.to_mark())),
            "APPEND": lambda _: self.extend(self.take(1)),
            **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda _: self.extend(self.to_mark())),
            "SETITEM": lambda _: self.fill(self.take(2)),
            "SETITEMS": lambda _: self.fill(self.to_mark()),
            "GLOBAL": lambda name: self.stack.append(_allowed(name, self.path)),
            "STACK_GLOBAL": lambda _: self.stack_global(),
            "REDUCE": lambda _: self.reduce(),
            "BUILD": lambda _: self.build(),
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
        }
        argument: Any
        for instruction, argument, _ in pickletools.genops(self.content):  # type: ignore[arg-type]  # mmap reads too
            name = instruction.name
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self.stack.pop()
            elif name in steps:
                steps[name](argument)
            else:
                raise ValueError(f"the instruction {name}, which plain data do not need")
            if self.room < 0:
                raise ValueError("copies of one text")
        raise EOFError("the file ends early")

    def to_mark(self) -> list[Any]:
        """Take off everything above the last mark."""
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def take(self, count: int) -> tuple[Any, ...]:
        """Take off the upper `count` values."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        return taken

    def put(self, place: int) -> None:
        if not 0 <= place < len(self.content):
            raise ValueError("an entry of the memo that is never reached")
        self.memo[place] = self.stack[-1]

    def extend(self, values: Iterable[Any]) -> None:
        list.extend(self.stack[-1], values)

    def fill(self, items: Sequence[Any]) -> None:
        _filled(self.stack[-1], items)

    def stack_global(self) -> None:
        module, attribute = self.take(2)
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise TypeError("a class whose name is no text")
        self.stack.append(_allowed(f"{module} {attribute}", self.path))

    def reduce(self) -> None:
        function, arguments = self.take(2)
        if not any(function is ours for ours in _ALLOWED.values()):
            raise TypeError(f"a call of {type(function).__name__}")
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            raise TypeError("a call with too many arguments")
        result = function(*arguments)
        if isinstance(result, bytes | np.generic):
            self.room -= len(result) if isinstance(result, bytes) else result.nbytes
        self.stack.append(result)

    def build(self) -> None:
        (state,) = self.take(1)
        if not isinstance(self.stack[-1], _DType | _Array):
            raise TypeError(f"state for {type(self.stack[-1]).__name__}")
        self.room -= self.stack[-1].restore(state)


def _allowed(name: str, path: Path) -> Any:
    require(
        name in _ALLOWED,
        f"{path} asks for {name.replace(' ', '.')[:80]}; only lists, dicts, numbers, strings and numpy "
        "arrays are read, and nothing was executed",
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
