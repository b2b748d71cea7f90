"""The model in the box: what its card says of it is so, it writes text, its attention is on, and it can be
published."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import verify_by_forks, verify_once
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_upload.code_files import auto_map, code_files
from hub_upload.verify import verify_folder
from modeling_seqboat import SeqBoatForCausalLM

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples/pretrained/seqboat-enwik8-small"
EXCERPT = ROOT / "examples/data/enwik8_excerpt.txt"
HELD_OUT_BYTES = 100_000
BITS_OF_A_TENTH = 1.2345
LARGEST_FILE = 12_000_000


@pytest.fixture(scope="module")
def model() -> SeqBoatForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def evaluate(size: int) -> dict:
    """The shipped model on the first bytes of the held-out slice, by the command that the card names."""
    examples = str(ROOT / "examples")
    sys.path.insert(0, examples)
    try:
        import evaluate_lm

        return evaluate_lm.main([str(FOLDER), "--data", str(EXCERPT), "--max-bytes", str(size)])
    finally:
        sys.path.remove(examples)


@pytest.fixture(scope="module")
def evaluated() -> dict:
    """A tenth of the slice: the whole takes most of a minute."""
    return evaluate(HELD_OUT_BYTES // 10)


def test_bits_per_byte_of_a_tenth_of_the_held_out_text(evaluated):
    """The number that belongs to those of the card, which a slow test measures."""
    assert evaluated["results"][0]["metrics"][0]["value"] == pytest.approx(BITS_OF_A_TENTH, abs=2e-3)


@pytest.mark.slow
def test_bits_per_byte_on_held_out_text_are_those_of_the_card():
    results = ModelCard.load(FOLDER / "README.md").data.eval_results
    (stated,) = [each.metric_value for each in results if each.dataset_name == EXCERPT.stem]
    found = evaluate(HELD_OUT_BYTES)
    assert found["protocol"]["bytes"] == HELD_OUT_BYTES
    assert found["results"][0]["metrics"][0]["value"] == pytest.approx(stated, abs=1e-2)


def test_the_test_split_is_within_what_was_promised():
    results = ModelCard.load(FOLDER / "README.md").data.eval_results
    (stated,) = [
        each.metric_value for each in results if (each.dataset_name, each.dataset_split) == ("enwik8", "test")
    ]
    assert stated <= 1.6


def test_routers_are_open(evaluated):
    rates = evaluated["activation_rates"]
    assert sum(rate < 0.01 for rate in rates) <= 3, rates
    assert sum(rates) / len(rates) > 0.05, rates


def test_continues_text_by_words(model):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = EXCERPT.read_bytes()
    known = set(re.findall(r"[A-Za-z]{4,}", text.decode("utf-8")))
    ids = torch.tensor([list(text[:30_000][-500:])])
    torch.manual_seed(0)
    # Many short continuations: a step takes about as long for eight rows as for one.
    new = model.generate(ids, max_new_tokens=50, num_return_sequences=8, do_sample=True, temperature=0.6)
    written = "\n".join(tokenizer.batch_decode(new[:, ids.shape[1] :], skip_special_tokens=True))
    assert written.count("\N{REPLACEMENT CHARACTER}") <= 0.02 * len(written)
    words = re.findall(r"[A-Za-z]{4,}", written)
    # Half of the long words in one part of the excerpt occur in the rest; of letters put together at random, hardly
    # any.
    assert len(words) >= 15 and sum(word in known for word in words) >= 0.4 * len(words), written


def test_is_a_complete_and_small_folder():
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "model.safetensors"} <= names
    assert all(path.stat().st_size <= LARGEST_FILE for path in FOLDER.iterdir())
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}
    assert "CC BY-SA 3.0" in (FOLDER / "README.md").read_text("utf-8")


def test_is_a_hub_repo_whose_code_is_the_packages():
    """By links, so that no copy goes stale; `link_code` of hub_upload/code_files.py makes them."""
    links = {path.name: path.resolve() for path in FOLDER.glob("*.py")}
    assert links == {file.name: file.resolve() for file in code_files()}
    assert all(path.is_symlink() and not os.readlink(path).startswith("/") for path in FOLDER.glob("*.py"))
    assert json.loads((FOLDER / "config.json").read_text("utf-8"))["auto_map"] == auto_map()


def test_loads_generates_and_trains_where_the_package_is_not(monkeypatch):
    """Offline, from another folder, in a process that cannot import the package, from the folder as it is. What its
    process saves is read again in tests of smaller models."""
    verify_by_forks(monkeypatch)
    verify_once(monkeypatch)
    names = [check.name for check in verify_folder(FOLDER)]
    assert names[:2] == ["AutoConfig", "AutoModelForCausalLM"] and "generation" in names
