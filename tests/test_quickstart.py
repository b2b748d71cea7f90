"""The main job of the README, in its short mode, as a user runs it; here with a model of the tests' own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from example_scripts import imported
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "examples/quickstart.py"
DOCUMENT = SCRIPT.parent / "data/enwik8_excerpt.txt"
# Packages of the extras are found neither by `import` nor by those who ask whether they are there.
WITHOUT_EXTRAS = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
EXTRAS = ("accelerate", "datasets", "matplotlib", "peft", "tensorboard", "torchao", "trl")
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in EXTRAS else find(name, *rest))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "boat"
    torch.manual_seed(0)
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).to(torch.bfloat16).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quickstart(model, tmp_path_factory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("quickstart") / "out"
    result = forks.run(forks.run_script, str(SCRIPT), "--fast", "--model", str(model), "--output", str(output))
    assert result.returncode == 0, result.stderr
    return result.stdout, output


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} not found in:\n{text}"
    return [float(group.replace(",", "")) for group in found.groups()]


def test_reads_a_document_and_continues_it_in_constant_memory(quickstart):
    printed, _ = quickstart
    (before,) = numbers(r"read 6,000 bytes in [\d.]+ s; cache of ([\d,]+) bytes", printed)
    speed, after = numbers(r"([\d,]+) tokens/s; cache of ([\d,]+) bytes", printed)
    assert before == after > 0 and speed > 0
    assert printed.split("continuation:\n---\n")[1].split("---")[0].strip()


def test_shows_where_attention_is_spent(quickstart, model):
    printed, output = quickstart
    rates = [float(rate) for rate in re.findall(r"layer \d+: ([\d.]+)% of these bytes activate", printed)]
    assert len(rates) == 2 and all(0 <= rate <= 100 for rate in rates)
    page = (output / "activation_map.html").read_text("utf-8")
    assert "the document&#x27;s last 512 bytes" in page and str(model.parent) not in page
    assert (output / "activation_map.png").read_bytes().startswith(b"\x89PNG")


def test_adapter_lowers_the_held_out_loss_and_merges(quickstart):
    printed, output = quickstart
    (before,) = numbers(r"held-out bits per byte before: ([\d.]+)", printed)
    (after,) = numbers(r"held-out bits per byte after: ([\d.]+)", printed)
    assert after < before
    from_file, merged = numbers(
        r"of logits: ([\d.e+-]+) after reloading the adapter, ([\d.e+-]+) after merging", printed
    )
    assert from_file == 0 and merged < 1e-3
    assert (output / "adapter/adapter_model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(output / "merged")
    ids = AutoTokenizer.from_pretrained(output / "merged")("ROMEO:", return_tensors="pt")
    assert torch.isfinite(loaded(**ids).logits).all()


def test_says_what_it_leaves_out_where_the_extras_are_missing(model, tmp_path):
    """As installed by `pip install -e .` alone."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(WITHOUT_EXTRAS, encoding="utf-8")
    output = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--fast", "--model", str(model), "--output", str(output)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (hidden, SCRIPT.parent.parent)))},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    assert 'no fine-tuning: it needs PEFT; pip install -c constraints.txt -e ".[train]"' in result.stdout
    assert "no activation_map.png: drawing it needs matplotlib" in result.stdout
    assert sorted(path.name for path in output.iterdir()) == ["activation_map.html"]


def test_refuses_what_it_cannot_use_before_any_work(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for script in imported(
        monkeypatch, "quickstart", "activation_map", "activation_page", "recipes", "train_from_scratch"
    ):
        for flags, message in (
            (("--model", str(model), "--output", str(tmp_path)), "is not empty"),
            (("--model", str(tmp_path), "--output", str(tmp_path / "out")), "there is no model in"),
            (("--model", str(model), "--output", str(tmp_path / "notes.txt/out")), "cannot be made"),
        ):
            monkeypatch.setattr(sys, "argv", ["quickstart.py", "--fast", *flags])
            with pytest.raises(SystemExit) as stopped:
                script.main()
            assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_excerpt_is_what_its_licence_says():
    data = DOCUMENT.read_bytes()
    data.decode("utf-8")
    licence = DOCUMENT.with_suffix(".LICENSE").read_text("utf-8")
    assert len(data) == 300_000 and "first 300,000 bytes of the usual test split" in " ".join(licence.split())
    assert "CC BY-SA 3.0" in licence
