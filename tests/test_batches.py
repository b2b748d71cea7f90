"""What batches may not change: padding, batch mates, packing, odd lengths, chunks, and what an activation may see."""

import pytest
import torch
from helpers import (
    MEMORY,
    assert_same_cache,
    cache_tensors,
    spread_row,
    tiny_config,
    tiny_encoder,
    tiny_lm,
    tiny_model,
    token_ids,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from modeling_seqboat import SeqBoatCache, SeqBoatModel

POSITIONS = ("rotary", "simple", "local", "t5", "none")
ACTIVATIONS = ("softmax", "relu2", "laplace")
# Every position kind and every activation at least once, without the whole grid.
KINDS = [
    pytest.param(
        {"position_embedding_type": position, "attention_activation": activation}, id=f"{position}-{activation}"
    )
    for position, activation in [
        ("rotary", "softmax"),
        ("rotary", "laplace"),
        ("simple", "relu2"),
        ("local", "softmax"),
        ("local", "laplace"),
        ("t5", "relu2"),
        ("none", "softmax"),
    ]
]
TRUNCATED = pytest.param({"ssm_truncation": 3}, id="truncated")
FFN_POSTNORM = pytest.param(
    {"intermediate_size": 16, "norm_first": False, "norm_type": "scalenorm"}, id="postnorm-ffn"
)
FEW = settings(phases=[Phase.explicit, Phase.generate], max_examples=5, deadline=None, derandomize=True)


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def alone(model, ids, **kwargs):
    """One unpadded row through the model."""
    return model(ids[None], **kwargs)


# Padding


@pytest.mark.parametrize("options", [*KINDS, TRUNCATED, FFN_POSTNORM])
def test_padding_anywhere_changes_neither_outputs_nor_cache(options):
    model = tiny_lm(**options)
    ids = token_ids(11)
    with torch.no_grad():
        expected = alone(model, ids)

    @FEW
    @given(st.lists(st.booleans(), min_size=1, max_size=10), st.integers(0, 100))
    @torch.no_grad()
    def check(gaps, seed):
        pattern = torch.tensor([part for gap in gaps for part in ([False, True] if gap else [True])])
        real = torch.cat([pattern, torch.ones(11 - int(pattern.sum()), dtype=torch.bool)])
        real = torch.cat([real, torch.zeros(seed % 3, dtype=torch.bool)])
        fills = token_ids(2, real.shape[0], seed=seed)
        padded, other = (model(spread_row(ids, real, fill)[None], attention_mask=real.long()[None]) for fill in fills)
        close(padded.logits[0, real], expected.logits[0])
        assert_same_cache(padded.past_key_values, expected.past_key_values)
        # What stands under the pads is not read at all.
        assert torch.equal(padded.logits[0, real], other.logits[0, real])
        assert_same_cache(other.past_key_values, padded.past_key_values, tolerance=0)

    check()


@pytest.mark.parametrize("options", [*KINDS[:4], TRUNCATED])
@pytest.mark.parametrize("side", ["left", "right", "interior"])
@torch.no_grad()
def test_decoding_after_a_padded_prefill(options, side):
    model = tiny_lm(**options)
    lengths, width = (9, 4, 13), 13
    prompts = [token_ids(n, seed=n) for n in lengths]
    rows, mask = token_ids(3, width, seed=99), torch.zeros(3, width, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        columns = {
            "left": range(width - len(prompt), width),
            "right": range(len(prompt)),
            "interior": [0, *range(width - len(prompt) + 1, width)],
        }[side]
        mask[i, list(columns)] = True
        rows[i] = spread_row(prompt, mask[i], rows[i])
    outputs = model(rows, attention_mask=mask.long())
    last = torch.where(mask, torch.arange(width), 0).amax(1)
    chosen = outputs.logits[torch.arange(3), last].argmax(-1)
    written = [chosen]
    for _ in range(7):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], dim=1)
        outputs = model(chosen[:, None], attention_mask=mask.long(), past_key_values=outputs.past_key_values)
        chosen = outputs.logits[:, -1].argmax(-1)
        written.append(chosen)
    for i, prompt in enumerate(prompts):
        row = prompt
        for step in range(8):
            expected = alone(model, row).logits[0, -1].argmax()
            assert written[step][i] == expected, (side, i, step)
            row = torch.cat([row, expected[None]])
    whole = [alone(model, torch.cat([p, torch.stack(written)[:-1, i]])).past_key_values for i, p in enumerate(prompts)]
    for i, expected in enumerate(whole):
        assert_same_cache({name: t[i : i + 1] for name, t in cache_tensors(outputs.past_key_values).items()}, expected)


@torch.no_grad()
def test_greedy_generation_of_a_left_padded_batch():
    model = tiny_lm()
    prompts = [token_ids(n, seed=n) for n in (7, 3, 10)]
    rows, mask = token_ids(3, 10, seed=5), torch.zeros(3, 10, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        rows[i, 10 - len(prompt) :], mask[i, 10 - len(prompt) :] = prompt, 1
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    batch = model.generate(rows, attention_mask=mask, **options)
    for i, prompt in enumerate(prompts):
        expected = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
        assert torch.equal(batch[i, 10:], expected[0, len(prompt) :])


@torch.no_grad()
def test_pads_inside_a_chunked_prefill_leave_the_cache_alone():
    model = tiny_lm(ssm_truncation=3)
    ids = token_ids(9)
    real = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    row = spread_row(ids, real, token_ids(18, seed=3))[None]
    mask, cache, parts = real.long()[None], SeqBoatCache(model.config), []
    for first, end in [(0, 2), (2, 3), (3, 6), (6, 10), (10, 17), (17, 18)]:
        parts.append(model(row[:, first:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    expected = alone(model, ids)
    close(torch.cat(parts, dim=1)[0, real], expected.logits[0])
    assert_same_cache(cache, expected.past_key_values)
    assert cache.get_seq_length() == 18


@pytest.mark.parametrize("options", [KINDS[0], KINDS[4], TRUNCATED])
def test_gradients_under_padding(options):
    ids = token_ids(8)
    real = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    row = spread_row(ids, real, token_ids(13, seed=4))[None]
    padded, plain = tiny_lm(**options), tiny_lm(**options)
    loss = padded(row, attention_mask=real.long()[None], labels=row).loss
    expected = alone(plain, ids, labels=ids[None]).loss
    close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, a), b in zip(padded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", [*KINDS, TRUNCATED, pytest.param({"norm_type": "batchnorm"}, id="batchnorm")])
@torch.no_grad()
def test_encoder_under_padding(options):
    model = tiny_encoder(**options)
    ids = token_ids(9)
    expected = alone(model, ids).last_hidden_state[0]
    for real in (
        torch.tensor([0] * 4 + [1] * 9, dtype=torch.bool),
        torch.tensor([1] * 9 + [0] * 4, dtype=torch.bool),
        torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1], dtype=torch.bool),
    ):
        padded, other = (
            model(spread_row(ids, real, fill)[None], attention_mask=real.long()[None]).last_hidden_state[0, real]
            for fill in token_ids(2, 13, seed=8)
        )
        close(padded, expected)
        assert torch.equal(padded, other)


# Batch mates


def steered_lm(**options):
    """Tokens 3..9 are always skipped, tokens 10..16 always activated in the first layer, the rest is left open."""
    model = tiny_lm(num_hidden_layers=2, **options)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.ssm.omega.fill_(1.0)
            layer.ssm.gamma.mul_(0.05)
            layer.router.weight[:, 0] = torch.tensor([-30.0, 30.0])
        embeddings = model.get_input_embeddings().weight
        embeddings[3:10, 0] = -3.0
        embeddings[10:17, 0] = 3.0
    return model


@pytest.mark.parametrize("options", [*KINDS, TRUNCATED])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_mates(options):
    model = steered_lm(**options)
    never, always, mixed = token_ids(15) % 7 + 3, token_ids(15, seed=1) % 7 + 10, token_ids(15, seed=2)
    outputs = model(torch.stack([never, always, mixed]), output_router_probs=True)
    rates = (outputs.router_probs[0] > 0).float().mean(1)
    assert rates[0] == 0 and rates[1] == 1 and 0 < rates[2] < 1
    for i, row in enumerate((never, always, mixed)):
        expected = alone(model, row)
        close(outputs.logits[i], expected.logits[0])
        tensors = {name: t[i : i + 1] for name, t in cache_tensors(outputs.past_key_values).items()}
        assert_same_cache(tensors, expected.past_key_values)


# Packing


def packed_forms(lengths):
    """The three ways to say where the segments of one packed row start."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    index = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": index},
        "cu_seq_lens_q": {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 9, "max_length_k": 9},
    }


LENGTHS = (5, 1, 9, 2, 6)


@pytest.mark.parametrize("form", ["position_ids", "seq_idx", "cu_seq_lens_q", "all"])
@pytest.mark.parametrize("options", [KINDS[0], KINDS[2], KINDS[4], TRUNCATED])
def test_packed_rows_equal_separate_rows(options, form):
    forms = packed_forms(LENGTHS)
    given_form = (
        {name: value for part in forms.values() for name, value in part.items()} if form == "all" else forms[form]
    )
    rows = [token_ids(n, seed=n) for n in LENGTHS]
    packed, separate = tiny_lm(**options), tiny_lm(**options)
    row = torch.cat(rows)[None]
    outputs = packed(row, labels=row, **given_form)
    losses, targets, logits = [], [], []
    for part in rows:
        single = alone(separate, part)
        logits.append(single.logits[0])
        losses.append(torch.nn.functional.cross_entropy(single.logits[0, :-1], part[1:], reduction="sum"))
        targets.append(len(part) - 1)
    close(outputs.logits[0], torch.cat(logits))
    expected = sum(losses) / sum(targets)
    close(outputs.loss, expected)
    outputs.loss.backward()
    expected.backward()
    for (name, a), b in zip(packed.named_parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_packing_as_the_flattening_collator_gives_it():
    rows = [token_ids(n, seed=n) for n in (6, 3, 8)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])
    model = tiny_lm()
    outputs = model(**batch)
    expected = [alone(model, row) for row in rows]
    close(outputs.logits[0], torch.cat([single.logits[0] for single in expected]))
    total = sum(
        torch.nn.functional.cross_entropy(single.logits[0, :-1], row[1:], reduction="sum")
        for single, row in zip(expected, rows, strict=True)
    )
    close(outputs.loss, total / sum(len(row) - 1 for row in rows))


@pytest.mark.parametrize("options", [KINDS[0], KINDS[3], TRUNCATED])
def test_no_gradient_crosses_a_border(options):
    model = tiny_lm(rate=1, **options)
    ids = torch.cat([token_ids(n, seed=n) for n in LENGTHS])[None]
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, seq_idx=packed_forms(LENGTHS)["seq_idx"]["seq_idx"]).logits
    (gradient,) = torch.autograd.grad(logits[0, 6:15].square().sum(), embeds)
    assert torch.equal(gradient[0, :6], torch.zeros(6, 12)) and torch.equal(gradient[0, 15:], torch.zeros(8, 12))
    assert (gradient[0, 6:15] != 0).any(-1).all()


@pytest.mark.parametrize("options", [KINDS[0], KINDS[2], KINDS[3], TRUNCATED])
@torch.no_grad()
def test_packed_rows_with_pads_between_and_inside_segments(options):
    model = tiny_lm(**options)
    first, second = token_ids(6, seed=1), token_ids(7, seed=2)
    real = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    row = spread_row(torch.cat([first, second]), real, token_ids(19, seed=3))[None]
    positions = spread_row(torch.cat([torch.arange(6), torch.arange(7)]), real, torch.zeros(19, dtype=torch.long))[
        None
    ]
    index = torch.full((1, 19), 7)
    index[0, real] = torch.tensor([0] * 6 + [1] * 7)
    for form in ({"position_ids": positions}, {"seq_idx": index}, {"position_ids": positions, "seq_idx": index}):
        outputs = model(row, attention_mask=real.long()[None], **form)
        expected = [alone(model, part) for part in (first, second)]
        close(outputs.logits[0, real], torch.cat([single.logits[0] for single in expected]))
        assert_same_cache(outputs.past_key_values, expected[1].past_key_values)


@pytest.mark.parametrize("options", [*KINDS, TRUNCATED])
@torch.no_grad()
def test_what_remains_after_packing_is_the_last_segment(options):
    model = tiny_lm(**options)
    rows = [token_ids(n, seed=n) for n in LENGTHS]
    for given_form in packed_forms(LENGTHS).values():
        cache = model(torch.cat(rows)[None], **given_form).past_key_values
        expected = alone(model, rows[-1])
        assert_same_cache(cache, expected.past_key_values)
        following = token_ids(3, seed=7)
        close(
            model(following[None], past_key_values=cache).logits,
            model(following[None], past_key_values=expected.past_key_values).logits,
        )


@pytest.mark.parametrize("options", [*KINDS, TRUNCATED])
@torch.no_grad()
def test_position_zero_behind_a_cache_starts_a_segment(options):
    model = tiny_lm(**options)
    old, new = token_ids(9, seed=1), token_ids(6, seed=2)
    for sizes in ((6,), (1, 5), (1, 1, 1, 1, 1, 1), (4, 2)):
        cache = alone(model, old).past_key_values
        logits, first = [], 0
        for size in sizes:
            positions = torch.arange(first, first + size)[None]
            part = new[None, first : first + size]
            logits.append(model(part, position_ids=positions, past_key_values=cache).logits)
            first += size
        expected = alone(model, new)
        close(torch.cat(logits, dim=1), expected.logits)
        assert_same_cache(cache, expected.past_key_values)


def test_segments_of_no_tokens_are_no_segments():
    model, row = tiny_lm(), token_ids(1, 10)
    expected = model(row, cu_seq_lens_q=torch.tensor([0, 4, 10])).logits
    borders = torch.tensor([0, 0, 4, 4, 10, 10], dtype=torch.int32)
    packed = model(row, cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=6, max_length_k=6)
    assert torch.equal(packed.logits, expected)


@torch.no_grad()
def test_a_static_cache_takes_packed_rows_again_once_it_is_reset():
    model, row = tiny_lm(), token_ids(1, sum(LENGTHS))
    cache = SeqBoatCache(model.config, static=True)
    for form in packed_forms(LENGTHS).values():
        cache.reset()
        logits = model(row, past_key_values=cache, **form).logits
        close(logits, model(row, use_cache=False, **form).logits)


def test_packing_that_contradicts_itself_is_refused():
    model = tiny_lm()
    row = token_ids(1, sum(LENGTHS))
    forms, other = packed_forms(LENGTHS), packed_forms((6, 9, 8))
    for first, second in (
        ("position_ids", "seq_idx"),
        ("position_ids", "cu_seq_lens_q"),
        ("seq_idx", "cu_seq_lens_q"),
    ):
        with pytest.raises(ValueError, match=f"{first} and {second} disagree"):
            model(row, **forms[first], **other[second])
    for borders in ([0, 5], [1, 23], [0, 9, 5, 23], [23]):
        with pytest.raises(ValueError, match="cu_seq_lens_q must rise from 0"):
            model(row, cu_seq_lens_q=torch.tensor(borders))
    with pytest.raises(ValueError, match="cu_seq_lens_q needs a batch of one"):
        model(row.expand(2, -1), **forms["cu_seq_lens_q"])
    with pytest.raises(ValueError, match="seq_idx must be of shape"):
        model(row, seq_idx=torch.zeros(1, 4, dtype=torch.long))
    keys = torch.tensor([0, 8, 23])
    for queries in ({"cu_seq_lens_q": torch.tensor([0, 9, 23])}, {}):
        with pytest.raises(ValueError, match="cu_seq_lens_k must"):
            model(row, cu_seq_lens_k=keys, **queries)
    cache = model(row).past_key_values
    before = cache_tensors(cache)
    for name in ("seq_idx", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=f"{name} cannot continue a filled"):
            model(row, past_key_values=cache, **forms[name])
    assert_same_cache(cache, before, tolerance=0)


@pytest.mark.parametrize("options", [*KINDS, TRUNCATED])
def test_packed_encoder_resets_both_directions(options):
    model = tiny_encoder(**options)
    rows = [token_ids(n, seed=n) for n in LENGTHS]
    expected = torch.cat([alone(model, part).last_hidden_state[0] for part in rows])
    for given_form in packed_forms(LENGTHS).values():
        close(model(torch.cat(rows)[None], **given_form).last_hidden_state[0], expected)
    real = torch.ones(sum(LENGTHS) + 4, dtype=torch.bool)
    real[[0, 4, 11, 26]] = False
    row = spread_row(torch.cat(rows), real, token_ids(len(real), seed=9))[None]
    index = torch.zeros(1, len(real), dtype=torch.long)
    index[0, real] = packed_forms(LENGTHS)["seq_idx"]["seq_idx"][0]
    embeds = model.get_input_embeddings()(row).detach().requires_grad_()
    outputs = model(inputs_embeds=embeds, attention_mask=real.long()[None], seq_idx=index).last_hidden_state[0]
    close(outputs[real], expected)
    inside = index[0] == 2
    (gradient,) = torch.autograd.grad(outputs[inside & real].square().sum(), embeds)
    assert torch.equal(gradient[0, ~(inside & real)], torch.zeros(int((~(inside & real)).sum()), 12))


# Lengths and counts


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "encoder"])
@pytest.mark.parametrize("rate", [0, 0.5, 1])
@pytest.mark.parametrize("position", ["rotary", "local"])
def test_every_length_runs_and_every_parameter_gets_a_gradient(bidirectional, rate, position):
    config = tiny_config(bidirectional=bidirectional, position_embedding_type=position, intermediate_size=8)
    model = tiny_model(SeqBoatModel, config, rate=rate).train()
    for length in (1, 2, MEMORY - 1, MEMORY, MEMORY + 1, 7, 17, 65):
        model.zero_grad()
        outputs = model(token_ids(2, length), output_router_probs=True)
        shares = [(probs > 0).float().mean() for probs in outputs.router_probs]
        assert rate == 0.5 or all(share == rate for share in shares)
        outputs.last_hidden_state.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (name, length)
            assert parameter.grad.isfinite().all(), (name, length)


def test_rows_of_padding_only_stay_finite():
    model = tiny_lm()
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1] = 0
    outputs = model(ids, attention_mask=mask, labels=ids)
    outputs.loss.backward()
    assert outputs.loss.isfinite() and outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    close(outputs.logits[2], alone(model, ids[2]).logits[0])


# Chunks


@pytest.mark.parametrize("rate", [0, 0.5, 1])
@pytest.mark.parametrize("options", [*KINDS, TRUNCATED, FFN_POSTNORM])
def test_any_split_into_chunks_gives_the_same_logits_and_cache(options, rate):
    if rate != 0.5 and options.get("position_embedding_type") not in (None, "rotary", "local"):
        pytest.skip("the extremes are covered by the other kinds")
    model = tiny_lm(rate=rate, **options)
    ids = token_ids(2, 23)
    with torch.no_grad():
        expected = model(ids)

    @FEW
    @given(st.sets(st.integers(1, 22), max_size=22), st.booleans())
    def check(cuts, with_grad):
        cache, parts = SeqBoatCache(model.config), []
        borders = [0, *sorted(cuts), 23]
        with torch.set_grad_enabled(with_grad):
            for first, end in zip(borders, borders[1:], strict=False):
                parts.append(model(ids[:, first:end], past_key_values=cache).logits)
        close(torch.cat(parts, dim=1), expected.logits)
        assert_same_cache(cache, expected.past_key_values)
        assert cache.get_seq_length() == 23

    check()


@torch.no_grad()
def test_chunks_without_an_activated_token():
    model = steered_lm()
    never, always = token_ids(2, 6) % 7 + 3, token_ids(2, 5, seed=1) % 7 + 10
    ids = torch.cat([never, always, never], dim=1)
    expected = model(ids, output_router_probs=True)
    assert (expected.router_probs[0][:, :6] == 0).all() and (expected.router_probs[0][:, 6:11] > 0).all()
    cache = SeqBoatCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in (never, always, never)]
    close(torch.cat(parts, dim=1), expected.logits)
    assert_same_cache(cache, expected.past_key_values)


# Causality


@pytest.mark.parametrize("options", [*KINDS, TRUNCATED, FFN_POSTNORM])
def test_nothing_depends_on_later_tokens(options):
    model = tiny_lm(**options)
    ids = token_ids(1, 20)
    with torch.no_grad():
        expected = model(ids, output_router_probs=True)
    for cut in (1, 7, 13, 19):
        changed = torch.cat([ids[:, :cut], token_ids(1, 20 - cut, seed=cut)], dim=1)
        with torch.no_grad():
            outputs = model(changed, output_router_probs=True)
        close(outputs.logits[:, :cut], expected.logits[:, :cut])
        for found, probs in zip(outputs.router_probs, expected.router_probs, strict=True):
            assert torch.equal(found[:, :cut] > 0, probs[:, :cut] > 0)
            close(found[:, :cut], probs[:, :cut])
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, :9].square().sum(), embeds)
    assert torch.equal(gradient[0, 9:], torch.zeros(11, 12))


# Truncation


@pytest.mark.parametrize("taps", [1, 2, 3, 5, 40])
@torch.no_grad()
def test_a_truncated_model_has_a_kernel_of_that_many_taps(taps):
    model = tiny_lm(num_hidden_layers=1, rate=0, ssm_truncation=taps)
    ids = token_ids(1, 30)
    other = ids.clone()
    other[0, 10] = ids[0, 10] % 20 + 4
    changed = (model(ids).logits - model(other).logits).abs().amax(-1)[0] > 1e-4
    assert changed[10] and not changed[:10].any() and not changed[10 + taps :].any()


@pytest.mark.parametrize("taps", [1, 3, 64])
@torch.no_grad()
def test_decoding_with_truncation_equals_the_full_forward(taps):
    model = tiny_lm(ssm_truncation=taps)
    ids = token_ids(2, 21)
    expected = model(ids)
    for prefill in (1, 5, 16):
        cache = SeqBoatCache(model.config)
        parts = [model(ids[:, :prefill], past_key_values=cache).logits]
        parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(prefill, 21)]
        close(torch.cat(parts, dim=1), expected.logits)
        assert_same_cache(cache, expected.past_key_values)
    assert cache.layers[0].ssm_inputs.shape == (2, taps, 12)
