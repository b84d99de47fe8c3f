"""A clip before and after the attack, its weak and strong view, and what the class layer makes of each (the
paper's Fig. 3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from torch import Tensor

from a2mc_fast.errors import InputError, require
from a2mc_fast.plots.skeletons import draw_strip, even_frames, extent, legend_lines, persons_seen
from a2mc_fast.plots.style import GREY, SKY, class_label, figure, shorten
from a2mc_fast.run import weights
from a2mc_fast.run.opened import Opened

_TOP = 5
_NUMBER_WIDTH = 0.09  # of the axis, that a bar's number takes


class Stage(NamedTuple):
    """One row of the picture."""

    name: str
    clip: Tensor  # [1, T, C, V, M]
    probability: Tensor  # [classes]


def attack(run: Opened, *, clip: str = "", frames: int = 6, seed: int = 0) -> Figure:
    """Four rows: the clip, the attacked clip (the clip as its shadow), and a weak and a strong view of it.

    Beside each, the class distribution that the attack flattens, its five highest bars marked. Raises
    `InputError` for an unknown clip.
    """
    number = find_clip(run, clip)
    stages = attacked_stages(run, number, seed)
    whole = stages[0].clip[0].cpu().numpy()
    skeleton, persons = run.clips.skeleton, persons_seen(whole)
    moments = even_frames(whole.shape[0], frames)
    # the first two rows share their scale; a view may be sheared or filtered to any size
    room = extent([whole, stages[1].clip[0].cpu().numpy()], moments, persons)

    picture = figure(7.4)
    grid = picture.subplots(len(stages), 2, width_ratios=(2.3, 1), squeeze=False)
    highest = max(float(stage.probability.max()) for stage in stages)
    for row, ((strip, bars), stage) in enumerate(zip(grid, stages)):
        drawn = stage.clip[0].cpu().numpy()
        shadow, slot = whole if row == 1 else None, room if row < 2 else None
        draw_strip(strip, drawn, skeleton, moments, persons, behind=shadow, slot=slot)
        strip.set_title(stage.name, loc="left")
        _bars(bars, stage.probability, highest)
    grid[-1][0].set_xlabel(f"frame of {whole.shape[0]}")
    grid[-1][1].set_xlabel("output of the attack's class layer")
    marks = [
        Patch(facecolor=SKY, edgecolor="black", hatch="////", label="five most probable classes"),
        Line2D([], [], color="black", lw=0.8, linestyle=(0, (4, 2)), label="uniform, 1/C"),
    ]
    picture.legend(handles=legend_lines(len(persons)) + marks, loc="outside lower center", ncols=6)
    label = int(run.clips.labels[number])
    action = f", {class_label(label, run.clips.class_names)}" if label >= 0 else ""
    picture.suptitle(f"{shorten(run.name, 30)}: {shorten(run.clips.names[number], 50)}{action}", fontsize=8.5)
    return picture


def find_clip(run: Opened, clip: str) -> int:
    """A clip by its name, else by its number; the first test clip where none is asked for."""
    if not clip:
        test = run.clips.split(run.config.split)[1]
        require(len(test) > 0, f"protocol {run.config.split!r} has no test clips: name one with --clip")
        return int(test[0])
    if clip in run.clips.names:
        return run.clips.names.index(clip)
    if clip.isdecimal() and int(clip) < len(run.clips):
        return int(clip)
    raise InputError(
        f"--clip {clip}: no clip has that name or number; numbers go from 0 to {len(run.clips) - 1}, "
        f"names look like {run.clips.names[0]!r}"
    )


def attacked_stages(run: Opened, number: int, seed: int) -> list[Stage]:
    """The clip and what Att-Aug makes of it, with the class distribution of each."""
    model, views = weights.whole(run.saved, run.clips.device), run.views
    model.eval()
    index = torch.tensor([number], device=run.clips.device)
    whole = views.whole(index)
    rho = model.attack(whole)
    # views are functions of (seed, step): steps that no training reaches stand for the seed
    step = -1 - seed
    _, _, weak, strong = views.draw(step, 1)
    length = float(torch.linalg.vector_norm(rho, dim=(2, 3)).max())
    clips = {
        "original": whole,
        f"attacked, ‖ρ‖ up to {length:.2f} m per person and frame (original in grey)": whole + rho,
        "weak view of the attacked clip": views.make(index, "weak", weak, step, rho),
        "strong view of the attacked clip": views.make(index, "strong", strong, step, rho),
    }
    with torch.no_grad():
        return [Stage(name, x, model.classify(x)[0].softmax(0).cpu()) for name, x in clips.items()]


def _bars(ax: Axes, probability: Tensor, highest: float) -> None:
    """The class distribution in percent; the five highest bars are hatched and carry their class."""
    percent = 100 * probability
    classes = len(percent)
    bars = ax.bar(range(classes), percent.tolist(), width=0.8, color="#DCDCDC", edgecolor=GREY, linewidth=0.4)
    line, before, level = 9 * highest, -math.inf, -math.inf
    for place in sorted(percent.topk(min(_TOP, classes)).indices.tolist()):
        bars[place].set(facecolor=SKY, edgecolor="black", hatch="////", linewidth=0.6)
        height = float(percent[place])
        if place - before < _NUMBER_WIDTH * classes and abs(height - level) < line:
            height = level + line  # above the number of its neighbour
        before, level = place, height
        ax.annotate(
            str(place), (place, height), (0, 1), textcoords="offset points", ha="center",
            va="bottom", fontsize=6.5, path_effects=[withStroke(linewidth=1.5, foreground="white")], zorder=4,
        )  # fmt: skip
    ax.axhline(100 / classes, color="black", lw=0.8, linestyle=(0, (4, 2)))
    distance = float((probability - 1 / classes).square().sum())
    ax.set_title(f"Σ (p − 1/C)² = {distance:.4f}")
    ax.set_ylim(0, 150 * highest)  # room for five numbers one above the other
    ax.set_xlim(-0.8, classes - 0.2)
    ax.set_xticks([])
    ax.set_ylabel("probability (%)")
