"""The loss against its literal float64 form, closed forms, and the numbers of an independent computation."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from a2mc_fast.kernels import reference
from a2mc_fast.kernels.problem import Contrast, Features
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from a2mc_fast.losses import PAPER_MIX, mixing_contrast, spread
from bench.baselines import literal_mixing_contrast, whole_logits_mixing_contrast

SHAPES = [(4, 6, 8), (7, 129, 24), (33, 200, 100), (1, 1, 3), (5, 9001, 16)]  # odd everywhere; beyond a block
MIXES = [PAPER_MIX, (), (0.25,), (0.37, 0.11)]


def wave(rows: int, dim: int, phase: float) -> Tensor:
    """Deterministic rows, not normalised."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)
    return torch.sin(1.3 * i + 0.7 * j + phase) + 0.2 * torch.cos(0.31 * i * j + phase)


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=1).to(dtype)


def problem(n: int, k: int, d: int) -> tuple[list[Tensor], Tensor]:
    """(key, basic, weak, strong), bank: unit rows, with a bank row equal to a query so that it is peaked."""
    features, bank = [unit(n, d) for _ in range(4)], unit(k, d)
    bank[0] = features[1][0]
    return features, bank


def test_golden() -> None:
    f0, f1, f2, f3 = (F.normalize(wave(4, 8, s), dim=1) for s in (0, 0.3, 0.8, 0.1))
    losses = mixing_contrast(f0, f3, f1, f2, F.normalize(2.5 * wave(6, 8, 2.0), dim=1))
    expected = (8.584528, 1.381204, 6.186785, 1.016539)
    assert [round(value.item(), 6) for value in losses] == list(expected)


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("n,k,d", SHAPES)
def test_values_and_gradients_equal_the_literal_form(n: int, k: int, d: int, mix: tuple[float, ...]) -> None:
    (key, *features), bank = problem(n, k, d)
    inputs = [x.requires_grad_() for x in (*features, bank)]
    basic, weak, strong, rows = inputs
    truth = literal_mixing_contrast(key, basic, weak, strong, rows, mix, 0.07)
    expected = torch.autograd.grad(sum(truth), inputs)
    got = mixing_contrast(key, basic, weak, strong, rows, mix=mix)
    parts = torch.stack([got.basic, got.weak, got.strong])
    torch.testing.assert_close(parts, torch.stack(truth), rtol=1e-10, atol=1e-10)
    for name, a, b in zip(
        ("basic", "weak", "strong", "bank"), torch.autograd.grad(got.total, inputs), expected
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("needed", [s for s in product((0, 1), repeat=4) if any(s)], ids=str)
def test_each_subset_of_gradients(needed: tuple[int, ...]) -> None:
    (key, *features), bank = problem(5, 33, 12)
    inputs = [x.clone().requires_grad_(bool(flag)) for x, flag in zip((*features, bank), needed)]
    leaves = [x for x in inputs if x.requires_grad]
    basic, weak, strong, rows = inputs
    expected = torch.autograd.grad(
        sum(literal_mixing_contrast(key, basic, weak, strong, rows, PAPER_MIX, 0.07)), leaves
    )
    got = torch.autograd.grad(mixing_contrast(key, basic, weak, strong, rows).total, leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_float32_errs_no_more_than_eager() -> None:
    """The single pass may err as much as plain float32 torch on all logits, plus rounding."""
    features, bank = problem(9, 4097, 64)
    truth = literal_mixing_contrast(*features, bank, PAPER_MIX, 0.07)
    low = [x.float() for x in features]
    eager = whole_logits_mixing_contrast(*low, bank.float(), PAPER_MIX, 0.07)
    losses = mixing_contrast(*low, bank.float())
    got = losses.basic, losses.weak, losses.strong
    for t, e, g in zip(truth, eager, got):
        excess = (g.double() - t).abs() - (e.double() - t).abs()
        assert excess.item() <= 2e-6 * t.item(), f"error exceeds eager's by {excess.item():.1e}"


def test_gradcheck() -> None:
    """Of the contrasts: a finite difference would move the target of distillation as well."""
    (key, basic, weak, strong), bank = problem(3, 7, 5)
    leaves = [x.requires_grad_() for x in (basic, weak, strong, bank)]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        *anchors, bank = leaves
        features = Features(key, *anchors)
        settings = Contrast((0.3, 0.1), 0.2, distill=False)
        return reference.mixing_contrast(features, bank, settings).losses.unbind()

    assert torch.autograd.gradcheck(function, leaves)


def test_equal_similarities_give_the_logarithm_of_the_count() -> None:
    """All rows equal: every logit of InfoNCE is the same, so the loss is ln(1 + K)."""
    row = unit(1, 16)
    features = Features(row.expand(3, -1), row.expand(3, -1))
    loss = reference.mixing_contrast(features, row.expand(50, -1), Contrast(mix=())).losses[0].item()
    assert loss == pytest.approx(math.log(51), rel=1e-12)


def test_loss_at_the_start_and_its_floor() -> None:
    """Orthogonal negatives and own mixing at K = 16,384: 15.69 with similarity 0 of the positive, 1.63 with
    1."""
    query = F.normalize(torch.eye(2, 8, dtype=torch.float64), dim=1)
    other = torch.eye(8, dtype=torch.float64)[[6, 7]]
    bank = torch.eye(8, dtype=torch.float64)[5].expand(16384, -1)
    start = mixing_contrast(other, query, None, None, bank).basic.item()
    floor = mixing_contrast(query, query, None, None, bank).basic.item()
    assert (round(start, 2), round(floor, 2)) == (15.69, 1.63)


def test_huge_logits_stay_finite() -> None:
    (key, *features), bank = problem(4, 50, 8)
    inputs = [x.float().requires_grad_() for x in (*features, bank)]
    losses = mixing_contrast(key.float(), *inputs, temperature=1e-3)
    gradients = torch.autograd.grad(losses.total, inputs)
    assert all(torch.isfinite(x).all() for x in (*losses, *gradients))


def test_without_views_their_terms_are_zero() -> None:
    (key, basic, weak, strong), bank = problem(4, 9, 8)
    assert mixing_contrast(key, basic, None, None, bank).weak.item() == 0
    one_hot = Contrast(distill=False)
    got = reference.mixing_contrast(Features(key, basic, weak, strong), bank, one_hot).losses[2]
    expected = reference.mixing_contrast(Features(key, strong), bank, one_hot).losses[0]
    torch.testing.assert_close(got, expected)


def test_nothing_of_the_size_of_all_logits_is_stored() -> None:
    """The largest tensor of a forward and backward pass is [N, K], not [N, 5K]."""
    n, k, d = 64, 16384, 16
    features, bank = [unit(n, d, dtype=torch.float32) for _ in range(4)], unit(k, d, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (*features[1:], bank)]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        mixing_contrast(features[0], *inputs).total.backward()
    assert largest == n * k


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weak": torch.zeros(3, 8)}, "weak is [3, 8], key is [4, 8]"),
        ({"bank": torch.zeros(6, 7)}, "expected key [N, D] and bank [K, D], got [4, 8] and [6, 7]"),
        ({"bank": torch.zeros(0, 8)}, "expected key [N, D] and bank [K, D]"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"mix": (0.5, 1.0)}, "mix must lie in (0, 1)"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, object], words: str) -> None:
    arguments = {name: torch.zeros(4, 8) for name in ("key", "basic", "weak", "strong")}
    with pytest.raises(ValueError) as error:
        mixing_contrast(**{**arguments, "bank": torch.zeros(6, 8), **change})  # type: ignore[arg-type]
    assert words in str(error.value)


def test_integer_features_are_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"key must be floating point, got torch\.int64"):
        mixing_contrast(torch.zeros(4, 8, dtype=torch.int64), *[torch.zeros(4, 8)] * 3, torch.zeros(6, 8))


def test_spread_tells_collapsed_features_from_others() -> None:
    one = F.normalize(torch.randn(1, 16), dim=1).expand(8, 16)
    line = F.normalize(one + torch.linspace(-0.5, 0.5, 8).unsqueeze(1) * torch.randn(1, 16), dim=1)
    apart = torch.eye(16)[:8]
    got = [{name: float(value) for name, value in spread(f).items()} for f in (one, line, apart)]
    assert [v["feature_similarity"] for v in got] == pytest.approx([1, float(_similarity(line)), 0], abs=1e-5)
    assert got[1]["feature_rank"] < 2 and got[2]["feature_rank"] == pytest.approx(7, abs=1e-3)


def _similarity(rows: Tensor) -> Tensor:
    """Mean over all ordered pairs."""
    return torch.stack([a @ b for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]).mean()
