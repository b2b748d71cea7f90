"""The gated attention unit: activated tokens over a window of activated tokens, or one token over the memory.

Letters: B batch, L columns, D hidden width, Z query/key width, V value width, W memory size, M activated tokens of all
rows. Step numbers in comments follow arXiv 2306.11197, section 3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .cache_seqboat import SeqBoatCacheLayer
from .configuration_seqboat import SeqBoatConfig
from .kernels_seqboat import (
    requested_backend,
    run_gated_unit,
    run_gather_rows,
    run_linear,
    run_memory_step,
    run_project_unit,
    run_windowed_attention,
)
from .ops_attention_seqboat import (
    apply_rotary,
    attention_scale,
    memory_attention_step,
    t5_bias_table,
)
from .ops_ssm_seqboat import without_autocast
from .ops_stream_seqboat import TokenStream, build_stream
from .sequence_seqboat import SequenceContext


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

    def fused(self, x: Tensor, stream: TokenStream, context: SequenceContext) -> Tensor:
        """`compressed` without a cache and without dropout of values or weights, in fused kernels between the linears.

        Args:
            x: (B, L, D); stream: what `begin_stream` found.

        Returns:
            out (M, D).
        """
        config = self.config
        projected = run_linear(self.in_proj, run_gather_rows(x.flatten(0, 1), stream.index, stream.slot))
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
        out = run_linear(self.out_proj, gated)
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
