"""Time steps of a pair of GRUs in Triton: the product with the state's weights and the gates in one kernel.

One program owns some clips and some hidden units of one direction, and with them the units' three gates, so a
step is one product of [clips, H] with three [H, units] and what follows it in registers:

    r, z = sigmoid(a + c),  n = tanh(a + r c),  h <- (1 - z) n + z h      a = W_ih x + b_ih, c = W_hh h + b_hh

The state is carried in float32; operands are of the type of the states, sums are float32. Backwards in time,
with dh the gradient of a step's state, h' the state before it, and q = (dr, dz, dn r) the gradient of c,

    dn = dh (1 - z) (1 - n²),  dz = dh (h' - n) z (1 - z),  dr = dn c r (1 - r),  dh' = dh z + q W_hh

A launch is one step, which needs nothing of its neighbours and runs anywhere: the next one sees all states of
the last. Or, forward, it is all steps (RESIDENT): then a program keeps its units' weights in shared memory,
and meets the others of its direction and clips at a counter after each step, to read what they wrote past the
first-level cache. `gru_resident` tells where that can run.
Direction 1 of a `reverse` pair walks from the last frame to the first; positions are those of the frames.
Legend: G groups, each a pair of directions with weights of its own · P of them, the first, that a backward
pass follows · T frames · N batch · H hidden units · S slots: all T frames, or 2 where a frame is not read
again, frame p in slot p mod S.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the language of the kernels has no annotations that mypy could check)

from __future__ import annotations

import triton
import triton.language as tl

from .common import wait_for_the_last

PARTS = tl.constexpr(4)  # r, z, n, and zeros, for a product's columns are a power of two
APART = tl.constexpr(32)  # counters, to lie in lines of their own


@triton.jit
def tanh(x):
    # of -|x|, so that no exponential overflows
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def tile_of(pointer, stride, n, j, inside):
    """What a program owns of rows with `stride`, [BLOCK_N, BLOCK_H] as float32."""
    return tl.load(pointer + n[:, None] * stride + j[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def columns_of(rows_ptr, begin, k, read, WIDTH: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns from `begin` on of rows that other programs wrote, [BLOCK_N, BLOCK_K]."""
    if WIDTH % BLOCK_K:
        read = read & (k[None, :] < WIDTH - begin)
    a = tl.load(rows_ptr + begin, mask=read, other=0.0, cache_modifier=".cg")
    return a.to(tl.float32) if UPCAST else a  # the interpreter's product of bfloat16 is wrong


@triton.jit
def tiles_of(
    rows_ptr, first, COUNT: tl.constexpr, k, read, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile number `first` of such columns and those after it, COUNT of them or as many as there are."""
    tiles = ()
    for i in tl.static_range(COUNT):
        if (first + i) * BLOCK_K < WIDTH:
            tiles = tiles + (columns_of(rows_ptr, (first + i) * BLOCK_K, k, read, WIDTH, UPCAST, BLOCK_K),)  # type: ignore[assignment]
    return tiles


@triton.jit
def weights_of(weight_ptr, begin, k, known, WIDTH: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr):
    """The same columns of the units' weights, transposed; with WHOLE no tile reaches beyond the matrix."""
    if WHOLE:
        w = tl.load(weight_ptr + begin)
    else:
        w = tl.load(weight_ptr + begin, mask=known & (k[:, None] < WIDTH - begin), other=0.0)
    return w.to(tl.float32) if UPCAST else w


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


@triton.jit
def forward_weights(
    weight_ptr, pair, H: tl.constexpr, UPCAST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What a program keeps of W_hh: its units' rows of r, z and n, and zeros, in tiles of BLOCK_K columns."""
    k, part = tl.arange(0, BLOCK_K), tl.arange(0, PARTS * BLOCK_H)
    unit = tl.program_id(0) * BLOCK_H + part % BLOCK_H
    weight_ptr += pair.to(tl.int64) * 3 * H * H
    weight_ptr += ((part // BLOCK_H) * H + unit)[None, :] * H + k[:, None]
    real = ((part < 3 * BLOCK_H) & (unit < H))[None, :]
    held = ()
    for chunk in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
        held = held + (weights_of(weight_ptr, chunk * BLOCK_K, k, real, H, False, UPCAST),)  # type: ignore[assignment]
    return held


@triton.jit
def forward_step(
    t, pair, start, held, patience, gates_ptr, weight_ptr, bias_ptr, states_ptr, inner_ptr, final_ptr,
    carry_ptr, T, N, S, H: tl.constexpr, REVERSE: tl.constexpr, FOLLOWED: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Step t of the clips from `start` on, in one direction of a group: pair = 2 group + direction."""
    group, direction = (pair // 2).to(tl.int64), pair % 2
    n, k = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = n[:, None] < N
    if H % BLOCK_H:
        inside = inside & (j[None, :] < H)
    frame, before = t, t - 1
    if REVERSE:
        frame = tl.where(direction == 1, T - 1 - t, frame)
        before = tl.where(direction == 1, T - t, before)
    # on their way while the product is made
    gates_ptr += ((group * T + frame) * N * 2 + direction) * 3 * H
    input_r = tile_of(gates_ptr, 6 * H, n, j, inside)
    input_z = tile_of(gates_ptr + H, 6 * H, n, j, inside)
    input_n = tile_of(gates_ptr + 2 * H, 6 * H, n, j, inside)
    # the state before the first step is zero
    read = n[:, None] < tl.where(t > 0, N, 0)
    own = n[:, None] * 2 * H + j[None, :]
    carry_ptr += group * N * 2 * H + direction * H + own
    h = tl.load(carry_ptr, mask=inside & read, other=0.0)
    rows_ptr = states_ptr + (group * S + before % S) * N * 2 * H + direction * H
    rows_ptr += n[:, None] * 2 * H + k[None, :]
    if RESIDENT:
        products = tl.zeros((BLOCK_N, PARTS * BLOCK_H), tl.float32)
        for chunk in tl.static_range(0, (H + BLOCK_K - 1) // BLOCK_K, TOGETHER):
            tiles = tiles_of(rows_ptr, chunk, TOGETHER, k, read, H, UPCAST, BLOCK_K)
            for i in tl.static_range(len(tiles)):
                products = tl.dot(tiles[i], held[chunk + i], products, input_precision=PRECISION)
        halves = tl.permute(tl.reshape(products, (BLOCK_N, 2, 2, BLOCK_H)), (0, 1, 3, 2))
        even, odd = tl.split(halves)
        ar, an = tl.split(tl.permute(even, (0, 2, 1)))
        az, _ = tl.split(tl.permute(odd, (0, 2, 1)))
    else:
        WHOLE: tl.constexpr = H % BLOCK_K == 0 and H % BLOCK_H == 0
        known = j[None, :] < H
        weight_ptr += pair.to(tl.int64) * 3 * H * H + j[None, :] * H + k[:, None]
        ar = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        az = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        an = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for begin in range(0, tl.where(t > 0, H, 0), BLOCK_K):
            a = columns_of(rows_ptr, begin, k, n[:, None] < N, H, UPCAST, BLOCK_K)
            wr = weights_of(weight_ptr, begin, k, known, H, WHOLE, UPCAST)
            wz = weights_of(weight_ptr + H * H, begin, k, known, H, WHOLE, UPCAST)
            wn = weights_of(weight_ptr + 2 * H * H, begin, k, known, H, WHOLE, UPCAST)
            ar = tl.dot(a, wr, ar, input_precision=PRECISION)
            az = tl.dot(a, wz, az, input_precision=PRECISION)
            an = tl.dot(a, wn, an, input_precision=PRECISION)

    bias_ptr += group * 12 * H + direction * 3 * H + j
    of_state = bias_ptr + 6 * H
    known = j < H
    bias_r = tl.load(bias_ptr, mask=known, other=0.0) + tl.load(of_state, mask=known, other=0.0)
    bias_z = tl.load(bias_ptr + H, mask=known, other=0.0) + tl.load(of_state + H, mask=known, other=0.0)
    bias_n = tl.load(bias_ptr + 2 * H, mask=known, other=0.0)
    bias_c = tl.load(of_state + 2 * H, mask=known, other=0.0)
    r = tl.sigmoid(ar + bias_r[None, :] + input_r)
    z = tl.sigmoid(az + bias_z[None, :] + input_z)
    c = an + bias_c[None, :]
    new = tanh(input_n + bias_n[None, :] + r * c)
    h = new + z * (h - new)
    if RESIDENT:
        # after a wait that was too long nothing is right, and shall not seem so
        h = tl.where(patience == 0, float("nan"), h)
    kind = states_ptr.dtype.element_ty
    slot = (group * S + frame % S) * N * 2 * H + direction * H
    tl.store(states_ptr + slot + own, h.to(kind), mask=inside)
    if group < FOLLOWED:
        out = gates_ptr + n[:, None] * 6 * H + j[None, :]
        tl.store(out, r.to(kind), mask=inside)
        tl.store(out + H, z.to(kind), mask=inside)
        tl.store(out + 2 * H, new.to(kind), mask=inside)
        inner = ((group * T + frame) * N * 2 + direction) * H
        tl.store(inner_ptr + inner + own, c.to(kind), mask=inside)
    tl.store(carry_ptr, h, mask=inside)
    if t == T - 1:
        out = final_ptr + group * N * 2 * H + direction * H + own
        tl.store(out, h.to(kind), mask=inside)


# a launch per step must not compile anew for its number
@triton.jit(do_not_specialize=["step", "origin"])
def forward_kernel(
    gates_ptr,  # [G, T, N, 2, 3H] W_ih x of r, z and n; in groups that are followed the gates replace them
    weight_ptr,  # [G, 2, 3H, H]
    bias_ptr,  # [G, 2, 2, 3H] float32: of the input, of the state
    states_ptr,  # [G, S, N, 2H]
    inner_ptr,  # [P, T, N, 2, H] c of n
    final_ptr,  # [G, N, 2H] states after the last step
    carry_ptr,  # [G, N, 2, H] float32 states between steps
    counter_ptr,  # [2G, blocks of clips, APART] int32 zeros, with RESIDENT
    fault_ptr,  # [1] int32, with RESIDENT
    origin,  # twice the launch's first group
    step,  # the launch's first
    T, N, S, patience,
    STEPS: tl.constexpr,  # per launch
    H: tl.constexpr, REVERSE: tl.constexpr, FOLLOWED: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_last(EARLY)
    pair = origin + tl.program_id(2)
    if RESIDENT:
        held = forward_weights(weight_ptr, pair, H, UPCAST, BLOCK_H, BLOCK_K)
        counter_ptr += (pair * tl.num_programs(1) + tl.program_id(1)) * APART
        for t in tl.range(step, step + STEPS, disable_licm=True):
            for start in tl.range(
                tl.program_id(1) * BLOCK_N, N, tl.num_programs(1) * BLOCK_N, disable_licm=True
            ):
                forward_step(
                    t, pair, start, held, patience, gates_ptr, weight_ptr, bias_ptr, states_ptr, inner_ptr,
                    final_ptr, carry_ptr, T, N, S, H, REVERSE, FOLLOWED, RESIDENT, PRECISION, UPCAST,
                    BLOCK_N, BLOCK_H, BLOCK_K, TOGETHER,
                )  # fmt: skip
            if t < step + STEPS - 1:
                patience = meet(counter_ptr, fault_ptr, (t - step + 1) * tl.num_programs(0), patience)
    else:
        forward_step(
            step, pair, tl.program_id(1) * BLOCK_N, (), patience, gates_ptr, weight_ptr, bias_ptr,
            states_ptr, inner_ptr, final_ptr, carry_ptr, T, N, S, H, REVERSE, FOLLOWED, RESIDENT, PRECISION,
            UPCAST, BLOCK_N, BLOCK_H, BLOCK_K, TOGETHER,
        )  # fmt: skip


@triton.jit
def advance(sum_ptr, x, j, step, H: tl.constexpr):
    """Add the sums of x over clips to those of the steps before."""
    before = tl.load(sum_ptr + j, mask=j < tl.where(step > 0, H, 0), other=0.0)
    tl.store(sum_ptr + j, before + tl.sum(x, 0), mask=j < H)


# a launch per step must not compile anew for its number
@triton.jit(do_not_specialize=["step"])
def backward_kernel(
    grad_ptr,  # [G, T, N, 2H] gradient of the states, with ALL
    grad_final_ptr,  # [G, N, 2H] that of the final ones, with FINAL
    weight_ptr,  # [G, 2, H, 3H] transposed
    states_ptr,  # [G, T, N, 2H]
    gates_ptr,  # [G, T, N, 2, 3H]
    inner_ptr,  # [G, T, N, 2, H]
    input_ptr,  # [G, T, N, 2, 3H] gradients of a
    state_ptr,  # [G, S, N, 2, 3H] and of c
    bias_ptr,  # [G, blocks of clips, 2, 4H] float32 sums over clips, frames: r, z, n of a, n of c; with BIAS
    carry_ptr,  # [G, N, 2, H] float32 dh between steps
    step,  # counted from the last frame backwards in time
    T, N, S,
    H: tl.constexpr, REVERSE: tl.constexpr, ALL: tl.constexpr, FINAL: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_the_last(EARLY)
    group, direction = (tl.program_id(2) // 2).to(tl.int64), tl.program_id(2) % 2
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = n[:, None] < N
    if H % BLOCK_H:
        inside = inside & (j[None, :] < H)
    t = T - 1 - step
    frame, before, after = t, t - 1, t + 1
    if REVERSE:
        frame = tl.where(direction == 1, step, frame)
        before = tl.where(direction == 1, step + 1, before)
        after = tl.where(direction == 1, step - 1, after)
    # on their way while the product is made
    place = ((group * T + frame) * N * 2 + direction) * H
    r = tile_of(gates_ptr + place * 3, 6 * H, n, j, inside)
    z = tile_of(gates_ptr + place * 3 + H, 6 * H, n, j, inside)
    new = tile_of(gates_ptr + place * 3 + 2 * H, 6 * H, n, j, inside)
    c = tile_of(inner_ptr + place, 2 * H, n, j, inside)
    earlier = ((group * T + before) * N * 2 + direction) * H
    not_first = inside & (n[:, None] < tl.where(t > 0, N, 0))
    h = tile_of(states_ptr + earlier, 2 * H, n, j, not_first)
    # nothing comes from behind the last frame
    read = n[:, None] < tl.where(step > 0, N, 0)
    own = n[:, None] * 2 * H + j[None, :]
    carry_ptr += group * N * 2 * H + direction * H + own
    dh = tl.load(carry_ptr, mask=inside & read, other=0.0)
    if ALL:
        dh += tile_of(grad_ptr + place, 2 * H, n, j, inside)
    rows_ptr = state_ptr + ((group * S + after % S) * N * 2 + direction) * 3 * H
    rows_ptr += n[:, None] * 6 * H + k[None, :]
    WHOLE: tl.constexpr = 3 * H % BLOCK_K == 0 and H % BLOCK_H == 0
    weight_ptr += tl.program_id(2).to(tl.int64) * 3 * H * H + j[None, :] * 3 * H + k[:, None]
    for begin in range(0, tl.where(step > 0, 3 * H, 0), BLOCK_K):
        a = columns_of(rows_ptr, begin, k, n[:, None] < N, 3 * H, UPCAST, BLOCK_K)
        w = weights_of(weight_ptr, begin, k, j[None, :] < H, 3 * H, WHOLE, UPCAST)
        dh = tl.dot(a, w, dh, input_precision=PRECISION)

    if FINAL:
        out = grad_final_ptr + group * N * 2 * H + direction * H + own
        at_end = inside & (n[:, None] < tl.where(step > 0, 0, N))
        dh += tl.load(out, mask=at_end, other=0.0).to(tl.float32)
    dn = dh * (1.0 - z) * (1.0 - new * new)
    dz = dh * (h - new) * z * (1.0 - z)
    dr = dn * c * r * (1.0 - r)
    kind = input_ptr.dtype.element_ty
    gate = n[:, None] * 6 * H + j[None, :]
    out = input_ptr + place * 3 + gate
    tl.store(out, dr.to(kind), mask=inside)
    tl.store(out + H, dz.to(kind), mask=inside)
    tl.store(out + 2 * H, dn.to(kind), mask=inside)
    out = state_ptr + ((group * S + frame % S) * N * 2 + direction) * 3 * H + gate
    tl.store(out, dr.to(kind), mask=inside)
    tl.store(out + H, dz.to(kind), mask=inside)
    tl.store(out + 2 * H, (dn * r).to(kind), mask=inside)
    tl.store(carry_ptr, dh * z, mask=inside)
    if BIAS:
        block = tl.program_id(2) // 2 * tl.num_programs(1) + tl.program_id(1)
        bias_ptr += (block * 2 + direction) * 4 * H
        advance(bias_ptr, dr, j, step, H)
        advance(bias_ptr + H, dz, j, step, H)
        advance(bias_ptr + 2 * H, dn, j, step, H)
        advance(bias_ptr + 3 * H, dn * r, j, step, H)
