"""Size and arithmetic of an encoder: its parameters, and the multiply-accumulates of one clip."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from a2mc_fast.encoders.bigru import BiGRU


def parameters_and_macs(
    encoder: nn.Module, frames: int = 64, joints: int = 25, persons: int = 2
) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one clip; only convolutions and matrix products count.

    `encoder` may have its head behind it. Nothing is computed: the clip and the weights have no storage.
    """
    # in training mode, because inference mode may hide products inside fused kernels
    shadow = copy.deepcopy(encoder).to("meta").train().requires_grad_(False)
    for module in shadow.modules():
        if isinstance(module, BiGRU):
            module.recurrence = "torch"  # the counter does not see into operations of our own
    clip = torch.empty(1, frames, 3, joints, persons, device="meta")
    with FlopCounterMode(display=False) as counter:
        shadow(clip)
    return sum(p.numel() for p in encoder.parameters()), counter.get_total_flops() // 2
