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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ask(saved, tmp_path_factory):
    """ask(path, **body) -> status and answer of a server that runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, folder = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("server")
    command = ["-m", "hub_upload", "serve", str(saved), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (folder / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(folder / "home")},
        stdout=log,
        stderr=log,
    )

    def asked(path, **body):
        content = json.dumps({"model": str(saved), "stream": False, **body}).encode()
        request = urllib.request.Request(f"{address}/v1/{path}", content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read().decode() or "{}").get("detail")

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield asked
    finally:
        server.terminate()
        server.wait(30)
        log.close()


serving = pytest.mark.skipif(not can_serve(), reason="needs transformers[serving]")


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@serving
def test_the_server_of_transformers_answers(ask):
    status, answer = ask("chat/completions", messages=chat(("user", "Hi")), max_tokens=4)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 4


@serving
def test_a_temperature_samples(ask):
    def texts(**body):
        return {
            ask("completions", prompt="abc", max_tokens=24, seed=seed, **body)[1]["choices"][0]["text"]
            for seed in (1, 2, 3)
        }

    greedy = texts()
    assert len(greedy) == 1 and texts(temperature=0) == greedy and texts(temperature=0, top_p=0.5) == greedy
    for asked in ({"temperature": 1.0}, {"top_p": 0.99}):
        assert len(texts(**asked)) == 3
        assert texts(**asked) == texts(**asked)


@serving
def test_a_developer_is_the_system(ask):
    answers = [
        ask("chat/completions", messages=chat((role, "Be brief."), ("user", "Hi")), max_tokens=8)
        for role in ("developer", "system")
    ]
    assert answers[0][0] == 200
    assert answers[0][1]["choices"][0]["message"] == answers[1][1]["choices"][0]["message"]
    assert answers[0][1]["usage"] == answers[1][1]["usage"]


@serving
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("completions", {"prompt": ""}, "the prompt is empty"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature must be from 0 to inf, got -1"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "temperature must be from 0 to inf, got 'hot'"),
        ("completions", {"prompt": "a", "top_p": 2}, "top_p must be from 0 to 1, got 2"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens must be from 1 to inf, got 0"),
        ("chat/completions", {"messages": []}, "at least one message"),
        ("chat/completions", {"messages": "Hi"}, "at least one message"),
        ("chat/completions", {}, "KeyError: 'messages'"),
        ("chat/completions", {"messages": [{"content": "a"}]}, "KeyError: 'role'"),
        ("chat/completions", {"messages": chat(("tool", "5"))}, "a role must be system, developer, user or assistant"),
        ("chat/completions", {"messages": chat(("user", "a"), ("robot", "b"))}, "not robot"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request_with_the_reason(ask, path, body, reason, stream):
    status, said = ask(path, stream=stream, **body)
    assert status == 400 and reason in said


def test_continuous_batching_is_refused_at_the_start(saved):
    for option in ("--continuous-batching", "--continuous-batching=true"):
        with pytest.raises(HubUploadError, match="constant size"):
            serve_model(saved, [option])


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
