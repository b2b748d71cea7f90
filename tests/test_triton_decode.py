"""The kernels of one decode step against loops; on a CPU they run under Triton's interpreter."""

import math
from collections import Counter

import pytest
import torch
from small_models import small_lm
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat import SeqBoatCache, triton_decode_seqboat
from modeling_seqboat.ops_attention_seqboat import memory_step
from modeling_seqboat.ops_ema_seqboat import ema_step
from modeling_seqboat.ops_naive_seqboat import ema_scan_naive, windowed_attention_naive
from modeling_seqboat.triton_decode_seqboat import ema_step_triton, memory_step_triton
from modeling_seqboat.triton_launch_seqboat import Kernel


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """NaN in everything a kernel ought to write, a count that nothing has where it is an integer."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 987)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def to_device(inputs):
    return {name: tensor.to(DEVICE) if torch.is_tensor(tensor) else tensor for name, tensor in inputs.items()}


class Memory:
    """A ring of W slots a row, and beside it every activated token ever seen."""

    def __init__(self, batch, size, qk_width, v_width, dtype):
        self.batch, self.size, self.dtype = batch, size, dtype
        self.keys = torch.full((batch, size, qk_width), float("nan"), dtype=dtype, device=DEVICE)
        self.values = torch.full((batch, size, v_width), float("nan"), dtype=dtype, device=DEVICE)
        self.positions = torch.full((batch, size), 999, device=DEVICE)
        self.count = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        self.history = [[] for _ in range(batch)]

    def step(self, q, k, v, active, position, *, bias_by_index, **options):
        """The kernel's output and, in float64 from the history, what it should be."""
        out = memory_step_triton(
            q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), self.keys, self.values, self.positions, self.count,
            active.to(DEVICE), position.to(DEVICE), bias_by_index=bias_by_index, **to_device(options),
        )  # fmt: skip
        expected = torch.zeros(self.batch, v.shape[1], dtype=torch.float64)
        for row in range(self.batch):
            if active[row]:
                self.history[row].append((k[row].double(), v[row].double(), position[row]))
                expected[row] = self.attend(row, q[row].double(), bias_by_index, **options)
        assert self.count.tolist() == [len(history) for history in self.history]
        return out.cpu(), expected

    def attend(self, row, q, bias_by_index, bias_table=None, **options):
        history = self.history[row]
        k, v, positions = (torch.stack(item) for item in zip(*history, strict=True))
        places = torch.arange(len(history)) if bias_by_index else positions
        last = torch.tensor([len(history)])
        table = None if bias_table is None else bias_table.double()
        return windowed_attention_naive(
            q[None], k, v, (last - self.size - 1).clamp_min(0), last, q_place=places[-1:], k_place=places,
            bias_table=table, **options,
        )[0]  # fmt: skip


def run_steps(steps, size, qk_width, v_width, *, dtype=torch.float32, tolerance=2e-6, bias=None, **options):
    batch = 3
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    memory = Memory(batch, size, qk_width, v_width, dtype)
    options |= {"bias_by_index": bias == "index"}
    if bias is not None:  # short enough to be clamped on the left
        options |= {"bias_table": randn(size), "bias_center": size - 2}
    position = torch.zeros(batch, dtype=torch.int64)
    for _ in range(steps):
        position = position + torch.randint(1, 3, (batch,), generator=generator)
        active = torch.rand(batch, generator=generator) < torch.tensor([1.0, 0.5, 0.0])
        kept = memory.keys[2].clone(), memory.values[1].clone(), memory.positions[2].clone()
        inputs = randn(batch, qk_width), randn(batch, qk_width), randn(batch, v_width)
        out, expected = memory.step(*inputs, active, position, **options)
        assert out.dtype == dtype
        error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < tolerance, f"relative error {error:.2e}"
        assert not out[~active].any()
        torch.testing.assert_close(memory.keys[2], kept[0], equal_nan=True, rtol=0, atol=0)
        assert torch.equal(memory.positions[2], kept[2])
        if not active[1]:
            torch.testing.assert_close(memory.values[1], kept[1], equal_nan=True, rtol=0, atol=0)
    for row in range(batch):
        for index, (key, value, place) in list(enumerate(memory.history[row]))[-size:]:
            slot = index % size
            assert torch.equal(memory.keys[row, slot].cpu(), key.to(dtype))
            assert torch.equal(memory.values[row, slot].cpu(), value.to(dtype))
            assert memory.positions[row, slot] == place


@pytest.mark.parametrize("activation", ["softmax", "relu2", "laplace"])
@pytest.mark.parametrize("bias", [None, "position", "index"])
def test_attention_equals_the_specification(activation, bias):
    size = 5
    scale = 1 / math.sqrt(6) if activation == "softmax" else 1 / size
    run_steps(12, size, 6, 10, activation=activation, scale=scale, bias=bias)


def test_attention_over_several_splits_and_value_blocks(monkeypatch):
    monkeypatch.setattr(triton_decode_seqboat, "_SPLITS", ((1 << 31, 4, 8, 2, 4),))
    monkeypatch.setattr(triton_decode_seqboat, "_COMBINE_V", 16)
    for activation in ("softmax", "relu2"):
        run_steps(25, 21, 6, 37, activation=activation, scale=0.3, bias="position")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_attention_in_half_precision(dtype, tolerance):
    run_steps(8, 4, 16, 24, dtype=dtype, tolerance=tolerance, activation="softmax", scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "states", "marks"), [(5, 1, ""), (40, 4, "m"), (24, 12, "mdo"), (70, 16, "ma")])
def test_ema_step_equals_the_specification(width, states, marks, dtype):
    """`marks`: m pads and segment starts, d delayed input, o no skip, a silu."""
    generator = torch.Generator().manual_seed(0)
    batch = 4

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": randn(batch, width).to(dtype),
        "decay": torch.rand(width, states, generator=generator),
        "input_gain": randn(width, states),
        "output_gain": randn(width, states),
        "skip": None if "o" in marks else randn(width).to(dtype),
        "state": randn(batch, width, states),
    }
    if "m" in marks:
        inputs |= {"real": torch.tensor([True, False, True, False]), "reset": torch.tensor([True, True, False, False])}
    if "d" in marks:
        inputs |= {"delayed": randn(batch, width).to(dtype)}
        inputs |= {"delay_decay": torch.rand(width, states, generator=generator)}
    columns = {name: inputs[name][:, None] for name in ("x", "real", "reset", "delayed") if name in inputs}
    y, state = ema_scan_naive(**(inputs | columns))
    if "m" in marks:
        inputs["x"][1] = float("nan")
    found_state = inputs["state"].to(DEVICE)
    activation = "silu" if "a" in marks else None
    found, same = ema_step_triton(**(to_device(inputs | columns) | {"state": found_state, "activation": activation}))
    assert same is found_state
    y = torch.nn.functional.silu(y) if activation else y
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found.cpu(), y, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found_state.cpu(), state, atol=1e-5, rtol=1e-5)


def test_steps_of_a_cut_kernel_forget_what_rounding_left_behind():
    """Both twins: token by token they equal the sum over the last T inputs, and an error in the state is gone after
    T."""
    generator = torch.Generator().manual_seed(0)
    batch, length, width, states, truncation = 3, 30, 5, 3, 6
    x = torch.randn(batch, length, width, generator=generator)
    real = torch.rand(batch, length, generator=generator) < 0.7
    decay, gain, out = (torch.rand(width, states, generator=generator) for _ in range(3))
    found, twin = torch.zeros(2, batch, 2, width, states).unbind(0)
    found, inputs = found.to(DEVICE), [[] for _ in range(batch)]
    for t in range(length):
        reset = real[:, t : t + 1] & torch.tensor([[False], [t == 17], [False]])
        delayed, starts, expected = torch.zeros(batch, 1, width), [], torch.zeros(batch, width)
        for row in range(batch):
            if reset[row]:
                inputs[row] = []
            starts.append([len(inputs[row]) % truncation == 0])
            if real[row, t]:
                delayed[row, 0] = inputs[row][-truncation] if len(inputs[row]) >= truncation else 0
                inputs[row].append(x[row, t])
                for lag, token in enumerate(inputs[row][: -truncation - 1 : -1]):
                    expected[row] += (out * gain * decay**lag).sum(1) * token
        marks = {"real": real[:, t : t + 1], "reset": reset, "block_start": torch.tensor(starts), "delayed": delayed}
        tables = {
            "decay": decay,
            "input_gain": gain,
            "output_gain": out,
            "skip": None,
            "delay_decay": decay**truncation,
        }
        arguments = {"x": x[:, t : t + 1]} | marks | tables
        y, twin = ema_step(**arguments, state=twin)
        got, same = ema_step_triton(**(to_device(arguments) | {"state": found}))
        assert same is found
        torch.testing.assert_close(got.cpu(), y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.cpu(), twin, atol=1e-5, rtol=1e-5)
        settled = torch.tensor([t < 3 or len(inputs[row]) > 2 * truncation for row in range(batch)])
        torch.testing.assert_close(y[settled, 0], expected[settled], atol=1e-5, rtol=1e-5)
        if t == 3:
            twin[:, 0] += 0.5
            found[:, 0] += 0.5


def attention_inputs():
    floats = {"q": (2, 4), "k_new": (2, 4), "v_new": (2, 6), "keys": (2, 3, 4), "values": (2, 3, 6)}
    inputs = {name: torch.randn(shape) for name, shape in floats.items()}
    row = torch.zeros(2, dtype=torch.int64)
    inputs |= {"positions": torch.zeros(2, 3, dtype=torch.int64), "activated_count": row, "position": row}
    return inputs | {"active": torch.ones(2, dtype=torch.bool), "activation": "softmax", "scale": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_new": torch.ones(2, 5)}, r"k_new has shape \(2, 5\), expected \(2, 4\)"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"active": torch.ones(2)}, "active is torch.float32, expected torch.bool"),
        ({"keys": torch.ones(2, 4, 3).transpose(1, 2)}, "keys is written in place and must be contiguous"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        memory_step_triton(**to_device(attention_inputs() | change))


def test_a_wanted_gradient_is_refused():
    inputs = to_device(attention_inputs())
    inputs["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        memory_step_triton(**inputs)
    with torch.no_grad():
        memory_step_triton(**inputs)


@pytest.mark.parametrize("activation", ["softmax", "relu2"])
@pytest.mark.parametrize("bias_by_index", [False, True])
def test_memories_in_pages_are_read_and_written_where_they_lie(activation, bias_by_index):
    """Both twins, on pages that stand apart, equal a step on copies; the other pages stay as they are."""
    generator = torch.Generator().manual_seed(0)
    rows, size, held = 4, 5, 7

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    whole = [randn(held, 2, size, 6), randn(held, 2, size, 10), torch.randint(0, 20, (held, 2, size))]
    pages, active = torch.tensor([5, 0, 6, 2]), torch.tensor([True, True, False, True])
    new = randn(rows, 6), randn(rows, 6), randn(rows, 10)
    counts, positions = torch.tensor([2, 0, 9, 12]), torch.tensor([21, 22, 23, 24])
    options = {"activation": activation, "scale": 0.3, "bias_by_index": bias_by_index}
    options |= {"bias_table": randn(9), "bias_center": 6}
    copies = [ring[pages, 1].clone() for ring in whole]
    expected = memory_step(*new, *copies, counts.clone(), active, positions, **options)
    for step in (memory_step, memory_step_triton):
        rings = [ring.clone().to(DEVICE) for ring in whole]
        others = [tensor.to(DEVICE) for tensor in (*new, *(ring[:, 1] for ring in rings), counts.clone(), active)]
        found = step(*others, positions.to(DEVICE), pages=pages.to(DEVICE), **to_device(options))
        torch.testing.assert_close(found.cpu()[active], expected[active], atol=1e-5, rtol=1e-5)
        assert others[6].tolist() == [3, 1, 9, 13]
        for ring, old, copy in zip(rings, whole, copies, strict=True):
            changed = old.clone()
            changed[pages, 1] = copy
            assert torch.equal(ring.cpu(), changed)


# The interpreter cuts bfloat16 off in place of rounding it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_the_gate_multiplies_what_was_rounded(activation, dtype, monkeypatch):
    """Both twins, bit for bit; the count of every row moves on once, whatever the number of programs."""
    monkeypatch.setattr(triton_decode_seqboat, "_SPLITS", ((1 << 31, 4, 8, 2, 4),))
    monkeypatch.setattr(triton_decode_seqboat, "_COMBINE_V", 16)
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6), (3, 6), (3, 37), (3, 9, 6), (3, 9, 37), (3, 37)
    *inputs, gate = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    active = torch.tensor([True, False, True], device=DEVICE)
    for step in (memory_step, memory_step_triton):
        found = []
        for options in ({}, {"gate": gate}):
            ring, count = torch.zeros(3, 9, dtype=torch.int64, device=DEVICE), torch.tensor([0, 7, 30], device=DEVICE)
            given = (*(tensor.clone() for tensor in inputs), ring, count, active, count.clone())
            found.append(step(*given, activation=activation, scale=0.3, **options)[active])
            assert count.tolist() == [1, 7, 31]
        assert found[0].abs().sum() > 1 and torch.equal(found[1], found[0] * gate[active])


def test_launches_of_a_decode_step(monkeypatch):
    """Each layer: kernels, linears and nothing else; the counters of all layers take one launch a model."""
    launched = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if not function.is_view and name not in ("empty", "empty_like"):
                launched.append(name)
            return function(*args, **(kwargs or {}))

    def note(self, *args, **kwargs):
        launched.append(self.function.fn.__name__)

    counts = []
    for layers in (2, 3):
        model = small_lm(num_hidden_layers=layers).to(DEVICE, torch.bfloat16).eval()
        model.config.kernel_backend = "triton"
        cache, ids = SeqBoatCache(model.config, static=True), torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            with monkeypatch.context() as patch, Noted():
                patch.setattr(Kernel, "__call__", note)
                model(ids, past_key_values=cache)
        counts.append(Counter(launched))
        launched.clear()
    a_layer = counts[1] - counts[0]
    assert counts[0]["_foreach_add_"] == counts[1]["_foreach_add_"] == 1
    kernels = {name: count for name, count in a_layer.items() if name.endswith("_kernel")}
    assert sum(kernels.values()) == 8 and a_layer["addmm"] == 3
    # What the fixture fills, and what asks for a dtype only.
    assert a_layer.keys() - kernels.keys() <= {"addmm", "fill_", "promote_types"}
