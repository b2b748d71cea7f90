"""The latent configurator (arXiv 2306.11197, sections 3.2 and 3.3): which tokens attend, and how sure the layer is of
it.

Letters: B batch, L columns, D hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_seqboat import LEARNED_ROUTERS, SeqBoatConfig
from .kernels_seqboat import op
from .ops_ema_seqboat import without_autocast
from .triton_rows_seqboat import route_opaque, route_triton

_WORD = 2**32 - 1


def _mixed(value):
    """A bijection of the integers below 2^32, of ints and int64 tensors alike, whose bits all depend on each other.

    Shifts 16, 15, 15 and two multipliers below 2^31: no product leaves int64, whose overflow devices need not agree
    on.
    """
    value = value ^ (value >> 16)
    value = (value * 0x21F0AAAD) & _WORD
    value = value ^ (value >> 15)
    value = (value * 0x735A2D97) & _WORD
    return value ^ (value >> 15)


def random_activation(places: Tensor, layer: int, rate: float, seed: int) -> Tensor:
    """Activates tokens at a given rate whatever they are: the draw is a hash of layer, place and seed.

    No generator is asked, so that padding, batch mates, packing and chunks change nothing, and a recomputation draws
    the same. Rows of a batch are drawn alike.

    Args:
        places: (B, L) int64, how many real tokens the segment has before each.
        layer: number of the layer; rate: in (0, 1]; seed: at least 0.

    Returns:
        (B, L) bool.
    """
    key = _mixed((_mixed(seed & _WORD) + _mixed((seed >> 32) & _WORD) + layer + 1) & _WORD)
    drawn = _mixed((_mixed(places & _WORD) + key) & _WORD)
    return drawn < round(rate * 2**32)


def _route_compiled(
    x: Tensor, weight: Tensor, bias: Tensor, log_temperature: Tensor, real: Tensor | None, shift: float
) -> tuple[Tensor, Tensor]:
    """`route` in a compiled graph: the kernel, in place of the three that a compiler takes for two logits; where
    gradients are wanted, which it does not have there, the torch twin."""
    inputs = x.contiguous(), weight, bias, log_temperature
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return route(*inputs, real, shift)
    return route_opaque(*inputs, real, shift)


@op(
    "route",
    triton=route_triton,
    compiled=_route_compiled,
    used=lambda facts: facts.routes,
    needs=(lambda facts: facts.noisy,),
)
def route(
    x: Tensor, weight: Tensor, bias: Tensor, log_temperature: Tensor, real: Tensor | None, shift: float
) -> tuple[Tensor, Tensor]:
    """The tempered softmax of two logits and its decision (arXiv 2306.11197, section 3.2), float32 inside.

    Args:
        x: (B, L, D).
        weight: (2, D); bias: (2,); log_temperature: (1,). Row 0 is the logit of skipping, row 1 of attending.
        real: (B, L) bool, False at pads; None if there are none.
        shift: added to the logit of skipping.

    Returns:
        confidence (B, L) float32, the probability of attending where that wins, else 0; active (B, L) bool, run >
        skip.
    """
    with without_autocast(x.device):
        skip, run = _logits(x, weight, bias, shift)
        active = run > skip
        if real is not None:
            active = active & real
        return torch.where(active, torch.sigmoid((run - skip) * _sharpness(log_temperature, run.dtype)), 0), active


def _logits(x: Tensor, weight: Tensor, bias: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    # A bias of 0 is added too: a branch on it would be a second graph for the compiler.
    return logits[..., 0] + shift, logits[..., 1]


def _sharpness(log_temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """The temperature's inverse. A temperature below e^-30 would differ only where the logits are less than 1e-12
    apart, and its inverse would overflow in backward."""
    return torch.exp(-log_temperature.to(dtype).clamp_min(-30))


class SeqBoatRouter(nn.Module):
    """The latent configurator (steps 4 and 5): float32 logits from plain parameters, so that no adapter or quantiser
    takes it for a linear layer. `router_type` of the config says how it decides; `always`, `never` and `random` have
    no parameters."""

    def __init__(self, config: SeqBoatConfig, layer_idx: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.learned = config.router_type in LEARNED_ROUTERS
        # Set by a `RouterBudget`, which moves the bias: then nothing is left for a term of the loss to do.
        self.rate_is_held = False
        if self.learned:
            self.weight = nn.Parameter(torch.empty(2, config.hidden_size))
            self.bias = nn.Parameter(torch.empty(2))
            self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(
        self, x: Tensor, real: Tensor | None, places: Tensor | None = None, route: Callable = route
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decides for every token.

        Args:
            x: (B, L, D).
            real: (B, L) bool, or None when every column is real.
            places: (B, L) int64, real tokens of the segment before each; read by `random` only.
            route: the op that a tempered softmax takes.

        Returns:
            confidence (B, L) float32, 0 where skipped or a pad; active (B, L) bool; and with `router_target_rate` the
            rate with a gradient (see `_rate`), a scalar, else None; None also where a `RouterBudget` holds the rate.
        """
        config = self.config
        if not self.learned:
            if config.router_type == "random":
                draw = config.router_random_rate, config.router_random_seed
                active = random_activation(places, self.layer_idx, *draw)
            else:
                active = torch.full(x.shape[:2], config.router_type == "always", dtype=torch.bool, device=x.device)
            if real is not None:
                active = active & real
            return active.float(), active, None
        pulled = config.router_target_rate is not None and not self.rate_is_held
        plain = ("tempered_softmax",) if self.training else ("tempered_softmax", "gumbel")
        if config.router_type in plain and not pulled:
            found = route(x, self.weight, self.bias, self.log_temperature, real, config.activation_bias)
            return *found, None
        with without_autocast(x.device):
            skip, run = _logits(x, self.weight, self.bias, config.activation_bias)
            noisy = run
            if self.training and config.router_type != "tempered_softmax":
                # The difference of two independent Gumbel variables.
                uniform = torch.rand_like(run).clamp(2**-25, 1 - 2**-24)
                noisy = run + (uniform.log() - torch.log1p(-uniform))
            active = noisy > skip
            if real is not None:
                active = active & real
            # Softmax over two logits at this temperature, the entry of the winner.
            sharpness = _sharpness(self.log_temperature, run.dtype)
            confidence = torch.sigmoid((noisy - skip) * sharpness)
            if config.router_type == "gumbel_straight_through":
                # 1 with the gradient of the soft probability.
                confidence = 1 + (confidence - confidence.detach())
            rate = None
            if pulled:
                rate = self._rate(torch.sigmoid((run - skip) * sharpness.detach()), active, real)
            return torch.where(active, confidence, 0), active, rate

    def _rate(self, probability: Tensor, active: Tensor, real: Tensor | None) -> Tensor:
        """The share of real tokens that are activated, with the gradient of the mean soft probability.

        The soft probability of a tempered softmax stays near 1/2 whatever is decided, so its own mean would be a poor
        account of the rate; its gradient points the right way, and is there when nothing is activated. The temperature
        is left out of it: it changes no decision.
        """
        count = active.numel()
        if real is not None:
            probability = probability.masked_fill(~real, 0)
            count = real.sum().clamp_min(1)
        soft = probability.sum() / count
        return active.sum() / count + (soft - soft.detach())
