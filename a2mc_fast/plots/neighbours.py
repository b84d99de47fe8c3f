"""Query clips and their nearest neighbours as skeleton strips (the paper's Fig. 11)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch.nn.functional import one_hot

from a2mc_fast import rng
from a2mc_fast.errors import require
from a2mc_fast.evaluation import protocols
from a2mc_fast.plots.skeletons import Array, Room, draw_strip, even_frames, extent, legend_lines, persons_seen
from a2mc_fast.plots.style import BLUE, VERMILION, WIDTH, class_label, figure
from a2mc_fast.run.opened import Opened

_TITLE = 0.42  # inches above a strip
_FLAT = 0.3  # height by width below which a strip shows one frame less
_BORDERS: dict[bool, dict[str, Any]] = {
    True: {"edgecolor": BLUE, "lw": 1.1, "linestyle": "-"},
    False: {"edgecolor": VERMILION, "lw": 1.1, "linestyle": (0, (3, 2))},
}


class Match(NamedTuple):
    """A query among the test clips and its nearest training clips."""

    query: int
    neighbours: list[int]
    similarity: list[float]  # cosine, highest first


class _Row(NamedTuple):
    """A query and its neighbours as they are drawn."""

    clips: list[Array]
    persons: list[list[int]]
    labels: list[int]
    moments: list[int]
    room: Room

    @property
    def height(self) -> float:
        """Of a strip, by its width."""
        left, right, low, high = self.room
        return (high - low) / (len(self.moments) * (right - left + 0.1))


def neighbours(run: Opened, *, queries: int = 5, k: int = 4, frames: int = 3, seed: int = 0) -> Figure:
    """A row per query: the test clip, then its k nearest training clips with their cosine similarity.

    A neighbour of the query's class has a solid blue frame and a tick, any other a dashed red one and a
    cross.
    """
    found = nearest(run, queries, k, seed)
    rows = [_row(run, match, frames) for match in found]
    # every row is as high as its strips need at the width of a column
    heights = [WIDTH / (k + 1) * row.height + _TITLE for row in rows]
    picture = figure(sum(heights) + 0.35)
    grid = picture.subplots(len(rows), k + 1, squeeze=False, height_ratios=heights)
    for axes, match, row, height in zip(grid, found, rows, heights):
        weight = 0.75 if height > 0.9 else 0.55
        for place, (ax, clip, persons) in enumerate(zip(axes, row.clips, row.persons)):
            look: dict[str, Any] = {"slot": row.room, "weight": weight, "bar": place == 0}
            draw_strip(ax, clip, run.clips.skeleton, row.moments, persons, **look)
            ax.set_xticks([])
            name = class_label(row.labels[place], run.clips.class_names, 22)
            if place == 0:
                ax.set_title(f"query\n{name}", fontsize=7, fontweight="bold")
            else:
                same = row.labels[place] == row.labels[0]
                similarity = f"cosine {match.similarity[place - 1]:.3f}"
                ax.set_title(f"{'✓' if same else '✗'} {name}\n{similarity}", fontsize=7)
                ax.spines[:].set(visible=True, **_BORDERS[same])
    legend: list[Artist] = list(
        legend_lines(1 + max(person for row in rows for seen in row.persons for person in seen))
    )
    legend += [
        Patch(facecolor="none", label=f"{mark} {text} class", **_BORDERS[same])
        for same, mark, text in ((True, "✓", "the query's"), (False, "✗", "another"))
    ]
    picture.legend(handles=legend, loc="outside lower center", ncols=len(legend))
    return picture


def _row(run: Opened, match: Match, frames: int) -> _Row:
    """A query and its neighbours as they are drawn, all in the room that the largest needs."""
    shown = torch.tensor([match.query, *match.neighbours], device=run.clips.device)
    clips = [clip.cpu().numpy() for clip in run.views.whole(shown)]
    persons = [persons_seen(clip) for clip in clips]
    for count in (frames, frames - 1):
        moments = even_frames(clips[0].shape[0], count)
        left, right, low, high = zip(*(extent([clip], moments, seen) for clip, seen in zip(clips, persons)))
        room = min(left), max(right), min(low), max(high)
        row = _Row(clips, persons, run.clips.labels[shown].tolist(), moments, room)
        if count <= 2 or row.height >= _FLAT:
            break  # two persons far apart would be tiny
    return row


def nearest(run: Opened, queries: int, k: int, seed: int) -> list[Match]:
    """Random test clips, of as many classes as possible, and their nearest training clips."""
    gallery, test = run.labelled("training"), run.labelled("test")
    require(len(gallery) >= k, f"--k {k}: there are only {len(gallery)} training clips")
    chosen = spread_over_classes(test, run.clips.labels[test], queries, seed)
    branch = run.trained()
    known, asked = (protocols.encode(branch, run.views, index) for index in (gallery, chosen))
    similarity, place = protocols.nearest(known, asked, k)
    return [Match(int(q), gallery[p].tolist(), s.tolist()) for q, p, s in zip(chosen, place, similarity)]


def spread_over_classes(index: torch.Tensor, labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` clips in random order, no class twice before every class has come once. [n] -> [count]"""
    order = rng.permutation(seed, 0, rng.STREAM_EVALUATE, len(index), index.device)
    shuffled = labels[order].unsqueeze(1)
    turn = one_hot(shuffled.squeeze(1)).cumsum(0).gather(1, shuffled).squeeze(1)
    return index[order[turn.argsort(stable=True)[:count]]]
