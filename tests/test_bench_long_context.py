"""The benchmark of long contexts at toy size: the stated protocol, results that the model card takes, and going on."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from hub_upload.card_sources import read_sources
from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "examples/data/enwik8_excerpt.txt").read_bytes()[:4_000]


@pytest.fixture(scope="module")
def bench():
    kept = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import bench_long_context

        yield bench_long_context
    finally:
        sys.path[:] = kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "boat"
    torch.manual_seed(0)
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).save_pretrained(path)
    build_byte_tokenizer().save_pretrained(path)
    (path.parent / "text.txt").write_bytes(TEXT)
    return path


def arguments(folder, output, *more):
    return [
        str(folder), "--data", str(folder.parent / "text.txt"), "--contexts", "16", "300", "--blocks", "3",
        "--block-bytes", "50", "--prompts", "20", "900", "--new-tokens", "12", "--chunk-size", "64", "--batch-size",
        "2",
        "--device", "cpu", "--output", str(output), *more,
    ]  # fmt: skip


def test_scores_the_same_bytes_after_each_context(bench, folder, tmp_path):
    measured = bench.main(arguments(folder, tmp_path / "out"))
    model = SeqBoatForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor(list(TEXT))
    starts = [300 + number * ((4_000 - 300) // 3) for number in range(3)]
    for row, context in zip(measured["quality"], (16, 300), strict=True):
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(
                    model(tokens[None, start - context : start + 50]).logits[0, context - 1 : -1],
                    tokens[start : start + 50],
                )
                for start in starts
            ]
        want = torch.stack(losses).mean().item() / math.log(2)
        assert (row["context_bytes"], row["scored_bytes"]) == (context, 150)
        assert row["bits_per_byte"] == pytest.approx(want, abs=1e-4)
    short, long = measured["generation"]
    assert short["cache_bytes"] == long["cache_bytes"] > 0
    assert long["prompt_bytes"] == 900 and long["tokens_per_second"] > 0 and long["prefill_seconds"] > 0
    assert len(long["sample"]) > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "long_context.csv", "long_context.json", "long_context.md",
    ]  # fmt: skip
    card = read_sources(folder, 2, evaluations=[tmp_path / "out/long_context.json"])
    assert card.long_context == measured
    assert str(tmp_path) not in (tmp_path / "out/long_context.md").read_text("utf-8")


def test_goes_on_where_it_was_interrupted(bench, folder, tmp_path, monkeypatch):
    usual = bench.bits_per_byte

    def interrupted(model, tokens, starts, context, a):
        if context == 300:
            raise KeyboardInterrupt
        return usual(model, tokens, starts, context, a)

    monkeypatch.setattr(bench, "bits_per_byte", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments(folder, tmp_path))
    kept = json.loads((tmp_path / "long_context.json").read_text("utf-8"))["long_context"]
    assert len(kept["generation"]) == 2 and len(kept["quality"]) == 1
    monkeypatch.setattr(bench, "bits_per_byte", usual)
    monkeypatch.setattr(bench, "generate", None)
    measured = bench.main(arguments(folder, tmp_path))
    assert measured["generation"] == kept["generation"] and len(measured["quality"]) == 2
    with pytest.raises(ValueError, match="was measured with blocks=3, not 2: name another --output"):
        bench.main(arguments(folder, tmp_path, "--blocks", "2"))


def test_bad_input_is_refused_before_any_work(bench, folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="the split has 4,000 bytes, but 5,000 are needed"):
        bench.main(arguments(folder, tmp_path / "out", "--prompts", "5000"))
    with pytest.raises(FileNotFoundError, match="there is no model in"):
        bench.main(arguments(tmp_path, tmp_path / "out"))
    with pytest.raises(SystemExit):
        bench.main(arguments(folder, tmp_path / "out", "--contexts", "1"))
    assert "--contexts must be at least 2, got 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
