"""Layer normalisation at the entry of a layer in Triton, one pass over memory forward and one backward.

Letters: R tokens of a batch (B * L), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_launch_seqboat import aligned_key, blocks_of, kernel, on_device, row_block

try:
    import triton.language as tl
except ImportError:
    tl = None

# Programs that share the sums for weight and bias.
_PROGRAMS = 512


@kernel("count")
def _norm_kernel(
    x, weight, bias, out, mean, scale, count, eps,
    AFFINE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    within, valid = columns < D, rows < count
    inside = valid[:, None] & within[None, :]
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    center = tl.sum(value, 1) / D
    value = tl.where(inside, value - center[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(mean + rows, center, mask=valid)
    tl.store(scale + rows, factor, mask=valid)
    value = value * factor[:, None]
    if AFFINE:
        value = value * tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)[None, :]
        value += tl.load(bias + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@kernel("count", "repeats")
def _norm_backward_kernel(
    grad, residual_grad, x, weight, mean, scale, grad_x, parts, count, repeats,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
    def forward(ctx, x, weight, bias, eps, dtype):
        count, width = x.shape
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        mean, scale = torch.empty(2, count, dtype=torch.float32, device=x.device).unbind()
        affine = weight is not None
        rows, columns = row_block(width)
        kinds = x.dtype, dtype, None if weight is None else (weight.dtype, bias.dtype), count % 4 == 0
        with on_device(x):
            _norm_kernel(
                (blocks_of(count, rows),), aligned_key((x, weight, bias), x.device, width, *kinds),
                x, weight, bias, out, mean, scale, count, eps, options={"num_warps": 4},
                AFFINE=affine, D=width, ROWS=rows, WIDTH=columns,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, residual_grad):
        x, weight, bias, mean, scale = ctx.saved_tensors
        count, width = x.shape
        affine = weight is not None
        if grad is None:
            zeros = (None, None) if weight is None else (torch.zeros_like(weight), torch.zeros_like(bias))
            return residual_grad, *zeros, None, None
        rows, columns = row_block(width)
        repeats = max(1, blocks_of(blocks_of(count, rows), _PROGRAMS))
        programs = max(1, blocks_of(count, rows * repeats))
        parts = torch.empty(programs if affine else 0, 2, width, dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad = grad.contiguous()
        residual_grad = None if residual_grad is None else residual_grad.contiguous()
        kinds = x.dtype, grad.dtype, None if weight is None else weight.dtype
        kinds += None if residual_grad is None else residual_grad.dtype, count % 4 == 0
        with on_device(x):
            _norm_backward_kernel(
                (programs,), aligned_key((grad, residual_grad, x, weight), x.device, width, *kinds),
                grad, residual_grad, x, weight, mean, scale, grad_x, parts, count, repeats, options={"num_warps": 4},
                AFFINE=affine, RESIDUAL=residual_grad is not None, D=width, ROWS=rows, WIDTH=columns,
            )  # fmt: skip
        if not affine:
            return grad_x, None, None, None, None
        weight_grad, bias_grad = parts.sum(0)
        return grad_x, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype), None, None


def layer_norm_residual(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Layer normalisation, and x itself for the residual: the gradients of both meet inside the backward kernel.

    Args:
        x: (R, D), any floating dtype but float64.
        weight, bias: (D,), both or neither.
        eps: added to the variance.
        dtype: of the normalised output.

    Returns:
        The normalised (R, D) of `dtype`, float32 inside, and x.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if (tensor is None) != (weight is None) or (tensor is not None and tensor.shape != x.shape[1:]):
            raise ValueError(f"{name} must be ({x.shape[1]},), as weight and bias both or neither, got {tensor}")
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    return _NormResidual.apply(x.contiguous(), weight, bias, float(eps), dtype)
