"""Pictures: `python -m a2mc_fast.plots curves|tsne|confusion|attack|neighbours|study ... --out FILE`.

torch and matplotlib are imported when a picture is drawn, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from a2mc_fast.errors import CountOrNone, Range, check_ranges, exit_on_error
from a2mc_fast.evaluation.settings import OfRun
from a2mc_fast.plots.output import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Seed = Annotated[int, Range("[0, 2147483647]")]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What every picture asks for."""

    out: str = ""
    """Picture to write; the suffix is .png, .pdf or .svg; empty = PICTURE.png."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def name(self) -> str:
        """Its name on the command line, and that of the function that draws it and of its module."""
        return type(self).__name__.lower()


@dataclass(frozen=True, kw_only=True)
class Curves(Written):
    """Loss, its parts and kNN accuracy over the steps of runs (the paper's Fig. 8, 9)."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of one to four runs, shown side by side."""


@dataclass(frozen=True, kw_only=True)
class Confusion(Written):
    """Confusion matrices of evaluation results (Fig. 10)."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """JSON files of a2mc_fast.evaluate, or folders of runs for all results in them; one to four in all."""
    classes: tuple[CountOrNone, ...] = ()
    """Show these classes only; none = all."""


@dataclass(frozen=True, kw_only=True)
class Tsne(Written, OfRun):
    """t-SNE of the features of test clips (Fig. 4)."""

    classes: tuple[CountOrNone, ...] = ()
    """Classes to show; none = the first ten."""
    untrained: bool = False
    """Also show the encoder as it was before training."""


@dataclass(frozen=True, kw_only=True)
class Attack(Written, OfRun):
    """A clip before and after the attack, its views, and their class distributions (Fig. 3)."""

    clip: str = ""
    """Name or number of the clip; empty = the first test clip."""
    frames: Annotated[int, Range("[1, 12]")] = 6
    """Frames to show, evenly spread."""
    seed: _Seed = 0
    """Seed of the two views."""


@dataclass(frozen=True, kw_only=True)
class Neighbours(Written, OfRun):
    """Query clips and their nearest neighbours as skeleton strips (Fig. 11)."""

    queries: Annotated[int, Range("[1, 12]")] = 5
    """Test clips to ask with, of different classes."""
    k: Annotated[int, Range("[1, 6]")] = 4
    """Neighbours to show, from the training clips."""
    frames: Annotated[int, Range("[1, 6]")] = 3
    """Frames of every clip, evenly spread."""
    seed: _Seed = 0
    """Seed of the choice of queries."""


@dataclass(frozen=True, kw_only=True)
class Study(Written):
    """Accuracies of every row on several sets."""

    results: tyro.conf.Positional[Path]
    """The study.json of a2mc_fast.ablate FILE FILE ..."""


Picture = Curves | Tsne | Confusion | Attack | Neighbours | Study


def draw(picture: Picture) -> Figure:
    """Drawn by the function of the picture's name, which takes its options and the opened run."""
    # no other picture's module: torch and scikit-learn take seconds each
    function = getattr(import_module(f"a2mc_fast.plots.{picture.name}"), picture.name)
    asked: dict[str, Any] = {f.name: getattr(picture, f.name) for f in fields(picture) if f.name != "out"}
    if isinstance(picture, OfRun):
        from a2mc_fast.run.opened import open_run

        asked["run"] = open_run(*(asked.pop(f.name) for f in fields(OfRun)))
    return function(**asked)


def main(args: list[str] | None = None) -> None:
    """The command line: PICTURE INPUT ... [--FLAG VALUE ...]."""
    with exit_on_error():
        picture: Picture = tyro.cli(Picture, args=args, prog="python -m a2mc_fast.plots")
        write_picture(Path(picture.out or f"{picture.name}.png"), lambda: draw(picture))


if __name__ == "__main__":
    main()
