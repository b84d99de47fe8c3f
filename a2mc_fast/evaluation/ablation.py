"""The paper's ablations: every row trained as an ordinary run, evaluated by kNN and by linear evaluation, and
shown in the paper's tables, or on several sets side by side. What is finished is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from a2mc_fast.config import Config, differences, located, to_dict
from a2mc_fast.data import Clips
from a2mc_fast.data.identity import differing
from a2mc_fast.errors import InputError, tell
from a2mc_fast.evaluation.results import evaluate
from a2mc_fast.evaluation.rows import row_configs, study_table, tables
from a2mc_fast.evaluation.settings import Evaluation, Knn, Linear, LinearConfig
from a2mc_fast.evaluation.tables import mean_and_std, read_ended, read_result
from a2mc_fast.files import sha256, write_json
from a2mc_fast.run import checkpoint
from a2mc_fast.run.folder import RUNS, holds_run, stored
from a2mc_fast.run.machine import machine
from a2mc_fast.run.metrics import read_metrics
from a2mc_fast.run.opened import load_clips
from a2mc_fast.run.start import pretrain

FORMAT = "a2mc-ablation/1"
STUDY = "a2mc-study/1"


def ablate(config: Config, rows: Sequence[str], seeds: int, linear: LinearConfig) -> dict[str, Any]:
    """Make or reuse the runs of some rows, with seeds from `config.seed` on, and print the tables.

    Writes ablation.json in the folder above the runs and returns its content.
    """
    config = located(config)
    base = Path(config.run.out or RUNS / f"{config.preset}-ablation")
    result = {
        "format": FORMAT,
        "preset": config.preset,
        "data": config.about["data"],
        "split": config.split,
        "seeds": seeds,
        "rows": _rows(config, base, rows, seeds, linear),
        "config": to_dict(config),
        **machine(),
    }
    write_json(base / "ablation.json", result)
    tell(f"{tables(result)}\n\nwrote {base / 'ablation.json'}")
    return result


def study(configs: Sequence[Config], rows: Sequence[str], seeds: int, linear: LinearConfig) -> dict[str, Any]:
    """The same rows on several sets, one configuration each, and the untrained encoder beside them.

    Writes study.json in the folder above the runs and returns its content.
    """
    base = Path(configs[0].run.out or RUNS / "study")
    sets = []
    for number, config in enumerate(map(located, configs), 1):
        tell(f"study: set {number} of {len(configs)}, {config.data}")
        made = _rows(config, base / Path(config.data).stem, rows, seeds, linear, untrained=True)
        about = {"data": config.data, "split": config.split}
        sets.append({**about, "rows": made, "config": to_dict(config)})
    result = {"format": STUDY, "seeds": seeds, "sets": sets, **machine()}
    write_json(base / "study.json", result)
    tell(f"{study_table(result)}\n\nwrote {base / 'study.json'}")
    return result


def _rows(
    config: Config, base: Path, rows: Sequence[str], seeds: int, linear: LinearConfig, untrained: bool = False
) -> dict[str, dict[str, Any]]:
    """Mean, spread and every run's numbers of each row; "untrained" is the encoder before training."""
    names, clips = list(dict.fromkeys(rows)), load_clips(config, torch.device("cpu"))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("untrained",) * untrained + (*names,)}
    for number in range(seeds * len(names)):
        name, seed = names[number // seeds], config.seed + number % seeds
        tell(f"run {number + 1} of {seeds * len(names)}: row {name}, seed {seed}")
        configs = row_configs(replace(config, seed=seed))
        # rows that are one run share the folder of the first
        first = next(n for n in configs if not differences(configs[n], configs[name]))
        folder = base / f"{first}-seed{seed}"
        run = replace(configs[first], run=replace(config.run, out=str(folder)))
        # the rows of a seed begin with the same weights
        before = untrained and name == names[0]
        for which, numbers in run_row(run, clips, folder, linear, before).items():
            runs[which or name].append({"seed": seed, "run": str(folder), **numbers})
        # the rows' steps cost unlike times
        done, limit = runs[name][-1], runs[names[0]][number % seeds]["seconds"]
        if (within := knn_within(folder, limit)) is not None:
            done["top1_knn_within"] = within
    return {name: {**mean_and_std(made), "runs": made} for name, made in runs.items()}


def run_row(
    config: Config, clips: Clips, folder: Path, linear: LinearConfig, untrained: bool = False
) -> dict[str, dict[str, float]]:
    """Train and evaluate one row and seed, as far as its folder does not hold it already.

    Returns accuracies, steps and seconds by "", and the accuracies before training by "untrained".
    """
    begun = holds_run(folder)
    if begun and (changed := "; ".join(differences(stored(folder), config))):
        raise InputError(f"{folder} was run with another configuration ({changed}): choose another --run.out")
    if not (folder / "result.json").exists():
        pretrain(config, clips, resume=begun)
    elif differing(checkpoint.load(folder).data, clips.identity):
        raise InputError(f"{folder} was trained on other data: choose another --run.out")
    ended = read_ended(folder / "result.json")
    asked: dict[str, Any] = {"run": folder, "data": config.data, "device": config.run.device}
    knn = evaluated(Knn(**asked, untrained=untrained), config)
    trained = evaluated(Linear(**asked, untrained=untrained, **vars(linear)), config)
    found = {"": _accuracies(knn, trained) | {"steps": ended["steps"], "seconds": ended["seconds"]}}
    return found | ({"untrained": _accuracies(knn["untrained"], trained["untrained"])} if untrained else {})


def knn_within(run: Path, seconds: float) -> float | None:
    """The run's last kNN accuracy, in percent, that it had logged after so many seconds of training."""
    found, now = None, 0.0
    with suppress(InputError):  # somebody has taken the log away
        for record in read_metrics(run):
            now = record.get("seconds", now)
            if now <= seconds:
                found = record.get("knn_top1", found)
    return found


def _accuracies(knn: Mapping[str, Any], linear: Mapping[str, Any]) -> dict[str, float]:
    """top1_knn, top1_linear_best and top1_linear_last, and those of test clips that are no copies."""
    found = {f"top1_knn{name[4:]}": value for name, value in knn.items() if name in ("top1", "top1_fresh")}
    names = ("top1_best", "top1_last", "top1_last_fresh")
    return found | {f"top1_linear{name[4:]}": linear[name] for name in names if name in linear}


def evaluated(options: Evaluation, config: Config) -> Mapping[str, Any]:
    """The run's saved result if it was made from this checkpoint with these options, or a new one."""
    path = options.run / f"{options.protocol}.json"
    if path.exists():
        saved = read_result(path)
        wanted = {
            "checkpoint_sha256": sha256(options.run / checkpoint.FILE),
            "data": config.about["data"],
            "split": config.split,
            "options": json.loads(json.dumps(options.resolved(config.encoder.name))),
        }
        same = all(saved.get(name) == value for name, value in wanted.items())
        if same and ("untrained" in saved or not options.untrained):
            return saved
    return evaluate(options)
