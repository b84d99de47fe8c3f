"""Evaluation of a run: `python -m a2mc_fast.evaluate PROTOCOL RUN [--FLAG VALUE ...]`.

Prints a table and writes RUN/PROTOCOL.json; protocols with one classifier also save the test clips' scores,
which `ensemble` adds up. `compare` makes one table of many results. The data file and protocol are those of
the run unless `--data` and `--split` say otherwise. torch is imported when a protocol begins.
"""

from __future__ import annotations

from typing import Annotated

import tyro
from tyro.conf import subcommand

from a2mc_fast.errors import exit_on_error, one_speaks, require, tell
from a2mc_fast.evaluation.settings import Compare, Ensemble, Finetune, Knn, Linear, Semi, Transfer
from a2mc_fast.evaluation.tables import read_results, table


def compare(options: Compare) -> None:
    """Print one table of saved results."""
    require(
        len(options.results) >= 1, "compare needs at least one result: a JSON file or the folder of a run"
    )
    tell(table([result for path in options.results for result in read_results(path)]))


def main(args: list[str] | None = None) -> None:
    """The command line: PROTOCOL RUN [--FLAG VALUE ...]."""
    with exit_on_error():
        protocols = (
            Annotated[Knn, subcommand("knn")]
            | Annotated[Linear, subcommand("linear")]
            | Annotated[Finetune, subcommand("finetune")]
            | Annotated[Semi, subcommand("semi")]
            | Annotated[Transfer, subcommand("transfer")]
            | Annotated[Ensemble, subcommand("ensemble")]
            | Annotated[Compare, subcommand("compare")]
        )
        with one_speaks():
            chosen = tyro.cli(protocols, args=args, prog="python -m a2mc_fast.evaluate")
        if isinstance(chosen, Compare):
            compare(chosen)
            return
        from a2mc_fast.evaluation.results import ensemble, evaluate

        if isinstance(chosen, Ensemble):
            ensemble(chosen)
        else:
            evaluate(chosen)


if __name__ == "__main__":
    main()
