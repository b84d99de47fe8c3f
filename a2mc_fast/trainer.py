"""One training step of A²MC, and the state it moves: `Trainer.step` is the algorithm from top to bottom.

The rooms it calls are `augment` (views), `attack`, `losses`, `bank` and `model`. Every step is a function of
(seed, step): the batch order and all random choices of the views come from `rng`, so a resumed run needs no
generator state. Nothing in a step waits for the device: what changes from step to step lies in tensors, and
on a GPU the whole step is captured once as a CUDA graph and replayed.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import record_function

from a2mc_fast import rng
from a2mc_fast.augment import Draws, Views
from a2mc_fast.config import Config
from a2mc_fast.data import Clips
from a2mc_fast.data.identity import differing
from a2mc_fast.encoders.branch import Recurrence, set_arithmetic, weights_held
from a2mc_fast.errors import require
from a2mc_fast.losses import Losses, spread
from a2mc_fast.model import A2MC
from a2mc_fast.ranks import ALONE, World, checksum
from a2mc_fast.run import checkpoint
from a2mc_fast.run.parts import Parts
from a2mc_fast.run.schedule import Schedule


class Trainer:
    """Model, data and optimizer of one run; of several ranks, each takes its part of the joint batch."""

    def __init__(
        self, config: Config, clips: Clips, world: World = ALONE, recurrence: Recurrence | None = None
    ) -> None:
        """`recurrence` is what computed the recurrent layers of the run until now."""
        self.config, self.clips, self.device, self.world = config, clips, clips.device, world
        self.schedule = Schedule(config, clips, world.size)
        self.classes = config.attack.classes or clips.num_classes
        require(
            self.classes >= 2 or not config.attack.radius,
            f"the data has {self.classes} labelled classes and the attack needs at least 2: "
            "give --attack.classes",
        )
        self.model = A2MC(config, clips.skeleton, clips.num_persons, max(self.classes, 1), world)
        self.model.to(self.device)
        set_arithmetic(config)
        self._join()
        self.views = Views(clips, config.views, config.seed, world)
        self.fault = torch.full((1,), -1, device=self.device)
        """The first step whose loss or gradient was not finite, or -1. From it on no weight moves."""
        self.optimizer = self._make_optimizer()
        scaled = self.device.type == "cuda" and config.precision == "fp16"
        self.scaler = torch.amp.GradScaler("cuda", enabled=scaled)
        self.parts = Parts(self.model, self.views, recurrence)

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

    def _join(self) -> None:
        """Have all ranks train the same model on the same data. `InputError` if they were told otherwise."""
        if self.world.alone:
            return
        config = replace(self.config, data="", run=replace(self.config.run, out=""))
        told = repr((config, self.clips.identity))
        number = int.from_bytes(hashlib.blake2b(told.encode(), digest_size=7).digest(), "big")
        self.world.require_equal(
            torch.tensor([number]),
            "{ranks} got other flags or other data than rank 0: start all with the same command and files",
        )
        parts = [t for name, t in self.model.state_dict().items() if not name.startswith("banks.")]
        self.world.broadcast_(parts)

    def step(self, step: int) -> dict[str, Tensor]:
        """Step number `step`. Returns what to log, on the device; a later step writes over it."""
        config = self.config
        if step == config.warmup_steps:
            self.model.update_key(ema=0.0)  # the bank has been filled
        run = self.parts.captured(self._warmup_step if step < config.warmup_steps else self._train_step)
        self.schedule.set(step)
        # the only other random numbers are those of dropout layers, each rank its own
        torch.manual_seed(rng.combine(config.seed, step) ^ self.world.rank)
        with weights_held(self.model.query.encoder, self.model.key.encoder):
            return run()

    def _warmup_step(self) -> dict[str, Tensor]:
        """MoCo on the bank as it fills: the basic views' contrast alone, keys written into the next rows."""
        model = self.model
        index, (draw0, draw3, _, _) = self._share()
        with record_function("key"):
            model.update_key(self.config.optim.ema)
        with record_function("views"):
            x0, x3 = self.parts.view(index.repeat(2), "weak", draw0 + draw3, self.schedule.time).chunk(2)
        features = model.features(x0, x3)
        with record_function("ranks"):
            joint = model.gathered(features)
        with record_function("loss"):
            losses, _ = model.losses(features, warmup=True)
        losses = self._optimize(losses)
        with record_function("bank"):
            model.write_keys(joint)
        return _to_log(losses) | spread(joint[model.main].basic)

    def _train_step(self) -> dict[str, Tensor]:
        """A²MC, Fig. 2. The named phases show in a profile; `bench/bench_step.py` sums them."""
        model, config, time = self.model, self.config, self.schedule.time
        index, (draw0, draw3, draw1, draw2) = self._share()
        with record_function("key"):
            model.update_key(self.config.optim.ema)

        # two basic views; a weak and a strong view of the attacked clip
        with record_function("views"):
            x0, x3 = self.parts.view(index.repeat(2), "weak", draw0 + draw3, time).chunk(2)
        x1 = x2 = rho = key = None
        if config.attack.radius:
            with record_function("attack"):
                rho, key = model.attack_with_key(self.views.whole(index), x0)
        with record_function("views"):
            if config.loss.weak != "off":
                x1 = self.parts.view(index, "weak" if config.views.augment else "none", draw1, time, rho)
            if config.loss.strong != "off":
                x2 = self.parts.view(index, "strong" if config.views.augment else "none", draw2, time, rho)

        # f0 from the key encoder, f3, f1 and f2 from the query encoder
        features = model.features(x0, x3, x1, x2, key)
        with record_function("ranks"):
            joint = model.gathered(features)
        with record_function("loss"):
            losses, sums = self.parts.losses(features)
        losses = self._optimize(losses)

        # the banks move with the features, and from the rows, that the loss has seen
        with record_function("bank"):
            bank = model.update_banks(joint, sums)
        return _to_log(losses) | bank | spread(joint[model.main].basic)

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
            finite = losses.total.isfinite()
            if not self.scaler.is_enabled():  # which skips a step whose scaled gradients overflow
                finite = finite & torch.stack(torch._foreach_norm(gradients)).isfinite().all()
            first = ~finite & (self.fault < 0)
            self.fault.copy_(torch.where(first, self.schedule.time, self.fault))
            faulty = self.fault >= 0
            # the fused optimizer reads this flag on the device; a scaler puts what it finds in its place
            self.optimizer.found_inf = faulty.float()  # type: ignore[attr-defined]
            if self.scaler.is_enabled():
                torch._foreach_mul_(gradients, torch.where(faulty, math.nan, 1.0).squeeze())
            self.scaler.step(self.optimizer)
            self.model.query.encoder.weights_changed()
            self.scaler.update()
        return losses

    def _share(self) -> tuple[Tensor, list[Draws]]:
        """This rank's clips of the step, and the random choices of their four views."""
        index = self.schedule.batch()
        own = self.world.part(len(index))
        return index[own], [draws.part(own) for draws in self.views.draw(self.schedule.time, len(index))]

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint. `InputError` if it was trained on other data."""
        changed = " and ".join(differing(saved.data, self.clips.identity))
        require(not changed, f"{saved.path} was trained on other data: the {changed} are not those of now")
        saved.restore(self.model)
        saved.restore_optimizer(self.model, self.optimizer)
        self.scaler.load_state_dict(saved.scaler)

    def state(self, step: int, progress: dict[str, float]) -> checkpoint.Checkpoint:
        """What a checkpoint holds after `step` steps: the live tensors, not copies.

        `InputError` if the ranks do not hold the same.
        """
        if not self.world.alone:
            self.world.require_equal(
                checksum(list(self.model.state_dict().values())),
                f"{{ranks}} no longer held what rank 0 held after step {step}, as may happen on unlike GPUs: "
                "continue from the last checkpoint on equal ones, with --resume",
            )
        return checkpoint.Checkpoint(
            step=step,
            config=self.config,
            skeleton=self.clips.skeleton,
            persons=self.clips.num_persons,
            classes=max(self.classes, 1),
            data=self.clips.identity,
            progress=dict(progress),
            scaler=self.scaler.state_dict(),
            recurrence=self.model.query.encoder.recurrence,
            tensors=checkpoint.tensors_of(self.model, self.optimizer),
        )


def _to_log(losses: Losses) -> dict[str, Tensor]:
    """L and its parts by name."""
    return dict(zip(("loss", "loss_weak", "loss_strong", "loss_basic"), losses, strict=True))
