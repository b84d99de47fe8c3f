"""Training runs in processes of their own, started fast, and sabotaged where a test says so.

A fork server imports the package once; every run is a fork of it. A trick is a function that runs in the new
process before the command line does.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from a2mc_fast import train
from a2mc_fast.run import checkpoint, machine, metrics, saver
from a2mc_fast.run import log as runlog
from a2mc_fast.run import start as beginning
from a2mc_fast.trainer import Trainer

_server = multiprocessing.get_context("forkserver")
# an optimizer imports the last one
_server.set_forkserver_preload([__name__, "a2mc_fast.trainer", "torch._dynamo"])
CLOCK = {"seconds", "clips_per_second", "memory_bytes", "peak_memory_bytes"}


def start(args: list[str], output: Path, trick: str = "", count: int = 0) -> BaseProcess:
    """Begin a run; what it prints goes to `output`."""
    process = _server.Process(target=_main, args=(args, str(output), trick, count))
    process.start()
    return process


def run(args: list[str], output: Path, trick: str = "", count: int = 0) -> tuple[int, str]:
    """A whole run. -> exit code (minus the signal that killed it), what it printed"""
    process = start(args, output, trick, count)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode, output.read_text()


def wait_for(path: Path, lines: int) -> None:
    """Until a file has that many lines."""
    for _ in range(12000):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} does not grow")


def _main(args: list[str], output: str, trick: str, count: int) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    # a shell's background jobs are born with SIGINT ignored, and hand that down
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # the source's commit takes a process to find out, and is the same for all
    machine._commit = lambda: ""
    if trick:
        TRICKS[trick](count)
    try:
        train.main(args)
    finally:
        os.seteuid(os.getuid())  # a trick may have given it up


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(owner: Any, name: str, number: int, then: Callable[..., Any], after: bool = False) -> None:
    """Replace the given call of a function, counted from one, or do something after it."""
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            return then(*args, **options)
        result = real(*args, **options)
        if calls == number:
            then(*args, **options)
        return result

    setattr(owner, name, wrapped)


def _die_in_a_metrics_line(number: int) -> None:
    def half(file: metrics.MetricsFile, line: bytes) -> None:
        os.write(file._file.fileno(), line[: len(line) // 2])
        _die()

    _at_call(metrics.MetricsFile, "_append", number, half)


def _half_written(path: Path, saved: checkpoint.Checkpoint) -> None:
    checkpoint.write_content(path, saved)
    os.truncate(path, path.stat().st_size // 2)


def _die_in_a_save(number: int) -> None:
    def half(path: Path, saved: checkpoint.Checkpoint) -> None:
        _half_written(path, saved)
        _die()

    _at_call(saver, "write_content", number, half)


def _full_disk(number: int) -> None:
    """Every save from the given one on, or for a negative number only that one, finds the disk full."""
    calls = 0
    real = saver.write_content

    def full(path: Path, saved: checkpoint.Checkpoint) -> None:
        nonlocal calls
        calls += 1
        if calls == -number or 0 < number <= calls:
            _half_written(path, saved)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, saved)

    saver.write_content = full  # type: ignore[assignment]


def _file_limit(bytes_: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


def _read_only_from(number: int) -> None:
    """The folder cannot be written from a save on; root gives up its right to write it all the same."""

    def close(self: saver.Saver, *_: object, **__: object) -> None:
        self.wait()
        self.folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)

    _at_call(saver.Saver, "save", number, close, after=True)


def _read_only_before(_: int) -> None:
    """The folder above the run's cannot be written when the run wants to begin."""

    def close(config: Any, *_: object) -> None:
        Path(config.run.out).parent.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)

    _at_call(beginning, "load_clips", 1, close, after=True)


def _nobody_reads(full: int) -> None:
    """Both streams lead to a pipe whose reader is gone, or to a full disk."""
    reader, end = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY) if full else end, stream)
    # as they would be from the start
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115


def _slow_step(number: int) -> None:
    _at_call(Trainer, "step", number, lambda *_: time.sleep(60))


def _out_of_memory(number: int) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    _at_call(Trainer, "step", number, full)


TRICKS: dict[str, Callable[[int], None]] = {
    "config written": lambda n: _at_call(runlog, "write_json", n, _die, after=True),
    "in a metrics line": _die_in_a_metrics_line,
    "before a save": lambda n: _at_call(saver.Saver, "save", n, _die),
    "in a save": _die_in_a_save,
    "between link and rename": lambda n: _at_call(saver.Saver, "_set_newest_aside", n, _die, after=True),
    "between rename and pruning": lambda n: _at_call(saver.Saver, "_prune", n, _die),
    "before the result": lambda n: _at_call(beginning, "outcome", n, _die),
    "full disk": _full_disk,
    "file limit": _file_limit,
    "read-only from": _read_only_from,
    "read-only before": _read_only_before,
    "nobody reads": _nobody_reads,
    "slow step": _slow_step,
    "out of memory": _out_of_memory,
}


def assert_same_end(whole: Path, other: Path) -> None:
    """Two runs ended alike: every tensor's bits, header, metrics and result; the clock's numbers aside."""
    tensors = [load_file(folder / checkpoint.FILE) for folder in (whole, other)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    headers = [_header(folder) for folder in (whole, other)]
    assert headers[0] == headers[1]
    lines = [[_timeless(json.loads(line)) for line in _metrics(folder)] for folder in (whole, other)]
    assert lines[0] == lines[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, other)]
    assert _timeless(results[0]) == _timeless(results[1])
    assert not list(other.glob(".*.tmp")), "something is left of a killed process"


def _metrics(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CLOCK}


def _header(folder: Path) -> dict[str, Any]:
    with safe_open(folder / checkpoint.FILE, framework="pt") as file:
        text = file.metadata()
    header = {name: json.loads(value) for name, value in text.items() if name != "checksum"}
    header["config"].pop("run")
    header["progress"].pop("seconds")
    return header
