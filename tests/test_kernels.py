"""The choice between torch and Triton: by config and environment, refused with a reason where it cannot run."""

import pytest
import torch
from triton_interpreter import DEVICE  # first, before anything imports triton

from modeling_seqboat import (
    SeqBoatConfig,
    SeqBoatForCausalLM,
    SeqBoatForSequenceClassification,
    context_seqboat,
    kernels_seqboat,
)
from modeling_seqboat.graphed_step_seqboat import GraphedStep
from modeling_seqboat.kernels_seqboat import OPS, explain, requested_backend, select_ops


def model(**overrides):
    torch.manual_seed(0)
    fields = {
        "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "qk_head_dim": 16, "v_head_dim": 40,
        "memory_size": 8,
    }  # fmt: skip
    built = SeqBoatForCausalLM(SeqBoatConfig(**(fields | overrides)))
    with torch.no_grad():
        for layer in built.model.layers:
            if layer.router.learned:
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


def reasons(device="cuda", dtype=torch.bfloat16, training=True, **overrides):
    """Op -> why it runs in torch, None where it runs in Triton."""
    return {choice.op: choice.reason for choice in explain(SeqBoatConfig(**overrides), device, dtype, training)}


def test_auto_takes_torch_on_a_cpu_and_triton_on_a_gpu_where_it_can(no_interpreter):
    everywhere = {"pack", "gather_rows", "extract_residual", "norm_residual", "linear", "windowed_attention"}
    everywhere |= {"project_unit", "gated_unit", "route"}
    causal = everywhere | {"memory_step", "write_memory", "ema_parameters", "ema_scan", "ema_step"}
    assert reasons() == dict.fromkeys(causal)
    assert set(reasons("cpu").values()) == {"tensors are on cpu, Triton needs a CUDA device"}
    assert set(reasons(kernel_backend="torch").values()) == {"kernel_backend='torch'"}
    assert set(reasons(dtype=torch.float64).values()) == {"the kernels have no float64"}
    encoder = reasons(bidirectional=True, router_type="always", norm_type="batchnorm")
    assert set(encoder) == everywhere - {"route"} | {"ema_parameters", "ema_scan"}


@pytest.mark.parametrize(
    ("overrides", "stays"),
    [
        ({"hidden_act": "gelu"}, ("project_unit", "gated_unit", "extract_residual")),
        ({"attention_activation": "laplace"}, ("windowed_attention", "gated_unit")),
        ({"attention_dropout": 0.1}, ("windowed_attention", "gated_unit")),
        ({"qk_head_dim": 258}, ("windowed_attention", "gated_unit")),
        ({"value_dropout": 0.1}, ("gated_unit",)),
        ({"router_type": "gumbel"}, ("route",)),
        ({"router_type": "gumbel_straight_through"}, ("route",)),
        ({"router_target_rate": 0.5}, ("route",)),
        ({"norm_type": "batchnorm", "bidirectional": True}, ("norm_residual",)),
        ({"ssm_type": "s4d"}, ("s4d_scan",)),
        ({"ssm_type": "s5"}, ("s5_scan",)),
        ({"norm_type": "rmsnorm"}, ()),
        ({"norm_type": "scalenorm", "norm_first": False}, ()),
        ({"router_type": "random", "hidden_dropout": 0.1, "ssm_truncation": 8}, ()),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_named_and_an_error_where_triton_was_asked_for(overrides, stays, no_interpreter):
    found = {op: reason for op, reason in reasons(**overrides).items() if reason is not None}
    assert found.keys() == set(stays)
    field, value = next(iter(overrides.items()))
    for reason in found.values():
        assert field in reason or str(value) in reason
    config = SeqBoatConfig(**overrides, kernel_backend="triton")
    if stays:
        with pytest.raises(ValueError, match=f"kernel_backend='triton' cannot run ({'|'.join(stays)}): "):
            select_ops(config, torch.device("cuda"), torch.bfloat16, training=True)
    else:
        assert select_ops(config, torch.device("cuda"), torch.bfloat16, training=True).opaque


def test_dropouts_and_noise_stand_in_the_way_in_training_only(no_interpreter):
    options = {"attention_dropout": 0.1, "value_dropout": 0.1, "router_type": "gumbel"}
    assert set(reasons(training=False, **options).values()) == {None}


GRID = [
    {}, {"hidden_act": "gelu"}, {"attention_activation": "laplace"}, {"value_dropout": 0.2}, {"router_type": "gumbel"},
    {"norm_type": "rmsnorm"}, {"norm_type": "scalenorm", "norm_first": False}, {"ssm_type": "s4d"},
    {"router_type": "random"}, {"position_embedding_type": "local"},
]  # fmt: skip


@pytest.mark.parametrize("overrides", GRID, ids=str)
@pytest.mark.parametrize("use_cache", [False, True])
def test_the_ops_that_run_are_those_that_the_table_names(overrides, use_cache, monkeypatch):
    """With a cache, which evaluation has by default, as without one."""
    ran = []
    for name, entry in OPS.items():
        for backend in ("torch", "triton"):
            function = getattr(entry, backend)

            def traced(*args, name=name, backend=backend, function=function, **kwargs):
                ran.append((name, backend))
                return function(*args, **kwargs)

            if function is not None:
                entry = entry._replace(**{backend: traced})
        monkeypatch.setitem(OPS, name, entry)
    monkeypatch.setattr(kernels_seqboat, "_SELECTED", {})
    # On a CPU only the interpreter stands for the GPU, and `auto` leaves that alone: here it takes it.
    plain = kernels_seqboat._choice
    as_on_a_gpu = (
        plain if DEVICE == "cuda" else lambda name, entry, facts: plain(name, entry, facts._replace(device="cuda"))
    )
    monkeypatch.setattr(kernels_seqboat, "_choice", as_on_a_gpu)
    built = model(num_hidden_layers=1, **overrides).train(not use_cache).to(DEVICE)
    out = built(torch.zeros(2, 9, dtype=torch.long, device=DEVICE), use_cache=use_cache)
    if not use_cache:
        out.logits.sum().backward()
    chosen = {choice.op: choice.backend for choice in explain(built.config, DEVICE, torch.float32, not use_cache)}
    assert dict(ran).items() <= chosen.items()
    missing = chosen.keys() - dict(ran).keys()
    # Those of a decode step, what a sequence of kernels does in one piece, and the noise that a router draws itself.
    allowed = {"ema_step", "memory_step"} | (set() if use_cache else {"write_memory"})
    if chosen["gated_unit"] == "triton":
        allowed |= {"project_unit", "windowed_attention"}
    if chosen.get("route") == "torch":
        allowed |= {"route"}
    assert missing <= allowed


def test_the_environment_overrides_the_config(monkeypatch):
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "torch")
    assert requested_backend("triton") == "torch"
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        requested_backend("auto")


def whole_model_on(backend, built, monkeypatch, **inputs):
    """Outputs, and gradients of every parameter."""
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", backend)
    built.to(DEVICE).zero_grad()
    out = built(**{name: tensor.to(DEVICE) for name, tensor in inputs.items()}, output_router_probs=True)
    out.loss.backward()
    return out, [parameter.grad.clone() for parameter in built.parameters()]


def assert_the_same_on_both(built, monkeypatch, **inputs):
    slow, slow_grads = whole_model_on("torch", built, monkeypatch, **inputs)
    fast, fast_grads = whole_model_on("triton", built, monkeypatch, **inputs)
    for a, b in zip(slow.router_probs, fast.router_probs, strict=True):
        assert torch.equal(a > 0, b > 0)
    torch.testing.assert_close(fast.logits, slow.logits, atol=1e-4, rtol=1e-4)
    for a, b in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", ["softmax", "relu2"])
@pytest.mark.parametrize("positions", ["rotary", "local"])
def test_a_whole_model_computes_the_same_on_both(attention, positions, monkeypatch):
    built = model(attention_activation=attention, position_embedding_type=positions)
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    assert_the_same_on_both(built, monkeypatch, input_ids=ids, labels=ids)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("norm", ["layernorm", "scalenorm", "after"])
def test_padded_and_packed_rows_are_the_same_on_both(kind, norm, monkeypatch):
    overrides = {"norm_first": False} if norm == "after" else {"norm_type": norm}
    built = model(num_hidden_layers=1, **overrides).train()
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids}
    if kind == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :7] = 0
    else:
        inputs["position_ids"] = torch.cat([torch.arange(20), torch.arange(13), torch.arange(17)]).expand(2, -1)
    assert_the_same_on_both(built, monkeypatch, **inputs)


@pytest.mark.parametrize("truncation", [None, 5])
def test_a_bidirectional_model_is_the_same_on_both(truncation, monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "state_size": 4, "qk_head_dim": 16, "v_head_dim": 40, "memory_size": 8}
    config = SeqBoatConfig(num_hidden_layers=1, bidirectional=True, ssm_truncation=truncation, **shape)
    built = SeqBoatForSequenceClassification(config).train()
    with torch.no_grad():
        for layer in built.model.layers:
            layer.router.weight.normal_(0, 1)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = mask[1, 40:] = 0
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    assert_the_same_on_both(built, monkeypatch, input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1]))


def test_dropout_takes_the_kernels_too_and_is_drawn_alike_when_a_layer_runs_twice(monkeypatch):
    built = model(hidden_dropout=0.2).train()
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            built.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        found.append(whole_model_on("triton", built, monkeypatch, input_ids=ids, labels=ids))
    assert torch.equal(found[0][0].logits, found[1][0].logits)
    for once, twice in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(twice, once, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        clean = built.eval()(ids.to(DEVICE), labels=ids.to(DEVICE))
    assert not torch.allclose(clean.logits, found[0][0].logits, atol=1e-3)


@pytest.mark.parametrize("positions", ["rotary", "local", "simple"])
def test_a_stream_filled_up_to_a_capacity_changes_no_number(positions, monkeypatch):
    built = model(num_hidden_layers=1, position_embedding_type=positions, max_position_embeddings=64).train()
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids}
    waiting, waiting_grads = whole_model_on("triton", built, monkeypatch, **inputs)
    counts = [int((probs > 0).sum()) for probs in waiting.router_probs]
    for layer, count in zip(built.model.layers, counts, strict=True):
        layer.stream_capacity, layer.counts_stream = count + 7, True
    padded, padded_grads = whole_model_on("triton", built, monkeypatch, **inputs)
    assert [int(layer.stream_count) for layer in built.model.layers] == counts
    torch.testing.assert_close(padded.logits, waiting.logits, atol=1e-6, rtol=1e-6)
    for a, b in zip(padded_grads, waiting_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_stream_too_short_reports_its_count_and_stays_finite(monkeypatch):
    built = model().train()
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    built.model.layers[0].stream_capacity, built.model.layers[0].counts_stream = 5, True
    out, grads = whole_model_on("triton", built, monkeypatch, input_ids=ids, labels=ids)
    assert int(built.model.layers[0].stream_count) == int((out.router_probs[0] > 0).sum()) > 5
    assert bool(out.logits.isfinite().all()) and all(bool(grad.isfinite().all()) for grad in grads)


def test_a_graphed_step_refuses_a_model_that_is_not_on_a_gpu():
    with pytest.raises(ValueError, match="on one CUDA device, got \\['cpu'\\]"):
        GraphedStep(model())


def test_padding_and_segments_are_read_off_the_device_once(monkeypatch):
    """Labels and heads take what the model found out about the columns."""
    built, asked = model().train(), []
    ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = torch.cat([torch.arange(20), torch.arange(10)]).expand(2, -1)
    for name in ("real_columns", "segment_starts"):
        function = getattr(context_seqboat, name)
        monkeypatch.setattr(context_seqboat, name, lambda *args, n=name, f=function: asked.append(n) or f(*args))
    built(ids, attention_mask=mask, position_ids=positions, labels=ids).loss.backward()
    assert asked == ["real_columns", "segment_starts"]
