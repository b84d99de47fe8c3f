"""Several processes, one per GPU, that train as one (torchrun, torch.distributed): `World` is all they say to
each other.

A step's batch is the joint batch of N clips, of which each of W ranks takes N / W, one rank after another;
all random choices are those of the joint batch. Gradients are averaged and features gathered, so that every
rank ends a step with the same weights and bank, which are those of one process. Alone, every method gives
back what it gets. On GPUs all of it goes through NCCL, without waiting for the device, and can be captured
in a CUDA graph; on CPUs through gloo.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from a2mc_fast.errors import require
from a2mc_fast.kernels.problem import Features


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

    def gather_features(self, features: dict[str, Features], depth: Mapping[str, int]) -> dict[str, Features]:
        """By bank, the features of the joint batch, in one message and without a gradient.

        A bank's are `depth` batches one after another, P of n clips each: [P n, D] -> [P W n, D].
        """
        if self.alone:
            return features
        given = [(f, depth[bank]) for bank, views in features.items() for f in views if f is not None]
        ranks = self.gather(torch.cat([f for f, _ in given]).unsqueeze(0))  # [W, all rows, D]
        parts = ranks.split([len(f) for f, _ in given], 1)
        # batch by batch, and each in the joint batch's order
        joint = iter(
            part.unflatten(1, (batches, -1)).transpose(0, 1).flatten(0, 2)
            for part, (_, batches) in zip(parts, given, strict=True)
        )
        return {
            bank: Features(*(None if f is None else next(joint) for f in views))
            for bank, views in features.items()
        }

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

    def start_alike(self, told: object, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's content into tensors. `InputError` if the ranks were told different things."""
        number = int.from_bytes(hashlib.blake2b(repr(told).encode(), digest_size=7).digest(), "big")
        self.require_equal(
            torch.tensor([number]),
            "{ranks} got other flags or other data than rank 0: start all with the same command and files",
        )
        self.broadcast_(tensors)

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
