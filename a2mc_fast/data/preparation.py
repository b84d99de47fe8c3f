"""A packed file and the report beside it: what `python -m a2mc_fast.prepare` does once it knows what to read.

A recording that cannot be used is skipped and named in the report (the output with the suffix .report.json).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from a2mc_fast.data.clips import Clips
from a2mc_fast.data.identity import copies
from a2mc_fast.data.pack import Handling, collect, most_frequent
from a2mc_fast.data.rules import Reason
from a2mc_fast.data.source import Skip, Source
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.data.units import doubt, measure
from a2mc_fast.errors import InputError, require
from a2mc_fast.files import write_json

_NO_SPLIT = (
    "no split says which clips are for training: the set can be embedded, but not trained on; give one (npz: "
    "split_NAME, pyskl: 'split', openpose and csv: folders called train and val)"
)
_NO_FAULT: tuple[Reason, ...] = ("excluded by the list", "listed twice")  # says nothing against the rest


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Clips ready to be written, how much was read, and what else is to be reported of it."""

    clips: Clips
    total: int
    unit: str
    skipped: tuple[Skip, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise `InputError` unless a packed file may be written there."""
    require(not path.is_dir(), f"{path} is a folder; name the file to write")
    require(path.suffix == ".safetensors", f"{path}: a packed file's name must end in .safetensors")
    require(overwrite or not path.exists(), f"{path} exists; replace it with --overwrite")


def pack_synthetic(clips: int, seed: int, command: str) -> Packed:
    """The built-in set."""
    made = synthetic_clips(clips=clips, seed=seed)
    made.source, made.command = "synthetic", command
    return Packed(clips=made, total=clips, unit="clips", facts={"seed": seed})


def pack_source(
    source: Source,
    where: Path,
    output: Path,
    handling: Handling,
    *,
    workers: int,
    allow_skipped: bool,
    command: str,
) -> Packed:
    """The usable recordings of a source, which was opened at `where`. Workers 0: one per core.

    Frames wait in the folder of `output`. Raises `InputError` without a usable recording, and if most are
    not, unless that is allowed.
    """
    # those that this process may use
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    made = collect(
        source,
        handling,
        workers=workers or cores,
        folder=next(folder for folder in output.absolute().parents if folder.is_dir()),
        command=command,
        progress=True,
    )
    refused = [skip for skip in made.skipped if skip.reason not in _NO_FAULT]
    if len(refused) > len(made.clips) and not allow_skipped:
        raise InputError(
            f"{source.name}: {len(refused):,} of {len(refused) + len(made.clips):,} recordings cannot be "
            f"used, such as {most_frequent(refused)}; --allow-skipped packs the others"
        )
    facts = {
        "input": str(where),
        **asdict(handling),
        "shortened": made.shortened,
        "remarks": {what: asdict(remark) for what, remark in made.remarks.items()},
        "expected": dict(source.expected),
        "differences": _differences(source, made.clips),
        "notes": [*source.notes, *([] if made.clips.splits else [_NO_SPLIT])],
    }
    return Packed(clips=made.clips, total=source.total, unit=source.unit, skipped=made.skipped, facts=facts)


def write(packed: Packed, output: Path, started: float) -> tuple[dict[str, Any], Path]:
    """Write the packed file and its report. -> the report, and its path.

    `started` is what time.perf_counter() said before anything was read.
    """
    clips, skipped = packed.clips, packed.skipped
    clips.save(output)
    sizes = measure(clips)
    # test clips that equal a training clip bit for bit
    repeated = {
        name: int(copies(clips.frames, clips.lengths, *clips.split(name)).sum()) for name in clips.splits
    }
    report = {
        "source": clips.source,
        "command": clips.command,
        "output": str(output),
        "seconds": round(time.perf_counter() - started, 3),
        "clips": len(clips),
        "frames": len(clips.frames),
        "classes": clips.num_classes,
        "splits": _splits(clips),
        "repeated": {name: count for name, count in repeated.items() if count},
        "rotation": clips.skeleton.rotation,
        "median_bone": float(f"{sizes.bone:.3g}"),
        "median_body": float(f"{sizes.body:.3g}"),
        "doubt": doubt(sizes),
        **packed.facts,
        "skipped": len(skipped),
        "reasons": dict(Counter(skip.reason for skip in skipped)),
        "skipped_recordings": [asdict(skip) for skip in skipped],
    }
    path = output.with_suffix(".report.json")
    write_json(path, report)
    return report, path


def _splits(clips: Clips) -> dict[str, dict[str, int]]:
    """Number of training and test clips of each protocol."""
    return {
        name: {"train": int(mask.sum()), "test": int((~mask).sum())} for name, mask in clips.splits.items()
    }


def _differences(source: Source, clips: Clips) -> list[str]:
    """How the counts differ from the published ones, one sentence each."""
    found = {source.unit: source.total + len(source.skipped), "clips": len(clips)}
    for name, sizes in _splits(clips).items():
        found |= {f"{name} {part}": size for part, size in sizes.items()}
    return [
        f"{source.name}: {count:,} {what} expected, {found.get(what, 0):,} found"
        for what, count in source.expected.items()
        if found.get(what, 0) != count
    ]
