"""Pretraining: `python -m a2mc_fast.train [PRESET] [--FLAG VALUE ...] [--resume]`.

The loop: step, log, evaluate, save. One step, the algorithm itself, is `trainer.Trainer.step`. torch is
imported when a run begins, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from a2mc_fast.config import BASE_PRESETS, Config, preset
from a2mc_fast.errors import InputError, exit_on_error, one_speaks, require

if TYPE_CHECKING:
    import torch

    from a2mc_fast.data import Clips
    from a2mc_fast.ranks import World
    from a2mc_fast.run.log import RunLog
    from a2mc_fast.trainer import Trainer


def train(config: Config, *, resume: bool = False) -> Path:
    """Pretrain as configured; returns the run folder. Raises `InputError` for what the user can mend."""
    from a2mc_fast.ranks import join

    with join(config, lambda: pick_device(config)) as world:
        folder = _train(config, resume, world)
    gc.collect()  # a captured step and what it captured refer to each other
    return folder


def _train(config: Config, resume: bool, world: World) -> Path:
    """One rank's run. All ranks take the same steps; rank 0 prints and writes."""
    import torch

    from a2mc_fast.files import write_json
    from a2mc_fast.run.checkpoint import shared
    from a2mc_fast.run.log import QuietLog, RunLog, leave, machine, open_folder, stop_on_signal
    from a2mc_fast.run.saver import Saver
    from a2mc_fast.trainer import Trainer

    folder, resumed = open_folder(config, resume) if world.main else (Path(), None)
    folder, resumed = Path(world.share(str(folder))), shared(resumed, world)
    torch.compiler.reset()  # torch compiles a function so many times and no more, earlier runs included
    trainer = Trainer(config, load_clips(config, world.device), world)
    total, per_epoch, run = trainer.total_steps, trainer.steps_per_epoch, config.run
    kept = run.keep_every * per_epoch
    if resumed:
        trainer.restore(resumed)
        if world.share(resumed.step >= total and (folder / "result.json").exists()):
            if world.main:
                print(f"{folder} is finished after {resumed.step} steps: nothing to resume")
            return folder

    with (
        stop_on_signal(say=world.main) as stop,
        (RunLog if world.main else QuietLog)(folder, config, total, resumed) as log,
        Saver(
            folder, resumed, keep_last=run.keep_last, keep_every=kept, before=log.sync, warn=log.say
        ) as saver,
    ):
        trainer.say = log.say
        with log.paused():
            ranks = "" if world.alone else f"{world.size} x "
            log.say(
                f"{config.preset}: {len(trainer.train_index)} training clips, {total} steps "
                f"({config.warmup_steps} of warm-up) on {ranks}{machine()['device']} -> {folder}"
            )
            for note in trainer.notes:
                log.say(note)
            if resumed:
                progress = resumed.progress
                log.say(f"resumed after step {resumed.step}")
            else:
                progress = log.accuracy(trainer.knn_accuracy(), "_untrained")
                trainer.start()
        for step in range(log.step, total):
            epoch, new_epoch = trainer.epochs_done(step)
            if new_epoch:
                trainer.model.refresh_classifier(epoch)
            values = trainer.step(step)
            logged = log.advance()
            if logged:
                progress["loss"] = log.metrics(trainer, values)["loss"]
            if log.due(run.eval_every, per_epoch):
                with log.paused():
                    progress |= log.accuracy(trainer.knn_accuracy())
            # read once: a signal may come at any line; several ranks agree where they wait for the device
            asked = world.largest(sum(stop[:1])) if logged or world.alone else 0
            last = bool(asked) or log.step == total
            if last or log.due(run.checkpoint_every, per_epoch) or log.due(run.keep_every, per_epoch):
                with log.paused():
                    log.check(trainer, values)
                    progress["seconds"] = log.seconds
                    state = trainer.state(log.step, progress)
                    if world.main:
                        saver.save(state, last=last)
            if last and log.step < total:
                log.say(f"stopped after step {log.step} of {total}: continue with --resume")
                leave(asked)
        result = outcome(config, trainer, log, progress)
        if world.main:
            write_json(folder / "result.json", result)
        log.say(summary(result, folder))
    return folder


def outcome(config: Config, trainer: Trainer, log: RunLog, progress: dict[str, float]) -> dict[str, Any]:
    """The content of result.json. It needs no step of this process: the last checkpoint holds the numbers."""
    from a2mc_fast.run.log import machine, peak_memory

    return {
        "preset": config.preset,
        "steps": log.step,
        "seconds": round(log.seconds, 2),
        "clips_per_second": round(log.step * config.optim.batch_size / log.seconds, 1),
        "peak_memory_bytes": peak_memory(trainer.device),
        "loss": progress["loss"],
        "knn_top1": progress.get("knn_top1"),
        "knn_top1_untrained": progress.get("knn_top1_untrained"),
        "ran": trainer.ran,
        **machine(),
    }


def summary(result: dict[str, Any], folder: Path) -> str:
    """The last lines of a run."""
    lines = [
        f"{result['steps']} steps in {result['seconds']:.0f} s, {result['clips_per_second']:.0f} clips/s, "
        f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB, loss {result['loss']:.3f}"
    ]
    if result["knn_top1"] is not None:
        gain = result["knn_top1"] - result["knn_top1_untrained"]
        lines.append(
            f"kNN top-1 {result['knn_top1']:.1f} %, untrained encoder {result['knn_top1_untrained']:.1f} % "
            f"({gain:+.1f} points)"
        )
    return "\n".join([*lines, f"wrote {folder}/checkpoint.safetensors and {folder}/result.json"])


def pick_device(config: Config) -> torch.device:
    """The GPU if there is one and the run allows it. Sets threads and torch's arithmetic."""
    import torch

    from a2mc_fast.encoders.branch import set_arithmetic

    # cuBLAS reads it when it starts, and repeats its results to the bit only with workspaces of its own
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.run.threads:
        most = 4 * (os.cpu_count() or 1)
        require(
            config.run.threads <= most,
            f"--run.threads {config.run.threads} is more than this machine can use: at most {most}",
        )
        torch.set_num_threads(config.run.threads)
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        raise InputError(
            "--run.device cuda: torch sees no GPU; use --run.device cpu, or install a CUDA build"
        )
    set_arithmetic(config)
    return torch.device("cuda" if available and config.run.device != "cpu" else "cpu")


def load_clips(config: Config, device: torch.device) -> Clips:
    """The packed data file, or the built-in set."""
    from a2mc_fast.data import Clips
    from a2mc_fast.data.synthetic import synthetic_clips

    if config.data:
        return Clips.load(config.data, device)
    s = config.synthetic
    return synthetic_clips(clips=s.clips, classes=s.classes, seed=s.seed, device=device)


@contextmanager
def out_of_memory_is_bad_input() -> Iterator[None]:
    """Turns an allocation that failed, on the GPU or the host, into an `InputError` with what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # a GPU's is a torch.OutOfMemoryError, which is a RuntimeError; a CPU's a plain one
        text = str(error).splitlines()[0] if str(error) else "no more memory"
        if not isinstance(error, MemoryError) and "memory" not in text:
            raise
        raise InputError(
            f"out of memory ({text}): lower --optim.batch-size, --views.frames, --bank.size or the encoder's "
            "width; a run with a checkpoint continues on a larger machine with --resume"
        ) from None


def main(args: list[str] | None = None) -> None:
    """The command line: a preset by name (default demo), then any field as a flag, and --resume."""
    args = list(sys.argv[1:] if args is None else args)
    with exit_on_error(), out_of_memory_is_bad_input():
        with one_speaks():
            name = args.pop(0) if args and not args[0].startswith("-") else "demo"
            resume = "--resume" in args
            require(
                not any(arg.split("=")[0] == "--preset" for arg in args),
                "a preset's name comes first, without a flag: python -m a2mc_fast.train own",
            )
            config = tyro.cli(
                Config,
                default=preset(name),
                args=[arg for arg in args if arg != "--resume"],
                prog="python -m a2mc_fast.train",
                description="Pretrain a skeleton encoder: python -m a2mc_fast.train [PRESET] [options]. "
                f"Presets: {', '.join(BASE_PRESETS)}; append -b1 .. -b4 or -a1 .. -a3 for an ablation. "
                "--resume continues the run in its folder.",
            )
        train(config, resume=resume)


if __name__ == "__main__":
    main()
