"""The evaluation command: the stated protocol, whatever the chunks, and an output that the model card reads."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def evaluate_lm():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import evaluate_lm

        yield evaluate_lm
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).save_pretrained(path)
    build_byte_tokenizer().save_pretrained(path)
    return path


def one_pass(folder, tokens):
    model = SeqBoatForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens.astype("int64"))[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.as_tensor(tokens[1:].astype("int64")))
    return float(loss) / math.log(2)


@pytest.mark.parametrize("chunk_size", [7, 64, 4096])
def test_one_pass_in_chunks_is_the_full_forward(evaluate_lm, folder, chunk_size, tmp_path):
    text = (EXAMPLES / "data/tinyshakespeare.txt").read_bytes()[:500]
    data = tmp_path / "text.txt"
    data.write_bytes(text)
    result = evaluate_lm.main([str(folder), "--data", str(data), "--chunk-size", str(chunk_size)])
    want = one_pass(folder, np.frombuffer(text, dtype=np.uint8))
    assert result["results"][0]["metrics"][0]["value"] == pytest.approx(want, abs=2e-4)
    assert result["protocol"]["scored_tokens"] == 499
    assert all(0 <= rate <= 1 for rate in result["activation_rates"])


def test_a_bounded_context_starts_afresh(evaluate_lm, folder, tmp_path):
    text = (EXAMPLES / "data/tinyshakespeare.txt").read_bytes()[:300]
    data = tmp_path / "text.txt"
    data.write_bytes(text)
    output = tmp_path / "out" / "evaluation.json"
    arguments = [str(folder), "--data", str(data), "--context", "100", "--chunk-size", "32", "--output", str(output)]
    evaluate_lm.main(arguments)
    tokens = np.frombuffer(text, dtype=np.uint8)
    want = sum(one_pass(folder, tokens[i : i + 100]) for i in (0, 100, 200)) / 3
    written = json.loads(output.read_text("utf-8"))
    assert str(tmp_path) not in written["command"] and " --data text.txt --context 100 " in written["command"]
    assert written["results"][0]["metrics"][0]["value"] == pytest.approx(want, abs=2e-4)
    with pytest.raises(SystemExit):
        evaluate_lm.main(arguments)


def test_splits_of_enwik8_and_of_other_texts(evaluate_lm):
    assert evaluate_lm.cut_split(b"0123456789" * 2, "test") == b"89"
    assert evaluate_lm.cut_split(b"0123456789", "all") == b"0123456789"


def test_bad_input_is_named(evaluate_lm, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_lm.main([str(folder), "--data", str(tmp_path / "nowhere.txt")])
    short = tmp_path / "short.txt"
    short.write_bytes(b"a")
    with pytest.raises(ValueError, match="1 tokens"):
        evaluate_lm.main([str(folder), "--data", str(short)])
