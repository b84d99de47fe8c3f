"""The Triton kernels against float64 truth: in Triton's interpreter, or on a GPU where there is one.

A kernel may err as much as plain float32 torch does on the same numbers, plus a slack for another order of
summation. Shapes straddle the tiles; memory that the kernels allocate starts as NaN, so that a lane left
unwritten shows.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from importlib import import_module
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = [pytest.mark.anywhere, pytest.mark.usefixtures("memory_starts_as_nan")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel modules are first imported

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from a2mc_fast.kernels import bank_ascent as ascent_module  # noqa: E402
from a2mc_fast.kernels import bank_pass, common, reference, verify  # noqa: E402
from a2mc_fast.kernels import mixing_contrast as contrast_module  # noqa: E402
from a2mc_fast.kernels.bank_ascent import bank_ascent  # noqa: E402
from a2mc_fast.kernels.mixing_contrast import mixing_contrast  # noqa: E402
from a2mc_fast.kernels.problem import Contrast, Contrasted, Features, Step, contrast_from  # noqa: E402
from triton.backends.nvidia.compiler import CUDAOptions  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

assert DEVICE == "cuda" or common.INTERPRET, "the kernels were imported before TRITON_INTERPRET was set"

PAPER_MIX = (0.4, 0.3, 0.2, 0.1)
MIXES = [(), (0.25,), (0.25, 0.5), (0.37, 0.11), (0.6, 0.3)]
# beyond a tile of clips, beyond a tile of bank rows, several tiles per program, and one of each
SHAPES = [(34, 40, 256), (5, 33, 100), (3, 65, 128), (5, 70, 24), (3, 300, 12), (1, 1, 3)]
# relative to the largest value; tensor cores keep 10 bits of each operand, and the logits are up to 1/τ; the
# interpreter multiplies in full float32 but for what is fp16, which has those bits too, of both operands
SLACK = {"ieee": 4e-6, "tf32": 2**-10 if DEVICE == "cpu" else 3e-2}
PAPER, CLIMB = Contrast(), Contrast(temperature=0.03)
EXACT, EXACT_CLIMB = PAPER._replace(precision="ieee"), CLIMB._replace(precision="ieee")

Loss = Callable[[Features, Tensor, Contrast], Contrasted]


zeros = partial(torch.zeros, device=DEVICE)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=1)


def problem(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Features, Tensor]:
    """Features and a bank, unit rows; a bank row equals a query, whose softmax is peaked."""
    features, bank = Features(*(unit(n, d).to(dtype) for _ in range(4))), unit(k, d)
    bank[0] = features.basic[0].float()
    return features, bank


def typed(features: Features, dtype: torch.dtype) -> Features:
    return Features(*(None if x is None else x.to(dtype) for x in features))


def with_gradients(loss: Loss, features: Features, bank: Tensor, settings: Contrast = PAPER) -> list[Tensor]:
    """The three losses and the gradients of their weighted sum with respect to basic, weak and strong, each
    times the number of clips, as of their sums."""
    key, *anchors = features
    anchors = [x.detach().requires_grad_() for x in anchors]
    losses = loss(Features(key, *anchors), bank, settings).losses
    total = (losses * torch.arange(1, 4, device=key.device)).sum()
    return [losses.detach() * len(key), *(len(key) * g for g in torch.autograd.grad(total, anchors))]


def assert_no_worse(
    got: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor], slack: float
) -> None:
    """Each result may err as much as eager's, plus the slack times the largest true value."""
    for i, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        assert torch.isfinite(g).all(), f"result {i} is not finite"
        excess = (g.double() - t).abs().max() - (e.double() - t).abs().max()
        allowed = slack * max(1.0, t.abs().max().item())
        assert excess <= allowed, f"result {i}: error exceeds eager's by {excess.item():.1e} > {allowed:.1e}"


def check_contrast(
    features: Features, bank: Tensor, settings: Contrast = EXACT, slack: float | None = None
) -> None:
    got = with_gradients(mixing_contrast, features, bank, settings)
    eager = with_gradients(reference.mixing_contrast, typed(features, torch.float32), bank, settings)
    high = typed(features, torch.float64)
    truth = with_gradients(reference.mixing_contrast, high, bank.double(), settings)
    assert_no_worse(got, eager, truth, SLACK[settings.precision] if slack is None else slack)


@pytest.mark.parametrize("precision", SLACK)
@pytest.mark.parametrize("n,k,d", SHAPES)
def test_losses_and_gradients(n: int, k: int, d: int, precision: str) -> None:
    check_contrast(*problem(n, k, d), PAPER._replace(precision=precision))


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("n,k,d,precision", [(3, 70, 24, "ieee"), (2, 33, 128, "tf32")])
def test_any_shares(n: int, k: int, d: int, precision: str, mix: tuple[float, ...]) -> None:
    check_contrast(*problem(n, k, d), Contrast(mix, precision=precision))


@pytest.mark.parametrize("temperature", [1.0, 0.03, 0.01, 0.005, 1e-3])
def test_any_temperature(temperature: float) -> None:
    """The running maximum leaves no logit to overflow, nor all of them to underflow."""
    slack = SLACK["ieee"] * max(1, 0.07 / temperature)
    check_contrast(*problem(3, 100, 16), EXACT._replace(temperature=temperature), slack)


@pytest.mark.parametrize("mix", [PAPER_MIX, (0.37, 0.11)], ids=str)
def test_rows_of_any_length(mix: tuple[float, ...]) -> None:
    features, bank = problem(5, 90, 24)
    scales = torch.logspace(-1.5, 0.7, 90, device=DEVICE).unsqueeze(1)
    features = Features(*(x * (1 + i) for i, x in enumerate(features)))
    check_contrast(features, bank * scales, EXACT._replace(mix=mix), 5e-5)


@pytest.mark.parametrize("mix", [PAPER_MIX, (0.5, 0.25)], ids=str)
@pytest.mark.parametrize("size", [0.2, 1.0, 40.0])
def test_orthogonal_and_opposite_rows(size: float, mix: tuple[float, ...]) -> None:
    """With every bank row opposite to the query, only the mixed banks and the positive have mass."""
    query = size * unit(2, 16)
    features = Features(unit(2, 16), query, query, query)
    # products of that size are rounded
    slack = 2e-5 * max(1.0, size**2)
    check_contrast(features, (-query[:1]).expand(50, -1), EXACT._replace(mix=mix, temperature=0.02), slack)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("own", [-1.0, 0.0, 0.9, 3.0])
def test_exponentials_of_evenly_spaced_shares(own: float, size: float) -> None:
    """The geometric series errs as little as one exponential per bank, wherever its terms underflow."""
    s = (size * torch.linspace(-1, 1, 4001, device=DEVICE)).double()[None]
    scale, top, a = 1 / (0.03 * math.log(2)), s.max(), torch.tensor(own * size, device=DEVICE).double()
    shares = torch.tensor([0.0, *PAPER_MIX], dtype=torch.float64, device=DEVICE)[:, None, None]
    reach = torch.maximum(top, 0.6 * top + 0.4 * a)
    exponentials = torch.exp2((shares * a + (1 - shares) * s - reach) * scale)
    truths = [exponentials.sum(0), (exponentials * (1 - shares)).sum(0)]
    for even in (True, False):
        sums = torch.full((2, 4001), math.nan, device=DEVICE)
        inputs = (s.float()[0], sums, 4001, top.item(), a.item(), (reach - top).item() * scale, scale)
        exponentials_kernel[(1,)](*inputs, PAPER_MIX, even, 4096)
        for got, truth in zip(sums, truths, strict=True):
            # offsets are rounded too, as the logits of the problem are
            error = (got.double() - truth[0]).abs().max() / truth.max()
            assert error < 4e-6 * max(1.0, abs(own) * size), f"even {even}: {error.item():.1e}"


@triton.jit
def exponentials_kernel(s_ptr, out_ptr, K, top, a, offset, scale, MIX: tl.constexpr, EVEN: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    k = tl.arange(0, BLOCK)
    s = tl.load(s_ptr + k, mask=k < K, other=0.0)
    if EVEN:
        e, w = bank_pass.even_exponentials(s, top, a, offset, scale, MIX[0], len(MIX))
    else:
        e, w = bank_pass.mixed_exponentials(s, top, a, offset, scale, MIX)
    tl.store(out_ptr + k, e, mask=k < K)
    tl.store(out_ptr + K + k, w, mask=k < K)


def test_which_shares_are_evenly_spaced() -> None:
    assert all(bank_pass.evenly_spaced(mix) for mix in (PAPER_MIX, (0.2, 0.1), (0.25, 0.5), (0.1, 0.3, 0.2)))
    uneven = ((), (0.25,), (0.37, 0.11), (0.3, 0.6), (0.4, 0.3, 0.2), (0.2, 0.2))
    assert not any(bank_pass.evenly_spaced(mix) for mix in uneven)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n,k,d", [(5, 70, 24), (2, 33, 128)])
def test_low_precision_features(n: int, k: int, d: int, dtype: torch.dtype) -> None:
    """Losses are float32; a gradient is rounded to the type of its feature, once."""
    features, bank = problem(n, k, d, dtype)
    got = with_gradients(mixing_contrast, features, bank, EXACT)
    truth = with_gradients(reference.mixing_contrast, typed(features, torch.float64), bank.double())
    assert [x.dtype for x in got] == [torch.float32] + [dtype] * 3
    assert_no_worse(got[:1], truth[:1], truth[:1], 1e-5)
    for g, t in zip(got[1:], truth[1:]):
        torch.testing.assert_close(g.double(), t, rtol=torch.finfo(dtype).eps, atol=2e-4)


def test_equal_similarities_give_the_logarithm_of_the_count() -> None:
    row = unit(1, 16)
    losses = mixing_contrast(Features(row, row), row.expand(50, -1), EXACT._replace(mix=())).losses
    assert losses.tolist() == pytest.approx([math.log(51), 0, 0], abs=1e-6)


@pytest.mark.parametrize("mix", [PAPER_MIX, ()], ids=str)
@pytest.mark.parametrize("given", [(0, 0), (1, 0), (0, 1)], ids=str)
def test_terms_that_are_off(given: tuple[int, int], mix: tuple[float, ...]) -> None:
    features, bank = problem(3, 40, 16)
    basic = features.basic.requires_grad_()
    views = (x if flag else None for x, flag in zip(features[2:], given))
    settings = EXACT._replace(mix=mix)
    got = mixing_contrast(Features(*features[:2], *views), bank, settings).losses
    whole = reference.mixing_contrast(features, bank, settings).losses
    torch.testing.assert_close(got, whole * torch.tensor([1, *given], device=DEVICE), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(got[0], basic)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole[0], basic)[0], rtol=1e-4, atol=1e-5)


def test_strong_term_as_a_contrast() -> None:
    features, bank = problem(3, 40, 16)
    got = with_gradients(mixing_contrast, features, bank, EXACT._replace(distill=False))

    def plain(features: Features, bank: Tensor, settings: Contrast) -> Contrasted:
        key, *anchors = features
        alone = [reference.mixing_contrast(Features(key, x), bank, settings).losses[0] for x in anchors]
        return Contrasted(torch.stack(alone))

    for g, want in zip(got, with_gradients(plain, features, bank)):
        torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", SLACK)
def test_raw_rows(precision: str) -> None:
    """`normalize` contrasts the unit rows; a row of zeros stays zero."""
    features, bank = problem(5, 70, 24)
    raw = bank * torch.rand(70, 1, device=DEVICE) * 5
    raw[3] = 0
    settings = Contrast(normalize=True, precision=precision)
    high = typed(features, torch.float64)
    results = (
        with_gradients(mixing_contrast, features, raw, settings),
        with_gradients(reference.mixing_contrast, features, F.normalize(raw, dim=1)),
        with_gradients(reference.mixing_contrast, high, F.normalize(raw.double(), dim=1)),
    )
    assert_no_worse(*results, max(SLACK[precision], 1e-5))


@pytest.mark.parametrize("needed", list(product((0, 1), repeat=3)), ids=str)
def test_each_subset_of_gradients(needed: tuple[int, ...]) -> None:
    (key, *anchors), bank = problem(2, 20, 16)
    anchors = [x.requires_grad_(bool(flag)) for x, flag in zip(anchors, needed)]
    leaves = [x for x in anchors if x.requires_grad]
    losses = mixing_contrast(Features(key, *anchors), bank, PAPER).losses
    assert losses.requires_grad == any(needed)
    if leaves:
        got = torch.autograd.grad(losses.sum(), leaves)
        whole = reference.mixing_contrast(Features(key, *anchors), bank, PAPER).losses
        for a, b in zip(got, torch.autograd.grad(whole.sum(), leaves)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=max(SLACK["tf32"], 1e-4))


def test_views_of_larger_tensors() -> None:
    """Transposed and offset inputs give the bits of contiguous ones."""
    features, bank = problem(5, 33, 24)
    want = with_gradients(mixing_contrast, features, bank)
    odd = Features(*(F.pad(x, (1, 2))[:, 1:-2] for x in features))
    got = with_gradients(mixing_contrast, odd, bank.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mix", [PAPER_MIX, ()], ids=str)
def test_weights_in_fp16_keep_ten_bits(mix: tuple[float, ...]) -> None:
    """Of peaked rows, and of rows whose weights are a millionth of the largest: the error of what a clip or a
    row sums up is within the last of ten bits of it."""
    features, bank = Features(*(unit(3, 32) for _ in range(4))), unit(150, 32)
    for i, feature in enumerate(features[1:]):
        bank[i] = feature[0]
        bank[3 + i] = F.normalize(feature[1] + 0.2 * bank[3 + i], dim=0)
    settings = Contrast(mix, 0.03, distill=False, normalize=True)
    high, rows = typed(features, torch.float64), bank.double().requires_grad_()
    got = with_gradients(mixing_contrast, features, bank, settings)
    truth = with_gradients(reference.mixing_contrast, high, rows.detach(), settings)
    for clips, true in zip(got[1:], truth[1:], strict=True):
        assert (clips - true).norm(dim=1).max() <= SLACK["tf32"] * true.norm(dim=1).max()
    total = reference.mixing_contrast(high, rows, settings._replace(normalize=False)).losses.sum()
    (pull,) = torch.autograd.grad(total, rows)
    assert pull.norm(dim=1).min() < 2e-6 * pull.norm(dim=1).max() or mix
    tangent = pull - rows.detach() * (pull * rows.detach()).sum(1, keepdim=True)
    still = torch.zeros_like(bank)
    velocity = stepped(bank_ascent, bank, still, features, settings, Step(weight_decay=0.0))[1]
    assert ((velocity + tangent).norm(dim=1) / pull.norm(dim=1)).max() <= SLACK["tf32"]


def test_two_runs_are_equal_to_the_bit() -> None:
    features, bank = problem(5, 300, 24)
    first, second = (with_gradients(mixing_contrast, features, bank) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_contrast_is_a_proper_operation() -> None:
    (key, *anchors), bank = problem(2, 20, 16)
    basic, weak, strong = (x.requires_grad_() for x in anchors)
    torch.library.opcheck(contrast_module._op, (key, basic, weak, strong, bank, EXACT.numbers()))
    shapes = ("test_schema", "test_faketensor")
    for second, settings in ((strong, EXACT), (None, EXACT._replace(normalize=True, climb=0.03))):
        arguments = (key, basic, None, second, bank, settings.numbers())
        torch.library.opcheck(contrast_module._op, arguments, test_utils=shapes)


def test_settings_survive_as_numbers() -> None:
    for settings in (PAPER, Contrast((), 1e-3, False, True, "ieee", 0.5), EXACT._replace(normalize=True)):
        assert contrast_from(settings.numbers()) == settings


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_contrast_compiles_without_a_graph_break(backend: str) -> None:
    features, bank = problem(3, 20, 16)

    compiled = torch.compile(mixing_contrast, fullgraph=True, backend=backend)
    for a, b in zip(*(with_gradients(form, features, bank) for form in (compiled, mixing_contrast))):
        assert torch.equal(a, b)


# bank ascent


def stepped(form: Any, rows: Tensor, velocity: Tensor, *problem: Any) -> list[Tensor]:
    """Rows and velocity after a step from copies of those given, and its summary."""
    rows, velocity = rows.clone(), velocity.clone()
    summary = form(rows, velocity, *problem)
    return [rows, velocity, torch.stack(list(summary))]


def check_ascent(
    features: Features,
    rows: Tensor,
    settings: Contrast = EXACT_CLIMB,
    step: Step = Step(),  # noqa: B008
    slack: float | None = None,
) -> None:
    velocity = torch.randn_like(rows) / 10
    got = stepped(bank_ascent, rows, velocity, features, settings, step)
    eager = stepped(reference.bank_ascent, rows, velocity, typed(features, rows.dtype), settings, step)
    high = (rows.double(), velocity.double(), typed(features, torch.float64))
    truth = stepped(reference.bank_ascent, *high, settings, step)
    assert_no_worse(got, eager, truth, SLACK[settings.precision] if slack is None else slack)


def chosen(n: int, d: int, present: str = "weak strong", dtype: torch.dtype = torch.float32) -> Features:
    """Key and basic, and of the other features those `present`."""
    key, basic, weak, strong = (unit(n, d).to(dtype) for _ in range(4))
    return Features(key, basic, weak if "weak" in present else None, strong if "strong" in present else None)


def test_plain_ascent_is_autograd_through_the_normalisation() -> None:
    """Of the losses one by one, in float64."""
    features = typed(chosen(3, 24), torch.float64)
    start = torch.randn(70, 24, device=DEVICE, dtype=torch.float64)
    rows = start.clone().requires_grad_()
    unit_rows = F.normalize(rows, dim=1)
    parts = reference.losses_per_clip(features, unit_rows, CLIMB)
    (gradient,) = torch.autograd.grad(2 * sum(part.mean() for part in parts if part is not None), rows)
    velocity = 1e-4 * start - gradient
    got = stepped(reference.bank_ascent, start, torch.zeros_like(start), features, CLIMB, Step(weight=2.0))
    torch.testing.assert_close(got[1], velocity, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[0], start - 3 * velocity, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[2][2], 1 - torch.exp(-parts[0].detach()).mean())


@pytest.mark.parametrize("precision", SLACK)
@pytest.mark.parametrize("n,k,d", SHAPES)
def test_ascent_of_the_whole_loss(n: int, k: int, d: int, precision: str) -> None:
    features, rows = chosen(n, d), torch.randn(k, d, device=DEVICE)
    rows[0] = 2 * features.basic[0]  # a peaked softmax
    check_ascent(features, rows, CLIMB._replace(precision=precision))


@pytest.mark.parametrize(
    "present,mix,distill",
    [
        ("", PAPER_MIX, True),
        ("weak", (), True),
        ("strong", (0.3,), True),
        ("weak strong", (0.37, 0.11), False),
    ],
)
def test_ascent_with_terms_off(present: str, mix: tuple[float, ...], distill: bool) -> None:
    rows = torch.randn(70, 24, device=DEVICE)
    check_ascent(chosen(3, 24, present), rows, EXACT_CLIMB._replace(mix=mix, distill=distill))


def test_weight_of_the_ascent() -> None:
    """The gradient in the velocity, which starts at zero, doubles with the weight."""
    features, rows = chosen(3, 24), torch.randn(70, 24, device=DEVICE)
    check_ascent(features, rows, step=Step(weight=2.0))
    still = torch.zeros_like(rows)
    once, twice = (
        stepped(bank_ascent, rows, still, features, CLIMB, Step(weight_decay=0.0, weight=weight))[1]
        for weight in (1.0, 2.0)
    )
    assert torch.equal(twice, 2 * once)


@pytest.mark.parametrize("temperature", [0.07, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ascent_at_any_temperature_and_type(temperature: float, dtype: torch.dtype) -> None:
    rows = 3 * torch.randn(40, 16, device=DEVICE)
    # a gradient of 1/τ, through products of float32
    settings = EXACT._replace(temperature=temperature)
    check_ascent(chosen(4, 16, dtype=dtype), rows, settings, slack=1e-6 / temperature)


@pytest.mark.parametrize("precision", SLACK)
@pytest.mark.parametrize("n,k,d,present,mix", [
    (5, 70, 16, "weak strong", PAPER_MIX), (2, 300, 24, "strong", (0.37, 0.11)), (2, 33, 16, "weak", ()),
])  # fmt: skip
def test_the_pass_of_the_loss_serves_the_ascent(
    n: int, k: int, d: int, present: str, mix: tuple[float, ...], precision: str
) -> None:
    """The sums at a second temperature give the step that its own pass would."""
    features, rows = chosen(n, d, present), 3 * torch.randn(k, d, device=DEVICE)
    rows[0] = 2 * features.basic[0]
    climb = CLIMB._replace(mix=mix, precision=precision)
    loss = climb._replace(temperature=0.07, normalize=True, climb=climb.temperature)
    found = mixing_contrast(features, rows, loss)
    apart = mixing_contrast(features, rows, loss._replace(climb=0.0))
    assert torch.equal(found.losses, apart.losses) and apart.sums is None
    problem = (rows, torch.randn_like(rows) / 10, features, climb, Step())
    for a, b in zip(stepped(bank_ascent, *problem, found.sums), stepped(bank_ascent, *problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the sums are of another loss"):
        bank_ascent(*problem[:2], Features(*features[:2]), *problem[3:], found.sums)


def test_equal_rows_stay_equal() -> None:
    features, rows = chosen(5, 16), torch.randn(1, 16, device=DEVICE).expand(100, -1).clone()
    bank_ascent(rows, torch.zeros_like(rows), features, CLIMB, Step())
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-6, atol=1e-7)


def test_two_ascents_are_equal_to_the_bit() -> None:
    features, start = chosen(5, 24), torch.randn(150, 24, device=DEVICE)
    problem = (start, torch.zeros_like(start), features, CLIMB, Step())
    for a, b in zip(*(stepped(bank_ascent, *problem) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_ascent_is_a_proper_operation() -> None:
    features, rows = chosen(2, 16), torch.randn(20, 16, device=DEVICE)
    arguments = (rows, torch.zeros_like(rows), *features, EXACT_CLIMB.numbers(), list(Step()), None)
    torch.library.opcheck(ascent_module._op, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ascent_compiles_without_a_graph_break(backend: str) -> None:
    features, start = chosen(3, 16), torch.randn(20, 16, device=DEVICE)
    problem = (start, torch.zeros_like(start), features, CLIMB, Step())
    forms = (bank_ascent, torch.compile(bank_ascent, fullgraph=True, backend=backend))
    for a, b in zip(*(stepped(form, *problem) for form in forms), strict=True):
        assert torch.equal(a, b)


# arguments


def test_the_launcher_claims_no_name_of_a_parameter() -> None:
    """Triton's launcher would take, or refuse, what it should hand on; the interpreter lets all pass."""
    files = Path(common.__file__).parent.glob("[a-z]*.py")
    modules = [import_module(f"a2mc_fast.kernels.{file.stem}") for file in files]
    found = {
        name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")
    }
    assert {"ascent_kernel", "bank_pass_kernel", "forward_kernel", "philox_kernel"} < set(found)
    claimed = {"stream", "device", "device_type"}  # refused by name
    claimed |= set(signature(JITFunction.run).parameters) | {field.name for field in fields(CUDAOptions)}
    for name, kernel in found.items():
        assert not claimed & set(kernel.arg_names), name


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"weak": zeros(3, 8)}, ValueError, "weak is [3, 8], key is [4, 8]"),
        (
            {"bank": zeros(6, 7)},
            ValueError,
            "expected key [N, D] and bank [K, D], got [4, 8] and [6, 7]",
        ),
        ({"bank": zeros(0, 8)}, ValueError, "expected key [N, D] and bank [K, D]"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"mix": (0.5, 1.0)}, ValueError, "mix must lie in (0, 1), got (0.5, 1.0)"),
        ({"precision": "fp8"}, ValueError, "precision must be tf32 or ieee, got 'fp8'"),
        ({"bank": zeros(6, 8).double()}, TypeError, "bank must be float32, got torch.float64"),
        ({"basic": zeros(4, 8).half()}, TypeError, "basic is torch.float16, key is torch.float32"),
        ({"key": zeros(4, 8).int()}, TypeError, "key must be float32, bfloat16 or float16"),
        ({"bank": zeros(6, 8, requires_grad=True)}, ValueError, "bank requires grad"),
        (
            {"bank": torch.zeros(6, 8, device="meta")},
            ValueError,
            f"key is on {zeros(1).device}, bank on meta",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_of_the_contrast(change: dict[str, Any], error: type[Exception], words: str) -> None:
    features = {name: zeros(4, 8) for name in ("key", "basic", "weak", "strong")}
    given = {**features, "bank": zeros(6, 8), **change}
    bank = given.pop("bank")
    settings = Contrast(**{name: given.pop(name) for name in tuple(given) if name in Contrast._fields})
    with pytest.raises(error) as raised:
        mixing_contrast(Features(**given), bank, settings)
    assert words in str(raised.value)


def test_too_wide_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="D must be <= 256, got 257"):
        mixing_contrast(Features(*[zeros(2, 257)] * 4), zeros(3, 257), PAPER)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"velocity": zeros(5, 8)}, "velocity must be like the rows [6, 8], got [5, 8]"),
        ({"rows": zeros(8, 6).T}, "must be contiguous"),
    ],
    ids=str,
)
def test_wrong_arguments_of_the_ascent(change: dict[str, Any], words: str) -> None:
    state = {"rows": zeros(6, 8), "velocity": zeros(6, 8), **change}
    with pytest.raises(ValueError) as raised:
        bank_ascent(**state, features=Features(*[zeros(4, 8)] * 4), settings=CLIMB, step=Step())
    assert words in str(raised.value)


# the check before a run


def mismatch() -> str:
    return verify.mismatch(torch.device(DEVICE), 16, PAPER._replace(normalize=True), CLIMB)


def test_right_kernels_are_found_right(monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter is slow, and right for any number
    monkeypatch.setattr(verify, "_CLIPS", 5)
    assert mismatch() == ""


def test_broken_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CLIPS", 3)
    with monkeypatch.context() as patch:
        strong = partial(bank_ascent, step=Step(weight=1.2))
        patch.setattr(verify, "bank_ascent", lambda *problem: strong(*problem[:4]))
        assert re.fullmatch(r"the bank's velocity is off by (19|20)\.\d% from float64", mismatch())
    with monkeypatch.context() as patch:
        patch.setattr(contrast_module, "launch_all", lambda *_: None)
        assert mismatch() == "the loss is off by nan% from float64"


@pytest.mark.parametrize("error, words", [
    (RuntimeError("out of resource\nshared memory"), "RuntimeError: out of resource"),
    (KeyError(), "KeyError"),
])  # fmt: skip
def test_kernels_that_raise_are_named(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(contrast_module, "launch_all", fail)
    assert mismatch() == words
