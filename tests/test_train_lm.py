"""Pretraining example in a short mode on real text: the loss falls, a resumed run repeats the losses of an
uninterrupted one exactly, and bad input is refused before training starts."""

import gzip
import importlib
import itertools
import json
import lzma
import os
import signal
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from example_scripts import imported
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_seqboat import SeqBoatConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples/data/tinyshakespeare.txt"
RECIPES = [
    path
    for path in sorted((ROOT / "configuration/recipes").glob("*.yaml"))
    if any(key in path.read_text("utf-8") for key in ("preset:", "model_type:"))
]


SIBLINGS = (
    "lm_arguments",
    "lm_checkpoints",
    "lm_data",
    "lm_parts",
    "optimizers",
    "recipes",
    "run_record",
    "text_data",
)


def forget_accelerator():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def examples(monkeypatch):
    """The example's module; its state in this process is undone afterwards."""
    forget_accelerator()
    yield from imported(monkeypatch, "train_lm", *SIBLINGS)
    forget_accelerator()


def run(module, output, *flags, steps=6, **overrides):
    forget_accelerator()
    settings = {
        "preset": "tiny", "train_file": TEXT, "max_bytes": 6000, "sequence_length": 32, "batch_size": 4,
        "max_steps": steps, "eval_steps": steps, "save_steps": 3, "logging_steps": 1, "warmup_steps": 2,
        "learning_rate": 1e-2, "eval_tokens": 256, "cpu": True, "output_dir": output,
    }  # fmt: skip
    settings.update(overrides)
    argv = [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]
    return module.main([*argv, *flags])


def logged(output) -> dict[int, dict]:
    """step -> everything that was logged there; the last run's word counts."""
    steps: dict[int, dict] = {}
    for line in (Path(output) / "metrics.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        steps.setdefault(entry.pop("step"), {}).update(entry)
    return steps


def test_short_run_learns_and_leaves_a_model_that_loads(tmp_path, examples, capsys):
    output = tmp_path / "run"
    result = run(examples, output, steps=24, eval_steps=12, save_steps=6, gradient_checkpointing=True)
    steps = logged(output)
    assert steps[24]["train/loss"] < 0.7 * steps[1]["train/loss"]
    assert steps[24]["validation/bits_per_byte"] == result["validation_bits_per_byte"] < 7
    assert result["best"] == min(steps[12]["validation/bits_per_byte"], steps[24]["validation/bits_per_byte"])
    assert 0 <= steps[24]["router/activation_rate_1"] <= 1 and steps[24]["router/temperature_0"] > 0
    assert steps[24]["train/tokens_per_second"] > 0
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-24"]
    assert list(output.rglob("events.out.tfevents.*"))
    model = AutoModelForCausalLM.from_pretrained(output / "best")
    ids = AutoTokenizer.from_pretrained(output / "best")("ROMEO:", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, eos_token_id=None).shape == (1, 10)
    assert "bits per byte" in capsys.readouterr().out


HELD = '{"hidden_dropout": 0.1, "router_target_rate": 0.3}'


@pytest.mark.parametrize(
    ("optimizer", "others"),
    [
        ("adamw", {}),
        ("radam", {}),
        ("muon", {"config_overrides": HELD, "average_decay": 0.9}),
        ("muon", {"muon_split": True, "muon_row_beta": 0.95, "qk_learning_rate": 1e-2}),
        ("adamw", {"config_overrides": HELD, "router_gain": 0}),
    ],
)
def test_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path, examples, optimizer, others):
    options = dict(
        optimizer=optimizer, gradient_accumulation_steps=2, config_overrides='{"hidden_dropout": 0.1}',
        router_learning_rate=1e-3, save_total_limit=5,
    )  # fmt: skip
    options.update(others)
    whole = tmp_path / "whole"
    # More micro-batches than an epoch has, so that the resume falls into a later epoch.
    run(examples, whole, steps=14, save_steps=9, max_bytes=2200, **options)
    resumed = tmp_path / "resumed"
    run(
        examples, resumed, steps=14, save_steps=9, max_bytes=2200,
        resume_from_checkpoint=whole / "checkpoint-9", **options,
    )  # fmt: skip
    first, second = logged(whole), logged(resumed)
    assert sorted(second) == list(range(10, 15))
    for step in second:
        assert second[step]["train/loss"] == first[step]["train/loss"]
    for folder in ("final", "averaged") if "average_decay" in others else ("final",):
        found, expected = (load_file(run_folder / folder / "model.safetensors") for run_folder in (resumed, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_run_has_the_optimizer_that_it_asks_for_resumed_or_not(tmp_path, examples, monkeypatch):
    made, build = [], examples.build_optimizer
    monkeypatch.setattr(examples, "build_optimizer", lambda *args: made.append(build(*args)) or made[-1])
    early = dict(muon_split=True, qk_learning_rate=0.5)
    run(examples, tmp_path / "run", steps=2, save_steps=1, optimizer="muon", **early)
    again = dict(steps=2, save_steps=1, optimizer="muon", resume_from_checkpoint=tmp_path / "run/checkpoint-1")
    # Even rows, and what weights are drawn from, may be asked for later.
    ranges = '{"initializer_range": 0.1, "qk_initializer_range": 0.3, "router_initializer_range": 0.01}'
    run(examples, tmp_path / "even", **again, **early, muon_row_beta=0.95, config_overrides=ranges)
    for optimizer, beta in zip(made, (None, 0.95), strict=True):
        sections = [group["sections"] for group in optimizer.param_groups if group["muon"]]
        assert len(sections) == 2 and sum(part is not None for part in sections) == 1
        assert any(group["initial_lr"] == 0.5 for group in optimizer.param_groups)
        assert {group["row_beta"] for group in optimizer.param_groups if group["muon"]} == {beta}
        assert any("row_square" in state for state in optimizer.state.values()) == (beta is not None)
    record = json.loads((tmp_path / "even/training_record.json").read_text("utf-8"))
    assert (record["muon_split"], record["muon_row_beta"], record["qk_learning_rate"]) == (True, 0.95, 0.5)
    with pytest.raises(ValueError, match="its optimizer has other groups of parameters .* muon_split"):
        run(examples, tmp_path / "joint", **again)


def test_the_rate_is_held_and_is_no_part_of_the_loss(tmp_path, examples):
    text = '{"router_target_rate": 0.25, "router_target_weight": 100.0}'
    run(examples, tmp_path / "held", steps=40, config_overrides=text, router_gain=0.5, logging_steps=20)
    run(examples, tmp_path / "pulled", steps=1, config_overrides=text, router_gain=0)
    run(examples, tmp_path / "free", steps=1)
    held, pulled, free = (logged(tmp_path / name) for name in ("held", "pulled", "free"))
    assert held[40]["router/activation_rate"] == pytest.approx(0.25, abs=0.1)
    assert pulled[1]["train/loss"] > free[1]["train/loss"] + 1
    assert held[20]["train/loss"] < free[1]["train/loss"]


def test_several_processes_go_by_the_step_before(examples):
    class Two:
        num_processes, device = 2, torch.device("cpu")

        def reduce(self, told, how):
            return (told + torch.tensor([0.0, 30.0])) / 2

    agreement = examples.Agreement(Two())
    found = [agreement(step == 2, 10.0 * step) for step in range(1, 5)]
    assert found == [(False, 20.0), (False, 20.0), (True, 25.0), (False, 30.0)]


def test_a_layer_that_stops_choosing_is_an_event_of_the_log(tmp_path, examples, monkeypatch):
    run(examples, tmp_path / "run", steps=4, config_overrides='{"activation_bias": 1000.0}')
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    events = [entry for entry in entries if "router/collapse" in entry]
    layers = SeqBoatConfig.from_preset("tiny").num_hidden_layers
    assert len(events) == layers and all(entry["step"] == 3 and entry["train/tokens"] == 384 for entry in events)
    assert "the router of layer 0 activates 0.0% of the tokens" in events[0]["router/collapse"]


def test_averaged_weights_are_scored_and_kept(tmp_path, examples):
    result = run(examples, tmp_path / "run", steps=16, eval_steps=16, average_decay=0.8)
    steps = logged(tmp_path / "run")
    average = steps[16]["validation/averaged_bits_per_byte"]
    assert 0 < average != result["validation_bits_per_byte"]
    assert average < 8
    averaged, final = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("averaged", "final"))
    distance = max(
        float((mine - theirs).detach().abs().max())
        for mine, theirs in zip(averaged.parameters(), final.parameters(), strict=True)
    )
    assert 0 < distance < 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(optimizer="muon"), "optimizer muon takes whole matrices, which FSDP does not keep"),
        (dict(average_decay=0.9), "average_decay averages whole parameters, which FSDP does not keep"),
    ],
)
def test_what_needs_whole_parameters_is_refused_where_they_are_sharded(examples, setting, message):
    arguments = examples.TrainArguments(output_dir="", **setting)
    with pytest.raises(ValueError, match=message):
        examples.check_sharding(arguments, DistributedType.FSDP)
    examples.check_sharding(arguments, DistributedType.MULTI_GPU)


def test_interrupt_saves_a_checkpoint_that_latest_finds(tmp_path, examples, monkeypatch):
    usual = examples.rate_factor

    pressed = []

    def interrupting(arguments, step, time_share):
        # Asked once a parameter group; a second Ctrl-C would end the run at once.
        if step == 2 and not pressed:
            pressed.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return usual(arguments, step, time_share)

    output = tmp_path / "run"
    monkeypatch.setattr(examples, "rate_factor", interrupting)
    assert run(examples, output, save_steps=100)["step"] == 2
    assert (output / "checkpoint-2").is_dir() and not (output / "final").exists()
    monkeypatch.setattr(examples, "rate_factor", usual)
    assert run(examples, output, save_steps=100, resume_from_checkpoint="latest")["step"] == 6
    assert (output / "final").is_dir()


def test_a_run_starts_from_the_weights_of_another(tmp_path, examples):
    """At a rate of 0 it ends with them."""
    run(examples, tmp_path / "first", steps=3)
    first = tmp_path / "first" / "final"
    start = {"init_from": first, "preset": None, "learning_rate": 0, "weight_decay": 0}
    run(examples, tmp_path / "second", steps=3, config_overrides='{"hidden_dropout": 0.5}', **start)
    found = tmp_path / "second" / "final"
    assert AutoConfig.from_pretrained(found).hidden_dropout == 0.5
    expected = load_file(first / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(found / "model.safetensors").items())
    text = (tmp_path / "second" / "training_record.json").read_text("utf-8")
    record = json.loads(text)
    counts = record["steps_before"], record["tokens_seen_before"]
    assert (record["init_from"], *counts) == ("first/final", 3, 3 * 4 * 32)
    assert str(tmp_path) not in text and record["steps"] == 3
    for flags, message in (
        ({"config_overrides": '{"hiden": 1}'}, "hiden is no field of SeqBoatConfig"),
        ({"model_type": "llama"}, "is a 'seqboat' model, this run trains a 'llama'"),
        ({"init_from": tmp_path / "second"}, "it has no config.json"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(examples, tmp_path / "third", steps=3, **(start | flags))
    assert not (tmp_path / "third").exists()


@pytest.fixture
def seconds(monkeypatch, examples):
    """A clock by which each reading comes a second after the last."""
    ticks = itertools.count()
    clock = importlib.import_module("lm_checkpoints")
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_time_budget_ends_the_run_and_counts_what_a_resumed_one_has_used(tmp_path, examples, seconds):
    options = dict(steps=None, max_minutes=0.4, eval_steps=100, save_steps=2, save_total_limit=9)
    output = tmp_path / "run"
    result = run(examples, output, **options)
    steps = logged(output)
    used = [steps[step]["train/seconds"] for step in sorted(steps)]
    assert used == sorted(used) and used[-2] < 24 <= used[-1]
    rates = [steps[step]["train/learning_rate"] for step in sorted(steps)]
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 0.3 * max(rates)
    assert result["step"] == max(steps) and "validation/bits_per_byte" in steps[max(steps)]
    assert (output / "final").is_dir()
    resumed = tmp_path / "resumed"
    run(examples, resumed, resume_from_checkpoint=output / "checkpoint-2", **options)
    again = logged(resumed)
    assert min(again) == 3 and again[3]["train/seconds"] > steps[2]["train/seconds"]
    assert again[max(again)]["train/seconds"] >= 24 > again[max(again) - 1]["train/seconds"]
    # Nothing is left of the budget: the model is written and no step is taken.
    assert run(examples, output, resume_from_checkpoint="latest", **options)["step"] == max(steps)


def test_time_budget_leaves_validation_and_saving_out(tmp_path, examples, seconds):
    plain, busy = tmp_path / "plain", tmp_path / "busy"
    # By this clock a pause lasts a second and training between two steps as many as there are readings.
    run(examples, plain, steps=4, save_steps=100, eval_steps=100, logging_steps=100)
    run(examples, busy, steps=4, save_steps=1, eval_steps=1, logging_steps=100)
    used = [logged(folder)[4]["train/seconds"] for folder in (plain, busy)]
    assert used[1] <= used[0] + 2 * 4


def test_llama_trains_alike(tmp_path, examples):
    shape = '{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}'
    options = dict(model_type="llama", config_overrides=shape, router_learning_rate=1e-3)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(examples, whole, steps=20, save_steps=10, **options)
    first = logged(whole)
    assert first[20]["train/loss"] < first[1]["train/loss"]
    assert not any(name.startswith("router/") for name in first[20])
    run(examples, resumed, steps=20, resume_from_checkpoint=whole / "checkpoint-10", **options)
    second = logged(resumed)
    assert [second[step]["train/loss"] for step in second] == [first[step]["train/loss"] for step in second]
    model = AutoModelForCausalLM.from_pretrained(whole / "final")
    assert (model.config.model_type, model.config.vocab_size, model.config.eos_token_id) == ("llama", 264, 258)
    with pytest.raises(ValueError, match="is of a 'llama' model, this run trains a 'seqboat'"):
        run(examples, tmp_path / "other", resume_from_checkpoint=whole / "checkpoint-10")


def test_record_of_a_run_names_no_folders(tmp_path, examples):
    output = tmp_path / "secret" / "run"
    run(examples, output, steps=3, gradient_accumulation_steps=2)
    run(examples, output, steps=6, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    text = (output / "training_record.json").read_text("utf-8")
    record = json.loads(text)
    assert str(tmp_path) not in text and str(ROOT) not in text and "resume" not in text
    assert record["command"].startswith("python examples/train_lm.py --preset tiny --train_file tinyshakespeare.txt")
    assert " --output_dir run " in record["command"]
    assert (record["dataset"], record["hardware"], record["precision"]) == ("tinyshakespeare", "1 x CPU", "float32")
    assert (record["steps"], record["batch_size"], record["tokens_seen"]) == (6, 8, 6 * 8 * 32)
    assert record["training_hours"] >= 0 and record["tokens_per_second"] > 0
    command = examples.published_command
    recipe = str(ROOT / "configuration/recipes/shakespeare.yaml")
    assert command("a.py", [recipe, "--cpu", "--train_file=/data/x.xz", "--resume_from_checkpoint=latest"]) == (
        "python a.py configuration/recipes/shakespeare.yaml --cpu --train_file x.xz"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_dataset_trains_and_resumes_exactly(tmp_path, examples, streaming, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "text.txt"
    file.write_text(TEXT.read_text("utf-8")[:8000], "utf-8")
    options = dict(
        train_file=None, max_bytes=None, dataset_name="text", dataset_files=file, streaming=streaming, eval_tokens=300
    )
    run(examples, tmp_path / "whole", **options)
    run(examples, tmp_path / "resumed", resume_from_checkpoint=tmp_path / "whole/checkpoint-3", **options)
    first, second = logged(tmp_path / "whole"), logged(tmp_path / "resumed")
    assert [second[step]["train/loss"] for step in (4, 5, 6)] == [first[step]["train/loss"] for step in (4, 5, 6)]
    with pytest.raises(ValueError, match="has no column 'words'; it has text"):
        run(examples, tmp_path / "other", **options, text_column="words")
    file.write_text("one line\n", "utf-8")
    with pytest.raises(ValueError, match="is too small: validation takes all of its 1 rows"):
        run(examples, tmp_path / "other", **options)
    file.write_text("", "utf-8")
    with pytest.raises(ValueError, match="dataset 'text' (cannot be read or )?is empty"):
        run(examples, tmp_path / "other", **options)


def test_a_stream_is_dealt_out_once_and_goes_on_where_it_was_left(examples):
    import text_data

    tokenizer = text_data.build_byte_tokenizer()
    documents = [{"text": letter * size} for letter, size in zip("abcdefgh", (5, 40, 1, 0, 17, 8, 3, 30), strict=True)]

    def rows(rank, world, count, start=(0, 0, 0)):
        stream = text_data.StreamedBlocks(documents, "text", tokenizer, 8)
        stream.place(rank, world, start)
        return list(itertools.islice(stream, count))

    def tokens(found):
        return [int(token) for row in found for token in row["input_ids"]]

    for world in (1, 3):
        for rank in range(world):
            mine = [document["text"] for document in documents[rank::world]]
            one_pass = [token for text in mine for token in (*text.encode(), tokenizer.eos_token_id)]
            whole = rows(rank, world, 40)
            # Each document once a pass, none of another process.
            assert tokens(whole) == (one_pass * 40)[: 40 * 8]
            for done in range(1, 30):
                assert tokens(rows(rank, world, 10, whole[done - 1]["place"].tolist())) == tokens(
                    whole[done : done + 10]
                )
    with pytest.raises(ValueError, match="no text for process 8 of 9: it needs a document for each"):
        rows(8, 9, 1)


def test_a_run_that_would_read_other_rows_is_refused(tmp_path, examples):
    run(examples, tmp_path / "run", max_steps=3)
    with pytest.raises(ValueError, match="a run of 4 rows a step, this run has 2: .* must make 4 rows"):
        run(examples, tmp_path / "other", resume_from_checkpoint=tmp_path / "run/checkpoint-3", batch_size=2)


def test_bad_input_is_refused_before_training(tmp_path, examples):
    output = tmp_path / "run"
    cases = [
        (FileNotFoundError, "there is no text file", dict(train_file=tmp_path / "missing.txt")),
        (ValueError, "there is no preset 'tinny'", dict(preset="tinny")),
        (ValueError, "sequence_length 9000 is longer than the training data, which has 5700 tokens",
         dict(sequence_length=9000)),
        (ValueError, "optimizer must be one of adamw, radam, muon, got 'sgd'", dict(optimizer="sgd")),
        (ValueError, "model_type must be one of seqboat, llama, got 'mamba'", dict(model_type="mamba")),
        (ValueError, "memory_siz is no field of SeqBoatConfig; the nearest is memory_size",
         dict(config_overrides='{"memory_siz": 3}')),
        (ValueError, "v_head_dim is no field of LlamaConfig",
         dict(model_type="llama", config_overrides='{"v_head_dim": 8}')),
        (ValueError, "max_minutes must be above 0, got 0", dict(max_minutes=0)),
        (ValueError, "give one of train_file and dataset_name, got None and None", dict(train_file=None)),
        (ValueError, "eval_context must be from 1 to 31, got 32", dict(eval_context=32)),
        (ValueError, "score_test is for enwik8, whole", dict(score_test=True)),
        (ValueError, "router_gain must be at least 0, got -0.1", dict(router_gain=-0.1)),
        (ValueError, "muon_learning_rate must be at least 0, got -1", dict(muon_learning_rate=-1.0)),
        (ValueError, "muon_row_beta must be at least 0 and below 1, got 1", dict(muon_row_beta=1.0)),
        (ValueError, "qk_learning_rate must be at least 0, got -1", dict(qk_learning_rate=-1.0)),
        (ValueError, "are for SeqBoat's attention, this run trains a llama",
         dict(model_type="llama", optimizer="muon", muon_split=True)),
        (ValueError, "average_decay must lie between 0 and 1, got 1", dict(average_decay=1.0)),
        (ValueError, "too few for one batch of 400 rows", dict(batch_size=400)),
        (ValueError, "context_parallel 2 does not divide the 1 processes", dict(context_parallel=2)),
        (ValueError, "context_parallel cannot be used: it is for SeqBoat",
         dict(context_parallel=2, model_type="llama")),
        (ValueError, "context_parallel cannot be used: it does not go with compile",
         dict(context_parallel=2, compile=True)),
        (ValueError, "there is no checkpoint in output_dir", dict(resume_from_checkpoint="latest")),
        (ValueError, "is no checkpoint folder of this script", dict(resume_from_checkpoint=tmp_path / "nowhere")),
    ]  # fmt: skip
    for error, message, change in cases:
        with pytest.raises(error, match=message):
            run(examples, output, **change)
        assert not (output / "metrics.jsonl").exists()
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="is empty"):
        run(examples, output, train_file=empty)
    output.mkdir(exist_ok=True)
    (output / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        run(examples, output)


def test_every_number_has_a_range(tmp_path, examples):
    ranges = sys.modules["lm_arguments"].RANGES
    kinds = typing.get_type_hints(examples.TrainArguments)
    numbers = {name for name, kind in kinds.items() if kind in (int, float, int | None, float | None)}
    assert numbers == set(ranges)
    for name in sorted(numbers):
        whole = kinds[name] in (int, int | None)
        for value in (-1, -(10**12)) if whole else (-0.5, "nan"):
            with pytest.raises(ValueError, match=f"{name} must .*, got -?{str(value).strip('-')}"):
                run(examples, tmp_path / "run", **{name: value})
    for name in ("batch_size", "eval_batch_size", "save_total_limit", "eval_tokens", "max_bytes", "max_grad_norm"):
        with pytest.raises(ValueError, match=f"{name} must .*, got 0"):
            run(examples, tmp_path / "run", **{name: 0})
    for name in ("learning_rate", "weight_decay", "final_rate", "beta1", "max_minutes"):
        with pytest.raises(ValueError, match=f"{name} must .*, got inf"):
            run(examples, tmp_path / "run", **{name: "inf"})
    for overrides in ("[1]", "{", "5", '"a"', "null", "[" * 50_000, '{"hidden_size": -1}'):
        with pytest.raises(ValueError, match="config_overrides|hidden_size"):
            run(examples, tmp_path / "run", config_overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_launch_with_fsdp_on_the_cpu_is_refused(tmp_path, examples, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="this launch asks for FSDP, but Accelerate shards on accelerators only"):
        run(examples, tmp_path / "run")


def test_checkpoint_of_another_shape_is_refused(tmp_path, examples):
    run(examples, tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match="another shape: hidden_size is 32 there and 48 in this run"):
        run(
            examples, tmp_path / "other", config_overrides='{"hidden_size": 48}',
            resume_from_checkpoint=tmp_path / "run/checkpoint-3",
        )  # fmt: skip


def test_text_files_plain_and_compressed_and_the_split_of_enwik8(tmp_path, examples, monkeypatch):
    text_data = sys.modules["text_data"]
    content = bytes(range(200)) * 2
    (tmp_path / "a.txt").write_bytes(content)
    with gzip.open(tmp_path / "a.gz", "wb") as stream:
        stream.write(content)
    with lzma.open(tmp_path / "a.xz", "wb") as stream:
        stream.write(content)
    for name in ("a.txt", "a.gz", "a.xz"):
        assert text_data.read_text_file(str(tmp_path / name)) == content
    monkeypatch.setattr(text_data, "ENWIK8_BYTES", 400)
    monkeypatch.setattr(text_data, "ENWIK8_SPLIT", (360, 380))
    splits = text_data.split_text(content, text_data.load_tokenizer("byte"), 0.5, with_test=True)
    assert bytes(splits.train.astype(np.uint8)) == content[:360]
    assert bytes(splits.validation.astype(np.uint8)) == content[360:380]
    assert bytes(splits.test.astype(np.uint8)) == content[380:]
    assert splits.bytes_per_token == splits.test_bytes_per_token == 1
    assert text_data.split_text(content, text_data.load_tokenizer("byte"), 0.5).test is None
    assert text_data.split_text(content[:-1], text_data.load_tokenizer("byte"), 0.5, with_test=True).test is None


def test_the_test_split_is_logged_and_chooses_nothing(tmp_path, examples, monkeypatch):
    text = TEXT.read_bytes()[:6000]
    # A test split that one byte repeated makes far easier than the validation split.
    (tmp_path / "text").write_bytes(text + b"e" * 1000)
    monkeypatch.setattr(sys.modules["text_data"], "ENWIK8_BYTES", 7000)
    monkeypatch.setattr(sys.modules["text_data"], "ENWIK8_SPLIT", (5000, 6000))
    options = dict(train_file=tmp_path / "text", max_bytes=None, eval_steps=3)
    result = run(examples, tmp_path / "run", score_test=True, **options)
    steps = logged(tmp_path / "run")
    assert all(0 < steps[step]["test/bits_per_byte"] != steps[step]["validation/bits_per_byte"] for step in (3, 6))
    assert result["best"] == min(steps[step]["validation/bits_per_byte"] for step in (3, 6))
    run(examples, tmp_path / "plain", **options)
    plain = logged(tmp_path / "plain")
    assert [plain[step]["train/loss"] for step in plain] == [steps[step]["train/loss"] for step in steps]
    assert not any("test/bits_per_byte" in entry for entry in plain.values())


def test_row_order_depends_on_seed_and_position_alone(examples):
    order = sys.modules["text_data"].RowOrder

    def take(count, **place):
        # 119 tokens: 11 rows of 10 whatever the offset, of which 10 fill batches of 2.
        return list(itertools.islice(iter(order(119, 10, 2, 3, **place)), count))

    whole = take(20)
    assert take(12, start=4) == whole[8:]
    assert len(set(whole[:10])) == 10 and sorted(whole[10:20]) != whole[10:20]
    ranks = [take(4, rank=rank, world=2) for rank in (0, 1)]
    assert ranks[0][:2] + ranks[1][:2] + ranks[0][2:] + ranks[1][2:] == whole[:8]


def test_each_pass_cuts_the_text_at_another_offset_and_reads_all_of_it(examples):
    text_data = sys.modules["text_data"]
    windows = text_data.TokenWindows(np.arange(70), 10)
    stream = iter(text_data.RowOrder(70, 10, 2, 3))
    offsets = set()
    for _ in range(40):
        # 6 rows fit at any offset, so a pass is 3 batches of 2.
        starts = [next(stream) for _ in range(6)]
        rows = [windows[start]["input_ids"].tolist() for start in starts]
        offset = min(starts)
        assert sorted(sum(rows, [])) == list(range(offset, offset + 60))
        offsets.add(offset)
    assert offsets == set(range(10))
    only = iter(text_data.RowOrder(15, 10, 1, 0))
    assert {next(only) for _ in range(60)} == set(range(6))
    with pytest.raises(IndexError):
        windows[61]
    with pytest.raises(ValueError, match="sequence_length 71 is longer than the training data, which has 70 tokens"):
        text_data.TokenWindows(np.arange(70), 71)


def test_schedules(examples):
    def rates(**changes):
        arguments = examples.TrainArguments(
            output_dir="", max_steps=10, warmup_steps=4, warmup_start=0.4, final_rate=0.1, **changes
        )
        return [examples.rate_factor(arguments, step) for step in range(11)]

    for schedule in ("linear", "cosine"):
        values = rates(schedule=schedule)
        assert values[:5] == pytest.approx([0.55, 0.7, 0.85, 1.0, 1.0])
        assert values[10] == pytest.approx(0.1)
        assert values[4:] == sorted(values[4:], reverse=True)
    assert rates(schedule="linear")[7] == pytest.approx(0.55)
    arguments = examples.TrainArguments(output_dir="", max_minutes=1, warmup_steps=4, final_rate=0.1)
    shares = [examples.rate_factor(arguments, 100, share) for share in (0.0, 0.5, 1.0, 1.2)]
    assert shares == pytest.approx([1, 0.55, 0.1, 0.1])
    assert examples.rate_factor(arguments, 0, 0.5) == 0.25


def test_flags_override_a_recipe_and_unknown_keys_are_named(tmp_path, examples):
    recipes = sys.modules["recipes"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("preset: tiny\nlearning_rate: 1.0e-3\nstreaming: true\n", "utf-8")
    arguments = recipes.parse_arguments(
        examples.TrainArguments, [str(recipe), "--output_dir", "out", "--preset", "small"]
    )
    assert (arguments.preset, arguments.learning_rate, arguments.streaming) == ("small", 1e-3, True)
    recipe.write_text("presset: tiny\n", "utf-8")
    with pytest.raises(ValueError, match="'presset' is no argument"):
        recipes.parse_arguments(examples.TrainArguments, [str(recipe)])
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        recipes.parse_arguments(examples.TrainArguments, [str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"preset: [tiny\n", "line 2"), (b"a: b: c\n", "line 1"), (b"preset: \xff\n", "line 1 of .* is no UTF-8"),
        (b"- preset\n", "must be a mapping"), (b"preset: {a: 1}\n", "preset must be a text or a number, got a dict"),
        (b"preset: [[1]]\n", "preset must be a text or a number"), (b"[" * 1500, "is no YAML"),
        (b"a: 2020-99-99\n", "is no"),
        (b"a: &a [1]\nb: &b [*a, *a]\npreset: [*b, *b]\n", "is no argument|must be a text"),
        (b"5: 6\n", "5 is no argument"),
    ],
)  # fmt: skip
def test_recipes_of_anybody_are_refused_with_the_file(content, words, tmp_path, examples):
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        sys.modules["recipes"].parse_arguments(examples.TrainArguments, [str(recipe)])
    assert "r.yaml" in str(caught.value)


def test_damaged_text_files_and_tokenizers_are_named(tmp_path, examples):
    text_data = sys.modules["text_data"]
    content = bytes(range(200)) * 200
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.xz").write_bytes(lzma.compress(content))
    for name in ("a.gz", "a.xz"):
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[:-20], whole[:30], whole[:25] + b"\0" * 8 + whole[33:], b"no such file"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name}' is damaged"):
                text_data.read_text_file(str(tmp_path / name))
    text_data.build_byte_tokenizer().save_pretrained(tmp_path / "model")
    for content in ("{", "[" * 50_000, "{}"):
        (tmp_path / "model/tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="the tokenizer of .*model' cannot be loaded .*tokenizer.json"):
            text_data.load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, examples):
    recipes = sys.modules["recipes"]
    flags = [str(path), "--output_dir", "out"]
    if "enwik8" in path.stem:
        flags += ["--train_file", "enwik8"]
    arguments = recipes.parse_arguments(examples.TrainArguments, flags)
    examples.check_arguments(arguments)
    overrides = json.loads(arguments.config_overrides or "{}")
    config = examples.build_config(arguments, examples.load_tokenizer("byte"))
    assert config.model_type == arguments.model_type and set(overrides) <= set(config.__dataclass_fields__)


def test_the_compared_recipes_differ_in_what_is_each_models_own(examples):
    boat, llama = (
        sys.modules["recipes"].parse_arguments(
            examples.TrainArguments,
            [str(ROOT / f"configuration/recipes/{name}.yaml"), "--output_dir", "out", "--train_file", "enwik8"],
        )
        for name in ("enwik8-base", "enwik8-llama")
    )
    # What is Muon's own: it trains one of the two.
    assert (boat.optimizer, llama.optimizer) == ("muon", "adamw")
    own = {"model_type", "preset", "config_overrides", "learning_rate", "router_learning_rate", "max_grad_norm",
           "optimizer", "muon_learning_rate", "muon_row_beta", "muon_split", "qk_learning_rate", "weight_decay",
           "cuda_graphs", "eval_steps", "save_steps"}  # fmt: skip
    different = {name for name in vars(boat) if getattr(boat, name) != getattr(llama, name)}
    assert different <= own
    sizes = []
    with torch.device("meta"):
        for arguments in (boat, llama):
            config = examples.build_config(arguments, examples.load_tokenizer("byte"))
            model = examples.SeqBoatForCausalLM if config.model_type == "seqboat" else examples.LlamaForCausalLM
            sizes.append(model(config).num_parameters())
    assert sizes == [39_108_986, 37_890_560]


def test_the_plan_names_recipes_and_arguments_that_exist(examples, monkeypatch, tmp_path):
    for queue in imported(monkeypatch, "run_queue"):
        path = ROOT / "configuration/recipes/pretraining/plan.yaml"
        runs = queue.read_plan(str(path), [], ["train_file=enwik8"])
        assert len(runs) > 5
        for run in runs:
            words = queue.command(run, tmp_path / run.name, "0")[2:]
            arguments = sys.modules["recipes"].parse_arguments(examples.TrainArguments, words)
            sys.modules["lm_arguments"].check_arguments(arguments)
            examples.build_config(arguments, examples.load_tokenizer("byte"))
            # Steps or minutes, not both.
            assert (arguments.max_minutes is None) == ("max_steps" in run.arguments)
        (tmp_path / runs[0].name / "run/checkpoint-5").mkdir(parents=True)
        words = queue.command(runs[0], tmp_path / runs[0].name, "cpu")
        assert words[words.index("--resume_from_checkpoint") + 1] == "latest"
        assert words[words.index("--cpu") + 1] == "True"


def test_cuda_graphs_are_refused_without_a_gpu(examples, tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs cannot be used: it needs a GPU"):
        run(examples, tmp_path / "run", "--cuda_graphs")
    assert not (tmp_path / "run").exists()
