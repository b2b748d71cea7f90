"""The README's Python blocks, run as they stand and in their order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def test_python_blocks_run_in_order(tmp_path):
    for package in ("peft", "accelerate"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = tmp_path / "examples/pretrained/seqboat-enwik8-small"
    SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).save_pretrained(model)
    build_byte_tokenizer().save_pretrained(model)
    data = tmp_path / "examples/data/tinyshakespeare.txt"
    data.parent.mkdir(parents=True)
    data.write_bytes((ROOT / "examples/data/tinyshakespeare.txt").read_bytes())
    script = tmp_path / "readme.py"
    script.write_text("\n".join(BLOCKS), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 7, 264])" in result.stdout


def test_no_block_is_longer_than_promised():
    assert len(BLOCKS) >= 6
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 12, block


@pytest.mark.parametrize(
    "command",
    [
        'pip install -c constraints.txt -e ".[train]" && python examples/quickstart.py',
        'pip install -c constraints.txt -e ".[test]" && pytest -n logical --dist loadfile',
        'pip install -c constraints-min.txt -e ".[test]" && pytest -n logical --dist loadfile',
    ],
)
def test_gives_the_commands(command):
    assert command in README
    assert (ROOT / re.search(r"-c (\S+)", command)[1]).exists()


def test_links_point_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
