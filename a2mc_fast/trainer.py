"""One training step of A²MC, and the state it moves: `Trainer.step` is the algorithm from top to bottom.

The rooms it calls are `augment` (views), `attack`, `losses`, `bank` and `model`. Every step is a function of
(seed, step): the batch order and all random choices of the views come from `rng`, so a resumed run needs no
generator state. Nothing in a step waits for the device: what changes from step to step lies in tensors, and
on a GPU the whole step is captured once as a CUDA graph and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import record_function

from a2mc_fast import rng
from a2mc_fast.augment import Draws, Views
from a2mc_fast.config import Config
from a2mc_fast.data import Clips
from a2mc_fast.encoders.branch import weights_held
from a2mc_fast.losses import Losses, spread
from a2mc_fast.model import A2MC, Sums
from a2mc_fast.ranks import ALONE, World

Body = Callable[[], dict[str, Tensor]]
"""A step's work. It reads what changes from tensors, and gives what to log."""
Attack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Whole clips, and their view x0 -> rho, and the key encoder's feature of x0 if that came along."""


class Trainer:
    """Model, data and optimizer of one run; of several ranks, each takes its part of the joint batch."""

    def __init__(self, config: Config, clips: Clips, world: World = ALONE) -> None:
        """`InputError` if the clips do not suit the run, or the ranks were told different things."""
        self.config, self.clips, self.device, self.world = config, clips, clips.device, world
        self.schedule = Schedule(config, clips)
        classes = config.attack.classes or clips.num_classes
        config.require_fit(len(self.schedule.train_index), classes, world.size)
        self.model = A2MC(config, clips.skeleton, clips.num_persons, max(classes, 1), world)
        self.model.to(self.device)
        if not world.alone:
            told = replace(config, data="", run=replace(config.run, out="")), clips.identity
            world.start_alike(told, list(self.model.state_dict().values()))
        self.views = Views(clips, config.views, config.seed, world)
        self.optimizer = self._make_optimizer()
        scaled = self.device.type == "cuda" and config.precision == "fp16"
        self.scaler = torch.amp.GradScaler("cuda", enabled=scaled)
        self.fault = torch.full((1,), -1, device=self.device)
        """The first step whose loss or gradient was not finite, or -1. From it on no weight moves."""
        # as written; `run.parts` puts what it compiles, combines and captures in these places
        self.view: Callable[..., Tensor] = self.views.make
        self.attack: Attack = lambda x, x0: (self.model.attack(x), None)
        self.losses: Callable[..., tuple[Losses, Sums]] = self.model.losses
        self.spread: Callable[[Tensor], dict[str, Tensor]] = spread
        self.first_fault: Callable[..., tuple[Tensor, Tensor]] = first_fault
        self.captured: Callable[[Body], Body] = lambda body: body

    def _make_optimizer(self) -> torch.optim.SGD:
        """SGD of the query branch, whose rate is read from the device."""
        optim = self.config.optim
        parameters = list(self.model.query.parameters())
        optimizer = torch.optim.SGD(
            parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
        )
        optimizer.param_groups[0]["lr"] = self.schedule.rate
        for parameter in parameters:
            # torch would leave it unwritten if fp16 skips the first step
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def step(self, step: int) -> dict[str, Tensor]:
        """Step number `step`. Returns what to log, on the device; a later step writes over it."""
        config = self.config
        if step == config.warmup_steps:
            self.model.update_key(ema=0.0)  # the bank has been filled
        body = self.captured(self._warmup_step if step < config.warmup_steps else self._train_step)
        self.schedule.set(step)
        # the only other random numbers are those of dropout layers, each rank its own
        torch.manual_seed(rng.combine(config.seed, step) ^ self.world.rank)
        with weights_held(self.model.query.encoder, self.model.key.encoder):
            return body()

    def _warmup_step(self) -> dict[str, Tensor]:
        """MoCo on the bank as it fills: the basic views' contrast alone, keys written into the next rows."""
        model = self.model
        index, (draw0, draw3, _, _) = self._share()
        with record_function("key"):
            model.update_key(self.config.optim.ema)
        with record_function("views"):
            x0, x3 = self.view(index.repeat(2), "weak", draw0 + draw3, self.schedule.time).chunk(2)
        features = model.features(x0, x3)
        with record_function("ranks"):
            joint = self.world.gather_features(features, model.depth)
        with record_function("loss"):
            losses, _ = model.losses(features, warmup=True)
        losses = self._optimize(losses)
        with record_function("bank"):
            model.write_keys(joint)
        return _to_log(losses) | self.spread(joint[model.main].basic)

    def _train_step(self) -> dict[str, Tensor]:
        """A²MC, Fig. 2. The named phases show in a profile; `bench/bench_step.py` sums them."""
        model, config, time = self.model, self.config, self.schedule.time
        index, (draw0, draw3, draw1, draw2) = self._share()
        with record_function("key"):
            model.update_key(self.config.optim.ema)

        # two basic views; a weak and a strong view of the attacked clip
        with record_function("views"):
            x0, x3 = self.view(index.repeat(2), "weak", draw0 + draw3, time).chunk(2)
        x1 = x2 = rho = key = None
        if config.attack.radius:
            with record_function("attack"):
                rho, key = self.attack(self.view(index, "none", draw1, time), x0)
        with record_function("views"):
            if config.loss.weak != "off":
                x1 = self.view(index, "weak" if config.views.augment else "none", draw1, time, rho)
            if config.loss.strong != "off":
                x2 = self.view(index, "strong" if config.views.augment else "none", draw2, time, rho)

        # f0 from the key encoder, f3, f1 and f2 from the query encoder
        features = model.features(x0, x3, x1, x2, key)
        with record_function("ranks"):
            joint = self.world.gather_features(features, model.depth)
        with record_function("loss"):
            losses, sums = self.losses(features)
        losses = self._optimize(losses)

        # the banks move with the features, and from the rows, that the loss has seen
        with record_function("bank"):
            bank = model.update_banks(joint, sums)
        return _to_log(losses) | bank | self.spread(joint[model.main].basic)

    def _share(self) -> tuple[Tensor, list[Draws]]:
        """This rank's clips of the step, and the random choices of their four views."""
        index = self.schedule.batch()
        own = self.world.part(len(index))
        return index[own], [draws.part(own) for draws in self.views.draw(self.schedule.time, len(index))]

    def _optimize(self, losses: Losses) -> Losses:
        """Backward pass and SGD; once a loss or gradient is not finite, the weights stay as they are.

        Returns the losses of the joint batch.
        """
        with record_function("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(losses.total).backward()
        gradients = [p.grad for p in self.model.query.parameters() if p.grad is not None]
        joint = torch.stack([part.detach() for part in losses])
        with record_function("ranks"):
            self.world.average_([*gradients, joint])
        losses = Losses(*joint)
        with record_function("optimizer"):
            # a scaler skips a step whose scaled gradients overflow
            norms = None if self.scaler.is_enabled() else torch.stack(torch._foreach_norm(gradients))
            fault, faulty = self.first_fault(losses.total, norms, self.fault, self.schedule.time)
            self.fault.copy_(fault)
            # the fused optimizer reads this flag on the device; a scaler puts what it finds in its place
            self.optimizer.found_inf = faulty  # type: ignore[attr-defined]
            if self.scaler.is_enabled():
                torch._foreach_mul_(gradients, torch.where(faulty > 0, math.nan, 1.0).squeeze())
            self.scaler.step(self.optimizer)
            self.model.query.encoder.weights_changed()
            self.scaler.update()
        return losses


def first_fault(total: Tensor, norms: Tensor | None, before: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The first step [1] whose loss or gradients were not finite, or -1, given that `before` this step [];
    and whether there was one, as a float32 [1]."""
    finite = total.isfinite() if norms is None else total.isfinite() & norms.isfinite().all()
    fault = torch.where(~finite & (before < 0), step, before)
    return fault, (fault >= 0).float()


def _to_log(losses: Losses) -> dict[str, Tensor]:
    """L and its parts by name."""
    return dict(zip(("loss", "loss_weak", "loss_strong", "loss_basic"), losses, strict=True))


class Schedule:
    """Which training clips of the protocol a step trains on, and how fast: functions of (seed, step).

    A captured step cannot take arguments: it reads `time`, `rate` and its clips from the device, where `set`
    puts them before.
    """

    def __init__(self, config: Config, clips: Clips) -> None:
        self.config, batch = config, config.optim.batch_size
        self.train_index, self.test_index = clips.split(config.split)
        self.steps_per_epoch = len(self.train_index) // batch
        self.total_steps = config.warmup_steps + config.optim.epochs * self.steps_per_epoch
        self.time = torch.zeros((), dtype=torch.int64, device=clips.device)
        self.rate = torch.tensor(config.optim.lr, device=clips.device)
        self._order = torch.zeros(len(self.train_index), dtype=torch.int64, device=clips.device)
        self._slots = torch.arange(batch, device=clips.device)
        self._epoch = -1  # whose batch order `_order` holds

    def set(self, step: int) -> None:
        """Write what step number `step` reads; every epoch has a permutation of the clips of its own."""
        epoch, order = step // self.steps_per_epoch, self._order
        if epoch != self._epoch:
            place = rng.permutation(self.config.seed, epoch, rng.STREAM_ORDER, len(order), order.device)
            order.copy_(self.train_index[place])
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
