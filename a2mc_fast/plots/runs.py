"""What the pictures read of a run: its log, or its checkpoint with the clips it is shown on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from a2mc_fast.augment import Views
from a2mc_fast.data import Clips
from a2mc_fast.errors import InputError, require
from a2mc_fast.evaluate import check_skeleton
from a2mc_fast.run import checkpoint
from a2mc_fast.run.checkpoint import Checkpoint
from a2mc_fast.run.machine import pick_device
from a2mc_fast.run.opened import load_clips

_NUMBERS = ("loss", "loss_weak", "loss_strong", "loss_basic", "lr", "knn_top1")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, and clips of its skeleton on the same device."""

    name: str
    saved: Checkpoint
    clips: Clips
    views: Views
    split: str
    device: torch.device

    def labelled(self, side: Literal["train", "test"]) -> Tensor:
        """Clip numbers of one side of the protocol that have a label."""
        index = self.clips.split(self.split)[side == "test"]
        index = index[self.clips.labels[index] >= 0]
        require(len(index) > 0, f"protocol {self.split!r} has no labelled {side} clips")
        return index


def open_run(run: Path, data: str, split: str, device: Literal["auto", "cpu", "cuda"]) -> Opened:
    """A run with the data and protocol it was trained on, unless others are named."""
    saved = checkpoint.load(run)
    config = replace(
        saved.config,
        data=data or saved.config.data,
        split=split or saved.config.split,
        run=replace(saved.config.run, device=device),
    )
    place = pick_device(config)
    clips = load_clips(config, place)
    check_skeleton(saved, clips, config.data or "the built-in set")
    views = Views(clips, config.views, config.seed)
    return Opened(name=run_name(run), saved=saved, clips=clips, views=views, split=config.split, device=place)


def run_name(run: Path) -> str:
    """The run's folder, also where its checkpoint was named."""
    run = Path(run).absolute()
    return run.parent.name if run.suffix == ".safetensors" else run.name


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file. A last line that a crash or a running job cut off is left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path} not found: is {run} the folder of a run of a2mc_fast.train?")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            for name in record.keys() & set(_NUMBERS):
                record[name] = float(record[name])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number} is not a metrics record") from None
        records.append(record)
    require(any("loss" in record for record in records), f"{path} holds no logged step yet")
    return records
