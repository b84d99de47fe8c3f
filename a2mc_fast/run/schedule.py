"""Which clips a step trains on, and how fast: functions of (seed, step).

A captured step cannot take arguments: it reads `time`, `rate` and its clips from the device, where `set` puts
them before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from a2mc_fast import rng
from a2mc_fast.config import Config
from a2mc_fast.data import Clips
from a2mc_fast.errors import require


class Schedule:
    """Batch order and learning rate of a run on the training clips of its protocol."""

    def __init__(self, config: Config, clips: Clips, ranks: int = 1) -> None:
        """`InputError` if the clips do not fill a batch, or `ranks` cannot share it evenly."""
        self.config = config
        batch = config.optim.batch_size
        require(
            batch % ranks == 0,
            f"--optim.batch-size {batch}, the joint batch, cannot be shared evenly by {ranks} ranks: choose "
            f"a multiple of {ranks}",
        )
        self.train_index, self.test_index = clips.split(config.split)
        count = len(self.train_index)
        require(
            count > 1,
            f"protocol {config.split!r} has {count} training clips: choose another with --split, or prepare "
            "the data with one",
        )
        self.steps_per_epoch = count // batch
        require(
            self.steps_per_epoch > 0,
            f"protocol {config.split!r} has {count} training clips, fewer than one batch: lower "
            f"--optim.batch-size {batch}",
        )
        self.total_steps = config.warmup_steps + config.optim.epochs * self.steps_per_epoch
        self.time = torch.zeros((), dtype=torch.int64, device=clips.device)
        self.rate = torch.tensor(config.optim.lr, device=clips.device)
        self._order = torch.zeros(count, dtype=torch.int64, device=clips.device)
        self._slots = torch.arange(batch, device=clips.device)
        self._epoch = -1  # whose batch order `_order` holds

    def set(self, step: int) -> None:
        """Write what step number `step` reads; every epoch has a permutation of the clips of its own."""
        epoch = step // self.steps_per_epoch
        if epoch != self._epoch:
            order = rng.permutation(
                self.config.seed, epoch, rng.STREAM_ORDER, len(self._order), self._order.device
            )
            self._order.copy_(self.train_index[order])
            self._epoch = epoch
        self.time.fill_(step)
        self.rate.fill_(self.learning_rate(step))

    def batch(self, step: int | None = None) -> Tensor:
        """Clip numbers of a step, or of that which was set, of all ranks, [N]; an epoch's remainder is
        dropped."""
        if step is not None:
            self.set(step)
        first = self.time % self.steps_per_epoch * self.config.optim.batch_size
        return self._order[first + self._slots]

    def learning_rate(self, step: int) -> float:
        """The rate of a step: the ramp, then half a cosine over the whole run, or the milestones.

        Until its end the warm-up knows no milestone; after it, gamma for each that has passed.
        """
        optim = self.config.optim
        lr = optim.lr * min(1.0, (step + 1) / (optim.ramp_steps + 1))
        if not optim.milestones:
            return lr * (1 + math.cos(math.pi * step / self.total_steps)) / 2
        if step < self.config.warmup_steps:
            return lr
        epoch = (step - self.config.warmup_steps) // self.steps_per_epoch
        return lr * optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)
