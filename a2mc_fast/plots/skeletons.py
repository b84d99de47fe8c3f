"""Stick figures of any `Skeleton`: frames of one clip, seen from the front and a little from the side.

Clips are arrays [T, C, V, M] in metres, normalised: z up, x from the left shoulder to the right one, so y is
forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from a2mc_fast.plots.style import BLACK, BLUE, ORANGE
from a2mc_fast.skeleton import Skeleton

Array = NDArray[np.float32]
Room = tuple[float, float, float, float]
"""What a frame needs in the picture: left, right, low, high, metres."""

MIDDLE, LEFT, RIGHT = 0, 1, 2
_SIDE_COLOR, _SIDE_WIDTH = (BLACK, ORANGE, BLUE), (1.5, 2.2, 1.1)
_PERSON_LINES = ("-", (0, (2.2, 0.9)))
_TURN, _TILT = np.deg2rad(35), np.deg2rad(8)
_BARS = (0.5, 1.0, 2.0, 5.0)  # lengths of the scale bar, metres


def sides(skeleton: Skeleton) -> list[int]:
    """MIDDLE, LEFT or RIGHT of every joint, by its name where that says so.

    Otherwise the lower number of a mirrored pair lies on the side of the lower joint of `axis_x`, whose first
    joint is the left one.
    """
    lower_is_left = skeleton.axis_x[0] <= skeleton.axis_x[1]
    result = []
    for joint, other in enumerate(skeleton.mirror):
        name = skeleton.joint_names[joint].lower() if skeleton.joint_names else ""
        named = "left" in name or "right" in name
        left = "left" in name if named else (joint < other) == lower_is_left
        result.append(MIDDLE if joint == other else LEFT if left else RIGHT)
    return result


def project(points: Array) -> Array:
    """The body turned a little to the right, seen from slightly above. [..., 3] -> [..., 2]"""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    right = y * np.sin(_TURN) - x * np.cos(_TURN)  # seen from the front, the body's right is on our left
    nearer = x * np.sin(_TURN) + y * np.cos(_TURN)
    return np.stack((right, z * np.cos(_TILT) - nearer * np.sin(_TILT)), -1)


def persons_seen(clip: Array) -> list[int]:
    """Persons that are not all zeros. clip [T, C, V, M]"""
    return [person for person in range(clip.shape[3]) if clip[..., person].any()]


def even_frames(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of `total` frames: actions happen there, not at the ends."""
    count = min(count, total)
    return [int((2 * part + 1) * total / (2 * count)) for part in range(count)]


def draw_pose(
    ax: Axes, points: Array, skeleton: Skeleton, person: int = 0, *, ghost: bool = False, weight: float = 1.0
) -> LineCollection:
    """One person: a line per bone, and a dot at every end of the trunk (the head). points [V, 2]

    A ghost is a pale shadow without sides, to compare another pose with.
    """
    side = sides(skeleton)
    bones = sorted(skeleton.bones, key=lambda bone: side[bone[0]] != LEFT)  # the thick ones lie below
    lines = LineCollection(
        [points[[joint, parent]] for joint, parent in bones],
        colors=["#B8B8B8" if ghost else _SIDE_COLOR[side[joint]] for joint, _ in bones],
        linewidths=[weight * (1.0 if ghost else _SIDE_WIDTH[side[joint]]) for joint, _ in bones],
        linestyles=[_PERSON_LINES[min(person, 1)]],
        capstyle="round" if person == 0 else "butt",
        zorder=1 if ghost else 2,
    )
    ax.add_collection(lines, autolim=False)
    inner = set(skeleton.parents)
    heads = [j for j in range(skeleton.num_joints) if j not in inner and side[j] == MIDDLE]
    if heads and not ghost:
        face = BLACK if person == 0 else "white"
        x, y = points[heads].T
        ax.scatter(x, y, s=16 * weight**2, c=face, edgecolors=BLACK, linewidths=0.9 * weight, zorder=3)
    return lines


def draw_strip(
    ax: Axes,
    clip: Array,
    skeleton: Skeleton,
    frames: Sequence[int],
    persons: Sequence[int],
    *,
    behind: Array | None = None,
    slot: Room | None = None,
    weight: float = 1.0,
    bar: bool = True,
) -> None:
    """Frames of a clip side by side, to scale. clip and behind [T, C, V, M]

    `behind` is drawn as a ghost below it. `slot` is the room of every frame, from `extent`; several strips
    that share it share their scale.
    """
    left, right, low, high = slot or extent([c for c in (clip, behind) if c is not None], frames, persons)
    tall = high - low
    gap = 0.08 * (right - left) + 0.06 * tall
    step = right - left + gap
    for place, frame in enumerate(frames):
        shift = np.array([place * step - left, 0], np.float32)
        for layer, ghost in ((behind, True), (clip, False)):
            if layer is not None:
                for person in persons:
                    points = project(layer[frame, :, :, person].T) + shift
                    draw_pose(ax, points, skeleton, person, ghost=ghost, weight=weight)
    ax.set_aspect("equal")
    ax.set_xlim(-gap - 0.08 * tall * bar, len(frames) * step)
    ax.set_ylim(low - 0.04 * tall, high + 0.07 * tall)
    ax.set_yticks([])
    ax.set_xticks([place * step + (right - left) / 2 for place in range(len(frames))])
    ax.set_xticklabels([str(frame + 1) for frame in frames])
    ax.tick_params(length=0, pad=1)
    ax.spines[:].set_visible(False)
    if bar:
        x = -gap - 0.02 * tall
        length = max((size for size in _BARS if size <= 0.5 * tall), default=_BARS[0])
        ax.plot([x, x], [low, low + length], color=BLACK, lw=1.2, solid_capstyle="butt")
        ax.annotate(
            f"{length:g} m", (x, low + length / 2), (-2, 0), textcoords="offset points", rotation=90,
            ha="right", va="center", fontsize=6.5,
        )  # fmt: skip


def extent(clips: Sequence[Array], frames: Sequence[int], persons: Sequence[int]) -> Room:
    """The room that fits each of these frames of every clip [T, C, V, M]."""
    drawn = [project(np.moveaxis(clip[frames][..., persons], 1, -1)).reshape(-1, 2) for clip in clips]
    (left, low), (right, high) = (ends(np.concatenate(drawn), 0).tolist() for ends in (np.min, np.max))
    return left, right, low, max(high, low + _BARS[0])


def legend_lines(persons: int) -> list[Line2D]:
    """Legend entries of the sides and, where there are two persons, of the second."""
    names = ("trunk", "left side", "right side")
    entries = [
        Line2D([], [], color=_SIDE_COLOR[s], lw=_SIDE_WIDTH[s], label=names[s]) for s in (LEFT, RIGHT, MIDDLE)
    ]
    if persons > 1:
        entries.append(
            Line2D([], [], color=BLACK, lw=1.3, linestyle=_PERSON_LINES[1], label="second person", marker="o",
                   markerfacecolor="white", markersize=4)
        )  # fmt: skip
    return entries
