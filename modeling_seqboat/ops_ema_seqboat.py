"""The multi-dimensional damped EMA (arXiv 2306.11197, section 3.1; Mega, arXiv 2209.10655, equation 4) as a scan, and
the chunked scan that it shares with other diagonal recurrences.

Letters: B batch, L columns, D channels, N states a channel, P parts of a number (1: real, 2: complex, the real part
first), C chunk length, G chunks of a row, S slots of a row (G * C), J inputs a chunk reads (C, or 2C with truncation).

One op serves training, chunked prefill and one-token decoding: the state comes in and goes out. Inside, rows are cut
into chunks; within a chunk the outputs are one small matrix product a channel, across chunks only the N states
travel. Cost and memory are linear in L. The specification, token by token, is `ema_scan_naive`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_seqboat import Facts, op
from .ops_layout_seqboat import ScanPlan, build_scan_plan, in_chunks, is_exporting, must_not_wait, to_columns, to_slots
from .triton_decode_seqboat import ema_step_triton
from .triton_ema_seqboat import ema_parameters_triton, ema_scan_triton
from .triton_launch_seqboat import first_derivative_only

# Products within a chunk grow with C, traffic of the states falls with it: 64 was the fastest of 32, 64 and 128 on a
# CPU at D 256, N 16, L 8,192.
CHUNK_SIZE = 64
# An exported graph that takes any length has a fixed number of steps, enough for two million tokens at once.
_MOST_EXPORTED_CHUNKS = 2**15
# log(q) of a decay that rounds to 0; exp of its multiples underflows to 0 without a NaN in the gradient.
SMALLEST_DECAY = 1e-30


def _is_ema(facts: Facts) -> bool:
    return facts.ssm_type == "ema"


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would run the float32 parts (EMA, router, scores) in half precision, backward too where that is called
    under it."""
    known = device.type in ("cpu", "cuda", "xpu", "mps")
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@op("ema_parameters", triton=ema_parameters_triton, used=_is_ema)
def ema_parameters(delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay q, input gain p*beta and output gain gamma/sqrt(N), float32 (float64 stays).

    Args:
        delta, alpha, beta: (D, N, 1).
        gamma: (D, N).

    Returns:
        Three (D, N) tensors: p = sigmoid(delta), q = 1 - p*sigmoid(alpha); s_t = q*s_{t-1} + p*beta*x_t and
        y_t = sum_n gamma_n/sqrt(N)*s_{t,n} + omega*x_t (Mega, equation 4).
    """
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    p = torch.sigmoid(delta[..., 0].to(dtype))
    decay = 1 - p * torch.sigmoid(alpha[..., 0].to(dtype))
    return decay, p * beta[..., 0].to(dtype), gamma.to(dtype) * gamma.shape[-1] ** -0.5


def ema_decayed(decay: Tensor, state: Tensor, tokens: Tensor) -> Tensor:
    """What is left of a state (B, D, N) after `tokens` (B,) int64 without inputs. decay: (D, N)."""
    # In float64: the logarithm is multiplied with a number of tokens.
    log_decay = decay.double().clamp_min(SMALLEST_DECAY).log()
    return (state * torch.exp(log_decay * tokens[:, None, None])).to(state.dtype)


def chunk_size_for(length: int) -> int:
    """The chunk length that `ema_scan` uses for rows of `length` columns: a power of two, at most 64."""
    # A length that an exported graph takes as it comes.
    if not isinstance(length, int):
        return CHUNK_SIZE
    return min(CHUNK_SIZE, 1 << max(0, length - 1).bit_length())


@op("ema_scan", triton=ema_scan_triton, used=_is_ema)
def ema_scan(
    x: Tensor, decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor | None, *,
    real: Tensor | None = None, reset: Tensor | None = None, state: Tensor | None = None,
    delayed: Tensor | None = None, delay_decay: Tensor | None = None, plan: ScanPlan | None = None,
    need_state: bool = True, reverse: bool = False, activation: str | None = None, relay: Any = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """EMA over real tokens: s_t = q*s_{t-1} + g*(x_t - r*x_{t-T}), y_t = sum_n o_n*s_{t,n} + skip*x_t.

    Args:
        x: (B, L, D), any float dtype; values at pads are not read.
        decay, input_gain, output_gain: q, g, o, each (D, N) float32.
        skip: omega, (D,) float32, or None for 0.
        real: (B, L) bool, False at pads, where the state stands still and y is 0; None when all columns are real.
        reset: (B, L) bool, True at real tokens whose segment starts there: the state is 0 before them; or None.
        state: (B, D, N) float32 before column 0, or None for zeros.
        delayed: (B, L, D), x_{t-T} (see `shift_real_tokens`), for a kernel cut to its first T taps; or None.
        delay_decay: r = q^T, (D, N) float32, with `delayed`.
        plan: the layout of `real` and `reset`, of the reversed row with `reverse`, when the caller has it already.
        need_state: whether the second result is wanted.
        reverse: scan from the last column to the first; `reset` then marks the token at which the reversed scan starts
            anew, and the final state is the one after the first column.
        activation: None, or "silu" to return silu(y).
        relay: for the kernel alone, see `ema_scan_triton`.

    Returns:
        y (B, L, D) of x's dtype, and the state (B, D, N) float32 after the last column, or None. Inside everything
        is float32 (float64 when x is).
    """
    if relay is not None:
        raise ValueError("a relay of states needs the Triton kernel: kernel_backend 'auto' or 'triton' on a GPU")
    if reverse:
        x, real, reset, delayed = (None if t is None else t.flip(1) for t in (x, real, reset, delayed))
    if x.shape[1] == 1:
        options = {"real": real, "reset": reset, "delayed": delayed, "delay_decay": delay_decay}
        y, state = ema_step(x, decay, input_gain, output_gain, skip, state, **options)
    else:
        log_decay = decay.clamp_min(SMALLEST_DECAY).log()[..., None]
        inputs = [(x, input_gain[..., None])]
        if delayed is not None:
            inputs.append((delayed, -(input_gain * delay_decay)[..., None]))
        before = None if state is None else state[..., None]
        y, state = chunked_scan(inputs, log_decay, output_gain[..., None], skip, real, reset, before, plan)
        state = state[..., 0] if need_state else None
    if reverse:
        y = y.flip(1)
    return (y if activation is None else F.silu(y)), state


@op("ema_step", triton=ema_step_triton, used=lambda facts: _is_ema(facts) and not facts.bidirectional)
def ema_step(
    x: Tensor, decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor | None, state: Tensor | None, *,
    real: Tensor | None = None, reset: Tensor | None = None, delayed: Tensor | None = None,
    delay_decay: Tensor | None = None, block_start: Tensor | None = None, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ema_scan` of one column without chunks and without branches on values: the recurrence as it is written.

    Args: those of `ema_scan` with L = 1, skip of any float dtype. The kernel overwrites the state.
        block_start: (B, 1) bool, with `delayed`, True where a multiple of T tokens stands before this one. The state
            is then (B, 2, D, N): that of the last T tokens, and beside it that of those since the last such place,
            which nothing was taken away from. Where the next block starts the two are the same, so the second becomes
            the first, and what rounding left behind in T steps is gone.
    """

    def after(before: Tensor, token: Tensor) -> Tensor:
        block, added = None, input_gain * token[:, :, None]
        if block_start is not None:
            before, block = before.unbind(1)
            before = torch.where(block_start[:, :, None], block, before)
            block = block.masked_fill(block_start[:, :, None], 0)
        state = decay * before + added
        if delayed is not None:
            state = state - input_gain * delay_decay * delayed[:, 0].to(token.dtype)[:, :, None]
        return state if block is None else torch.stack((state, decay * block + added), dim=1)

    def read(state: Tensor) -> Tensor:
        return (output_gain * (state if block_start is None else state[:, 0])).sum(-1)

    shape = decay.shape if block_start is None else (2, *decay.shape)
    y, state = one_step(x, shape, after, read, skip, real, reset, state)
    return (y if activation is None else F.silu(y)), state


def one_step(
    x: Tensor,
    state_shape: tuple[int, ...],
    after: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    skip: Tensor | None,
    real: Tensor | None,
    reset: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One column of a recurrence, without branches on values.

    Args:
        x: (B, 1, D); real, reset: (B, 1) bool or None; state: (B, *state_shape), or None for zeros.
        after: (state before, token (B, D)) -> the state after it; read: that state -> (B, D), to which skip * token is
            added.

    Returns:
        y (B, 1, D) of x's dtype, and the state, which stands still at a pad; float32 (float64 when x is).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    token = x[:, 0].to(dtype)
    state = token.new_zeros(x.shape[0], *state_shape) if state is None else state.to(dtype)
    marks = (-1, *[1] * len(state_shape))
    if real is not None:
        token = token.masked_fill(~real, 0)
    before = state
    if reset is not None:
        starts = reset if real is None else reset & real
        before = before.masked_fill(starts.view(marks), 0)
    following = after(before, token)
    y = read(following)
    if skip is not None:
        y = y + skip.to(dtype) * token
    if real is not None:
        following = torch.where(real.view(marks), following, state)
        y = y.masked_fill(~real, 0)
    return y.to(x.dtype)[:, None], following


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """(..., P) x (..., P) -> (..., P)."""
    if a.shape[-1] == 1:
        return a * b
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    imaginary = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return torch.stack([real, imaginary], dim=-1)


def conjugate(a: Tensor) -> Tensor:
    """(..., P) -> (..., P)."""
    return a if a.shape[-1] == 1 else torch.stack([a[..., 0], -a[..., 1]], dim=-1)


def complex_powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """exp(z * k) for z (..., P) and k (K,) -> (..., K, P). With a real part of z of at most 0 no power exceeds 1."""
    size = torch.exp(log_decay[..., :1] * exponents)
    if log_decay.shape[-1] == 1:
        return size[..., None]
    # A whole turn less changes nothing and keeps the products with k small, hence exact.
    angle = torch.remainder(log_decay[..., 1:], 2 * torch.pi) * exponents
    return torch.stack([size * angle.cos(), size * angle.sin()], dim=-1)


def readout(gain: Tensor) -> Tensor:
    """(..., P) gains -> (..., P) factors of a state's parts, whose products add up to the output: of a complex state,
    which stands for its conjugate too, twice the real part."""
    return gain if gain.shape[-1] == 1 else 2 * conjugate(gain)


def toeplitz(taps: Tensor) -> Tensor:
    """(D, C) taps -> (D, C, C) with entry [i, j] = taps[i - j] for j <= i, else 0."""
    size = taps.shape[-1]
    padded = F.pad(taps.flip(-1), (0, size - 1))  # taps[C-1] .. taps[0], 0, ..., 0
    # Row i starts at entry C-1-i, where taps[i] stands.
    return padded.unfold(-1, size, 1).flip(1)


def causal_product(matrix: Tensor, columns: Tensor, size: int) -> Tensor:
    """What the tokens of each chunk give the later ones: matrix @ columns, in which a NaN or an infinity reaches no
    token before it, though 0 * NaN is NaN.

    Args:
        matrix: (D, I, J), made of causal (C, C) blocks; the last row of the first has no zeros.
        columns: (D, J, K), a chunk in each of the K.
        size: C, of which I and J are multiples.

    Returns:
        (D, I, K). In a compiled or exported graph, and while a CUDA graph is captured, nothing can be looked up, and a
        NaN does reach its whole chunk.
    """
    product = torch.bmm(matrix, columns)
    # Each token enters the last row, so that this is NaN or infinite if any of them is.
    if must_not_wait(columns.device) or bool(product[:, size - 1].detach().sum().isfinite()):
        return product
    wrong = ~columns.isfinite()
    reached = wrong.unflatten(1, (-1, size)).any(1).cumsum(1) > 0
    finite = torch.bmm(matrix, columns.masked_fill(wrong, 0))
    return torch.where(reached.repeat(1, matrix.shape[1] // size, 1), product, finite)


def _scan_in_place(entries: Tensor, decay: Tensor, linked: Tensor | None) -> Tensor:
    """Solves e[g] = u[g] + (a*e[g-1] where g is linked to its predecessor) in log2(G) steps; overwrites `entries`."""
    offset = 1
    while offset < entries.shape[0]:
        carried = complex_product(entries[:-offset], decay)
        if linked is not None:
            carried = _where_linked(carried, linked[offset:])
            # Border g hears from g - 2k if it hears from g - k, and that one from g - 2k.
            linked = torch.cat([linked[:offset], linked[offset:] & linked[:-offset]])
        entries[offset:] += carried
        decay, offset = complex_product(decay, decay), offset * 2
    return entries


def _where_linked(borders: Tensor, linked: Tensor) -> Tensor:
    """borders (G, B, ..., P), 0 where linked (G, B) is False: a product would carry a NaN into the next segment."""
    return borders.masked_fill(~linked.view(*linked.shape, *[1] * (borders.dim() - 2)), 0)


class _BorderScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entries: Tensor, decay: Tensor, linked: Tensor | None) -> Tensor:
        borders = _scan_in_place(entries.clone(), decay, linked)
        ctx.save_for_backward(borders, decay, linked)
        return borders

    @first_derivative_only
    def backward(ctx, grad):
        borders, decay, linked = ctx.saved_tensors
        backward_links = None
        if linked is not None:
            backward_links = torch.cat([torch.zeros_like(linked[:1]), linked[1:].flip(0)])
        worth = _scan_in_place(grad.flip(0), conjugate(decay), backward_links).flip(0)
        read = worth[1:]
        if linked is not None:
            read = _where_linked(read, linked[1:])
        grad_decay = complex_product(read, conjugate(borders[:-1])).sum((0, 1))
        return worth, grad_decay, None


def scan_borders(entries: Tensor, decay: Tensor, first_chunk: Tensor | None) -> Tensor:
    """States at chunk borders: e[g] = u[g] + a*e[g-1], and 0 where a segment starts.

    Args:
        entries: u, (G + 1, B, ..., P), in u[0] the state before the row and in u[g] what chunk g - 1 adds.
        decay: a, (..., P), of a whole chunk.
        first_chunk: (B, G + 1) int64 as in `ScanPlan`, or None.

    Returns:
        (G + 1, B, ..., P).
    """
    linked = None
    if first_chunk is not None:
        linked = first_chunk.t() != torch.arange(entries.shape[0], device=entries.device)[:, None]
        entries = _where_linked(entries, linked)
    if is_exporting():
        return _scan_of_any_length(entries, decay)
    return _BorderScan.apply(entries, decay, linked)


def _scan_of_any_length(entries: Tensor, decay: Tensor) -> Tensor:
    """`_scan_in_place` of one segment in a number of steps that does not depend on G, for an exported graph."""
    count = entries.shape[0]
    borders = torch.arange(count, device=entries.device)
    most = count if isinstance(count, int) else _MOST_EXPORTED_CHUNKS
    for step in range((most - 1).bit_length()):
        carried = complex_product(entries.index_select(0, (borders - 2**step).clamp_min(0)), decay)
        linked = (borders >= 2**step).view(-1, *[1] * (entries.dim() - 1))
        entries = entries + torch.where(linked, carried, 0)
        decay = complex_product(decay, decay)
    return entries


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable, *tensors: Tensor | None):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        # Training has no use for the last state, and zeros would be taken all the way back.
        ctx.set_materialize_grads(False)
        with torch.no_grad():
            return function(*tensors)

    @first_derivative_only
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:]
        saved = zip(ctx.saved_tensors, needed, strict=True)
        leaves = [None if tensor is None else tensor.detach().requires_grad_(need) for tensor, need in saved]
        with torch.enable_grad(), without_autocast(leaves[0].device):
            outputs = ctx.function(*leaves)
            wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            pairs = zip(outputs, grads, strict=True)
            pairs = [(output, grad) for output, grad in pairs if output.requires_grad and grad is not None]
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def recomputed(function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """function(*tensors), of which only the tensors are kept for backward, where it runs again: its intermediate
    results are many times as large. Backward stays in float32 also where it is called under autocast."""
    return function(*tensors) if is_exporting() else _Recomputed.apply(function, *tensors)


# Not traced: torch 2.11 compiles the in-place border scan to wrong gradients.
@torch.compiler.disable
def chunked_scan(
    inputs: list[tuple[Tensor, Tensor]],
    log_decay: Tensor,
    output_gain: Tensor,
    skip: Tensor | None,
    real: Tensor | None,
    reset: Tensor | None,
    state: Tensor | None,
    plan: ScanPlan | None,
) -> tuple[Tensor, Tensor]:
    """s_t = exp(z)*s_{t-1} + (sum over inputs of g*x_t), y_t = Re(sum_n o_n*s_{t,n}) + skip*x_t, of real numbers or,
    then with twice that real part, of complex ones; x being the first input.

    Args:
        inputs: pairs of x, (B, L, D), and g, (D, N, P).
        log_decay: z, (D, N, P), its real part at most 0; output_gain: o, (D, N, P); skip: (D,), or None for 0.
        real, reset, plan: as in `ema_scan`.
        state: (B, D, N, P) before column 0, or None for zeros.

    Returns:
        y (B, L, D) of x's dtype, and the state (B, D, N, P) after the last column. Inside everything is float32
        (float64 when x is).
    """
    batch, length, width = inputs[0][0].shape
    device, states, parts = log_decay.device, *log_decay.shape[1:]
    if plan is None:
        plan = build_scan_plan(batch, length, chunk_size_for(length), device, real, reset)
    size, chunks = plan.chunk_size, plan.num_chunks
    dtype = torch.float64 if inputs[0][0].dtype == torch.float64 else torch.float32

    def scan(log_decay, output_gain, skip, state, *pairs):
        steps = torch.arange(size, device=device, dtype=dtype)
        powers = complex_powers(log_decay, steps)  # (D, N, C, P), a^0 .. a^(C-1)
        kernels, input_matrices, columns = [], [], []
        for slots, gain in zip(pairs[::2], pairs[1::2], strict=True):
            # What an input is worth in the state some steps later, and in the output then.
            later = complex_product(gain[:, :, None], powers)
            kernels.append(torch.einsum("dnp,dncp->dc", readout(output_gain), later))
            input_matrices.append(later.flip(2).permute(0, 1, 3, 2).reshape(width, -1, size))
            columns.append(in_chunks(slots, plan).permute(3, 2, 0, 1).to(dtype))
        if skip is not None:
            kernels[0] = torch.cat([kernels[0][:, :1] + skip[:, None], kernels[0][:, 1:]], dim=1)
        matrix = torch.cat([toeplitz(kernel) for kernel in kernels], dim=-1)  # (D, C, J)
        input_matrix = torch.cat(input_matrices, dim=-1)  # (D, N * P, J)
        # One matrix product a channel: (D, J, B * G).
        # Sizes and no -1: an exporter that does not know the length could not divide by it.
        columns = torch.cat(columns, dim=1).reshape(width, len(pairs) // 2 * size, batch * chunks)
        added = torch.bmm(input_matrix, columns).view(width, states, parts, batch, chunks).permute(4, 3, 0, 1, 2)
        whole = complex_powers(log_decay, steps[-1:] + 1)[..., 0, :]
        borders = scan_borders(torch.cat([state[None], added]), whole, plan.first_chunk)
        output_matrix = readout(complex_product(output_gain[:, :, None], complex_powers(log_decay, steps + 1)))
        output_matrix = output_matrix.permute(0, 2, 1, 3).reshape(width, size, -1)  # (D, C, N * P)
        read = borders[:-1].permute(2, 3, 4, 1, 0).reshape(width, states * parts, batch * chunks)
        y = torch.baddbmm(causal_product(matrix, columns, size), output_matrix, read)
        if y.requires_grad and not is_exporting():
            # It comes with channels last, which a CPU would copy matrix by matrix in each product it enters.
            y.register_hook(Tensor.contiguous)
        y = y.view(width, size, batch, chunks).permute(2, 3, 1, 0).reshape(batch, -1, width)
        # The last chunk may be partly filled: its tokens, moved to the chunk's end, enter with the same weights.
        entry = borders[plan.last_chunk, torch.arange(batch, device=device)]
        tail_decay = complex_powers(log_decay, plan.last_length.to(dtype)).permute(2, 0, 1, 3)
        index = (plan.last_chunk * size + plan.last_length - size)[:, None] + steps.long()
        filled = index >= plan.last_chunk[:, None] * size
        index = index.clamp_min(0)[:, :, None].expand(-1, -1, width)
        final = complex_product(tail_decay, entry)
        for slots, weights in zip(pairs[::2], input_matrices, strict=True):
            tail = slots.gather(1, index).to(dtype).masked_fill(~filled[:, :, None], 0)
            added = torch.bmm(weights, tail.permute(2, 1, 0).contiguous())  # (D, N * P, B)
            final = final + added.permute(2, 0, 1).view(batch, width, states, parts)
        # Steps may write it in place, by kernels that take it for contiguous.
        return y.to(pairs[0].dtype), final.contiguous()

    if state is None:
        state = log_decay.new_zeros(batch, *log_decay.shape)
    tables = (None if t is None else t.to(dtype) for t in (log_decay, output_gain, skip, state))
    pairs = (part for x, gain in inputs for part in (to_slots(x, plan), gain.to(dtype)))
    y, final = recomputed(scan, *tables, *pairs)
    return to_columns(y, plan, length, real), final
