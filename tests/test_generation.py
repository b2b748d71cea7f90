"""Every mode of generate gives, token for token, what the model gives without a cache."""

import copy
import functools
import logging
from threading import Thread

import pytest
import torch
from small_models import pad_left, random_ids, small_lm
from transformers import TextIteratorStreamer, TextStreamer, set_seed

from modeling_seqboat import SeqBoatCache, build_byte_tokenizer, generation_seqboat

KINDS = [
    ("rotary", "softmax"),
    ("rotary", "relu2"),
    ("simple", "softmax"),
    ("simple", "relu2"),
    ("local", "softmax"),
    ("local", "relu2"),
    ("none", "laplace"),
]
NEW = 18
MODES = {
    "sample": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "beams-return-2": {"num_beams": 3, "num_return_sequences": 2},
    "sample-return-3": {"do_sample": True, "num_return_sequences": 3},
    "beam-sample": {"do_sample": True, "num_beams": 2},
}


def model_of(kind: tuple[str, str], **overrides):
    return small_lm(position_embedding_type=kind[0], attention_activation=kind[1], **overrides)


def padded_prompts() -> dict[str, torch.Tensor]:
    return pad_left([random_ids(1, length, seed=length)[0] for length in (21, 1, 9)])


def greedy(model, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    return model.generate(**inputs, do_sample=False, max_new_tokens=options.pop("max_new_tokens", NEW), **options)


@functools.cache
def cache_free(kind: tuple[str, str]) -> torch.Tensor:
    """Greedy continuation of `padded_prompts` by a model of this kind without a cache."""
    return greedy(model_of(kind), padded_prompts(), use_cache=False)


def by_forward(model, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Greedy continuation of one unpadded row by full forwards alone."""
    with torch.no_grad():
        for _ in range(new):
            logits = model(ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_greedy_equals_full_forwards_row_by_row(kind):
    model, inputs = model_of(kind), padded_prompts()
    produced = greedy(model, inputs)
    assert torch.equal(produced, cache_free(kind))
    for row, mask, got in zip(inputs["input_ids"], inputs["attention_mask"], produced, strict=True):
        alone = row[mask.bool()][None]
        assert torch.equal(by_forward(model, alone)[0, alone.shape[1] :], got[row.shape[0] :])


def test_the_models_under_test_skip_some_tokens_and_use_their_memory():
    model, ids = model_of(KINDS[0]), random_ids(2, 60)
    probs = model(ids, output_router_probs=True).router_probs
    for confidence in probs:
        assert 0.15 < (confidence > 0).float().mean() < 0.85
        assert ((confidence > 0).sum(1) > model.config.memory_size).all()


# What a cache holds depends on the kind, what is done with it on the mode: each kind is sampled from and reordered.
@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((KINDS[0], mode) for mode in MODES), *((kind, mode) for kind in KINDS[1:] for mode in list(MODES)[1::2])],
    ids=str,
)
def test_sampling_and_beams_equal_their_cache_free_counterpart(kind, mode):
    model, inputs = model_of(kind), padded_prompts()
    outputs = []
    for use_cache in (True, False):
        set_seed(3)
        outputs.append(model.generate(**inputs, max_new_tokens=14, use_cache=use_cache, **MODES[mode]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_greedy_with_routers_that_activate_nothing_or_everything(share):
    model, inputs = model_of(KINDS[0]), padded_prompts()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.bias.copy_(torch.tensor([0.0, 1e4]) if share else torch.tensor([1e4, 0.0]))
    assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))


def test_greedy_with_a_truncated_ema_and_a_feed_forward_block():
    model, inputs = small_lm(ssm_truncation=5, intermediate_size=24, norm_type="scalenorm"), padded_prompts()
    assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))
    assert torch.equal(greedy(model, inputs, prefill_chunk_size=3), greedy(model, inputs, use_cache=False))


@pytest.mark.parametrize(
    ("kind", "chunk"), [(kind, 7) for kind in KINDS] + [(KINDS[0], 1), (KINDS[0], 100), (KINDS[3], 1)], ids=str
)
def test_prefill_in_chunks(kind, chunk):
    model, inputs = model_of(kind), padded_prompts()
    assert torch.equal(greedy(model, inputs, prefill_chunk_size=chunk), cache_free(kind))


@pytest.mark.parametrize("rows", ["ids", "embeddings"])
def test_a_long_prompt_is_read_in_chunks_that_are_reported(rows, monkeypatch):
    model, inputs = model_of(KINDS[0]), padded_prompts()
    expected = cache_free(KINDS[0])
    monkeypatch.setattr(generation_seqboat, "LONG_PREFILL", 8)
    if rows == "embeddings":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        expected = expected[:, -NEW:]
    reports, widths = [], []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(
            next(kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None).shape[1]
        ),
        with_kwargs=True,
    )
    found = greedy(model, inputs, prefill_progress=lambda done, total: reports.append((done, total)))
    hook.remove()
    assert torch.equal(found, expected)
    assert reports == [(8, 21), (16, 21), (21, 21)] and widths[:4] == [8, 8, 5, 1]


def test_the_bar_of_a_prefill(capfd):
    model, inputs = model_of(KINDS[0]), padded_prompts()
    greedy(model, inputs, prefill_chunk_size=8)
    assert "prefill" not in capfd.readouterr().err
    greedy(model, inputs, prefill_chunk_size=8, prefill_progress=True)
    assert "prefill" in capfd.readouterr().err


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_static_cache(kind):
    model, inputs = model_of(kind), padded_prompts()
    for chunk in (None, 4):
        found = greedy(model, inputs, cache_implementation="static", prefill_chunk_size=chunk)
        assert torch.equal(found, cache_free(kind))
    expected = model.generate(**inputs, num_beams=2, max_new_tokens=12, use_cache=False)
    assert torch.equal(
        model.generate(**inputs, num_beams=2, max_new_tokens=12, cache_implementation="static"), expected
    )


@pytest.mark.parametrize("implementation", [None, "static"])
def test_inputs_embeds(implementation):
    model, inputs = model_of(KINDS[0]), padded_prompts()
    expected = greedy(model, inputs)[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(greedy(model, given, cache_implementation=implementation), expected)
    both = given | {"input_ids": inputs["input_ids"]}
    assert torch.equal(greedy(model, both)[:, -NEW:], expected)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_inputs_embeds_in_chunks(implementation):
    model, inputs = model_of(KINDS[0]), padded_prompts()
    width = inputs["input_ids"].shape[1]
    expected = greedy(model, inputs, return_dict_in_generate=True, output_logits=True)
    given = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    given["attention_mask"] = inputs["attention_mask"]
    for prompt in (given, given | {"input_ids": inputs["input_ids"]}):
        found = greedy(
            model, prompt, prefill_chunk_size=5, cache_implementation=implementation,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert found.past_key_values.get_seq_length() == width + NEW - 1
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_filled_cache_with_only_new_columns():
    model, ids = model_of(KINDS[0]), random_ids(2, 20)
    expected = greedy(model, {"input_ids": ids}, use_cache=False)[:, 20:]
    embeds = model.get_input_embeddings()(ids)

    def cache(columns: int) -> SeqBoatCache:
        return model(ids[:, :columns]).past_key_values

    new = {"input_ids": ids[:, 12:], "attention_mask": torch.ones_like(ids), "past_key_values": cache(12)}
    assert torch.equal(greedy(model, new)[:, 8:], expected)
    whole = {"inputs_embeds": embeds, "past_key_values": cache(12)}
    assert torch.equal(greedy(model, whole), expected)
    for given in ({"input_ids": ids[:, 12:]}, {"input_ids": ids[:, 12:], "attention_mask": torch.ones(2, 8)}):
        with pytest.raises(ValueError, match=r"holds 12 columns and input_ids has 8.*whole text \(20 columns\)"):
            greedy(model, given | {"past_key_values": cache(12)})
    with pytest.raises(ValueError, match="holds 20 columns and input_ids has 20"):
        greedy(model, {"input_ids": ids, "past_key_values": cache(20)})
    with pytest.raises(ValueError, match="holds 12 columns and inputs_embeds has 8"):
        greedy(model, {"inputs_embeds": embeds[:, 12:], "past_key_values": cache(12)})
    with pytest.raises(ValueError, match="attention_mask has 15 columns, input_ids 8, and past_key_values 12"):
        greedy(model, new | {"attention_mask": torch.ones(2, 15), "past_key_values": cache(12)})


@pytest.mark.parametrize("implementation", [None, "static"])
def test_continuing_from_a_returned_cache(implementation):
    model, inputs = model_of(KINDS[0]), padded_prompts()
    expected = cache_free(KINDS[0])
    options = {"return_dict_in_generate": True, "cache_implementation": implementation}
    first = greedy(model, inputs, max_new_tokens=10, **options)
    assert isinstance(first.past_key_values, SeqBoatCache)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 10, dtype=torch.long)], dim=1)
    second = greedy(
        model,
        {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values},
        max_new_tokens=NEW - 10,
    )
    assert torch.equal(second, expected)


def test_continuing_a_conversation_with_more_text():
    model, ids, more = model_of(KINDS[0]), random_ids(1, 12), random_ids(1, 9, seed=5)
    first = greedy(model, {"input_ids": ids}, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, more], dim=1)
    expected = greedy(model, {"input_ids": whole}, use_cache=False)
    cached = greedy(model, {"input_ids": whole, "past_key_values": copy.deepcopy(first.past_key_values)})
    assert torch.equal(cached, expected)
    chunked = {"input_ids": whole, "past_key_values": copy.deepcopy(first.past_key_values)}
    assert torch.equal(greedy(model, chunked, prefill_chunk_size=4), expected)
    unread = whole[:, first.past_key_values.get_seq_length() :]
    new = {"input_ids": unread, "attention_mask": torch.ones_like(whole), "past_key_values": first.past_key_values}
    assert torch.equal(greedy(model, new, prefill_chunk_size=4)[:, -NEW:], expected[:, -NEW:])


class Collector:
    """A streamer that keeps the ids it is given."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_sees_every_token():
    model, ids, streamer = model_of(KINDS[0]), random_ids(1, 12), Collector()
    expected = greedy(model, {"input_ids": ids}, use_cache=False)
    greedy(model, {"input_ids": ids}, streamer=streamer)
    assert streamer.ids == expected[0].tolist() and streamer.ended


def test_text_streamers(capsys):
    tokenizer = build_byte_tokenizer()
    model = small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257)
    inputs = {"input_ids": torch.tensor([list(b"a harbour at dawn")])}
    # Printable ASCII: a streamer may cut other bytes in the middle of a character.
    options = {"suppress_tokens": [*range(32), *range(127, 264)]}
    expected = tokenizer.decode(greedy(model, inputs, use_cache=False, **options)[0, -NEW:])
    greedy(model, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=greedy, args=(model, inputs), kwargs={"streamer": streamer, **options})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def single_prompts() -> list[dict[str, torch.Tensor]]:
    """An unpadded and a left-padded row; assisted decoding takes one row at a time."""
    plain = {"input_ids": random_ids(1, 13)}
    padded = pad_left([random_ids(1, 13)[0], random_ids(1, 18)[0]])
    return [plain, {name: value[:1] for name, value in padded.items()}]


@pytest.mark.parametrize(("kind", "padded"), [(kind, True) for kind in KINDS] + [(KINDS[0], False)], ids=str)
def test_assisted_decoding_with_another_draft_model(kind, padded):
    model, inputs = model_of(kind), single_prompts()[padded]
    draft = model_of(kind, seed=1, num_hidden_layers=1, hidden_size=8)
    expected = greedy(model, inputs, use_cache=False)
    assert torch.equal(greedy(model, inputs, assistant_model=draft), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("truncation", [None, 5])
def test_the_model_as_its_own_assistant(padded, truncation):
    model, inputs = model_of(KINDS[0], ssm_truncation=truncation), single_prompts()[padded]
    expected = greedy(model, inputs, use_cache=False)
    assert torch.equal(greedy(model, inputs, assistant_model=model), expected)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_prompt_lookup(kind):
    model = model_of(kind)
    pattern = random_ids(1, 7)
    for inputs in ({"input_ids": pattern.repeat(1, 4)}, single_prompts()[1]):
        expected = greedy(model, inputs, use_cache=False)
        assert torch.equal(greedy(model, inputs, prompt_lookup_num_tokens=4), expected)


def test_assisted_sampling_equals_its_own_repetition():
    model, draft = model_of(KINDS[0]), model_of(KINDS[0], seed=1)
    outputs = []
    for _ in range(2):
        set_seed(0)
        outputs.append(model.generate(random_ids(1, 13), do_sample=True, max_new_tokens=NEW, assistant_model=draft))
    assert torch.equal(*outputs)


def test_a_prompt_padded_on_the_right_is_warned_of(caplog):
    model, ids = model_of(KINDS[0]), random_ids(2, 6)
    mask = torch.ones_like(ids)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model.generate(ids, attention_mask=mask, max_new_tokens=1)
        assert "padding_side" not in caplog.text
        mask[1, -2:] = 0
        model.generate(ids, attention_mask=mask, max_new_tokens=1)
        assert "padding_side" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@torch.no_grad()
def test_right_padded_prefill_by_forward_then_decoding(kind):
    model = model_of(kind)
    rows = [random_ids(1, length, seed=length)[0] for length in (19, 4, 11)]
    width = 19
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[0])) for row in rows])
    mask = (torch.arange(width) < torch.tensor([[19], [4], [11]])).long()
    outputs = model(ids, attention_mask=mask, use_cache=True)
    token = outputs.logits[torch.arange(3), mask.sum(1) - 1].argmax(-1, keepdim=True)
    produced = [token]
    for _ in range(NEW - 1):
        outputs = model(token, past_key_values=outputs.past_key_values)
        token = outputs.logits[:, -1:].argmax(-1)
        produced.append(token)
    for row, got in zip(rows, torch.cat(produced, dim=1), strict=True):
        assert torch.equal(by_forward(model, row[None])[0, row.shape[0] :], got)


def test_position_ids_that_generate_counts_itself_are_accepted():
    model, inputs = model_of(KINDS[2]), padded_prompts()
    expected = greedy(model, inputs)
    counted = inputs["attention_mask"].cumsum(1) - 1
    assert torch.equal(greedy(model, inputs | {"position_ids": counted}), expected)
    # Only differences of positions enter the model, so an offset changes nothing.
    assert torch.equal(greedy(model, inputs | {"position_ids": counted + 7}), expected)
    ids = random_ids(1, 13)
    given = {"input_ids": ids, "position_ids": torch.arange(13)[None]}
    draft = model_of(KINDS[2], seed=1)
    assert torch.equal(greedy(model, given, assistant_model=draft), by_forward(model, ids))


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1, 2], [0, 2, 4, 6, 8, 10]], ids=["restart", "gaps"])
def test_position_ids_that_generate_cannot_honour_are_refused(positions):
    model, ids = model_of(KINDS[0]), random_ids(1, 6)
    with pytest.raises(ValueError, match="position_ids must rise by one"):
        model.generate(ids, position_ids=torch.tensor([positions]), max_new_tokens=2)


def test_a_tokenizer_is_for_strings_to_stop_at():
    """As `transformers serve` gives it with every request."""
    model, tokenizer = small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257).eval(), build_byte_tokenizer()
    prompt = tokenizer("Hi", return_tensors="pt")
    # Bytes that are letters of their own.
    unseen = [token for token in range(264) if not 32 < token < 127]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "suppress_tokens": unseen}
    text = model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, tokenizer=tokenizer, **options), text)
    stop = tokenizer.decode(text[0, 5:7])
    stopped = model.generate(**prompt, tokenizer=tokenizer, stop_strings=[stop], **options)
    assert stopped.shape[1] < text.shape[1] and torch.equal(stopped, text[:, : stopped.shape[1]])


@pytest.mark.parametrize("size", [0, -3, "4", 2.0, True])
def test_a_chunk_of_a_prefill_has_a_column(size):
    with pytest.raises(ValueError, match=f"prefill_chunk_size must be an integer of at least 1 or None, got {size!r}"):
        small_lm().generate(random_ids(1, 6), prefill_chunk_size=size, max_new_tokens=2)


def test_a_cache_that_is_not_to_be_used_is_refused():
    """Each step would feed it the whole text once more."""
    model, ids = small_lm(), random_ids(1, 6)
    cache = SeqBoatCache(model.config)
    with pytest.raises(ValueError, match="use_cache=False contradicts past_key_values"):
        model.generate(ids, past_key_values=cache, use_cache=False, max_new_tokens=2)
    assert not cache.is_initialized
