"""One training step of A²MC, and the state it moves: `Trainer.step` is the algorithm from top to bottom.

The rooms it calls are `augment` (views), `attack`, `losses`, `bank` and `model`. Every step is a function of
(seed, step): the batch order and all random choices of the views come from `rng`, so a resumed run needs no
generator state. Nothing in a step waits for the device: what changes from step to step lies in tensors, and
on a GPU the whole step is captured once as a CUDA graph and replayed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function

import a2mc_fast.kernels as kernels
from a2mc_fast import rng
from a2mc_fast.augment import Draws, Views
from a2mc_fast.config import Config
from a2mc_fast.data import Clips
from a2mc_fast.data.identity import differing
from a2mc_fast.encoders.bigru import BiGRU
from a2mc_fast.encoders.branch import set_arithmetic
from a2mc_fast.encoders.common import weights_held
from a2mc_fast.encoders.recurrence import Recurrence, choose_recurrence, no_triton, require_kernels
from a2mc_fast.errors import require
from a2mc_fast.evaluation.protocols import knn_accuracy
from a2mc_fast.losses import Losses
from a2mc_fast.model import A2MC
from a2mc_fast.ranks import ALONE, World, checksum
from a2mc_fast.run import checkpoint
from a2mc_fast.run.capture import Captured, Part, Say


class Trainer:
    """Model, data and optimizer of one run; of several ranks, each takes its part of the joint batch."""

    def __init__(
        self, config: Config, clips: Clips, world: World = ALONE, recurrence: Recurrence | None = None
    ) -> None:
        """`recurrence` is what computed the recurrent layers of the run until now."""
        self.config, self.clips, self.device, self.world = config, clips, clips.device, world
        require(
            config.optim.batch_size % world.size == 0,
            f"--optim.batch-size {config.optim.batch_size}, the joint batch, cannot be shared evenly by "
            f"{world.size} ranks: choose a multiple of {world.size}",
        )
        self.train_index, self.test_index = clips.split(config.split)
        self.steps_per_epoch = len(self.train_index) // config.optim.batch_size
        require(
            len(self.train_index) > 1,
            f"protocol {config.split!r} has {len(self.train_index)} training clips: choose another with "
            "--split, or prepare the data with one",
        )
        require(
            self.steps_per_epoch > 0,
            f"protocol {config.split!r} has {len(self.train_index)} training clips, fewer than one batch: "
            f"lower --optim.batch-size {config.optim.batch_size}",
        )
        self.total_steps = config.warmup_steps + config.optim.epochs * self.steps_per_epoch
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
        cuda = self.device.type == "cuda"
        # what the step reads: a captured step cannot take arguments
        self._time = torch.zeros((), dtype=torch.int64, device=self.device)
        self._lr = torch.tensor(config.optim.lr, device=self.device)
        self._order = torch.zeros(len(self.train_index), dtype=torch.int64, device=self.device)
        self._slots = torch.arange(config.optim.batch_size, device=self.device)
        self._epoch = -1  # whose batch order `_order` holds
        self.fault = torch.full((1,), -1, device=self.device)
        """The first step whose loss or gradient was not finite, or -1. From it on no weight moves."""
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler("cuda", enabled=cuda and config.precision == "fp16")
        self.model.backend, note = choose_backend(self.model, self.device)
        if world.any(self.model.backend == "torch") and self.model.backend == "triton":
            self.model.backend, note = "torch", "loss and bank in plain torch, as on another rank"
        refused = rng.kernel_refused(self.device) if cuda else ""
        self._words_by_kernel = cuda and not refused
        self.notes = [note] if note else []
        """Sentences for the log: by what each part of a step is computed, and why."""
        if refused:
            self.notes.append(f"random numbers in plain torch, because their kernel was refused: {refused}")
        self._choose_recurrence(recurrence)
        self.say: Say = print
        """Where to tell what a compiler refused."""
        self._compile_parts()
        require(cuda or config.run.graph != "on", "--run.graph on needs a GPU: use --run.graph auto")
        self._stream = torch.cuda.Stream(self.device) if cuda and config.run.graph != "off" else None
        self._phase, self._run = "", Captured(dict, None)

    def _make_optimizer(self) -> torch.optim.SGD:
        """SGD of the query branch, whose rate is read from the device."""
        optim = self.config.optim
        parameters = list(self.model.query.parameters())
        optimizer = torch.optim.SGD(
            parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
        )
        optimizer.param_groups[0]["lr"] = self._lr
        for parameter in parameters:
            # torch would leave it unwritten if fp16 skips the first step
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def _choose_recurrence(self, before: Recurrence | None) -> None:
        """Both encoders' recurrent layers by what suits all ranks, and as `before` if that is possible."""
        encoder, share = self.model.query.encoder, self.config.optim.batch_size // self.world.size
        chosen, note = choose_recurrence(self.config, encoder, self.device, share, before)
        if self.world.any(chosen == "torch") and chosen != "torch":
            chosen, note = "torch", "recurrent layers by cuDNN, as on another rank"
        self._recurrence: Recurrence | None = None
        if isinstance(encoder, BiGRU) and isinstance(self.model.key.encoder, BiGRU):
            self._recurrence = encoder.recurrence = self.model.key.encoder.recurrence = chosen
        self.notes += [note] if note else []

    def _compile_parts(self) -> None:
        """Views, losses and encoders, each behind torch.compile where that is asked for."""
        run = self.config.run
        compiled = run.compile == "on" or (run.compile == "auto" and self.device.type == "cuda")

        def part(name: str, function: Callable[..., Any], compile: bool = True) -> Part:
            strict = run.compile == "on"
            return Part(name, function, compile and compiled, strict, lambda line: self.say(line))

        self._make_view = part("views", self.views.make)
        self._losses = part("losses", self.model.losses)
        encoders = []
        for name, branch in (("query encoder", self.model.query), ("key encoder", self.model.key)):
            branch.compiled = part(name, branch.encoder, not branch.encoder.recurrent)
            encoders.append(branch.compiled)
        self._parts = (self._make_view, self._losses, *encoders)

    @property
    def ran(self) -> dict[str, str]:
        """How each part of the step ran, by name: compiled, captured, by which kernels, or why not."""
        return {
            **{part.name: part.ran for part in self._parts},
            "step": self._run.ran,
            "loss and bank": "Triton kernels" if self.model.backend == "triton" else "plain torch",
            "random numbers": "Triton kernel" if self._words_by_kernel else "plain torch",
            **({"recurrent layers": self._recurrence} if self._recurrence else {}),
        }

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Inside, all parts run as written."""
        for part in self._parts:
            part.resting = True
        yield
        for part in self._parts:
            part.resting = False

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
        phase = "warmup" if step < config.warmup_steps else "train"
        if step == config.warmup_steps:
            self.model.copy_query_to_key()
        if phase != self._phase:
            body = self._warmup_step if phase == "warmup" else self._train_step
            strict = config.run.graph == "on"
            self._phase = phase
            self._run = Captured(body, self._stream, strict, lambda line: self.say(line))
        self._write_order(step // self.steps_per_epoch)
        self._time.fill_(step)
        self._lr.fill_(self.learning_rate(step))
        # the only other random numbers are those of dropout layers, each rank its own
        torch.manual_seed(rng.combine(config.seed, step) ^ self.world.rank)
        with weights_held(self.model.query.encoder, self.model.key.encoder):
            return self._run()

    def launch_steps(self) -> None:
        """From now on the host launches every operation of a step: slower, but a profile can name them."""
        self._stream, self._phase = None, ""

    def _warmup_step(self) -> dict[str, Tensor]:
        """MoCo on the bank as it fills: the basic views' contrast alone, keys written into the next rows."""
        model = self.model
        index, (draw0, draw3, _, _) = self._share()
        with record_function("key"):
            model.update_key()
        with record_function("views"):
            x0, x3 = self._make_view(index.repeat(2), "weak", draw0 + draw3, self._time).chunk(2)
        features = model.features(x0, x3)
        with record_function("ranks"):
            joint = model.gathered(features)
        with record_function("loss"):
            losses, _ = model.losses(features, warmup=True)
        losses = self._optimize(losses)
        with record_function("bank"):
            model.write_keys(joint)
        return _to_log(losses) | model.spread(joint)

    def _train_step(self) -> dict[str, Tensor]:
        """A²MC, Fig. 2. The named phases show in a profile; `bench/bench_step.py` sums them."""
        model, config, time = self.model, self.config, self._time
        index, (draw0, draw3, draw1, draw2) = self._share()
        with record_function("key"):
            model.update_key()

        # two basic views; a weak and a strong view of the attacked clip
        with record_function("views"):
            x0, x3 = self._make_view(index.repeat(2), "weak", draw0 + draw3, time).chunk(2)
        x1 = x2 = rho = key = None
        if config.attack.radius:
            with record_function("attack"):
                rho, key = model.attack_with_key(self.views.whole(index), x0)
        with record_function("views"):
            if config.loss.weak != "off":
                x1 = self._make_view(index, "weak" if config.views.augment else "none", draw1, time, rho)
            if config.loss.strong != "off":
                x2 = self._make_view(index, "strong" if config.views.augment else "none", draw2, time, rho)

        # f0 from the key encoder, f3, f1 and f2 from the query encoder
        features = model.features(x0, x3, x1, x2, key)
        with record_function("ranks"):
            joint = model.gathered(features)
        with record_function("loss"):
            losses, sums = self._losses(features)
        losses = self._optimize(losses)

        # the banks move with the features, and from the rows, that the loss has seen
        with record_function("bank"):
            bank = model.update_banks(joint, sums)
        return _to_log(losses) | bank | model.spread(joint)

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
            self.fault.copy_(torch.where(first, self._time, self.fault))
            faulty = self.fault >= 0
            # the fused optimizer reads this flag on the device; a scaler puts what it finds in its place
            self.optimizer.found_inf = faulty.float()  # type: ignore[attr-defined]
            if self.scaler.is_enabled():
                torch._foreach_mul_(gradients, torch.where(faulty, math.nan, 1.0).squeeze())
            self.scaler.step(self.optimizer)
            self.model.query.encoder.weights_changed()
            self.scaler.update()
        return losses

    def _write_order(self, epoch: int) -> None:
        """A permutation of the training clips per epoch."""
        if epoch != self._epoch:
            order = rng.permutation(
                self.config.seed, epoch, rng.STREAM_ORDER, len(self.train_index), self.device
            )
            self._order.copy_(self.train_index[order])
            self._epoch = epoch

    def _batch(self) -> Tensor:
        """Clip numbers of the step that `_time` says; an epoch's remainder is dropped."""
        first = self._time % self.steps_per_epoch * self.config.optim.batch_size
        return self._order[first + self._slots]

    def _share(self) -> tuple[Tensor, list[Draws]]:
        """This rank's clips of the step, and the random choices of their four views."""
        index = self._batch()
        own = self.world.part(len(index))
        return index[own], [draws.part(own) for draws in self.views.draw(self._time, len(index))]

    def batch(self, step: int) -> Tensor:
        """Clip numbers of a step, of all ranks, [N]."""
        self._write_order(step // self.steps_per_epoch)
        self._time.fill_(step)
        return self._batch()

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

    def knn_accuracy(self) -> float | None:
        """kNN accuracy of the protocol in percent, None where a side of it has no labels."""
        labels = self.clips.labels
        if not all(bool((labels[index] >= 0).any()) for index in (self.train_index, self.test_index)):
            return None
        # its odd batch sizes are not worth compiling for
        with self._uncompiled():
            return knn_accuracy(self.model.query, self.views, self.config.split)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint. `InputError` if it was trained on other data."""
        changed = " and ".join(differing(saved.data, self.clips.identity))
        require(not changed, f"{saved.path} was trained on other data: the {changed} are not those of now")
        saved.restore(self.model)
        saved.restore_optimizer(self.model, self.optimizer)
        self.scaler.load_state_dict(saved.scaler)

    def state(self, step: int, progress: dict[str, float]) -> checkpoint.State:
        """What a checkpoint holds after `step` steps: the live tensors, not copies.

        `InputError` if the ranks do not hold the same.
        """
        if not self.world.alone:
            self.world.require_equal(
                checksum(list(self.model.state_dict().values())),
                f"{{ranks}} no longer held what rank 0 held after step {step}, as may happen on unlike GPUs: "
                "continue from the last checkpoint on equal ones, with --resume",
            )
        return checkpoint.state(
            step=step,
            config=self.config,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            clips=self.clips,
            classes=max(self.classes, 1),
            progress=progress,
            recurrence=self._recurrence,
        )


def _to_log(losses: Losses) -> dict[str, Tensor]:
    """L and its parts by name."""
    return dict(zip(("loss", "loss_weak", "loss_strong", "loss_basic"), losses, strict=True))


def choose_backend(model: A2MC, device: torch.device) -> tuple[Literal["triton", "torch"], str]:
    """How losses and banks are computed, and why, as a sentence for the log or "".

    `auto` takes the Triton kernels on a GPU, once they have agreed with float64 there.
    """
    config = model.config
    if config.run.backend == "triton":
        require_kernels("--run.backend triton", "use --run.backend auto or torch", device)
    if config.run.backend != "auto":
        return config.run.backend, ""
    if device.type != "cuda" or not config.fits_kernels:
        return "torch", ""
    if no_triton():
        return "torch", "loss and bank in plain torch, because triton is not installed"
    reason = kernels.verify.mismatch(device, config.encoder.projection, model.settings, model.ascent)
    if reason:
        return (
            "torch",
            f"loss and bank in plain torch, because the Triton kernels cannot be used here: {reason}",
        )
    return "triton", "loss and bank by Triton kernels, which agree with float64 here"
