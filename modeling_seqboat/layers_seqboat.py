"""A SeqBoat layer and its parts: norms, the gated attention unit, the feed-forward block.

Letters: B batch, L columns, D hidden width, N states a channel, Z query/key width, V value width, W memory size, M
activated tokens of all rows. Step numbers in comments follow arXiv 2306.11197, section 3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_seqboat import CacheUpdate, SeqBoatCacheLayer
from .configuration_seqboat import SeqBoatConfig
from .kernels_seqboat import (
    begin_stream,
    requested_backend,
    run_extract_residual,
    run_gated_unit,
    run_gather_rows,
    run_layer_norm_residual,
    run_memory_step,
    run_project_unit,
    run_windowed_attention,
    runs_fused,
    runs_memory_step,
)
from .ops_attention_seqboat import (
    apply_rotary,
    attention_scale,
    memory_attention_step,
    rotary_tables,
    t5_bias_table,
)
from .ops_ssm_seqboat import without_autocast
from .ops_stream_seqboat import build_stream
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


class SeqBoatPositionBias(nn.Module):
    """Learned attention bias by distance, as one table indexed by clamp(center + place_k - place_q)."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__()
        self.kind = config.position_embedding_type
        self.bidirectional = config.bidirectional
        shape = {
            "simple": (2 * config.max_position_embeddings - 1,),
            "local": (6 * config.memory_size - 1,),
            "t5": (32, 1),
        }[self.kind]
        self.center = {"simple": config.max_position_embeddings - 1, "local": 4 * config.memory_size - 1, "t5": 128}[
            self.kind
        ]
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        return t5_bias_table(self.weight, self.bidirectional) if self.kind == "t5" else self.weight


class SeqBoatAttention(nn.Module):
    """The gated attention unit over activated tokens (steps 6 to 8)."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__()
        self.config = config
        self.sizes = [config.qk_head_dim, config.v_head_dim, config.v_head_dim]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes))
        self.out_proj = nn.Linear(config.v_head_dim, config.hidden_size)
        self.qk_scale = nn.Parameter(torch.empty(2, config.qk_head_dim))
        self.qk_offset = nn.Parameter(torch.empty(2, config.qk_head_dim))
        learned = config.position_embedding_type in ("simple", "local", "t5")
        self.position_bias = SeqBoatPositionBias(config) if learned else None
        self.activation = ACT2FN[config.hidden_act]
        self.scale = attention_scale(
            config.attention_activation, config.qk_head_dim, config.memory_size, config.bidirectional
        )

    def project(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (..., D) -> q, k (..., Z), v, gate (..., V); q and k rotated when the positions are rotary."""
        config, projected, parts = self.config, self.in_proj(x), None
        if config.hidden_act == "silu" and x.dim() == 2:
            backend = requested_backend(config.kernel_backend)
            parts = run_project_unit(backend, projected, self.qk_scale, self.qk_offset, cos, sin)
        if parts is not None:
            q, k, v, gate = parts
        else:
            z, gate, v = self.activation(projected).split(self.sizes, dim=-1)
            q, k = ((z * s + o).to(z.dtype) for s, o in zip(self.qk_scale, self.qk_offset, strict=True))
            if cos is not None:
                q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        v = F.dropout(v, config.value_dropout, self.training)
        return q, k, v, gate

    def finish(self, attended: Tensor, gate: Tensor) -> Tensor:
        """(..., V) -> (..., D)."""
        out = self.out_proj(attended * gate)
        return F.dropout(out, self.config.hidden_dropout, self.training) if self.config.bidirectional else out

    def _bias(self) -> dict[str, Tensor | int]:
        if self.position_bias is None:
            return {}
        return {"bias_table": self.position_bias(), "bias_center": self.position_bias.center}

    def forward(self, method: str, *args) -> tuple[Tensor, ...] | Tensor:
        """Runs `compressed`, `fused`, `step` or `step_in_memory`: hooks on the module, which load offloaded weights for one, see each."""
        return getattr(self, method)(*args)

    @torch.compiler.disable
    def compressed(
        self,
        x: Tensor,
        active: Tensor,
        context: SequenceContext,
        cache: SeqBoatCacheLayer | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Runs the unit on activated tokens only.

        Args:
            x: (B, L, D); active: (B, L) bool.

        Returns:
            flat (M,) int64, places of the activated tokens in (B * L); out (M, D); and what the cache keeps of them.
        """
        config = self.config
        stream = build_stream(
            active,
            context.segment,
            config.memory_size,
            config.bidirectional,
            None if cache is None else cache.activated_count,
        )
        positions = context.positions.flatten()[stream.flat]
        cos = sin = None
        if context.cos is not None:
            cos, sin = (table.flatten(0, 1)[stream.flat] for table in (context.cos, context.sin))
        q, k, v, gate = self.project(x.flatten(0, 1).index_select(0, stream.flat), cos, sin)
        keys = stream.with_memory(k, None if cache is None else cache.keys)
        values = stream.with_memory(v, None if cache is None else cache.values)
        bias = self._bias()
        if bias:
            if config.position_embedding_type == "local":
                bias |= {"q_place": stream.key_index, "k_place": torch.arange(stream.num_keys, device=x.device)}
            else:
                places = stream.with_memory(positions, None if cache is None else cache.positions)
                bias |= {"q_place": positions, "k_place": places}
        with without_autocast(x.device):
            attended = run_windowed_attention(
                requested_backend(config.kernel_backend), q, keys, values, stream.key_start, stream.key_end,
                activation=config.attention_activation, scale=self.scale,
                max_keys=config.memory_size * (2 if config.bidirectional else 1) + 1,
                dropout_p=config.attention_dropout if self.training else 0.0, **bias,
            )  # fmt: skip
        out = self.finish(attended, gate)
        entries = {
            "row": stream.row,
            "column": stream.column,
            "ordinal": stream.ordinal,
            "current": stream.current,
            "keys": k,
            "values": v,
            "positions": positions,
        }
        return stream.flat, out, entries

    def fused(self, x: Tensor, stream: "TokenStream", context: SequenceContext) -> Tensor:  # noqa: F821
        """`compressed` without a cache and without dropout, all between the two linears in fused kernels.

        Args:
            x: (B, L, D); stream: what `begin_stream` found.

        Returns:
            out (M, D).
        """
        config = self.config
        projected = self.in_proj(run_gather_rows(x.flatten(0, 1), stream.index, stream.slot))
        cos = sin = None
        if context.cos is not None:
            cos, sin = (table.flatten(0, 1) for table in (context.cos, context.sin))
        bias = self._bias()
        if bias:
            if config.position_embedding_type == "local":
                places = torch.arange(stream.index.shape[0], device=x.device)
            else:
                places = context.positions.flatten()[stream.index]
            bias |= {"q_place": places, "k_place": places}
        with without_autocast(x.device):
            gated = run_gated_unit(
                projected, self.qk_scale, self.qk_offset, stream.key_start, stream.key_end,
                activation=config.attention_activation, attention_scale=self.scale, cos=cos, sin=sin,
                table_rows=None if cos is None else stream.index,
                max_keys=config.memory_size * (2 if config.bidirectional else 1) + 1, **bias,
            )  # fmt: skip
        out = self.out_proj(gated)
        return F.dropout(out, config.hidden_dropout, self.training) if config.bidirectional else out

    def step(self, x: Tensor, context: SequenceContext, cache: SeqBoatCacheLayer, rows: Tensor | None):
        """One column over the memory, every row alike: no shape and no branch depends on data.

        Args:
            x: (B, 1, D).
            rows: (R,) int64, the rows to compute, or None for all.

        Returns:
            out (R, D), and the new keys (R, Z), values (R, V) and positions (R,).
        """
        config = self.config
        count = cache.activated_count
        if context.reset is not None:
            starts = context.reset if context.real is None else context.reset & context.real
            count = count.masked_fill(starts[:, 0], 0)
        pick = (lambda tensor: tensor) if rows is None else (lambda tensor: tensor[rows])
        cos = sin = None
        if context.cos is not None:
            cos, sin = pick(context.cos[:, 0]), pick(context.sin[:, 0])
        count, position = pick(count), pick(context.positions[:, 0])
        q, k, v, gate = self.project(pick(x[:, 0]), cos, sin)
        bias = self._bias()
        if bias:
            if config.position_embedding_type == "local":
                # Slot s holds the newest ordinal below `count` that is congruent to it.
                slots = torch.arange(config.memory_size, device=x.device)
                places = count[:, None] - 1 - (count[:, None] - 1 - slots) % config.memory_size
                bias |= {"q_place": count, "k_place": places}
            else:
                bias |= {"q_place": position, "k_place": pick(cache.positions)}
        with without_autocast(x.device):
            attended = memory_attention_step(
                q, k, v, pick(cache.keys), pick(cache.values), count,
                activation=config.attention_activation, scale=self.scale, **bias,
            )  # fmt: skip
        return self.finish(attended.to(gate.dtype), gate), k, v, position

    def step_in_memory(self, x: Tensor, active: Tensor, context: SequenceContext, cache: SeqBoatCacheLayer) -> Tensor:
        """`step` by a kernel that reads the memory of activated rows alone and writes the token into it.

        Args:
            x: (B, 1, D); active: (B,) bool.

        Returns:
            out (B, D), of no meaning where not activated.
        """
        config, bias = self.config, self._bias()
        cos, sin = (None, None) if context.cos is None else (context.cos[:, 0], context.sin[:, 0])
        q, k, v, gate = self.project(x[:, 0], cos, sin)
        position = context.positions[:, 0]
        by_index = config.position_embedding_type == "local"
        with without_autocast(x.device):
            attended = run_memory_step(
                q, k, v, cache.keys, cache.values, cache.positions, cache.activated_count, active,
                cache.activated_count if by_index else position, activation=config.attention_activation,
                scale=self.scale, position=position, bias_by_index=by_index, **bias,
            )  # fmt: skip
        return self.finish(attended, gate)


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
        `router_target_rate` its squared distance from it (a scalar), else None."""
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
        confidence, active, miss = self.router(m, context.real, context.places)
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
        return self._finish(self.activation(hidden + x), context), confidence, miss

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
        confidence, active, miss = self.router(m, context.real, context.places)
        pending = begin_stream(
            active, config.memory_size, config.bidirectional, context.segment_bounds(), self.stream_capacity
        )
        if self.counts_stream:
            self.stream_count = pending.count.clone()
        # Before the wait, so that the device has work meanwhile.
        hidden = self.hidden_proj(m)
        stream = pending.wait()
        out = self.attention("fused", m, stream, context)
        dropout_p = config.hidden_dropout if self.training and not config.bidirectional else 0.0
        with without_autocast(x.device):
            added = run_extract_residual(
                hidden.flatten(0, 1), residual.flatten(0, 1), out, confidence.flatten().float(), stream.slot, dropout_p,
                stream.padded,
            )  # fmt: skip
        return self._finish(added.view_as(x), context), confidence, miss

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
