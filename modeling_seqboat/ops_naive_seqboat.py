"""The specification of every op, token by token: slow, short, and read by eye against the paper's equations.

Arguments are those of the ops. Letters: B batch, L columns, D channels, N states, M queries and Mk keys of one flat
stream, Z query/key width, V value width, W memory size.
"""

import math

import torch
from torch import Tensor


def ema_scan_naive(
    x, decay, input_gain, output_gain, skip, *, delayed=None, delay_decay=None, **marks
) -> tuple[Tensor, Tensor]:
    """`ema_scan` as a loop over columns: s = q*s + g*(x_t - r*x_{t-T}), y_t = sum_n o_n*s_n + skip*x_t."""

    def write(token: Tensor, t: int) -> Tensor:
        written = input_gain * token[:, :, None]
        if delayed is not None:
            written = written - input_gain * delay_decay * delayed[:, t].to(decay.dtype)[:, :, None]
        return written

    return _loop(x, decay, write, lambda s: (output_gain * s).sum(-1), skip, **marks)


def windowed_attention_naive(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, *, activation: str, scale: float,
    bias_table: Tensor | None = None, bias_center: int = 0, q_place: Tensor | None = None,
    k_place: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`windowed_attention` query by query (arXiv 2306.11197, section 3.3): keys key_start[i] <= j < key_end[i]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = []
    for i in range(q.shape[0]):
        keys = slice(int(key_start[i]), int(key_end[i]))
        if keys.start >= keys.stop:
            rows.append(v.new_zeros(v.shape[1]) + 0 * q[i].sum())
            continue
        scores = k[keys].to(dtype) @ (q[i] * scale).to(dtype)
        if bias_table is not None:
            entry = bias_center + k_place[keys] - q_place[i]
            scores = scores + bias_table[entry.clamp(0, bias_table.shape[0] - 1)]
        if activation == "softmax":
            weights = scores.softmax(-1)
        elif activation == "relu2":
            weights = scores.relu().square()
        else:
            weights = 0.5 * (1 + torch.erf((scores - 0.707107) / (0.282095 * math.sqrt(2))))
        rows.append((weights.to(v.dtype) @ v[keys]).to(v.dtype))
    return torch.stack(rows) if rows else v.new_zeros(0, v.shape[1])


def s4d_scan_naive(
    x: Tensor, log_decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor | None, **marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`s4d_scan` as a loop over columns: s = exp(z)*s + g*x_t, y_t = 2*Re(sum_n o_n*s_n) + skip*x_t."""
    gain, out = torch.view_as_complex(input_gain), torch.view_as_complex(output_gain)
    write, read = lambda token, _: gain * token[:, :, None], lambda s: 2 * (out * s).sum(-1).real
    return _complex_loop(x, log_decay, write, read, skip, **marks)


def s5_scan_naive(
    x: Tensor, log_decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor | None, **marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`s5_scan` as a loop over columns: s = exp(z)*s + G x_t, y_t = 2*Re(O s) + skip*x_t."""
    gain, out = torch.view_as_complex(input_gain), torch.view_as_complex(output_gain)
    write, read = lambda token, _: token.to(gain.dtype) @ gain.T, lambda s: 2 * (s @ out.T).real
    return _complex_loop(x, log_decay, write, read, skip, **marks)


def _complex_loop(x, log_decay, write, read, skip, state=None, **marks) -> tuple[Tensor, Tensor]:
    state = None if state is None else torch.view_as_complex(state)
    y, state = _loop(x, torch.view_as_complex(log_decay).exp(), write, read, skip, state=state, **marks)
    return y, torch.view_as_real(state)


def _loop(x, decay, write, read, skip, *, real=None, reset=None, state=None) -> tuple[Tensor, Tensor]:
    """s = decay*s + write(x_t, t), y_t = read(s) + skip*x_t at real tokens; s is 0 where a segment starts."""
    batch, length, _ = x.shape
    s = decay.new_zeros(batch, *decay.shape) if state is None else state
    marks = (slice(None), *[None] * decay.dim())
    ys = []
    for t in range(length):
        is_real = torch.ones(batch, dtype=torch.bool) if real is None else real[:, t]
        starts = torch.zeros(batch, dtype=torch.bool) if reset is None else reset[:, t] & is_real
        token = torch.where(is_real[:, None], x[:, t].to(decay.real.dtype), 0)
        s = torch.where(is_real[marks], decay * torch.where(starts[marks], 0, s) + write(token, t), s)
        y = read(s) + (0 if skip is None else skip * token)
        ys.append(torch.where(is_real[:, None], y, 0))
    return torch.stack(ys, dim=1).to(x.dtype), s
