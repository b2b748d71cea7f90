"""The gated attention unit: activated tokens over a window of activated tokens, or one token over the memory.

Letters: B batch, L columns, D hidden width, Z query/key width, V value width, W memory size, M activated tokens of all
rows; in an exported graph C queries of a block, G blocks, K keys that a block reads. Step numbers in comments follow
arXiv 2306.11197, section 3.
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
from .ops_attention_seqboat import attention_scale, attention_weights, project_unit, rotary_tables, t5_bias_table
from .ops_ema_seqboat import without_autocast
from .ops_layout_seqboat import Packed, rows_at

CacheLayer = SeqBoatCacheLayer | None
# What lies before the columns that the tokens attend to.
Memory = SeqBoatCacheLayer | PartMemory | None
# Queries of a block in an exported graph.
_EXPORTED_BLOCK = 128


class SeqBoatPositionBias(nn.Module):
    """Learned attention bias by distance, as one table indexed by clamp(center + place_k - place_q)."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__()
        self.kind = config.position_embedding_type
        self.bidirectional = config.bidirectional
        far, size = config.max_position_embeddings - 1, config.memory_size
        shapes = {"simple": (2 * far + 1,), "local": (6 * size - 1,), "t5": (32, 1)}
        self.center = {"simple": far, "local": 4 * size - 1, "t5": 128}[self.kind]
        self.weight = nn.Parameter(torch.empty(shapes[self.kind]))

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
        self, x: Tensor, active: Tensor, packed: Packed, context: SequenceContext, cache: CacheLayer, memory: Memory
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
        self, projected: Tensor, packed: Packed, context: SequenceContext, memory: Memory, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Every token over the activated tokens around it."""
        config = self.config
        options = {"attention": config.attention_activation, "attention_scale": self.scale, "keep": keep}
        options |= {"activation": self.activation, "max_keys": self.most_keys}
        if memory is not None:
            options["memory"] = packed.memory, memory.keys, memory.values
        if context.cos is not None:
            cos, sin = context.cos.flatten(0, 1), context.sin.flatten(0, 1)
            options |= {"cos": cos, "sin": sin, "table_rows": packed.index}
        if self.position_bias is not None:
            options |= self._bias(packed, context, memory)
        if self.training:
            options |= {"value_dropout": config.value_dropout, "attention_dropout": config.attention_dropout}
        inputs = projected, self.qk_scale, self.qk_offset, packed.key_start, packed.key_end
        return context.ops.gated_unit(*inputs, **options)

    def _bias(self, packed: Packed, context: SequenceContext, memory: Memory) -> dict:
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
        self, projected: Tensor, active: Tensor, rows: Tensor | None, context: SequenceContext, cache: CacheLayer
    ) -> Tensor:
        """One token a row over the cache's memory, which takes it in. rows: (R,) int64, those in `projected`, or None
        for all."""
        config, cos, sin = self.config, None, None
        if context.cos is not None:
            cos, sin = context.cos[:, 0], context.sin[:, 0]
        tables = cos, sin, rows
        q, k, v, gate = context.ops.project_unit(projected, self.qk_scale, self.qk_offset, *tables, self.activation)
        v = F.dropout(v, config.value_dropout, self.training)
        options = {"activation": config.attention_activation, "scale": self.scale, "rows": rows, "pages": cache.pages}
        if self.position_bias is not None:
            options |= {"bias_table": self.position_bias(), "bias_center": self.position_bias.center}
            options["bias_by_index"] = config.position_embedding_type == "local"
        memory = cache.keys, cache.values, cache.positions, cache.activated_count
        return context.ops.memory_step(q, k, v, *memory, active, context.positions[:, 0], gate=gate, **options)

    def exported(
        self, x: Tensor, active: Tensor, context: SequenceContext, cache: CacheLayer, scanned: tuple | None
    ) -> Tensor:
        """The unit over a prompt under torch.export, whose graphs have no shape that depends on the data; and what it
        leaves in a static cache.

        In place of compression each row's activated tokens move to the front of a row of L places, in order; a block
        of them reads the W before it. Time and memory are linear in L, and do not fall with the number of activated
        tokens.

        Args:
            x: (B, L, D); active: (B, L) bool.
            cache: the layer's, which the tokens continue; None without one.
            scanned: the recurrence's inputs (B, L, D) and state, with a cache.

        Returns:
            (B, L, D), without meaning where a token is not activated.
        """
        memory, (batch, length) = self.config.memory_size, active.shape
        if cache is not None:
            cache.make_room(memory)
        columns = torch.arange(length, device=x.device)
        ordinal = active.long().cumsum(1) - 1
        count = ordinal[:, -1:] + 1
        # The column of each row's n-th activated token.
        place = torch.where(active, ordinal, length)
        source = place.new_zeros(batch, length + 1).scatter(1, place, columns.expand(batch, -1))[:, :length]

        tables = [None if t is None else t.flatten(0, 1) for t in (context.cos, context.sin)]
        with without_autocast(x.device):
            projected = self.in_proj(x).flatten(0, 1)
            parts = project_unit(projected, self.qk_scale, self.qk_offset, *tables, None, self.activation)
            q, k, v, gate = (part.view(batch, length, -1) for part in parts)
            q, k, v = (rows_at(rows, source) for rows in (q, k, v))
            places = context.positions.gather(1, source)
            before = cache.activated_count[:, None] if cache is not None else count.new_zeros(batch, 1)
            # The W places before the first token, oldest first: the cache's memory, or nothing.
            earlier = before - memory + torch.arange(memory, device=x.device)
            if cache is None:
                keys, values = (F.pad(rows, (0, 0, memory, 0)) for rows in (k, v))
                key_places = F.pad(places, (memory, 0))
            else:
                slots = (earlier + memory) % memory
                keys = torch.cat([rows_at(cache.keys, slots).to(k.dtype), k], dim=1)
                values = torch.cat([rows_at(cache.values, slots).to(v.dtype), v], dim=1)
                key_places = torch.cat([cache.positions.gather(1, slots), places], dim=1)
            held = torch.cat([earlier >= 0, columns < count], dim=1)
            attended = self._in_blocks(q, keys, values, held, places, key_places)
            gated = rows_at(attended, ordinal.clamp_min(0)).to(gate.dtype) * gate
        if cache is not None:
            cache.advance_in_graph(context, *scanned, count, k, v, places)
        return self.out_proj(gated)

    def _in_blocks(self, q, keys, values, held, places, key_places) -> Tensor:
        """Attention of the L tokens q (B, L, Z) over the W + L keys (B, W + L, Z), of which `held` (B, W + L) are
        there: (B, G * C, V), of which the first L places are meant. A token sees itself, which is W keys further on
        than it, and the W before it; in an encoder also the W after it."""
        config, memory, length = self.config, self.config.memory_size, q.shape[1]
        size = min(_EXPORTED_BLOCK, memory, length) if isinstance(length, int) else min(_EXPORTED_BLOCK, memory)
        after = memory if config.bidirectional else 0
        # One block more than there need be: sizes that may be 1 would make an exporter ask which it is.
        blocks = (length + size - 1) // size + (0 if isinstance(length, int) else 1)
        first = torch.arange(blocks, device=q.device)[:, None] * size
        own, far = torch.arange(size, device=q.device), torch.arange(size + memory + after, device=q.device)
        # (G, C) and (G, K): which tokens the blocks have, and which keys. Behind the last one any will do: it is never
        # read.
        tokens, index = (first + own).clamp_max(length - 1), first + far
        held = held[:, index.clamp_max(memory + length - 1)] & (index < memory + length)
        index = index.clamp_max(memory + length - 1)
        near = (far >= own[:, None]) & (far <= own[:, None] + memory + after)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        # (B, G, C, K)
        scores = torch.matmul(q[:, tokens].to(dtype) * self.scale, keys[:, index].to(dtype).transpose(-1, -2))
        if self.position_bias is not None:
            table, center = self.position_bias(), self.position_bias.center
            if config.position_embedding_type == "local":
                offset = far - memory - own[:, None]
            else:
                offset = key_places[:, index][:, :, None] - places[:, tokens][..., None]
            scores = scores + table[(center + offset).clamp(0, table.shape[0] - 1)].to(dtype)
        weights = attention_weights(scores, near & held[:, :, None], config.attention_activation)
        return torch.matmul(weights.to(values.dtype), values[:, index]).flatten(1, 2)
