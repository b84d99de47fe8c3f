"""metrics.jsonl: the lines that a run logs, read again when it is resumed and by the curves."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from a2mc_fast.errors import InputError, Range, os_reason, require, tell
from a2mc_fast.files import atomic_path, parse_json, read_bytes, typed

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


class MetricsFile:
    """The file as a run writes it. Lines that the disk refuses wait in memory for the next one."""

    def __init__(self, run: Path, step: int, known: float | None) -> None:
        """Goes on after the checkpoint of `step`, which knows so many lines; -1 and None for a new run."""
        self.path = run / "metrics.jsonl"
        self.lines = self._keep(step, known)
        """From the run's beginning."""
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = b""
        self._writing = threading.Lock()  # the thread that saves also asks for what is unwritten

    def _keep(self, step: int, known: float | None) -> int:
        """Remove what was logged after the checkpoint: those steps are done again. Returns the lines left.

        Lines that the checkpoint knows and the file lacks are said, and marked by a line that counts them.
        """
        content, kept, count = lines_of(self.path), [], 0
        for line in content:
            with suppress(InputError):
                record = read_line(line)
                if record["step"] <= step and line.endswith(b"\n"):
                    kept.append(line)
                    count += record.get("lost", 1)
        lost = 0 if known is None else int(known) - count
        if lost > 0:
            tell(f"{self.path} lacks {lost} of the lines up to step {step}: a line there marks the gap")
            kept.append(json.dumps({"step": step, "lost": lost}).encode() + b"\n")
            count += lost
        if kept != content:
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))
        return count

    def add(self, record: dict[str, Any]) -> str:
        """Write a line. Returns what to say when the first one has to wait, else ""."""
        waited, self.lines = bool(self._unwritten), self.lines + 1
        try:
            self._append(json.dumps(record).encode() + b"\n")
        except OSError as error:
            if not waited:
                return f"{self.path} cannot be written ({os_reason(error)}): its lines wait in memory"
        return ""

    def _append(self, line: bytes) -> None:
        """Write what is unwritten and `line`; what is left after an error stays for the next time."""
        with self._writing:
            self._unwritten += line
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def sync(self) -> None:
        """Have every line on the disk, or `OSError`."""
        self._append(b"")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
