"""Evaluation of a run: `python -m a2mc_fast.evaluate PROTOCOL RUN [--FLAG VALUE ...]`.

Prints a table and writes RUN/PROTOCOL.json; protocols with one classifier also save the test clips' scores,
which `ensemble` adds up. `compare` makes one table of many results. The data file and protocol are those of
the run unless `--data` and `--split` say otherwise. torch is imported when a protocol begins.
"""

from __future__ import annotations

import csv
import hashlib
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import tyro
from tyro.conf import Positional, arg, subcommand

from a2mc_fast.config import Config, to_dict
from a2mc_fast.errors import exit_on_error, one_speaks, require
from a2mc_fast.evaluation.settings import FinetuneConfig, LinearConfig, SemiConfig
from a2mc_fast.evaluation.tables import FORMAT, accuracies, mean_and_std, read_results, table
from a2mc_fast.files import atomic_path, write_json

if TYPE_CHECKING:  # --help does not wait for torch
    from torch import Tensor

    from a2mc_fast.augment import Views
    from a2mc_fast.data import Clips
    from a2mc_fast.encoders.branch import Branch
    from a2mc_fast.evaluation.scores import Outcome, Scores
    from a2mc_fast.ranks import World
    from a2mc_fast.run.checkpoint import Checkpoint

_STREAM_WEIGHTS = {"joint": 0.6, "motion": 0.4, "bone": 0.6}  # AimCLR, HiCLR


class Measured(NamedTuple):
    """What a protocol found: the result's own entries, and the test clips' scores if it has any."""

    entries: dict[str, Any]
    scores: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every protocol asks for."""

    encodes: ClassVar[bool] = False
    """Whether most of the work is to encode clips, which ranks can share."""
    run: Annotated[Positional[Path], arg(metavar="RUN")]
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

    def shown(self, epoch: int, accuracy: float) -> None:
        """Tells the user on standard error how a training goes."""
        print(f"{self.protocol}: epoch {epoch}  top-1 {accuracy:.2f} %", file=sys.stderr)

    def resolved(self, encoder: str) -> dict[str, Any]:
        """The protocol's own options, as they are used with this encoder."""
        shared = Evaluation.__dataclass_fields__
        return {name: value for name, value in asdict(self).items() if name not in shared}

    def measure(self, branch: Branch, views: Views, split: str) -> Measured:
        """Accuracies in percent and what belongs to them. May train `branch`, which is not used again."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Knn(Evaluation):
    """k nearest neighbours by cosine similarity, which is retrieval (the paper's Table III)."""

    encodes: ClassVar[bool] = True
    k: int = 1
    """Neighbours that vote."""
    neighbours: str = ""
    """List the nearest training clips of every test clip in this .json or .csv file."""
    top: int = 5
    """How many to list."""

    def __post_init__(self) -> None:
        require(
            not self.neighbours or Path(self.neighbours).suffix in (".json", ".csv"),
            f"neighbours must be a .json or .csv file, got {self.neighbours}",
        )
        require(self.k >= 1 and self.top >= 1, f"k and top must be >= 1, got {self.k} and {self.top}")

    def measure(self, branch: Branch, views: Views, split: str) -> Measured:
        from a2mc_fast.evaluation.protocols import encode, labelled_split, nearest, vote
        from a2mc_fast.evaluation.scores import accuracy, confusion_matrix, details

        train, test = labelled_split(views, split)
        clips = views.clips
        gallery, queries = encode(branch, views, train), encode(branch, views, test)
        _, rows = nearest(gallery, queries, self.k)
        predicted, truth = vote(clips.labels[train][rows]), clips.labels[test]
        if self.neighbours and views.world.main:
            listed = min(self.top, len(train))
            similarity, rows = nearest(gallery, queries, listed)
            _write_neighbours(Path(self.neighbours), clips, test, train[rows], similarity)
        confusion = confusion_matrix(predicted, truth, clips.num_classes)
        return Measured({"top1": accuracy(predicted, truth), **details(confusion)})


@dataclass(frozen=True, kw_only=True)
class Linear(LinearConfig, Evaluation):
    """A linear classifier on the frozen encoder (the paper's Table I)."""

    encodes: ClassVar[bool] = True

    def resolved(self, encoder: str) -> dict[str, Any]:
        return {**super().resolved(encoder), "lr": self.learning_rate(encoder)}

    def measure(self, branch: Branch, views: Views, split: str) -> Measured:
        from a2mc_fast.evaluation.protocols import labelled_split, linear_evaluation

        outcome = linear_evaluation(branch, views, split, self, progress=self.shown)
        return _classified(outcome, views.clips, labelled_split(views, split)[1])


@dataclass(frozen=True, kw_only=True)
class Finetune(FinetuneConfig, Evaluation):
    """Encoder and a new classifier trained on all labels (the paper's Table VII)."""

    def measure(self, branch: Branch, views: Views, split: str) -> Measured:
        from a2mc_fast.evaluation.finetune import finetune
        from a2mc_fast.evaluation.protocols import check_classes, labelled_split

        train, test = labelled_split(views, split)
        check_classes(views, train, test, f"protocol {split!r}", self.allow_missing)
        return _classified(finetune(branch, views, train, test, self, progress=self.shown), views.clips, test)


@dataclass(frozen=True, kw_only=True)
class Transfer(Finetune):
    """Fine-tuning on another data set, given by --data (the paper's Table IV)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data), "transfer needs --data: the packed clips to tune and test on")


@dataclass(frozen=True, kw_only=True)
class Semi(SemiConfig, Evaluation):
    """Fine-tuning on a share of the labels, mean of several subsets (the paper's Tables VIII and IX)."""

    def shown(self, epoch: int, accuracy: float) -> None:
        if epoch == self.epochs:  # one line per subset
            super().shown(epoch, accuracy)

    def measure(self, branch: Branch, views: Views, split: str) -> Measured:
        import torch

        from a2mc_fast.evaluation.finetune import semi_supervised
        from a2mc_fast.evaluation.protocols import labelled_split
        from a2mc_fast.evaluation.scores import details

        test = labelled_split(views, split)[1]
        entries = []
        for share, clips, outcomes in semi_supervised(branch, views, split, self, progress=self.shown):
            runs = [{"top1_best": o.best, "top1_last": o.last} for o in outcomes]
            seeds = range(self.seed, self.seed + self.seeds)
            confusion = torch.stack([_confusion(o, views.clips, test) for o in outcomes]).sum(0)
            entries.append(
                {
                    "fraction": share,
                    "training_clips": clips,
                    **mean_and_std(runs),
                    "runs": [{"seed": seed, **run} for seed, run in zip(seeds, runs)],
                    **details(confusion),
                }
            )
        return Measured({"fractions": entries})


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Weighted sum of saved scores: joint, motion and bone streams (the paper's Tables II and X)."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
    """Folders of the runs, or files of scores."""
    protocol: Literal["linear", "finetune", "transfer"] = "linear"
    """Whose scores to read from the folders."""
    weights: tuple[float, ...] = ()
    """One weight per run; by default that of its stream: joint 0.6, motion 0.4, bone 0.6 (AimCLR)."""
    equal: bool = False
    """Weigh all runs alike (CMD)."""
    of: Literal["logits", "softmax"] = "logits"
    """What is summed: raw scores, or class probabilities."""
    out: str = ""
    """JSON file to write; empty = ensemble.json in the first run's folder."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """One table of many results."""

    results: Annotated[Positional[tuple[Path, ...]], arg(metavar="RESULT")]
    """JSON files that a protocol wrote, or folders of runs: all results in them."""


def evaluate(options: Evaluation) -> dict[str, Any]:
    """Evaluate a run's query encoder and write the result. Returns what was written.

    The ranks that torchrun started share the encoding of clips; rank 0 prints and writes.
    """
    from a2mc_fast.ranks import join
    from a2mc_fast.run import checkpoint
    from a2mc_fast.run.machine import pick_device

    with one_speaks():
        loaded = checkpoint.load(options.run)
    config = replace(
        loaded.config,
        data=options.data or loaded.config.data,
        split=options.split or loaded.config.split,
        run=replace(loaded.config.run, device=options.device),
    )
    with join(config, lambda: pick_device(config)) as world, one_speaks():
        return _evaluate(options, loaded, config, world)


def _evaluate(options: Evaluation, loaded: Checkpoint, config: Config, world: World) -> dict[str, Any]:
    from a2mc_fast.augment import Views
    from a2mc_fast.evaluation.protocols import labelled_split
    from a2mc_fast.evaluation.scores import Scores
    from a2mc_fast.run.machine import machine
    from a2mc_fast.run.opened import load_clips

    require(
        world.alone or options.encodes,
        f"{options.protocol} trains the encoder on one process: start it without torchrun",
    )
    device = world.device
    clips = load_clips(config, device)
    check_skeleton(loaded, clips, config.data or "the built-in set")
    views = Views(clips, config.views, config.seed, world)
    about = {
        "protocol": options.protocol,
        "run": str(options.run),
        "data": config.data or "synthetic",
        "split": config.split,
        "stream": config.stream,
        "encoder": config.encoder.name,
        "class_names": class_names(clips),
    }
    start = time.perf_counter()
    entries, scores = options.measure(loaded.build(device).query, views, config.split)
    result: dict[str, Any] = {
        "format": FORMAT,
        **about,
        "preset": config.preset,
        "steps": loaded.step,
        "options": options.resolved(config.encoder.name),
        **entries,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if options.untrained:
        # the list of neighbours is the trained encoder's
        plain = replace(options, neighbours="") if isinstance(options, Knn) else options
        untrained = plain.measure(loaded.build_untrained(device).query, views, config.split).entries
        result["untrained"] = accuracies(untrained)
    result |= {
        "checkpoint_sha256": sha256(loaded.path),
        "config": to_dict(loaded.config),
        **machine(),
    }
    if not world.main:
        return result
    folder = options.run if options.run.is_dir() else options.run.parent
    path = Path(options.out) if options.out else folder / f"{options.protocol}.json"
    if scores is not None:
        test = labelled_split(views, config.split)[1]
        saved = Scores(scores=scores, labels=clips.labels[test], clips=test, about=about)
        saved.save(path.with_suffix(".scores.safetensors"))
        result["scores"] = path.with_suffix(".scores.safetensors").name
    write_json(path, result)
    print(f"{table([result])}\nwrote {path}")
    return result


def ensemble(options: Ensemble) -> dict[str, Any]:
    """Add up saved scores and write the result. Returns what was written."""
    from a2mc_fast.evaluation.scores import accuracy, confusion_matrix, details
    from a2mc_fast.evaluation.scores import ensemble as weighted_sum
    from a2mc_fast.run.machine import machine

    require(len(options.runs) >= 2, f"ensemble needs at least two runs, got {len(options.runs)}")
    require(not (options.weights and options.equal), "give --weights or --equal, not both")
    streams = [_load_scores(run, options.protocol) for run in options.runs]
    names = [s.about["stream"] for s in streams]
    weights = options.weights or tuple(1.0 if options.equal else _STREAM_WEIGHTS[name] for name in names)
    scores = weighted_sum(streams, weights, options.of)
    first, truth = streams[0].about, streams[0].labels
    result = {
        "format": FORMAT,
        "protocol": "ensemble",
        "run": " + ".join(str(run) for run in options.runs),
        "data": first["data"],
        "split": first["split"],
        "stream": " + ".join(names),
        "encoder": " + ".join(dict.fromkeys(s.about["encoder"] for s in streams)),
        "class_names": first["class_names"],
        "options": {"protocol": options.protocol, "weights": list(weights), "of": options.of},
        "top1": accuracy(scores.argmax(1), truth),
        **details(confusion_matrix(scores.argmax(1), truth, scores.shape[1])),
        "members": [{**s.about, "top1_last": accuracy(s.scores.argmax(1), s.labels)} for s in streams],
        **machine(),
    }
    folder = options.runs[0] if options.runs[0].is_dir() else options.runs[0].parent
    path = Path(options.out) if options.out else folder / "ensemble.json"
    write_json(path, result)
    print(f"{table([*result['members'], result])}\nwrote {path}")
    return result


def compare(options: Compare) -> None:
    """Print one table of saved results."""
    require(
        len(options.results) >= 1, "compare needs at least one result: a JSON file or the folder of a run"
    )
    print(table([result for path in options.results for result in read_results(path)]))


def check_skeleton(loaded: Checkpoint, clips: Clips, where: str) -> None:
    """The data must have the skeleton and the persons that the encoder was trained on."""
    expected = (loaded.skeleton.num_joints, loaded.persons)
    joints, persons = clips.skeleton.num_joints, clips.num_persons
    require(
        (joints, persons) == expected,
        f"{loaded.path} was trained on {expected[0]} joints and {expected[1]} persons, "
        f"{where} has {joints} joints and {persons} persons",
    )
    require(
        clips.skeleton.parents == loaded.skeleton.parents,
        f"{loaded.path} was trained on another skeleton of {joints} joints: the bones of {where} differ",
    )


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def class_names(clips: Clips) -> list[str]:
    """A name for every class, the data's own or "class 7"."""
    from a2mc_fast.evaluation.protocols import class_name

    return [class_name(clips.class_names, c) for c in range(clips.num_classes)]


def _classified(outcome: Outcome, clips: Clips, test: Tensor) -> Measured:
    """The result of one trained classifier; confusion and classes are those of the last epoch."""
    from a2mc_fast.evaluation.scores import details

    entries = {"top1_best": outcome.best, "top1_last": outcome.last}
    return Measured({**entries, **details(_confusion(outcome, clips, test))}, outcome.scores)


def _confusion(outcome: Outcome, clips: Clips, test: Tensor) -> Tensor:
    from a2mc_fast.evaluation.scores import confusion_matrix

    return confusion_matrix(outcome.predicted, clips.labels[test], clips.num_classes)


def _load_scores(run: Path, protocol: str) -> Scores:
    """The scores of a run folder, or those in a file."""
    from a2mc_fast.evaluation.scores import Scores

    path = run / f"{protocol}.scores.safetensors" if run.is_dir() else run
    if not path.is_file():
        made = f"; make it with: python -m a2mc_fast.evaluate {protocol} {run}" if run.is_dir() else ""
        raise FileNotFoundError(f"{path} not found{made}")
    return Scores.load(path)


def _write_neighbours(path: Path, clips: Clips, queries: Tensor, found: Tensor, similarity: Tensor) -> None:
    """Every test clip with its nearest training clips. queries [Q] and found [Q, k] clip numbers."""
    names, labels = clips.names, class_names(clips)
    truth = clips.labels.tolist()

    def describe(clip: int) -> dict[str, Any]:
        return {"name": names[clip], "label": truth[clip], "class": labels[truth[clip]]}

    rows = [
        {
            **describe(query),
            "neighbours": [
                {**describe(clip), "similarity": round(value, 6)} for clip, value in zip(clips_, values)
            ],
        }
        for query, clips_, values in zip(queries.tolist(), found.tolist(), similarity.tolist())
    ]
    if path.suffix == ".json":
        write_json(path, rows)
        return
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        head = ("name", "label", "class")
        table.writerow((*head, "rank", *(f"neighbour_{h}" for h in head), "similarity"))
        for row in rows:
            for rank, other in enumerate(row["neighbours"], 1):
                table.writerow((*(row[h] for h in head), rank, *other.values()))


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
        if isinstance(chosen, Ensemble):
            ensemble(chosen)
        elif isinstance(chosen, Compare):
            compare(chosen)
        else:
            evaluate(chosen)


if __name__ == "__main__":
    main()
