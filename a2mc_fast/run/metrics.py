"""The lines of metrics.jsonl: what a run logs, read again when it is resumed and by the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from a2mc_fast.errors import InputError, Range, require
from a2mc_fast.files import parse_json, read_bytes, typed

_LARGEST_LOG, _LONGEST_LINE = 1 << 30, 1 << 16  # bytes
_Number = Annotated[float, Range("[-1e30, 1e30]")]


class Record(TypedDict):
    """What is read of a line."""

    step: Annotated[int, Range("[0, 1e12]")]
    stage: NotRequired[str]
    lr: NotRequired[_Number]
    knn_top1: NotRequired[_Number]
    seconds: NotRequired[_Number]
    loss: NotRequired[_Number]
    loss_weak: NotRequired[_Number]
    loss_strong: NotRequired[_Number]
    loss_basic: NotRequired[_Number]
    lost: NotRequired[Annotated[int, Range("[1, 1e12]")]]


def lines_of(path: Path) -> list[bytes]:
    """A metrics file's lines with their ends; none where there is no file."""
    return read_bytes(path, _LARGEST_LOG).splitlines(keepends=True) if path.exists() else []


def read_line(line: bytes) -> Record:
    """What a line says. `InputError` if it is none of a run's."""
    require(len(line) <= _LONGEST_LINE, f"{len(line)} bytes")
    record: Record = typed(parse_json(line, "it"), Record, "it")
    return record


def read_metrics(run: Path) -> list[Record]:
    """The lines of a run's metrics file. A last line that a crash or a running job cut off is left out."""
    path = Path(run) / "metrics.jsonl"
    lines = lines_of(path)
    require(bool(lines), f"{path} not found: is {run} the folder of a run of a2mc_fast.train?")
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(read_line(line))
        except InputError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number} is not a metrics record ({error})") from None
    require(any("loss" in record for record in records), f"{path} holds no logged step yet")
    return records
