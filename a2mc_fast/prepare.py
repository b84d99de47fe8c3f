"""`python -m a2mc_fast.prepare SOURCE INPUT OUTPUT`: recordings or a converted set into one file."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from a2mc_fast.errors import Count, Range, Share, check_ranges, exit_on_error, one_line, tell

_LONGEST_COMMAND = 10_000  # characters

if TYPE_CHECKING:
    from a2mc_fast.data.source import Source
    from a2mc_fast.skeleton import Rotation


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Arguments of every source that is read from files."""

    input: Annotated[Positional[Path], arg(metavar="INPUT")]
    """What to read."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The packed file to write, e.g. ntu60.safetensors."""
    overwrite: bool = False
    """Replace OUTPUT if it exists."""
    workers: Annotated[int, Range("[0, 1000]")] = 0
    """Processes that read; 0 for one per core."""
    max_frames: Count = 300
    """Longer clips are cut to this many frames."""
    persons: Annotated[int, Range("[0, 64]")] = 0
    """Persons of every clip: of more those that move most are kept; 0 for as many as the source has."""
    scale: Annotated[float, Range("[1e-9, 1e9]")] = 1.0
    """Coordinates times this are metres: 0.001 for millimetres."""
    confidence: Share = 0.3
    """Joints below it, of those that have one, are missing."""
    nan_is_missing: bool = False
    """A joint that is not a number is missing, instead of losing its clip."""
    rotation: Literal["first-frame", "none"] = "first-frame"
    """Turn each clip by the axes of its first frame, or leave it as it stands; flat clips (z = 0) stay."""
    allow_skipped: bool = False
    """Write the file even if most recordings cannot be used."""


@dataclass(frozen=True, kw_only=True)
class _Ntu(Reading):
    exclude: Path | None = None
    """The published list of samples with missing skeletons, one name per line."""


class Ntu60(_Ntu):
    """NTU RGB+D 60: INPUT is a folder of .skeleton files (NTU-120's own files in it are left out)."""


class Ntu120(_Ntu):
    """NTU RGB+D 120: INPUT is a folder of .skeleton files."""


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


class Pku1(_Pku):
    """PKU-MMD part I: INPUT holds a folder of skeleton files, one of label files, and the split files."""


class Pku2(_Pku):
    """PKU-MMD part II: INPUT holds a folder of skeleton files and one of label files."""


@dataclass(frozen=True, kw_only=True)
class Agcn(Reading):
    """AGCN/ISC arrays: INPUT is a protocol folder with train_data_joint.npy, or the folder above several."""

    protocol: str = ""
    """Name of the protocol; by default that of its folder."""


@dataclass(frozen=True, kw_only=True)
class Ctrgcn(Reading):
    """CTR-GCN: INPUT is an archive such as NTU60_CS.npz."""

    protocol: str = ""
    """Name of the protocol; by default told by the file's name."""


@dataclass(frozen=True, kw_only=True)
class _Named(Reading):
    skeleton: str = ""
    """A built-in skeleton (ntu25, coco17, openpose18, openpose25, halpe26, h36m17, mediapipe33, hand21); by
    default the one that INPUT tells."""


class Pyskl(_Named):
    """PYSKL/MMAction2, 3-D or 2-D: INPUT is a pickle such as ntu60_hrnet.pkl; nothing in it is executed."""


class Npz(_Named):
    """Own data of any skeleton, 3-D or 2-D: INPUT is a clip archive (.npz)."""


class Openpose(_Named):
    """OpenPose: INPUT is a folder of frames (JSON), or of such folders, [train|val/][CLASS/]RECORDING."""


class Csv(_Named):
    """Tables, 3-D or 2-D: INPUT is a .csv file, or a folder of them, [train|val/][CLASS/]RECORDING.csv."""


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


Command = Ntu60 | Ntu120 | Pku1 | Pku2 | Agcn | Ctrgcn | Pyskl | Npz | Openpose | Csv | Synthetic
"""A subcommand is called after its class."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ends the process with code 2 and one sentence on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with exit_on_error():
        wanted: Any = tyro.cli(
            Command,
            args=arguments,
            prog="python -m a2mc_fast.prepare",
            description="Turn recordings or a converted data set into one packed file.",
            config=(FlagCreatePairsOff,),
        )
        # a file's name may be no text, and the packed file's header is
        command = one_line(shlex.join(["python", "-m", "a2mc_fast.prepare", *arguments]), _LONGEST_COMMAND)
        prepare(wanted, command)


def prepare(wanted: Reading | Synthetic, command: str = "") -> None:
    """Read, pack, write the file and the report beside it, and print what was made.

    `InputError` for input of another format, without a usable recording, or an output that exists.
    """
    # these need torch, for which --help does not wait
    from a2mc_fast.data import pack, preparation

    check_ranges(wanted)
    started = time.perf_counter()
    preparation.check_output(wanted.output, overwrite=wanted.overwrite)
    if isinstance(wanted, Synthetic):
        packed = preparation.pack_synthetic(wanted.clips, wanted.seed, command)
    else:
        source = _open(wanted)
        rotation: Rotation = "none" if wanted.rotation == "none" else "first frame"
        skeleton = replace(source.skeleton, rotation=rotation, max_frames=wanted.max_frames)
        packed = preparation.pack_source(
            replace(source, skeleton=skeleton),
            wanted.input,
            wanted.output,
            pack.Handling(wanted.scale, wanted.persons, wanted.confidence, wanted.nan_is_missing),
            workers=wanted.workers,
            allow_skipped=wanted.allow_skipped,
            command=command,
        )
    report, path = preparation.write(packed, wanted.output, started)
    speed = f"{report['seconds']:.1f} s, {packed.total / max(report['seconds'], 1e-3):,.0f} {packed.unit}/s"
    _print(report, path, wanted.output.stat().st_size, speed)


def _open(wanted: Reading) -> Source:
    """What the input holds."""
    from a2mc_fast.data import agcn, ctrgcn, npz, ntu, openpose, pku, pyskl, table  # as above

    match wanted:
        case _Ntu():
            return ntu.open_ntu(
                wanted.input, "ntu60" if isinstance(wanted, Ntu60) else "ntu120", wanted.exclude
            )
        case _Pku():
            part: pku.Part = "pku1" if isinstance(wanted, Pku1) else "pku2"
            splits = {"xsub": wanted.xsub_file, "xview": wanted.xview_file}
            folders = {"skeletons": wanted.skeletons, "labels": wanted.labels}
            return pku.open_pku(wanted.input, part, **folders, splits=splits)
        case Agcn():
            return agcn.open_agcn(wanted.input, wanted.protocol)
        case Ctrgcn():
            return ctrgcn.open_ctrgcn(wanted.input, wanted.protocol)
        case Pyskl():
            return pyskl.open_pyskl(wanted.input, wanted.skeleton)
        case Npz():
            return npz.open_npz(wanted.input, wanted.skeleton)
        case Openpose():
            return openpose.open_openpose(wanted.input, wanted.skeleton)
        case Csv():
            return table.open_table(wanted.input, wanted.skeleton)
    raise TypeError(f"no source: {type(wanted).__name__}")


def _print(report: Mapping[str, Any], path: Path, size: int, speed: str) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report["reasons"].items())
    rows = {
        "clips": f"{report['clips']:,}",
        "skipped": f"{report['skipped']:,}" + (f"  ({reasons})" if reasons else ""),
        "frames": f"{report['frames']:,}",
        "classes": f"{report['classes']:,}",
        **{name: f"{n['train']:,} train, {n['test']:,} test" for name, n in report["splits"].items()},
        "bodies": f"{report['median_body']:g} m, bones {report['median_bone']:g} m (median)",
        "file": f"{report['output']}, {size / 1e6:,.1f} MB",
        "report": str(path),
        "time": speed,
    }
    lines = [f"{name:<10}{value}" for name, value in rows.items()]
    lines += (*report.get("differences", ()), *report.get("notes", ()))
    for name, count in report["repeated"].items():
        tested = report["splits"][name]["test"]
        lines.append(f"{name}: {count:,} of {tested:,} test clips equal a training clip, bit for bit")
    for what, remark in report.get("remarks", {}).items():
        lines.append(f"{remark['clips']:,} clips, {remark['frames']:,} frames: {what}")
    if report["doubt"]:
        lines.append(report["doubt"])
    if report.get("shortened"):
        lines.append(f"{report['shortened']:,} clips were cut to the frame limit")
    for line in lines:
        tell(one_line(line))


if __name__ == "__main__":
    main()
