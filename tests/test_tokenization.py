"""The byte tokenizer: ids are bytes, every text comes back, and a saved one loads without this package."""

import time
from pathlib import Path

import numpy as np
import pytest
import strangers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, TextStreamer

from modeling_seqboat import build_byte_tokenizer

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "\x00a\x00\x00",
    "\r\n\n\r\t\x0b\x0c\x1c\x85\u2028\u2029",
    "e\u0301 \u00e9 \ufb01 \u212b \u1e9b\u0323",
    "\ufeffmark, \ufffd replacement, \U0010ffff last, \ue000 private",
    "can 't , wo n't . ! ?",
    "naïve 😀👩‍👩‍👧 世界 שלום",
    "<|pa d|> <|pad| <||> <|endoftext|>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer()


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def as_bytes(text):
    return np.frombuffer(text.encode(), np.uint8).tolist()


def test_the_ids_of_bytes_and_specials(tokenizer):
    assert len(tokenizer) == 264
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIALS] == list(range(256, 264))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert tokenizer.mask_token_id == 259
    assert sorted(tokenizer.all_special_ids) == list(range(256, 264))
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length > 10**9
    assert tokenizer.clean_up_tokenization_spaces is False


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_its_bytes_and_comes_back(tokenizer, saved, text):
    for each in (tokenizer, AutoTokenizer.from_pretrained(saved)):
        assert each(text)["input_ids"] == each(text, add_special_tokens=False)["input_ids"] == as_bytes(text)
        assert each.decode(as_bytes(text)) == text
        assert each.decode(as_bytes(text), skip_special_tokens=True) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_its_bytes_and_comes_back(tokenizer, text):
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == as_bytes(text)
    assert tokenizer.decode(as_bytes(text)) == text


def test_a_specials_spelling_is_a_special_or_stays_bytes(tokenizer):
    text = "a<|eos|>b<|pad|>"
    assert tokenizer(text)["input_ids"] == [97, 258, 98, 256]
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == as_bytes(text)
    assert tokenizer.decode([97, 258, 98]) == "a<|eos|>b"
    assert tokenizer.decode([97, 258, 98], skip_special_tokens=True) == "ab"


def test_padding_goes_to_the_left(tokenizer):
    batch = tokenizer(["abc", "d"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[97, 98, 99], [256, 256, 100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


class Recorder(TextStreamer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


@pytest.mark.parametrize("text", [text for text in TEXTS if text and "\ufffd" not in text])
def test_streaming_emits_whole_characters(tokenizer, text):
    streamer = Recorder(tokenizer)
    for byte in as_bytes(text):
        streamer.put(torch.tensor([byte]))
        assert not any("\ufffd" in piece for piece in streamer.pieces)
    streamer.end()
    assert "".join(streamer.pieces) == text


def test_a_chat_becomes_turns_and_marks_what_the_assistant_said(tokenizer):
    chat = [
        {"role": "system", "content": " s "},
        {"role": "user", "content": "hé\n"},
        {"role": "assistant", "content": "ö"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|system|> s <|end|><|user|>hé\n<|end|><|assistant|>ö<|end|>"
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|assistant|>")
    tokens = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mine in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mine]
    assert said == [*as_bytes("ö"), 263]
    with pytest.raises(Exception, match="role must be system, developer, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_a_saved_tokenizer_loads_without_this_package(saved, tmp_path):
    """P16: a fresh process needs no code of this package for the tokenizer."""
    assert {path.name for path in saved.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    program = (
        "import sys\n"
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(saved)!r})\n"
        "assert tokenizer('hé')['input_ids'] == list('hé'.encode())\n"
        "assert tokenizer.pad_token_id == 256 and tokenizer.padding_side == 'left'\n"
        "assert tokenizer.model_max_length > 10**9 and tokenizer.chat_template\n"
        "assert 'modeling_seqboat' not in sys.modules\n"
    )
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = strangers.run(tmp_path, tmp_path / "program.py")
    assert done.returncode == 0, done.stderr


def test_a_megabyte_of_text_takes_seconds(tokenizer):
    text = (Path(__file__).parents[1] / "examples/data/tinyshakespeare.txt").read_text(encoding="utf-8")
    start = time.monotonic()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == as_bytes(text)
    assert time.monotonic() - start < 20
