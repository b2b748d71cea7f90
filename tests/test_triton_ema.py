"""The EMA scan kernels against the token-by-token specification; on a CPU they run under Triton's interpreter."""

import pytest
import torch
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat import triton_ema_seqboat
from modeling_seqboat.ops_naive_seqboat import ema_scan_naive
from modeling_seqboat.triton_ema_seqboat import ema_scan_triton

PARAMETERS = ("x", "decay", "input_gain", "output_gain", "skip", "state", "delayed", "delay_decay")


@pytest.fixture(autouse=True)
def _many_chunks_of_poisoned_memory(monkeypatch):
    """Chunks of 16 tokens, and NaN in everything a kernel ought to write."""
    monkeypatch.setattr(triton_ema_seqboat, "_CHUNKS", ((1 << 30, 16),))
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def draw(shape, *, dtype=torch.float32, marks="", seed=0):
    """Inputs of (B, L, D, N); `marks` names optional ones by letter: s state, d delayed, o no skip, p pads (left,
    right and interior), r resets."""
    batch, length, width, states = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    inputs = {
        "x": randn(batch, length, width).to(dtype),
        "decay": torch.rand(width, states, generator=generator),
        "input_gain": randn(width, states),
        "output_gain": randn(width, states) / states**0.5,
        "skip": None if "o" in marks else randn(width),
        "state": randn(batch, width, states) if "s" in marks else None,
        "delayed": randn(batch, length, width).to(dtype) if "d" in marks else None,
        "delay_decay": torch.rand(width, states, generator=generator) if "d" in marks else None,
        "real": None,
        "reset": None,
    }
    if "p" in marks:
        real = torch.rand(batch, length, generator=generator) < 0.8
        real[0, : length // 3] = False
        real[-1, length - length // 3 :] = False
        inputs["real"] = real
    if "r" in marks:
        inputs["reset"] = torch.rand(batch, length, generator=generator) < 0.1
    return inputs


def backward(results, grads, from_state):
    """From both results, or from y alone as in training."""
    count = 2 if from_state else 1
    torch.autograd.backward(results[:count], grads[:count])


def run_reference(inputs, grads, *, reverse=False, silu=False, from_state=True):
    """Outputs and gradients in float64."""
    leaves = {name: None if inputs[name] is None else inputs[name].double().requires_grad_() for name in PARAMETERS}
    along = {name: inputs[name] for name in ("real", "reset")} | {name: leaves[name] for name in ("x", "delayed")}
    if reverse:
        along = {name: None if tensor is None else tensor.flip(1) for name, tensor in along.items()}
    rest = {name: leaves[name] for name in PARAMETERS if name not in along}
    y, state = ema_scan_naive(**along, **rest)
    y = y.flip(1) if reverse else y
    y = torch.nn.functional.silu(y) if silu else y
    backward([y, state], [grads[0].double(), grads[1].double()], from_state)
    return [y, state] + [None if leaves[name] is None else leaves[name].grad for name in PARAMETERS]


def run_kernel(inputs, grads, *, reverse=False, silu=False, from_state=True):
    """The same from the kernels, with NaN under every pad."""
    leaves = {name: None if tensor is None else tensor.clone() for name, tensor in inputs.items()}
    grad_y = grads[0].clone()
    if inputs["real"] is not None:
        for tensor in (leaves["x"], leaves["delayed"], grad_y):
            if tensor is not None:
                tensor[~inputs["real"]] = float("nan")
    leaves = {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in leaves.items()}
    for name in PARAMETERS:
        if leaves[name] is not None:
            leaves[name].requires_grad_()
    y, state = ema_scan_triton(**leaves, reverse=reverse, activation="silu" if silu else None)
    backward([y, state], [grad_y.to(DEVICE), grads[1].to(DEVICE)], from_state)
    assert y.dtype == inputs["x"].dtype and state.dtype == torch.float32
    gradients = [None if leaves[name] is None else leaves[name].grad for name in PARAMETERS]
    return [None if tensor is None else tensor.cpu() for tensor in (y.detach(), state.detach(), *gradients)]


def compare(inputs, shape, *, tolerance=2e-6, **options):
    batch, length, width, states = shape
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(batch, length, width, generator=generator).to(inputs["x"].dtype)]
    grads.append(torch.randn(batch, width, states, generator=generator))
    expected = run_reference(inputs, grads, **options)
    found = run_kernel(inputs, grads, **options)
    for name, a, b in zip(("y", "final state", *PARAMETERS), found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            error = (a.double() - b).norm() / b.norm().clamp_min(1e-12)
            assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("shape", "marks"),
    [
        ((2, 1, 5, 1), "s"),
        ((2, 1, 5, 4), "sdpr"),
        ((1, 5, 70, 4), ""),
        ((2, 5, 24, 12), "or"),
        ((1, 63, 5, 16), "p"),
        ((1, 64, 40, 4), "s"),
        ((1, 65, 24, 4), "sr"),
        ((2, 34, 24, 16), "spr"),
        ((1, 40, 5, 16), "sdp"),
        ((1, 40, 24, 1), "od"),
    ],
)
def test_equals_the_specification(shape, marks):
    compare(draw(shape, marks=marks), shape)


@pytest.mark.parametrize("marks", ["", "s", "do", "p", "sr"])
def test_gradients_of_the_outputs_alone(marks):
    shape = (2, 37, 5, 4)
    compare(draw(shape, marks=marks), shape, from_state=False)


@pytest.mark.parametrize("marks", ["", "sdpr"])
@pytest.mark.parametrize("options", [{"silu": True}, {"reverse": True}, {"reverse": True, "silu": True}])
def test_activation_and_reverse(marks, options):
    shape = (1, 21, 5, 4)
    compare(draw(shape, marks=marks), shape, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_rounds_inputs_and_outputs_only(dtype, tolerance):
    shape = (1, 21, 5, 4)
    inputs = draw(shape, dtype=dtype, marks="sdpr")
    compare(inputs, shape, tolerance=tolerance, silu=True)
    parameters = {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in inputs.items()}
    state = ema_scan_triton(**parameters)[1]
    wide = {name: parameters[name].float() for name in ("x", "delayed")}
    assert torch.equal(state, ema_scan_triton(**(parameters | wide))[1])


def test_long_rows_with_chunks_from_the_table(monkeypatch):
    monkeypatch.undo()
    shape = (1, 500, 5, 16)
    compare(draw(shape), shape)


@pytest.mark.parametrize("decay", [0.0, 1 - 6e-8, 1.0])
def test_extreme_decay(decay):
    shape = (1, 37, 5, 4)
    inputs = draw(shape, marks="s")
    inputs["decay"].fill_(decay)
    compare(inputs, shape, tolerance=1e-5)
    compare(inputs, shape, tolerance=1e-5, from_state=False)


def test_gains_of_zero_keep_the_state_and_every_gradient():
    shape = (1, 20, 5, 4)
    inputs = draw(shape, marks="s")
    for name in ("input_gain", "output_gain"):
        inputs[name][:, ::2] = 0
        inputs[name][0] = 0
    compare(inputs, shape)
    compare(inputs, shape, from_state=False)


def test_any_split_gives_the_same_outputs_and_state():
    inputs = draw((2, 36, 5, 4), marks="pr")
    inputs = {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in inputs.items()}
    whole, final = ema_scan_triton(**inputs)
    for cuts in ([0, 1, 36], [0, 17, 18, 36]):
        state, pieces = None, []
        for start, end in zip(cuts, cuts[1:], strict=False):
            part = {name: inputs[name][:, start:end] for name in ("x", "real", "reset")}
            y, state = ema_scan_triton(**(inputs | part | {"state": state}))
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state, final, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_batch_mates_and_runs_repeat_bit_for_bit():
    shape = (2, 20, 5, 4)
    inputs = {name: None if t is None else t.to(DEVICE) for name, t in draw(shape, marks="spr").items()}
    y, state = ema_scan_triton(**inputs)
    again = ema_scan_triton(**inputs)
    assert torch.equal(y, again[0]) and torch.equal(state, again[1])
    for row in range(2):
        alone = {name: inputs[name][row : row + 1] for name in ("x", "real", "reset", "state")}
        y_alone, state_alone = ema_scan_triton(**(inputs | alone))
        assert torch.equal(y_alone[0], y[row]) and torch.equal(state_alone[0], state[row])


def test_a_gradient_of_one_output_alone():
    shape = (1, 20, 5, 4)
    for wanted in (0, 1):
        leaves = {name: None if t is None else t.to(DEVICE) for name, t in draw(shape).items()}
        leaves["x"].requires_grad_()
        results = ema_scan_triton(**leaves)
        results[wanted].sum().backward()
        reference = {name: None if t is None else t.double() for name, t in draw(shape).items()}
        reference["x"].requires_grad_()
        ema_scan_naive(**reference)[wanted].sum().backward()
        torch.testing.assert_close(leaves["x"].grad.cpu(), reference["x"].grad.float(), atol=1e-5, rtol=1e-5)


def test_no_tokens():
    inputs = {name: None if t is None else t.to(DEVICE) for name, t in draw((2, 0, 5, 4), marks="s").items()}
    y, state = ema_scan_triton(**inputs)
    assert y.shape == (2, 0, 5) and torch.equal(state, inputs["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.ones(4, 4)}, r"decay has shape \(4, 4\), expected \(5, 4\)"),
        ({"state": torch.ones(2, 5, 4).double()}, "state is torch.float64, expected torch.float32"),
        ({"real": torch.ones(2, 7)}, "real is torch.float32, expected torch.bool"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"delay_decay": torch.ones(5, 4)}, "go together"),
        ({"x": torch.ones(7, 5)}, r"expected \(B, L, D\)"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    inputs = draw((2, 7, 5, 4)) | change
    inputs = {name: t.to(DEVICE) if torch.is_tensor(t) else t for name, t in inputs.items()}
    with pytest.raises(ValueError, match=message):
        ema_scan_triton(**inputs)


class Relay:
    """Hands over a state and a gradient that are known, and keeps what it is given."""

    def __init__(self, state, grad):
        self.state, self.grad = state, grad

    def forward(self, state):
        self.given = state
        return self.state

    def backward(self, grad):
        self.given_back = grad
        return self.grad


@pytest.mark.parametrize(("length", "marks", "silu"), [(9, "", False), (20, "", True), (34, "pr", False)])
def test_a_relay_in_place_of_a_state(length, marks, silu):
    """It is given what these columns alone make of state and gradient, and outputs and gradients are those of a scan
    with the state and with the gradient of the last state that it gives."""
    inputs = draw((2, length, 5, 3), marks=marks)
    state, final_grad, grad = (torch.randn(size, device=DEVICE) for size in ((2, 5, 3), (2, 5, 3), (2, length, 5)))
    names = [name for name in PARAMETERS if inputs[name] is not None]

    def run(relay=None, state=None, final_grad=None):
        leaves = {name: inputs[name].to(DEVICE).requires_grad_() for name in names}
        flags = {name: None if inputs[name] is None else inputs[name].to(DEVICE) for name in ("real", "reset")}
        given = {} if state is None else {"state": state.clone().requires_grad_()}
        y, final = ema_scan_triton(**leaves, **flags, **given, relay=relay, activation="silu" if silu else None)
        (y * grad).sum().backward(retain_graph=True)
        if final_grad is not None:
            final.backward(final_grad)
        return y, final, [leaves[name].grad for name in names], *(tensor.grad for tensor in given.values())

    relay = Relay(state, final_grad)
    found, expected = run(relay), run(state=state, final_grad=final_grad)
    for a, b in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(relay.given, run()[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(relay.given_back, run(state=state)[3], atol=1e-5, rtol=1e-4)


def test_nan_reaches_no_token_before_it_no_other_row_and_no_other_segment():
    inputs = draw((2, 70, 5, 3))
    inputs["reset"] = torch.zeros(2, 70, dtype=torch.bool)
    inputs["reset"][:, 37] = True
    found = []
    for value in (0.5, torch.nan):
        inputs["x"] = inputs["x"].detach().clone()
        inputs["x"][0, 20] = value
        tensors = {name: None if t is None else t.to(DEVICE).requires_grad_(name == "x") for name, t in inputs.items()}
        y, state = ema_scan_triton(**tensors)
        (gradient,) = torch.autograd.grad(y[:, 37:].sum() + state.sum(), tensors["x"])
        found.append((y, state, gradient))
    (y, state, gradient), (with_nan, its_state, its_gradient) = found
    assert not with_nan[0, 20:37].isfinite().any()
    for expected, got in ((y, with_nan), (gradient, its_gradient)):
        assert torch.equal(got[0, :20], expected[0, :20]) and torch.equal(got[0, 37:], expected[0, 37:])
        assert torch.equal(got[1], expected[1])
    assert torch.equal(its_state, state)
