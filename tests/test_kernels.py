"""The choice between torch and Triton: by config and environment, refused with a reason where it cannot run."""

import pytest
import torch

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.kernels_seqboat import choose_backend, requested_backend, why_not_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def model(**overrides):
    torch.manual_seed(0)
    fields = {
        "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "qk_head_dim": 16, "v_head_dim": 40, "memory_size": 8,
    }  # fmt: skip
    built = SeqBoatForCausalLM(SeqBoatConfig(**(fields | overrides)))
    with torch.no_grad():
        for layer in built.model.layers:
            layer.router.weight.normal_(0, 1)
            layer.attention.qk_scale.normal_(0, 1)
    return built


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_triton_on_a_cpu_is_refused_before_any_work(no_interpreter):
    with pytest.raises(ValueError, match="tensors are on cpu"):
        model(kernel_backend="triton")(torch.zeros(1, 5, dtype=torch.long))


@torch.no_grad()
def test_triton_is_refused_for_a_single_token_too(no_interpreter, monkeypatch):
    built = model().eval()
    cache = built(torch.zeros(1, 5, dtype=torch.long)).past_key_values
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "triton")
    with pytest.raises(ValueError, match="tensors are on cpu"):
        built(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_an_attention_without_a_kernel_is_refused_before_the_first_layer(monkeypatch):
    built = model(attention_activation="laplace").eval()
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(built.model.layers[0], "forward", lambda *args, **kwargs: pytest.fail("a layer ran"))
    with pytest.raises(ValueError, match="laplace attention has no kernel"):
        built(torch.zeros(1, 5, dtype=torch.long))


def test_auto_takes_torch_on_a_cpu_and_triton_on_a_gpu_where_it_can(no_interpreter):
    assert choose_backend("ema_scan", "auto", CPU, torch.float32) == "torch"
    assert choose_backend("ema_scan", "auto", CUDA, torch.float32) == "triton"
    assert choose_backend("windowed_attention", "auto", CUDA, torch.bfloat16, activation="laplace") == "torch"
    assert choose_backend("windowed_attention", "torch", CUDA, torch.bfloat16) == "torch"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [({"activation": "laplace"}, "laplace"), ({"dropout_p": 0.1}, "attention_dropout"), ({}, None)],
)
def test_reasons_name_what_stands_in_the_way(no_interpreter, facts, reason):
    found = why_not_triton("windowed_attention", CUDA, torch.float32, **facts)
    assert (found is None) if reason is None else (reason in found)


def test_the_environment_overrides_the_config(monkeypatch):
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "torch")
    assert requested_backend("triton") == "torch"
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        requested_backend("auto")


@pytest.mark.parametrize("attention", ["softmax", "relu2"])
@pytest.mark.parametrize("positions", ["rotary", "local"])
def test_a_whole_model_computes_the_same_on_both(attention, positions, monkeypatch):
    built = model(attention_activation=attention, position_embedding_type=positions)
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", backend)
        built.zero_grad()
        out = built(ids, labels=ids, output_router_probs=True)
        out.loss.backward()
        found[backend] = out, [parameter.grad.clone() for parameter in built.parameters()]
    (slow, slow_grads), (fast, fast_grads) = found["torch"], found["triton"]
    for a, b in zip(slow.router_probs, fast.router_probs, strict=True):
        assert torch.equal(a > 0, b > 0)
    torch.testing.assert_close(fast.logits, slow.logits, atol=1e-4, rtol=1e-4)
    for a, b in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
