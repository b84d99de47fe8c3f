"""Loss with gradients, and the bank's ascent: the Triton kernels against compiled, eager and literal torch.

`pytest bench/bench_kernels.py -s` sweeps K, N and the number of mixing shares around the paper's size, all
forms in one run after a check that they agree, with the memory a call allocates beyond its inputs and the
distance from the memory's limit. On a CPU, where the kernels do not run, the torch forms are timed at the
smaller sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from a2mc_fast.kernels import reference
from a2mc_fast.kernels.bank_ascent import bank_ascent
from a2mc_fast.kernels.mixing_contrast import mixing_contrast
from a2mc_fast.kernels.problem import Contrast, Contrasted, Features, Step
from torch import Tensor

from bench.baselines import literal_mixing_contrast, whole_logits_mixing_contrast
from bench.harness import CUDA, DEVICE, TOY, Form, compare, compiled, compiled_all, sized
from bench.records import Recorder

D, PAPER_MIX = 128, (0.4, 0.3, 0.2, 0.1)
KERNELS = CUDA or TOY  # a rehearsal runs them in Triton's interpreter
Loss = Callable[..., Tensor]
LITERAL_LIMIT = 30e9 if CUDA else 3e9  # bytes of mixed banks beyond which the literal form is left out


@dataclass(frozen=True)
class Size:
    """One measured problem."""

    n: int = sized(64, 64, 8)
    k: int = sized(16384, 16384, 64)
    mix: tuple[float, ...] = PAPER_MIX

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.n, "K": self.k, "mix": len(self.mix)}

    def __str__(self) -> str:
        return f"N{self.n}-K{self.k}-mix{len(self.mix)}"


# torch.compile takes its time for each size
COMPILED = [Size(), Size(k=sized(65536, 4096, 64))]
SWEEP = [
    *(Size(k=k) for k in sized((16384, 4096, 65536, 262144, 1048576), (16384, 4096), (64,))),
    *(Size(n=n) for n in sized((32, 256, 1024), (32,), ())),
    *(Size(mix=mix) for mix in ((), (0.25,))),
]


def ours(form: Callable[..., Contrasted]) -> Loss:
    """An operation that is called as the forms of `baselines` are."""

    def called(*args: Any) -> Tensor:
        *features, bank, mix, temperature = args
        return form(Features(*features), bank, Contrast(mix, temperature)).losses.sum()

    return called


def summed(form: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Loss:
    """L of one of the `baselines`."""

    def called(*args: Any) -> Tensor:
        basic, weak, strong = form(*args)
        return basic + weak + strong

    return called


EAGER = ours(reference.mixing_contrast)


class Problem:
    """Unit features [N, D] and raw bank rows [K, D] of one size, and every way to the same result."""

    def __init__(self, size: Size) -> None:
        generator = torch.Generator().manual_seed(0)

        def unit(rows: int) -> Tensor:
            return F.normalize(torch.randn(rows, D, generator=generator), dim=1).to(DEVICE)

        self.size, self.key = size, unit(size.n)
        self.anchors = [unit(size.n).requires_grad_() for _ in range(3)]  # basic, weak, strong
        self.bank, self.rows = unit(size.k), 2 * unit(size.k)
        self.velocity = torch.zeros_like(self.rows)
        self.compiled = compiled(summed(whole_logits_mixing_contrast)) if size in COMPILED else None

    def gradients(self, form: Loss) -> list[Tensor]:
        """Gradients of L with respect to the anchors."""
        loss = form(self.key, *self.anchors, self.bank, self.size.mix, 0.07)
        return list(torch.autograd.grad(loss, self.anchors))

    def losses(self) -> dict[str, Callable[[], list[Tensor]]]:
        """Loss with feature gradients, by form."""
        forms: dict[str, Loss] = {"ours": ours(mixing_contrast) if KERNELS else EAGER}
        if self.compiled:
            forms["compiled"] = self.compiled
        if KERNELS:
            forms["eager"] = EAGER
        if 4 * self.size.n * self.size.k * D * (1 + len(self.size.mix)) * 3 < LITERAL_LIMIT:
            forms["literal"] = summed(literal_mixing_contrast)
        return {name: lambda form=form: self.gradients(form) for name, form in forms.items()}  # type: ignore[misc]

    def plain(self, form: Loss) -> Callable[[], object]:
        """One step of the bank up the whole loss at 0.03, by autograd."""
        anchors = [a.detach() for a in self.anchors]

        def step() -> object:
            unit = F.normalize(self.rows, dim=1).requires_grad_()
            (gradient,) = torch.autograd.grad(form(self.key, *anchors, unit, self.size.mix, 0.03), unit)
            return reference.bank_step(self.rows, self.velocity, gradient, Step())

        return step

    def ascents(self) -> dict[str, Callable[[], object]]:
        """The same, by form."""
        features = Features(self.key, *(a.detach() for a in self.anchors))

        def triton() -> object:
            return bank_ascent(self.rows, self.velocity, features, Contrast(self.size.mix, 0.03), Step())

        forms: dict[str, Callable[[], object]] = {"ours": triton if KERNELS else self.plain(EAGER)}
        if self.compiled:
            forms["compiled"] = self.plain(self.compiled)
        if KERNELS:
            forms["eager"] = self.plain(EAGER)
        return forms

    def step(self) -> None:
        """Loss, gradients and ascent by the kernels as a training step has them: sums of one pass."""
        features, mix = Features(self.key, *self.anchors), self.size.mix
        found = mixing_contrast(features, self.rows, Contrast(mix, normalize=True, climb=0.03))
        torch.autograd.grad(found.losses.sum(), self.anchors)
        settings = Contrast(mix, 0.03)
        bank_ascent(self.rows, self.velocity, features.detach(), settings, Step(), found.sums)

    @property
    def bank_bytes(self) -> int:
        return 4 * self.size.k * D


@pytest.fixture(scope="module", autouse=True)
def _compile_all_sizes() -> None:
    """Before anything is timed."""
    # beyond a number of sizes torch gives up compiling a function
    torch._dynamo.config.recompile_limit = 8 * len(SWEEP)
    torch._dynamo.config.accumulated_recompile_limit = 64 * len(SWEEP)
    for size in SWEEP:
        problem = Problem(size)
        for forms in (problem.losses(), problem.ascents()):
            for name, form in forms.items():
                if name in ("ours", "compiled"):  # the others take gigabytes that others may need
                    form()
    compiled_all()


def test_loss_gradients_and_ascent(record: Recorder) -> None:
    """All that a step of the paper's size does with its bank."""
    problem = Problem(Size())
    losses, ascents = problem.losses(), problem.ascents()
    forms: dict[str, Form] = {
        name: lambda name=name: (losses[name](), ascents[name]())  # type: ignore[misc]
        for name in ascents
    }
    if KERNELS:
        forms["ours"] = problem.step
    if "literal" in losses:
        forms["literal"] = lambda: (losses["literal"](), ascents["compiled"]())
    sizes = problem.size.sizes
    record(*compare("loss, gradients and ascent", sizes, forms, 6 * problem.bank_bytes))


@pytest.mark.parametrize("size", SWEEP, ids=str)
def test_loss_and_gradients(record: Recorder, size: Size) -> None:
    problem = Problem(size)
    forms = problem.losses()
    results = {name: form() for name, form in forms.items()}
    truth = problem.gradients(summed(whole_logits_mixing_contrast))
    for name, got in results.items():
        for a, b in zip(got, truth, strict=True):
            # tf32 products carry ten bits
            worst = ((a - b).norm() / b.norm()).item()
            assert worst < (5e-3 if name == "ours" else 1e-3), (
                f"{name} differs by {worst:.1e}: no speed for it"
            )
    # the bank is read once
    record(*compare("loss with gradients", size.sizes, forms, problem.bank_bytes))


@pytest.mark.parametrize("size", SWEEP, ids=str)
def test_ascent(record: Recorder, size: Size) -> None:
    problem = Problem(size)
    problem.plain(summed(whole_logits_mixing_contrast))()
    truth = problem.velocity
    for name in problem.ascents():
        problem = Problem(size)
        problem.ascents()[name]()
        worst = ((problem.velocity - truth).norm() / truth.norm()).item()
        assert worst < 5e-3, f"{name} differs by {worst:.1e}: no speed for it"
    problem = Problem(size)
    # the rows are read for the softmax, then rows and velocity are read and written
    record(*compare("ascent", size.sizes, problem.ascents(), 5 * problem.bank_bytes))
