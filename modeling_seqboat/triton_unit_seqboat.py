"""What lies between the linears of the gated attention unit, in Triton: each stage one pass over memory.

Letters: M activated tokens, Z query/key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .triton_attention_seqboat import (
    AttentionRanges,
    attention_backward,
    attention_forward,
    plan_attention,
    row_sums,
    windowed_attention_triton,
)
from .triton_launch_seqboat import first_derivative_only, jit, kernel, power_of_two, row_block, tl
from .triton_rows_seqboat import silu_slope


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
    Z: tl.constexpr, V: tl.constexpr, ROTARY: tl.constexpr, HAS_ROWS: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
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
        if GATED:
            value = tl.load(source + Z, mask=inside, other=0.0).to(tl.float32)
            tl.store(gate + place, (value * tl.sigmoid(value)).to(gate.dtype.element_ty), mask=inside)


@kernel("count")
def _project_backward_kernel(
    projected, scale, offset, cos, sin, table_rows, grad_q, grad_k, grad_v, grad_gate, grad, parts, count, stride,
    Z: tl.constexpr, V: tl.constexpr, ROTARY: tl.constexpr, HAS_ROWS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, REPEATS: tl.constexpr, WIDTH: tl.constexpr,
):
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
            even, even_slope = silu_slope(raw_even)
            odd, odd_slope = silu_slope(raw_odd)
            qe, qo = _load_pairs(grad_q, Z, rows, valid, Z, ROWS, BLOCK)
            ke, ko = _load_pairs(grad_k, Z, rows, valid, Z, ROWS, BLOCK)
            if ROTARY:
                c, s = _load_angles(cos, sin, table_rows, rows, valid, HAS_ROWS, Z // 2, BLOCK)
                qe, qo = qe * c + qo * s, qo * c - qe * s
                ke, ko = ke * c + ko * s, ko * c - ke * s
            scale_sums = (
                scale_sums[0] + tl.sum(qe * even, 0), scale_sums[1] + tl.sum(qo * odd, 0),
                scale_sums[2] + tl.sum(ke * even, 0), scale_sums[3] + tl.sum(ko * odd, 0),
            )
            offset_sums = (
                offset_sums[0] + tl.sum(qe, 0), offset_sums[1] + tl.sum(qo, 0),
                offset_sums[2] + tl.sum(ke, 0), offset_sums[3] + tl.sum(ko, 0),
            )
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
            _, slope = silu_slope(tl.load(source + Z + V, mask=inside, other=0.0).to(tl.float32))
            slope = slope * tl.load(grad_v + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(target + Z + V, slope.to(grad.dtype.element_ty), mask=inside)
            _, slope = silu_slope(tl.load(source + Z, mask=inside, other=0.0).to(tl.float32))
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
    _silu_kernel((-(-count // rows),), x, out, count, x.stride(0), D=width, ROWS=rows, WIDTH=columns)
    return out


def _project(projected, scale, offset, cos, sin, table_rows, width, gated):
    """q, k, v and, with `gated`, silu of the gate."""
    count, z = projected.shape[0], scale.shape[1]
    like = {"dtype": projected.dtype, "device": projected.device}
    # Tensors of their own, so that each is aligned.
    q, k = torch.empty(count, z, **like), torch.empty(count, z, **like)
    v = torch.empty(count, width, **like)
    gate = torch.empty(count, width, **like) if gated else None
    if count > 0:
        columns = min(512, power_of_two(width))
        _project_kernel(
            (-(-count // 16), 1 - (-width // columns)),
            projected, scale, offset, cos, sin, table_rows, q, k, v, gate, count, projected.stride(0),
            Z=z, V=width, ROTARY=cos is not None, HAS_ROWS=table_rows is not None, GATED=gated,
            BLOCK=power_of_two(-(-z // 2), 8), ROWS=16, WIDTH=columns,
        )
    return q, k, v, gate


def _project_backward(projected, scale, offset, cos, sin, table_rows, grad_q, grad_k, grad_v, grad_gate, grad):
    """Fills grad (M, Z + 2V), or only its first Z columns when grad_v is None; returns those of scale and offset."""
    count, z = projected.shape[0], scale.shape[1]
    width = (projected.shape[1] - z) // 2
    rows, repeats = 16, 4
    parts = torch.empty(-(-count // (rows * repeats)), 2, 2, z, dtype=torch.float32, device=projected.device)
    if count > 0:
        columns = min(256, power_of_two(width))
        slices = 0 if grad_v is None else -(-width // columns)
        _project_backward_kernel(
            (parts.shape[0], 1 + slices),
            projected, scale, offset, cos, sin, table_rows, grad_q, grad_k, grad_v, grad_gate, grad, parts,
            count, projected.stride(0),
            Z=z, V=width, ROTARY=cos is not None, HAS_ROWS=table_rows is not None, WIDE=grad_v is not None,
            BLOCK=power_of_two(-(-z // 2), 8), ROWS=rows, REPEATS=repeats, WIDTH=columns,
        )
    grad_scale, grad_offset = parts.sum(0)
    return grad_scale.to(scale.dtype), grad_offset.to(offset.dtype)


class _ProjectUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, scale, offset, cos, sin, table_rows):
        ctx.save_for_backward(projected, scale, offset, cos, sin, table_rows)
        width = (projected.shape[1] - scale.shape[1]) // 2
        return _project(projected, scale, offset, cos, sin, table_rows, width, True)

    @first_derivative_only
    def backward(ctx, *grads):
        # Read once: under gradient checkpointing a second reading is an error.
        saved = ctx.saved_tensors
        grad = torch.empty(saved[0].shape, dtype=saved[0].dtype, device=saved[0].device)
        return grad, *_project_backward(*saved, *(g.contiguous() for g in grads), grad), None, None, None


def project_unit_triton(
    projected: Tensor, scale: Tensor, offset: Tensor, cos: Tensor | None = None, sin: Tensor | None = None,
    table_rows: Tensor | None = None, activation: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`project_unit` with silu, float32 inside, all results of projected's dtype."""
    projected = projected if projected.stride(-1) == 1 else projected.contiguous()
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    return _ProjectUnit.apply(projected, scale.contiguous(), offset.contiguous(), cos, sin, table_rows)


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, scale, offset, table, cos, sin, table_rows, start, end, q_place, k_place, call):
        z = scale.shape[1]
        width = (projected.shape[1] - z) // 2
        ranges = AttentionRanges(start, end, q_place, k_place)
        ctx.call = call
        ctx.set_materialize_grads(False)
        if call.list_size == 0:
            ctx.save_for_backward(projected, scale, offset, table)
            k, v = projected.new_zeros(projected.shape[0], z), projected.new_zeros(projected.shape[0], width)
            ctx.mark_non_differentiable(k, v)
            return v.clone(), k, v
        gate = projected[:, z : z + width]
        q, k, v, _ = _project(projected, scale, offset, cos, sin, table_rows, width, False)
        out, gated, row_stats, plan = attention_forward(q, k, v, table, ranges, call, gate, "silu")
        # v is silu of what is kept anyway, and the widest tensor here.
        ctx.save_for_backward(
            projected, scale, offset, table, cos, sin, table_rows, q, k, out, row_stats, plan, *ranges
        )
        ctx.mark_non_differentiable(k, v)
        return gated, k, v

    @first_derivative_only
    def backward(ctx, grad, *_):
        if ctx.call.list_size == 0:
            return *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors), *[None] * 8
        projected, scale, offset, table, cos, sin, table_rows, q, k, out, row_stats, plan, *ranges = ctx.saved_tensors
        z, width = q.shape[1], out.shape[1]
        whole = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
        _, gate, raw_v = projected.split([z, width, width], dim=1)
        _, grad_gate, grad_v = whole.split([z, width, width], dim=1)
        grad = grad.to(out.dtype).contiguous()
        grad_out, sums = row_sums(grad, out, gate, "silu", grad_gate)
        grad_q, grad_k, grad_table = attention_backward(
            grad_out, q, k, _silu(raw_v), table, AttentionRanges(*ranges), ctx.call, row_stats, sums, plan, grad_v,
            raw_v,
        )
        grad_scale, grad_offset = _project_backward(
            projected, scale, offset, cos, sin, table_rows, grad_q, grad_k, None, None, whole
        )
        return whole, grad_scale, grad_offset, grad_table, *[None] * 8


def gated_unit_triton(
    projected: Tensor, scale: Tensor, offset: Tensor, key_start: Tensor, key_end: Tensor, *, attention: str,
    attention_scale: float, activation: Callable | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    table_rows: Tensor | None = None, bias_table: Tensor | None = None, bias_center: int = 0,
    q_place: Tensor | None = None, k_place: Tensor | None = None, max_keys: int | None = None,
    memory: tuple | None = None, value_dropout: float = 0.0, attention_dropout: float = 0.0, keep: bool = False,
    project_unit: Callable | None = None, windowed_attention: Callable | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`gated_unit` with silu, without dropouts: `project_unit_triton` and `windowed_attention_triton` with its gate.

    For tokens that are their own keys, silu(gate) and its product never take a pass of their own, and the gradient of
    `projected` is written in place by the kernels that find it.
    """
    if memory is not None:
        q, k, v, gate = project_unit_triton(projected, scale, offset, cos, sin, table_rows)
        place, old_keys, old_values = memory
        gated = windowed_attention_triton(
            q, place.join(old_keys, k), place.join(old_values, v), key_start, key_end, activation=attention,
            scale=attention_scale, bias_table=bias_table, bias_center=bias_center, q_place=q_place, k_place=k_place,
            max_keys=max_keys, gate=gate,
        )
        return (gated, k, v) if keep else (gated, None, None)
    z = scale.shape[1]
    width = (projected.shape[1] - z) // 2
    count = projected.shape[0]
    call = plan_attention(count, count, width, projected.dtype, attention, attention_scale, bias_center, max_keys)
    projected = projected if projected.stride(-1) == 1 else projected.contiguous()
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    gated, k, v = _GatedUnit.apply(
        projected, scale.contiguous(), offset.contiguous(), bias_table, cos, sin, table_rows, key_start, key_end,
        q_place, k_place, call,
    )
    return (gated, k, v) if keep else (gated, None, None)
