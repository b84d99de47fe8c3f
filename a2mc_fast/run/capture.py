"""A step without the host in its way: its parts compiled, then the whole captured as a CUDA graph.

No compiler can end a run: a part that torch.compile, Triton or the capture refuses runs as it is written from
then on, and says so, unless the user asked for it strictly. Nothing here knows what a step does.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from a2mc_fast.errors import InputError, first_line

# which float32 products may be rounded is the run's choice
warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32 matrix multiplication available")

Say = Callable[[str], None]

_EAGER_RUNS = (
    3  # while libraries choose algorithms, torch.compile compiles and the optimizer allocates its state
)


class Part:
    """A function of tensors behind torch.compile, forward and backward.

    Before it is called with arguments of a new form, it is tried on them: a backward pass compiles only when
    it runs, in the middle of a step, where nobody could tell whose it was. A trial leaves no trace: gradients
    go nowhere, buffers and random states are put back.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        compile: bool,
        strict: bool,
        say: Say,
        module: nn.Module | None = None,
    ) -> None:
        """`strict` turns a refusal into an `InputError`; `module` has the weights that `function` learns."""
        self.name, self.function, self.strict, self.say = name, function, strict, say
        self.resting = False
        """Whether calls run as written for now, as odd batch sizes do that are not worth compiling for."""
        self.reason = ""
        """Why it runs as written although it should not."""
        self._module = module or nn.Module()
        self._compiled: Callable[..., Any] | None = None
        if compile:
            self._compiled = torch.compile(function, dynamic=False)
        self._tried: set[tuple[object, ...]] = set()

    @property
    def ran(self) -> str:
        """How it runs, for the record."""
        if self._compiled is not None:
            return "compiled"
        return f"as written: {self.reason}" if self.reason else "as written"

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None or self.resting:
            return self.function(*args)
        try:
            form = self._form(args)
            if form not in self._tried:
                self._try(args)
                self._tried.add(form)
            return self._compiled(*args)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # compilers raise whatever they like
            self._give_up(error)
        return self.function(*args)

    def _form(self, args: tuple[Any, ...]) -> tuple[object, ...]:
        """What decides that torch.compile compiles anew: layouts, and which gradients are wanted."""
        weights = [p.requires_grad for p in self._module.parameters()]
        modes = [m.training for m in self._module.modules()]
        shapes = [
            (x.shape, x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else x
            for x in _leaves(args)
        ]
        device_types = ("cuda", "cpu")
        lower = [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in device_types]
        return (*shapes, *weights, *modes, *lower, torch.is_grad_enabled())

    def _try(self, args: tuple[Any, ...]) -> None:
        """Compile both passes by running them."""
        assert self._compiled is not None
        tensors = [x for x in _leaves(args) if isinstance(x, Tensor)]
        devices = {x.device.index for x in tensors if x.is_cuda}
        buffers = list(self._module.buffers())
        before = [b.clone() for b in buffers]
        try:
            with torch.random.fork_rng(devices):
                leaves = _leaves(self._compiled(*args))
                results = [x.float().sum() for x in leaves if isinstance(x, Tensor) and x.requires_grad]
                wanted = [x for x in (*tensors, *self._module.parameters()) if x.requires_grad]
                if results:
                    torch.autograd.grad(results, wanted, allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)

    def _give_up(self, error: Exception) -> None:
        self.reason = first_line(error)
        if self.strict:
            raise InputError(
                f"--run.compile on: {self.name} cannot be compiled here ({self.reason}); --run.compile auto "
                "runs what is refused as it is written"
            ) from error
        self._compiled = None
        self.say(f"{self.name} runs uncompiled, because the compiler refused: {self.reason}")


def _leaves(value: Any) -> Iterator[Any]:
    """What tuples, lists, mappings and dataclasses hold, in order."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    else:
        yield value


class Captured:
    """A function of static tensors on a GPU: its fourth call captures it, and from then on it is replayed.

    It takes no arguments and reads what changes from call to call from tensors that its owner writes before.
    It must not wait for the device, and must allocate nothing that outlives it but what it returns: those
    tensors are written anew by every replay. All calls run on `stream`: autograd remembers on which stream a
    parameter's gradient was first summed, and a capture must not depend on another one.
    """

    def __init__(
        self,
        function: Callable[[], dict[str, Tensor]],
        stream: torch.cuda.Stream,
        strict: bool = False,
        say: Say = print,
    ) -> None:
        """`strict` turns a refused capture into an `InputError`."""
        self.function, self.stream, self.strict, self.say = function, stream, strict, say
        self.graph: torch.cuda.CUDAGraph | None = None
        self.reason = ""
        """Why it is launched although it should be captured."""
        self._runs, self._results = 0, {}  # type: tuple[int, dict[str, Tensor]]

    @property
    def ran(self) -> str:
        """How it runs, for the record."""
        if self.graph is not None:
            return "captured"
        return f"launched: {self.reason}" if self.reason else "launched"

    def __call__(self) -> dict[str, Tensor]:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            if self.graph is None and not self.reason and self._runs >= _EAGER_RUNS:
                self._capture()
            if self.graph is not None:
                self.graph.replay()
            else:
                self._runs += 1
                self._results = self.function()
        current.wait_stream(self.stream)
        return self._results

    def _capture(self) -> None:
        """Record the work, which does none of it; a refusal leaves all as it was."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.stream.device.index or 0]
        before = generator.get_state()
        try:
            # other threads, as that which watches over NCCL, may go on asking the device
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._results = self.function()
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the driver, of torch, or of what was called
            self.reason = first_line(error)
            if self.strict:
                raise InputError(
                    f"--run.graph on: the step cannot be captured here ({self.reason}); --run.graph auto "
                    "launches its operations instead"
                ) from error
            # the old state would go on waiting for the replay of a graph that is not there
            generator.graphsafe_set_state(torch.Generator(self.stream.device).graphsafe_get_state())
            generator.set_state(before)
            self.say(f"steps are launched, because their capture was refused: {self.reason}")
        else:
            self.graph = graph
