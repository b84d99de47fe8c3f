"""Philox4x32-10 words of consecutive counters: one kernel, so that no compiler takes the arithmetic apart.

The counter of block i is (first + i, stream, low and high half of the step), the key is the seed. The words
are those of Salmon et al. (SC 2011), as int64, word after word: [4, count]. The plain form is that of `rng`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Call, launch_all

_BLOCK = 512


@triton.jit
def philox_kernel(
    step_ptr,  # int64 scalar
    words_ptr,  # int64 [4, count]
    seed,
    stream_number,  # Triton's launcher refuses an argument named `stream`
    first,
    count,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step = tl.load(step_ptr)
    zero = tl.zeros((BLOCK,), tl.int64)
    c0, c1, c2, c3 = tl.philox(
        seed,
        (first + i).to(tl.uint32),
        (zero + stream_number).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + (step >> 32)).to(tl.uint32),
    )
    inside = i < count
    tl.store(words_ptr + i, c0.to(tl.int64), mask=inside)
    tl.store(words_ptr + count + i, c1.to(tl.int64), mask=inside)
    tl.store(words_ptr + 2 * count + i, c2.to(tl.int64), mask=inside)
    tl.store(words_ptr + 3 * count + i, c3.to(tl.int64), mask=inside)


def plan(step: Tensor, seed: int, stream: int, first: int, count: int) -> tuple[Call, Tensor]:
    """The launch, and the words that it will write. step: int64 scalar on the device."""
    words = torch.empty(4, count, dtype=torch.int64, device=step.device)
    arguments = {
        "step_ptr": step,
        "words_ptr": words,
        "seed": seed,
        "stream_number": stream,
        "first": first,
        "count": count,
        "BLOCK": _BLOCK,
    }
    return Call(philox_kernel, (triton.cdiv(count, _BLOCK),), arguments), words


def philox(step: Tensor, seed: int, stream: int, first: int, count: int) -> Tensor:
    """`count` blocks of four words from block `first` on, int64 [4, count]. step: int64 scalar on a GPU."""
    call, words = plan(step, seed, stream, first, count)
    launch_all([call], step.device)
    return words
