"""Windowed attention with wide values as banded products, in Triton, forward and backward.

Letters: M queries and Mk keys of one flat stream, Z query/key width, V value width.

V is ten times Z, so a kernel that forms the weights again for every slice of V would spend 40 % of its time on q.k.
Here the weights are written once, as a list of dense BLOCK_M x BLOCK_N tiles that holds only the tiles some query sees,
and every wide product (weights.v, grad.v^T, weights^T.grad) is a plain tiled product over that list. The tiles live for
one call; between forward and backward only the row statistics are kept. Within BLOCK_M queries a run of keys starts no
earlier than the first query's and ends no later than the last one's, so a block's tiles are neighbours.

The list is described by int32 arrays ("plan") that the first kernel writes, so that nothing waits for the host:
    first, end (blocks of queries)   tiles of keys that a block sees: first <= tile < end
    base (blocks of queries)         the block's tile j lies at base + j in the list
    low, high (blocks of keys)       blocks of queries that see a tile of keys: low <= block < high
    owner (list)                     the block of queries of a tile in the list
"""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("the Triton kernels need the triton package (pip install triton)") from error

_LOG2_E = 1.4426950408889634
# Fixed-point steps between 0 and the largest bias gradient of one pair: 2^34 of them leave 29 bits for the sum of pairs.
_FIXED_POINT = 2.0**34


class _Blocks(NamedTuple):
    """Tile sizes and launch options. `rows` queries of a block share one program where the weights are formed."""

    m: int
    n: int
    rows: int
    inner: int
    values: int
    weights_warps: int
    product_warps: int
    product_stages: int
    scores_stages: int


_BLOCKS_16BIT = _Blocks(128, 128, 64, 64, 256, 4, 8, 3, 3)
# float32 products run on the ordinary units, where a large tile only costs registers.
_BLOCKS_32BIT = _Blocks(64, 64, 32, 32, 64, 4, 4, 2, 2)


def _blocks_for(dtype: torch.dtype) -> _Blocks:
    return _BLOCKS_32BIT if dtype == torch.float32 else _BLOCKS_16BIT


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _span(key_start, key_end, block, valid, m, mk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First tile of keys of a block of queries, and the tile after its last."""
    start = tl.load(key_start + block * BLOCK_M, mask=valid, other=0)
    end = tl.load(key_end + tl.minimum((block + 1) * BLOCK_M, m) - 1, mask=valid, other=0)
    first = tl.minimum(tl.maximum(start, 0), mk).to(tl.int32) // BLOCK_N
    last = (tl.minimum(tl.maximum(end, 0), mk).to(tl.int32) + BLOCK_N - 1) // BLOCK_N
    return first, tl.maximum(first, last)


@triton.jit
def _fill(target, begin, end, value, CHUNK: tl.constexpr):
    for offset in range(begin, end, CHUNK):
        index = offset + tl.arange(0, CHUNK)
        tl.store(target + index, tl.full((CHUNK,), 0, tl.int32) + value, mask=index < end)


@triton.jit
def _write_plan(
    key_start, key_end, plan, block, base, first, end, m, mk, n_blocks, n_key_blocks, fits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tl.store(plan + block, first)
    tl.store(plan + n_blocks + block, end)
    tl.store(plan + 2 * n_blocks + block, base - first)
    low = plan + 3 * n_blocks
    high = low + n_key_blocks
    owner = high + n_key_blocks
    if fits:
        _fill(owner, base, base + end - first, block, CHUNK)
    _, end_before = _span(key_start, key_end, block - 1, block > 0, m, mk, BLOCK_M, BLOCK_N)
    first_after, _ = _span(key_start, key_end, block + 1, block + 1 < n_blocks, m, mk, BLOCK_M, BLOCK_N)
    # Each tile of keys is claimed by the first block that ends after it, and by the last one that begins at or before it.
    _fill(low, tl.where(block > 0, end_before, 0), end, block, CHUNK)
    if block + 1 < n_blocks:
        _fill(high, first, first_after, block + 1, CHUNK)
    else:
        _fill(low, end, n_key_blocks, n_blocks, CHUNK)
        _fill(high, first, n_key_blocks, n_blocks, CHUNK)
    if block == 0:
        _fill(high, 0, first, 0, CHUNK)


@triton.jit
def _scores(
    q_tile, k_tile, table, q_places, k_places, table_size, table_center, scale, table_factor,
    HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q_tile (rows, Z), k_tile (Z, BLOCK_N) -> float32 scores; for softmax in units of log 2."""
    acc = tl.zeros((q_tile.shape[0], k_tile.shape[1]), tl.float32)
    scores = _dot(q_tile, k_tile, acc, PRECISION) * scale
    if HAS_TABLE:
        entry = table_center + k_places[None, :] - q_places[:, None]
        entry = tl.minimum(tl.maximum(entry, 0), table_size - 1)
        scores += tl.load(table + entry).to(tl.float32) * table_factor
    return scores


@triton.jit
def _load_keys(k, k_place, tile, mk, k_stride, Z, HAS_TABLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr):
    """One tile of keys as (Z, BLOCK_N), their numbers in the stream and their places."""
    z = tl.arange(0, BLOCK_Z)
    local = tl.arange(0, BLOCK_N)
    keys = tile * BLOCK_N + local
    block = k + tl.cast(tile * BLOCK_N, tl.int64) * k_stride
    inside = (keys < mk)[None, :] & (z < Z)[:, None]
    k_tile = tl.load(block + local[None, :] * k_stride + z[:, None], mask=inside, other=0.0)
    places = keys
    if HAS_TABLE:
        places = tl.load(k_place + keys, mask=keys < mk, other=0).to(tl.int32)
    return k_tile, keys, places


@triton.jit
def _load_queries(
    q, key_start, key_end, q_place, row, m, q_stride, Z,
    HAS_TABLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Queries row .. row + ROWS as (ROWS, Z) with their runs of keys and places; past the stream the run is empty."""
    z = tl.arange(0, BLOCK_Z)
    local = tl.arange(0, ROWS)
    rows = row + local
    block = q + row.to(tl.int64) * q_stride
    inside = (rows < m)[:, None] & (z < Z)[None, :]
    q_tile = tl.load(block + local[:, None] * q_stride + z[None, :], mask=inside, other=0.0)
    start = tl.load(key_start + rows, mask=rows < m, other=0).to(tl.int32)
    end = tl.load(key_end + rows, mask=rows < m, other=0).to(tl.int32)
    places = rows
    if HAS_TABLE:
        places = tl.load(q_place + rows, mask=rows < m, other=0).to(tl.int32)
    return q_tile, start, end, places


@triton.jit
def _weights_kernel(
    q, k, key_start, key_end, table, q_place, k_place, weights, row_log, plan,
    m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, table_size, table_center, scale, table_factor, lift,
    Z: tl.constexpr, SOFTMAX: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the plan, the tiles of weights, and for softmax log2 of each row's sum of exponentials."""
    parts: tl.constexpr = BLOCK_M // ROWS
    block = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    base = 0
    for offset in range(0, block, CHUNK):
        others = offset + tl.arange(0, CHUNK)
        firsts, ends = _span(key_start, key_end, others, others < block, m, mk, BLOCK_M, BLOCK_N)
        base += tl.sum(tl.where(others < block, ends - firsts, 0))
    first, end = _span(key_start, key_end, block, block < n_blocks, m, mk, BLOCK_M, BLOCK_N)
    fits = base + end - first <= list_size
    if part == 0:
        _write_plan(
            key_start, key_end, plan, block, base, first, end, m, mk, n_blocks, n_key_blocks, fits,
            BLOCK_M, BLOCK_N, CHUNK,
        )  # fmt: skip
    if fits:
        row = block * BLOCK_M + part * ROWS
        q_tile, start, stop, q_places = _load_queries(
            q, key_start, key_end, q_place, row, m, q_stride, Z, HAS_TABLE, ROWS, BLOCK_Z
        )
        local = tl.arange(0, ROWS)
        log_sum = tl.full((ROWS,), float("inf"), tl.float32)
        if SOFTMAX:
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            for tile in range(first, end):
                k_tile, keys, k_places = _load_keys(k, k_place, tile, mk, k_stride, Z, HAS_TABLE, BLOCK_N, BLOCK_Z)
                scores = _scores(
                    q_tile, k_tile, table, q_places, k_places, table_size, table_center, scale, table_factor,
                    HAS_TABLE, PRECISION,
                )  # fmt: skip
                visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < stop[:, None])
                scores = tl.where(visible, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                # A row that has seen no key yet would subtract -inf from -inf.
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
                top = new_top
            log_sum = tl.where(stop > start, top + tl.log2(total), log_sum)
            tl.store(row_log + row + local, log_sum, mask=row + local < m)
        columns = tl.arange(0, BLOCK_N)
        for tile in range(first, end):
            k_tile, keys, k_places = _load_keys(k, k_place, tile, mk, k_stride, Z, HAS_TABLE, BLOCK_N, BLOCK_Z)
            scores = _scores(
                q_tile, k_tile, table, q_places, k_places, table_size, table_center, scale, table_factor,
                HAS_TABLE, PRECISION,
            )  # fmt: skip
            visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < stop[:, None])
            if SOFTMAX:
                found = tl.where(visible, tl.exp2(scores - log_sum[:, None]), 0.0)
            else:
                positive = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
                found = positive * positive * lift
            place = weights + (tl.cast(base + tile - first, tl.int64) * BLOCK_M + part * ROWS) * BLOCK_N
            tl.store(place + local[:, None] * BLOCK_N + columns[None, :], found.to(weights.dtype.element_ty))


@triton.jit
def _times_rows(
    acc, tiles, x, first, base, steps, column, x_rows, x_columns, x_stride,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_M, WIDTH) += tiles of one block of queries times rows of x (keys, columns)."""
    per_tile: tl.constexpr = BLOCK_N // INNER
    inner = tl.arange(0, INNER)
    if not TMA:
        columns = column + tl.arange(0, WIDTH)
        a_offset = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + inner[None, :]
        x_offset = inner[:, None] * x_stride + columns[None, :]
    for step in range(0, steps):
        a_row = (base + first + step // per_tile) * BLOCK_M
        a_column = (step % per_tile) * INNER
        x_row = first * BLOCK_N + step * INNER
        if TMA:
            a = tiles.load([a_row, a_column])
            b = x.load([x_row, column])
        else:
            a = tl.load(tiles + (tl.cast(a_row, tl.int64) * BLOCK_N + a_column) + a_offset)
            inside = (x_row + inner < x_rows)[:, None] & (columns < x_columns)[None, :]
            b = tl.load(x + tl.cast(x_row, tl.int64) * x_stride + x_offset, mask=inside, other=0.0)
        acc = _dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _times_columns(
    acc, tiles, x, bases, key_block, low, steps, column, x_rows, x_columns, x_stride,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_N, WIDTH) += tiles of one block of keys, transposed, times rows of x (queries, columns)."""
    per_tile: tl.constexpr = BLOCK_M // INNER
    inner = tl.arange(0, INNER)
    if not TMA:
        columns = column + tl.arange(0, WIDTH)
        a_offset = inner[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        x_offset = inner[:, None] * x_stride + columns[None, :]
    for step in range(0, steps):
        block = low + step // per_tile
        part = (step % per_tile) * INNER
        a_row = (tl.load(bases + block) + key_block) * BLOCK_M + part
        x_row = block * BLOCK_M + part
        if TMA:
            a = tiles.load([a_row, 0])
            b = x.load([x_row, column])
        else:
            a = tl.load(tiles + tl.cast(a_row, tl.int64) * BLOCK_N + a_offset)
            inside = (x_row + inner < x_rows)[:, None] & (columns < x_columns)[None, :]
            b = tl.load(x + tl.cast(x_row, tl.int64) * x_stride + x_offset, mask=inside, other=0.0)
        acc = _dot(tl.trans(a), b, acc, PRECISION)
    return acc


@triton.jit
def _list_length(plan, n_blocks):
    return tl.load(plan + 3 * n_blocks - 1) + tl.load(plan + 2 * n_blocks - 1)


@triton.jit
def _values_kernel(
    tiles, v, plan, gate, out, gated, m, mk, n_blocks, list_size, v_stride, gate_stride, lowering,
    V: tl.constexpr, GATE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """out (M, V) = weights . v, and gated = out * gate (or silu(gate)) beside it."""
    block = tl.program_id(0) // SLICES
    column = (tl.program_id(0) % SLICES) * WIDTH
    first = tl.load(plan + block)
    end = tl.load(plan + n_blocks + block)
    base = tl.load(plan + 2 * n_blocks + block)
    fits = _list_length(plan, n_blocks) <= list_size
    steps = tl.where(fits, (end - first) * (BLOCK_N // INNER), 0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    acc = _times_rows(
        acc, tiles, v, first, base, steps, column, mk, V, v_stride,
        TMA, PRECISION, BLOCK_M, BLOCK_N, INNER, WIDTH,
    )  # fmt: skip
    acc = acc * tl.where(fits, lowering, float("nan"))
    local = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, WIDTH)
    row = block * BLOCK_M
    inside = (row + local < m)[:, None] & (columns < V)[None, :]
    offset = local[:, None] * V + columns[None, :]
    found = acc.to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * V + offset, found, mask=inside)
    if GATE != "none":
        gate_offset = local[:, None] * gate_stride + columns[None, :]
        factor = tl.load(gate + row.to(tl.int64) * gate_stride + gate_offset, mask=inside, other=0.0).to(tl.float32)
        if GATE == "silu":
            factor = factor * tl.sigmoid(factor)
        tl.store(gated + row.to(tl.int64) * V + offset, (acc * factor).to(gated.dtype.element_ty), mask=inside)


@triton.jit
def _row_sums_kernel(
    grad, out, gate, grad_out, grad_gate, sums, m, grad_stride, gate_stride, grad_gate_stride,
    V: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums_i = sum over V of grad_out * out; with a gate, first splits grad into those of out and of the gate."""
    local = tl.arange(0, ROWS)
    row = tl.program_id(0) * ROWS
    total = tl.zeros((ROWS,), tl.float32)
    for column in range(0, V, WIDTH):
        columns = column + tl.arange(0, WIDTH)
        inside = (row + local < m)[:, None] & (columns < V)[None, :]
        offset = local[:, None] * V + columns[None, :]
        grad_offset = local[:, None] * grad_stride + columns[None, :]
        incoming = tl.load(grad + row.to(tl.int64) * grad_stride + grad_offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(out + row.to(tl.int64) * V + offset, mask=inside, other=0.0).to(tl.float32)
        if GATE != "none":
            gate_offset = local[:, None] * gate_stride + columns[None, :]
            raw = tl.load(gate + row.to(tl.int64) * gate_stride + gate_offset, mask=inside, other=0.0).to(tl.float32)
            factor = raw
            slope = incoming * value
            if GATE == "silu":
                squash = tl.sigmoid(raw)
                factor = raw * squash
                slope = slope * (squash + factor * (1 - squash))
            place = grad_gate + row.to(tl.int64) * grad_gate_stride + local[:, None] * grad_gate_stride
            tl.store(place + columns[None, :], slope.to(grad_gate.dtype.element_ty), mask=inside)
            incoming = (incoming * factor).to(grad_out.dtype.element_ty)
            tl.store(grad_out + row.to(tl.int64) * V + offset, incoming, mask=inside)
            incoming = incoming.to(tl.float32)
        total += tl.sum(incoming * value, 1)
    tl.store(sums + row + local, total, mask=row + local < m)


@triton.jit
def _score_grads_kernel(
    q, k, v, grad_out, key_start, key_end, table, q_place, k_place, row_log, row_sums, plan, weights, score_grads, top,
    m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, v_stride, grad_stride,
    table_size, table_center, scale, table_factor, lift,
    Z: tl.constexpr, V: tl.constexpr, SOFTMAX: tl.constexpr, HAS_TABLE: tl.constexpr, WANT_TOP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile: the weights again, d loss/d weights = grad_out . v^T, and from both d loss/d scores."""
    item = tl.program_id(0)
    length = _list_length(plan, n_blocks)
    if (item < length) & (length <= list_size):
        block = tl.load(plan + 3 * n_blocks + 2 * n_key_blocks + item)
        tile = item - tl.load(plan + 2 * n_blocks + block)
        row = block * BLOCK_M
        local = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_N)
        q_tile, start, stop, q_places = _load_queries(
            q, key_start, key_end, q_place, row, m, q_stride, Z, HAS_TABLE, BLOCK_M, BLOCK_Z
        )
        k_tile, keys, k_places = _load_keys(k, k_place, tile, mk, k_stride, Z, HAS_TABLE, BLOCK_N, BLOCK_Z)
        scores = _scores(
            q_tile, k_tile, table, q_places, k_places, table_size, table_center, scale, table_factor,
            HAS_TABLE, PRECISION,
        )  # fmt: skip
        visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < stop[:, None])
        # The slope, in 16 bits, waits in registers for the product below; the scores would take twice the room.
        place = item.to(tl.int64) * (BLOCK_M * BLOCK_N) + local[:, None] * BLOCK_N + columns[None, :]
        if SOFTMAX:
            log_sum = tl.load(row_log + row + local, mask=row + local < m, other=float("inf"))
            slope = tl.where(visible, tl.exp2(scores - log_sum[:, None]), 0.0).to(weights.dtype.element_ty)
            tl.store(weights + place, slope)
        else:
            positive = tl.where(visible, tl.maximum(scores, 0.0), 0.0)
            tl.store(weights + place, (positive * positive * lift).to(weights.dtype.element_ty))
            slope = (2 * positive).to(weights.dtype.element_ty)

        inner = tl.arange(0, INNER)
        key = tile * BLOCK_N
        if not TMA:
            grad_offset = local[:, None] * grad_stride + inner[None, :]
            v_offset = columns[None, :] * v_stride + inner[:, None]
            grad_block = grad_out + row.to(tl.int64) * grad_stride
            v_block = v + key.to(tl.int64) * v_stride
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in range(0, V, INNER):
            if TMA:
                a = grad_out.load([row, column])
                b = tl.trans(v.load([key, column]))
            else:
                valid = column + inner < V
                a = tl.load(grad_block + column + grad_offset, mask=(row + local < m)[:, None] & valid[None, :], other=0.0)
                b = tl.load(v_block + column + v_offset, mask=(keys < mk)[None, :] & valid[:, None], other=0.0)
            acc = _dot(a, b, acc, PRECISION)
        if SOFTMAX:
            acc = acc - tl.load(row_sums + row + local, mask=row + local < m, other=0.0)[:, None]
        found = acc * slope.to(tl.float32)
        tl.store(score_grads + place, found.to(score_grads.dtype.element_ty))
        if WANT_TOP:
            # Bit patterns of floats >= 0 order as the floats do, NaN above all.
            tl.atomic_max(top, tl.max(tl.max(tl.abs(found), 1), 0).to(tl.int32, bitcast=True))


@triton.jit
def _value_grads_kernel(
    tiles, grad_out, plan, grad_v, m, mk, n_blocks, n_key_blocks, list_size, grad_stride, lowering,
    V: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    grad_v_stride=None,
):  # fmt: skip
    """grad_v (Mk, V) = weights^T . grad_out."""
    key_block = tl.program_id(0) // SLICES
    column = (tl.program_id(0) % SLICES) * WIDTH
    low = tl.load(plan + 3 * n_blocks + key_block)
    high = tl.load(plan + 3 * n_blocks + n_key_blocks + key_block)
    fits = _list_length(plan, n_blocks) <= list_size
    steps = tl.where(fits, (high - low) * (BLOCK_M // INNER), 0)
    acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    acc = _times_columns(
        acc, tiles, grad_out, plan + 2 * n_blocks, key_block, low, steps, column, m, V, grad_stride,
        TMA, PRECISION, BLOCK_M, BLOCK_N, INNER, WIDTH,
    )  # fmt: skip
    acc = acc * tl.where(fits, lowering, float("nan"))
    local = tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, WIDTH)
    key = key_block * BLOCK_N
    inside = (key + local < mk)[:, None] & (columns < V)[None, :]
    place = grad_v + key.to(tl.int64) * grad_v_stride + local[:, None] * grad_v_stride + columns[None, :]
    tl.store(place, acc.to(grad_v.dtype.element_ty), mask=inside)


@triton.jit
def _query_key_grads_kernel(
    tiles, q, k, plan, grad_q, grad_k, m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, scale,
    Z: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad_q = scale * score_grads . k in the first programs, grad_k = scale * score_grads^T . q in the others."""
    block = tl.program_id(0)
    fits = _list_length(plan, n_blocks) <= list_size
    factor = tl.where(fits, scale, float("nan"))
    columns = tl.arange(0, WIDTH)
    if block < n_blocks:
        first = tl.load(plan + block)
        steps = tl.where(fits, (tl.load(plan + n_blocks + block) - first) * (BLOCK_N // INNER), 0)
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        acc = _times_rows(
            acc, tiles, k, first, tl.load(plan + 2 * n_blocks + block), steps, 0, mk, Z, k_stride,
            False, PRECISION, BLOCK_M, BLOCK_N, INNER, WIDTH,
        )  # fmt: skip
        row = block * BLOCK_M
        local = tl.arange(0, BLOCK_M)
        inside = (row + local < m)[:, None] & (columns < Z)[None, :]
        place = grad_q + row.to(tl.int64) * Z + local[:, None] * Z + columns[None, :]
        tl.store(place, (acc * factor).to(grad_q.dtype.element_ty), mask=inside)
    else:
        block -= n_blocks
        low = tl.load(plan + 3 * n_blocks + block)
        high = tl.load(plan + 3 * n_blocks + n_key_blocks + block)
        steps = tl.where(fits, (high - low) * (BLOCK_M // INNER), 0)
        acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        acc = _times_columns(
            acc, tiles, q, plan + 2 * n_blocks, block, low, steps, 0, m, Z, q_stride,
            False, PRECISION, BLOCK_M, BLOCK_N, INNER, WIDTH,
        )  # fmt: skip
        key = block * BLOCK_N
        local = tl.arange(0, BLOCK_N)
        inside = (key + local < mk)[:, None] & (columns < Z)[None, :]
        place = grad_k + key.to(tl.int64) * Z + local[:, None] * Z + columns[None, :]
        tl.store(place, (acc * factor).to(grad_k.dtype.element_ty), mask=inside)


@triton.jit
def _table_grads_kernel(
    tiles, key_start, key_end, q_place, k_place, plan, top, sums,
    m, mk, n_blocks, n_key_blocks, list_size, table_size, table_center, fixed_point,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds score gradients to their table entries as integers, whose sum does not depend on the order."""
    parts: tl.constexpr = BLOCK_M // ROWS
    item = tl.program_id(0) // parts
    part = (tl.program_id(0) % parts) * ROWS
    length = _list_length(plan, n_blocks)
    if (item < length) & (length <= list_size):
        block = tl.load(plan + 3 * n_blocks + 2 * n_key_blocks + item)
        tile = item - tl.load(plan + 2 * n_blocks + block)
        local = part + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_N)
        rows = block * BLOCK_M + local
        keys = tile * BLOCK_N + columns
        start = tl.load(key_start + rows, mask=rows < m, other=0).to(tl.int32)
        stop = tl.load(key_end + rows, mask=rows < m, other=0).to(tl.int32)
        visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < stop[:, None])
        q_places = tl.load(q_place + rows, mask=rows < m, other=0).to(tl.int32)
        k_places = tl.load(k_place + keys, mask=keys < mk, other=0).to(tl.int32)
        entry = table_center + k_places[None, :] - q_places[:, None]
        entry = tl.minimum(tl.maximum(entry, 0), table_size - 1)
        largest = tl.load(top)
        factor = tl.where(largest > 0, fixed_point / largest, 0.0)
        place = tiles + item.to(tl.int64) * (BLOCK_M * BLOCK_N) + local[:, None] * BLOCK_N + columns[None, :]
        found = tl.load(place).to(tl.float32) * factor
        tl.atomic_add(sums + entry, found.to(tl.int64), mask=visible, sem="relaxed")


class _Call(NamedTuple):
    """What forward and backward share beside tensors."""

    activation: str
    scale: float
    table_center: int
    list_size: int
    lift: float


class _Ranges(NamedTuple):
    key_start: Tensor
    key_end: Tensor
    q_place: Tensor | None
    k_place: Tensor | None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _precision(dtype: torch.dtype) -> str:
    # The interpreter multiplies the bit patterns of bfloat16 as integers.
    return "upcast" if _interpreted() else "ieee" if dtype == torch.float32 else "tf32"


def _width(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _can_describe(*tensors: Tensor) -> bool:
    """Whether the tensor copy engine can read these (rows, columns) tensors: 16-byte rows, Hopper or newer."""
    if not _interpreted() and torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    return all(
        t.element_size() == 2 and t.stride(1) == 1 and t.stride(0) * 2 % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
    )


def _describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [rows, columns])


def _list_bound(m: int, mk: int, longest: int, blocks: _Blocks) -> int:
    """Tiles that m queries with at most `longest` keys each can need; 0 when there is nothing to compute.

    A block spans `longest` keys plus what its runs advance; the advances add up to at most mk over all blocks, and
    rounding to tiles adds less than two a block.
    """
    count = triton.cdiv(m, blocks.m)
    spans = (count * longest + mk) // blocks.n + 2 * count
    return min(spans, count * triton.cdiv(mk, blocks.n))


def _score_arguments(call: _Call, table: Tensor | None) -> tuple[int, int, float, float]:
    factor = _LOG2_E if call.activation == "softmax" else 1.0
    return 0 if table is None else table.numel(), call.table_center, call.scale * factor, factor


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, ranges: _Ranges, call: _Call, gate: Tensor | None, gate_form: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """out, gated (None without a gate), the softmax row statistics and the plan; see `windowed_attention_triton`."""
    (m, z), (mk, width) = q.shape, v.shape
    blocks = _blocks_for(q.dtype)
    n_blocks, n_key_blocks = triton.cdiv(m, blocks.m), triton.cdiv(mk, blocks.n)
    plan = torch.empty(3 * n_blocks + 2 * n_key_blocks + call.list_size, dtype=torch.int32, device=q.device)
    row_log = torch.empty(m if call.activation == "softmax" else 0, dtype=torch.float32, device=q.device)
    weights = torch.empty(call.list_size * blocks.m, blocks.n, dtype=q.dtype, device=q.device)
    precision = _precision(q.dtype)
    _weights_kernel[(n_blocks * (blocks.m // blocks.rows),)](
        q, k, ranges.key_start, ranges.key_end, table, ranges.q_place, ranges.k_place, weights, row_log, plan,
        m, mk, n_blocks, n_key_blocks, call.list_size, q.stride(0), k.stride(0), *_score_arguments(call, table), call.lift,
        Z=z, SOFTMAX=call.activation == "softmax", HAS_TABLE=table is not None, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_Z=_width(z), ROWS=blocks.rows, CHUNK=128,
        num_warps=blocks.weights_warps, num_stages=2,
    )  # fmt: skip
    out = torch.empty(m, width, dtype=v.dtype, device=v.device)
    gated = None if gate is None else torch.empty_like(out)
    columns = min(blocks.values, _width(width))
    slices = triton.cdiv(width, columns)
    described = _can_describe(weights, v)
    _values_kernel[(n_blocks * slices,)](
        _describe(weights, blocks.m, blocks.inner) if described else weights,
        _describe(v, blocks.inner, columns) if described else v,
        plan, gate, out, gated, m, mk, n_blocks, call.list_size, v.stride(0), 0 if gate is None else gate.stride(0),
        1 / call.lift, V=width, GATE=gate_form, TMA=described, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, INNER=blocks.inner, WIDTH=columns, SLICES=slices,
        num_warps=blocks.product_warps, num_stages=blocks.product_stages,
    )  # fmt: skip
    return out, gated, row_log, plan


def row_sums(
    grad: Tensor, out: Tensor, gate: Tensor | None, gate_form: str, grad_gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of the ungated output (M, V) and, in float32, sum over V of it times out; fills grad_gate."""
    m, width = out.shape
    sums = torch.empty(m, dtype=torch.float32, device=out.device)
    grad_out = grad if gate is None else torch.empty_like(out)
    _row_sums_kernel[(triton.cdiv(m, 4),)](
        grad, out, gate, grad_out, grad_gate, sums, m, grad.stride(0), 0 if gate is None else gate.stride(0),
        0 if grad_gate is None else grad_gate.stride(0), V=width, GATE=gate_form, ROWS=4, WIDTH=min(512, _width(width)),
        num_warps=4,
    )  # fmt: skip
    return grad_out, sums


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, ranges: _Ranges, call: _Call,
    row_log: Tensor, sums: Tensor | None, plan: Tensor, grad_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k and the table; fills grad_v (Mk, V), whose rows may lie apart."""
    (m, z), (mk, width) = q.shape, v.shape
    blocks = _blocks_for(q.dtype)
    n_blocks, n_key_blocks = triton.cdiv(m, blocks.m), triton.cdiv(mk, blocks.n)
    weights = torch.empty(call.list_size * blocks.m, blocks.n, dtype=q.dtype, device=q.device)
    score_grads = torch.empty_like(weights)
    top = None if table is None else torch.zeros(1, dtype=torch.int32, device=q.device)
    precision = _precision(q.dtype)
    described = _can_describe(grad_out, v)
    _score_grads_kernel[(call.list_size,)](
        q, k, _describe(v, blocks.n, blocks.inner) if described else v,
        _describe(grad_out, blocks.m, blocks.inner) if described else grad_out,
        ranges.key_start, ranges.key_end, table, ranges.q_place, ranges.k_place, row_log, sums, plan, weights, score_grads, top,
        m, mk, n_blocks, n_key_blocks, call.list_size, q.stride(0), k.stride(0), v.stride(0), grad_out.stride(0),
        *_score_arguments(call, table), call.lift,
        Z=z, V=width, SOFTMAX=call.activation == "softmax", HAS_TABLE=table is not None, WANT_TOP=top is not None,
        TMA=described, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_Z=_width(z), INNER=blocks.inner,
        num_warps=blocks.product_warps, num_stages=blocks.scores_stages,
    )  # fmt: skip
    columns = min(blocks.values, _width(width))
    slices = triton.cdiv(width, columns)
    described = _can_describe(weights, grad_out)
    _value_grads_kernel[(n_key_blocks * slices,)](
        _describe(weights, blocks.inner, blocks.n) if described else weights,
        _describe(grad_out, blocks.inner, columns) if described else grad_out,
        plan, grad_v, m, mk, n_blocks, n_key_blocks, call.list_size, grad_out.stride(0), 1 / call.lift,
        V=width, TMA=described, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, INNER=blocks.inner, WIDTH=columns, SLICES=slices,
        grad_v_stride=grad_v.stride(0), num_warps=blocks.product_warps, num_stages=blocks.product_stages,
    )  # fmt: skip
    grad_q, grad_k = torch.empty(m, z, dtype=q.dtype, device=q.device), torch.empty(mk, z, dtype=k.dtype, device=k.device)
    _query_key_grads_kernel[(n_blocks + n_key_blocks,)](
        score_grads, q, k, plan, grad_q, grad_k, m, mk, n_blocks, n_key_blocks, call.list_size, q.stride(0), k.stride(0),
        call.scale, Z=z, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, INNER=blocks.inner, WIDTH=_width(z),
        num_warps=blocks.product_warps, num_stages=blocks.product_stages,
    )  # fmt: skip
    if table is None:
        return grad_q, grad_k, None
    largest = top.view(torch.float32)
    fixed = torch.zeros(table.numel(), dtype=torch.int64, device=q.device)
    _table_grads_kernel[(call.list_size * (blocks.m // blocks.rows),)](
        score_grads, ranges.key_start, ranges.key_end, ranges.q_place, ranges.k_place, plan, largest, fixed,
        m, mk, n_blocks, n_key_blocks, call.list_size, table.numel(), call.table_center, _FIXED_POINT,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, ROWS=blocks.rows, num_warps=4,
    )  # fmt: skip
    return grad_q, grad_k, (fixed * (largest.double() / _FIXED_POINT)).to(table.dtype)


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, gate, key_start, key_end, q_place, k_place, call):
        ranges = _Ranges(key_start, key_end, q_place, k_place)
        gate_form = "none" if gate is None else "product"
        ctx.call, ctx.gate_form = call, gate_form
        if call.list_size == 0:
            ctx.save_for_backward(q, k, v, table, gate)
            return v.new_zeros(q.shape[0], v.shape[1])
        out, gated, row_log, plan = attention_forward(q, k, v, table, ranges, call, gate, gate_form)
        # relu2 has no row sums, so without a gate its backward does not need the output.
        kept = out if call.activation == "softmax" or gate is not None else None
        ctx.save_for_backward(q, k, v, table, gate, kept, row_log, plan, *ranges)
        return out if gate is None else gated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.call.list_size == 0:
            return *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors), *[None] * 5
        q, k, v, table, gate, out, row_log, plan, *ranges = ctx.saved_tensors
        grad = grad.to(v.dtype).contiguous()
        grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        sums = None
        if out is not None:
            grad, sums = row_sums(grad, out, gate, ctx.gate_form, grad_gate)
        grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        grad_q, grad_k, grad_table = attention_backward(
            grad, q, k, v, table, _Ranges(*ranges), ctx.call, row_log, sums, plan, grad_v
        )
        return grad_q, grad_k, grad_v, grad_table, grad_gate, *[None] * 5


def make_call(
    activation: str, scale: float, bias_center: int, m: int, mk: int, max_keys: int, dtype: torch.dtype
) -> _Call:
    """The numbers that one call's kernels share."""
    # Products of small relu2 scores leave the range of float16; a power of two brings them back and costs nothing.
    lift = 1.0 if activation == "softmax" else 2.0 ** round(-math.log2(scale))
    return _Call(activation, scale, bias_center, _list_bound(m, mk, min(max_keys, mk), _blocks_for(dtype)), lift)


def windowed_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    activation: str,
    scale: float,
    bias_table: Tensor | None = None,
    bias_center: int = 0,
    q_place: Tensor | None = None,
    k_place: Tensor | None = None,
    dropout_p: float = 0.0,
    max_keys: int | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`windowed_attention` on a GPU: out_i = sum over key_start[i] <= j < key_end[i] of weight(scale q_i.k_j + bias) v_j.

    Args:
        q: (M, Z), Z up to 256, rotated already when the positions are rotary; float32, float16 or bfloat16.
        k, v: (Mk, Z) and (Mk, V), of q's dtype. Rows may lie apart (slices of a wider tensor).
        key_start, key_end: (M,) int64, neither decreasing; an empty run gives 0.
        activation: softmax or relu2 (arXiv 2306.11197, section 3.3).
        scale: 1/sqrt(Z) for softmax; 1/W, or 1/(2W) when bidirectional, for relu2.
        bias_table: (T,), or None; the bias is entry clamp(bias_center + k_place[j] - q_place[i], 0, T - 1).
        q_place, k_place: (M,) and (Mk,) int64 below 2^31, with `bias_table`.
        max_keys: a bound on key_end - key_start (W + 1 causal, 2W + 1 bidirectional), which sizes the scratch memory.
            None reads it from the ranges and so waits for the device; a bound that is too small makes the result NaN.
        gate: (M, V) of v's dtype; the result is then multiplied with it.

    Returns:
        (M, V) of v's dtype; gradients for q, k, v, bias_table and gate. The sums, bias_table's included, do not depend
        on the order in which programs run.

    Raises:
        ValueError: dropout, laplace, float64, unequal dtypes or shapes, or Z above 256.
    """
    _check(q, k, v, key_start, key_end, activation, bias_table, q_place, k_place, dropout_p, gate)
    m, mk = q.shape[0], k.shape[0]
    if max_keys is None:
        max_keys = int((key_end - key_start).max()) if m else 0
    call = make_call(activation, scale, bias_center, m, mk, max(max_keys, 0), q.dtype)
    rows = [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, gate)]
    ranges = [None if t is None else t.contiguous() for t in (key_start, key_end, q_place, k_place)]
    table = None if bias_table is None else bias_table.contiguous()
    return _WindowedAttention.apply(*rows[:3], table, rows[3], *ranges, call)


def _check(q, k, v, key_start, key_end, activation, bias_table, q_place, k_place, dropout_p, gate) -> None:
    if dropout_p > 0:
        raise ValueError(f"windowed_attention_triton has no dropout of attention weights, got dropout_p={dropout_p}")
    if activation not in ("softmax", "relu2"):
        raise ValueError(f"windowed_attention_triton takes activation 'softmax' or 'relu2', got {activation!r}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"windowed_attention_triton takes float32, float16 or bfloat16, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v), ("gate", gate)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if q.shape[1] != k.shape[1] or k.shape[0] != v.shape[0]:
        raise ValueError(f"q (M, Z), k (Mk, Z), v (Mk, V) do not fit: {[tuple(t.shape) for t in (q, k, v)]}")
    if q.shape[1] > 256:
        raise ValueError(f"windowed_attention_triton takes a query width up to 256, got {q.shape[1]}")
    if key_start.shape != q.shape[:1] or key_end.shape != q.shape[:1]:
        raise ValueError(f"key_start and key_end must be ({q.shape[0]},), got {[*key_start.shape]}, {[*key_end.shape]}")
    if gate is not None and gate.shape != (q.shape[0], v.shape[1]):
        raise ValueError(f"gate must be {(q.shape[0], v.shape[1])}, got {tuple(gate.shape)}")
    if bias_table is None:
        return
    if bias_table.ndim != 1 or bias_table.numel() == 0:
        raise ValueError(f"bias_table must be (T,) with T > 0, got {tuple(bias_table.shape)}")
    if q_place is None or k_place is None or q_place.shape != q.shape[:1] or k_place.shape != k.shape[:1]:
        raise ValueError("bias_table needs q_place (M,) and k_place (Mk,)")
