"""Every kernel, in the launch configurations used, compiled for real chips without one: registers and shared
memory within the chip's limits.

The compiler must not be in interpreter mode, so all is compiled in one subprocess, which runs this file and
prints what the machine code uses as JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

# bytes of shared memory that one program may use
LIMITS = {80: 163 * 1024, 90: 227 * 1024}
ROOT = Path(__file__).parent.parent
PAPER_MIX = (0.4, 0.3, 0.2, 0.1)


class Problem(NamedTuple):
    """What is trained: it decides the launches."""

    n: int = 64
    k: int = 16384
    d: int = 128
    mix: tuple[float, ...] = PAPER_MIX
    dtype: str = "float32"
    precision: str = "tf32"


PROBLEMS = [
    *(Problem(d=d) for d in (24, 64, 128, 256)),
    Problem(d=256, precision="ieee"),
    Problem(dtype="bfloat16"),
    Problem(precision="ieee"),
    Problem(mix=()),
    Problem(mix=(0.37, 0.11)),
    Problem(n=1, k=1, d=3),
]


def signature(call: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignments of a planned launch, specialised as Triton's launcher does."""
    import torch

    types = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    names: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        number = isinstance(value, int) and not parameter.do_not_specialize
        aligned = isinstance(value, torch.Tensor) or (number and value % 16 == 0)
        if parameter.is_constexpr or (number and value == 1):
            names[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            names[parameter.name] = types[value.dtype]
        else:
            whole = "i32" if -(2**31) <= value < 2**31 else "i64"
            names[parameter.name] = "fp32" if isinstance(value, float) else whole
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return names, constants, attributes


def launches(problem: Problem) -> list[Any]:
    """All launches of the operations, planned on tensors without memory."""
    import torch
    from a2mc_fast.kernels import bank_ascent, mixing_contrast, philox
    from a2mc_fast.kernels.problem import Contrast, Features, Step

    p = problem
    dtype = getattr(torch, p.dtype)
    features = Features(*(torch.empty(p.n, p.d, dtype=dtype, device="meta") for _ in range(4)))
    rows = torch.empty(p.k, p.d, device="meta")
    settings = Contrast(p.mix, distill=bool(p.mix), precision=p.precision)
    contrast = [
        call
        for normalize in ((False, True) if p.k == 16384 else (False,))
        for call in mixing_contrast.plan(
            features, rows, settings._replace(normalize=normalize, climb=0.03 * normalize)
        )[0]
    ]
    step = torch.empty((), dtype=torch.int64, device="meta")
    return [
        *contrast,
        *bank_ascent.plan(rows, rows, features, settings._replace(temperature=0.03), Step())[0],
        *(philox.plan(step, seed, 2, first, 9600)[0] for seed, first in ((0, 0), (2**62, 2**40))),
    ]


class Pass(NamedTuple):
    """One pass of a pair of GRUs: it decides the launches."""

    n: int = 64
    h: int = 1024
    t: int = 64
    dtype: str = "bfloat16"
    precision: str = "tf32"
    reverse: bool = False
    learns: bool = True  # whether the weights get gradients
    final: bool = False  # whether the final states alone are read


PASSES = [
    Pass(learns=False),
    Pass(n=192),
    Pass(n=192, final=True),
    Pass(dtype="float32", learns=False),
    Pass(n=192, dtype="float32", precision="ieee"),
    Pass(n=70, h=100, t=7, dtype="float16", reverse=True),
]


def steps(problem: Pass, form: Literal["fused", "resident"] = "fused") -> list[Any]:
    """The first launch forward, as kept for a backward pass, and that backward, on tensors without memory; of
    a pass without gradients of the weights also one that keeps nothing. If resident that forward alone."""
    import torch
    from a2mc_fast.kernels import gru_plan

    p, dtype = problem, getattr(torch, problem.dtype)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    gates, grad, grad_final = empty(p.t, p.n, 2, 3 * p.h), empty(p.t, p.n, 2 * p.h), empty(p.n, 2 * p.h)
    how: dict[str, Any] = {"reverse": p.reverse, "precision": p.precision}
    weight, bias = empty(2, 3 * p.h, p.h), empty(2, 2, 3 * p.h, dtype=torch.float32)
    ahead = gru_plan.plan_forward(gates, weight, bias, followed=1, slots=p.t, form=form, **how)
    if form == "resident":
        return ahead.calls
    behind = gru_plan.plan_backward(
        None if p.final else grad, grad_final if p.final else None, empty(2, p.h, 3 * p.h),
        ahead.states, gates, ahead.inner, slots=p.t if p.learns else 2, with_bias=p.learns, **how,
    )  # fmt: skip
    calls = [ahead.calls[0], behind.calls[0]]
    if p.learns:
        return calls
    slots = 2 if p.final else p.t
    return [*calls, gru_plan.plan_forward(gates, weight, bias, followed=0, slots=slots, **how).calls[0]]


NARROW = [
    Pass(h=64, t=32, learns=False),
    Pass(n=192, h=64, t=32),
    Pass(n=192, h=128, t=32, reverse=True),
    Pass(h=64, dtype="float32", final=True),
    Pass(n=5, h=10, t=7, dtype="float16"),
    Pass(n=1, h=16, t=1),
]


def narrow(problem: Pass) -> list[Any]:
    """The two launches of a narrow pair, forward as kept for a backward pass, on tensors without memory."""
    import torch
    from a2mc_fast.kernels import gru_small

    p, dtype = problem, getattr(torch, problem.dtype)
    assert p.h <= gru_small.most_units(dtype, p.precision)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    gates, grad, grad_final = empty(p.t, p.n, 2, 3 * p.h), empty(p.t, p.n, 2 * p.h), empty(p.n, 2 * p.h)
    how: dict[str, Any] = {"reverse": p.reverse, "precision": p.precision}
    weight, bias = empty(2, 3 * p.h, p.h), empty(2, 2, 3 * p.h, dtype=torch.float32)
    ahead = gru_small.plan_small_forward(gates, weight, bias, followed=1, slots=p.t, **how)
    behind = gru_small.plan_small_backward(
        None if p.final else grad, grad_final if p.final else None, empty(2, p.h, 3 * p.h),
        ahead.states, gates, ahead.inner, with_weights=p.learns, **how,
    )  # fmt: skip
    return [*ahead.calls, *behind.calls]


def planned(problem: Problem | Pass) -> list[Any]:
    """All launches of a problem."""
    if isinstance(problem, Problem):
        return launches(problem)
    return narrow(problem) if problem in NARROW else steps(problem)


def weights_in_loops(call: Any, chip: int) -> tuple[int, int]:
    """How often tiles of the weights' shape are loaded or put into shared memory: before the first loop, and
    from there on."""
    depth, columns = call.arguments["BLOCK_K"], 4 * call.arguments["BLOCK_H"]
    before, after = compiled_for(call, chip).asm["ttgir"].split("scf.for", 1)
    pattern = rf"(?:tt\.load|local_alloc) .*(?:tensor|memdesc)<{depth}x{columns}x(?:bf16|!tt.ptr)"
    return len(re.findall(pattern, before)), len(re.findall(pattern, after))


def compiled_for(call: Any, chip: int) -> Any:
    """A launch's kernel compiled for a chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(call.kernel, *signature(call))
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=call.options)


def accesses_before_wait(ptx: str) -> list[int] | None:
    """How often a kernel that starts early loads and stores before it waits for the launch before it."""
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    kinds = (r"\b(?:ld\.global|cp\.async\.c[ag])", r"\b(?:st|red|atom)\.global")
    return [len(re.findall(kind, before)) for kind in kinds] if waits else None


def usage(call: Any, chip: int) -> dict[str, Any]:
    """Registers, stack, local and shared memory of one launch, and what it does early: from its code."""
    import triton

    compiled = compiled_for(call, chip)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    # the kernels' shared memory is allotted at launch, so the machine code does not state it
    early = accesses_before_wait(compiled.asm["ptx"])
    asked = bool(call.options.get("launch_pdl"))
    threads = 32 * call.num_warps
    return {**found, "shared": compiled.metadata.shared, "threads": threads, "asked": asked, "early": early}


def compile_all() -> dict[str, list[dict[str, Any]]]:
    """Usage per chip of all distinct launches."""
    from a2mc_fast.kernels import common

    results: dict[str, list[dict[str, Any]]] = {}
    for chip in LIMITS:
        common.MODEL_CHIP = chip
        seen = set()
        results[str(chip)] = rows = []
        for problem in (*PROBLEMS, *PASSES, *NARROW):
            for call in planned(problem):
                form = (call.kernel.__name__, repr(signature(call)), repr(call.options))
                if form not in seen:
                    seen.add(form)
                    rows.append(
                        {"kernel": call.kernel.__name__, "problem": str(problem), **usage(call, chip)}
                    )
    for problem in (Pass(learns=False), Pass(n=192)):
        for call in steps(problem, "resident"):
            row = {"kernel": "resident", "problem": str(problem), **usage(call, 90)}
            weights = weights_in_loops(call, 90)
            results["90"].append({**row, "programs": math.prod(call.grid), "weights": weights})
    return results


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("chip", LIMITS, ids=lambda chip: f"sm_{chip}")
def test_registers_and_shared_memory_suffice(compiled: dict[str, list[dict[str, Any]]], chip: int) -> None:
    rows = compiled[str(chip)]
    assert {row["kernel"] for row in rows} == {
        "bank_pass_kernel",
        "combine_kernel",
        "philox_kernel",
        "row_softmax_kernel",
        "ascent_kernel",
        "summary_kernel",
        "forward_kernel",
        "backward_kernel",
        "small_forward_kernel",
        "small_backward_kernel",
        *(["resident"] if chip == 90 else []),
    }
    for row in rows:
        assert row["local"] == row["stack"] == 0, f"spills: {row}"
        assert row["shared"] <= LIMITS[chip], f"shared memory: {row}"
        assert row["reg"] * row["threads"] <= 65536, f"registers: {row}"


@pytest.mark.slow
def test_nothing_is_touched_before_the_wait(compiled: dict[str, list[dict[str, Any]]]) -> None:
    """A launch that starts early must leave alone what the one before it reads and writes."""
    for row in compiled["80"] + compiled["90"]:
        assert row["early"] == ([0, 0] if row["asked"] else None), row
    assert not any(row["asked"] for row in compiled["80"])
    late = {row["kernel"] for row in compiled["90"] if not row["asked"]}
    # of the time steps those of many clips alone
    assert late == {"philox_kernel", "resident", "forward_kernel", "backward_kernel"}
    early = {row["kernel"] for row in compiled["90"] if row["asked"]}
    assert {"bank_pass_kernel", "ascent_kernel", "forward_kernel", "backward_kernel"} <= early
    assert {"small_forward_kernel", "small_backward_kernel"} <= early


@pytest.mark.slow
def test_two_programs_of_the_loss_fit_on_a_multiprocessor(
    compiled: dict[str, list[dict[str, Any]]],
) -> None:
    """Which is what the number of splits counts on, at the paper's size."""
    for row in compiled["90"]:
        if row["problem"] == str(Problem()) and row["kernel"] == "bank_pass_kernel":
            assert 2 * row["reg"] * row["threads"] <= 65536
            assert 2 * (row["shared"] + 1024) <= 228 * 1024


@pytest.mark.slow
def test_the_weights_stay_on_the_chip(compiled: dict[str, list[dict[str, Any]]]) -> None:
    """At the paper's size all programs run at once on an H100, and no loop reads or moves the weights."""
    from a2mc_fast.kernels.gru_resident import programs_at_once

    rows = [row for row in compiled["90"] if row["kernel"] == "resident"]
    assert len(rows) == 2
    for row in rows:
        # loaded and put there: four tiles of 256 columns each
        assert row["weights"] == [8, 0], row
        at_once = programs_at_once(row["shared"], row["reg"], row["threads"], 228 * 1024)
        assert row["programs"] == 128 <= 132 * at_once, row


if __name__ == "__main__":
    print(json.dumps(compile_all()))
