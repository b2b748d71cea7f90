"""What diagonal complex state-space recurrences share: discretisation, powers, and the scan over chunk borders.

Letters: B batch, G chunks of a row, S the shape of one row's states.

Complex numbers are pairs of reals in the last dimension, real part first: half precision, compilers and devices without
complex types then need no special case. Of each conjugate pair of states one is kept, and outputs are twice a real part
(S4D, arXiv 2206.11893, section 3).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .ops_ssm_seqboat import without_autocast


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """(..., 2) x (..., 2) -> (..., 2)."""
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    imaginary = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return torch.stack([real, imaginary], dim=-1)


def conjugate(a: Tensor) -> Tensor:
    """(..., 2) -> (..., 2)."""
    return torch.stack([a[..., 0], -a[..., 1]], dim=-1)


def complex_powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """exp(z * k) for z (..., 2) and k (K,) -> (..., K, 2). With a real part of z of at most 0 no power exceeds 1."""
    size = torch.exp(log_decay[..., :1] * exponents)
    # A whole turn less changes nothing and keeps the products with k small, hence exact.
    angle = torch.remainder(log_decay[..., 1:], 2 * torch.pi) * exponents
    return torch.stack([size * angle.cos(), size * angle.sin()], dim=-1)


def zero_order_hold(log_step: Tensor, log_rate: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Discretises ds/dt = a*s + u with a = -exp(log_rate) + i*frequency, u being held for a step (S4D, section 2).

    Args:
        log_step, log_rate, frequency: broadcastable shapes, any float dtype.

    Returns:
        z = step*a and gain = (exp(z) - 1) / a, each (..., 2), float32 (float64 stays): s_t = exp(z)*s_{t-1} + gain*u_t.
        The real part of z is below 0 whatever the parameters, so |exp(z)| <= 1. Finite for all finite parameters.
    """
    dtype = torch.float64 if log_step.dtype == torch.float64 else torch.float32
    step = log_step.to(dtype).clamp(-20, 10).exp()
    real = -step * log_rate.to(dtype).clamp(-30, 10).exp()
    imaginary = step * frequency.to(dtype).clamp(-1e6, 1e6)
    # exp(z) - 1 without cancellation where z is small.
    top_real = torch.expm1(real) * imaginary.cos() - 2 * torch.sin(imaginary / 2).square()
    top_imaginary = real.exp() * imaginary.sin()
    square = real.square() + imaginary.square()
    # Below 1e-4 two terms of (exp(z) - 1) / z are exact in float32, and the quotient has no value at 0.
    small = square < 1e-8
    below = torch.where(small, 1, square)
    quotient_real = torch.where(small, 1 + real / 2, (top_real * real + top_imaginary * imaginary) / below)
    quotient_imaginary = torch.where(small, imaginary / 2, (top_imaginary * real - top_real * imaginary) / below)
    log_decay = torch.stack([real, imaginary], dim=-1)
    return log_decay, step[..., None] * torch.stack([quotient_real, quotient_imaginary], dim=-1)


def toeplitz(taps: Tensor) -> Tensor:
    """(R, C) taps -> (R, C, C) with entry [i, j] = taps[i - j] for j <= i, else 0."""
    size = taps.shape[-1]
    padded = torch.nn.functional.pad(taps.flip(-1), (0, size - 1))
    return padded.unfold(-1, size, 1).flip(1)


def _scan(entries: Tensor, decay: Tensor, linked: Tensor | None) -> Tensor:
    """Solves e[g] = u[g] + (a*e[g-1] where g is linked to its predecessor) in log2(G) steps; overwrites `entries`."""
    offset = 1
    while offset < entries.shape[0]:
        carried = complex_product(entries[:-offset], decay)
        if linked is not None:
            carried = carried * linked[offset:].view(*linked[offset:].shape, *[1] * (entries.dim() - 2))
            # Border g hears from g - 2k if it hears from g - k, and that one from g - 2k.
            linked = torch.cat([linked[:offset], linked[offset:] & linked[:-offset]])
        entries[offset:] += carried
        decay, offset = complex_product(decay, decay), offset * 2
    return entries


class _BorderScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entries: Tensor, decay: Tensor, linked: Tensor | None) -> Tensor:
        borders = _scan(entries.clone(), decay, linked)
        ctx.save_for_backward(borders, decay, linked)
        return borders

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        borders, decay, linked = ctx.saved_tensors
        backward_links = None
        if linked is not None:
            backward_links = torch.cat([torch.zeros_like(linked[:1]), linked[1:].flip(0)])
        worth = _scan(grad.flip(0), conjugate(decay), backward_links).flip(0)
        read = worth[1:]
        if linked is not None:
            read = read * linked[1:].view(*linked[1:].shape, *[1] * (worth.dim() - 2))
        grad_decay = complex_product(read, conjugate(borders[:-1])).sum((0, 1))
        return worth, grad_decay, None


def scan_borders(entries: Tensor, decay: Tensor, first_chunk: Tensor | None) -> Tensor:
    """States at chunk borders: e[g] = u[g] + a*e[g-1], and 0 where a segment starts.

    Args:
        entries: u, (G + 1, B, *S, 2), in u[0] the state before the row and in u[g] what chunk g - 1 adds.
        decay: a, (*S, 2), of a whole chunk.
        first_chunk: (B, G + 1) int64 as in `ScanPlan`, or None.

    Returns:
        (G + 1, B, *S, 2).
    """
    linked = None
    if first_chunk is not None:
        linked = first_chunk.t() != torch.arange(entries.shape[0], device=entries.device)[:, None]
        entries = entries.masked_fill(~linked.view(*linked.shape, *[1] * (entries.dim() - 2)), 0)
    return _BorderScan.apply(entries, decay, linked)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable, *tensors: Tensor | None):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return function(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:]
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), without_autocast(leaves[0].device):
            outputs = ctx.function(*leaves)
            wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def recomputed(function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """function(*tensors), of which only the tensors are kept for backward, where it runs again: its intermediate
    results are many times as large. Backward stays in float32 also where it is called under autocast."""
    return _Recomputed.apply(function, *tensors)
