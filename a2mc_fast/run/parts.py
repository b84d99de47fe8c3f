"""By what the parts of a step are computed on this machine: by kernels or in plain torch, compiled, captured.

It is chosen once, before the first step, so that all ranks choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

import a2mc_fast.kernels as kernels
from a2mc_fast import rng
from a2mc_fast.encoders.branch import Encoder, Recurrence
from a2mc_fast.encoders.recurrence import choose_recurrence, no_triton, require_kernels
from a2mc_fast.errors import require
from a2mc_fast.model import A2MC
from a2mc_fast.run.beside import attack_with_key, key_rides
from a2mc_fast.run.capture import Captured, Part, Say
from a2mc_fast.run.machine import set_arithmetic
from a2mc_fast.trainer import Body, Trainer


class Parts:
    """Views, losses and encoders, each behind torch.compile where that is asked for, and the whole step."""

    def __init__(self, trainer: Trainer, before: Recurrence | None = None) -> None:
        """Put them in the places of those that the trainer has as written. `before` is what computed the
        recurrent layers of the run until now."""
        self.config, self.model, self.world = trainer.config, trainer.model, trainer.world
        self.say: Say = print
        """Where to tell what a compiler refused."""
        model, run, device = self.model, self.config.run, trainer.device
        cuda = device.type == "cuda"
        require(cuda or run.graph != "on", "--run.graph on needs a GPU: use --run.graph auto")
        set_arithmetic(self.config)
        model.backend, note = choose_backend(model, device)
        if self.world.any(model.backend == "torch") and model.backend == "triton":
            model.backend, note = "torch", "loss and bank in plain torch, as on another rank"
        self.notes = [note] if note else []
        """Sentences for the log: by what each part of a step is computed, and why."""
        refused = rng.kernel_refused(device) if cuda else ""
        self._words_by_kernel = cuda and not refused
        if refused:
            self.notes.append(f"random numbers in plain torch, because their kernel was refused: {refused}")
        self._choose_recurrence(device, before)
        if key_rides(model):
            trainer.attack = partial(attack_with_key, model)
        self._compiles = run.compile == "on" or (run.compile == "auto" and cuda)
        trainer.view = view = self._part("views", trainer.view)
        trainer.losses = losses = self._part("losses", trainer.losses)
        # each a score of small operations, which a narrow encoder's step would feel
        model.perturb = perturb = self._part("perturbation", model.perturb)
        trainer.spread = spread = self._part("spread of features", trainer.spread)
        trainer.first_fault = first_fault = self._part("search for faults", trainer.first_fault)
        self._all = [view, losses, perturb, spread, first_fault]
        for name, encoder in (("query encoder", model.query.encoder), ("key encoder", model.key.encoder)):
            # one that defines its own forward pass over all views is left alone
            if type(encoder).forward is Encoder.forward:
                # one view's pass: three in a graph would take a compiler three times as long
                part = self._part(name, encoder.encode, encoder)
                encoder.encode = part  # type: ignore[method-assign, assignment]
                self._all.append(part)
        self._captured: Captured | None = None
        if cuda and run.graph != "off":
            self._stream = torch.cuda.Stream(device)
            trainer.captured = self._capture

    def _choose_recurrence(self, device: torch.device, before: Recurrence | None) -> None:
        """Both encoders' recurrent layers by what suits all ranks, and as `before` if that is possible."""
        encoder, share = self.model.query.encoder, self.config.optim.batch_size // self.world.size
        chosen, note = choose_recurrence(self.config, encoder, device, share, before)
        if self.world.any(chosen == "torch") and chosen != "torch":
            chosen, note = "torch", "recurrent layers by cuDNN, as on another rank"
        if encoder.recurrence:
            encoder.recurrence = self.model.key.encoder.recurrence = chosen
        self.notes += [note] if note else []

    def _part(self, name: str, function: Callable[..., Any], module: nn.Module | None = None) -> Part:
        strict = self.config.run.compile == "on"
        return Part(name, function, self._compiles, strict, lambda line: self.say(line), module)

    def _capture(self, body: Body) -> Body:
        """What runs `body` on a GPU: after some calls in a row, the capture of it."""
        if self._captured is None or self._captured.function != body:
            strict = self.config.run.graph == "on"
            self._captured = Captured(body, self._stream, strict, lambda line: self.say(line))
        return self._captured

    @property
    def ran(self) -> dict[str, str]:
        """How each part of the step ran, by name: compiled, captured, by which kernels, or why not."""
        recurrence = self.model.query.encoder.recurrence
        return {
            **{part.name: part.ran for part in self._all},
            "step": self._captured.ran if self._captured else "launched",
            "loss and bank": "Triton kernels" if self.model.backend == "triton" else "plain torch",
            "random numbers": "Triton kernel" if self._words_by_kernel else "plain torch",
            **({"recurrent layers": recurrence} if recurrence else {}),
        }

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Inside, all parts run as written."""
        for part in self._all:
            part.resting = True
        yield
        for part in self._all:
            part.resting = False


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
