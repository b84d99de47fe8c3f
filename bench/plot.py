"""The speed figure: `python -m bench.plot [RESULTS.json ...] --out speed.png`, from recorded runs.

It draws typed records (`bench/records.py`): what was timed in several forms at several sizes as time over K,
over N and over the number of mixing shares; steps with their phases as stacked bars; and what was done in
several forms at one size as how many times as much each takes as ours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import tyro

from a2mc_fast.errors import exit_on_error, require
from a2mc_fast.plots.output import write_picture
from bench.records import RESULTS, Record, read, recorded_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = ("views", "attack", "key", "query", "loss", "backward", "optimizer", "bank")
_FORMS = {
    "ours": "ours",
    "eager": "eager torch",
    "compiled": "torch.compile of whole logits",
    "literal": "literal, mixed banks stored",
    "cudnn": "cuDNN",
    "resident": "all time steps in one launch",
}
_AXES = {"K": "bank rows K", "N": "clips per step N", "mix": "mixing shares"}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as much as ours another form takes."""

    name: str
    times: float


def subjects(records: tuple[Record, ...]) -> dict[str, list[Record]]:
    """Those that have several forms of what they measure, by it: no steps, which have a picture of their own,
    and no launch sizes, which are for whoever tunes them."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if not record.phases and not record.what.startswith("launch sizes"):
            found.setdefault(record.subject, []).append(record)
    return {name: some for name, some in found.items() if len({r.form for r in some}) > 1}


def sweeps(records: tuple[Record, ...]) -> dict[str, dict[str, list[Record]]]:
    """What was timed along an axis: by subject, by axis."""
    found = {name: {axis: varied(some, axis) for axis in _AXES} for name, some in subjects(records).items()}
    return {name: axes for name, axes in found.items() if any(axes.values())}


def varied(records: list[Record], axis: str) -> list[Record]:
    """The timed records that differ along one axis alone, in its order; the commonest value of the others."""
    timed = [r for r in records if r.ms is not None and axis in r.sizes]
    if not timed:
        return []
    common = {name: Counter(r.sizes.get(name) for r in timed).most_common(1)[0][0] for name in timed[0].sizes}
    along = [r for r in timed if all(r.sizes.get(n) == v for n, v in common.items() if n != axis)]
    return sorted(along, key=lambda r: r.sizes[axis]) if len({r.sizes[axis] for r in along}) > 1 else []


def ratios(records: tuple[Record, ...]) -> list[Ratio]:
    """Every comparison of two ways to the same result at one size, the largest first."""
    drawn, result = sweeps(records), []
    for name, some in subjects(records).items():
        forms = {r.form: r for r in some}
        if name not in drawn and (ours := forms.pop("ours", None)):
            result += [
                Ratio(name=f"{name}: {_FORMS.get(form, form)}", times=_times(ours, r))
                for form, r in forms.items()
            ]
    return sorted(result, key=lambda ratio: -ratio.times)


def _times(ours: Record, theirs: Record) -> float:
    """By rate, since two ways may have handled different amounts; where there is none by time, or memory."""
    if ours.per_second and theirs.per_second:
        return ours.per_second / theirs.per_second
    for mine, other in ((ours.ms, theirs.ms), (ours.MiB, theirs.MiB)):
        if mine and other:
            return other / mine
    require(False, f"records of {ours.subject!r} have nothing in common to compare")
    raise AssertionError


def speed(paths: tuple[Path, ...]) -> Figure:
    """One figure of all files: sweeps, steps by phase, comparisons; a caption names the machines."""
    from a2mc_fast.plots import style

    paths = paths or recorded_files()
    recorded = {path: read(path) for path in paths}
    curves = [(path, *sweep) for path, one in recorded.items() for sweep in sweeps(one.records).items()]
    stepped = {path: [r for r in one.records if r.phases] for path, one in recorded.items()}
    stepped = {path: some for path, some in stepped.items() if some}
    compared = {path: found for path, one in recorded.items() if (found := ratios(one.records))}
    require(
        bool(curves or stepped or compared),
        f"{', '.join(map(str, paths)) or RESULTS} holds nothing to draw: record a run with "
        "pytest bench -s --record bench/results/NAME.json",
    )

    heights = [2.25] * len(curves)
    heights += [1.0 + 0.35 * sum(map(len, stepped.values()))] if stepped else []
    heights += [0.6 + 0.2 * len(found) for found in compared.values()]
    picture = style.figure(sum(heights) + 0.15 * len(recorded))
    sections = iter(picture.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    letters: dict[Path, str] = {}

    def lettered(ax: Axes, text: str, *of: Path) -> None:
        letter = chr(ord("a") + len(set("".join(letters.values()))))
        for path in of:
            letters[path] = letters.get(path, "") + letter
        ax.set_title(f"({letter}) {text}", loc="left")

    for path, name, by_axis in curves:
        section = next(sections)
        shown = {axis: records for axis, records in by_axis.items() if records}
        panels = section.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, (axis, records) in zip(panels, shown.items()):
            draw_sweep(ax, records, axis)
            lettered(ax, _held(records, axis), path)
        panels[0].set_ylabel("time (ms)")
        _caption_sweep(section, panels, name, [r for records in shown.values() for r in records])
    if stepped:
        ax = next(sections).subplots()
        draw_steps(ax, {f"{path.stem} {r.case}".strip(): r for path, some in stepped.items() for r in some})
        lettered(ax, "training step by phase", *stepped)
    for path, found in compared.items():
        ax = next(sections).subplots()
        draw_ratios(ax, found)
        lettered(ax, f"ours against others, {path.stem}", path)
    named = sorted(
        ((letters[path], one) for path, one in recorded.items() if path in letters), key=lambda pair: pair[0]
    )
    lines = [line for of, one in named for line in (f"{_span(of)}: {one.caption}", *wrap(one.note, 150))]
    picture.supxlabel("\n".join(lines), fontsize=6.5, x=0.01, ha="left")
    return picture


def draw_sweep(ax: Axes, records: list[Record], axis: str) -> None:
    """Time of every form along an axis, with 20 and 80 % and its ratio to ours at its last point."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from a2mc_fast.plots.style import BLACK, BLUE, GREEN, LINES, ORANGE, PURPLE, SKY, VERMILION

    looks = dict(zip(_FORMS, zip((BLUE, GREEN, VERMILION, BLACK, ORANGE, SKY), "os^DvP", cycle(LINES))))
    ours = {r.sizes[axis]: r.ms for r in records if r.form == "ours"}
    for form in dict.fromkeys(r.form for r in records):
        there = [r for r in records if r.form == form]
        at = [r.sizes[axis] for r in there]
        middle = [r.ms or 0.0 for r in there]
        whiskers = [[max((r.ms or 0) - (r.p20 or r.ms or 0), 0) for r in there],
                    [max((r.p80 or r.ms or 0) - (r.ms or 0), 0) for r in there]]  # fmt: skip
        color, marker, line = looks.get(form, (PURPLE, "v", "-"))
        ax.errorbar(
            at, middle, whiskers, color=color, marker=marker, linestyle=line, markersize=3.5, capsize=2,
            elinewidth=0.8, lw=1.2, label=_FORMS.get(form, form),
        )  # fmt: skip
        reference = ours.get(at[-1])
        if form != "ours" and reference:
            ax.annotate(
                _times_text(middle[-1] / reference), (at[-1], middle[-1]), (5, 0),
                textcoords="offset points", va="center", fontsize=7, color=color,
            )  # fmt: skip
    values = sorted({r.sizes[axis] for r in records})
    if axis != "mix":
        ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.margins(x=0.22, y=0.12)
    ax.set_xticks(values, [_short(value) for value in values])
    ax.xaxis.minorticks_off()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(_AXES[axis] + (" (k = 1,024)" if axis == "K" else ""))
    ax.grid(axis="y")


def draw_steps(ax: Axes, found: dict[str, Record]) -> None:
    """A bar per step, stacked by phase. Shares, since steps of different encoders differ a hundredfold."""
    from a2mc_fast.plots.style import COLORS, HATCHES

    names = list(dict.fromkeys([*PHASES, *(name for step in found.values() for name in step.phases)]))
    names = [name for name in names if any(name in step.phases for step in found.values())]
    left = [0.0] * len(found)
    for number, name in enumerate(names):
        widths = [100 * r.phases.get(name, 0.0) / sum(r.phases.values()) for r in found.values()]
        ax.barh(
            range(len(found)), widths, left=left, height=0.6, label=name, color=COLORS[number % len(COLORS)],
            hatch=HATCHES[number % len(HATCHES)], edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, widths)]
    for place, (step, end) in enumerate(zip(found.values(), left)):
        ax.annotate(_note(step), (end, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_yticks(range(len(found)), list(found))
    ax.set_xlim(0, 160)
    ax.set_xticks(range(0, 101, 20))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlabel("share of the step under the profiler (%)")
    ax.figure.legend(loc="outside lower center", ncols=len(names), handlelength=1.4, columnspacing=1.2)


def _note(step: Record) -> str:
    """A step's time, rate and share of a large product's."""
    said = []
    if step.ms is not None:
        said.append(f"{step.ms:,.0f} ms per step" if step.ms >= 100 else f"{step.ms:.3g} ms per step")
    if step.per_second is not None:
        said.append(f"{step.per_second:,.0f} clips/s")
    if (share := step.numbers.get("share of a large product's rate")) is not None:
        said.append(f"MFU {share:.1%}")
    return ", ".join(said)


def draw_ratios(ax: Axes, found: list[Ratio]) -> None:
    """A bar per comparison, on a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from a2mc_fast.plots.style import SKY

    bars = ax.barh(
        range(len(found)), [r.times for r in found], height=0.62, color=SKY, edgecolor="black", lw=0.5
    )
    ax.bar_label(bars, [_times_text(r.times) for r in found], padding=3, fontsize=7)
    ax.set_yticks(range(len(found)), [r.name for r in found])
    ax.set_xscale("log")
    ax.set_xlim(min(1.0, *(0.8 * r.times for r in found)), 2.2 * max(r.times for r in found))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.axvline(1, color="black", lw=0.8)
    ax.set_xlabel("times as long (peak memory: times as much) as ours")


def _caption_sweep(section: Any, panels: Any, name: str, records: list[Record]) -> None:
    """Above a row of sweeps: the operation, the forms' legend, and what the numbers are ratios to."""
    from matplotlib.ticker import LogLocator

    entries: dict[str, Any] = {}
    for ax in panels:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    section.legend(
        list(entries.values()), list(entries), loc="outside upper center", ncols=len(entries),
        title=f"{name}: median, 20 to 80 %; n× = times as long as ours", title_fontsize=8.5,
    )  # fmt: skip
    low, *_, high = sorted(time for r in records for time in (r.p20, r.ms, r.p80) if time)
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 200 * low else (1.0, 2.0, 5.0)))


def _held(records: list[Record], axis: str) -> str:
    """The sizes that a panel holds fixed."""
    fixed = {name: value for name, value in records[0].sizes.items() if name != axis}
    return ", ".join(f"{v} shares" if n == "mix" else f"{n} = {_short(v)}" for n, v in fixed.items())


def _times_text(times: float) -> str:
    """16.7× or 283×"""
    return f"{times:,.0f}×" if times >= 100 else f"{times:.1f}×"


def _short(value: int) -> str:
    """16384 -> 16k, 1048576 -> 1M; k and M are binary."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def _span(letters: str) -> str:
    """abc -> a–c"""
    return f"({letters})" if len(letters) == 1 else f"({letters[0]}–{letters[-1]})"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw and where to."""

    results: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of records; none = all of bench/results."""
    out: Path = RESULTS / "speed.png"
    """Picture to write; the suffix is .png, .pdf or .svg."""


def main(args: list[str] | None = None) -> None:
    """The command line: [RESULTS.json ...] [--out FILE]."""
    with exit_on_error():
        options = tyro.cli(Options, args=args, prog="python -m bench.plot", description=__doc__)
        write_picture(options.out, lambda: speed(options.results))


if __name__ == "__main__":
    main()
