"""Results of protocols, written and printed: one measured on an opened run, one of the scores of several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a2mc_fast.config import to_dict
from a2mc_fast.data import Clips
from a2mc_fast.data.identity import copies
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.errors import one_speaks, require, tell
from a2mc_fast.evaluation.finetune import finetune, semi_supervised
from a2mc_fast.evaluation.protocols import (
    check_classes,
    class_names,
    classes_of,
    encode,
    knn,
    labelled_split,
    linear_evaluation,
    nearest,
)
from a2mc_fast.evaluation.scores import (
    About,
    Outcome,
    Progress,
    Scores,
    accuracy,
    beside,
    details,
    weighted_sum,
)
from a2mc_fast.evaluation.settings import Ensemble, Evaluation, Finetune, Knn, Linear, Semi
from a2mc_fast.evaluation.tables import FORMAT, accuracies, mean_and_std, table, write_csv
from a2mc_fast.files import sha256, write_json
from a2mc_fast.ranks.joining import join
from a2mc_fast.run import checkpoint
from a2mc_fast.run.machine import machine, pick_device
from a2mc_fast.run.opened import Opened, read_run, with_clips

_STREAM_WEIGHTS = {"joint": 0.6, "motion": 0.4, "bone": 0.6}  # AimCLR, HiCLR


def evaluate(options: Evaluation) -> dict[str, Any]:
    """Evaluate a run's query encoder and write the result. Returns what was written.

    The ranks that torchrun started share the encoding of clips; rank 0 prints and writes.
    """
    with one_speaks():
        saved, config = read_run(options.run, options.data, options.split, options.device)
    with join(config, lambda: pick_device(config)) as world, one_speaks():
        require(
            world.alone or isinstance(options, Knn | Linear),
            f"{options.protocol} trains the encoder on one process: start it without torchrun",
        )
        return _evaluate(options, with_clips(saved, config, world, named=bool(options.data)))


def _evaluate(options: Evaluation, run: Opened) -> dict[str, Any]:
    saved, config = run.saved, run.config
    about: About = {
        "protocol": options.protocol,
        "run": str(options.run),
        **config.about,  # type: ignore[typeddict-item]
        "class_names": class_names(run.clips),
        "identity": run.clips.identity,
    }
    start = time.perf_counter()
    branch = run.trained()
    entries, outcome = measure(options, branch, run)
    result: dict[str, Any] = {
        "format": FORMAT,
        **about,
        "preset": config.preset,
        "steps": saved.step,
        "options": options.resolved(config.encoder.name),
        **entries,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if options.untrained:
        # the list of neighbours is the trained encoder's
        plain = replace(options, neighbours="") if isinstance(options, Knn) else options
        result["untrained"] = accuracies(measure(plain, run.untrained(), run, ", untrained encoder")[0])
    result |= {"checkpoint_sha256": sha256(saved.path), "config": to_dict(saved.config), **machine()}
    if not run.views.world.main:
        return result
    path = Path(options.out) if options.out else _place(options, saved.path)
    if outcome is not None:
        test = run.labelled("test")
        names = tuple(run.clips.names[number] for number in test.tolist())
        scores, classifier = (path.with_suffix(f".{what}.safetensors") for what in ("scores", "classifier"))
        Scores(
            scores=outcome.scores, labels=run.clips.labels[test], clips=test, names=names, about=about
        ).save(scores)
        # with its encoder, which fine-tuning has changed, so that the file is all that predict needs
        tuned = saved.with_classifier(branch.encoder, outcome.weight, outcome.bias, about["class_names"])
        checkpoint.write(classifier, tuned)
        result |= {"scores": scores.name, "classifier": classifier.name}
    write_json(path, result)
    fresh = result.get("top1_fresh", result.get("top1_last_fresh"))
    if fresh is not None:
        fresh = f"{fresh:.2f} % on the {result['fresh_test_clips']} test clips that equal no training clip\n"
    tell(f"{table([result])}\n{fresh or ''}wrote {path}")
    return result


def _place(options: Evaluation, opened: Path) -> Path:
    """PROTOCOL.json beside a run's newest checkpoint, beside any other CHECKPOINT.PROTOCOL.json."""
    newest = options.run.is_dir() or opened.name == checkpoint.FILE
    return opened.with_name(
        f"{options.protocol}.json" if newest else f"{opened.stem}.{options.protocol}.json"
    )


# what a protocol measures


def measure(
    options: Evaluation, branch: Branch, run: Opened, which: str = ""
) -> tuple[dict[str, Any], Outcome | None]:
    """A result's own entries, and the outcome of its classifier if it has just one.

    May train `branch`, which is not used again; `which` encoder it is, the user is told.
    """
    if isinstance(options, Knn):
        return _knn(options, branch, run), None
    assert isinstance(options, Linear | Finetune)
    name, split = f"{options.protocol}{which}", run.config.split
    if isinstance(options, Semi):
        return _semi(options, branch, run, name), None
    train, test = labelled_split(run.views, split)
    check_classes(run.views, train, test, f"protocol {split!r}", options.allow_missing)
    what = f"{len(train)} training and {len(test)} test clips"
    progress = _begins(options, name, what, options.seed)
    if isinstance(options, Linear):
        outcome = linear_evaluation(branch, run.views, split, options, progress=progress)
    else:
        outcome = finetune(branch, run.views, train, test, options, progress=progress)
    entries = {"top1_best": outcome.best, "top1_last": outcome.last}
    return entries | _fresh("top1_last", outcome.predicted, run) | _details([outcome.predicted], run), outcome


def _begins(options: Linear | Finetune, name: str, what: str, seed: int) -> Progress:
    """Tells on standard error that a training begins. Returns what tells how it goes; of many trainings, only
    how each one ended."""
    tell(f"{name}: {what}, {options.epochs} epochs, seed {seed}", error=True)
    start = time.perf_counter()

    def report(epoch: int, accuracy: float) -> None:
        seconds = time.perf_counter() - start
        left = seconds * (options.epochs / epoch - 1)
        if not isinstance(options, Semi) or epoch == options.epochs:
            times = f"{seconds:.0f} s" + (f", {left:.0f} s left" if epoch < options.epochs else "")
            tell(f"{name}: epoch {epoch}/{options.epochs}  top-1 {accuracy:.2f} %  {times}", error=True)

    return report


def _knn(options: Knn, branch: Branch, run: Opened) -> dict[str, Any]:
    clips, views = run.clips, run.views
    split = run.config.split
    train, test = clips.split(split) if options.neighbours else labelled_split(views, split)
    require(len(train) > 0 and len(test) > 0, f"a side of protocol {split!r} has no clips")
    gallery, queries = encode(branch, views, train), encode(branch, views, test)
    if options.neighbours and views.world.main:
        similarity, rows = nearest(gallery, queries, min(options.top, len(train)))
        _write_neighbours(Path(options.neighbours), clips, test, train[rows], similarity)
    # clips without a label are listed, but neither vote nor count
    known, asked = clips.labels[train] >= 0, clips.labels[test] >= 0
    if not (known.any() and asked.any()):
        return {}
    predicted = knn(gallery[known], clips.labels[train[known]], queries[asked], options.k)
    top1 = accuracy(predicted, clips.labels[test[asked]])
    return {"top1": top1, **_fresh("top1", predicted, run), **_details([predicted], run)}


def _semi(options: Semi, branch: Branch, run: Opened, name: str) -> dict[str, Any]:
    entries = []
    begins = partial(_begins, options, name)
    for share, clips, outcomes in semi_supervised(
        branch, run.views, run.config.split, options, begins=begins
    ):
        runs = [{"top1_best": o.best, "top1_last": o.last} for o in outcomes]
        entries.append(
            {
                "fraction": share,
                "training_clips": clips,
                **mean_and_std(runs),
                "runs": [{"seed": seed, **one} for seed, one in enumerate(runs, options.seed)],
                **_details([o.predicted for o in outcomes], run),
            }
        )
    return {"fractions": entries}


def _fresh(name: str, predicted: Tensor, run: Opened) -> dict[str, Any]:
    """`name`_fresh: the accuracy on test clips that equal no training clip; nothing if none does."""
    clips, test = run.clips, run.labelled("test")
    fresh = ~copies(clips.frames, clips.lengths, run.labelled("training"), test).to(test.device)
    if fresh.all() or not fresh.any():
        return {}
    truth = clips.labels[test]
    return {f"{name}_fresh": accuracy(predicted[fresh], truth[fresh]), "fresh_test_clips": int(fresh.sum())}


def _details(predicted: Sequence[Tensor], run: Opened) -> dict[str, Any]:
    """`details` of one or several predictions of the labelled test clips."""
    truth = run.clips.labels[run.labelled("test")].repeat(len(predicted))
    return details(torch.cat(list(predicted)), truth, run.clips.num_classes)


def _write_neighbours(path: Path, clips: Clips, queries: Tensor, found: Tensor, similarity: Tensor) -> None:
    """Every test clip with its nearest training clips. queries [Q] and found [Q, k] clip numbers."""
    told = zip(clips.names, clips.labels.tolist(), classes_of(clips))
    clip = [{"name": name, "label": label, "class": kind} for name, label, kind in told]
    near = [
        [{**clip[number], "similarity": round(value, 6)} for number, value in zip(*row)]
        for row in zip(found.tolist(), similarity.tolist())
    ]
    asked = [clip[number] for number in queries.tolist()]
    if path.suffix == ".json":
        write_json(path, [{**query, "neighbours": others} for query, others in zip(asked, near)])
        return
    head = ("name", "label", "class")
    lines = [
        (*query.values(), rank, *other.values())
        for query, others in zip(asked, near)
        for rank, other in enumerate(others, 1)
    ]
    write_csv(path, [(*head, "rank", *(f"neighbour_{h}" for h in head), "similarity"), *lines])


# several results together


def ensemble(options: Ensemble) -> dict[str, Any]:
    """Add up saved scores and write the result. Returns what was written."""
    require(len(options.runs) >= 2, f"ensemble needs at least two runs, got {len(options.runs)}")
    streams = [Scores.load(beside(run, options.protocol, "scores")) for run in options.runs]
    names = [s.about["stream"] for s in streams]
    weights = options.weights or tuple(_STREAM_WEIGHTS[name] for name in names)
    scores = weighted_sum(streams, weights, options.of)
    for run in options.runs:
        others = [other for other in options.runs if other.resolve() == run.resolve()]
        require(len(others) == 1, f"ensemble adds up different runs, and {run} is given twice")
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
        **details(scores.argmax(1), truth, scores.shape[1]),
        "members": [{**s.about, "top1_last": accuracy(s.scores.argmax(1), s.labels)} for s in streams],
        **machine(),
    }
    folder = options.runs[0] if options.runs[0].is_dir() else options.runs[0].parent
    path = Path(options.out) if options.out else folder / "ensemble.json"
    write_json(path, result)
    tell(f"{table([*result['members'], result])}\nwrote {path}")
    return result
