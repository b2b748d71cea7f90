"""The chunked EMA scan equals the loop over tokens: outputs, state and every gradient."""

import pytest
import torch

from modeling_seqboat.ops_ema_seqboat import ema_parameters, ema_scan
from modeling_seqboat.ops_layout_seqboat import last_real_tokens, shift_real_tokens
from modeling_seqboat.ops_naive_seqboat import ema_scan_naive

BATCH, WIDTH, STATES = 3, 4, 3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def scan_inputs(length, dtype, *, truncation=None, with_state=False, pads=False, resets=False, skip=True, seed=0):
    """Arguments of `ema_scan` by name, the differentiable ones as leaves, and the marks."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    leaves = {
        "x": randn(BATCH, length, WIDTH),
        "decay": torch.rand(WIDTH, STATES, generator=generator, dtype=dtype) * 0.98 + 0.01,
        "input_gain": randn(WIDTH, STATES),
        "output_gain": randn(WIDTH, STATES),
    }
    if skip:
        leaves["skip"] = randn(WIDTH)
    if with_state:
        leaves["state"] = randn(BATCH, WIDTH, STATES)
    if truncation is not None:
        leaves["history"] = (
            randn(BATCH, truncation, WIDTH) if with_state else leaves["x"].new_zeros(BATCH, truncation, WIDTH)
        )
    marks = {}
    if pads:
        marks["real"] = torch.rand(BATCH, length, generator=generator) > 0.35
        marks["real"][0] = True
        marks["real"][1, : length // 2] = False
    if resets:
        marks["reset"] = torch.rand(BATCH, length, generator=generator) < 0.08
        marks["reset"][0, 0] = True
    return leaves, marks


def run_scan(op, leaves, marks, truncation, fill=None):
    """Outputs, final state and gradients of a scalar that reads both."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    arguments = dict(leaves)
    history = arguments.pop("history", None)
    x = arguments.pop("x")
    if fill is not None:
        x = x.masked_fill(~marks["real"][..., None], fill)
    if truncation is not None:
        arguments["delayed"] = shift_real_tokens(x, truncation, marks.get("real"), marks.get("reset"), history)
        arguments["delay_decay"] = arguments["decay"] ** truncation
    skip = arguments.pop("skip", None)
    gains = [arguments.pop(name) for name in ("decay", "input_gain", "output_gain")]
    y, state = op(x, *gains, skip, **marks, **arguments)
    generator = torch.Generator().manual_seed(1)
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in (y, state))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {"y": y, "state": state} | {f"grad of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_equal_results(found, expected, tolerance):
    for name, tensor in expected.items():
        # The history only reaches outputs through truncation taps that a segment start may cut off.
        if tensor is None or found[name] is None:
            assert all(item is None or not item.any() for item in (tensor, found[name])), name
            continue
        scale = max(1.0, float(tensor.detach().abs().max())) if tensor.numel() else 1.0
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance * scale, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"with_state": True, "skip": False},
        {"pads": True, "with_state": True},
        {"resets": True, "with_state": True},
        {"pads": True, "resets": True, "with_state": True, "truncation": 5},
        {"truncation": 70, "with_state": True},
    ],
    ids=["plain", "state", "pads", "resets", "all-truncated", "long-truncation"],
)
def test_scan_equals_the_loop(options, length, dtype):
    if dtype == torch.float32 and length in (2, 63):
        pytest.skip("covered in float64")
    truncation = options.get("truncation")
    leaves, marks = scan_inputs(length, dtype, **options)
    expected = run_scan(ema_scan_naive, leaves, marks, truncation)
    assert_equal_results(run_scan(ema_scan, leaves, marks, truncation), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("truncation", [None, 5])
@pytest.mark.parametrize("length", [1, 130])
def test_nothing_is_read_under_pads(length, truncation):
    leaves, marks = scan_inputs(length, torch.float32, pads=True, resets=True, with_state=True, truncation=truncation)
    found = [run_scan(ema_scan, leaves, marks, truncation, fill) for fill in (0.0, float("nan"))]
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
        assert tensor.isfinite().all(), name
    assert torch.equal(found[1]["y"][~marks["real"]], torch.zeros(int((~marks["real"]).sum()), WIDTH))


@pytest.mark.parametrize("split", [1, 4, 30, 64, 100])
def test_state_continues_a_scan(split):
    leaves, marks = scan_inputs(130, torch.float64, pads=True, resets=True, truncation=7)
    gains = [leaves[name] for name in ("decay", "input_gain", "output_gain", "skip")]
    state, history, ys = None, leaves["history"], []
    for part in (slice(0, split), slice(split, 130)):
        x, cut = leaves["x"][:, part], {name: mark[:, part] for name, mark in marks.items()}
        delayed = shift_real_tokens(x, 7, cut["real"], cut["reset"], history)
        needed = shift_real_tokens(x, 7, cut["real"], cut["reset"], history[:, : x.shape[1]])
        assert torch.equal(needed, delayed)
        y, state = ema_scan(x, *gains, **cut, state=state, delayed=delayed, delay_decay=leaves["decay"] ** 7)
        history = last_real_tokens(x, 7, cut["real"], cut["reset"], history)
        ys.append(y)
    whole = run_scan(ema_scan_naive, leaves, marks, 7)
    torch.testing.assert_close(torch.cat(ys, dim=1), whole["y"])
    torch.testing.assert_close(state, whole["state"])


@pytest.mark.parametrize("taps", [1, 3, 64, 90])
def test_truncation_cuts_the_kernel(taps):
    """y equals the convolution with the first T taps of k[l] = sum_n o_n g_n q_n^l."""
    leaves, _ = scan_inputs(100, torch.float64, truncation=taps)
    decay, gain, out = leaves["decay"], leaves["input_gain"], leaves["output_gain"]
    kernel = torch.einsum("dn,dnl->dl", out * gain, decay[..., None] ** torch.arange(taps))
    padded = torch.nn.functional.pad(leaves["x"], (0, 0, taps - 1, 0)).transpose(1, 2)
    expected = torch.nn.functional.conv1d(padded, kernel.flip(-1)[:, None], groups=WIDTH).transpose(1, 2)
    found = run_scan(ema_scan, leaves, {}, taps)["y"] - leaves["skip"] * leaves["x"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [-1e4, -30.0, 30.0, 1e4])
@pytest.mark.parametrize("length", [1, 65, 300])
@pytest.mark.parametrize("truncation", [None, 16])
def test_extreme_decays_stay_finite(value, length, truncation):
    leaves, _ = scan_inputs(length, torch.float32, with_state=True, truncation=truncation)
    parameters = {
        "delta": torch.full((WIDTH, STATES, 1), value),
        "alpha": torch.full((WIDTH, STATES, 1), value),
        "beta": torch.ones(WIDTH, STATES, 1),
        "gamma": torch.ones(WIDTH, STATES),
    }
    for tensor in parameters.values():
        tensor.requires_grad_()
    decay, gain, out = ema_parameters(*parameters.values())
    delay = {}
    if truncation is not None:
        delay = {
            "delayed": shift_real_tokens(leaves["x"], truncation, None, None, None),
            "delay_decay": decay**truncation,
        }
    y, state = ema_scan(leaves["x"], decay, gain, out, leaves["skip"], state=leaves["state"], **delay)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and state.isfinite().all()
    for name, tensor in parameters.items():
        assert tensor.grad.isfinite().all(), name


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decays_of_zero_and_one(decay):
    leaves, marks = scan_inputs(150, torch.float32, resets=True, with_state=True)
    leaves["decay"] = torch.full((WIDTH, STATES), decay)
    found, expected = (run_scan(op, leaves, marks, None) for op in (ema_scan, ema_scan_naive))
    for name in ("y", "state", "grad of x", "grad of input_gain", "grad of state"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-4)
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_a_float32_state(dtype):
    leaves, _ = scan_inputs(130, torch.float32)
    gains = [leaves[name] for name in ("decay", "input_gain", "output_gain", "skip")]
    x = leaves["x"].to(dtype)
    y, state = ema_scan(x, *gains)
    expected, final = ema_scan(x.float(), *gains)
    assert y.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(state, final, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y, expected.to(dtype), atol=1e-2, rtol=1e-2)


def test_a_row_of_pads_keeps_its_state():
    leaves, marks = scan_inputs(70, torch.float32, pads=True, resets=True, with_state=True)
    marks["real"][2] = False
    for length in (1, 70):
        x, cut = leaves["x"][:, :length], {name: mark[:, :length] for name, mark in marks.items()}
        gains = [leaves[name] for name in ("decay", "input_gain", "output_gain", "skip")]
        _, state = ema_scan(x, *gains, **cut, state=leaves["state"])
        torch.testing.assert_close(state[2], leaves["state"][2], atol=0, rtol=0)


def test_no_product_of_backward_copies_its_matrices_one_by_one():
    """A CPU multiplies a batch of matrices whose strides suit it in one call; of others it copies each."""
    width = 256
    x = torch.randn(BATCH, 130, width, requires_grad=True)
    gains = [torch.rand(width, STATES, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile() as profile:
        ema_scan(x, *gains, None)[0].square().sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::bmm"] > 5
    assert counts["aten::clone"] < width
