"""The picture and the table of several pretraining runs, and the numbers that the pages quote from the recorded
ones."""

import json
from pathlib import Path

import pytest
from example_scripts import imported
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs/pretraining"


@pytest.fixture
def plot_training(monkeypatch):
    yield from imported(monkeypatch, "plot_training")


def write_run(folder: Path, scores: list[tuple[float, float]], layers: int = 0, test: bool = False) -> Path:
    folder.mkdir()
    entries = []
    for step, (seconds, value) in enumerate(scores, start=1):
        place = {"step": step, "train/seconds": seconds, "train/tokens": 1000 * step}
        rates = {f"router/activation_rate_{layer}": 0.1 * layer for layer in range(layers)}
        entries.append({**place, "train/loss": value, **rates})
        tested = {"test/bits_per_byte": value - 0.5} if test else {}
        entries.append({**place, "validation/bits_per_byte": value, **tested})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_runs_are_compared_at_equal_time(plot_training, tmp_path, capsys):
    boat = write_run(tmp_path / "boat", [(60, 3.0), (180, 2.0)], layers=3, test=True)
    # Validations before the first of the other run, between two of it, and after its end.
    llama = write_run(tmp_path / "llama", [(30, 4.0), (120, 2.25), (181, 2.1), (240, 1.5)])
    output = tmp_path / "pictures" / "curves.png"
    plot_training.main([f"SeqBoat={boat}", f"Llama={llama / 'metrics.jsonl'}", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "| SeqBoat | 3.0 | 2 | 0 | 2.0000 |" in printed and "| Llama | 0.5 | 1 | 0 | 4.0000 |" in printed
    # 2.5 on the line between 3 and 2 is above 2.25; 2.0 at the end is below 2.1; at 240 s it had long ended.
    assert (
        "validation: at equal time SeqBoat is below Llama in 1 of 2 validations, in the last one by 0.1000" in printed
    )
    # Only one of them was scored on the test split.
    assert "test" not in printed
    with Image.open(output) as image:
        assert image.width > image.height > 100
        by_minutes = image.convert("RGB").tobytes()
    plot_training.main([f"SeqBoat={boat}", f"Llama={llama}", "--output", str(output), "--over", "tokens"])
    with Image.open(output) as image:
        assert image.convert("RGB").tobytes() != by_minutes


def test_steps_that_a_resumed_run_repeats_count_once(plot_training, tmp_path):
    folder = write_run(tmp_path / "boat", [(60, 3.0), (120, 2.5), (180, 2.0)], layers=2)
    place = {"step": 2, "train/seconds": 110.0, "train/tokens": 2000}
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({**place, "train/loss": 2.4}) + "\n")
        log.write(json.dumps({**place, "validation/bits_per_byte": 2.25}) + "\n")
    run = plot_training.read_run(f"boat={folder}")
    assert [(entry["step"], entry["validation/bits_per_byte"]) for entry in run.scores] == [(1, 3.0), (2, 2.25)]
    assert [(entry["train/seconds"], entry["train/loss"]) for entry in run.losses] == [(60, 3.0), (110, 2.4)]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("outputs/boat", "NAME=FOLDER, got 'outputs/boat'"),
        ("Boat=nowhere", "Boat: there is no nowhere"),
        ("Boat=cut.jsonl", "Boat: line 2 of cut.jsonl is no entry of train_lm.py"),
        ("Boat=old.jsonl", "Boat: line 1 of old.jsonl is no entry of train_lm.py"),
        ("Boat=early.jsonl", "Boat: early.jsonl holds no validation yet"),
    ],
)
def test_what_is_no_run_is_refused(plot_training, tmp_path, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(tmp_path)
    entry = json.dumps({"step": 1, "train/seconds": 1.0, "train/tokens": 10, "train/loss": 2.0}) + "\n"
    Path("early.jsonl").write_text(entry)
    Path("cut.jsonl").write_text(entry + entry[:20])
    Path("old.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    with pytest.raises(SystemExit):
        plot_training.main([argument, "--output", str(tmp_path / "curves.png")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_the_pages_quote_the_recorded_runs(plot_training):
    page = (RECORDS / "README.md").read_text("utf-8")
    runs = [
        plot_training.read_run(f"{name}={RECORDS / file}.metrics.jsonl")
        for name, file in (("SeqBoat", "enwik8-base"), ("Llama", "enwik8-llama"))
    ]
    assert plot_training.table(runs) in page
    routers, readme = (RECORDS / "routers.md").read_text("utf-8"), (ROOT / "README.md").read_text("utf-8")
    for file, page_of_it, first in (
        ("enwik8-base", page, None), ("enwik8-llama", page, readme), ("routers/long-22-minutes", routers, readme),
        ("routers/long-22-minutes-early", routers, readme), ("routers/long-22-minutes-muon-0.014", routers, readme),
    ):  # fmt: skip
        result = json.loads((RECORDS / f"{file}.test.json").read_text("utf-8"))
        value = result["results"][0]["metrics"][0]["value"]
        assert f"{value:.4f}" in page_of_it
        assert first is None or f"{value:.3f}" in first
