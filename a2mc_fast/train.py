"""Pretraining: `python -m a2mc_fast.train [PRESET] [--FLAG VALUE ...] [--resume]`.

The loop: step, log, evaluate, save. One step, the algorithm itself, is `trainer.Trainer.step`. torch is
imported when a run begins, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from a2mc_fast.config import BASE_PRESETS, Config, preset
from a2mc_fast.errors import InputError, exit_on_error

if TYPE_CHECKING:
    import torch

    from a2mc_fast.data import Clips


def train(config: Config, *, resume: bool = False) -> Path:
    """Pretrain as configured; returns the run folder. Raises `InputError` for what the user can mend."""
    from a2mc_fast.checkpoint import FILE
    from a2mc_fast.files import write_json
    from a2mc_fast.runlog import RunLog, machine, open_folder, peak_memory
    from a2mc_fast.trainer import Trainer

    folder, resumed = open_folder(config, resume)
    trainer = Trainer(config, load_clips(config, pick_device(config)))
    if resumed:
        trainer.restore(resumed)
        if resumed.step >= trainer.total_steps:
            print(f"{folder} is finished after {resumed.step} steps: nothing to resume")
            return folder

    with RunLog(folder, config, trainer.total_steps, resumed) as log:
        with log.paused():
            log.say(
                f"{config.preset}: {len(trainer.train_index)} training clips, {trainer.total_steps} steps "
                f"({config.warmup_steps} of warm-up) on {machine()['device']} -> {folder}"
            )
            if trainer.backend_note:
                log.say(trainer.backend_note)
            if resumed:
                untrained = resumed.progress.get("knn_top1_untrained")
                log.say(f"resumed after step {resumed.step}")
            else:
                untrained = trainer.knn_accuracy()
                log.accuracy(untrained)
                trainer.start()
        accuracy, numbers = untrained, {}
        for step in range(log.step, trainer.total_steps):
            epoch, new_epoch = trainer.epochs_done(step)
            if new_epoch:
                trainer.model.refresh_classifier(epoch)
            values = trainer.step(step)
            if log.advance():
                stage = "warm-up" if step < config.warmup_steps else "train"
                numbers = log.metrics(values, trainer.learning_rate(step), stage, trainer.device)
            if log.due(config.run.eval_every, trainer.steps_per_epoch):
                with log.paused():
                    accuracy = trainer.knn_accuracy()
                    log.accuracy(accuracy)
            if log.due(config.run.checkpoint_every, trainer.steps_per_epoch):
                with log.paused():
                    progress = {"seconds": log.seconds}
                    if untrained is not None:
                        progress["knn_top1_untrained"] = untrained
                    trainer.save(folder / FILE, log.step, progress)
        result = {
            "preset": config.preset,
            "steps": log.step,
            "seconds": round(log.seconds, 2),
            "clips_per_second": round(log.step * config.optim.batch_size / log.seconds, 1),
            "peak_memory_bytes": peak_memory(trainer.device),
            "loss": numbers["loss"],
            "knn_top1": accuracy,
            "knn_top1_untrained": untrained,
            **machine(),
        }
        write_json(folder / "result.json", result)
        log.say(summary(result, folder))
    return folder


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
    """The GPU if there is one and the run allows it. Sets threads and the arithmetic of float32 products."""
    import torch

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        raise InputError(
            "--run.device cuda: torch sees no GPU; use --run.device cpu, or install a CUDA build"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    return torch.device("cuda" if available and config.run.device != "cpu" else "cpu")


def load_clips(config: Config, device: torch.device) -> Clips:
    """The packed data file, or the built-in set."""
    from a2mc_fast.data import Clips
    from a2mc_fast.data.synthetic import synthetic_clips

    if config.data:
        return Clips.load(config.data, device)
    s = config.synthetic
    return synthetic_clips(clips=s.clips, classes=s.classes, seed=s.seed, device=device)


def main(args: list[str] | None = None) -> None:
    """The command line: a preset by name (default demo), then any field as a flag, and --resume."""
    args = list(sys.argv[1:] if args is None else args)
    with exit_on_error():
        name = args.pop(0) if args and not args[0].startswith("-") else "demo"
        resume = "--resume" in args
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
