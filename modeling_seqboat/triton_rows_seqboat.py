"""Stages of a layer that pass over rows of tokens once, in Triton: norm, router, the list of activated tokens, their
rows and the way back, bias gradients.

Letters: R tokens of a batch (B * L), M activated ones, D width, W memory size.

Compress (`gather_rows_triton`) and extract (`extract_residual_triton`) use the list of activated tokens both ways:
`index` (M,) names the token of an activated row, `packed_index` (R,) the activated row of a token, or -1. With both at
hand every gradient is a gather too, and nothing is added atomically.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from .ops_layout_seqboat import Packed, lead_with_memory, memory_before
from .triton_launch_seqboat import first_derivative_only, jit, kernel, power_of_two, program_sums, row_block, tl

# Programs that share sums over all rows: enough to fill the chip, few enough to add up at no cost.
_PROGRAMS = 512
# Tokens that one program of the list of activated tokens looks at.
_LIST_BLOCK = 1024
# As in the torch router: below it only logits less than 1e-12 apart would tell the difference.
_LOWEST_LOG_TEMPERATURE = -30.0
# The bias gradient: rows and columns that a program reads at a time; programs in all, and along the rows.
_ROWS, _COLUMNS = 32, 128
_COLUMN_PROGRAMS, _MOST_ROW_PROGRAMS = 1024, 256


@jit
def silu_slope(x):
    """silu(x) and its derivative, float32."""
    squash = tl.sigmoid(x)
    value = x * squash
    return value, squash + value * (1 - squash)


@kernel("count")
def _norm_kernel(
    x, weight, bias, out, mean, scale, count, eps,
    CENTERED: tl.constexpr, AFFINE: tl.constexpr, SHIFTED: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Without CENTERED the mean is taken for 0, as RMS and scale norm do; SHIFTED: there is a bias."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    within, valid = columns < D, rows < count
    inside = valid[:, None] & within[None, :]
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    center = tl.zeros((ROWS,), tl.float32)
    if CENTERED:
        center = tl.sum(value, 1) / D
    value = tl.where(inside, value - center[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(mean + rows, center, mask=valid)
    tl.store(scale + rows, factor, mask=valid)
    value = value * factor[:, None]
    if AFFINE:
        value = value * tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    if SHIFTED:
        value += tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@kernel("count", "repeats")
def _norm_backward_kernel(
    grad, residual_grad, x, weight, mean, scale, grad_x, parts, count, repeats,
    CENTERED: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """grad_x, the residual's gradient added, and a row of sums a program: (2, D) for weight and bias."""
    columns = tl.arange(0, WIDTH)
    within = columns < D
    factor = tl.zeros((WIDTH,), tl.float32) + 1.0
    if AFFINE:
        factor = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((WIDTH,), tl.float32)
    for repeat in range(repeats):
        rows = (tl.program_id(0) * repeats + repeat) * ROWS + tl.arange(0, ROWS)
        valid = rows < count
        inside = valid[:, None] & within[None, :]
        place = rows.to(tl.int64)[:, None] * D + columns[None, :]
        above = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(scale + rows, mask=valid, other=0.0)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value = (value - tl.load(mean + rows, mask=valid, other=0.0)[:, None]) * inverse[:, None]
        value = tl.where(inside, value, 0.0)
        if AFFINE:
            weight_sum += tl.sum(above * value, 0)
            bias_sum += tl.sum(above, 0)
        above = above * factor[None, :]
        along = tl.sum(above * value, 1) / D
        level = tl.zeros((ROWS,), tl.float32)
        if CENTERED:
            level = tl.sum(above, 1) / D
        result = (above - level[:, None] - value * along[:, None]) * inverse[:, None]
        if RESIDUAL:
            result += tl.load(residual_grad + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=inside)
    if AFFINE:
        line = parts + tl.program_id(0) * (2 * D)
        tl.store(line + columns, weight_sum, mask=within)
        tl.store(line + D + columns, bias_sum, mask=within)


class _NormResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, centered, dtype):
        width = x.shape[-1]
        count = x.numel() // width
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        mean, scale = torch.empty(2, count, dtype=torch.float32, device=x.device).unbind()
        rows, columns = row_block(width)
        _norm_kernel(
            (-(-count // rows),), x, weight, bias, out, mean, scale, count, eps,
            CENTERED=centered, AFFINE=weight is not None, SHIFTED=bias is not None, D=width, ROWS=rows, WIDTH=columns,
        )
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.centered = centered
        ctx.set_materialize_grads(False)
        return out, x

    @first_derivative_only
    def backward(ctx, grad, residual_grad):
        x, weight, bias, mean, scale = ctx.saved_tensors
        width = x.shape[-1]
        count = x.numel() // width
        affine = weight is not None
        if grad is None:
            zeros = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
            return residual_grad, *zeros, None, None, None
        rows, columns = row_block(width)
        programs, repeats, parts = program_sums(count, rows, _PROGRAMS, x, 2, width if affine else 0)
        grad_x = torch.empty_like(x)
        grad = grad.contiguous()
        residual_grad = None if residual_grad is None else residual_grad.contiguous()
        _norm_backward_kernel(
            (programs,), grad, residual_grad, x, weight, mean, scale, grad_x, parts, count, repeats,
            CENTERED=ctx.centered, AFFINE=affine, RESIDUAL=residual_grad is not None,
            D=width, ROWS=rows, WIDTH=columns,
        )
        if not affine:
            return grad_x, None, None, None, None, None
        weight_grad, bias_grad = parts.sum(0)
        bias_grad = None if bias is None else bias_grad.to(bias.dtype)
        return grad_x, weight_grad.to(weight.dtype), bias_grad, None, None, None


def norm_residual_triton(
    x: Tensor, norm: Callable | None, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`norm_residual`, with one kernel each way, in which the gradients of the norm and the residual meet.

    Args:
        x: (..., D), any floating dtype but float64; norm: what the torch twin runs, not read here.
        weight, bias: (D,), or None; eps: added to the variance; dtype: of the normalised output, float32 inside.
        centered: whether the mean is taken off, as layer norm does and RMS norm does not.
    """
    weight, bias = None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()
    return _NormResidual.apply(x.contiguous(), weight, bias, eps, centered, dtype)


@kernel("count", "shift")
def _route_kernel(
    x, weight, bias, log_temperature, real, confidence, active, margin, count, shift,
    HAS_REAL: tl.constexpr, LOWEST: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    valid = rows < count
    inside = valid[:, None] & (columns < D)[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    of_skip = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    of_run = tl.load(weight + D + columns, mask=columns < D, other=0.0).to(tl.float32)
    skip = tl.sum(value * of_skip[None, :], 1) + tl.load(bias).to(tl.float32) + shift
    run = tl.sum(value * of_run[None, :], 1) + tl.load(bias + 1).to(tl.float32)
    chosen = run > skip
    if HAS_REAL:
        chosen = chosen & (tl.load(real + rows, mask=valid, other=0) != 0)
    sharpness = tl.exp(-tl.maximum(tl.load(log_temperature).to(tl.float32), LOWEST))
    tl.store(margin + rows, run - skip, mask=valid)
    tl.store(confidence + rows, tl.where(chosen, tl.sigmoid((run - skip) * sharpness), 0.0), mask=valid)
    tl.store(active + rows, chosen, mask=valid)


@kernel("count", "repeats")
def _route_backward_kernel(
    grad, x, weight, log_temperature, confidence, margin, grad_x, parts, count, repeats,
    LOWEST: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """grad_x, and in a row of `parts` a program: sums for the difference of weights (D), of biases, the
    temperature."""
    columns = tl.arange(0, WIDTH)
    within = columns < D
    of_skip = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    slope = tl.load(weight + D + columns, mask=within, other=0.0).to(tl.float32) - of_skip
    sharpness = tl.exp(-tl.maximum(tl.load(log_temperature).to(tl.float32), LOWEST))
    weight_sum = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((ROWS,), tl.float32)
    temperature_sum = tl.zeros((ROWS,), tl.float32)
    for repeat in range(repeats):
        rows = (tl.program_id(0) * repeats + repeat) * ROWS + tl.arange(0, ROWS)
        valid = rows < count
        inside = valid[:, None] & within[None, :]
        place = rows.to(tl.int64)[:, None] * D + columns[None, :]
        chance = tl.load(confidence + rows, mask=valid, other=0.0)
        # 0 where skipped, as the confidence is.
        part = tl.load(grad + rows, mask=valid, other=0.0) * chance * (1 - chance)
        temperature_sum += part * tl.load(margin + rows, mask=valid, other=0.0)
        part = part * sharpness
        bias_sum += part
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        weight_sum += tl.sum(part[:, None] * value, 0)
        tl.store(grad_x + place, (part[:, None] * slope[None, :]).to(grad_x.dtype.element_ty), mask=inside)
    line = parts + tl.program_id(0) * (D + 2)
    tl.store(line + columns, weight_sum, mask=within)
    tl.store(line + D, tl.sum(bias_sum, 0))
    tl.store(line + D + 1, tl.sum(temperature_sum, 0))


@kernel("programs")
def _route_sums_kernel(
    parts, log_temperature, grad_weight, grad_bias, grad_log_temperature, programs,
    LOWEST: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < programs)[:, None] & (columns < D + 2)[None, :]
        total += tl.sum(tl.load(parts + rows[:, None] * (D + 2) + columns[None, :], mask=inside, other=0.0), 0)
    kind = grad_weight.dtype.element_ty
    tl.store(grad_weight + columns, (-total).to(kind), mask=columns < D)
    tl.store(grad_weight + D + columns, total.to(kind), mask=columns < D)
    at_bias = columns == D
    tl.store(grad_bias + columns - D, (-total).to(grad_bias.dtype.element_ty), mask=at_bias)
    tl.store(grad_bias + columns - D + 1, total.to(grad_bias.dtype.element_ty), mask=at_bias)
    temperature = tl.load(log_temperature).to(tl.float32)
    # d sharpness / d log temperature = -sharpness, and 0 below the clamp.
    total = tl.where(temperature >= LOWEST, -tl.exp(-temperature), 0.0) * total
    kind = grad_log_temperature.dtype.element_ty
    tl.store(grad_log_temperature + columns - D - 1, total.to(kind), mask=columns == D + 1)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, log_temperature, real, shift):
        width = x.shape[-1]
        count = x.numel() // width
        confidence, margin = torch.empty(2, *x.shape[:-1], dtype=torch.float32, device=x.device).unbind()
        active = torch.empty(x.shape[:-1], dtype=torch.bool, device=x.device)
        rows, columns = row_block(width)
        _route_kernel(
            (-(-count // rows),), x, weight, bias, log_temperature, real, confidence, active, margin, count, shift,
            HAS_REAL=real is not None, LOWEST=_LOWEST_LOG_TEMPERATURE, D=width, ROWS=rows, WIDTH=columns,
        )
        ctx.save_for_backward(x, weight, bias, log_temperature, confidence, margin)
        ctx.mark_non_differentiable(active)
        return confidence, active

    @first_derivative_only
    def backward(ctx, grad, _):
        x, weight, bias, log_temperature, confidence, margin = ctx.saved_tensors
        width = x.shape[-1]
        count = x.numel() // width
        rows, columns = row_block(width)
        programs, repeats, parts = program_sums(count, rows, _PROGRAMS, x, width + 2)
        grad_x = torch.empty_like(x)
        grads = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(log_temperature)
        _route_backward_kernel(
            (programs,), grad.contiguous(), x, weight, log_temperature, confidence, margin, grad_x, parts, count,
            repeats, LOWEST=_LOWEST_LOG_TEMPERATURE, D=width, ROWS=rows, WIDTH=columns,
        )
        _route_sums_kernel(
            (-(-(width + 2) // 32),), parts, log_temperature, *grads, programs,
            LOWEST=_LOWEST_LOG_TEMPERATURE, D=width, ROWS=64, WIDTH=32,
        )
        return grad_x, *grads, None, None


def route_triton(
    x: Tensor, weight: Tensor, bias: Tensor, log_temperature: Tensor, real: Tensor | None = None, shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`route` in one kernel each way: x (..., D) of any floating dtype but float64, real (...). Gradients for x,
    weight, bias and log_temperature."""
    real = None if real is None else real.contiguous()
    return _Route.apply(x.contiguous(), weight.contiguous(), bias, log_temperature, real, float(shift))


# For compilers, without gradients. A copy of this file that came with a checkpoint registers its own.
route_opaque = torch.library.custom_op(
    f"{re.sub(r'[^0-9a-zA-Z]', '_', __name__)}::route", route_triton, mutates_args=()
)


@route_opaque.register_fake
def _(x, *others, **options) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.bool)


@kernel("count", "length", "memory", "capacity")
def _pack_kernel(
    total, first, last, index, packed_index, start, end, count, length, memory, capacity,
    SEGMENTS: tl.constexpr, BIDIRECTIONAL: tl.constexpr, BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    place = tl.load(total + at - 1, mask=valid & (at > 0), other=0)
    active = tl.load(total + at, mask=valid, other=0) != place
    if SEGMENTS:
        begin = tl.load(first + at, mask=active, other=0)
        final = tl.load(last + at, mask=active, other=0)
    else:
        begin = at // length * length
        final = begin + length - 1
    low = tl.load(total + begin - 1, mask=active & (begin > 0), other=0)
    stop = place + 1
    if BIDIRECTIONAL:
        stop = tl.minimum(place + memory + 1, tl.load(total + final, mask=active, other=0))
    active = active & (place < capacity)
    tl.store(index + place, at, mask=active)
    tl.store(start + place, tl.maximum(place - memory, low).to(tl.int64), mask=active)
    tl.store(end + place, tl.minimum(stop, capacity).to(tl.int64), mask=active)
    tl.store(packed_index + at, tl.where(active, place, -1).to(tl.int64), mask=valid)
    # Behind the last token: no token, and no key. Empty runs at the border of a tile take no tile.
    size = tl.minimum(tl.load(total + count - 1), capacity)
    behind = (at >= size) & (at < capacity)
    border = tl.zeros((BLOCK,), tl.int64) + tl.minimum((size + 127) // 128 * 128, capacity)
    tl.store(index + at, border * 0 - 1, mask=behind)
    tl.store(start + at, border, mask=behind)
    tl.store(end + at, border, mask=behind)


class _PendingPacked:
    """The list of activated tokens under way: `wait` knows M once the device has come this far, and the host may queue
    work meanwhile.

    Attributes:
        count: (1,) int32 on the device, how many tokens are activated, those that a capacity leaves out included.
    """

    def __init__(self, packed: Packed, capacity: int | None, length: int, memory_size: int, memory: tuple | None):
        self._packed, self._capacity, self._memory = packed, capacity, memory
        self._length, self._memory_size = length, memory_size
        self.count = packed.total[-1:]
        if capacity is None:
            sizes = self.count if memory is None else torch.cat([self.count, memory[1].sum()[None].int()])
            self._sizes = sizes.to("cpu", non_blocking=True)
            self._arrival = torch.cuda.Event() if self.count.is_cuda else None
            if self._arrival is not None:
                self._arrival.record()

    def wait(self) -> Packed:
        """The layer's one synchronisation with the device, or none with a capacity."""
        packed, size = self._packed, self._capacity
        if size is None:
            if self._arrival is not None:
                self._arrival.synchronize()
            size, *entries = self._sizes.tolist()
        packed.index = packed.index[:size]
        packed.key_start, packed.key_end = packed.key_start[:size], packed.key_end[:size]
        if self._memory is None:
            return packed
        count, filled, segment = self._memory
        return lead_with_memory(packed, self._length, self._memory_size, count, filled, segment, entries[0])


def pack_triton(
    active: Tensor, memory_size: int, bidirectional: bool, bounds: Tensor | None = None, *,
    capacity: int | None = None, memory: tuple[Tensor, Tensor | None] | None = None,
) -> _PendingPacked:
    """`pack`, which runs while the host goes on. With a `capacity` nobody waits for the device: the list has this
    length, is filled up with no tokens, and of more activated tokens than that the last are left out; `memory` is None
    then."""
    flat, length = active.flatten(), active.shape[1]
    tokens = flat.shape[0]
    total = flat.cumsum(0, dtype=torch.int32)
    room = tokens if capacity is None else min(capacity, tokens)
    packed_index, index, start, end = torch.empty(4, tokens, dtype=torch.int64, device=flat.device).unbind()
    first, last = (None, None) if bounds is None else bounds.unbind()
    _pack_kernel(
        (-(-tokens // _LIST_BLOCK),), total, first, last, index, packed_index, start, end,
        tokens, length, memory_size, room,
        SEGMENTS=bounds is not None, BIDIRECTIONAL=bidirectional, BLOCK=_LIST_BLOCK,
    )
    if memory is not None:
        count, segment = memory
        memory = count, memory_before(active, count, memory_size), segment
    packed = Packed(index, packed_index, start, end, total, padded=capacity is not None)
    return _PendingPacked(packed, None if capacity is None else room, length, memory_size, memory)


@kernel("length", "slots")
def _write_memory_kernel(
    total, first, before, keys, values, positions, new_keys, new_values, new_positions, after, length, slots,
    FIRST: tl.constexpr, Z: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    end = tl.load(total + (row + 1) * length - 1).to(tl.int64)
    if FIRST:
        begin = tl.load(first + row).to(tl.int64)
    else:
        begin = tl.load(total + row * length - 1, mask=row > 0, other=0).to(tl.int64)
    count = tl.load(before + row)
    last = count + end - begin - 1
    # The newest token that belongs in the slot, or one from before these columns.
    ordinal = last - (last - slot + slots) % slots
    written = (slot < slots) & (ordinal >= count)
    source = begin + ordinal - count
    entry = row * slots + slot
    columns = tl.arange(0, KEY_WIDTH)
    inside = written[:, None] & (columns < Z)[None, :]
    value = tl.load(new_keys + source[:, None] * Z + columns[None, :], mask=inside)
    tl.store(keys + entry[:, None] * Z + columns[None, :], value, mask=inside)
    columns = tl.arange(0, VALUE_WIDTH)
    inside = written[:, None] & (columns < V)[None, :]
    value = tl.load(new_values + source[:, None] * V + columns[None, :], mask=inside)
    tl.store(values + entry[:, None] * V + columns[None, :], value, mask=inside)
    tl.store(positions + entry, tl.load(new_positions + source, mask=written), mask=written)
    if tl.program_id(0) == 0:
        tl.store(after + row, last + 1)


def write_memory_triton(
    ring: list[Tensor], new: list[Tensor], total: Tensor, first: Tensor | None, activated_count: Tensor
) -> tuple[Tensor, None, list[Tensor]]:
    """`write_memory` in one launch; what is written over is lost. Numbers of rows and positions are int64."""
    (keys, values, positions), (batch, slots) = ring, ring[2].shape
    after = torch.empty_like(activated_count)
    first = None if first is None else first.contiguous()
    rows, value_width = row_block(values.shape[2])
    _write_memory_kernel(
        (max(1, -(-slots // rows)), batch), total.contiguous(), first, activated_count, keys, values, positions,
        *(t.contiguous() for t in new), after, total.shape[1], max(1, slots),
        FIRST=first is not None, Z=keys.shape[2], V=values.shape[2], ROWS=rows,
        KEY_WIDTH=power_of_two(keys.shape[2]), VALUE_WIDTH=value_width,
    )
    return after, None, []


@kernel("count")
def _gather_kernel(x, index, out, count, x_stride, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    source = tl.load(index + rows, mask=rows < count, other=-1).to(tl.int64)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    value = tl.load(x + source[:, None] * x_stride + columns[None, :], mask=inside & (source >= 0)[:, None], other=0.0)
    tl.store(out + rows.to(tl.int64)[:, None] * D + columns[None, :], value, mask=inside)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    count, width = index.shape[0], x.shape[1]
    out = torch.empty(count, width, dtype=x.dtype, device=x.device)
    if count > 0:
        rows, columns = row_block(width)
        _gather_kernel((-(-count // rows),), x, index, out, count, x.stride(0), D=width, ROWS=rows, WIDTH=columns)
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, packed_index):
        ctx.save_for_backward(packed_index)
        return _gather(x, index)

    @first_derivative_only
    def backward(ctx, grad):
        (packed_index,) = ctx.saved_tensors
        return _gather(grad if grad.stride(-1) == 1 else grad.contiguous(), packed_index), None, None


def gather_rows_triton(x: Tensor, index: Tensor, packed_index: Tensor) -> Tensor:
    """`gather_rows`, whose gradient is a gather through `packed_index`. Rows of x may lie apart; an index of -1 gives
    a row of zeros."""
    return _GatherRows.apply(x if x.stride(-1) == 1 else x.contiguous(), index, packed_index)


@jit
def _mixed(value):
    """A bijection of uint32, the router's `_mixed`: each bit of the result depends on every bit of the value."""
    value = (value ^ (value >> 16)) * 0x21F0AAAD
    value = (value ^ (value >> 15)) * 0x735A2D97
    return value ^ (value >> 15)


@jit
def _kept(seed, place, dropout):
    """What dropout multiplies with: 0 or 1 / (1 - dropout), by a hash of seed and place in the tensor, which takes
    less than half of the instructions of Triton's generator. Places 2^32 apart share a draw; no batch has so many."""
    drawn = _mixed(_mixed(place.to(tl.uint32)) + _mixed(tl.load(seed).to(tl.uint32)))
    return tl.where((drawn >> 8).to(tl.float32) * 2.0**-24 >= dropout, 1 / (1 - dropout), 0.0)


@jit
def _extracted(
    hidden, residual, out, confidence, packed_index, count, seed, dropout,
    DROPOUT: tl.constexpr, ALL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """A block of rows before its activation: the sum, the rows' numbers, place and extent, what of `out` they take,
    from where and how much of it, and what dropout left."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    source = rows.to(tl.int64)
    if not ALL:
        source = tl.load(packed_index + rows, mask=rows < count, other=-1).to(tl.int64)
    factor = tl.load(confidence + rows, mask=rows < count, other=0.0)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    chosen = inside & (source >= 0)[:, None]
    value_place = source[:, None] * D + columns[None, :]
    total = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(out + value_place, mask=chosen, other=0.0).to(tl.float32)
    total += tl.where(chosen, factor[:, None] * value, 0.0)
    kept = factor
    if DROPOUT:
        kept = _kept(seed, place, dropout)
        total *= kept
    total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    return total, rows, place, inside, value, value_place, chosen, factor, kept


@kernel("count", "dropout")
def _extract_kernel(
    hidden, residual, out, confidence, packed_index, result, count, seed, dropout,
    DROPOUT: tl.constexpr, ALL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    total, _, place, inside, _, _, _, _, _ = _extracted(
        hidden, residual, out, confidence, packed_index, count, seed, dropout, DROPOUT, ALL, D, ROWS, WIDTH
    )
    tl.store(result + place, (total * tl.sigmoid(total)).to(result.dtype.element_ty), mask=inside)


@kernel("count", "dropout")
def _extract_backward_kernel(
    grad, hidden, residual, out, confidence, packed_index, grad_hidden, grad_residual, grad_out, grad_confidence,
    count, seed, dropout,
    DROPOUT: tl.constexpr, SAME: tl.constexpr, ALL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    total, rows, place, inside, value, value_place, chosen, factor, kept = _extracted(
        hidden, residual, out, confidence, packed_index, count, seed, dropout, DROPOUT, ALL, D, ROWS, WIDTH
    )
    _, slope = silu_slope(total)
    slope = slope * tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if not SAME:
        tl.store(grad_residual + place, slope.to(grad_residual.dtype.element_ty), mask=inside)
    if DROPOUT:
        slope *= kept
    tl.store(grad_hidden + place, slope.to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_out + value_place, (slope * factor[:, None]).to(grad_out.dtype.element_ty), mask=chosen)
    tl.store(grad_confidence + rows, tl.sum(tl.where(chosen, slope * value, 0.0), 1), mask=rows < count)


class _ExtractResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, residual, out, confidence, packed_index, seed, dropout_p, padded):
        ctx.save_for_backward(hidden, residual, out, confidence, packed_index, seed)
        ctx.dropout_p, ctx.padded = dropout_p, padded
        dtype = torch.promote_types(hidden.dtype, residual.dtype)
        result = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        count, width = hidden.shape
        rows, columns = row_block(width)
        _extract_kernel(
            (-(-count // rows),), hidden, residual, out, confidence, packed_index, result, count, seed, dropout_p,
            DROPOUT=dropout_p > 0, ALL=packed_index is None, D=width, ROWS=rows, WIDTH=columns,
        )
        return result

    @first_derivative_only
    def backward(ctx, grad):
        hidden, residual, out, confidence, packed_index, seed = ctx.saved_tensors
        count, width = hidden.shape
        grad_hidden = torch.empty_like(hidden)
        dropout_p = ctx.dropout_p
        same = hidden.dtype == residual.dtype and dropout_p == 0
        grad_residual = grad_hidden if same else torch.empty_like(residual)
        # Rows of no token get no gradient from the kernel, and must not bring any to the linear before them.
        grad_out = torch.zeros_like(out) if ctx.padded else torch.empty_like(out)
        grad_confidence = torch.empty_like(confidence)
        rows, columns = row_block(width)
        _extract_backward_kernel(
            (-(-count // rows),), grad.contiguous(), hidden, residual, out, confidence, packed_index,
            grad_hidden, grad_residual, grad_out, grad_confidence, count, seed, dropout_p,
            DROPOUT=dropout_p > 0, SAME=same, ALL=packed_index is None, D=width, ROWS=rows, WIDTH=columns,
        )
        return grad_hidden, grad_residual, grad_out, grad_confidence, None, None, None, None


def extract_residual_triton(
    hidden: Tensor, residual: Tensor, out: Tensor, confidence: Tensor, packed: Packed, dropout_p: float = 0.0,
    activation: Callable | None = None,
) -> Tensor:
    """`extract_residual` with silu; the sum is float32. `packed.packed_index` names the row of `out` of each token,
    each row once; with `packed.padded`, rows of `out` that it does not name get a gradient of 0. The dropout's seed is
    drawn from the device's generator. Gradients for the first four arguments."""
    # On the device, where a CUDA graph draws anew at every replay; a layer that runs twice finds the state restored.
    seed = torch.randint(2**31 - 1, (1,), device=hidden.device) if dropout_p > 0 else None
    rows = None if packed.index is None else packed.packed_index
    tensors = hidden.contiguous(), residual.contiguous(), out.contiguous(), confidence.contiguous()
    return _ExtractResidual.apply(*tensors, rows, seed, float(dropout_p), packed.padded)


@kernel("count", "repeats")
def _column_sums_kernel(
    x, parts, count, repeats, stride, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """A row of `parts` a program along axis 0: sums of its rows."""
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for repeat in range(repeats):
        rows = (tl.program_id(0) * repeats + repeat) * ROWS + tl.arange(0, ROWS)
        inside = (rows < count)[:, None] & (columns < N)[None, :]
        place = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(parts + tl.program_id(0) * N + columns, tl.sum(total, 0), mask=columns < N)


def column_sums(x: Tensor) -> Tensor:
    """Sums over all dimensions but the last, (..., N) -> (N,) float32; the order of the additions is always the same.

    torch's reduction of a tall matrix reads it at a tenth of the memory's rate: 2.5 of the 34 ms of a training step at
    the enwik8 shape.

    Args:
        x: float32, float16 or bfloat16.
    """
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    count, width = rows.shape
    if count == 0:
        return torch.zeros(width, dtype=torch.float32, device=x.device)
    columns = min(_COLUMNS, power_of_two(width))
    slices = -(-width // columns)
    most = min(_MOST_ROW_PROGRAMS, -(-_COLUMN_PROGRAMS // slices))
    programs, repeats, parts = program_sums(count, _ROWS, most, x, width)
    _column_sums_kernel(
        (programs, slices), rows, parts, count, repeats, rows.stride(0), N=width, ROWS=_ROWS, WIDTH=columns
    )
    return parts.sum(0)


class _BiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, bias):
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @first_derivative_only
    def backward(ctx, grad):
        return grad, column_sums(grad).to(ctx.dtype)


def linear_triton(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, with the gradient of its bias by a kernel where it is a plain nn.Linear in training. An adapter, a
    quantised layer and one whose weights come when it is called are not, nor is one whose call is more than its
    forward: hooks, its own or everybody's, or a forward put in place of it, as Accelerate does to offload weights."""
    bias = getattr(module, "bias", None)
    if (
        not torch.is_grad_enabled()
        or type(module) is not nn.Linear
        or type(bias) not in (Tensor, nn.Parameter)
        or not bias.requires_grad
        or "forward" in module.__dict__
        or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or hooks._global_forward_hooks or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks or hooks._global_backward_pre_hooks
    ):
        return module(x.contiguous())
    # The bias is added without a gradient, which `_BiasGradient` then gives it.
    return _BiasGradient.apply(F.linear(x, module.weight, bias.detach()), bias)
