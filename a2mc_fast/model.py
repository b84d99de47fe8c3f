"""A²MC: query and key encoder, the frozen class layer of the attack, the memory banks, and the loss they meet
in.

    x0 basic view ─► key encoder   ─► f0 ┐
    x3 basic view ─► query encoder ─► f3 │
    x1 weak view  ─► query encoder ─► f1 ├─► mixing contrast ◄─► bank
    x2 strong view ► query encoder ─► f2 ┘

x1 and x2 are views of the attacked clip. Features are [N, D] float32 unit rows; clips are [N, T, C, V, M].
An encoder contrasts one or more levels of its feature, each with a head and a bank of its own, in pairs
(query level, key level). The loss is summed over the pairs; those that share a bank are stacked along N, P
pairs deep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

import a2mc_fast.kernels as kernels
from a2mc_fast.attack import perturbation, semantic_attack
from a2mc_fast.bank import MemoryBank, Queue
from a2mc_fast.config import Config
from a2mc_fast.encoders.branch import frozen
from a2mc_fast.encoders.build import build_branch
from a2mc_fast.kernels import reference
from a2mc_fast.kernels.problem import Contrast, Features, Step
from a2mc_fast.losses import Losses
from a2mc_fast.ranks import ALONE, World
from a2mc_fast.ranks.batch_norm import join_batch_norms
from a2mc_fast.skeleton import Skeleton

Sums = dict[str, Tensor | None]
"""By bank, what its loss leaves for its ascent."""


class A2MC(nn.Module):
    """The whole method; `Trainer` calls its parts in the order of the paper."""

    def __init__(
        self, config: Config, skeleton: Skeleton, persons: int, classes: int, world: World = ALONE
    ) -> None:
        super().__init__()
        self.config, self.world = config, world
        # for the weights only; all that is random in training draws from `rng`
        torch.manual_seed(config.seed)
        self.query = build_branch(config, skeleton, persons)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        join_batch_norms(self, world)
        encoder, bank, dim = self.query.encoder, config.bank, config.encoder.projection
        # the query levels that meet at each bank, which is a key level's, and their number
        self.meeting: dict[str, list[str]] = {}
        for query, key in encoder.pairs:
            self.meeting.setdefault(key, []).append(query)
        self.depth = {bank: len(levels) for bank, levels in self.meeting.items()}
        # the whole feature's level comes last
        self.main = list(encoder.levels)[-1]

        def new_bank(seed: int) -> Queue:
            if bank.kind == "fifo":
                return Queue(bank.size, dim, seed=seed)
            step = Step(config.bank_lr, bank.momentum, bank.weight_decay)
            return MemoryBank(bank.size, dim, step, seed=seed)

        self.banks = nn.ModuleDict({level: new_bank(config.seed + i) for i, level in enumerate(self.depth)})
        # the attack's class layer: frozen, so that its directions mean the same throughout training
        self.classifier = nn.Linear(encoder.feature_dim, classes).requires_grad_(False)
        # as written; `run.parts` puts it there compiled
        self.perturb: Callable[..., Tensor] = perturbation
        # the Triton kernels, or plain torch; the trainer chooses once the model is on its device
        self.backend: Literal["triton", "torch"] = "triton" if config.run.backend == "triton" else "torch"
        loss, products = config.loss, "ieee" if config.precision == "fp32" else "tf32"
        self.settings = Contrast(loss.mix, loss.temperature, loss.strong == "distill", True, products)
        """Of the loss."""
        self.ascent = self.settings._replace(temperature=bank.temperature)
        """Of what the banks climb."""

    # Att-Aug (sec. III-B)

    def attack(self, x: Tensor, classify: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The perturbation of whole clips that flattens their class distribution. -> like x"""
        attack = self.config.attack
        with frozen(self.query):
            return semantic_attack(
                classify or self.classify, x, lr=attack.lr, radius=attack.radius, perturb=self.perturb
            )

    def classify(self, x: Tensor) -> Tensor:
        """Class logits of the attack. x [N, T, C, V, M] -> [N, classes] float32"""
        return self.classifier(self.query.feature(x, wide=True).float())

    # features, losses (sec. III-C, III-D)

    def features(
        self, x0: Tensor, x3: Tensor, x1: Tensor | None = None, x2: Tensor | None = None,
        key: Tensor | None = None,
    ) -> dict[str, Features]:  # fmt: skip
        """f0 of the key encoder; f3, f1, f2 of the query encoder in one pass over all its views: by bank.

        `key` is the key encoder's feature of x0, where the attack has brought it along.
        """
        with torch.no_grad(), record_function("key"):
            keys = self.key(x0) if key is None else self.key.projected(key)
        views = {"basic": x3, "weak": x1, "strong": x2}
        given = {name: x for name, x in views.items() if x is not None}
        with record_function("query"):
            together = self.query(torch.cat(list(given.values())), views=len(given))
        queries = {level: dict(zip(given, f.chunk(len(given)))) for level, f in together.items()}
        return {
            bank: Features(
                _stack([keys[bank]] * len(levels)),
                **{view: _stack([queries[level][view] for level in levels]) for view in given},
            )
            for bank, levels in self.meeting.items()
        }

    def losses(self, features: dict[str, Features], *, warmup: bool = False) -> tuple[Losses, Sums]:
        """L1, L2, L3 and their sum (Eq. 9), batch means, summed over the pairs of levels; and what the banks'
        ascents can use of them, where they meet the same features.

        During the warm-up it is MoCo on the bank as it fills: InfoNCE of f3 (Eq. 1), without mixing.
        """
        settings = self.settings._replace(mix=()) if warmup else self.settings
        if not warmup and self.config.bank.kind != "fifo" and self.world.alone:
            settings = settings._replace(climb=self.ascent.temperature)
        form = kernels.mixing_contrast if self.backend == "triton" else reference
        found = {n: form.mixing_contrast(f, self.bank(n).rows, settings) for n, f in features.items()}
        parts = torch.stack([self.depth[name] * each.losses for name, each in found.items()]).sum(0)
        return Losses.of(parts), {name: each.sums for name, each in found.items()}

    def bank(self, level: str | None = None) -> Queue:
        """The bank of a key level, by default that of the whole feature."""
        bank = self.banks[level or self.main]
        assert isinstance(bank, Queue)
        return bank

    # what follows the optimiser step

    @torch.no_grad()
    def update_key(self, ema: float) -> None:
        """Moving average of the parameters (Eq. 4), with 0 a copy of the query's; BatchNorm statistics come
        from the key's own passes."""
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), 1 - ema)

    def write_keys(self, features: dict[str, Features], most: int | None = None) -> None:
        """The keys of a batch, at most so many, into the next rows of the banks: stacked pairs share them."""
        for name, f in features.items():
            self.bank(name).write(f.key[: len(f.key) // self.depth[name]][:most])

    def update_banks(self, features: dict[str, Features], sums: Sums) -> dict[str, Tensor]:
        """Ascend the loss (Eq. 7), or queue the keys, with the features from before the optimiser step and
        what `losses` left of them.

        Returns, on the device and averaged over banks, what shows a bank that runs away or sleeps: the mean
        row norm, how far unit rows moved, and the share of f3's softmax that lies on negatives at the
        ascent's temperature.
        """
        if self.config.bank.kind == "fifo":
            self.write_keys(features)
            return {}
        ascents = []
        for name, f in features.items():
            bank = self.bank(name)
            assert isinstance(bank, MemoryBank)
            fused, weight = self.backend == "triton", self.depth[name]
            ascents.append(bank.ascend(f, self.ascent, weight=weight, triton=fused, sums=sums.get(name)))
        norm, movement, negatives = (torch.stack(values).mean() for values in zip(*ascents, strict=True))
        if self.config.bank.refresh:
            self.write_keys(features, self.config.bank.refresh)
        return {"bank_norm": norm, "bank_movement": movement, "bank_negatives": negatives}


def _stack(parts: list[Tensor]) -> Tensor:
    """One after another along N; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
