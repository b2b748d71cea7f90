"""A SeqBoat layer and its parts: norms, embeddings of values and places, the feed-forward block, the layer itself.

Letters: B batch, L columns, D hidden width, M activated tokens of all rows. Step numbers in comments follow
arXiv 2306.11197, section 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_seqboat import SeqBoatAttention
from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import SequenceContext
from .diagonal_seqboat import SeqBoatS4D, SeqBoatS5
from .ops_attention_seqboat import rotary_tables
from .ops_layout_seqboat import Packed, is_exporting
from .ops_packed_seqboat import pack_step
from .router_seqboat import SeqBoatRouter
from .ssm_seqboat import RECURRENCES, SeqBoatEMA, register_recurrence

for _name, _kind in {"ema": SeqBoatEMA, "s4d": SeqBoatS4D, "s5": SeqBoatS5}.items():
    register_recurrence(_name, _kind)


class _RowNorm(nn.Module):
    """A norm of the layers, called as norm(x, real); with an op `norm_residual` as norm(x, real, op, dtype), which
    gives the norm in that dtype, and x for the residual beside it."""

    centered = False

    def forward(
        self, x: Tensor, real: Tensor | None = None, op: Callable | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if op is None:
            return self.normed(x)
        weight = self.weight
        if weight is not None and weight.numel() == 1:
            weight = weight.expand(x.shape[-1])
        return op(x, self.normed, weight, getattr(self, "bias", None), self.eps, self.centered, dtype)


class SeqBoatLayerNorm(_RowNorm, nn.LayerNorm):
    centered = True
    normed = nn.LayerNorm.forward


class SeqBoatRMSNorm(_RowNorm, nn.RMSNorm):
    normed = nn.RMSNorm.forward


class SeqBoatScaleNorm(_RowNorm):
    """x * s * rsqrt(mean(x^2) + eps) with one learned scalar s, a parameter of shape (1,)."""

    def __init__(self, eps: float, affine: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1)) if affine else None

    def normed(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled if self.weight is None else scaled * self.weight).to(x.dtype)


class SeqBoatBatchNorm(nn.Module):
    """Batch normalisation of each channel over the real positions of all rows; pads take no part and stay 0. Called as
    `_RowNorm` is."""

    def __init__(self, width: int, eps: float, affine: bool):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=eps, affine=affine)

    def forward(
        self, x: Tensor, real: Tensor | None = None, op: Callable | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if real is None or not self.training:
            normed = self.norm(x.flatten(0, 1)).view_as(x)
            normed = normed if real is None else normed.masked_fill(~real[..., None], 0)
        else:
            chosen = self.norm(x[real])
            normed = x.new_zeros(x.shape, dtype=chosen.dtype).masked_scatter(real[..., None], chosen)
        return normed if op is None else (normed.to(dtype), x)


def build_norm(config: SeqBoatConfig, affine: bool) -> nn.Module:
    """The norm that `config.norm_type` names, called as `_RowNorm` is."""
    if config.norm_type in ("layernorm", "rmsnorm"):
        kind = SeqBoatLayerNorm if config.norm_type == "layernorm" else SeqBoatRMSNorm
        return kind(config.hidden_size, eps=config.norm_eps, elementwise_affine=affine)
    if config.norm_type == "scalenorm":
        return SeqBoatScaleNorm(config.norm_eps, affine)
    return SeqBoatBatchNorm(config.hidden_size, config.norm_eps, affine)


class SeqBoatValueEmbedding(nn.Module):
    """Real numbers as tokens: (B, L) values v -> v * weight + bias, (B, L, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, values: Tensor) -> Tensor:
        return values[..., None].to(self.weight.dtype) * self.weight + self.bias


class SeqBoatAbsolutePositions(nn.Module):
    """scale * [sin(t / 10000^(2i/D)), cos(...)], the sines first, with one learned scale."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, positions: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D) float32."""
        cos, sin = rotary_tables(positions, self.width, 10000.0)
        return self.scale * torch.cat([sin, cos], dim=-1)


class SeqBoatFFN(nn.Module):
    """Step 11: the normalised feed-forward block, x + dropout(fc2(dropout(silu(fc1(norm(x))))))."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__()
        self.config = config
        self.norm = build_norm(config, config.norm_affine)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        config = self.config
        hidden = self.norm(x, real) if config.norm_first else x
        hidden = F.dropout(self.activation(self.fc1(hidden)), config.activation_dropout, self.training)
        hidden = F.dropout(self.fc2(hidden), config.hidden_dropout, self.training)
        x = x + hidden
        return x if config.norm_first else self.norm(x, real)


class SeqBoatDecoderLayer(GradientCheckpointingLayer):
    """One layer: a recurrence over every token, attention where the router asks for it."""

    def __init__(self, config: SeqBoatConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.norm = build_norm(config, config.norm_affine)
        self.ssm = RECURRENCES[config.ssm_type](config)
        self.hidden_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.router = SeqBoatRouter(config, layer_idx)
        self.attention = SeqBoatAttention(config)
        self.ffn = SeqBoatFFN(config) if config.intermediate_size > 0 else None
        self.activation = ACT2FN[config.hidden_act]
        # Set where nothing may wait for the device, as in a CUDA graph: the list of activated tokens then has this
        # length. While `counts_stream` is set the layer leaves the number of activated tokens, (1,) int32, in
        # `stream_count`.
        self.stream_capacity: int | None = None
        self.counts_stream = False
        self.stream_count: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, context: SequenceContext, past_key_values=None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden_states (B, L, D) -> the same shape, the router's confidence (B, L) float32, and with
        `router_target_rate` the rate (a scalar with a gradient), else None."""
        if torch.compiler.is_compiling() and hidden_states.shape[1] > 1 and context.ops.opaque:
            return self._outside_of_graphs(hidden_states, context, past_key_values)
        config, x, ops, real = self.config, hidden_states, context.ops, context.real
        cache = before = None
        if past_key_values is not None:
            cache = past_key_values.layers[self.layer_idx]
            cache.initialize(x.shape[0], context.dtype, x.device)
            before = cache.before(x.shape[1])
        # Under autocast the residual stays float32; what the layer computes starts in the lower precision, and the
        # recurrence and the router are float32 inside whatever they are given.
        if config.norm_first:
            h, residual = self.norm(x, real, ops.norm_residual, context.dtype)
        else:
            h, residual = x.to(context.dtype), x
        if context.part is not None:
            before, inputs = context.part.before(self.ssm, h, context)
        m, state, replay = self.ssm(h, context, before)
        m = F.dropout(m, config.hidden_dropout, self.training)
        # The op is there only for a learned router, which alone takes it.
        confidence, active, rate = self.router(m, real, context.places, getattr(ops, "route", None))
        in_place = cache is not None and before.overwrite
        attend = self._attend
        if torch.compiler.is_compiling() and not in_place and not is_exporting():
            attend = self._attend_outside_of_graphs
        scanned = None if cache is None else (h, state, replay)
        # A step reads the memory where it lies, and must not be compiled once more when the cache is no longer blank.
        memory = None if cache is None or in_place or cache.is_blank else cache
        if context.part is not None:
            memory = context.part.memory(self.attention, m, active, context)
            if cache is not None:
                cache.start_at(context.part.offset, inputs, memory)
        y = attend(m, residual, confidence, active, context, cache, memory, in_place, scanned)
        if not config.norm_first:
            y, _ = self.norm(y, real, ops.norm_residual, y.dtype)
        return (y if self.ffn is None else self.ffn(y, real)), confidence, rate

    def _attend(self, m, residual, confidence, active, context, cache, memory, in_place, scanned):
        """Steps 4 and 6 to 9: what the layer gives (B, L, D), attending to `memory` before these columns, a filled
        cache or a `PartMemory`. Moves the cache past these columns, given the recurrence's inputs, state and
        replay."""
        config, ops = self.config, context.ops
        # Asked only where something traces: a layer calls into few other files.
        exporting = not in_place and torch.compiler.is_compiling() and is_exporting()
        if in_place:
            if context.reset is not None:
                cache.start_segments(context.reset)
            cache.make_room(1)
            packed = pack_step(active, all_rows=ops.runs_triton("memory_step"))
        elif exporting:
            packed = Packed(None)
        else:
            before = None if memory is None else (memory.activated_count, context.segment)
            window = config.memory_size, config.bidirectional, context.segment_bounds()
            packed = ops.pack(active, *window, capacity=self.stream_capacity, memory=before)
            if self.counts_stream and cache is None and ops.captures:
                self.stream_count = packed.count.clone()
        # Before the wait, so that the device has work meanwhile.
        hidden = ops.linear(self.hidden_proj, m)
        packed = packed.wait()
        if exporting:
            out = self.attention.exported(m, active, context, cache, scanned and scanned[:2]).flatten(0, 1)
        else:
            out, keys, values = self.attention(m, active, packed, context, cache, memory)
        dropout_p = config.hidden_dropout if self.training and not config.bidirectional else 0.0
        y = ops.extract_residual(
            hidden.flatten(0, 1), residual.flatten(0, 1), out, confidence.flatten(), packed, dropout_p, self.activation
        )
        # The exported unit has moved the cache itself.
        if cache is not None and not exporting:
            cache.advance(context, *scanned, active, packed, keys, values)
        return y.view_as(residual)

    @torch.compiler.disable
    def _outside_of_graphs(self, hidden_states, context, past_key_values):
        """`forward` in Triton, where a compiled model breaks its graph: the compiler does not see through these
        kernels, and would add nothing to them."""
        return self.forward(hidden_states, context.but(ops=context.ops.but(compiling=False)), past_key_values)

    @torch.compiler.disable
    def _attend_outside_of_graphs(self, *args):
        """`_attend` where a compiled model breaks its graph: sizes depend on the data."""
        return self._attend(*args)
