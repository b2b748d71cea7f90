"""The latent configurator and the list of activated tokens in Triton: one pass over the tokens each.

Letters: R tokens of a batch (B * L), M activated ones, D width, W memory size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops_stream_seqboat import TokenStream
from .triton_launch_seqboat import aligned_key, blocks_of, interpreted, kernel, on_device, row_block

try:
    import triton.language as tl
except ImportError:
    tl = None

# Programs that share the sums of the backward pass: enough to fill the chip, few enough to add up at no cost.
_PROGRAMS = 512
_BLOCK = 1024
# As in the torch router: below it only logits less than 1e-12 apart would tell the difference.
_LOWEST_LOG_TEMPERATURE = -30.0


@kernel("count", "shift")
def _route_kernel(
    x, weight, bias, log_temperature, real, confidence, active, margin, count, shift,
    HAS_REAL: tl.constexpr, LOWEST: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
):  # fmt: skip
    """grad_x, and in a row of `parts` a program: sums for the difference of weights (D), of biases, the temperature."""
    columns = tl.arange(0, WIDTH)
    within = columns < D
    of_skip = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    slope = tl.load(weight + D + columns, mask=within, other=0.0).to(tl.float32) - of_skip
    sharpness = tl.exp(-tl.maximum(tl.load(log_temperature).to(tl.float32), LOWEST))
    weight_sum = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((ROWS,), tl.float32)
    heat_sum = tl.zeros((ROWS,), tl.float32)
    for repeat in range(repeats):
        rows = (tl.program_id(0) * repeats + repeat) * ROWS + tl.arange(0, ROWS)
        valid = rows < count
        inside = valid[:, None] & within[None, :]
        place = rows.to(tl.int64)[:, None] * D + columns[None, :]
        sure = tl.load(confidence + rows, mask=valid, other=0.0)
        # 0 where skipped, as the confidence is.
        part = tl.load(grad + rows, mask=valid, other=0.0) * sure * (1 - sure)
        heat_sum += part * tl.load(margin + rows, mask=valid, other=0.0)
        part = part * sharpness
        bias_sum += part
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        weight_sum += tl.sum(part[:, None] * value, 0)
        tl.store(grad_x + place, (part[:, None] * slope[None, :]).to(grad_x.dtype.element_ty), mask=inside)
    line = parts + tl.program_id(0) * (D + 2)
    tl.store(line + columns, weight_sum, mask=within)
    tl.store(line + D, tl.sum(bias_sum, 0))
    tl.store(line + D + 1, tl.sum(heat_sum, 0))


@kernel("programs")
def _route_sums_kernel(
    parts, log_temperature, grad_weight, grad_bias, grad_log_temperature, programs,
    LOWEST: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
    heat = tl.load(log_temperature).to(tl.float32)
    # d sharpness / d log temperature = -sharpness, and 0 below the clamp.
    total = tl.where(heat >= LOWEST, -tl.exp(-heat), 0.0) * total
    kind = grad_log_temperature.dtype.element_ty
    tl.store(grad_log_temperature + columns - D - 1, total.to(kind), mask=columns == D + 1)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, log_temperature, real, shift):
        count, width = x.shape
        confidence, margin = torch.empty(2, count, dtype=torch.float32, device=x.device).unbind()
        active = torch.empty(count, dtype=torch.bool, device=x.device)
        rows, columns = row_block(width)
        key = x.device, width, real is None, x.dtype, weight.dtype, bias.dtype, log_temperature.dtype, count % 4 == 0
        with on_device(x):
            _route_kernel(
                (blocks_of(count, rows),), aligned_key((x, weight, bias, log_temperature, real), *key),
                x, weight, bias, log_temperature, real, confidence, active, margin, count, shift,
                options={"num_warps": 4},
                HAS_REAL=real is not None, LOWEST=_LOWEST_LOG_TEMPERATURE, D=width, ROWS=rows, WIDTH=columns,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, log_temperature, confidence, margin)
        ctx.mark_non_differentiable(active)
        return confidence, active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        x, weight, bias, log_temperature, confidence, margin = ctx.saved_tensors
        count, width = x.shape
        rows, columns = row_block(width)
        repeats = max(1, blocks_of(blocks_of(count, rows), _PROGRAMS))
        programs = max(1, blocks_of(count, rows * repeats))
        parts = torch.empty(programs, width + 2, dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grads = torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(log_temperature)
        kinds = x.dtype, weight.dtype, bias.dtype, log_temperature.dtype
        grad = grad.contiguous()
        key = aligned_key((x, weight, log_temperature, grad), x.device, width, *kinds, count % 4 == 0)
        with on_device(x):
            _route_backward_kernel(
                (programs,), key,
                grad, x, weight, log_temperature, confidence, margin, grad_x, parts, count, repeats,
                options={"num_warps": 4}, LOWEST=_LOWEST_LOG_TEMPERATURE, D=width, ROWS=rows, WIDTH=columns,
            )  # fmt: skip
            _route_sums_kernel(
                (blocks_of(width + 2, 32),), key,
                parts, log_temperature, *grads, programs,
                options={"num_warps": 4}, LOWEST=_LOWEST_LOG_TEMPERATURE, D=width, ROWS=64, WIDTH=32,
            )  # fmt: skip
        return grad_x, *grads, None, None


def route(
    x: Tensor, weight: Tensor, bias: Tensor, log_temperature: Tensor, *, real: Tensor | None = None, shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The tempered softmax of two logits and its decision (arXiv 2306.11197, section 3.2), float32 inside.

    Args:
        x: (R, D), any floating dtype but float64.
        weight: (2, D); bias: (2,); log_temperature: (1,). Row 0 is the logit of skipping, row 1 of attending.
        real: (R,) bool, False at pads; None if there are none.
        shift: added to the logit of skipping.

    Returns:
        confidence (R,) float32, the probability of attending where that wins, else 0; active (R,) bool, run > skip.
        Gradients for x, weight, bias and log_temperature.
    """
    if weight.shape != (2, x.shape[1]) or bias.shape != (2,) or log_temperature.shape != (1,):
        shapes = tuple(weight.shape), tuple(bias.shape), tuple(log_temperature.shape)
        raise ValueError(f"weight, bias, log_temperature must be (2, {x.shape[1]}), (2,) and (1,), got {shapes}")
    if real is not None and (real.shape != x.shape[:1] or real.dtype != torch.bool):
        raise ValueError(f"real must be ({x.shape[0]},) bool, got {tuple(real.shape)} {real.dtype}")
    tensors = (x, weight, bias, log_temperature)
    real = None if real is None else real.contiguous()
    return _Route.apply(*(t.contiguous() for t in tensors), real, float(shift))


@kernel("count", "length", "memory", "capacity")
def _stream_kernel(
    total, first, last, index, slot, start, end, count, length, memory, capacity,
    SEGMENTS: tl.constexpr, BIDIRECTIONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    tl.store(slot + at, tl.where(active, place, -1).to(tl.int64), mask=valid)
    # Behind the last token: no token, and no key. Empty runs at the border of a tile take no tile.
    size = tl.minimum(tl.load(total + count - 1), capacity)
    behind = (at >= size) & (at < capacity)
    border = tl.zeros((BLOCK,), tl.int64) + tl.minimum((size + 127) // 128 * 128, capacity)
    tl.store(index + at, border * 0 - 1, mask=behind)
    tl.store(start + at, border, mask=behind)
    tl.store(end + at, border, mask=behind)


class PendingStream:
    """Compression under way: `wait` knows M once the device has come this far, and the host may queue work meanwhile.

    Args:
        active: (B, L) bool.
        memory_size: W; a token attends to itself and the W activated tokens of its segment before it (and after it
            when `bidirectional`).
        bounds: first and last column of each token's segment, (2, B * L) int64 places among the R; None where every
            row is one segment.
        capacity: None, or a fixed length of the stream for which nobody waits: it is filled up with no tokens, and of
            more activated tokens than that the last are left out.

    Attributes:
        count: (1,) int32 on the device, how many tokens are activated, the ones left out included.
    """

    def __init__(
        self,
        active: Tensor,
        memory_size: int,
        bidirectional: bool,
        bounds: Tensor | None = None,
        capacity: int | None = None,
    ):
        flat, length = active.flatten(), active.shape[1]
        tokens, device = flat.shape[0], flat.device
        total = flat.cumsum(0, dtype=torch.int32)
        self.padded = capacity is not None
        capacity = tokens if capacity is None else min(capacity, tokens)
        self.slot, *lists = torch.empty(4, tokens, dtype=torch.int64, device=device).unbind()
        first, last = (None, None) if bounds is None else bounds.unbind()
        with on_device(active):
            _stream_kernel(
                (blocks_of(tokens, _BLOCK),), (device, bounds is None, bidirectional, tokens % 2 == 0),
                total, first, last, lists[0], self.slot, *lists[1:], tokens, length, memory_size, capacity,
                options={"num_warps": 4},
                SEGMENTS=bounds is not None, BIDIRECTIONAL=bidirectional, BLOCK=_BLOCK,
            )  # fmt: skip
            self.lists, self.count = [part[:capacity] for part in lists], total[-1:]
            self.size = self.arrival = None
            if not self.padded:
                self.size = self.count.to("cpu", non_blocking=True)
                if not interpreted():
                    self.arrival = torch.cuda.Event()
                    self.arrival.record()

    def wait(self) -> TokenStream:
        """The layer's one synchronisation with the device, or none with a `capacity`."""
        if self.padded:
            return TokenStream(self.slot, *self.lists, padded=True)
        if self.arrival is not None:
            self.arrival.synchronize()
        size = int(self.size)
        return TokenStream(self.slot, *(part[:size] for part in self.lists), padded=False)
