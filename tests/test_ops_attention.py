"""Blocked windowed attention and its one-token form equal the loop over queries, gradients included."""

import pytest
import torch

from modeling_seqboat.ops_attention_seqboat import (
    QUERY_BLOCK,
    apply_rotary,
    attention_scale,
    memory_step,
    rotary_tables,
    t5_bias_table,
    windowed_attention,
)
from modeling_seqboat.ops_naive_seqboat import windowed_attention_naive
from modeling_seqboat.ops_packed_seqboat import pack

ACTIVATIONS = ("softmax", "relu2", "laplace")
KEY_WIDTH, VALUE_WIDTH = 6, 5


def ragged_ranges(counts, window, bidirectional=False):
    """Key ranges of rows of `counts` activated tokens, each token seeing `window` before it (and after it)."""
    length = max(max(counts), 1)
    active = torch.arange(length) < torch.tensor(counts)[:, None]
    packed = pack(active, window, bidirectional).wait()
    return packed.key_start, packed.key_end


def attention_inputs(count, keys, dtype, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    leaves = {"q": randn(count, KEY_WIDTH), "k": randn(keys, KEY_WIDTH), "v": randn(keys, VALUE_WIDTH)}
    extra = {}
    if bias:
        leaves["bias_table"] = randn(11)
        # Places jump, so that offsets leave the table on both sides.
        places = torch.randint(0, 3, (max(keys, count),), generator=generator).cumsum(0)
        extra = {"bias_center": 6, "k_place": places[:keys], "q_place": places[:count]}
    return leaves, extra


def run_attention(op, leaves, key_start, key_end, **options):
    """Output and gradients of a random scalar of it."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    out = op(**leaves, key_start=key_start, key_end=key_end, **options)
    generator = torch.Generator().manual_seed(1)
    total = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"out": out} | {f"grad of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_equal_results(found, expected, tolerance):
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "counts, window, bidirectional",
    [
        ((1,), 4, False),
        ((7, 0, 1, 12), 4, False),
        ((7, 0, 1, 12), 4, True),
        ((QUERY_BLOCK - 1, 3, QUERY_BLOCK + 2), 1, False),
        ((2 * QUERY_BLOCK + 5,), 200, False),
    ],
    ids=["one", "ragged", "both-ways", "over-blocks", "long-window"],
)
def test_attention_equals_the_loop(counts, window, bidirectional, activation, bias, dtype):
    if dtype == torch.float32 and sum(counts) > 100 and activation != "softmax":
        pytest.skip("covered in float64")
    start, end = ragged_ranges(counts, window, bidirectional)
    leaves, extra = attention_inputs(len(start), len(start), dtype, bias)
    options = dict(activation=activation, scale=attention_scale(activation, KEY_WIDTH, window, bidirectional), **extra)
    expected = run_attention(windowed_attention_naive, leaves, start, end, **options)
    found = run_attention(windowed_attention, leaves, start, end, **options)
    assert_equal_results(found, expected, 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_ranges_empty_ones_included(activation, bias):
    """Ranges as packing and a memory make them: more keys than queries, some seen by none, some queries blind."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, 200, (150,), generator=generator).sort().values
    end = (start + torch.randint(0, 30, (150,), generator=generator)).clamp_max(200).cummax(0).values
    start[20:60] = end[20:60] = end[19]
    start, end = start.cummax(0).values, end.cummax(0).values
    leaves, extra = attention_inputs(150, 200, torch.float64, bias)
    options = dict(activation=activation, scale=0.3, **extra)
    expected = run_attention(windowed_attention_naive, leaves, start, end, **options)
    found = run_attention(windowed_attention, leaves, start, end, **options)
    assert torch.equal(found["out"][20:60], torch.zeros(40, VALUE_WIDTH, dtype=torch.float64))
    assert_equal_results(found, expected, 1e-10)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_query_at_all(activation, bias):
    empty = torch.zeros(0, dtype=torch.long)
    leaves, extra = attention_inputs(0, 3, torch.float32, bias)
    found = run_attention(windowed_attention, leaves, empty, empty, activation=activation, scale=1.0, **extra)
    assert found["out"].shape == (0, VALUE_WIDTH)
    for name, tensor in leaves.items():
        gradient = found[f"grad of {name}"]
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_scores_stay_finite(activation):
    start, end = ragged_ranges((9, 4), 3)
    leaves, _ = attention_inputs(13, 13, torch.float32, False)
    leaves["q"] *= 1e4
    found = run_attention(windowed_attention, leaves, start, end, activation=activation, scale=1.0)
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropped_weights_are_the_same_in_backward(activation):
    start, end = ragged_ranges((QUERY_BLOCK + 5, 6), 5)
    leaves, extra = attention_inputs(len(start), len(start), torch.float64, True)
    options = dict(activation=activation, scale=0.4, dropout_p=0.4, **extra)

    def attend(*tensors):
        torch.manual_seed(5)
        named = dict(zip(leaves, tensors, strict=True))
        return windowed_attention(**named, key_start=start, key_end=end, **options)

    # A weight that is dropped forwards and kept backwards would show in a directional derivative.
    tensors = [tensor.requires_grad_() for tensor in leaves.values()]
    directions = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=t.dtype) for i, t in enumerate(tensors)
    ]
    reader = torch.randn(len(start), VALUE_WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad((attend(*tensors) * reader).sum(), tensors)
    step = 1e-6
    for i, direction in enumerate(directions):
        moved = [
            [t.detach() + sign * direction if i == j else t.detach() for j, t in enumerate(tensors)]
            for sign in (step, -step)
        ]
        with torch.no_grad():
            above, below = ((attend(*each) * reader).sum() for each in moved)
        torch.testing.assert_close(
            (gradients[i] * direction).sum(), (above - below) / (2 * step), atol=1e-5, rtol=1e-5
        )


def test_dropout_drops_the_named_share_and_keeps_the_mean():
    count = 400
    start, end = torch.arange(count), torch.arange(count) + 1
    ones = torch.ones(count, 1)
    torch.manual_seed(0)
    out = windowed_attention(ones, ones, ones, start, end, activation="softmax", scale=1.0, dropout_p=0.25)[:, 0]
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.75))
    assert 0.65 < kept.float().mean() < 0.85
    torch.manual_seed(0)
    again = windowed_attention(ones, ones, ones, start, end, activation="softmax", scale=1.0, dropout_p=0.25)[:, 0]
    assert torch.equal(out, again)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_token_over_the_memory_equals_the_window(activation, bias):
    memory, counts = 4, [0, 1, 3, 4, 5, 11]
    for seed, count in enumerate(counts):
        leaves, extra = attention_inputs(count + 1, count + 1, torch.float64, bias, seed)
        start, end = torch.tensor([max(0, count - memory)]), torch.tensor([count + 1])
        options = dict(activation=activation, scale=0.4)
        table = {"bias_table": leaves["bias_table"], "bias_center": 6} if bias else {}
        places = {"q_place": extra["q_place"][-1:], "k_place": extra["k_place"]} if bias else {}
        q, k, v = leaves["q"][-1:], leaves["k"], leaves["v"]
        expected = windowed_attention_naive(q, k, v, start, end, **options, **table, **places)
        # The ring: the token with ordinal i stands in slot i % W, slots never filled hold what must not be read.
        keys, values = torch.full((1, memory, KEY_WIDTH), 1e3), torch.full((1, memory, VALUE_WIDTH), 1e3)
        keys, values, ring = keys.double(), values.double(), torch.zeros(1, memory, dtype=torch.long)
        for i in range(count):
            keys[0, i % memory], values[0, i % memory] = k[i], v[i]
            ring[0, i % memory] = extra["k_place"][i] if bias else 0
        place = extra["q_place"][-1:] if bias else torch.tensor([7])
        rings = keys, values, ring
        # A row in between that is not active keeps its memory; only active rows, or all of them, may be given.
        spread = [torch.cat([part, part + 1, part]) for part in rings]
        kept = [part[1].clone() for part in spread]
        for rows in (torch.tensor([0, 2]), None):
            q_, k_, v_ = (part.expand(3 if rows is None else 2, -1) for part in (q, k[-1:], v[-1:]))
            memory_ = [part.clone() for part in spread]
            found = memory_step(
                q_, k_, v_, *memory_, torch.tensor([count] * 3), torch.tensor([True, False, True]), place.expand(3),
                rows=rows, **options, **table,
            )  # fmt: skip
            torch.testing.assert_close(found[[0, -1]], expected.expand(2, -1))
            for ring_, new, old in zip(memory_, (k[-1], v[-1], place[0]), kept, strict=True):
                assert torch.equal(ring_[0, count % memory], new) and torch.equal(ring_[2], ring_[0])
                assert torch.equal(ring_[1], old)


def test_rotary_angles_at_a_million_tokens():
    offset = 1_000_000
    q, k = (torch.randn(1, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))

    def score(position):
        tables = [rotary_tables(torch.tensor([place]), 8, 10000.0) for place in (position + 5, position)]
        rotated = [apply_rotary(x, *table) for x, table in zip((q, k), tables, strict=True)]
        return (rotated[0] * rotated[1]).sum()

    # Only the difference of positions counts, however far they are.
    torch.testing.assert_close(score(offset), score(0), atol=1e-5, rtol=1e-5)


def test_t5_buckets():
    weight = torch.arange(32.0)[:, None]
    causal, both = t5_bias_table(weight, False), t5_bias_table(weight, True)
    assert causal.shape == both.shape == (257,)
    # Entry 128 + (pos_k - pos_q): causal buckets of a distance grow one by one to 16, then by its logarithm to 31.
    assert causal[128 - 15 : 129].flip(0).tolist() == list(range(16))
    assert causal[0] == 31 and (causal[128:] == 0).all()
    assert (causal[:128].diff() <= 0).all()
    assert both[128 - 7 : 129].flip(0).tolist() == list(range(8))
    assert both[129:136].tolist() == list(range(17, 24)) and both[0] == 15 and both[256] == 31


def test_rotary_keeps_double_precision():
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(torch.arange(5), 8, 10000.0)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos.double(), sin.double())
    torch.testing.assert_close(apply_rotary(x, cos, sin), torch.view_as_real(turned).flatten(-2), atol=1e-14, rtol=0)
