"""A pair of GRUs, the two directions of a layer, as one operation: sequence [T, N, W] -> states [T, N, 2H].

One matrix product gives what both directions read of the input; then the time steps run by the kernels of
`gru_steps`. What is kept for the backward pass are the gates, in the place of the input's products, and the
states; its other products run over all frames at once. Only gradients of the weights need the input and what
the state's products receive at every frame: where the input's gradient is all that is wanted, as in the
attack, neither is kept.

The operation multiplies with copies of the parameters in the sequence's type, stacked, and one of them
transposed. They are made once and serve as long as the parameters stay as they are.
Legend: T frames · N batch · W width of the input · H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import FEATURE_DTYPES, INTERPRET, launch_all, require
from .gru_resident import available, plan_resident_forward
from .gru_steps import plan_backward, plan_forward, tile_for
from .problem import Precision

PARAMETERS = 8  # of both directions: input's weights, state's weights, input's biases, state's biases


class Operands(NamedTuple):
    """What the passes multiply with."""

    input: Tensor  # [6H, W] W_ih of both directions
    state: Tensor  # [2, 3H, H] W_hh
    bias: Tensor  # [2, 2, 3H] float32: b_ih, b_hh
    back: Tensor | None  # [2, H, 3H] W_hh transposed, for the backward pass


def make_operands(parameters: Sequence[Tensor], dtype: torch.dtype, *, backward: bool = True) -> Operands:
    """Copies of a pair's parameters in the type of its sequences; `backward`: for a backward pass as well."""
    (gates, width), hidden, device = parameters[0].shape, parameters[2].shape[1], parameters[0].device
    operands = Operands(
        torch.empty(2 * gates, width, dtype=dtype, device=device),
        torch.empty(2, gates, hidden, dtype=dtype, device=device),
        torch.empty(2, 2, gates, dtype=torch.float32, device=device),
        torch.empty(2, hidden, gates, dtype=dtype, device=device) if backward else None,
    )
    places = [*operands.input.chunk(2), *operands.state.unbind(), *operands.bias.flatten(0, 1).unbind()]
    with torch.no_grad():
        torch._foreach_copy_(places, list(parameters))
        if operands.back is not None:
            operands.back.copy_(operands.state.transpose(1, 2))
    return operands


@torch.library.custom_op("a2mc::gru_pair", mutates_args=())
def _op(
    sequence: Tensor, parameters: Sequence[Tensor], input_weight: Tensor, state_weight: Tensor, bias: Tensor,
    back: Tensor | None, reverse: bool, final: bool, keep: bool, precision: str, resident: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """States [T, N, 2H], those after the last step [N, 2H], and for the backward pass, with `keep`, gates
    [T, N, 2, 3H] and inner products [T, N, 2, H]. With `final` and not `keep` states are of two frames."""
    (steps, n, _), h = sequence.shape, state_weight.shape[-1]
    gates = torch.mm(sequence.flatten(0, 1), input_weight.T).view(1, steps, n, 2, 3 * h)
    slots = min(2, steps) if final and not keep else steps
    plan = (plan_resident_forward if resident else plan_forward)(
        gates, state_weight[None], bias[None],
        reverse=reverse, keep=keep, slots=slots, precision=precision,
    )  # fmt: skip
    launch_all(plan.calls, sequence.device)
    kept = gates[0] if keep else gates.new_empty(0)
    return plan.states[0], plan.final[0], kept, plan.inner[0] if keep else gates.new_empty(0)


@_op.register_fake
def _(
    sequence: Tensor, parameters: Sequence[Tensor], input_weight: Tensor, state_weight: Tensor, bias: Tensor,
    back: Tensor | None, reverse: bool, final: bool, keep: bool, precision: str, resident: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (steps, n, _), h = sequence.shape, state_weight.shape[-1]
    slots = min(2, steps) if final and not keep else steps
    return (
        sequence.new_empty(slots, n, 2 * h),
        sequence.new_empty(n, 2 * h),
        sequence.new_empty((steps, n, 2, 3 * h) if keep else (0,)),
        sequence.new_empty((steps, n, 2, h) if keep else (0,)),
    )


@torch.library.custom_op("a2mc::gru_pair_backward", mutates_args=())
def _backward_op(
    grad: Tensor | None, grad_final: Tensor | None, back: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, reverse: bool, with_weights: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the input's products [T, N, 2, 3H] and, `with_weights`, of the state's, and the sums of
    both over clips and frames as [B, 2, 4H] float32: r, z, n of the input, n of the state."""
    plan = plan_backward(
        None if grad is None else grad[None], None if grad_final is None else grad_final[None],
        back[None], states[None], gates[None], inner[None],
        reverse=reverse, slots=len(states) if with_weights else min(2, len(states)),
        with_bias=with_weights, precision=precision,
    )  # fmt: skip
    launch_all(plan.calls, states.device)
    return plan.input[0], plan.state[0] if with_weights else gates.new_empty(0), plan.bias[0]


@_backward_op.register_fake
def _(
    grad: Tensor | None, grad_final: Tensor | None, back: Tensor, states: Tensor, gates: Tensor,
    inner: Tensor, reverse: bool, with_weights: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (_, n, _), h = states.shape, back.shape[1]
    blocks = -(-n // tile_for("backward", n, h, gates.dtype, precision).rows) if with_weights else 0
    return (
        torch.empty_like(gates),
        torch.empty_like(gates) if with_weights else gates.new_empty(0),
        gates.new_empty(blocks, 2, 4 * h, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sequence, parameters, input_weight, _, _, back, reverse, _, _, precision, _ = inputs
    states, _, gates, inner = output
    ctx.with_weights = any(p.requires_grad for p in parameters)
    ctx.save_for_backward(sequence if ctx.with_weights else None, input_weight, back, states, gates, inner)
    ctx.reverse, ctx.precision = reverse, precision
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    sequence, input_weight, back, states, gates, inner = ctx.saved_tensors
    of_input, of_state, bias = _backward_op(
        None if grad is None else grad.contiguous(),
        None if grad_final is None else grad_final.contiguous(),
        back, states, gates, inner, ctx.reverse, ctx.with_weights, ctx.precision,
    )  # fmt: skip
    rows = of_input.flatten(2).flatten(0, 1)
    of_sequence = None
    if ctx.needs_input_grad[0]:
        of_sequence = (rows @ input_weight).view(*gates.shape[:2], -1)
    parameters: list[Tensor | None] = [None] * PARAMETERS
    if ctx.with_weights:
        parameters = [
            *(rows.T @ sequence.flatten(0, 1)).float().chunk(2),
            *(_state_weight(of_state, states, direction, ctx.reverse) for direction in range(2)),
            *_biases(bias.sum(0)),
        ]
    return of_sequence, parameters, *[None] * 9


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
    sequence: Tensor,
    parameters: Sequence[Tensor],
    operands: Operands | None = None,
    *,
    reverse: bool = False,
    final: bool = False,
    precision: Precision = "tf32",
    resident: bool = False,
) -> Tensor:
    """Both directions' states [T, N, 2H], or with `final` those after each one's last step, [N, 2H].

    sequence [T, N, W] is float32, bfloat16 or float16, as are the results. The float32 parameters, to which
    gradients flow, are W_ih [3H, W], W_hh [3H, H], b_ih [3H] and b_hh [3H], each of both directions in turn,
    gates in the order r, z, n (torch.nn.GRU). `reverse`: direction 1 walks from the last frame to the first.
    `operands` are what `make_operands` gave for this type; without them they are made here. `resident`: all
    steps of the forward pass in one launch, where the device can run it (`gru_resident`).
    """
    _check(sequence, parameters, operands)
    learns = sequence.requires_grad or any(p.requires_grad for p in parameters)
    keep = learns and torch.is_grad_enabled()
    if operands is None:
        operands = make_operands(parameters, sequence.dtype, backward=keep)
    require(
        operands.back is not None or not keep,
        "gru_pair: these operands are for passes without gradients: make them with backward=True",
    )
    states, last, *_ = _op(
        sequence.contiguous(), list(parameters), *operands,
        reverse, final, keep, precision,
        resident and available(sequence, operands.state, reverse=reverse, keep=keep, precision=precision),
    )  # fmt: skip
    return last if final else states


def _check(sequence: Tensor, parameters: Sequence[Tensor], operands: Operands | None) -> None:
    require(
        sequence.ndim == 3 and min(sequence.shape) > 0,
        f"gru_pair: expected a sequence [T, N, W], got {list(sequence.shape)}",
    )
    require(
        sequence.dtype in FEATURE_DTYPES,
        f"gru_pair: the sequence must be float32, bfloat16 or float16, got {sequence.dtype}",
        TypeError,
    )
    require(
        len(parameters) == PARAMETERS,
        f"gru_pair: expected {PARAMETERS} parameters, four of each direction, got {len(parameters)}",
    )
    width, hidden = sequence.shape[-1], parameters[2].shape[-1]
    shapes = [(3 * hidden, width)] * 2 + [(3 * hidden, hidden)] * 2 + [(3 * hidden,)] * 4
    for parameter, shape in zip(parameters, shapes, strict=True):
        require(
            parameter.shape == shape and parameter.dtype == torch.float32,
            f"gru_pair: expected a float32 parameter {list(shape)}, got {parameter.dtype} "
            f"{list(parameter.shape)}",
        )
    if operands is not None:
        require(
            operands.state.dtype == sequence.dtype,
            f"gru_pair: operands must be {sequence.dtype}, as the sequence, got {operands.state.dtype}",
            TypeError,
        )
    require(
        INTERPRET or sequence.device.type != "cpu",
        "gru_pair: the kernels need a GPU: use torch.nn.GRU on a CPU",
    )
