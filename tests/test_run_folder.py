"""A run owns its folder: checkpoints of its own alone, one process at a time, nothing lost when it is overwritten or
killed, nothing executed when it is resumed from, and a damaged file stops it by name."""

import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from classification_tasks import TINY, write_reviews
from transformers import AutoModelForCausalLM

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples/data/tinyshakespeare.txt"
SETTINGS = {
    "preset": "tiny", "train_file": TEXT, "max_bytes": 6000, "sequence_length": 32, "batch_size": 2, "max_steps": 6,
    "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "warmup_steps": 1, "learning_rate": 1e-2, "eval_tokens": 64,
    "cpu": True, "config_overrides": '{"hidden_dropout": 0.3}',
}  # fmt: skip


def command(output, script="train_lm", settings=None, **changes):
    settings = {**(SETTINGS if settings is None else settings), "output_dir": output, **changes}
    flags = [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / f"examples/{script}.py"), *flags]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts' modules find their siblings in their folder; this process forgets them afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    for name in (set(sys.modules) - before) & examples:
        del sys.modules[name]


@pytest.fixture
def folders():
    return importlib.import_module("run_folder")


def main(script: str, flags: list[str]):
    """Calls a script's main function."""
    path = ROOT / "examples" / script
    if path.parent.name != "examples":
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.name).main(flags)


def run(output, ok=True, script="train_lm", **changes):
    """Runs a script in this process; what it refuses to do it with, where not `ok`."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        main(script, command(output, script, **changes)[2:])
    except ValueError as error:
        assert not ok, error
        return f"ValueError: {error}"
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    assert ok
    return None


def forked(output, script="train_lm", settings=None, **changes):
    """The command in a process that has this one's imports, and prints nothing."""
    return forks.Command(command(output, script, settings, **changes), env=ENVIRONMENT)


def losses(output):
    entries = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of six steps with all its checkpoints."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(output, save_total_limit=9)
    return output


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_every_checkpoint_and_line_names_the_run(whole):
    run_id = json.loads((whole / "run.json").read_text("utf-8"))["run"]
    manifests = [
        json.loads((path / "manifest.json").read_text("utf-8")) for path in sorted(whole.glob("checkpoint-*"))
    ]
    assert [(m["run"], m["step"], m["order"]) for m in manifests] == [(run_id, 2, 1), (run_id, 4, 2), (run_id, 6, 3)]
    lines = (whole / "metrics.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["run"] for line in lines} == {run_id}


def test_no_file_of_a_checkpoint_is_read_as_a_pickle_that_may_run_code(whole):
    names = {path.name for path in (whole / "checkpoint-2").iterdir()}
    assert not any(name.startswith("custom_checkpoint") for name in names)
    state = json.loads((whole / "checkpoint-2/manifest.json").read_text("utf-8"))["state"]
    assert state["progress"]["step"] == 2 and state["schedule"]["last_epoch"] == 2


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin"])
def test_a_payload_does_not_run(copy, folders, tmp_path, name, sealed):
    """Also where the manifest was written anew by whoever put the payload there."""
    mark, checkpoint = tmp_path / "ran", copy / "checkpoint-2"
    torch.save(Payload(mark), checkpoint / name)
    if sealed:
        manifest = folders.read_manifest(checkpoint)
        folders.write_manifest(
            checkpoint, {key: manifest[key] for key in ("run", "order", "step", "processes", "state")}
        )
    # scheduler.bin is none of the files that a resume reads.
    said = run(copy, ok=sealed and name == "scheduler.bin", resume_from_checkpoint=checkpoint)
    assert not mark.exists()
    assert (sealed and name == "scheduler.bin") or "ValueError" in said and str(checkpoint) in said


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json", "config.json"]
)
def test_a_damaged_file_stops_a_resume_by_name(copy, folders, name):
    checkpoint = copy / "checkpoint-6"
    data = (checkpoint / name).read_bytes()
    for damaged in (data[:20], data[: len(data) // 2] + b"\0" + data[len(data) // 2 + 1 :], None):
        (checkpoint / name).unlink()
        if damaged is not None:
            (checkpoint / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            folders.verify_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(data)
    assert folders.verify_checkpoint(checkpoint, 1)["step"] == 6
    with pytest.raises(ValueError, match="written by 1 processes, this run has 2"):
        folders.verify_checkpoint(checkpoint, 2)
    (checkpoint / name).write_bytes(data[:-2])
    assert name in run(copy, ok=False, resume_from_checkpoint="latest")


def test_a_state_of_another_kind_is_refused(copy, folders):
    checkpoint = copy / "checkpoint-2"
    manifest = folders.read_manifest(checkpoint)
    kept = {key: manifest[key] for key in ("run", "order", "step", "processes", "state")}
    for state in ({}, {**kept["state"], "progress": {"step": "2", "best": 1, "seconds": 1}},
                  {**kept["state"], "schedule": {**kept["state"]["schedule"], "base_lrs": [1, 2, 3]}}):  # fmt: skip
        folders.write_manifest(checkpoint, {**kept, "state": state})
        assert "cannot be resumed from" in run(copy, ok=False, resume_from_checkpoint=checkpoint)


def test_overwriting_moves_the_old_run_and_keeps_the_new_one(copy):
    (copy / "notes.txt").write_text("mine")
    run(copy, overwrite_output_dir=True, max_steps=4, seed=5)
    assert {path.name for path in copy.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert {path.name for path in (copy / "replaced-1").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 6)}
    assert sorted(losses(copy)) == [1, 2, 3, 4] and (copy / "notes.txt").read_text() == "mine"
    AutoModelForCausalLM.from_pretrained(copy / "replaced-1/final")
    fresh = losses(copy)
    run(copy, resume_from_checkpoint="latest", seed=5)
    assert sorted(losses(copy)) == [1, 2, 3, 4, 5, 6] and losses(copy).items() >= fresh.items()
    said = run(copy, ok=False, resume_from_checkpoint="latest", overwrite_output_dir=True)
    assert "overwrite_output_dir would move" in said and (copy / "checkpoint-6").is_dir()


def test_latest_is_what_was_written_last_and_no_other_run_s(copy, folders, tmp_path):
    shutil.rmtree(copy / "checkpoint-4")
    run(copy, resume_from_checkpoint=copy / "checkpoint-2", max_steps=4, save_total_limit=9)
    assert folders.latest_checkpoint(copy) == copy / "checkpoint-4"
    shutil.copytree(copy / "checkpoint-6", copy / "checkpoint-999")
    other = tmp_path / "other"
    run(other, max_steps=2)
    shutil.copytree(other / "checkpoint-2", copy / "checkpoint-8")
    assert folders.latest_checkpoint(copy) == copy / "checkpoint-4"
    with pytest.raises(ValueError, match="holds another run"):
        folders.take_folder(str(copy), other / "checkpoint-2")
    # A foreign checkpoint is put aside before one of this run could take its place.
    folders.take_folder(str(copy), copy / "checkpoint-4").close()
    assert not (copy / "checkpoint-8").exists() and (copy / "replaced-1/checkpoint-8").is_dir()


def test_folders_with_other_names_are_left_alone(tmp_path):
    output = tmp_path / "run"
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-4-copy", "checkpoint-²"):
        (output / name).mkdir(parents=True)
    run(output, overwrite_output_dir=True, save_total_limit=1)
    left = {path.name for path in output.glob("checkpoint-*")}
    assert left == {"checkpoint-best", "checkpoint-", "checkpoint-4-copy", "checkpoint-²", "checkpoint-6"}
    run(output, resume_from_checkpoint="latest", max_steps=7, save_total_limit=1)


def test_two_live_runs_in_one_folder_are_refused(copy, folders, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.1)
    first = folders.take_folder(str(copy), copy / "checkpoint-6")
    for flags in ({"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
        assert "is in use: another run is writing to it" in run(copy, ok=False, **flags)
    with pytest.raises(ValueError, match="is in use"):
        folders.take_folder(str(copy), overwrite=True)
    first.close()
    folders.take_folder(str(copy), copy / "checkpoint-6").close()
    assert (copy / "checkpoint-6").is_dir()


def test_what_a_killed_run_left_is_cleared_away(copy, folders):
    (copy / ".partial-checkpoint-8").mkdir()
    (copy / "best").rename(copy / ".best.old")
    with (copy / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 7, "train/l')
    run(copy, resume_from_checkpoint="latest", max_steps=7)
    assert sorted(losses(copy)) == [1, 2, 3, 4, 5, 6, 7]
    assert not (copy / ".partial-checkpoint-8").exists() and not (copy / ".best.old").exists()
    AutoModelForCausalLM.from_pretrained(copy / "best")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(folders, tmp_path, monkeypatch, exchange):
    import hub_upload.folders

    if not exchange:
        monkeypatch.setattr(hub_upload.folders, "_exchange", lambda first, second: False)
    owner = folders.RunFolder(tmp_path)
    for content in ("one", "two"):
        with owner.replacing("best") as stage:
            (stage / "a").write_text(content)
        assert (tmp_path / "best/a").read_text() == content
    with pytest.raises(KeyError), owner.replacing("best") as stage:
        (stage / "a").write_text("half")
        raise KeyError
    assert (tmp_path / "best/a").read_text() == "two" and [path.name for path in tmp_path.iterdir()] == ["best"]


def wait_for(condition, process, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_to_go_on_from(whole, tmp_path, number):
    output = tmp_path / "run"
    changes = {"save_steps": 100_000, "max_steps": 100_000, "eval_steps": 100_000}
    process = forked(output, **changes)
    try:
        log = output / "metrics.jsonl"
        wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > 2, process)
        process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        process.kill()
    (checkpoint,) = output.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert step == max(losses(output)) and not (output / "final").exists()
    run(output, resume_from_checkpoint="latest", **{**changes, "max_steps": step + 1})
    assert max(losses(output)) == step + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_at_any_moment_loses_no_more_than_the_steps_since_the_last_checkpoint(whole, tmp_path):
    expected = losses(whole)
    began = time.monotonic()
    assert forked(tmp_path / "timed").wait() == 0
    length = time.monotonic() - began
    for attempt in range(6):
        output = tmp_path / f"run{attempt}"
        process = forked(output)
        time.sleep(length * (attempt + 0.5) / 6)
        process.kill()
        process.wait()
        for name in ("best", "final"):
            if (output / name).exists():
                AutoModelForCausalLM.from_pretrained(output / name)
        kept = sorted(output.glob("checkpoint-*"))
        run(output, **({"resume_from_checkpoint": "latest"} if kept else {"overwrite_output_dir": True}))
        assert losses(output) == expected


INSTRUCTIONS = {
    "train_file": TEXT, "max_bytes": 6000, "sequence_length": 64, "max_steps": 6, "learning_rate": 1e-2,
    "per_device_train_batch_size": 2, "validation_fraction": 0.1, "use_cpu": True, "report_to": "none",
    "logging_steps": 1, "save_steps": 2, "disable_tqdm": True, "lr_scheduler_type": "constant", "save_total_limit": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", hidden_dropout=0.1)).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned") / "run"
    run(output, script="finetune_trainer", settings=INSTRUCTIONS, model=model)
    return output


def tune(output, model, ok=True, **changes):
    return run(output, ok, script="finetune_trainer", settings=INSTRUCTIONS, model=model, **changes)


def test_fine_tuning_owns_its_folder_too(tuned, model, tmp_path, folders):
    output = tmp_path / "run"
    shutil.copytree(tuned, output)
    manifests = [folders.verify_checkpoint(output / f"checkpoint-{step}", 1) for step in (2, 4, 6)]
    assert len({manifest["run"] for manifest in manifests}) == 1
    tune(output, model, overwrite_output_dir=True, max_steps=4, save_total_limit=1, seed=3)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-4"}
    assert (output / "replaced-1/checkpoint-6").is_dir() and (output / "replaced-1/final").is_dir()
    tune(output, model, resume_from_checkpoint="latest", max_steps=6, save_total_limit=1, seed=3)
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "model.safetensors"):
        path = output / "checkpoint-6" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert name in tune(output, model, ok=False, resume_from_checkpoint="latest")
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_payload_does_not_run_in_fine_tuning(tuned, model, tmp_path, folders, name):
    mark, checkpoint = tmp_path / "ran", tmp_path / "run/checkpoint-2"
    shutil.copytree(tuned, tmp_path / "run")
    torch.save(Payload(mark), checkpoint / name)
    manifest = folders.read_manifest(checkpoint)
    folders.write_manifest(checkpoint, {key: manifest[key] for key in ("run", "order", "step", "processes", "state")})
    assert str(checkpoint) in tune(tmp_path / "run", model, ok=False, resume_from_checkpoint=checkpoint)
    assert not mark.exists()


def test_a_signal_saves_a_checkpoint_of_fine_tuning(model, tmp_path):
    output = tmp_path / "run"
    changes = {"script": "finetune_trainer", "settings": INSTRUCTIONS, "model": model, "save_steps": 100_000}
    said = tmp_path / "said.txt"
    with said.open("w", encoding="utf-8") as file:
        process = forks.Command(command(output, max_steps=100_000, **changes), env=ENVIRONMENT, stdout=file)
    try:
        # The first loss that is logged.
        wait_for(lambda: "'loss'" in said.read_text("utf-8"), process)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
    (checkpoint,) = output.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert f"stopped after step {step}; {checkpoint.name} is saved" in said.read_text("utf-8")
    assert not (output / "final").exists()
    run(output, **changes, max_steps=step + 1, resume_from_checkpoint="latest")
    assert json.loads((output / "report.json").read_text("utf-8"))["steps"] == step + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "moment", ["checkpoint-2", ".partial-checkpoint-4*", "checkpoint-4", "checkpoint-6", ".partial-final*"]
)
def test_a_kill_of_fine_tuning_leaves_a_folder_to_go_on_in(tuned, model, tmp_path, moment):
    output = tmp_path / "run"
    kill_when(forked(output, "finetune_trainer", INSTRUCTIONS, model=model), lambda: any(output.glob(moment)))
    if (output / "final").exists():
        AutoModelForCausalLM.from_pretrained(output / "final")
    else:
        assert "is not empty" in tune(output, model, ok=False)
    kept = list(output.glob("checkpoint-*"))
    tune(output, model, **({"resume_from_checkpoint": "latest"} if kept else {"overwrite_output_dir": True}))
    for name in ("final/model.safetensors", "report.json"):
        assert (output / name).read_bytes() == (tuned / name).read_bytes()


def kill_when(process, condition):
    """Lets a process run until the condition holds, and ends it there with SIGKILL; or until its own end."""
    while process.poll() is None and not condition():
        time.sleep(0.001)
    process.kill()
    process.wait()


ADAPTER = {
    "train_file": TEXT, "max_bytes": 4000, "sequence_length": 64, "max_steps": 4, "batch_size": 2, "use_cpu": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def adapted(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapted") / "run"
    run(output, script="finetune_lora", settings=ADAPTER, model=model)
    return output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "moment", ["run.json", ".partial-adapter*/adapter_model*", "adapter_model.safetensors", "adapter_config.json"]
)
def test_a_kill_of_an_adapter_s_training_says_so(adapted, model, tmp_path, moment):
    """It keeps no checkpoints: what is there is the whole adapter, or the same command starts again when told to."""
    output, settings = tmp_path / "run", {**ADAPTER, "model": model}
    kill_when(forked(output, "finetune_lora", settings), lambda: any(output.glob(moment)))
    left = {path.name for path in output.iterdir()} - {"run.json", ".lock"}
    if any(not name.startswith(".partial-") for name in left):
        assert "is not empty" in run(output, ok=False, script="finetune_lora", settings=settings)
    run(output, script="finetune_lora", settings=settings, overwrite_output_dir=True)
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (adapted / name).read_bytes()


def classified(output):
    results = json.loads((output / "results.json").read_text("utf-8"))
    return results["confusion_matrix"], (output / "best/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    """Settings of a classification, and what an uninterrupted run comes to."""
    folder = tmp_path_factory.mktemp("classification")
    settings = {**write_reviews(folder), "task": "text", "preset": "lra-text", "max_steps": 6, "eval_steps": 2}
    settings |= {"config_overrides": json.dumps(TINY), "use_cpu": True, "batch_size": 4, "logging_steps": 1}
    settings |= {"validation_size": 4}
    assert forked(folder / "whole", "classification/train", settings).wait() == 0
    return settings, classified(folder / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "moment", ["checkpoint-2", ".partial-checkpoint-4*", "checkpoint-4", ".partial-best*", "best"]
)
def test_a_kill_of_a_classification_leaves_a_folder_to_go_on_in(classification, tmp_path, moment):
    (settings, whole), output = classification, tmp_path / "run"
    kill_when(forked(output, "classification/train", settings), lambda: any(output.glob(moment)))
    kept = list(output.glob("checkpoint-*"))
    changes = {"resume_from_checkpoint": "latest"} if kept else {"overwrite_output_dir": True}
    assert forked(output, "classification/train", settings, **changes).wait() == 0
    assert classified(output) == whole


def test_paths_in_a_trainer_s_state_are_not_followed(tmp_path):
    trainer_runs = importlib.import_module("trainer_runs")
    state = SimpleNamespace(best_model_checkpoint="/etc", best_global_step=4, best_metric=0.9)
    trainer_runs.BestOfFolder(tmp_path / "checkpoint-6").on_train_begin(None, state, None)
    assert state.best_model_checkpoint is None and state.best_metric is None
    (tmp_path / "checkpoint-4").mkdir()
    state.best_global_step = 4
    with pytest.raises(ValueError, match="has no manifest.json"):
        trainer_runs.BestOfFolder(tmp_path / "checkpoint-6").on_train_begin(None, state, None)
    (tmp_path / "trainer_state.json").write_text('{"best_global_step": "../../x"}', "utf-8")
    with pytest.raises(ValueError, match="best_global_step='../../x' is no number of steps"):
        trainer_runs.check_trainer_checkpoint(tmp_path)
