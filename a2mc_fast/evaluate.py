"""Evaluation of a run: `python -m a2mc_fast.evaluate PROTOCOL RUN [--FLAG VALUE ...]`.

Prints a table and writes RUN/PROTOCOL.json; protocols with one classifier also save the test clips' scores,
which `ensemble` adds up. `compare` makes one table of many results. The data file and protocol are those of
the run unless `--data` and `--split` say otherwise. torch is imported when a protocol begins.
"""

from __future__ import annotations

import tyro

from a2mc_fast.errors import exit_on_error, one_speaks
from a2mc_fast.evaluation.comparison import compare
from a2mc_fast.evaluation.settings import Compare, Ensemble, Finetune, Knn, Linear, Semi, Transfer

Asked = Knn | Linear | Finetune | Semi | Transfer | Ensemble | Compare


def main(args: list[str] | None = None) -> None:
    """The command line: PROTOCOL RUN [--FLAG VALUE ...]."""
    with exit_on_error():
        with one_speaks():
            chosen: Asked = tyro.cli(Asked, args=args, prog="python -m a2mc_fast.evaluate")
        if isinstance(chosen, Compare):
            compare(chosen.results, chosen.out)
            return
        from a2mc_fast.evaluation.results import ensemble, evaluate

        if isinstance(chosen, Ensemble):
            ensemble(chosen)
        else:
            evaluate(chosen)


if __name__ == "__main__":
    main()
