"""Pairs of GRUs, each the two directions of a layer, as one operation: sequences [G, T, N, W] -> states.

One matrix product for each group gives what both directions read of its input; then the time steps of all
groups run by the kernels of `gru_steps`. What is kept for the backward pass are the gates, in the place of
the input's products, and the states; its other products run over all frames at once. Only gradients of the
weights need the input and what the state's products receive at every frame: where the input's gradient is all
that is wanted, as in the attack, neither is kept.

The operation multiplies with copies of the parameters in the sequences' type, stacked, and one of them
transposed. They are made once and serve as long as the parameters stay as they are. Input and its weights get
columns of zeros up to whole 16 bytes, without which matrix products take a slower way: 150 coordinates do not
fill them.
Legend: G groups, each a pair with weights of its own, of which gradients reach the first · T frames · N batch
· W width of the input, W' with those columns · H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import FEATURE_DTYPES, INTERPRET, launch_all, require
from .gru_plan import Form, Forward, plan_backward, plan_forward
from .gru_resident import fits
from .gru_small import most_units, plan_small_backward, plan_small_forward
from .problem import Precision

PARAMETERS = 8  # of both directions: input's weights, state's weights, input's biases, state's biases


class Operands(NamedTuple):
    """What the passes multiply with."""

    input: Tensor  # [G, 6H, W'] W_ih of both directions
    state: Tensor  # [G, 2, 3H, H] W_hh
    bias: Tensor  # [G, 2, 2, 3H] float32: b_ih, b_hh
    back: Tensor | None  # [1, 2, H, 3H] W_hh transposed, of the first group, for the backward pass

    def group(self, number: int) -> Operands:
        """Those of one group, which lie where they lay."""
        one = slice(number, number + 1)
        return Operands(self.input[one], self.state[one], self.bias[one], None if number else self.back)


def make_operands(parameters: Sequence[Tensor], dtype: torch.dtype, *, backward: bool = True) -> Operands:
    """Copies of the parameters of one pair after another in the type of their sequences; `backward`: for a
    backward pass as well."""
    (gates, width), hidden, device = parameters[0].shape, parameters[2].shape[1], parameters[0].device
    groups = len(parameters) // PARAMETERS
    operands = Operands(
        torch.empty(groups, 2 * gates, _filled(width, dtype), dtype=dtype, device=device),
        torch.empty(groups, 2, gates, hidden, dtype=dtype, device=device),
        torch.empty(groups, 2, 2, gates, dtype=torch.float32, device=device),
        torch.empty(1, 2, hidden, gates, dtype=dtype, device=device) if backward else None,
    )
    places = [
        place
        for each, state, bias in zip(operands.input, operands.state, operands.bias, strict=True)
        for place in (*each[:, :width].chunk(2), *state.unbind(), *bias.flatten(0, 1).unbind())
    ]
    with torch.no_grad():
        operands.input[..., width:].zero_()
        torch._foreach_copy_(places, list(parameters))
        if operands.back is not None:
            operands.back.copy_(operands.state[:1].transpose(2, 3))
    return operands


def _filled(width: int, dtype: torch.dtype) -> int:
    """W' of W."""
    columns = 16 // dtype.itemsize
    return -(-width // columns) * columns


def _narrow(weight: Tensor, precision: str) -> bool:
    """Whether a program can carry all hidden units. weight [..., 3H, H] or [..., H, 3H]"""
    return min(weight.shape[-2:]) <= most_units(weight.dtype, precision)


_stays: dict[tuple[Any, ...], bool] = {}


def _planned(gates: Tensor, weight: Tensor, bias: Tensor, *, form: Form, **how: Any) -> Forward:
    """Of the form resident one launch for all steps, or one for each group's, where the device can run it;
    else one per step."""
    if form == "resident" and _narrow(weight, how["precision"]):
        return plan_small_forward(gates, weight, bias, **how)
    ways = [how, {**how, "apart": True}] if len(gates) > 1 else [how]
    for way in ways if form == "resident" and gates.shape[1] > 1 else []:
        known = (gates.shape, gates.dtype, gates.device, *sorted(way.items()))
        if _stays.get(known, True):
            found = plan_forward(gates, weight, bias, form=form, **way)
            if known not in _stays:
                _stays[known] = fits(found.calls[0])
            if _stays[known]:
                return found
    return plan_forward(gates, weight, bias, **how)


@torch.library.custom_op("a2mc::gru_pairs", mutates_args=())
def _op(
    sequences: Tensor, parameters: Sequence[Tensor], input_weight: Tensor, state_weight: Tensor, bias: Tensor,
    back: Tensor | None, reverse: bool, final: bool, keep: bool, precision: str, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """States [G, T, N, 2H], those after the last step [G, N, 2H], and with `keep`, for the first group's
    backward pass, gates [1, T, N, 2, 3H] and inner products [1, T, N, 2, H]. With `final` and not `keep`
    states are of two frames."""
    (groups, steps, n, _), h = sequences.shape, state_weight.shape[-1]
    gates = sequences.new_empty(groups, steps, n, 2, 3 * h)
    for sequence, weight, out in zip(sequences, input_weight, gates, strict=True):
        torch.mm(sequence.flatten(0, 1), weight.T, out=out.view(steps * n, 6 * h))
    plan = _planned(
        gates, state_weight, bias, form=cast(Form, form), reverse=reverse,
        followed=int(keep), slots=min(2, steps) if final and not keep else steps, precision=precision,
    )  # fmt: skip
    launch_all(plan.calls, sequences.device)
    return plan.states, plan.final, gates[:1] if keep else gates.new_empty(0), plan.inner


@_op.register_fake
def _(
    sequences: Tensor, parameters: Sequence[Tensor], input_weight: Tensor, state_weight: Tensor, bias: Tensor,
    back: Tensor | None, reverse: bool, final: bool, keep: bool, precision: str, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (groups, steps, n, _), h = sequences.shape, state_weight.shape[-1]
    slots = min(2, steps) if final and not keep else steps
    return (
        sequences.new_empty(groups, slots, n, 2 * h),
        sequences.new_empty(groups, n, 2 * h),
        sequences.new_empty((1, steps, n, 2, 3 * h) if keep else (0,)),
        sequences.new_empty(int(keep), steps, n, 2, h),
    )


@torch.library.custom_op("a2mc::gru_pairs_backward", mutates_args=())
def _backward_op(
    grad: Tensor | None, grad_final: Tensor | None, back: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, reverse: bool, with_weights: bool, precision: str, form: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the first group: gradients of the input's products [1, T, N, 2, 3H] and, `with_weights`, of the
    state's, and the sums of both over clips and frames as [1, 2, 4H] float32: r, z, n of the input, n of the
    state."""
    steps, states = states.shape[1], states[:1]
    grad, grad_final = (None if x is None else x[:1] for x in (grad, grad_final))
    given = grad, grad_final, back, states, gates, inner
    if form == "resident" and _narrow(back, precision):
        plan = plan_small_backward(*given, reverse=reverse, with_weights=with_weights, precision=precision)
    else:
        plan = plan_backward(
            *given, reverse=reverse, slots=steps if with_weights else min(2, steps), with_bias=with_weights,
            precision=precision,
        )  # fmt: skip
    launch_all(plan.calls, states.device)
    if with_weights:
        return plan.input, plan.state, plan.bias.sum(1)
    return plan.input, gates.new_empty(0), gates.new_empty(0, dtype=torch.float32)


@_backward_op.register_fake
def _(
    grad: Tensor | None, grad_final: Tensor | None, back: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, reverse: bool, with_weights: bool, precision: str, form: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sums = gates.new_empty((1, 2, 4 * back.shape[2]) if with_weights else (0,), dtype=torch.float32)
    return torch.empty_like(gates), torch.empty_like(gates) if with_weights else gates.new_empty(0), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sequences, parameters, input_weight, _, _, back, reverse, _, _, precision, form = inputs
    states, _, gates, inner = output
    ctx.with_weights = any(p.requires_grad for p in parameters)
    ctx.save_for_backward(sequences if ctx.with_weights else None, input_weight, back, states, gates, inner)
    ctx.groups, ctx.width = len(sequences), parameters[0].shape[1]
    ctx.reverse, ctx.precision, ctx.form = reverse, precision, form
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    sequences, input_weight, back, states, gates, inner = ctx.saved_tensors
    of_input, of_state, bias = _backward_op(
        None if grad is None else grad.contiguous(),
        None if grad_final is None else grad_final.contiguous(),
        back, states, gates, inner, ctx.reverse, ctx.with_weights, ctx.precision, ctx.form,
    )  # fmt: skip
    rows, others = of_input[0].flatten(2).flatten(0, 1), ctx.groups - 1
    of_sequences = None
    if ctx.needs_input_grad[0]:
        of_sequences = (rows @ input_weight[0]).view(*gates.shape[:3], -1)
        of_sequences = F.pad(of_sequences, (0, 0) * 3 + (0, others)) if others else of_sequences
    parameters: list[Tensor | None] = [None] * PARAMETERS
    if ctx.with_weights:
        parameters = [
            *(rows.T @ sequences[0].flatten(0, 1))[:, : ctx.width].float().chunk(2),
            *(_state_weight(of_state[0], states[0], direction, ctx.reverse) for direction in range(2)),
            *_biases(bias[0]),
        ]
    return of_sequences, parameters + [None] * (PARAMETERS * others), *[None] * 9


def _state_weight(of_state: Tensor, states: Tensor, direction: int, reverse: bool) -> Tensor:
    """Gradient of one direction's W_hh, float32: of each frame with the state before it, which is zero at the
    first. of_state [T, N, 2, 3H], states [T, N, 2H] -> [3H, H]"""
    h = states.shape[-1] // 2
    if reverse and direction == 1:
        gates, before = of_state[:-1], states[1:]
    else:
        gates, before = of_state[1:], states[:-1]
    gates = gates[:, :, direction].flatten(0, 1)
    return (gates.T @ before[..., direction * h : direction * h + h].flatten(0, 1)).float()


def _biases(sums: Tensor) -> list[Tensor]:
    """Gradients of the four biases from the sums [2, 4H]: b_ih of both directions, then b_hh."""
    h = sums.shape[1] // 4
    of_state = torch.cat((sums[:, : 2 * h], sums[:, 3 * h :]), 1)
    return [*sums[:, : 3 * h].unbind(), *of_state.unbind()]


_op.register_autograd(_backward, setup_context=_setup_context)


def gru_pair(
    sequence: Tensor, parameters: Sequence[Tensor], operands: Operands | None = None, **how: Any
) -> Tensor:
    """`gru_pairs` of one: sequence [T, N, W] -> states [T, N, 2H], or with `final` [N, 2H]."""
    return gru_pairs(sequence.unsqueeze(0), parameters, operands, **how).squeeze(0)


def gru_pairs(
    sequences: Tensor,
    parameters: Sequence[Tensor],
    operands: Operands | None = None,
    *,
    reverse: bool = False,
    final: bool = False,
    precision: Precision = "tf32",
    form: Form = "fused",
) -> Tensor:
    """Both directions' states [G, T, N, 2H], or with `final` those after each one's last step, [G, N, 2H].

    Sequences [G, T, N, W] are float32, bfloat16 or float16, as are the results. A group's float32 parameters
    are W_ih [3H, W], W_hh [3H, H], b_ih [3H] and b_hh [3H], each of both directions in turn, gates in the
    order r, z, n (torch.nn.GRU). Gradients flow to the first group alone: the sequences of the others, whose
    parameters must not require any, are constants. `reverse`: direction 1 walks from the last frame to the
    first. `operands` are what `make_operands` gave for this type; without them they are made here.
    `form`: how the steps are launched (`gru_plan.Form`); resident where the device can run it.
    """
    _check(sequences, parameters, operands)
    learns = sequences.requires_grad or any(p.requires_grad for p in parameters)
    keep = learns and torch.is_grad_enabled()
    if operands is None:
        operands = make_operands(parameters, sequences.dtype, backward=keep)
    require(
        operands.back is not None or not keep,
        "gru_pairs: these operands are for passes without gradients: make them with backward=True",
    )
    missing = operands.input.shape[-1] - sequences.shape[-1]
    sequences = F.pad(sequences, (0, missing)) if missing else sequences.contiguous()
    states, last, *_ = _op(sequences, list(parameters), *operands, reverse, final, keep, precision, form)
    return last if final else states


def _check(sequences: Tensor, parameters: Sequence[Tensor], operands: Operands | None) -> None:
    require(
        sequences.ndim == 4 and min(sequences.shape) > 0,
        f"gru_pairs: expected sequences [G, T, N, W], got {list(sequences.shape)}",
    )
    require(
        sequences.dtype in FEATURE_DTYPES,
        f"gru_pairs: sequences must be float32, bfloat16 or float16, got {sequences.dtype}",
        TypeError,
    )
    groups, width = len(sequences), sequences.shape[-1]
    require(
        len(parameters) == PARAMETERS * groups,
        f"gru_pairs: expected {PARAMETERS} parameters of each group, four of each direction, got "
        f"{len(parameters)} for {groups}",
    )
    require(
        not any(p.requires_grad for p in parameters[PARAMETERS:]),
        "gru_pairs: the parameters of the first group alone may require gradients",
    )
    hidden = parameters[2].shape[-1]
    shapes = [(3 * hidden, width)] * 2 + [(3 * hidden, hidden)] * 2 + [(3 * hidden,)] * 4
    for parameter, shape in zip(parameters, shapes * groups, strict=True):
        require(
            parameter.shape == shape and parameter.dtype == torch.float32,
            f"gru_pairs: expected a float32 parameter {list(shape)}, got {parameter.dtype} "
            f"{list(parameter.shape)}",
        )
    if operands is not None:
        require(
            operands.state.dtype == sequences.dtype,
            f"gru_pairs: operands must be {sequences.dtype}, as the sequences, got {operands.state.dtype}",
            TypeError,
        )
    require(
        INTERPRET or sequences.device.type != "cpu",
        "gru_pairs: the kernels need a GPU: use torch.nn.GRU on a CPU",
    )
