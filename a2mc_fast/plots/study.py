"""Accuracies of a study, set by set: the untrained encoder and every row of `a2mc_fast.ablate FILE ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from matplotlib.figure import Figure

from a2mc_fast.errors import require
from a2mc_fast.evaluation.rows import LABELS
from a2mc_fast.evaluation.tables import Percent
from a2mc_fast.files import read_json, typed
from a2mc_fast.plots.style import figure, mark, shorten

_PANELS = (
    ("kNN top-1 accuracy (%)", ("top1_knn_fresh", "top1_knn")),
    ("linear top-1 accuracy (%)", ("top1_linear_last_fresh", "top1_linear_last")),
)


class _Run(TypedDict):
    top1_knn: NotRequired[Percent]
    top1_knn_fresh: NotRequired[Percent]
    top1_linear_last: NotRequired[Percent]
    top1_linear_last_fresh: NotRequired[Percent]


class _Row(_Run):
    """The means of its runs, and these."""

    runs: list[_Run]


class _Set(TypedDict):
    data: str
    rows: dict[str, _Row]


class _Study(TypedDict):
    """What is read of a study.json."""

    sets: list[_Set]


def read_study(results: Path) -> list[Any]:
    """The sets of a study, all with the same rows; `InputError` if the file holds none."""
    content = read_json(results)
    is_study = isinstance(content, dict) and content.get("format") == "a2mc-study/1"
    require(is_study, f"{results} is not the study.json of a2mc_fast.ablate FILE FILE ...")
    sets: list[Any] = typed(content, _Study, str(results))["sets"]
    rows = {tuple(one["rows"]) for one in sets}
    require(len(rows) == 1 and rows != {()}, f"{results}: its sets must have the same rows, at least one")
    for name, row in [pair for one in sets for pair in one["rows"].items()]:
        for title, kinds in _PANELS:
            require(_kind(row, kinds) != "", f"{results}: row {name} has no {title}")
    return sets


def _kind(row: Any, kinds: tuple[str, ...]) -> str:
    """The first kind of accuracy that a row and all its runs have; "" if none."""
    return next((k for k in kinds if all(k in numbers for numbers in (row, *row["runs"]))), "")


def study(results: Path) -> Figure:
    """kNN to the left, linear to the right; one point per seed, a line through each row's mean.

    Raises `InputError` if the file is not the study.json of a2mc_fast.ablate.
    """
    sets = read_study(results)
    picture = figure(2.7)
    names = list(sets[0]["rows"])
    width = 0.8 / len(names)
    for ax, (title, kinds) in zip(picture.subplots(1, len(_PANELS)), _PANELS):
        for number, name in enumerate(names):
            for at, one in enumerate(sets):
                row = one["rows"][name]
                kind = _kind(row, kinds)
                place = at - 0.4 + width * (number + 0.5)
                label = LABELS.get(name, shorten(name, 24)) if at == 0 else None
                values = [run[kind] for run in row["runs"]]
                look = mark(number)
                ax.scatter([place] * len(values), values, s=16, label=label, **look)
                ax.hlines(row[kind], place - width / 3, place + width / 3, colors=look["facecolors"], lw=1)
        ax.set_xticks(range(len(sets)), [shorten(Path(one["data"]).stem, 24) for one in sets])
        ax.set_xlim(-0.5, len(sets) - 0.5)
        ax.grid(axis="y")
        ax.set_ylabel(title)
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
    return picture
