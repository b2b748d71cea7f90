"""The decode step compiles as one graph and does what the eager model does."""

import pytest
import torch
from small_models import pad_left, random_ids, small_lm
from torch._dynamo.utils import counters
from triton_interpreter import DEVICE  # before anything imports triton

from modeling_seqboat import SeqBoatCache


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def assert_states_close(found: SeqBoatCache, expected: SeqBoatCache) -> None:
    for (name, a), (_, b) in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


# A second layer doubles the time of a trace and is run as the first: one of these has two.
STEPS = {
    "rotary-softmax": {},
    "rotary-softmax-one": {"num_hidden_layers": 1},
    "simple-relu2-truncated": {
        "num_hidden_layers": 1,
        "position_embedding_type": "simple",
        "attention_activation": "relu2",
        "ssm_truncation": 5,
    },
    "local-laplace-ffn": {
        "num_hidden_layers": 1,
        "position_embedding_type": "local",
        "attention_activation": "laplace",
        "intermediate_size": 24,
    },
}


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ("rotary-softmax", True),
        ("rotary-softmax-one", False),
        ("simple-relu2-truncated", True),
        ("local-laplace-ffn", False),
    ],
)
def test_the_decode_step_is_one_graph_that_never_recompiles(options, masked):
    model = small_lm(**STEPS[options])
    prompt = pad_left([random_ids(1, 11)[0], random_ids(1, 5)[0], random_ids(1, 1)[0]])
    steps = random_ids(3, 20, seed=4)
    mask = torch.ones(3, 1, dtype=torch.long) if masked else None
    caches = [SeqBoatCache(model.config, static=True) for _ in range(2)]
    for cache in caches:
        model(**prompt, past_key_values=cache)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    activated = []
    for column in range(steps.shape[1]):
        token = steps[:, column : column + 1]
        if masked and column == 9:
            mask = torch.tensor([[1], [0], [1]])
        found = compiled(token, attention_mask=mask, past_key_values=caches[0], use_cache=True)
        expected = model(token, attention_mask=mask, past_key_values=caches[1], output_router_probs=True)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        activated.append(int((expected.router_probs[0] > 0).sum()))
    # Steps where no, some and all rows attend went through the same graph.
    assert {0, 3} <= set(activated) or len(set(activated)) > 2
    assert counters["stats"]["unique_graphs"] == 1
    assert_states_close(*caches)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 31


def test_the_decode_step_traces_through_autograd_and_functionalisation():
    """aot_eager sees the in-place updates as a real backend does."""
    model, steps = small_lm(num_hidden_layers=1, ssm_truncation=5), random_ids(2, 8, seed=4)
    caches = [SeqBoatCache(model.config, static=True) for _ in range(2)]
    for cache in caches:
        model(random_ids(2, 9), past_key_values=cache)
    addresses = {name: tensor.data_ptr() for name, tensor in caches[0].tensors()}
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for token in steps.split(1, dim=1):
        found = compiled(token, past_key_values=caches[0], use_cache=True).logits
        torch.testing.assert_close(found, model(token, past_key_values=caches[1]).logits, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert {name: tensor.data_ptr() for name, tensor in caches[0].tensors()} == addresses
    assert_states_close(*caches)


def test_the_step_of_a_dynamic_cache_compiles_too():
    model, steps = small_lm(num_hidden_layers=1), random_ids(2, 12, seed=4)
    caches = [SeqBoatCache(model.config) for _ in range(2)]
    for cache in caches:
        model(random_ids(2, 9), past_key_values=cache)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    for token in steps.split(1, dim=1):
        found = compiled(token, past_key_values=caches[0], use_cache=True).logits
        torch.testing.assert_close(found, model(token, past_key_values=caches[1]).logits, atol=1e-4, rtol=1e-4)
    # The count of columns is a plain integer here: it becomes a symbol after the first steps.
    assert counters["stats"]["unique_graphs"] <= 3
    assert caches[0].get_seq_length() == 21
    assert_states_close(*caches)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_embedding_type": "simple", "attention_activation": "relu2"},
        {"position_embedding_type": "local", "attention_activation": "softmax", "intermediate_size": 24},
    ],
    ids=["rotary-softmax", "simple-relu2", "local-ffn"],
)
@pytest.mark.parametrize("compiles", [False, True])
def test_a_step_by_kernels_is_the_step_in_torch(options, compiles, monkeypatch):
    """The kernels that a GPU takes, here in Triton's interpreter; under a compiler as an op of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # One layer: the interpreter is slow, and a second runs as the first.
    model = small_lm(num_hidden_layers=1, **options).to(DEVICE)
    steps = random_ids(3, 12, seed=4).to(DEVICE)
    prompt = {name: tensor.to(DEVICE) for name, tensor in pad_left([row for row in random_ids(3, 9)]).items()}
    caches = [SeqBoatCache(model.config, static=static) for static in (compiles, False)]
    for cache in caches:
        model(**prompt, past_key_values=cache)
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if compiles else model.forward
    mask = torch.tensor([[1], [0], [1]], device=DEVICE)
    for column in range(12):
        token = steps[:, column : column + 1]
        arguments = {"attention_mask": mask} if compiles or column == 5 else {}
        logits = []
        for call, backend, cache in ((forward, "triton", caches[0]), (model, "torch", caches[1])):
            monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", backend)
            logits.append(call(token, past_key_values=cache, use_cache=True, **arguments).logits)
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert_states_close(*caches)


def test_a_compiler_is_not_taken_for_an_export(monkeypatch):
    """torch 2.11 has `torch.compiler.is_exporting` True under `torch.compile`; a step would leave the kernels out.
    They are given what is contiguous: no copy is hidden from the compiler."""
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "triton")
    seen, model = [], small_lm(num_hidden_layers=1).eval().to(DEVICE)

    def backend(graph, inputs):
        seen.extend(node for node in graph.graph.nodes if "_seqboat." in str(node.target))
        return graph.forward

    cache = SeqBoatCache(model.config, static=True)
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        step(random_ids(2, 1).to(DEVICE), past_key_values=cache, use_cache=True)
    assert [node.target._schema.name.split("::")[1] for node in seen] == ["route", "memory_step"]
    for node in seen:
        given = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.fx.Node)]
        assert given and all(value.meta["example_value"].is_contiguous() for value in given)


def test_gradients_of_a_compiled_training_forward_of_one_column(monkeypatch):
    """The router's kernel as an op of compiled graphs has none: where they are wanted its torch twin runs."""
    monkeypatch.setenv("SEQBOAT_KERNEL_BACKEND", "triton")
    model, ids, found = small_lm(num_hidden_layers=1).train().to(DEVICE), random_ids(6, 1).to(DEVICE), []
    for forward in (model.forward, torch.compile(model.forward, backend="aot_eager")):
        model.zero_grad()
        with torch.enable_grad():
            forward(ids, use_cache=False).logits.square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(bool(grad.any()) for name, grad in found[0].items() if "router" in name)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
