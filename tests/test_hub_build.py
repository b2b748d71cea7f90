"""Building and verifying a Hub folder: what is in it, what is refused, and that it works where the package is not."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import strangers
import torch
from helpers import verify_by_forks, verify_once
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_models import small_lm
from transformers import AutoTokenizer

import modeling_seqboat
from hub_upload.build import build_folder, load_model, read_config
from hub_upload.card_sources import read_sources
from hub_upload.cli import main
from hub_upload.code_files import auto_classes, auto_map, code_files
from hub_upload.errors import HubUploadError, redact
from hub_upload.folders import staged_folder
from hub_upload.model_card import CardOptions
from hub_upload.verify import Check, verify_folder
from modeling_seqboat import SeqBoatConfig, SeqBoatModel, build_byte_tokenizer

PACKAGE = Path(modeling_seqboat.__file__).parent
EVALUATION = {
    "results": [
        {
            "task": "text-generation",
            "dataset": {"name": "enwik8", "type": "enwik8", "split": "test"},
            "metrics": [{"type": "bits_per_byte", "name": "Bits per byte", "value": 1.523456}],
        }
    ],
    "activation_rates": [0.25, 0.75],
}
FAKE_TOKEN = "hf_" + "A1b2C3d4E5" * 4


def byte_model(seed=0, **overrides):
    special = {"vocab_size": 264, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    return small_lm(seed, **{**special, **overrides})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder as save_pretrained and a Trainer leave it."""
    folder = tmp_path_factory.mktemp("model") / "saved"
    byte_model().save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"what a Trainer leaves behind: " + FAKE_TOKEN.encode())
    (folder / "optimizer.pt").write_bytes(b"state")
    return folder


@pytest.fixture(scope="module")
def built(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "hub"
    build_folder(saved, folder, card=CardOptions(repo_id="ann/boat"))
    return folder


@pytest.fixture(autouse=True)
def forked_strangers(monkeypatch):
    verify_by_forks(monkeypatch)


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def refused(model, tmp_path, **kwargs):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(HubUploadError) as caught:
        build_folder(model, tmp_path / "out", **kwargs)
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


def test_weights_are_bit_equal(saved, built):
    before, after = load_file(saved / "model.safetensors"), load_file(built / "model.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_head_is_in_the_auto_map(built):
    mapped = json.loads((built / "config.json").read_text())["auto_map"]
    assert mapped == auto_map()
    assert set(mapped) == {"AutoConfig", *modeling_seqboat.modeling_seqboat.AUTO_CLASSES}
    for auto, cls in auto_classes().items():
        module, name = mapped[auto].split(".")
        assert name == cls.__name__
        assert f"class {name}(" in (built / f"{module}.py").read_text()


def test_code_is_complete_flat_and_unchanged(built):
    names = {file.name for file in code_files()}
    assert {"configuration_seqboat.py", "modeling_seqboat.py", "layers_seqboat.py", "cache_seqboat.py"} <= names
    assert "__init__.py" not in names
    assert {file.name for file in built.glob("*.py")} == names
    assert all((built / name).read_bytes() == (PACKAGE / name).read_bytes() for name in names)
    assert not [path for path in built.iterdir() if path.is_dir()]


def test_only_what_belongs_to_the_model_goes_along(built):
    allowed = {"LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"}
    allowed |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} | {f.name for f in code_files()}
    assert {path.name for path in built.iterdir()} == allowed
    assert (built / "LICENSE").read_text().startswith("MIT License")


def test_the_tokenizer_is_the_models_own(saved, built):
    text = "Schön — \N{SNOWMAN}\n"
    first, second = AutoTokenizer.from_pretrained(saved), AutoTokenizer.from_pretrained(built)
    assert first(text)["input_ids"] == second(text)["input_ids"] == list(text.encode())
    assert first.chat_template == second.chat_template


def test_weights_are_sharded_on_request(saved, tmp_path):
    built = build_folder(saved, tmp_path / "out", max_shard_size="10KB")
    assert "model.safetensors.index.json" in built.files
    assert sum(name.endswith(".safetensors") for name in built.files) > 1
    model = load_model(tmp_path / "out", read_config(tmp_path / "out")[1])
    original = byte_model().state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


def test_half_precision_stays(tmp_path):
    byte_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    build_folder(tmp_path / "model", tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_base_model_can_be_built(tmp_path):
    SeqBoatModel(byte_model().config).save_pretrained(tmp_path / "model")
    assert build_folder(tmp_path / "model", tmp_path / "out").model_class == "SeqBoatModel"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not a JSON object"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type='llama'"),
        (lambda f: edit_config(f, architectures=["LlamaForCausalLM"]), "architectures=['LlamaForCausalLM']"),
        (lambda f: edit_config(f, attention_activation="gelu"), "attention_activation='gelu'"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 100), "cannot be loaded"),
        (lambda f: edit_weights(f, lambda w: w.pop("model.layers.0.ssm.omega")), "missing: model.layers.0.ssm.omega"),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))), "left over: extra"),
        (
            lambda f: edit_weights(f, lambda w: w.update({"model.layers.0.ssm.omega": torch.zeros(3)})),
            "wrong shape: model.layers.0.ssm.omega",
        ),
        (lambda f: edit_weights(f, lambda w: w["model.layers.0.ssm.omega"].fill_(torch.nan)), "not finite"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda f: edit_config(f, vocab_size=263, pad_token_id=0, bos_token_id=1, eos_token_id=2), "263"),
    ],
)
def test_incomplete_and_foreign_models_are_refused(damage, words, copied, tmp_path):
    """A corrupt or foreign model is refused with a reason, and nothing half-written is left behind."""
    damage(copied)
    assert words in refused(copied, tmp_path)


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refused(tmp_path / "adapter", tmp_path)


def test_an_access_token_never_goes_along(copied, tmp_path):
    edit_config(copied, note=FAKE_TOKEN)
    message = refused(copied, tmp_path)
    assert "config.json" in message and FAKE_TOKEN not in message


def test_tokens_are_cut_out_of_messages():
    assert redact(f"Bearer {FAKE_TOKEN} at x", ()) == "Bearer <token> at x"
    assert redact("secret and more", ("secret", None)) == "<token> and more"


def test_an_existing_folder_is_replaced_on_request_only(saved, tmp_path, capsys):
    out = tmp_path / "out"
    build_folder(saved, out)
    (out / "old_seqboat.py").write_text("")
    command = ["build", "--model", str(saved), "--output", str(out)]
    assert main(command) == 1
    assert "not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert not (out / "old_seqboat.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_the_output_may_not_overlap_with_the_model(place, copied, tmp_path):
    before = sorted(copied.iterdir())
    with pytest.raises(HubUploadError, match="overlaps"):
        build_folder(copied, copied / place, overwrite=True)
    assert sorted(copied.iterdir()) == before


def test_the_old_folder_comes_back_when_the_new_one_cannot_move_in(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def fail_for_stage(self, target):
        if ".partial-" in self.name:
            raise OSError("device busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_stage)
    with pytest.raises(OSError, match="device busy"), staged_folder(out, overwrite=True) as stage:
        (stage / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_states_what_is_known(copied, tmp_path):
    (copied / "evaluation.json").write_text(json.dumps(EVALUATION))
    (copied / "training_record.json").write_text(
        json.dumps({"dataset": "enwik8, first 90 M bytes", "tokens_seen": 1234567, "output_dir": "/home/ann/secret"})
    )
    history = [
        {"step": 10, "loss": 2.5, "learning_rate": 1e-3},
        {"step": 20, "loss": 1.75, "learning_rate": 5e-4},
        {"step": 20, "eval_loss": 1.5, "eval_runtime": 3.0},
    ]
    (copied / "trainer_state.json").write_text(
        json.dumps({"global_step": 20, "epoch": 0.5, "train_batch_size": 4, "total_flos": 0, "log_history": history})
    )
    options = CardOptions(
        repo_id="ann/boat", license="cc-by-sa-3.0", languages=["en"], datasets=["enwik8"], base_model="ann/base"
    )
    built = build_folder(copied, tmp_path / "out", card=options)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("cc-by-sa-3.0", ["en"], ["enwik8"])
    assert (data["library_name"], data["pipeline_tag"], data["base_model"]) == (
        "transformers",
        "text-generation",
        "ann/base",
    )
    assert data["metrics"] == ["bits_per_byte"]
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 1.523456 and result["dataset"]["split"] == "test"
    for part in (
        'model="ann/boat"',
        "1,234,567",
        "enwik8, first 90 M bytes",
        "| Optimizer steps | 20 |",
        "| Highest logged learning rate | 0.001 |",
        "| Last logged training loss | 1.75 |",
        "| enwik8 | test | Bits per byte | 1.5235 |",
        "50.0 % on average",
        "| 1 | 75.0 % |",
        "2306.11197",
    ):
        assert part in card.text
    assert "/home/ann" not in card.text and "Floating point" not in card.text
    assert any("output_dir" in remark for remark in built.remarks)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "activation_rates.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_leaves_out_what_is_not_known(built):
    card = ModelCard.load(built / "README.md")
    data = card.data.to_dict()
    assert not {"model-index", "metrics", "datasets", "language", "base_model"} & set(data)
    for heading in ("## Training", "## Results", "## Activation rates"):
        assert heading not in card.text
    assert "| Layers | 2 |" in card.text
    assert "No evaluation results" in card.text


def test_activation_rates_are_found_in_the_trainers_log(copied):
    history = [
        {
            "router/activation_rate_0": 0.5,
            "router/activation_rate_1": 0.25,
            "router/activation_rate": 0.4,
            "loss": 2.0,
        },
        {"loss": 1.0},
    ]
    (copied / "checkpoint-20").mkdir()
    (copied / "checkpoint-20" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (copied / "checkpoint-3").mkdir()
    (copied / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert read_sources(copied, 2).activation_rates == [0.5, 0.25]
    assert read_sources(copied, 3).activation_rates == []


def test_the_log_of_train_lm_is_read_up_to_the_weights_it_belongs_to(tmp_path):
    log = [
        {"step": 10, "train/loss": 3.0, "train/learning_rate": 2e-3, "router/activation_rate_0": 0.5},
        {"step": 10, "validation/bits_per_byte": 2.5},
        {"step": 20, "train/loss": 2.0, "train/learning_rate": 1e-3, "router/activation_rate_0": 0.25},
        {"step": 20, "validation/bits_per_byte": 2.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    best, final = read_sources(tmp_path / "best", 1), read_sources(tmp_path / "final", 1)
    assert (best.procedure["Optimizer steps"], final.procedure["Optimizer steps"]) == ("10", "20")
    assert (best.plain_results, final.plain_results) == ({"bits_per_byte": 2.5}, {"bits_per_byte": 2.75})
    assert (best.activation_rates, final.activation_rates) == ([0.5], [0.25])
    assert final.procedure["Highest logged learning rate"] == "0.002"
    assert read_sources(tmp_path / "other", 1).procedure == {}


def test_an_average_of_weights_has_a_score_of_its_own(tmp_path):
    scores = {"validation/bits_per_byte": 2.5, "validation/averaged_bits_per_byte": 2.25}
    logged = {"train/loss": 1.5, "router/activation_rate_0": 0.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10} | scores | logged) + "\n")
    metrics = [{"type": "bits_per_byte", "value": 2.625}]
    evaluation = {"results": [{"task": "text-generation", "dataset": {"name": "some"}, "metrics": metrics}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    averaged, final = read_sources(tmp_path / "averaged", 1), read_sources(tmp_path / "final", 1)
    assert averaged.plain_results == {"bits_per_byte": 2.25} and averaged.procedure["Optimizer steps"] == "10"
    assert final.plain_results == {"bits_per_byte": 2.5}
    assert averaged.results == [] and final.results != []
    assert averaged.activation_rates == [] and final.activation_rates == [0.25]
    assert not any("loss" in name for name in averaged.procedure)


def test_the_flat_file_of_save_metrics_is_read(copied, tmp_path):
    file = tmp_path / "eval_results.json"
    file.write_text(json.dumps({"eval_loss": 1.25, "eval_accuracy": 0.5, "eval_runtime": 9.0, "epoch": 3.0}))
    assert read_sources(copied, 2, evaluations=[file]).plain_results == {"loss": 1.25, "accuracy": 0.5}


RECORD = {
    "dataset": "enwik8", "steps": 20, "tokens_seen": 2000, "training_hours": 0.2, "tokens_per_second": 3,
    "hardware": "1 x some GPU", "command": "python examples/train_lm.py recipe.yaml --max_minutes 5",
}  # fmt: skip
LONG_CONTEXT = {
    "protocol": "The same bytes for every length.", "command": "python benchmarks/bench_long_context.py MODEL",
    "hardware": "some GPU",
    "quality": [
        {"context_bytes": 1024, "scored_bytes": 512, "bits_per_byte": 1.61},
        {"context_bytes": 262144, "scored_bytes": 512, "bits_per_byte": 1.5},
    ],
    "generation": [
        {"prompt_bytes": 1000000, "prefill_seconds": 12.34, "tokens_per_second": 80.6, "cache_bytes": 4096,
         "peak_memory_mib": None, "sample": "the ```end``` of it"},
    ],
}  # fmt: skip


@pytest.fixture
def run_folder(copied, tmp_path):
    """A run of train_lm.py with its evaluations beside `best` and `final`."""
    run = tmp_path / "run"
    shutil.copytree(copied, run / "best")
    shutil.copytree(copied, run / "final")
    log = [
        {"step": 10, "train/loss": 2.0, "train/seconds": 360.0, "train/tokens": 1000},
        {"step": 10, "validation/bits_per_byte": 2.5},
        {"step": 20, "train/loss": 1.0, "train/seconds": 720.0, "train/tokens": 2000},
        {"step": 20, "validation/bits_per_byte": 2.75},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (run / "training_record.json").write_text(json.dumps(RECORD))
    protocol = {"scored_tokens": 39999, "bytes": 40000, "context": None, "dtype": "float32"}
    command = "python examples/evaluate_lm.py MODEL --split test"
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "protocol": protocol, "command": command}))
    second = json.loads(json.dumps(EVALUATION))
    second["results"][0]["dataset"] = {"name": "excerpt"}
    second["activation_rates"] = [0.5, 0.5]
    (run / "evaluation_excerpt.json").write_text(json.dumps(second))
    (run / "long_context.json").write_text(json.dumps({"long_context": LONG_CONTEXT}))
    return run


@pytest.mark.parametrize(
    "context, stride, words",
    [
        (512, None, "up to 511 tokens before it"),
        (8192, 2048, "6,144 to 8,191 tokens before it (fewer in the first 8,192 tokens)"),
        # A text shorter than a window is all in the first one.
        (65536, 2048, "up to 65,535 tokens before it"),
    ],
)
def test_the_card_says_how_windows_were_scored(run_folder, tmp_path, context, stride, words):
    path = run_folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["protocol"].update(context=context, stride=stride)
    path.write_text(json.dumps(evaluation))
    build_folder(run_folder / "best", tmp_path / "out", card=CardOptions(records=run_folder))
    assert f"scored once each, with {words} as context, in float32:" in (tmp_path / "out/README.md").read_text("utf-8")


def test_the_card_is_written_from_the_records_of_a_run(run_folder, tmp_path):
    options = CardOptions(records=run_folder, data_license="CC BY-SA 3.0", repo_id="ann/boat")
    build_folder(run_folder / "best", tmp_path / "out", card=options)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    for part in (
        "Licence of the data: CC BY-SA 3.0.",
        "| Data | enwik8 |",
        # Of the step whose weights these are, not of the last.
        "| Optimizer steps | 10 |",
        "| Tokens seen | 1,000 |",
        "| Training time without validation and saving (h) | 0.1 |",
        "| Hardware | 1 x some GPU |",
        "```\npython examples/train_lm.py recipe.yaml --max_minutes 5\n```",
        "| enwik8 | test | Bits per byte | 1.5235 |",
        "| excerpt |  | Bits per byte | 1.5235 |",
        "enwik8: 39,999 tokens of 40,000 bytes scored once each, with everything before it as context, in float32:",
        "```\npython examples/evaluate_lm.py MODEL --split test\n```",
        "| 1 | 75.0 % |",
        "The same bytes for every length.",
        "| 262,144 | 512 | 1.5000 |",
        "| 1,000,000 | 12.3 | 81 | 4,096 |  |",
        "````text\nthe ```end``` of it\n````",
    ):
        assert part in card.text
    assert len(card.data.eval_results) == 2
    # Without being told, the folders of a run are known by their names.
    sources = read_sources(run_folder / "final", 2)
    assert (sources.procedure["Optimizer steps"], sources.procedure["Tokens seen"]) == ("20", "2,000")
    assert len(sources.results) == 2 and sources.long_context == LONG_CONTEXT
    named = read_sources(run_folder / "final", 2, evaluations=[run_folder / "evaluation_excerpt.json"])
    assert (len(named.results), named.activation_rates, named.long_context) == (1, [0.5, 0.5], None)
    with pytest.raises(HubUploadError, match="is not the folder of a run"):
        read_sources(run_folder / "final", 2, records=tmp_path)
    for name, content in (
        ("long_context.json", {"long_context": {**LONG_CONTEXT, "quality": [{"context_bytes": 1}]}}),
        ("evaluation.json", {**EVALUATION, "protocol": {"bytes": 3}}),
        ("training_record.json", {"command": 3}),
    ):
        (run_folder / name).write_text(json.dumps(content))
        with pytest.raises(HubUploadError, match=name):
            read_sources(run_folder / "final", 2)


def test_weights_are_rounded_on_request(copied, tmp_path):
    arguments = ["build", "--model", str(copied), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(arguments) == 0
    weights, before = load_file(tmp_path / "out/model.safetensors"), load_file(copied / "model.safetensors")
    assert all(torch.equal(weights[name], before[name].bfloat16()) for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "with-a-map"])
def test_a_folder_without_code_is_verified_with_the_packages(mapped, copied, built, tmp_path, monkeypatch):
    """What the processes are given is what was built with code, and verifies in another test. A model that came from
    the Hub keeps the map to its code where this package's class saves it again."""
    given = []
    if mapped:
        edit_config(copied, auto_map=auto_map())

    def read_files(source, saved, stage, home):
        if stage == "first":
            given.append({file.name: file.read_bytes() for file in source.iterdir()})
        yield Check(stage, "")

    monkeypatch.setattr("hub_upload.verify._run_child", read_files)
    checks = verify_folder(copied)
    assert [check.name for check in checks] == ["code", "first", "again"]
    expected = {file.name: file.read_bytes() for file in built.iterdir()}
    assert given[0].keys() == expected.keys()
    # The card names another repository.
    assert {name for name, data in given[0].items() if data != expected[name]} == {"README.md"}
    assert not list(copied.glob("*.py"))


def test_code_can_be_links(copied, built, tmp_path):
    """Of a folder that stays in the checkout: the same files to whoever reads them, and no copy."""
    output = tmp_path / "deeper/out"
    for overwrite in ([], ["--overwrite"]):
        assert main(["build", "--model", str(copied), "--output", str(output), "--link-code", *overwrite]) == 0
    assert {path.name for path in output.iterdir()} == {path.name for path in built.iterdir()}
    for file in code_files():
        link = output / file.name
        assert link.is_symlink() and not os.readlink(link).startswith("/") and link.resolve() == file.resolve()
    assert all(path.is_symlink() == (path.suffix == ".py") for path in output.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"results": {}}),
        json.dumps({"results": [{"task": "x"}]}),
        json.dumps({"results": [{"task": "x", "dataset": {"name": "y"}, "metrics": [{"type": "z", "value": "1"}]}]}),
        '{"results": [{"task": "x", "dataset": {"name": "y"}, "metrics": [{"type": "z", "value": NaN}]}]}',
        json.dumps({"activation_rates": [0.5]}),
        json.dumps({"activation_rates": [0.5, 1.5]}),
    ],
)
def test_bad_evaluation_files_are_refused(content, copied, tmp_path):
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    assert "evaluation.json" in refused(copied, tmp_path, card=CardOptions(evaluations=[file]))


def test_named_files_must_exist(copied, tmp_path):
    assert "nowhere.json" in refused(copied, tmp_path, card=CardOptions(record=tmp_path / "nowhere.json"))


def test_a_finished_card_is_used_as_it_is(copied, tmp_path):
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n")
    build_folder(copied, tmp_path / "out", card=CardOptions(card=card))
    assert (tmp_path / "out" / "README.md").read_text() == card.read_text()


def test_a_built_folder_verifies_where_the_package_is_not(built, monkeypatch):
    """A Hub folder loads in a fresh process without this package, generates, fine-tunes, saves again and reloads."""

    def start(command, **options):
        # One process of this file's starts anew, as all do where it counts.
        return (subprocess if command[-1] == "first" else strangers).Popen(command, **options)

    monkeypatch.setattr("hub_upload.verify.subprocess.Popen", start)
    seen = []
    checks = verify_folder(built, on_check=seen.append)
    assert seen == checks
    first = [check.name for check in checks if not check.again]
    again = [check.name for check in checks if check.again]
    assert first == [
        "AutoConfig",
        "AutoModelForCausalLM",
        "AutoModel",
        "auto_map",
        "AutoTokenizer",
        "forward",
        "generation",
        "LoRA step",
        "save and reload",
    ]
    assert again == first[:-1]
    assert next(check.detail for check in checks if check.name == "auto_map") == ", ".join(sorted(auto_map()))
    texts = [check.detail for check in checks if check.name == "generation"]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "layers_seqboat.py").unlink(), "layers_seqboat"),
        (lambda f: edit_config(f, auto_map={"AutoConfig": "configuration_seqboat.SeqBoatConfig"}), "verify"),
        (lambda f: edit_config(f, auto_map={**auto_map(), "AutoModel": "modeling_seqboat.Nothing"}), "Nothing"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
    ],
)
def test_verification_finds_what_is_missing(damage, words, built, tmp_path):
    shutil.copytree(built, tmp_path / "hub")
    damage(tmp_path / "hub")
    with pytest.raises(HubUploadError, match=words):
        verify_folder(tmp_path / "hub")


FINE_TUNE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert "modeling_seqboat" not in sys.modules
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = tokenizer("to be or not to be", return_tensors="pt")["input_ids"]
model.train()(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
model.save_pretrained(target)
tokenizer.save_pretrained(target)
print(model.lm_head.weight.double().sum().item())
"""


@pytest.fixture(scope="module")
def tuned(built, tmp_path_factory):
    """What a stranger saves who fine-tuned the published model, and the sum of its embedding's weights."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "tune.py").write_text(FINE_TUNE)
    result = in_a_stranger_s_process(folder, "tune.py", built, folder / "tuned")
    return folder / "tuned", float(result.stdout.split()[-1])


def in_a_stranger_s_process(folder, *command):
    result = strangers.run(folder, *command)
    assert result.returncode == 0, result.stderr
    return result


def test_a_model_fine_tuned_from_the_hub_is_saved_and_built_again(tuned, tmp_path):
    """A stranger fine-tunes the published model; what they save can be published in turn."""
    folder, total = tuned
    again = build_folder(folder, tmp_path / "again")
    assert again.model_class == "SeqBoatForCausalLM"
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == auto_map()
    weights = load_file(tmp_path / "again" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].double().sum().item() == total


@pytest.mark.parametrize("kind", ["tokens", "values"])
def test_classifiers_are_built_and_verified(kind, tmp_path, monkeypatch):
    extra = {"input_type": "values", "vocab_size": 40} if kind == "values" else {}
    special = {} if kind == "values" else {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = SeqBoatConfig(
        **{"vocab_size": 40, **special, **extra},
        hidden_size=16,
        num_hidden_layers=2,
        state_size=2,
        qk_head_dim=8,
        v_head_dim=24,
        memory_size=8,
        bidirectional=True,
        num_labels=3,
    )
    modeling_seqboat.SeqBoatForSequenceClassification(config).save_pretrained(tmp_path / "model")
    build_folder(tmp_path / "model", tmp_path / "out")
    if kind == "values":
        verify_once(monkeypatch)
    names = [check.name for check in verify_folder(tmp_path / "out")]
    assert "AutoModelForSequenceClassification" in names and "LoRA step" in names


def test_text_generation_pipeline_runs_on_what_a_stranger_saved(tuned, tmp_path):
    """It loads on its own, in a process that has neither this package nor the Hub folder that it was tuned from."""
    (tmp_path / "write.py").write_text(
        "import sys\nfrom transformers import pipeline\n"
        "generate = pipeline('text-generation', model=sys.argv[1], trust_remote_code=True)\n"
        "assert 'modeling_seqboat' not in sys.modules\n"
        "print(generate.model.lm_head.weight.double().sum().item())\n"
        "text = generate('To be', max_new_tokens=6, do_sample=False)[0]['generated_text']\n"
        "chat = [{'role': 'user', 'content': 'Hi'}]\n"
        "answer = generate(chat, max_new_tokens=4, do_sample=False)[0]['generated_text'][-1]\n"
        "assert text.startswith('To be') and answer['role'] == 'assistant', (text, answer)\n"
    )
    folder, total = tuned
    result = in_a_stranger_s_process(tmp_path, "write.py", folder)
    assert float(result.stdout.split()[0]) == total


HOSTILE = (
    "x\n---\n# Owned",
    "<img src=x onerror=alert(1)>",
    "a](javascript:alert(1))",
    "a | b |\n| c",
    "\u202etxt",
    "`" * 9 + "x",
)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "option", ["license", "data_license", "base_model", "repo_id", "datasets", "tags", "languages"]
)
def test_a_card_holds_no_markup_of_an_option(option, text, copied, tmp_path):
    value = [text] if option in ("datasets", "tags", "languages") else text
    try:
        build_folder(copied, tmp_path / "out", card=CardOptions(**{option: value}))
    except HubUploadError as error:
        assert f"--{option.rstrip('s').replace('_', '-')}" in str(error) and not (tmp_path / "out").exists()
        return
    card = ModelCard.load(tmp_path / "out/README.md")
    assert option in ("data_license", "datasets", "tags")
    for forbidden in ("<img", "\n# Owned", "](java", "\u202e"):
        assert forbidden not in card.text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_holds_no_markup_of_a_record(text, copied, tmp_path):
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["results"][0]["dataset"] = {"name": text, "type": text, "split": text}
    evaluation["results"][0]["metrics"][0]["name"] = text
    evaluation["protocol"] = {"scored_tokens": 9, "bytes": 9, "context": None, "dtype": text}
    evaluation["command"] = text
    (copied / "evaluation.json").write_text(json.dumps(evaluation))
    (copied / "training_record.json").write_text(
        json.dumps({"dataset": text, "hardware": text, "betas": [text], "command": text})
    )
    build_folder(copied, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    body = "".join(card.text.split("```")[::2])
    for forbidden in ("<img", "\n# Owned", "[a](", "](java", "\n| c"):
        assert forbidden not in body, forbidden
    assert "\u202e" not in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} <= {3, 5}
    assert card.data.to_dict()["model-index"][0]["results"][0]["dataset"]["name"] == " ".join(
        "".join(c if c.isprintable() else " " for c in text).split()
    )


@pytest.mark.parametrize("name", ["evaluation.json", "training_record.json", "trainer_state.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "\xff", "[1]", "null", '{"results": [{"task": "t"'])
def test_files_beside_a_model_are_named_when_they_are_broken(name, content, copied, tmp_path):
    (copied / name).write_bytes(content.encode("latin-1"))
    assert name in refused(copied, tmp_path)


def test_a_finished_card_must_have_metadata_that_can_be_read(copied, tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: [mit\n---\n\n# Mine\n")
    assert "card.md cannot be read" in refused(copied, tmp_path, card=CardOptions(card=tmp_path / "card.md"))


def test_an_index_names_files_of_the_folder_alone(copied, tmp_path):
    secret = tmp_path / "secret.safetensors"
    shutil.copyfile(copied / "model.safetensors", secret)
    names = load_file(secret)
    (copied / "model.safetensors").rename(copied / "model-00001-of-00001.safetensors")
    index = copied / "model.safetensors.index.json"
    for shard in ("../secret.safetensors", str(secret), 5):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
        assert "which is no file of the folder" in refused(copied, tmp_path)
    index.write_text("[" * 100_000)
    assert "is no index of weights" in refused(copied, tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("IO error: No space left on device (os error 28)")],
)
def test_a_full_disk_is_reported_with_the_place(error, tmp_path):
    with (
        pytest.raises(OSError, match="out cannot be written.*No space left"),
        staged_folder(tmp_path / "out") as stage,
    ):
        (stage / "half").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_token_behind_a_letter_is_one(copied, tmp_path):
    assert FAKE_TOKEN not in redact(f"keyx{FAKE_TOKEN} 5{FAKE_TOKEN}")
    (copied / "chat_template.jinja").write_text(f"x{FAKE_TOKEN}")
    assert "access token" in refused(copied, tmp_path)
