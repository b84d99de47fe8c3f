"""Memory banks of negatives: a first-in-first-out queue of keys, and rows that ascend the loss (A²MC Eq. 7).

Both hold raw rows [K, D], contrast their unit rows, and are written the same way while they fill; only the
gradient bank can `ascend`. Sharded over W ranks, each holds K / W rows, one rank after another, and takes the
same keys and features. All state is in buffers on the device: no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mc_fast.errors import require
from a2mc_fast.kernels import reference
from a2mc_fast.ranks import ALONE, World


class Queue(nn.Module):
    """First in, first out: new keys replace the oldest rows. Starts with N(0, 1) rows."""

    rows: Tensor  # [K, D]
    position: Tensor  # where the next key goes, int64 scalar

    def __init__(self, size: int, dim: int, *, seed: int = 0, shards: World = ALONE) -> None:
        """`shards` are the ranks that share the rows; alone, all rows are here."""
        super().__init__()
        require(size >= 1 and dim >= 1, f"a bank needs at least one row and column, got {size} x {dim}")
        require(
            size % shards.size == 0,
            f"--bank.size {size} cannot be shared evenly by {shards.size} ranks: choose a multiple",
        )
        self.size, self.shards = size, shards
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(size, dim, generator=generator)
        self.register_buffer("rows", rows[self.own].clone() if not shards.alone else rows)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @property
    def own(self) -> slice:
        """Which of the K rows are here."""
        return self.shards.part(self.size)

    def unit(self) -> Tensor:
        """Unit rows M0. -> [rows here, D]"""
        return F.normalize(self.rows, dim=1)

    @torch.no_grad()
    def write(self, keys: Tensor) -> None:
        """Replace the next N rows, wrapping around. keys [N, D], N <= K."""
        require(len(keys) <= self.size, f"cannot write {len(keys)} keys into {self.size} rows")
        here = len(self.rows)
        # as many as a rank has rows: each then has a place of its own on every rank, whoever owns it
        for part in keys.to(self.rows.dtype).split(here):
            target = (self.position + torch.arange(len(part), device=part.device)) % self.size
            if not self.shards.alone:
                owner = target.div(here, rounding_mode="floor")
                target = target % here
                part = torch.where((owner == self.shards.rank).unsqueeze(1), part, self.rows[target])
            self.rows.index_copy_(0, target, part)
            self.position.add_(len(part)).remainder_(self.size)

    @torch.no_grad()
    def pick(self, index: Tensor) -> Tensor:
        """Unit rows by number, wherever they are. index [n] -> [n, D]"""
        unit = self.unit()
        if self.shards.alone:
            return unit[index]
        mine = index.div(len(unit), rounding_mode="floor") == self.shards.rank
        return self.shards.sum(torch.where(mine.unsqueeze(1), unit[index % len(unit)], 0.0))

    def whole(self) -> dict[str, Tensor]:
        """The state dict with all K rows, on the host where they were shared; complete on rank 0 alone."""
        return {name: self.shards.collect(t) if t.ndim == 2 else t for name, t in self.state_dict().items()}

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Of all K rows take one's own."""
        if not self.shards.alone:
            mine = {k: t[self.own] for k, t in state.items() if k.startswith(prefix) and t.ndim == 2}
            state = {**state, **mine}
        super()._load_from_state_dict(state, prefix, *rest)


class Ascent(NamedTuple):
    """What one ascent did, as tensors on the device."""

    row_norm: Tensor  # mean norm of the rows
    movement: Tensor  # mean distance that a unit row moved


class MemoryBank(Queue):
    """Rows that climb the loss as adversarial negatives (AdCo)."""

    velocity: Tensor  # [K, D]

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        lr: float = 3.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        seed: int = 0,
        shards: World = ALONE,
    ) -> None:
        super().__init__(size, dim, seed=seed, shards=shards)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.register_buffer("velocity", torch.zeros_like(self.rows))

    def ascend(self, objective: Callable[[Tensor], Tensor]) -> Ascent:
        """One step up the objective, a scalar function of the unit rows here, through the normalisation."""
        unit = self.unit().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(unit), unit)
        with torch.no_grad():
            stats = reference.bank_step(
                self.rows,
                self.velocity,
                gradient,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        return Ascent(*(self.shards.mean(value) for value in stats))
