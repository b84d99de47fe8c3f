"""The speed figure: `python -m bench.plot [RESULTS.json ...] --out speed.png`, from recorded runs.

It reads pytest-benchmark files as `bench/conftest.py` records them, and of each benchmark's `extra_info`

- every entry that is an object with `ms`, `p20`, `p80`: one form of a problem whose size the benchmark's id
  gives, e.g. [N64-K4096-mix4] -> time over K, over N and over the number of mixing shares;
- `phases`: milliseconds of each part of a training step -> stacked bars, beside them `milliseconds`, `clips
  per second` and `MFU` where they are there;
- `ratio` or `times faster`, and benchmarks whose id is a form (`ours` and others) -> how many times faster.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from a2mc_fast.errors import InputError, exit_on_error, require
from a2mc_fast.files import read_json
from a2mc_fast.plots.output import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

PHASES = ("views", "attack", "key", "query", "loss", "backward", "optimizer", "bank")
_FORMS = {
    "ours": "ours",
    "triton": "Triton kernel (ours)",
    "eager": "eager torch, single pass",
    "compiled": "torch.compile of whole logits",
    "literal": "literal, mixed banks stored",
}
_AXES = {"K": "bank rows K", "N": "clips per step N", "mix": "mixing shares"}
_RATIO_KEYS = ("ratio", "times faster")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One recorded run of benchmarks."""

    path: Path
    machine: str
    benchmarks: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A problem of one size, and the milliseconds (median, 20 %, 80 %) that each form takes."""

    size: dict[str, int]
    forms: dict[str, tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a training step's time goes."""

    name: str
    phases: dict[str, float]  # milliseconds
    note: str


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster (or smaller) ours is."""

    name: str
    times: float


def read(path: Path) -> Recorded:
    """A benchmark file. `InputError` if it is none."""
    if not path.is_file():
        raise InputError(f"{path} not found; make it with: pytest bench -s --benchmark-json {path}")
    content = read_json(path)
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    require(
        isinstance(benchmarks, list)
        and all(isinstance(b, dict) and "name" in b and "median" in b.get("stats", ()) for b in benchmarks),
        f"{path} is not a file of pytest --benchmark-json",
    )
    info = content.get("machine_info") or {}
    parts = [str(info.get("device", "unknown machine"))]
    parts += [f"{name} {info[name]}" for name in ("torch", "triton", "a2mc_fast", "commit") if info.get(name)]
    parts.append(str(content.get("datetime", ""))[:10])
    return Recorded(path=path, machine=", ".join(p for p in parts if p), benchmarks=list(benchmarks or []))


def recorded_files() -> tuple[Path, ...]:
    """The benchmarks recorded with the project; its records of fuzzing and soaking are no benchmarks."""
    return tuple(path for path in sorted(RESULTS.glob("*.json")) if "benchmarks" in read_json(path))


def extra(benchmark: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark says beyond pytest-benchmark's own statistics."""
    return benchmark.get("extra_info") or {}


def title(benchmark: dict[str, Any]) -> str:
    """A benchmark's name in words, without its id."""
    return str(benchmark["name"]).split("[")[0].removeprefix("test_").replace("_", " ")


def _identity(benchmark: dict[str, Any]) -> str:
    """What stands in brackets after a benchmark's name."""
    match = re.search(r"\[(.*)\]", benchmark["name"])
    return match.group(1) if match else ""


def size_of(benchmark: dict[str, Any]) -> dict[str, int]:
    """The sizes in a benchmark's id: test_x[N64-K4096-mix4] -> {"N": 64, "K": 4096, "mix": 4}."""
    found = (re.fullmatch(r"([A-Za-z]+)(\d+)", part) for part in _identity(benchmark).split("-"))
    return {match.group(1): int(match.group(2)) for match in found if match}


def sweeps(recorded: Recorded) -> dict[str, list[Point]]:
    """Timed forms by operation."""
    result: dict[str, list[Point]] = {}
    for benchmark in recorded.benchmarks:
        forms = {
            name: _quantiles(value)
            for name, value in extra(benchmark).items()
            if isinstance(value, dict) and "ms" in value
        }
        if forms and size_of(benchmark):
            point = Point(size=size_of(benchmark), forms=forms)
            result.setdefault(title(benchmark), []).append(point)
    return result


def _quantiles(entry: dict[str, Any]) -> tuple[float, float, float]:
    """Median, 20 and 80 %; the median alone where there is no more."""
    middle = float(entry["ms"])
    return middle, float(entry.get("p20", middle)), float(entry.get("p80", middle))


def varied(points: list[Point], axis: str) -> list[Point]:
    """The points that differ along one axis alone, in its order: the others have their commonest value."""
    common = {name: Counter(p.size.get(name) for p in points).most_common(1)[0][0] for name in points[0].size}
    along = [p for p in points if all(p.size.get(n) == v for n, v in common.items() if n != axis)]
    along = sorted((p for p in along if axis in p.size), key=lambda p: p.size[axis])
    return along if len({p.size[axis] for p in along}) > 1 else []


def baseline(points: list[Point]) -> str:
    """Our form: the kernel where it ran, else the single pass in eager torch."""
    have = {name for point in points for name in point.forms}
    return next((name for name in ("ours", "triton", "eager") if name in have), min(have))


def steps(recorded: Recorded) -> list[Step]:
    """Training steps by phase."""
    result = []
    for benchmark in recorded.benchmarks:
        info = extra(benchmark)
        phases = {name: float(value) for name, value in info.get("phases", {}).items()}
        if phases:
            notes = {name.lower().replace("_", " "): value for name, value in info.items()}
            said = []
            if "milliseconds" in notes:
                value = notes["milliseconds"]
                said.append(f"{value:,.0f} ms per step" if value >= 100 else f"{value:.3g} ms per step")
            for name in ("clips per second", "clips/s"):
                if name in notes:
                    said.append(f"{notes[name]:,.0f} clips/s")
            if isinstance(notes.get("mfu"), float):
                said.append(f"MFU {notes['mfu']:.1%}")
            name = f"{recorded.path.stem} {_identity(benchmark)}".strip()
            result.append(Step(name=name, phases=phases, note=", ".join(said)))
    return result


def ratios(recorded: Recorded) -> list[Ratio]:
    """Every comparison of two ways to the same result, the largest first."""
    result: list[Ratio] = []
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in recorded.benchmarks:
        name = _subject(benchmark)
        for key in _RATIO_KEYS:
            if isinstance(extra(benchmark).get(key), int | float):
                result.append(Ratio(name=name, times=float(extra(benchmark)[key])))
        form = _identity(benchmark)
        if form and not size_of(benchmark):
            groups.setdefault(name, {})[form] = benchmark
    for name, forms in groups.items():
        if "ours" in forms:
            ours = forms.pop("ours")
            result += [Ratio(name=f"{name}: {form}", times=_times(ours, b)) for form, b in forms.items()]
    return sorted(result, key=lambda ratio: -ratio.times)


def _subject(benchmark: dict[str, Any]) -> str:
    """The bench a benchmark belongs to, and what it compares."""
    module = re.search(r"bench_(\w+)\.py", str(benchmark.get("fullname", "")))
    name = re.sub(r"^(a \w+ times faster than|against a) ", "", title(benchmark))
    return f"{module.group(1)}: {name}" if module else name


def _times(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How many times ours the other way costs: memory where that was measured, else time.

    Two ways may have handled different amounts, so a rate counts before the median.
    """
    mine, other = extra(ours), extra(theirs)
    if "extra bytes" in mine:
        return float(other["extra bytes"] / mine["extra bytes"])
    for key in mine.keys() & other.keys():
        if re.search("per.second", key):
            return float(mine[key] / other[key])
    return float(theirs["stats"]["median"] / ours["stats"]["median"])


def speed(paths: tuple[Path, ...]) -> Figure:
    """One figure of all files: sweeps, steps by phase, comparisons; a caption names the machines."""
    from a2mc_fast.plots import style

    recorded = [read(path) for path in paths or recorded_files()]
    curves = [
        (one, name, {axis: varied(points, axis) for axis in _AXES})
        for one in recorded
        for name, points in sweeps(one).items()
    ]
    curves = [c for c in curves if any(c[2].values())]
    stepped = [(one, step) for one in recorded for step in steps(one)]
    compared = [(one, found) for one in recorded if (found := ratios(one))]
    require(
        bool(curves or stepped or compared),
        f"{', '.join(str(r.path) for r in recorded) or RESULTS} holds nothing to draw: record a run with "
        "pytest bench -s --benchmark-json bench/results/NAME.json",
    )

    heights = [2.25] * len(curves)
    heights += [1.0 + 0.35 * len(stepped)] if stepped else []
    heights += [0.6 + 0.2 * len(found) for _, found in compared]
    picture = style.figure(sum(heights) + 0.15 * len(recorded))
    sections = iter(picture.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    letters: dict[Path, str] = {}

    def lettered(ax: Axes, text: str, *of: Path) -> None:
        letter = chr(ord("a") + len(set("".join(letters.values()))))
        for path in of:
            letters[path] = letters.get(path, "") + letter
        ax.set_title(f"({letter}) {text}", loc="left")

    for one, name, by_axis in curves:
        section = next(sections)
        shown = {axis: points for axis, points in by_axis.items() if points}
        panels = section.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, (axis, points) in zip(panels, shown.items()):
            draw_sweep(ax, points, axis)
            lettered(ax, _held(points, axis), one.path)
        panels[0].set_ylabel("time (ms)")
        _caption_sweep(section, panels, name, [p for points in shown.values() for p in points])
    if stepped:
        ax = next(sections).subplots()
        draw_steps(ax, [step for _, step in stepped])
        lettered(ax, "training step by phase", *dict.fromkeys(one.path for one, _ in stepped))
    for one, found in compared:
        ax = next(sections).subplots()
        draw_ratios(ax, found)
        lettered(ax, "ours against others", one.path)
    named = sorted((letters[r.path], r.machine) for r in recorded if r.path in letters)
    picture.supxlabel(
        "\n".join(f"{_span(of)}: {machine}" for of, machine in named), fontsize=6.5, x=0.01, ha="left"
    )
    return picture


def draw_sweep(ax: Axes, points: list[Point], axis: str) -> None:
    """Time of every form along an axis, with 20 and 80 % and its ratio to ours at its last point."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from a2mc_fast.plots.style import BLACK, BLUE, GREEN, LINES, PURPLE, VERMILION

    looks = {
        name: (color, marker, line)
        for name, color, marker, line in zip(
            _FORMS,
            (BLUE, BLUE, GREEN, VERMILION, BLACK),
            "oos^D",
            (LINES[0], LINES[0], LINES[1], LINES[2], LINES[3]),
        )
    }
    ours = baseline(points)
    for form in dict.fromkeys(name for point in points for name in point.forms):
        there = [p for p in points if form in p.forms]
        at = [p.size[axis] for p in there]
        middle, low, high = (list(values) for values in zip(*(p.forms[form] for p in there)))
        color, marker, line = looks.get(form, (PURPLE, "v", "-"))
        whiskers = [
            [max(m - v, 0) for m, v in zip(middle, low)], [max(v - m, 0) for m, v in zip(middle, high)]
        ]  # fmt: skip
        ax.errorbar(
            at, middle, whiskers, color=color, marker=marker, linestyle=line, markersize=3.5, capsize=2,
            elinewidth=0.8, lw=1.2, label=_FORMS.get(form, form),
        )  # fmt: skip
        reference = there[-1].forms.get(ours)
        if form != ours and reference:
            ax.annotate(
                _times_text(middle[-1] / reference[0]), (at[-1], middle[-1]), (5, 0),
                textcoords="offset points", va="center", fontsize=7, color=color,
            )  # fmt: skip
    values = sorted({p.size[axis] for p in points})
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


def draw_steps(ax: Axes, found: list[Step]) -> None:
    """A bar per step, stacked by phase. Shares, since steps of different encoders differ a hundredfold."""
    from a2mc_fast.plots.style import COLORS, HATCHES

    names = list(dict.fromkeys(name for step in found for name in (*PHASES, *step.phases)))
    names = [name for name in names if any(name in step.phases for step in found)]
    left = [0.0] * len(found)
    for number, name in enumerate(names):
        widths = [100 * step.phases.get(name, 0.0) / sum(step.phases.values()) for step in found]
        ax.barh(
            range(len(found)), widths, left=left, height=0.6, label=name, color=COLORS[number % len(COLORS)],
            hatch=HATCHES[number % len(HATCHES)], edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, widths)]
    for place, (step, end) in enumerate(zip(found, left)):
        ax.annotate(step.note, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_yticks(range(len(found)), [step.name for step in found])
    ax.set_xlim(0, 160)
    ax.set_xticks(range(0, 101, 20))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlabel("share of the step under the profiler (%)")
    ax.figure.legend(loc="outside lower center", ncols=len(names), handlelength=1.4, columnspacing=1.2)


def draw_ratios(ax: Axes, found: list[Ratio]) -> None:
    """A bar per comparison, on a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter

    from a2mc_fast.plots.style import SKY

    bars = ax.barh(
        range(len(found)), [r.times for r in found], height=0.62, color=SKY, edgecolor="black", lw=0.5
    )
    ax.bar_label(bars, [_times_text(r.times) for r in found], padding=3, fontsize=7)
    ax.set_yticks(range(len(found)), [r.name for r in found])
    ax.set_xscale("log")
    ax.set_xlim(min(1.0, *(0.8 * r.times for r in found)), 2.2 * max(r.times for r in found))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.axvline(1, color="black", lw=0.8)
    ax.set_xlabel("times as long (peak memory: times as much) as ours")


def _caption_sweep(section: Any, panels: Any, name: str, points: list[Point]) -> None:
    """Above a row of sweeps: the operation, the forms' legend, and what the numbers are ratios to."""
    from matplotlib.ticker import LogLocator

    entries: dict[str, Any] = {}
    for ax in panels:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    ours = baseline(points)
    against = f"; n× = times as long as {_FORMS.get(ours, ours)}" if len(entries) > 1 else ""
    section.legend(
        list(entries.values()), list(entries), loc="outside upper center", ncols=len(entries),
        title=f"{name}: median, 20 to 80 %{against}", title_fontsize=8.5,
    )  # fmt: skip
    low, *_, high = sorted(time for p in points for times in p.forms.values() for time in times)
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 200 * low else (1.0, 2.0, 5.0)))


def _held(points: list[Point], axis: str) -> str:
    """The sizes that a panel holds fixed."""
    fixed = {name: value for name, value in points[0].size.items() if name != axis}
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
    """Files of pytest --benchmark-json; none = all of bench/results."""
    out: Path = RESULTS / "speed.png"
    """Picture to write; the suffix is .png, .pdf or .svg."""


def main(args: list[str] | None = None) -> None:
    """The command line: [RESULTS.json ...] [--out FILE]."""
    with exit_on_error():
        options = tyro.cli(Options, args=args, prog="python -m bench.plot", description=__doc__)
        write_picture(options.out, lambda: speed(options.results))


if __name__ == "__main__":
    main()
