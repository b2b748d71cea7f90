"""Triton kernels of the EMA scan (arXiv 2306.11197, section 3.1; damped EMA of Mega), forward and backward.

Letters: B batch, L length, D width, N states of a channel, C tokens of a chunk.

A sequence is cut into chunks that are scanned in parallel. With the gains divided out, a state obeys
z_t = q z_{t-1} + u_t and costs one multiply-add a token, its output y_t = sum_n c z_t (c = input gain x output gain)
a second one:

    1. every chunk's last z when it starts from zero                             chunk_state_kernel
    2. z at the entry of every chunk, a short scan over chunks                   carry_kernel
    3. outputs, from the entry states                                            output_kernel

The backward pass is the same in reverse for the adjoint a_t = q a_{t+1} + dy_t, again with the gain divided out
(adjoint_kernel, carry_adjoint_kernel, input_grad_kernel). Only x, the pre-activation and one state a chunk are
kept. Gradients of parameters are partial sums of programs, added up in a fixed order: nothing here uses atomics, so
that two runs over the same inputs agree bit for bit.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .triton_ema_kernels_seqboat import (
    adjoint_kernel,
    carry_adjoint_kernel,
    carry_kernel,
    chunk_state_kernel,
    input_grad_kernel,
    output_kernel,
    pack_kernel,
    parameter_grad_kernel,
)
from .triton_launch_seqboat import blocks_of, interpreted, on_device, power_of_two

try:
    import triton
except ImportError:
    triton = None

# (largest L, C): a chunk depends on the length alone, so that a row is computed alike whatever its batch mates.
# Longer chunks save traffic of chunk states, shorter ones fill the chip at batch 1.
_CHUNKS = ((2048, 64), (16384, 128), (65536, 256), (262144, 512), (1048576, 2048))
_LONGEST_CHUNK = 4096
# Channels and warps of a program.
_BLOCK_D = 64
_WARPS = 2
# Tokens loaded at a time: the fastest of 4, 8 and 16 on an H100 at B 4, L 8,192, D 616, N 16; and with pads, segment
# starts or a delayed input, which take registers of their own, what fits without spills.
_UNROLL = {"chunk_state": (16, 8), "output": (8, 8), "adjoint": (16, 8), "input_grad": (8, 4)}
_ACTIVATIONS = (None, "silu")


def _chunk_length(length: int) -> int:
    for longest, chunk in _CHUNKS:
        if length <= longest:
            return chunk
    return _LONGEST_CHUNK


class _EmaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, decay, input_gain, output_gain, skip, real, reset, state, delayed, delay_decay, reverse, silu):
        batch, length, width = x.shape
        states = decay.shape[1]
        chunk = _chunk_length(length)
        chunks = blocks_of(length, chunk)
        training = any(ctx.needs_input_grad)
        has_span = real is not None or reset is not None
        unroll = {name: counts[has_span or delayed is not None] for name, counts in _UNROLL.items()}
        common = {"D": width, "N": states, "BLOCK_D": _BLOCK_D, "BLOCK_N": power_of_two(states, 1), "UNROLL": 0}
        common |= {"REVERSE": reverse, "HAS_DELAY": delayed is not None}
        common |= {"HAS_REAL": real is not None, "HAS_RESET": reset is not None}
        has_skip, has_state = skip is not None, state is not None
        options = {"num_warps": _WARPS}
        key = (
            x.dtype,
            x.device.index,
            *common.values(),
            chunk.bit_length(),
            *unroll.values(),
            has_skip,
            has_state,
            silu,
        )
        grid = (blocks_of(width, _BLOCK_D), chunks, batch)
        size = states * width
        float32 = {"dtype": torch.float32, "device": x.device}
        # Where an input is missing, another pointer stands in for it and is not read.
        tokens = [x if tensor is None else tensor for tensor in (x, delayed, real, reset)]
        with on_device(x):
            pack = torch.empty(4 if delayed is None else 5, states, width, **float32)
            pack_kernel(
                (blocks_of(size, 256),), key, decay, input_gain, output_gain,
                decay if delay_decay is None else delay_decay, pack,
                D=width, N=states, BLOCK=256, HAS_DELAY=delayed is not None, options={"num_warps": 4},
            )  # fmt: skip
            local = entry = span = pack
            if chunks > 1 or training:
                local = torch.empty(batch, chunks, states, width, **float32)
                if has_span:
                    span = torch.empty(batch, chunks, dtype=torch.int32, device=x.device)
                chunk_state_kernel(
                    grid, key, *tokens, pack, local, span, length, chunk,
                    **common | {"UNROLL": unroll["chunk_state"]}, options=options,
                )  # fmt: skip
            if chunks > 1:
                entry = torch.empty_like(local)
                carry_kernel(
                    (blocks_of(size, 128), batch), key, pack, state if has_state else pack, local, span,
                    entry, chunk, chunks, D=width, N=states, BLOCK=128, UNROLL=16, BITS=chunk.bit_length(),
                    HAS_STATE=has_state, HAS_SPAN=has_span, options={"num_warps": 4},
                )  # fmt: skip
            out = torch.empty_like(x)
            save_y = silu and training
            y = torch.empty_like(x) if save_y else out
            final = torch.empty(batch, width, states, **float32)
            output_kernel(
                grid, (*key, chunks > 1, save_y), *tokens, pack, skip if has_skip else pack,
                state if has_state else pack, entry, y, out, final, length, chunk,
                **common | {"UNROLL": unroll["output"]}, HAS_SKIP=has_skip, HAS_STATE=has_state,
                HAS_ENTRY=chunks > 1, SILU=silu, SAVE_Y=save_y, options=options,
            )  # fmt: skip
        if training:
            ctx.save_for_backward(
                x, skip, state, delayed, real, reset, pack, local, span if has_span else None, y if silu else None
            )
            ctx.chunk, ctx.common, ctx.unroll, ctx.key, ctx.silu = chunk, common, unroll, key, silu
            ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, final_grad):
        x, skip, state, delayed, real, reset, pack, local, span, y = ctx.saved_tensors
        batch, length, width = x.shape
        chunk, common, unroll, silu = ctx.chunk, ctx.common, ctx.unroll, ctx.silu
        chunks, states = local.shape[1], local.shape[2]
        size = states * width
        rows = (1 if delayed is None else 2) * states + 1
        eager = span is not None or final_grad is not None
        key = (*ctx.key, final_grad is None)
        options = {"num_warps": _WARPS}
        grid = (blocks_of(width, common["BLOCK_D"]), chunks, batch)
        float32 = {"dtype": torch.float32, "device": x.device}
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        tokens = [x if tensor is None else tensor for tensor in (x, delayed, real, reset)]
        state_, y_ = pack if state is None else state, x if y is None else y
        with on_device(x):
            leaving, product, entry, arriving = torch.empty(4, *local.shape, **float32).unbind()
            adjoint_kernel(
                grid, key, *tokens, pack, y_, grad, leaving, product, length, chunk,
                **common | {"UNROLL": unroll["adjoint"]}, SILU=silu, EAGER=eager,
                options=options,
            )  # fmt: skip
            gain_grad = torch.empty(batch, 2, states, width, **float32)
            state_grad = torch.empty(batch, width, states, **float32)
            carry_adjoint_kernel(
                (blocks_of(size, 128), batch), key, pack, state_, local,
                pack if span is None else span, leaving, product,
                pack if final_grad is None else final_grad.contiguous(), entry, arriving, gain_grad, state_grad,
                length, chunk, chunks, D=width, N=states, BLOCK=128, UNROLL=8, BITS=chunk.bit_length(),
                HAS_STATE=state is not None, HAS_FINAL_GRAD=final_grad is not None, HAS_SPAN=span is not None,
                EAGER=eager, options={"num_warps": 4},
            )  # fmt: skip
            x_grad = torch.empty_like(x)
            delayed_grad = x_grad if delayed is None else torch.empty_like(delayed)
            parts = torch.empty(batch * chunks, rows, width, **float32)
            input_grad_kernel(
                grid, key, *tokens, pack, pack if skip is None else skip, y_, grad, entry, arriving,
                x_grad, delayed_grad, parts, length, chunk, **common | {"UNROLL": unroll["input_grad"]},
                HAS_SKIP=skip is not None, SILU=silu, EAGER=eager, options=options,
            )  # fmt: skip
            sums = torch.empty((2 * states + rows) * width, **float32)
            columns = max(2 * size, rows * width)
            parameter_grad_kernel(
                (blocks_of(columns, 32), 2), key, parts, gain_grad, sums, batch * chunks, batch,
                D=width, N=states, ROWS=rows, BLOCK_P=32, BLOCK=32, options={"num_warps": 4},
            )  # fmt: skip
        input_gain_grad, output_gain_grad, decay_grad = sums[: 3 * size].view(3, width, states)
        return (
            x_grad,
            decay_grad,
            input_gain_grad,
            output_gain_grad,
            None if skip is None else sums[-width:],
            None,
            None,
            None if state is None else state_grad,
            None if delayed is None else delayed_grad,
            None if delayed is None else sums[3 * size : 4 * size].view(width, states),
            None,
            None,
        )


@torch.compiler.disable
def _scan(*inputs):
    """A compiled model breaks its graph here: the compiler adds nothing to these kernels, and it knows no `Kernel`."""
    return _EmaScan.apply(*inputs)


def expect(
    name: str, tensor: torch.Tensor, shape: tuple, dtypes: tuple[torch.dtype, ...], like: torch.Tensor
) -> torch.Tensor:
    """The tensor, contiguous; a ValueError that names it where its shape, dtype or device is another one."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    return tensor.contiguous()


def expect_runnable(name: str, x: torch.Tensor) -> None:
    """A RuntimeError where kernels cannot run on x."""
    if triton is None:
        raise RuntimeError(f"{name} needs the triton package")
    if not x.is_cuda and not interpreted():
        raise RuntimeError(f"{name} needs a CUDA device, its input is on {x.device}")


def ema_scan_triton(
    x: torch.Tensor,
    decay: torch.Tensor,
    input_gain: torch.Tensor,
    output_gain: torch.Tensor,
    skip: torch.Tensor | None,
    *,
    real: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    delayed: torch.Tensor | None = None,
    delay_decay: torch.Tensor | None = None,
    reverse: bool = False,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-dimensional damped EMA as a recurrence (arXiv 2306.11197, section 3.1), on a CUDA device.

    At a real token: s_t = (0 if reset_t else decay s_{t-1}) + input_gain (x_t - delay_decay delayed_t) and
    y_t = sum_n output_gain s_t + skip x_t. At a pad the state stands still, x is ignored (it may hold NaN), y_t = 0.
    Arithmetic and state are float32 whatever the dtype of x. Results are the same bit for bit in every run.

    Args:
        x: (B, L, D), float32, bfloat16 or float16.
        decay, input_gain, output_gain: (D, N) float32: q, p beta and gamma / sqrt(N). 0 <= decay <= 1.
        skip: (D,) float32, omega; None for 0.
        real: (B, L) bool, False at pads; None if there are none.
        reset: (B, L) bool, True where a segment starts; read at real tokens only.
        state: (B, D, N) float32, the state before the first token; None for 0.
        delayed: (B, L, D) in the dtype of x, the input T real tokens earlier, for a kernel cut to T taps.
        delay_decay: (D, N) float32, decay ** T; goes with `delayed`.
        reverse: scan from the last column to the first; `reset` then marks the token at which the reversed scan
            starts anew, and the final state is the one after the first column.
        activation: None, or "silu" to return silu(y).

    Returns:
        y (B, L, D) in the dtype of x, final state (B, D, N) float32. Gradients reach every float input from both.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit, by name.
        RuntimeError: Triton is missing, or x is not on a CUDA device.
    """
    expect_runnable("ema_scan_triton", x)
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, L, D)")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {_ACTIVATIONS}")
    if (delayed is None) != (delay_decay is None):
        raise ValueError("delayed and delay_decay go together, one of them is None")
    batch, length, width = x.shape
    single, table = (torch.float32,), (width, decay.shape[-1])
    x = expect("x", x, (batch, length, width), (torch.float32, torch.bfloat16, torch.float16), x)
    decay = expect("decay", decay, table, single, x)
    input_gain = expect("input_gain", input_gain, table, single, x)
    output_gain = expect("output_gain", output_gain, table, single, x)
    if skip is not None:
        skip = expect("skip", skip, (width,), single, x)
    if real is not None:
        real = expect("real", real, (batch, length), (torch.bool,), x)
    if reset is not None:
        reset = expect("reset", reset, (batch, length), (torch.bool,), x)
    if state is not None:
        state = expect("state", state, (batch, width, table[1]), single, x)
    if delayed is not None:
        delayed = expect("delayed", delayed, (batch, length, width), (x.dtype,), x)
        delay_decay = expect("delay_decay", delay_decay, table, single, x)
    if x.numel() == 0:
        return x, x.new_zeros(batch, *table, dtype=torch.float32) if state is None else state
    silu = activation == "silu"
    return _scan(x, decay, input_gain, output_gain, skip, real, reset, state, delayed, delay_decay, reverse, silu)
