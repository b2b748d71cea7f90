"""Classification example: runs that end in time, random variants of rows, short recipes, several tasks at once and the
page of results."""

import functools
import io
import itertools
import json
import os
import signal
import tarfile
import time
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from classification_tasks import (
    RECIPES,
    ROOT,
    TINY,
    WRITERS,
    draw_little,
    importable,  # noqa: F401
    module,
    run,
    write_gray_pictures,
    write_pairs,
    write_recordings,
    write_reviews,
)
from safetensors.torch import load_file
from test_classification_examples import components, dots
from transformers import TrainerControl

pytestmark = pytest.mark.usefixtures("importable")

KINDS = {"short": 10, "half-hour": 31}


@pytest.fixture(autouse=True)
def _no_pictures(importable, monkeypatch):  # noqa: F811
    """Runs within this process draw nothing, which would be most of their time: test_classification_examples.py
    looks at the pictures of each task."""
    for name in ("write_activations", "write_confusion_matrix"):
        monkeypatch.setattr(module("train"), name, lambda *drawn: drawn[-1].write_bytes(b"no picture"))


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """A recipe's data, written or generated once for its kinds."""
    return functools.cache(lambda recipe: WRITERS[recipe](tmp_path_factory.mktemp(recipe)))


TIMED = [
    (kind, path.stem)
    for kind in KINDS
    for path in sorted((ROOT / "configuration/recipes/classification" / kind).glob("*.yaml"))
]


def of_task(recipe):
    """The published recipe of a timed one's task."""
    return recipe.partition("-strips")[0]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def end_step(budget, folder=None, step=1):
    return budget.on_step_end(SimpleNamespace(output_dir=folder), SimpleNamespace(global_step=step), TrainerControl())


def test_a_budget_keeps_time_for_validation_and_test():
    clock = Clock()
    # 100 seconds, of which 2 are margin; 40 rows are left for the end.
    budget = module("budget").TimeBudget(100 / 60, 90.0, 40, 8, clock=clock)
    assert budget.progress() == 0 and budget.spent() == 10
    clock.now += 20
    assert not end_step(budget).should_training_stop
    # Of 88 seconds; a step that took 8 seconds for 8 rows is no measure as the first one.
    assert budget.progress() == pytest.approx(20 / 88)
    clock.now += 8
    end_step(budget)
    assert budget.progress() == pytest.approx(28 / 88)
    clock.now += 4
    end_step(budget)
    # Half a second a row, stretched by 1.2, for 40 rows.
    assert budget.progress() == pytest.approx(32 / (88 - 24))
    # Compilation during the first validation counts for nothing.
    clock.now += 10
    budget.evaluated(10, 10.0)
    end_step(budget)
    assert budget.progress() == pytest.approx(42 / (88 - 24))
    budget.evaluated(10, 1.0)
    # The reserve shrinks to 4.8 seconds, and the share does not go back.
    assert budget.progress() == pytest.approx(42 / (88 - 24))
    clock.now = 90 + 100 - 2 - 4.8 - 0.1
    assert not end_step(budget).should_training_stop
    clock.now += 0.2
    control = end_step(budget)
    assert control.should_training_stop and control.should_evaluate and control.should_save
    assert budget.progress() == 1


def test_a_resumed_budget_goes_on_where_the_clock_stood(tmp_path):
    clock, kind = Clock(), module("budget").TimeBudget
    budget = kind(1.0, 100.0, 1, 1, clock=clock)
    clock.now += 10
    budget.progress()
    clock.now += 20
    budget.progress()
    (tmp_path / "checkpoint-3").mkdir()
    budget.on_save(SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=3), TrainerControl())
    clock.now = 5000.0
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed = kind(1.0, 4995.0, 1, 1, checkpoint, clock)
    assert resumed.spent() == 35
    assert resumed.progress() == pytest.approx((35 - 10) / (60 - 1.2 - 10))
    with pytest.raises(ValueError, match="max_minutes 0.5 is used up.*0.5 minutes"):
        kind(0.5, 4995.0, 1, 1, checkpoint, clock)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="without max_minutes"):
        kind(1.0, 4995.0, 1, 1, str(tmp_path / "checkpoint-4"), clock)


@pytest.mark.parametrize(("kind", "clock"), [("cosine", "real"), ("linear", "quick")])
def test_a_run_ends_in_time_with_its_rate_run_down(tmp_path, kind, clock, monkeypatch):
    if clock == "quick":
        # Each reading comes a tenth of a second after the last.
        train, readings = module("train"), itertools.count()
        ticking = SimpleNamespace(monotonic=lambda: next(readings) / 10, perf_counter=lambda: next(readings) / 10)
        monkeypatch.setattr(train, "time", ticking)
        monkeypatch.setattr(train, "TimeBudget", functools.partial(train.TimeBudget, clock=ticking.monotonic))
    output, minutes = tmp_path / "run", 0.1
    settings = {**write_reviews(tmp_path), "eval_steps": 40, "lr_scheduler_type": kind, "logging_steps": 1}
    results = run("lra-text", output, max_steps=100_000, max_minutes=minutes, learning_rate=1e-2, **settings)
    assert 2 < results["steps"] < 100_000
    assert results["minutes"] < 3 * minutes
    # The last step was validated and saved, and rates went up and then down all the way.
    state = json.loads((output / f"checkpoint-{results['steps']}/trainer_state.json").read_text("utf-8"))
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert max(rates) > 0.5e-2 and rates[-1] < 0.3 * max(rates)
    assert state["log_history"][-1]["step"] == results["steps"] and "eval_accuracy" in state["log_history"][-1]
    resumed = run(
        "lra-text", output, max_steps=100_000, max_minutes=minutes + 0.05, learning_rate=1e-2,
        resume_from_checkpoint="latest", **settings,
    )  # fmt: skip
    assert resumed["steps"] > results["steps"]
    with pytest.raises(ValueError, match="is used up"):
        run("lra-text", output, max_minutes=minutes / 2, resume_from_checkpoint="latest", **settings)


def test_steps_may_end_a_run_before_its_time_does(tmp_path):
    results = run(
        "lra-text", tmp_path / "run", max_steps=3, max_minutes=10, logging_steps=1, **write_reviews(tmp_path)
    )
    assert results["steps"] == 3
    state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text("utf-8"))
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates[1] > rates[2] > 0


def test_turned_pictures_still_show_their_label():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pictures, labels = module("pathfinder").draw(np.random.default_rng(5), 40)
        turned = module("augmentation").turn_pictures(torch.from_numpy(pictures)[:, None])[:, 0].numpy()
    changed = 0
    for picture, label, before in zip(turned, labels, pictures, strict=True):
        areas, count = components(picture > 0)
        first, second = dots(picture)
        assert count == 7 and (areas[first] == areas[second]) == bool(label)
        changed += not np.array_equal(picture, before)
    assert 20 < changed < 40


def test_a_strip_is_mirrored_and_not_turned():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        strip = torch.arange(8.0).view(1, 1, 2, 4)
        turned = module("augmentation").turn_pictures(strip.repeat(60, 1, 1, 1))
    places = {tuple(picture.flatten().tolist()) for picture in turned}
    assert places == {tuple(strip.flip(axes).flatten().tolist()) for axes in ((), (2,), (3,), (2, 3))}


def test_a_model_of_strips_goes_on_with_whole_pictures(tmp_path, monkeypatch):
    """At rates of 0 its weights stay; only the statistics of batches move."""
    draw_little(monkeypatch)
    data = {**WRITERS["lra-pathx"](tmp_path), "learning_rate": 0, "weight_decay": 0, "max_steps": 1, "augment": True}
    strips = {**data, "picture_height": 32, "contour_length": 4}
    first = run("lra-pathx", tmp_path / "first", {"router_target_rate": 0.75}, **strips, seed=1)
    assert first["trained_tokens"] == 4 * 32 * 64 and "init_from" not in first
    start, rate = {"init_from": tmp_path / "first/best"}, {"router_target_rate": 0.5}
    second = run("lra-pathx", tmp_path / "second", rate, **data, **start)
    assert second["trained_tokens"] == 4 * 64 * 64
    assert (second["init_from"], second["steps_before"]) == ("first/best", 1)
    before, after = (load_file(tmp_path / name / "best/model.safetensors") for name in ("first", "second"))
    kept = [name for name in before if "running" not in name and "num_batches" not in name]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in kept)
    third = run("lra-pathx", tmp_path / "third", rate, **data, init_from=tmp_path / "second/best")
    assert third["steps_before"] == 2
    # As train_lm, the same command goes on with a run, and keeps where it came from.
    go_on = {"max_steps": 2, "resume_from_checkpoint": "latest"}
    resumed = run("lra-pathx", tmp_path / "second", rate, **(data | start | go_on))
    assert (resumed["init_from"], resumed["steps_before"], resumed["steps"]) == ("first/best", 1, 2)
    cases = [
        ({"hidden_size": 16}, {}, "is of another shape: hidden_size is 8 there and 16 in this run"),
        ({}, {"init_from": tmp_path}, "it has no config.json"),
    ]
    for overrides, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            run("lra-pathx", tmp_path / "none", overrides, **(data | start | settings))
    assert not (tmp_path / "none").exists()


def test_strips_are_for_path_x_alone(tmp_path, monkeypatch):
    draw_little(monkeypatch)
    data = WRITERS["lra-pathx"](tmp_path)
    for recipe, settings, message in (
        ("lra-pathfinder", {"picture_height": 16}, "picture_height is for task 'pathx', got 16"),
        ("lra-listops", {"contour_length": 4}, "contour_length is for task 'pathx', got 4"),
        ("lra-pathx", {"picture_height": 8}, "picture_height must be from 16 to"),
        ("lra-pathx", {"contour_length": 15}, "contour_length must be from 2 to 14, got 15"),
        ("lra-pathx", {"contour_length": 4, "easy_rows": 2}, "no shorter contours are drawn"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe, tmp_path / "run", **(data | settings))
    assert not (tmp_path / "run").exists()


def test_pictures_are_mirrored_and_moved_by_at_most_two_pixels():
    augmentation = module("augmentation")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        picture = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
        varied = augmentation.vary_pictures(picture)
    assert varied.shape == picture.shape
    middle = {(int(value) // 8, int(value) % 8) for value in varied[:, 0, 4, 3]}
    rows, columns = ({place[axis] for place in middle} for axis in (0, 1))
    assert rows == {2, 3, 4, 5, 6} and columns == {1, 2, 3, 4, 5, 6}
    falling = (varied[:, 0, 0, 6] < varied[:, 0, 0, 2]).float().mean()
    assert 0.3 < falling < 0.7


def test_recordings_vary_a_little():
    augmentation = module("augmentation")
    time = torch.arange(16000) / 16000
    tone = torch.sin(2 * torch.pi * 440 * time).repeat(50, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        varied = augmentation.vary_recordings(tone)
    assert varied.shape == tone.shape and varied.dtype == tone.dtype and varied.isfinite().all()
    peaks = torch.fft.rfft(varied[:, 4000:12000]).abs().argmax(1) * 2
    assert peaks.min() >= 440 * 0.84 and peaks.max() <= 440 * 1.16 and peaks.float().std() > 10
    assert (varied[0] - varied[1]).abs().max() > 0.1
    silence = torch.zeros(2, 200)
    assert augmentation.vary_recordings(silence).abs().max() < 1


def test_a_resumed_run_draws_the_same_variants(tmp_path):
    data = write_recordings(tmp_path)
    settings = {**data, "max_steps": 4, "eval_steps": 2, "augment": True, "save_total_limit": 5}
    run("speech-commands", tmp_path / "whole", **settings)
    run("speech-commands", tmp_path / "resumed", resume_from_checkpoint=tmp_path / "whole/checkpoint-2", **settings)
    run("speech-commands", tmp_path / "plain", **(settings | {"augment": False}))
    whole, resumed, plain = (
        load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("whole", "resumed", "plain")
    )
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


@pytest.mark.parametrize("task", ["listops", "pathfinder"])
def test_easy_rows_are_for_training_alone(task, tmp_path, monkeypatch):
    tasks, pathfinder = module("tasks"), module("pathfinder")
    monkeypatch.setattr(pathfinder, "BLOCK", 24)
    monkeypatch.setattr(pathfinder.os, "cpu_count", lambda: 1)
    arguments = tasks.DataArguments(data_path=str(tmp_path), train_size=8, validation_size=4, test_size=4)
    plain = tasks.load_task(task, arguments, None)
    arguments.easy_rows = 7
    mixed = tasks.load_task(task, arguments, None)
    assert len(mixed.train) == 15 and mixed.easy == 7 and len(list(tmp_path.iterdir())) == 4
    name = "input_ids" if task == "listops" else "pixel_values"
    for split in ("validation", "test"):
        before, after = ([rows[i][name] for i in range(len(rows))] for rows in
                         (getattr(plain, split), getattr(mixed, split)))  # fmt: skip
        assert all(map(np.array_equal, before, after))
    size = [float((mixed.train[i][name] > -1).sum()) for i in range(15)]
    assert np.mean(size[8:]) < np.mean(size[:8])
    if task == "listops":
        assert max(size[8:]) <= 500 < min(size[:8])
        assert [mixed.train[i]["labels"] for i in range(8, 15)] == [
            module("listops").evaluate(mixed.train[i]["input_ids"]) for i in range(8, 15)
        ]
    with pytest.raises(ValueError, match="easy_rows must be"):
        tasks.load_task("text", arguments, None)


def test_bad_settings_are_refused(tmp_path, monkeypatch):
    reviews = write_reviews(tmp_path)
    cases = [
        ({"max_minutes": 0}, "max_minutes must be greater than 0"),
        ({"lr_scheduler_type": "constant"}, "linear or cosine, got 'constant'"),
        ({"easy_passes": 1}, "easy_passes must be .* 0 without easy_rows, got 1"),
        ({"easy_passes": 2, "easy_rows": -1}, "easy_rows must be at least 0"),
        ({"optimizer": "lion"}, "optimizer must be adamw or muon, got 'lion'"),
        ({"muon_row_beta": 1.0}, "muon_row_beta must be at least 0 and below 1, got 1"),
        ({"cuda_graphs": True}, "cuda_graphs needs a GPU"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            run("lra-text", tmp_path / "run", **reviews, **settings)
    with pytest.raises(ValueError, match="no variants for task 'retrieval'"):
        run("lra-retrieval", tmp_path / "run", **write_pairs(tmp_path), augment=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="max_minutes is for one process"):
        run("lra-text", tmp_path / "run", **reviews, max_minutes=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "recipe"), TIMED)
def test_every_timed_recipe_runs_on_a_slice(kind, recipe, slices, tmp_path, monkeypatch):
    draw_little(monkeypatch)
    easy = 3 if recipe in ("lra-listops", "lra-pathfinder", "lra-pathx") or "strips" in recipe else None
    fits = {"contour_length": 5} if "strips" in recipe else {}
    results = run(
        f"{kind}/{recipe}", tmp_path / "run", {"router_target_rate": 0.5}, **slices(of_task(recipe)),
        num_workers=0, easy_rows=easy, cuda_graphs=False, **fits,
    )  # fmt: skip
    assert results["steps"] == 2 and results["arguments"]["max_minutes"] < KINDS[kind]
    assert (results["arguments"]["optimizer"] == "muon") == (kind == "half-hour" or recipe == "lra-pathx")


@pytest.mark.parametrize(("kind", "recipe"), TIMED)
def test_timed_recipes_name_shapes_that_exist(kind, recipe):
    train, recipes = module("train"), module("recipes")
    folder = ROOT / "configuration/recipes/classification"
    timed, published = (
        recipes.parse_arguments(train.ClassificationArguments, [str(folder / name), "--output_dir", "out"])
        for name in (f"{kind}/{recipe}.yaml", f"{of_task(recipe)}.yaml")
    )
    train.check_arguments(timed)
    config = train.build_config(timed)
    assert (timed.task, timed.preset, timed.max_length) == (published.task, published.preset, published.max_length)
    assert config.bidirectional and timed.router_learning_rate < timed.learning_rate
    assert not timed.router_gain or config.router_target_rate is not None
    own = {of_task(name) for other, name in TIMED if other == kind}
    assert own | {"lra-retrieval"} == {path.stem for path in RECIPES}


def test_a_budget_and_muon_hold_in_a_resumed_run(tmp_path):
    """Biases move as the budget says, whatever the loss does; nothing else is kept for it in a checkpoint."""
    settings = {
        **write_reviews(tmp_path), "optimizer": "muon", "router_gain": 0.5, "learning_rate": 1e-2, "max_steps": 6,
        "eval_steps": 3, "save_total_limit": 5, "augment": True, "muon_split": True, "muon_row_beta": 0.95,
        "qk_learning_rate": 0.04,
    }  # fmt: skip
    target = {"router_target_rate": 0.9, "router_target_scope": "layer"}
    run("lra-text", tmp_path / "whole", target, **settings)
    run("lra-text", tmp_path / "again", target, resume_from_checkpoint=tmp_path / "whole/checkpoint-3", **settings)
    run("lra-text", tmp_path / "free", target, **(settings | {"router_gain": 0}))
    run("lra-text", tmp_path / "joint", target, **(settings | {"muon_split": False}))
    whole, again, free, joint = (
        load_file(tmp_path / name / "checkpoint-6/model.safetensors") for name in ("whole", "again", "free", "joint")
    )
    torch.testing.assert_close(whole, again, rtol=0, atol=0)
    assert any(not torch.equal(whole[name], joint[name]) for name in whole if name.endswith("in_proj.weight"))
    biases = [name for name in whole if name.endswith("router.bias")]
    assert biases and any(not torch.equal(whole[name], free[name]) for name in biases)
    with pytest.raises(ValueError, match="router_gain 0.5 needs a rate to hold"):
        run("lra-text", tmp_path / "none", **settings)
    with pytest.raises(ValueError, match="router_target is no field of SeqBoatConfig; the nearest is router_target_"):
        run("lra-text", tmp_path / "none", {"router_target": 0.5}, **settings)
    assert not (tmp_path / "none").exists()


def test_texts_keep_their_length_and_most_of_their_bytes():
    augmentation = module("augmentation")
    ids = torch.arange(100).repeat(40, 1)
    mask = (torch.arange(100) < 60).long().repeat(40, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        varied = augmentation.vary_texts(ids, mask)
    changed = varied != ids
    assert not changed[:, 60:].any() and int(varied[:, :60].max()) < 60
    assert 0.07 < changed[:, :60].float().mean() < 0.13


def test_pictures_have_a_square_blanked():
    augmentation = module("augmentation")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        varied = augmentation.vary_pictures(torch.ones(300, 1, 9, 12), shift=0, cutout=4)
    blank = (varied[:, 0] == 0).flatten(1)
    assert int(blank.sum(1).max()) == 16 and int(blank.sum(1).min()) >= 4
    # The square's middle is any pixel alike: of 108 middles 16 reach one in the picture's middle, 4 the last one.
    shares = blank.float().mean(0)
    assert shares.min() > 0 and float(shares.view(9, 12)[4, 6]) == pytest.approx(16 / 108, abs=0.06)
    one = (varied[0, 0] == 0).nonzero()
    assert len(one) == int(torch.prod(one.amax(0) - one.amin(0) + 1))


def test_tasks_run_together_and_their_results_make_a_page(tmp_path, monkeypatch, capsys):
    reviews, pictures = write_reviews(tmp_path), write_gray_pictures(tmp_path)
    settings = {
        "config_overrides": json.dumps(TINY), "max_steps": 2, "eval_steps": 1, "batch_size": 4, "validation_size": 4,
        "warmup_steps": 1, "use_cpu": True, "num_workers": 0, "eval_batch_size": 4, "cuda_graphs": False,
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    collected, output = tmp_path / "back/all.tar.gz", tmp_path / "out"
    launcher = module("run_tasks")
    monkeypatch.setattr(launcher.subprocess, "Popen", forks.Command)
    monkeypatch.chdir(ROOT)
    status = launcher.main(
        [f"text={reviews['data_path']}", f"image={pictures['data_path']},{pictures['labels_path']}",
         "speech=nowhere.npz", "--output_dir", str(output), "--collect", str(collected), "--set", "text.max_steps=3",
         *flags]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 1, said
    assert "speech: failed (exit code 1): train.py: error: " in said and "nowhere.npz" in said
    summary = {entry["task"]: entry for entry in json.loads((output / "summary.json").read_text("utf-8"))}
    assert summary["text"]["results"]["steps"] == 3 and summary["image"]["results"]["steps"] == 2
    assert "results" not in summary["speech"]
    assert summary["text"]["command"].startswith("python examples/classification/train.py configuration/recipes/")
    with tarfile.open(collected) as tar:
        names = tar.getnames()
    assert {"summary.json", "text.log", "speech.log", "text/results.json", "image/activations.png"} <= set(names)
    assert not any("safetensors" in name for name in names)

    report, page = module("report"), tmp_path / "docs/classification.md"
    page.parent.mkdir()
    report.main([str(collected), "--page", str(page)])
    first = page.read_text("utf-8")
    assert f"{summary['image']['results']['test_accuracy']:.1%}" in first and "raw speech" not in first
    assert (page.parent / "images/classification/text_confusion_matrix.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert numbers["image"]["test_accuracy"] == summary["image"]["results"]["test_accuracy"]
    page.write_text(first.replace("# Classification results", "# Mine\n\nWhat was tried."), "utf-8")
    report.main([str(collected), "--page", str(page)])
    again = page.read_text("utf-8")
    assert again.startswith("# Mine\n\nWhat was tried.") and again.count("| LRA text") == 1
    page.write_text("no marks", "utf-8")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.main([str(collected), "--page", str(page)])
    assert page.read_text("utf-8") == "no marks"


def test_tasks_that_outlast_their_limit_are_ended(tmp_path):
    launcher = module("run_tasks")
    slow = {
        "slow": ["-c", "import time; print('on it', flush=True); time.sleep(60)"],
        "quick": ["-c", "print('done')"],
        "stuck": [
            "-c",
            "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('{}'); print('over', flush=True); "
            "time.sleep(60)",
            str(tmp_path / "stuck/results.json"),
        ],
    }
    (tmp_path / "stuck").mkdir()
    began = time.time()
    codes = launcher.run_all(slow, tmp_path, limit=0.05)
    assert codes["quick"] == 0 and codes["slow"] != 0 and codes["stuck"] != 0
    summary = launcher.summarise(slow, codes, tmp_path, began)
    assert [entry.get("error") for entry in summary] == ["on it", "done", None]
    # Results of an earlier attempt are not this one's.
    assert launcher.summarise(slow, codes, tmp_path, time.time() + 60)[2]["error"] == "over"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text"], "must be TASK=DATA"),
        (["sums=x"], "must be TASK=DATA"),
        (["text=a", "text=b"], "named twice"),
        (["image=a"], "needs PIXELS,LABELS"),
        (["text=a", "--set", "speech.max_steps=1"], "with one of the tasks text"),
        (["text=a", "--set", "max_steps"], "must be FLAG=VALUE"),
        (["retrieval=a"], "no recipe 'lra-retrieval.yaml' for short runs"),
    ],
)
def test_launcher_refuses_what_it_cannot_run(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        module("run_tasks").main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def write_archive(path, summary, files=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in [("summary.json", summary), *files]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


RESULTS = {
    "test_accuracy": 0.5, "validation_accuracy": 0.5, "steps": 2, "best_step": 1, "minutes": 0.1, "parameters": 10,
    "tokens_per_second": 5.0, "activation_rate_by_layer": [0.5], "device": "a CPU", "command": "python train.py",
    "rows": {"train": 1, "validation": 1, "test": 1}, "versions": {"torch": "2", "transformers": "5"},
}  # fmt: skip


def test_a_report_reads_archives_of_anybody(tmp_path):
    report, page = module("report"), tmp_path / "docs/page.md"
    page.parent.mkdir()
    picture = b"\x89PNG\r\n\x1a\n rest"

    def make(task="text", files=(("text/activations.png", picture),), **changes):
        summary = json.dumps([{"task": task, "results": {**RESULTS, **changes}}]).encode()
        return write_archive(tmp_path / "a.tar.gz", summary, files)

    report.main([str(make()), "--page", str(page)])
    before = {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}
    assert before[page.parent / "images/classification/text_activations.png"] == picture
    cases = [
        (dict(task="/tmp/x"), "task='/tmp/x' is none of text"), (dict(task="../text"), "is none of"),
        (dict(task=5), "task=5 is none of"), (dict(task=["text"]), "is none of"),
        (dict(files=[("text/activations.png", b"<script>")]), "is no PNG picture"),
        (dict(device="<script>"), "where a plain line should be"),
        (dict(command="a\n# b"), "where a plain line should be"),
        (dict(steps="2"), "where a number should be"), (dict(activation_rate_by_layer=[None]), "a number should be"),
        (dict(minutes=float("nan")), "a number should be"), (dict(rows=[]), "are not what train.py writes"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            report.main([str(make(**changes)), "--page", str(page)])
    for summary in (b"{}", b"[1]", b"[" * 100_000, b"\xff", b'[{"results": {}}]'):
        with pytest.raises(ValueError, match="summary.json"):
            report.main([str(write_archive(tmp_path / "b.tar.gz", summary)), "--page", str(page)])
    whole = make().read_bytes()
    for damaged in (whole[:50], b"no archive", b"", whole[:30] + b"\0\0\0\0" + whole[34:]):
        (tmp_path / "c.tar.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="c.tar.gz' cannot be read"):
            report.main([str(tmp_path / "c.tar.gz"), "--page", str(page)])
    assert {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()} == before


def test_a_stopped_task_saves_a_checkpoint_and_no_results(tmp_path):
    settings = {**write_reviews(tmp_path), "max_steps": 6, "eval_steps": 100, "save_total_limit": 1}
    train, output = module("train"), tmp_path / "run"

    class Stop(train.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    usual = train.RouterCallback.attach
    try:
        train.RouterCallback.attach = lambda trainer: trainer.add_callback(Stop())
        assert run("lra-text", output, **settings) == {}
    finally:
        train.RouterCallback.attach = usual
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (output / "results.json").exists() and not (output / "best").exists()
    results = run("lra-text", output, resume_from_checkpoint="latest", **settings)
    whole = run("lra-text", tmp_path / "whole", **settings)
    assert results["steps"] == 6
    torch.testing.assert_close(
        *(load_file(path / "best/model.safetensors") for path in (output, tmp_path / "whole")), rtol=0, atol=0
    )
    for name in ("trainer_state.json", "rng_state.pth"):
        (output / "checkpoint-6" / name).write_bytes(b"")
        with pytest.raises(ValueError, match="checkpoint-6"):
            run("lra-text", output, resume_from_checkpoint="latest", **settings)
        run("lra-text", output, overwrite_output_dir=True, **settings)
    assert results["confusion_matrix"] == whole["confusion_matrix"]


def test_every_number_has_a_range(tmp_path):
    train, reviews = module("train"), write_reviews(tmp_path)
    numbers = {
        name for name, field in train.ClassificationArguments.__dataclass_fields__.items()
        if field.type in (int, float, int | None, float | None)
    }  # fmt: skip
    assert numbers - set(train.RANGES) == {"max_minutes"}
    for name in sorted(numbers):
        for value in (-1, "nan") if name not in ("max_length",) else (0,):
            with pytest.raises((ValueError, SystemExit)):
                run("lra-text", tmp_path / "run", **{**reviews, name: value})
    assert not (tmp_path / "run").exists()
