"""S4D (arXiv 2206.11893): every channel has N complex states of its own, discretised with a zero-order hold.

Letters: B batch, L columns, D channels, N states a channel, C chunk length, G chunks of a row.

Scanned as the EMA is: within a chunk the outputs are one matrix product a channel, across chunks only the states travel.
The specification, token by token, is `s4d_scan_naive`.
"""

import torch
from torch import Tensor

from .ops_diagonal_seqboat import complex_powers, complex_product, conjugate, recomputed, scan_borders, toeplitz
from .ops_layout_seqboat import ScanPlan, build_scan_plan, to_columns, to_slots
from .ops_ssm_seqboat import chunk_size_for


def s4d_scan(
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
    """s_t = exp(z)*s_{t-1} + g*x_t, y_t = 2*Re(sum_n o_n*s_{t,n}) + skip*x_t over real tokens.

    Args:
        x: (B, L, D), any float dtype; values at pads are not read.
        log_decay, input_gain, output_gain: z, g, o, each (D, N, 2) float32, complex; the real part of z at most 0.
        skip: (D,) float32, or None for 0.
        real, reset, plan: as in `ema_scan`.
        state: (B, D, N, 2) float32 before column 0, or None for zeros.

    Returns:
        y (B, L, D) of x's dtype, and the state (B, D, N, 2) after the last column. Inside everything is float32
        (float64 when x is).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(x.shape[0], *log_decay.shape, dtype=dtype, device=x.device)
    state = state.to(dtype)
    if x.shape[1] == 1:
        return _step(x, log_decay, input_gain, output_gain, skip, real, reset, state)
    return _chunks(x, log_decay, input_gain, output_gain, skip, real, reset, state, plan)


def _step(x, log_decay, input_gain, output_gain, skip, real, reset, state):
    """One column without chunks and without branches on values."""
    token = x[:, 0].to(state.dtype)
    if real is not None:
        token = token.masked_fill(~real, 0)
    before = state
    if reset is not None:
        starts = reset if real is None else reset & real
        before = before.masked_fill(starts[:, :, None, None], 0)
    decay = complex_powers(log_decay, log_decay.new_ones(1))[..., 0, :]
    after = complex_product(decay, before) + input_gain * token[:, :, None, None]
    y = 2 * (output_gain[..., 0] * after[..., 0] - output_gain[..., 1] * after[..., 1]).sum(-1)
    if skip is not None:
        y = y + skip.to(y.dtype) * token
    if real is not None:
        after = torch.where(real[:, :, None, None], after, state)
        y = y.masked_fill(~real, 0)
    return y.to(x.dtype)[:, None], after


@torch.compiler.disable
def _chunks(x, log_decay, input_gain, output_gain, skip, real, reset, state, plan):
    batch, length, width = x.shape
    if plan is None:
        plan = build_scan_plan(batch, length, chunk_size_for(length), x.device, real, reset)
    size, chunks = plan.chunk_size, plan.num_chunks
    states = log_decay.shape[1]

    def scan(slots, log_decay, input_gain, output_gain, skip, state):
        steps = torch.arange(size, device=slots.device, dtype=state.dtype)
        powers = complex_powers(log_decay, steps)  # (D, N, C, 2), a^0 .. a^(C-1)
        gain = complex_product(output_gain, input_gain)[:, :, None]
        taps = 2 * (gain[..., 0] * powers[..., 0] - gain[..., 1] * powers[..., 1]).sum(1)  # (D, C)
        if skip is not None:
            taps = torch.cat([taps[:, :1] + skip.to(taps.dtype)[:, None], taps[:, 1:]], dim=1)
        # What input j leaves in the state after the chunk, and what the state before it gives to output i.
        writer = complex_product(input_gain[:, :, None], powers.flip(2)).permute(0, 1, 3, 2).reshape(width, -1, size)
        reader = complex_product(output_gain[:, :, None], complex_powers(log_decay, steps + 1))
        reader = 2 * conjugate(reader).permute(0, 2, 1, 3).reshape(width, size, -1)
        columns = slots.view(batch, chunks, size, width).permute(3, 2, 1, 0).to(state.dtype)
        columns = columns.reshape(width, size, chunks * batch)
        added = torch.bmm(writer, columns).view(width, states, 2, chunks, batch).permute(3, 4, 0, 1, 2)
        whole = complex_powers(log_decay, steps[-1:] + 1)[..., 0, :]
        borders = scan_borders(torch.cat([state[None], added]), whole, plan.first_chunk)
        read = borders[:-1].permute(2, 3, 4, 0, 1).reshape(width, -1, chunks * batch)
        y = torch.baddbmm(torch.bmm(toeplitz(taps), columns), reader, read)
        y = y.view(width, size, chunks, batch).permute(3, 2, 1, 0).reshape(batch, -1, width)
        # The last chunk may be partly filled: its tokens, moved to the chunk's end, enter with the same weights.
        entry = borders[plan.last_chunk, torch.arange(batch, device=slots.device)]
        tail_decay = complex_powers(log_decay, plan.last_length.to(state.dtype)).permute(2, 0, 1, 3)
        index = (plan.last_chunk * size + plan.last_length - size)[:, None] + steps.long()
        filled = index >= plan.last_chunk[:, None] * size
        tail = slots.gather(1, index.clamp_min(0)[:, :, None].expand(-1, -1, width)).to(state.dtype)
        tail = tail.masked_fill(~filled[:, :, None], 0)
        written = torch.einsum("dsc,bcd->bds", writer, tail).view(batch, width, states, 2)
        return y.to(slots.dtype), complex_product(tail_decay, entry) + written

    y, final = recomputed(scan, to_slots(x, plan), log_decay, input_gain, output_gain, skip, state)
    return to_columns(y, plan, length, real), final
