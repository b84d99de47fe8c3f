"""What the kernel modules share: planned launches, limits, and checks of arguments.

From Hopper on a launch starts `early`: its programs take their places while the launch before them ends, and
wait there for what it writes. Each lets the next launch start once its own wait is over, so at any time one
launch runs and one waits.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Contrast, Features, check_arguments, require

INTERPRET: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before the first import."""

MODEL_CHIP = 90
"""The chip that plans on the meta device are for: sm_90, of an H200."""

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
        early = {"launch_pdl": True} if self.arguments.get("EARLY") else {}
        return options | early | ({"launch_cooperative_grid": True} if self.cooperative else {})

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


def before_hopper(device: torch.device) -> bool:
    """Whether a GPU, or the one that plans on the meta device are for, is older than Hopper."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) < (9, 0)
    return device.type == "meta" and MODEL_CHIP < 90


def starts_early(device: torch.device) -> bool:
    """Whether launches can start early on a device."""
    return device.type != "cpu" and not before_hopper(device)


@triton.jit
def wait_for_the_last(EARLY: tl.constexpr):
    """Wait until the launch before this one has ended. What it writes is to be read, and all is to be
    written, after this."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def resident_programs(device: torch.device) -> int:
    """Programs of four warps that fill the device, two on each multiprocessor."""
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    # the interpreter wants few programs, yet several splits
    return 12 if device.type == "cpu" else 264


def width(dim: int) -> int:
    """Power of two that holds a row of `dim` columns; a matrix product needs 16 at least."""
    return max(16, triton.next_power_of_2(dim))


def feature_width(dim: int) -> int:
    """That of a feature: 32 at least, because in tf32 an H100 and an H200 gave NaN at 16 (Triton 3.6)."""
    return max(32, width(dim))


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
