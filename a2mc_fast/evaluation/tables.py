"""Results of protocols as JSON, and tables of them. Accuracies are in percent. Nothing imports torch."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

from a2mc_fast.errors import Range, one_line, require
from a2mc_fast.files import atomic_path, read_json, typed

FORMAT = "a2mc-evaluation/1"
Percent = Annotated[float, Range("[0, 100]")]
HEAD = (
    *("run", "protocol", "data", "split", "stream", "encoder", "preset"),
    *("seed", "steps", "best %", "last %", "macro %", "untrained %"),
)
_TEXT = 7  # columns that hold no number


class Accuracies(TypedDict):
    """What a protocol measures."""

    top1: NotRequired[Percent]
    """That of a protocol without training."""
    top1_best: NotRequired[Percent]
    """The highest test accuracy of a classifier's training."""
    top1_last: NotRequired[Percent]
    top1_fresh: NotRequired[Percent]
    """On test clips that equal no training clip."""
    top1_last_fresh: NotRequired[Percent]
    top1_macro: NotRequired[Percent]
    """Mean over classes."""
    top1_best_std: NotRequired[Percent]
    top1_last_std: NotRequired[Percent]


class Part(Accuracies):
    """The result on a share of the labels."""

    fraction: Annotated[float, Range("[0, 1]")]


class Parts(Accuracies):
    """A result, or one for each share of labels."""

    fractions: NotRequired[list[Part]]


class Result(Parts):
    """What is read of a result's JSON."""

    protocol: str
    run: str
    data: str
    split: str
    stream: str
    encoder: str
    preset: NotRequired[str]
    steps: NotRequired[Annotated[int, Range("[0, 1e12]")]]
    untrained: NotRequired[Parts]
    class_names: NotRequired[list[str]]
    confusion: NotRequired[list[list[int]]]
    options: NotRequired[dict[str, Any]]
    checkpoint_sha256: NotRequired[str]
    config: NotRequired[dict[str, Any]]


class Ended(TypedDict):
    """What is read of a run's result.json."""

    preset: str
    steps: Annotated[int, Range("[1, 1e12]")]
    seconds: Annotated[float, Range("[0, 1e12]")]
    knn_top1: Percent | None
    knn_top1_untrained: Percent | None


def read_ended(path: Path) -> Ended:
    """What a finished run says; `InputError` if the file does not."""
    ended: Ended = typed(read_json(path), Ended, str(path))
    return ended


def read_result(path: Path) -> Result:
    """The result in a JSON file; `InputError` if it is none."""
    content = read_json(path)
    require(_is_result(content), f"{path} is not the result of a protocol ({FORMAT})")
    result: Result = typed(content, Result, str(path))
    shares, before = result.get("fractions", []), result.get("untrained", {}).get("fractions", [])
    require(len(before) in (0, len(shares)), f"{path}: the untrained encoder has other shares of labels")
    return result


def result_files(path: Path) -> list[Path]:
    """A file itself, or all files of results in a folder, in the order of their names."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.glob("*.json")) if _is_result(read_json(file))]


def read_results(path: Path) -> Iterator[Result]:
    """The result in a file, or all in a folder. `InputError` if there is none."""
    files = result_files(path)
    require(bool(files), f"{path} holds no results: make one with python -m a2mc_fast.evaluate knn {path}")
    yield from map(read_result, files)


def _is_result(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def mean_and_std(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every accuracy over the runs and, of two or more, the standard deviation of a sample."""
    result = {}
    for name in [name for name in runs[0] if name.startswith("top1")]:
        values = [run[name] for run in runs]
        result[name] = statistics.fmean(values)
        if len(values) > 1:
            result[f"{name}_std"] = statistics.stdev(values)
    return result


def accuracies(entries: dict[str, Any]) -> dict[str, Any]:
    """Only the accuracies of a result, and of its shares of labels."""
    if "fractions" in entries:
        return {"fractions": [{"fraction": f["fraction"], **accuracies(f)} for f in entries["fractions"]]}
    return {name: value for name, value in entries.items() if name.startswith("top1")}


def percent(numbers: Mapping[str, Any], *names: str) -> str:
    """The first of these accuracies: "80.04", with "± 0.31" where there are several seeds; "" if none."""
    for name in names:
        if name in numbers:
            spread = numbers.get(f"{name}_std")
            return f"{numbers[name]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
    return ""


class Row(NamedTuple):
    """A result, or that on one share of the labels."""

    result: Mapping[str, Any]
    part: Mapping[str, Any]
    before: Mapping[str, Any]
    """What the untrained encoder reached."""

    @property
    def cells(self) -> tuple[str, ...]:
        """What `HEAD` names."""
        result, part = self.result, self.part
        share = f" {100 * part['fraction']:g} %" if "fraction" in part else ""
        seed = result.get("config", {}).get("seed")
        return (
            result["run"],
            result["protocol"] + share,
            Path(result["data"]).stem,
            *(result[name] for name in ("split", "stream", "encoder")),
            result.get("preset", ""),
            str(seed) if isinstance(seed, int) else "",
            str(result.get("steps", "")),
            percent(part, "top1_best"),
            percent(part, "top1_last", "top1"),
            percent(part, "top1_macro"),
            percent(self.before, "top1_best", "top1"),
        )


def rows_of(results: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """One row per result and share of labels."""
    for result in results:
        untrained = result.get("untrained", {})
        for number, part in enumerate(result.get("fractions", [result])):
            yield Row(
                result, part, untrained["fractions"][number] if untrained.get("fractions") else untrained
            )


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """One line per result and share of labels, whatever was trained; "untrained %" where one has it."""
    lines = [row.cells for row in rows_of(results)]
    hidden = ("preset", "seed", "steps") + ("untrained %",) * (not any(line[-1] for line in lines))
    return layout(lines, hidden)


def layout(lines: Iterable[Sequence[str]], hidden: Collection[str]) -> str:
    """Cells of rows as lines of text under those of `HEAD`, without these columns."""
    kept = [name not in hidden for name in HEAD]
    return align([tuple(compress(line, kept)) for line in (HEAD, *lines)], sum(kept[:_TEXT]))


def align(rows: Sequence[tuple[str, ...]], text: int) -> str:
    """Rows as lines: the first `text` columns to the left, the others to the right."""
    rows = [tuple(one_line(cell, 80) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = ["<" if column < text else ">" for column in range(len(widths))]
    return "\n".join(
        "  ".join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths)).rstrip() for row in rows
    )


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """A table as a .csv file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
