"""The evaluation command: the stated protocol, whatever the chunks, and an output that the model card reads."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


def context_bound(kind: str):
    """A small model with weights so large that what it predicts depends on tokens far before."""
    torch.manual_seed(1)
    if kind == "llama":
        fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=264, initializer_range=0.5, **fields)).eval()
    model = SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def bits_with(model, tokens, starts: list[int]) -> float:
    """Bits of tokens 1, 2, …, each predicted from what follows its start."""
    bits = 0.0
    for token, start in enumerate(starts, start=1):
        logits = model(tokens[None, start:token], use_cache=False).logits[0, -1]
        bits -= float(logits.log_softmax(-1)[tokens[token]]) / math.log(2)
    return bits


@pytest.mark.parametrize("size", [12, 20, 21, 60])
@pytest.mark.parametrize("kind", ["seqboat", "llama"])
def test_windows_score_every_token_once_with_context(evaluate_lm, kind, size):
    text = (EXAMPLES / "data/tinyshakespeare.txt").read_bytes()[:size]
    tokens = torch.tensor(list(text))
    model = context_bound(kind)
    bits, scored, rates = evaluate_lm.score_windows(model, np.frombuffer(text, dtype=np.uint8), 20, 6, 3)
    # The window that a token falls in: the first, or the first one that ends after it.
    ends = [min(size, 20 + 6 * max(0, math.ceil((token + 1 - 20) / 6))) for token in range(1, size)]
    starts = [max(0, end - 20) for end in ends]
    assert scored == size - 1
    assert bits / scored == pytest.approx(bits_with(model, tokens, starts) / scored, abs=1e-5)
    if size == 60:
        # The models tell these contexts apart, or the line above would say nothing.
        for other in ([0] * 59, [max(0, token - 19) for token in range(1, 60)]):
            assert abs(bits_with(model, tokens, other) - bits) / scored > 1e-4
    if kind == "llama":
        assert rates == []
        return
    windows = [tokens[None, start:end] for start, end in sorted(set(zip(starts, ends, strict=True)))]
    with torch.no_grad():
        open_routers = [model(ids, use_cache=False, output_router_probs=True).router_probs for ids in windows]
    for layer, rate in enumerate(rates):
        active = sum(int((probs[layer] > 0).sum()) for probs in open_routers)
        assert rate == pytest.approx(active / sum(ids.numel() for ids in windows))


def test_windows_of_a_llama_by_the_command(evaluate_lm, tmp_path, capsys):
    model = context_bound("llama")
    model.save_pretrained(tmp_path / "llama")
    build_byte_tokenizer().save_pretrained(tmp_path / "llama")
    text = (EXAMPLES / "data/tinyshakespeare.txt").read_bytes()[:150]
    (tmp_path / "text.txt").write_bytes(text)
    arguments = ["--data", str(tmp_path / "text.txt"), "--context", "100", "--stride", "30"]
    result = evaluate_lm.main([str(tmp_path / "llama"), *arguments])
    bits, scored, _ = evaluate_lm.score_windows(model, np.frombuffer(text, dtype=np.uint8), 100, 30, 1)
    assert result["results"][0]["metrics"][0]["value"] == pytest.approx(bits / scored, abs=1e-3)
    assert result["protocol"] == {
        "scored_tokens": 149, "bytes": 150, "context": 100, "stride": 30, "dtype": "float32"
    }  # fmt: skip
    assert "context: 70 to 99 tokens after the first window" in capsys.readouterr().out


def test_what_cannot_be_scored_is_refused_before_work(evaluate_lm, folder, tmp_path, capsys):
    data = tmp_path / "text.txt"
    data.write_bytes(b"some text")
    for extra, message in (
        (["--stride", "4"], "--stride 4 needs --context"),
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
