"""The bias gradient of linear layers: a kernel's column sums against torch's, and where a layer keeps its own."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from small_models import random_ids, small_lm
from torch import nn
from triton_comparison import poisoned_memory  # noqa: F401
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat import triton_rows_seqboat
from modeling_seqboat.triton_rows_seqboat import column_sums, linear_triton


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (31, 7), (33, 128), (500, 130), (3, 40, 257), (0, 5), (9000, 3)])
def test_column_sums_are_those_of_float64(shape, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    exact = x.double().flatten(0, -2).sum(0)
    sums = column_sums(x)
    assert sums.dtype == torch.float32 and torch.equal(sums, column_sums(x))
    torch.testing.assert_close(sums.double(), exact, atol=1e-3, rtol=1e-5)


def test_column_sums_of_rows_that_lie_apart():
    wide = torch.full((70, 50), torch.nan, device=DEVICE)
    wide[:, 3:20] = torch.randn(70, 17, device=DEVICE)
    for x in (wide[:, 3:20], wide[:, 3:20].T.contiguous().T):
        torch.testing.assert_close(column_sums(x), x.sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_keeps_its_outputs_and_gradients(autocast):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40).to(DEVICE), torch.randn(3, 50, 24, device=DEVICE)
    above = torch.randn(3, 50, 40, device=DEVICE)
    found = []
    for run in (linear, lambda given: linear_triton(linear, given)):
        given = x.clone().requires_grad_()
        linear.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = run(given)
        out.backward(above.to(out.dtype))
        found.append((out.detach(), given.grad, linear.weight.grad, linear.bias.grad))
    # torch adds up in bfloat16's own precision under autocast.
    for expected, ours in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, atol=1e-1 if autocast else 1e-4, rtol=2e-2 if autocast else 1e-5)
    exact = above.to(out.dtype).double().flatten(0, 1).sum(0)
    torch.testing.assert_close(found[1][3].double(), exact, atol=1e-4, rtol=1e-5)


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often the gradient of a bias was taken over by the kernel."""
    calls, node = [], triton_rows_seqboat._BiasGradient
    stand_in = SimpleNamespace(apply=lambda y, bias: calls.append(bias) or node.apply(y, bias))
    monkeypatch.setattr(triton_rows_seqboat, "_BiasGradient", stand_in)
    return calls


def test_a_layer_that_is_more_than_linear_runs_itself(kernel_calls):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(5, 4, device=DEVICE)
    doubled = Doubled(4, 3).to(DEVICE)
    assert torch.equal(linear_triton(doubled, x), doubled(x))
    seen = []
    hooked = nn.Linear(4, 3).to(DEVICE)
    hooked.register_forward_hook(lambda module, args, out: seen.append(out))
    linear_triton(hooked, x).sum().backward()
    assert len(seen) == 1 and hooked.bias.grad is not None
    bare = nn.Linear(4, 3, bias=False).to(DEVICE)
    assert torch.equal(linear_triton(bare, x), bare(x))
    replaced = nn.Linear(4, 3).to(DEVICE)
    replaced.forward = lambda given: given + 1
    assert torch.equal(linear_triton(replaced, x), x + 1)
    plain = nn.Linear(4, 3).to(DEVICE)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(out))
    try:
        linear_triton(plain, x)
    finally:
        handle.remove()
    assert len(seen) == 2 and not kernel_calls
    linear_triton(plain, x)
    assert len(kernel_calls) == 1


def test_a_frozen_bias_gets_no_gradient(kernel_calls):
    linear = nn.Linear(4, 3).to(DEVICE)
    linear.bias.requires_grad_(False)
    linear_triton(linear, torch.randn(5, 4, device=DEVICE)).sum().backward()
    assert linear.bias.grad is None and linear.weight.grad is not None
    with torch.no_grad():
        assert not linear_triton(linear.requires_grad_(True), torch.randn(5, 4, device=DEVICE)).requires_grad
    assert not kernel_calls


def test_offloaded_weights_train_on_the_fused_path(monkeypatch):
    ids = random_ids(2, 12).to(DEVICE)
    model = small_lm(num_hidden_layers=2).to(DEVICE).train()
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "triton")
    expected = model(ids, use_cache=False).logits
    offloaded = cpu_offload(model, DEVICE)
    torch.testing.assert_close(offloaded(ids, use_cache=False).logits, expected)
