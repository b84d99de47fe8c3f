"""All time steps of a pair's forward pass in one launch: a program keeps its weights in shared memory.

A program owns 16 hidden units of one direction and all clips. The units' rows of W_hh, of r, z and n and a
fourth part of zeros, are loaded before the first step and stay for all of them; what a step reads is the
state alone. All programs of a direction have written it before any goes on: they meet at a counter, and read
past the first-level cache what others wrote. Each step is that of `gru_steps`.

A program that waits for one which has not started waits for ever, so this is launched only where all programs
run at once (`fits`), as a cooperative launch, which the driver refuses otherwise. Should a wait be too long
all the same, the program raises a flag (`timed_out`) and makes its states NaN, so that no result of such a
pass is taken for one.
Legend: as in `gru_steps`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET, Call, width
from .gru_steps import Forward, finish_step, tile_of

UNITS = 16
_ROWS, _DEPTH, _WARPS = 64, 128, 4
_PATIENCE = 1 << 20  # polls of some 0.5 us each
_PARTS = tl.constexpr(4)  # r, z, n, and zeros, for a product's columns are a power of two
_APART = tl.constexpr(32)  # counters, to lie in lines of their own


@triton.jit
def meet(counter_ptr, fault_ptr, target, patience):
    """Wait until `target` programs have arrived -> the patience left, none once it ran out."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu") + 1
    polls = 0
    while (arrived < target) & (polls < patience):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    if arrived < target:
        tl.store(fault_ptr, 1)
        patience = 0
    # what others wrote is read by all threads, and one of them has waited
    tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return patience


@triton.jit(do_not_specialize=["first"])
def resident_forward_kernel(
    gates_ptr,  # [G, T, N, 2, 3H]
    weight_ptr,  # [G, 2, 3H, H]
    bias_ptr,  # [G, 2, 2, 3H] float32
    states_ptr,  # [G, S, N, 2H]
    inner_ptr,  # [G, T, N, 2, H]
    final_ptr,  # [G, N, 2H]
    carry_ptr,  # [G, N, 2, H] float32 states
    counter_ptr,  # [2G, APART] int32, zeros
    fault_ptr,  # [1] int32
    first,
    T,
    N,
    S,
    patience,
    STEPS: tl.constexpr,  # per launch
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group, direction = (tl.program_id(2) // 2).to(tl.int64), tl.program_id(2) % 2
    j = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    part = tl.arange(0, _PARTS * BLOCK_H)
    unit = tl.program_id(0) * BLOCK_H + part % BLOCK_H
    weight_ptr += (group * 2 + direction) * 3 * H * H
    weight_ptr += ((part // BLOCK_H) * H + unit)[None, :] * H + k[:, None]
    real = ((part < 3 * BLOCK_H) & (unit < H))[None, :]
    held = ()
    for chunk in tl.static_range(tl.cdiv(H, BLOCK_K)):
        known = real & (k[:, None] < H - chunk * BLOCK_K)
        w = tl.load(weight_ptr + chunk * BLOCK_K, mask=known, other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        held = held + (w,)  # type: ignore[assignment]
    carry_ptr += group * N * 2 * H + direction * H
    for t in range(first, first + STEPS):
        frame, before = t, t - 1
        if REVERSE:
            frame = tl.where(direction == 1, T - 1 - t, frame)
            before = tl.where(direction == 1, T - t, before)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = (n[:, None] < N) & (j[None, :] < H)
            # the state before the first step is zero
            read = n[:, None] < tl.where(t > 0, N, 0)
            rows_ptr = states_ptr + (group * S + before % S) * N * 2 * H + direction * H
            rows_ptr += n[:, None] * 2 * H + k[None, :]
            products = tl.zeros((BLOCK_N, _PARTS * BLOCK_H), tl.float32)
            for chunk in tl.static_range(tl.cdiv(H, BLOCK_K)):
                here = read
                if H % BLOCK_K:
                    here = here & (k[None, :] < H - chunk * BLOCK_K)
                a = tl.load(rows_ptr + chunk * BLOCK_K, mask=here, other=0.0, cache_modifier=".cg")
                if UPCAST:
                    a = a.to(tl.float32)
                products = tl.dot(a, held[chunk], products, input_precision=PRECISION)
            halves = tl.permute(tl.reshape(products, (BLOCK_N, 2, 2, BLOCK_H)), (0, 1, 3, 2))
            even, odd = tl.split(halves)
            ar, an = tl.split(tl.permute(even, (0, 2, 1)))
            az, _ = tl.split(tl.permute(odd, (0, 2, 1)))
            h = tile_of(carry_ptr, 2 * H, n, j, inside & read)
            h = finish_step(
                ar, az, an, h, gates_ptr, bias_ptr, states_ptr, inner_ptr, n, j, inside,
                group, direction, frame, T, N, S, H, KEEP,
            )  # fmt: skip
            # after a wait that was too long nothing is right, and shall not seem so
            h = tl.where(patience == 0, float("nan"), h)
            own = n[:, None] * 2 * H + j[None, :]
            tl.store(carry_ptr + own, h, mask=inside)
            if t == T - 1:
                out = final_ptr + group * N * 2 * H + direction * H + own
                tl.store(out, h.to(final_ptr.dtype.element_ty), mask=inside)
        if t < first + STEPS - 1:
            target = (t - first + 1) * tl.num_programs(0)
            patience = meet(counter_ptr + tl.program_id(2) * _APART, fault_ptr, target, patience)


_faults: dict[torch.device, Tensor] = {}


def fault(device: torch.device) -> Tensor:
    """The device's flag [1] int32, which a wait that is too long sets to 1."""
    if device not in _faults:
        _faults[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _faults[device]


def timed_out(device: torch.device) -> bool:
    """Whether a program has waited too long since the last call. Waits for the device."""
    flag = fault(device)
    late = bool(flag.item())
    flag.zero_()
    return late


def plan_resident_forward(
    gates: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool, keep: bool, slots: int, precision: str
) -> Forward:
    """`gru_steps.plan_forward` in one launch."""
    groups, steps, n, _, h = *gates.shape[:4], weight.shape[-1]
    states, final = gates.new_empty(groups, slots, n, 2 * h), gates.new_empty(groups, n, 2 * h)
    inner = gates.new_empty(groups, steps if keep else 0, n, 2, h)
    arguments = {
        "gates_ptr": gates,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "states_ptr": states,
        "inner_ptr": inner,
        "final_ptr": final,
        "carry_ptr": gates.new_empty(groups, n, 2, h, dtype=torch.float32),
        "counter_ptr": gates.new_zeros(2 * groups, _APART.value, dtype=torch.int32),
        "fault_ptr": fault(gates.device),
        "first": 0,
        "T": steps,
        "N": n,
        "S": slots,
        "patience": _PATIENCE,
        "STEPS": steps,
        "H": h,
        "REVERSE": reverse,
        "KEEP": keep,
        "PRECISION": precision,
        "UPCAST": INTERPRET and gates.dtype == torch.bfloat16,
        "BLOCK_N": min(_ROWS, width(n)),
        "BLOCK_H": UNITS,
        "BLOCK_K": min(_DEPTH, width(h)),
    }
    grid = (triton.cdiv(h, UNITS), 1, 2 * groups)
    call = Call(resident_forward_kernel, grid, arguments, _WARPS, 1, cooperative=True)
    return Forward([call], states, final, inner)


def available(sequence: Tensor, weight: Tensor, *, reverse: bool, keep: bool, precision: str) -> bool:
    """Whether this pass, over a sequence [T, N, W] with W_hh [2, 3H, H], can be one launch on its device."""
    (steps, n, _), h = sequence.shape, weight.shape[-1]
    return _available(sequence.device, steps, n, h, sequence.dtype, reverse, keep, precision)


@functools.cache
def _available(
    device: torch.device, steps: int, n: int, h: int, dtype: torch.dtype, reverse: bool, keep: bool,
    precision: str,
) -> bool:  # fmt: skip
    if device.type != "cuda" or steps < 2:
        return False
    # the compiler asks for types alone
    gates = torch.empty(1, steps, n, 2, 3 * h, dtype=dtype, device="meta")
    weight, bias = gates.new_empty(1, 2, 3 * h, h), gates.new_empty(1, 2, 2, 3 * h, dtype=torch.float32)
    plan = plan_resident_forward(
        gates, weight, bias, reverse=reverse, keep=keep, slots=steps, precision=precision
    )
    return fits(plan.calls[0], device)


def fits(call: Call, device: torch.device) -> bool:
    """Whether all programs of a launch run on the device at once, from what the compiled kernel takes."""
    with torch.cuda.device(device):
        try:
            compiled = call.kernel.warmup(**call.arguments, **call.options, grid=call.grid)
            compiled._init_handles()
        except triton.runtime.errors.OutOfResources:
            return False
    chip = torch.cuda.get_device_properties(device)
    return math.prod(call.grid) <= chip.multi_processor_count * programs_at_once(
        compiled.metadata.shared, compiled.n_regs, 32 * call.num_warps, chip.shared_memory_per_multiprocessor
    )


def programs_at_once(shared: int, registers: int, threads: int, shared_memory: int) -> int:
    """Programs that run on one multiprocessor at once; a program takes 1 KiB of shared memory for itself."""
    return min(shared_memory // (shared + 1024), 65536 // (registers * threads), 2048 // threads)
