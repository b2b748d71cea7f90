"""Attention of activated tokens within their memory window (arXiv 2306.11197, section 3.3).

Letters: B batch, L columns, M queries and Mk keys of one flat stream, Z query/key width, V value width, W memory size.

The activated tokens of all rows form one stream; each query names the run of keys that it sees. That one form serves
rows of different counts, packed segments, and a memory that precedes each row's first new key. The specification is
`windowed_attention_naive`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_seqboat import Facts, needs_silu, op
from .ops_ema_seqboat import without_autocast
from .ops_layout_seqboat import MemoryKeys, must_not_wait
from .triton_attention_seqboat import windowed_attention_triton
from .triton_decode_seqboat import memory_step_compiled, memory_step_triton
from .triton_launch_seqboat import first_derivative_only
from .triton_unit_seqboat import gated_unit_triton, project_unit_triton

# Queries of one block share a product with their keys; the block reads W + 128 keys to use W + 1 of them.
QUERY_BLOCK = 128
_LAPLACE_MEAN = 0.707107
_LAPLACE_STD = 0.282095


def _needs_kernel(facts: Facts) -> str | None:
    if facts.attention_activation == "laplace":
        return "laplace attention has no kernel"
    if facts.attention_dropout > 0:
        return "attention_dropout has no kernel"
    return None if facts.qk_head_dim <= 256 else f"qk_head_dim={facts.qk_head_dim} is above 256, the kernels' largest"


def _needs_plain_values(facts: Facts) -> str | None:
    return "value_dropout has no kernel" if facts.value_dropout > 0 else None


def attention_scale(activation: str, query_width: int, memory_size: int, bidirectional: bool) -> float:
    """What q is multiplied with: 1/sqrt(Z) for softmax, else 1/W (causal) or 1/(2W) (bidirectional)."""
    if activation == "softmax":
        return query_width**-0.5
    return 1 / (2 * memory_size if bidirectional else memory_size)


def rotary_tables(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, float32.

    Args:
        positions: (...,) int64, exact at any size: angles are formed in float64, because float32 angles are off by
            0.05 rad at a million tokens.
        width: Z, even.
        theta: base of the frequencies theta^(-2i/Z).

    Returns:
        Two (..., Z/2) float32 tensors.
    """
    # MPS has no float64: the angles come from the CPU there.
    device = torch.device("cpu") if positions.device.type == "mps" else positions.device
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    angles = positions.to(device)[..., None].double() * theta**-exponents
    return angles.cos().float().to(positions.device), angles.sin().float().to(positions.device)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channels 2i and 2i+1 of x (..., Z) as one complex number; cos, sin (..., Z/2) float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    even, odd = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def t5_bias_table(weight: Tensor, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """The 32 T5 buckets spread over offsets pos_k - pos_q from -max_distance to max_distance.

    Args:
        weight: (32, 1).

    Returns:
        (2 * max_distance + 1,); beyond its ends the T5 buckets are constant, so clamping the offset is exact.
    """
    offsets = torch.arange(-max_distance, max_distance + 1, device=weight.device)
    buckets = weight.shape[0]
    base = torch.zeros_like(offsets)
    if bidirectional:
        buckets //= 2
        base = (offsets > 0).long() * buckets
        distance = offsets.abs()
    else:
        distance = (-offsets).clamp_min(0)
    exact = buckets // 2
    scaled = torch.log(distance.clamp_min(1).double() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + scaled.long()).clamp_max(buckets - 1)
    return weight[base + torch.where(distance < exact, distance, far), 0]


def attention_weights(scores: Tensor, visible: Tensor, activation: str) -> Tensor:
    """(..., keys) float scores -> weights, 0 where not visible; a query that sees nothing has only zeros."""
    if activation == "softmax":
        masked = scores.masked_fill(~visible, float("-inf"))
        top = masked.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        weights = torch.exp(masked - top)
        return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if activation == "relu2":
        weights = scores.relu().square()
    elif activation == "laplace":
        weights = 0.5 * (1 + torch.erf((scores - _LAPLACE_MEAN) / (_LAPLACE_STD * math.sqrt(2))))
    else:
        raise ValueError(f"attention_activation must be 'softmax', 'relu2' or 'laplace', got {activation!r}")
    # After the activation: laplace(0) is not 0, so a hidden key would still count.
    return weights.masked_fill(~visible, 0)


def _weights_backward(scores: Tensor, weights: Tensor, grad: Tensor, visible: Tensor, activation: str) -> Tensor:
    """The gradient of the scores, given that of the weights."""
    if activation == "softmax":
        return weights * (grad - (weights * grad).sum(-1, keepdim=True))
    if activation == "relu2":
        slope = 2 * scores.relu()
    else:
        slope = torch.exp(-0.5 * ((scores - _LAPLACE_MEAN) / _LAPLACE_STD) ** 2) / (
            _LAPLACE_STD * math.sqrt(2 * math.pi)
        )
    return (grad * slope).masked_fill_(~visible, 0)


@op("windowed_attention", triton=windowed_attention_triton, needs=(_needs_kernel,))
def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, *, activation: str, scale: float,
    bias_table: Tensor | None = None, bias_center: int = 0, q_place: Tensor | None = None,
    k_place: Tensor | None = None, dropout_p: float = 0.0, max_keys: int | None = None, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out_i = sum over key_start[i] <= j < key_end[i] of weight(q_i*scale . k_j + bias) v_j.

    Args:
        q: (M, Z), rotated already when the positions are rotary.
        k, v: (Mk, Z) and (Mk, V), of q's dtype.
        key_start, key_end: (M,) int64, neither decreasing; an empty run gives 0.
        activation: softmax, relu2 or laplace; scores and softmax are float32 (float64 when q is).
        scale: see `attention_scale`.
        bias_table: (T,), or None; the bias is entry clamp(bias_center + k_place[j] - q_place[i], 0, T - 1).
        q_place, k_place: (M,) and (Mk,) int64, with `bias_table`.
        dropout_p: share of weights dropped (the rest is scaled up); the caller passes 0 outside training.
        max_keys: a bound on key_end - key_start, for the kernel.
        gate: (M, V) of v's dtype; the result is then multiplied with it.

    Returns:
        (M, V) of v's dtype. Time and memory are linear in M; weights are recomputed in backward. A query that is not
        finite, or sees a key or value that is not, gives NaN, and no other does, but in a compiled or exported graph
        and while a CUDA graph is captured, where nothing can be looked up.
    """
    seed = int(torch.randint(2**62, ())) if dropout_p > 0 else 0
    wrong_queries = wrong_keys = None
    if not must_not_wait(v.device) and not _are_finite(q, k, v):
        # A hidden key has weight 0, which a product with NaN or infinity would not keep: here and in the gradients.
        wrong_queries = ~q.isfinite().all(1, keepdim=True)
        wrong_keys = ~(k.isfinite().all(1, keepdim=True) & v.isfinite().all(1, keepdim=True))
        q, k, v = q.masked_fill(wrong_queries, 0), k.masked_fill(wrong_keys, 0), v.masked_fill(wrong_keys, 0)
    blocks, places = _blocks(key_start, key_end), (key_start, key_end, q_place, k_place, wrong_queries, wrong_keys)
    numbers = {"activation": activation, "scale": scale, "center": bias_center, "dropout_p": dropout_p}
    out = _WindowedAttention.apply(q, k, v, bias_table, places, blocks, seed, numbers)
    return out if gate is None else out * gate


@op("project_unit", triton=project_unit_triton, needs=(needs_silu,))
def project_unit(
    projected: Tensor,
    scale: Tensor,
    offset: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    table_rows: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the unit makes of its input projection: q, k, v and the gate (arXiv 2306.11197, section 3.3).

    Args:
        projected: (M, Z + 2V), z, gate and v before their activation.
        scale, offset: (2, Z), row 0 for q and row 1 for k: activation(z) * scale + offset.
        cos, sin: (M, Z/2) float32, the rotary angles of pairs of channels 2i and 2i+1; None for no rotation.
        table_rows: (M,) int64, which row of cos and sin belongs to which token; None where they correspond.

    Returns:
        q, k (M, Z), v and gate (M, V), all of projected's dtype.
    """
    width = (projected.shape[-1] - scale.shape[1]) // 2
    z, gate, v = activation(projected).split([scale.shape[1], width, width], dim=-1)
    q, k = ((z * s + o).to(z.dtype) for s, o in zip(scale, offset, strict=True))
    if cos is not None:
        if table_rows is not None:
            cos, sin = cos[table_rows], sin[table_rows]
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    return q, k, v, gate


@op(
    "gated_unit",
    triton=gated_unit_triton,
    needs=(needs_silu, _needs_kernel, _needs_plain_values),
    parts=("project_unit", "windowed_attention"),
)
def gated_unit(
    projected: Tensor, scale: Tensor, offset: Tensor, key_start: Tensor, key_end: Tensor, *, attention: str,
    attention_scale: float, activation: Callable[[Tensor], Tensor] = F.silu, cos: Tensor | None = None,
    sin: Tensor | None = None, table_rows: Tensor | None = None, bias_table: Tensor | None = None,
    bias_center: int = 0, q_place: Tensor | None = None, k_place: Tensor | None = None, max_keys: int | None = None,
    memory: tuple[MemoryKeys, Tensor, Tensor] | None = None, value_dropout: float = 0.0,
    attention_dropout: float = 0.0, keep: bool = False, project_unit: Callable = project_unit,
    windowed_attention: Callable = windowed_attention,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Everything between the unit's two linears (arXiv 2306.11197, section 3.3).

    Args:
        projected, scale, offset, activation, cos, sin, table_rows: as in `project_unit`.
        key_start, key_end, attention_scale, bias_table, bias_center, q_place, k_place, max_keys: as in
            `windowed_attention`, where attention is the `activation`.
        memory: what joins the tokens' own keys: how, and the keys and values of a cache's ring.
        value_dropout, attention_dropout: probabilities, 0 outside training.
        keep: whether keys and values are wanted.
        project_unit, windowed_attention: the ops that this one is made of, where it is not one kernel sequence.

    Returns:
        (M, V) of projected's dtype, attention * activation(gate), the input of the output linear; and the tokens' keys
        (M, Z) and values (M, V), or None.
    """
    q, k, v, gate = project_unit(projected, scale, offset, cos, sin, table_rows, activation)
    if value_dropout > 0:
        v = F.dropout(v, value_dropout)
    keys, values = k, v
    if memory is not None:
        place, old_keys, old_values = memory
        keys, values = place.join(old_keys, k), place.join(old_values, v)
    bias = {"bias_table": bias_table, "bias_center": bias_center, "q_place": q_place, "k_place": k_place}
    options = {"scale": attention_scale, "dropout_p": attention_dropout, "max_keys": max_keys, "gate": gate}
    gated = windowed_attention(q, keys, values, key_start, key_end, activation=attention, **bias, **options)
    return (gated, k, v) if keep else (gated, None, None)


def _are_finite(*tensors: Tensor) -> bool:
    return bool(sum(tensor.detach().sum(dtype=torch.float32) for tensor in tensors).isfinite())


def _blocks(key_start: Tensor, key_end: Tensor) -> list[tuple[int, int, int, int]]:
    """Query blocks with the keys they need: (first query, end, first key, end). One copy to the host."""
    count = key_start.shape[0]
    if count == 0:
        return []
    firsts = torch.arange(0, count, QUERY_BLOCK, device=key_start.device)
    lasts = (firsts + QUERY_BLOCK).clamp_max(count) - 1
    spans = torch.stack([firsts, lasts + 1, key_start[firsts], key_end[lasts]]).t().tolist()
    return [tuple(span) for span in spans if span[3] > span[2]]


def _computed(q, k, table, places, blocks, seed, *, activation, scale, center, dropout_p) -> Iterator[tuple]:
    """Block after block of queries with all keys that any of them sees; the same seed draws the same dropout.

    Yields:
        queries, keys: which, as slices; scores (queries, keys), visible bool, entries int64 of the bias table or None;
        weights, before dropout, and what dropout multiplies them with or None.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    generator = torch.Generator(device=q.device).manual_seed(seed) if dropout_p > 0 else None
    for q0, q1, k0, k1 in blocks:
        queries, keys, entries, kept = slice(q0, q1), slice(k0, k1), None, None
        key_start, key_end, q_place, k_place, wrong_queries, wrong_keys = places
        scores = (q[queries].to(dtype) * scale) @ k[keys].to(dtype).t()
        if table is not None:
            entries = (center + k_place[None, keys] - q_place[queries, None]).clamp(0, table.shape[0] - 1)
            scores = scores + table.to(dtype)[entries]
        numbers = torch.arange(k0, k1, device=k.device)
        visible = (numbers >= key_start[queries, None]) & (numbers < key_end[queries, None])
        if wrong_keys is not None:
            scores = scores.masked_fill(visible & (wrong_queries[queries] | wrong_keys[keys].t()), torch.nan)
        weights = attention_weights(scores, visible, activation)
        if wrong_keys is not None:
            weights = weights.masked_fill(~visible, 0)
        if generator is not None:
            drawn = torch.rand(weights.shape, device=weights.device, generator=generator)
            kept = (drawn >= dropout_p).to(weights.dtype) / (1 - dropout_p)
        yield queries, keys, scores, visible, entries, weights, kept


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, places, blocks, seed, numbers):
        ctx.save_for_backward(q, k, v, table, *places)
        ctx.blocks, ctx.seed, ctx.numbers = blocks, seed, numbers
        out = v.new_zeros(q.shape[0], v.shape[1])
        for queries, keys, _, _, _, weights, kept in _computed(q, k, table, places, blocks, seed, **numbers):
            weights = weights if kept is None else weights * kept
            torch.mm(weights.to(v.dtype), v[keys], out=out[queries])
        return out

    @first_derivative_only
    def backward(ctx, grad_out):
        with without_autocast(grad_out.device):
            q, k, v, table, *places, wrong_queries, wrong_keys = ctx.saved_tensors
            if not must_not_wait(v.device) and not _are_finite(grad_out):
                # What is behind such a query stays with the keys that it sees.
                wrong = ~grad_out.isfinite().all(1, keepdim=True)
                grad_out = grad_out.masked_fill(wrong, 0)
                wrong_queries = wrong if wrong_queries is None else wrong | wrong_queries
                wrong_keys = torch.zeros_like(k[:, :1], dtype=torch.bool) if wrong_keys is None else wrong_keys
            places += wrong_queries, wrong_keys
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            grads = [None if t is None else q.new_zeros(t.shape, dtype=dtype) for t in (q, k, v, table)]
            grad_q, grad_k, grad_v, grad_table = grads
            scale, activation = ctx.numbers["scale"], ctx.numbers["activation"]
            for queries, keys, scores, visible, entries, weights, kept in _computed(
                q, k, table, places, ctx.blocks, ctx.seed, **ctx.numbers
            ):
                grad = grad_out[queries].to(dtype)
                grad_v[keys].addmm_((weights if kept is None else weights * kept).t(), grad)
                grad_weights = grad @ v[keys].to(dtype).t()
                grad_weights = grad_weights if kept is None else grad_weights * kept
                grad_scores = _weights_backward(scores, weights, grad_weights, visible, activation)
                if wrong_keys is not None:
                    # A row of NaN has them at keys that it does not see, too.
                    grad_scores = grad_scores.masked_fill(~visible, 0)
                grad_q[queries] = grad_scores @ k[keys].to(dtype) * scale
                grad_k[keys].addmm_(grad_scores.t(), q[queries].to(dtype), alpha=scale)
                if grad_table is not None:
                    grad_table.index_add_(0, entries.flatten(), grad_scores.flatten())
            found = (None if g is None else g.to(t.dtype) for t, g in zip((q, k, v, table), grads, strict=True))
            return *found, *[None] * 4


def _of_rows(ring: Tensor, at: Tensor | None) -> Tensor:
    return ring if at is None else ring[at]


@op(
    "memory_step", triton=memory_step_triton, compiled=memory_step_compiled, used=lambda facts: not facts.bidirectional
)
def memory_step(
    q: Tensor, k_new: Tensor, v_new: Tensor, keys: Tensor, values: Tensor, positions: Tensor, activated_count: Tensor,
    active: Tensor, position: Tensor, *, activation: str, scale: float, bias_table: Tensor | None = None,
    bias_center: int = 0, bias_by_index: bool = False, rows: Tensor | None = None, pages: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one token a row over its memory and itself; then the token enters the memory, in place.

    The memory is a ring: activated token i of a row (0, 1, ...) lives in slot i % W, so that slots below
    min(activated_count, W) hold the last W activated tokens. The token attends to all of them and to itself, W + 1
    keys; then its key, value and position replace the oldest slot, activated_count % W, and activated_count goes up
    by 1. A row that is not active keeps its memory and count, and its output means nothing. No shape and no branch
    depends on data.

    Args:
        q, k_new: (B, Z); v_new: (B, V).
        keys, values: (B, W, Z) and (B, W, V); positions: (B, W) int64.
        activated_count: (B,) int64, activated tokens that the row has had; active: (B,) bool.
        position: (B,) int64, of the new tokens.
        activation, scale, bias_table, bias_center: as in `windowed_attention`.
        bias_by_index: whether places are counts of activated tokens, in place of positions.
        rows: (R,) int64, the only active rows, in order, that q, k_new and v_new hold; None for all rows.
        pages: (B,) int64, where keys, values and positions are those of P texts in place of the B rows: which of them
            each row is. None for the B rows in order.
        gate: of v_new's shape and dtype; the result is then multiplied with it.

    Returns:
        (B or R, V) of v_new's dtype.
    """
    size, used, at, count, place = keys.shape[1], keys.shape[1], rows, activated_count, position
    if rows is not None:
        count, place = count[rows], place[rows]
    if pages is not None:
        at = pages if rows is None else pages[rows]
    filled = None
    if at is not None and q.device.type == "cpu" and not torch.compiler.is_compiling():
        # Looking is free, and so each row's memory can be read where it lies, as far as it is filled.
        filled = list(zip(at.tolist(), count.clamp_max(size).tolist(), strict=True))
        used = max((length for _, length in filled), default=0)
    columns = torch.arange(used + 1, device=q.device)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scaled = q.to(dtype) * scale
    if filled is None:
        scores = torch.matmul(_of_rows(keys, at).to(dtype), scaled[:, :, None])[:, :, 0]
    else:
        scores = scaled.new_zeros(scaled.shape[0], used)
        for row, (page, length) in enumerate(filled):
            torch.mv(keys[page, :length].to(dtype), scaled[row], out=scores[row, :length])
    own = (scaled * k_new.to(dtype)).sum(-1, keepdim=True)
    scores = torch.cat([scores, own], dim=1)
    if bias_table is not None:
        if bias_by_index:
            # Slot s holds the newest token i < count with i % W == s.
            q_place = count[:, None]
            k_place = q_place - 1 - (q_place - 1 - columns[:-1]) % size
        else:
            q_place, k_place = place[:, None], _of_rows(positions, at)[:, :used]
        entries = (bias_center + torch.cat([k_place, q_place], dim=1) - q_place).clamp(0, bias_table.shape[0] - 1)
        scores = scores + bias_table.to(dtype)[entries]
    visible = (columns < count[:, None].clamp_max(size)) | (columns == used)
    weights = attention_weights(scores, visible, activation).to(values.dtype)
    if filled is None:
        attended = torch.matmul(weights[:, None, :-1], _of_rows(values, at))[:, 0]
    else:
        attended = values.new_empty(weights.shape[0], values.shape[2])
        for row, (page, length) in enumerate(filled):
            torch.mv(values[page, :length].t(), weights[row, :length], out=attended[row])
    out = (attended + weights[:, -1:] * v_new).to(v_new.dtype)
    slot, at = count % size, torch.arange(active.shape[0], device=active.device) if at is None else at
    for ring, new in ((keys, k_new), (values, v_new), (positions, place)):
        new = new.to(ring.dtype)
        if rows is None:
            new = torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, ring[at, slot])
        ring[at, slot] = new
    activated_count.add_(active)
    return out if gate is None else out * gate
