"""The fused pair of GRUs against torch.nn.GRU in float64: in Triton's interpreter, or on a GPU.

Shapes straddle the tiles; memory that the kernels allocate starts as NaN, so that an unwritten lane shows.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel modules are first imported

pytest.importorskip("triton")

from a2mc_fast.kernels import common, gru, gru_plan, reference, verify  # noqa: E402
from a2mc_fast.kernels.gru import gru_pair, gru_pairs, make_operands  # noqa: E402

assert DEVICE == "cuda" or common.INTERPRET, "the kernels were imported before TRITON_INTERPRET was set"
pytestmark = [pytest.mark.anywhere, pytest.mark.usefixtures("memory_starts_as_nan")]

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
# one of each, beyond a tile of units, beyond a tile of clips and not a multiple of a tile's depth: N, T, W, H
# and whether direction 1 goes backwards
SHAPES = [
    (1, 1, 3, 16, False), (5, 2, 20, 48, True), (5, 4, 2, 16, False), (5, 4, 2, 16, True),
    (70, 2, 10, 100, False),
]  # fmt: skip
# relative to the norm of a result: operands and what is kept are rounded to the type
ERROR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program, and next to none for each number."""
    if DEVICE == "cpu":
        tile = gru_plan.Tile(64, 64, 64, 4, 1)
        monkeypatch.setattr(gru_plan, "_TILES", dict.fromkeys(gru_plan._TILES, tile))
        monkeypatch.setattr(gru_plan, "_FULL", tile)


def directions(width: int, hidden: int) -> list[nn.GRU]:
    return [nn.GRU(width, hidden).to(DEVICE) for _ in range(2)]


def parameters(pair: list[nn.GRU]) -> list[Tensor]:
    """In the order of the operation: each kind of both directions."""
    return [getattr(one, name) for name in NAMES for one in pair]


def torch_pair(pair: list[nn.GRU], x: Tensor, reverse: bool, final: bool) -> Tensor:
    """The same by torch.nn.GRU, direction 1 over reversed time if `reverse`."""
    ahead, other = pair[0](x)[0], pair[1](x.flip(0) if reverse else x)[0]
    if final:
        return torch.cat((ahead[-1], other[-1]), 1)
    return torch.cat((ahead, other.flip(0) if reverse else other), 2)


def check(
    n: int, t: int, w: int, h: int, dtype: torch.dtype = torch.float32, *, reverse: bool = False,
    final: bool = False, wanted: str = "all", error: float | None = None,
    form: gru_plan.Form = "fused",
) -> None:  # fmt: skip
    """Result and gradients against float64; `wanted` are all, the input's alone or the parameters' alone."""
    pair = directions(w, h)
    x = torch.randn(t, n, w, device=DEVICE).to(dtype)
    weights = parameters(pair)
    for p in weights:
        p.requires_grad_(wanted != "input")
    x.requires_grad_(wanted != "parameters")
    leaves = [leaf for leaf in [x, *weights] if leaf.requires_grad]
    got = gru_pair(x, weights, reverse=reverse, final=final, precision="ieee", form=form)
    direction = torch.randn(got.shape, device=DEVICE).to(dtype)
    gradients = torch.autograd.grad(got, leaves, direction)
    exact = x.detach().double().requires_grad_(x.requires_grad)
    for one in pair:
        one.double()
    doubles = [leaf for leaf in [exact, *parameters(pair)] if leaf.requires_grad]
    truth = torch_pair(pair, exact, reverse, final)
    truths = torch.autograd.grad(truth, doubles, direction.double())
    allowed = ERROR[dtype] if error is None else error
    for i, (a, b) in enumerate(zip([got, *gradients], [truth, *truths], strict=True)):
        assert a.shape == b.shape and a.dtype == (dtype if i == 0 or leaves[i - 1] is x else torch.float32)
        off = ((a.double() - b).norm() / b.norm().clamp_min(1e-9)).item()
        assert off <= allowed, f"result {i} is off by {off:.1e} > {allowed:.0e}"


@pytest.mark.parametrize("n,t,w,h,reverse", SHAPES)
def test_states_and_gradients(n: int, t: int, w: int, h: int, reverse: bool) -> None:
    check(n, t, w, h, reverse=reverse)


@pytest.mark.parametrize("n,t,w,h,reverse", [*SHAPES, (5, 7, 2, 16, True), (3, 1, 3, 128, True)])
@pytest.mark.parametrize("final, wanted", [(False, "all"), (True, "input"), (True, "parameters")])
def test_narrow_layers_in_one_launch(
    n: int, t: int, w: int, h: int, reverse: bool, final: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way is one launch, of the kernels that carry all units."""
    launched: list[str] = []
    launch_all = gru.launch_all

    def counted(calls: list[common.Call], device: torch.device) -> None:
        launched.extend(call.kernel.__name__ for call in calls)
        launch_all(calls, device)

    monkeypatch.setattr(gru, "launch_all", counted)
    check(n, t, w, h, reverse=reverse, final=final, wanted=wanted, form="resident")
    assert launched == ["small_forward_kernel", "small_backward_kernel"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_layers_in_low_precision(dtype: torch.dtype) -> None:
    check(18, 3, 20, 48, dtype, reverse=True, form="resident")


def test_many_steps_of_many_clips() -> None:
    check(70, 3, 10, 100, torch.bfloat16, reverse=True)


@pytest.mark.parametrize("dtype, final", [(torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_low_precision(dtype: torch.dtype, final: bool) -> None:
    check(5, 3, 20, 48, dtype, final=final, reverse=final)


@pytest.mark.parametrize("n, t, wanted, reverse", [
    (3, 3, "all", False), (3, 3, "all", True), (3, 3, "input", True), (3, 3, "parameters", True),
    (1, 1, "all", True), (1, 1, "input", False), (2, 2, "input", True), (2, 2, "parameters", False),
])  # fmt: skip
def test_the_final_states_alone(n: int, t: int, wanted: str, reverse: bool) -> None:
    check(n, t, 5, 16, final=True, wanted=wanted, reverse=reverse)


@pytest.mark.parametrize("wanted", ["input", "parameters"])
def test_each_side_of_the_gradients(wanted: str) -> None:
    check(5, 3, 4, 20, wanted=wanted, reverse=True)


def test_some_parameters_alone() -> None:
    """Which parameters learn changes nothing for those that do."""
    pair, x = directions(3, 16), torch.randn(2, 4, 3, device=DEVICE)
    weights = parameters(pair)
    together = torch.autograd.grad(gru_pair(x, weights).square().sum(), weights)
    for i, p in enumerate(weights):
        p.requires_grad_(i in (3, 4))
    some = torch.autograd.grad(gru_pair(x, weights).square().sum(), [weights[3], weights[4]])
    assert torch.equal(some[0], together[3]) and torch.equal(some[1], together[4])


@pytest.mark.parametrize("final, reverse", [(False, True), (True, False)])
def test_without_gradients_nothing_is_kept(final: bool, reverse: bool) -> None:
    pair, x = directions(8, 16), torch.randn(3, 2, 8, device=DEVICE)
    weights = parameters(pair)
    with torch.no_grad():
        alone = gru_pair(x, weights, reverse=reverse, final=final)
    assert not alone.requires_grad
    assert torch.equal(alone, gru_pair(x, weights, reverse=reverse, final=final))
    operands = make_operands(weights, x.dtype, backward=True)
    states, last, gates, inner = gru._op(x[None], weights, *operands, reverse, final, False, "ieee", "fused")
    assert gates.numel() == inner.numel() == 0
    assert states.shape == (1, 2 if final else 3, 2, 32) and last.shape == (1, 2, 32)


def test_the_input_alone_keeps_neither_the_input_nor_its_own_gates() -> None:
    """What the attack holds on to: states, gates and operands, and one copy of each."""
    x = torch.randn(4, 3, 8, device=DEVICE, requires_grad=True)
    weights = parameters(directions(8, 16))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for learn in (False, True):
        for p in weights:
            p.requires_grad_(learn)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gru_pair(x, weights)
        assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept) is learn
    of_input, of_state, bias = gru._backward_op(
        torch.zeros(1, 4, 3, 32, device=DEVICE), None, *kept[-4:], False, False, "ieee", "fused"
    )
    assert of_input.shape == (1, 4, 3, 2, 48) and of_state.numel() == bias.numel() == 0


def test_groups_are_independent() -> None:
    """Two pairs in one launch give what each gives alone."""
    t, n, h = 2, 5, 20
    products = torch.randn(2, t, n, 2, 3 * h, device=DEVICE)
    weight, bias = torch.randn(2, 2, 3 * h, h, device=DEVICE), torch.randn(2, 2, 2, 3 * h, device=DEVICE)
    back, grad = weight.transpose(2, 3).contiguous(), torch.randn(2, t, n, 2 * h, device=DEVICE)

    def run(of: slice) -> list[Tensor]:
        gates = products[of].clone()
        ahead = gru_plan.plan_forward(
            gates, weight[of], bias[of], reverse=True, followed=len(gates), slots=t, precision="ieee"
        )
        common.launch_all(ahead.calls, gates.device)
        behind = gru_plan.plan_backward(
            grad[of], None, back[of], ahead.states, gates, ahead.inner,
            reverse=True, slots=t, with_bias=True, precision="ieee",
        )  # fmt: skip
        common.launch_all(behind.calls, gates.device)
        return [ahead.states, ahead.final, ahead.inner, gates, behind.input, behind.state, behind.bias]

    together = run(slice(0, 2))
    for one in range(2):
        for both, alone in zip(together, run(slice(one, one + 1)), strict=True):
            assert torch.equal(both[one], alone[0])


def test_gradients_reach_the_first_of_two_groups_alone() -> None:
    """Which gives what it gives alone, to the bit, as does the one that rides along."""
    first, other = parameters(directions(5, 16)), [p.detach() for p in parameters(directions(5, 16))]
    both = torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True)
    for final in (False, True):
        states = gru_pairs(both, [*first, *other], final=final)
        of_input, *of_weights = torch.autograd.grad(states[0].square().sum(), [both, *first])
        with torch.no_grad():
            assert torch.equal(states[1], gru_pair(both[1], other, final=final))
        assert not of_input[1].any()
        alone = gru_pair(both[0], first, final=final)
        truth = torch.autograd.grad(alone.square().sum(), [both, *first])
        for got, want in zip((states[0], of_input, *of_weights), (alone, *truth), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="the first group alone may require gradients"):
        gru_pairs(both, [*first, *(p.clone().requires_grad_() for p in other)])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_inputs_saturate() -> None:
    """Gates of ±1000 are 0 and 1, not NaN."""
    weights = parameters(directions(4, 16))
    x = (1e4 * torch.randn(3, 5, 4, device=DEVICE)).requires_grad_()
    states = gru_pair(x, weights)
    (gradient,) = torch.autograd.grad(states.sum(), x)
    assert states.isfinite().all() and states.abs().max() <= 1 and gradient.isfinite().all()


def test_the_reference_is_torch() -> None:
    pair, x = directions(5, 6), torch.randn(4, 3, 5, device=DEVICE).double()
    for one in pair:
        one.double()
    for reverse in (False, True):
        got = reference.gru_pair(x, parameters(pair), reverse=reverse)
        torch.testing.assert_close(got, torch_pair(pair, x, reverse, False))


def test_a_sequence_in_any_layout_and_two_backward_passes() -> None:
    weights = parameters(directions(5, 16))
    x = torch.randn(3, 4, 5, device=DEVICE)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    states = gru_pair(strided, weights)
    assert torch.equal(states, gru_pair(x, weights))
    first = torch.autograd.grad(states.sum(), [strided, *weights], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(states.sum(), [strided, *weights]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width, dtype, filled", [
    (150, torch.bfloat16, 152), (45, torch.float16, 48), (150, torch.float32, 152),
    (152, torch.bfloat16, 152),
])  # fmt: skip
def test_rows_of_the_input_fill_16_bytes(
    width: int, dtype: torch.dtype, filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all products of an input are given, forward and backward."""
    weights = parameters(directions(width, 16))
    operands = make_operands(weights, dtype)
    assert operands.input.shape == (1, 96, filled) and not operands.input[..., width:].any()
    seen: list[Tensor] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.append(a), mm(a, b, out=out))[1])
    x = torch.randn(2, 3, width, device=DEVICE, dtype=dtype, requires_grad=True)
    gradient = torch.autograd.grad(gru_pair(x, weights, operands).sum(), x)[0]
    assert [a.shape for a in seen] == [(6, filled)] and gradient.shape == x.shape


@pytest.mark.parametrize(
    "final, reverse, keep", [(False, False, True), (True, True, True), (True, False, False)]
)
def test_opcheck(final: bool, reverse: bool, keep: bool) -> None:
    x = torch.randn(1, 3, 2, 8, device=DEVICE, requires_grad=keep)
    weights = [p.requires_grad_(keep) for p in parameters(directions(8, 16))]
    operands = make_operands(weights, x.dtype, backward=True)
    arguments = (x, weights, *operands, reverse, final, keep, "ieee", "fused")
    shapes = ("test_schema", "test_faketensor")
    of_autograd = ("test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(gru._op, arguments, test_utils=shapes if final else shapes + of_autograd)
    if keep:
        with torch.no_grad():
            states, last, gates, inner = gru._op(*arguments)
        for grads in ((torch.ones_like(states), None), (None, torch.ones_like(last))):
            arguments = (*grads, operands.back, states, gates, inner, reverse, final, "ieee", "fused")
            torch.library.opcheck(gru._backward_op, arguments, test_utils=shapes)


@pytest.mark.parametrize("backend, final", [("eager", False), ("aot_eager", True)])
def test_it_compiles_without_a_graph_break(backend: str, final: bool) -> None:
    weights = parameters(directions(5, 16))
    x = torch.randn(3, 2, 5, device=DEVICE, requires_grad=True)

    def run(x: Tensor, weights: list[Tensor]) -> Tensor:
        return gru_pair(x, weights, final=final).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    results = [torch.autograd.grad(form(x, weights), [x, *weights]) for form in (run, compiled)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"sequence": torch.zeros(2, 3)}, ValueError, "expected sequences [G, T, N, W], got [1, 2, 3]"),
        ({"sequence": torch.zeros(2, 0, 4)}, ValueError, "sequences [G, T, N, W], got [1, 2, 0, 4]"),
        ({"sequence": torch.zeros(2, 3, 4).double()}, TypeError, "must be float32, bfloat16 or float16"),
        ({"sequence": torch.zeros(2, 3, 5)}, ValueError, "a float32 parameter [48, 5], got torch.float32"),
        ({"parameters": []}, ValueError, "8 parameters of each group, four of each direction, got 0 for 1"),
        ({"dtype": torch.bfloat16}, TypeError, "operands must be torch.float32, as the sequences, got"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    weights = parameters(directions(4, 16))
    operands = make_operands(weights, change.pop("dtype", torch.float32), backward=True)
    arguments: dict[str, Any] = {"sequence": torch.zeros(2, 3, 4), "parameters": weights} | change
    with pytest.raises(error, match=re.escape(words)):
        gru_pair(
            **{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()},
            operands=operands,
        )


def test_operands_without_a_backward_pass_are_refused_one() -> None:
    weights, x = parameters(directions(4, 16)), torch.zeros(2, 3, 4, device=DEVICE)
    operands = make_operands(weights, x.dtype, backward=False)
    with pytest.raises(ValueError, match="these operands are for passes without gradients"):
        gru_pair(x, weights, operands)
    with torch.no_grad():
        gru_pair(x, weights, operands)


def mismatch(**options: Any) -> str:
    return verify.recurrence_mismatch(torch.device(DEVICE), 16, (3, 5), torch.float32, **options)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_kernels_are_right_on_this_device(reverse: bool) -> None:
    assert mismatch(reverse=reverse) == ""


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    state_weight = gru._state_weight
    monkeypatch.setattr(gru, "_state_weight", lambda *args: 1.1 * state_weight(*args))
    assert mismatch() == "the gradient of a GRU's W_hh is off by 10.0% from float64"

    def refuse(*_: Any) -> None:
        raise RuntimeError("no such instruction\nin a long report")

    monkeypatch.setattr(gru, "launch_all", refuse)
    assert mismatch() == "RuntimeError: no such instruction"


def test_a_cpu_is_sent_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gru, "INTERPRET", False)
    weights = [p.cpu() for p in parameters(directions(4, 16))]
    with pytest.raises(ValueError, match=r"the kernels need a GPU: use torch\.nn\.GRU on a CPU"):
        gru_pair(torch.zeros(2, 3, 4), weights)
