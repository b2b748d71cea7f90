"""The cache's names in every version of transformers that is supported, and what an unknown version gets."""

import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from small_models import pad_left, random_ids, small_lm

from modeling_seqboat import SeqBoatCache
from modeling_seqboat.generation_seqboat import CACHE_NAME, NEWEST_TESTED, OLDEST_TESTED, untested_version

ROOT = Path(__file__).parent.parent
NAMES = ["past_key_values", "cache", "cache_params"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", [False, True], ids=["base", "lm"])
def test_forward_takes_the_cache_under_every_name(name, head):
    lm = small_lm()
    model = lm if head else lm.model
    ids = random_ids(2, 20)
    with torch.no_grad():
        whole = model(ids, use_cache=False)[0]
        cache = SeqBoatCache(model.config)
        parts = [model(part, **{name: cache})[0] for part in ids.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_generate_continues_a_cache_under_every_name(name, static):
    model, inputs = small_lm(), pad_left([random_ids(1, 12)[0], random_ids(1, 5)[0]])
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    cache = SeqBoatCache(model.config, static=static)
    with torch.no_grad():
        model(inputs["input_ids"][:, :8], attention_mask=inputs["attention_mask"][:, :8], cache=cache)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, **{name: cache}), expected)


def test_two_names_of_one_cache_are_one_and_two_caches_are_refused():
    model = small_lm()
    one, other = SeqBoatCache(model.config), SeqBoatCache(model.config)
    ids = random_ids(1, 4)
    model(ids, past_key_values=one, cache=one)
    assert one.get_seq_length() == 4
    with pytest.raises(ValueError, match="past_key_values and cache are names of one argument"):
        model(ids, past_key_values=one, cache=other)
    with pytest.raises(ValueError, match="cache and cache_params are names of one argument"):
        model.generate(ids, cache=one, cache_params=other)
    assert one.get_seq_length() == 4 and other.get_seq_length() == 0


@pytest.mark.parametrize("head", [False, True], ids=["base", "lm"])
def test_outputs_are_read_under_the_names_of_this_version(head):
    lm = small_lm()
    outputs = (lm if head else lm.model)(random_ids(1, 4))
    assert isinstance(outputs.past_key_values, SeqBoatCache)
    assert outputs["past_key_values"] is outputs.past_key_values and "past_key_values" in outputs
    # Before hidden states and the like, as in transformers' own outputs.
    assert outputs.to_tuple()[1] is outputs.past_key_values
    if Version(transformers.__version__) >= Version("5.24.0.dev0"):
        assert CACHE_NAME == "cache"
        assert outputs.cache is outputs.past_key_values is outputs.cache_params
    else:
        assert CACHE_NAME == "past_key_values"
    assert (lm if head else lm.model)(random_ids(1, 4), use_cache=False).past_key_values is None


def test_nothing_of_ours_warns_of_the_cache(caplog):
    transformers.logging.enable_propagation()
    # What another test was warned of must be said again.
    transformers.utils.logging.warning_once.cache_clear()
    try:
        model, ids = small_lm(), random_ids(1, 9)
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            cache = SeqBoatCache(model.config)
            model(ids[:, :4], past_key_values=cache)
            model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
            model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
            model.generate(ids, max_new_tokens=2, do_sample=False, assistant_model=small_lm(1))
    finally:
        transformers.logging.disable_propagation()
    assert "past_key_values" not in caplog.text


def test_a_version_that_was_not_tried_is_named():
    for version in (OLDEST_TESTED, NEWEST_TESTED, f"{NEWEST_TESTED}.3"):
        assert untested_version(version) is None
    major, minor = map(int, NEWEST_TESTED.split("."))
    message = untested_version(f"{major}.{minor + 1}.0")
    assert f"{major}.{minor + 1}.0" in message and f"{OLDEST_TESTED} to {NEWEST_TESTED}" in message


def test_the_constraints_are_the_ends_of_what_is_called_tested():
    def pinned(name: str) -> Version:
        return Version(re.search(r"^transformers==(.+)$", (ROOT / name).read_text("utf-8"), re.M)[1])

    assert pinned("constraints.txt").release[:2] == Version(NEWEST_TESTED).release[:2]
    assert pinned("constraints-min.txt").release[:2] == Version(OLDEST_TESTED).release[:2]
    assert f'"transformers>={OLDEST_TESTED}"' in (ROOT / "setup.py").read_text("utf-8")
