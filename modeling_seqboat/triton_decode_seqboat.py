"""Triton kernels of one decode step: the EMA for one token, and attention of one token over the memory.

Letters: B batch, D width, N states of a channel, W memory size, Z query/key width, V value width, S splits of the
memory.

Both work in place on the cache, wait for nothing on the host and have shapes that do not depend on the data, so that
a decode step can be captured in a CUDA graph. Rows that do not take part return at once.
"""

from __future__ import annotations

import re

import torch

from .triton_ema_seqboat import expect, expect_runnable
from .triton_launch_seqboat import Kernel, alignment, blocks_of, jit, kernel, on_device, power_of_two

try:
    import triton.language as tl
except ImportError:
    tl = None

# (largest B, slots a program reads, V columns a block, programs that share the V blocks of a split, warps): few rows
# must be cut finely to reach every multiprocessor, many rows are better off with the scores computed once.
_SPLITS = ((2, 32, 128, 16, 2), (8, 32, 256, 2, 4), (1 << 31, 64, 256, 1, 4))
_COMBINE_V = 128
_COMBINE_SPLITS = 16
_STEP_D = 32
_ATTENTION = ("softmax", "relu2", "laplace")
_ACTIVATIONS = (None, "silu")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@kernel()
def _ema_step_kernel(
    x_ptr, decay_ptr, input_gain_ptr, output_gain_ptr, skip_ptr, state_ptr, real_ptr, reset_ptr, delayed_ptr,
    delay_decay_ptr, y_ptr,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_REAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_DELAY: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
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
    state = tl.load(state_ptr + row * (D * N) + table, mask=mask, other=0.0)
    if HAS_RESET:
        state = tl.where(tl.load(reset_ptr + row) != 0, 0.0, state)
    gain = tl.load(input_gain_ptr + table, mask=mask, other=0.0)
    state = tl.load(decay_ptr + table, mask=mask, other=0.0) * state + gain * u
    tl.store(state_ptr + row * (D * N) + table, state, mask=mask)
    y = tl.sum(tl.load(output_gain_ptr + table, mask=mask, other=0.0) * state, axis=1)
    if HAS_SKIP:
        y += tl.load(skip_ptr + d, mask=inside, other=0.0) * x
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
    q_ptr, keys_ptr, values_ptr, positions_ptr, count_ptr, active_ptr, place_ptr, bias_ptr, top_ptr, total_ptr,
    part_ptr, scale, bias_center,
    W: tl.constexpr, Z: tl.constexpr, V: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_V: tl.constexpr, GROUPS: tl.constexpr, BY_INDEX: tl.constexpr,
):  # fmt: skip
    """Weighted values of a split of the memory (B, S, V); for softmax its largest score and sum of weights (B, S)."""
    split, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    active = tl.load(active_ptr + row)
    count = tl.load(count_ptr + row)
    valid = tl.minimum(count, W)
    if active == 0:
        return
    if split * BLOCK_W >= valid:
        return
    w = split * BLOCK_W + tl.arange(0, BLOCK_W)
    filled = w < valid
    z = tl.arange(0, BLOCK_Z)
    v = group * BLOCK_V + tl.arange(0, BLOCK_V)
    BLOCKS: tl.constexpr = (V + BLOCK_V * GROUPS - 1) // (BLOCK_V * GROUPS)
    values_ptr += row * (W * V) + w[:, None] * V + v[None, :]
    # Loads are issued well before their use: values before the scores, and each block before the work on the last one.
    keys = tl.load(
        keys_ptr + row * (W * Z) + w[:, None] * Z + z[None, :], mask=filled[:, None] & (z < Z)[None, :], other=0.0
    )
    q = tl.load(q_ptr + row * Z + z, mask=z < Z, other=0.0).to(tl.float32) * scale
    values = tl.load(values_ptr, mask=filled[:, None] & (v < V)[None, :], other=0.0)
    score = tl.sum(keys.to(tl.float32) * q[None, :], axis=1)
    if BIAS > 0:
        if BY_INDEX:
            place = count - 1 - (count - 1 - w + W) % W  # the newest activated token i < count with i % W == w
        else:
            place = tl.load(positions_ptr + row * W + w, mask=filled, other=0)
        score += _bias(bias_ptr, bias_center + place - tl.load(place_ptr + row), BIAS)
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
    q_ptr, k_new_ptr, v_new_ptr, keys_ptr, values_ptr, positions_ptr, count_ptr, active_ptr, place_ptr, position_ptr,
    bias_ptr, top_ptr, total_ptr, part_ptr, out_ptr, scale, bias_center,
    W: tl.constexpr, Z: tl.constexpr, V: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up the splits and the token itself, then writes the token into its slot.

    The slot's old content takes part in this very step, so the write waits for a launch of its own.
    """
    row = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = v < V
    if tl.load(active_ptr + row) == 0:
        tl.store(out_ptr + row * V + v, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), mask=inside)
        return
    count = tl.load(count_ptr + row)
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
    tl.store(out_ptr + row * V + v, out.to(out_ptr.dtype.element_ty), mask=inside)
    slot = row * W + count % W
    tl.store(values_ptr + slot * V + v, value.to(values_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(keys_ptr + slot * Z + z, key.to(keys_ptr.dtype.element_ty), mask=z < Z)
        tl.store(positions_ptr + slot, tl.load(position_ptr + row))


def _launch(kernel: Kernel, grid: tuple[int, ...], key: tuple, *args, options: dict[str, int], **constants) -> None:
    if torch.compiler.is_compiling():  # the compiler takes Triton functions as they are, and finds variants itself
        kernel.function[grid](*args, **constants, **options)
    else:
        key += alignment(*(arg for arg in args if isinstance(arg, torch.Tensor)))
        kernel(grid, key, *args, options=options, **constants)


def _overwritten(*tensors: torch.Tensor) -> None:
    """Tells autograd, which does not see what kernels write."""
    for tensor in tensors:
        if not tensor.is_inference() and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(tensor)


def _expect_no_gradient(name: str, *inputs: torch.Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise RuntimeError(f"{name} works in place and has no gradient; call it under torch.no_grad()")


def _expect_in_place(name: str, tensor: torch.Tensor, shape: tuple, dtypes: tuple, like: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is written in place and must be contiguous, its strides are {tensor.stride()}")
    return expect(name, tensor, shape, dtypes, like)


def ema_step(
    x: torch.Tensor,
    decay: torch.Tensor,
    input_gain: torch.Tensor,
    output_gain: torch.Tensor,
    skip: torch.Tensor | None,
    state: torch.Tensor,
    *,
    real: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    delayed: torch.Tensor | None = None,
    delay_decay: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """One token of the damped EMA (arXiv 2306.11197, section 3.1), in one launch; `state` is updated in place.

    Args:
        x: (B, D), float32, bfloat16 or float16.
        decay, input_gain, output_gain: (D, N) float32: q, p beta and gamma / sqrt(N).
        skip: (D,) float32, omega; None for 0.
        state: (B, D, N) float32, contiguous; overwritten with the state after the token.
        real: (B,) bool, False where the token is a pad: state untouched, y 0.
        reset: (B,) bool, True where the token starts a segment.
        delayed: (B, D) in the dtype of x and delay_decay: (D, N) float32, for a kernel cut to T taps.
        activation: None, or "silu" to return silu(y).

    Returns:
        y (B, D) in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit, by name.
        RuntimeError: Triton is missing, x is not on a CUDA device, or a gradient would be needed.
    """
    expect_runnable("ema_step", x)
    _expect_no_gradient("ema_step", x, decay, input_gain, output_gain, skip, state, delayed, delay_decay)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, D)")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {_ACTIVATIONS}")
    if (delayed is None) != (delay_decay is None):
        raise ValueError("delayed and delay_decay go together, one of them is None")
    batch, width = x.shape
    single, table = (torch.float32,), (width, decay.shape[-1])
    x = expect("x", x, (batch, width), _FLOATS, x)
    decay = expect("decay", decay, table, single, x)
    input_gain = expect("input_gain", input_gain, table, single, x)
    output_gain = expect("output_gain", output_gain, table, single, x)
    state = _expect_in_place("state", state, (batch, *table), single, x)
    skip_ = x if skip is None else expect("skip", skip, (width,), single, x)
    real_ = x if real is None else expect("real", real, (batch,), (torch.bool,), x)
    reset_ = x if reset is None else expect("reset", reset, (batch,), (torch.bool,), x)
    delayed_ = x if delayed is None else expect("delayed", delayed, (batch, width), (x.dtype,), x)
    delay_decay_ = x if delay_decay is None else expect("delay_decay", delay_decay, table, single, x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    inputs = (x, decay, input_gain, output_gain, skip_, state, real_, reset_, delayed_, delay_decay_, y)
    constants = {"D": width, "N": table[1], "BLOCK_D": _STEP_D, "BLOCK_N": power_of_two(table[1], 1)}
    constants |= {"HAS_SKIP": skip is not None, "HAS_REAL": real is not None, "HAS_RESET": reset is not None}
    constants |= {"HAS_DELAY": delayed is not None, "SILU": activation == "silu"}
    key = (x.dtype, x.device.index, *constants.values())
    with on_device(x):
        _launch(
            _ema_step_kernel, (blocks_of(width, _STEP_D), batch), key, *inputs, **constants, options={"num_warps": 4}
        )
    _overwritten(state)
    return y


def memory_attention_step(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    activated_count: torch.Tensor,
    active: torch.Tensor,
    place_q: torch.Tensor,
    *,
    activation: str,
    scale: float,
    bias_table: torch.Tensor | None = None,
    bias_center: int = 0,
    bias_by_index: bool = False,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one activated token a row over its memory and itself (arXiv 2306.11197, section 3.3); two launches.

    The memory is a ring: activated token i of a row (0, 1, ...) lives in slot i % W, so that slots below
    min(activated_count, W) hold the last W activated tokens. The token attends to all of them and to itself, W + 1
    keys; then its key, value and position replace the oldest slot, activated_count % W, in place. The caller
    increments activated_count. A row that is not active keeps its memory and its output is 0.

    Args:
        q, k_new: (B, Z); v_new: (B, V); float32, bfloat16 or float16, rotary already applied.
        keys: (B, W, Z), values: (B, W, V), floats of any of these dtypes, contiguous, written in place.
        positions: (B, W) int64, contiguous, written in place.
        activated_count: (B,) int64, tokens activated so far.
        active: (B,) bool.
        place_q: (B,) int64, the place of the new token: its position, or with `bias_by_index` its activated index.
        activation: "softmax", "relu2" or "laplace".
        scale: factor of q, 1 / sqrt(Z) or 1 / W.
        bias_table: (n,) added to scores at entry clamp(bias_center + place_k - place_q, 0, n - 1); None for none.
        bias_by_index: places of keys are activated indices instead of stored positions.
        position: (B,) int64, stored as the new token's position; place_q where it is None.

    Returns:
        (B, V) in the dtype of v_new.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit, by name.
        RuntimeError: Triton is missing, q is not on a CUDA device, or a gradient would be needed.
    """
    expect_runnable("memory_attention_step", q)
    _expect_no_gradient("memory_attention_step", q, k_new, v_new, keys, values, bias_table)
    if activation not in _ATTENTION:
        raise ValueError(f"activation {activation!r} is none of {_ATTENTION}")
    if keys.dim() != 3 or values.dim() != 3:
        shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
        raise ValueError(f"keys and values have shapes {shapes}, expected (B, W, Z) and (B, W, V)")
    batch, memory, qk_width = keys.shape
    v_width = values.shape[-1]
    integers, row = (torch.int64,), (batch,)
    q = expect("q", q, (batch, qk_width), _FLOATS, q)
    k_new = expect("k_new", k_new, (batch, qk_width), _FLOATS, q)
    v_new = expect("v_new", v_new, (batch, v_width), _FLOATS, q)
    keys = _expect_in_place("keys", keys, (batch, memory, qk_width), _FLOATS, q)
    values = _expect_in_place("values", values, (batch, memory, v_width), _FLOATS, q)
    positions = _expect_in_place("positions", positions, (batch, memory), integers, q)
    activated_count = expect("activated_count", activated_count, row, integers, q)
    active = expect("active", active, row, (torch.bool,), q)
    place_q = expect("place_q", place_q, row, integers, q)
    position = place_q if position is None else expect("position", position, row, integers, q)
    bias = 0
    if bias_table is not None:
        bias = bias_table.numel()
        bias_table = expect("bias_table", bias_table, (bias,), _FLOATS, q)
    out = torch.empty_like(v_new)
    if batch == 0:
        return out
    block_w, block_v, groups, warps = next(entry[1:] for entry in _SPLITS if batch <= entry[0])
    groups = min(groups, blocks_of(v_width, block_v))
    splits = blocks_of(memory, block_w)
    part = torch.empty(batch, splits, v_width, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, batch, splits, dtype=torch.float32, device=q.device)
    bias_ = q if bias_table is None else bias_table
    cache = (keys, values, positions, activated_count, active, place_q)
    sizes = {"W": memory, "Z": qk_width, "V": v_width, "S": splits, "BIAS": bias, "ACTIVATION": activation}
    sizes |= {"BLOCK_W": block_w, "BLOCK_Z": power_of_two(qk_width, 1)}
    split = {"BLOCK_V": block_v, "GROUPS": groups, "BY_INDEX": bias_by_index}
    combine = {"BLOCK_V": _COMBINE_V, "BLOCK_S": _COMBINE_SPLITS, "SPLITS": power_of_two(splits, _COMBINE_SPLITS)}
    dtypes = (tensor.dtype for tensor in (q, k_new, v_new, keys, values, bias_))
    key = (*dtypes, q.device.index, *sizes.values(), *split.values(), warps)
    options = {"num_warps": warps}
    with on_device(q):
        _launch(
            _memory_partial_kernel, (splits, groups, batch), key, q, *cache, bias_, top, total, part,
            float(scale), bias_center, **sizes, **split, options=options,
        )  # fmt: skip
        _launch(
            _memory_combine_kernel, (blocks_of(v_width, _COMBINE_V), batch), key, q, k_new, v_new, *cache, position,
            bias_, top, total, part, out, float(scale), bias_center, **sizes, **combine, options={"num_warps": 4},
        )  # fmt: skip
    _overwritten(keys, values, positions)
    return out


_SCHEMA = (
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
    "Tensor activated_count, Tensor active, Tensor place_q, str activation, float scale, Tensor? bias_table, "
    "int bias_center, bool bias_by_index, Tensor? position) -> Tensor"
)


def _memory_attention(
    q, k_new, v_new, keys, values, positions, activated_count, active, place_q, activation, scale, bias_table,
    bias_center, bias_by_index, position,
) -> torch.Tensor:  # fmt: skip
    return memory_attention_step(
        q, k_new, v_new, keys, values, positions, activated_count, active, place_q, activation=activation, scale=scale,
        bias_table=bias_table, bias_center=bias_center, bias_by_index=bias_by_index, position=position,
    )  # fmt: skip


# For compilers, which take it as it is. A copy of this file that came with a checkpoint registers its own.
memory_attention_op = torch.library.custom_op(
    f"{re.sub(r'[^0-9a-zA-Z]', '_', __name__)}::memory_attention_step",
    _memory_attention,
    mutates_args=("keys", "values", "positions"),
    schema=_SCHEMA,
)


@memory_attention_op.register_fake
def _(q, k_new, v_new, *others) -> torch.Tensor:
    return torch.empty_like(v_new)
