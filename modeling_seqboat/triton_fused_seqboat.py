"""Elementwise stages around the attention of activated tokens, each one pass over memory, in Triton.

Letters: R tokens of a batch (B * L), M activated ones, D width, Z query/key width, V value width.

Compress (`gather_rows`) and extract (`extract_residual`) use the list of activated tokens both ways: `index` (M,) names
the token of an activated row, `slot` (R,) the activated row of a token, or -1. With both at hand every gradient is a
gather too, and nothing is added atomically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_attention_seqboat import (
    AttentionRanges,
    attention_backward,
    attention_forward,
    check_attention,
    plan_attention,
    row_sums,
)
from .triton_launch_seqboat import aligned_key, blocks_of, jit, kernel, on_device, power_of_two, row_block

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _silu_slope(x):
    """silu(x) and its derivative, float32."""
    squash = tl.sigmoid(x)
    value = x * squash
    return value, squash + value * (1 - squash)


@kernel("count")
def _gather_kernel(x, index, out, count, x_stride, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    source = tl.load(index + rows, mask=rows < count, other=-1).to(tl.int64)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    value = tl.load(x + source[:, None] * x_stride + columns[None, :], mask=inside & (source >= 0)[:, None], other=0.0)
    tl.store(out + rows.to(tl.int64)[:, None] * D + columns[None, :], value, mask=inside)


@jit
def _kept(seed, place, dropout):
    """What dropout multiplies with: 0 or 1 / (1 - dropout), drawn by the place in the tensor."""
    return tl.where(tl.rand(tl.load(seed), place) >= dropout, 1 / (1 - dropout), 0.0)


@kernel("count", "dropout")
def _extract_kernel(
    hidden, residual, out, confidence, slot, result, count, seed, dropout,
    DROPOUT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    source = tl.load(slot + rows, mask=rows < count, other=-1).to(tl.int64)
    factor = tl.load(confidence + rows, mask=rows < count, other=0.0)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    chosen = inside & (source >= 0)[:, None]
    total = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(out + source[:, None] * D + columns[None, :], mask=chosen, other=0.0).to(tl.float32)
    total += tl.where(chosen, factor[:, None] * value, 0.0)
    if DROPOUT:
        total *= _kept(seed, place, dropout)
    total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, (total * tl.sigmoid(total)).to(result.dtype.element_ty), mask=inside)


@kernel("count", "dropout")
def _extract_backward_kernel(
    grad, hidden, residual, out, confidence, slot, grad_hidden, grad_residual, grad_out, grad_confidence, count,
    seed, dropout,
    DROPOUT: tl.constexpr, SAME: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    source = tl.load(slot + rows, mask=rows < count, other=-1).to(tl.int64)
    factor = tl.load(confidence + rows, mask=rows < count, other=0.0)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    chosen = inside & (source >= 0)[:, None]
    total = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    value_place = source[:, None] * D + columns[None, :]
    value = tl.load(out + value_place, mask=chosen, other=0.0).to(tl.float32)
    total += tl.where(chosen, factor[:, None] * value, 0.0)
    if DROPOUT:
        kept = _kept(seed, place, dropout)
        total *= kept
    total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    _, slope = _silu_slope(total)
    slope = slope * tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if not SAME:
        tl.store(grad_residual + place, slope.to(grad_residual.dtype.element_ty), mask=inside)
    if DROPOUT:
        slope *= kept
    tl.store(grad_hidden + place, slope.to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_out + value_place, (slope * factor[:, None]).to(grad_out.dtype.element_ty), mask=chosen)
    tl.store(grad_confidence + rows, tl.sum(tl.where(chosen, slope * value, 0.0), 1), mask=rows < count)


@jit
def _load_pairs(base, stride, rows, valid, Z: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels 2i and channels 2i + 1 of a block of rows, float32 (ROWS, BLOCK) each."""
    channels = tl.arange(0, 2 * BLOCK)
    place = base + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    both = tl.load(place, mask=valid[:, None] & (channels < Z)[None, :], other=0.0)
    return tl.split(tl.reshape(both.to(tl.float32), (ROWS, BLOCK, 2)))


@jit
def _load_channels(base, Z: tl.constexpr, BLOCK: tl.constexpr):
    """Channels 2i and channels 2i + 1 of one parameter row, float32 (1, BLOCK) each."""
    channels = tl.arange(0, 2 * BLOCK)
    both = tl.load(base + channels, mask=channels < Z, other=0.0)
    even, odd = tl.split(tl.reshape(both.to(tl.float32), (BLOCK, 2)))
    return even[None, :], odd[None, :]


@jit
def _store_pairs(base, stride, rows, valid, even, odd, Z: tl.constexpr, BLOCK: tl.constexpr):
    channels = tl.arange(0, 2 * BLOCK)
    place = base + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    both = tl.interleave(even, odd).to(base.dtype.element_ty)
    tl.store(place, both, mask=valid[:, None] & (channels < Z)[None, :])


@jit
def _load_angles(cos, sin, table_rows, rows, valid, HAS_ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    pairs = tl.arange(0, BLOCK)
    source = rows
    if HAS_ROWS:
        source = tl.maximum(tl.load(table_rows + rows, mask=valid, other=0), 0)  # -1: no token
    place = source.to(tl.int64)[:, None] * HALF + pairs[None, :]
    inside = valid[:, None] & (pairs < HALF)[None, :]
    return tl.load(cos + place, mask=inside, other=1.0), tl.load(sin + place, mask=inside, other=0.0)


@kernel("count")
def _project_kernel(
    projected, scale, offset, cos, sin, table_rows, q, k, v, gate, count, stride,
    Z: tl.constexpr, V: tl.constexpr, ROTARY: tl.constexpr, HAS_ROWS: tl.constexpr, GATE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Axis 1: program 0 makes q and k, the others a slice of v (and of the gate) each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < count
    if tl.program_id(1) == 0:
        even, odd = _load_pairs(projected, stride, rows, valid, Z, ROWS, BLOCK)
        even = even * tl.sigmoid(even)
        odd = odd * tl.sigmoid(odd)
        if ROTARY:
            c, s = _load_angles(cos, sin, table_rows, rows, valid, HAS_ROWS, Z // 2, BLOCK)
        for which in tl.static_range(2):
            scale_even, scale_odd = _load_channels(scale + which * Z, Z, BLOCK)
            offset_even, offset_odd = _load_channels(offset + which * Z, Z, BLOCK)
            a = even * scale_even + offset_even
            b = odd * scale_odd + offset_odd
            if ROTARY:
                turned = a * c - b * s
                b = a * s + b * c
                a = turned
            if which == 0:
                _store_pairs(q, Z, rows, valid, a, b, Z, BLOCK)
            else:
                _store_pairs(k, Z, rows, valid, a, b, Z, BLOCK)
    else:
        columns = (tl.program_id(1) - 1) * WIDTH + tl.arange(0, WIDTH)
        inside = valid[:, None] & (columns < V)[None, :]
        source = projected + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        place = rows.to(tl.int64)[:, None] * V + columns[None, :]
        value = tl.load(source + Z + V, mask=inside, other=0.0).to(tl.float32)
        tl.store(v + place, (value * tl.sigmoid(value)).to(v.dtype.element_ty), mask=inside)
        if GATE:
            value = tl.load(source + Z, mask=inside, other=0.0).to(tl.float32)
            tl.store(gate + place, (value * tl.sigmoid(value)).to(gate.dtype.element_ty), mask=inside)


@kernel("count")
def _project_backward_kernel(
    projected, scale, offset, cos, sin, table_rows, grad_q, grad_k, grad_v, grad_gate, grad, parts, count, stride,
    Z: tl.constexpr, V: tl.constexpr, ROTARY: tl.constexpr, HAS_ROWS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, REPEATS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad (M, Z + 2V) of the projection and, a row of `parts` a program, sums for scale (2, Z) and offset (2, Z)."""
    if tl.program_id(1) == 0:
        pairs = tl.arange(0, BLOCK)
        part = parts + tl.program_id(0) * (4 * Z)
        scale_qe, scale_qo = _load_channels(scale, Z, BLOCK)
        scale_ke, scale_ko = _load_channels(scale + Z, Z, BLOCK)
        none = tl.zeros((BLOCK,), tl.float32)
        scale_sums = (none, none, none, none)
        offset_sums = (none, none, none, none)
        for repeat in range(REPEATS):
            rows = (tl.program_id(0) * REPEATS + repeat) * ROWS + tl.arange(0, ROWS)
            valid = rows < count
            raw_even, raw_odd = _load_pairs(projected, stride, rows, valid, Z, ROWS, BLOCK)
            even, even_slope = _silu_slope(raw_even)
            odd, odd_slope = _silu_slope(raw_odd)
            qe, qo = _load_pairs(grad_q, Z, rows, valid, Z, ROWS, BLOCK)
            ke, ko = _load_pairs(grad_k, Z, rows, valid, Z, ROWS, BLOCK)
            if ROTARY:
                c, s = _load_angles(cos, sin, table_rows, rows, valid, HAS_ROWS, Z // 2, BLOCK)
                qe, qo = qe * c + qo * s, qo * c - qe * s
                ke, ko = ke * c + ko * s, ko * c - ke * s
            scale_sums = (
                scale_sums[0] + tl.sum(qe * even, 0), scale_sums[1] + tl.sum(qo * odd, 0),
                scale_sums[2] + tl.sum(ke * even, 0), scale_sums[3] + tl.sum(ko * odd, 0),
            )  # fmt: skip
            offset_sums = (
                offset_sums[0] + tl.sum(qe, 0), offset_sums[1] + tl.sum(qo, 0),
                offset_sums[2] + tl.sum(ke, 0), offset_sums[3] + tl.sum(ko, 0),
            )  # fmt: skip
            even_slope = even_slope * (qe * scale_qe + ke * scale_ke)
            odd_slope = odd_slope * (qo * scale_qo + ko * scale_ko)
            _store_pairs(grad, Z + 2 * V, rows, valid, even_slope, odd_slope, Z, BLOCK)
        for which in tl.static_range(4):
            channel = (which // 2) * Z + which % 2 + 2 * pairs
            inside = 2 * pairs + which % 2 < Z
            tl.store(part + channel, scale_sums[which], mask=inside)
            tl.store(part + 2 * Z + channel, offset_sums[which], mask=inside)
    elif WIDE:
        columns = (tl.program_id(1) - 1) * WIDTH + tl.arange(0, WIDTH)
        for repeat in range(REPEATS):
            rows = (tl.program_id(0) * REPEATS + repeat) * ROWS + tl.arange(0, ROWS)
            inside = (rows < count)[:, None] & (columns < V)[None, :]
            source = projected + rows.to(tl.int64)[:, None] * stride + columns[None, :]
            target = grad + rows.to(tl.int64)[:, None] * (Z + 2 * V) + columns[None, :]
            place = rows.to(tl.int64)[:, None] * V + columns[None, :]
            _, slope = _silu_slope(tl.load(source + Z + V, mask=inside, other=0.0).to(tl.float32))
            slope = slope * tl.load(grad_v + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(target + Z + V, slope.to(grad.dtype.element_ty), mask=inside)
            _, slope = _silu_slope(tl.load(source + Z, mask=inside, other=0.0).to(tl.float32))
            slope = slope * tl.load(grad_gate + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(target + Z, slope.to(grad.dtype.element_ty), mask=inside)


@kernel("count")
def _silu_kernel(x, out, count, stride, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    rows = rows.to(tl.int64)[:, None]
    value = tl.load(x + rows * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows * D + columns[None, :], (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)


def _silu(x: Tensor) -> Tensor:
    """silu of rows that may lie apart."""
    count, width = x.shape
    out = torch.empty(count, width, dtype=x.dtype, device=x.device)
    rows, columns = row_block(width)
    _silu_kernel(
        (blocks_of(count, rows),), aligned_key((x,), x.device, x.dtype, width, x.stride(0)),
        x, out, count, x.stride(0), options={"num_warps": 4}, D=width, ROWS=rows, WIDTH=columns,
    )  # fmt: skip
    return out


def _gather(x: Tensor, index: Tensor) -> Tensor:
    count, width = index.shape[0], x.shape[1]
    out = torch.empty(count, width, dtype=x.dtype, device=x.device)
    if count > 0:
        rows, columns = row_block(width)
        with on_device(x):
            _gather_kernel(
                (blocks_of(count, rows),), aligned_key((x, index), x.device, x.dtype, width, x.stride(0)),
                x, index, out, count, x.stride(0), options={"num_warps": 4}, D=width, ROWS=rows, WIDTH=columns,
            )  # fmt: skip
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, slot):
        ctx.save_for_backward(slot)
        return _gather(x, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slot,) = ctx.saved_tensors
        return _gather(grad if grad.stride(-1) == 1 else grad.contiguous(), slot), None, None


def gather_rows(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """Compress: x[index], whose gradient is a gather through `slot`.

    Args:
        x: (R, D), any floating dtype; its rows may lie apart.
        index: (M,) int64, the activated tokens, none twice; -1 for a row of zeros.
        slot: (R,) int64, with slot[index[i]] == i and -1 elsewhere.

    Returns:
        (M, D) of x's dtype.
    """
    if slot.shape != x.shape[:1]:
        raise ValueError(f"slot must be ({x.shape[0]},), one entry for each row of x, got {tuple(slot.shape)}")
    return _GatherRows.apply(x if x.stride(-1) == 1 else x.contiguous(), index.contiguous(), slot.contiguous())


def _extract_key(hidden: Tensor, *others: Tensor, dropped: bool) -> tuple | None:
    dtypes = (t.dtype for t in (hidden, *others))
    return aligned_key((hidden, *others), hidden.device, hidden.shape[1], dropped, *dtypes)


class _ExtractResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, residual, out, confidence, slot, seed, dropout_p, padded):
        ctx.save_for_backward(hidden, residual, out, confidence, slot, seed)
        ctx.dropout_p, ctx.padded = dropout_p, padded
        result = torch.empty(
            hidden.shape, dtype=torch.promote_types(hidden.dtype, residual.dtype), device=hidden.device
        )
        count, width = hidden.shape
        if count > 0:
            rows, columns = row_block(width)
            with on_device(hidden):
                _extract_kernel(
                    (blocks_of(count, rows),),
                    _extract_key(hidden, residual, out, confidence, slot, dropped=dropout_p > 0),
                    hidden, residual, out, confidence, slot, result, count, seed, dropout_p, options={"num_warps": 4},
                    DROPOUT=dropout_p > 0, D=width, ROWS=rows, WIDTH=columns,
                )  # fmt: skip
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, residual, out, confidence, slot, seed = ctx.saved_tensors
        count, width = hidden.shape
        grad_hidden = torch.empty_like(hidden)
        dropout_p = ctx.dropout_p
        same = hidden.dtype == residual.dtype and dropout_p == 0
        grad_residual = grad_hidden if same else torch.empty_like(residual)
        # Rows of no token get no gradient from the kernel, and must not bring any to the linear before them.
        grad_out = torch.zeros_like(out) if ctx.padded else torch.empty_like(out)
        grad_confidence = torch.empty_like(confidence)
        if count > 0:
            rows, columns = row_block(width)
            grad = grad.contiguous()
            with on_device(hidden):
                _extract_backward_kernel(
                    (blocks_of(count, rows),),
                    _extract_key(hidden, residual, out, confidence, slot, grad, dropped=dropout_p > 0),
                    grad, hidden, residual, out, confidence, slot,
                    grad_hidden, grad_residual, grad_out, grad_confidence, count, seed, dropout_p,
                    options={"num_warps": 4},
                    DROPOUT=dropout_p > 0, SAME=same, D=width, ROWS=rows, WIDTH=columns,
                )  # fmt: skip
        return grad_hidden, grad_residual, grad_out, grad_confidence, None, None, None, None


def extract_residual(
    hidden: Tensor,
    residual: Tensor,
    out: Tensor,
    confidence: Tensor,
    slot: Tensor,
    dropout_p: float = 0.0,
    padded: bool = False,
) -> Tensor:
    """Extract and residual (arXiv 2306.11197, section 3.2): silu(dropout(hidden + confidence * out[slot]) + residual).

    Args:
        hidden, residual: (R, D); their dtypes may differ.
        out: (M, D), the attention's output for the activated tokens; M may be 0.
        confidence: (R,) float32, 0 where not activated.
        slot: (R,) int64, the row of `out` of each token, each row once, or -1 where not activated.
        dropout_p: the dropout's probability, below 1; its seed is drawn from the device's generator.
        padded: whether `out` may have rows that no slot names; they get a gradient of 0.

    Returns:
        (R, D) of the wider dtype of hidden and residual; the sum is float32. Gradients for the first four arguments.
    """
    if hidden.shape != residual.shape or out.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            "hidden and residual must be (R, D) and out (M, D), got "
            f"{tuple(hidden.shape)}, {tuple(residual.shape)}, {tuple(out.shape)}"
        )
    if confidence.shape != hidden.shape[:1] or slot.shape != hidden.shape[:1] or confidence.dtype != torch.float32:
        raise ValueError(f"confidence and slot must be ({hidden.shape[0]},), and confidence float32")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    # On the device, where a CUDA graph draws anew at every replay; a layer that runs twice finds the state restored.
    seed = torch.randint(2**31 - 1, (1,), device=hidden.device) if dropout_p > 0 else None
    tensors = (hidden, residual, out, confidence, slot)
    return _ExtractResidual.apply(*(t.contiguous() for t in tensors), seed, float(dropout_p), padded)


def _project(projected, scale, offset, cos, sin, table_rows, width, with_gate):
    """q, k, v and, when asked for, silu of the gate."""
    count, z = projected.shape[0], scale.shape[1]

    def empty(columns):
        return torch.empty(count, columns, dtype=projected.dtype, device=projected.device)

    q, k, v, gate = empty(z), empty(z), empty(width), empty(width) if with_gate else None
    if count > 0:
        columns = min(512, power_of_two(width))
        _project_kernel(
            (blocks_of(count, 16), 1 + blocks_of(width, columns)),
            _project_key(projected, scale, offset, cos, sin, table_rows, with_wide=with_gate),
            projected, scale, offset, cos, sin, table_rows, q, k, v, gate, count, projected.stride(0),
            options={"num_warps": 4},
            Z=z, V=width, ROTARY=cos is not None, HAS_ROWS=table_rows is not None, GATE=with_gate,
            BLOCK=power_of_two(blocks_of(z, 2), 8), ROWS=16, WIDTH=columns,
        )  # fmt: skip
    return q, k, v, gate


def _project_key(projected, scale, offset, cos, sin, table_rows, *grads, with_wide: bool) -> tuple | None:
    shape = projected.shape[1], scale.shape[1], projected.stride(0)
    form = scale.dtype, offset.dtype, cos is None, table_rows is None, with_wide
    tensors = (projected, scale, offset, cos, sin, table_rows, *grads)
    return aligned_key(tensors, projected.device, projected.dtype, *shape, *form)


def _project_backward(projected, scale, offset, cos, sin, table_rows, grad_q, grad_k, grad_v, grad_gate, grad):
    """Fills grad (M, Z + 2V), or only its first Z columns when grad_v is None; returns those of scale and offset."""
    count, z = projected.shape[0], scale.shape[1]
    width = (projected.shape[1] - z) // 2
    rows, repeats = 16, 4
    parts = torch.empty(blocks_of(count, rows * repeats), 2, 2, z, dtype=torch.float32, device=projected.device)
    if count > 0:
        columns = min(256, power_of_two(width))
        slices = 0 if grad_v is None else blocks_of(width, columns)
        grads = grad_q, grad_k, grad_v, grad_gate
        inputs = projected, scale, offset, cos, sin, table_rows
        _project_backward_kernel(
            (parts.shape[0], 1 + slices), _project_key(*inputs, *grads, with_wide=grad_v is not None),
            *inputs, *grads, grad, parts,
            count, projected.stride(0), options={"num_warps": 4},
            Z=z, V=width, ROTARY=cos is not None, HAS_ROWS=table_rows is not None, WIDE=grad_v is not None,
            BLOCK=power_of_two(blocks_of(z, 2), 8), ROWS=rows, REPEATS=repeats, WIDTH=columns,
        )  # fmt: skip
    grad_scale, grad_offset = parts.sum(0)
    return grad_scale.to(scale.dtype), grad_offset.to(offset.dtype)


class _ProjectUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, scale, offset, cos, sin, table_rows):
        ctx.save_for_backward(projected, scale, offset, cos, sin, table_rows)
        width = (projected.shape[1] - scale.shape[1]) // 2
        with on_device(projected):
            return _project(projected, scale, offset, cos, sin, table_rows, width, True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        projected = ctx.saved_tensors[0]
        grad = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
        grads = [g.contiguous() for g in grads]
        with on_device(projected):
            return grad, *_project_backward(*ctx.saved_tensors, *grads, grad), None, None, None


def _check_projected(projected, scale, offset, cos, sin, table_rows) -> None:
    z = scale.shape[1]
    if scale.shape != (2, z) or offset.shape != (2, z) or projected.shape[1] <= z or (projected.shape[1] - z) % 2:
        raise ValueError(
            "projected must be (M, Z + 2V) and scale, offset (2, Z), got "
            f"{tuple(projected.shape)}, {tuple(scale.shape)}, {tuple(offset.shape)}"
        )
    if cos is None:
        return
    if z % 2:
        raise ValueError(f"rotary positions need an even query width, got {z}")
    expected = (projected.shape[0] if table_rows is None else cos.shape[0], z // 2)
    if cos.shape != expected or sin.shape != expected or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must be {expected} float32, got {tuple(cos.shape)} {cos.dtype}")


def project_unit(
    projected: Tensor,
    scale: Tensor,
    offset: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    table_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the unit makes of its input projection: q, k, v and the gate (arXiv 2306.11197, section 3.3).

    Args:
        projected: (M, Z + 2V), z, gate and v before their silu.
        scale, offset: (2, Z), row 0 for q and row 1 for k: silu(z) * scale + offset.
        cos, sin: (M, Z/2) float32, the rotary angles of pairs of channels 2i and 2i+1; None for no rotation.
        table_rows: (M,) int64, which row of cos and sin belongs to which token; None where they correspond.

    Returns:
        q, k (M, Z), v = silu(v) and gate = silu(gate) (M, V), all of projected's dtype; float32 inside.
    """
    _check_projected(projected, scale, offset, cos, sin, table_rows)
    return _ProjectUnit.apply(*_contiguous(projected, scale, offset, cos, sin, table_rows))


def _contiguous(projected, *others):
    projected = projected if projected.stride(-1) == 1 else projected.contiguous()
    return projected, *(None if t is None else t.contiguous() for t in others)


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, scale, offset, table, cos, sin, table_rows, start, end, q_place, k_place, call):
        z = scale.shape[1]
        width = (projected.shape[1] - z) // 2
        ranges = AttentionRanges(start, end, q_place, k_place)
        ctx.call = call
        if call.list_size == 0:
            ctx.save_for_backward(projected, scale, offset, table)
            return projected.new_zeros(projected.shape[0], width)
        gate = projected[:, z : z + width]
        with on_device(projected):
            q, k, v, _ = _project(projected, scale, offset, cos, sin, table_rows, width, False)
            out, gated, row_stats, plan = attention_forward(q, k, v, table, ranges, call, gate, "silu")
        # v is silu of what is kept anyway, and the widest tensor here.
        ctx.save_for_backward(
            projected, scale, offset, table, cos, sin, table_rows, q, k, out, row_stats, plan, *ranges
        )
        return gated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.call.list_size == 0:
            return *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors), *[None] * 8
        projected, scale, offset, table, cos, sin, table_rows, q, k, out, row_stats, plan, *ranges = ctx.saved_tensors
        z, width = q.shape[1], out.shape[1]
        whole = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
        _, gate, raw_v = projected.split([z, width, width], dim=1)
        _, grad_gate, grad_v = whole.split([z, width, width], dim=1)
        grad = grad.to(out.dtype).contiguous()
        with on_device(projected):
            grad_out, sums = row_sums(grad, out, gate, "silu", grad_gate)
            grad_q, grad_k, grad_table = attention_backward(
                grad_out,
                q,
                k,
                _silu(raw_v),
                table,
                AttentionRanges(*ranges),
                ctx.call,
                row_stats,
                sums,
                plan,
                grad_v,
                raw_v,
            )
            grad_scale, grad_offset = _project_backward(
                projected, scale, offset, cos, sin, table_rows, grad_q, grad_k, None, None, whole
            )
        return whole, grad_scale, grad_offset, grad_table, *[None] * 8


def gated_unit(
    projected: Tensor,
    scale: Tensor,
    offset: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    activation: str,
    attention_scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    table_rows: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_center: int = 0,
    q_place: Tensor | None = None,
    k_place: Tensor | None = None,
    max_keys: int | None = None,
) -> Tensor:
    """Everything between the unit's two linears, for tokens that are their own keys (no memory, no dropout).

    The same as `project_unit`, `windowed_attention_triton` and the product with the gate; silu(gate) and its product
    never take a pass of their own, and the gradient of `projected` is written in place by the kernels that find it.

    Args:
        projected, scale, offset, cos, sin, table_rows: as in `project_unit`.
        key_start, key_end: (M,) int64 into the M tokens themselves.
        activation, attention_scale, bias_table, bias_center, q_place, k_place, max_keys: as in
            `windowed_attention_triton` (attention_scale is its `scale`).

    Returns:
        (M, V) of projected's dtype: attention * silu(gate), the input of the output linear.
    """
    _check_projected(projected, scale, offset, cos, sin, table_rows)
    z = scale.shape[1]
    width = (projected.shape[1] - z) // 2
    shapes = projected[:, :z], projected[:, :z], projected[:, z + width :]
    check_attention(*shapes, key_start, key_end, activation, bias_table, q_place, k_place)
    call = plan_attention(*shapes, key_start, key_end, activation, attention_scale, bias_center, max_keys)
    projected, *others = _contiguous(
        projected, scale, offset, bias_table, cos, sin, table_rows, key_start, key_end, q_place, k_place
    )
    return _GatedUnit.apply(projected, *others, call)
