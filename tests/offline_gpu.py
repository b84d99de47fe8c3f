"""A make-believe GPU: what torch.compile writes for NVIDIA chips, compiled for them on a machine without one.

`make_believe(chip)` has torch and Triton see one GPU that can be reasoned about and not run. Tensors made
under `mode` then say that they lie on it and have no memory; torch.compile traces functions of them as it
would there, and every Triton kernel that Inductor writes is compiled down to machine code before `graphs` has
an entry for it. What a GPU's compiler would refuse is refused here: constants that do not fit an index,
operations that it lacks, too much shared memory. Nothing is launched: wrong results and races stay unseen,
and so do convolutions, products and other libraries' kernels. Where Inductor would time several
configurations of a kernel, the first is compiled, and products are not padded.

It changes torch for good, so it has a process to itself: `tests.offline_cases`. It leans on internals of
torch and Triton, for which `tests.test_offline_gpu` names the versions.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

# torch remembers from its import on whether there is a GPU, so ours is there before
assert "torch" not in sys.modules, "tests.offline_gpu must be imported before torch"
_spec = find_spec("torch")
assert _spec is not None and _spec.origin is not None
ctypes.CDLL(str(Path(_spec.origin).parent / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(os.environ["OFFLINE_GPU_LIBRARY"])  # offline_gpu.cpp

import logging
import re
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, ir
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

GPU = torch.device("cuda", 0)
mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
"""Under it, tensors have a device and no memory."""


class Chip(NamedTuple):
    name: str
    multiprocessors: int
    shared: int  # bytes that one program may use
    memory: int
    l2: int


CHIPS = {
    80: Chip("NVIDIA A100", 108, 163 << 10, 80 << 30, 40 << 20),
    90: Chip("NVIDIA H200", 132, 227 << 10, 141 << 30, 50 << 20),
}


class Graph(NamedTuple):
    """One graph that Inductor compiled."""

    backward: bool
    kernels: tuple[str, ...]
    """Names of its Triton kernels; all have machine code."""
    calls: tuple[str, ...]
    """Operations outside torch that it calls as they are, as "namespace.name"."""
    large: tuple[str, ...]
    """Whole numbers of more than 32 bits in the kernels."""
    low: bool
    """Whether a kernel reads or writes bf16."""


graphs: list[Graph] = []
"""What was compiled so far, in order."""


def make_believe(number: int) -> None:
    """Have torch and Triton see the chip of this compute capability from now on."""
    chip = CHIPS[number]
    properties = types.SimpleNamespace(
        name=chip.name,
        major=number // 10,
        minor=number % 10,
        multi_processor_count=chip.multiprocessors,
        total_memory=chip.memory,
        L2_cache_size=chip.l2,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=chip.shared,
        shared_memory_per_multiprocessor=chip.shared + 1024,
        gcnArchName="",
        uuid="offline",
        is_multi_gpu_board=0,
    )
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
        "set_device": None,
        "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "get_device_properties": properties,
        "_get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": chip.name,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _answering(answer))
    for owner in (CudaInterface, CudaInterface.Worker):
        owner.get_device_properties = staticmethod(_answering(properties))
    triton_helpers.set_driver_to_gpu = _answering(None)
    triton.runtime.driver.set_active(_Driver(number, chip))
    # torch asks for no value of a tensor on a device that it may not wake up
    FakeTensorMode.avoid_device_init = property(_answering(True))
    # pointers are looked at when a graph runs
    compile_fx.get_input_idxs_to_check = _answering(())
    # padding is decided by timing it
    inductor_config.shape_padding = False
    inductor_config.compile_threads = 1
    inductor_config.fx_graph_cache = False
    functorch_config.enable_autograd_cache = False
    GraphLowering.compile_to_module = _compile_to_module
    UniformValueConstantFolder._deduce_value = _deduced_on_cpu
    # a refused kernel is raised, and need not be logged as well
    triton_heuristics.log.setLevel(logging.CRITICAL)


def _answering(value: Any) -> Any:
    return lambda *_, **__: value


class _Driver:
    """What Triton and Inductor ask of a driver before anything is launched."""

    def __init__(self, number: int, chip: Chip) -> None:
        self.target = GPUTarget("cuda", number, 32)
        limits = {
            "max_shared_mem": chip.shared,
            "multiprocessor_count": chip.multiprocessors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }
        self.utils = types.SimpleNamespace(get_device_properties=_answering(limits))

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def is_active(self) -> bool:
        return True


class _OnCpu(TorchDispatchMode):
    """What would be made on the GPU is made on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


_deduce_value = UniformValueConstantFolder._deduce_value


def _deduced_on_cpu(self: Any, node: torch.fx.Node) -> Any:
    """Inductor folds constants by computing with one element of them."""
    with _OnCpu():
        return _deduce_value(self, node)


def _compile_to_module(graph: GraphLowering) -> Any:
    """In place of loading the program that Inductor wrote: compile its kernels, and return one that gives
    tensors without memory."""
    code = graph.codegen()[0].value
    sources = dict(re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.S))
    # of another form it would pass without being looked at
    assert code.count("= async_compile.") == len(sources), "Inductor wrote kernels in a form unknown here"
    for name, source in sources.items():
        module = vars(PyCodeCache.load(source))
        kernel = module[re.findall(r"^def (\w+)\(", source, re.M)[-1]]
        try:
            kernel._precompile_config(kernel.configs[0])
        except Exception as error:
            raise RuntimeError(f"Triton refuses {name}: {error}") from error
    calls = re.findall(r"= torch\.ops\.(\w+\.\w+)\.\w+\(|^\s*torch\.ops\.(\w+\.\w+)\.\w+\(", code, re.M)
    graphs.append(
        Graph(
            backward=graph.is_backward,
            kernels=tuple(sources),
            calls=tuple(name for pair in calls for name in pair if name and not name.startswith("aten.")),
            large=tuple(n for source in sources.values() for n in _large_numbers(source)),
            low=any("'*bf16'" in source for source in sources.values()),
        )
    )
    graph.cache_path = graph.cache_key = graph.cache_linemap = None
    outputs: Sequence[Any] = graph.graph_outputs

    def call(inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        inputs.clear()
        with mode:
            return tuple(_empty(output) for output in outputs)

    return types.SimpleNamespace(call=call, __file__="")


def _large_numbers(source: str) -> list[str]:
    """Decimal numbers of more than 32 bits in the body of a kernel."""
    body = source[source.rindex("\ndef ") :]
    return [n for n in re.findall(r"(?<![\w.])\d{10,}(?![\w.])", body) if int(n) >= 2**31]


def _empty(output: Any) -> Tensor | None:
    """A tensor of the layout that Inductor gave to an output."""
    if isinstance(output, ir.NoneAsConstantBuffer):
        return None
    layout = output.get_layout()
    size, stride = ([int(n) for n in values] for values in (layout.size, layout.stride))
    return torch.empty_strided(size, stride, dtype=layout.dtype, device=layout.device)
