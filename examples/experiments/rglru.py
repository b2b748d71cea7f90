"""A recurrence whose decay depends on the input: the RG-LRU of Griffin (arXiv 2402.19427, section 2.4). Importing this
module makes it known as `ssm_type` `rglru`. It shows how a recurrence of one's own is written.

    r_t = sigmoid(W_r x_t + b_r),  i_t = sigmoid(W_i x_t + b_i)
    a_t = a^(c r_t),  a = sigmoid(decay)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t),  y_t = h_t + omega x_t

W_r and W_i are block-diagonal. omega x_t is the other recurrences' and not Griffin's, where a convolution precedes.

Letters: B batch, L columns, D width, R parameter rows (D; 2D in an encoder, the last D run backwards), K channels of a
block, G blocks of a direction.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization as init

from modeling_seqboat import SeqBoatConfig
from modeling_seqboat.context_seqboat import SequenceContext
from modeling_seqboat.ops_ema_seqboat import without_autocast
from modeling_seqboat.ssm_seqboat import Before, Recurrence, Replay, register_recurrence

NAME = "rglru"
# c of the paper.
SHARPNESS = 8.0
# a^c is drawn between these.
SLOWEST, FASTEST = 0.999, 0.9
# log a_t is kept below this: the square root's gradient has no bound where a_t reaches 1.
_LEAST_DECAY = -1e-6


def gated_scan_naive(decay: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, column by column: what `gated_scan` computes."""
    states = []
    for t in range(added.shape[1]):
        state = decay[:, t] * state + added[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def _states(decay: Tensor, added: Tensor) -> Tensor:
    """The states from 0 on. Two columns are one of a scan of half the length, which gives the states at odd columns;
    at even ones they are a step away. So L columns take log2(L) rounds of ever less work."""
    length = added.shape[1]
    if length == 1:
        return added
    even = length - length % 2
    second = decay[:, 1:even:2]
    odd = _states(second * decay[:, :even:2], torch.addcmul(added[:, 1:even:2], second, added[:, :even:2]))
    states = torch.empty_like(added)
    states[:, 0], states[:, 1::2] = added[:, 0], odd
    later = added[:, 2::2]
    states[:, 2::2] = torch.addcmul(later, decay[:, 2::2], odd[:, : later.shape[1]])
    return states


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay: Tensor, added: Tensor, state: Tensor) -> Tensor:
        added = added.clone()
        added[:, 0].addcmul_(decay[:, 0], state)
        states = _states(decay, added)
        ctx.save_for_backward(decay, states, state)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        decay, states, state = ctx.saved_tensors
        # What a state is worth to the outputs from its column on: the same recurrence, read backwards.
        following = F.pad(decay.flip(1)[:, :-1], (0, 0, 1, 0))
        worth = _states(following, grad.flip(1)).flip(1)
        before = torch.cat([state[:, None], states[:, :-1]], dim=1)
        return worth * before, worth, worth[:, 0] * decay[:, 0]


def gated_scan(decay: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t.

    Args:
        decay: a, (B, L, D), from 0 to 1; added: b, (B, L, D); state: h before column 0, (B, D). One float dtype.

    Returns:
        (B, L, D), all states.
    """
    return _GatedScan.apply(decay, added, state)


def block_width(config: SeqBoatConfig) -> int:
    """The largest divisor of the width up to 2N: the gates then have about as many parameters as the EMA."""
    widest = min(2 * config.state_size, config.hidden_size)
    return next(width for width in range(widest, 0, -1) if config.hidden_size % width == 0)


def _through_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """(B, L, D) times (G, K, K) -> (B, L, D)."""
    return torch.einsum("blgk,gkj->blgj", x.unflatten(-1, weight.shape[:2]), weight).flatten(-2)


def gates(x: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """x (B, L, D) -> a_t and sqrt(1 - a_t^2) i_t x_t, each (B, L, D); `tables` are one direction's decay (D,), W_r and
    W_i (G, K, K), b_r and b_i (D,)."""
    decay, to_recurrence, to_input, recurrence_bias, input_bias = (table.to(x.dtype) for table in tables)
    recurrence = torch.sigmoid(_through_blocks(x, to_recurrence) + recurrence_bias)
    entrance = torch.sigmoid(_through_blocks(x, to_input) + input_bias)
    log_decay = (-SHARPNESS * F.softplus(-decay) * recurrence).clamp_max(_LEAST_DECAY)
    # 1 - a^2 without cancellation.
    return log_decay.exp(), torch.sqrt(-torch.expm1(2 * log_decay)) * entrance * x


def run(
    x: Tensor, tables: tuple[Tensor, ...], real: Tensor | None, reset: Tensor | None, state: Tensor | None
) -> Tensor:
    """All states (B, L, D) of x (B, L, D), 0 at pads of which it is; they stand still there, and begin anew at real
    tokens under `reset`. real, reset: (B, L) bool or None; state: (B, D) or None for zeros."""
    decay, added = gates(x, tables)
    if real is not None:
        decay, added = decay.masked_fill(~real[..., None], 1), added.masked_fill(~real[..., None], 0)
    if reset is not None:
        starts = reset if real is None else reset & real
        decay = decay.masked_fill(starts[..., None], 0)
    state = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state.to(x.dtype)
    return gated_scan(decay, added, state)


def _wide(x: Tensor, real: Tensor | None) -> Tensor:
    """x in float32 (float64 stays), 0 at pads."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if real is None else x.masked_fill(~real[..., None], 0)


def _replayed(tables: tuple[Tensor, ...], x, real, reset, state, history) -> Tensor:
    with without_autocast(x.device):
        return run(_wide(x, real), tables, real, reset, state)[:, -1]


class RGLRU(Recurrence):
    """One state a channel, whose decay and input are gated by the token."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        width, block = config.hidden_size, block_width(config)
        rows = width * (2 if config.bidirectional else 1)
        self.decay = nn.Parameter(torch.empty(rows))
        self.recurrence_gate = nn.Parameter(torch.empty(rows // block, block, block))
        self.input_gate = nn.Parameter(torch.empty(rows // block, block, block))
        self.recurrence_bias = nn.Parameter(torch.empty(rows))
        self.input_bias = nn.Parameter(torch.empty(rows))
        self.omega = nn.Parameter(torch.empty(width))

    @staticmethod
    def state_shape(config: SeqBoatConfig) -> tuple[int, ...]:
        return (config.hidden_size,)

    @staticmethod
    def flops(config: SeqBoatConfig) -> int:
        """Two gates of K multiplications a channel, then 3 for a_t, 4 for what is added, 2 for the state."""
        return config.hidden_size * (4 * block_width(config) + 9)

    @torch.no_grad()
    def draw_initial_values(self) -> None:
        a = torch.empty_like(self.decay).uniform_(FASTEST, SLOWEST) ** (1 / SHARPNESS)
        init.copy_(self.decay, torch.log(a) - torch.log1p(-a))
        for gate, bias in ((self.recurrence_gate, self.recurrence_bias), (self.input_gate, self.input_bias)):
            init.normal_(gate, 0.0, gate.shape[-1] ** -0.5)
            init.zeros_(bias)
        init.trunc_normal_(self.omega, mean=0.0, std=1.0, a=-2.0, b=2.0)

    def _tables(self) -> list[tuple[Tensor, ...]]:
        """Of each direction."""
        every = self.decay, self.recurrence_gate, self.input_gate, self.recurrence_bias, self.input_bias
        if not self.config.bidirectional:
            return [every]
        return list(zip(*(table.chunk(2) for table in every), strict=True))

    def forward(
        self, x: Tensor, context: SequenceContext, before: Before | None = None
    ) -> tuple[Tensor, Tensor | None, Replay | None]:
        real, (tables, *back) = context.real, self._tables()
        with without_autocast(x.device):
            wide = _wide(x, real)
            states = run(wide, tables, real, context.reset, None if before is None else before.state)
            y = states + self.omega.to(wide.dtype) * wide
            if back:
                backwards, ends = context.reversed_marks()
                y = y + run(wide.flip(1), back[0], backwards, ends, None).flip(1)
            if real is not None:
                y = y.masked_fill(~real[..., None], 0)
            y = self.activation(y).to(x.dtype)
        if before is None:
            return y, None, None
        return y, states[:, -1], functools.partial(_replayed, tuple(table.detach() for table in tables))


register_recurrence(NAME, RGLRU)
