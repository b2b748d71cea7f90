"""Windowed attention kernels against a dense masked reference; on a CPU they run under Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat import triton_attention_seqboat
from modeling_seqboat.triton_attention_seqboat import windowed_attention_triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAMES = ("q", "k", "v", "bias_table", "gate")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """NaN, or a wild index, in everything a kernel ought to write."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles so small that short streams have many of them."""
    sizes = {"m": 32, "n": 16, "rows": 16, "inner": 16, "values": 32}
    for name in ("_BLOCKS_16BIT", "_BLOCKS_32BIT"):
        blocks = getattr(triton_attention_seqboat, name)
        monkeypatch.setattr(triton_attention_seqboat, name, replace(blocks, **sizes))


def stream(counts, window, memory=0, ahead=0):
    """key_start, key_end (M,) and Mk of rows or segments of `counts` new tokens, each led by `memory` older keys."""
    starts, ends, first = [], [], 0
    for count in counts:
        last = first + memory + count
        for place in range(first + memory, last):
            starts.append(max(first, place - window))
            ends.append(min(last, place + ahead + 1))
        first = last
    return torch.tensor(starts, dtype=torch.long), torch.tensor(ends, dtype=torch.long), first


def reference(q, k, v, bias_table, gate, *, start, end, activation, scale, bias_center=0, q_place=None, k_place=None):
    """The definition over all pairs, in float64."""
    scores = scale * q @ k.T
    if bias_table is not None:
        scores = scores + bias_table[(bias_center + k_place - q_place[:, None]).clamp(0, len(bias_table) - 1)]
    keys = torch.arange(len(k))
    visible = (keys >= start[:, None]) & (keys < end[:, None])
    if activation == "softmax":
        weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
    else:
        weights = scores.relu().square() * visible
    out = weights @ v
    return out if gate is None else out * gate


def draw(start, mk, z, width, dtype, *, table=0, gate=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    m = len(start)
    tensors = [randn(m, z), randn(mk, z), randn(mk, width)]
    return tensors + [randn(table).float() if table else None, randn(m, width) if gate else None]


def compare(tensors, start, end, *, tolerance=None, max_keys="bound", **options):
    """Output and every gradient of the kernels against the reference's."""
    dtype = tensors[0].dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    wide = [None if t is None else t.double().requires_grad_() for t in tensors]
    places = {name: options.get(name) for name in ("q_place", "k_place")}
    expected = reference(*wide, start=start, end=end, **options)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected_grads = torch.autograd.grad(expected, [t for t in wide if t is not None], grad.double())

    narrow = [None if t is None else t.to(DEVICE).requires_grad_() for t in tensors]
    if max_keys == "bound":
        max_keys = int((end - start).max())
    options |= {name: None if place is None else place.to(DEVICE) for name, place in places.items()}
    out = windowed_attention_triton(
        *narrow[:3],
        start.to(DEVICE),
        end.to(DEVICE),
        bias_table=narrow[3],
        gate=narrow[4],
        max_keys=max_keys,
        **options,
    )
    grads = torch.autograd.grad(out, [t for t in narrow if t is not None], grad.to(DEVICE))
    assert out.dtype == dtype
    names = [name for name, t in zip(NAMES, tensors, strict=True) if t is not None]
    for name, found, wanted in zip(["out", *names], (out, *grads), (expected, *expected_grads), strict=True):
        error = (found.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-3)
        assert error < tolerance, (name, float(error))
    return out.detach().cpu()


def scale_of(activation, z, window):
    return z**-0.5 if activation == "softmax" else 1 / window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_rows_of_every_count(activation, dtype, small_blocks):
    """Rows (or packed segments) of 0, 1, W - 1, W, W + 1 and odd counts in one stream."""
    window = 20
    start, end, mk = stream((0, 1, window - 1, window, window + 1, 37, 0, 2), window)
    compare(draw(start, mk, 16, 64, dtype), start, end, activation=activation, scale=scale_of(activation, 16, window))


@pytest.mark.parametrize(("z", "width"), [(8, 40), (30, 120), (60, 64), (96, 257), (128, 1)])
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_awkward_widths(activation, z, width, small_blocks):
    start, end, mk = stream((33, 18), 20)
    dtype = torch.float32 if z % 4 else torch.bfloat16
    compare(draw(start, mk, z, width, dtype), start, end, activation=activation, scale=scale_of(activation, z, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_as_on_a_gpu(dtype):
    start, end, mk = stream((150, 0, 70), 130)
    compare(draw(start, mk, 128, 300, dtype), start, end, activation="softmax", scale=0.1)


@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_both_directions_behind_a_memory(activation, small_blocks):
    """Keys outnumber queries, and each query also sees keys after it."""
    start, end, mk = stream((5, 0, 41, 1), 12, memory=12, ahead=12)
    compare(
        draw(start, mk, 16, 40, torch.float32), start, end, activation=activation, scale=scale_of(activation, 16, 24)
    )


def test_many_rows_of_one_query_in_a_block(small_blocks):
    """A block's keys are then as many as its rows' memories together."""
    start, end, mk = stream((1,) * 9 + (0, 2, 1), 30, memory=30)
    compare(draw(start, mk, 16, 40, torch.float32), start, end, activation="softmax", scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
@pytest.mark.parametrize(("copies", "entries"), [(64, 2**17), (3, 2**17), (64, 1)])
def test_bias_table(activation, dtype, copies, entries, small_blocks, monkeypatch):
    """Offsets beyond the table take its ends; places have gaps and start again in each row. The sums do not depend on
    how many tables they are collected in."""
    monkeypatch.setattr(triton_attention_seqboat, "_MOST_COPIES", copies)
    monkeypatch.setattr(triton_attention_seqboat, "_COPIED_ENTRIES", entries)
    window = 20
    start, end, mk = stream((30, 25), window, memory=4, ahead=window)
    k_place = torch.cat([torch.arange(34) * 2, torch.arange(29) ** 2 // 4])
    own = torch.cat([torch.arange(4, 34), torch.arange(38, 63)])
    compare(
        draw(start, mk, 16, 40, dtype, table=31), start, end, activation=activation,
        scale=scale_of(activation, 16, window), bias_center=15, q_place=k_place[own], k_place=k_place,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_gate(activation, small_blocks):
    start, end, mk = stream((3, 40), 20)
    compare(
        draw(start, mk, 16, 72, torch.bfloat16, gate=True), start, end, activation=activation,
        scale=scale_of(activation, 16, 20),
    )  # fmt: skip


def test_slices_of_a_wider_tensor(small_blocks):
    start, end, mk = stream((50,), 20)
    tensors = draw(start, mk, 16, 40, torch.bfloat16)
    whole = torch.cat([tensors[0], tensors[1], tensors[2]], 1)
    compare([*whole.split([16, 16, 40], 1), None, None], start, end, activation="softmax", scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_that_rise_along_the_row(dtype):
    """Scores a hundred above those of the row's first keys: nothing overflows, and the largest ones win."""
    start, end, mk = stream((210, 30), 200)
    tensors = draw(start, mk, 16, 40, dtype)
    tensors[0] = tensors[0].abs() + 1
    tensors[1] = tensors[1] * 0.1 + torch.linspace(-3, 3, mk)[:, None].to(dtype)
    out = compare(
        tensors, start, end, activation="softmax", scale=1.0, tolerance=2e-2 if dtype == torch.float16 else 1e-4
    )
    assert out.isfinite().all()


def test_empty_streams_give_zero_gradients():
    """Every input takes part also when nothing activates."""
    for m, mk in ((0, 0), (0, 7), (5, 0)):
        start = torch.zeros(m, dtype=torch.long)
        tensors = draw(start, mk, 16, 40, torch.float32, table=5, gate=True)
        leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
        places = {"q_place": torch.zeros(m, dtype=torch.long), "k_place": torch.zeros(mk, dtype=torch.long)}
        out = windowed_attention_triton(
            *leaves[:3], start.to(DEVICE), start.to(DEVICE), activation="softmax", scale=1.0, bias_table=leaves[3],
            gate=leaves[4], **{name: place.to(DEVICE) for name, place in places.items()},
        )  # fmt: skip
        assert out.shape == (m, 40) and (out == 0).all()
        out.sum().backward()
        assert all((leaf.grad == 0).all() and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_queries_without_keys(activation, small_blocks):
    """Empty runs among others, at the ends and in between: output and gradients 0."""
    start = torch.tensor([0] * 20 + [3] * 30 + [9] * 25)
    end = torch.tensor([0] * 20 + [9] * 30 + [9] * 25)
    out = compare(draw(start, 40, 16, 40, torch.float32), start, end, activation=activation, scale=0.25)
    assert (out[:20] == 0).all() and (out[50:] == 0).all()


def test_a_row_does_not_depend_on_its_batch_mates(small_blocks):
    counts, window = (17, 40, 23), 20
    start, end, mk = stream(counts, window)
    tensors = draw(start, mk, 16, 40, torch.float32)
    whole = compare(tensors, start, end, activation="softmax", scale=0.25)
    alone_start, alone_end, _ = stream(counts[1:2], window)
    rows = slice(17, 57)
    alone = compare(
        [*(t[rows] for t in tensors[:3]), None, None], alone_start, alone_end, activation="softmax", scale=0.25
    )
    torch.testing.assert_close(whole[rows], alone, atol=1e-5, rtol=1e-5)


def test_long_streams_count_their_tiles_in_larger_bites(small_blocks, monkeypatch):
    monkeypatch.setattr(triton_attention_seqboat, "_MANY_BLOCKS", 1)
    start, end, mk = stream((9, 60), 12)
    compare(draw(start, mk, 16, 40, torch.float32), start, end, activation="softmax", scale=0.25)


def test_without_a_bound_on_the_keys(small_blocks):
    start, end, mk = stream((9, 30), 12)
    compare(draw(start, mk, 16, 40, torch.float32), start, end, activation="softmax", scale=0.25, max_keys=None)


def test_a_bound_that_is_too_small_shows(small_blocks):
    start, end, mk = stream((90,), 60)
    tensors = [t.to(DEVICE).requires_grad_() for t in draw(start, mk, 16, 40, torch.float32)[:3]]
    out = windowed_attention_triton(
        *tensors, start.to(DEVICE), end.to(DEVICE), activation="softmax", scale=0.25, max_keys=1
    )
    assert out.isnan().all()
    out.sum().backward()
    assert all(t.grad.isnan().all() for t in tensors)


def test_the_same_bits_twice(small_blocks):
    start, end, mk = stream((60,), 30)
    tensors = [
        None if t is None else t.to(DEVICE).requires_grad_() for t in draw(start, mk, 16, 40, torch.bfloat16, table=9)
    ]
    places = torch.arange(60, device=DEVICE)
    results = []
    for _ in range(2):
        out = windowed_attention_triton(
            *tensors[:3], start.to(DEVICE), end.to(DEVICE), activation="softmax", scale=0.25, bias_table=tensors[3],
            bias_center=8, q_place=places, k_place=places, max_keys=31,
        )  # fmt: skip
        results.append((out, *torch.autograd.grad(out.float().square().sum(), tensors[:4])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_p": 0.1}, "dropout"),
        ({"activation": "laplace"}, "laplace"),
        ({"q": torch.zeros(3, 16, dtype=torch.float64)}, "float64"),
        ({"v": torch.zeros(3, 40, dtype=torch.bfloat16)}, "v must have q's dtype"),
        ({"k": torch.zeros(3, 8)}, "do not fit"),
        ({"q": torch.zeros(3, 512), "k": torch.zeros(3, 512)}, "512"),
        ({"key_end": torch.zeros(2, dtype=torch.long)}, "key_start and key_end"),
        ({"gate": torch.zeros(3, 8)}, "gate must be"),
        ({"bias_table": torch.zeros(0)}, "T > 0"),
        ({"bias_table": torch.zeros(5)}, "q_place"),
    ],
)
def test_what_cannot_run_is_refused(change, message):
    arguments = {
        "q": torch.zeros(3, 16), "k": torch.zeros(3, 16), "v": torch.zeros(3, 40),
        "key_start": torch.zeros(3, dtype=torch.long), "key_end": torch.ones(3, dtype=torch.long),
        "activation": "softmax", "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        windowed_attention_triton(**(arguments | change))
