"""What the benchmarks share: how large, timing, memory, and the limits of the machine that a number is held
against.

On a GPU every form is captured as a CUDA graph first, as the trainer runs it, so that the host's launches do
not count for either side; times come from CUDA events with the second-level cache flushed.

BENCH_TOY=1 in the environment shrinks every problem until it is a rehearsal that says nothing about speed.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from bench.records import Record
from bench.runner import wait_for_turn

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOY = os.environ.get("BENCH_TOY") == "1"

Form = Callable[[], object]
T = TypeVar("T")


def sized(gpu: T, cpu: T, toy: T) -> T:
    """The size for this machine."""
    return toy if TOY else gpu if CUDA else cpu


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile for fixed sizes; a rehearsal stops before Inductor."""
    return torch.compile(function, dynamic=False, backend="eager" if TOY else "inductor")


class Time(NamedTuple):
    """Milliseconds of repeated calls."""

    median: float
    p20: float
    p80: float


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def compiled_all() -> None:
    """Call it when everything is compiled: from here on nothing else runs beside this process."""
    synchronize()
    if CUDA:
        torch.cuda.empty_cache()  # others want it too
    wait_for_turn()


def captured(function: Form) -> Form:
    """The function as one CUDA graph; on a CPU the function itself. Its results are those of the capture."""
    if not CUDA:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def milliseconds(function: Form) -> Time:
    """Median, 20 and 80 % of repeated calls."""
    if CUDA:
        from triton.testing import do_bench

        return Time(*do_bench(captured(function), quantiles=[0.5, 0.2, 0.8]))
    if TOY:
        return Time(*[1e3 * seconds(function)] * 3)
    times = sorted([1e3 * seconds(function) for _ in range(6)][1:])
    return Time(times[2], times[1], times[3])


def seconds(work: Callable[..., object], *args: object) -> float:
    """Wall time of one call, the device included."""
    synchronize()
    start = time.perf_counter()
    work(*args)
    synchronize()
    return time.perf_counter() - start


def allocated(function: Form) -> float | None:
    """MiB that a call allocates at its peak, results included; None on a CPU."""
    if not CUDA:
        return None
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of the largest plain copy: what memory-bound work can reach."""
    source = torch.empty(sized(2**28, 2**24, 2**10), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * milliseconds(lambda: target.copy_(source)).p20)


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """FLOP per second of one large matrix product: what arithmetic-bound work can reach."""
    size = sized(8192, 1024, 32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (1e-3 * milliseconds(lambda: a @ b).p20)


def compare(
    what: str,
    sizes: dict[str, int],
    forms: Mapping[str, Form],
    traffic: float | None = None,
    case: str = "",
) -> list[Record]:
    """Measure every form and print a table. -> a record of each

    `ratio` is a form's time over the first one's; with `traffic`, the bytes that the first form has to move,
    its distance from the memory's limit is told too.
    """
    records = []
    for name, form in forms.items():
        ms, p20, p80 = milliseconds(form)
        memory = allocated(form)
        records.append(
            Record(what=what, case=case, form=name, sizes=sizes, ms=ms, p20=p20, p80=p80, MiB=memory)
        )
    best = records[0].ms or 1.0
    title = ", ".join([records[0].subject, *(f"{k} {v}" for k, v in sizes.items())])
    print(f"\n{title}\n{'':10}{'median ms':>12}{'20 %':>10}{'80 %':>10}{'MiB':>10}{'ratio':>8}")
    for r in records:
        used = f"{r.MiB:.1f}" if r.MiB is not None else ""
        print(f"{r.form:10}{r.ms:12.4f}{r.p20:10.4f}{r.p80:10.4f}{used:>10}{(r.ms or 0) / best:8.1f}")
    if traffic is not None:
        limit = 1e3 * traffic / copy_bandwidth()
        records[0].numbers["memory limit, ms"] = limit
        print(f"memory's limit {limit:.4f} ms: {limit / best:.0%} of it reached")
    return records
