"""Random numbers that are a pure function of (seed, step, stream, index), the same on every device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as one operation that
torch.compile does not look into: Inductor would turn its 32-bit constants into index arithmetic, which Triton
refuses. There is no generator state to save, to synchronise or to capture: the counter is (index, stream,
step), the key is the seed. `step` may be a tensor on the device.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import a2mc_fast.kernels as kernels
from a2mc_fast.errors import first_line

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the key
_ROUNDS = 10
_MASK64, _WEYL64 = 0xFFFFFFFFFFFFFFFF, 0x9E3779B97F4A7C15

# streams of the training step; evaluation and the attack use their own
STREAM_ORDER, STREAM_VIEWS, STREAM_NOISE, STREAM_EVALUATE, STREAM_SUBSET = 0, 1, 2, 3, 5


def combine(seed: int, step: int) -> int:
    """A 63-bit seed for torch's own generators, from those of a run and a step (SplitMix64's finaliser)."""
    z = (seed * _WEYL64 + step + 1) * _WEYL64 & _MASK64
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z >> shift) * multiplier & _MASK64
    return (z ^ z >> 31) >> 1


def philox(
    seed: int, step: Tensor | int, stream: int, count: int, device: torch.device | str, first: int = 0
) -> Tensor:
    """`count` blocks of four random 32-bit words, beginning with block `first`, as int64 [4, count].

    Block i encrypts the counter (i, stream, low and high half of step) with the seed's two halves.
    """
    if not isinstance(step, Tensor):
        # filled on the device: a number brought from the host would be waited for
        step = torch.full((), step, dtype=torch.int64, device=device)
    return _philox(step, seed, stream, first, count)


@torch.library.custom_op("a2mc::philox", mutates_args=())
def _philox(step: Tensor, seed: int, stream: int, first: int, count: int) -> Tensor:
    if step.is_cuda and not kernel_refused(step.device):
        return kernels.philox.philox(step, seed, stream, first, count)
    return _plain(step, seed, stream, first, count)


@_philox.register_fake
def _(step: Tensor, seed: int, stream: int, first: int, count: int) -> Tensor:
    return step.new_empty(4, count)


def _plain(step: Tensor, seed: int, stream: int, first: int, count: int) -> Tensor:
    """The words by tensor arithmetic, on any device."""
    zero = torch.zeros(count, dtype=torch.int64, device=step.device)
    counter = (
        torch.arange(first, first + count, device=step.device),
        zero + stream,
        zero + (step & _MASK),
        zero + (step >> 32 & _MASK),
    )
    return encrypt(counter, seed)


@functools.cache
def kernel_refused(device: torch.device) -> str:
    """Why a GPU draws its words by tensor arithmetic: what the kernel's compiler said, or that its words are
    others; "" where they agree. Asked once, before anything is captured."""
    step = torch.full((), 2**40 + 7, dtype=torch.int64, device=device)
    arguments = (step, 2**61 + 5, STREAM_NOISE, 2**20 + 3, 1001)
    try:
        words = kernels.philox.philox(*arguments)
    except Exception as error:  # whatever the compiler or the driver raises means the same
        return first_line(error)
    return "" if torch.equal(words, _plain(*arguments)) else "its words are not Philox's"


def encrypt(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> Tensor:
    """Philox4x32-10 of 128-bit counters, given as four words in int64 [count], which are overwritten."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(_ROUNDS):
        # signed products wrap, and masking makes their high words unsigned again; in place, since large
        # counts are bound by memory
        c0.mul_(_MULTIPLIERS[0])
        c2.mul_(_MULTIPLIERS[1])
        high0 = (c0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(key1)
        high2 = (c2 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(key0)
        c0, c1, c2, c3 = high2, c2.bitwise_and_(_MASK), high0, c0.bitwise_and_(_MASK)
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3))


def uniform(
    seed: int, step: Tensor | int, stream: int, shape: tuple[int, ...], device: torch.device | str
) -> Tensor:
    """Uniform float32 in [0, 1), multiples of 2^-24."""
    count = math.prod(shape)
    words = philox(seed, step, stream, -(-count // 4), device)
    return ((words >> 8).float() * 2.0**-24).view(-1)[:count].view(shape)


def normal(
    seed: int,
    step: Tensor | int,
    stream: int,
    shape: tuple[int, ...],
    device: torch.device | str,
    first: int = 0,
) -> Tensor:
    """Standard normal float32 (Box-Muller). [N, ...], where row n belongs to place `first` + n: the same
    numbers whichever rows are asked for."""
    rows, width = shape[0], math.prod(shape[1:])
    blocks = -(-width // 4)
    words = philox(seed, step, stream, rows * blocks, device, first * blocks)
    draws = ((words >> 8).float() * 2.0**-24).view(2, 2, rows, blocks)
    radius = (-2 * torch.log1p(-draws[0])).sqrt_()  # 1 - u is in (0, 1], so the logarithm is finite
    angle = draws[1] * (2 * math.pi)
    pairs = torch.cat((radius * angle.cos(), radius * angle.sin()))  # [4, N, blocks]
    return pairs.transpose(0, 1).flatten(1)[:, :width].reshape(shape)


def permutation(seed: int, step: Tensor | int, stream: int, count: int, device: torch.device | str) -> Tensor:
    """A random order of 0 .. count - 1, int64 [count]."""
    words = philox(seed, step, stream, count, device)
    return torch.argsort(words[0] << 31 ^ words[1])  # 63 random bits: a tie is out of reach
