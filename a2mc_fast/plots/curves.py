"""Loss and its parts, and kNN accuracy, over the steps of one or more runs (the paper's Fig. 8 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from a2mc_fast.errors import Count, require
from a2mc_fast.evaluation.tables import read_ended
from a2mc_fast.files import read_json, typed
from a2mc_fast.plots.style import BLACK, BLUE, GREEN, GREY, LINES, VERMILION, figure, shorten
from a2mc_fast.run.metrics import Record, read_metrics

Values = NDArray[np.float64]


class _Epochs(TypedDict):
    epochs: Count


class _Settings(TypedDict):
    optim: _Epochs


# label, colour, line style, width and order: where lines coincide, the upper ones let the lower ones show
_PARTS: dict[str, tuple[str, str, Any, float, float]] = {
    "loss": ("L", BLACK, LINES[0], 2.2, 2.1),
    "loss_weak": ("L1 (weak)", BLUE, LINES[1], 1.4, 2.4),
    "loss_strong": ("L2 (strong)", GREEN, LINES[2], 1.6, 2.3),
    "loss_basic": ("L3 (basic)", VERMILION, LINES[0], 1.1, 2.2),
}
_MOST_RUNS = 4
_MOST_DROPS = 6
_NARROW = 1 / 3  # of the width, for a warm-up that is most of the run
_SMOOTH = 60  # windows per run over which the bold line averages


def curves(runs: Sequence[Path]) -> Figure:
    """A column per run: loss above, kNN accuracy below; the warm-up shaded, drops of the rate marked.

    Raises `InputError` where a run has logged nothing.
    """
    require(
        1 <= len(runs) <= _MOST_RUNS, f"curves shows 1 to {_MOST_RUNS} runs side by side, got {len(runs)}"
    )
    logs = [read_metrics(run) for run in runs]
    picture = figure(4.6, width=7.2 if len(runs) > 1 else 4.6)
    grid = picture.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False, height_ratios=(1.5, 1))
    for (loss, knn), run, log in zip(grid.T, runs, logs):
        steps = [record for record in log if "loss" in record]
        warmup = max((r["step"] for r in steps if r.get("stage") == "warm-up"), default=0)
        _losses(loss, steps)
        _accuracy(knn, [record for record in log if "knn_top1" in record])
        for ax in (loss, knn):
            if warmup:
                ax.axvspan(0, warmup, color="#EFEFEF", lw=0, zorder=0, label="warm-up (MoCo)")
            _drops(ax, steps, factors=ax is loss and len(runs) <= 2)
            ax.set_xlim(0, log[-1]["step"])
            _gaps(ax, log)
        _epochs(loss, run, warmup, _narrow(loss, warmup, log[-1]["step"]))
        loss.set_title(shorten(run.absolute().name, 40), pad=8)
        knn.set_xlabel("training step")
    grid[0][0].set_ylabel("loss")
    grid[1][0].set_ylabel("kNN top-1 accuracy (%)")
    top = max(record["loss"] for log in logs for record in log if "loss" in record)
    grid[0][0].set_ylim(0, 1.12 * top)
    handles, labels = grid[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=6 if len(runs) > 1 else 3)
    return picture


def _losses(ax: Axes, steps: list[Record]) -> None:
    """Every logged value pale, and a running mean within each stage on top."""
    at = np.array([record["step"] for record in steps])
    warming = np.array([record.get("stage") == "warm-up" for record in steps])
    for name, (label, color, line, width, order) in _PARTS.items():
        values = np.array([record.get(name, np.nan) for record in steps], float)
        # the warm-up has L3 alone, which is the whole loss
        shown = ~warming if name in ("loss_weak", "loss_strong") else np.ones_like(warming)
        if not np.any(values[shown] != 0):
            continue  # a term that the run switches off
        ax.plot(at[shown], values[shown], color=color, lw=0.5, alpha=0.3)
        smooth = np.full_like(values, np.nan)
        for stage in (warming, ~warming):
            smooth[stage] = running_mean(values[stage], max(1, len(values) // _SMOOTH))
        ax.plot(at[shown], smooth[shown], color=color, linestyle=line, lw=width, zorder=order, label=label)
    ax.grid(axis="y")


def running_mean(values: Values, window: int) -> Values:
    """Centred mean over `window` values, over what there is at the ends. [n] -> [n]"""
    if len(values) == 0:
        return values
    total, count = np.convolve(values, np.ones(window)), np.convolve(np.ones(len(values)), np.ones(window))
    first = (window - 1) // 2
    return (total / count)[first : first + len(values)]


def _accuracy(ax: Axes, tested: list[Record]) -> None:
    """Every evaluation; the first is the untrained encoder."""
    ax.grid(axis="y")
    if not tested:
        ax.text(0.5, 0.5, "no evaluation logged", transform=ax.transAxes, ha="center", va="center")
        return
    at, accuracy = [r["step"] for r in tested], [r["knn_top1"] for r in tested]
    ax.margins(y=0.15)
    ax.plot(at, accuracy, color=BLUE, marker="o", markersize=3, clip_on=False, label="kNN")
    if at[0] == 0:
        ax.axhline(accuracy[0], color=GREY, lw=0.9, linestyle=(0, (4, 2)))
        ax.annotate(
            "untrained", (1, accuracy[0]), (-2, -2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="top", fontsize=7, color="#5A5A5A",
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
    ax.annotate(
        f"{accuracy[-1]:.1f}", (at[-1], accuracy[-1]), (-3, 4), textcoords="offset points", ha="right",
        fontsize=7.5, path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip


def _drops(ax: Axes, steps: list[Record], *, factors: bool) -> None:
    """Mark where the learning rate drops, where there is room with the factor."""
    rates = [(record["step"], record["lr"]) for record in steps if "lr" in record]
    drops = [(step, old, new) for (step, old), (_, new) in pairwise(rates) if new < old]
    if len(drops) > _MOST_DROPS:
        return  # a cosine falls at every step
    for number, (step, old, new) in enumerate(drops):
        label = None if number else "learning rate drops"
        ax.axvline(step, color=GREY, lw=0.9, linestyle=(0, (1, 1)), zorder=0.5, label=label)
        if factors:
            side = -1 if step > 0.9 * rates[-1][0] else 1
            ax.annotate(
                f"×{new / old:.2g}", (step, 1), (2 * side, -2 - 8 * number),
                xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="left" if side > 0 else "right", va="top", fontsize=7,
                color="#5A5A5A",
            )  # fmt: skip


def _narrow(ax: Axes, warmup: int, last: int) -> Any:
    """Give the method's phase room beside a warm-up of most steps. Returns where the axis has a step."""
    if not last / 2 < warmup < last:
        return lambda step: step
    # ten times as long to both sides, since nothing is drawn beyond
    steps = (-9 * warmup, warmup, 10 * last - 9 * warmup)
    places = (-9 * _NARROW, _NARROW, 10 - 9 * _NARROW)
    along, back = partial(np.interp, xp=steps, fp=places), partial(np.interp, xp=places, fp=steps)
    ax.set_xscale("function", functions=(along, back))
    later = [tick for tick in MaxNLocator(4, integer=True).tick_values(warmup, last) if warmup < tick <= last]
    ax.set_xticks([0, warmup, *(tick for tick in later if tick - warmup > 0.1 * (last - warmup))])
    return along


def _gaps(ax: Axes, log: list[Record]) -> None:
    """Hatch where lines of the log are lost."""
    at = [0, *(record["step"] for record in log)]
    lost = [number for number, record in enumerate(log) if "lost" in record]
    for number in lost:
        label = "lines lost" if number == lost[0] else None
        ax.axvspan(at[number], at[number + 1], fill=False, ec=GREY, lw=0, hatch="///", zorder=0, label=label)


def _epochs(ax: Axes, run: Path, warmup: int, place: Any) -> None:
    """A second axis in epochs after the warm-up, once the run has ended and so tells their length; `place`
    is where the first one has a step."""
    settings, result = Path(run) / "config.json", Path(run) / "result.json"
    if not (settings.is_file() and result.is_file()):
        return
    epochs: int = typed(read_json(settings), _Settings, str(settings))["optim"]["epochs"]
    total = read_ended(result)["steps"]
    per_epoch = (total - warmup) / epochs
    if per_epoch > 0:
        there: Any = lambda step: (step - warmup) / per_epoch  # noqa: E731
        back: Any = lambda epoch: place(epoch * per_epoch + warmup)  # noqa: E731
        axis = ax.secondary_xaxis("top", functions=(there, back))
        axis.set_xlabel("epoch after the warm-up", labelpad=3)
        ticks = MaxNLocator(4, integer=True).tick_values(0, epochs)
        axis.set_ticks([tick for tick in ticks if 0 <= tick <= epochs])
