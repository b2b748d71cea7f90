"""Fine-tuning with the Trainer in a short mode on real text and real instructions: the loss falls, a resumed run ends
in the weights of an uninterrupted one, packing equals padding, and bad input is refused before training starts."""

import json
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import imported
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, TrainingArguments

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples/data"


@pytest.fixture
def example(monkeypatch):
    yield from imported(monkeypatch, "finetune_trainer", "instruction_data", "recipes", "text_data")


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", hidden_dropout=0.1)).save_pretrained(tmp_path / "model")
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(module, output, model, **changes):
    settings = {
        "model": model, "train_file": DATA / "gsm8k_excerpt.jsonl", "output_dir": output, "max_steps": 4,
        "prompt_column": "question", "completion_column": "answer", "sequence_length": 300, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "validation_fraction": 0.02, "use_cpu": True, "report_to": "none",
        "logging_steps": 1, "save_steps": 2, "disable_tqdm": True, "lr_scheduler_type": "constant", **changes,
    }  # fmt: skip
    return module.main([part for name, value in settings.items() if value is not None
                        for part in (f"--{name}", str(value))])  # fmt: skip


def test_instructions_train_and_resume_exactly(tmp_path, example, model, capsys):
    report = run(example, tmp_path / "whole", model, max_steps=20, save_steps=10)
    assert report["eval_token_loss"] < 0.8 * report["before_eval_token_loss"]
    assert report["before_eval_accuracy"] < report["eval_accuracy"] <= 1
    assert report["examples"] + report["dropped_examples"] == 196 and report["cut_examples"] > 0
    assert report == json.loads((tmp_path / "whole/report.json").read_text("utf-8"))
    assert "accuracy" in capsys.readouterr().out
    run(example, tmp_path / "resumed", model, max_steps=20, save_steps=10,
        resume_from_checkpoint=tmp_path / "whole/checkpoint-10")  # fmt: skip
    first, second = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "resumed"))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    state = json.loads((tmp_path / "whole/checkpoint-20/trainer_state.json").read_text("utf-8"))
    assert 0 <= state["log_history"][-1]["router/activation_rate_1"] <= 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole/final")
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/final")
    assert (
        loaded.generate(**question, max_new_tokens=4, eos_token_id=None).shape[1] == question["input_ids"].shape[1] + 4
    )


def test_text_trains(tmp_path, example, model):
    report = run(
        example, tmp_path / "run", model, train_file=DATA / "tinyshakespeare.txt", max_bytes=6000, sequence_length=64,
        max_steps=20, validation_fraction=0.1, router_learning_rate=1e-3,
    )  # fmt: skip
    assert report["eval_token_loss"] < 0.8 * report["before_eval_token_loss"]


def test_packed_batch_equals_padded_batch(tmp_path, example, model):
    """Several texts in one row: state, attention and loss stop at the borders."""
    data = sys.modules["instruction_data"]
    tokenizer = build_byte_tokenizer()
    conversations = data.read_instructions(str(DATA / "gsm8k_excerpt.jsonl"), "question", "answer")[:3]
    rows = list(data.Instructions(conversations, tokenizer, 400))
    assert len({len(row["input_ids"]) for row in rows}) > 1
    loaded = SeqBoatForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        packed = loaded(**DataCollatorWithFlattening()(rows)).loss
        padded = loaded(**example.LeftPadding(tokenizer.pad_token_id)(rows)).loss
    torch.testing.assert_close(packed, padded)


def test_labels_are_the_answers(tmp_path, example):
    data = sys.modules["instruction_data"]
    file = tmp_path / "set.jsonl"
    turns = [("user", "a?"), ("assistant", "b!"), ("user", "c?"), ("assistant", "d!")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file.write_text(json.dumps({"messages": messages}) + "\n\n", "utf-8")
    tokenizer = build_byte_tokenizer()
    (row,) = data.Instructions(data.read_instructions(str(file), "prompt", "completion"), tokenizer, 100)
    kept = row["labels"] != -100
    assert torch.equal(row["labels"][kept], row["input_ids"][kept])
    assert tokenizer.decode(row["labels"][kept]) == "b!<|end|>d!<|end|>"


def test_bad_input_is_refused_before_training(tmp_path, example, model):
    empty, broken, lone = (tmp_path / f"{name}.jsonl" for name in ("empty", "broken", "lone"))
    empty.write_text("\n", "utf-8")
    broken.write_text('{"question": "a", "answer": "b"}\n{"question"\n', "utf-8")
    lone.write_text('{"question": "a", "answer": "b"}\n', "utf-8")
    text = DATA / "tinyshakespeare.txt"
    other = tmp_path / "other"
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", hidden_size=48, hidden_dropout=0.1)).save_pretrained(other)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    cases = [
        (ValueError, "model is missing", dict(model=None)),
        (ValueError, "train_file is missing", dict(train_file=None)),
        (FileNotFoundError, "there is no instruction file", dict(train_file=tmp_path / "missing.jsonl")),
        (FileNotFoundError, "there is no text file", dict(train_file=tmp_path / "missing.txt")),
        (ValueError, "is empty", dict(train_file=empty)),
        (ValueError, "line 2 of .* is no JSON", dict(train_file=broken)),
        (ValueError, "has 1 example; evaluation needs another", dict(train_file=lone)),
        (ValueError, "line 1 of .* has no 'prompt'; it has question, answer", dict(prompt_column=None)),
        (ValueError, "no answer begins within sequence_length 8", dict(sequence_length=8)),
        (ValueError, "sequence_length 5000 is longer than the training data, which has 3920 tokens",
         dict(train_file=text, max_bytes=4000, sequence_length=5000)),
        (ValueError, "validation_fraction must lie between 0 and 1, got 1.5", dict(validation_fraction=1.5)),
        (ValueError, "another shape: hidden_size is 48 there and 32 in this run", dict(resume_from_checkpoint=other)),
        (ValueError, "is no checkpoint folder of this script", dict(resume_from_checkpoint=tmp_path / "nowhere")),
        (ValueError, "there is no checkpoint in output_dir", dict(resume_from_checkpoint="latest")),
        (ValueError, "is not empty", dict(output=full)),
    ]  # fmt: skip
    for error, message, change in cases:
        with pytest.raises(error, match=message):
            run(example, **{"output": tmp_path / "run", "model": model, **change})
        assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        example.main([str(tmp_path / "none.yaml")])


def test_numbers_out_of_range_are_refused_by_name(tmp_path, example, model):
    own = {
        name for name, field in example.FinetuneArguments.__dataclass_fields__.items()
        if name not in TrainingArguments.__dataclass_fields__ and field.type in (int, float, int | None, float | None)
    }  # fmt: skip
    assert own <= set(example.RANGES)
    cases = {name: -1 for name in example.RANGES} | {
        "save_total_limit": 0,
        "per_device_eval_batch_size": 0,
        "max_steps": -2,
    }
    for name, value in cases.items():
        with pytest.raises(ValueError, match=name):
            run(example, tmp_path / "run", model, **{name: value})
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "router_learning_rate"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got nan"):
            run(example, tmp_path / "run", model, **{name: "nan"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\n", "line 1 of .* is no UTF-8"),
        (b'{"question": "a", "answer": "b"}\n[1]\n', "line 2 of .* it holds a list"),
        (b"5\n", "line 1 of .* must hold a JSON object, it holds a int"), (b"[" * 50_000, "line 1 of .* is no JSON"),
        (b'{"question": 5, "answer": "b"}\n', "line 1 of .*: 'question' must be a text, got 5"),
        (b'{"question": null, "answer": "b"}\n', "must be a text, got None"),
        (b'{"messages": "x"}\n', "line 1 of .*'messages' must be a list"),
        (b'{"messages": [1]}\n', "a message must hold"),
        (b'{"messages": [{"role": "user", "content": null}]}\n', "line 1 of .* a message must hold"),
    ],
)  # fmt: skip
def test_instructions_of_anybody_are_refused_with_file_and_line(content, words, tmp_path, example):
    file = tmp_path / "set.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        sys.modules["instruction_data"].read_instructions(str(file), "question", "answer")
    assert "set.jsonl" in str(caught.value)


def test_lines_end_at_line_feeds_alone(tmp_path, example):
    """U+2028, U+2029 and U+0085 may stand in JSON as they are; a byte order mark and CRLF do no harm."""
    texts = ["a\u2028b", "c\u2029d", "e\u0085f", "g\x0b", "h\x0c\x1c"]
    rows = [json.dumps({"question": text, "answer": text}, ensure_ascii=False) for text in texts]
    file = tmp_path / "set.jsonl"
    for start, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")):
        file.write_bytes(start + end.join(row.encode() for row in rows))
        read = sys.modules["instruction_data"].read_instructions(str(file), "question", "answer")
        assert [conversation[0]["content"] for conversation in read] == texts


def test_tokenizer_of_another_model_is_refused(tmp_path, example):
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", vocab_size=263)).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="has 264 ids, the model's vocabulary 263"):
        run(example, tmp_path / "run", tmp_path / "small", tokenizer="byte")


def test_shipped_recipe_is_valid(example, tmp_path):
    recipes = sys.modules["recipes"]
    arguments = recipes.parse_arguments(
        example.FinetuneArguments,
        [str(ROOT / "configuration/recipes/gsm8k.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "True"],
    )
    assert arguments.num_train_epochs == 4 and arguments.learning_rate == 2e-3
