"""What the kernel modules share: planned launches, limits, and checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .problem import Contrast, Features, check_arguments, require

INTERPRET: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before the first import."""

MAX_DIM = 256
MOST_SHARES = 60  # so many exponentials, times 2^10 as `bank_pass` keeps them, add up to what fp16 holds
FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """One kernel launch. Planned apart from being launched, so that tests can compile just what will run."""

    kernel: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name: tensors, numbers and constants
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = (
        None  # registers per thread; without it the assembler may spill to fit more programs
    )
    cooperative: bool = False  # whether the programs wait for one another

    @property
    def options(self) -> dict[str, int | None]:
        """What the compiler is told beside the arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
        return options | ({"launch_cooperative_grid": True} if self.cooperative else {})

    def launch(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def launch_all(calls: Sequence[Call], device: torch.device) -> None:
    """Launch in order on `device`, whichever device is current."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            for call in calls:
                call.launch()
    else:
        for call in calls:
            call.launch()


def resident_programs(device: torch.device) -> int:
    """Programs of four warps that fill the device, two on each multiprocessor."""
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    # the interpreter wants few programs, yet several splits; plans for the meta device stand for an H200
    return 12 if device.type == "cpu" else 264


def width(dim: int) -> int:
    """Power of two that holds a row of `dim` columns; a matrix product needs 16 at least."""
    return max(16, triton.next_power_of_2(dim))


def check_problem(name: str, features: Features, bank: Tensor, settings: Contrast) -> None:
    """`check_arguments`, and what the kernels know of types, devices and sizes."""
    check_arguments(name, features, bank, settings)
    like = features.key
    require(
        INTERPRET or bank.device.type != "cpu",
        f"{name}: the kernels need tensors on a GPU, or TRITON_INTERPRET=1: use the backend torch",
    )
    require(bank.shape[1] <= MAX_DIM, f"{name}: D must be <= {MAX_DIM}, got {bank.shape[1]}")
    require(bank.dtype == torch.float32, f"{name}: bank must be float32, got {bank.dtype}", TypeError)
    require(
        like.dtype in FEATURE_DTYPES,
        f"{name}: key must be float32, bfloat16 or float16, got {like.dtype}",
        TypeError,
    )
    for other, feature in features._asdict().items():
        if feature is None:
            continue
        require(
            feature.dtype == like.dtype,
            f"{name}: {other} is {feature.dtype}, key is {like.dtype}",
            TypeError,
        )
        require(
            feature.device == bank.device,
            f"{name}: {other} is on {feature.device}, bank on {bank.device}",
        )
    shares = len(settings.mix)
    require(shares <= MOST_SHARES, f"{name}: mix may have {MOST_SHARES} shares, got {shares}")
    known = settings.precision in ("tf32", "ieee")
    require(known, f"{name}: precision must be tf32 or ieee, got {settings.precision!r}")
