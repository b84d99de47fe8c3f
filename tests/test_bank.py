"""The memory bank: AdCo's closed form, independently computed numbers, invariants, and the queue's
wrap-around."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from a2mc_fast.kernels import reference
from a2mc_fast.kernels.problem import Contrast, Features, Step
from torch import Tensor

from a2mc_fast.bank import MemoryBank, Queue
from a2mc_fast.losses import mixing_contrast
from tests.test_losses import unit, wave


def bank_of(rows: Tensor, lr: float = 3.0) -> MemoryBank:
    bank = MemoryBank(*rows.shape, Step(lr)).to(rows.dtype)
    bank.rows.copy_(rows)
    return bank


def test_golden_step() -> None:
    """One step up the mean InfoNCE of f1 and f3 at 0.03; rows and columns are exchanged in the source's W."""
    f0, f1, _, f3 = (F.normalize(wave(4, 8, s), dim=1) for s in (0, 0.3, 0.8, 0.1))
    bank = bank_of(2.5 * F.normalize(wave(6, 8, 2.0), dim=1))
    bank.ascend(Features(f0, f3, f1), Contrast((), 0.03), weight=0.5)
    got = (bank.rows[0, 0], bank.rows[4, 3], bank.velocity.norm())
    assert [round(value.item(), 6) for value in got] == [1.075340, 0.335893, 0.167827]


def test_infonce_gradient_is_the_published_closed_form() -> None:
    """g_k = -(1 / tau |W_k|) [mean_n p_nk q_n - M_k mean_n p_nk s_nk], and v <- 0.9 v + g + 1e-4 W, W <- W -
    3 v."""
    q, k, rows, tau = unit(5, 8), unit(5, 8), 3 * torch.randn(11, 8, dtype=torch.float64), 0.03
    bank = bank_of(rows)
    bank.velocity.normal_()
    before = bank.velocity.clone()
    bank.ascend(Features(k, q), Contrast((), tau))
    unit_rows = F.normalize(rows, dim=1)
    s = q @ unit_rows.T
    p = torch.cat(((q * k).sum(1, keepdim=True), s), 1).div(tau).softmax(1)[:, 1:]
    pull = (p.T @ q - unit_rows * (p * s).sum(0).unsqueeze(1)) / len(q)
    g = -pull / (tau * rows.norm(dim=1, keepdim=True))
    velocity = 0.9 * before + g + 1e-4 * rows
    torch.testing.assert_close(bank.velocity, velocity, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bank.rows, rows - 3 * velocity, rtol=1e-9, atol=1e-12)
    assert (g * rows).sum(1).abs().max() < 1e-10  # tangential


def test_ascent_raises_the_loss() -> None:
    features = Features(*(unit(16, 32) for _ in range(4)))
    bank = bank_of(torch.randn(64, 32, dtype=torch.float64), lr=0.1)

    def objective() -> float:
        return mixing_contrast(*features, bank.unit(), temperature=0.03).total.item()

    before = objective()
    ascent = bank.ascend(features, Contrast(temperature=0.03))
    assert objective() > before
    assert ascent.movement > 0


def test_step_equals_autograd_through_the_normalisation() -> None:
    rows = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, 6, dtype=torch.float64)
    value = (F.normalize(rows, dim=1) * weights).sum()
    (gradient,) = torch.autograd.grad(value, rows)
    moved, velocity = rows.detach().clone(), torch.zeros(9, 6, dtype=torch.float64)
    reference.bank_step(moved, velocity, weights, Step(lr=1.0, weight_decay=0.0))
    torch.testing.assert_close(moved, rows.detach() + gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [15, 16, 17])
@pytest.mark.parametrize("batch", [1, 4, 5, 15])
def test_queue_holds_the_newest_keys(size: int, batch: int) -> None:
    queue = Queue(size, 3)
    keys = torch.arange(1.0, 12 * batch + 1)[:, None].expand(-1, 3)
    for part in keys.split(batch):
        queue.write(part)
    newest = keys[:, 0].sort(descending=True).values[:size]
    assert set(newest.tolist()) <= set(queue.rows[:, 0].tolist())
    assert queue.position.item() == 12 * batch % size


def test_written_rows_start_at_rest() -> None:
    bank = bank_of(torch.randn(5, 4))
    bank.velocity.normal_()
    before = bank.velocity.clone()
    bank.write(torch.ones(3, 4))
    bank.write(2 * torch.ones(3, 4))
    assert bank.rows[:, 0].tolist() == [2, 1, 1, 2, 2]
    assert not bank.velocity.any() and before.all()
    bank.velocity.copy_(before)
    bank.write(torch.ones(2, 4))
    assert torch.equal(bank.velocity.eq(0).all(1), torch.tensor([False, True, True, False, False]))


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot write 5 keys into 4 rows"):
        Queue(4, 3).write(torch.zeros(5, 3))


def test_unit_rows_are_unit() -> None:
    queue = Queue(50, 8, seed=3)
    torch.testing.assert_close(queue.unit().norm(dim=1), torch.ones(50))
    assert torch.equal(queue.rows, Queue(50, 8, seed=3).rows)
    assert not torch.equal(queue.rows, Queue(50, 8, seed=4).rows)
