"""How the ranks of a run meet, part, and say once what went wrong."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

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
from a2mc_fast.ranks import World

_MAIN_FIRST = 0.5  # seconds that the others leave rank 0 to say what has gone wrong for all
_LINGER = 3.0  # seconds before a rank that has lost another one ends: the launcher shall see who went first


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
