"""Pretraining: `python -m a2mc_fast.train [PRESET] [--FLAG VALUE ...] [--resume]`.

`Trainer.step` is the algorithm; the rooms it calls are `augment` (views), `attack`, `losses`, `bank` and
`model`. Every step is a function of (seed, step): the batch order and all random choices of the views come
from `rng`, so a resumed run needs no generator state.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2mc_fast.config import BASE_PRESETS, Config, preset
from a2mc_fast.errors import InputError, exit_on_error, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from a2mc_fast.data import Clips


class Trainer:
    """Model, data and optimizer of one run, and the step."""

    def __init__(self, config: Config, clips: Clips) -> None:
        import torch

        from a2mc_fast.augment import Views
        from a2mc_fast.model import A2MC

        self.config, self.clips, self.device = config, clips, clips.device
        self.train_index = clips.split(config.split)[0]
        self.steps_per_epoch = len(self.train_index) // config.optim.batch_size
        require(
            self.steps_per_epoch > 0,
            f"protocol {config.split!r} has {len(self.train_index)} training clips, fewer than one batch: "
            f"lower --optim.batch-size {config.optim.batch_size}",
        )
        self.total_steps = config.warmup_steps + config.optim.epochs * self.steps_per_epoch
        self.classes = config.attack.classes or clips.num_classes
        require(
            not config.attack.enabled or self.classes >= 2,
            f"the data has {self.classes} labelled classes, the attack needs at least 2: give --attack.classes",
        )
        self.model = A2MC(config, clips.skeleton, clips.num_persons, self.classes).to(self.device)
        self.views = Views(clips, config.views, config.seed)
        cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            self.model.query.parameters(),
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            fused=cuda,
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=cuda and config.precision == "fp16")
        self._order = (-1, self.train_index)  # epoch, its batch order
        compiled = config.run.compile == "on" or (config.run.compile == "auto" and cuda)
        wrap: Any = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        # the recurrent layer stays outside: it would break the graph
        self.make_view, self.losses = wrap(self.views.make), wrap(self.model.losses)

    def batch(self, step: int) -> Tensor:
        """Clip numbers of a step: a permutation of the training clips per epoch, its remainder dropped."""
        from a2mc_fast import rng

        epoch, number = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            seed, count = self.config.seed, len(self.train_index)
            order = rng.permutation(seed, epoch, rng.STREAM_ORDER, count, self.device)
            self._order = (epoch, self.train_index[order])
        size = self.config.optim.batch_size
        return self._order[1][number * size : (number + 1) * size]

    def learning_rate(self, step: int) -> float:
        """Constant, times gamma after each milestone; the warm-up counts as epoch 0."""
        optim = self.config.optim
        epoch = max(0, step - self.config.warmup_steps) // self.steps_per_epoch
        return optim.lr * optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)

    def step(self, step: int) -> dict[str, Tensor]:
        """One training step (A²MC, Fig. 2). Returns what to log, on the device."""
        import torch

        model, config = self.model, self.config
        index = self.batch(step)
        time = torch.tensor(step, device=self.device)
        draw0, draw3, draw1, draw2 = self.views.draw(time, len(index))
        warmup = step < config.warmup_steps
        if step == config.warmup_steps and step > 0:
            model.copy_query_to_key()
        model.update_key()

        x0 = self.make_view(index, "weak", draw0, time)
        x3 = self.make_view(index, "weak", draw3, time)
        if warmup:
            features = model.features(x0, x3)
            losses = model.warmup_losses(features)
        else:
            rho = model.attack(self.views.whole(index)) if config.attack.enabled else None
            x1 = self.make_view(index, config.views.weak, draw1, time, rho) if model.uses_weak else None
            x2 = self.make_view(index, config.views.strong, draw2, time, rho) if model.uses_strong else None
            features = model.features(x0, x3, x1, x2)
            losses = self.losses(features)

        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(losses.total).backward()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        if warmup:
            model.bank.write(features.key)
            bank = {}
        else:
            bank = model.update_bank(features)
            model.fit_classifier(x3, features.basic)
        return {
            "loss": losses.total,
            "loss_weak": losses.weak,
            "loss_strong": losses.strong,
            "loss_basic": losses.basic,
            **bank,
        }

    def fill_bank(self) -> None:
        """bank.init keys_only: the rows become keys of the untrained key encoder."""
        import torch

        size = self.config.optim.batch_size
        with torch.no_grad():
            for number in range(-(-self.config.bank.size // size)):
                step = -1 - number  # negative, so that no training step draws the same views
                index = self.batch(number)
                draws = self.views.draw(step, len(index), views=1)[0]
                self.model.bank.write(self.model.key(self.views.make(index, "weak", draws, step)))


def train(config: Config, *, resume: bool = False) -> Path:
    """Pretrain as configured; returns the run folder. Raises `InputError` for what the user can mend."""
    from a2mc_fast import checkpoint
    from a2mc_fast.files import write_json
    from a2mc_fast.protocols import knn_accuracy
    from a2mc_fast.runlog import RunLog, machine, open_folder, peak_memory

    folder, resumed = open_folder(config, resume)
    device = pick_device(config)
    clips = load_clips(config, device)
    trainer = Trainer(config, clips)
    if resumed and (folder / "result.json").exists() and resumed.step >= trainer.total_steps:
        print(f"{folder} is finished: {resumed.step} steps; nothing to resume")
        return folder
    if resumed:
        require(
            resumed.data == checkpoint.data_identity(clips),
            f"{folder} was trained on {resumed.data}, the data now holds {checkpoint.data_identity(clips)}",
        )
        resumed.restore(trainer.model)
        resumed.restore_optimizer(trainer.model, trainer.optimizer)
    log = RunLog(folder, config, trainer.total_steps, resumed)
    has_labels = clips.num_classes > 0 and all(
        (clips.labels[i] >= 0).any() for i in clips.split(config.split)
    )

    def evaluate() -> float | None:
        return knn_accuracy(trainer.model.query, trainer.views, config.split) if has_labels else None

    def save() -> None:
        progress = {"seconds": log.seconds}
        if untrained is not None:
            progress["knn_top1_untrained"] = untrained
        checkpoint.save(
            folder / checkpoint.FILE,
            step=log.step,
            config=config,
            model=trainer.model,
            optimizer=trainer.optimizer,
            scaler=trainer.scaler,
            clips=clips,
            classes=trainer.classes,
            progress=progress,
        )

    try:
        with log.paused():
            log.say(
                f"{config.preset}: {len(trainer.train_index)} of {len(clips)} clips, {trainer.total_steps} steps "
                f"({config.warmup_steps} of warm-up) on {machine()['device']} -> {folder}"
            )
            if resumed:
                untrained = resumed.progress.get("knn_top1_untrained")
                log.say(f"resumed at step {resumed.step}")
            else:
                untrained = evaluate()
                if untrained is not None:
                    log.log_accuracy(untrained)
                if config.bank.init == "keys_only":
                    trainer.fill_bank()
        numbers: dict[str, float] = {}
        accuracy = untrained
        while log.step < trainer.total_steps:
            step = log.step
            epoch, within = divmod(step - config.warmup_steps, trainer.steps_per_epoch)
            if within == 0 and epoch >= 0:
                trainer.model.refresh_classifier(epoch)
            values = trainer.step(step)
            if log.advance():
                stage = "warm-up" if step < config.warmup_steps else "train"
                numbers = log.log(values, trainer.learning_rate(step), stage, device)
            done, last = epoch + 1, log.step == trainer.total_steps
            if last or (epoch >= 0 and within + 1 == trainer.steps_per_epoch):
                with log.paused():
                    if last or (config.run.eval_every and done % config.run.eval_every == 0):
                        accuracy = evaluate()
                        if accuracy is not None:
                            log.log_accuracy(accuracy)
                    if last or done % config.run.checkpoint_every == 0:
                        save()
        result = {
            "preset": config.preset,
            "steps": log.step,
            "seconds": round(log.seconds, 2),
            "clips_per_second": round(log.step * config.optim.batch_size / log.seconds, 1),
            "peak_memory_bytes": peak_memory(device),
            "loss": numbers.get("loss"),
            "knn_top1": accuracy,
            "knn_top1_untrained": untrained,
            **machine(),
        }
        write_json(folder / "result.json", result)
        log.say(summary(result, folder))
    finally:
        log.close()
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
    """The GPU if there is one and the run allows it. Sets the arithmetic of float32 products."""
    import torch

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
    import tyro

    args = list(sys.argv[1:] if args is None else args)
    with exit_on_error():
        name = args.pop(0) if args and not args[0].startswith("-") else "demo"
        resume = "--resume" in args
        args = [arg for arg in args if arg != "--resume"]
        config = tyro.cli(
            Config,
            default=preset(name),
            args=args,
            prog="python -m a2mc_fast.train [PRESET]",
            description="Pretrain a skeleton encoder with A²MC. Presets: "
            + ", ".join(BASE_PRESETS)
            + "; append -b1 .. -b4 or -a1 .. -a3 for an ablation. --resume continues the run in its folder.",
        )
        train(config, resume=resume)


if __name__ == "__main__":
    main()
