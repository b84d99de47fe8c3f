"""The paper's ablations: every row trained as an ordinary run, evaluated by kNN and by linear evaluation, and
shown in the paper's tables. What is finished is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from a2mc_fast.config import Config, differences, located, to_dict
from a2mc_fast.data import Clips
from a2mc_fast.data.identity import differing
from a2mc_fast.errors import require, tell
from a2mc_fast.evaluation.results import evaluate
from a2mc_fast.evaluation.rows import row_configs, tables
from a2mc_fast.evaluation.settings import AnyEvaluation, Knn, Linear, LinearConfig
from a2mc_fast.evaluation.tables import mean_and_std
from a2mc_fast.files import read_json, sha256, write_json
from a2mc_fast.run import checkpoint
from a2mc_fast.run.folder import RUNS, holds_run, stored
from a2mc_fast.run.machine import machine
from a2mc_fast.run.opened import load_clips
from a2mc_fast.run.start import pretrain

FORMAT = "a2mc-ablation/1"


def ablate(config: Config, rows: Sequence[str], seeds: int, linear: LinearConfig) -> dict[str, Any]:
    """Make or reuse the runs of some rows, with seeds from `config.seed` on, and print the tables.

    Writes ablation.json in the folder above the runs and returns its content.
    """
    config = located(config)
    clips = load_clips(config, torch.device("cpu"))
    base = Path(config.run.out or RUNS / f"{config.preset}-ablation")
    made: dict[str, Any] = {}
    for name in dict.fromkeys(rows):
        runs: list[dict[str, Any]] = []
        for seed in range(config.seed, config.seed + seeds):
            configs = row_configs(replace(config, seed=seed))
            # rows that are one run share the folder of the first
            first = next(n for n in configs if not differences(configs[n], configs[name]))
            folder = base / f"{first}-seed{seed}"
            run = replace(configs[first], run=replace(config.run, out=str(folder)))
            runs.append({"seed": seed, "run": str(folder), **run_row(run, clips, folder, linear)})
        made[name] = {**mean_and_std(runs), "runs": runs}
    result = {
        "format": FORMAT,
        "preset": config.preset,
        "data": config.data or "synthetic",
        "split": config.split,
        "seeds": seeds,
        "rows": made,
        "config": to_dict(config),
        **machine(),
    }
    write_json(base / "ablation.json", result)
    tell(f"{tables(result)}\n\nwrote {base / 'ablation.json'}")
    return result


def run_row(config: Config, clips: Clips, folder: Path, linear: LinearConfig) -> dict[str, float]:
    """Train and evaluate one row and seed, as far as its folder does not hold it already."""
    begun = holds_run(folder)
    if begun:
        changed = differences(stored(folder), config)
        require(
            not changed,
            f"{folder} was run with another configuration ({'; '.join(changed)}): choose another --run.out",
        )
    if (folder / "result.json").exists():
        changed = differing(checkpoint.load(folder).data, clips.identity)
        require(not changed, f"{folder} was trained on other data: choose another --run.out")
    else:
        pretrain(config, clips, resume=begun)
    device = config.run.device
    knn = evaluated(Knn(run=folder, data=config.data, device=device), config)
    trained = evaluated(Linear(run=folder, data=config.data, device=device, **vars(linear)), config)
    return {
        "top1_linear_best": trained["top1_best"],
        "top1_linear_last": trained["top1_last"],
        "top1_knn": knn["top1"],
    }


def evaluated(options: AnyEvaluation, config: Config) -> dict[str, Any]:
    """The run's saved result if it was made from this checkpoint with these options, or a new one."""
    path = options.run / f"{options.protocol}.json"
    if path.exists():
        saved = read_json(path)
        wanted = {
            "checkpoint_sha256": sha256(options.run / checkpoint.FILE),
            "data": config.data or "synthetic",
            "split": config.split,
            "options": json.loads(json.dumps(options.resolved(config.encoder.name))),
        }
        if all(saved.get(name) == value for name, value in wanted.items()):
            return saved
    return evaluate(options)
