"""Triton kernels of one decode step: the EMA for one token, and attention of one token over the memory.

Letters: B batch, D width, N states of a channel, W memory size, Z query/key width, V value width, S splits of the
memory.

Both work in place on the cache, wait for nothing on the host and have shapes that do not depend on the data, so that
a decode step can be captured in a CUDA graph. Rows that do not take part return at once.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .triton_launch_seqboat import contiguous, jit, kernel, power_of_two, tl

# (largest B, slots a program reads, V columns a block, programs that share the V blocks of a split, warps): few rows
# must be cut finely to reach every multiprocessor. Of many rows a program reads one wide block, all of whose loads are
# under way at once; a second one would not fit into registers.
_SPLITS = ((2, 32, 128, 16, 2), (8, 32, 256, 2, 4), (1 << 31, 32, 1024, 1 << 31, 4))
_BLOCK_BYTES = 2048
_COMBINE_V = 128
_COMBINE_SPLITS = 16
_STEP_D = 32


@kernel()
def _ema_step_kernel(
    x_ptr, decay_ptr, input_gain_ptr, output_gain_ptr, skip_ptr, state_ptr, real_ptr, reset_ptr, delayed_ptr,
    delay_decay_ptr, block_start_ptr, y_ptr,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_DELAY: tl.constexpr, HAS_BLOCK: tl.constexpr,
    SILU: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    inside = d < D
    if HAS_REAL:
        if tl.load(real_ptr + row) == 0:
            tl.store(y_ptr + row * D + d, tl.zeros((BLOCK_D,), y_ptr.dtype.element_ty), mask=inside)
            return
    table = d[:, None] * N + n[None, :]
    mask = inside[:, None] & (n < N)[None, :]
    x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    u = x[:, None]
    if HAS_DELAY:
        delayed = tl.load(delayed_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        u = u - tl.load(delay_decay_ptr + table, mask=mask, other=0.0) * delayed[:, None]
    state_ptr += row * (D * N) * (2 if HAS_BLOCK else 1) + table
    state = tl.load(state_ptr, mask=mask, other=0.0)
    gain = tl.load(input_gain_ptr + table, mask=mask, other=0.0)
    decay = tl.load(decay_ptr + table, mask=mask, other=0.0)
    anew = False
    if HAS_RESET:
        anew = tl.load(reset_ptr + row) != 0
    if HAS_BLOCK:
        block = tl.load(state_ptr + D * N, mask=mask, other=0.0)
        starts = tl.load(block_start_ptr + row) != 0
        state = tl.where(starts, block, state)
        block = decay * tl.where(starts | anew, 0.0, block) + gain * x[:, None]
        tl.store(state_ptr + D * N, block, mask=mask)
    if HAS_RESET:
        state = tl.where(anew, 0.0, state)
    state = decay * state + gain * u
    tl.store(state_ptr, state, mask=mask)
    y = tl.sum(tl.load(output_gain_ptr + table, mask=mask, other=0.0) * state, axis=1)
    if HAS_SKIP:
        y += tl.load(skip_ptr + d, mask=inside, other=0.0).to(tl.float32) * x
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _weight(score, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu2":
        score = tl.maximum(score, 0.0)
        weight = score * score
    else:  # laplace
        weight = 0.5 * (1.0 + tl.erf((score - 0.707107) / (0.282095 * 1.4142135623730951)))
    return weight


@jit
def _bias(table_ptr, offset, LENGTH: tl.constexpr):
    return tl.load(table_ptr + tl.minimum(tl.maximum(offset, 0), LENGTH - 1)).to(tl.float32)


@kernel("bias_center")
def _memory_partial_kernel(
    q_ptr, keys_ptr, values_ptr, positions_ptr, count_ptr, active_ptr, position_ptr, bias_ptr, pages_ptr,
    key_stride, value_stride, position_stride, top_ptr, total_ptr, part_ptr, before_ptr, scale, bias_center,
    W: tl.constexpr, Z: tl.constexpr, V: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_Z: tl.constexpr, HAS_PAGES: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr, BY_INDEX: tl.constexpr,
):
    """Weighted values of a split of the memory (B, S, V); for softmax its largest score and sum of weights (B, S).

    Leaves the counts for the next kernel, one program of which moves them on while others may not have begun.
    """
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    page = tl.load(pages_ptr + row) if HAS_PAGES else row
    active = tl.load(active_ptr + row)
    count = tl.load(count_ptr + row)
    valid = tl.minimum(count, W)
    if active == 0:
        return
    if split + group == 0:
        tl.store(before_ptr + row, count)
    if split * BLOCK_W >= valid:
        return
    w = split * BLOCK_W + tl.arange(0, BLOCK_W)
    filled = w < valid
    z = tl.arange(0, BLOCK_Z)
    v = group * BLOCK_V + tl.arange(0, BLOCK_V)
    BLOCKS: tl.constexpr = (V + BLOCK_V * GROUPS - 1) // (BLOCK_V * GROUPS)
    values_ptr += page * value_stride + w[:, None] * V + v[None, :]
    # Loads are issued well before their use: values before the scores, and each block before the work on the last one.
    keys = tl.load(
        keys_ptr + page * key_stride + w[:, None] * Z + z[None, :], mask=filled[:, None] & (z < Z)[None, :], other=0.0
    )
    q = tl.load(q_ptr + row * Z + z, mask=z < Z, other=0.0).to(tl.float32) * scale
    values = tl.load(values_ptr, mask=filled[:, None] & (v < V)[None, :], other=0.0)
    score = tl.sum(keys.to(tl.float32) * q[None, :], axis=1)
    if BIAS > 0:
        if BY_INDEX:
            offset = -1 - (count - 1 - w + W) % W  # of the newest activated token i < count with i % W == w
        else:
            place = tl.load(positions_ptr + page * position_stride + w, mask=filled, other=0)
            offset = place - tl.load(position_ptr + row)
        score += _bias(bias_ptr, bias_center + offset, BIAS)
    if ACTIVATION == "softmax":
        score = tl.where(filled, score, float("-inf"))
        top = tl.max(score, axis=0)
        weight = tl.exp(score - top)
        if group == 0:
            tl.store(top_ptr + row * S + split, top)
            tl.store(total_ptr + row * S + split, tl.sum(weight, axis=0))
    else:
        weight = tl.where(filled, _weight(score, ACTIVATION), 0.0)
    part_ptr += (row * S + split) * V + v
    for block in tl.static_range(BLOCKS):
        start = block * (BLOCK_V * GROUPS)
        following = values
        if block + 1 < BLOCKS:
            inside = start + BLOCK_V * GROUPS + v < V
            following = tl.load(
                values_ptr + start + BLOCK_V * GROUPS, mask=filled[:, None] & inside[None, :], other=0.0
            )
        part = tl.sum(weight[:, None] * values.to(tl.float32), axis=0)
        tl.store(part_ptr + start, part, mask=start + v < V)
        values = following


@kernel("bias_center")
def _memory_combine_kernel(
    q_ptr, k_new_ptr, v_new_ptr, keys_ptr, values_ptr, positions_ptr, count_ptr, active_ptr, position_ptr, bias_ptr,
    pages_ptr, key_stride, value_stride, position_stride, top_ptr, total_ptr, part_ptr, before_ptr, gate_ptr, out_ptr,
    scale, bias_center,
    W: tl.constexpr, Z: tl.constexpr, V: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_Z: tl.constexpr, HAS_PAGES: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, HAS_GATE: tl.constexpr,
):
    """Adds up the splits and the token itself, then writes the token into the ring and counts it.

    What stood there takes part in this very step, so the write waits for a launch of its own.
    """
    row = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = v < V
    if tl.load(active_ptr + row) == 0:
        tl.store(out_ptr + row * V + v, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), mask=inside)
        return
    page = tl.load(pages_ptr + row) if HAS_PAGES else row
    count = tl.load(before_ptr + row)
    used = (tl.minimum(count, W) + BLOCK_W - 1) // BLOCK_W
    z = tl.arange(0, BLOCK_Z)
    q = tl.load(q_ptr + row * Z + z, mask=z < Z, other=0.0).to(tl.float32) * scale
    key = tl.load(k_new_ptr + row * Z + z, mask=z < Z, other=0.0)
    own_score = tl.sum(q * key.to(tl.float32), axis=0)
    if BIAS > 0:
        own_score += _bias(bias_ptr, bias_center, BIAS)
    if ACTIVATION == "softmax":
        s = tl.arange(0, SPLITS)
        tops = tl.load(top_ptr + row * S + s, mask=s < used, other=float("-inf"))
        totals = tl.load(total_ptr + row * S + s, mask=s < used, other=0.0)
        top = tl.maximum(tl.max(tops, axis=0), own_score)
        own = tl.exp(own_score - top)
        total = tl.sum(totals * tl.exp(tops - top), axis=0) + own
    else:
        own = _weight(own_score, ACTIVATION)
    value = tl.load(v_new_ptr + row * V + v, mask=inside, other=0.0)
    out = own * value.to(tl.float32)
    for first in tl.static_range(0, SPLITS, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        part_offsets = (row * S + s)[:, None] * V + v[None, :]
        parts = tl.load(part_ptr + part_offsets, mask=(s < used)[:, None] & inside[None, :], other=0.0)
        if ACTIVATION == "softmax":
            tops = tl.load(top_ptr + row * S + s, mask=s < used, other=float("-inf"))
            parts = parts * tl.exp(tops - top)[:, None]
        out += tl.sum(parts, axis=0)
    if ACTIVATION == "softmax":
        out = out / total
    if HAS_GATE:
        # Of the rounded result, as torch multiplies.
        gate = tl.load(gate_ptr + row * V + v, mask=inside, other=0.0).to(tl.float32)
        out = out.to(out_ptr.dtype.element_ty).to(tl.float32) * gate
    tl.store(out_ptr + row * V + v, out.to(out_ptr.dtype.element_ty), mask=inside)
    oldest = count % W
    values_ptr += page * value_stride + oldest * V
    tl.store(values_ptr + v, value.to(values_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        keys_ptr += page * key_stride + oldest * Z
        tl.store(keys_ptr + z, key.to(keys_ptr.dtype.element_ty), mask=z < Z)
        tl.store(positions_ptr + page * position_stride + oldest, tl.load(position_ptr + row))
        tl.store(count_ptr + row, count + 1)


def _overwritten(*tensors: Tensor) -> None:
    """Tells autograd, which does not see what kernels write."""
    for tensor in tensors:
        if not tensor.is_inference() and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(tensor)


def ema_step_triton(
    x: Tensor, decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor | None, state: Tensor, *,
    real: Tensor | None = None, reset: Tensor | None = None, delayed: Tensor | None = None,
    delay_decay: Tensor | None = None, block_start: Tensor | None = None, activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`ema_step` in one launch, which overwrites `state`, contiguous float32, and returns it; x, skip, delayed:
    float32, bfloat16 or float16."""
    batch, _, width = x.shape
    states = decay.shape[-1]
    tables = contiguous(x, decay, input_gain, output_gain, skip)
    marks = contiguous(real, reset, delayed, delay_decay, block_start)
    y = torch.empty_like(tables[0])
    _ema_step_kernel(
        (-(-width // _STEP_D), batch), *tables, state, *marks, y,
        D=width, N=states, BLOCK_D=_STEP_D, BLOCK_N=power_of_two(states, 1), HAS_SKIP=skip is not None,
        HAS_REAL=real is not None, HAS_RESET=reset is not None, HAS_DELAY=delayed is not None,
        HAS_BLOCK=block_start is not None, SILU=activation == "silu",
    )
    _overwritten(state)
    return y, state


def memory_step_triton(
    q: Tensor, k_new: Tensor, v_new: Tensor, keys: Tensor, values: Tensor, positions: Tensor, activated_count: Tensor,
    active: Tensor, position: Tensor, activation: str, scale: float, bias_table: Tensor | None = None,
    bias_center: int = 0, bias_by_index: bool = False, rows: Tensor | None = None, pages: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`memory_step` in two launches. Floats are float32, bfloat16 or float16; keys, values, positions and
    activated_count are written in place, and each page of the first three is contiguous. Rows that are not active cost
    nothing and give 0, so `rows` is None here."""
    batch, (_, memory, qk_width), v_width = len(q), keys.shape, values.shape[-1]
    bias = 0 if bias_table is None else bias_table.numel()
    q, k_new, v_new, active, position = contiguous(q, k_new, v_new, active, position)
    bias_table, gate = contiguous(bias_table, gate)
    out = torch.empty_like(v_new)
    block_w, block_v, groups, warps = next(entry[1:] for entry in _SPLITS if batch <= entry[0])
    block_v = min(block_v, _BLOCK_BYTES // values.element_size(), power_of_two(v_width, 16))
    groups = min(groups, -(-v_width // block_v))
    splits = -(-memory // block_w)
    part = torch.empty(batch, splits, v_width, dtype=torch.float32, device=q.device)
    before = torch.empty_like(activated_count)
    top, total = torch.empty(2, batch, splits, dtype=torch.float32, device=q.device)
    shared = keys, values, positions, activated_count, active, position, bias_table, pages
    shared += keys.stride(0), values.stride(0), positions.stride(0)
    sizes = {"W": memory, "Z": qk_width, "V": v_width, "S": splits, "BIAS": bias, "ACTIVATION": activation}
    sizes |= {"BLOCK_W": block_w, "BLOCK_Z": power_of_two(qk_width, 1), "HAS_PAGES": pages is not None}
    _memory_partial_kernel(
        (splits, groups, batch), q, *shared, top, total, part, before, float(scale), bias_center,
        options={"num_warps": warps}, **sizes, BLOCK_V=block_v, GROUPS=groups, BY_INDEX=bias_by_index,
    )
    _memory_combine_kernel(
        (-(-v_width // _COMBINE_V), batch), q, k_new, v_new, *shared, top, total, part, before, gate, out,
        float(scale), bias_center, **sizes, BLOCK_V=_COMBINE_V,
        BLOCK_S=_COMBINE_SPLITS, SPLITS=power_of_two(splits, _COMBINE_SPLITS), HAS_GATE=gate is not None,
    )
    _overwritten(keys, values, positions, activated_count)
    return out


# For compilers. A copy of this file that came with a checkpoint registers its own.
memory_step_opaque = torch.library.custom_op(
    f"{re.sub(r'[^0-9a-zA-Z]', '_', __name__)}::memory_step", memory_step_triton,
    mutates_args=("keys", "values", "positions", "activated_count"),
)


@memory_step_opaque.register_fake
def _(q, k_new, v_new, *others, **options) -> Tensor:
    return torch.empty_like(v_new)


def memory_step_compiled(
    q: Tensor, k_new: Tensor, v_new: Tensor, keys: Tensor, values: Tensor, positions: Tensor, activated_count: Tensor,
    active: Tensor, position: Tensor, *, gate: Tensor | None = None, **options: Any,
) -> Tensor:
    """`memory_step_triton` in a compiled graph. Values and gate are slices of one tensor: made contiguous here, where
    the compiler sees it, they are written so, and not copied inside."""
    q, k_new, v_new, active, position, gate = contiguous(q, k_new, v_new, active, position, gate)
    memory = keys, values, positions, activated_count
    return memory_step_opaque(q, k_new, v_new, *memory, active, position, gate=gate, **options)
