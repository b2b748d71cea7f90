"""LoRA, DoRA and quantised bases: the default targets exist in every layer, train, save, reload and merge; routers and
EMA stay untouched."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from example_scripts import imported
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TorchAoConfig

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.training_seqboat import parameter_groups

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = json.loads((ROOT / "configuration/peft/seqboat_lora.json").read_text("utf-8"))


def make_model(**overrides) -> SeqBoatForCausalLM:
    torch.manual_seed(0)
    return SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", **overrides))


def config(**overrides) -> LoraConfig:
    settings = {name: value for name, value in SETTINGS.items() if name != "peft_type"}
    return LoraConfig(**{**settings, "r": 4, **overrides})


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(seed))


def train(model, steps: int = 5) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=ids(1), use_cache=False).logits


@pytest.mark.parametrize("intermediate_size", [0, 48])
def test_every_default_target_exists_in_every_layer_and_trains(intermediate_size):
    model = get_peft_model(make_model(intermediate_size=intermediate_size), config())
    expected = {"hidden_proj", "attention.in_proj", "attention.out_proj"}
    if intermediate_size:
        expected |= {"ffn.fc1", "ffn.fc2"}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}."
        adapted = {
            name.removeprefix(prefix).split(".lora_")[0] for name in before if prefix in name and ".lora_" in name
        }
        assert adapted == expected
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert torch.equal(parameter, before[name]) != (".lora_" in name), name


def test_all_linear_leaves_router_and_ema_alone():
    model = get_peft_model(make_model(intermediate_size=48), config(target_modules="all-linear"))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"hidden_proj", "in_proj", "out_proj", "fc1", "fc2"}


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_saves_reloads_and_merges_to_the_same_logits(tmp_path, use_dora):
    model = get_peft_model(make_model(), config(use_dora=use_dora))
    base = logits(make_model())
    losses = train(model)
    assert losses[-1] < losses[0]
    wanted = logits(model)
    assert (wanted - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(logits(reloaded), wanted, rtol=0, atol=0)
    merged = reloaded.merge_and_unload()
    assert type(merged) is SeqBoatForCausalLM
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def untied() -> SeqBoatForCausalLM:
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


BOTH = ["embed_tokens", "lm_head"]
# What trains embeddings or output matrix beside the layers, and whether they are one matrix afterwards.
OUTER = [
    (make_model, dict(modules_to_save=["lm_head"]), False),
    (make_model, dict(modules_to_save=["lm_head"], ensure_weight_tying=True), True),
    (make_model, dict(modules_to_save=["embed_tokens"]), False),
    (make_model, dict(modules_to_save=BOTH, ensure_weight_tying=True), True),
    (make_model, dict(trainable_token_indices=[1, 2, 3]), True),
    (make_model, dict(trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [1, 2]}), True),
    (untied, dict(target_modules=["lm_head"]), False),
    (untied, dict(target_modules=["in_proj", *BOTH]), False),
]


@pytest.mark.parametrize(("make", "overrides", "tied"), OUTER)
def test_trained_embeddings_and_output_matrix_merge_to_the_same_logits(tmp_path, make, overrides, tied):
    model = get_peft_model(make(), config(**{"target_modules": "all-linear", **overrides}))
    train(model)
    wanted = logits(model)
    assert (wanted - logits(make_model())).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(make(), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == merged.config.tie_word_embeddings == tied
    merged.save_pretrained(tmp_path / "merged")
    loaded = SeqBoatForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target_modules", [["lm_head"], ["embed_tokens"], BOTH])
@pytest.mark.parametrize("ensure_weight_tying", [False, True])
def test_merging_an_adapter_of_a_tied_matrix_warns(target_modules, ensure_weight_tying):
    # PEFT merges it for the embeddings and for the output at once, or twice, in any tied model.
    model = get_peft_model(
        make_model(), config(target_modules=target_modules, ensure_weight_tying=ensure_weight_tying)
    )
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model.merge_and_unload()


def test_router_and_ema_are_trained_when_asked_for(tmp_path):
    model = get_peft_model(make_model(), config(modules_to_save=["router", "ssm"]))
    train(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(logits(reloaded), wanted, rtol=0, atol=0)
    trained = reloaded.merge_and_unload().model.layers[0].router.log_temperature
    assert trained != make_model().model.layers[0].router.log_temperature


def test_adapted_model_generates_with_its_cache():
    model = get_peft_model(make_model(), config())
    train(model, steps=2)
    model.eval()
    prompt = ids(2)[:1]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    cached = model.generate(input_ids=prompt, **options)
    assert torch.equal(cached, model.generate(input_ids=prompt, use_cache=False, **options))


def quantization(kind: str) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else IntxWeightOnlyConfig(torch.int4, PerGroup(16)))


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.15), ("int4", 1.5)])
def test_quantised_base_runs_and_takes_an_adapter(tmp_path, kind, worst):
    plain = make_model().eval()
    plain.save_pretrained(tmp_path)
    model = SeqBoatForCausalLM.from_pretrained(tmp_path, quantization_config=quantization(kind)).eval()
    quantised = {
        name for name, parameter in model.named_parameters() if type(parameter.data) is not torch.Tensor
        or type(parameter) is not torch.nn.Parameter
    }  # fmt: skip
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in quantised} == {"hidden_proj", "in_proj", "out_proj"}
    difference = (logits(model) - logits(plain)).abs().max()
    assert 0 < difference < worst
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    cached = model.generate(ids(2)[:1], **options)
    assert torch.equal(cached, model.generate(ids(2)[:1], use_cache=False, **options))
    adapted = get_peft_model(model, config())
    losses = train(adapted)
    assert losses[-1] < losses[0]


@pytest.fixture
def example(monkeypatch):
    yield from imported(monkeypatch, "finetune_lora", "recipes", "text_data")


def test_example_trains_saves_and_merges(tmp_path, example, capsys):
    make_model().save_pretrained(tmp_path / "model")
    flags = [
        "--model", str(tmp_path / "model"), "--train_file", str(ROOT / "examples/data/tinyshakespeare.txt"),
        "--max_bytes", "4000", "--sequence_length", "64", "--max_steps", "10", "--batch_size", "4",
        "--learning_rate", "1e-2", "--use_cpu", "True", "--warmup_steps", "0",
    ]  # fmt: skip
    report = example.main([*flags, "--output_dir", str(tmp_path / "adapter"), "--save_merged", "True"])
    assert report["loss_after"] < report["loss_before"]
    assert 0 < report["trainable_share"] < 0.5
    assert report["reloaded_difference"] == 0 and report["merged_difference"] < 1e-4
    merged = SeqBoatForCausalLM.from_pretrained(tmp_path / "adapter/merged")
    loaded = PeftModel.from_pretrained(SeqBoatForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), logits(loaded), rtol=1e-4, atol=1e-4)
    assert "validation loss" in capsys.readouterr().out


def test_bad_input_is_refused_before_training(tmp_path, example, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    full, empty = tmp_path / "full", tmp_path / "empty.txt"
    full.mkdir()
    (full / "notes.txt").touch()
    empty.touch()
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", vocab_size=263)).save_pretrained(tmp_path / "small")
    (tmp_path / "tied.json").write_text('{"target_modules": ".*lm_head"}')
    monkeypatch.chdir(tmp_path)
    cases = [
        (FileNotFoundError, "there is no text file", dict(train_file="missing.txt")),
        (ValueError, "is empty", dict(train_file="empty.txt")),
        (ValueError, "sequence_length 5000 is longer than the training data, which has 3600 tokens",
         dict(sequence_length=5000)),
        (ValueError, "validation_fraction must lie between 0 and 1, got 0.0", dict(validation_fraction=0.0)),
        (ValueError, "there are 0 validation tokens", dict(validation_fraction=1e-9)),
        (ValueError, "is not empty", dict(output_dir="full")),
        (ValueError, "quantization must be none, int8 or int4, got 'int2'", dict(quantization="int2")),
        (FileNotFoundError, "there is no PEFT config", dict(peft_config="missing.json")),
        (FileNotFoundError, "there is no model in './nowhere'", dict(model="./nowhere")),
        (FileNotFoundError, "there is no model in 'full/final'", dict(model="full/final")),
        (ValueError, "has 264 ids, the model's vocabulary 263", dict(model="small")),
        (ValueError, "target_modules='.*lm_head' .* one matrix", dict(peft_config="tied.json")),
        (ValueError, "target_modules={'embed_tokens'} .* one matrix", dict(target_modules="embed_tokens")),
    ]  # fmt: skip
    for error, message, change in cases:
        settings = {
            "model": "model", "train_file": ROOT / "examples/data/tinyshakespeare.txt", "max_bytes": 4000,
            "sequence_length": 64, "use_cpu": True, "output_dir": "run", **change,
        }  # fmt: skip
        with pytest.raises(error, match=message):
            example.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
        assert not (tmp_path / "run").exists()


def test_numbers_out_of_range_are_refused_by_name(tmp_path, example):
    kinds = example.LoraArguments.__dataclass_fields__
    numbers = {name for name, field in kinds.items() if field.type in (int, float, int | None, float | None)}
    assert numbers == set(example.RANGES)
    for name in sorted(numbers):
        with pytest.raises(ValueError, match=f"{name} must"):
            example.main(
                ["--model", "m", "--train_file", "t", "--output_dir", str(tmp_path / "run"), f"--{name}", "-1"]
            )
    for content, words in (
        ("[1]", "must hold a JSON object"),
        ("{", "is no JSON"),
        ('{"r": "x", "zz": 1}', "no config of PEFT"),
    ):
        (tmp_path / "peft.json").write_text(content)
        with pytest.raises(ValueError, match=f"peft.json.*{words}"):
            example.lora_config(example.LoraArguments("m", "t", "o", peft_config=str(tmp_path / "peft.json")))


def test_a_stopped_training_keeps_its_adapter(tmp_path, example, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    usual = example.RunTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(example.RunTrainer, "training_step", interrupted)
    report = example.main([
        "--model", str(tmp_path / "model"), "--train_file", str(ROOT / "examples/data/tinyshakespeare.txt"),
        "--max_bytes", "4000", "--sequence_length", "64", "--max_steps", "10", "--batch_size", "2", "--use_cpu",
        "True",
        "--output_dir", str(tmp_path / "adapter"),
    ])  # fmt: skip
    assert report["steps"] == 3
    PeftModel.from_pretrained(SeqBoatForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
