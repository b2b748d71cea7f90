"""The recurrence of examples/experiments/rglru.py: its definition, its scan against the loop, and all that the
protocol promises of a recurrence."""

import importlib
import sys
from pathlib import Path

import invariants
import pytest
import torch
from helpers import tiny_config, tiny_encoder, tiny_lm, token_ids

from modeling_seqboat import SeqBoatForCausalLM, configuration_seqboat, ssm_seqboat

FOLDER = Path(__file__).resolve().parent.parent / "examples/experiments"


@pytest.fixture(scope="module", autouse=True)
def rglru():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("rglru")
    sys.path[:] = before
    del sys.modules["rglru"], ssm_seqboat.RECURRENCES["rglru"]
    configuration_seqboat.SSM_TYPES.remove("rglru")


def scan_inputs(length, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.rand(2, length, 5, generator=generator, dtype=dtype)
    # A start, and a pad.
    decay[0, length // 2], decay[1, length // 3] = 0, 1
    added = torch.randn(2, length, 5, generator=generator, dtype=dtype)
    state = torch.randn(2, 5, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (decay, added, state)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 63, 64, 65, 500])
def test_scan_equals_the_loop(rglru, length, dtype):
    """States, and the gradients of all three inputs."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    inputs = scan_inputs(length, dtype)
    found, expected = (scan(*inputs) for scan in (rglru.gated_scan, rglru.gated_scan_naive))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    grads = [torch.autograd.grad((states * weights).sum(), inputs) for states in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_layer_is_what_the_paper_writes(rglru):
    """Equations 1 to 4 of arXiv 2402.19427, token by token, with whole matrices in place of blocks."""
    config = tiny_config(ssm_type="rglru")
    layer = rglru.RGLRU(config).double()
    layer.draw_initial_values()
    torch.nn.init.normal_(layer.recurrence_bias)
    torch.nn.init.normal_(layer.input_bias)
    width, block = config.hidden_size, rglru.block_width(config)
    assert width % block == 0 and block <= 2 * config.state_size and len(layer.input_gate) == width // block
    a = torch.sigmoid(layer.decay)
    assert (a**8).min() >= 0.9 - 1e-6 and (a**8).max() <= 0.999 + 1e-6
    gate, entrance = (torch.block_diag(*blocks) for blocks in (layer.recurrence_gate, layer.input_gate))
    x = torch.randn(2, 9, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, expected = torch.zeros(2, width, dtype=torch.float64), []
    for token in x.unbind(1):
        decay = a ** (8 * torch.sigmoid(token @ gate + layer.recurrence_bias))
        state = decay * state + (1 - decay**2).sqrt() * torch.sigmoid(token @ entrance + layer.input_bias) * token
        expected.append(state)
    tables = layer._tables()[0]
    torch.testing.assert_close(rglru.run(x, tables, None, None, None), torch.stack(expected, 1))


@pytest.mark.parametrize("check", invariants.OF_A_RECURRENCE, ids=lambda check: check.__name__)
def test_what_holds_for_the_ema_holds(check):
    check(tiny_lm(ssm_type="rglru"))


def test_encoders_and_files(tmp_path):
    invariants.check_encoder(tiny_encoder(ssm_type="rglru"))
    invariants.check_files(tiny_lm(ssm_type="rglru"), tmp_path)


@pytest.mark.parametrize("decay", [-80.0, 80.0])
def test_extreme_parameters_stay_finite(rglru, decay):
    """P12, with tokens so large that the gates are shut or open."""
    model = tiny_lm(ssm_type="rglru").train()
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.ssm.decay, decay)
        torch.nn.init.constant_(layer.ssm.recurrence_bias, -200.0)
    ids = token_ids(2, 40)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_parameters_are_about_those_of_the_ema(rglru):
    sizes = {}
    with torch.device("meta"):
        for name in ("ema", "rglru"):
            config = tiny_config(ssm_type=name, hidden_size=616, state_size=16)
            sizes[name] = sum(
                parameter.numel() for parameter in SeqBoatForCausalLM(config).model.layers[0].ssm.parameters()
            )
    assert sizes["rglru"] == pytest.approx(sizes["ema"], rel=0.1)
