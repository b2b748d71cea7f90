"""The fused stages around attention against plain torch in float64; on a CPU under Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat.ops_attention_seqboat import apply_rotary, windowed_attention
from modeling_seqboat.triton_fused_seqboat import extract_residual, gated_unit, gather_rows, project_unit

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """NaN, or a wild index, in everything a kernel ought to write."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def draw(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def choose(tokens, active, seed=0):
    """index (M,) of `active` tokens in order, and slot (R,) the other way round."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    index = order[:active].sort().values
    slot = torch.full((tokens,), -1)
    slot[index] = torch.arange(active)
    return index, slot


def compare(function, definition, tensors, *, tolerance=None):
    """Outputs and gradients of a fused stage, and of its definition on float64 copies of the same tensors."""
    narrow = [t.to(DEVICE).requires_grad_() for t in tensors]
    wide = [t.double().requires_grad_() for t in tensors]
    found, expected = function(*narrow), definition(*wide)
    found, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(x.shape, generator=generator).to(y.dtype) for x, y in zip(expected, found, strict=True)]
    found += torch.autograd.grad(found, narrow, [g.to(DEVICE) for g in grads])
    expected += torch.autograd.grad(expected, wide, [g.double() for g in grads])
    tolerance = tolerance or max(TOLERANCE[t.dtype] for t in tensors)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.cpu().double() - b).norm() / b.norm().clamp_min(1e-3)
        assert a.shape == b.shape and error < tolerance, (place, float(error))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "active"), [(37, 11), (5, 0), (8, 8)])
def test_gather_rows(tokens, active, dtype):
    index, slot = choose(tokens, active)
    found = compare(
        lambda x: gather_rows(x, index.to(DEVICE), slot.to(DEVICE)),
        lambda x: x[index],
        draw((tokens, 44), dtype=dtype),
    )
    assert found[1].dtype == dtype


def test_gather_of_rows_that_lie_apart():
    index, slot = choose(20, 7)
    compare(
        lambda x: gather_rows(x[:, 3:30], index.to(DEVICE), slot.to(DEVICE)), lambda x: x[index, 3:30], draw((20, 40))
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
        lambda *tensors: extract_residual(*tensors, slot.to(DEVICE)), definition,
        [hidden.to(hidden_dtype), residual.to(residual_dtype), out.to(hidden_dtype), confidence],
    )  # fmt: skip
    assert [t.dtype for t in found] == [residual_dtype, hidden_dtype, residual_dtype, hidden_dtype, torch.float32]


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
        return project_unit(projected, scale, offset, *tables)

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
        return gated_unit(
            projected, s, o, start.to(DEVICE), end.to(DEVICE), activation=activation, attention_scale=scale,
            cos=cos.to(DEVICE), sin=sin.to(DEVICE), bias_table=table, max_keys=window + 1, **moved,
        )  # fmt: skip

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
    out = gated_unit(
        *leaves[:3], nothing, nothing, activation="softmax", attention_scale=1.0, bias_table=leaves[3], q_place=nothing,
        k_place=nothing, max_keys=9,
    )  # fmt: skip
    assert out.shape == (0, 40)
    out.sum().backward()
    assert all((leaf.grad == 0).all() and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(4, 8)
    slot = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="slot must be"):
        gather_rows(x, slot, slot[:3])
    with pytest.raises(ValueError, match="hidden and residual"):
        extract_residual(x, x[:3], x, torch.zeros(4), slot)
    with pytest.raises(ValueError, match="float32"):
        extract_residual(x, x, x, torch.zeros(4, dtype=torch.float64), slot)
    with pytest.raises(ValueError, match="Z \\+ 2V"):
        project_unit(torch.zeros(4, 9), torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="even"):
        project_unit(torch.zeros(4, 9), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 1), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="cos and sin"):
        project_unit(torch.zeros(4, 10), torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 2), torch.zeros(3, 2))
