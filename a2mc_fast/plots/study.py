"""Accuracies of a study, set by set: the untrained encoder and every row of `a2mc_fast.ablate FILE ...`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from a2mc_fast.errors import require
from a2mc_fast.evaluation.rows import LABELS
from a2mc_fast.files import read_json
from a2mc_fast.plots.style import figure, mark

_PANELS = (
    ("kNN top-1 accuracy (%)", ("top1_knn_fresh", "top1_knn")),
    ("linear top-1 accuracy (%)", ("top1_linear_last_fresh", "top1_linear_last")),
)


def study(results: Path) -> Figure:
    """kNN to the left, linear to the right; one point per seed, a line through each row's mean.

    Raises `InputError` if the file is not the study.json of a2mc_fast.ablate.
    """
    content = read_json(results)
    is_study = isinstance(content, dict) and content.get("format") == "a2mc-study/1"
    require(is_study, f"{results} is not the study.json of a2mc_fast.ablate FILE FILE ...")
    picture = figure(2.7)
    names = list(content["sets"][0]["rows"])
    width = 0.8 / len(names)
    for ax, (title, kinds) in zip(picture.subplots(1, len(_PANELS)), _PANELS):
        for number, name in enumerate(names):
            for at, one in enumerate(content["sets"]):
                row = one["rows"][name]
                kind = next(kind for kind in kinds if kind in row)
                place = at - 0.4 + width * (number + 0.5)
                label = LABELS.get(name, name) if at == 0 else None
                values = [run[kind] for run in row["runs"]]
                look = mark(number)
                ax.scatter([place] * len(values), values, s=16, label=label, **look)
                ax.hlines(row[kind], place - width / 3, place + width / 3, colors=look["facecolors"], lw=1)
        ax.set_xticks(range(len(content["sets"])), [Path(one["data"]).stem for one in content["sets"]])
        ax.set_xlim(-0.5, len(content["sets"]) - 0.5)
        ax.grid(axis="y")
        ax.set_ylabel(title)
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
    return picture
