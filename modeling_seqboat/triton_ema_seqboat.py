"""Triton kernels of the EMA scan (arXiv 2306.11197, section 3.1; damped EMA of Mega), forward and backward.

Letters: B batch, L length, D width, N states of a channel, C tokens of a chunk.

A sequence is cut into chunks that are scanned in parallel. With the gains divided out, a state obeys
z_t = q z_{t-1} + u_t and costs one multiply-add a token, its output y_t = sum_n c z_t (c = input gain x output gain)
a second one:

    1. every chunk's last z when it starts from zero                             chunk_state_kernel
    2. z at the entry of every chunk, a short scan over chunks                   carry_kernel
    3. outputs, from the entry states                                            output_kernel

The backward pass is the same in reverse for the adjoint a_t = q a_{t+1} + dy_t, again with the gain divided out
(adjoint_kernel, carry_adjoint_kernel, input_grad_kernel). Only x, the pre-activation and one state a chunk are
kept. Gradients of parameters are partial sums of programs, added up in a fixed order: nothing here uses atomics, so
that two runs over the same inputs agree bit for bit.

A program takes one chunk of one row and BLOCK_D channels, one channel a lane: the N states of a channel stay in the
registers of one thread, and a warp reads 32 neighbours. u = x - delay decay x delayed; `pack` holds the parameters as
(4 or 5, N, D): q, c (both gains), input gain, output gain, delay decay. The decay and gains themselves are made from
the layer's parameters in one kernel each way, in place of some thirty elementwise launches (`ema_parameters_triton`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_launch_seqboat import first_derivative_only, jit, kernel, power_of_two, tl

# (largest L, C): a chunk depends on the length alone, so that a row is computed alike whatever its batch mates.
# Longer chunks save traffic of chunk states, shorter ones fill the chip at batch 1.
_CHUNKS = ((2048, 64), (16384, 128), (65536, 256), (262144, 512), (1048576, 2048))
_LONGEST_CHUNK = 4096
# Channels and warps of a program.
_BLOCK_D = 64
_WARPS = {"num_warps": 2}
# Tokens loaded at a time: the fastest of 4, 8 and 16 on an H100 at B 4, L 8,192, D 616, N 16; and with pads, segment
# starts or a delayed input, which take registers of their own, what fits without spills.
_UNROLL = {"chunk_state": (16, 8), "output": (8, 8), "adjoint": (16, 8), "input_grad": (8, 4)}
# Every access is one element a lane, so that alignment and divisibility of these make no other code.
_VARYING = (
    "x_ptr", "decay_ptr", "input_gain_ptr", "output_gain_ptr", "skip_ptr", "delay_decay_ptr", "delayed_ptr",
    "real_ptr", "reset_ptr", "state_ptr", "y_ptr", "out_ptr", "final_ptr", "grad_ptr", "final_grad_ptr", "x_grad_ptr",
    "delayed_grad_ptr", "state_grad_ptr", "pack_ptr", "local_ptr", "span_ptr", "entry_ptr", "carry_in_ptr",
    "carry_out_ptr", "product_ptr", "length", "chunk", "chunks",
)


# Bits of the constant HAS: what tokens bring with them besides x.
_DELAY, _REAL, _RESET = (1, 2, 4) if tl is None else map(tl.constexpr, (1, 2, 4))


@jit
def _away_from_zero(gain):
    # States are carried with the gain divided out; below 1e-16 the difference is lost in float32 rounding of the rest.
    return tl.where(tl.abs(gain) < 1e-16, tl.where(gain < 0, -1e-16, 1e-16), gain)


@jit
def _chunk(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, length, chunk, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, UNROLL: tl.constexpr, DIRECTION: tl.constexpr,
):
    """A program's chunk: its number among all rows' chunks, its channels and states, where its inputs, delayed inputs,
    real marks and segment starts lie, where its first token's channels do among all B * L * D, how many tokens it has,
    and how many come UNROLL at once."""
    index, row = tl.program_id(1), tl.program_id(2)
    chunk_id = row.to(tl.int64) * tl.num_programs(1) + index
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = index * chunk
    if DIRECTION < 0:
        at = length - 1 - at
    token = row.to(tl.int64) * length + at
    tokens = tl.minimum(chunk, length - index * chunk)
    place = token * D + tl.minimum(d, D - 1)
    at = (x_ptr + place, delayed_ptr + place, real_ptr + token, reset_ptr + token)
    return chunk_id, d, tl.arange(0, BLOCK_N), at, place, tokens, tokens // UNROLL * UNROLL


@jit
def _tile_offsets(d, n, D: tl.constexpr, N: tl.constexpr):
    # The clamp keeps every load in bounds, and it hides from the compiler that d is contiguous: else it would spread
    # the states of one channel over four lanes, to load 16 bytes a lane once, and pay for shuffles at every token.
    return tl.minimum(n, N - 1)[None, :] * D + tl.minimum(d, D - 1)[:, None]


@jit
def _load_tile(ptr, d, n, D: tl.constexpr, N: tl.constexpr):
    """(D-block, N-block) of an (N, D) table, zero beyond N."""
    return tl.where((n < N)[None, :], tl.load(ptr + _tile_offsets(d, n, D, N)), 0.0)


@jit
def _load_decays(pack_ptr, d, n, D: tl.constexpr, N: tl.constexpr, HAS: tl.constexpr):
    """q and the delay decay; without one, q again, which nobody reads."""
    q = _load_tile(pack_ptr, d, n, D, N)
    qt = q
    if _DELAY & HAS:
        qt = _load_tile(pack_ptr + 4 * N * D, d, n, D, N)
    return q, qt


@jit
def _store_tile(ptr, value, d, n, D: tl.constexpr, N: tl.constexpr):
    tl.store(ptr + _tile_offsets(d, n, D, N), value, mask=(d < D)[:, None] & (n < N)[None, :])


@jit
def _state_offsets(row, d, n, D: tl.constexpr, N: tl.constexpr):
    # Offsets into (B, D, N); both indices clamped for the reason given in _tile_offsets.
    return row.to(tl.int64) * (D * N) + tl.minimum(d, D - 1)[:, None] * N + tl.minimum(n, N - 1)[None, :]


@jit
def _load_one(ptr, valid, STEP: tl.constexpr, COUNT: tl.constexpr):
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (tl.load(ptr + j * STEP, mask=valid),)
    return values


@jit
def _load_tokens(at, i, valid, D: tl.constexpr, DIRECTION: tl.constexpr, COUNT: tl.constexpr, HAS: tl.constexpr):
    """Everything that COUNT tokens from number i on bring with them, one list after the other; see _pick. at: of
    _chunk."""
    values = _load_one(at[0] + i * (DIRECTION * D), valid, DIRECTION * D, COUNT)
    if _DELAY & HAS:
        values = values + _load_one(at[1] + i * (DIRECTION * D), valid, DIRECTION * D, COUNT)
    if _REAL & HAS:
        values = values + _load_one(at[2] + i * DIRECTION, valid, DIRECTION, COUNT)
    if _RESET & HAS:
        values = values + _load_one(at[3] + i * DIRECTION, valid, DIRECTION, COUNT)
    return values


@jit
def _pick(values, j: tl.constexpr, COUNT: tl.constexpr, HAS: tl.constexpr):
    """x, delayed input, real and reset of token j; what there is not is x again, which nobody reads."""
    x = values[j]
    delayed, real, first = x, x, x
    if _REAL & HAS:
        real = values[(2 if _DELAY & HAS else 1) * COUNT + j] != 0
    if _RESET & HAS:
        first = values[len(values) - COUNT + j] != 0
    x = _float(x, real, HAS)
    if _DELAY & HAS:
        delayed = _float(values[COUNT + j], real, HAS)
    return x, delayed, real, first


@jit
def _float(value, real, HAS: tl.constexpr):
    value = value.to(tl.float32)
    if _REAL & HAS:  # pads may hold NaN, which a product with zero would keep
        value = tl.where(real, value, 0.0)
    return value


@jit
def _drive(x, delayed, qt, HAS: tl.constexpr):
    u = x[:, None]
    if _DELAY & HAS:
        u = u - qt * delayed[:, None]
    return u


@jit
def _advance(z, u, q, real, first, HAS: tl.constexpr):
    kept = z
    if _RESET & HAS:
        kept = tl.where(first, 0.0, kept)
    moved = q * kept + u
    if _REAL & HAS:
        moved = tl.where(real, moved, z)
    return moved


@jit
def _load_grads(grad_ptr, y_ptr, at, valid, STEP: tl.constexpr, COUNT: tl.constexpr, SILU: tl.constexpr):
    values = _load_one(grad_ptr + at * STEP, valid, STEP, COUNT)
    if SILU:
        values = values + _load_one(y_ptr + at * STEP, valid, STEP, COUNT)
    return values


@jit
def _output_grad(values, j: tl.constexpr, real, COUNT: tl.constexpr, HAS: tl.constexpr, SILU: tl.constexpr):
    grad = values[j].to(tl.float32)
    if SILU:
        y = values[COUNT + j].to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-y))
        grad = grad * gate * (1.0 + y * (1.0 - gate))
    if _REAL & HAS:
        grad = tl.where(real, grad, 0.0)
    return grad


@jit
def _power(base, exponent, BITS: tl.constexpr):
    # In float64: rounding of a power grows with the exponent, and the result is applied once a chunk.
    result = base * 0.0 + 1.0
    for bit in tl.static_range(BITS):
        result = tl.where(((exponent >> bit) & 1) != 0, result * base, result)
        base = base * base
    return result.to(tl.float32)


@jit
def _through_chunk(z, span_ptr, q, valid, BITS: tl.constexpr):
    """What a chunk leaves of z: nothing where a segment starts in it, and then no NaN either."""
    span = tl.load(span_ptr, mask=valid, other=0)
    return tl.where(span < 0, 0.0, _power(q, span, BITS) * z)


@kernel(*_VARYING)
def _pack_kernel(
    decay_ptr, input_gain_ptr, output_gain_ptr, delay_decay_ptr, pack_ptr,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, HAS_DELAY: tl.constexpr,
):
    """(D, N) parameters to a (4 or 5, N, D) table: q, output coefficient c, input gain, output gain, delay decay."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N * D
    source = (i % D) * N + i // D
    input_gain = _away_from_zero(tl.load(input_gain_ptr + source, mask=inside, other=1.0))
    output_gain = _away_from_zero(tl.load(output_gain_ptr + source, mask=inside, other=1.0))
    tl.store(pack_ptr + i, tl.load(decay_ptr + source, mask=inside), mask=inside)
    tl.store(pack_ptr + N * D + i, input_gain * output_gain, mask=inside)
    tl.store(pack_ptr + 2 * N * D + i, input_gain, mask=inside)
    tl.store(pack_ptr + 3 * N * D + i, output_gain, mask=inside)
    if HAS_DELAY:
        tl.store(pack_ptr + 4 * N * D + i, tl.load(delay_decay_ptr + source, mask=inside), mask=inside)


@jit
def _chunk_state_block(z, count, cut, values, q, qt, COUNT: tl.constexpr, HAS: tl.constexpr):
    for j in tl.static_range(COUNT):
        x, delayed, real, first = _pick(values, j, COUNT, HAS)
        z = _advance(z, _drive(x, delayed, qt, HAS), q, real, first, HAS)
        if _REAL & HAS:
            count += real.to(tl.int32)
            if _RESET & HAS:
                cut += (real & first).to(tl.int32)
        elif _RESET & HAS:
            count += 1
            cut += first.to(tl.int32)
    return z, count, cut


@kernel(*_VARYING)
def _chunk_state_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, local_ptr, span_ptr, length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DIRECTION: tl.constexpr,
    HAS: tl.constexpr, UNROLL: tl.constexpr,
):
    """z at the end of each chunk when it starts from zero (B, chunks, N, D); the chunk's count of real tokens, -1 if
    a segment starts in it (B, chunks)."""
    chunk_id, d, n, at, place, tokens, whole = _chunk(
        x_ptr, delayed_ptr, real_ptr, reset_ptr, length, chunk, D, BLOCK_D, BLOCK_N, UNROLL, DIRECTION
    )
    # The next tokens are on their way while these are worked on.
    values = _load_tokens(at, 0, whole > 0, D, DIRECTION, UNROLL, HAS)
    q, qt = _load_decays(pack_ptr, d, n, D, N, HAS)
    z = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    count = 0
    cut = 0
    i = 0
    while i < whole:
        following = _load_tokens(at, i + UNROLL, i + UNROLL < whole, D, DIRECTION, UNROLL, HAS)
        z, count, cut = _chunk_state_block(z, count, cut, values, q, qt, UNROLL, HAS)
        values = following
        i += UNROLL
    while i < tokens:
        last = _load_tokens(at, i, i < tokens, D, DIRECTION, 1, HAS)
        z, count, cut = _chunk_state_block(z, count, cut, last, q, qt, 1, HAS)
        i += 1
    _store_tile(local_ptr + chunk_id * (N * D), z, d, n, D, N)
    if (_REAL | _RESET) & HAS:
        if tl.program_id(0) == 0:
            tl.store(span_ptr + chunk_id, tl.where(cut > 0, -1, count))


@jit
def _carry_forward(
    z, local_ptr, entry_ptr, span_ptr, q, power, inside, chunks,
    SIZE: tl.constexpr, UNROLL: tl.constexpr, BITS: tl.constexpr, HAS_SPAN: tl.constexpr,
):
    """Writes the z at the entry of each chunk of a row, beginning with z."""
    first = 0
    while first < chunks:
        locals_ = ()
        for j in tl.static_range(UNROLL):
            where = inside & (first + j < chunks)
            locals_ = locals_ + (tl.load(local_ptr + (first + j) * SIZE, mask=where, other=0.0),)
        for j in tl.static_range(UNROLL):
            tl.store(entry_ptr + (first + j) * SIZE, z, mask=inside & (first + j < chunks))
            if HAS_SPAN:
                z = _through_chunk(z, span_ptr + first + j, q, first + j < chunks, BITS) + locals_[j]
            else:
                z = power * z + locals_[j]
        first += UNROLL


@kernel(*_VARYING)
def _carry_kernel(
    pack_ptr, state_ptr, local_ptr, span_ptr, entry_ptr, chunk, chunks,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, BITS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SPAN: tl.constexpr,
):
    """z at the entry of each chunk (B, chunks, N, D)."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N * D
    local_ptr += row * chunks * (N * D) + i
    entry_ptr += row * chunks * (N * D) + i
    span_ptr += row * chunks
    q = tl.load(pack_ptr + i, mask=inside, other=0.0).to(tl.float64)
    power = _power(q, chunk, BITS)
    z = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        z = tl.load(state_ptr + row * (N * D) + (i % D) * N + i // D, mask=inside, other=0.0)
        z = z / tl.load(pack_ptr + 2 * N * D + i, mask=inside, other=1.0)
    _carry_forward(z, local_ptr, entry_ptr, span_ptr, q, power, inside, chunks, N * D, UNROLL, BITS, HAS_SPAN)


@jit
def _output_block(
    z, values, to, channels,
    STEP: tl.constexpr, COUNT: tl.constexpr, HAS: tl.constexpr, SILU: tl.constexpr, SAVE_Y: tl.constexpr,
):
    q, c, qt, skip, inside = channels
    y_ptr, out_ptr = to
    for j in tl.static_range(COUNT):
        x, delayed, real, first = _pick(values, j, COUNT, HAS)
        z = _advance(z, _drive(x, delayed, qt, HAS), q, real, first, HAS)
        y = tl.sum(c * z, axis=1) + skip * x
        if _REAL & HAS:
            y = tl.where(real, y, 0.0)
        if SAVE_Y:
            tl.store(y_ptr + j * STEP, y.to(y_ptr.dtype.element_ty), mask=inside)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out_ptr + j * STEP, y.to(out_ptr.dtype.element_ty), mask=inside)
    return z


@kernel(*_VARYING)
def _output_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, skip_ptr, state_ptr, entry_ptr, y_ptr, out_ptr, final_ptr,
    length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DIRECTION: tl.constexpr,
    HAS: tl.constexpr, UNROLL: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_STATE: tl.constexpr, HAS_ENTRY: tl.constexpr,
    SILU: tl.constexpr, SAVE_Y: tl.constexpr,
):
    """Outputs of a chunk from its entry state, and the final state from the last chunk."""
    chunk_id, d, n, at, place, tokens, whole = _chunk(
        x_ptr, delayed_ptr, real_ptr, reset_ptr, length, chunk, D, BLOCK_D, BLOCK_N, UNROLL, DIRECTION
    )
    inside = d < D
    column = tl.minimum(d, D - 1)
    STEP: tl.constexpr = DIRECTION * D
    y_ptr += place
    out_ptr += place
    values = _load_tokens(at, 0, whole > 0, D, DIRECTION, UNROLL, HAS)
    q, qt = _load_decays(pack_ptr, d, n, D, N, HAS)
    c = _load_tile(pack_ptr + N * D, d, n, D, N)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + column)
    z = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if HAS_ENTRY:
        z = _load_tile(entry_ptr + chunk_id * (N * D), d, n, D, N)
    elif HAS_STATE:
        gain = tl.load(pack_ptr + 2 * N * D + _tile_offsets(d, n, D, N))
        z = tl.load(state_ptr + _state_offsets(tl.program_id(2), d, n, D, N)) / gain
    channels = (q, c, qt, skip, inside)
    i = 0
    while i < whole:
        following = _load_tokens(at, i + UNROLL, i + UNROLL < whole, D, DIRECTION, UNROLL, HAS)
        to = (y_ptr + i * STEP, out_ptr + i * STEP)
        z = _output_block(z, values, to, channels, STEP, UNROLL, HAS, SILU, SAVE_Y)
        values = following
        i += UNROLL
    while i < tokens:
        last = _load_tokens(at, i, i < tokens, D, DIRECTION, 1, HAS)
        to = (y_ptr + i * STEP, out_ptr + i * STEP)
        z = _output_block(z, last, to, channels, STEP, 1, HAS, SILU, SAVE_Y)
        i += 1
    if tl.program_id(1) == tl.num_programs(1) - 1:
        gain = tl.load(pack_ptr + 2 * N * D + _tile_offsets(d, n, D, N))
        target = final_ptr + _state_offsets(tl.program_id(2), d, n, D, N)
        tl.store(target, gain * z, mask=inside[:, None] & (n < N)[None, :])


@jit
def _adjoint_step(carry, dy, q, real, first, HAS: tl.constexpr, EAGER: tl.constexpr):
    """One token back: the token's adjoint a, and what is carried to the token before it.

    The carry is the a of the token behind, so that a step is one multiply-add. That doesn't do where a token may cut
    it off (pads, resets) or where it comes from a final state and not from a token: then (`EAGER`) the carry is the
    gradient that reaches the state before the token, already multiplied with q.
    """
    if EAGER:
        a = carry + dy[:, None]
        back = q * a
        if _RESET & HAS:
            back = tl.where(first, 0.0, back)
        if _REAL & HAS:
            back = tl.where(real, back, carry)
    else:
        a = q * carry + dy[:, None]
        back = a
    return a, back


@jit
def _adjoint_block(
    carry, product, values, grads, q, qt,
    COUNT: tl.constexpr, HAS: tl.constexpr, SILU: tl.constexpr, EAGER: tl.constexpr,
):
    for j in tl.static_range(COUNT - 1, -1, -1):
        x, delayed, real, first = _pick(values, j, COUNT, HAS)
        dy = _output_grad(grads, j, real, COUNT, HAS, SILU)
        a, carry = _adjoint_step(carry, dy, q, real, first, HAS, EAGER)
        product += _drive(x, delayed, qt, HAS) * a
    return carry, product


@kernel(*_VARYING)
def _adjoint_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, y_ptr, grad_ptr, carry_out_ptr, product_ptr, length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DIRECTION: tl.constexpr,
    HAS: tl.constexpr, UNROLL: tl.constexpr, SILU: tl.constexpr, EAGER: tl.constexpr,
):
    """The chunk's own share of the carry that leaves it at its entry, and sum_t u_t a_t; both (B, chunks, N, D)."""
    chunk_id, d, n, at, place, tokens, whole = _chunk(
        x_ptr, delayed_ptr, real_ptr, reset_ptr, length, chunk, D, BLOCK_D, BLOCK_N, UNROLL, DIRECTION
    )
    STEP: tl.constexpr = DIRECTION * D
    y_ptr += place
    grad_ptr += place
    i = whole - UNROLL
    values = _load_tokens(at, i, i >= 0, D, DIRECTION, UNROLL, HAS)
    grads = _load_grads(grad_ptr, y_ptr, i, i >= 0, STEP, UNROLL, SILU)
    q, qt = _load_decays(pack_ptr, d, n, D, N, HAS)
    carry = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    product = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    k = tokens - 1
    while k >= whole:
        last = _load_tokens(at, k, k >= whole, D, DIRECTION, 1, HAS)
        last_grads = _load_grads(grad_ptr, y_ptr, k, k >= whole, STEP, 1, SILU)
        carry, product = _adjoint_block(carry, product, last, last_grads, q, qt, 1, HAS, SILU, EAGER)
        k -= 1
    while i >= 0:
        following = _load_tokens(at, i - UNROLL, i >= UNROLL, D, DIRECTION, UNROLL, HAS)
        following_grads = _load_grads(grad_ptr, y_ptr, i - UNROLL, i >= UNROLL, STEP, UNROLL, SILU)
        carry, product = _adjoint_block(carry, product, values, grads, q, qt, UNROLL, HAS, SILU, EAGER)
        values = following
        grads = following_grads
        i -= UNROLL
    _store_tile(carry_out_ptr + chunk_id * (N * D), carry, d, n, D, N)
    _store_tile(product_ptr + chunk_id * (N * D), product, d, n, D, N)


@kernel(*_VARYING)
def _carry_adjoint_kernel(
    pack_ptr, state_ptr, local_ptr, span_ptr, carry_out_ptr, product_ptr, final_grad_ptr,
    entry_ptr, carry_in_ptr, gain_grad_ptr, state_grad_ptr, length, chunk, chunks,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, BITS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_FINAL_GRAD: tl.constexpr, HAS_SPAN: tl.constexpr, EAGER: tl.constexpr,
):
    """Entry states again, the carry into the end of each chunk (B, chunks, N, D), the gradients of the initial state
    (B, D, N) and, one sum a row, of the input gain and the output gain (B, 2, N, D)."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N * D
    base = row * chunks * (N * D) + i
    state_offset = row * (N * D) + (i % D) * N + i // D
    span_ptr += row * chunks
    q = tl.load(pack_ptr + i, mask=inside, other=0.0).to(tl.float64)
    input_gain = tl.load(pack_ptr + 2 * N * D + i, mask=inside, other=1.0)
    output_gain = tl.load(pack_ptr + 3 * N * D + i, mask=inside, other=1.0)
    whole_power = _power(q, chunk, BITS)
    last_power = _power(q, length - (chunks - 1) * chunk, BITS)

    z = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        z = tl.load(state_ptr + state_offset, mask=inside, other=0.0) / input_gain
    _carry_forward(
        z, local_ptr + base, entry_ptr + base, span_ptr, q, whole_power, inside, chunks,
        N * D, UNROLL, BITS, HAS_SPAN,
    )
    # Each thread reads back below what it wrote above itself.
    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_FINAL_GRAD:
        carry = tl.load(final_grad_ptr + state_offset, mask=inside, other=0.0) / output_gain
    to_state = q.to(tl.float32)  # what turns a carry into the gradient of a state
    if EAGER:
        to_state = tl.full((BLOCK,), 1.0, tl.float32)
    input_sum = tl.zeros((BLOCK,), tl.float32)
    output_sum = tl.zeros((BLOCK,), tl.float32)
    first = 0
    while first < chunks:
        locals_, entries, carries_out, products = (), (), (), ()
        for j in tl.static_range(UNROLL):
            index = chunks - 1 - first - j
            at = base + index * (N * D)
            where = inside & (index >= 0)
            locals_ = locals_ + (tl.load(local_ptr + at, mask=where, other=0.0),)
            entries = entries + (tl.load(entry_ptr + at, mask=where, other=0.0),)
            carries_out = carries_out + (tl.load(carry_out_ptr + at, mask=where, other=0.0),)
            products = products + (tl.load(product_ptr + at, mask=where, other=0.0),)
        for j in tl.static_range(UNROLL):
            index = chunks - 1 - first - j
            at = base + index * (N * D)
            tl.store(carry_in_ptr + at, carry, mask=inside & (index >= 0))
            input_sum += products[j] + to_state * carry * locals_[j]
            output_sum += products[j] + to_state * carries_out[j] * entries[j]
            if HAS_SPAN:
                passed = _through_chunk(carry, span_ptr + index, q, index >= 0, BITS)
            else:
                passed = tl.where(index == chunks - 1, last_power, whole_power) * carry
            carry = tl.where(index >= 0, passed + carries_out[j], carry)
        first += UNROLL
    tl.store(state_grad_ptr + state_offset, output_gain * to_state * carry, mask=inside)
    tl.store(gain_grad_ptr + row * (2 * N * D) + i, output_gain * input_sum, mask=inside)
    tl.store(gain_grad_ptr + row * (2 * N * D) + N * D + i, input_gain * output_sum, mask=inside)


@jit
def _input_grad_block(
    sums, values, grads, to, channels,
    STEP: tl.constexpr, COUNT: tl.constexpr, HAS: tl.constexpr, SILU: tl.constexpr, EAGER: tl.constexpr,
):
    carry, slope, decay_sum, delay_sum, skip_sum = sums
    q, c, qt, skip, inside = channels
    x_grad_ptr, delayed_grad_ptr = to
    for j in tl.static_range(COUNT - 1, -1, -1):
        x, delayed, real, first = _pick(values, j, COUNT, HAS)
        dy = _output_grad(grads, j, real, COUNT, HAS, SILU)
        a, carry = _adjoint_step(carry, dy, q, real, first, HAS, EAGER)
        decay_sum += _drive(x, delayed, qt, HAS) * slope
        stepped = q * slope + a
        if _RESET & HAS:
            stepped = tl.where(first, 0.0, stepped)
        if _REAL & HAS:
            stepped = tl.where(real, stepped, slope)
        slope = stepped
        skip_sum += dy * x
        x_grad = tl.sum(c * a, axis=1) + skip * dy
        if _REAL & HAS:
            x_grad = tl.where(real, x_grad, 0.0)
        tl.store(x_grad_ptr + j * STEP, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
        if _DELAY & HAS:
            delay_sum += delayed[:, None] * a
            delayed_grad = -tl.sum(c * qt * a, axis=1)
            if _REAL & HAS:
                delayed_grad = tl.where(real, delayed_grad, 0.0)
            tl.store(delayed_grad_ptr + j * STEP, delayed_grad.to(delayed_grad_ptr.dtype.element_ty), mask=inside)
    return carry, slope, decay_sum, delay_sum, skip_sum


@kernel(*_VARYING)
def _input_grad_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, skip_ptr, y_ptr, grad_ptr, entry_ptr, carry_in_ptr,
    x_grad_ptr, delayed_grad_ptr, part_ptr, length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DIRECTION: tl.constexpr,
    HAS: tl.constexpr, UNROLL: tl.constexpr, HAS_SKIP: tl.constexpr, SILU: tl.constexpr, EAGER: tl.constexpr,
):
    """Gradients of x and delayed; a chunk's sums for decay, delay decay and skip (B chunks, N [+ N] + 1, D).

    The gradient of q is sum_t a_t s_{t-1}, adjoints from the right times states from the left. s_{t-1} is linear in
    the inputs before t and the entry state, so one backward sweep does: the slope sum_{t>j} q^(t-1-j) a_t is what
    multiplies input j.
    """
    chunk_id, d, n, at, place, tokens, whole = _chunk(
        x_ptr, delayed_ptr, real_ptr, reset_ptr, length, chunk, D, BLOCK_D, BLOCK_N, UNROLL, DIRECTION
    )
    inside = d < D
    column = tl.minimum(d, D - 1)
    STEP: tl.constexpr = DIRECTION * D
    y_ptr += place
    grad_ptr += place
    x_grad_ptr += place
    delayed_grad_ptr += place
    i = whole - UNROLL
    values = _load_tokens(at, i, i >= 0, D, DIRECTION, UNROLL, HAS)
    grads = _load_grads(grad_ptr, y_ptr, i, i >= 0, STEP, UNROLL, SILU)
    q, qt = _load_decays(pack_ptr, d, n, D, N, HAS)
    c = _load_tile(pack_ptr + N * D, d, n, D, N)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + column)
    channels = (q, c, qt, skip, inside)
    none = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    # Carry, slope, and the sums for decay, delay decay and skip.
    carry = _load_tile(carry_in_ptr + chunk_id * (N * D), d, n, D, N)
    sums = (carry, none, none, none, tl.zeros((BLOCK_D,), tl.float32))
    k = tokens - 1
    while k >= whole:
        last = _load_tokens(at, k, k >= whole, D, DIRECTION, 1, HAS)
        last_grads = _load_grads(grad_ptr, y_ptr, k, k >= whole, STEP, 1, SILU)
        to = (x_grad_ptr + k * STEP, delayed_grad_ptr + k * STEP)
        sums = _input_grad_block(sums, last, last_grads, to, channels, STEP, 1, HAS, SILU, EAGER)
        k -= 1
    while i >= 0:
        following = _load_tokens(at, i - UNROLL, i >= UNROLL, D, DIRECTION, UNROLL, HAS)
        following_grads = _load_grads(grad_ptr, y_ptr, i - UNROLL, i >= UNROLL, STEP, UNROLL, SILU)
        to = (x_grad_ptr + i * STEP, delayed_grad_ptr + i * STEP)
        sums = _input_grad_block(sums, values, grads, to, channels, STEP, UNROLL, HAS, SILU, EAGER)
        values = following
        grads = following_grads
        i -= UNROLL
    _, slope, decay_sum, delay_sum, skip_sum = sums
    input_gain = _load_tile(pack_ptr + 2 * N * D, d, n, D, N)
    output_gain = _load_tile(pack_ptr + 3 * N * D, d, n, D, N)
    entry = _load_tile(entry_ptr + chunk_id * (N * D), d, n, D, N)
    ROWS: tl.constexpr = 2 * N + 1 if _DELAY & HAS else N + 1
    part_ptr += chunk_id * (ROWS * D)
    # Each factor keeps its own gain: with both gains near zero the bare product would overflow.
    _store_tile(part_ptr, c * decay_sum + (input_gain * entry) * (output_gain * slope), d, n, D, N)
    if _DELAY & HAS:
        _store_tile(part_ptr + N * D, -c * delay_sum, d, n, D, N)
    tl.store(part_ptr + (ROWS - 1) * D + column, skip_sum, mask=inside)


@kernel("parts", "batch")
def _parameter_grad_kernel(
    part_ptr, gain_grad_ptr, out_ptr, parts, batch,
    D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):
    """Adds up partial sums: (parts, ROWS, D) and (B, 2, N, D) to a flat buffer of (D, N) blocks, skip (D) last."""
    gains = tl.program_id(1) == 1
    columns = tl.where(gains, 2 * N * D, ROWS * D)
    count = tl.where(gains, batch, parts)
    source = part_ptr
    if gains:
        source = gain_grad_ptr
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    first = 0
    while first < count:
        offsets = (first + p).to(tl.int64)[:, None] * columns + i[None, :]
        total += tl.load(source + offsets, mask=(first + p < count)[:, None] & (i < columns)[None, :], other=0.0)
        first += BLOCK_P
    table_row = i // D + tl.where(gains, 0, 2 * N)  # gains first: input gain, output gain, decay, [delay decay,] skip
    last = tl.where(gains, -1, 2 * N + ROWS - 1)
    target = (table_row // N) * (N * D) + (i % D) * N + table_row % N
    target = tl.where(table_row == last, last * D + i % D, target)
    tl.store(out_ptr + target, tl.sum(total, axis=0), mask=i < columns)


# Parameters that one program takes.
_BLOCK = 512


@kernel("count", "factor")
def _parameters_kernel(delta, alpha, beta, gamma, out, count, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = tl.sigmoid(tl.load(delta + at, mask=inside, other=0.0).to(tl.float32))
    a = tl.sigmoid(tl.load(alpha + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + at, 1 - p * a, mask=inside)
    tl.store(out + count + at, p * tl.load(beta + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
    tl.store(out + 2 * count + at, tl.load(gamma + at, mask=inside, other=0.0).to(tl.float32) * factor, mask=inside)


@kernel("count", "factor")
def _parameters_backward_kernel(
    delta, alpha, beta, decay_grad, input_grad, output_grad, delta_grad, alpha_grad, beta_grad, gamma_grad,
    count, factor, BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = tl.sigmoid(tl.load(delta + at, mask=inside, other=0.0).to(tl.float32))
    a = tl.sigmoid(tl.load(alpha + at, mask=inside, other=0.0).to(tl.float32))
    of_decay = tl.load(decay_grad + at, mask=inside, other=0.0)
    of_input = tl.load(input_grad + at, mask=inside, other=0.0)
    of_output = tl.load(output_grad + at, mask=inside, other=0.0)
    slope = tl.load(beta + at, mask=inside, other=0.0).to(tl.float32) * of_input - a * of_decay
    kind = delta_grad.dtype.element_ty
    tl.store(delta_grad + at, (slope * p * (1 - p)).to(kind), mask=inside)
    tl.store(alpha_grad + at, (-p * of_decay * a * (1 - a)).to(kind), mask=inside)
    tl.store(beta_grad + at, (p * of_input).to(kind), mask=inside)
    tl.store(gamma_grad + at, (of_output * factor).to(kind), mask=inside)


def _entries(pack: Tensor, state: Tensor | None, local: Tensor, span: Tensor | None, chunk: int) -> Tensor:
    """z at the entry of each chunk, (B, chunks, N, D), from what each chunk makes of nothing."""
    batch, chunks, states, width = local.shape
    entry = torch.empty_like(local)
    _carry_kernel(
        (-(-states * width // 128), batch), pack, state, local, pack if span is None else span, entry, chunk, chunks,
        D=width, N=states, BLOCK=128, UNROLL=16, BITS=chunk.bit_length(), HAS_STATE=state is not None,
        HAS_SPAN=span is not None,
    )
    return entry


def _last_state(pack: Tensor, local: Tensor, entry: Tensor, span: Tensor | None, tail: int) -> Tensor:
    """The state (B, D, N) after the last chunk, which has `tail` columns."""
    decay, gain = pack[0].double(), pack[2]
    if span is None:
        kept = (decay**tail).float() * entry[:, -1]
    else:
        count = span[:, -1, None, None]
        kept = (decay ** count.clamp_min(0)).float() * entry[:, -1]
        kept = kept.masked_fill(count < 0, 0)
    return (gain * (kept + local[:, -1])).transpose(1, 2)


class _EmaScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, decay, input_gain, output_gain, skip, real, reset, state, delayed, delay_decay, reverse, silu, relay
    ):
        batch, length, width = x.shape
        states = decay.shape[1]
        chunk = next((chunk for longest, chunk in _CHUNKS if length <= longest), _LONGEST_CHUNK)
        chunks = -(-length // chunk)
        training = any(ctx.needs_input_grad)
        has_span = real is not None or reset is not None
        many = has_span or delayed is not None
        has = sum(bit for bit, given in ((1, delayed), (2, real), (4, reset)) if given is not None)
        shape = {"D": width, "N": states, "BLOCK_D": _BLOCK_D, "BLOCK_N": power_of_two(states, 1)}
        shape |= {"DIRECTION": -1 if reverse else 1, "HAS": has}
        grid = (-(-width // _BLOCK_D), chunks, batch)
        float32 = {"dtype": torch.float32, "device": x.device}
        # The kernels add to these pointers: where one is missing, another stands in for it and is not read.
        tokens = x, x if delayed is None else delayed, x if real is None else real, x if reset is None else reset
        pack = torch.empty(4 if delayed is None else 5, states, width, **float32)
        _pack_kernel(
            (-(-states * width // 256),), decay, input_gain, output_gain, delay_decay, pack, D=width, N=states,
            BLOCK=256, HAS_DELAY=delayed is not None,
        )
        local, entry, span = pack, pack, None
        if chunks > 1 or training or relay is not None:
            local = torch.empty(batch, chunks, states, width, **float32)
            if has_span:
                span = torch.empty(batch, chunks, dtype=torch.int32, device=x.device)
            _chunk_state_kernel(
                grid, *tokens, pack, local, pack if span is None else span, length, chunk, options=_WARPS, **shape,
                UNROLL=_UNROLL["chunk_state"][many],
            )
        if relay is not None:
            tail = length - (chunks - 1) * chunk
            entry = _entries(pack, None, local, span, chunk)
            state = relay.forward(_last_state(pack, local, entry, span, tail)).contiguous()
        if chunks > 1:
            entry = _entries(pack, state, local, span, chunk)
        out = torch.empty_like(x)
        save_y = silu and training
        y = torch.empty_like(x) if save_y else out
        final = torch.empty(batch, width, states, **float32)
        _output_kernel(
            grid, *tokens, pack, skip, state, entry, y, out, final, length, chunk, options=_WARPS, **shape,
            UNROLL=_UNROLL["output"][many], HAS_SKIP=skip is not None, HAS_STATE=state is not None,
            HAS_ENTRY=chunks > 1, SILU=silu, SAVE_Y=save_y,
        )
        if training:
            ctx.save_for_backward(x, skip, state, delayed, real, reset, pack, local, span, y if silu else None)
            ctx.chunk, ctx.shape, ctx.silu, ctx.many, ctx.relay = chunk, shape, silu, many, relay
            ctx.set_materialize_grads(False)
        return out, final

    @first_derivative_only
    def backward(ctx, grad, final_grad):
        x, skip, state, delayed, real, reset, pack, local, span, y = ctx.saved_tensors
        batch, length, width = x.shape
        chunk, shape, silu, many = ctx.chunk, ctx.shape, ctx.silu, ctx.many
        chunks, states = local.shape[1], local.shape[2]
        size = states * width
        rows = (1 if delayed is None else 2) * states + 1
        eager = span is not None or final_grad is not None or ctx.relay is not None
        grid = (-(-width // _BLOCK_D), chunks, batch)
        float32 = {"dtype": torch.float32, "device": x.device}
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        tokens = x, x if delayed is None else delayed, x if real is None else real, x if reset is None else reset
        y_ = x if y is None else y
        carry_out, product, entry, carry_in = torch.empty(4, *local.shape, **float32).unbind()
        _adjoint_kernel(
            grid, *tokens, pack, y_, grad, carry_out, product, length, chunk, options=_WARPS,
            **shape, UNROLL=_UNROLL["adjoint"][many], SILU=silu, EAGER=eager,
        )
        gain_grad = torch.empty(batch, 2, states, width, **float32)
        state_grad = torch.empty(batch, width, states, **float32)

        def carry_adjoints(final_grad: Tensor | None) -> None:
            _carry_adjoint_kernel(
                (-(-size // 128), batch), pack, state, local, pack if span is None else span, carry_out, product,
                None if final_grad is None else final_grad.contiguous(), entry, carry_in, gain_grad, state_grad,
                length, chunk, chunks, D=width, N=states, BLOCK=128, UNROLL=8, BITS=chunk.bit_length(),
                HAS_STATE=state is not None, HAS_FINAL_GRAD=final_grad is not None, HAS_SPAN=span is not None,
                EAGER=eager,
            )

        carry_adjoints(final_grad)
        if ctx.relay is not None:
            # A copy: the second call writes to it again.
            passed_back = ctx.relay.backward(state_grad.clone())
            carry_adjoints(passed_back if final_grad is None else passed_back + final_grad)
        x_grad = torch.empty_like(x)
        delayed_grad = x_grad if delayed is None else torch.empty_like(delayed)
        parts = torch.empty(batch * chunks, rows, width, **float32)
        _input_grad_kernel(
            grid, *tokens, pack, skip, y_, grad, entry, carry_in, x_grad, delayed_grad, parts, length, chunk,
            options=_WARPS, **shape, UNROLL=_UNROLL["input_grad"][many], HAS_SKIP=skip is not None, SILU=silu,
            EAGER=eager,
        )
        sums = torch.empty((2 * states + rows) * width, **float32)
        columns = max(2 * size, rows * width)
        _parameter_grad_kernel(
            (-(-columns // 32), 2), parts, gain_grad, sums, batch * chunks, batch,
            D=width, N=states, ROWS=rows, BLOCK_P=32, BLOCK=32,
        )
        input_gain_grad, output_gain_grad, decay_grad = sums[: 3 * size].view(3, width, states)
        return (
            x_grad, decay_grad, input_gain_grad, output_gain_grad, None if skip is None else sums[-width:], None, None,
            None if state is None or ctx.relay is not None else state_grad, None if delayed is None else delayed_grad,
            None if delayed is None else sums[3 * size : 4 * size].view(width, states), None, None, None,
        )


def ema_scan_triton(
    x: Tensor, decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor | None, *,
    real: Tensor | None = None, reset: Tensor | None = None, state: Tensor | None = None,
    delayed: Tensor | None = None, delay_decay: Tensor | None = None, plan: object = None, need_state: bool = True,
    reverse: bool = False, activation: str | None = None, relay: Any = None,
) -> tuple[Tensor, Tensor]:
    """`ema_scan` on a CUDA device, where x is float32, bfloat16 or float16. x may hold NaN at pads. Arithmetic and
    state are float32 whatever the dtype of x, and results are the same bit for bit in every run. `plan` and
    `need_state` are for the torch twin alone. Gradients reach every float input from both results.

    Args:
        relay: instead of a state, what makes it of the state that these columns reach from nothing, and passes
            gradients back likewise: `forward` takes and gives (B, D, N) float32, `backward` takes the gradient of the
            initial state of the columns alone and gives what adds to that of the last one (see `StateRelay`).
    """
    if x.numel() == 0:
        return x, x.new_zeros(x.shape[0], *decay.shape, dtype=torch.float32) if state is None else state
    real = None if real is None else real.contiguous()
    reset = None if reset is None else reset.contiguous()
    if delayed is not None:
        delayed, delay_decay = delayed.contiguous(), delay_decay.contiguous()
    return _EmaScan.apply(
        x.contiguous(), decay.contiguous(), input_gain.contiguous(), output_gain.contiguous(), skip, real, reset,
        None if state is None else state.contiguous(), delayed, delay_decay, reverse, activation == "silu", relay,
    )


class _EmaParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta, alpha, beta, gamma):
        count, factor = gamma.numel(), gamma.shape[-1] ** -0.5
        out = torch.empty(3, *gamma.shape, dtype=torch.float32, device=gamma.device)
        _parameters_kernel((-(-count // _BLOCK),), delta, alpha, beta, gamma, out, count, factor, BLOCK=_BLOCK)
        ctx.save_for_backward(delta, alpha, beta)
        return out.unbind()

    @first_derivative_only
    def backward(ctx, *grads):
        delta, alpha, beta = ctx.saved_tensors
        count, factor = delta.numel(), delta.shape[-2] ** -0.5
        grads = [grad.contiguous() for grad in grads]
        results = *(torch.empty_like(delta) for _ in range(3)), delta.new_empty(delta.shape[:-1])
        _parameters_backward_kernel(
            (-(-count // _BLOCK),), delta, alpha, beta, *grads, *results, count, factor, BLOCK=_BLOCK
        )
        return results


def ema_parameters_triton(delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`ema_parameters` on a GPU, for parameters of one floating dtype but float64. Gradients for all four."""
    return _EmaParameters.apply(delta.contiguous(), alpha.contiguous(), beta.contiguous(), gamma.contiguous())
