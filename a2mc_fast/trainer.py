"""One training step of A²MC, and the state it moves: `Trainer.step` is the algorithm from top to bottom.

The rooms it calls are `augment` (views), `attack`, `losses`, `bank` and `model`. Every step is a function of
(seed, step): the batch order and all random choices of the views come from `rng`, so a resumed run needs no
generator state. Nothing in a step waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from a2mc_fast import checkpoint, rng
from a2mc_fast.augment import Views
from a2mc_fast.config import Config
from a2mc_fast.data import Clips
from a2mc_fast.errors import InputError, require
from a2mc_fast.model import A2MC
from a2mc_fast.protocols import knn_accuracy


class Trainer:
    """Model, data and optimizer of one run."""

    def __init__(self, config: Config, clips: Clips) -> None:
        self.config, self.clips, self.device = config, clips, clips.device
        self.train_index, self.test_index = clips.split(config.split)
        self.steps_per_epoch = len(self.train_index) // config.optim.batch_size
        require(
            self.steps_per_epoch > 0,
            f"protocol {config.split!r} has {len(self.train_index)} training clips, fewer than one batch: "
            f"lower --optim.batch-size {config.optim.batch_size}",
        )
        self.total_steps = config.warmup_steps + config.optim.epochs * self.steps_per_epoch
        self.classes = config.attack.classes or clips.num_classes
        require(
            self.classes >= 2 or not config.attack.enabled,
            f"the data has {self.classes} labelled classes and the attack needs at least 2: "
            "give --attack.classes",
        )
        self.model = A2MC(config, clips.skeleton, clips.num_persons, max(self.classes, 1)).to(self.device)
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
        self._make_view, self._losses = wrap(self.views.make), wrap(self.model.losses)

    def step(self, step: int) -> dict[str, Tensor]:
        """Step number `step` (A²MC, Fig. 2). Returns what to log, on the device.

        The named phases show in a profile; `bench/bench_step.py` sums them.
        """
        model, config = self.model, self.config
        warmup = step < config.warmup_steps
        if step == config.warmup_steps:
            model.copy_query_to_key()
        index = self.batch(step)
        time = torch.tensor(step, device=self.device)
        draw0, draw3, draw1, draw2 = self.views.draw(time, len(index))

        # f0 from the key encoder, f3, f1 and f2 from the query encoder
        with record_function("key update"):
            model.update_key()
        with record_function("views"):
            x0, x3 = self._make_view(index.repeat(2), "weak", draw0 + draw3, time).chunk(2)
            x1 = x2 = rho = None
        if not warmup:
            if config.attack.enabled:
                with record_function("attack"):
                    rho = model.attack(self.views.whole(index))
            with record_function("views"):
                if model.uses_weak:
                    x1 = self._make_view(index, config.views.weak, draw1, time, rho)
                if model.uses_strong:
                    x2 = self._make_view(index, config.views.strong, draw2, time, rho)
        with record_function("features"):
            features = model.features(x0, x3, x1, x2)
        with record_function("loss"):
            losses = model.warmup_losses(features) if warmup else self._losses(features)

        with record_function("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(losses.total).backward()
        with record_function("optimizer"):
            self.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
            self.scaler.step(self.optimizer)
            self.scaler.update()

        # the bank moves with the features, and from the rows, that the loss has seen
        bank: dict[str, Tensor] = {}
        with record_function("bank"):
            if warmup:
                model.bank.write(features.key)
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

    def batch(self, step: int) -> Tensor:
        """Clip numbers of a step: a permutation of the training clips per epoch, its remainder dropped."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            count = len(self.train_index)
            order = rng.permutation(self.config.seed, epoch, rng.STREAM_ORDER, count, self.device)
            self._order = (epoch, self.train_index[order])
        size = self.config.optim.batch_size
        return self._order[1][number * size : (number + 1) * size]

    def epochs_done(self, steps: int) -> tuple[int, bool]:
        """Whole epochs after the warm-up once `steps` steps are done, and whether one ends there exactly."""
        epoch, rest = divmod(steps - self.config.warmup_steps, self.steps_per_epoch)
        return max(epoch, 0), rest == 0 and epoch >= 0

    def learning_rate(self, step: int) -> float:
        """The warm-up runs at the base rate; after it, gamma for each milestone that has passed."""
        optim = self.config.optim
        if step < self.config.warmup_steps:
            return optim.lr
        epoch = self.epochs_done(step)[0]
        return optim.lr * optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)

    def start(self) -> None:
        """Before the first step: bank.init keys_only fills the rows with keys of the untrained encoder."""
        if self.config.bank.init != "keys_only":
            return
        size = self.config.optim.batch_size
        with torch.no_grad():
            for number in range(-(-self.config.bank.size // size)):
                step = -1 - number  # negative, so that no training step draws the same views
                index = self.batch(number)
                draws = self.views.draw(step, len(index), views=1)[0]
                self.model.bank.write(self.model.key(self.views.make(index, "weak", draws, step)))

    def knn_accuracy(self) -> float | None:
        """kNN accuracy of the protocol in percent, None where a side of it has no labels."""
        labels = self.clips.labels
        if not all(bool((labels[index] >= 0).any()) for index in (self.train_index, self.test_index)):
            return None
        return knn_accuracy(self.model.query, self.views, self.config.split)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint. `InputError` if it was trained on other data."""
        if saved.data != checkpoint.data_identity(self.clips):
            raise InputError(
                f"{saved.path} was trained on other data: {saved.data['clips']} clips with "
                f"{saved.data['frames']} frames, now {len(self.clips)} with {len(self.clips.frames)}"
            )
        saved.restore(self.model)
        saved.restore_optimizer(self.model, self.optimizer)
        self.scaler.load_state_dict(saved.scaler)

    def state(self, step: int, progress: dict[str, float]) -> checkpoint.State:
        """What a checkpoint holds after `step` steps: the live tensors, not copies."""
        return checkpoint.state(
            step=step,
            config=self.config,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            clips=self.clips,
            classes=max(self.classes, 1),
            progress=progress,
        )
