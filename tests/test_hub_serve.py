"""Serving: transformers' own server answers with a SeqBoat model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from small_models import small_lm
from transformers.utils import is_rich_available

import hub_upload.serve
from hub_upload.errors import HubUploadError
from hub_upload.serve import serve_model
from modeling_seqboat import SeqBoatModel, build_byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def can_serve() -> bool:
    try:
        from transformers.cli.serve import is_serve_available
    except ImportError:
        return False
    return is_serve_available() and is_rich_available()


@pytest.fixture
def saved(tmp_path):
    small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257).save_pretrained(tmp_path / "model")
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.skipif(not can_serve(), reason="needs transformers[serving]")
def test_the_server_of_transformers_answers(saved, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = ["-m", "hub_upload", "serve", str(saved), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        question = {
            "model": str(saved),
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 4,
            "stream": False,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 4


def test_only_language_models_are_served(tmp_path):
    SeqBoatModel(small_lm().config).save_pretrained(tmp_path / "model")
    with pytest.raises(HubUploadError, match="only language models"):
        serve_model(tmp_path / "model")


def test_missing_packages_are_named_and_arguments_restored(saved, monkeypatch):
    cli = pytest.importorskip("transformers.cli.transformers")
    seen = []

    def main():
        seen.append(list(sys.argv))
        raise ImportError("Missing dependencies for serving.")

    monkeypatch.setattr(cli, "main", main)
    before = list(sys.argv)
    with pytest.raises(HubUploadError, match="Missing dependencies for serving"):
        hub_upload.serve.serve_model(saved, ["--port", "1"])
    assert seen == [["transformers", "serve", str(saved), "--port", "1"]]
    assert sys.argv == before
