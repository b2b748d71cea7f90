"""Pushing through the real Hub client to a server on loopback: one commit or none, and a token that stays secret."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from hub_server import HubServer, StoredFile
from safetensors.torch import load, load_file
from small_models import small_lm

from hub_upload.cli import main
from hub_upload.code_files import auto_map, code_files
from hub_upload.errors import HubUploadError
from hub_upload.push import push_folder
from hub_upload.verify import Check, verify_folder
from modeling_seqboat import SeqBoatForCausalLM, build_byte_tokenizer

TOKEN = "hf_" + "S3cretToken" * 3
PROMPT = "To be, or not"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved"
    small_lm(vocab_size=264, pad_token_id=256, bos_token_id=257, eos_token_id=258).save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer({TOKEN: "ann", "hf_" + "OtherUser" * 4: "bob"}) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        # The server speaks the LFS protocol only.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # Waits between the client's retries.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        yield server
        assert list(scratch.iterdir()) == [], "a push leaves no temporary files"


def push(saved, **options):
    return push_folder(saved, "ann/boat", **{"verify": False, **options})


def refused(saved, **options):
    with pytest.raises(HubUploadError) as caught:
        push(saved, **options)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def environment(hub, folder):
    """Environment of a process that shares nothing with this one but the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_HOME": str(folder / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }


LOAD_FROM_HUB = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, prompt, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt")["input_ids"]

def text(model):
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return new[0].tolist()

model.save_pretrained(target)
tokenizer.save_pretrained(target)
again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True).eval()
assert "modeling_seqboat" not in sys.modules
print(json.dumps({"ids": text(model), "again": text(again), "class": type(model).__module__}))
"""


def test_push_and_load_in_a_fresh_process(hub, saved, tmp_path):
    """A pushed model loads by name where the package is not installed, with the same weights and the same text."""
    pushed = push(saved)
    assert pushed.url == f"{hub.url}/ann/boat"
    assert hub.repos["ann/boat"].history() == ["Upload SeqBoatForCausalLM", "initial commit"]

    before = load_file(saved / "model.safetensors")
    after = load(hub.repos["ann/boat"].files()["model.safetensors"])
    assert sorted(before) == sorted(after) and all(torch.equal(before[name], after[name]) for name in before)

    result = subprocess.run(
        [sys.executable, "-I", "-c", LOAD_FROM_HUB, "ann/boat", PROMPT, str(tmp_path / "again")],
        env=environment(hub, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    model = SeqBoatForCausalLM.from_pretrained(saved).eval()
    ids = torch.tensor([list(PROMPT.encode())])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert seen["ids"] == seen["again"] == expected[0].tolist()
    assert seen["class"].startswith("transformers_modules.")
    # What was saved again stands on its own: its classes are found beside its config.
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert all("--" not in reference for reference in auto_map.values())


def test_command_line_builds_verifies_and_prints_the_address(hub, saved, monkeypatch, capfd):
    verified = []

    def verify(folder, *, on_check):
        verified.append(json.loads((folder / "config.json").read_text("utf-8"))["auto_map"])
        on_check(Check("AutoModelForCausalLM", "loaded", again=True))

    # The tests of verify run it; here it is called as it asks to be.
    monkeypatch.setattr("hub_upload.push.verify_folder", create_autospec(verify_folder, side_effect=verify))
    command = ["push", "--model", str(saved), "--repo-id", "ann/boat", "--message", "First", "--token", TOKEN]
    status, said = main(command), capfd.readouterr()
    assert status == 0, said.err
    assert said.out.splitlines()[-1] == f"{hub.url}/ann/boat"
    assert "ok  AutoModelForCausalLM (saved again)" in said.out and verified == [auto_map()]
    assert "model.safetensors: 100%" in said.err, "no progress bar"
    assert TOKEN not in said.out + said.err
    assert hub.repos["ann/boat"].history() == ["First", "initial commit"]
    assert not any(TOKEN.encode() in content for content in hub.repos["ann/boat"].files().values())


def test_a_refused_token_stops_before_any_work(hub, saved, capsys):
    bad = "hf_" + "WrongToken" * 3
    status = main(["push", "--model", str(saved), "--repo-id", "ann/boat", "--token", bad])
    captured = capsys.readouterr()
    assert status == 1
    assert "does not accept the access token" in captured.err
    assert bad not in captured.out + captured.err
    assert hub.requests == ["GET /api/whoami-v2"]


def test_without_a_token_the_ways_to_give_one_are_named(hub, saved, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(saved)
    assert hub.requests == []


def test_a_token_without_write_permission_is_named(hub, saved):
    hub.read_only_tokens.add(TOKEN)
    assert "may not write to ann/boat" in refused(saved)
    assert hub.repos == {}


def test_another_users_repo_is_refused(hub, saved):
    with pytest.raises(HubUploadError, match="may not write to bob/boat"):
        push_folder(saved, "bob/boat", verify=False)


def test_an_existing_repo_is_not_overwritten_unasked(hub, saved):
    """An existing repo is never overwritten unasked; asked, outdated weights and code go and other files stay."""
    old = {
        "model-00001-of-00002.safetensors": b"old",
        "model-00002-of-00002.safetensors": b"old too",
        "model.safetensors.index.json": b"{}",
        "attic_seqboat.py": b"",
        "notes.txt": b"mine",
        "images/plot.png": b"png",
    }
    repo = hub.add_repo("ann/boat", old)
    before = repo.files()
    assert "--overwrite" in refused(saved)
    assert repo.files() == before
    push(saved, overwrite=True)
    files = repo.files()
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "attic_seqboat.py"} & set(files)
    assert (files["notes.txt"], files["images/plot.png"]) == (b"mine", b"png")
    assert "model.safetensors" in files
    assert repo.history() == ["Upload SeqBoatForCausalLM", "add files", "initial commit"]


def test_pushing_the_same_again_adds_no_commit(hub, saved):
    push(saved)
    history = hub.repos["ann/boat"].history()
    push(saved, overwrite=True)
    assert hub.repos["ann/boat"].history() == history


def test_an_empty_existing_repo_is_used(hub, saved):
    hub.add_repo("ann/boat")
    push(saved)
    assert "model.safetensors" in hub.repos["ann/boat"].files()


def test_a_cut_connection_leaves_the_repo_as_it_was_and_the_next_push_resumes(hub, saved):
    """An interrupted push commits nothing, and what arrived is not sent a second time."""
    hub.cut_after = 1
    assert "run the same command again" in refused(saved, max_shard_size="10KB")
    assert hub.repos["ann/boat"].history() == ["initial commit"]
    arrived = list(hub.uploaded_oids)
    assert arrived
    hub.cut_after = None
    push(saved, max_shard_size="10KB")
    assert hub.repos["ann/boat"].history() == ["Upload SeqBoatForCausalLM", "initial commit"]
    assert hub.uploaded_oids[: len(arrived)] == arrived
    assert len(hub.uploaded_oids) == len(set(hub.uploaded_oids)) == 3


def test_a_connection_cut_once_is_retried(hub, saved):
    hub.cut_next = 1
    push(saved)
    assert "model.safetensors" in hub.repos["ann/boat"].files()


def test_a_failed_overwrite_leaves_the_old_model(hub, saved):
    repo = hub.add_repo("ann/boat", {"model.safetensors": b"old"})
    hub.fail_commits = 1
    assert "nothing was committed" in refused(saved, overwrite=True)
    assert repo.files()["model.safetensors"] == b"old"
    assert repo.history() == ["add files", "initial commit"]


def test_large_files_go_in_parts(hub, saved):
    hub.part_size = 4096
    push(saved)
    content = hub.repos["ann/boat"].files()["model.safetensors"]
    assert sorted(load(content)) == sorted(load_file(saved / "model.safetensors"))
    assert sum("/part/" in request for request in hub.requests) > 1


def test_a_change_by_somebody_else_is_not_overwritten(hub, saved):
    repo = hub.add_repo("ann/boat")

    def somebody_else(server):
        repo.add_commit("main", repo.refs["main"], "theirs", {"theirs.txt": StoredFile(b"new")})

    hub.before_commit = somebody_else
    assert "somebody else" in refused(saved)
    assert repo.history() == ["theirs", "initial commit"]


def test_a_new_revision_leaves_main_alone(hub, saved):
    repo = hub.add_repo("ann/boat", {"model.safetensors": b"old"})
    pushed = push(saved, revision="v2")
    assert pushed.url == f"{hub.url}/ann/boat/tree/v2"
    assert repo.history("main") == ["add files", "initial commit"]
    assert set(repo.files("v2")) >= {"model.safetensors", *(file.name for file in code_files())}
    assert repo.files("v2")["model.safetensors"] != b"old"
    assert "at v2 is not empty" in refused(saved, revision="v2")


def test_a_revision_of_a_new_repo(hub, saved):
    push(saved, revision="dev")
    repo = hub.repos["ann/boat"]
    assert repo.history("main") == ["initial commit"]
    assert repo.history("dev") == ["Upload SeqBoatForCausalLM", "initial commit"]


def test_a_failed_push_takes_its_new_branch_back(hub, saved):
    repo = hub.add_repo("ann/boat", {"model.safetensors": b"old"})
    hub.fail_commits = 1
    refused(saved, revision="v2")
    assert set(repo.refs) == {"main"}


def test_a_pull_request_changes_no_branch(hub, saved):
    repo = hub.add_repo("ann/boat", {"model.safetensors": b"old"})
    pushed = push(saved, create_pr=True, message="Proposal")
    assert pushed.url == pushed.pull_request == f"{hub.url}/ann/boat/discussions/1"
    assert repo.files("main")["model.safetensors"] == b"old"
    assert repo.history("refs/pr/1")[0] == "Proposal"


def test_a_pull_request_needs_a_repo(hub, saved):
    assert "does not exist" in refused(saved, create_pr=True)
    hub.add_repo("ann/boat")
    assert "no revision 'v9'" in refused(saved, create_pr=True, revision="v9")


def test_private_repos(hub, saved):
    push(saved, private=True)
    assert hub.repos["ann/boat"].private
    hub.repos["ann/boat"].private = False
    assert "public" in refused(saved, private=True, overwrite=True)


@pytest.mark.parametrize("repo_id", ["boat", "ann/boat/x", "ann/", "", "ann/bo at", "../boat"])
def test_repo_ids_are_checked_before_anything_else(repo_id, hub, saved):
    with pytest.raises(HubUploadError, match="repo id"):
        push_folder(saved, repo_id, verify=False)
    assert hub.requests == []


def test_a_bad_model_folder_is_found_before_the_hub_is_asked(hub, tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert hub.requests == []


def test_a_folder_that_does_not_verify_is_not_uploaded(hub, saved, monkeypatch):
    def fail(folder, on_check=None):
        raise HubUploadError("did not verify")

    monkeypatch.setattr("hub_upload.push.verify_folder", fail)
    assert "did not verify" in refused(saved, verify=True)
    assert hub.repos == {}


def test_an_interrupt_commits_nothing(hub, saved, monkeypatch, capsys):
    repo = hub.add_repo("ann/boat", {"model.safetensors": b"old"})

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", interrupt)
    command = ["push", "--model", str(saved), "--repo-id", "ann/boat", "--no-verify", "--revision", "v2"]
    assert main(command) == 130
    assert "nothing was committed" in capsys.readouterr().err
    assert set(repo.refs) == {"main"}


def test_an_unreachable_hub_is_reported(saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert "broke off" in refused(saved)
