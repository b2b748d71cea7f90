"""Training from nothing on a CPU, in its short mode, as a user runs it."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import forks
import pytest
from example_scripts import imported

from hub_upload.build import build_folder

SCRIPT = Path(__file__).resolve().parent.parent / "examples/train_from_scratch.py"
LONG = 5_000


def run_fast(*flags: str) -> None:
    """The script with `--fast`, fewer and smaller steps, and a prompt of three chunks in place of ten."""
    sys.path.insert(0, str(SCRIPT.parent))
    script = importlib.import_module(SCRIPT.stem)
    script.FAST = replace(script.FAST, batch_size=4, length=64, steps=12, new_tokens=20, timed_steps=5)
    script.PROMPT_BYTES = LONG
    sys.argv = [str(SCRIPT), "--fast", *flags]
    script.main()


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("from_scratch") / "model"
    result = forks.run(run_fast, "--output", str(output))
    assert result.returncode == 0, result.stderr
    return result.stdout, output


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} not found in:\n{text}"
    return float(found[1].replace(",", ""))


def test_validation_loss_falls(from_scratch):
    printed, _ = from_scratch
    before = number(r"validation bits per byte before training: ([\d.]+)", printed)
    after = number(r"validation bits per byte after training: ([\d.]+)", printed)
    assert after < before - 1


def test_reports_activation_and_continuation(from_scratch):
    printed, _ = from_scratch
    rates = [float(rate) for rate in re.findall(r"layer \d+: ([\d.]+)% of the validation bytes", printed)]
    assert len(rates) == 4 and all(0 <= rate <= 100 for rate in rates)
    continuation = printed.split(f"continuation of a prompt of {LONG:,} bytes:\n---\n")[1].split("---")[0]
    assert continuation.strip()


def test_cache_is_as_large_after_a_long_prompt_as_after_a_short_one(from_scratch):
    printed, _ = from_scratch
    short = number(r"after 1,000 bytes: cache of ([\d,]+) bytes, [\d.]+ tokens/s", printed)
    long = number(rf"after {LONG:,} bytes: cache of ([\d,]+) bytes, [\d.]+ tokens/s", printed)
    assert short == long > 0


def test_what_it_saves_can_be_published(from_scratch, tmp_path):
    _, output = from_scratch
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    assert build_folder(output, tmp_path / "hub").model_class == "SeqBoatForCausalLM"


def test_refuses_a_folder_that_holds_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--fast", "--output", str(tmp_path)])
    for script in imported(monkeypatch, "train_from_scratch"):
        with pytest.raises(SystemExit) as stopped:
            script.main()
    assert stopped.value.code == 2 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
