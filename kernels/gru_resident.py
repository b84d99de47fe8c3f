"""All time steps of a forward pass in one launch: where that can run, and what tells that it ended badly.

A program that waits for one which has not started waits for ever, so this is launched only where all programs
run at once (`fits`), as a cooperative launch, which the driver refuses otherwise. Should a wait be too long
all the same, the program raises a flag (`timed_out`) and makes its results NaN, so that none of such a pass
is taken for one.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .common import Call

PATIENCE = 1 << 20  # polls of some 0.5 us each

_faults: dict[torch.device, Tensor] = {}


def fault(device: torch.device) -> Tensor:
    """The device's flag [1] int32, which a wait that is too long sets to 1."""
    if device not in _faults:
        _faults[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _faults[device]


def timed_out(device: torch.device) -> bool:
    """Whether a program has waited too long since the last call. Waits for the device."""
    flag = fault(device)
    late = bool(flag.item())
    flag.zero_()
    return late


def fits(call: Call) -> bool:
    """Whether all programs of a launch run on its device at once, from what the compiled kernel takes."""
    device = call.arguments["states_ptr"].device
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        try:
            compiled = call.kernel.warmup(**call.arguments, **call.options, grid=call.grid)
            compiled._init_handles()
        except triton.runtime.errors.OutOfResources:
            return False
    chip = torch.cuda.get_device_properties(device)
    return math.prod(call.grid) <= chip.multi_processor_count * programs_at_once(
        compiled.metadata.shared, compiled.n_regs, 32 * call.num_warps, chip.shared_memory_per_multiprocessor
    )


def programs_at_once(shared: int, registers: int, threads: int, shared_memory: int) -> int:
    """Programs that run on one multiprocessor at once; a program takes 1 KiB of shared memory for itself."""
    return min(shared_memory // (shared + 1024), 65536 // (registers * threads), 2048 // threads)
