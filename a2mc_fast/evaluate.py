"""Evaluation of a run: `python -m a2mc_fast.evaluate knn RUN` or `linear RUN`.

Prints a table and writes RUN/knn.json or RUN/linear.json. The data file and protocol are those of the run
unless `--data` and `--split` say otherwise.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from a2mc_fast import checkpoint
from a2mc_fast.augment import Views
from a2mc_fast.checkpoint import Checkpoint
from a2mc_fast.errors import exit_on_error, require
from a2mc_fast.files import write_json
from a2mc_fast.model import Branch
from a2mc_fast.protocols import LinearConfig, knn_accuracy, linear_evaluation
from a2mc_fast.runlog import machine
from a2mc_fast.train import load_clips, pick_device


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every protocol asks for."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or a checkpoint."""
    data: str = ""
    """Packed clips; empty = the data of the run."""
    split: str = ""
    """Protocol; empty = that of the run."""
    untrained: bool = False
    """Also evaluate the encoder as it was before training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU if there is one."""
    out: str = ""
    """JSON file to write; empty = RUN/PROTOCOL.json."""

    @property
    def protocol(self) -> str:
        """Its name on the command line."""
        return type(self).__name__.lower()

    def measure(self, branch: Branch, views: Views, split: str) -> dict[str, float]:
        """Accuracies in percent."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """k nearest neighbours by cosine similarity (the paper's Table III)."""

    k: int = 1
    """Neighbours that vote."""

    def measure(self, branch: Branch, views: Views, split: str) -> dict[str, float]:
        return {"top1": knn_accuracy(branch, views, split, self.k)}


@dataclass(frozen=True, kw_only=True)
class Linear(LinearConfig, Evaluation):
    """A linear classifier on the frozen encoder (the paper's Table I)."""

    def measure(self, branch: Branch, views: Views, split: str) -> dict[str, float]:
        result = linear_evaluation(branch, views, split, self)
        return {"top1_best": result.best, "top1_last": result.last}


def evaluate(options: Evaluation) -> dict[str, Any]:
    """Evaluate a run's query encoder and write the result. Returns what was written."""
    loaded = checkpoint.load(options.run)
    config = replace(
        loaded.config,
        data=options.data or loaded.config.data,
        split=options.split or loaded.config.split,
        run=replace(loaded.config.run, device=options.device),
    )
    device = pick_device(config)
    clips = load_clips(config, device)
    check_skeleton(loaded, clips.skeleton.num_joints, clips.num_persons, config.data or "the built-in set")
    views = Views(clips, config.views, config.seed)

    start = time.perf_counter()
    result: dict[str, Any] = {
        "protocol": options.protocol,
        "run": str(options.run),
        "preset": config.preset,
        "steps": loaded.step,
        "data": config.data or "synthetic",
        "split": config.split,
        "stream": config.stream,
        "encoder": config.encoder.name,
        **options.measure(loaded.build(device).query, views, config.split),
    }
    result["seconds"] = round(time.perf_counter() - start, 2)
    if options.untrained:
        result["untrained"] = options.measure(loaded.build_untrained(device).query, views, config.split)
    shared = vars(Evaluation(run=options.run))
    result["options"] = {name: value for name, value in asdict(options).items() if name not in shared}
    result.update(machine())
    folder = options.run if options.run.is_dir() else options.run.parent
    path = Path(options.out) if options.out else folder / f"{options.protocol}.json"
    write_json(path, result)
    print(f"{table(result)}\nwrote {path}")
    return result


def check_skeleton(loaded: Checkpoint, joints: int, persons: int, where: str) -> None:
    """The data must have the joints and persons that the encoder was trained on."""
    expected = (loaded.skeleton.num_joints, loaded.persons)
    require(
        (joints, persons) == expected,
        f"{loaded.path} was trained on {expected[0]} joints and {expected[1]} persons, "
        f"{where} has {joints} joints and {persons} persons",
    )


def table(result: dict[str, Any]) -> str:
    """One row per encoder, one column per accuracy."""
    untrained = result.get("untrained")
    names = [name for name in result if name.startswith("top1")]
    rows = [("trained", result)] + ([("untrained", untrained)] if untrained else [])
    head = f"{result['protocol']} {result['split']}"
    lines = [f"{head:<18}" + "".join(f"{name:>12}" for name in names)]
    lines += [f"{label:<18}" + "".join(f"{row[name]:>10.2f} %" for name in names) for label, row in rows]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """The command line: PROTOCOL RUN [--FLAG VALUE ...]."""
    with exit_on_error():
        protocols = (
            Annotated[Knn, tyro.conf.subcommand("knn")] | Annotated[Linear, tyro.conf.subcommand("linear")]
        )
        evaluate(tyro.cli(protocols, args=args, prog="python -m a2mc_fast.evaluate"))


if __name__ == "__main__":
    main()
