"""Runs parts of a measurement, each as a process of its own with a time limit, under one deadline.

What is timed runs alone. So that the time before it is not lost, timed parts may start beside others, import
and compile, and wait for their turn (`wait_for_turn`). A part that fails or hangs is ended and leaves its
last lines (a hanging Python also says where it hangs), the rest goes on. Whatever parts record is gathered
into one file as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from a2mc_fast.errors import InputError
from a2mc_fast.files import atomic_path
from bench.records import Outcome, Record, Results, read, write

ROOT = Path(__file__).parent.parent
PASSED, FAILED, LATE, NOT_RUN = "passed", "failed", "out of time", "not run"
_LOG_HEAD, _LOG_TAIL = 20_000, 200_000  # bytes kept of each part's output
_LAST_LINES = 12
TURN = "BENCH_TURN"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command. {record} in it becomes the file that its records go to."""

    name: str
    command: tuple[str, ...]
    """Arguments of this Python."""
    seconds: float
    """It is ended after so many, and not begun when less than a third of them is left."""
    alone: bool = True
    """Whether nothing may run beside it, as for everything that is timed."""
    waits: bool = False
    """Whether it starts beside others and calls `wait_for_turn` before it measures."""
    prepares: bool = False
    """It only fills caches for others: how it ends is told and counts for nothing."""


@dataclass(kw_only=True)
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    log: IO[bytes]
    records: Path

    @property
    def ready(self) -> bool:
        """Whether it waits for its turn."""
        return _ready(self.records).exists()


class Runner:
    """First, side by side, the parts before the first timed one and all that wait for their turn; then the
    timed ones, each alone; then what is left, side by side."""

    def __init__(
        self,
        out: Path,
        work: Path,
        start: Results,
        deadline: float,
        environment: dict[str, str],
        at_once: int,
    ) -> None:
        """Results go to `out`, everything else to `work`; `deadline` is a time of `time.monotonic`."""
        self.out, self.work, self.deadline = out, work, deadline
        self.environment, self.at_once = environment, at_once
        self.results, self.outcomes = start, dict[str, Outcome]()
        self._order: list[Part] = []
        self._alive: list[_Running] = []
        self._seen: dict[str, int] = {}
        self._logs: dict[str, bytes] = {}

    def run(self, parts: Iterable[Part], beside_until: float) -> None:
        """All of it; the first stage lasts no longer than to the time `beside_until`."""
        self._order = list(parts)
        timed = [part for part in self._order if part.alone]
        before = list(itertools.takewhile(lambda part: not part.alone, self._order))
        after = [part for part in self._order if not part.alone and part not in before]
        try:
            self._beside([*before, *(part for part in timed if part.waits)], beside_until)
            for part in timed:
                self._alone(part)
            self._beside(after, self.deadline)
        finally:
            for one in self._alive:
                _kill(one.process)

    def _beside(self, parts: list[Part], until: float) -> None:
        """Side by side, until each has ended or waits for its turn."""
        until = min(until, self.deadline)
        while parts or any(not one.ready for one in self._alive):
            left = until - time.monotonic()
            while parts and sum(not one.ready for one in self._alive) < self.at_once:
                part = parts.pop(0)
                if left >= part.seconds / 3:
                    self._start(part, until)
                elif not part.waits:  # those that do will start in their turn
                    self._ended(part, NOT_RUN, 0.0, "no time left for it", b"")
            self._look()
            if left <= 0:
                break
        for one in self._alive:
            if not one.ready:  # it goes on when nobody measures beside it
                os.killpg(one.process.pid, signal.SIGSTOP)

    def _alone(self, part: Part) -> None:
        """One timed part, whether it waits or has not begun."""
        _go(self._records(part)).touch()
        one = next((one for one in self._alive if one.part is part), None)
        now = time.monotonic()
        if part.name in self.outcomes:  # it failed before its turn came
            return
        if self.deadline - now < part.seconds / 3:
            if one is not None:
                self._alive.remove(one)
                _kill(one.process)
                one.log.close()
            self._ended(part, NOT_RUN, 0.0, "no time left for it", b"")
            return
        if one is None:
            one = self._start(part, self.deadline)
        os.killpg(one.process.pid, signal.SIGCONT)
        one.began, one.limit = now, min(now + part.seconds, self.deadline)
        while one in self._alive:
            self._look()

    def _look(self) -> None:
        """See which parts have ended, and take what they recorded. Those whose turn is to come may wait."""
        for one in list(self._alive):
            if self._look_at(one, one.part.waits and not _go(one.records).exists()):
                self._alive.remove(one)
        self._gather()
        time.sleep(0.02)

    def _start(self, part: Part, until: float) -> _Running:
        records = self._records(part)
        command = [sys.executable, *(word.replace("{record}", str(records)) for word in part.command)]
        log = (self.work / f"{_file_name(part)}.log").open("w+b")
        print(f"{part.name} ...", flush=True)
        # a group of its own, so that what a part has started ends with it
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **self.environment, **({TURN: str(records)} if part.waits else {})},
            process_group=0,
        )
        began = time.monotonic()
        limit = min(began + part.seconds, until)
        one = _Running(part=part, process=process, began=began, limit=limit, log=log, records=records)
        self._alive.append(one)
        return one

    def _look_at(self, one: _Running, patient: bool) -> bool:
        """Whether a running part has ended, or was ended here because its time is up."""
        code, now = one.process.poll(), time.monotonic()
        if code is None and (patient or now < one.limit):
            return False
        if code is None:
            _kill(one.process)
        one.log.seek(0)
        said = one.log.read()
        one.log.close()
        # what it left running would disturb the next part
        _kill(one.process)
        outcome = LATE if code is None else FAILED if code else PASSED
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        note = "\n".join(lines[-1:] if outcome == PASSED else lines[-_LAST_LINES:])
        if outcome == LATE:
            note += f"\n(ended after {now - one.began:.0f} s)"
        if outcome == FAILED:
            note += f"\n(exit code {code})"
        try:
            self._recorded(one.part)
        except InputError as error:
            outcome, note = FAILED, f"{note}\n{error}"
        self._ended(one.part, outcome, now - one.began, note, said)
        return True

    def _ended(self, part: Part, outcome: str, seconds: float, note: str, said: bytes) -> None:
        print(f"{part.name}: {outcome} after {seconds:.1f} s", flush=True)
        self.outcomes[part.name] = Outcome(part=part.name, outcome=outcome, seconds=seconds, note=note)
        if len(said) > _LOG_HEAD + _LOG_TAIL:
            said = said[:_LOG_HEAD] + b"\n[...]\n" + said[-_LOG_TAIL:]
        title = f"\n=== {part.name}: {outcome} after {seconds:.1f} s\n$ python {' '.join(part.command)}\n"
        self._logs[part.name] = title.encode() + said
        with atomic_path(self.out / "logs.txt") as temporary:
            temporary.write_bytes(b"".join(self._logs.values()))
        self._gather(ended=True)

    def _gather(self, ended: bool = False) -> None:
        """Write all records and outcomes so far, if there are new ones."""
        paths = [path for part in self._order if (path := self._records(part)).exists()]
        seen = {str(path): path.stat().st_mtime_ns for path in paths}
        if seen == self._seen and not ended:
            return
        records: list[Record] = []
        for part in self._order:
            try:
                records += self._recorded(part)
            except InputError:  # a part may be writing it, and has failed if it ends like this
                seen = {}
        self._seen = seen
        told = tuple(self.outcomes[part.name] for part in self._order if part.name in self.outcomes)
        self.results = dataclasses.replace(self.results, records=tuple(records), parts=told)
        write(self.out / "gpu.json", self.results)

    def _recorded(self, part: Part) -> tuple[Record, ...]:
        """What a part has recorded so far. `InputError` if its file is damaged."""
        path = self._records(part)
        return read(path).records if path.exists() else ()

    def _records(self, part: Part) -> Path:
        return self.work / f"{_file_name(part)}.json"


def wait_for_turn() -> None:
    """In a part that waits: returns when it is its turn to measure. Anywhere else: at once."""
    if TURN in os.environ:
        records = Path(os.environ[TURN])
        _ready(records).touch()
        while not _go(records).exists():
            time.sleep(0.02)


def _ready(records: Path) -> Path:
    return records.with_suffix(".ready")


def _go(records: Path) -> Path:
    return records.with_suffix(".go")


def _file_name(part: Part) -> str:
    return "".join(c if c.isalnum() else "-" for c in part.name)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: first so that Python tells where it is, then for certain."""
    for kind, patience in ((signal.SIGCONT, 0.0), (signal.SIGABRT, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:  # a process inside a broken driver does not end at all
            continue
