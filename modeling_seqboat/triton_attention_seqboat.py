"""Windowed attention with wide values as banded products, in Triton, forward and backward.

Letters: M queries and Mk keys of one flat stream, Z query/key width, V value width.

V is ten times Z, so a kernel that formed the weights again for every slice of V would spend 40 % of its time on q.k.
Here the weights are written once, as a list of dense BLOCK_M x BLOCK_N tiles, only those that some query sees, and
every wide product (weights.v, grad.v^T, weights^T.grad) is a plain tiled product over that list:

    forward     weights_kernel      the list, and where its tiles lie
                values_kernel       out = weights . v, times the gate
    backward    row_sums_kernel     sum over V of grad * out, and the gate's gradient
                score_grads_kernel  the weights again, and d loss/d scores from grad . v^T
                input_grads_kernel  gradients of v, k and q
                table_grads_kernel  gradient of the bias table

The list lives for one call: 34 MB at 16,384 queries and W = 1,024. Between forward and backward only row statistics
are kept. No sum depends on the order in which programs run, and nothing waits for the host: where the tiles lie is
told by int32 arrays ("plan") that the first kernel writes.
    first, end (blocks of queries)   tiles of keys that a block sees: first <= tile < end
    base (blocks of queries)         the block's tile j lies at base + j in the list
    low, high (blocks of keys)       blocks of queries that see a tile of keys: low <= block < high
    owner (list)                     the block of queries of a tile in the list
Both ends of the runs of keys never decrease, so a block of queries spans from its first query's start to its last
one's end, and both maps are runs. Where the list turns out too small, results are NaN and no memory is touched beyond
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .triton_launch_seqboat import first_derivative_only, interpreted, jit, kernel, power_of_two, tl

_LOG2_E = 1.4426950408889634
# Fixed-point steps between 0 and the largest gradient of one pair's bias, which leaves 29 bits for the sum of pairs.
_FIXED_POINT = 2.0**34
# Tables that programs add to in turn, and entries of all of them together.
_MOST_COPIES, _COPIED_ENTRIES = 64, 2**17
# How far, in powers of two, a score may exceed those of its row's first tile before the row is computed again: the
# sums and products are float32, but the weights must fit their own type.
_RISE = {torch.float16: 14.0, torch.bfloat16: 64.0, torch.float32: 64.0}


@dataclass(frozen=True)
class _Blocks:
    """Tile sizes, and each kernel's launch options. `rows` queries share one program where the weights are formed."""

    m: int
    n: int
    rows: int
    inner: int
    values: int
    options: dict[str, dict[str, int]]


# Two programs of 128 columns share an SM: while one reads the gate and stores, the other multiplies.
_BLOCKS_16BIT = _Blocks(m=128, n=128, rows=64, inner=64, values=128, options={
    "weights": {"num_warps": 4, "num_stages": 2},
    "values": {"num_warps": 8, "num_stages": 3},
    "score_grads": {"num_warps": 8, "num_stages": 3, "maxnreg": 128},
    "input_grads": {"num_warps": 8, "num_stages": 3},
})
# float32 products run on the ordinary units, where a large tile only costs registers.
_BLOCKS_32BIT = _Blocks(m=64, n=64, rows=32, inner=32, values=64, options=dict.fromkeys(
    _BLOCKS_16BIT.options, {"num_warps": 4, "num_stages": 2}
))
# How products are formed. The interpreter multiplies the bit patterns of bfloat16 as integers.
_PRECISION = {torch.float32: "ieee", torch.float16: "tf32", torch.bfloat16: "tf32"}
if interpreted():
    _PRECISION = dict.fromkeys(_PRECISION, "upcast")
# Each block of queries adds up the tiles of all blocks before it; beyond this many blocks in larger bites.
_MANY_BLOCKS = 512


class AttentionRanges(NamedTuple):
    """What each query sees: key_start, key_end (M,) and, with a bias table, q_place (M,) and k_place (Mk,), int64."""

    key_start: Tensor
    key_end: Tensor
    q_place: Tensor | None
    k_place: Tensor | None


class AttentionCall(NamedTuple):
    """What forward and backward share beside tensors. `list_size` 0: there is nothing to compute."""

    activation: str
    scale: float
    table_center: int
    list_size: int
    upscale: float


def _score_arguments(call: AttentionCall, table: Tensor | None) -> tuple[int, int, float, float]:
    factor = _LOG2_E if call.activation == "softmax" else 1.0
    return 0 if table is None else table.shape[0], call.table_center, call.scale * factor, factor


@jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def _span(key_start, key_end, block, valid, m, mk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First tile of keys of a block of queries, and the tile after its last."""
    start = tl.load(key_start + block * BLOCK_M, mask=valid, other=0)
    end = tl.load(key_end + tl.minimum((block + 1) * BLOCK_M, m) - 1, mask=valid, other=0)
    first = tl.minimum(tl.maximum(start, 0), mk).to(tl.int32) // BLOCK_N
    last = (tl.minimum(tl.maximum(end, 0), mk).to(tl.int32) + BLOCK_N - 1) // BLOCK_N
    return first, tl.maximum(first, last)


@jit
def _fill(target, begin, end, value, CHUNK: tl.constexpr):
    for offset in range(begin, end, CHUNK):
        index = offset + tl.arange(0, CHUNK)
        tl.store(target + index, tl.full((CHUNK,), 0, tl.int32) + value, mask=index < end)


@jit
def _write_plan(
    key_start, key_end, plan, block, base, first, end, m, mk, n_blocks, n_key_blocks, fits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):
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
    # A tile of keys is claimed by the first block that ends after it, and by the last one that begins no later.
    _fill(low, tl.where(block > 0, end_before, 0), end, block, CHUNK)
    if block + 1 < n_blocks:
        _fill(high, first, first_after, block + 1, CHUNK)
    else:
        _fill(low, end, n_key_blocks, n_blocks, CHUNK)
        _fill(high, first, n_key_blocks, n_blocks, CHUNK)
    if block == 0:
        _fill(high, 0, first, 0, CHUNK)


@jit
def _visible(keys, start, length):
    """(rows, keys): start <= key < start + length, as one unsigned comparison."""
    return (keys[None, :] - start[:, None]).to(tl.uint32, bitcast=True) < length[:, None].to(tl.uint32, bitcast=True)


@jit
def _load_queries(
    q, key_start, key_end, q_place, row, m, q_stride, Z,
    HAS_TABLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_Z: tl.constexpr,
):
    """Queries row .. row + ROWS as (ROWS, Z), where their runs of keys start, how long they are (0 past the end),
    places."""
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
    return q_tile, start, tl.maximum(end - start, 0), places


@jit
def _tile_scores(
    queries, tile, k, k_place, table, numbers, Z: tl.constexpr, HIDDEN: tl.constexpr, HAS_TABLE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr,
):
    """float32 scores of a tile, for softmax in units of log 2, HIDDEN where a query does not see the key. queries: of
    `_load_queries`; numbers: mk, k_stride, table_size, table_center, scale, table_factor."""
    q_tile, start, length, q_places = queries
    mk, k_stride, table_size, table_center, scale, table_factor = numbers
    z = tl.arange(0, BLOCK_Z)
    local = tl.arange(0, BLOCK_N)
    keys = tile * BLOCK_N + local
    block = k + tl.cast(tile * BLOCK_N, tl.int64) * k_stride
    inside = (keys < mk)[None, :] & (z < Z)[:, None]
    k_tile = tl.load(block + local[None, :] * k_stride + z[:, None], mask=inside, other=0.0)
    k_places = keys
    if HAS_TABLE:
        k_places = tl.load(k_place + keys, mask=keys < mk, other=0).to(tl.int32)
    scores = _dot(q_tile, k_tile, tl.zeros((q_tile.shape[0], BLOCK_N), tl.float32), PRECISION) * scale
    if HAS_TABLE:
        entry = table_center + k_places[None, :] - q_places[:, None]
        entry = tl.minimum(tl.maximum(entry, 0), table_size - 1)
        scores += tl.load(table + entry).to(tl.float32) * table_factor
    return tl.where(_visible(keys, start, length), scores, HIDDEN)


@kernel("m", "mk", "n_blocks", "n_key_blocks", "list_size", "table_size", "table_center")
def _weights_kernel(
    q, k, key_start, key_end, table, q_place, k_place, weights, row_stats, plan,
    m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, table_size, table_center, scale, table_factor,
    upscale,
    Z: tl.constexpr, SOFTMAX: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr, RISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):
    """Writes the plan and the tiles of weights; for softmax not yet divided by their sum.

    row_stats (2, M) for softmax: log2 of each row's sum of exponentials, and what the row's tiles are to be multiplied
    with. Exponentials are taken relative to the row's largest score in its first tile, which saves a pass to find the
    largest of all; a row that later rises by more than RISE (in powers of two) is written again.
    """
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
        )
    if fits:
        row = block * BLOCK_M + part * ROWS
        local = tl.arange(0, ROWS)
        queries = _load_queries(q, key_start, key_end, q_place, row, m, q_stride, Z, HAS_TABLE, ROWS, BLOCK_Z)
        length = queries[2]
        numbers = (mk, k_stride, table_size, table_center, scale, table_factor)
        tile_offset = local[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        place = weights + (tl.cast(base - first, tl.int64) * BLOCK_M + part * ROWS) * BLOCK_N
        if SOFTMAX:
            reference = tl.full((ROWS,), float("-inf"), tl.float32)
            top = reference
            total = tl.zeros((ROWS,), tl.float32)
            for tile in range(first, end):
                scores = _tile_scores(
                    queries, tile, k, k_place, table, numbers, Z, float("-inf"), HAS_TABLE, PRECISION, BLOCK_N, BLOCK_Z
                )
                highest = tl.max(scores, 1)
                top = tl.maximum(top, highest)
                reference = tl.where(reference == float("-inf"), highest, reference)
                # A row that has seen no key yet would subtract -inf from -inf.
                shift = tl.where(reference == float("-inf"), 0.0, reference)
                found = tl.exp2(scores - shift[:, None])
                total += tl.sum(found, 1)
                target = place + tl.cast(tile, tl.int64) * (BLOCK_M * BLOCK_N)
                tl.store(target + tile_offset, found.to(weights.dtype.element_ty))
            seen = reference > float("-inf")
            if tl.max(tl.where(seen, top - reference, 0.0), 0) > RISE:
                reference = top
                total = tl.zeros((ROWS,), tl.float32)
                shift = tl.where(seen, reference, 0.0)
                for tile in range(first, end):
                    scores = _tile_scores(
                        queries, tile, k, k_place, table, numbers, Z, float("-inf"), HAS_TABLE, PRECISION,
                        BLOCK_N, BLOCK_Z,
                    )
                    found = tl.exp2(scores - shift[:, None])
                    total += tl.sum(found, 1)
                    target = place + tl.cast(tile, tl.int64) * (BLOCK_M * BLOCK_N)
                    tl.store(target + tile_offset, found.to(weights.dtype.element_ty))
            # An empty row: weights 2^(score - inf) = 0 in backward.
            total = tl.where(length > 0, total, 1.0)
            log_sum = tl.where(length > 0, reference + tl.log2(total), float("inf"))
            tl.store(row_stats + row + local, log_sum, mask=row + local < m)
            tl.store(row_stats + m + row + local, 1.0 / total, mask=row + local < m)
        else:
            for tile in range(first, end):
                scores = _tile_scores(
                    queries, tile, k, k_place, table, numbers, Z, 0.0, HAS_TABLE, PRECISION, BLOCK_N, BLOCK_Z
                )
                positive = tl.maximum(scores, 0.0)
                target = place + tl.cast(tile, tl.int64) * (BLOCK_M * BLOCK_N)
                tl.store(target + tile_offset, (positive * positive * upscale).to(weights.dtype.element_ty))


@jit
def _times_rows(
    acc, tiles, x, first, base, steps, column, x_rows, x_columns, x_stride, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):
    """acc (BLOCK_M, WIDTH) += tiles of one block of queries times rows of x (keys, columns)."""
    per_tile: tl.constexpr = BLOCK_N // INNER
    inner = tl.arange(0, INNER)
    columns = column + tl.arange(0, WIDTH)
    a_offset = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + inner[None, :]
    x_offset = inner[:, None] * x_stride + columns[None, :]
    for step in range(0, steps):
        a_row = (base + first + step // per_tile) * BLOCK_M
        a_column = (step % per_tile) * INNER
        x_row = first * BLOCK_N + step * INNER
        a = tl.load(tiles + (tl.cast(a_row, tl.int64) * BLOCK_N + a_column) + a_offset)
        inside = (x_row + inner < x_rows)[:, None] & (columns < x_columns)[None, :]
        b = tl.load(x + tl.cast(x_row, tl.int64) * x_stride + x_offset, mask=inside, other=0.0)
        acc = _dot(a, b, acc, PRECISION)
    return acc


@jit
def _times_columns(
    acc, tiles, x, bases, key_block, low, steps, column, x_rows, x_columns, x_stride, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):
    """acc (BLOCK_N, WIDTH) += tiles of one block of keys, transposed, times rows of x (queries, columns)."""
    per_tile: tl.constexpr = BLOCK_M // INNER
    inner = tl.arange(0, INNER)
    columns = column + tl.arange(0, WIDTH)
    a_offset = inner[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    x_offset = inner[:, None] * x_stride + columns[None, :]
    # Read one step ahead: a load whose address is loaded in the same step would halve the depth of the pipeline.
    base = tl.load(bases + low)
    for step in range(0, steps):
        block = low + step // per_tile
        part = (step % per_tile) * INNER
        a_row = (base + key_block) * BLOCK_M + part
        x_row = block * BLOCK_M + part
        a = tl.load(tiles + tl.cast(a_row, tl.int64) * BLOCK_N + a_offset)
        inside = (x_row + inner < x_rows)[:, None] & (columns < x_columns)[None, :]
        b = tl.load(x + tl.cast(x_row, tl.int64) * x_stride + x_offset, mask=inside, other=0.0)
        acc = _dot(tl.trans(a), b, acc, PRECISION)
        base = tl.load(bases + low + (step + 1) // per_tile)
    return acc


@jit
def _list_length(plan, n_blocks):
    return tl.load(plan + 3 * n_blocks - 1) + tl.load(plan + 2 * n_blocks - 1)


@jit
def _column_halves(x):
    """(rows, 2C) -> its left and right (rows, C): an epilogue on halves needs half the registers beside the result."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@jit
def _store_values(
    acc, to, row, column, V: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):
    gate, out, gated, m, gate_stride = to
    local = tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, WIDTH)
    inside = (row + local < m)[:, None] & (columns < V)[None, :]
    offset = local[:, None] * V + columns[None, :]
    tl.store(out + row.to(tl.int64) * V + offset, acc.to(out.dtype.element_ty), mask=inside)
    if GATE != "none":
        gate_offset = local[:, None] * gate_stride + columns[None, :]
        factor = tl.load(gate + row.to(tl.int64) * gate_stride + gate_offset, mask=inside, other=0.0).to(tl.float32)
        if GATE == "silu":
            factor = factor * tl.sigmoid(factor)
        tl.store(gated + row.to(tl.int64) * V + offset, (acc * factor).to(gated.dtype.element_ty), mask=inside)


@kernel("m", "mk", "n_blocks", "list_size")
def _values_kernel(
    tiles, v, plan, row_stats, gate, out, gated, m, mk, n_blocks, list_size, v_stride, gate_stride, downscale,
    V: tl.constexpr, SOFTMAX: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
):
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
        acc, tiles, v, first, base, steps, column, mk, V, v_stride, PRECISION, BLOCK_M, BLOCK_N, INNER, WIDTH
    )
    row = block * BLOCK_M
    if SOFTMAX:
        rows = row + tl.arange(0, BLOCK_M)
        acc = acc * tl.load(row_stats + m + rows, mask=rows < m, other=0.0)[:, None]
    acc = acc * tl.where(fits, downscale, float("nan"))
    to = (gate, out, gated, m, gate_stride)
    if WIDTH >= 128:
        left, right = _column_halves(acc)
        _store_values(left, to, row, column, V, GATE, BLOCK_M, WIDTH // 2)
        _store_values(right, to, row, column + WIDTH // 2, V, GATE, BLOCK_M, WIDTH // 2)
    else:
        _store_values(acc, to, row, column, V, GATE, BLOCK_M, WIDTH)


@kernel("m")
def _row_sums_kernel(
    grad, out, gate, grad_out, grad_gate, sums, m, grad_stride, gate_stride, grad_gate_stride,
    V: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
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


@kernel("m", "mk", "n_blocks", "n_key_blocks", "list_size", "table_size", "table_center")
def _score_grads_kernel(
    q, k, v, grad_out, key_start, key_end, table, q_place, k_place, row_stats, row_sums, plan, weights, score_grads,
    top, m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, v_stride, grad_stride,
    table_size, table_center, scale, table_factor, upscale, downscale,
    Z: tl.constexpr, V: tl.constexpr, SOFTMAX: tl.constexpr, HAS_TABLE: tl.constexpr, WANT_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, INNER: tl.constexpr,
):
    """One tile: the weights again, d loss/d weights = grad_out . v^T, and from both d loss/d scores."""
    item = tl.program_id(0)
    items = _list_length(plan, n_blocks)
    if (item < items) & (items <= list_size):
        block = tl.load(plan + 3 * n_blocks + 2 * n_key_blocks + item)
        tile = item - tl.load(plan + 2 * n_blocks + block)
        row = block * BLOCK_M
        local = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_N)
        queries = _load_queries(q, key_start, key_end, q_place, row, m, q_stride, Z, HAS_TABLE, BLOCK_M, BLOCK_Z)
        numbers = (mk, k_stride, table_size, table_center, scale, table_factor)
        scores = _tile_scores(
            queries, tile, k, k_place, table, numbers, Z, float("-inf"), HAS_TABLE, PRECISION, BLOCK_N, BLOCK_Z
        )
        place = item.to(tl.int64) * (BLOCK_M * BLOCK_N) + local[:, None] * BLOCK_N + columns[None, :]
        if SOFTMAX:
            log_sum = tl.load(row_stats + row + local, mask=row + local < m, other=float("inf"))
            found = tl.exp2(scores - log_sum[:, None])
        else:
            positive = tl.maximum(scores, 0.0)
            found = positive * positive * upscale
        # Read back below: registers that held the weights during the product would keep a second program off the SM.
        tl.store(weights + place, found.to(weights.dtype.element_ty))

        inner = tl.arange(0, INNER)
        key = tile * BLOCK_N
        grad_offset = local[:, None] * grad_stride + inner[None, :]
        v_offset = columns[None, :] * v_stride + inner[:, None]
        grad_block = grad_out + row.to(tl.int64) * grad_stride
        v_block = v + key.to(tl.int64) * v_stride
        rows_inside, keys_inside = row + local < m, key + columns < mk
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in range(0, V, INNER):
            valid = column + inner < V
            a = tl.load(grad_block + column + grad_offset, mask=rows_inside[:, None] & valid[None, :], other=0.0)
            b = tl.load(v_block + column + v_offset, mask=keys_inside[None, :] & valid[:, None], other=0.0)
            acc = _dot(a, b, acc, PRECISION)
        tl.debug_barrier()
        found = tl.load(weights + place).to(tl.float32)
        if SOFTMAX:
            found = found * (acc - tl.load(row_sums + row + local, mask=row + local < m, other=0.0)[:, None])
        else:
            found = 2 * tl.sqrt(found * downscale) * acc
        tl.store(score_grads + place, found.to(score_grads.dtype.element_ty))
        if WANT_TOP:
            # Bit patterns of floats >= 0 order as the floats do, NaN above all.
            tl.atomic_max(top, tl.max(tl.max(tl.abs(found), 1), 0).to(tl.int32, bitcast=True))


@jit
def _store_value_grads(
    acc, to, key, column, V: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr
):
    raw, grad_v, mk, raw_stride, grad_v_stride = to
    local = tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, WIDTH)
    inside = (key + local < mk)[:, None] & (columns < V)[None, :]
    if SILU:
        before_block = raw + key.to(tl.int64) * raw_stride
        before = tl.load(before_block + local[:, None] * raw_stride + columns[None, :], mask=inside, other=0.0)
        before = before.to(tl.float32)
        squash = tl.sigmoid(before)
        acc = acc * (squash + before * squash * (1 - squash))
    place = grad_v + key.to(tl.int64) * grad_v_stride + local[:, None] * grad_v_stride + columns[None, :]
    tl.store(place, acc.to(grad_v.dtype.element_ty), mask=inside)


@jit
def _store_rows(acc, target, row, count, Z: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    local = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (row + local < count)[:, None] & (columns < Z)[None, :]
    place = target + row.to(tl.int64) * Z + local[:, None] * Z + columns[None, :]
    tl.store(place, acc.to(target.dtype.element_ty), mask=inside)


@kernel("m", "mk", "n_blocks", "n_key_blocks", "list_size")
def _input_grads_kernel(
    tiles, grad_out, score_grads, q, k, raw, plan, grad_v, grad_q, grad_k,
    m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, grad_stride, raw_stride, grad_v_stride, downscale,
    scale, V: tl.constexpr, Z: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """grad_v (Mk, V) = weights^T . grad_out, or where v = silu(raw) the gradient of raw, in the first programs; then
    grad_k = scale * score_grads^T . q and grad_q = scale * score_grads . k, which are bound by memory and share the
    launch so that they run beside the products."""
    item = tl.program_id(0)
    fits = _list_length(plan, n_blocks) <= list_size
    bases = plan + 2 * n_blocks
    n_values = n_key_blocks * SLICES
    if item < n_values + n_key_blocks:
        is_value = item < n_values
        key_block = tl.where(is_value, item // SLICES, item - n_values)
        low = tl.load(plan + 3 * n_blocks + key_block)
        high = tl.load(plan + 3 * n_blocks + n_key_blocks + key_block)
        steps = tl.where(fits, (high - low) * (BLOCK_M // INNER), 0)
        key = key_block * BLOCK_N
        if is_value:
            column = (item % SLICES) * WIDTH
            acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
            acc = _times_columns(
                acc, tiles, grad_out, bases, key_block, low, steps, column, m, V, grad_stride,
                PRECISION, BLOCK_M, BLOCK_N, INNER, WIDTH,
            )
            acc = acc * tl.where(fits, downscale, float("nan"))
            to = (raw, grad_v, mk, raw_stride, grad_v_stride)
            if WIDTH >= 128:
                left, right = _column_halves(acc)
                _store_value_grads(left, to, key, column, V, SILU, BLOCK_N, WIDTH // 2)
                _store_value_grads(right, to, key, column + WIDTH // 2, V, SILU, BLOCK_N, WIDTH // 2)
            else:
                _store_value_grads(acc, to, key, column, V, SILU, BLOCK_N, WIDTH)
        else:
            key_grads = tl.zeros((BLOCK_N, BLOCK_Z), tl.float32)
            key_grads = _times_columns(
                key_grads, score_grads, q, bases, key_block, low, steps, 0, m, Z, q_stride,
                PRECISION, BLOCK_M, BLOCK_N, INNER, BLOCK_Z,
            )
            _store_rows(key_grads * tl.where(fits, scale, float("nan")), grad_k, key, mk, Z, BLOCK_N, BLOCK_Z)
    else:
        block = item - n_values - n_key_blocks
        first = tl.load(plan + block)
        steps = tl.where(fits, (tl.load(plan + n_blocks + block) - first) * (BLOCK_N // INNER), 0)
        query_grads = tl.zeros((BLOCK_M, BLOCK_Z), tl.float32)
        query_grads = _times_rows(
            query_grads, score_grads, k, first, tl.load(bases + block), steps, 0, mk, Z, k_stride,
            PRECISION, BLOCK_M, BLOCK_N, INNER, BLOCK_Z,
        )
        _store_rows(query_grads * tl.where(fits, scale, float("nan")), grad_q, block * BLOCK_M, m, Z, BLOCK_M, BLOCK_Z)


@kernel("m", "mk", "n_blocks", "n_key_blocks", "list_size", "table_size", "table_center")
def _table_grads_kernel(
    tiles, key_start, key_end, q_place, k_place, plan, top, sums,
    m, mk, n_blocks, n_key_blocks, list_size, table_size, table_center, fixed_point,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr,
):
    """Adds score gradients to their table entries as integers, whose sum does not depend on the order.

    All tiles have the same few hundred entries in sight, and the units that add wait for one another: so programs take
    turns at COPIES tables.
    """
    parts: tl.constexpr = BLOCK_M // ROWS
    item = tl.program_id(0) // parts
    part = (tl.program_id(0) % parts) * ROWS
    items = _list_length(plan, n_blocks)
    if (item < items) & (items <= list_size):
        block = tl.load(plan + 3 * n_blocks + 2 * n_key_blocks + item)
        tile = item - tl.load(plan + 2 * n_blocks + block)
        local = part + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_N)
        rows = block * BLOCK_M + local
        keys = tile * BLOCK_N + columns
        start = tl.load(key_start + rows, mask=rows < m, other=0).to(tl.int32)
        stop = tl.load(key_end + rows, mask=rows < m, other=0).to(tl.int32)
        visible = _visible(keys, start, tl.maximum(stop - start, 0))
        q_places = tl.load(q_place + rows, mask=rows < m, other=0).to(tl.int32)
        k_places = tl.load(k_place + keys, mask=keys < mk, other=0).to(tl.int32)
        entry = table_center + k_places[None, :] - q_places[:, None]
        entry = tl.minimum(tl.maximum(entry, 0), table_size - 1)
        largest = tl.load(top)
        factor = tl.where(largest > 0, fixed_point / largest, 0.0)
        place = tiles + item.to(tl.int64) * (BLOCK_M * BLOCK_N) + local[:, None] * BLOCK_N + columns[None, :]
        found = tl.load(place).to(tl.float32) * factor
        table = sums + (item % COPIES) * table_size
        tl.atomic_add(table + entry, found.to(tl.int64), mask=visible, sem="relaxed")


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, ranges: AttentionRanges, call: AttentionCall,
    gate: Tensor | None, gate_form: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """out, gated (None without a gate), row statistics and the plan that backward needs.

    Args:
        gate: (M, V), whose rows may lie apart.
        gate_form: none; product: gated = out * gate; silu: gated = out * silu(gate).
    """
    blocks = _BLOCKS_32BIT if q.dtype == torch.float32 else _BLOCKS_16BIT
    precision = _PRECISION[q.dtype]
    (m, z), (mk, width), softmax = q.shape, v.shape, call.activation == "softmax"
    n_blocks, n_key_blocks = -(-m // blocks.m), -(-mk // blocks.n)
    plan = torch.empty(3 * n_blocks + 2 * n_key_blocks + call.list_size, dtype=torch.int32, device=q.device)
    row_stats = torch.empty(2, m if softmax else 0, dtype=torch.float32, device=q.device)
    weights = torch.empty(call.list_size * blocks.m, blocks.n, dtype=q.dtype, device=q.device)
    _weights_kernel(
        (n_blocks * (blocks.m // blocks.rows),),
        q, k, ranges.key_start, ranges.key_end, table, ranges.q_place, ranges.k_place, weights, row_stats, plan,
        m, mk, n_blocks, n_key_blocks, call.list_size, q.stride(0), k.stride(0),
        *_score_arguments(call, table), call.upscale, options=blocks.options["weights"],
        Z=z, SOFTMAX=softmax, HAS_TABLE=table is not None, PRECISION=precision, RISE=_RISE[q.dtype],
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_Z=power_of_two(z), ROWS=blocks.rows,
        CHUNK=128 if n_blocks <= _MANY_BLOCKS else 1024,
    )
    out = torch.empty(m, width, dtype=v.dtype, device=v.device)
    gated = None if gate is None else torch.empty_like(out)
    columns = min(blocks.values, power_of_two(width))
    slices = -(-width // columns)
    _values_kernel(
        (n_blocks * slices,), weights, v, plan, row_stats, gate, out, gated,
        m, mk, n_blocks, call.list_size, v.stride(0), 0 if gate is None else gate.stride(0), 1 / call.upscale,
        options=blocks.options["values"], V=width, SOFTMAX=softmax, GATE=gate_form, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, INNER=blocks.inner, WIDTH=columns, SLICES=slices,
    )
    return out, gated, row_stats, plan


def row_sums(
    grad: Tensor, out: Tensor, gate: Tensor | None, gate_form: str, grad_gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of the ungated output (M, V) and, in float32, its sum over V times out; fills grad_gate."""
    m, width = out.shape
    sums = torch.empty(m, dtype=torch.float32, device=out.device)
    grad_out = grad if gate is None else torch.empty_like(out)
    strides = grad.stride(0), 0 if gate is None else gate.stride(0), 0 if grad_gate is None else grad_gate.stride(0)
    _row_sums_kernel(
        (-(-m // 4),), grad, out, gate, grad_out, grad_gate, sums, m, *strides,
        V=width, GATE=gate_form, ROWS=4, WIDTH=min(512, power_of_two(width)),
    )
    return grad_out, sums


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, ranges: AttentionRanges,
    call: AttentionCall, row_stats: Tensor, sums: Tensor | None, plan: Tensor, grad_v: Tensor,
    raw_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and the table; fills grad_v (Mk, V), or with raw_v, where v = silu(raw_v), that of raw_v."""
    blocks = _BLOCKS_32BIT if q.dtype == torch.float32 else _BLOCKS_16BIT
    precision = _PRECISION[q.dtype]
    (m, z), (mk, width), softmax = q.shape, v.shape, call.activation == "softmax"
    n_blocks, n_key_blocks = -(-m // blocks.m), -(-mk // blocks.n)
    sizes = m, mk, n_blocks, n_key_blocks, call.list_size
    weights = torch.empty(call.list_size * blocks.m, blocks.n, dtype=q.dtype, device=q.device)
    score_grads = torch.empty_like(weights)
    top = None if table is None else torch.zeros(1, dtype=torch.int32, device=q.device)
    _score_grads_kernel(
        (call.list_size,), q, k, v, grad_out, ranges.key_start, ranges.key_end, table, ranges.q_place, ranges.k_place,
        row_stats, sums if softmax else None, plan, weights, score_grads, top,
        *sizes, q.stride(0), k.stride(0), v.stride(0), grad_out.stride(0),
        *_score_arguments(call, table), call.upscale, 1 / call.upscale, options=blocks.options["score_grads"],
        Z=z, V=width, SOFTMAX=softmax, HAS_TABLE=table is not None, WANT_TOP=table is not None, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_Z=power_of_two(z), INNER=blocks.inner,
    )
    columns = min(blocks.values, power_of_two(width))
    slices = -(-width // columns)
    grad_q = torch.empty(m, z, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(mk, z, dtype=k.dtype, device=k.device)
    strides = grad_out.stride(0), 0 if raw_v is None else raw_v.stride(0), grad_v.stride(0)
    _input_grads_kernel(
        (n_key_blocks * (slices + 1) + n_blocks,),
        weights, grad_out, score_grads, q, k, raw_v, plan, grad_v, grad_q, grad_k,
        *sizes, q.stride(0), k.stride(0), *strides, 1 / call.upscale, call.scale,
        options=blocks.options["input_grads"], V=width, Z=z, SILU=raw_v is not None, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, INNER=blocks.inner, WIDTH=columns, SLICES=slices, BLOCK_Z=power_of_two(z),
    )
    if table is None:
        return grad_q, grad_k, None
    largest = top.view(torch.float32)
    copies = max(1, min(_MOST_COPIES, _COPIED_ENTRIES // table.shape[0]))
    fixed = torch.zeros(copies, table.shape[0], dtype=torch.int64, device=q.device)
    _table_grads_kernel(
        (call.list_size * (blocks.m // blocks.rows),),
        score_grads, ranges.key_start, ranges.key_end, ranges.q_place, ranges.k_place, plan, largest, fixed,
        *sizes, table.shape[0], call.table_center, _FIXED_POINT,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, ROWS=blocks.rows, COPIES=copies,
    )
    return grad_q, grad_k, (fixed.sum(0) * (largest.double() / _FIXED_POINT)).to(table.dtype)


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, gate, key_start, key_end, q_place, k_place, call):
        ranges = AttentionRanges(key_start, key_end, q_place, k_place)
        gate_form = "none" if gate is None else "product"
        ctx.call, ctx.gate_form = call, gate_form
        if call.list_size == 0:
            ctx.save_for_backward(q, k, v, table, gate)
            return v.new_zeros(q.shape[0], v.shape[1])
        out, gated, row_stats, plan = attention_forward(q, k, v, table, ranges, call, gate, gate_form)
        # relu2 has no row sums, so without a gate its backward does not need the output.
        kept = out if call.activation == "softmax" or gate is not None else None
        ctx.save_for_backward(q, k, v, table, gate, kept, row_stats, plan, *ranges)
        return out if gate is None else gated

    @first_derivative_only
    def backward(ctx, grad):
        if ctx.call.list_size == 0:
            return *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors), *[None] * 5
        q, k, v, table, gate, out, row_stats, plan, *ranges = ctx.saved_tensors
        grad = grad.to(v.dtype).contiguous()
        grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        sums = None
        if out is not None:
            grad, sums = row_sums(grad, out, gate, ctx.gate_form, grad_gate)
        grad_q, grad_k, grad_table = attention_backward(
            grad, q, k, v, table, AttentionRanges(*ranges), ctx.call, row_stats, sums, plan, grad_v
        )
        return grad_q, grad_k, grad_v, grad_table, grad_gate, *[None] * 5


def plan_attention(
    m: int, mk: int, width: int, dtype: torch.dtype, activation: str, scale: float, center: int, max_keys: int
) -> AttentionCall:
    """The numbers that one call's kernels share: for m queries, mk keys and values of this width."""
    longest, blocks = min(max_keys, mk), _BLOCKS_32BIT if dtype == torch.float32 else _BLOCKS_16BIT
    count = -(-m // blocks.m)
    # A block spans `longest` keys plus what its runs advance; the advances add up to at most mk over all blocks, and
    # rounding to tiles adds less than two a block.
    tiles = min((count * longest + mk) // blocks.n + 2 * count, count * -(-mk // blocks.n)) if width else 0
    # Products of small relu2 scores leave the range of float16; a power of two brings them back and costs nothing.
    upscale = 1.0 if activation == "softmax" else 2.0 ** round(-math.log2(scale))
    return AttentionCall(activation, scale, center, tiles, upscale)


def windowed_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, *, activation: str, scale: float,
    bias_table: Tensor | None = None, bias_center: int = 0, q_place: Tensor | None = None,
    k_place: Tensor | None = None, dropout_p: float = 0.0, max_keys: int | None = None, gate: Tensor | None = None,
) -> Tensor:
    """`windowed_attention` on a GPU: softmax or relu2, Z up to 256, float32, float16 or bfloat16. Rows of q, k, v and
    gate may lie apart; places are below 2^31.

    Args: those of `windowed_attention`. max_keys (W + 1 causal, 2W + 1 bidirectional) sizes the scratch memory: None
        reads it from the ranges and so waits for the device; a bound that is too small makes the result NaN.

    Returns:
        (M, V) of v's dtype; gradients for q, k, v, bias_table and gate. The sums, bias_table's included, do not depend
        on the order in which programs run. Unlike with `windowed_attention`, a NaN or an infinity in v reaches queries
        that do not see it, if a tile of keys has both: to look at each value in the inner loop would cost time."""
    if max_keys is None:
        max_keys = int((key_end - key_start).max()) if len(key_end) else 0
    call = plan_attention(len(q), len(k), v.shape[1], q.dtype, activation, scale, bias_center, max(0, max_keys))
    rows = [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, gate)]
    ranges = [None if t is None else t.contiguous() for t in (key_start, key_end, q_place, k_place)]
    table = None if bias_table is None else bias_table.contiguous()
    return _WindowedAttention.apply(*rows[:3], table, rows[3], *ranges, call)
