"""What the benchmarks share: timing, memory, and the limits of the machine that a number is held against.

On a GPU every form is captured as a CUDA graph first, as the trainer runs it, so that the host's launches do
not count for either side; times come from CUDA events with the second-level cache flushed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

Form = Callable[[], object]


class Time(NamedTuple):
    """Milliseconds of repeated calls."""

    median: float
    p20: float
    p80: float


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
    function()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return Time(times[2], times[1], times[3])


def allocated(function: Form) -> int:
    """Bytes that a call allocates at its peak, results included; 0 on a CPU."""
    if not CUDA:
        return 0
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of the largest plain copy: what memory-bound work can reach."""
    source = torch.empty(2**28 if CUDA else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * milliseconds(lambda: target.copy_(source)).p20)


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """FLOP per second of one large matrix product: what arithmetic-bound work can reach."""
    size = 8192 if CUDA else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (1e-3 * milliseconds(lambda: a @ b).p20)


def report(
    benchmark: BenchmarkFixture, title: str, forms: dict[str, Form], traffic: float | None = None
) -> dict[str, Time]:
    """Measure every form, print a table, and keep the numbers with the record.

    `ratio` is a form's time over the first one's; with `traffic`, the bytes that the first form has to move,
    its distance from the memory's limit is told too.
    """
    times = {name: milliseconds(form) for name, form in forms.items()}
    memory = {name: allocated(form) / 2**20 for name, form in forms.items()}
    best = next(iter(times.values())).median
    print(f"\n{title}\n{'':10}{'median ms':>12}{'20 %':>10}{'80 %':>10}{'MiB':>10}{'ratio':>8}")
    for name, (median, low, high) in times.items():
        print(f"{name:10}{median:12.4f}{low:10.4f}{high:10.4f}{memory[name]:10.1f}{median / best:8.1f}")
    for name, (median, low, high) in times.items():
        benchmark.extra_info[name] = {"ms": median, "p20": low, "p80": high, "MiB": memory[name]}
    if traffic is not None:
        limit = 1e3 * traffic / copy_bandwidth()
        benchmark.extra_info["memory limit ms"] = limit
        print(f"memory's limit {limit:.4f} ms: {limit / best:.0%} of it reached")
    benchmark.pedantic(next(iter(forms.values())), rounds=3, warmup_rounds=1)
    return times
