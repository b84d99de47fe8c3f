"""The look shared by every picture.

Colours are Okabe and Ito's, which differ for colour-blind readers and in grey; each is paired with a line
style, marker or hatch of its own. Sizes are for print: text of 8 points in a figure at most 7.2 inches wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from a2mc_fast.errors import one_line

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"

COLORS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
LINES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "oo", "++")

WIDTH = 7.2  # inches, two columns of print

_RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.color": "#D9D9D9",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a name may hold dollars
    "svg.hashsalt": "a2mc_fast",
    "savefig.dpi": 200,
}


def mark(number: int) -> dict[str, Any]:
    """Colour and marker of the number-th of many groups of points; beyond the colours, hollow."""
    color = COLORS[number % len(COLORS)]
    hollow = number >= len(COLORS)
    return {
        "marker": MARKERS[number % len(MARKERS)],
        "facecolors": "white" if hollow else color,
        "edgecolors": color if hollow else "white",
        "linewidths": 0.9 if hollow else 0.3,
    }


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure in inches that finds room for its own labels."""
    matplotlib.rcParams.update(_RC)
    return Figure(figsize=(width, height), layout="constrained")


def shorten(text: str, most: int) -> str:
    """The text, which may come from a file, in printable letters, and cut with an ellipsis beyond `most`."""
    text = one_line(text, 500)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def class_label(label: int, names: Sequence[str], most: int = 24) -> str:
    """A class by its name, or by its number where it has none."""
    return shorten(names[label], most) if label < len(names) else f"class {label}"
