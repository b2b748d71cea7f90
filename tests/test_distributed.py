"""Several processes over gloo, started by `accelerate launch` with the shipped configs: routers at 0, 50 and 100 %
finish under DDP and FSDP2 with the gradients of a single process."""

import json
import socket
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import patch_environment
from example_scripts import imported
from forks import forked_workers, torchrun
from test_train_lm import SIBLINGS, forget_accelerator

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configuration/accelerate"
slow = pytest.mark.slow


def launch(config: str, processes: int, *command: str) -> None:
    """`accelerate launch`, whose workers have this process's imports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        "--config_file", str(CONFIGS / config), "--num_processes", str(processes), "--main_process_port", str(port),
        "--mixed_precision", "no", *command,
    ]  # fmt: skip
    with patch_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""), forked_workers():
        launch_command(launch_command_parser().parse_args(arguments))


def launch_jobs(folder: Path, config: str, processes: int, jobs: list[list[str]]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    launch(config, processes, str(ROOT / "tests/distributed_worker.py"), str(folder / "jobs.json"))


def train_lm(output: Path, *flags: str) -> list[str]:
    """A job that pretrains for four steps."""
    return [
        "train_lm", "--preset", "tiny", "--train_file", str(ROOT / "examples/data/tinyshakespeare.txt"), "--max_bytes",
        "6000", "--batch_size", "2", "--max_steps", "4", "--save_steps", "2", "--eval_tokens", "200",
        "--logging_steps", "1", "--warmup_steps", "2", "--gradient_accumulation_steps", "2", "--output_dir",
        str(output), *flags,
    ]  # fmt: skip


def with_its_resumption(folder: Path, *flags: str) -> list[list[str]]:
    flags = ("--sequence_length", "32", "--eval_steps", "4", "--config_overrides",
             '{"hidden_dropout": 0.1, "router_target_rate": 0.3}', *flags)  # fmt: skip
    whole = train_lm(folder / "whole", *flags)
    return [
        whole,
        train_lm(folder / "resumed", *flags, "--resume_from_checkpoint", str(folder / "whole/checkpoint-2")),
    ]


CUT = ("--sequence_length", "31", "--eval_steps", "2", "--average_decay", "0.9", "--config_overrides",
       '{"router_target_rate": 0.3}')  # fmt: skip

PLAIN = ("--sequence_length", "32", "--eval_steps", "4", "--gradient_accumulation_steps", "1")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder of what two processes did one after the other, launched once."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [["adversarial", str(folder / "report.json")]]
    jobs += with_its_resumption(folder, "--optimizer", "muon", "--average_decay", "0.9")
    jobs.append(train_lm(folder / "cut", *CUT, "--context_parallel", "2"))
    jobs.append(train_lm(folder / "written", *PLAIN))
    launch_jobs(folder, "ddp_cpu.yaml", 2, jobs)
    return folder


def expect_the_steps_of_one_process(report_file: Path, kind: str, processes: int) -> None:
    report = json.loads(report_file.read_text("utf-8"))
    assert (report["type"], report["world"]) == (kind, processes)
    assert (report["sharded"], report["sharded_layers"]) == ((True, 2) if kind == "FSDP" else (False, 0))
    assert report["find_unused_parameters"] is False
    assert report["without_gradient"] == []
    assert report["losses"] == pytest.approx(report["reference_losses"], abs=1e-6)
    assert max(report["gradient_errors"]) < 1e-6
    assert report["weight_error"] < 1e-6
    # The budget has moved them, the same in every process.
    assert all(abs(skip + run) < 0.05 and abs(skip - run) > 0.01 for skip, run in report["biases"])
    if processes == 2:
        assert report["rates"][0] == [0.5, 0.5]
    assert report["rates"][2] == [0, 0]


def test_adversarial_routers_train_as_one_process_does(two_processes):
    expect_the_steps_of_one_process(two_processes / "report.json", "MULTI_CPU", 2)


def test_adversarial_routers_train_sharded_as_one_process_does(tmp_path):
    launch_jobs(tmp_path, "fsdp2.yaml", 2, [["adversarial", str(tmp_path / "report.json")]])
    expect_the_steps_of_one_process(tmp_path / "report.json", "FSDP", 2)


def losses(output: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in metrics(output) if "train/loss" in line}


def expect_an_exact_resumption(folder: Path) -> None:
    whole = losses(folder / "whole")
    assert sorted(whole) == [1, 2, 3, 4]
    assert losses(folder / "resumed") == {step: whole[step] for step in (3, 4)}
    assert (folder / "whole/final/model.safetensors").is_file()


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_pretraining_example_runs_and_resumes_exactly(two_processes):
    expect_an_exact_resumption(two_processes)


def run_here(monkeypatch, job: list[str]) -> None:
    """A pretraining in this process."""
    forget_accelerator()
    for example in imported(monkeypatch, "train_lm", *SIBLINGS):
        example.main(job[1:])
    forget_accelerator()


def expect_the_run_of_one_process(monkeypatch, folder: Path, processes: int, *names: str) -> None:
    """Runs in parts are those of a process that reads the whole."""
    run_here(monkeypatch, train_lm(folder / "one", *CUT, "--batch_size", str(processes), "--cpu", "True"))
    kept = ("train/loss", "validation/bits_per_byte", "router/activation_rate_0", "train/tokens")
    for name in names:
        first = 1 if name == "cut" else 3
        found = [{key: line[key] for key in kept if key in line} for line in metrics(folder / name)]
        one = [line for line in metrics(folder / "one") if line["step"] >= first]
        assert found == [pytest.approx({key: line[key] for key in kept if key in line}, rel=1e-5) for line in one]
        assert len(found) == 2 + 4 if first == 1 else 1 + 2


def test_pretraining_in_parts_is_that_of_one_process(two_processes, monkeypatch):
    expect_the_run_of_one_process(monkeypatch, two_processes, 2, "cut")


@slow
def test_four_processes_train_as_one_does(tmp_path, monkeypatch):
    """Adversarial routers; and a pretraining in parts of a sequence, with two groups of rows, and its resumption."""
    parts = (*CUT, "--context_parallel", "2")
    jobs = [["adversarial", str(tmp_path / "report.json")], train_lm(tmp_path / "cut", *parts)]
    jobs.append(train_lm(tmp_path / "resumed", *parts, "--resume_from_checkpoint", str(tmp_path / "cut/checkpoint-2")))
    launch_jobs(tmp_path, "ddp_cpu.yaml", 4, jobs)
    expect_the_steps_of_one_process(tmp_path / "report.json", "MULTI_CPU", 4)
    expect_the_run_of_one_process(monkeypatch, tmp_path, 4, "cut", "resumed")


def expect_the_same_steps(whole: Path, resumed: Path) -> None:
    """They read the same rows, as many in a step as before; without dropout nothing else is drawn."""
    assert losses(resumed) == {step: pytest.approx(losses(whole)[step], rel=1e-5) for step in (3, 4)}


def test_a_run_goes_on_in_one_process(two_processes, monkeypatch):
    written, output = two_processes / "written", two_processes / "resumed_alone"
    flags = ("--batch_size", "4", "--cpu", "True", "--resume_from_checkpoint", str(written / "checkpoint-2"))
    run_here(monkeypatch, train_lm(output, *PLAIN, *flags))
    expect_the_same_steps(written, output)


@slow
@pytest.mark.timeout(600)
def test_sharded_runs_resume_exactly_and_go_on_over_more_processes(tmp_path):
    written, resumed = tmp_path / "written", tmp_path / "over_four"
    launch_jobs(tmp_path, "fsdp2.yaml", 2, [*with_its_resumption(tmp_path), train_lm(written, *PLAIN)])
    expect_an_exact_resumption(tmp_path)
    flags = ("--batch_size", "1", "--resume_from_checkpoint", str(written / "checkpoint-2"))
    jobs = [["adversarial", str(tmp_path / "report.json")], train_lm(resumed, *PLAIN, *flags)]
    launch_jobs(tmp_path, "fsdp2.yaml", 4, jobs)
    expect_the_steps_of_one_process(tmp_path / "report.json", "FSDP", 4)
    expect_the_same_steps(written, resumed)


@slow
def test_fine_tuning_with_trainer_shares_the_work(tmp_path):
    """Two processes with 2 rows each take the steps that one process takes with 4."""
    model = tmp_path / "model"
    torch.manual_seed(0)
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).save_pretrained(model)
    build_byte_tokenizer().save_pretrained(model)
    reports = []
    for config, processes in (("cpu.yaml", 1), ("ddp_cpu.yaml", 2)):
        output = tmp_path / config
        launch(
            config, processes, str(ROOT / "examples/finetune_trainer.py"),
            str(ROOT / "configuration/recipes/gsm8k.yaml"),
            "--model", str(model), "--max_steps", "3", "--per_device_train_batch_size", str(4 // processes),
            "--sequence_length", "300", "--validation_fraction", "0.02", "--eval_strategy", "no", "--save_strategy",
            "no", "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--output_dir", str(output),
        )  # fmt: skip
        reports.append(json.loads((output / "report.json").read_text("utf-8")))
    assert reports[1]["eval_token_loss"] == pytest.approx(reports[0]["eval_token_loss"], rel=1e-5)
    assert reports[1]["eval_token_loss"] < reports[1]["before_eval_token_loss"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(path))
    text = yaml.safe_load(path.read_text("utf-8"))
    assert config.num_processes == text["num_processes"]
    if "fsdp_config" in text:
        assert text["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] == "SeqBoatDecoderLayer"


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=slow)])
def test_graphed_steps_of_adversarial_routers_are_those_of_one_process(tmp_path, processes):
    report_file = tmp_path / "report.json"
    torchrun(processes, ROOT / "tests/graphed_worker.py", str(report_file))
    reports = json.loads(report_file.read_text("utf-8"))
    assert len(reports) == processes
    for report in reports:
        assert report["captures"] >= 2 and report["overflows"][-1] >= 1
        assert max(report["errors"]) < 1e-5
    # Each process computed steps again when its own routers asked for it, while others replayed their graphs.
    assert reports[0]["overflows"] != reports[1]["overflows"]
