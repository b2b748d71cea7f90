"""The gated attention unit: activated tokens over a window of activated tokens, or one token over the memory.

Letters: B batch, L columns, D hidden width, Z query/key width, V value width, W memory size, M activated tokens of all
rows. Step numbers in comments follow arXiv 2306.11197, section 3.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .cache_seqboat import PartMemory, SeqBoatCacheLayer
from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import SequenceContext
from .kernels_seqboat import Ops
from .ops_attention_seqboat import attention_scale, rotary_tables, t5_bias_table
from .ops_ema_seqboat import without_autocast
from .ops_layout_seqboat import Packed


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


def wants_whole_texts(module: nn.Module) -> bool:
    """Whether a module in the place of a linear layer has to be given (B, L, D), activated tokens or not.

    A linear layer, and LoRA's around one, treats every row of (M, D) for itself. Other adapters may look at texts
    (their length, which tokens come last), and hooks of PEFT's too (which adapter a row of the batch has, which tokens
    are to be learned from). Anybody else's hooks see what is computed.
    """
    if any(map(_is_of_peft, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
        return True
    return not isinstance(module, nn.Linear) and not type(module).__module__.startswith("peft.tuners.lora.")


def _is_of_peft(hook: Callable) -> bool:
    function = hook.func if isinstance(hook, functools.partial) else hook
    return (getattr(function, "__module__", None) or type(function).__module__).startswith("peft.")


def _linear(module: nn.Module, rows: Tensor, ops: Ops) -> Tensor:
    """`module` on (M, D). It is never given no rows, which quantised layers do not take: one of zeros is computed, and
    dropped, so that its parameters have a gradient all the same."""
    if rows.shape[0] == 0:
        return ops.linear(module, F.pad(rows, (0, 0, 0, 1)))[:0]
    return ops.linear(module, rows)


def _spread(rows: Tensor, packed: Packed, tokens: int, ops: Ops) -> Tensor:
    """(M, N) -> (R, N), zeros where a token is not activated."""
    if packed.packed_index is not None:
        return ops.gather_rows(rows, packed.packed_index, packed.index)
    return rows.new_zeros(tokens, rows.shape[1]).index_copy(0, packed.index, rows)


class SeqBoatAttention(nn.Module):
    """The gated attention unit over activated tokens (steps 6 to 8)."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.hidden_size, config.qk_head_dim + 2 * config.v_head_dim)
        self.out_proj = nn.Linear(config.v_head_dim, config.hidden_size)
        self.qk_scale = nn.Parameter(torch.empty(2, config.qk_head_dim))
        self.qk_offset = nn.Parameter(torch.empty(2, config.qk_head_dim))
        learned = config.position_embedding_type in ("simple", "local", "t5")
        self.position_bias = SeqBoatPositionBias(config) if learned else None
        self.activation = ACT2FN[config.hidden_act]
        self.most_keys = config.memory_size * (2 if config.bidirectional else 1) + 1
        self.scale = attention_scale(
            config.attention_activation, config.qk_head_dim, config.memory_size, config.bidirectional
        )

    def forward(
        self,
        x: Tensor,
        active: Tensor,
        packed: Packed,
        context: SequenceContext,
        cache: SeqBoatCacheLayer | None,
        memory: SeqBoatCacheLayer | PartMemory | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Runs the unit on activated tokens only.

        Args:
            x: (B, L, D); active: (B, L) bool; packed: the list of activated tokens.
            cache: which takes the tokens in: in a decode step here, else by `advance` later.
            memory: what lies before the columns that the tokens attend to; not read in a decode step.

        Returns:
            out (M, D), without meaning in rows that are not activated; and what the cache is to keep, keys (M, Z) and
            values (M, V), or None.
        """
        ops, steps = context.ops, packed.steps
        if steps and packed.skips:
            return x.new_zeros(0, x.shape[2]), None, None
        projected = self._on_activated(self.in_proj, x, packed, ops)
        keys = values = None
        with without_autocast(x.device):
            if steps:
                gated = self._step(projected, active[:, 0], packed.index, context, cache)
            else:
                gated, keys, values = self._over_window(projected, packed, context, memory, cache is not None)
        if wants_whole_texts(self.out_proj):
            if packed.index is not None:
                gated = _spread(gated, packed, active.numel(), ops)
            out = self._on_activated(self.out_proj, gated.view(*active.shape, -1), packed, ops)
        else:
            out = _linear(self.out_proj, gated, ops)
        if self.config.bidirectional:
            out = F.dropout(out, self.config.hidden_dropout, self.training)
        return out, keys, values

    @staticmethod
    def _on_activated(module: nn.Module, x: Tensor, packed: Packed, ops: Ops) -> Tensor:
        """(B, L, D) -> (M, N), what `module` makes of the activated tokens."""
        if wants_whole_texts(module):
            rows = module(x).flatten(0, 1)
            return rows if packed.index is None else ops.gather_rows(rows, packed.index, packed.packed_index)
        rows = x.flatten(0, 1)
        if packed.index is not None:
            rows = ops.gather_rows(rows, packed.index, packed.packed_index)
        return _linear(module, rows, ops)

    def keys_of(self, rows: Tensor, positions: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Keys (B, W, Z) and values (B, W, V) of tokens that are not among the columns. rows: (B, W, D); positions:
        (B, W) int64."""
        config, ops, shape = self.config, context.ops, rows.shape[:2]
        projected = _linear(self.in_proj, rows.flatten(0, 1), ops)
        tables = None, None
        if context.cos is not None:
            tables = rotary_tables(positions.flatten(), config.qk_head_dim, config.rope_theta)
        with without_autocast(rows.device):
            parts = ops.project_unit(projected, self.qk_scale, self.qk_offset, *tables, None, self.activation)
            values = F.dropout(parts[2], config.value_dropout, self.training)
        return parts[1].view(*shape, -1), values.view(*shape, -1)

    def _over_window(
        self,
        projected: Tensor,
        packed: Packed,
        context: SequenceContext,
        memory: SeqBoatCacheLayer | PartMemory | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Every token over the activated tokens around it."""
        config = self.config
        options = {}
        if context.cos is not None:
            cos, sin = context.cos.flatten(0, 1), context.sin.flatten(0, 1)
            options = {"cos": cos, "sin": sin, "table_rows": packed.index}
        if self.position_bias is not None:
            options |= self._bias(packed, context, memory)
        if self.training:
            options |= {"value_dropout": config.value_dropout, "attention_dropout": config.attention_dropout}
        return context.ops.gated_unit(
            projected,
            self.qk_scale,
            self.qk_offset,
            packed.key_start,
            packed.key_end,
            attention=config.attention_activation,
            attention_scale=self.scale,
            activation=self.activation,
            max_keys=self.most_keys,
            memory=None if memory is None else (packed.memory, memory.keys, memory.values),
            keep=keep,
            **options,
        )

    def _bias(self, packed: Packed, context: SequenceContext, memory: SeqBoatCacheLayer | PartMemory | None) -> dict:
        join = packed.memory
        if self.config.position_embedding_type == "local":
            keys = packed.index.shape[0] if join is None else join.num_keys
            k_place = torch.arange(keys, device=packed.index.device)
            q_place = k_place if join is None else join.new_index
        else:
            # Behind a list that was filled up: any place will do.
            q_place = context.positions.flatten()[packed.index]
            k_place = q_place if join is None else join.join(memory.positions, q_place)
        center, table = self.position_bias.center, self.position_bias()
        return {"bias_table": table, "bias_center": center, "q_place": q_place, "k_place": k_place}

    def _step(
        self,
        projected: Tensor,
        active: Tensor,
        rows: Tensor | None,
        context: SequenceContext,
        cache: SeqBoatCacheLayer,
    ) -> Tensor:
        """One token a row over the cache's memory, which takes it in. rows: (R,) int64, those in `projected`, or None
        for all."""
        config, cos, sin, options = self.config, None, None, {}
        if context.cos is not None:
            cos, sin = context.cos[:, 0], context.sin[:, 0]
        parts = context.ops.project_unit(projected, self.qk_scale, self.qk_offset, cos, sin, rows, self.activation)
        q, k, v, gate = parts
        v = F.dropout(v, config.value_dropout, self.training)
        if self.position_bias is not None:
            options = {"bias_table": self.position_bias(), "bias_center": self.position_bias.center}
            options["bias_by_index"] = config.position_embedding_type == "local"
        attended = context.ops.memory_step(
            q,
            k,
            v,
            cache.keys,
            cache.values,
            cache.positions,
            cache.activated_count,
            active,
            context.positions[:, 0],
            activation=config.attention_activation,
            scale=self.scale,
            rows=rows,
            pages=cache.pages,
            **options,
        )
        return attended.to(gate.dtype) * gate
