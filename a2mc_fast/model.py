"""A²MC: query and key encoder, the frozen class layer of the attack, the memory banks, and the loss they meet
in.

    x0 basic view ─► key encoder   ─► f0 ┐
    x3 basic view ─► query encoder ─► f3 │
    x1 weak view  ─► query encoder ─► f1 ├─► mixing contrast ◄─► bank
    x2 strong view ► query encoder ─► f2 ┘

x1 and x2 are views of the attacked clip. Features are [N, D] float32 unit rows; clips are [N, C, T, V, M].
An encoder contrasts one or more levels of its feature, each with a head and a bank of its own, in pairs
(query level, key level). The loss is summed over the pairs; those that share a bank are stacked along N, P
pairs deep.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from a2mc_fast.attack import semantic_attack
from a2mc_fast.bank import MemoryBank, Queue
from a2mc_fast.config import Config
from a2mc_fast.encoders.branch import Branch
from a2mc_fast.encoders.common import frozen
from a2mc_fast.encoders.joint_norm import join_batch_norms
from a2mc_fast.losses import Backend, Losses, info_nce, mixing_contrast
from a2mc_fast.ranks import ALONE, World
from a2mc_fast.skeleton import Skeleton


class Features(NamedTuple):
    """Unit rows [P N, D] of one batch that meet at one bank; weak and strong are absent where not used."""

    key: Tensor  # f0
    basic: Tensor  # f3
    weak: Tensor | None = None  # f1
    strong: Tensor | None = None  # f2

    def detach(self) -> Features:
        return Features(*(None if f is None else f.detach() for f in self))  # type: ignore[arg-type]


class A2MC(nn.Module):
    """The whole method; `Trainer` calls its parts in the order of the paper."""

    def __init__(
        self, config: Config, skeleton: Skeleton, persons: int, classes: int, world: World = ALONE
    ) -> None:
        super().__init__()
        self.config, self.world = config, world
        # for the weights only; all that is random in training draws from `rng`
        torch.manual_seed(config.seed)
        self.query = Branch(config, skeleton, persons)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        if config.encoder.batch_norm == "joint":
            join_batch_norms(self, world)
        encoder, bank, dim = self.query.encoder, config.bank, config.encoder.projection
        self.pairs = encoder.pairs
        # the whole feature's level comes last
        self.main = list(encoder.levels)[-1]

        def new_bank(seed: int) -> Queue:
            if bank.kind == "fifo":
                return Queue(bank.size, dim, seed=seed)
            return MemoryBank(
                bank.size,
                dim,
                lr=config.bank_lr,
                momentum=bank.momentum,
                weight_decay=bank.weight_decay,
                seed=seed,
            )

        key_levels = dict.fromkeys(level for _, level in self.pairs)
        self.banks = nn.ModuleDict({level: new_bank(config.seed + i) for i, level in enumerate(key_levels)})
        # the attack's class layer: frozen, so that its directions mean the same throughout training
        self.classifier = nn.Linear(encoder.feature_dim, classes).requires_grad_(False)
        # the Triton kernels, or plain torch; the trainer chooses once the model is on its device
        self.backend: Literal["triton", "torch"] = "triton" if config.run.backend == "triton" else "torch"
        # how the kernels multiply float32
        self.products: Literal["tf32", "ieee"] = "ieee" if config.precision == "fp32" else "tf32"

    @property
    def uses_weak(self) -> bool:
        """Whether the loss has the term of the weak view, L1."""
        return self.config.loss.weak != "off"

    @property
    def uses_strong(self) -> bool:
        """Whether the loss has the term of the strong view, L2."""
        return self.config.loss.strong != "off"

    # Att-Aug (sec. III-B)

    def attack(self, x: Tensor) -> Tensor:
        """The perturbation of whole clips that flattens their class distribution. -> like x"""
        with frozen(self.query):
            return semantic_attack(
                self.classify, x, lr=self.config.attack.lr, radius=self.config.attack.radius
            )

    def classify(self, x: Tensor) -> Tensor:
        """Class logits of the attack. x [N, C, T, V, M] -> [N, classes] float32"""
        return self.classifier(self.query.feature(x, wide=True).float())

    # features, losses (sec. III-C, III-D)

    def features(
        self, x0: Tensor, x3: Tensor, x1: Tensor | None = None, x2: Tensor | None = None
    ) -> dict[str, Features]:
        """f0 of the key encoder; f3, f1, f2 of the query encoder in one pass over all its views: by bank."""
        with torch.no_grad(), record_function("key"):
            keys = self.key(x0)
        views = [x for x in (x3, x1, x2) if x is not None]
        with record_function("query"):
            # joined in the order in which views are stored
            together = torch.cat([x.transpose(1, 2) for x in views]).transpose(1, 2)
            queries = {k: f.chunk(len(views)) for k, f in self.query(together, views=len(views)).items()}
        places = iter(range(len(views)))
        at = [None if x is None else next(places) for x in (x3, x1, x2)]

        def stacked(bank: str, view: int) -> Tensor:
            return _stack([queries[query][view] for query, key in self.pairs if key == bank])

        return {
            bank: Features(
                _stack([keys[key] for _, key in self.pairs if key == bank]),
                *(None if view is None else stacked(bank, view) for view in at),  # type: ignore[arg-type]
            )
            for bank in self.banks
        }

    def gathered(self, features: dict[str, Features]) -> dict[str, Features]:
        """The features of all ranks, as of the joint batch, in one message and without a gradient."""
        if self.world.alone:
            return features
        given = [f for of_bank in features.values() for f in of_bank if f is not None]
        ranks = self.world.gather(torch.cat(given).unsqueeze(0))  # [W, all rows, D]
        parts = iter(ranks.split([len(f) for f in given], 1))

        def joint(bank: str) -> Tensor:
            """Pair by pair, and each in the joint batch's order."""
            return next(parts).unflatten(1, (self._depth(bank), -1)).transpose(0, 1).flatten(0, 2)

        return {
            bank: Features(*(None if f is None else joint(bank) for f in of_bank))  # type: ignore[arg-type]
            for bank, of_bank in features.items()
        }

    def warmup_losses(self, features: dict[str, Features]) -> Losses:
        """MoCo on the bank as it fills: InfoNCE of f3 (Eq. 1)."""
        parts = []
        for name, f in features.items():
            loss = info_nce(
                f.basic,
                f.key,
                self.bank(name).rows,
                temperature=self.config.loss.temperature,
                normalize=True,
                backend=self.backend,
                products=self.products,
            )
            parts.append(self._depth(name) * loss.mean())
        basic = torch.stack(parts).sum()
        return Losses(basic, torch.zeros_like(basic), torch.zeros_like(basic), basic)

    def losses(self, features: dict[str, Features]) -> Losses:
        """L1, L2, L3 and their sum (Eq. 9), batch means, summed over the pairs of levels."""
        tau = self.config.loss.temperature
        per_bank = [
            [
                self._depth(name) * part.mean()
                for part in self._terms(f, self.bank(name).rows, tau, normalize=True, backend=self.backend)
            ]
            for name, f in features.items()
        ]
        return Losses(*(torch.stack(parts).sum() for parts in zip(*per_bank, strict=True)))

    def bank(self, level: str | None = None) -> Queue:
        """The bank of a key level, by default that of the whole feature."""
        bank = self.banks[level or self.main]
        assert isinstance(bank, Queue)
        return bank

    def _depth(self, bank: str) -> int:
        """Pairs of levels that meet at a bank, P."""
        return sum(key == bank for _, key in self.pairs)

    def _terms(
        self, f: Features, bank: Tensor, temperature: float, *, normalize: bool, backend: Backend
    ) -> Losses:
        """The loss per clip, against unit rows, or those of raw rows with `normalize`."""
        loss = self.config.loss
        return mixing_contrast(
            f.key,
            f.basic,
            f.weak,
            f.strong,
            bank,
            mix=loss.mix,
            temperature=temperature,
            strong_target="one_hot" if loss.strong == "contrast" else "distribution",
            normalize=normalize,
            reduction="none",
            backend=backend,
            products=self.products,
        )

    # what follows the optimiser step

    @torch.no_grad()
    def update_key(self) -> None:
        """Moving average of the parameters (Eq. 4); BatchNorm statistics come from the key's own passes."""
        torch._foreach_lerp_(
            list(self.key.parameters()), list(self.query.parameters()), 1 - self.config.optim.ema
        )

    @torch.no_grad()
    def copy_query_to_key(self) -> None:
        """Query parameters into the key encoder, when the bank has been filled."""
        torch._foreach_copy_(list(self.key.parameters()), list(self.query.parameters()))

    def keys(self, features: dict[str, Features]) -> dict[str, Tensor]:
        """The keys of a batch by level, [N, D] each: stacked pairs share theirs."""
        return {n: f.key.detach()[: len(f.key) // self._depth(n)] for n, f in features.items()}

    def write_keys(self, keys: dict[str, Tensor]) -> None:
        """The keys of a batch, by level, [N, D] each, into the next rows of their banks."""
        for name in self.banks:
            self.bank(name).write(keys[name])

    def update_banks(self, features: dict[str, Features]) -> dict[str, Tensor]:
        """Ascend the loss (Eq. 7), or queue the keys, with the features from before the optimiser step.

        Returns, on the device and averaged over banks, what shows a bank that runs away or sleeps: the mean
        row norm, how far unit rows moved, and the share of f3's softmax that lies on negatives at the
        ascent's temperature.
        """
        if self.config.bank.kind == "fifo":
            self.write_keys(self.keys(features))
            return {}
        step = self._fused_ascent if self.backend == "triton" else self._plain_ascent
        stats = [step(self.bank(name), f.detach(), self._depth(name)) for name, f in features.items()]
        norm, movement, negatives = (torch.stack(values).mean() for values in zip(*stats, strict=True))
        return {"bank_norm": norm, "bank_movement": movement, "bank_negatives": negatives}

    def _plain_ascent(self, rows: Queue, f: Features, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ascent by autograd. -> (row norm, movement, share of negatives)"""
        assert isinstance(rows, MemoryBank)
        bank = self.config.bank
        negatives = f.basic.new_zeros(())

        def objective(unit: Tensor) -> Tensor:
            nonlocal negatives
            terms = self._terms(f, unit, bank.temperature, normalize=False, backend="torch")
            negatives = 1 - torch.exp(-terms.basic.detach()).mean()
            return depth * terms.total.mean()

        return (*rows.ascend(objective), negatives)

    def _fused_ascent(self, rows: Queue, f: Features, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same step in one pass over rows and velocity."""
        from a2mc_fast.kernels.bank_ascent import bank_ascent

        assert isinstance(rows, MemoryBank)
        bank, loss = self.config.bank, self.config.loss
        return bank_ascent(
            rows.rows,
            rows.velocity,
            *f,
            mix=loss.mix,
            temperature=bank.temperature,
            lr=rows.lr,
            momentum=rows.momentum,
            weight_decay=rows.weight_decay,
            weight=depth,
            distill=loss.strong == "distill",
            precision=self.products,
        )


def _stack(parts: list[Tensor]) -> Tensor:
    """One after another along N; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
