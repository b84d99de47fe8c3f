"""Results of protocols as JSON, and tables of them. A result is a dictionary; accuracies are in percent.

`top1_best` and `top1_last` are the highest and the last test accuracy of a classifier's training, `top1` is
that of a protocol without training, `fractions` holds one entry per share of labels. Nothing imports torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from a2mc_fast.errors import require
from a2mc_fast.files import read_json

FORMAT = "a2mc-evaluation/1"
_COLUMNS = (
    "run",
    "protocol",
    "data",
    "split",
    "stream",
    "encoder",
    "best %",
    "last %",
    "macro %",
    "untrained %",
)
_TEXT = 6  # columns that hold no number


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The result in a file, or all in a folder in the order of their names. `InputError` if there is none."""
    if not path.is_dir():
        content = read_json(path)
        require(_is_result(content), f"{path} is not the result of a protocol ({FORMAT})")
        yield content
        return
    results = [content for file in sorted(path.glob("*.json")) if _is_result(content := read_json(file))]
    require(bool(results), f"{path} holds no results: make one with python -m a2mc_fast.evaluate knn {path}")
    yield from results


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


def percent(numbers: dict[str, Any], *names: str) -> str:
    """The first of these accuracies: "80.04", with "± 0.31" where there are several seeds; "" if none."""
    for name in names:
        if name in numbers:
            spread = numbers.get(f"{name}_std")
            return f"{numbers[name]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
    return ""


def table(results: list[dict[str, Any]]) -> str:
    """One row per result and share of labels."""
    rows = [_COLUMNS, *(row for result in results for row in _rows(result))]
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]  # no untrained encoder was evaluated
    return align(rows, _TEXT)


def align(rows: list[tuple[str, ...]], text: int) -> str:
    """Rows as lines: the first `text` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < text else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    untrained = result.get("untrained", {})
    for number, part in enumerate(result.get("fractions", [result])):
        before = untrained["fractions"][number] if "fractions" in untrained else untrained
        yield (
            result["run"],
            result["protocol"] + (f" {100 * part['fraction']:g} %" if "fraction" in part else ""),
            Path(result["data"]).stem,
            result["split"],
            result["stream"],
            result["encoder"],
            percent(part, "top1_best"),
            percent(part, "top1_last", "top1"),
            percent(part, "top1_macro"),
            percent(before, "top1_best", "top1"),
        )
