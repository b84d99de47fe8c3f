"""Several processes, one per GPU, that train as one (torchrun, torch.distributed): `World` is all they say to
each other.

A step's batch is the joint batch of N clips, of which each of W ranks takes N / W, one rank after another;
all random choices are those of the joint batch. Gradients are averaged and features gathered, so that every
rank ends a step with the same weights and bank, which are those of one process. Alone, every method gives
back what it gets. On GPUs all of it goes through NCCL, without waiting for the device, and can be captured
in a CUDA graph; on CPUs through gloo.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from a2mc_fast.config import Config
from a2mc_fast.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    InputError,
    launched,
    one_speaks,
    rank,
    require,
    tell,
)

_MAIN_FIRST = 0.5  # seconds that the others leave rank 0 to say what has gone wrong for all
_LINGER = 3.0  # seconds before a rank that has lost another one ends: the launcher shall see who went first


@dataclass(frozen=True)
class World:
    """The ranks of a run, as seen by one of them; without arguments, a process on its own."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this rank's tensors live."""
    alone: bool = True
    """Nobody to talk to."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's share of `count` things in order; `count` is a multiple of the ranks."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    # in the step: tensors on the device, shapes alike on all ranks

    def gather(self, x: Tensor) -> Tensor:
        """Those of all ranks, one rank after another. No gradient. x [n, ...] -> [W n, ...]"""
        if self.alone:
            return x
        gathered: Tensor = stacked(x.detach(), self.size)
        return gathered.flatten(0, 1)

    def gather_stacks(self, stacks: Sequence[Tensor], depths: Sequence[int]) -> list[Tensor]:
        """Of features of P batches one after another, those of the joint batches, in one message.

        stacks [P n, D], each with its P -> [P W n, D]. No gradient.
        """
        ranks = self.gather(torch.cat(list(stacks)).unsqueeze(0))  # [W, all rows, D]
        parts = ranks.split([len(stack) for stack in stacks], 1)
        # batch by batch, and each in the joint batch's order
        return [
            part.unflatten(1, (depth, -1)).transpose(0, 1).flatten(0, 2)
            for part, depth in zip(parts, depths, strict=True)
        ]

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over ranks into float32 tensors, in one message."""
        if self.alone:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(self.size).split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

    # between steps

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank. All ranks must ask."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers. All ranks must ask."""
        return int(self.gather(torch.tensor([number], device=self.device)).max())

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x), where each rank computes some of its rows. x [n, ...] -> [n, ...]"""
        if self.alone:
            return function(x)
        share = -(-len(x) // self.size)
        # all ranks compute as many: the last row again where rows run out
        place = torch.arange(share * self.size, device=x.device).clamp_max(len(x) - 1)
        return self.gather(function(x[place[self.part(len(place))]]))[: len(x)]

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's content into tensors."""
        for tensor in tensors if not self.alone else ():
            content = tensor.detach().to(self.device).contiguous()
            dist.broadcast(content, 0)
            tensor.detach().copy_(content)

    def share(self, value: Any) -> Any:
        """What rank 0 gives, as JSON keeps it; what the others give is not read."""
        if self.alone:
            return value
        text = torch.frombuffer(
            bytearray(json.dumps(value if self.main else None).encode()), dtype=torch.uint8
        )
        length = torch.tensor([len(text)], device=self.device)
        self.broadcast_([length])
        content = text if self.main else torch.empty(int(length), dtype=torch.uint8)
        self.broadcast_([content])
        return json.loads(content.numpy().tobytes())

    def require_equal(self, values: Tensor, message: str) -> None:
        """`InputError` if a rank's int64 values [n] differ from rank 0's: {ranks} in the message names it."""
        if self.alone:
            return
        everyone = self.gather(values.to(self.device).unsqueeze(0))
        other = (everyone != everyone[0]).any(1).nonzero().flatten().tolist()
        ranks = "rank " * (len(other) == 1) + "ranks " * (len(other) > 1) + ", ".join(map(str, other))
        require(not other, message.format(ranks=ranks))


ALONE = World()


@torch.library.custom_op("a2mc::stacked", mutates_args=())
def stacked(x: Tensor, ranks: int) -> Tensor:
    """The x of all ranks. [...] -> [W, ...]. An operation of its own, which torch.compile leaves alone."""
    result = x.new_empty(ranks, *x.shape)
    dist.all_gather(list(result.unbind()), x.contiguous())
    return result


@stacked.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(ranks, *x.shape)


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Two numbers per tensor that tell contents apart, bits and order. -> int64 [2 n]"""
    sums = []
    for tensor in tensors:
        content = tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1).contiguous()
        if content.is_floating_point():
            content = content.view(torch.int32 if content.element_size() == 4 else torch.int16)
        for line in (content.sum(1, dtype=torch.int64), content.sum(0, dtype=torch.int64)):
            # places weigh differently
            sums.append((line * torch.arange(1, len(line) + 1, device=line.device)).sum())
    return torch.stack(sums)


# joining and leaving


@contextmanager
def join(config: Config, device: Callable[[], torch.device]) -> Iterator[World]:
    """The ranks that torchrun started, or a process on its own, for as long as the context lasts.

    `device()` says where to train, once this rank's GPU is the current one. A failure is said once, by the
    rank that it began on, with its number; ranks that fail because another one did end in silence.
    `InputError` for a setup that cannot work.
    """
    size = launched("WORLD_SIZE", 1)
    with one_speaks():
        _take_gpu(config)
        here = device()
        if size == 1:
            yield World(device=here)
            return
        store = _meet(size, here, config.run.timeout)
    world = World(rank(), size, here, alone=False)
    try:
        yield world
    except BaseException as error:
        _say_once(error, world, dist.PrefixStore("faults", store), config.run.timeout)
        raise
    # a captured step holds on to the group
    gc.collect()
    dist.destroy_process_group()


def _take_gpu(config: Config) -> None:
    """Make the GPU of this rank's number on its machine the current one."""
    if config.run.device == "cpu" or not torch.cuda.is_available() or "LOCAL_RANK" not in os.environ:
        return
    here, gpus = launched("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    require(
        here <= gpus,
        f"{here} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}: use at most torchrun --nproc-per-node "
        f"{gpus}, or --run.device cpu",
    )
    torch.cuda.set_device(launched("LOCAL_RANK", 0))


def _meet(size: int, device: torch.device, timeout: float) -> dist.Store:
    """Form the group of all ranks. Returns the store through which they can also leave word."""
    limit = timedelta(seconds=timeout)
    gpu = device.type == "cuda"
    try:
        store = next(dist.rendezvous("env://", rank(), size, timeout=limit))[0]
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank(),
            world_size=size,
            timeout=limit,
            device_id=torch.device("cuda", torch.cuda.current_device()) if gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{size} ranks could not meet within {timeout:g} s ({_first_line(error)}): start all of them by "
            "torchrun, with the same --nnodes and --rdzv-endpoint, or raise --run.timeout"
        ) from None
    return store


def _say_once(error: BaseException, world: World, store: dist.Store, timeout: float) -> None:
    """Let one rank alone raise what went wrong, with its number; the others leave."""
    if isinstance(error, SystemExit):
        return
    if isinstance(error, KeyboardInterrupt):  # all ranks stop at the same step
        if world.main:
            return
        raise SystemExit(EXIT_INTERRUPTED) from None
    lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    if not world.main or lost:
        time.sleep(_MAIN_FIRST)
    first = True
    with suppress(RuntimeError):  # the store may have died with rank 0
        first = store.add("said", 1) == 1
        # where it lives in rank 0's process, the others shall still find it
        for _ in range(10 if world.main else 0):
            if store.add("said", 0) == world.size:
                break
            time.sleep(_MAIN_FIRST / 5)
    if not first:
        raise SystemExit(EXIT_BAD_INPUT if isinstance(error, InputError) else 1) from None
    if lost:
        tell(
            f"error: rank {world.rank} has lost another rank, which died or did not answer for {timeout:g} s "
            f"({_first_line(error)}): the run continues from its last checkpoint with --resume"
        )
        time.sleep(_LINGER)
        raise SystemExit(1) from None
    if isinstance(error, InputError) and not world.main:
        raise InputError(f"rank {world.rank}: {error}") from None
    error.add_note(f"on rank {world.rank} of {world.size}")


def _first_line(error: BaseException) -> str:
    """An error of torch.distributed in short."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split("] ", 1)[-1].split(". This is")[0].strip()
