"""Memory banks of negatives: a first-in-first-out queue of keys, and rows that ascend the loss (A²MC Eq. 7).

Both hold raw rows [K, D], contrast their unit rows, and are written the same way while they fill; only the
gradient bank can `ascend`. All state is in buffers on the device: no step waits for the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import a2mc_fast.kernels as kernels
from a2mc_fast.errors import require
from a2mc_fast.kernels import reference
from a2mc_fast.kernels.problem import Ascent, Contrast, Features, Step


class Queue(nn.Module):
    """First in, first out: new keys replace the oldest rows. Starts with N(0, 1) rows."""

    rows: Tensor  # [K, D]
    position: Tensor  # where the next key goes, int64 scalar

    def __init__(self, size: int, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        require(size >= 1 and dim >= 1, f"a bank needs at least one row and column, got {size} x {dim}")
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", torch.randn(size, dim, generator=generator))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def unit(self) -> Tensor:
        """Unit rows M0. -> [K, D]"""
        return F.normalize(self.rows, dim=1)

    @torch.no_grad()
    def write(self, keys: Tensor) -> None:
        """Replace the next N rows, wrapping around. keys [N, D], N <= K."""
        count, size = len(keys), len(self.rows)
        require(count <= size, f"cannot write {count} keys into {size} rows")
        self._put(keys, (self.position + torch.arange(count, device=keys.device)) % size)
        self.position.add_(count).remainder_(size)

    def _put(self, keys: Tensor, places: Tensor) -> None:
        """Keys [N, D] into rows, by number [N]."""
        self.rows.index_copy_(0, places, keys.to(self.rows.dtype))


class MemoryBank(Queue):
    """Rows that climb the loss as adversarial negatives (AdCo)."""

    velocity: Tensor  # [K, D]

    def __init__(self, size: int, dim: int, step: Step | None = None, *, seed: int = 0) -> None:
        super().__init__(size, dim, seed=seed)
        self.step = step or Step()
        self.register_buffer("velocity", torch.zeros_like(self.rows))

    def _put(self, keys: Tensor, places: Tensor) -> None:
        """As a queue's; rows that are written start at rest."""
        super()._put(keys, places)
        self.velocity.index_fill_(0, places, 0.0)

    def ascend(
        self, features: Features, settings: Contrast, *, weight: float = 1.0, triton: bool = False,
        sums: Tensor | None = None,
    ) -> Ascent:  # fmt: skip
        """One step up `weight` times the batch mean of L1 + L2 + L3, through the rows' normalisation.

        With `triton` in one pass of the fused kernels over rows and velocity, else by autograd. `sums` are
        what the loss left of the same features and rows for this temperature.
        """
        form = kernels.bank_ascent if triton else reference
        step = self.step._replace(weight=weight)
        return form.bank_ascent(self.rows, self.velocity, features.detach(), settings, step, sums)
