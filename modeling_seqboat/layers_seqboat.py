"""A SeqBoat layer and its parts: embeddings of values and places, the feed-forward block, the layer itself.

Letters: B batch, L columns, D hidden width, M activated tokens of all rows. Step numbers in comments follow
arXiv 2306.11197, section 3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_seqboat import SeqBoatAttention
from .cache_seqboat import CacheUpdate, SeqBoatCacheLayer
from .configuration_seqboat import SeqBoatConfig
from .kernels_seqboat import (
    begin_stream,
    requested_backend,
    run_extract_residual,
    run_linear,
    runs_fused,
    runs_memory_step,
)
from .norms_seqboat import SeqBoatLayerNorm, build_norm
from .ops_attention_seqboat import rotary_tables
from .ops_ssm_seqboat import without_autocast
from .router_seqboat import SeqBoatRouter
from .sequence_seqboat import SequenceContext
from .ssm_seqboat import build_ssm


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
        self.ssm = build_ssm(config)
        self.hidden_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.router = SeqBoatRouter(config, layer_idx)
        self.attention = SeqBoatAttention(config)
        self.ffn = SeqBoatFFN(config) if config.intermediate_size > 0 else None
        self.activation = ACT2FN[config.hidden_act]
        # Set where nothing may wait for the device, as in a CUDA graph: the fused path then runs over a stream of this
        # length. While `counts_stream` is set it leaves the number of activated tokens, (1,) int32, in `stream_count`.
        self.stream_capacity: int | None = None
        self.counts_stream = False
        self.stream_count: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, context: SequenceContext, past_key_values=None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden_states (B, L, D) -> the same shape, the router's confidence (B, L) float32, and with
        `router_target_rate` the rate (a scalar with a gradient), else None."""
        config, x = self.config, hidden_states
        if past_key_values is None and self._runs_fused(x):
            return self._forward_fused(x, context)
        cache = None
        if past_key_values is not None:
            cache = past_key_values.layers[self.layer_idx]
            cache.initialize(x.shape[0], self._state_dtype(x), x.device)
        # Under autocast norms return float32; what the layer computes from here on starts in the lower precision, and the
        # EMA and the router are float32 inside whatever they are given.
        h = (self.norm(x, context.real) if config.norm_first else x).to(self._state_dtype(x))
        m, scanned = self.ssm(h, context, cache)
        m = F.dropout(m, config.hidden_dropout, self.training)
        hidden = self.hidden_proj(m)
        confidence, active, rate = self.router(m, context.real, context.places)
        if cache is not None and x.shape[1] == 1 and cache.steps_in_place:
            step = self._step_in_memory if self._steps_in_memory(context, cache) else self._step
            hidden = step(h, m, hidden, confidence, active, context, cache, scanned)
        else:
            flat, out, entries = self.attention("compressed", m, active, context, cache)
            out = (out * confidence.flatten()[flat, None]).to(hidden.dtype)
            hidden = hidden.flatten(0, 1).index_add(0, flat, out).view_as(hidden)
            if cache is not None:
                self._commit(cache, h, context, scanned, entries)
        if not config.bidirectional:
            hidden = F.dropout(hidden, config.hidden_dropout, self.training)
        return self._finish(self.activation(hidden + x), context), confidence, rate

    def _finish(self, x: Tensor, context: SequenceContext) -> Tensor:
        if not self.config.norm_first:
            x = self.norm(x, context.real)
        return x if self.ffn is None else self.ffn(x, context.real)

    def _runs_fused(self, x: Tensor) -> bool:
        config = self.config
        return runs_fused(
            requested_backend(config.kernel_backend),
            x.device,
            self._state_dtype(x),
            config.hidden_act == "silu" and not (self.training and config.value_dropout > 0),
            activation=config.attention_activation,
            dropout_p=config.attention_dropout if self.training else 0.0,
        )

    @torch.compiler.disable
    def _forward_fused(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward` without a cache, elementwise steps in kernels of our own: the same numbers. A compiled model breaks
        its graph here: the compiler does not see through these kernels, and would add nothing to them."""
        config, dtype, residual = self.config, self._state_dtype(x), x
        if not config.norm_first:
            h = x.to(dtype)
        elif isinstance(self.norm, SeqBoatLayerNorm):
            h, residual = self.norm(x, context.real, fused_dtype=dtype)
        else:
            h = self.norm(x, context.real).to(dtype)
        m, _ = self.ssm(h, context, None)
        m = F.dropout(m, config.hidden_dropout, self.training)
        confidence, active, rate = self.router(m, context.real, context.places)
        pending = begin_stream(
            active, config.memory_size, config.bidirectional, context.segment_bounds(), self.stream_capacity
        )
        if self.counts_stream:
            self.stream_count = pending.count.clone()
        # Before the wait, so that the device has work meanwhile.
        hidden = run_linear(self.hidden_proj, m)
        stream = pending.wait()
        out = self.attention("fused", m, stream, context)
        dropout_p = config.hidden_dropout if self.training and not config.bidirectional else 0.0
        with without_autocast(x.device):
            added = run_extract_residual(
                hidden.flatten(0, 1), residual.flatten(0, 1), out, confidence.flatten().float(), stream.slot, dropout_p,
                stream.padded,
            )  # fmt: skip
        return self._finish(added.view_as(x), context), confidence, rate

    def _state_dtype(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        if kind in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return x.dtype

    def _steps_in_memory(self, context: SequenceContext, cache: SeqBoatCacheLayer) -> bool:
        # Where segments may start, or a delayed input is kept, the general step clears and fills what this one does not.
        if context.reset is not None or cache.ssm_inputs is not None:
            return False
        return runs_memory_step(requested_backend(self.config.kernel_backend), cache.keys.device, cache.keys.dtype)

    def _step_in_memory(self, h, m, hidden, confidence, active, context, cache, scanned) -> Tensor:
        """One column for every row, on a device where looking for rows that skip would cost a wait."""
        out = self.attention("step_in_memory", m, active[:, 0], context, cache)
        cache.count_step(context.real, scanned["ssm_state"], active[:, 0])
        return hidden + (out * confidence).to(hidden.dtype)[:, None]

    def _step(self, h, m, hidden, confidence, active, context, cache, scanned) -> Tensor:
        """One column for every row; rows that skip cost no attention on the CPU, where looking is free."""
        real, reset = context.real, context.reset
        position = context.positions[:, 0]
        batch = m.shape[0]
        chosen = None
        if m.device.type == "cpu" and not torch.compiler.is_compiling():
            chosen = active[:, 0].nonzero()[:, 0]
            if chosen.shape[0] == batch:
                chosen = None
        if chosen is not None and chosen.shape[0] == 0:
            key, value = cache.keys[:, 0], cache.values[:, 0]
        else:
            out, key, value, _ = self.attention("step", m, context, cache, chosen)
            if chosen is None:
                hidden = hidden + (out * confidence).to(hidden.dtype)[:, None]
            else:
                added = (out * confidence[chosen]).to(hidden.dtype)
                hidden = hidden.index_add(0, chosen, added[:, None])
                spread = [tensor.new_zeros(batch, tensor.shape[1]) for tensor in (key, value)]
                key, value = (s.index_copy_(0, chosen, t) for s, t in zip(spread, (key, value), strict=True))
        cache.commit_step(h, real, reset, scanned["ssm_state"], active[:, 0], key, value, position)
        return hidden

    @staticmethod
    @torch.compiler.disable
    def _commit(cache, h, context, scanned, entries) -> None:
        detached = {name: tensor.detach() for name, tensor in entries.items()}
        scanned = {name: None if tensor is None else tensor.detach() for name, tensor in scanned.items()}
        if torch.is_grad_enabled():
            # Autograd keeps the state, and a later step may overwrite the cache's.
            scanned["ssm_state"] = scanned["ssm_state"].clone()
        cache.commit(CacheUpdate(hidden=h.detach(), real=context.real, reset=context.reset, **scanned, **detached))
