"""The rows of the paper's ablations: what each one trains, and the tables of their results.

Tables V and VI, and a table of the mixing shares λ (Fig. 7). Nothing imports torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

from a2mc_fast.config import Config, _ablations
from a2mc_fast.evaluation.tables import align, percent

RowName = Literal["b1", "b2", "b3", "b4", "full", "a1", "a2", "a3", "l0", "l1", "l2", "l3", "l4"]
_SHARES = (0.4, 0.3, 0.2, 0.1)  # row l3 mixes by the first three


class Table(NamedTuple):
    """A table of the paper: its columns, and for each row its label and marks."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]


TABLES = (
    Table(
        "Table V: components",
        ("Baseline", "Att-Aug", "PNM", "MC"),
        {
            "b1": ("B1", "✗", "✗", "✗"),
            "b2": ("B2", "✗", "✓", "✗"),
            "b3": ("B3", "✓", "✗", "✗"),
            "b4": ("B4", "✓", "✗", "✓"),
            "full": ("A²MC", "✓", "✓", "✓"),
        },
    ),
    Table(
        "Table VI: targeted attack and untargeted augmentation",
        ("Baseline", "Att", "Aug"),
        {
            "a1": ("A1", "✗", "✗"),
            "a2": ("A2", "✗", "✓"),
            "a3": ("A3", "✓", "✗"),
            "full": ("A²MC", "✓", "✓"),
        },
    ),
    Table(
        "Mixing shares",
        ("λ",),
        {f"l{count}": (", ".join(map(str, _SHARES[:count])) or "none",) for count in range(5)},
    ),
)

# linear evaluation on NTU-60, the paper's Tables V and VI
_PAPER: dict[str, dict[str, float]] = {
    "ntu60-xsub": {
        "b1": 75.6, "b2": 76.9, "b3": 78.5, "b4": 79.0, "full": 80.0, "a1": 75.6, "a2": 79.0, "a3": 79.9
    },
    "ntu60-xview": {
        "b1": 82.8, "b2": 84.2, "b3": 85.6, "b4": 86.7, "full": 87.9, "a1": 82.8, "a2": 86.7, "a3": 87.1
    },
}  # fmt: skip


def row_configs(config: Config) -> dict[str, Config]:
    """The configuration of every row, derived from the full method's."""
    # the preset of B1 has no warm-up, which is MoCo as B1 is; here every row takes the same number of steps
    warmup = config.bank.warmup_steps
    rows = {n: replace(r, bank=replace(r.bank, warmup_steps=warmup)) for n, r in _ablations(config).items()}
    rows["full"] = config
    for count in range(len(_SHARES) + 1):
        loss = replace(config.loss, mix=_SHARES[:count])
        rows[f"l{count}"] = replace(config, preset=f"{config.preset}-l{count}", loss=loss)
    return {name: rows[name] for name in get_args(RowName)}


def tables(result: dict[str, Any]) -> str:
    """The paper's tables of the rows that were run, with the paper's numbers where it has them."""
    paper = _PAPER.get(result["preset"], {})
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    parts = []
    for table in TABLES:
        chosen = [(name, cells) for name, cells in table.rows.items() if name in result["rows"]]
        if not chosen:
            continue
        head = (*table.columns, "linear best %", "linear last %", "kNN %") + ("paper %",) * bool(paper)
        lines = [head]
        for name, cells in chosen:
            row = result["rows"][name]
            numbers = [percent(row, f"top1_{n}") for n in ("linear_best", "linear_last", "knn")]
            known = [f"{paper[name]:.1f}" if name in paper else ""] * bool(paper)
            lines.append((*cells, *numbers, *known))
        title = f"{table.title} ({Path(result['data']).stem} {result['split']}, {seeds})"
        parts.append(f"{title}\n{align(lines, len(table.columns))}")
    return "\n\n".join(parts)


LABELS: dict[str, str] = {row: cells[0] for table in TABLES[:2] for row, cells in table.rows.items()}
"""How rows are called in the paper."""


def study_table(result: dict[str, Any]) -> str:
    """One line per set and row. Test clips that are copies of training clips are left out, but in the last
    column: what a row had logged after as many seconds as the first one took is kNN on all of them."""
    head = ("set", "split", "row", "steps", "seconds", "kNN %", "linear %", "kNN % in the first row's time")
    lines: list[tuple[str, ...]] = [head]
    for one in result["sets"]:
        for number, (name, row) in enumerate(one["rows"].items()):
            about = (Path(one["data"]).stem, one["split"]) if number == 0 else ("", "")
            runs, cost = row["runs"], ("", "")
            if "steps" in runs[0]:
                cost = str(runs[0]["steps"]), f"{fmean(run['seconds'] for run in runs):.0f}"
            numbers = (
                percent(row, "top1_knn_fresh", "top1_knn"),
                percent(row, "top1_linear_last_fresh", "top1_linear_last"),
                percent(row, "top1_knn_within"),
            )
            lines.append((*about, LABELS.get(name, name), *cost, *numbers))
    seeds = f"mean ± standard deviation of {result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    return f"{seeds}\n{align(lines, 3)}"
