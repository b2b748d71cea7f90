"""Cross entropy straight from hidden states and the output matrix, through Liger's fused kernel (arXiv 2410.10989).

The logits of a training batch are B*L*V numbers and their gradient as many again; Liger makes them for a few tokens at
a time. Letters: B batch, L columns, D hidden width, V vocabulary.
"""

import os

import torch
from torch import Tensor, nn


def _liger_sum() -> nn.Module | None:
    """Liger's loss, summed over tokens; None if the package is not installed, or too old."""
    # Here and not at the top: the import takes seconds, and only this loss needs it.
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        # The output matrix' gradient adds up over groups of tokens, for which bfloat16 has too few bits.
        return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    except (ImportError, TypeError):
        return None


def why_not_liger(head: nn.Module) -> str | None:
    """The reason why Liger cannot make the loss of the output layer `head`, or None if it can.

    Triton's interpreter (TRITON_INTERPRET=1) runs its kernels on CPU tensors.
    """
    weight = getattr(head, "weight", None)
    # Adapters, quantisation and sharding act in a layer's forward, which is not run.
    if not isinstance(head, nn.Linear) or type(weight) not in (Tensor, nn.Parameter):
        kinds = type(head).__name__, type(weight).__name__
        return f"lm_head must be a plain linear layer, got {kinds[0]} whose weight is a {kinds[1]}"
    expected, found = (head.out_features, head.in_features), tuple(weight.shape)
    place, dtype, floats = weight.device.type, weight.dtype, (torch.float32, torch.bfloat16, torch.float16)
    on_gpu, interpreted = place == "cuda", os.environ.get("TRITON_INTERPRET") == "1"
    table = (
        (found != expected, f"lm_head.weight must be of shape {expected}, got {found}: it is packed or sharded"),
        (not (on_gpu or interpreted), f"tensors are on {place}, Liger's kernels need a CUDA device"),
        (dtype not in floats, f"lm_head.weight is {dtype}, Liger's kernels take float32, bfloat16 and float16"),
        (
            on_gpu and torch.cuda.is_current_stream_capturing(),
            "Liger waits for the device in every step, which a CUDA graph (GraphedStep, cuda_graphs=True) does not "
            "allow",
        ),
        (_liger_sum() is None, "the package liger-kernel is not installed, or older than 0.6.2"),
    )
    return next((reason for applies, reason in table if applies), None)


@torch.compiler.disable
def expect_liger(head: nn.Module) -> None:
    """Raises ValueError with the reason if Liger cannot make the loss of this output layer."""
    reason = why_not_liger(head)
    if reason is not None:
        raise ValueError(f"loss_implementation='liger' cannot run: {reason}; or use loss_implementation='torch'")


@torch.compiler.disable
def fused_linear_cross_entropy(
    hidden: Tensor, head: nn.Linear, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy of `head(hidden)` without these logits, as `transformers` computes it from them.

    Args:
        hidden: (B, L, D). labels: (B, L) int64 targets, already shifted; -100 is ignored.
        num_items: what the sum over labels is divided by; None for their number here.

    Returns:
        () float32, with gradients for `hidden` and `head`. 0 without a label.
    """
    weight, bias = head.weight, head.bias
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(weight.device)
    labels = labels.reshape(-1).to(weight.device)
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        # Once, as autocast does for a linear layer: Liger would cast the whole matrix for each group of tokens.
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
    if torch.is_grad_enabled() and weight.requires_grad and not hidden.requires_grad:
        # Under a frozen body: Liger makes no gradient at all where the hidden states want none.
        hidden = hidden.detach().requires_grad_()
    total = _liger_sum()(weight, hidden, labels, bias)
    if num_items is None:
        num_items = (labels != -100).sum().clamp_min(1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
