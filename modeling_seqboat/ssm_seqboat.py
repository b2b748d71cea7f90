"""Step 1 of a layer (arXiv 2306.11197, section 3.1): the recurrence that runs over every token, by `ssm_type`.

Letters: B batch, L columns, D hidden width, N states a channel, T truncation, R parameter rows (D, or 2D in a
bidirectional model: the first D run forwards, the last D backwards, and both see the token itself).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_seqboat import SSM_TYPES, SeqBoatConfig
from .context_seqboat import SequenceContext
from .ops_ema_seqboat import ema_decayed, ema_parameters, ema_scan, ema_step, without_autocast
from .ops_layout_seqboat import is_exporting, last_real_tokens, real_ordinals, shift_real_tokens

# (inputs (B, L, D), real, reset, state, history) -> the state after the last of these columns. With `ssm_truncation`
# also tokens=(B,) int64, see `Before`.
Replay = Callable[..., Tensor]


class Before(NamedTuple):
    """What a cache knows of the columns before these.

    Attributes:
        state: (B, *state_shape(config)) float32.
        history: (B, min(L, T), D), the first of the last T real inputs, oldest first; None without `ssm_truncation`.
        overwrite: whether one column may be computed in place of the state.
        window: (B, T, D), the last T real inputs, oldest first, where the state is to be made from them anew; else
            None.
        relay: where other processes have the columns before and the kernels can wait for their states amid a scan:
            what makes the `relay` of `ema_scan` of the function `decayed`; the state is None then.
        tokens: (B,) int64, real tokens of the row's segment; None without `ssm_truncation`.
    """

    state: Tensor
    history: Tensor | None
    overwrite: bool
    window: Tensor | None = None
    relay: Callable[[Callable[[Tensor, Tensor], Tensor]], Any] | None = None
    tokens: Tensor | None = None


class Recurrence(nn.Module):
    """What a recurrence is to the rest of the model; `register_recurrence` gives it a name as `ssm_type`.

    At a pad the state stands still, and it is 0 before a token whose segment starts there. A row's result depends on
    its real tokens alone.
    """

    def __init__(self, config: SeqBoatConfig):
        super().__init__()
        self.config = config
        self.activation = ACT2FN[config.hidden_act]

    @staticmethod
    def state_shape(config: SeqBoatConfig) -> tuple[int, ...]:
        """The shape of one row's state."""
        raise NotImplementedError

    @staticmethod
    def flops(config: SeqBoatConfig) -> int:
        """FLOPs of one real token in one direction, a multiplication with its addition counting 2."""
        raise NotImplementedError

    def draw_initial_values(self) -> None:
        """Initialises the parameters by `transformers.initialization`, which leaves loaded ones alone. Called for a
        recurrence that holds a parameter itself, not for one of submodules alone."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, context: SequenceContext, before: Before | None = None
    ) -> tuple[Tensor, Tensor | None, Replay | None]:
        """Runs over the columns.

        Args:
            x: (B, L, D).
            before: the state that the columns continue; None without a cache.

        Returns:
            activation(y) (B, L, D) of x's dtype; the state after the last column, and how to compute it for other
            columns of the same model, both None without a cache. The second is None too where the state was
            overwritten.
        """
        raise NotImplementedError

    def takes_relay(self, context: SequenceContext) -> bool:
        """Whether `forward` takes `Before.relay`, which spares `state_after`."""
        return False

    def state_after(self, x: Tensor, context: SequenceContext) -> Tensor:
        """The state after x (B, L, D) where nothing came before, with gradients. Asked for where a sequence is cut
        over processes, as the next two are."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        state = torch.zeros(x.shape[0], *self.state_shape(self.config), dtype=dtype, device=x.device)
        return self(x, context, Before(state, None, False))[1]

    def decayed(self, state: Tensor, tokens: Tensor) -> Tensor:
        """What is left of a state (B, *state_shape) after `tokens` (B,) int64 real tokens, so that the state after
        them is this and `state_after` together. A recurrence that is not linear in its state has no such function."""
        raise NotImplementedError

    def state_of(self, window: Tensor, tokens: Tensor) -> Tensor:
        """With `ssm_truncation`: the state that stands for the last T real inputs (B, T, D), zeros where there were
        fewer, of the `tokens` (B,) int64 that the row's segment had."""
        raise NotImplementedError


RECURRENCES: dict[str, type[Recurrence]] = {}


def register_recurrence(name: str, kind: type[Recurrence]) -> None:
    """Makes `kind` what a config with `ssm_type=name` builds."""
    RECURRENCES[name] = kind
    if name not in SSM_TYPES:
        SSM_TYPES.append(name)


# With a truncated kernel what enters the state leaves it again T tokens later, rounded, and with slow decays the
# remainders pile up. So after this many columns of one forward the state is made anew from the T inputs that it stands
# for. While decoding, `ema_step` puts the state right every T tokens.
RENEWED_COLUMNS = 32_768


def _ema_state_of(window: Tensor, decay: Tensor, gain: Tensor, **marks: Tensor | None) -> Tensor:
    """The state (B, D, N) after the inputs (B, T, D), and after nothing else but a `state` that is given."""
    return ema_scan(window, decay, gain, torch.zeros_like(gain), None, **marks)[1]


def _block_state(tables: tuple[Tensor, Tensor], truncation: int, x, real, reset, block, history, tokens) -> Tensor:
    """The second state of `ema_step` after the columns, (B, D, N); arguments as a `Replay` has them."""
    ordinal = real_ordinals(*x.shape[:2], x.device, real, reset, tokens)
    if not is_exporting() and x.shape[1] <= truncation:
        starts = ordinal % truncation == 0
        return _ema_state_of(x, *tables, real=real, reset=starts if reset is None else starts | reset, state=block)
    last = last_real_tokens(x, truncation, real, reset, history)
    return _last_block_state(tables, last, ordinal[:, -1:] + 1)


def _last_block_state(tables: tuple[Tensor, Tensor], window: Tensor, tokens: Tensor) -> Tensor:
    """The second state of `ema_step` after `tokens` (B, 1), of which `window` (B, T, D) has the last T."""
    truncation = window.shape[1]
    held = (tokens - 1) % truncation + 1
    return _ema_state_of(window, *tables, real=torch.arange(truncation, device=window.device) >= truncation - held)


def _ema_replay(
    tables: tuple[Tensor, Tensor], truncation: int | None, x, real, reset, state, history, tokens=None
) -> Tensor:
    decay, gain = tables
    if truncation is None:
        return _ema_state_of(x, decay, gain, real=real, reset=reset, state=state)
    state, block = state.unbind(1)
    delayed = shift_real_tokens(x, truncation, real, reset, history)
    delay = {"delayed": delayed, "delay_decay": decay**truncation}
    state = _ema_state_of(x, decay, gain, real=real, reset=reset, state=state, **delay)
    return torch.stack((state, _block_state(tables, truncation, x, real, reset, block, history, tokens)), dim=1)


class SeqBoatEMA(Recurrence):
    """The multi-dimensional damped EMA over every real token."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        shape = (config.hidden_size * (2 if config.bidirectional else 1), config.state_size)
        self.truncation = config.ssm_truncation
        self.delta = nn.Parameter(torch.empty(*shape, 1))
        self.alpha = nn.Parameter(torch.empty(*shape, 1))
        self.beta = nn.Parameter(torch.empty(*shape, 1))
        self.gamma = nn.Parameter(torch.empty(*shape))
        # The scan ends with the activation where nothing is added in between.
        self.fused_activation = "silu" if config.hidden_act == "silu" and not config.bidirectional else None
        self.omega = nn.Parameter(torch.empty(config.hidden_size))

    @staticmethod
    def state_shape(config: SeqBoatConfig) -> tuple[int, ...]:
        """(D, N), or with truncation (2, D, N), see `ema_step`."""
        shape = (config.hidden_size, config.state_size)
        return shape if config.ssm_truncation is None else (2, *shape)

    @staticmethod
    def flops(config: SeqBoatConfig) -> int:
        """q*s + g*x is 3, the read-out 2; truncation subtracts what leaves the window."""
        return config.hidden_size * config.state_size * (5 if config.ssm_truncation is None else 7)

    @torch.no_grad()
    def draw_initial_values(self) -> None:
        init.trunc_normal_(self.delta, mean=0.0, std=0.2, a=-0.4, b=0.4)
        init.trunc_normal_(self.alpha, mean=0.0, std=0.2, a=-0.4, b=0.4)
        beta = nn.init.trunc_normal_(torch.empty_like(self.beta), std=0.02, a=-0.04, b=0.04)
        beta[:, 0::2] += 1
        beta[:, 1::2] -= 1
        init.copy_(self.beta, beta)
        init.trunc_normal_(self.gamma, mean=0.0, std=1.0, a=-2.0, b=2.0)
        init.trunc_normal_(self.omega, mean=0.0, std=1.0, a=-2.0, b=2.0)

    def forward(
        self, x: Tensor, context: SequenceContext, before: Before | None = None
    ) -> tuple[Tensor, Tensor | None, Replay | None]:
        ops, real, reset, truncation = context.ops, context.real, context.reset, self.truncation
        state, history, overwrite, window, relay, tokens = before or (None, None, False, None, None, None)
        with without_autocast(x.device):
            tables = ops.ema_parameters(self.delta, self.alpha, self.beta, self.gamma)
            back = None
            if self.config.bidirectional:
                tables, back = zip(*(table.chunk(2) for table in tables), strict=True)
            delayed = delay_decay = replay = None
            if truncation is not None:
                delay_decay = tables[0] ** truncation
                delayed = shift_real_tokens(x, truncation, real, reset, history)
            arguments = {"real": real, "reset": reset, "delayed": delayed, "delay_decay": delay_decay}
            arguments["activation"] = self.fused_activation
            one_column = before is not None and x.shape[1] == 1 and relay is None
            # A step takes it as it is, a launch less.
            skip = self.omega if one_column else self.omega.to(tables[0].dtype)
            block = None
            if tokens is not None:
                if window is not None:
                    with torch.no_grad():
                        renewed = torch.stack((_ema_state_of(window, *tables[:2]), state[:, 1]), dim=1).to(state.dtype)
                        state = state.copy_(renewed) if overwrite else renewed
                if x.shape[1] > 1:
                    # Of a text cut over processes the first has a gradient.
                    state, block = state.unbind(1)
                    with torch.no_grad():
                        block = _block_state(tables[:2], truncation, x, real, reset, block, history, tokens)
            if relay is not None:
                arguments["relay"] = relay(functools.partial(ema_decayed, tables[0].detach()))
                y, state = ops.ema_scan(x, *tables, skip, **arguments)
            elif one_column:
                # One column is a handful of elementwise operations, which need no kernel.
                step = ops.ema_step if overwrite else ema_step
                starts = None if tokens is None else (tokens % truncation == 0)[:, None]
                y, state = step(x, *tables, skip, state, block_start=starts, **arguments)
            elif truncation is not None and not is_exporting() and truncation <= RENEWED_COLUMNS < x.shape[1]:
                y, state = self._in_pieces(x, context, (*tables, skip), state, history, arguments)
            else:
                scan = ops.ema_scan if x.shape[1] > 1 else ema_scan
                arguments |= {"state": state, "plan": context.plan, "need_state": before is not None}
                y, state = scan(x, *tables, skip, **arguments)
            if block is not None:
                state = torch.stack((state, block.to(state.dtype)), dim=1)
            if before is not None and not overwrite:
                replay = functools.partial(_ema_replay, (tables[0].detach(), tables[1].detach()), truncation)
            if back is not None:
                y = y + self._backwards(x, back, context)
            if self.fused_activation is None:
                y = self.activation(y)
        return y, (None if before is None else state), replay

    def takes_relay(self, context: SequenceContext) -> bool:
        return context.ops.runs_triton("ema_scan")

    def state_after(self, x: Tensor, context: SequenceContext) -> Tensor:
        with without_autocast(x.device):
            tables = context.ops.ema_parameters(self.delta, self.alpha, self.beta, self.gamma)
            scan = context.ops.ema_scan if x.shape[1] > 1 else ema_scan
            return scan(x, *tables, None, real=context.real, reset=context.reset, plan=context.plan)[1]

    def decayed(self, state: Tensor, tokens: Tensor) -> Tensor:
        return ema_decayed(ema_parameters(self.delta, self.alpha, self.beta, self.gamma)[0], state, tokens)

    def state_of(self, window: Tensor, tokens: Tensor) -> Tensor:
        with without_autocast(window.device):
            tables = ema_parameters(self.delta, self.alpha, self.beta, self.gamma)[:2]
            state = _ema_state_of(window, *tables)
            with torch.no_grad():
                block = _last_block_state(tables, window, tokens[:, None])
            return torch.stack((state, block), dim=1)

    def _in_pieces(
        self, x: Tensor, context: SequenceContext, tables: tuple[Tensor, ...], state, history, arguments: dict
    ) -> tuple[Tensor, Tensor | None]:
        """The scan of a long row, whose state is made anew every `RENEWED_COLUMNS`. state, history: as in `Before`;
        arguments: of `ema_scan`."""
        ys, length = [], x.shape[1]
        window = x.new_zeros(x.shape[0], self.truncation, x.shape[2]) if history is None else history
        columns = {name: arguments[name] for name in ("real", "reset", "delayed")}
        rest = {name: value for name, value in arguments.items() if name not in columns}
        for first in range(0, length, RENEWED_COLUMNS):
            cut = slice(first, first + RENEWED_COLUMNS)
            if first:
                state = _ema_state_of(window, *tables[:2])
            part = x[:, cut].contiguous()
            own = {name: None if value is None else value[:, cut].contiguous() for name, value in columns.items()}
            scan = context.ops.ema_scan if part.shape[1] > 1 else ema_scan
            y, state = scan(part, *tables, state=state, need_state=True, **own, **rest)
            ys.append(y)
            window = last_real_tokens(part, self.truncation, own["real"], own["reset"], window)
        return torch.cat(ys, dim=1), state

    def _backwards(self, x: Tensor, tables: tuple[Tensor, ...], context: SequenceContext) -> Tensor:
        real, ends = context.reversed_marks()
        reset = None if ends is None else ends.flip(1)
        arguments = {"real": context.real, "reset": reset, "plan": context.reverse_plan}
        if self.truncation is not None:
            # The delayed input is made from the columns in the order in which the scan reads them.
            arguments["delayed"] = shift_real_tokens(x.flip(1), self.truncation, real, ends, None).flip(1)
            arguments["delay_decay"] = tables[0] ** self.truncation
        scan = context.ops.ema_scan if x.shape[1] > 1 else ema_scan
        return scan(x, *tables, None, need_state=False, reverse=True, **arguments)[0]
