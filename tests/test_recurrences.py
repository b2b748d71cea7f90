"""A recurrence of one's own: what the protocol asks for is enough for batches, packing, chunks and rollback, also
where gates depend on the input, as in no recurrence of the package."""

import functools

import invariants
import pytest
import torch
from helpers import tiny_config, tiny_lm
from torch import nn

from modeling_seqboat import configuration_seqboat, ssm_seqboat
from modeling_seqboat.flops_seqboat import layer_flops
from modeling_seqboat.ssm_seqboat import Recurrence, register_recurrence


def gated_average(gate, x, real, reset, state, history=None):
    """s_t = a_t*s_{t-1} + (1 - a_t)*x_t with a_t = sigmoid(gate*x_t), column by column; y_t = s_t, and the last
    state."""
    ys, wide = [], x.to(state.dtype)
    for t in range(x.shape[1]):
        is_real = torch.ones_like(x[:, t, :1], dtype=torch.bool) if real is None else real[:, t, None]
        before = state if reset is None else torch.where(reset[:, t, None] & is_real, 0, state)
        token = torch.where(is_real, wide[:, t], 0)
        keep = torch.sigmoid(gate * token)
        state = torch.where(is_real, keep * before + (1 - keep) * token, state)
        ys.append(torch.where(is_real, state, 0))
    return torch.stack(ys, dim=1).to(x.dtype), state


def replayed(gate, *columns):
    return gated_average(gate, *columns)[1]


class GatedAverage(Recurrence):
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.empty(config.hidden_size))

    @staticmethod
    def state_shape(config):
        return (config.hidden_size,)

    @staticmethod
    def flops(config):
        return 5 * config.hidden_size

    @torch.no_grad()
    def draw_initial_values(self):
        self.gate.normal_()

    def forward(self, x, context, before=None):
        empty = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
        state = empty if before is None else before.state
        y, state = gated_average(self.gate, x, context.real, context.reset, state)
        y = self.activation(y)
        if before is None:
            return y, None, None
        return y, state, functools.partial(replayed, self.gate.detach())


@pytest.fixture(autouse=True)
def registered():
    register_recurrence("gated_average", GatedAverage)
    yield
    del ssm_seqboat.RECURRENCES["gated_average"]
    configuration_seqboat.SSM_TYPES.remove("gated_average")


@pytest.mark.parametrize("check", invariants.OF_A_RECURRENCE, ids=lambda check: check.__name__)
def test_what_holds_for_the_ema_holds(check):
    check(tiny_lm(ssm_type="gated_average"))


def test_files_and_flops(tmp_path):
    model = tiny_lm(ssm_type="gated_average")
    invariants.check_files(model, tmp_path)
    assert layer_flops(model.config, 7, 0, 0).ssm == 7 * (5 * 12 + 2 * 12)


def test_an_unregistered_name_is_refused():
    with pytest.raises(ValueError, match="'gated_average', 'ema', 's4d', 's5'|must be one of .*'gated_average'"):
        tiny_config(ssm_type="gated_averages")
