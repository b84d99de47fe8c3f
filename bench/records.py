"""What a benchmark found, as typed records, and the files that hold them: `bench/results/*.json`.

A file names its machine, versions, commit and date once, then the records. It is written anew after every
record, whole or not at all, so that a run that is cut off leaves all it had measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from a2mc_fast.errors import InputError, require
from a2mc_fast.files import read_json, typed, write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One way of doing one thing at one size. Records that differ in `form` alone are ways to one result."""

    what: str
    """The operation, in words."""
    case: str = ""
    """Which of several of its kind: an encoder, a seed."""
    form: str = "ours"
    """Who does it: ours, compiled, eager, literal, public, cudnn ..."""
    sizes: dict[str, int] = field(default_factory=dict)
    """The problem's sizes: N clips, K bank rows, T frames, mix mixing shares."""
    ms: float | None = None
    """Median milliseconds."""
    p20: float | None = None
    p80: float | None = None
    per_second: float | None = None
    """Clips, views or files per second."""
    MiB: float | None = None
    """Memory that a call allocates at its peak; on the CPU it is only known where a process measured it."""
    phases: dict[str, float] = field(default_factory=dict)
    """Milliseconds of each part of a step."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Whatever else was measured, by name and unit."""

    @property
    def subject(self) -> str:
        """What is done, in words."""
        return f"{self.what}, {self.case}" if self.case else self.what


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one part of `bench.gpu` went."""

    part: str
    outcome: str
    """passed, failed, out of time or not run."""
    seconds: float = 0.0
    note: str = ""
    """What it said last."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One file of records."""

    machine: dict[str, str]
    date: str
    note: str = ""
    """What a reader of the numbers has to know."""
    parts: tuple[Outcome, ...] = ()
    records: tuple[Record, ...] = ()

    @property
    def caption(self) -> str:
        """Machine, versions, commit and date in a line."""
        named = [
            f"{k} {self.machine[k]}"
            for k in ("torch", "triton", "a2mc_fast", "commit")
            if self.machine.get(k)
        ]
        return ", ".join([self.machine.get("device", "unknown machine"), *named, self.date[:10]])


def here(commit: str = "") -> Results:
    """No records yet of this machine, now; `commit` is told where there is no checkout to ask."""
    import torch

    from a2mc_fast.run.log import machine

    about = machine() | {"threads": str(torch.get_num_threads())}
    if commit:
        about["commit"] = commit
    with suppress(importlib.metadata.PackageNotFoundError):
        about["triton"] = importlib.metadata.version("triton")
    if torch.cuda.is_available():
        about["cuDNN"] = str(torch.backends.cudnn.version())
    return Results(machine=about, date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def write(path: Path, results: Results) -> None:
    """A file of records; what a record leaves open is left out."""
    content = dataclasses.asdict(results)
    content["records"] = [
        {name: v for name, v in r.items() if v not in (None, "", {})} for r in content["records"]
    ]
    write_json(path, {name: value for name, value in content.items() if value or name == "records"})


def read(path: Path) -> Results:
    """A file of records. `InputError` if it is none."""
    if not path.is_file():
        raise InputError(f"{path} not found; make it with: pytest bench -s --record {path}")
    content = read_json(path)
    require(
        isinstance(content, dict) and "records" in content,
        f"{path} is not a file of records: pytest bench -s --record FILE writes one",
    )
    results: Results = typed(content, Results, str(path))
    return results


def recorded_files() -> tuple[Path, ...]:
    """The records kept with the project; those of fuzzing and soaking are of another kind."""
    return tuple(path for path in sorted(RESULTS.glob("*.json")) if "records" in read_json(path))


def _identity(record: Record) -> tuple[object, ...]:
    return record.what, record.case, record.form, record.sizes


class Recorder:
    """Takes records as they are found, and keeps a file of them; without a path it only takes them.

    One that tells more of what was recorded before takes its place.
    """

    def __init__(self, path: Path | None, commit: str = "") -> None:
        self.path, self.commit = path, commit
        self.results: Results | None = None

    def __call__(self, *records: Record) -> None:
        if self.path is None:
            return
        if self.results is None:
            self.results = here(self.commit)
        new = [_identity(record) for record in records]
        kept = [record for record in self.results.records if _identity(record) not in new]
        self.results = dataclasses.replace(self.results, records=(*kept, *records))
        write(self.path, self.results)
