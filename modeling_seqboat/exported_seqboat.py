"""What takes the place of compression under torch.export, whose graphs have no shape that depends on the data.

Letters: B batch, L columns, D hidden width, Z query/key width, V value width, W memory size, C queries of a block, G
blocks, K keys that a block reads.

Each row's activated tokens move to the front of a row of L places, in order; a block of C of them reads the W before
it. Time and memory are linear in L, and do not fall with the number of activated tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_attention_seqboat import attention_weights, project_unit
from .ops_ema_seqboat import without_autocast
from .ops_layout_seqboat import last_real_tokens

_BLOCK = 128


def exported_unit(unit, x: Tensor, active: Tensor, context, cache, scanned: tuple | None) -> Tensor:
    """The gated attention unit over a prompt, and what it leaves in a static cache.

    Args:
        unit: a `SeqBoatAttention`; x: (B, L, D); active: (B, L) bool.
        cache: the layer's, which the tokens continue; None without one.
        scanned: the recurrence's inputs (B, L, D) and state, with a cache.

    Returns:
        (B, L, D), without meaning where a token is not activated.
    """
    memory, (batch, length) = unit.config.memory_size, active.shape
    if cache is not None:
        cache.make_room(memory)
    columns = torch.arange(length, device=x.device)
    ordinal = active.long().cumsum(1) - 1
    count = ordinal[:, -1:] + 1
    # The column of each row's n-th activated token.
    place = torch.where(active, ordinal, length)
    source = place.new_zeros(batch, length + 1).scatter(1, place, columns.expand(batch, -1))[:, :length]

    def moved(rows: Tensor) -> Tensor:
        return rows.gather(1, source[:, :, None].expand(-1, -1, rows.shape[2]))

    tables = [None if t is None else t.flatten(0, 1) for t in (context.cos, context.sin)]
    with without_autocast(x.device):
        projected = unit.in_proj(x).flatten(0, 1)
        parts = project_unit(projected, unit.qk_scale, unit.qk_offset, *tables, None, unit.activation)
        q, k, v, gate = (part.view(batch, length, -1) for part in parts)
        q, k, v = moved(q), moved(k), moved(v)
        places = context.positions.gather(1, source)
        before = cache.activated_count[:, None] if cache is not None else count.new_zeros(batch, 1)
        # The W places before the first token, oldest first: the cache's memory, or nothing.
        earlier = before - memory + torch.arange(memory, device=x.device)
        keys, values, key_places = _led(k, memory), _led(v, memory), F.pad(places, (memory, 0))
        if cache is not None:
            slots = ((earlier + memory) % memory)[:, :, None]
            keys = torch.cat([cache.keys.gather(1, slots.expand(-1, -1, k.shape[2])).to(k.dtype), k], dim=1)
            values = torch.cat([cache.values.gather(1, slots.expand(-1, -1, v.shape[2])).to(v.dtype), v], dim=1)
            key_places = torch.cat([cache.positions.gather(1, slots[:, :, 0]), places], dim=1)
        held = torch.cat([earlier >= 0, columns < count], dim=1)
        attended = _attend(unit, q, keys, values, held, places, key_places)
        gated = attended.gather(1, ordinal.clamp_min(0)[:, :, None].expand(-1, -1, v.shape[2])).to(gate.dtype) * gate
    if cache is not None:
        _advance(cache, context, *scanned, before, count, k, v, places)
    return unit.out_proj(gated)


def _led(rows: Tensor, count: int) -> Tensor:
    return F.pad(rows, (0, 0, count, 0))


def _attend(unit, q, keys, values, held, places, key_places) -> Tensor:
    """Attention of the L tokens q (B, L, Z) over the W + L keys (B, W + L, Z), of which `held` (B, W + L) are there:
    (B, G * C, V), of which the first L places are meant. A token sees itself, which is W keys further on than it, and
    the W before it; in an encoder also the W after it."""
    config, memory, length = unit.config, unit.config.memory_size, q.shape[1]
    size = min(_BLOCK, memory, length) if isinstance(length, int) else min(_BLOCK, memory)
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
    scores = torch.matmul(q[:, tokens].to(dtype) * unit.scale, keys[:, index].to(dtype).transpose(-1, -2))
    if unit.position_bias is not None:
        table, center = unit.position_bias(), unit.position_bias.center
        if config.position_embedding_type == "local":
            offset = far - memory - own[:, None]
        else:
            offset = key_places[:, index][:, :, None] - places[:, tokens][..., None]
        scores = scores + table[(center + offset).clamp(0, table.shape[0] - 1)].to(dtype)
    weights = attention_weights(scores, near & held[:, :, None], config.attention_activation)
    return torch.matmul(weights.to(values.dtype), values[:, index]).flatten(1, 2)


def _advance(cache, context, hidden, state, before, count, keys, values, places) -> None:
    """Moves a static cache past the columns, without a shape that depends on the data; see
    `SeqBoatCacheLayer.advance`."""
    memory = cache.memory_size
    last = before + count - 1
    # The newest token whose ordinal leaves the rest of its slot.
    newest = last - (last + memory - torch.arange(memory, device=last.device)) % memory
    is_new, taken = newest >= before, (newest - before).clamp_min(0)
    taken = torch.minimum(taken, torch.full_like(taken, 1) * (keys.shape[1] - 1))
    for name, rows in (("keys", keys), ("values", values), ("positions", places[:, :, None])):
        ring = getattr(cache, name)
        new = rows.gather(1, taken[:, :, None].expand(-1, -1, rows.shape[2])).to(ring.dtype).view(ring.shape)
        cache._store(name, torch.where(is_new.view(*is_new.shape, *[1] * (ring.dim() - 2)), new, ring))
    real = context.real
    if real is None:
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if cache.ssm_inputs is not None:
        inputs = last_real_tokens(hidden, cache.truncation, real, None, cache.recent_inputs())
        cache._store("token_count", cache.token_count + real.sum(1))
        size = cache.truncation
        order = (torch.arange(size, device=inputs.device) + size - cache.token_count[:, None] % size) % size
        cache._store("ssm_inputs", inputs.gather(1, order[:, :, None].expand_as(inputs)))
    else:
        cache._store("token_count", cache.token_count + real.sum(1))
    cache._store("activated_count", cache.activated_count + count[:, 0])
    cache._store("ssm_state", state.to(cache.ssm_state.dtype))
    cache._count(hidden.shape[1])
