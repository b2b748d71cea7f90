"""Diagonal complex state-space recurrences, S4D and S5: modules, scans, and what the two share.

Letters: B batch, L columns, D channels, N states of a channel (S4D) or of the layer (S5), C chunk length, G chunks of
a row, S the shape of one row's states.

S4D (arXiv 2206.11893) gives every channel N complex states of its own. S5 (arXiv 2208.04933) has N of them in the
layer, which all channels write to and read from. Both are discretised with a zero-order hold. Within a chunk outputs
(S4D) or states (S5) are one matrix product each, across chunks only the states travel. The specifications, token by
token, are `s4d_scan_naive` and `s5_scan_naive`.

Complex numbers are pairs of reals in the last dimension, real part first: half precision, compilers and devices
without complex types then need no special case. Of each conjugate pair of states one is kept, and outputs are twice a
real part (S4D, arXiv 2206.11893, section 3).
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import SequenceContext
from .kernels_seqboat import op
from .ops_ema_seqboat import (
    causal_product,
    chunk_size_for,
    chunked_scan,
    complex_powers,
    complex_product,
    one_step,
    readout,
    recomputed,
    scan_borders,
    toeplitz,
    without_autocast,
)
from .ops_layout_seqboat import ScanPlan, build_scan_plan, in_chunks, to_columns, to_slots
from .ssm_seqboat import Before, Recurrence, Replay


def zero_order_hold(log_step: Tensor, log_rate: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Discretises ds/dt = a*s + u with a = -exp(log_rate) + i*frequency, u being held for a step (S4D, section 2).

    Args:
        log_step, log_rate, frequency: broadcastable shapes, any float dtype.

    Returns:
        z = step*a and gain = (exp(z) - 1) / a, each (..., 2), float32 (float64 stays): s_t = exp(z)*s_{t-1} +
        gain*u_t. The real part of z is below 0 whatever the parameters, so |exp(z)| <= 1. Finite for all finite
        parameters.
    """
    dtype = torch.float64 if log_step.dtype == torch.float64 else torch.float32
    step = log_step.to(dtype).clamp(-20, 10).exp()
    real = -step * log_rate.to(dtype).clamp(-30, 10).exp()
    imaginary = step * frequency.to(dtype).clamp(-1e6, 1e6)
    # exp(z) - 1 without cancellation where z is small.
    top_real = torch.expm1(real) * imaginary.cos() - 2 * torch.sin(imaginary / 2).square()
    top_imaginary = real.exp() * imaginary.sin()
    square = real.square() + imaginary.square()
    # Below 1e-4 two terms of (exp(z) - 1) / z are exact in float32, and the quotient has no value at 0.
    small = square < 1e-8
    below = torch.where(small, 1, square)
    quotient_real = torch.where(small, 1 + real / 2, (top_real * real + top_imaginary * imaginary) / below)
    quotient_imaginary = torch.where(small, imaginary / 2, (top_imaginary * real - top_real * imaginary) / below)
    log_decay = torch.stack([real, imaginary], dim=-1)
    return log_decay, step[..., None] * torch.stack([quotient_real, quotient_imaginary], dim=-1)


def _step(x, log_decay, write, read, skip, real, reset, state):
    """One column. write: (B, D) -> what a token adds to the state; read: state -> (B, D)."""
    decay = complex_powers(log_decay, log_decay.new_ones(1))[..., 0, :]

    def after(before: Tensor, token: Tensor) -> Tensor:
        return complex_product(decay, before) + write(token)

    return one_step(x, log_decay.shape, after, read, skip, real, reset, state)


@op("s4d_scan", used=lambda facts: facts.ssm_type == "s4d", missing="the recurrence of ssm_type='s4d' has no kernel")
def s4d_scan(
    x: Tensor, log_decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor | None, *,
    real: Tensor | None = None, reset: Tensor | None = None, state: Tensor | None = None, plan: ScanPlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    if x.shape[1] > 1:
        return chunked_scan([(x, input_gain)], log_decay, output_gain, skip, real, reset, state, plan)
    factors = readout(output_gain)
    write, read = lambda token: input_gain * token[:, :, None, None], lambda states: (factors * states).sum((-2, -1))
    return _step(x, log_decay, write, read, skip, real, reset, state)


@op("s5_scan", used=lambda facts: facts.ssm_type == "s5", missing="the recurrence of ssm_type='s5' has no kernel")
def s5_scan(
    x, log_decay, input_gain, output_gain, skip, *, real=None, reset=None, state=None, plan=None
) -> tuple[Tensor, Tensor]:
    """s_t = exp(z)*s_{t-1} + G x_t, y_t = 2*Re(O s_t) + skip*x_t over real tokens.

    Args and returns: those of `s4d_scan`, but for z (N, 2), G (N, D, 2), O (D, N, 2) and states (B, N, 2).
    """
    if x.shape[1] == 1:
        write, read = lambda token: _write(token, input_gain), lambda states: _read(states, output_gain)
        return _step(x, log_decay, write, read, skip, real, reset, state)
    return _s5_chunks(x, log_decay, input_gain, output_gain, skip, real, reset, state, plan)


def _write(tokens: Tensor, input_gain: Tensor) -> Tensor:
    """(..., D) real -> (..., N, 2)."""
    return torch.einsum("...d,ndp->...np", tokens, input_gain)


def _read(states: Tensor, output_gain: Tensor) -> Tensor:
    """(..., N, 2) -> (..., D): twice the real part."""
    return torch.einsum("...np,dnp->...d", states, readout(output_gain))


@torch.compiler.disable
def _s5_chunks(x, log_decay, input_gain, output_gain, skip, real, reset, state, plan):
    batch, length, width = x.shape
    if plan is None:
        plan = build_scan_plan(batch, length, chunk_size_for(length), x.device, real, reset)
    size, chunks = plan.chunk_size, plan.num_chunks
    count = log_decay.shape[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = log_decay.new_zeros(batch, *log_decay.shape, dtype=dtype) if state is None else state.to(dtype)

    def scan(slots, log_decay, input_gain, output_gain, skip, state):
        steps = torch.arange(size, device=slots.device, dtype=state.dtype)
        tokens = slots.to(state.dtype)
        # A complex product of matrices as a real one: real parts in the first C rows, imaginary parts in the last C.
        taps = [toeplitz(part) for part in complex_powers(log_decay, steps).unbind(-1)]
        matrix = torch.cat([torch.cat([taps[0], -taps[1]], dim=2), torch.cat([taps[1], taps[0]], dim=2)], dim=1)
        written = in_chunks(_write(tokens, input_gain), plan)
        columns = written.permute(3, 4, 2, 0, 1).reshape(count, 2 * size, batch * chunks)
        inner = causal_product(matrix, columns, size).view(count, 2, size, batch, chunks).permute(4, 3, 2, 0, 1)
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


class _Diagonal(Recurrence):
    """What s4d and s5 share: complex decays exp(step * (-exp(log_rate) + i*frequency)), never larger than 1."""

    def __init__(self, config: SeqBoatConfig, decay_shape: tuple[int, ...]):
        super().__init__(config)
        self.directions = 2 if config.bidirectional else 1
        self.log_step = nn.Parameter(torch.empty(decay_shape[:1]))
        self.log_rate = nn.Parameter(torch.empty(decay_shape))
        self.frequency = nn.Parameter(torch.empty(decay_shape))
        self.omega = nn.Parameter(torch.empty(config.hidden_size))

    def gains(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithm of the decay, input gain and output gain, float32, the rows of both directions together."""
        raise NotImplementedError

    @torch.no_grad()
    def draw_initial_values(self) -> None:
        """S4D-Lin (arXiv 2206.11893, section 4): a = -1/2 + i*pi*n; steps log-uniform from 0.001 to 0.1."""
        step = torch.empty_like(self.log_step).uniform_(math.log(1e-3), math.log(1e-1))
        init.copy_(self.log_step, step)
        init.constant_(self.log_rate, math.log(0.5))
        count = self.config.state_size
        n = torch.arange(self.frequency.shape[-1], device=step.device, dtype=step.dtype) % count
        init.copy_(self.frequency, (math.pi * n).expand_as(self.frequency))
        init.trunc_normal_(self.omega, mean=0.0, std=1.0, a=-2.0, b=2.0)

    def forward(
        self, x: Tensor, context: SequenceContext, before: Before | None = None
    ) -> tuple[Tensor, Tensor | None, Replay | None]:
        scan = getattr(context.ops, f"{self.config.ssm_type}_scan")
        with without_autocast(x.device):
            gains = self.gains()
            back = None
            if self.directions == 2:
                gains, back = zip(*(gain.chunk(2) for gain in gains), strict=True)
            state = None if before is None else before.state
            marks = {"real": context.real, "reset": context.reset, "plan": context.plan, "state": state}
            y, state = scan(x, *gains, self.omega.to(gains[0].dtype), **marks)
            if back is not None:
                real, ends = context.reversed_marks()
                marks = {"real": real, "reset": ends, "plan": context.reverse_plan}
                y = y + scan(x.flip(1), *back, None, **marks)[0].flip(1)
            y = self.activation(y)
        if before is None:
            return y, None, None
        return y, state, functools.partial(_replay, scan, tuple(gain.detach() for gain in gains))

    def decayed(self, state: Tensor, tokens: Tensor) -> Tensor:
        # In float64: a phase is multiplied with a number of tokens.
        powers = complex_powers(self.gains()[0].double(), tokens.double())
        return complex_product(powers.movedim(-2, 0), state).to(state.dtype)


def _replay(scan: Callable, gains: tuple[Tensor, ...], x, real, reset, state, history) -> Tensor:
    return scan(x, *gains, None, real=real, reset=reset, state=state)[1]


class SeqBoatS4D(_Diagonal):
    """N complex states for each channel (arXiv 2206.11893): y = 2*Re(sum_n o_n*s_n) + omega*x, the input matrix 1."""

    def __init__(self, config: SeqBoatConfig):
        rows = config.hidden_size * (2 if config.bidirectional else 1)
        super().__init__(config, (rows, config.state_size))
        self.output = nn.Parameter(torch.empty(rows, config.state_size, 2))

    @staticmethod
    def state_shape(config: SeqBoatConfig) -> tuple[int, ...]:
        """Real and imaginary parts last."""
        return (config.hidden_size, config.state_size, 2)

    @staticmethod
    def flops(config: SeqBoatConfig) -> int:
        """6 for a*s, 4 to add g*x, 4 to read the real part out."""
        return config.hidden_size * config.state_size * 14

    def gains(self) -> tuple[Tensor, Tensor, Tensor]:
        log_decay, gain = zero_order_hold(self.log_step[:, None], self.log_rate, self.frequency)
        return log_decay, gain, self.output.to(gain.dtype)

    @torch.no_grad()
    def draw_initial_values(self) -> None:
        super().draw_initial_values()
        init.normal_(self.output, 0.0, 0.5**0.5)


class SeqBoatS5(_Diagonal):
    """N complex states of the layer, which all D channels write to and read from (arXiv 2208.04933)."""

    def __init__(self, config: SeqBoatConfig):
        directions = 2 if config.bidirectional else 1
        super().__init__(config, (directions * config.state_size,))
        self.input = nn.Parameter(torch.empty(directions * config.state_size, config.hidden_size, 2))
        self.output = nn.Parameter(torch.empty(directions * config.hidden_size, config.state_size, 2))

    @staticmethod
    def state_shape(config: SeqBoatConfig) -> tuple[int, ...]:
        """Real and imaginary parts last."""
        return (config.state_size, 2)

    @staticmethod
    def flops(config: SeqBoatConfig) -> int:
        """4 D N to write, 6 N for a*s, 4 D N to read."""
        return config.state_size * (8 * config.hidden_size + 6)

    def gains(self) -> tuple[Tensor, Tensor, Tensor]:
        log_decay, hold = zero_order_hold(self.log_step, self.log_rate, self.frequency)
        return log_decay, complex_product(hold[:, None], self.input.to(hold.dtype)), self.output.to(hold.dtype)

    @torch.no_grad()
    def draw_initial_values(self) -> None:
        super().draw_initial_values()
        init.normal_(self.input, 0.0, (2 * self.config.hidden_size) ** -0.5)
        init.normal_(self.output, 0.0, (2 * self.config.state_size) ** -0.5)
