"""A pretraining run from its configuration to its result: step, log, evaluate, save.

One step, the algorithm itself, is `trainer.Trainer.step`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from a2mc_fast.config import Config, located
from a2mc_fast.data import Clips
from a2mc_fast.errors import require, tell
from a2mc_fast.evaluation.protocols import knn_accuracy
from a2mc_fast.files import write_json
from a2mc_fast.ranks import World
from a2mc_fast.ranks.joining import join
from a2mc_fast.run import checkpoint, snapshot, weights
from a2mc_fast.run.checkpoint import Checkpoint
from a2mc_fast.run.folder import open_folder
from a2mc_fast.run.log import RunLog, command, heading, outcome, summary
from a2mc_fast.run.machine import keep_threads, pick_device
from a2mc_fast.run.opened import load_clips
from a2mc_fast.run.parts import Parts
from a2mc_fast.run.saver import Saver
from a2mc_fast.run.signals import leave, stop_on_signal
from a2mc_fast.trainer import Trainer

Watch = Callable[[dict[str, Any]], None]


def pretrain(
    config: Config, clips: Clips | None = None, *, resume: bool = False, watch: Watch | None = None
) -> Path:
    """Pretrain as configured, on `clips` instead of `config.data` if they are given; returns the run folder.

    `watch` hears of every line of metrics.jsonl, on rank 0. Raises `InputError` for what the user can mend.
    """
    config = located(config)
    with (
        join(config, lambda: pick_device(config)) as world,
        _opened(config, resume, world) as (folder, resumed),
    ):
        _pretrain(config, clips, folder, resumed, world, watch)
    gc.collect()  # a captured step and what it captured refer to each other
    return folder


def _pretrain(
    config: Config,
    clips: Clips | None,
    folder: Path,
    resumed: Checkpoint | None,
    world: World,
    watch: Watch | None,
) -> None:
    """One rank's run. All ranks take the same steps; rank 0 prints and writes."""
    other = keep_threads(config, resumed.progress) if resumed and world.alone else ""
    trainer, parts = _trainer(config, clips, resumed, world)
    total, per_epoch, run = trainer.schedule.total_steps, trainer.schedule.steps_per_epoch, config.run
    if resumed and world.share(resumed.step >= total and (folder / "result.json").exists()):
        if world.main:
            tell(f"{folder} is finished after {resumed.step} steps: nothing to resume")
        return
    with (
        stop_on_signal(say=world.main) as stop,
        RunLog(folder, config, total, resumed, world.main) as log,
        Saver(folder, resumed, keep_last=run.keep_last, before=log.sync, warn=log.say) as saver,
    ):
        parts.say, log.watch = log.say, watch
        with log.paused():
            for line in (heading(trainer, folder), *parts.notes):
                log.say(line)
            if resumed:
                progress = resumed.progress
                log.say(f"resumed after step {resumed.step}{other}")
            else:
                progress = log.accuracy(knn_top1(trainer, parts), "_untrained")
        for step in range(log.step, total):
            values = trainer.step(step)
            logged = log.advance()
            if logged:
                progress["loss"] = log.metrics(trainer, values)["loss"]
            if log.due(run.eval_every, per_epoch):
                with log.paused():
                    progress |= log.accuracy(knn_top1(trainer, parts))
            # read once: a signal may come at any line; several ranks agree where they wait for the device
            asked = world.largest(sum(stop[:1])) if logged or world.alone else 0
            last = bool(asked) or log.step == total
            if last or log.due(run.checkpoint_every, per_epoch):
                with log.paused():
                    progress["loss"] = log.check(trainer, values)["loss"]
                    threads = torch.get_num_threads()
                    progress |= {"seconds": log.seconds, "lines": log.lines, "threads": threads}
                    state = snapshot.state(trainer, log.step, progress)
                    if world.main:
                        saver.save(state, last=last)
            if last and log.step < total:
                log.say(f"stopped after step {log.step} of {total}: continue with {command(folder)}")
                leave(asked)
        result = outcome(config, trainer, log, progress) | {"ran": parts.ran}
        if world.main:
            write_json(folder / "result.json", result)
        log.say(summary(result, folder))


def _trainer(
    config: Config, clips: Clips | None, resumed: Checkpoint | None, world: World
) -> tuple[Trainer, Parts]:
    """A new trainer, by what its parts are computed, and the state of a checkpoint or an encoder in it."""
    torch.compiler.reset()  # torch compiles a function so many times and no more, earlier runs included
    clips = load_clips(config, world.device) if clips is None else clips.to(world.device)
    trainer = Trainer(config, clips, world)
    parts = Parts(trainer, resumed.recurrence if resumed else None)
    if resumed:
        told = {"loss", "seconds"} <= resumed.progress.keys()
        require(told, f"{resumed.path} is not the checkpoint of a run: it tells neither loss nor seconds")
        snapshot.restore(trainer, resumed)
    elif config.init_from:
        parts.notes.append(weights.begin_with(trainer.model, config))
    return trainer, parts


def knn_top1(trainer: Trainer, parts: Parts) -> float | None:
    """kNN accuracy of the protocol in percent, None where a side of it has no labels."""
    labels, schedule = trainer.clips.labels, trainer.schedule
    if not all((labels[index] >= 0).any() for index in (schedule.train_index, schedule.test_index)):
        return None
    # its odd batch sizes are not worth compiling for
    with parts.uncompiled():
        return knn_accuracy(trainer.model.query, trainer.views, trainer.config.split)


@contextmanager
def _opened(config: Config, resume: bool, world: World) -> Iterator[tuple[Path, Checkpoint | None]]:
    """The run's folder, and the checkpoint to resume, which every rank reads itself."""
    with open_folder(config, resume) if world.main else nullcontext((Path(), None)) as (folder, resumed):
        told = world.share([str(folder), *((str(resumed.path), resumed.step) if resumed else ())])
        if len(told) > 1 and not world.main:
            newest, step = Path(told[1]), told[2]
            resumed = checkpoint.load(newest) if newest.exists() else None
            require(
                resumed is not None and resumed.step == step,
                f"{newest} of step {step} is not here: every rank reads it, from a folder that all share",
            )
        yield Path(told[0]), resumed
