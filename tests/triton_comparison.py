"""What tests of Triton stages share: drawn inputs, and the comparison with a definition in float64."""

import pytest
import torch
from triton_interpreter import DEVICE  # first, before anything imports triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def poisoned_memory(monkeypatch):
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
    """Outputs and gradients of a stage, and of its definition on float64 copies of the same tensors."""
    narrow = [t.to(DEVICE).requires_grad_() for t in tensors]
    wide = [t.double().requires_grad_() for t in tensors]
    found, expected = function(*narrow), definition(*wide)
    found, expected = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (found, expected))
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(x.shape, generator=generator).to(y.dtype) for x, y in zip(expected, found, strict=True)]
    found += torch.autograd.grad(found, narrow, [g.to(DEVICE) for g in grads])
    expected += torch.autograd.grad(expected, wide, [g.double() for g in grads])
    tolerance = tolerance or max(TOLERANCE[t.dtype] for t in tensors)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.cpu().double() - b).norm() / b.norm().clamp_min(1e-3)
        assert a.shape == b.shape and error < tolerance, (place, float(error))
    return found
