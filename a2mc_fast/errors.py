"""What a user can get wrong, said in one sentence; ranges of numbers; the exit codes of the command lines.

Library functions raise `InputError` (a `ValueError`) for bad files and values; `exit_on_error` makes one line
and exit code 2 of it, and of what the operating system refuses. A setting's range is declared in its type,
`gamma: Annotated[float, Range("[0, 1]")]`; its class calls `check_ranges(self)` in `__post_init__`.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_LONGEST = 500  # characters of a message


class InputError(ValueError):
    """Bad input. The message is one sentence: what, where, and what to do. It may quote files, so it is made
    one printable line, of which the middle is left out if it is very long."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, longest: int = _LONGEST) -> str:
    """`text` with unprintable characters escaped as in Python's literals, cut in the middle to `longest`."""
    for _ in range(2):  # escaping makes it longer again
        if len(text) > longest:
            text = f"{text[: longest - longest // 4 - 5]} ... {text[-(longest // 4) :]}"
        text = _printable(text)
    return text


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class Range:
    """An interval as it is written: "[0, 1)" has 0 and not 1. The ends are finite."""

    interval: str

    @property
    def ends(self) -> tuple[float, float]:
        low, high = map(float, self.interval[1:-1].split(","))
        return low, high

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        above = value >= low if self.interval[0] == "[" else value > low
        return above and (value <= high if self.interval[-1] == "]" else value < high)


Share = Annotated[float, Range("[0, 1]")]
Rate = Annotated[float, Range("[1e-9, 1000]")]
Temperature = Annotated[float, Range("[0.001, 1000]")]
Momentum = Annotated[float, Range("[0, 1)")]
Count = Annotated[int, Range("[1, 1e6]")]
CountOrNone = Annotated[int, Range("[0, 1e6]")]
Seed = Annotated[int, Range("[0, 9223372036854775808)")]


@functools.cache
def ranges(kind: type) -> dict[str, Range | None]:
    """The range of every number, and of every number of a tuple, among a dataclass's fields."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        inner, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if inner in (int, float):
            found[name] = next((extra for extra in extras if isinstance(extra, Range)), None)
    return found


def check_ranges(settings: Any, prefix: str = "") -> None:
    """`InputError`, naming the field after `prefix`, for a number outside its range."""
    for name, inside in ranges(settings.__class__).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            require(
                inside is None or number in inside,
                f"{prefix}{name} must be in {inside and inside.interval}, got {number!r:.40}",
            )


def first_line(error: BaseException) -> str:
    """What went wrong at the bottom of a library's exception, its kind first. Compilers say where in the
    first line and what in the last, so a first line that ends in a colon gets it."""
    # torch's compilers keep what they wrap under a name of their own
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:1])
    if text.endswith(":"):
        text = " ".join(dict.fromkeys((text, lines[-1])))
    return one_line(": ".join(filter(None, (type(error).__name__, text))), 300)


def os_reason(error: OSError) -> str:
    """The operating system's reason without its number, e.g. "Permission denied: runs/x"."""
    reason = error.strerror or str(error)
    return f"{reason}: {error.filename}" if error.filename is not None else reason


def launched(name: str, alone: int) -> int:
    """A number that torchrun puts into the environment, or what it is for a process on its own."""
    text = os.environ.get(name, str(alone))
    require(text.isdecimal(), f"{name}={text}: expected a number, as torchrun sets it; unset {name}")
    return int(text)


def rank() -> int:
    """This process's number among those that torchrun started; 0 for one on its own."""
    return launched("RANK", 0)


@contextmanager
def one_speaks() -> Iterator[None]:
    """Around what all ranks do alike before they meet: what is wrong with it, rank 0 says alone."""
    if rank() == 0:
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except InputError:
        sys.exit(EXIT_BAD_INPUT)


def tell(line: str, *, error: bool = False) -> None:
    """Lines to standard output, or standard error, printable ones. If nobody or a full disk takes them, they
    alone are lost."""
    line = "\n".join(_printable(part) for part in line.split("\n"))
    stream = sys.stderr if error else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        # a reader that went away, as a dead `tee` does, would fail every later line too
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_standard_streams() -> None:
    """Streams that take whatever is printed. Those that were closed at the start (`>&-`) lead to nowhere:
    else a file would get their number. What a terminal's encoding lacks is escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Around a command line's main: bad input ends it with one line and exit code 2, Ctrl-C with 130."""
    open_standard_streams()
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, e.g. `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        # our own FileNotFoundError carries its sentence alone; the system's carries errno and file name
        message = os_reason(error) if isinstance(error, OSError) and error.errno is not None else str(error)
        tell(f"error: {one_line(message)}", error=True)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        tell("interrupted", error=True)
        sys.exit(EXIT_INTERRUPTED)
