"""A run opened for use: its checkpoint, read once, and clips of its skeleton on the device to use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from a2mc_fast.augment import Views
from a2mc_fast.config import Config
from a2mc_fast.config.settings import Device
from a2mc_fast.data import Clips
from a2mc_fast.data.identity import differing
from a2mc_fast.data.synthetic import synthetic_clips
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.errors import require, tell
from a2mc_fast.ranks import World
from a2mc_fast.run import weights
from a2mc_fast.run.checkpoint import Checkpoint
from a2mc_fast.run.machine import most_threads, pick_device
from a2mc_fast.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, and clips of its skeleton on the same device."""

    saved: Checkpoint
    config: Config
    """That of the run, with the data, protocol and device that were asked for."""
    clips: Clips
    views: Views

    @property
    def name(self) -> str:
        """The run's folder, also where its checkpoint was named."""
        return self.saved.path.absolute().parent.name

    def trained(self) -> Branch:
        """The query encoder and its heads, anew at each call."""
        return self.saved.branch(self.clips.device)

    def untrained(self) -> Branch:
        """The same as they were before training."""
        return weights.untrained(self.saved, self.clips.device)

    def labelled(self, side: Literal["training", "test"]) -> Tensor:
        """Clip numbers of one side of the protocol that have a label. `InputError` if there are none."""
        return self.clips.labelled(self.config.split, side)


def open_run(run: Path, data: str = "", split: str = "", device: Device = "auto") -> Opened:
    """A run's folder or checkpoint with the data and protocol it was trained on, unless others are named."""
    saved, config = read_run(run, data, split, device)
    return with_clips(saved, config, World(device=pick_device(config)), named=bool(data))


def read_run(run: Path, data: str, split: str, device: Device) -> tuple[Checkpoint, Config]:
    """The first half of `open_run`, which several ranks need before they can meet."""
    saved = weights.load(run)
    # of a larger machine
    threads = saved.config.run.threads if saved.config.run.threads <= most_threads() else 0
    config = replace(
        saved.config,
        data=data or saved.config.data,
        split=split or saved.config.split,
        run=replace(saved.config.run, device=device, threads=threads),
    )
    return saved, config


def with_clips(saved: Checkpoint, config: Config, world: World, *, named: bool) -> Opened:
    """The second half of `open_run`. `InputError` if the clips have another skeleton.

    A checkpoint may come from anywhere, so a file that it names, and not the user, must hold the recordings
    that it was trained on. Where labels or splits are others, standard error says so.
    """
    clips, where = load_clips(config, world.device), config.data or "the built-in set"
    check_skeleton(saved.path, saved.skeleton, saved.persons, clips, where)
    changed = differing(saved.data, clips.identity)
    require(
        named or not config.data or "frames" not in changed,
        f"{where} does not hold the recordings that {saved.path} was trained on: name the data with --data",
    )
    # another set may be asked for by name
    if changed and world.main and "lengths" not in changed:
        tell(
            f"notice: {where} is not what {saved.path} was trained on, its {' and '.join(changed)} differ",
            error=True,
        )
    views = Views(clips, config.views, config.seed, world)
    return Opened(saved=saved, config=config, clips=clips, views=views)


def load_clips(config: Config, device: torch.device) -> Clips:
    """The packed data file, or the built-in set."""
    if config.data:
        return Clips.load(config.data, device)
    return synthetic_clips(clips=config.synthetic.clips, device=device)


def check_skeleton(source: Path, skeleton: Skeleton, persons: int, clips: Clips, where: str) -> None:
    """The data must have the persons and the skeleton that the encoder was trained on, normalised alike."""
    there, expected = (clips.skeleton.num_joints, clips.num_persons), (skeleton.num_joints, persons)
    require(
        there == expected,
        f"{source} was trained on {expected[0]} joints and {expected[1]} persons, "
        f"{where} has {there[0]} joints and {there[1]} persons",
    )
    differing = [
        f"{name} {getattr(clips.skeleton, name)} instead of {getattr(skeleton, name)}"
        for name in ("parents", "center", "axis_z", "axis_x", "rotation")
        if getattr(clips.skeleton, name) != getattr(skeleton, name)
    ]
    require(
        not differing,
        f"{source} was trained on another skeleton: {where} has {'; '.join(differing)}; prepare it with "
        "the skeleton of the training clips",
    )
