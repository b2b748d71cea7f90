"""Graphs in ExecuTorch. Runs where it is installed: `.ci/executorch` makes such a place."""

import importlib
from pathlib import Path

import pytest
import torch
from small_models import small_lm
from test_export import expect_equal_steps

pytest.importorskip("executorch", reason="runs in an environment with ExecuTorch: .ci/executorch")

from hub_upload.export import export_folder  # noqa: E402
from modeling_seqboat import build_byte_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


# ExecuTorch takes two minutes of one core over these two layers.
@pytest.mark.timeout(1800)
def test_a_text_goes_on_as_in_generate(tmp_path, monkeypatch):
    model = small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257, ssm_truncation=7)
    model.save_pretrained(tmp_path / "model")
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "out", "executorch", length=16)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("run_exported")
    flags = [str(tmp_path / "out"), "--prompt", "A text of more than 16 bytes", "--tokens", "50"]
    assert len(example.main([*flags, "--compare", str(tmp_path / "model")])) == 50
    exported = example.ExportedModel(tmp_path / "out")

    def run(name, ids, mask, state):
        exported.state = [tensor.numpy() for tensor in state]
        logits = exported.read(ids.numpy(), mask.numpy())
        return [torch.from_numpy(array) for array in (logits, *exported.state)]

    expect_equal_steps(model, run, [5, 16, 40])
