"""Windowed attention with wide values as banded products, in Triton, forward and backward.

Letters: M queries and Mk keys of one flat stream, Z query/key width, V value width.

V is ten times Z, so a kernel that formed the weights again for every slice of V would spend 40 % of its time on q.k. Here
the weights are written once, as a list of dense tiles that holds only the tiles some query sees, and every wide product
(weights.v, grad.v^T, weights^T.grad) is a plain tiled product over that list:

    forward     weights_kernel      the list, and where its tiles lie
                values_kernel       out = weights . v, times the gate
    backward    row_sums_kernel     sum over V of grad * out, and the gate's gradient
                score_grads_kernel  the weights again, and d loss/d scores from grad . v^T
                input_grads_kernel  gradients of v, k and q
                table_grads_kernel  gradient of the bias table

The list lives for one call: 34 MB at 16,384 queries and W = 1,024. Between forward and backward only row statistics are
kept. Nothing here waits for the device, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .triton_attention_kernels_seqboat import (
    input_grads_kernel,
    row_sums_kernel,
    score_grads_kernel,
    table_grads_kernel,
    values_kernel,
    weights_kernel,
)
from .triton_launch_seqboat import aligned_key, blocks_of, interpreted, on_device, power_of_two

_LOG2_E = 1.4426950408889634
# Fixed-point steps between 0 and the largest gradient of one pair's bias, which leaves 29 bits for the sum of pairs.
_FIXED_POINT = 2.0**34
# Tables that programs add to in turn, and entries of all of them together.
_MOST_COPIES, _COPIED_ENTRIES = 64, 2**17
# How far, in powers of two, a score may exceed those of its row's first tile before the row is computed again: the
# sums and products are float32, but the weights must fit their own type.
_RISE = {torch.float16: 14.0, torch.bfloat16: 64.0, torch.float32: 64.0}


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Tile sizes and each kernel's launch options. `rows` queries share one program where the weights are formed."""

    m: int
    n: int
    rows: int
    inner: int
    values: int
    weights_options: dict[str, int]
    values_options: dict[str, int]
    score_grads_options: dict[str, int]
    input_grads_options: dict[str, int]


# Two programs of 128 columns share an SM: while one reads the gate and stores, the other multiplies.
_BLOCKS_16BIT = _Blocks(
    m=128, n=128, rows=64, inner=64, values=128,
    weights_options={"num_warps": 4, "num_stages": 2},
    values_options={"num_warps": 8, "num_stages": 3},
    score_grads_options={"num_warps": 8, "num_stages": 3, "maxnreg": 128},
    input_grads_options={"num_warps": 8, "num_stages": 3},
)  # fmt: skip
# float32 products run on the ordinary units, where a large tile only costs registers.
_BLOCKS_32BIT = _Blocks(
    m=64, n=64, rows=32, inner=32, values=64,
    weights_options={"num_warps": 4, "num_stages": 2},
    values_options={"num_warps": 4, "num_stages": 2},
    score_grads_options={"num_warps": 4, "num_stages": 2},
    input_grads_options={"num_warps": 4, "num_stages": 2},
)  # fmt: skip


def _blocks_for(dtype: torch.dtype) -> _Blocks:
    return _BLOCKS_32BIT if dtype == torch.float32 else _BLOCKS_16BIT


# Each block of queries adds up the tiles of all blocks before it; beyond this many blocks in larger bites.
_MANY_BLOCKS = 512


class AttentionRanges(NamedTuple):
    """What each query sees: key_start, key_end (M,) and, with a bias table, q_place (M,) and k_place (Mk,), int64."""

    key_start: Tensor
    key_end: Tensor
    q_place: Tensor | None
    k_place: Tensor | None


class AttentionCall(NamedTuple):
    """What forward and backward share beside tensors. `list_size` 0: there is nothing to compute."""

    activation: str
    scale: float
    table_center: int
    list_size: int
    lift: float


class _Sizes(NamedTuple):
    m: int
    mk: int
    z: int
    width: int
    n_blocks: int
    n_key_blocks: int


def _sizes(q: Tensor, v: Tensor, blocks: _Blocks) -> _Sizes:
    (m, z), (mk, width) = q.shape, v.shape
    return _Sizes(m, mk, z, width, blocks_of(m, blocks.m), blocks_of(mk, blocks.n))


def _precision(dtype: torch.dtype) -> str:
    # The interpreter multiplies the bit patterns of bfloat16 as integers.
    return "upcast" if interpreted() else "ieee" if dtype == torch.float32 else "tf32"


def _list_bound(m: int, mk: int, longest: int, blocks: _Blocks) -> int:
    """Tiles that m queries with at most `longest` keys each can need.

    A block spans `longest` keys plus what its runs advance; the advances add up to at most mk over all blocks, and
    rounding to tiles adds less than two a block.
    """
    count = blocks_of(m, blocks.m)
    spans = (count * longest + mk) // blocks.n + 2 * count
    return min(spans, count * blocks_of(mk, blocks.n))


def _score_arguments(call: AttentionCall, table: Tensor | None) -> tuple[int, int, float, float]:
    factor = _LOG2_E if call.activation == "softmax" else 1.0
    return 0 if table is None else table.shape[0], call.table_center, call.scale * factor, factor


def _facts(blocks: _Blocks, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, call: AttentionCall) -> tuple:
    """What all of a call's compiled variants depend on; see `aligned_key`."""
    table_dtype = None if table is None else table.dtype
    strides = q.stride(0), k.stride(0), v.stride(0)
    return blocks, q.device, q.dtype, q.shape[1], v.shape[1], *strides, call.activation, table_dtype


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, ranges: AttentionRanges, call: AttentionCall,
    gate: Tensor | None, gate_form: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """out, gated (None without a gate), row statistics and the plan that backward needs.

    Args:
        gate: (M, V), whose rows may lie apart.
        gate_form: none; product: gated = out * gate; silu: gated = out * silu(gate).
    """
    blocks = _blocks_for(q.dtype)
    m, mk, z, width, n_blocks, n_key_blocks = _sizes(q, v, blocks)
    softmax, precision = call.activation == "softmax", _precision(q.dtype)
    plan = torch.empty(3 * n_blocks + 2 * n_key_blocks + call.list_size, dtype=torch.int32, device=q.device)
    row_stats = torch.empty(2, m if softmax else 0, dtype=torch.float32, device=q.device)
    weights = torch.empty(call.list_size * blocks.m, blocks.n, dtype=q.dtype, device=q.device)
    gate_stride = 0 if gate is None else gate.stride(0)
    chunk = 128 if n_blocks <= _MANY_BLOCKS else 1024
    facts = _facts(blocks, q, k, v, table, call)
    key = aligned_key((q, k, v, table, gate, *ranges), *facts, gate_form, gate_stride, chunk)
    weights_kernel(
        (n_blocks * (blocks.m // blocks.rows),), key,
        q, k, ranges.key_start, ranges.key_end, table, ranges.q_place, ranges.k_place, weights, row_stats, plan,
        m, mk, n_blocks, n_key_blocks, call.list_size, q.stride(0), k.stride(0),
        *_score_arguments(call, table), call.lift, options=blocks.weights_options,
        Z=z, SOFTMAX=softmax, HAS_TABLE=table is not None, PRECISION=precision, RISE=_RISE[q.dtype],
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_Z=power_of_two(z), ROWS=blocks.rows, CHUNK=chunk,
    )  # fmt: skip
    out = torch.empty(m, width, dtype=v.dtype, device=v.device)
    gated = None if gate is None else torch.empty_like(out)
    columns = min(blocks.values, power_of_two(width))
    slices = blocks_of(width, columns)
    values_kernel(
        (n_blocks * slices,), key,
        weights, v, plan, row_stats, gate, out, gated,
        m, mk, n_blocks, call.list_size, v.stride(0), gate_stride, 1 / call.lift, options=blocks.values_options,
        V=width, SOFTMAX=softmax, GATE=gate_form, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, INNER=blocks.inner, WIDTH=columns, SLICES=slices,
    )  # fmt: skip
    return out, gated, row_stats, plan


def row_sums(
    grad: Tensor, out: Tensor, gate: Tensor | None, gate_form: str, grad_gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of the ungated output (M, V) and, in float32, its sum over V times out; fills grad_gate."""
    m, width = out.shape
    sums = torch.empty(m, dtype=torch.float32, device=out.device)
    grad_out = grad if gate is None else torch.empty_like(out)
    strides = (grad.stride(0), 0 if gate is None else gate.stride(0), 0 if grad_gate is None else grad_gate.stride(0))
    row_sums_kernel(
        (blocks_of(m, 4),),
        aligned_key((grad, out, gate, grad_gate), out.device, out.dtype, width, gate_form, *strides),
        grad, out, gate, grad_out, grad_gate, sums, m, *strides, options={"num_warps": 4},
        V=width, GATE=gate_form, ROWS=4, WIDTH=min(512, power_of_two(width)),
    )  # fmt: skip
    return grad_out, sums


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, ranges: AttentionRanges,
    call: AttentionCall, row_stats: Tensor, sums: Tensor | None, plan: Tensor, grad_v: Tensor, raw_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k and the table; fills grad_v (Mk, V), or with raw_v, where v = silu(raw_v), that of raw_v."""
    blocks = _blocks_for(q.dtype)
    m, mk, z, width, n_blocks, n_key_blocks = _sizes(q, v, blocks)
    sizes = (m, mk, n_blocks, n_key_blocks, call.list_size)
    precision = _precision(q.dtype)
    weights = torch.empty(call.list_size * blocks.m, blocks.n, dtype=q.dtype, device=q.device)
    score_grads = torch.empty_like(weights)
    top = None if table is None else torch.zeros(1, dtype=torch.int32, device=q.device)
    strides = grad_out.stride(0), 0 if raw_v is None else raw_v.stride(0), grad_v.stride(0)
    key = aligned_key(
        (q, k, v, table, grad_out, raw_v, grad_v, *ranges), *_facts(blocks, q, k, v, table, call), *strides
    )
    softmax = call.activation == "softmax"
    score_grads_kernel(
        (call.list_size,), key,
        q, k, v, grad_out, ranges.key_start, ranges.key_end, table, ranges.q_place, ranges.k_place,
        row_stats, sums if softmax else None, plan, weights, score_grads, top,
        *sizes, q.stride(0), k.stride(0), v.stride(0), grad_out.stride(0),
        *_score_arguments(call, table), call.lift, 1 / call.lift, options=blocks.score_grads_options,
        Z=z, V=width, SOFTMAX=softmax, HAS_TABLE=table is not None, WANT_TOP=table is not None, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_Z=power_of_two(z), INNER=blocks.inner,
    )  # fmt: skip
    columns = min(blocks.values, power_of_two(width))
    slices = blocks_of(width, columns)
    grad_q = torch.empty(m, z, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(mk, z, dtype=k.dtype, device=k.device)
    input_grads_kernel(
        (n_key_blocks * (slices + 1) + n_blocks,), key,
        weights, grad_out, score_grads, q, k, raw_v, plan, grad_v, grad_q, grad_k,
        *sizes, q.stride(0), k.stride(0), *strides, 1 / call.lift, call.scale, options=blocks.input_grads_options,
        V=width, Z=z, SILU=raw_v is not None, PRECISION=precision,
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, INNER=blocks.inner, WIDTH=columns, SLICES=slices, BLOCK_Z=power_of_two(z),
    )  # fmt: skip
    if table is None:
        return grad_q, grad_k, None
    largest = top.view(torch.float32)
    copies = max(1, min(_MOST_COPIES, _COPIED_ENTRIES // table.shape[0]))
    fixed = torch.zeros(copies, table.shape[0], dtype=torch.int64, device=q.device)
    table_grads_kernel(
        (call.list_size * (blocks.m // blocks.rows),), None if key is None else (*key, copies),
        score_grads, ranges.key_start, ranges.key_end, ranges.q_place, ranges.k_place, plan, largest, fixed,
        *sizes, table.shape[0], call.table_center, _FIXED_POINT, options={"num_warps": 4},
        BLOCK_M=blocks.m, BLOCK_N=blocks.n, ROWS=blocks.rows, COPIES=copies,
    )  # fmt: skip
    return grad_q, grad_k, (fixed.sum(0) * (largest.double() / _FIXED_POINT)).to(table.dtype)


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, gate, key_start, key_end, q_place, k_place, call):
        ranges = AttentionRanges(key_start, key_end, q_place, k_place)
        gate_form = "none" if gate is None else "product"
        ctx.call, ctx.gate_form = call, gate_form
        if call.list_size == 0:
            ctx.save_for_backward(q, k, v, table, gate)
            return v.new_zeros(q.shape[0], v.shape[1])
        with on_device(q):
            out, gated, row_stats, plan = attention_forward(q, k, v, table, ranges, call, gate, gate_form)
        # relu2 has no row sums, so without a gate its backward does not need the output.
        kept = out if call.activation == "softmax" or gate is not None else None
        ctx.save_for_backward(q, k, v, table, gate, kept, row_stats, plan, *ranges)
        return out if gate is None else gated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.call.list_size == 0:
            return *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors), *[None] * 5
        q, k, v, table, gate, out, row_stats, plan, *ranges = ctx.saved_tensors
        grad = grad.to(v.dtype).contiguous()
        grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        sums = None
        with on_device(q):
            if out is not None:
                grad, sums = row_sums(grad, out, gate, ctx.gate_form, grad_gate)
            grad_q, grad_k, grad_table = attention_backward(
                grad, q, k, v, table, AttentionRanges(*ranges), ctx.call, row_stats, sums, plan, grad_v
            )
        return grad_q, grad_k, grad_v, grad_table, grad_gate, *[None] * 5


def plan_attention(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor,
    activation: str, scale: float, bias_center: int, max_keys: int | None,
) -> AttentionCall:  # fmt: skip
    """The numbers that one call's kernels share; without `max_keys` this waits for the device."""
    m, mk = q.shape[0], k.shape[0]
    if max_keys is None:
        max_keys = int((key_end - key_start).max()) if m else 0
    list_size = _list_bound(m, mk, max(0, min(max_keys, mk)), _blocks_for(q.dtype)) if v.shape[1] else 0
    # Products of small relu2 scores leave the range of float16; a power of two brings them back and costs nothing.
    lift = 1.0 if activation == "softmax" else 2.0 ** round(-math.log2(scale))
    return AttentionCall(activation, scale, bias_center, list_size, lift)


def windowed_attention_triton(
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
    max_keys: int | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`windowed_attention` on a GPU: out_i = sum of weight(scale * q_i . k_j + bias) v_j, key_start[i] <= j < key_end[i].

    Args:
        q: (M, Z), Z up to 256, rotated already when the positions are rotary; float32, float16 or bfloat16.
        k, v: (Mk, Z) and (Mk, V), of q's dtype. Rows may lie apart (slices of a wider tensor).
        key_start, key_end: (M,) int64, neither decreasing; an empty run gives 0.
        activation: softmax or relu2 (arXiv 2306.11197, section 3.3).
        scale: 1/sqrt(Z) for softmax; 1/W, or 1/(2W) when bidirectional, for relu2.
        bias_table: (T,), or None; the bias is entry clamp(bias_center + k_place[j] - q_place[i], 0, T - 1).
        q_place, k_place: (M,) and (Mk,) int64 below 2^31, with `bias_table`.
        max_keys: a bound on key_end - key_start (W + 1 causal, 2W + 1 bidirectional), which sizes the scratch memory.
            None reads it from the ranges and so waits for the device; a bound that is too small makes the result NaN.
        gate: (M, V) of v's dtype; the result is then multiplied with it.

    Returns:
        (M, V) of v's dtype; gradients for q, k, v, bias_table and gate. The sums, bias_table's included, do not depend
        on the order in which programs run.

    Raises:
        ValueError: dropout, laplace, float64, unequal dtypes or shapes, or Z above 256.
    """
    if dropout_p > 0:
        raise ValueError(f"windowed_attention_triton has no dropout of attention weights, got dropout_p={dropout_p}")
    check_attention(q, k, v, key_start, key_end, activation, bias_table, q_place, k_place, gate)
    call = plan_attention(q, k, v, key_start, key_end, activation, scale, bias_center, max_keys)
    rows = [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, gate)]
    ranges = [None if t is None else t.contiguous() for t in (key_start, key_end, q_place, k_place)]
    table = None if bias_table is None else bias_table.contiguous()
    return _WindowedAttention.apply(*rows[:3], table, rows[3], *ranges, call)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, activation: str,
    bias_table: Tensor | None, q_place: Tensor | None, k_place: Tensor | None, gate: Tensor | None = None,
) -> None:  # fmt: skip
    """Raises ValueError where the kernels cannot compute what is asked; see `windowed_attention_triton`."""
    if activation not in ("softmax", "relu2"):
        raise ValueError(f"windowed_attention_triton takes activation 'softmax' or 'relu2', got {activation!r}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"windowed_attention_triton takes float32, float16 or bfloat16, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v), ("gate", gate)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if q.shape[1] != k.shape[1] or k.shape[0] != v.shape[0]:
        raise ValueError(f"q (M, Z), k (Mk, Z), v (Mk, V) do not fit: {[tuple(t.shape) for t in (q, k, v)]}")
    if q.shape[1] > 256:
        raise ValueError(f"windowed_attention_triton takes a query width up to 256, got {q.shape[1]}")
    if key_start.shape != q.shape[:1] or key_end.shape != q.shape[:1]:
        shapes = tuple(key_start.shape), tuple(key_end.shape)
        raise ValueError(f"key_start and key_end must be ({q.shape[0]},), one for each query, got {shapes}")
    if gate is not None and gate.shape != (q.shape[0], v.shape[1]):
        raise ValueError(f"gate must be {(q.shape[0], v.shape[1])}, got {tuple(gate.shape)}")
    if bias_table is None:
        return
    if bias_table.ndim != 1 or bias_table.numel() == 0:
        raise ValueError(f"bias_table must be (T,) with T > 0, got {tuple(bias_table.shape)}")
    if q_place is None or k_place is None or q_place.shape != q.shape[:1] or k_place.shape != k.shape[:1]:
        raise ValueError("bias_table needs q_place (M,) and k_place (Mk,)")
