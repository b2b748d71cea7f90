"""The evaluation command: the stated protocol, whatever the chunks, and an output that the model card reads."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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


@pytest.mark.parametrize("size", [60, 100, 101, 300])
@pytest.mark.parametrize("kind", ["seqboat", "llama"])
def test_windows_score_every_token_once_with_context(evaluate_lm, folder, kind, size, tmp_path):
    data = tmp_path / "text.txt"
    data.write_bytes((EXAMPLES / "data/tinyshakespeare.txt").read_bytes()[:size])
    if kind == "llama":
        folder = tmp_path / "llama"
        fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=264, **fields)).save_pretrained(folder)
        build_byte_tokenizer().save_pretrained(folder)
    arguments = [str(folder), "--data", str(data), "--context", "100", "--stride", "30", "--batch-size", "3"]
    result = evaluate_lm.main(arguments)
    tokens = torch.as_tensor(np.frombuffer(data.read_bytes(), dtype=np.uint8).astype("int64"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for token in range(1, size):
        # The window that a token falls in: the first, or the first one that ends after it.
        end = min(size, 100 + 30 * max(0, math.ceil((token + 1 - 100) / 30)))
        start = max(0, end - 100)
        with torch.no_grad():
            logits = model(tokens[None, start:token], use_cache=False).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[tokens[token]]) / math.log(2))
    assert result["protocol"]["scored_tokens"] == size - 1
    assert result["results"][0]["metrics"][0]["value"] == pytest.approx(sum(losses) / (size - 1), abs=2e-4)
    assert len(result["activation_rates"]) == (model.config.num_hidden_layers if kind == "seqboat" else 0)


def test_what_cannot_be_scored_is_refused_before_work(evaluate_lm, folder, tmp_path, capsys):
    data = tmp_path / "text.txt"
    data.write_bytes(b"some text")
    for extra, message in (
        (["--stride", "4"], "--stride needs --context"),
        (["--context", "8", "--stride", "8"], "--stride must be from 1 to 7"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            evaluate_lm.main([str(folder), "--data", str(data), *extra])
        assert message in capsys.readouterr().err
    llama = tmp_path / "llama"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(llama)
    build_byte_tokenizer().save_pretrained(llama)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*--context and --stride"):
        evaluate_lm.main([str(llama), "--data", str(data)])


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
