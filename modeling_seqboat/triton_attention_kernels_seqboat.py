"""Triton kernels of windowed attention with wide values; `triton_attention_seqboat` says how they fit together.

Letters: M queries and Mk keys of one flat stream, Z query/key width, V value width.

The kernels share a list of dense BLOCK_M x BLOCK_N tiles, only those that some query sees, and int32 arrays ("plan") that
the first kernel writes, so that nothing waits for the host:
    first, end (blocks of queries)   tiles of keys that a block sees: first <= tile < end
    base (blocks of queries)         the block's tile j lies at base + j in the list
    low, high (blocks of keys)       blocks of queries that see a tile of keys: low <= block < high
    owner (list)                     the block of queries of a tile in the list
Both ends of the runs of keys never decrease, so a block of queries spans from its first query's start to its last one's
end, and both maps are runs. Where the list turns out too small, results are NaN and no memory is touched beyond it.
"""

from __future__ import annotations

from .triton_launch_seqboat import jit, kernel

try:
    import triton.language as tl
except ImportError:
    tl = None


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


@jit
def _visible(keys, start, length):
    """(rows, keys): start <= key < start + length, as one unsigned comparison."""
    return (keys[None, :] - start[:, None]).to(tl.uint32, bitcast=True) < length[:, None].to(tl.uint32, bitcast=True)


@jit
def _load_keys(
    k, k_place, tile, mk, k_stride, Z, HAS_TABLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr
):
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


@jit
def _load_queries(
    q, key_start, key_end, q_place, row, m, q_stride, Z,
    HAS_TABLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Queries row .. row + ROWS as (ROWS, Z), where their runs of keys start, how long they are (0 past the end), places."""
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
    q_tile, start, length, q_places, tile, k, k_place, table, mk, k_stride, table_size, table_center, scale, table_factor,
    Z: tl.constexpr, HIDDEN: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, HIDDEN where a query does not see the key."""
    k_tile, keys, k_places = _load_keys(k, k_place, tile, mk, k_stride, Z, HAS_TABLE, BLOCK_N, BLOCK_Z)
    scores = _scores(
        q_tile, k_tile, table, q_places, k_places, table_size, table_center, scale, table_factor, HAS_TABLE, PRECISION
    )
    return tl.where(_visible(keys, start, length), scores, HIDDEN)


@kernel("m", "mk", "n_blocks", "n_key_blocks", "list_size", "table_size", "table_center")
def weights_kernel(
    q, k, key_start, key_end, table, q_place, k_place, weights, row_stats, plan,
    m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, table_size, table_center, scale, table_factor, lift,
    Z: tl.constexpr, SOFTMAX: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr, RISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
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
        )  # fmt: skip
    if fits:
        row = block * BLOCK_M + part * ROWS
        local = tl.arange(0, ROWS)
        q_tile, start, length, q_places = _load_queries(
            q, key_start, key_end, q_place, row, m, q_stride, Z, HAS_TABLE, ROWS, BLOCK_Z
        )
        tile_offset = local[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        place = weights + (tl.cast(base - first, tl.int64) * BLOCK_M + part * ROWS) * BLOCK_N
        if SOFTMAX:
            reference = tl.full((ROWS,), float("-inf"), tl.float32)
            top = reference
            total = tl.zeros((ROWS,), tl.float32)
            for tile in range(first, end):
                scores = _tile_scores(
                    q_tile, start, length, q_places, tile, k, k_place, table, mk, k_stride,
                    table_size, table_center, scale, table_factor,
                    Z, float("-inf"), HAS_TABLE, PRECISION, BLOCK_N, BLOCK_Z,
                )  # fmt: skip
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
                        q_tile, start, length, q_places, tile, k, k_place, table, mk, k_stride,
                        table_size, table_center, scale, table_factor,
                        Z, float("-inf"), HAS_TABLE, PRECISION, BLOCK_N, BLOCK_Z,
                    )  # fmt: skip
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
                    q_tile, start, length, q_places, tile, k, k_place, table, mk, k_stride,
                    table_size, table_center, scale, table_factor,
                    Z, 0.0, HAS_TABLE, PRECISION, BLOCK_N, BLOCK_Z,
                )  # fmt: skip
                positive = tl.maximum(scores, 0.0)
                target = place + tl.cast(tile, tl.int64) * (BLOCK_M * BLOCK_N)
                tl.store(target + tile_offset, (positive * positive * lift).to(weights.dtype.element_ty))


@jit
def _times_rows(
    acc, tiles, x, first, base, steps, column, x_rows, x_columns, x_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
    acc, tiles, x, bases, key_block, low, steps, column, x_rows, x_columns, x_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
    acc, gate, out, gated, row, column, m, gate_stride,
    V: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
def values_kernel(
    tiles, v, plan, row_stats, gate, out, gated, m, mk, n_blocks, list_size, v_stride, gate_stride, lowering,
    V: tl.constexpr, SOFTMAX: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
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
        PRECISION, BLOCK_M, BLOCK_N, INNER, WIDTH,
    )  # fmt: skip
    row = block * BLOCK_M
    if SOFTMAX:
        rows = row + tl.arange(0, BLOCK_M)
        acc = acc * tl.load(row_stats + m + rows, mask=rows < m, other=0.0)[:, None]
    acc = acc * tl.where(fits, lowering, float("nan"))
    if WIDTH >= 128:
        left, right = _column_halves(acc)
        _store_values(left, gate, out, gated, row, column, m, gate_stride, V, GATE, BLOCK_M, WIDTH // 2)
        _store_values(right, gate, out, gated, row, column + WIDTH // 2, m, gate_stride, V, GATE, BLOCK_M, WIDTH // 2)
    else:
        _store_values(acc, gate, out, gated, row, column, m, gate_stride, V, GATE, BLOCK_M, WIDTH)


@kernel("m")
def row_sums_kernel(
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


@kernel("m", "mk", "n_blocks", "n_key_blocks", "list_size", "table_size", "table_center")
def score_grads_kernel(
    q, k, v, grad_out, key_start, key_end, table, q_place, k_place, row_stats, row_sums, plan, weights, score_grads, top,
    m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, v_stride, grad_stride,
    table_size, table_center, scale, table_factor, lift, lowering,
    Z: tl.constexpr, V: tl.constexpr, SOFTMAX: tl.constexpr, HAS_TABLE: tl.constexpr, WANT_TOP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Z: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile: the weights again, d loss/d weights = grad_out . v^T, and from both d loss/d scores."""
    item = tl.program_id(0)
    items = _list_length(plan, n_blocks)
    if (item < items) & (items <= list_size):
        block = tl.load(plan + 3 * n_blocks + 2 * n_key_blocks + item)
        tile = item - tl.load(plan + 2 * n_blocks + block)
        row = block * BLOCK_M
        local = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_N)
        q_tile, start, length, q_places = _load_queries(
            q, key_start, key_end, q_place, row, m, q_stride, Z, HAS_TABLE, BLOCK_M, BLOCK_Z
        )
        scores = _tile_scores(
            q_tile, start, length, q_places, tile, k, k_place, table, mk, k_stride,
            table_size, table_center, scale, table_factor,
            Z, float("-inf"), HAS_TABLE, PRECISION, BLOCK_N, BLOCK_Z,
        )  # fmt: skip
        place = item.to(tl.int64) * (BLOCK_M * BLOCK_N) + local[:, None] * BLOCK_N + columns[None, :]
        if SOFTMAX:
            log_sum = tl.load(row_stats + row + local, mask=row + local < m, other=float("inf"))
            found = tl.exp2(scores - log_sum[:, None])
        else:
            positive = tl.maximum(scores, 0.0)
            found = positive * positive * lift
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
            found = 2 * tl.sqrt(found * lowering) * acc
        tl.store(score_grads + place, found.to(score_grads.dtype.element_ty))
        if WANT_TOP:
            # Bit patterns of floats >= 0 order as the floats do, NaN above all.
            tl.atomic_max(top, tl.max(tl.max(tl.abs(found), 1), 0).to(tl.int32, bitcast=True))


@jit
def _store_value_grads(
    acc, raw, grad_v, key, column, mk, raw_stride, grad_v_stride,
    V: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
def input_grads_kernel(
    tiles, grad_out, score_grads, q, k, raw, plan, grad_v, grad_q, grad_k,
    m, mk, n_blocks, n_key_blocks, list_size, q_stride, k_stride, grad_stride, raw_stride, grad_v_stride, lowering, scale,
    V: tl.constexpr, Z: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):  # fmt: skip
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
            )  # fmt: skip
            acc = acc * tl.where(fits, lowering, float("nan"))
            if WIDTH >= 128:
                half: tl.constexpr = WIDTH // 2
                left, right = _column_halves(acc)
                _store_value_grads(
                    left, raw, grad_v, key, column, mk, raw_stride, grad_v_stride, V, SILU, BLOCK_N, half
                )
                column += half
                _store_value_grads(
                    right, raw, grad_v, key, column, mk, raw_stride, grad_v_stride, V, SILU, BLOCK_N, half
                )
            else:
                _store_value_grads(
                    acc, raw, grad_v, key, column, mk, raw_stride, grad_v_stride, V, SILU, BLOCK_N, WIDTH
                )
        else:
            key_grads = tl.zeros((BLOCK_N, BLOCK_Z), tl.float32)
            key_grads = _times_columns(
                key_grads, score_grads, q, bases, key_block, low, steps, 0, m, Z, q_stride,
                PRECISION, BLOCK_M, BLOCK_N, INNER, BLOCK_Z,
            )  # fmt: skip
            _store_rows(key_grads * tl.where(fits, scale, float("nan")), grad_k, key, mk, Z, BLOCK_N, BLOCK_Z)
    else:
        block = item - n_values - n_key_blocks
        first = tl.load(plan + block)
        steps = tl.where(fits, (tl.load(plan + n_blocks + block) - first) * (BLOCK_N // INNER), 0)
        query_grads = tl.zeros((BLOCK_M, BLOCK_Z), tl.float32)
        query_grads = _times_rows(
            query_grads, score_grads, k, first, tl.load(bases + block), steps, 0, mk, Z, k_stride,
            PRECISION, BLOCK_M, BLOCK_N, INNER, BLOCK_Z,
        )  # fmt: skip
        _store_rows(query_grads * tl.where(fits, scale, float("nan")), grad_q, block * BLOCK_M, m, Z, BLOCK_M, BLOCK_Z)


@kernel("m", "mk", "n_blocks", "n_key_blocks", "list_size", "table_size", "table_center")
def table_grads_kernel(
    tiles, key_start, key_end, q_place, k_place, plan, top, sums,
    m, mk, n_blocks, n_key_blocks, list_size, table_size, table_center, fixed_point,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Adds score gradients to their table entries as integers, whose sum does not depend on the order.

    All tiles have the same few hundred entries in sight, and the units that add wait for one another: so programs take turns
    at COPIES tables.
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
