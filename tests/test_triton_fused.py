"""The fused stages around attention against plain torch in float64; on a CPU under Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from triton_comparison import choose, compare, draw, poisoned_memory  # noqa: F401
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat.ops_attention_seqboat import apply_rotary, windowed_attention
from modeling_seqboat.ops_layout_seqboat import Packed
from modeling_seqboat.triton_rows_seqboat import extract_residual_triton, gather_rows_triton
from modeling_seqboat.triton_unit_seqboat import gated_unit_triton, project_unit_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def packed(index, slot):
    return Packed(index.to(DEVICE), slot.to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "active"), [(37, 11), (5, 0), (8, 8)])
def test_gather_rows(tokens, active, dtype):
    index, slot = choose(tokens, active)
    found = compare(
        lambda x: gather_rows_triton(x, index.to(DEVICE), slot.to(DEVICE)),
        lambda x: x[index],
        draw((tokens, 44), dtype=dtype),
    )
    assert found[1].dtype == dtype


def test_gather_of_rows_that_lie_apart():
    index, slot = choose(20, 7)
    compare(
        lambda x: gather_rows_triton(x[:, 3:30], index.to(DEVICE), slot.to(DEVICE)),
        lambda x: x[index, 3:30],
        draw((20, 40)),
    )


@pytest.mark.parametrize(
    ("hidden_dtype", "residual_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("active", [0, 13, 40])
def test_extract_residual(active, hidden_dtype, residual_dtype):
    tokens, width = 40, 44
    index, slot = choose(tokens, active)
    hidden, residual, out, confidence = draw((tokens, width), (tokens, width), (active, width), (tokens,))
    confidence = confidence.sigmoid() * (slot >= 0)

    def definition(hidden, residual, out, confidence):
        extracted = torch.zeros_like(hidden).index_copy(0, index, out * confidence[index, None])
        return F.silu(hidden + extracted + residual)

    found = compare(
        lambda *tensors: extract_residual_triton(*tensors, packed(index, slot)), definition,
        [hidden.to(hidden_dtype), residual.to(residual_dtype), out.to(hidden_dtype), confidence],
    )  # fmt: skip
    assert [t.dtype for t in found] == [residual_dtype, hidden_dtype, residual_dtype, hidden_dtype, torch.float32]


def test_extract_of_a_step_takes_every_row():
    hidden, residual, out, confidence = draw((5, 44), (5, 44), (5, 44), (5,))
    compare(
        lambda *tensors: extract_residual_triton(*tensors, Packed(None)),
        lambda hidden, residual, out, confidence: F.silu(hidden + confidence[:, None] * out + residual),
        [hidden, residual, out, confidence],
    )


def project_definition(projected, scale, offset, cos, sin):
    z = scale.shape[1]
    width = (projected.shape[1] - z) // 2
    hidden, gate, v = F.silu(projected).split([z, width, width], dim=-1)
    q, k = (hidden * s + o for s, o in zip(scale, offset, strict=True))
    if cos is not None:
        # The op returns its input's dtype through float32, which is exact enough for every tolerance here.
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    return q, k, v, gate


def angles(rows, z, seed=3):
    turn = torch.rand(rows, z // 2, generator=torch.Generator().manual_seed(seed)) * 6
    return turn.cos(), turn.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("z", "width"), [(16, 24), (30, 40), (7, 5), (128, 600)])
@pytest.mark.parametrize("rotary", [True, False])
def test_project_unit(z, width, rotary, dtype):
    if rotary and z % 2:
        pytest.skip("rotary positions need pairs")
    count = 70
    cos, sin = angles(90, z) if rotary else (None, None)
    rows = torch.randint(0, 90, (count,), generator=torch.Generator().manual_seed(2)) if rotary else None

    def fused(projected, scale, offset):
        tables = [None if t is None else t.to(DEVICE) for t in (cos, sin, rows)]
        return project_unit_triton(projected, scale, offset, *tables)

    def definition(projected, scale, offset):
        return project_definition(projected, scale, offset, *(None if t is None else t[rows] for t in (cos, sin)))

    tensors = draw((count, z + 2 * width), dtype=dtype) + draw((2, z), (2, z), seed=1)
    compare(fused, definition, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_unit(activation, dtype, bias):
    """The unit in one piece equals its parts, the table of a learned position bias included."""
    count, window, z, width = 70, 20, 16, 40
    start, end = (torch.arange(count) - window).clamp_min(0), torch.arange(count) + 1
    start[45:] = start[45:].clamp_min(45)
    cos, sin = angles(count, z)
    places = torch.arange(count)
    scale = z**-0.5 if activation == "softmax" else 1 / window
    options = {"bias_center": 20, "q_place": places, "k_place": places} if bias else {}

    def fused(projected, s, o, table=None):
        moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return gated_unit_triton(
            projected, s, o, start.to(DEVICE), end.to(DEVICE), attention=activation, attention_scale=scale,
            cos=cos.to(DEVICE), sin=sin.to(DEVICE), bias_table=table, max_keys=window + 1, **moved,
        )[0]  # fmt: skip

    def definition(projected, s, o, table=None):
        q, k, v, gate = project_definition(projected, s, o, cos, sin)
        return gate * windowed_attention(
            q, k, v, start, end, activation=activation, scale=scale, bias_table=table, **options
        )

    tensors = draw((count, z + 2 * width), dtype=dtype) + draw((2, z), (2, z), seed=1)
    compare(fused, definition, tensors + (draw((31,), seed=4) if bias else []))


def test_gated_unit_of_nothing():
    """Every parameter gets a gradient also when nothing activates."""
    leaves = [torch.zeros(*shape, device=DEVICE, requires_grad=True) for shape in ((0, 96), (2, 16), (2, 16), (9,))]
    nothing = torch.zeros(0, dtype=torch.long, device=DEVICE)
    out, keys, values = gated_unit_triton(
        *leaves[:3], nothing, nothing, keep=True, attention="softmax", attention_scale=1.0, bias_table=leaves[3],
        q_place=nothing,
        k_place=nothing, max_keys=9,
    )  # fmt: skip
    assert (out.shape, keys.shape, values.shape) == ((0, 40), (0, 16), (0, 40))
    out.sum().backward()
    assert all((leaf.grad == 0).all() and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(4, 8)
    slot = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="packed_index has shape"):
        gather_rows_triton(x, slot, slot[:3])
    with pytest.raises(ValueError, match="hidden and residual"):
        extract_residual_triton(x, x[:3], x, torch.zeros(4), Packed(slot, slot))
    with pytest.raises(ValueError, match="float32"):
        extract_residual_triton(x, x, x, torch.zeros(4, dtype=torch.float64), Packed(slot, slot))
    with pytest.raises(ValueError, match="Z \\+ 2V"):
        project_unit_triton(torch.zeros(4, 9), torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="even"):
        project_unit_triton(
            torch.zeros(4, 9), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 1), torch.zeros(4, 1)
        )
    with pytest.raises(ValueError, match="cos and sin"):
        project_unit_triton(
            torch.zeros(4, 10), torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 2), torch.zeros(3, 2)
        )


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_dropout_in_extract_falls_on_the_branch_alone(residual_dtype):
    tokens, width, dropout = 200, 44, 0.3
    index, slot = (part.to(DEVICE) for part in choose(tokens, 90))
    hidden, out = (t.to(DEVICE).requires_grad_() for t in draw((tokens, width), (90, width)))
    # A residual far from 0 shows what silu was given.
    residual = torch.full((tokens, width), 20.0, device=DEVICE, dtype=residual_dtype).requires_grad_()
    confidence = torch.full((tokens,), 0.5, device=DEVICE) * (slot >= 0)
    torch.manual_seed(3)
    result = extract_residual_triton(hidden, residual, out, confidence, packed(index, slot), dropout)
    torch.manual_seed(3)
    again = extract_residual_triton(hidden, residual, out, confidence, packed(index, slot), dropout)
    other = extract_residual_triton(hidden, residual, out, confidence, packed(index, slot), dropout)
    assert torch.equal(result, again) and not torch.equal(result, other)
    branch = hidden.detach().index_add(0, index, 0.5 * out.detach())
    kept = (result.detach() - 20).abs() > 1e-4 * branch.abs()
    assert abs(1 - float(kept.float().mean()) - dropout) < 0.03
    torch.testing.assert_close(result - 20, torch.where(kept, branch / (1 - dropout), 0), atol=1e-3, rtol=1e-3)
    result.sum().backward()
    scale = torch.where(kept, 1 / (1 - dropout), 0)
    torch.testing.assert_close(hidden.grad, scale, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.grad, 0.5 * scale[index], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(residual.grad, torch.ones_like(residual), atol=1e-2, rtol=1e-2)


def test_dropout_in_extract_is_even_and_independent(monkeypatch):
    """Seeds and places next to each other: under a weak hash a seed's drops are the next one's, moved by a place."""
    tokens, width, dropout = 2000, 64, 0.3
    ones, zeros = (torch.full((tokens, width), value, device=DEVICE) for value in (1.0, 0.0))
    drops = []
    for seed in (5, 6, 2**30):
        monkeypatch.setattr(torch, "randint", lambda *_, seed=seed, **__: torch.tensor([seed], device=DEVICE))
        result = extract_residual_triton(ones, zeros, zeros, zeros[:, 0], Packed(None), dropout)
        drops.append((result == 0).flatten().double().cpu() - dropout)
    for one in drops:
        # A drop less its mean has a variance of p (1 - p), the product of two that are independent the square of it.
        assert abs(float(one.mean())) < 3 * (dropout * (1 - dropout) / len(one)) ** 0.5
        for other in drops:
            for shift in (0, 1, 2, width):
                if one is not other or shift:
                    products = one[shift:] * other[: len(other) - shift]
                    assert abs(float(products.mean())) < 4 * dropout * (1 - dropout) / len(products) ** 0.5, shift


def test_extract_refuses_a_dropout_that_keeps_nothing():
    tokens = torch.zeros(4, 8, device=DEVICE)
    slot = torch.full((4,), -1, device=DEVICE)
    with pytest.raises(ValueError, match="dropout_p must be at least 0 and below 1, got 1.0"):
        extract_residual_triton(tokens, tokens, tokens[:0], tokens[:, 0], packed(slot[:0], slot), 1.0)
