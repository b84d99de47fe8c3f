"""A BiGRU's layers by the fused kernels, of one encoder or several in the same launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

import a2mc_fast.kernels as kernels

if TYPE_CHECKING:
    from a2mc_fast.encoders.bigru import BiGRU


def fused(encoders: Sequence[BiGRU], sequences: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The layers of encoders of one shape by the fused kernels, in the same launches, each over its sequence
    [N, T, W] -> [encoders, N, feature_dim]. Gradients reach the first."""
    first = encoders[0]
    states = torch.stack([sequence.transpose(0, 1).to(dtype) for sequence in sequences])
    for layer in range(len(first.directions)):
        pairs = [encoder._pairs()[layer] for encoder in encoders]
        parameters = [
            weight
            for pair in pairs
            for both in zip(*(gru.parameters() for gru in pair), strict=True)
            for weight in both
        ]
        states = kernels.gru.gru_pairs(
            states,
            parameters,
            _operands(encoders, layer, parameters, dtype),
            reverse=first.time_mode == "bidirectional",
            final=layer + 1 == len(first.directions) and first.pool == "last",
            precision="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
            form=cast(kernels.gru_plan.Form, first.recurrence),
        )
    return states if first.pool == "last" else first.pooled(states)


def _operands(
    encoders: Sequence[BiGRU], layer: int, parameters: list[Tensor], dtype: torch.dtype
) -> kernels.gru.Operands | None:
    """A layer's weights in `dtype`, made once within `weights_held`, and None outside of it."""
    holds = [encoder.held for encoder in encoders]
    if holds[0] is None:
        return None
    backward, place = torch.is_grad_enabled(), (layer, dtype, len(encoders))
    made: kernels.gru.Operands | None = holds[0].get(place)
    if made is None or (backward and made.back is None):
        made = kernels.gru.make_operands(parameters, dtype, backward=backward)
        # the passes of one encoder alone find theirs among those of all
        for number, held in reversed([*enumerate(holds)]):
            if held is not None:
                held[layer, dtype, 1] = made.group(number)
        holds[0][place] = made
    return made
