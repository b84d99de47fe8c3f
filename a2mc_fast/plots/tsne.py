"""t-SNE of test features, by class (the paper's Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from a2mc_fast.errors import require
from a2mc_fast.evaluation.protocols import encode
from a2mc_fast.evaluation.scores import accuracy
from a2mc_fast.plots.style import class_label, figure, mark
from a2mc_fast.run.opened import Opened

_DEFAULT_CLASSES, _MOST_CLASSES = 10, 20
_MOST_PERPLEXITY = 30


def tsne(run: Opened, *, classes: Sequence[int] = (), untrained: bool = False) -> Figure:
    """The test clips of some classes (default: the first ten) as points whose neighbours have like features.

    With `untrained`, the encoder before training is shown beside. Raises `InputError` for a class that the
    test clips do not have.
    """
    index, labels = chosen(run, classes)
    branches = [*([run.untrained()] if untrained else []), run.trained()]
    picture = figure(3.3, width=7.2 if untrained else 4.7)
    panels = picture.subplots(1, len(branches), squeeze=False)[0]
    for ax, branch, name in zip(panels, branches, ("untrained", "trained")[-len(branches) :]):
        features = encode(branch, run.views, index)
        unit = torch.nn.functional.normalize(features, dim=1).cpu().numpy()
        # from the first two principal components, the same every time
        perplexity = min(_MOST_PERPLEXITY, (len(unit) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
        pure = neighbour_agreement(features, run.clips.labels[index])
        _scatter(ax, points, labels, run.clips.class_names)
        ax.set_title(f"{name}\nnearest neighbour of the same class: {pure:.0f} %")
    handles, names = panels[0].get_legend_handles_labels()
    picture.legend(handles, names, loc="outside right center", handletextpad=0.2)
    picture.suptitle(f"{run.name}, {run.config.split}: {len(index)} test clips", fontsize=8.5)
    return picture


def chosen(run: Opened, classes: Sequence[int]) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Numbers and labels of the test clips of the classes."""
    test = run.labelled("test")
    labels = run.clips.labels[test]
    present = sorted(set(labels.tolist()))
    wanted = sorted(set(classes)) or present[:_DEFAULT_CLASSES]
    for label in wanted:
        require(
            label in present,
            f"--classes {label}: protocol {run.config.split!r} has no test clip of that class "
            f"(it has {len(present)} classes from {present[0]} to {present[-1]})",
        )
    number = len(wanted)
    require(number <= _MOST_CLASSES, f"--classes: at most {_MOST_CLASSES} can be told apart, got {number}")
    keep = torch.isin(labels, torch.tensor(wanted, device=labels.device))
    require(int(keep.sum()) >= 4, f"t-SNE needs at least 4 test clips, these classes have {int(keep.sum())}")
    return test[keep], labels[keep].cpu().numpy()


def neighbour_agreement(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of clips whose nearest other clip, by cosine similarity, has their class, in percent."""
    unit = torch.nn.functional.normalize(features, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    return accuracy(labels[nearest], labels)


def _scatter(ax: Axes, points: NDArray[np.float32], labels: NDArray[np.int64], names: Sequence[str]) -> None:
    """A colour and a marker per class."""
    for number, label in enumerate(sorted(set(labels.tolist()))):
        here = points[labels == label]
        name = f"{class_label(label, names)} ({len(here)})"
        ax.scatter(here[:, 0], here[:, 1], s=13, label=name, **mark(number))
    # the axes of t-SNE have no unit
    ax.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    middle, half = (points.max(0) + points.min(0)) / 2, 0.54 * float(np.ptp(points, axis=0).max())
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
    ax.set_box_aspect(1)
