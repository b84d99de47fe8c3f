"""Results of protocols: one measured on a run, one added up from the scores of several; written and printed.

A result is a JSON file beside the run; protocols with one classifier also save the test clips' scores.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from a2mc_fast.config import to_dict
from a2mc_fast.errors import one_speaks, require, tell
from a2mc_fast.evaluation.measure import measure
from a2mc_fast.evaluation.protocols import class_names
from a2mc_fast.evaluation.scores import About, Scores, accuracy, details, weighted_sum
from a2mc_fast.evaluation.settings import AnyEvaluation, Ensemble, Knn
from a2mc_fast.evaluation.tables import FORMAT, accuracies, table
from a2mc_fast.files import sha256, write_json
from a2mc_fast.ranks import join
from a2mc_fast.run import checkpoint
from a2mc_fast.run.machine import machine, pick_device
from a2mc_fast.run.opened import Opened, read_run, with_clips

_STREAM_WEIGHTS = {"joint": 0.6, "motion": 0.4, "bone": 0.6}  # AimCLR, HiCLR


def evaluate(options: AnyEvaluation) -> dict[str, Any]:
    """Evaluate a run's query encoder and write the result. Returns what was written.

    The ranks that torchrun started share the encoding of clips; rank 0 prints and writes.
    """
    with one_speaks():
        saved, config = read_run(options.run, options.data, options.split, options.device)
    with join(config, lambda: pick_device(config)) as world, one_speaks():
        require(
            world.alone or options.encodes,
            f"{options.protocol} trains the encoder on one process: start it without torchrun",
        )
        return _evaluate(options, with_clips(saved, config, world, named=bool(options.data)))


def _evaluate(options: AnyEvaluation, run: Opened) -> dict[str, Any]:
    saved, config = run.saved, run.config
    about: About = {
        "protocol": options.protocol,
        "run": str(options.run),
        "data": config.data or "synthetic",
        "split": config.split,
        "stream": config.stream,
        "encoder": config.encoder.name,
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
        result["untrained"] = accuracies(measure(plain, run.untrained(), run, "untrained encoder").entries)
    result |= {
        "checkpoint_sha256": sha256(saved.path),
        "config": to_dict(saved.config),
        **machine(),
    }
    if not run.views.world.main:
        return result
    path = Path(options.out) if options.out else saved.path.parent / f"{options.protocol}.json"
    if outcome is not None:
        test = run.labelled("test")
        names = tuple(run.clips.names[number] for number in test.tolist())
        Scores(
            scores=outcome.scores, labels=run.clips.labels[test], clips=test, names=names, about=about
        ).save(path.with_suffix(".scores.safetensors"))
        # with its encoder, which fine-tuning has changed, so that the file is all that predict needs
        checkpoint.write(
            path.with_suffix(".classifier.safetensors"),
            checkpoint.with_classifier(
                saved, branch.encoder, outcome.weight, outcome.bias, about["class_names"]
            ),
        )
        for name in ("scores", "classifier"):
            result[name] = path.with_suffix(f".{name}.safetensors").name
    write_json(path, result)
    tell(f"{table([result])}\n{_on_fresh(result)}wrote {path}")
    return result


def _on_fresh(result: dict[str, Any]) -> str:
    """A line on the test clips that are no copies of training clips, where there are such copies."""
    value = result.get("top1_fresh", result.get("top1_last_fresh"))
    if value is None:
        return ""
    return f"{value:.2f} % on the {result['fresh_test_clips']} test clips that equal no training clip\n"


def ensemble(options: Ensemble) -> dict[str, Any]:
    """Add up saved scores and write the result. Returns what was written."""
    require(len(options.runs) >= 2, f"ensemble needs at least two runs, got {len(options.runs)}")
    require(not (options.weights and options.equal), "give --weights or --equal, not both")
    streams = [_load_scores(run, options.protocol) for run in options.runs]
    names = [s.about["stream"] for s in streams]
    weights = options.weights or tuple(1.0 if options.equal else _STREAM_WEIGHTS[name] for name in names)
    scores = weighted_sum(streams, weights, options.of)
    twice = [
        run for i, run in enumerate(options.runs) if run.resolve() in map(Path.resolve, options.runs[:i])
    ]
    require(not twice, f"ensemble adds up different runs, and {', '.join(map(str, twice))} is given twice")
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


def _load_scores(run: Path, protocol: str) -> Scores:
    """The scores of a run folder, or those in a file."""
    path = run / f"{protocol}.scores.safetensors" if run.is_dir() else run
    if not path.is_file():
        made = f"; make it with: python -m a2mc_fast.evaluate {protocol} {run}" if run.is_dir() else ""
        raise FileNotFoundError(f"{path} not found{made}")
    return Scores.load(path)
