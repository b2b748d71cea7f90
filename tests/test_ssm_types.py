"""S4D and S5 recurrences: their specification, their stability, and all that holds for the EMA."""

import math

import invariants
import pytest
import torch
from helpers import tiny_config, tiny_encoder, tiny_lm, token_ids
from test_ops_ssm import assert_equal_results, run_scan

from modeling_seqboat import SeqBoatCache, SeqBoatForCausalLM
from modeling_seqboat.diagonal_seqboat import s4d_scan, s5_scan, zero_order_hold
from modeling_seqboat.flops_seqboat import layer_flops
from modeling_seqboat.ops_naive_seqboat import s4d_scan_naive, s5_scan_naive

KINDS = ("s4d", "s5")
SCANS = {"s4d": (s4d_scan, s4d_scan_naive), "s5": (s5_scan, s5_scan_naive)}
BATCH, WIDTH, STATES = 3, 4, 3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def scan_inputs(kind, length, dtype, *, pads=False, resets=False, seed=0):
    """Arguments by name, of which `run_scan` calls the logarithm of the decay `decay`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    states = (WIDTH, STATES) if kind == "s4d" else (STATES,)
    real_part = -0.3 * torch.rand(states, generator=generator, dtype=dtype)
    leaves = {
        "x": randn(BATCH, length, WIDTH),
        "decay": torch.stack([real_part, 2 * randn(*states)], dim=-1),
        "input_gain": randn(*(states if kind == "s4d" else (STATES, WIDTH)), 2),
        "output_gain": randn(WIDTH, STATES, 2),
        "skip": randn(WIDTH),
        "state": randn(BATCH, *states, 2),
    }
    marks = {}
    if pads:
        marks["real"] = torch.rand(BATCH, length, generator=generator) > 0.35
        marks["real"][0] = True
        marks["real"][1, : length // 2] = False
        marks["real"][2] = False
    if resets:
        marks["reset"] = torch.rand(BATCH, length, generator=generator) < 0.08
        marks["reset"][0, 0] = True
    return leaves, marks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("length", [1, 2, 64, 65, 300])
@pytest.mark.parametrize("marked", [{}, {"pads": True}, {"resets": True}, {"pads": True, "resets": True}], ids=str)
def test_scan_equals_the_loop(kind, dtype, length, marked):
    leaves, marks = scan_inputs(kind, length, dtype, **marked)
    found, expected = (run_scan(op, leaves, marks, None) for op in SCANS[kind])
    assert_equal_results(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 130])
def test_nothing_is_read_under_pads(kind, length):
    leaves, marks = scan_inputs(kind, length, torch.float32, pads=True, resets=True)
    found = [run_scan(SCANS[kind][0], leaves, marks, None, fill) for fill in (0.0, float("nan"))]
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor) and tensor.isfinite().all(), name
    torch.testing.assert_close(found[0]["state"][2], leaves["state"][2], atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [1, 30, 64, 100])
def test_state_continues_a_scan(kind, split):
    leaves, marks = scan_inputs(kind, 130, torch.float64, pads=True, resets=True)
    gains = [leaves[name] for name in ("decay", "input_gain", "output_gain", "skip")]
    state, ys = leaves["state"], []
    for part in (slice(0, split), slice(split, 130)):
        cut = {name: mark[:, part] for name, mark in marks.items()}
        y, state = SCANS[kind][0](leaves["x"][:, part], *gains, **cut, state=state)
        ys.append(y)
    whole = run_scan(SCANS[kind][1], leaves, marks, None)
    torch.testing.assert_close(torch.cat(ys, dim=1), whole["y"])
    torch.testing.assert_close(state, whole["state"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_a_float32_state(kind, dtype):
    leaves, _ = scan_inputs(kind, 130, torch.float32)
    gains = [leaves[name] for name in ("decay", "input_gain", "output_gain", "skip")]
    x = leaves["x"].to(dtype).requires_grad_()
    y, state = SCANS[kind][0](x, *gains)
    expected, final = SCANS[kind][0](x.float(), *gains)
    assert y.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(state, final)
    torch.testing.assert_close(y, expected.to(dtype), atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(expected.sum(), x)
    (exact,) = torch.autograd.grad(SCANS[kind][0](x.float(), *gains)[0].sum(), x)
    assert torch.equal(gradient, exact)


def test_zero_order_hold_is_the_matrix_exponential():
    """exp(z) and (exp(z) - 1) / a by complex arithmetic, for steps small and large."""
    log_step = torch.linspace(-18, 2, 40, dtype=torch.float64)[:, None]
    log_rate = torch.linspace(-8, 3, 7, dtype=torch.float64)
    frequency = torch.tensor([0.0, 1e-6, 0.5, math.pi, 50.0, -3.0, 1e3], dtype=torch.float64)
    log_decay, gain = zero_order_hold(log_step, log_rate, frequency)
    a = torch.complex(-log_rate.exp(), frequency)
    z = log_step.exp() * a
    torch.testing.assert_close(torch.view_as_complex(log_decay), z)
    # The textbook formula loses digits where z is small; the series does not.
    exact = torch.where(z.abs() < 1e-3, log_step.exp() * (1 + z / 2 + z**2 / 6 + z**3 / 24), (z.exp() - 1) / a)
    torch.testing.assert_close(torch.view_as_complex(gain), exact, rtol=1e-8, atol=0)
    single = zero_order_hold(log_step.float(), log_rate.float(), frequency.float())[1]
    torch.testing.assert_close(torch.view_as_complex(single).to(exact.dtype), exact, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_extreme_parameters_stay_finite_and_stable(kind, value):
    model = tiny_lm(ssm_type=kind).train()
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in (layer.ssm.log_step, layer.ssm.log_rate, layer.ssm.frequency):
                parameter.fill_(value)
    log_decay = model.model.layers[0].ssm.gains()[0]
    assert (log_decay[..., 0] <= 0).all()
    ids = token_ids(2, 300)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_initial_recurrence_is_s4d_lin(kind):
    ssm = SeqBoatForCausalLM(tiny_config(ssm_type=kind, state_size=5)).model.layers[0].ssm
    step = ssm.log_step.exp()
    assert 1e-3 <= step.min() and step.max() <= 0.1 + 1e-6
    step = step if kind == "s5" else step[:, None]
    log_decay = ssm.gains()[0]
    torch.testing.assert_close(log_decay[..., 0], (-step / 2).expand_as(log_decay[..., 0]))
    torch.testing.assert_close(log_decay[..., 1], (step * math.pi * torch.arange(5.0)).expand_as(log_decay[..., 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_state_size_means_nearly_the_same_parameters(kind):
    def count(ssm_type):
        config = tiny_config(ssm_type=ssm_type, hidden_size=64, state_size=16)
        return sum(p.numel() for p in SeqBoatForCausalLM(config).model.layers[0].ssm.parameters())

    assert count(kind) == pytest.approx(count("ema"), rel=0.03)


CAUSAL = [getattr(invariants, f"check_{name}") for name in (
    "padding", "batch_mates", "packing", "chunks", "causality", "gradients", "rollback", "generation",
)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CAUSAL, ids=lambda check: check.__name__)
def test_what_holds_for_the_ema_holds(kind, check):
    check(tiny_lm(ssm_type=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_decode_step_is_one_graph(kind):
    # A second layer doubles the time of a trace and is run as the first.
    invariants.check_compiled_step(tiny_lm(ssm_type=kind, num_hidden_layers=1))


@pytest.mark.parametrize("kind", KINDS)
def test_encoders(kind):
    model = tiny_encoder(ssm_type=kind)
    invariants.check_encoder(model)
    invariants.check_gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_model_and_cache_survive_a_file(kind, tmp_path):
    model = tiny_lm(ssm_type=kind)
    invariants.check_files(model, tmp_path)
    shape = {"s4d": (2, 12, 3, 2), "s5": (2, 3, 2)}[kind]
    assert SeqBoatCache.load(tmp_path / "state.safetensors", model.config).layers[0].ssm_state.shape == shape
    other = tiny_lm(ssm_type="ema")
    with pytest.raises(ValueError, match=f"ssm_type is '{kind}'"):
        SeqBoatCache.load(tmp_path / "state.safetensors", other.config)
    with pytest.raises(ValueError, match=f"ssm_type is '{kind}'"):
        other(token_ids(2, 1), past_key_values=model(token_ids(2, 4)).past_key_values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(kind, dtype):
    model, ids = tiny_lm(ssm_type=kind).to(dtype), token_ids(2, 70)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    layer = model(ids, use_cache=True).past_key_values.layers[0]
    assert layer.ssm_state.dtype == torch.float32 and layer.keys.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    ids, gradients = token_ids(2, 70), []
    for checkpointing in (False, True):
        model = tiny_lm(ssm_type=kind, hidden_dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_training_learns(kind):
    torch.manual_seed(0)
    model = SeqBoatForCausalLM(tiny_config(ssm_type=kind, hidden_size=24)).train()
    ids = torch.arange(40).remainder(7)[None] + 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_go_together_is_refused(kind, monkeypatch):
    with pytest.raises(ValueError, match=f"ssm_truncation=8 contradicts ssm_type='{kind}'"):
        tiny_config(ssm_type=kind, ssm_truncation=8)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=f"cannot run {kind}_scan: the recurrence of ssm_type='{kind}' has no kernel"):
        tiny_lm(ssm_type=kind, kernel_backend="triton")(token_ids(1, 5))


def test_flops_of_the_recurrences():
    width, states = 12, 3
    for directions in (1, 2):
        for kind, per_token in (("s4d", 14 * states * width), ("s5", 8 * states * width + 6 * states)):
            config = tiny_config(ssm_type=kind, bidirectional=directions == 2)
            assert layer_flops(config, 7, 0, 0).ssm == 7 * (directions * per_token + 2 * width)
