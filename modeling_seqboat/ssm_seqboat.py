"""Step 1 of a layer (arXiv 2306.11197, section 3.1): the recurrence that runs over every token, by `ssm_type`.

Letters: B batch, L columns, D hidden width, N states (a channel: ema, s4d; a layer: s5), R parameter rows (D, or 2D in
a bidirectional model: the first D run forwards, the last D backwards, and both see the token itself).
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .cache_seqboat import SeqBoatCacheLayer
from .configuration_seqboat import SeqBoatConfig
from .kernels_seqboat import requested_backend, run_diagonal_scan, run_ema_parameters, run_ema_scan, run_ema_step
from .ops_diagonal_seqboat import complex_product, zero_order_hold
from .ops_layout_seqboat import shift_real_tokens
from .ops_ssm_seqboat import without_autocast
from .sequence_seqboat import SequenceContext


class SeqBoatEMA(nn.Module):
    """The multi-dimensional damped EMA over every real token."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__()
        rows = config.hidden_size * (2 if config.bidirectional else 1)
        self.config = config
        self.hidden_size = config.hidden_size
        self.truncation = config.ssm_truncation
        self.bidirectional = config.bidirectional
        shape = (rows, config.state_size)
        self.delta = nn.Parameter(torch.empty(*shape, 1))
        self.alpha = nn.Parameter(torch.empty(*shape, 1))
        self.beta = nn.Parameter(torch.empty(*shape, 1))
        self.gamma = nn.Parameter(torch.empty(*shape))
        self.activation = ACT2FN[config.hidden_act]
        # The forward scan's kernel ends with the activation, where nothing is added in between.
        self.fused_activation = "silu" if config.hidden_act == "silu" and not config.bidirectional else None
        self.omega = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, x: Tensor, context: SequenceContext, cache: SeqBoatCacheLayer | None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """x (B, L, D) -> silu(y) (B, L, D) of x's dtype, and what the cache keeps of the scan."""
        with without_autocast(x.device):
            tables = run_ema_parameters(
                requested_backend(self.config.kernel_backend), self.delta, self.alpha, self.beta, self.gamma
            )
            ways = list(zip(*(table.split(self.hidden_size) for table in tables), strict=True))
            history = state = None
            if cache is not None and x.shape[1] == 1 and cache.steps_in_place and self.truncation is None:
                y = run_ema_step(
                    requested_backend(self.config.kernel_backend), x, *ways[0], self.omega.to(tables[0].dtype),
                    cache.ssm_state, real=context.real, reset=context.reset, activation=self.fused_activation,
                )  # fmt: skip
                if y is not None:
                    y = y if self.fused_activation else self.activation(y)
                    return y, {"ssm_state": cache.ssm_state}
            if cache is not None:
                state, history = cache.ssm_state, cache.recent_inputs(x.shape[1])
                if cache.static and torch.is_grad_enabled():
                    # The graph keeps what the cache is about to overwrite.
                    state = state.clone()
            y, state, delay_decay = self._scan(
                x, ways[0], self.omega.to(tables[0].dtype), context.real, context.reset, context.plan, state, history,
                cache is not None,
            )  # fmt: skip
            if self.bidirectional:
                y = y + self._scan_back(x, ways[1], context)
            if self.fused_activation is None:
                y = self.activation(y)
        decay, input_gain, _ = ways[0]
        scanned = {"decay": decay, "input_gain": input_gain, "delay_decay": delay_decay, "ssm_state": state}
        return y, scanned

    def _scan_back(self, x: Tensor, way: tuple[Tensor, ...], context: SequenceContext) -> Tensor:
        real, ends = context.reversed_marks()
        if self.truncation is None:
            return self._scan(x, way, None, real, ends, context.reverse_plan, None, None, False, reverse=True)[0]
        # The delayed input is made from the columns in the order in which the scan reads them.
        return self._scan(x.flip(1), way, None, real, ends, context.reverse_plan, None, None, False)[0].flip(1)

    def _scan(self, x, way, skip, real, reset, plan, state, history, need_state, reverse=False):
        delayed = delay_decay = None
        if self.truncation is not None:
            delay_decay = way[0] ** self.truncation
            delayed = shift_real_tokens(x, self.truncation, real, reset, history)
        y, state = run_ema_scan(
            requested_backend(self.config.kernel_backend), x, *way, skip, real=real, reset=reset, state=state,
            delayed=delayed, delay_decay=delay_decay, plan=plan, need_state=need_state, reverse=reverse,
            activation=self.fused_activation,
        )  # fmt: skip
        return y, state, delay_decay


class _SeqBoatDiagonal(nn.Module):
    """What s4d and s5 share: complex decays exp(step * (-exp(log_rate) + i*frequency)), never larger than 1."""

    def __init__(self, config: SeqBoatConfig, decay_shape: tuple[int, ...]):
        super().__init__()
        self.config = config
        self.directions = 2 if config.bidirectional else 1
        self.log_step = nn.Parameter(torch.empty(decay_shape[:1]))
        self.log_rate = nn.Parameter(torch.empty(decay_shape))
        self.frequency = nn.Parameter(torch.empty(decay_shape))
        self.omega = nn.Parameter(torch.empty(config.hidden_size))
        self.activation = ACT2FN[config.hidden_act]

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
        self, x: Tensor, context: SequenceContext, cache: SeqBoatCacheLayer | None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """x (B, L, D) -> silu(y) (B, L, D) of x's dtype, and what the cache keeps of the scan."""
        with without_autocast(x.device):
            ways = list(zip(*(gain.chunk(self.directions) for gain in self.gains()), strict=True))
            state = None if cache is None else cache.ssm_state
            if state is not None and cache.static and torch.is_grad_enabled():
                # The graph keeps what the cache is about to overwrite.
                state = state.clone()
            y, state = self._scan(
                x, ways[0], self.omega.to(ways[0][0].dtype), context.real, context.reset, state, context.plan
            )
            if self.directions == 2:
                real, ends = context.reversed_marks()
                back, _ = self._scan(x.flip(1), ways[1], None, real, ends, None, context.reverse_plan)
                y = y + back.flip(1)
            y = self.activation(y)
        log_decay, input_gain, _ = ways[0]
        return y, {"decay": log_decay, "input_gain": input_gain, "delay_decay": None, "ssm_state": state}

    def _scan(self, x, gains, skip, real, reset, state, plan):
        return run_diagonal_scan(self.config.ssm_type, x, *gains, skip, real=real, reset=reset, state=state, plan=plan)


class SeqBoatS4D(_SeqBoatDiagonal):
    """N complex states for each channel (arXiv 2206.11893): y = 2*Re(sum_n o_n*s_n) + omega*x, the input matrix 1."""

    def __init__(self, config: SeqBoatConfig):
        rows = config.hidden_size * (2 if config.bidirectional else 1)
        super().__init__(config, (rows, config.state_size))
        self.output = nn.Parameter(torch.empty(rows, config.state_size, 2))

    def gains(self) -> tuple[Tensor, Tensor, Tensor]:
        log_decay, gain = zero_order_hold(self.log_step[:, None], self.log_rate, self.frequency)
        return log_decay, gain, self.output.to(gain.dtype)

    @torch.no_grad()
    def draw_initial_values(self) -> None:
        super().draw_initial_values()
        init.normal_(self.output, 0.0, 0.5**0.5)


class SeqBoatS5(_SeqBoatDiagonal):
    """N complex states of the layer, which all D channels write to and read from (arXiv 2208.04933)."""

    def __init__(self, config: SeqBoatConfig):
        directions = 2 if config.bidirectional else 1
        super().__init__(config, (directions * config.state_size,))
        self.input = nn.Parameter(torch.empty(directions * config.state_size, config.hidden_size, 2))
        self.output = nn.Parameter(torch.empty(directions * config.hidden_size, config.state_size, 2))

    def gains(self) -> tuple[Tensor, Tensor, Tensor]:
        log_decay, hold = zero_order_hold(self.log_step, self.log_rate, self.frequency)
        return log_decay, complex_product(hold[:, None], self.input.to(hold.dtype)), self.output.to(hold.dtype)

    @torch.no_grad()
    def draw_initial_values(self) -> None:
        super().draw_initial_values()
        init.normal_(self.input, 0.0, (2 * self.config.hidden_size) ** -0.5)
        init.normal_(self.output, 0.0, (2 * self.config.state_size) ** -0.5)


def build_ssm(config: SeqBoatConfig) -> nn.Module:
    """The recurrence that `config.ssm_type` names, called as ssm(x, context, cache)."""
    return {"ema": SeqBoatEMA, "s4d": SeqBoatS4D, "s5": SeqBoatS5}[config.ssm_type](config)
