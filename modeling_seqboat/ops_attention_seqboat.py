"""Attention of activated tokens within their memory window (arXiv 2306.11197, section 3.3).

Letters: B batch, L columns, M queries and Mk keys of one flat stream, Z query/key width, V value width, W memory size.

The activated tokens of all rows form one stream; each query names the run of keys that it sees. That one form serves
rows of different counts, packed segments, and a memory that precedes each row's first new key. The specification is
`windowed_attention_naive`.
"""

import math

import torch
from torch import Tensor

from .ops_ssm_seqboat import without_autocast

# Queries of one block share a product with their keys; the block reads W + 128 keys to use W + 1 of them.
QUERY_BLOCK = 128
_LAPLACE_MEAN = 0.707107
_LAPLACE_STD = 0.282095


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


def _weights_backward(scores: Tensor, weights: Tensor, grad: Tensor, activation: str) -> Tensor:
    """d loss / d scores from d loss / d weights; weights are 0 where hidden, and so is the result for softmax."""
    if activation == "softmax":
        return weights * (grad - (weights * grad).sum(-1, keepdim=True))
    if activation == "relu2":
        return 2 * scores.relu() * grad
    density = torch.exp(-0.5 * ((scores - _LAPLACE_MEAN) / _LAPLACE_STD) ** 2)
    return grad * density / (_LAPLACE_STD * math.sqrt(2 * math.pi))


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    *,
    activation: str,
    scale: float,
    bias_table: Tensor | None = None,
    bias_center: int = 0,
    q_place: Tensor | None = None,
    k_place: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
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

    Returns:
        (M, V) of v's dtype. Time and memory are linear in M; weights are recomputed in backward.
    """
    seed = int(torch.randint(2**62, ())) if dropout_p > 0 else 0
    blocks = _blocks(key_start, key_end)
    return _WindowedAttention.apply(
        q,
        k,
        v,
        bias_table,
        key_start,
        key_end,
        q_place,
        k_place,
        blocks,
        activation,
        scale,
        bias_center,
        dropout_p,
        seed,
    )


def _blocks(key_start: Tensor, key_end: Tensor) -> list[tuple[int, int, int, int]]:
    """Query blocks with the keys they need: (first query, end, first key, end). One copy to the host."""
    count = key_start.shape[0]
    if count == 0:
        return []
    firsts = torch.arange(0, count, QUERY_BLOCK, device=key_start.device)
    lasts = (firsts + QUERY_BLOCK).clamp_max(count) - 1
    spans = torch.stack([firsts, lasts + 1, key_start[firsts], key_end[lasts]]).t().tolist()
    return [tuple(span) for span in spans if span[3] > span[2]]


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, start, end, q_place, k_place, blocks, activation, scale, center, dropout_p, seed):
        ctx.save_for_backward(q, k, v, table, start, end, q_place, k_place)
        ctx.blocks, ctx.activation, ctx.scale, ctx.center = blocks, activation, scale, center
        ctx.dropout_p, ctx.seed = dropout_p, seed
        out = v.new_zeros(q.shape[0], v.shape[1])
        generator = ctx.generator = _generator(dropout_p, seed, q.device)
        for q0, q1, k0, k1 in blocks:
            _, weights = _block_weights(ctx, q, k, table, start, end, q_place, k_place, q0, q1, k0, k1)
            if generator is not None:
                weights = weights * _keep(weights, dropout_p, generator)
            torch.mm(weights.to(v.dtype), v[k0:k1], out=out[q0:q1])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        with without_autocast(grad_out.device):
            return _WindowedAttention._gradients(ctx, grad_out)

    @staticmethod
    def _gradients(ctx, grad_out):
        q, k, v, table, start, end, q_place, k_place = ctx.saved_tensors
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        grad_q = torch.zeros_like(q)
        grad_k = torch.zeros(k.shape, dtype=dtype, device=k.device)
        grad_v = torch.zeros(v.shape, dtype=dtype, device=v.device)
        grad_table = None if table is None else torch.zeros(table.shape, dtype=dtype, device=table.device)
        generator = _generator(ctx.dropout_p, ctx.seed, q.device)
        for q0, q1, k0, k1 in ctx.blocks:
            scores, weights = _block_weights(ctx, q, k, table, start, end, q_place, k_place, q0, q1, k0, k1)
            keep = None if generator is None else _keep(weights, ctx.dropout_p, generator)
            dropped = weights if keep is None else weights * keep
            grad = grad_out[q0:q1].to(dtype)
            grad_v[k0:k1].addmm_(dropped.t(), grad)
            grad_weights = grad @ v[k0:k1].to(dtype).t()
            if keep is not None:
                grad_weights = grad_weights * keep
            grad_scores = _weights_backward(scores, weights, grad_weights, ctx.activation)
            if ctx.activation != "softmax":
                grad_scores = grad_scores.masked_fill(~_visible(start, end, q0, q1, k0, k1), 0)
            grad_q[q0:q1] = (grad_scores @ k[k0:k1].to(dtype) * ctx.scale).to(q.dtype)
            grad_k[k0:k1].addmm_(grad_scores.t(), q[q0:q1].to(dtype), alpha=ctx.scale)
            if grad_table is not None:
                entries = _entries(table, ctx.center, q_place[q0:q1], k_place[k0:k1])
                grad_table.index_add_(0, entries.flatten(), grad_scores.flatten())
        if grad_table is not None:
            grad_table = grad_table.to(table.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_table, *[None] * 10


def _visible(start: Tensor, end: Tensor, q0: int, q1: int, k0: int, k1: int) -> Tensor:
    keys = torch.arange(k0, k1, device=start.device)
    return (keys >= start[q0:q1, None]) & (keys < end[q0:q1, None])


def _entries(table: Tensor, center: int, q_place: Tensor, k_place: Tensor) -> Tensor:
    return (center + k_place[None, :] - q_place[:, None]).clamp(0, table.shape[0] - 1)


def _block_weights(ctx, q, k, table, start, end, q_place, k_place, q0, q1, k0, k1) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q[q0:q1].to(dtype) * ctx.scale) @ k[k0:k1].to(dtype).t()
    if table is not None:
        scores = scores + table.to(dtype)[_entries(table, ctx.center, q_place[q0:q1], k_place[k0:k1])]
    return scores, attention_weights(scores, _visible(start, end, q0, q1, k0, k1), ctx.activation)


def _generator(dropout_p: float, seed: int, device: torch.device) -> torch.Generator | None:
    """Backward draws the same masks again from the same seed instead of keeping them."""
    return torch.Generator(device=device).manual_seed(seed) if dropout_p > 0 else None


def _keep(weights: Tensor, dropout_p: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(weights.shape, device=weights.device, generator=generator)
    return (drawn >= dropout_p).to(weights.dtype) / (1 - dropout_p)


def memory_attention_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    *,
    activation: str,
    scale: float,
    bias_table: Tensor | None = None,
    bias_center: int = 0,
    q_place: Tensor | None = None,
    k_place: Tensor | None = None,
) -> Tensor:
    """One new token a row over its memory and itself, without a shape or a branch that depends on data.

    Args:
        q, k_new: (B, Z); v_new: (B, V).
        keys, values: (B, W, Z) and (B, W, V), a ring whose first min(count, W) slots are filled.
        count: (B,) int64, activated tokens that the row has had.
        q_place, k_place: (B,) and (B, W) int64, with `bias_table` as in `windowed_attention`.

    Returns:
        (B, V) of v_new's dtype.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scaled = q.to(dtype) * scale
    scores = torch.matmul(keys.to(dtype), scaled[:, :, None])[:, :, 0]
    own = (scaled * k_new.to(dtype)).sum(-1, keepdim=True)
    scores = torch.cat([scores, own], dim=1)
    if bias_table is not None:
        places = torch.cat([k_place, q_place[:, None]], dim=1)
        entries = (bias_center + places - q_place[:, None]).clamp(0, bias_table.shape[0] - 1)
        scores = scores + bias_table.to(dtype)[entries]
    size = keys.shape[1]
    slots = torch.arange(size + 1, device=q.device)
    visible = (slots < count[:, None].clamp_max(size)) | (slots == size)
    weights = attention_weights(scores, visible, activation).to(values.dtype)
    out = torch.matmul(weights[:, None, :-1], values)[:, 0]
    return out + weights[:, -1:] * v_new
