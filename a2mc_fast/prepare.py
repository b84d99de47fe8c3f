"""`python -m a2mc_fast.prepare SOURCE INPUT OUTPUT`: recordings or converted data sets into one packed file.

A recording that cannot be used is skipped and named in the report beside the output (OUTPUT with the suffix
.report.json). Without a single usable recording nothing is written.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

from a2mc_fast.errors import exit_on_error, one_line, require
from a2mc_fast.files import write_json

_LONGEST_COMMAND = 10_000  # characters

if TYPE_CHECKING:  # the readers import torch, for which --help does not wait
    from a2mc_fast.data import Clips
    from a2mc_fast.data.pack import Skip, Source


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Arguments of every source that is read from files."""

    input: Annotated[Positional[Path], arg(metavar="INPUT")]
    """What to read."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The packed file to write, e.g. ntu60.safetensors."""
    overwrite: bool = False
    """Replace OUTPUT if it exists."""
    workers: int = 0
    """Processes that read; 0 for one per core."""
    max_frames: int = 300
    """Longer clips are cut to this many frames."""

    def open(self) -> Source:
        """The recordings of `input`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Ntu60(Reading):
    """NTU RGB+D 60: INPUT is a folder of .skeleton files (NTU-120's own files in it are left out)."""

    exclude: Path | None = None
    """The published list of samples with missing skeletons, one name per line."""

    def open(self) -> Source:
        from a2mc_fast.data.ntu import open_ntu

        return open_ntu(self.input, "ntu60", self.exclude)


@dataclass(frozen=True, kw_only=True)
class Ntu120(Reading):
    """NTU RGB+D 120: INPUT is a folder of .skeleton files."""

    exclude: Path | None = None
    """The published list of samples with missing skeletons, one name per line."""

    def open(self) -> Source:
        from a2mc_fast.data.ntu import open_ntu

        return open_ntu(self.input, "ntu120", self.exclude)


@dataclass(frozen=True, kw_only=True)
class _Pku(Reading):
    skeletons: Path | None = None
    """Folder of skeleton files; by default the subfolder of INPUT called *skel*."""
    labels: Path | None = None
    """Folder of label files; by default the subfolder of INPUT called *label*."""
    xsub_file: Path | None = None
    """Official cross-subject split; by default looked for in INPUT."""
    xview_file: Path | None = None
    """Official cross-view split; by default looked for in INPUT."""

    def open(self) -> Source:
        from a2mc_fast.data.pku import open_pku

        return open_pku(
            self.input,
            "pku1" if isinstance(self, Pku1) else "pku2",
            skeletons=self.skeletons,
            labels=self.labels,
            splits={"xsub": self.xsub_file, "xview": self.xview_file},
        )


@dataclass(frozen=True, kw_only=True)
class Pku1(_Pku):
    """PKU-MMD part I: INPUT holds a folder of skeleton files, one of label files, and the split files."""


@dataclass(frozen=True, kw_only=True)
class Pku2(_Pku):
    """PKU-MMD part II: INPUT holds a folder of skeleton files and one of label files."""


@dataclass(frozen=True, kw_only=True)
class Agcn(Reading):
    """AGCN/ISC arrays: INPUT is a protocol folder with train_data_joint.npy, or the folder above several."""

    protocol: str = ""
    """Name of the protocol; by default that of its folder."""

    def open(self) -> Source:
        from a2mc_fast.data.agcn import open_agcn

        return open_agcn(self.input, self.protocol)


@dataclass(frozen=True, kw_only=True)
class Ctrgcn(Reading):
    """CTR-GCN: INPUT is an archive such as NTU60_CS.npz."""

    protocol: str = ""
    """Name of the protocol; by default told by the file's name."""

    def open(self) -> Source:
        from a2mc_fast.data.agcn import open_ctrgcn

        return open_ctrgcn(self.input, self.protocol)


@dataclass(frozen=True, kw_only=True)
class Pyskl(Reading):
    """PYSKL/MMAction2: INPUT is a pickle such as ntu60_3danno.pkl; nothing in it is executed."""

    def open(self) -> Source:
        from a2mc_fast.data.agcn import open_pyskl

        return open_pyskl(self.input)


@dataclass(frozen=True, kw_only=True)
class Npz(Reading):
    """Own data of any skeleton: INPUT is a clip archive (.npz)."""

    def open(self) -> Source:
        from a2mc_fast.data.agcn import open_npz

        return open_npz(self.input)


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """The built-in set of made-up actions."""

    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The packed file to write."""
    overwrite: bool = False
    """Replace OUTPUT if it exists."""
    clips: int = 2000
    """Number of clips."""
    seed: int = 0
    """Another seed gives other clips."""


Command = (
    Annotated[Ntu60, subcommand("ntu60")]
    | Annotated[Ntu120, subcommand("ntu120")]
    | Annotated[Pku1, subcommand("pku1")]
    | Annotated[Pku2, subcommand("pku2")]
    | Annotated[Agcn, subcommand("agcn")]
    | Annotated[Ctrgcn, subcommand("ctrgcn")]
    | Annotated[Pyskl, subcommand("pyskl")]
    | Annotated[Npz, subcommand("npz")]
    | Annotated[Synthetic, subcommand("synthetic")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ends the process with code 2 and one sentence on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted: Any = tyro.cli(
        Command,
        args=arguments,
        prog="python -m a2mc_fast.prepare",
        description="Turn recordings or a converted data set into one packed file.",
        config=(FlagCreatePairsOff,),
    )
    with exit_on_error():
        # a file's name may be no text, and the packed file's header is
        command = one_line(shlex.join(["python", "-m", "a2mc_fast.prepare", *arguments]), _LONGEST_COMMAND)
        prepare(wanted, command)


def prepare(wanted: Reading | Synthetic, command: str = "") -> None:
    """Read, pack, write the file and the report beside it, and print what was made.

    Raises `InputError` for input of another format, without a usable recording, or an output that exists.
    """
    output = wanted.output
    require(_is_text(output), f"{output} is not UTF-8, and a packed file's name must be; name another file")
    require(not output.is_dir(), f"{output} is a folder; name the file to write")
    require(output.suffix == ".safetensors", f"{output}: a packed file's name must end in .safetensors")
    require(wanted.overwrite or not output.exists(), f"{output} exists; replace it with --overwrite")
    start = time.perf_counter()
    if isinstance(wanted, Synthetic):
        from a2mc_fast.data.synthetic import synthetic_clips

        clips = synthetic_clips(clips=wanted.clips, seed=wanted.seed)
        clips.source, clips.command = "synthetic", command
        skipped: tuple[Skip, ...] = ()
        facts: dict[str, Any] = {"seed": wanted.seed}
        work = (wanted.clips, "clips")
    else:
        from a2mc_fast.data.pack import collect

        require(wanted.workers >= 0, f"--workers must not be negative, got {wanted.workers}")
        require(wanted.max_frames >= 1, f"--max-frames must be at least 1, got {wanted.max_frames}")
        source = wanted.open()
        made = collect(
            source,
            workers=wanted.workers or _cores(),
            limit=wanted.max_frames,
            folder=next(folder for folder in output.absolute().parents if folder.is_dir()),
            command=command,
            progress=True,
        )
        clips, skipped = made.clips, made.skipped
        facts = {
            "input": str(wanted.input),
            "shortened": made.shortened,
            "expected": dict(source.expected),
            "differences": _differences(source, clips),
            "notes": list(source.notes),
        }
        work = (source.total, source.unit)
    clips.save(output)
    seconds = time.perf_counter() - start
    report = {
        "source": clips.source,
        "command": command,
        "output": str(output),
        "seconds": round(seconds, 3),
        "clips": len(clips),
        "frames": len(clips.frames),
        "classes": clips.num_classes,
        "splits": _splits(clips),
        "repeated": _repeated(clips),
        **facts,
        "skipped": len(skipped),
        "reasons": dict(Counter(skip.reason for skip in skipped)),
        "skipped_recordings": [asdict(skip) for skip in skipped],
    }
    path = output.with_suffix(".report.json")
    write_json(path, report)
    _print(report, path, output.stat().st_size, f"{seconds:.1f} s, {work[0] / seconds:,.0f} {work[1]}/s")


def _print(report: Mapping[str, Any], path: Path, size: int, speed: str) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report["reasons"].items())
    rows = {
        "clips": f"{report['clips']:,}",
        "skipped": f"{report['skipped']:,}" + (f"  ({reasons})" if reasons else ""),
        "frames": f"{report['frames']:,}",
        "classes": f"{report['classes']:,}",
        **{name: f"{n['train']:,} train, {n['test']:,} test" for name, n in report["splits"].items()},
        "file": f"{report['output']}, {size / 1e6:,.1f} MB",
        "report": str(path),
        "time": speed,
    }
    for name, value in rows.items():
        print(one_line(f"{name:<10}{value}"))
    for sentence in (*report.get("differences", ()), *report.get("notes", ())):
        print(one_line(sentence))
    for name, count in report["repeated"].items():
        tested = report["splits"][name]["test"]
        print(one_line(f"{name}: {count:,} of {tested:,} test clips equal a training clip, bit for bit"))
    if report.get("shortened"):
        print(f"{report['shortened']:,} clips were cut to the frame limit")


def _splits(clips: Clips) -> dict[str, dict[str, int]]:
    """Number of training and test clips of each protocol."""
    return {
        name: {"train": int(mask.sum()), "test": int((~mask).sum())} for name, mask in clips.splits.items()
    }


def _repeated(clips: Clips) -> dict[str, int]:
    """Test clips that equal a training clip bit for bit, for each protocol that has any."""
    import numpy as np

    ends = clips.lengths.cumsum(0).tolist()
    recordings = np.split(clips.frames.numpy(), ends[:-1])
    digests = [hashlib.blake2b(recording.tobytes(), digest_size=16).digest() for recording in recordings]
    found = {}
    for name in clips.splits:
        train, test = clips.split(name)
        known = {digests[i] for i in train.tolist()}
        found[name] = sum(digests[i] in known for i in test.tolist())
    return {name: count for name, count in found.items() if count}


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


def _is_text(path: Path) -> bool:
    """Whether the path's bytes are UTF-8, which safetensors needs to read it again."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
