"""The router, the list of activated tokens, the entry norm and the EMA's parameters in Triton, against plain torch."""

import pytest
import torch
from triton_comparison import compare, draw, poisoned_memory  # noqa: F401
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat.ops_ema_seqboat import ema_parameters
from modeling_seqboat.ops_layout_seqboat import segment_bounds
from modeling_seqboat.ops_packed_seqboat import pack, write_memory
from modeling_seqboat.triton_ema_seqboat import ema_parameters_triton
from modeling_seqboat.triton_rows_seqboat import (
    norm_residual_triton,
    pack_triton,
    route_opaque,
    route_triton,
    write_memory_triton,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def route_definition(real, shift, active):
    def definition(x, weight, bias, log_temperature):
        skip, run = (x @ weight.t() + bias).unbind(-1)
        confidence = torch.sigmoid((run - skip - shift) * torch.exp(-log_temperature.clamp_min(-30)))
        active.append(((run > skip + shift) & real).cpu())
        return torch.where(active[0], confidence, 0)

    return definition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(50, 44), (7, 300), (1, 24)])
@pytest.mark.parametrize("padded", [False, True])
def test_route(tokens, width, padded, dtype):
    x, weight, bias = draw((tokens, width), (2, width), (2,))
    real = torch.rand(tokens, generator=torch.Generator().manual_seed(4)) < 0.7 if padded else None
    wanted, found = [], []

    def function(*tensors):
        confidence, active = route_triton(*tensors, real=None if real is None else real.to(DEVICE), shift=0.25)
        found.append(active.cpu())
        return confidence

    known = torch.ones(tokens, dtype=torch.bool) if real is None else real
    compare(
        function, route_definition(known, 0.25, wanted), [x.to(dtype), weight, bias, torch.tensor([1.2])],
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
    )  # fmt: skip
    assert torch.equal(found[0], wanted[0])


def test_a_temperature_below_the_clamp_has_no_gradient():
    x, weight, bias = (t.to(DEVICE) for t in draw((20, 24), (2, 24), (2,)))
    heat = torch.tensor([-40.0], device=DEVICE, requires_grad=True)
    confidence, active = route_triton(x, weight, bias, heat)
    assert torch.equal(confidence > 0, active) and bool((confidence[active] == 1).all())
    confidence.sum().backward()
    assert heat.grad.item() == 0


@pytest.mark.parametrize("padded", [False, True])
def test_route_for_compilers_tells_them_what_it_gives(padded):
    """Shapes, strides, dtypes and aliases, for any number of rows; the values are the kernel's."""
    x, weight, bias = (t.to(DEVICE) for t in draw((3, 2, 24), (2, 24), (2,)))
    real = torch.tensor([[True, False]] * 3, device=DEVICE) if padded else None
    inputs = x, weight, bias, torch.tensor([1.2], device=DEVICE), real, 0.25
    torch.library.opcheck(route_opaque, inputs)
    told = route_opaque(*(t.to("meta") if torch.is_tensor(t) else t for t in inputs))
    for found, wanted, fake in zip(route_opaque(*inputs), route_triton(*inputs), told, strict=True):
        assert torch.equal(found, wanted) and found.stride() == fake.stride()


def test_route_names_what_does_not_fit():
    x, weight, bias = (t.to(DEVICE) for t in draw((20, 24), (2, 23), (2,)))
    with pytest.raises(ValueError, match=r"must be \(2, 24\)"):
        route_triton(x, weight, bias, bias[:1])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(3, 37), (1, 1100), (2, 1)])
def test_the_list_of_activated_tokens_is_what_torch_builds(shape, rate, segments, bidirectional):
    generator = torch.Generator().manual_seed(2)
    active = torch.rand(shape, generator=generator) < rate
    reset = torch.rand(shape, generator=generator) < 0.1
    bounds = segment_bounds(reset) if segments else None
    continued = [None]
    if not bidirectional:
        # Rows whose memory is empty, partly filled and full.
        count = torch.tensor([0, 3, 12])[: shape[0]]
        continued.append((count, reset.long().cumsum(1) if segments else None))
    for memory in continued:
        expected = pack(active, 5, bidirectional, bounds, memory=memory).wait()
        moved = None if memory is None else tuple(None if t is None else t.to(DEVICE) for t in memory)
        found = pack_triton(
            active.to(DEVICE), 5, bidirectional, None if bounds is None else bounds.to(DEVICE), memory=moved
        ).wait()
        for name in ("index", "key_start", "key_end"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
        packed_index = torch.full((active.numel(),), -1)
        packed_index[expected.index] = torch.arange(len(expected.index))
        assert torch.equal(found.packed_index.cpu(), packed_index)
        assert torch.equal(found.total.cpu(), expected.total)
        if memory is not None:
            assert found.memory.num_keys == expected.memory.num_keys
            for name in ("row", "ring_index", "key_index", "new_index"):
                assert torch.equal(getattr(found.memory, name).cpu(), getattr(expected.memory, name)), name


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slots", "rate"), [(1, 0.5), (7, 0.5), (7, 1.0), (40, 0.7), (7, 0.0)])
def test_the_memory_is_written_as_torch_writes_it(slots, rate, dtype, segments):
    batch, length, generator = 3, 19, torch.Generator().manual_seed(5)
    active = torch.rand(batch, length, generator=generator) < rate
    active[1] = False
    total = active.flatten().cumsum(0).view(batch, length)
    tokens, widths = int(total[-1, -1]), ((12,), (20,), ())
    ring = [torch.randn(batch, slots, *width, generator=generator).to(dtype) for width in widths]
    new = [torch.randn(tokens, *width, generator=generator) for width in widths]
    ring[2], new[2] = ring[2].long(), torch.arange(tokens)
    first = (total - active.long())[:, 4] if segments else None
    before = torch.tensor([0, 5, 1000])
    found = [entries.to(DEVICE) for entries in ring]
    after, *_ = write_memory_triton(
        found, [rows.to(DEVICE) for rows in new], total.int().to(DEVICE), None if first is None else first.to(DEVICE),
        before.to(DEVICE),
    )  # fmt: skip
    old = [entries.clone() for entries in ring]
    wanted, slot, overwritten = write_memory(ring, new, total, first, before)
    assert torch.equal(after.cpu(), wanted)
    for one, other in zip(found, ring, strict=True):
        assert torch.equal(one.cpu(), other)
    # With what was written over the memory is as before.
    for entries, kept, gone in zip(ring, old, overwritten, strict=False):
        at = slot.view(*slot.shape, *[1] * (entries.dim() - 2)).expand_as(gone)
        assert torch.equal(entries.scatter(1, at, gone), kept)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(50, 44), (3, 600)])
def test_norm_and_the_residual_beside_it(tokens, width, affine, dtypes):
    def definition(x, *parameters):
        return torch.nn.functional.layer_norm(x, (width,), *parameters, eps=1e-5), x

    x, weight, bias = draw((tokens, width), (width,), (width,))
    parameters = [weight, bias] if affine else []
    found = compare(
        lambda x, weight=None, bias=None: norm_residual_triton(x, None, weight, bias, 1e-5, True, dtypes[1]),
        definition,
        [(3 * x + 1).to(dtypes[0]), *parameters],
        tolerance=1e-5 if dtypes[1] == torch.float32 else 1e-2,
    )
    assert found[0].dtype == dtypes[1] and found[1].dtype == dtypes[0]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_the_residual_beside_it(affine, dtype):
    """Scale norm is the same with one weight for all channels."""

    def definition(x, *weight):
        return torch.nn.functional.rms_norm(x, (44,), *weight, eps=1e-5), x

    x, weight = draw((50, 44), (44,))
    compare(
        lambda x, weight=None: norm_residual_triton(x, None, weight, None, 1e-5, False, dtype),
        definition,
        [3 * x + 1, weight] if affine else [3 * x + 1],
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
    )


def test_the_residual_alone_passes_its_gradient_on():
    x = torch.ones(4, 16, device=DEVICE, requires_grad=True)
    weight = torch.ones(16, device=DEVICE, requires_grad=True)
    _, residual = norm_residual_triton(x, None, weight, torch.zeros_like(weight), 1e-5, True, torch.float32)
    (2 * residual).sum().backward()
    assert bool((x.grad == 2).all()) and bool((weight.grad == 0).all())


@pytest.mark.parametrize(("rows", "states"), [(12, 3), (300, 16)])
def test_parameters_of_the_ema(rows, states):
    shapes = [(rows, states, 1)] * 3 + [(rows, states)]
    compare(ema_parameters_triton, ema_parameters, draw(*shapes))


def test_parameters_of_different_dtypes_are_named():
    delta, alpha, beta, gamma = (t.to(DEVICE) for t in draw(*[(4, 2, 1)] * 3, (4, 2)))
    with pytest.raises(ValueError, match="alpha must be"):
        ema_parameters_triton(delta, alpha.half(), beta, gamma)
