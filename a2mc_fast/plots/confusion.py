"""Confusion matrices of evaluation results (the paper's Fig. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from a2mc_fast.errors import require
from a2mc_fast.evaluation.tables import read_result, result_files
from a2mc_fast.plots.style import GREY, class_label, figure, shorten

_MOST_RESULTS = 4
_NUMBERS_UP_TO, _NAMES_UP_TO = 20, 30  # classes


class Confusion(NamedTuple):
    """What an evaluation says of its predictions."""

    counts: NDArray[np.float64]
    """[classes, classes], row = true class, column = predicted class."""
    names: tuple[str, ...]
    title: str


def confusion(results: Sequence[Path], classes: Sequence[int] = ()) -> Figure:
    """Predictions per true class in percent, one panel per result.

    With `classes`, only their rows and columns are shown; percents are still of all predictions. Raises
    `InputError` where a file holds no confusion matrix or lacks a class.
    """
    files = []
    for path in results:
        found = [file for file in result_files(path) if file == path or "confusion" in read_result(file)]
        require(bool(found), f"{path} holds no result with a confusion matrix")
        files += found
    number = len(files)
    require(
        1 <= number <= _MOST_RESULTS,
        f"confusion shows 1 to {_MOST_RESULTS} results, got {number}: "
        f"name some of {', '.join(map(str, files))}",
    )
    loaded = [read_confusion(path) for path in files]
    for path, one in zip(files, loaded):
        for label in classes:
            last = len(one.counts) - 1
            require(0 <= label <= last, f"--classes {label}: {path} has classes 0 to {last}")
    columns = min(number, 2)
    rows = -(-number // columns)
    side = 7.2 / columns if columns > 1 else 5.4
    picture = figure(rows * side * 0.98, width=side * columns)
    panels = [picture.add_subplot(rows, columns, place) for place in range(1, number + 1)]
    for ax, one in zip(panels, loaded):
        image = _panel(ax, one, list(classes) or list(range(len(one.counts))), crowded=columns > 1)
    picture.colorbar(image, ax=panels, shrink=0.6, aspect=30, label="share of the true class's clips (%)")
    return picture


def _panel(ax: Axes, one: Confusion, shown: list[int], *, crowded: bool) -> AxesImage:
    """One matrix as a heat map, with numbers and names where there is room."""
    clips = one.counts.sum(1, keepdims=True)
    percent = np.where(clips > 0, 100 * one.counts / clips.clip(1), np.nan)[np.ix_(shown, shown)]
    color_map = matplotlib.colormaps["Blues"].with_extremes(bad="white")
    image = ax.imshow(np.ma.masked_invalid(percent), vmin=0, vmax=100, cmap=color_map, aspect="equal")
    for row in np.flatnonzero(np.isnan(percent[:, 0])).tolist():
        ax.axhspan(row - 0.5, row + 0.5, facecolor="white", edgecolor=GREY, hatch="////", lw=0)
        if len(shown) <= _NUMBERS_UP_TO:
            ax.text(
                (len(shown) - 1) / 2, float(row), "no clips", ha="center", va="center", fontsize=6,
                bbox={"facecolor": "white", "lw": 0, "pad": 1},
            )  # fmt: skip
    if len(shown) <= _NUMBERS_UP_TO:
        size = min(7.0, (62 if crowded else 100) / len(shown))
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:  # blank where it would round to zero
                ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size,
                        color="white" if value > 55 else "black")  # fmt: skip
    size, every = 7.5, max(1, -(-len(shown) // (12 if crowded else 24)))
    if named := len(shown) <= _NAMES_UP_TO and bool(one.names):
        size, every = min(size, (110 if crowded else 180) / len(shown)), 1
    labels = [class_label(c, one.names, 22) if named else str(c) for c in shown]
    ax.set_xticks(range(0, len(shown), every), labels[::every], rotation=90 * named, fontsize=size)
    ax.set_yticks(range(0, len(shown), every), labels[::every], fontsize=size)
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.set_title(one.title)
    ax.spines[["top", "right"]].set_visible(True)
    return image


def read_confusion(path: Path) -> Confusion:
    """The matrix of an evaluation's JSON file. `InputError` if it has none or it is no matrix of counts."""
    require(path.is_file(), f"{path} not found; make it with: python -m a2mc_fast.evaluate PROTOCOL RUN")
    result = read_result(path)
    rows, names = result.get("confusion", []), tuple(result.get("class_names", ()))
    require(
        bool(rows),
        f"{path} holds no confusion matrix: give the JSON file of a classification by a2mc_fast.evaluate",
    )
    require(
        all(len(row) == len(rows) and min(row) >= 0 and max(row) < 2**53 for row in rows),
        f"{path}: confusion must be a square list of rows of counts",
    )
    require(len(names) in (0, len(rows)), f"{path}: class_names must be a list of no or {len(rows)} names")
    counts = np.array(rows, np.float64)
    top1 = 100 * counts.trace() / max(counts.sum(), 1e-9)
    title = f"{shorten(Path(result['run']).name, 30)}: {shorten(result['protocol'], 20)} "
    title += f"{shorten(result['split'], 20)}\ntop-1 {top1:.1f} % of {counts.sum():.0f} clips"
    return Confusion(counts, names, title)
