"""The multi-dimensional damped EMA (arXiv 2306.11197, section 3.1; Mega, arXiv 2209.10655, equation 4) as a scan.

Letters: B batch, L columns, D channels, N states a channel, C chunk length, G chunks of a row, J inputs a chunk reads
(C, or 2C with truncation).

One op serves training, chunked prefill and one-token decoding: the state comes in and goes out. Inside, rows are cut
into chunks; within a chunk the outputs are one small matrix product a channel, across chunks only the N states
travel. Cost and memory are linear in L. The specification, token by token, is `ema_scan_naive`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_seqboat import Facts, op
from .ops_layout_seqboat import ScanPlan, build_scan_plan, to_columns, to_slots
from .triton_decode_seqboat import ema_step_triton
from .triton_ema_seqboat import ema_parameters_triton, ema_scan_triton
from .triton_launch_seqboat import first_derivative_only

# Products within a chunk grow with C, traffic of the states falls with it: 64 was the fastest of 32, 64 and 128 on a
# CPU at D 256, N 16, L 8,192.
CHUNK_SIZE = 64
# log(q) of a decay that rounds to 0; exp of its multiples underflows to 0 without a NaN in the gradient.
_SMALLEST_DECAY = 1e-30


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


def chunk_size_for(length: int) -> int:
    """The chunk length that `ema_scan` uses for rows of `length` columns: a power of two, at most 64."""
    return min(CHUNK_SIZE, 1 << max(0, length - 1).bit_length())


@op("ema_scan", triton=ema_scan_triton, used=_is_ema)
def ema_scan(
    x: Tensor,
    decay: Tensor,
    input_gain: Tensor,
    output_gain: Tensor,
    skip: Tensor | None,
    *,
    real: Tensor | None = None,
    reset: Tensor | None = None,
    state: Tensor | None = None,
    delayed: Tensor | None = None,
    delay_decay: Tensor | None = None,
    plan: ScanPlan | None = None,
    need_state: bool = True,
    reverse: bool = False,
    activation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
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

    Returns:
        y (B, L, D) of x's dtype, and the state (B, D, N) float32 after the last column, or None. Inside everything
        is float32 (float64 when x is).
    """
    if reverse:
        x, real, reset, delayed = (None if t is None else t.flip(1) for t in (x, real, reset, delayed))
    if x.shape[1] == 1:
        y, state = ema_step(x, decay, input_gain, output_gain, skip, state, real=real, reset=reset, delayed=delayed,
                            delay_decay=delay_decay)  # fmt: skip
    else:
        if plan is None:
            plan = build_scan_plan(x.shape[0], x.shape[1], chunk_size_for(x.shape[1]), x.device, real, reset)
        tables = decay, input_gain, output_gain, skip
        y, state = _ema_chunks(x, *tables, real, state, delayed, delay_decay, plan, need_state)
    if reverse:
        y = y.flip(1)
    return (y if activation is None else F.silu(y)), state


@torch.compiler.disable
def _ema_chunks(
    x: Tensor,
    decay: Tensor,
    input_gain: Tensor,
    output_gain: Tensor,
    skip: Tensor | None,
    real: Tensor | None,
    state: Tensor | None,
    delayed: Tensor | None,
    delay_decay: Tensor | None,
    plan: ScanPlan,
    need_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`ema_scan` of several columns, chunk by chunk.

    Not traced: torch 2.11 compiles the in-place border scan to wrong gradients.
    """
    _, length, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    size, chunks = plan.chunk_size, plan.num_chunks
    steps = torch.arange(size, device=x.device, dtype=dtype)
    log_decay = decay.to(dtype).clamp_min(_SMALLEST_DECAY).log()
    powers = torch.exp(log_decay[:, :, None] * steps)  # (D, N, C), q^0 .. q^(C-1)
    gains = input_gain.to(dtype)
    into_state = gains[:, :, None] * powers.flip(-1)  # (D, N, C): what input j leaves in the chunk's last state
    out_of_state = (output_gain[:, :, None] * powers * decay[:, :, None]).transpose(1, 2)  # (D, C, N)
    taps = torch.einsum("dn,dnc->dc", output_gain * gains, powers)  # (D, C)
    inputs = [to_slots(x, plan)]
    kernels, writers = [taps], [into_state]
    if skip is not None:
        kernels[0] = torch.cat([taps[:, :1] + skip.to(dtype)[:, None], taps[:, 1:]], dim=1)
    if delayed is not None:
        inputs.append(to_slots(delayed, plan))
        kernels.append(-torch.einsum("dn,dnc->dc", output_gain * gains * delay_decay, powers))
        writers.append(-into_state * delay_decay[:, :, None])
    chunk_decay = torch.exp(log_decay * size)
    outputs, entry = _ChunkScan.apply(
        torch.cat(inputs, dim=-1) if len(inputs) > 1 else inputs[0],
        torch.cat(kernels, dim=0) if len(kernels) > 1 else kernels[0],
        torch.cat(writers, dim=-1) if len(writers) > 1 else writers[0],
        out_of_state,
        chunk_decay,
        None if state is None else state.to(dtype),
        plan.first_chunk,
        plan.last_chunk,
        chunks,
    )
    y = to_columns(outputs, plan, length, real)
    if not need_state:
        return y, None
    # The last chunk may be partly filled: its tokens, moved to the chunk's end, enter with the same weights.
    final = torch.exp(log_decay * plan.last_length[:, None, None].to(dtype)) * entry
    index = plan.last_chunk[:, None] * size + plan.last_length[:, None] - size + torch.arange(size, device=x.device)
    filled = index >= plan.last_chunk[:, None] * size
    for source, writer in zip(inputs, writers, strict=True):
        tail = source.gather(1, index.clamp_min(0)[:, :, None].expand(-1, -1, width)).to(dtype)
        tail = tail.masked_fill(~filled[:, :, None], 0)
        final = final + torch.einsum("dnc,bcd->bdn", writer, tail)
    return y, final


@op("ema_step", triton=ema_step_triton, used=lambda facts: _is_ema(facts) and not facts.bidirectional)
def ema_step(
    x: Tensor,
    decay: Tensor,
    input_gain: Tensor,
    output_gain: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    *,
    real: Tensor | None = None,
    reset: Tensor | None = None,
    delayed: Tensor | None = None,
    delay_decay: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`ema_scan` of one column without chunks and without branches on values: the recurrence as it is written.

    Args: those of `ema_scan` with L = 1. The kernel overwrites the state.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    token = x[:, 0].to(dtype)
    if real is not None:
        token = token.masked_fill(~real, 0)
    if state is None:
        state = token.new_zeros(token.shape[0], *decay.shape)
    before = state.to(dtype)
    if reset is not None:
        starts = reset if real is None else reset & real
        before = before.masked_fill(starts[:, :, None], 0)
    after = decay * before + input_gain * token[:, :, None]
    if delayed is not None:
        after = after - input_gain * delay_decay * delayed[:, 0].to(dtype)[:, :, None]
    y = (output_gain * after).sum(-1)
    if skip is not None:
        y = y + skip.to(dtype) * token
    if real is not None:
        after = torch.where(real[:, :, None], after, state)
        y = y.masked_fill(~real, 0)
    y = y.to(x.dtype)[:, None]
    return (y if activation is None else F.silu(y)), after


def toeplitz(taps: Tensor) -> Tensor:
    """(D, C) taps -> (D, C, C) with entry [i, j] = taps[i - j] for j <= i, else 0."""
    size = taps.shape[-1]
    padded = F.pad(taps.flip(-1), (0, size - 1))  # taps[C-1] .. taps[0], 0, ..., 0
    # Row i starts at entry C-1-i, where taps[i] stands.
    return padded.unfold(-1, size, 1).flip(1)


def _diagonal_sums(matrix: Tensor) -> Tensor:
    """(D, C, C) -> (D, C): entry l is the sum over i - j = l. The transpose of `toeplitz`."""
    width, size, _ = matrix.shape
    skewed = F.pad(matrix.flip(-1), (0, size)).reshape(width, -1)[:, : size * (2 * size - 1)]
    # Reading the padded rows with a stride one shorter moves row i right by i, so diagonals become columns.
    return skewed.reshape(width, size, 2 * size - 1).sum(1)[:, size - 1 :]


def _scan_borders(entries: Tensor, chunk_decay: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """Solves e[g] = u[g] + q^C * e[g-1] over chunk borders in log2(G) steps (from the other end with `reverse`).

    Args:
        entries: u, (G + 1, B, D, N); overwritten.
        chunk_decay: q^C, (D, N).
        first: (G + 1, B) int64, the border where the segment of each border starts, -1 for none; or None.
    """
    count = entries.shape[0]
    factor, offset = chunk_decay, 1
    borders = torch.arange(count, device=entries.device)
    while offset < count:
        source = entries[offset:] if reverse else entries[:-offset]
        carried = source * factor
        if first is not None:
            # Border g hears from g - offset only if its segment did not start in between.
            linked = borders[offset:, None] - first[offset:].clamp_min(0) >= offset
            carried = carried * linked[:, :, None, None]
        target = entries[:-offset] if reverse else entries[offset:]
        target.add_(carried)
        factor, offset = factor * factor, offset * 2
    return entries


class _ChunkScan(torch.autograd.Function):
    """Chunked scan; saves its inputs only and recomputes the states in backward, so memory does not grow with N."""

    @staticmethod
    def forward(ctx, x, kernels, writer, reader, chunk_decay, state, first_chunk, last_chunk, chunks):
        """x (B, S, D) or (B, S, 2D) [the delayed input beside it] -> y (B, S, D), entry state of `last_chunk`."""
        first = None if first_chunk is None else first_chunk.t()
        matrix = _ChunkScan._matrix(kernels, chunk_decay.shape[0])
        columns = _ChunkScan._columns(x, chunk_decay.shape[0], chunks, matrix.dtype)
        borders = _ChunkScan._borders(columns, writer, chunk_decay, state, first, x.shape[0], chunks)
        y = torch.bmm(matrix, columns)
        read = borders[:-1].permute(2, 3, 0, 1).reshape(matrix.shape[0], -1, y.shape[-1])
        y.baddbmm_(reader, read)
        rows = torch.arange(x.shape[0], device=x.device)
        ctx.save_for_backward(x, kernels, writer, reader, chunk_decay, state, first_chunk, last_chunk)
        ctx.chunks = chunks
        return _ChunkScan._rows(y, x.shape[0], chunks).to(x.dtype), borders[last_chunk, rows]

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_y, grad_entry):
        with without_autocast(grad_y.device):
            return _ChunkScan._gradients(ctx, grad_y, grad_entry)

    @staticmethod
    def _gradients(ctx, grad_y, grad_entry):
        x, kernels, writer, reader, chunk_decay, state, first_chunk, last_chunk = ctx.saved_tensors
        chunks, batch = ctx.chunks, x.shape[0]
        width = chunk_decay.shape[0]
        first = None if first_chunk is None else first_chunk.t()
        matrix = _ChunkScan._matrix(kernels, width)
        columns = _ChunkScan._columns(x, width, chunks, matrix.dtype)
        borders = _ChunkScan._borders(columns, writer, chunk_decay, state, first, batch, chunks)
        grad_out = _ChunkScan._columns(grad_y, width, chunks, matrix.dtype)
        # Adjoint of the border recurrence: what each border's state is worth.
        worth = torch.zeros_like(borders)
        worth[:-1] = torch.bmm(reader.transpose(1, 2), grad_out).view(width, -1, chunks, batch).permute(2, 3, 0, 1)
        rows = torch.arange(batch, device=x.device)
        worth[last_chunk, rows] += grad_entry
        if first is not None:
            starts = first == torch.arange(chunks + 1, device=x.device)[:, None]
            worth = _ChunkScan._adjoint_with_starts(worth, chunk_decay, starts)
        else:
            worth = _scan_borders(worth, chunk_decay, None, reverse=True)
        if first is not None:
            # Nothing flows into the border at which a segment starts.
            worth = worth.masked_fill(starts[:, :, None, None], 0)
        grad_decay = (worth[1:] * borders[:-1]).sum((0, 1)) if ctx.needs_input_grad[4] else None
        grad_state = worth[0] if state is not None and ctx.needs_input_grad[5] else None
        grad_sum = worth[1:].permute(2, 3, 0, 1).reshape(width, -1, chunks * batch)
        grad_columns = torch.bmm(matrix.transpose(1, 2), grad_out)
        grad_columns.baddbmm_(writer.transpose(1, 2), grad_sum)
        grad_matrix = torch.bmm(grad_out, columns.transpose(1, 2))
        grad_kernels = torch.cat([_diagonal_sums(part) for part in grad_matrix.split(matrix.shape[1], dim=-1)])
        grad_writer = torch.bmm(grad_sum, columns.transpose(1, 2))
        read = borders[:-1].permute(2, 3, 0, 1).reshape(width, -1, chunks * batch)
        grad_reader = torch.bmm(grad_out, read.transpose(1, 2))
        parts = grad_columns.split(matrix.shape[1], dim=1)
        grad_x = torch.cat([_ChunkScan._rows(part, batch, chunks) for part in parts], dim=-1).to(x.dtype)
        return grad_x, grad_kernels, grad_writer, grad_reader, grad_decay, grad_state, None, None, None

    @staticmethod
    def _matrix(kernels: Tensor, width: int) -> Tensor:
        """(D or 2D, C) taps -> (D, C, J)."""
        return torch.cat([toeplitz(part) for part in kernels.split(width)], dim=-1)

    @staticmethod
    def _columns(x: Tensor, width: int, chunks: int, dtype: torch.dtype) -> Tensor:
        """(B, S, D or 2D) -> (D, J, G*B), the layout in which every product is one matrix product a channel."""
        batch, slots, _ = x.shape
        parts = x.view(batch, chunks, slots // chunks, -1, width)
        columns = parts.permute(4, 3, 2, 1, 0).to(dtype)
        return columns.reshape(width, -1, chunks * batch)

    @staticmethod
    def _rows(y: Tensor, batch: int, chunks: int) -> Tensor:
        """(D, C, G*B) -> (B, S, D)."""
        width, size, _ = y.shape
        return y.view(width, size, chunks, batch).permute(3, 2, 1, 0).reshape(batch, chunks * size, width)

    @staticmethod
    def _borders(
        columns: Tensor,
        writer: Tensor,
        chunk_decay: Tensor,
        state: Tensor | None,
        first: Tensor | None,
        batch: int,
        chunks: int,
    ) -> Tensor:
        """States at chunk borders, (G + 1, B, D, N): border g is what chunk g starts from, 0 where a segment does."""
        width, states = chunk_decay.shape
        entries = columns.new_zeros(chunks + 1, batch, width, states)
        if state is not None:
            entries[0] = state
        entries[1:] = torch.bmm(writer, columns).view(width, states, chunks, batch).permute(2, 3, 0, 1)
        if first is not None:
            starts = first == torch.arange(chunks + 1, device=columns.device)[:, None]
            entries.masked_fill_(starts[:, :, None, None], 0)
        return _scan_borders(entries, chunk_decay, first, reverse=False)

    @staticmethod
    def _adjoint_with_starts(worth: Tensor, chunk_decay: Tensor, starts: Tensor) -> Tensor:
        """The adjoint recurrence w[g] += q^C * w[g+1] unless a segment starts at g + 1."""
        count = worth.shape[0]
        borders = torch.arange(count, device=worth.device)[:, None]
        # Next start strictly after each border; beyond the end when there is none.
        following = torch.where(starts, borders, count).flip(0).cummin(0).values.flip(0)
        following = torch.cat([following[1:], torch.full_like(following[:1], count)])
        factor, offset = chunk_decay, 1
        while offset < count:
            linked = following[:-offset] - borders[:-offset] > offset
            worth[:-offset] += worth[offset:] * factor * linked[:, :, None, None]
            factor, offset = factor * factor, offset * 2
        return worth
