"""The norms of a SeqBoat layer, each called as norm(x, real).

Letters: B batch, L columns, D hidden width.
"""

import torch
from torch import Tensor, nn

from .configuration_seqboat import SeqBoatConfig
from .kernels_seqboat import run_layer_norm_residual


class SeqBoatLayerNorm(nn.LayerNorm):
    def forward(
        self, x: Tensor, real: Tensor | None = None, fused_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with `fused_dtype` by a kernel that gives it in that dtype, and x for the residual beside it."""
        if fused_dtype is not None:
            return run_layer_norm_residual(x, self.weight, self.bias, self.eps, fused_dtype)
        return super().forward(x)


class SeqBoatRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return super().forward(x)


class SeqBoatScaleNorm(nn.Module):
    """x * s * rsqrt(mean(x^2) + eps) with one learned scalar s, a parameter of shape (1,)."""

    def __init__(self, eps: float, affine: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1)) if affine else None

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed if self.weight is None else normed * self.weight).to(x.dtype)


class SeqBoatBatchNorm(nn.Module):
    """Batch normalisation of each channel over the real positions of all rows; pads take no part and stay 0."""

    def __init__(self, width: int, eps: float, affine: bool):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=eps, affine=affine)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            return self.norm(x.flatten(0, 1)).view_as(x)
        normed = self.norm(x[real])
        return x.new_zeros(x.shape, dtype=normed.dtype).masked_scatter(real[..., None], normed)


def build_norm(config: SeqBoatConfig, affine: bool) -> nn.Module:
    """The norm that `config.norm_type` names, called as norm(x, real)."""
    if config.norm_type == "layernorm":
        return SeqBoatLayerNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=affine)
    if config.norm_type == "rmsnorm":
        return SeqBoatRMSNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=affine)
    if config.norm_type == "scalenorm":
        return SeqBoatScaleNorm(config.norm_eps, affine)
    return SeqBoatBatchNorm(config.hidden_size, config.norm_eps, affine)
