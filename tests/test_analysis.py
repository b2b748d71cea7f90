"""Rates, spans, context and FLOPs against loops over tokens, and FLOPs against a count of the products that run."""

import math

import pytest
import torch
from helpers import randomise, tiny_config, tiny_encoder, tiny_lm, token_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_seqboat import kernels_seqboat
from modeling_seqboat.analysis_seqboat import (
    BYTE_CLASS_NAMES,
    TokenClasses,
    analyse_activations,
    attention_reach,
    byte_classes,
)
from modeling_seqboat.flops_seqboat import layer_flops
from modeling_seqboat.ops_naive_seqboat import windowed_attention_naive


def reach_naive(active, memory_size, bidirectional, real, segment):
    """Token by token: the window is counted over the row's activated tokens, distances over its real ones."""
    keys, mean, farthest = (torch.zeros(active.shape, dtype=torch.float64) for _ in range(3))
    for row in range(active.shape[0]):
        for query in active[row].nonzero()[:, 0].tolist():
            mates = [c for c in active[row].nonzero()[:, 0].tolist() if segment[row, c] == segment[row, query]]
            at = mates.index(query)
            seen = mates[max(0, at - memory_size) : at + 1 + (memory_size if bidirectional else 0)]
            distances = [abs(int(real[row, :query].sum()) - int(real[row, :key].sum())) for key in seen]
            keys[row, query], mean[row, query] = len(seen), sum(distances) / len(seen)
            farthest[row, query] = max(distances)
    return keys, mean, farthest


def random_rows(seed: int, rate: float, batch: int = 3, length: int = 41):
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(batch, length, generator=generator) < 0.8
    active = real & (torch.rand(batch, length, generator=generator) < rate)
    segment = (torch.rand(batch, length, generator=generator) < 0.1).long().cumsum(1)
    return active, real, segment


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("memory_size", [1, 4, 100])
def test_reach_equals_the_loop(bidirectional, rate, memory_size):
    active, real, segment = random_rows(memory_size, rate)
    expected = reach_naive(active, memory_size, bidirectional, real, segment)
    found = attention_reach(active, memory_size, bidirectional, real=real, segment=segment)
    for name, want in zip(("keys", "mean_distance", "farthest"), expected, strict=True):
        torch.testing.assert_close(getattr(found, name).double(), want, msg=name)


def test_reach_of_a_row_without_padding_and_segments():
    active = torch.tensor([[True, False, False, True, True]])
    reach = attention_reach(active, 1, False)
    assert reach.keys.tolist() == [[1, 0, 0, 2, 2]]
    assert reach.mean_distance.tolist() == [[0, 0, 0, 1.5, 0.5]]
    assert reach.farthest.tolist() == [[0, 0, 0, 3, 1]]


def test_byte_classes():
    text = "a Z\t7\n.é\x00".encode()
    names = [BYTE_CLASS_NAMES[place] for place in byte_classes(torch.tensor([*text, 256, 263]))]
    assert names == [
        *["letter", "whitespace", "letter", "whitespace", "digit", "whitespace", "punctuation"],
        *["non-ASCII", "non-ASCII", "other", "other", "other"],
    ]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        byte_classes(torch.tensor([3, -1]))


def report_of(model, **inputs):
    """The report on a model's own decisions."""
    with torch.no_grad():
        probs = model(**inputs, output_router_probs=True).router_probs
    return probs, analyse_activations(probs, model.config, **inputs, bucket_size=8)


def test_rates_by_layer_position_and_class():
    model, ids = tiny_lm(vocab_size=264), token_ids(3, 37, vocab_size=264)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, 5:9] = 0
    probs, report = report_of(model, input_ids=ids, attention_mask=mask)
    real = mask.bool()
    assert report.tokens == int(mask.sum())
    places = mask.cumsum(1) - 1
    for layer, confidence in enumerate(probs):
        active = confidence > 0
        assert report.rates[layer].item() == pytest.approx(active.sum().item() / report.tokens)
        assert 0 < report.rates[layer] < 1
        for bucket, rate in enumerate(report.bucket_rates[layer].tolist()):
            inside = real & (places // 8 == bucket)
            assert rate == pytest.approx(active[inside].float().mean().item())
        for place, rate in enumerate(report.class_rates[layer].tolist()):
            inside = real & (byte_classes(ids) == place)
            assert (
                math.isnan(rate) if not inside.any() else rate == pytest.approx(active[inside].float().mean().item())
            )
    assert report.class_tokens.sum() == report.bucket_tokens.sum() == report.tokens
    assert torch.equal(report.class_activated.sum(1), report.activated)


@pytest.mark.parametrize("build", [tiny_lm, tiny_encoder])
def test_spans_and_context_of_a_model(build):
    model, ids = build(), token_ids(2, 30)
    probs, report = report_of(model, input_ids=ids)
    everything = torch.ones_like(ids)
    for layer, confidence in enumerate(probs):
        active = confidence > 0
        keys, mean, farthest = reach_naive(
            active, model.config.memory_size, model.config.bidirectional, everything, torch.zeros_like(ids)
        )
        assert report.pairs[layer] == keys.sum()
        assert report.spans[layer].item() == pytest.approx(mean[active].mean().item())
        assert report.contexts[layer].item() == pytest.approx(farthest[active].mean().item())


def test_a_padded_or_packed_batch_gives_what_its_texts_give_one_by_one():
    """Padding and batch mates change nothing; packed rows equal separate rows."""
    model = tiny_lm()
    texts = [token_ids(length, seed=length) for length in (9, 1, 23)]
    alone = [report_of(model, input_ids=text[None])[1] for text in texts]
    summed = alone[0] + alone[1] + alone[2]
    width = max(map(len, texts))
    padded = torch.stack([nn.functional.pad(text, (width - len(text), 0)) for text in texts])
    mask = torch.stack([(torch.arange(width) >= width - len(text)).long() for text in texts])
    packed = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    for _, report in (
        report_of(model, input_ids=padded, attention_mask=mask),
        report_of(model, input_ids=packed, position_ids=positions),
        report_of(model, input_ids=packed, cu_seq_lens_q=torch.tensor([0, 9, 10, 33])),
        report_of(model, input_ids=packed, seq_idx=torch.arange(3).repeat_interleave(torch.tensor([9, 1, 23]))[None]),
    ):
        for name in ("tokens", "always_on_pairs"):
            assert getattr(report, name) == getattr(summed, name)
        for name in ("activated", "bucket_tokens", "bucket_activated", "class_activated", "pairs", "farthest"):
            assert torch.equal(getattr(report, name), getattr(summed, name)), name
        torch.testing.assert_close(report.distance, summed.distance)
        assert report.flops_saved == summed.flops_saved


def test_a_row_of_pads_and_a_layer_that_never_attends():
    model, ids = tiny_lm(rate=0), token_ids(1, 5)
    _, report = report_of(model, input_ids=ids)
    assert report.rates.tolist() == [0, 0] and report.spans.isnan().all() and report.contexts.isnan().all()
    assert report.share_saved > 0
    _, report = report_of(model, input_ids=ids, attention_mask=torch.zeros_like(ids))
    assert report.tokens == 0 and report.rates.isnan().all() and math.isnan(report.share_saved)
    assert report.bucket_rates.shape == (2, 0)


def test_attention_that_is_always_on_saves_nothing():
    model = tiny_lm(router_type="always")
    _, report = report_of(model, input_ids=token_ids(2, 19))
    assert report.rates.tolist() == [1, 1] and report.flops_saved == [0, 0]
    # A router that activates everything costs its own logits: 2 D 2 FLOPs a token.
    _, report = report_of(tiny_lm(rate=1), input_ids=token_ids(2, 19))
    assert report.flops_saved == [-4 * model.config.hidden_size * 38] * 2


def hooked_flops(model: nn.Module, **inputs) -> dict[str, int]:
    """FLOPs of the linears of each layer by forward hooks, 2 an entry of the weight and row."""
    counts: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def count(module, arguments, output, name=name):
                counts[name] = 2 * module.weight.numel() * arguments[0].numel() // module.in_features

            handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("intermediate_size", [0, 20])
def test_flops_of_the_linears_equal_a_count_by_hooks(intermediate_size):
    model, ids = tiny_lm(intermediate_size=intermediate_size), token_ids(2, 29)
    _, report = report_of(model, input_ids=ids)
    counts = hooked_flops(model.model, input_ids=ids)
    for layer, flops in enumerate(report.flops):
        prefix = f"layers.{layer}."
        assert flops.hidden_proj == counts[prefix + "hidden_proj"]
        assert flops.attention_linears == sum(counts[f"{prefix}attention.{name}_proj"] for name in ("in", "out"))
        ffn = sum(counts.get(f"{prefix}ffn.{name}", 0) for name in ("fc1", "fc2"))
        assert flops.ffn == ffn and (ffn > 0) == (intermediate_size > 0)


def matrix_vector_flops(matrix, vector, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(matrix)


def counted_flops(model: nn.Module, **inputs) -> int:
    """FLOPs of every product that a forward runs."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: matrix_vector_flops})
    with counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def sparse_and_always_on(build, **overrides):
    """Two models that differ in the router only."""
    sparse = build(**overrides)
    always_on = randomise(type(sparse)(tiny_config(**sparse.config.to_diff_dict() | {"router_type": "always"}))).eval()
    return sparse, always_on


def test_saved_flops_equal_those_counted_on_the_torch_path():
    """A bidirectional window as wide as the row computes exactly the pairs that are seen, so nothing is left over."""
    sparse, always_on = sparse_and_always_on(tiny_encoder, memory_size=64)
    ids = token_ids(1, 50)
    _, report = report_of(sparse, input_ids=ids)
    saved = counted_flops(always_on, input_ids=ids) - counted_flops(sparse, input_ids=ids)
    assert saved == sum(report.flops_saved) > 0


def test_saved_flops_equal_those_counted_query_by_query(monkeypatch):
    """The causal torch path computes pairs in blocks and masks some; the specification computes those seen alone."""

    def query_by_query(*args, max_keys, dropout_p, gate, **kwargs):
        return windowed_attention_naive(*args, **kwargs) * gate

    entry = kernels_seqboat.OPS["windowed_attention"]
    monkeypatch.setitem(kernels_seqboat.OPS, "windowed_attention", entry._replace(torch=query_by_query))
    monkeypatch.setattr(kernels_seqboat, "_SELECTED", {})
    sparse, always_on = sparse_and_always_on(tiny_lm)
    ids = token_ids(2, 33)
    _, report = report_of(sparse, input_ids=ids)
    saved = counted_flops(always_on, input_ids=ids) - counted_flops(sparse, input_ids=ids)
    assert saved == sum(report.flops_saved) > 0


def test_flops_of_the_ema_equal_the_recurrence_written_out():
    for bidirectional in (False, True):
        for truncation, per_state in ((None, 5), (8, 7)):
            config = tiny_config(bidirectional=bidirectional, ssm_truncation=truncation)
            states = config.hidden_size * config.state_size * (2 if bidirectional else 1)
            assert layer_flops(config, 7, 0, 0).ssm == 7 * (per_state * states + 2 * config.hidden_size)


def test_classes_of_the_callers():
    model, ids = tiny_lm(), token_ids(1, 40)
    with torch.no_grad():
        probs = model(ids, output_router_probs=True).router_probs
    parity = TokenClasses(("even", "odd"), lambda ids: ids % 2)
    report = analyse_activations(probs, model.config, input_ids=ids, token_classes=parity)
    assert report.class_tokens.tolist() == [int((ids % 2 == 0).sum()), int((ids % 2).sum())]
    with pytest.raises(ValueError, match="class 2; there are classes 0 to 1"):
        wrong = TokenClasses(("even", "odd"), lambda ids: torch.full_like(ids, 2))
        analyse_activations(probs, model.config, input_ids=ids, token_classes=wrong)


def test_refuses_what_does_not_fit():
    model, ids = tiny_lm(), token_ids(2, 12)
    with torch.no_grad():
        probs = model(ids, output_router_probs=True).router_probs
    with pytest.raises(ValueError, match="1 layers, the config 2"):
        analyse_activations(probs[:1], model.config)
    with pytest.raises(ValueError, match="one \\(batch, length\\) tensor a layer"):
        analyse_activations((probs[0], probs[1][:1]), model.config)
    with pytest.raises(ValueError, match="input_ids must be of shape \\(2, 12\\)"):
        analyse_activations(probs, model.config, input_ids=ids[:, 1:])
    with pytest.raises(ValueError, match="bucket_size must be an integer of at least 1, got 0"):
        analyse_activations(probs, model.config, bucket_size=0)
    with pytest.raises(ValueError, match="above 0 at padding"):
        analyse_activations(probs, model.config, attention_mask=torch.zeros_like(ids))
    report = analyse_activations(probs, model.config)
    with pytest.raises(ValueError, match="differ in bucket_size: 2 and 3"):
        report + analyse_activations(probs, model.config, bucket_size=3)


def test_a_model_and_ids_give_the_report_of_its_router_probs():
    """`analyse_activations(model, ids)` is short for running the model, whose mode stays what it was."""
    torch.manual_seed(0)
    model = tiny_lm().train()
    ids = token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    report = analyse_activations(model, ids, attention_mask=mask)
    assert model.training
    with torch.no_grad():
        probs = model.eval()(ids, attention_mask=mask, output_router_probs=True).router_probs
    expected = analyse_activations(probs, model.config, input_ids=ids, attention_mask=mask)
    assert report.tokens == 43 and torch.equal(report.activated, expected.activated)
    assert torch.equal(report.class_activated, expected.class_activated)
    lines = str(report).splitlines()
    assert lines[:2] == ["43 tokens", "layer  activated  span  context"] and len(lines) == 3 + len(probs)
    assert f"{report.rates[0]:.1%}" in lines[2]
    for wrong in ((model, model.config), (probs, ids), (model,)):
        with pytest.raises(TypeError, match="or \\(model, input_ids\\)"):
            analyse_activations(*wrong)
