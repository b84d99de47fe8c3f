"""What the trainer hands to torch.compile, and what the checker must refuse, for a make-believe GPU.

`python -m tests.offline_cases CHIP CASE ...` compiles each case and prints as JSON what came of it: its
seconds of CPU, its graphs, and the compiler's words if it refused one. A case is named by words, as "view
strong attacked", "losses ntu60-xsub-b4 torch" and "encoder scd": a function of this module, and its
arguments.
"""

from __future__ import annotations

# isort: off
from tests.offline_gpu import GPU, graphs, make_believe, mode
# isort: on

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from a2mc_fast.kernels.problem import Features
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

import a2mc_fast.trainer
from a2mc_fast.attack import perturbation
from a2mc_fast.augment import Draws, Views
from a2mc_fast.config import EncoderConfig, RunConfig, preset
from a2mc_fast.data import Clips
from a2mc_fast.losses import spread
from a2mc_fast.model import A2MC
from a2mc_fast.run.machine import set_arithmetic
from a2mc_fast.run.parts import Parts
from a2mc_fast.skeleton import NTU25
from a2mc_fast.trainer import Trainer, first_fault

CLIPS, TRAINING = 56_578, 40_091  # of NTU-60
FRAMES = 4_773_093


def compiled(function: Callable[..., Any], *inputs: Any) -> Any:
    """Its result, compiled as the trainer compiles."""
    return torch.compile(function, dynamic=False)(*inputs)


class FakeClips(Clips):
    """A data set of NTU-60's size without memory."""

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """How many clips each side has depends on values."""
        train = torch.zeros(TRAINING, dtype=torch.int64, device=GPU)
        return train, torch.zeros(CLIPS - TRAINING, dtype=torch.int64, device=GPU)


def clips() -> Clips:
    numbers = torch.zeros(CLIPS, dtype=torch.int64, device=GPU)
    return FakeClips(
        frames=torch.empty(FRAMES, 3, NTU25.num_joints, 2, device=GPU),
        lengths=numbers,
        labels=numbers,
        skeleton=NTU25,
        splits={},
        names=("",) * CLIPS,
        class_names=tuple(map(str, range(60))),
    )


class FakeA2MC(A2MC):
    """Built on the CPU; on the GPU its tensors have no memory."""

    def __init__(self, *args: Any) -> None:
        with unset_fake_temporarily():
            super().__init__(*args)

    def to(self, device: torch.device) -> FakeA2MC:  # type: ignore[override]
        return self._apply(lambda t: mode.from_tensor(t).to(device))


def view(kind: str, clip: str = "plain") -> None:
    """A batch of views; "whole" is kind none, and a weak view of the clip itself is made for two at once."""
    config = preset("ntu60-xsub")
    count = config.optim.batch_size * (2 if (kind, clip) == ("weak", "plain") else 1)
    views = Views(clips(), config.views, config.seed)
    index, step = torch.zeros(count, dtype=torch.int64, device=GPU), torch.tensor(5, device=GPU)
    draws = Draws(torch.empty(count, 49, device=GPU))
    rho = torch.empty(count, config.views.frames, 3, NTU25.num_joints, 2, device=GPU)
    made = compiled(
        views.make,
        index,
        "none" if kind == "whole" else kind,
        draws,
        step,
        rho if clip == "attacked" else None,
    )
    assert made.shape == rho.shape and made.device == GPU


def losses(name: str, backend: str, rows: str = "1024") -> None:
    """The loss of a preset and its gradients; `rows` of the bank are gone through in blocks of 4,096."""
    config = preset(name)
    config = replace(
        config,
        encoder=EncoderConfig(hidden=8, layers=1),
        bank=replace(config.bank, size=int(rows)),
        run=RunConfig(backend=backend),  # type: ignore[arg-type]
    )
    set_arithmetic(config)
    model = FakeA2MC(config, NTU25, 2, 60).to(GPU)
    shape = (config.optim.batch_size, config.encoder.projection)
    key, *anchors = (torch.empty(shape, device=GPU, requires_grad=i > 0) for i in range(4))
    used = (True, config.loss.weak != "off", config.loss.strong != "off")
    anchors = [a if u else None for a, u in zip(anchors, used)]
    compiled(model.losses, {model.main: Features(key, *anchors)})[0].total.backward()
    for anchor in anchors:
        assert anchor is None or anchor.grad.shape == shape


def perturb() -> None:
    """What the attack makes of a gradient."""
    x = torch.empty(64, 64, 3, NTU25.num_joints, 2, device=GPU)
    assert compiled(perturbation, x, x, 0.1, 0.5).shape == x.shape


def watch() -> None:
    """What each step looks at beside its losses: faults and the spread of its features."""
    total, step = torch.empty((), device=GPU), torch.tensor(5, device=GPU)
    fault, norms = torch.zeros(1, dtype=torch.int64, device=GPU), torch.empty(18, device=GPU)
    assert compiled(first_fault, total, norms, fault, step)[0].dtype == fault.dtype
    assert compiled(spread, torch.empty(64, 128, device=GPU)).keys() == {"feature_similarity", "feature_rank"}


def encoder(name: str) -> None:
    """A step of the method under bf16, with as little as possible beside the encoder.

    It runs forward for keys, for the attack and for the queries, and backward to the attacked clip and to the
    weights.
    """
    config = preset("ntu60-xsub-a3")
    config = replace(
        config,
        encoder=EncoderConfig(name=name),  # type: ignore[arg-type]
        bank=replace(config.bank, size=1024, warmup_steps=0),
        run=RunConfig(compile="on", graph="off", backend="triton"),
    )
    a2mc_fast.trainer.A2MC = FakeA2MC  # type: ignore[misc]
    trainer = Trainer(config, clips())
    Parts(trainer)
    # a kernel of torch, which has no form without memory
    trainer.optimizer.step = lambda *_: None  # type: ignore[method-assign]
    trainer.step(0)
    for parameter in trainer.model.query.encoder.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


def arange_times_a_large_constant() -> None:
    """Which Inductor turns into arithmetic of indices."""
    like = torch.zeros(1000, dtype=torch.int64, device=GPU)
    compiled(lambda x: x ^ torch.arange(1000, device=x.device) * 3528531795, like)


def data_times_a_large_constant() -> None:
    """Which is arithmetic of 64 bits, and stays it."""
    compiled(lambda x: x * 3528531795, torch.zeros(1000, dtype=torch.int64, device=GPU))


@torch.library.custom_op("offline::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    raise AssertionError("an operation of our own was run")


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("offline::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    raise AssertionError("an operation of our own was run")


def own_operations() -> None:
    """One that returns something new, and one that writes in place, between two kernels of Inductor's."""

    def function(x: Tensor) -> Tensor:
        y = doubled(x.sin())
        double_(y)
        return y.cos()

    assert compiled(function, torch.zeros(1000, device=GPU)).shape == (1000,)


def run(case: str) -> dict[str, Any]:
    """What came of a case."""
    word, *rest = case.split()
    torch.compiler.reset()
    graphs.clear()
    begin, error = sum(os.times()[:4]), ""
    try:
        with mode:
            globals()[word](*rest)
    except Exception as reason:
        error = f"{type(reason).__name__}: {reason}"
    seconds = round(sum(os.times()[:4]) - begin, 1)
    return {"error": error, "seconds": seconds, "graphs": [graph._asdict() for graph in graphs]}


if __name__ == "__main__":
    make_believe(int(sys.argv[1]))
    print(json.dumps({case: run(case) for case in sys.argv[2:]}))
