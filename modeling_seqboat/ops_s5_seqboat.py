"""S5 (arXiv 2208.04933): one complex diagonal recurrence of N states that all channels write to and read from.

Letters: B batch, L columns, D channels, N states of a layer, C chunk length, G chunks of a row.

Within a chunk the states are one matrix product a state, across chunks they are scanned. The specification, token by
token, is `s5_scan_naive`.
"""

import torch
from torch import Tensor

from .ops_diagonal_seqboat import complex_powers, complex_product, conjugate, recomputed, scan_borders, toeplitz
from .ops_layout_seqboat import ScanPlan, build_scan_plan, to_columns, to_slots
from .ops_ssm_seqboat import chunk_size_for


def s5_scan(
    x: Tensor,
    log_decay: Tensor,
    input_gain: Tensor,
    output_gain: Tensor,
    skip: Tensor | None,
    *,
    real: Tensor | None = None,
    reset: Tensor | None = None,
    state: Tensor | None = None,
    plan: ScanPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """s_t = exp(z)*s_{t-1} + G x_t, y_t = 2*Re(O s_t) + skip*x_t over real tokens.

    Args:
        x: (B, L, D), any float dtype; values at pads are not read.
        log_decay: z, (N, 2) float32, complex, the real part at most 0.
        input_gain: G, (N, D, 2); output_gain: O, (D, N, 2), float32, complex.
        skip: (D,) float32, or None for 0.
        real, reset, plan: as in `ema_scan`.
        state: (B, N, 2) float32 before column 0, or None for zeros.

    Returns:
        y (B, L, D) of x's dtype, and the state (B, N, 2) after the last column. Inside everything is float32 (float64
        when x is).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(x.shape[0], *log_decay.shape, dtype=dtype, device=x.device)
    state = state.to(dtype)
    if x.shape[1] == 1:
        return _step(x, log_decay, input_gain, output_gain, skip, real, reset, state)
    return _chunks(x, log_decay, input_gain, output_gain, skip, real, reset, state, plan)


def _write(tokens: Tensor, input_gain: Tensor) -> Tensor:
    """(..., D) real -> (..., N, 2)."""
    return torch.einsum("...d,ndp->...np", tokens, input_gain)


def _read(states: Tensor, output_gain: Tensor) -> Tensor:
    """(..., N, 2) -> (..., D): twice the real part."""
    return 2 * torch.einsum("...np,dnp->...d", states, conjugate(output_gain))


def _step(x, log_decay, input_gain, output_gain, skip, real, reset, state):
    """One column without chunks and without branches on values."""
    token = x[:, 0].to(state.dtype)
    if real is not None:
        token = token.masked_fill(~real, 0)
    before = state
    if reset is not None:
        starts = reset if real is None else reset & real
        before = before.masked_fill(starts[:, :, None], 0)
    decay = complex_powers(log_decay, log_decay.new_ones(1))[..., 0, :]
    after = complex_product(decay, before) + _write(token, input_gain)
    y = _read(after, output_gain)
    if skip is not None:
        y = y + skip.to(y.dtype) * token
    if real is not None:
        after = torch.where(real[:, :, None], after, state)
        y = y.masked_fill(~real, 0)
    return y.to(x.dtype)[:, None], after


@torch.compiler.disable
def _chunks(x, log_decay, input_gain, output_gain, skip, real, reset, state, plan):
    batch, length, width = x.shape
    if plan is None:
        plan = build_scan_plan(batch, length, chunk_size_for(length), x.device, real, reset)
    size, chunks = plan.chunk_size, plan.num_chunks
    count = log_decay.shape[0]

    def scan(slots, log_decay, input_gain, output_gain, skip, state):
        steps = torch.arange(size, device=slots.device, dtype=state.dtype)
        tokens = slots.to(state.dtype)
        # A complex product of matrices as a real one: real parts in the first C rows, imaginary parts in the last C.
        taps = [toeplitz(part) for part in complex_powers(log_decay, steps).unbind(-1)]
        matrix = torch.cat([torch.cat([taps[0], -taps[1]], dim=2), torch.cat([taps[1], taps[0]], dim=2)], dim=1)
        written = _write(tokens, input_gain).view(batch, chunks, size, count, 2)
        columns = written.permute(3, 4, 2, 1, 0).reshape(count, 2 * size, chunks * batch)
        inner = torch.bmm(matrix, columns).view(count, 2, size, chunks, batch).permute(3, 4, 2, 0, 1)
        whole = complex_powers(log_decay, steps[-1:] + 1)[:, 0]
        borders = scan_borders(torch.cat([state[None], inner[:, :, -1]]), whole, plan.first_chunk)
        carried = complex_product(complex_powers(log_decay, steps + 1).transpose(0, 1), borders[:-1, :, None])
        states = (inner + carried).transpose(0, 1).reshape(batch, chunks * size, count, 2)
        y = _read(states, output_gain)
        if skip is not None:
            y = y + skip.to(y.dtype) * tokens
        rows = torch.arange(batch, device=slots.device)
        last = states[rows, plan.last_chunk * size + (plan.last_length - 1).clamp_min(0)]
        final = torch.where((plan.last_length > 0)[:, None, None], last, borders[plan.last_chunk, rows])
        return y.to(slots.dtype), final

    y, final = recomputed(scan, to_slots(x, plan), log_decay, input_gain, output_gain, skip, state)
    return to_columns(y, plan, length, real), final
