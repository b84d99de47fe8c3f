"""The folder of a run.

It holds `config.json`, `metrics.jsonl` (one object per log line), `checkpoint.safetensors` and older ones,
and, when the run has ended, `result.json`.
"""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path

from a2mc_fast.config import Config, differences, from_dict
from a2mc_fast.errors import InputError, require, tell
from a2mc_fast.files import read_json
from a2mc_fast.run.checkpoint import FILE, Checkpoint, load_last_good


def open_folder(config: Config, resume: bool) -> tuple[Path, Checkpoint | None]:
    """The folder of a new run, or of the run to resume with its newest good checkpoint.

    A run is never written over: an explicit folder that holds one is refused, and runs/PRESET moves on to
    runs/PRESET-2, -3, ... A run that was killed before its first checkpoint begins again. `InputError` lists
    the fields in which a resumed run would differ.
    """
    base = Path(config.run.out or f"runs/{config.preset}")
    numbered = [] if config.run.out else [Path(f"{base}-{number}") for number in range(2, 1000)]
    taken = list(itertools.takewhile(_holds_run, [base, *numbered]))
    if not resume:
        require(
            len(taken) <= len(numbered),
            f"{base} already holds a run: continue it with --resume, or choose another --run.out",
        )
        return [base, *numbered][len(taken)], None
    require(bool(taken), f"{base} holds no run to resume: start it without --resume")
    folder = taken[-1]
    checkpoint, damaged = load_last_good(folder)
    changed = differences(checkpoint.config if checkpoint else _started_with(folder), config)
    require(
        not changed,
        f"{folder} was run with another configuration ({'; '.join(changed)}): "
        "resume it with the same flags, or choose another --run.out",
    )
    if damaged or checkpoint is None:
        tell(damaged or f"{folder} holds no checkpoint yet: starting from the beginning")
    return folder, checkpoint


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FILE, "config.json", "metrics.jsonl", "result.json"))


def _started_with(folder: Path) -> Config:
    """The configuration that a run without a checkpoint wrote down."""
    path = folder / "config.json"
    require(path.exists(), f"{folder} holds neither checkpoint nor config.json: nothing to resume")
    content = read_json(path)
    if isinstance(content, dict):
        content.pop("machine", None)
    config: Config = from_dict(content, where=str(path))
    return config


def lock(folder: Path) -> int:
    """Keep other processes out of a run's folder. Returns the descriptor to close; a kill closes it too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"another process is at work in {folder}: wait for it, or end it") from None
    except OSError:  # some network file systems have no locks
        pass
    return descriptor
