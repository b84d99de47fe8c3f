"""One table of many runs and results: what `a2mc_fast.evaluate compare` shows. Nothing imports torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from a2mc_fast.config import PRESETS, Config, to_dict
from a2mc_fast.errors import one_line, require, tell
from a2mc_fast.evaluation.tables import (
    Result,
    align,
    percent,
    read_ended,
    read_results,
    result_files,
)
from a2mc_fast.files import atomic_path, read_json, typed

_TEXT = ("run", "protocol", "data", "split", "stream", "encoder", "preset")
_NUMBERS = ("seed", "steps", "best %", "last %", "macro %", "untrained %")
# columns of their own, or how and where a run was made
_NO_CHANGE = ("preset", "data", "split", "stream", "seed", "run")


class Row(NamedTuple):
    """A result, or that on one share of the labels."""

    result: Result
    part: Mapping[str, Any]
    before: Mapping[str, Any]
    """What the untrained encoder reached."""

    @property
    def order(self) -> tuple[str, str, str, float, float]:
        """Rows of one data set, split, protocol and share lie together, the best first."""
        of, names = self.result, ("top1_best", "top1_last", "top1")
        best = next((self.part[name] for name in names if name in self.part), -1.0)
        return Path(of["data"]).stem, of["split"], of["protocol"], self.part.get("fraction", 1.0), -best


def compare(paths: Sequence[Path], out: str = "") -> None:
    """Print a table of all results, best first, and write it to the `.csv` file `out`."""
    require(len(paths) >= 1, "compare needs at least one result: a JSON file or the folder of a run")
    rows = sorted(
        (row for path in paths for result in _results(path) for row in _rows(result)),
        key=lambda row: row.order,
    )
    changed = _changed([row.result for row in rows])
    head = (*_TEXT, *_NUMBERS)
    cells = [head, *(tuple(map(one_line, _cells(row))) for row in rows)]
    shown = [number for number in range(len(head)) if any(line[number] for line in cells[1:])]
    text = sum(number < len(_TEXT) for number in shown)
    lines = align([tuple(line[number] for number in shown) for line in cells], text).split("\n")
    width = max(map(len, lines))
    notes = ["changed" * any(changed), *changed]
    tell("\n".join(f"{line:<{width}}  {note}".rstrip() for line, note in zip(lines, notes)))
    if out:
        with atomic_path(Path(out)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow((*(name.replace(" %", "_percent") for name in head), "changed"))
            table.writerows((*line, note) for line, note in zip(cells[1:], changed))
        tell(f"wrote {out}")


def _results(path: Path) -> Iterator[Result]:
    """The results in a file or folder; of a run that was never evaluated, what it says of itself."""
    settings = path / "config.json"
    if result_files(path) or not settings.is_file():
        yield from read_results(path)
        return
    content = read_json(settings)
    if isinstance(content, dict):
        content.pop("machine", None)
    config: Config = typed(content, Config, str(settings))
    result = Result(
        protocol="unfinished",
        run=str(path),
        data=config.data or "synthetic",
        split=config.split,
        stream=config.stream,
        encoder=config.encoder.name,
        preset=config.preset,
        config=to_dict(config),
    )
    if (path / "result.json").is_file():
        ended = read_ended(path / "result.json")
        result["protocol"], result["steps"] = "knn in training", ended["steps"]
        if ended["knn_top1"] is not None and ended["knn_top1_untrained"] is not None:
            result["top1"], result["untrained"] = ended["knn_top1"], {"top1": ended["knn_top1_untrained"]}
    yield result


def _rows(result: Result) -> Iterator[Row]:
    before = result.get("untrained", {})
    if "fractions" not in result:
        yield Row(result, result, before)
        return
    for number, part in enumerate(result["fractions"]):
        yield Row(result, part, before["fractions"][number] if before.get("fractions") else {})


def _cells(row: Row) -> tuple[str, ...]:
    """The columns of `_TEXT` and `_NUMBERS`."""
    result, part = row.result, row.part
    share = f" {100 * part['fraction']:g} %" if "fraction" in part else ""
    seed = result.get("config", {}).get("seed")
    return (
        result["run"],
        result["protocol"] + share,
        Path(result["data"]).stem,
        result["split"],
        result["stream"],
        result["encoder"],
        result.get("preset", ""),
        str(seed) if isinstance(seed, int) else "",
        str(result.get("steps", "")),
        percent(part, "top1_best"),
        percent(part, "top1_last", "top1"),
        percent(part, "top1_macro"),
        percent(row.before, "top1_best", "top1"),
    )


def _changed(results: Sequence[Result]) -> list[str]:
    """The settings in which each run differs from its preset, but for those in which all runs agree."""
    settings = [_flat(result.get("config", {})) for result in results]
    presets = [_flat(to_dict(PRESETS[p])) if (p := r.get("preset", "")) in PRESETS else {} for r in results]
    notes = []
    for mine, preset in zip(settings, presets):
        changed = [name for name in mine if name in preset and mine[name] != preset[name]]
        if len({result["run"] for result in results}) > 1:
            changed = [name for name in changed if any(other.get(name) != mine[name] for other in settings)]
        notes.append(one_line(", ".join(f"{name} {mine[name]}" for name in changed)))
    return notes


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Every setting as "optim.lr" and its JSON."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if name not in _NO_CHANGE:
            inner = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{name}.{n}".rstrip("."): json.dumps(v) for n, v in inner}
    return flat
