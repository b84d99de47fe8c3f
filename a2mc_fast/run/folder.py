"""The folder of a run: found, locked, and looked at under the lock. README.md says what it holds."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from a2mc_fast.config import Config, differences, read_settings
from a2mc_fast.errors import InputError, require, tell
from a2mc_fast.run.checkpoint import FILE, Checkpoint, load_last_good

RUNS = Path("runs")
"""Where runs go that are not told where."""


@contextmanager
def open_folder(config: Config, resume: bool) -> Iterator[tuple[Path, Checkpoint | None]]:
    """The locked folder of a new run, or of the run to resume with its newest good checkpoint.

    A run is never written over: an explicit folder that holds one is refused, and runs/PRESET moves on to
    runs/PRESET-2, -3, ... A run that was killed before its first checkpoint begins again. `InputError` lists
    the fields in which a resumed run would differ; only its epochs may become more.
    """
    if resume:
        folder = Path(config.run.out) if config.run.out else unfinished(config.preset)
        held = _lock_and_look(folder, run=True)
    else:
        folder, held = _new(config)
    try:
        yield folder, _newest(folder, config) if resume else None
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing came of it
        os.close(held)


def _new(config: Config) -> tuple[Path, int]:
    """A folder without a run, and the lock on it."""
    if config.run.out:
        return Path(config.run.out), _lock_and_look(Path(config.run.out), run=False)
    base = RUNS / config.preset
    for folder in (base, *(Path(f"{base}-{number}") for number in range(2, 1000))):
        if not holds_run(folder):
            with suppress(InputError):  # another process was quicker
                return folder, _lock_and_look(folder, run=False)
    raise InputError(f"{base} and 998 more hold runs: choose another --run.out")


def _lock_and_look(folder: Path, *, run: bool) -> int:
    """Keep other processes out of a folder, which is made if need be, and look whether it holds a run.

    Returns the descriptor to close; a kill closes it too. `InputError` if another process is at work there,
    or if there is no run, or one, against what was expected.
    """
    wrong = f"{folder} already holds a run: continue it with --resume {folder}, or choose another --run.out"
    if run:
        wrong = f"{folder} holds no run to resume: start it without --resume"
        require(holds_run(folder), wrong)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise InputError(f"another process is at work in {folder}: wait for it, or end it") from None
    except OSError:  # some network file systems have no locks
        pass
    if holds_run(folder) != run:  # it has changed meanwhile
        os.close(held)
        raise InputError(wrong)
    return held


def unfinished(preset: str) -> Path:
    """The run of a preset in runs/ that began last of those without a result."""
    found = [
        path.parent
        for path in RUNS.glob("*/config.json")
        if not (path.parent / "result.json").exists() and _preset(path) == preset
    ]
    require(
        bool(found),
        f"{RUNS}/ holds no unfinished run of {preset}: name the folder of a run, as in --resume "
        f"{RUNS / preset}, or start one without --resume",
    )
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime_ns)


def _preset(path: Path) -> str:
    """That of a config.json, empty if it cannot be read."""
    with suppress(InputError, OSError):
        return read_settings(path).preset
    return ""


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FILE, "config.json", "metrics.jsonl", "result.json"))


def stored(folder: Path) -> Config:
    """The settings with which a run last began."""
    require(holds_run(folder), f"{folder} holds no run to resume: start it without --resume")
    path = folder / "config.json"
    try:
        require(path.is_file(), f"{path} not found, and no checkpoint beside it: nothing to resume")
        return read_settings(path)
    except (InputError, OSError):
        checkpoint, _ = load_last_good(folder)
        if checkpoint is None:
            raise
        return checkpoint.config


def _newest(folder: Path, config: Config) -> Checkpoint | None:
    """The newest good checkpoint of a run that goes on with these settings, None if there is none yet."""
    checkpoint, damaged = load_last_good(folder)
    old = checkpoint.config if checkpoint else stored(folder)
    epochs = max(old.optim.epochs, config.optim.epochs)
    changed = differences(replace(old, optim=replace(old.optim, epochs=epochs)), config)
    require(
        not changed,
        f"{folder} was run with another configuration ({'; '.join(changed)}): "
        "resume it without these flags, or choose another --run.out",
    )
    if damaged or checkpoint is None:
        tell(damaged or f"{folder} holds no checkpoint yet: starting from the beginning")
    return checkpoint
