"""Ways to choose tokens beside the tempered softmax, and the pull to a target rate."""

import invariants
import pytest
import torch
from helpers import tiny_config, tiny_encoder, tiny_lm, tiny_model, token_ids

import modeling_seqboat
from modeling_seqboat import SeqBoatCache, SeqBoatForCausalLM
from modeling_seqboat.flops_seqboat import layer_flops
from modeling_seqboat.router_seqboat import random_activation
from modeling_seqboat.training_seqboat import parameter_groups

GUMBEL = ("gumbel", "gumbel_straight_through")
KINDS = (*GUMBEL, "never", "random")
CAUSAL = [getattr(invariants, f"check_{name}") for name in (
    "padding", "batch_mates", "packing", "chunks", "causality", "gradients", "rollback", "generation",
)]  # fmt: skip


def rates(outputs) -> list[float]:
    return [(probs > 0).float().mean().item() for probs in outputs.router_probs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CAUSAL, ids=lambda check: check.__name__)
def test_what_holds_for_the_tempered_softmax_holds(kind, check):
    check(tiny_lm(router_type=kind, router_random_rate=0.4))


@pytest.mark.parametrize("kind", ["never", "random"])
def test_the_decode_step_is_one_graph(kind):
    invariants.check_compiled_step(tiny_lm(router_type=kind, num_hidden_layers=1))


@pytest.mark.parametrize("kind", KINDS)
def test_encoders(kind):
    model = tiny_encoder(router_type=kind)
    invariants.check_encoder(model)
    invariants.check_gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_model_and_cache_survive_a_file(kind, tmp_path):
    model = tiny_lm(router_type=kind, router_random_rate=0.3, router_random_seed=5)
    invariants.check_files(model, tmp_path)
    with pytest.raises(ValueError, match=f"router_type is '{kind}'"):
        SeqBoatCache.load(tmp_path / "state.safetensors", tiny_config(router_type="always"))


# Gumbel noise


@pytest.mark.parametrize("kind", GUMBEL)
@torch.no_grad()
def test_without_training_the_larger_logit_decides(kind):
    ids = token_ids(2, 50)
    found = tiny_lm(router_type=kind)(ids, output_router_probs=True)
    expected = tiny_lm()(ids, output_router_probs=True)
    first, plain = found.router_probs[0], expected.router_probs[0]
    assert 0.2 < rates(expected)[0] < 0.8
    assert torch.equal(first > 0, plain > 0)
    if kind == "gumbel":
        assert torch.equal(first, plain) and torch.equal(found.logits, expected.logits)
    else:
        assert set(first.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", GUMBEL)
@torch.no_grad()
def test_in_training_tokens_are_drawn_with_the_probability_of_their_logits(kind):
    model = tiny_lm(router_type=kind, activation_bias=0.5)
    router = model.model.layers[0].router.train()
    router.bias.copy_(torch.tensor([0.2, 0.9]))
    x = torch.zeros(40, 500, model.config.hidden_size)
    torch.manual_seed(0)
    confidence, active, _ = router(x, None)
    expected = torch.sigmoid(torch.tensor(0.9 - 0.2 - 0.5)).item()
    assert active.float().mean().item() == pytest.approx(expected, abs=0.02)
    assert torch.equal(active, confidence > 0)
    assert (confidence[active] == 1).all() if kind != "gumbel" else (confidence[active] > 0.5).all()
    real = torch.rand(40, 500) < 0.5
    assert not router(x, real)[1][~real].any()
    assert not torch.equal(router(x, None)[1], active)
    torch.manual_seed(0)
    assert torch.equal(router(x, None)[0], confidence)


def test_straight_through_is_one_with_the_gradient_of_the_soft_probability():
    x, found = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0)), []
    for kind in GUMBEL:
        router = tiny_lm(router_type=kind).model.layers[0].router.train()
        torch.manual_seed(1)
        confidence, active, _ = router(x, None)
        confidence.sum().backward()
        found.append((active, [parameter.grad for parameter in router.parameters()]))
    (active, soft), (again, hard) = found
    assert torch.equal(active, again) and 0 < active.float().mean() < 1
    for expected, gradient in zip(soft, hard, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputation_under_checkpointing_decides_the_same(kind):
    ids, results = token_ids(2, 40), []
    for checkpointing in (False, True):
        model = tiny_lm(router_type=kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", GUMBEL)
def test_short_trainings_in_half_precision_stay_finite(kind):
    model, ids = tiny_lm(router_type=kind).to(torch.bfloat16).train(), token_ids(4, 40)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, router_learning_rate=1e-2), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
    assert loss.isfinite()


# Never and random


def test_never_is_the_model_without_attention_and_its_gradients_are_zero():
    model, ids = tiny_lm(router_type="never"), token_ids(2, 30)
    outputs = model(ids, labels=ids, output_router_probs=True)
    assert rates(outputs) == [0, 0] and not hasattr(model.model.layers[0].router, "weight")
    outputs.loss.backward()
    attention = [p for name, p in model.named_parameters() if ".attention." in name]
    assert attention and all(torch.equal(p.grad, torch.zeros_like(p)) for p in attention)
    skipping = tiny_lm(rate=0)
    skipping.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(skipping(ids).logits, outputs.logits)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_the_random_rate_is_what_was_asked_for(rate):
    places = torch.arange(50_000)[None]
    drawn = torch.stack([random_activation(places, layer, rate, seed)[0] for layer in range(3) for seed in (0, 7)])
    shares = drawn.float().mean(1)
    assert (shares - rate).abs().max() <= 4.5 * (rate * (1 - rate) / 50_000) ** 0.5
    # As many pairs are drawn by two layers, or one layer and its next place, as chance gives.
    for pairs in (drawn[1:] & drawn[:-1], drawn[:, 1:] & drawn[:, :-1]):
        assert (pairs.float().mean(1) - rate**2).abs().max() <= 6 * (rate**2 / 50_000) ** 0.5
    assert rate == 1 or len({tuple(row.tolist()) for row in drawn[:, :2000]}) == 6


def test_the_draw_is_a_function_of_seed_layer_and_place_alone():
    """The values are fixed, so that a saved model draws the same on every machine and in every version."""
    places = torch.tensor([[0, 1, 2, 3, 1000, 2**31, 2**33 + 5]])
    drawn = [random_activation(places, layer, 0.5, seed)[0].int().tolist() for layer, seed in ((0, 0), (1, 0), (0, 1))]
    assert drawn == [[0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]]


@torch.no_grad()
def test_random_does_not_look_at_tokens_positions_or_generators():
    model = tiny_lm(router_type="random", router_random_rate=0.4)
    first = model(token_ids(2, 300), output_router_probs=True).router_probs
    torch.manual_seed(99)
    ids = token_ids(2, 300, seed=8)
    outputs = model(ids, position_ids=torch.arange(300)[None] + 70, output_router_probs=True)
    assert all(torch.equal(a, b) for a, b in zip(first, outputs.router_probs, strict=True))
    assert torch.equal(first[0][0], first[0][1]) and not torch.equal(first[0], first[1])
    assert all(rate == pytest.approx(0.4, abs=0.1) for rate in rates(outputs))
    other = tiny_lm(router_type="random", router_random_rate=0.4, router_random_seed=1)
    assert not torch.equal(other(ids, output_router_probs=True).router_probs[0], first[0])


def test_the_cache_of_another_draw_is_refused():
    cache = tiny_lm(router_type="random")(token_ids(1, 5)).past_key_values
    for options in ({"router_random_seed": 1}, {"router_random_rate": 0.2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            tiny_lm(router_type="random", **options)(token_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_only_learned_routers_cost_flops(kind):
    assert (layer_flops(tiny_config(router_type=kind), 10, 0, 0).router > 0) == (kind in GUMBEL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("router_random_rate", 0),
        ("router_random_rate", 1.1),
        ("router_random_rate", None),
        ("router_random_seed", -1),
        ("router_random_seed", 0.5),
        ("router_target_rate", 1.5),
        ("router_target_rate", "0.3"),
        ("router_target_weight", -1),
        ("router_target_scope", "models"),
    ],
)
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        tiny_config(**{field: value})


@pytest.mark.parametrize("kind", ["always", "never", "random"])
def test_a_target_for_a_router_without_parameters_is_refused(kind):
    with pytest.raises(ValueError, match=f"router_target_rate=0.3 contradicts router_type='{kind}'"):
        tiny_config(router_type=kind, router_target_rate=0.3)


# Target rate

TARGET = {"router_target_rate": 0.25, "router_target_weight": 3.0}


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("rate", [0, 0.5, 1])
@pytest.mark.parametrize("kind", ["tempered_softmax", *GUMBEL])
def test_the_penalty_is_the_squared_distance_and_moves_routers_at_any_rate(kind, rate, scope):
    model = tiny_lm(rate=rate, router_type=kind, router_target_scope=scope, **TARGET).train()
    ids = token_ids(3, 30)
    if rate != 0.5:
        # Clear decisions, but not so clear that the soft probability is flat.
        with torch.no_grad():
            for layer in model.model.layers:
                layer.router.bias.mul_(0.01)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    torch.manual_seed(0)
    outputs = model(ids, attention_mask=mask, output_router_probs=True)
    shares = [(probs > 0).sum() / mask.sum() for probs in outputs.router_probs]
    assert rate == 0.5 or all(share == rate for share in shares)
    if scope == "model":
        expected = 3 * 2 * (sum(shares) / 2 - 0.25) ** 2
    else:
        expected = 3 * sum((share - 0.25) ** 2 for share in shares) / 2
    torch.testing.assert_close(outputs.router_penalty, expected)
    outputs.router_penalty.backward()
    first, last = (layer.router for layer in model.model.layers)
    assert first.bias.grad[1] != 0
    # Down where too much is activated, up where too little is; no decision of a layer depends on its temperature.
    assert last.bias.grad[1] * (1 if rate else -1) > 0
    assert last.log_temperature.grad is None


def heads():
    ids = token_ids(2, 12)
    text = {"input_ids": ids}
    picture = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    classes, values = torch.tensor([0, 1]), {"input_type": "values", "bidirectional": True}
    yield "SeqBoatForCausalLM", {}, text | {"labels": ids}
    yield "SeqBoatForSequenceClassification", {}, text | {"labels": classes}
    yield (
        "SeqBoatForSequenceClassification",
        {"pair_features": "nli"},
        text | {"pair_input_ids": ids, "labels": classes},
    )
    yield "SeqBoatForTokenClassification", {}, text | {"labels": ids % 2}
    yield "SeqBoatForQuestionAnswering", {}, text | {"start_positions": classes, "end_positions": classes + 3}
    yield "SeqBoatForMaskedLM", {"bidirectional": True}, text | {"labels": ids}
    yield "SeqBoatForImageClassification", values, {"pixel_values": picture, "labels": classes}
    yield "SeqBoatForAudioClassification", values, {"input_values": picture.flatten(1), "labels": classes}


@pytest.mark.parametrize(
    ("head", "options", "inputs"), list(heads()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_head_adds_it_in_training_and_not_in_evaluation(head, options, inputs):
    if options.get("input_type") == "values":
        options = options | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    kind = getattr(modeling_seqboat, head)
    model, plain = (tiny_model(kind, tiny_config(**options, **target)) for target in (TARGET, {}))
    outputs, expected = model(**inputs), plain(**inputs)
    assert expected.router_penalty is None and outputs.router_penalty > 0
    assert torch.equal(outputs.loss, expected.loss)
    outputs = model.train()(**inputs)
    torch.testing.assert_close(outputs.loss, expected.loss + outputs.router_penalty)


def test_micro_batches_weigh_it_by_their_labels():
    model, ids = tiny_lm(**TARGET).train(), token_ids(4, 20)
    plain = tiny_lm().train()
    total = torch.tensor(3 * 19)
    for rows in (slice(0, 1), slice(1, 3)):
        part = ids[rows]
        outputs = model(part, labels=part, num_items_in_batch=total)
        expected = plain(part, labels=part, num_items_in_batch=total).loss
        torch.testing.assert_close(outputs.loss, expected + outputs.router_penalty * part.shape[0] / 3)


@pytest.mark.parametrize("kind", ["tempered_softmax", *GUMBEL])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_short_training_reaches_the_target_from_either_end(kind, start):
    model = tiny_lm(router_type=kind, router_target_rate=0.3, router_target_scope="layer", hidden_size=16).train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.weight.mul_(0.05)
            layer.router.bias.copy_(torch.tensor([0.0, 3.0] if start else [3.0, 0.0]))
    ids = token_ids(4, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    torch.manual_seed(0)
    seen = []
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(ids, labels=ids, output_router_probs=True)
        outputs.loss.backward()
        optimizer.step()
        seen.append(rates(outputs))
    seen = torch.tensor(seen)
    assert ((seen[0] - start).abs() < 0.15).all()
    assert ((seen[-20:].mean(0) - 0.3).abs() < 0.07).all(), seen[-20:].mean(0)


def test_it_is_off_by_default():
    config = tiny_config()
    assert config.router_target_rate is None
    model, ids = SeqBoatForCausalLM(config).train(), token_ids(1, 8)
    assert model(ids, labels=ids).router_penalty is None
