"""The EMA's decay and gains from its parameters in one kernel each way, in place of some thirty elementwise launches.

Letters: D rows (both directions of a bidirectional model), N states of a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_launch_seqboat import aligned_key, blocks_of, kernel, on_device

try:
    import triton.language as tl
except ImportError:
    tl = None

_BLOCK = 512


@kernel("count", "factor")
def _parameters_kernel(delta, alpha, beta, gamma, out, count, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = tl.sigmoid(tl.load(delta + at, mask=inside, other=0.0).to(tl.float32))
    a = tl.sigmoid(tl.load(alpha + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + at, 1 - p * a, mask=inside)
    tl.store(out + count + at, p * tl.load(beta + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
    tl.store(out + 2 * count + at, tl.load(gamma + at, mask=inside, other=0.0).to(tl.float32) * factor, mask=inside)


@kernel("count", "factor")
def _parameters_backward_kernel(
    delta, alpha, beta, decay_grad, input_grad, output_grad, delta_grad, alpha_grad, beta_grad, gamma_grad,
    count, factor, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = tl.sigmoid(tl.load(delta + at, mask=inside, other=0.0).to(tl.float32))
    a = tl.sigmoid(tl.load(alpha + at, mask=inside, other=0.0).to(tl.float32))
    of_decay = tl.load(decay_grad + at, mask=inside, other=0.0)
    of_input = tl.load(input_grad + at, mask=inside, other=0.0)
    of_output = tl.load(output_grad + at, mask=inside, other=0.0)
    slope = tl.load(beta + at, mask=inside, other=0.0).to(tl.float32) * of_input - a * of_decay
    kind = delta_grad.dtype.element_ty
    tl.store(delta_grad + at, (slope * p * (1 - p)).to(kind), mask=inside)
    tl.store(alpha_grad + at, (-p * of_decay * a * (1 - a)).to(kind), mask=inside)
    tl.store(beta_grad + at, (p * of_input).to(kind), mask=inside)
    tl.store(gamma_grad + at, (of_output * factor).to(kind), mask=inside)


class _EmaParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta, alpha, beta, gamma):
        count, factor = gamma.numel(), gamma.shape[-1] ** -0.5
        out = torch.empty(3, *gamma.shape, dtype=torch.float32, device=gamma.device)
        with on_device(gamma):
            _parameters_kernel(
                (blocks_of(count, _BLOCK),), aligned_key((delta, alpha, beta, gamma), gamma.device, gamma.dtype),
                delta, alpha, beta, gamma, out, count, factor, options={"num_warps": 4}, BLOCK=_BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(delta, alpha, beta)
        return out.unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        delta, alpha, beta = ctx.saved_tensors
        count, factor = delta.numel(), delta.shape[-2] ** -0.5
        grads = [grad.contiguous() for grad in grads]
        results = *(torch.empty_like(delta) for _ in range(3)), delta.new_empty(delta.shape[:-1])
        with on_device(delta):
            _parameters_backward_kernel(
                (blocks_of(count, _BLOCK),), aligned_key((delta, alpha, beta, *grads), delta.device, delta.dtype),
                delta, alpha, beta, *grads, *results, count, factor, options={"num_warps": 4}, BLOCK=_BLOCK,
            )  # fmt: skip
        return results


def ema_parameters_triton(delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`ema_parameters` on a GPU: decay 1 - p sigmoid(alpha), input gain p beta, output gain gamma / sqrt(N), where
    p = sigmoid(delta) (Mega, equation 4).

    Args:
        delta, alpha, beta: (D, N, 1); gamma: (D, N); all of one floating dtype but float64.

    Returns:
        Three (D, N) float32 tensors. Gradients for all four.
    """
    shape = (*gamma.shape, 1)
    for name, tensor in (("delta", delta), ("alpha", alpha), ("beta", beta)):
        if tensor.shape != shape or tensor.dtype != gamma.dtype:
            raise ValueError(f"{name} must be {shape} {gamma.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    return _EmaParameters.apply(*(t.contiguous() for t in (delta, alpha, beta, gamma)))
