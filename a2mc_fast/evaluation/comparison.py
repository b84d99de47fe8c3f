"""One table of many runs and results: what `a2mc_fast.evaluate compare` shows. Nothing imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from a2mc_fast.config import PRESETS, flat, read_settings, to_dict
from a2mc_fast.errors import one_line, require, tell
from a2mc_fast.evaluation.tables import (
    HEAD,
    Result,
    Row,
    layout,
    read_ended,
    read_results,
    result_files,
    rows_of,
    write_csv,
)

# columns of their own, or how and where a run was made
_NO_CHANGE = ("preset", "data", "split", "stream", "seed", "run")


def compare(paths: Sequence[Path], out: str = "") -> None:
    """Print a table of all results, best first, and write it to the `.csv` file `out`."""
    require(len(paths) >= 1, "compare needs at least one result: a JSON file or the folder of a run")
    rows = sorted(rows_of(result for path in paths for result in _results(path)), key=_order)
    changed = _changed([row.result for row in rows])
    cells = [tuple(map(one_line, row.cells)) for row in rows]
    empty = [name for name, column in zip(HEAD, zip(*cells)) if not any(column)]
    lines = layout(cells, empty).split("\n")
    width = max(map(len, lines))
    notes = ["changed" * any(changed), *changed]
    tell("\n".join(f"{line:<{width}}  {note}".rstrip() for line, note in zip(lines, notes)))
    if out:
        head = (*(name.replace(" %", "_percent") for name in HEAD), "changed")
        write_csv(Path(out), [head, *((*line, note) for line, note in zip(cells, changed))])
        tell(f"wrote {out}")


def _order(row: Row) -> tuple[str, str, str, float, float]:
    """Rows of one data set, split, protocol and share lie together, the best first."""
    best = next((row.part[name] for name in ("top1_best", "top1_last", "top1") if name in row.part), -1.0)
    names = Path(row.result["data"]).stem, row.result["split"], row.result["protocol"]
    return *names, row.part.get("fraction", 1.0), -best


def _results(path: Path) -> Iterator[Result]:
    """The results in a file or folder; of a run that was never evaluated, what it says of itself."""
    settings = path / "config.json"
    if result_files(path) or not settings.is_file():
        yield from read_results(path)
        return
    config = read_settings(settings)
    result: Result = {
        **config.about,  # type: ignore[typeddict-item]
        "protocol": "unfinished",
        "run": str(path),
        "preset": config.preset,
        "config": to_dict(config),
    }
    if (path / "result.json").is_file():
        ended = read_ended(path / "result.json")
        result["protocol"], result["steps"] = "knn in training", ended["steps"]
        if ended["knn_top1"] is not None and ended["knn_top1_untrained"] is not None:
            result["top1"], result["untrained"] = ended["knn_top1"], {"top1": ended["knn_top1_untrained"]}
    yield result


def _changed(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which each run differs from its preset, but for those in which all runs agree."""
    settings = [_settings(result.get("config", {})) for result in results]
    presets = [
        _settings(to_dict(PRESETS[p])) if (p := r.get("preset", "")) in PRESETS else {} for r in results
    ]
    notes = []
    for mine, preset in zip(settings, presets):
        changed = [name for name in mine if name in preset and mine[name] != preset[name]]
        if len({result["run"] for result in results}) > 1:
            changed = [name for name in changed if any(other.get(name) != mine[name] for other in settings)]
        notes.append(one_line(", ".join(f"{name} {mine[name]}" for name in changed)))
    return notes


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The JSON of every setting that is neither a column nor says how and where a run was made."""
    return {n: json.dumps(v) for n, v in flat(config).items() if n.split(".")[0] not in _NO_CHANGE}
