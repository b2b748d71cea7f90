"""The command `seqboat`, and what the scripts say of mistakes: one line that names what is wrong."""

import os
import sys
from pathlib import Path

import forks
import huggingface_hub
import pytest
from example_scripts import imported
from forks import run_script
from helpers import tiny_lm

from hub_upload.cli import main
from modeling_seqboat import SeqBoatForCausalLM, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def start_command(command: list[str], start: str) -> None:
    # Its variable is read when it is imported, which may be long ago.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    exec(start, {"sys": sys})
    if command[0].endswith(".py"):
        run_script(*command)
    else:
        sys.argv = command
        sys.exit(main())


def run(command, cwd, *, start="", **environment):
    """A command of Python in another folder, as a user types it; `start` runs first in the process."""
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return forks.run(start_command, command, start, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_lm(vocab_size=264).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


def test_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in ("train", "evaluate", "teach", "activations", "publish", "convert", "serve", "export"):
        assert f"\n    {name} " in shown


@pytest.mark.parametrize("command", [["nothing"], ["convert"], ["evaluate"], ["train", "--max_step", "3"]])
def test_a_wrong_command_line_is_answered_in_one_line(command, tmp_path):
    done = run(["seqboat", *command], tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert line.startswith(f"seqboat {command[0]}: error: " if command != ["nothing"] else "seqboat: error: ")
    assert "usage:" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("size", ["3XB", "0GB", "-1GB", "GB", "5"])
def test_a_size_of_weight_files_is_read_before_any_work(size, capsys):
    for command in (["build", "--model", "m", "--output", "o"], ["convert", "--checkpoint", "c", "--output", "o"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, f"--max-shard-size={size}"])
        assert ended.value.code == 2 and f"{size!r} is not a number" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    done = run(["seqboat", "evaluate", "outputs/nothing", "--data", "text.txt"], tmp_path)
    assert done.returncode == 2 and "there is no model in 'outputs/nothing': the folder does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [["evaluate", "nowhere", "--data", "text.txt"], ["activations", "nowhere", "text"]]
)
def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_named_in_one_line(command, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be")
    done = run(["seqboat", *command], tmp_path)
    assert done.returncode and "error: there is no folder 'nowhere', and no " in done.stderr.splitlines()[-1]


def test_activations_twice(model, tmp_path):
    """A second run says what is there, and `--overwrite` replaces it."""
    pytest.importorskip("matplotlib")
    command = ["seqboat", "activations", str(model), "To be, or not to be"]
    first, second = run(command, tmp_path), run(command, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "layer  activated" in first.stdout
    assert (tmp_path / "outputs/activation_map/activation_map.html").is_file()
    assert second.returncode == 2 and "add --overwrite to replace" in second.stderr
    assert "usage:" not in second.stderr and "Traceback" not in second.stderr
    assert run([*command, "--overwrite"], tmp_path).returncode == 0


def test_a_value_that_is_refused_ends_in_one_line_and_a_fault_in_its_traceback(tmp_path):
    """Errors that this package raises say what to do; any other needs its traceback."""
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be")
    command = [
        str(ROOT / "examples/train_lm.py"),
        "--train_file",
        "text.txt",
        "--output_dir",
        "out",
        "--max_steps",
        "1",
    ]
    pytest.importorskip("accelerate")
    done = run(command, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train_lm.py: error: sequence_length" in done.stderr
    assert "Traceback" in run(command, tmp_path, SEQBOAT_TRACEBACK="1").stderr
    broken = run(command, tmp_path, start="import transformers; transformers.HfArgumentParser.parse_args = 1 / 0")
    assert broken.returncode == 1 and "Traceback" in broken.stderr and "ZeroDivisionError" in broken.stderr


@pytest.mark.parametrize(
    "package, extra, script", [("accelerate", "train", "train_lm"), ("peft", "train", "finetune_lora")]
)
def test_a_missing_package_names_the_extra(package, extra, script, tmp_path):
    hide = f"sys.modules[{package!r}] = None"
    done = run([str(ROOT / f"examples/{script}.py"), "--output_dir", "out"], tmp_path, start=hide)
    assert done.returncode == 1
    assert f'the package {package} is not installed: pip install -c constraints.txt -e ".[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_scripts_let_waiting_threads_sleep():
    """Every script that computes imports `script_start` before torch: OpenMP reads it when torch is loaded."""
    marker = '__name__ == "__main__"'
    scripts = [path for path in (ROOT / "examples").rglob("*.py") if marker in path.read_text("utf-8")]
    # The experiments compute in the processes of worker.py alone.
    scripts = [path for path in scripts if path.parent.name != "experiments" or path.name == "worker.py"]
    assert len(scripts) > 15
    for path in scripts:
        lines = path.read_text("utf-8").splitlines()
        torch_lines = [n for n, line in enumerate(lines) if line.startswith(("import torch", "from torch"))]
        if torch_lines:
            assert any("script_start" in line for line in lines[: torch_lines[0]]), path


@pytest.fixture
def script_start(monkeypatch):
    yield from imported(monkeypatch, "script_start")


def test_scripts_take_a_thread_for_each_idle_core(script_start, monkeypatch):
    """On few cores; what a user has set is left as it is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(script_start, "idle_cores", lambda: 1)
    waiting = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
    for given, expected in (
        ({}, waiting | {"OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "2"}, waiting | {"OMP_NUM_THREADS": "2"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
    ):
        environment = dict(given)
        script_start.choose_threads(environment)
        assert environment == expected, given
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    environment = {}
    script_start.choose_threads(environment)
    assert environment == waiting


@pytest.mark.parametrize("busy, idle", [([0, 0], 2), ([10, 0], 1), ([3, 1], 2), ([10, 10], 1), ([10, 4], 1)])
def test_idle_cores_are_counted(busy, idle, script_start, monkeypatch):
    """From the system's counts of a tenth of a second: ticks of each core, busy, idle or waiting for a disk."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)

    def stat(*passed):
        cores = [f"cpu{n} {100 + ticks} 0 7 {500 + 10 - ticks} 3 0 0 0 9 0" for n, ticks in enumerate(passed)]
        return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *cores, "intr 5"])

    readings = iter(
        [stat(0, 0).replace("510", "500"), stat(*busy)],
    )
    monkeypatch.setattr(Path, "read_text", lambda path: next(readings))
    assert script_start.idle_cores(seconds=0) == idle


def test_where_the_system_does_not_tell_no_threads_are_chosen(script_start, monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    environment = {}
    script_start.choose_threads(environment)
    assert "OMP_NUM_THREADS" not in environment and environment["GOMP_SPINCOUNT"] == "10000"


def test_another_memory_than_the_trained_one_is_warned_of(model, caplog):
    """The window is part of what was trained: loading with another one says so, with the same one nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        trained = AutoModelForCausalLM.from_pretrained(model).config.memory_size
        assert "memory_size" not in caplog.text
        AutoModelForCausalLM.from_pretrained(model, memory_size=trained + 1)
        assert f"memory_size is {trained + 1}, but {trained} in" in caplog.text
        caplog.clear()
        config = AutoConfig.from_pretrained(model)
        config.memory_size = trained + 2
        SeqBoatForCausalLM.from_pretrained(model, config=config)
        assert f"memory_size is {trained + 2}, but {trained} in" in caplog.text
    finally:
        logging.disable_propagation()
