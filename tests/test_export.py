"""Models as graphs: prompts of any length, steps and encoders equal eager calls, in torch and in onnxruntime."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging import version
from small_models import random_ids, small_lm
from torch import nn
from torch.export import Dim
from transformers import AutoModelForSequenceClassification

from hub_upload.cli import main
from hub_upload.errors import HubUploadError
from hub_upload.export import empty_state, export_folder, export_model
from modeling_seqboat import (
    SeqBoatCache,
    SeqBoatConfig,
    SeqBoatForCausalLM,
    SeqBoatForSequenceClassification,
    build_byte_tokenizer,
)

pytestmark = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.13"), reason="graphs of any length were tried with torch 2.13"
)
ROOT = Path(__file__).resolve().parent.parent
# A second layer doubles the time of an export and is run as the first, so most models here have one; that several hand
# on their states is seen in the default kind.
ONE = {"num_hidden_layers": 1}
KINDS = [
    ONE,
    ONE | {"position_embedding_type": "simple", "attention_activation": "relu2", "ssm_truncation": 7},
    ONE | {"position_embedding_type": "local", "attention_activation": "laplace", "ssm_type": "s4d"},
    ONE | {"position_embedding_type": "t5", "ssm_type": "s5", "norm_first": False},
]


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask).logits


def mask_for(ids):
    """Padding on the left, on the right and within."""
    mask, length = torch.ones_like(ids), ids.shape[1]
    if length > 8:
        mask[0, : length // 3], mask[1, -2:], mask[1, 3:5] = 0, 0, 0
    return mask


@torch.no_grad()
def expect_equal_texts(model, program, lengths):
    for length in lengths:
        ids = random_ids(2, length, seed=length)
        mask = mask_for(ids)
        want = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        torch.testing.assert_close(program(ids, mask)[mask.bool()], want, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("overrides", KINDS)
def test_a_whole_text_exports(overrides):
    model, ids = small_lm(**overrides).eval(), random_ids(2, 70)
    program = torch.export.export(Logits(model), (ids, mask_for(ids)), strict=False)
    expect_equal_texts(model, program.module(), [70])


def test_any_number_of_texts_of_any_length_exports():
    model, ids = small_lm(**ONE).eval(), random_ids(2, 70)
    sizes = {0: Dim("rows"), 1: Dim("length", min=2, max=4096)}
    program = torch.export.export(Logits(model), (ids, mask_for(ids)), dynamic_shapes=(sizes, sizes), strict=False)
    expect_equal_texts(model, program.module(), [2, 63, 64, 65, 300])


@torch.no_grad()
def expect_equal_steps(model, run, lengths, rows=1):
    """A prompt, steps behind it, and another prompt behind these; logits and state."""
    for length in lengths:
        state, cache = empty_state(model.config, rows), SeqBoatCache(model.config, static=True)
        ids, more = random_ids(rows, length + 3, seed=length), random_ids(rows, 9, seed=99)
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, : length // 3] = 0
        parts = [("prompt", ids[:, :length], mask)]
        parts += [("step", column, torch.ones_like(column)) for column in ids[:, length:].split(1, dim=1)]
        if lengths[1:]:
            parts.append(("prompt", more, torch.ones_like(more)))
        for name, part, marks in parts:
            logits, *state = run(name, part, marks, state)
            want = model(part, attention_mask=marks, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, want, atol=3e-5, rtol=3e-5)
        for found, (name, expected) in zip(state, cache.tensors(), strict=True):
            torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5, msg=name)


@pytest.mark.parametrize(
    ("overrides", "rows", "length"),
    [({}, 1, None), (KINDS[1], 1, None), (KINDS[2], 1, None), (KINDS[1], 2, 40)],
)
def test_prompts_and_steps_hand_the_state_on(overrides, rows, length):
    model = small_lm(**overrides).eval()
    graphs = export_model(model, rows=rows, length=length)
    modules = {name: program.module() for name, (program, _, _) in graphs.items()}
    lengths = [2, 40, 130] if length is None else [length]
    expect_equal_steps(model, lambda name, ids, mask, state: modules[name](ids, mask, *state), lengths, rows)


def save(folder, **overrides):
    small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257, **overrides).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_is_written_and_read(tmp_path, capsys):
    """And its graphs of fixed sizes, read from the files, hand the state on."""
    saved, output = save(tmp_path / "model", **ONE), tmp_path / "out"
    sizes = ["--rows", "2", "--length", "40"]
    assert main(["export", str(saved), "--format", "torch", "--output", str(output), *sizes]) == 0
    described = json.loads((output / "export.json").read_text("utf-8"))
    assert set(described["graphs"]) == {"prompt", "step"} and (output / "tokenizer.json").is_file()
    inputs = described["graphs"]["prompt"]["inputs"]
    assert inputs[0] == {"name": "input_ids", "dtype": "int64", "shape": [2, 40]}
    assert inputs[2]["name"] == "layers.0.ssm_state" and inputs[2]["dtype"] == "float32"
    outputs = described["graphs"]["step"]["outputs"]
    assert outputs[0] == {"name": "logits", "dtype": "float32", "shape": [2, 264]}
    assert [each["name"] for each in outputs[1:]] == [f"new.{each['name']}" for each in inputs[2:]]
    files = {name: output / graph["file"] for name, graph in described["graphs"].items()}
    modules = {name: torch.export.load(file).module() for name, file in files.items()}
    model = SeqBoatForCausalLM.from_pretrained(saved).eval()
    expect_equal_steps(model, lambda name, ids, mask, state: modules[name](ids, mask, *state), [40], 2)
    assert main(["export", str(saved), "--format", "torch", "--output", str(output)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    saved = save(tmp_path / "model", **ONE)
    with pytest.raises(HubUploadError, match="--format must be one of torch, onnx"):
        export_folder(saved, tmp_path / "out", "gguf")
    with pytest.raises(HubUploadError, match="--format aoti is not offered"):
        export_folder(saved, tmp_path / "out", "aoti")
    for sizes in ({}, {"rows": None, "length": 16}):
        with pytest.raises(HubUploadError, match="--format executorch sets memory aside .* --rows .* --length"):
            export_folder(saved, tmp_path / "out", "executorch", **sizes)
    with pytest.raises(HubUploadError, match="at least 1 row and 2 columns, got 1 and 1"):
        export_folder(saved, tmp_path / "out", "torch", length=1)
    assert not (tmp_path / "out").exists()
    model, ids = small_lm().eval(), random_ids(1, 12)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, seq_idx):
            return self.model(ids, seq_idx=seq_idx).logits

    with pytest.raises(ValueError, match="an exported SeqBoat reads one text a row"):
        torch.export.export(Packed(), (ids, torch.zeros_like(ids)), strict=False)


def test_encoders_export():
    config = SeqBoatConfig.from_preset("lra-text", num_hidden_layers=1, norm_type="batchnorm", num_labels=3)
    torch.manual_seed(0)
    model = SeqBoatForSequenceClassification(config).eval()
    for name, module in model.named_modules():
        if name.endswith("norm.norm"):
            module.running_mean.normal_()
    ((program, inputs, outputs),) = export_model(model, rows=2).values()
    assert inputs == ["input_ids", "attention_mask"] and outputs == ["logits"]
    module = program.module()
    for length in (2, 150, 300):
        ids = random_ids(2, length, seed=length)
        mask = mask_for(ids)
        with torch.no_grad():
            want = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(module(ids, mask), want, atol=3e-5, rtol=3e-5)


def test_a_folder_of_an_encoder_is_one_graph(tmp_path):
    config = SeqBoatConfig.from_preset("lra-text", num_hidden_layers=1, norm_type="layernorm")
    SeqBoatForSequenceClassification(config).save_pretrained(tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "out", "torch", length=8)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    graphs = json.loads((tmp_path / "out/export.json").read_text("utf-8"))["graphs"]
    assert set(graphs) == {"model"} and graphs["model"]["inputs"][0]["shape"] == [1, 8]


def test_values_export():
    config = SeqBoatConfig.from_preset("speech-commands-10", num_hidden_layers=1, memory_size=8)
    torch.manual_seed(0)
    model, values = SeqBoatForSequenceClassification(config).eval(), torch.randn(1, 200)
    ((program, inputs, _),) = export_model(model, length=200).values()
    assert inputs == ["input_values", "attention_mask"]
    mask = torch.ones(1, 200, dtype=torch.long)
    with torch.no_grad():
        want = model(input_values=values, attention_mask=mask).logits
    torch.testing.assert_close(program.module()(values, mask), want, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_text_goes_on_in_onnxruntime_as_in_generate(layers, tmp_path, monkeypatch):
    """Prompt and 50 tokens, from the example's command line."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    shape = {"num_hidden_layers": layers}
    saved = save(tmp_path / "model", **shape)
    export_folder(saved, tmp_path / "out", "onnx")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("run_exported")
    flags = [str(tmp_path / "out"), "--prompt", "A text to go on with", "--tokens", "50", "--threads", "1"]
    assert len(example.main([*flags, "--compare", str(saved)])) == 50
    exported = example.ExportedModel(tmp_path / "out", 1)
    model = small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257, **shape)

    def run(name, ids, mask, state):
        exported.state = [tensor.numpy() for tensor in state]
        logits = exported.read(ids.numpy(), mask.numpy())
        return [torch.from_numpy(array) for array in (logits, *exported.state)]

    expect_equal_steps(model.eval(), run, [2, 70])
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out", other)
    small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257, seed=5, **shape).save_pretrained(tmp_path / "model5")
    with pytest.raises(SystemExit, match="generate\\(\\) continues otherwise"):
        example.main([*flags, "--compare", str(tmp_path / "model5")])


def test_a_graph_of_one_length_is_given_prompts_of_others(monkeypatch):
    """Longer ones in parts, the last one padded."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    model = object.__new__(importlib.import_module("run_exported").ExportedModel)
    calls = []

    def run(values):
        calls.append([value.tolist() for value in values])
        return [np.array([[len(calls)]]), values[2] + 1]

    model.columns, model.runs, model.state = 4, {"prompt": run, "step": run}, [np.zeros(1)]
    assert model.read(np.array([[5, 6, 7, 8, 9, 10]])).tolist() == [[2]]
    assert calls == [[[[5, 6, 7, 8]], [[1] * 4], [0]], [[[9, 10, 0, 0]], [[1, 1, 0, 0]], [1]]]
    model.read(np.array([[5]]))
    assert calls[2] == [[[5]], [[1]], [2]] and model.state[0].tolist() == [3]
    with pytest.raises(ValueError, match="more than 4 columns"):
        model.read(np.zeros((2, 5), np.int64))
