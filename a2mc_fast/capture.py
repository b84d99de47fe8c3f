"""A step without the host in its way: run a few times as usual, then captured as a CUDA graph and replayed.

The captured function takes no arguments and reads what changes from step to step (step number, learning
rate, batch order) from tensors that its owner writes before each call. It must not wait for the device, and
must allocate nothing that outlives it but what it returns: those tensors are written anew by every replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EAGER_RUNS = (
    3  # while libraries choose algorithms, torch.compile compiles and the optimizer allocates its state
)


class Captured:
    """A function of static tensors; on a GPU its fourth call captures it, and from then on it is replayed.

    All calls run on `stream`: autograd remembers on which stream a parameter's gradient was first summed, and
    a capture must not depend on another one.
    """

    def __init__(self, function: Callable[[], dict[str, Tensor]], stream: torch.cuda.Stream | None) -> None:
        """`stream` None: every call runs as usual, on the current stream."""
        self.function, self.stream = function, stream
        self.graph: torch.cuda.CUDAGraph | None = None
        self._runs, self._results = 0, {}  # type: tuple[int, dict[str, Tensor]]

    def __call__(self) -> dict[str, Tensor]:
        if self.stream is None:
            return self.function()
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            if self._runs < _EAGER_RUNS:
                self._runs += 1
                self._results = self.function()
            else:
                if self.graph is None:
                    self.graph = torch.cuda.CUDAGraph()
                    # capturing records the work and does none of it; other threads, as that which watches
                    # over NCCL, may go on asking the device
                    with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                        self._results = self.function()
                self.graph.replay()
        current.wait_stream(self.stream)
        return self._results
