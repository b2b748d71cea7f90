"""Triton kernels of the EMA scan (arXiv 2306.11197, section 3.1; damped EMA of Mega), forward and backward.

Letters: B batch, L length, D width, N states of a channel, C tokens of a chunk.

A sequence is cut into chunks that are scanned in parallel. With the gains divided out, a state obeys
z_t = q z_{t-1} + u_t and costs one multiply-add a token, its output y_t = sum_n c z_t (c = input gain x output gain)
a second one:

    1. every chunk's last z when it starts from zero                             _chunk_state_kernel
    2. z at the entry of every chunk, a short scan over chunks                   _carry_kernel
    3. outputs, from the entry states                                            _output_kernel

The backward pass is the same in reverse for the adjoint a_t = q a_{t+1} + dy_t, again with the gain divided out
(_adjoint_kernel, _carry_adjoint_kernel, _input_grad_kernel). Only x, the pre-activation and one state a chunk are
kept. Gradients of parameters are partial sums of programs, added up in a fixed order: nothing here uses atomics, so
that two runs over the same inputs agree bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None


def _jit(function):
    return function if triton is None else triton.jit(function)


# (largest L, C): a chunk depends on the length alone, so that a row is computed alike whatever its batch mates.
# Longer chunks save traffic of chunk states, shorter ones fill the chip at batch 1.
_CHUNKS = ((2048, 64), (16384, 128), (65536, 256), (262144, 512), (1048576, 2048))
_LONGEST_CHUNK = 4096
# One channel a lane: the N states of a channel stay in the registers of one thread, and a warp reads 32 neighbours.
_BLOCK_D = 64
_WARPS = 2
_UNROLL = 8
_ACTIVATIONS = (None, "silu")


def _chunk_length(length: int) -> int:
    for longest, chunk in _CHUNKS:
        if length <= longest:
            return chunk
    return _LONGEST_CHUNK


@_jit
def _away_from_zero(gain):
    # States are carried with the gain divided out; below 1e-16 the difference is lost in float32 rounding of the rest.
    return tl.where(tl.abs(gain) < 1e-16, tl.where(gain < 0, -1e-16, 1e-16), gain)


@_jit
def _tile_offsets(d, n, D: tl.constexpr, N: tl.constexpr):
    # The clamp keeps every load in bounds, and it hides from the compiler that d is contiguous: else it would spread
    # the states of one channel over four lanes, to load 16 bytes a lane once, and pay for shuffles at every token.
    return tl.minimum(n, N - 1)[None, :] * D + tl.minimum(d, D - 1)[:, None]


@_jit
def _load_tile(ptr, d, n, D: tl.constexpr, N: tl.constexpr):
    """(D-block, N-block) of an (N, D) table, zero beyond N."""
    return tl.where((n < N)[None, :], tl.load(ptr + _tile_offsets(d, n, D, N)), 0.0)


@_jit
def _store_tile(ptr, value, d, n, D: tl.constexpr, N: tl.constexpr):
    tl.store(ptr + _tile_offsets(d, n, D, N), value, mask=(d < D)[:, None] & (n < N)[None, :])


@_jit
def _state_offsets(row, d, n, D: tl.constexpr, N: tl.constexpr):
    # Offsets into (B, D, N); both indices clamped for the reason given in _tile_offsets.
    return row.to(tl.int64) * (D * N) + tl.minimum(d, D - 1)[:, None] * N + tl.minimum(n, N - 1)[None, :]


@_jit
def _load_tokens(ptr, STEP: tl.constexpr, COUNT: tl.constexpr):
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (tl.load(ptr + j * STEP),)
    return values


@_jit
def _load_flags(ptr, STEP: tl.constexpr, COUNT: tl.constexpr):
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (tl.load(ptr + j * STEP) != 0,)
    return values


@_jit
def _float(value, real, HAS_REAL: tl.constexpr):
    value = value.to(tl.float32)
    if HAS_REAL:  # pads may hold NaN, which a product with zero would keep
        value = tl.where(real, value, 0.0)
    return value


@_jit
def _drive(x, delayed, qt, HAS_DELAY: tl.constexpr):
    u = x[:, None]
    if HAS_DELAY:
        u = u - qt * delayed[:, None]
    return u


@_jit
def _advance(z, u, q, real, first, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr):
    kept = z
    if HAS_RESET:
        kept = tl.where(first, 0.0, kept)
    moved = q * kept + u
    if HAS_REAL:
        moved = tl.where(real, moved, z)
    return moved


@_jit
def _output_grad(grad, y, real, HAS_REAL: tl.constexpr, SILU: tl.constexpr):
    grad = grad.to(tl.float32)
    if SILU:
        y = y.to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-y))
        grad = grad * gate * (1.0 + y * (1.0 - gate))
    if HAS_REAL:
        grad = tl.where(real, grad, 0.0)
    return grad


@_jit
def _power(base, exponent, BITS: tl.constexpr):
    # In float64: rounding of a power grows with the exponent, and the result is applied once a chunk.
    result = base * 0.0 + 1.0
    for bit in tl.static_range(BITS):
        result = tl.where(((exponent >> bit) & 1) != 0, result * base, result)
        base = base * base
    return result.to(tl.float32)


@_jit
def _chunk_power(span_ptr, q, valid, BITS: tl.constexpr):
    span = tl.load(span_ptr, mask=valid, other=0)
    return tl.where(span < 0, 0.0, _power(q, span, BITS))


@_jit
def _pack_kernel(
    decay_ptr, input_gain_ptr, output_gain_ptr, delay_decay_ptr, pack_ptr,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, HAS_DELAY: tl.constexpr,
):  # fmt: skip
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


@_jit
def _chunk_state_block(
    z, count, cut, x_ptr, delayed_ptr, real_ptr, reset_ptr, q, qt,
    STEP: tl.constexpr, FLAG_STEP: tl.constexpr, COUNT: tl.constexpr,
    HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    xs = _load_tokens(x_ptr, STEP, COUNT)  # all loads are in flight before the first is used
    delays, reals, firsts = xs, xs, xs
    if HAS_DELAY:
        delays = _load_tokens(delayed_ptr, STEP, COUNT)
    if HAS_REAL:
        reals = _load_flags(real_ptr, FLAG_STEP, COUNT)
    if HAS_RESET:
        firsts = _load_flags(reset_ptr, FLAG_STEP, COUNT)
    for j in tl.static_range(COUNT):
        u = _drive(_float(xs[j], reals[j], HAS_REAL), _float(delays[j], reals[j], HAS_REAL), qt, HAS_DELAY)
        z = _advance(z, u, q, reals[j], firsts[j], HAS_REAL, HAS_RESET)
        if HAS_REAL:
            count += reals[j].to(tl.int32)
            if HAS_RESET:
                cut += (reals[j] & firsts[j]).to(tl.int32)
        else:
            count += 1
            if HAS_RESET:
                cut += firsts[j].to(tl.int32)
    return z, count, cut


@_jit
def _chunk_state_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, local_ptr, span_ptr, length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
    REVERSE: tl.constexpr, HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """z at the end of each chunk when it starts from zero (B, chunks, N, D); the chunk's count of real tokens, -1 if
    a segment starts in it (B, chunks)."""
    block, index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = row.to(tl.int64) * tl.num_programs(1) + index
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    STEP: tl.constexpr = -D if REVERSE else D
    FLAG_STEP: tl.constexpr = -1 if REVERSE else 1
    token = row.to(tl.int64) * length + (length - 1 - index * chunk if REVERSE else index * chunk)
    tokens = tl.minimum(chunk, length - index * chunk)
    column = tl.minimum(d, D - 1)
    x_ptr += token * D + column
    delayed_ptr += token * D + column
    q = _load_tile(pack_ptr, d, n, D, N)
    qt = q
    if HAS_DELAY:
        qt = _load_tile(pack_ptr + 4 * N * D, d, n, D, N)
    z = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    count = 0
    cut = 0
    whole = tokens // UNROLL * UNROLL
    i = 0
    while i < whole:
        z, count, cut = _chunk_state_block(
            z, count, cut, x_ptr + i * STEP, delayed_ptr + i * STEP, real_ptr + token + i * FLAG_STEP,
            reset_ptr + token + i * FLAG_STEP, q, qt, STEP, FLAG_STEP, UNROLL, HAS_DELAY, HAS_REAL, HAS_RESET,
        )  # fmt: skip
        i += UNROLL
    while i < tokens:
        z, count, cut = _chunk_state_block(
            z, count, cut, x_ptr + i * STEP, delayed_ptr + i * STEP, real_ptr + token + i * FLAG_STEP,
            reset_ptr + token + i * FLAG_STEP, q, qt, STEP, FLAG_STEP, 1, HAS_DELAY, HAS_REAL, HAS_RESET,
        )  # fmt: skip
        i += 1
    _store_tile(local_ptr + slot * (N * D), z, d, n, D, N)
    if HAS_REAL or HAS_RESET:
        if block == 0:
            tl.store(span_ptr + slot, tl.where(cut > 0, -1, count))


@_jit
def _carry_kernel(
    pack_ptr, state_ptr, local_ptr, span_ptr, entry_ptr, chunk, chunks,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, BITS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SPAN: tl.constexpr,
):  # fmt: skip
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
    first = 0
    while first < chunks:
        locals_ = ()
        for j in tl.static_range(UNROLL):
            where = inside & (first + j < chunks)
            locals_ = locals_ + (tl.load(local_ptr + (first + j) * (N * D), mask=where, other=0.0),)
        for j in tl.static_range(UNROLL):
            tl.store(entry_ptr + (first + j) * (N * D), z, mask=inside & (first + j < chunks))
            if HAS_SPAN:
                power = _chunk_power(span_ptr + first + j, q, first + j < chunks, BITS)
            z = power * z + locals_[j]
        first += UNROLL


@_jit
def _output_block(
    z, x_ptr, delayed_ptr, real_ptr, reset_ptr, y_ptr, out_ptr, q, c, qt, skip, inside,
    STEP: tl.constexpr, FLAG_STEP: tl.constexpr, COUNT: tl.constexpr, HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr,
    HAS_RESET: tl.constexpr, SILU: tl.constexpr, SAVE_Y: tl.constexpr,
):  # fmt: skip
    xs = _load_tokens(x_ptr, STEP, COUNT)
    delays, reals, firsts = xs, xs, xs
    if HAS_DELAY:
        delays = _load_tokens(delayed_ptr, STEP, COUNT)
    if HAS_REAL:
        reals = _load_flags(real_ptr, FLAG_STEP, COUNT)
    if HAS_RESET:
        firsts = _load_flags(reset_ptr, FLAG_STEP, COUNT)
    for j in tl.static_range(COUNT):
        x = _float(xs[j], reals[j], HAS_REAL)
        u = _drive(x, _float(delays[j], reals[j], HAS_REAL), qt, HAS_DELAY)
        z = _advance(z, u, q, reals[j], firsts[j], HAS_REAL, HAS_RESET)
        y = tl.sum(c * z, axis=1) + skip * x
        if HAS_REAL:
            y = tl.where(reals[j], y, 0.0)
        if SAVE_Y:
            tl.store(y_ptr + j * STEP, y.to(y_ptr.dtype.element_ty), mask=inside)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out_ptr + j * STEP, y.to(out_ptr.dtype.element_ty), mask=inside)
    return z


@_jit
def _output_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, skip_ptr, state_ptr, entry_ptr, y_ptr, out_ptr, final_ptr,
    length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
    REVERSE: tl.constexpr, HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_STATE: tl.constexpr, HAS_ENTRY: tl.constexpr, SILU: tl.constexpr, SAVE_Y: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk from its entry state, and the final state from the last chunk."""
    block, index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    inside = d < D
    STEP: tl.constexpr = -D if REVERSE else D
    FLAG_STEP: tl.constexpr = -1 if REVERSE else 1
    token = row.to(tl.int64) * length + (length - 1 - index * chunk if REVERSE else index * chunk)
    tokens = tl.minimum(chunk, length - index * chunk)
    column = tl.minimum(d, D - 1)
    x_ptr += token * D + column
    delayed_ptr += token * D + column
    y_ptr += token * D + column
    out_ptr += token * D + column
    q = _load_tile(pack_ptr, d, n, D, N)
    c = _load_tile(pack_ptr + N * D, d, n, D, N)
    qt = q
    if HAS_DELAY:
        qt = _load_tile(pack_ptr + 4 * N * D, d, n, D, N)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + column)
    z = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if HAS_ENTRY:
        z = _load_tile(entry_ptr + (row.to(tl.int64) * tl.num_programs(1) + index) * (N * D), d, n, D, N)
    elif HAS_STATE:
        gain = tl.load(pack_ptr + 2 * N * D + _tile_offsets(d, n, D, N))
        z = tl.load(state_ptr + _state_offsets(row, d, n, D, N)) / gain
    whole = tokens // UNROLL * UNROLL
    i = 0
    while i < whole:
        z = _output_block(
            z, x_ptr + i * STEP, delayed_ptr + i * STEP, real_ptr + token + i * FLAG_STEP,
            reset_ptr + token + i * FLAG_STEP, y_ptr + i * STEP, out_ptr + i * STEP, q, c, qt, skip, inside,
            STEP, FLAG_STEP, UNROLL, HAS_DELAY, HAS_REAL, HAS_RESET, SILU, SAVE_Y,
        )  # fmt: skip
        i += UNROLL
    while i < tokens:
        z = _output_block(
            z, x_ptr + i * STEP, delayed_ptr + i * STEP, real_ptr + token + i * FLAG_STEP,
            reset_ptr + token + i * FLAG_STEP, y_ptr + i * STEP, out_ptr + i * STEP, q, c, qt, skip, inside,
            STEP, FLAG_STEP, 1, HAS_DELAY, HAS_REAL, HAS_RESET, SILU, SAVE_Y,
        )  # fmt: skip
        i += 1
    if index == tl.num_programs(1) - 1:
        gain = tl.load(pack_ptr + 2 * N * D + _tile_offsets(d, n, D, N))
        tl.store(final_ptr + _state_offsets(row, d, n, D, N), gain * z, mask=inside[:, None] & (n < N)[None, :])


@_jit
def _adjoint_step(carry, dy, q, scale, real, first, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr):
    """One token back: the token's adjoint a, and what is carried to the token before it.

    Without pads and resets the carry is a itself, so that a step is one multiply-add (`scale` is q, or 1 where the
    carry comes from outside of the chunk); otherwise it is the gradient that reaches the state before the token.
    """
    if HAS_REAL or HAS_RESET:
        a = carry + dy[:, None]
        back = q * a
        if HAS_RESET:
            back = tl.where(first, 0.0, back)
        if HAS_REAL:
            back = tl.where(real, back, carry)
    else:
        a = scale * carry + dy[:, None]
        back = a
    return a, back


@_jit
def _adjoint_block(
    carry, product, x_ptr, delayed_ptr, real_ptr, reset_ptr, y_ptr, grad_ptr, q, qt, at_end,
    STEP: tl.constexpr, FLAG_STEP: tl.constexpr, COUNT: tl.constexpr,
    HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    grads = _load_tokens(grad_ptr, STEP, COUNT)
    xs = _load_tokens(x_ptr, STEP, COUNT)
    delays, reals, firsts, ys = xs, xs, xs, xs
    if SILU:
        ys = _load_tokens(y_ptr, STEP, COUNT)
    if HAS_DELAY:
        delays = _load_tokens(delayed_ptr, STEP, COUNT)
    if HAS_REAL:
        reals = _load_flags(real_ptr, FLAG_STEP, COUNT)
    if HAS_RESET:
        firsts = _load_flags(reset_ptr, FLAG_STEP, COUNT)
    for j in tl.static_range(COUNT - 1, -1, -1):
        dy = _output_grad(grads[j], ys[j], reals[j], HAS_REAL, SILU)
        u = _drive(_float(xs[j], reals[j], HAS_REAL), _float(delays[j], reals[j], HAS_REAL), qt, HAS_DELAY)
        scale = q
        if j == COUNT - 1:
            scale = tl.where(at_end, 1.0, q)
        a, carry = _adjoint_step(carry, dy, q, scale, reals[j], firsts[j], HAS_REAL, HAS_RESET)
        product += u * a
    return carry, product


@_jit
def _adjoint_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, y_ptr, grad_ptr, leaving_ptr, product_ptr, length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
    REVERSE: tl.constexpr, HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """The chunk's own share of the gradient that leaves it at its entry, and sum_t u_t a_t; both (B, chunks, N, D)."""
    block, index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = row.to(tl.int64) * tl.num_programs(1) + index
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    STEP: tl.constexpr = -D if REVERSE else D
    FLAG_STEP: tl.constexpr = -1 if REVERSE else 1
    token = row.to(tl.int64) * length + (length - 1 - index * chunk if REVERSE else index * chunk)
    tokens = tl.minimum(chunk, length - index * chunk)
    column = tl.minimum(d, D - 1)
    x_ptr += token * D + column
    delayed_ptr += token * D + column
    y_ptr += token * D + column
    grad_ptr += token * D + column
    q = _load_tile(pack_ptr, d, n, D, N)
    qt = q
    if HAS_DELAY:
        qt = _load_tile(pack_ptr + 4 * N * D, d, n, D, N)
    carry = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    product = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    whole = tokens // UNROLL * UNROLL
    i = tokens
    while i > whole:
        i -= 1
        carry, product = _adjoint_block(
            carry, product, x_ptr + i * STEP, delayed_ptr + i * STEP, real_ptr + token + i * FLAG_STEP,
            reset_ptr + token + i * FLAG_STEP, y_ptr + i * STEP, grad_ptr + i * STEP, q, qt, i == tokens - 1,
            STEP, FLAG_STEP, 1, HAS_DELAY, HAS_REAL, HAS_RESET, SILU,
        )  # fmt: skip
    while i > 0:
        i -= UNROLL
        carry, product = _adjoint_block(
            carry, product, x_ptr + i * STEP, delayed_ptr + i * STEP, real_ptr + token + i * FLAG_STEP,
            reset_ptr + token + i * FLAG_STEP, y_ptr + i * STEP, grad_ptr + i * STEP, q, qt, i + UNROLL == tokens,
            STEP, FLAG_STEP, UNROLL, HAS_DELAY, HAS_REAL, HAS_RESET, SILU,
        )  # fmt: skip
    if not (HAS_REAL or HAS_RESET):
        carry = q * carry
    _store_tile(leaving_ptr + slot * (N * D), carry, d, n, D, N)
    _store_tile(product_ptr + slot * (N * D), product, d, n, D, N)


@_jit
def _carry_adjoint_kernel(
    pack_ptr, state_ptr, local_ptr, span_ptr, leaving_ptr, product_ptr, final_grad_ptr,
    entry_ptr, arriving_ptr, gain_grad_ptr, state_grad_ptr, length, chunk, chunks,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, BITS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_FINAL_GRAD: tl.constexpr, HAS_SPAN: tl.constexpr,
):  # fmt: skip
    """Entry states again, the gradient arriving at the end of each chunk (B, chunks, N, D), the gradients of the
    initial state (B, D, N) and, one sum a row, of the input gain and the output gain (B, 2, N, D)."""
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

    power = whole_power
    z = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        z = tl.load(state_ptr + state_offset, mask=inside, other=0.0) / input_gain
    first = 0
    while first < chunks:
        locals_ = ()
        for j in tl.static_range(UNROLL):
            where = inside & (first + j < chunks)
            locals_ = locals_ + (tl.load(local_ptr + base + (first + j) * (N * D), mask=where, other=0.0),)
        for j in tl.static_range(UNROLL):
            where = inside & (first + j < chunks)
            tl.store(entry_ptr + base + (first + j) * (N * D), z, mask=where)
            if HAS_SPAN:
                power = _chunk_power(span_ptr + first + j, q, first + j < chunks, BITS)
            z = power * z + locals_[j]
        first += UNROLL
    # Each thread reads back below what it wrote above itself.
    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_FINAL_GRAD:
        carry = tl.load(final_grad_ptr + state_offset, mask=inside, other=0.0) / output_gain
    input_sum = tl.zeros((BLOCK,), tl.float32)
    output_sum = tl.zeros((BLOCK,), tl.float32)
    first = 0
    while first < chunks:
        locals_, entries, leavings, products = (), (), (), ()
        for j in tl.static_range(UNROLL):
            index = chunks - 1 - first - j
            at = base + index * (N * D)
            where = inside & (index >= 0)
            locals_ = locals_ + (tl.load(local_ptr + at, mask=where, other=0.0),)
            entries = entries + (tl.load(entry_ptr + at, mask=where, other=0.0),)
            leavings = leavings + (tl.load(leaving_ptr + at, mask=where, other=0.0),)
            products = products + (tl.load(product_ptr + at, mask=where, other=0.0),)
        for j in tl.static_range(UNROLL):
            index = chunks - 1 - first - j
            at = base + index * (N * D)
            tl.store(arriving_ptr + at, carry, mask=inside & (index >= 0))
            input_sum += products[j] + carry * locals_[j]
            output_sum += products[j] + entries[j] * leavings[j]
            if HAS_SPAN:
                power = _chunk_power(span_ptr + index, q, index >= 0, BITS)
            else:
                power = tl.where(index == chunks - 1, last_power, whole_power)
            carry = tl.where(index >= 0, power * carry + leavings[j], carry)
        first += UNROLL
    tl.store(state_grad_ptr + state_offset, output_gain * carry, mask=inside)
    tl.store(gain_grad_ptr + row * (2 * N * D) + i, output_gain * input_sum, mask=inside)
    tl.store(gain_grad_ptr + row * (2 * N * D) + N * D + i, input_gain * output_sum, mask=inside)


@_jit
def _input_grad_block(
    carry, slope, decay_sum, delay_sum, skip_sum, x_ptr, delayed_ptr, real_ptr, reset_ptr, y_ptr, grad_ptr, x_grad_ptr,
    delayed_grad_ptr, q, c, qt, skip, inside, at_end,
    STEP: tl.constexpr, FLAG_STEP: tl.constexpr, COUNT: tl.constexpr,
    HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    grads = _load_tokens(grad_ptr, STEP, COUNT)
    xs = _load_tokens(x_ptr, STEP, COUNT)
    delays, reals, firsts, ys = xs, xs, xs, xs
    if SILU:
        ys = _load_tokens(y_ptr, STEP, COUNT)
    if HAS_DELAY:
        delays = _load_tokens(delayed_ptr, STEP, COUNT)
    if HAS_REAL:
        reals = _load_flags(real_ptr, FLAG_STEP, COUNT)
    if HAS_RESET:
        firsts = _load_flags(reset_ptr, FLAG_STEP, COUNT)
    for j in tl.static_range(COUNT - 1, -1, -1):
        dy = _output_grad(grads[j], ys[j], reals[j], HAS_REAL, SILU)
        x = _float(xs[j], reals[j], HAS_REAL)
        delayed = _float(delays[j], reals[j], HAS_REAL)
        scale = q
        if j == COUNT - 1:
            scale = tl.where(at_end, 1.0, q)
        a, carry = _adjoint_step(carry, dy, q, scale, reals[j], firsts[j], HAS_REAL, HAS_RESET)
        # slope: how the gradient of q by later tokens depends on this token's state; see _input_grad_kernel.
        decay_sum += _drive(x, delayed, qt, HAS_DELAY) * slope
        stepped = q * slope + a
        if HAS_RESET:
            stepped = tl.where(firsts[j], 0.0, stepped)
        if HAS_REAL:
            stepped = tl.where(reals[j], stepped, slope)
        slope = stepped
        skip_sum += dy * x
        x_grad = tl.sum(c * a, axis=1) + skip * dy
        if HAS_REAL:
            x_grad = tl.where(reals[j], x_grad, 0.0)
        tl.store(x_grad_ptr + j * STEP, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
        if HAS_DELAY:
            delay_sum += delayed[:, None] * a
            delayed_grad = -tl.sum(c * qt * a, axis=1)
            if HAS_REAL:
                delayed_grad = tl.where(reals[j], delayed_grad, 0.0)
            tl.store(delayed_grad_ptr + j * STEP, delayed_grad.to(delayed_grad_ptr.dtype.element_ty), mask=inside)
    return carry, slope, decay_sum, delay_sum, skip_sum


@_jit
def _input_grad_kernel(
    x_ptr, delayed_ptr, real_ptr, reset_ptr, pack_ptr, skip_ptr, y_ptr, grad_ptr, entry_ptr, arriving_ptr,
    x_grad_ptr, delayed_grad_ptr, part_ptr, length, chunk,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
    REVERSE: tl.constexpr, HAS_DELAY: tl.constexpr, HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_SKIP: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradients of x and delayed, and one partial sum a chunk for decay, delay decay and skip, (B chunks, N [+ N] + 1, D).

    The gradient of q is sum_t a_t s_{t-1}, adjoints from the right times states from the left. s_{t-1} is linear in
    the inputs before t and the entry state, so one backward sweep does: the slope sum_{t>j} q^(t-1-j) a_t is what
    multiplies input j.
    """
    block, index, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = row.to(tl.int64) * tl.num_programs(1) + index
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    inside = d < D
    STEP: tl.constexpr = -D if REVERSE else D
    FLAG_STEP: tl.constexpr = -1 if REVERSE else 1
    token = row.to(tl.int64) * length + (length - 1 - index * chunk if REVERSE else index * chunk)
    tokens = tl.minimum(chunk, length - index * chunk)
    column = tl.minimum(d, D - 1)
    x_ptr += token * D + column
    delayed_ptr += token * D + column
    y_ptr += token * D + column
    grad_ptr += token * D + column
    x_grad_ptr += token * D + column
    delayed_grad_ptr += token * D + column
    q = _load_tile(pack_ptr, d, n, D, N)
    c = _load_tile(pack_ptr + N * D, d, n, D, N)
    qt = q
    if HAS_DELAY:
        qt = _load_tile(pack_ptr + 4 * N * D, d, n, D, N)
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + column)
    carry = _load_tile(arriving_ptr + slot * (N * D), d, n, D, N)
    slope = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    decay_sum = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    delay_sum = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    skip_sum = tl.zeros((BLOCK_D,), tl.float32)
    whole = tokens // UNROLL * UNROLL
    i = tokens
    while i > whole:
        i -= 1
        carry, slope, decay_sum, delay_sum, skip_sum = _input_grad_block(
            carry, slope, decay_sum, delay_sum, skip_sum, x_ptr + i * STEP, delayed_ptr + i * STEP,
            real_ptr + token + i * FLAG_STEP, reset_ptr + token + i * FLAG_STEP, y_ptr + i * STEP, grad_ptr + i * STEP,
            x_grad_ptr + i * STEP, delayed_grad_ptr + i * STEP, q, c, qt, skip, inside, i == tokens - 1,
            STEP, FLAG_STEP, 1, HAS_DELAY, HAS_REAL, HAS_RESET, SILU,
        )  # fmt: skip
    while i > 0:
        i -= UNROLL
        carry, slope, decay_sum, delay_sum, skip_sum = _input_grad_block(
            carry, slope, decay_sum, delay_sum, skip_sum, x_ptr + i * STEP, delayed_ptr + i * STEP,
            real_ptr + token + i * FLAG_STEP, reset_ptr + token + i * FLAG_STEP, y_ptr + i * STEP, grad_ptr + i * STEP,
            x_grad_ptr + i * STEP, delayed_grad_ptr + i * STEP, q, c, qt, skip, inside, i + UNROLL == tokens,
            STEP, FLAG_STEP, UNROLL, HAS_DELAY, HAS_REAL, HAS_RESET, SILU,
        )  # fmt: skip
    input_gain = _load_tile(pack_ptr + 2 * N * D, d, n, D, N)
    output_gain = _load_tile(pack_ptr + 3 * N * D, d, n, D, N)
    entry = _load_tile(entry_ptr + slot * (N * D), d, n, D, N)
    ROWS: tl.constexpr = 2 * N + 1 if HAS_DELAY else N + 1
    part_ptr += slot * (ROWS * D)
    # Each factor keeps its own gain: with both gains near zero the bare product would overflow.
    _store_tile(part_ptr, c * decay_sum + (input_gain * entry) * (output_gain * slope), d, n, D, N)
    if HAS_DELAY:
        _store_tile(part_ptr + N * D, -c * delay_sum, d, n, D, N)
    tl.store(part_ptr + (ROWS - 1) * D + column, skip_sum, mask=inside)


@_jit
def _parameter_grad_kernel(
    part_ptr, gain_grad_ptr, out_ptr, parts, batch,
    D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


class _EmaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, decay, input_gain, output_gain, skip, real, reset, state, delayed, delay_decay, reverse, silu):
        batch, length, width = x.shape
        states = decay.shape[1]
        chunk = _chunk_length(length)
        chunks = triton.cdiv(length, chunk)
        training = any(ctx.needs_input_grad)
        masked = real is not None or reset is not None
        flags = {"REVERSE": reverse, "HAS_DELAY": delayed is not None, "HAS_REAL": real is not None}
        flags.update(HAS_RESET=reset is not None)
        shape = {"D": width, "N": states, "BLOCK_D": _BLOCK_D, "BLOCK_N": triton.next_power_of_2(states)}
        shape.update(UNROLL=_UNROLL, num_warps=_WARPS)
        grid = (triton.cdiv(width, _BLOCK_D), chunks, batch)
        size = states * width
        scratch = {"dtype": torch.float32, "device": x.device}
        delayed_ = x if delayed is None else delayed
        real_ = x if real is None else real
        reset_ = x if reset is None else reset
        with _device(x):
            pack = torch.empty(4 if delayed is None else 5, states, width, **scratch)
            _pack_kernel[(triton.cdiv(size, 256),)](
                decay, input_gain, output_gain, decay if delay_decay is None else delay_decay, pack,
                D=width, N=states, BLOCK=256, HAS_DELAY=delayed is not None,
            )  # fmt: skip
            local = entry = span = pack
            if chunks > 1 or training:
                local = torch.empty(batch, chunks, states, width, **scratch)
                if masked:
                    span = torch.empty(batch, chunks, dtype=torch.int32, device=x.device)
                _chunk_state_kernel[grid](
                    x, delayed_, real_, reset_, pack, local, span, length, chunk, **shape, **flags
                )
            if chunks > 1:
                entry = torch.empty_like(local)
                _carry_kernel[(triton.cdiv(size, 128), batch)](
                    pack, pack if state is None else state, local, span, entry, chunk, chunks,
                    D=width, N=states, BLOCK=128, UNROLL=8, BITS=chunk.bit_length(),
                    HAS_STATE=state is not None, HAS_SPAN=masked, num_warps=4,
                )  # fmt: skip
            out = torch.empty_like(x)
            y = torch.empty_like(x) if silu and training else out
            final = torch.empty(batch, width, states, **scratch)
            _output_kernel[grid](
                x, delayed_, real_, reset_, pack, pack if skip is None else skip, pack if state is None else state,
                entry, y, out, final, length, chunk, **shape, **flags, HAS_SKIP=skip is not None,
                HAS_STATE=state is not None, HAS_ENTRY=chunks > 1, SILU=silu, SAVE_Y=silu and training,
            )  # fmt: skip
        if training:
            ctx.save_for_backward(
                x, skip, state, delayed, real, reset, pack, local, span if masked else None, y if silu else None
            )
            ctx.chunk, ctx.shape, ctx.flags, ctx.silu = chunk, shape, flags, silu
            ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, final_grad):
        x, skip, state, delayed, real, reset, pack, local, span, y = ctx.saved_tensors
        shape, flags = ctx.shape, ctx.flags
        batch, length, width = x.shape
        chunks, states = local.shape[1], local.shape[2]
        size = states * width
        grid = (triton.cdiv(width, _BLOCK_D), chunks, batch)
        scratch = {"dtype": torch.float32, "device": x.device}
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        final_grad = None if final_grad is None else final_grad.contiguous()
        rows = (1 if delayed is None else 2) * states + 1
        delayed_ = x if delayed is None else delayed
        real_ = x if real is None else real
        reset_ = x if reset is None else reset
        y_ = x if y is None else y
        with _device(x):
            leaving, product, entry, arriving = (torch.empty_like(local) for _ in range(4))
            _adjoint_kernel[grid](
                x, delayed_, real_, reset_, pack, y_, grad, leaving, product, length, ctx.chunk,
                **shape, **flags, SILU=ctx.silu,
            )  # fmt: skip
            gain_grad = torch.empty(batch, 2, states, width, **scratch)
            state_grad = torch.empty(batch, width, states, **scratch)
            _carry_adjoint_kernel[(triton.cdiv(size, 128), batch)](
                pack, pack if state is None else state, local, pack if span is None else span, leaving, product,
                pack if final_grad is None else final_grad, entry, arriving, gain_grad, state_grad,
                length, ctx.chunk, chunks, D=width, N=states, BLOCK=128, UNROLL=4, BITS=ctx.chunk.bit_length(),
                HAS_STATE=state is not None, HAS_FINAL_GRAD=final_grad is not None, HAS_SPAN=span is not None,
                num_warps=4,
            )  # fmt: skip
            x_grad = torch.empty_like(x)
            delayed_grad = x_grad if delayed is None else torch.empty_like(delayed)
            parts = torch.empty(batch * chunks, rows, width, **scratch)
            _input_grad_kernel[grid](
                x, delayed_, real_, reset_, pack, pack if skip is None else skip, y_, grad, entry, arriving,
                x_grad, delayed_grad, parts, length, ctx.chunk,
                **shape, **flags, HAS_SKIP=skip is not None, SILU=ctx.silu,
            )  # fmt: skip
            sums = torch.empty((2 * states + rows) * width, **scratch)
            columns = max(2 * size, rows * width)
            _parameter_grad_kernel[(triton.cdiv(columns, 32), 2)](
                parts, gain_grad, sums, batch * chunks, batch, D=width, N=states, ROWS=rows, BLOCK_P=32, BLOCK=32
            )
        input_gain_grad, output_gain_grad, decay_grad = sums[: 3 * size].view(3, width, states)
        return (
            x_grad,
            decay_grad,
            input_gain_grad,
            output_gain_grad,
            None if skip is None else sums[-width:],
            None,
            None,
            None if state is None else state_grad,
            None if delayed is None else delayed_grad,
            None if delayed is None else sums[3 * size : 4 * size].view(width, states),
            None,
            None,
        )


def _device(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _expect(name: str, tensor: torch.Tensor, shape: tuple, dtypes: tuple, like: torch.Tensor) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"ema_scan_triton: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"ema_scan_triton: {name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != like.device:
        raise ValueError(f"ema_scan_triton: {name} is on {tensor.device} but x is on {like.device}")
    return tensor.contiguous()


def ema_scan_triton(
    x: torch.Tensor,
    decay: torch.Tensor,
    input_gain: torch.Tensor,
    output_gain: torch.Tensor,
    skip: torch.Tensor | None,
    *,
    real: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    delayed: torch.Tensor | None = None,
    delay_decay: torch.Tensor | None = None,
    reverse: bool = False,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-dimensional damped EMA as a recurrence (arXiv 2306.11197, section 3.1), on a CUDA device.

    At a real token: s_t = (0 if reset_t else decay s_{t-1}) + input_gain (x_t - delay_decay delayed_t) and
    y_t = sum_n output_gain s_t + skip x_t. At a pad the state stands still, x is ignored (it may hold NaN), y_t = 0.
    Arithmetic and state are float32 whatever the dtype of x. Results are the same bit for bit in every run.

    Args:
        x: (B, L, D), float32, bfloat16 or float16.
        decay, input_gain, output_gain: (D, N) float32: q, p beta and gamma / sqrt(N). 0 <= decay <= 1.
        skip: (D,) float32, omega; None for 0.
        real: (B, L) bool, False at pads; None if there are none.
        reset: (B, L) bool, True where a segment starts; read at real tokens only.
        state: (B, D, N) float32, the state before the first token; None for 0.
        delayed: (B, L, D) in the dtype of x, the input T real tokens earlier, for a kernel cut to T taps.
        delay_decay: (D, N) float32, decay ** T; goes with `delayed`.
        reverse: scan from the last column to the first; `reset` then marks the token at which the reversed scan
            starts anew, and the final state is the one after the first column.
        activation: None, or "silu" to return silu(y).

    Returns:
        y (B, L, D) in the dtype of x, final state (B, D, N) float32. Gradients reach every float input from both.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit, by name.
        RuntimeError: Triton is missing, or x is not on a CUDA device.
    """
    if triton is None:
        raise RuntimeError("ema_scan_triton needs the triton package; use ema_scan instead")
    if not x.is_cuda and isinstance(_output_kernel, triton.JITFunction):
        raise RuntimeError(f"ema_scan_triton needs a CUDA device, x is on {x.device}; use ema_scan instead")
    if x.dim() != 3:
        raise ValueError(f"ema_scan_triton: x has shape {tuple(x.shape)}, expected (B, L, D)")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"ema_scan_triton: activation {activation!r} is none of {_ACTIVATIONS}")
    if (delayed is None) != (delay_decay is None):
        raise ValueError("ema_scan_triton: delayed and delay_decay go together, one of them is None")
    batch, length, width = x.shape
    single, table = (torch.float32,), (width, decay.shape[-1])
    x = _expect("x", x, (batch, length, width), (torch.float32, torch.bfloat16, torch.float16), x)
    decay = _expect("decay", decay, table, single, x)
    input_gain = _expect("input_gain", input_gain, table, single, x)
    output_gain = _expect("output_gain", output_gain, table, single, x)
    if skip is not None:
        skip = _expect("skip", skip, (width,), single, x)
    if real is not None:
        real = _expect("real", real, (batch, length), (torch.bool,), x).view(torch.uint8)
    if reset is not None:
        reset = _expect("reset", reset, (batch, length), (torch.bool,), x).view(torch.uint8)
    if state is not None:
        state = _expect("state", state, (batch, width, table[1]), single, x)
    if delayed is not None:
        delayed = _expect("delayed", delayed, (batch, length, width), (x.dtype,), x)
        delay_decay = _expect("delay_decay", delay_decay, table, single, x)
    if x.numel() == 0:
        return x, x.new_zeros(batch, *table, dtype=torch.float32) if state is None else state
    silu = activation == "silu"
    return _EmaScan.apply(
        x, decay, input_gain, output_gain, skip, real, reset, state, delayed, delay_decay, reverse, silu
    )
