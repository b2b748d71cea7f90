"""Several processes over gloo, started by `accelerate launch` with the shipped configs: routers at 0, 50 and 100 %
finish under DDP and FSDP2 with the gradients of a single process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configuration/accelerate"
slow = pytest.mark.slow


def launch(config: str, processes: int, *command: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command_line = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config),
        "--num_processes", str(processes), "--main_process_port", str(port), "--mixed_precision", "no", *command,
    ]  # fmt: skip
    process = subprocess.Popen(
        command_line,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        # Asked to end, and not killed, it ends the processes it started.
        process.terminate()
        output, errors = process.communicate(timeout=40)
    assert process.returncode == 0, output[-3000:] + errors[-6000:]
    return output


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=slow)])
@pytest.mark.parametrize(("config", "kind"), [("ddp_cpu.yaml", "MULTI_CPU"), ("fsdp2.yaml", "FSDP")])
def test_adversarial_routers_train_as_one_process_does(tmp_path, config, kind, processes):
    report_file = tmp_path / "report.json"
    launch(config, processes, str(ROOT / "tests/distributed_worker.py"), str(report_file))
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


@pytest.mark.parametrize(
    ("config", "script", "options"),
    [
        ("ddp_cpu.yaml", ("examples/train_lm.py",), ("--optimizer", "muon", "--average_decay", "0.9")),
        pytest.param("fsdp2.yaml", ("tests/distributed_worker.py", "train_lm"), (), marks=slow),
    ],
)
def test_pretraining_example_runs_and_resumes_exactly(tmp_path, config, script, options):
    def train(output, *flags):
        launch(
            config, 2, str(ROOT / script[0]), *script[1:], "--preset", "tiny", "--train_file",
            str(ROOT / "examples/data/tinyshakespeare.txt"), "--max_bytes", "6000", "--sequence_length", "32",
            "--batch_size", "2", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "4", "--eval_tokens", "200",
            "--logging_steps", "1", "--warmup_steps", "2", "--gradient_accumulation_steps", "2", "--config_overrides",
            '{"hidden_dropout": 0.1, "router_target_rate": 0.3}', "--output_dir", str(output), *options, *flags,
        )  # fmt: skip
        lines = map(json.loads, (output / "metrics.jsonl").read_text("utf-8").splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", "--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-2"))
    assert sorted(whole) == [1, 2, 3, 4]
    assert resumed == {step: whole[step] for step in (3, 4)}
    assert (tmp_path / "whole/final/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("written", "resumed", "script"),
    [
        (("ddp_cpu.yaml", 2), ("cpu.yaml", 1), ("examples/train_lm.py",)),
        pytest.param(("fsdp2.yaml", 2), ("fsdp2.yaml", 4), ("tests/distributed_worker.py", "train_lm"), marks=slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, written, resumed, script):
    """They read the same rows, as many in a step as before; without dropout nothing else is drawn."""

    def train(output, config, processes, *flags):
        launch(
            config, processes, str(ROOT / script[0]), *script[1:], "--preset", "tiny", "--train_file",
            str(ROOT / "examples/data/tinyshakespeare.txt"), "--max_bytes", "6000", "--sequence_length", "32",
            "--batch_size", str(4 // processes), "--max_steps", "4", "--save_steps", "2", "--eval_steps", "4",
            "--eval_tokens", "200", "--logging_steps", "1", "--warmup_steps", "2", "--output_dir", str(output), *flags,
        )  # fmt: skip
        lines = map(json.loads, (output / "metrics.jsonl").read_text("utf-8").splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    whole = train(tmp_path / "whole", *written)
    checkpoint = str(tmp_path / "whole/checkpoint-2")
    found = train(tmp_path / "resumed", *resumed, "--resume_from_checkpoint", checkpoint)
    assert found == {step: pytest.approx(whole[step], rel=1e-5) for step in (3, 4)}


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
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(ROOT / "tests/graphed_worker.py"), str(report_file),
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    reports = json.loads(report_file.read_text("utf-8"))
    assert len(reports) == processes
    for report in reports:
        assert report["captures"] >= 2 and report["overflows"][-1] >= 1
        assert max(report["errors"]) < 1e-5
    # Each process computed steps again when its own routers asked for it, while others replayed their graphs.
    assert reports[0]["overflows"] != reports[1]["overflows"]
