"""The converter: published checkpoints reproduce their logits, and what cannot be converted is named."""

import copy
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from example_scripts import imported
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import modeling_seqboat
from hub_upload.byte_dictionary import byte_permutation, read_byte_dictionary
from hub_upload.cli import main
from hub_upload.convert import convert_checkpoint, load_published
from hub_upload.errors import HubUploadError
from hub_upload.published_options import PUBLISHED_TRUNCATION, read_options

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests/goldens"
LANGUAGE_MODELS = ("lm_rotary", "lm_relu2_ffn")
ENCODERS = ("encoder_text", "encoder_pixels")
PUBLISHED_PAD = 1


@pytest.fixture(scope="module")
def checkpoint():
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(GOLDENS / "lm_rotary.pt", weights_only=True)


@pytest.fixture
def write(tmp_path, checkpoint):
    """Write a variant of the checkpoint: options changed (None deletes one), weights edited in place."""

    def write_variant(options=None, edit=None, source=checkpoint, **entries):
        variant = {**copy.deepcopy(source), **entries}
        for name, value in (options or {}).items():
            if value is Ellipsis:
                delattr(variant["args"], name)
            else:
                setattr(variant["args"], name, value)
        if edit is not None:
            edit(variant["model"])
        path = tmp_path / "variant.pt"
        torch.save(variant, path)
        return path

    return write_variant


def refused(path, tmp_path, dictionary=None):
    """The message of a refused conversion; nothing may be left beside the checkpoint."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(HubUploadError) as caught:
        convert_checkpoint(path, tmp_path / "out", dictionary)
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_reproduces_its_golden(name, tmp_path):
    convert_checkpoint(GOLDENS / f"{name}.pt", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    golden = load_file(GOLDENS / f"{name}.safetensors")
    real = golden["input_ids"] != PUBLISHED_PAD
    output = model(
        golden["input_ids"],
        attention_mask=real.long(),
        labels=golden["input_ids"].masked_fill(~real, -100),
        use_cache=False,
    )
    torch.testing.assert_close(output.logits[real], golden["logits"][real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, golden["loss"][0], atol=1e-4, rtol=1e-4)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (1, 0, 2)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_dictionary_puts_the_embedding_into_byte_order(name, tmp_path):
    dictionary = GOLDENS / f"{name}.dict.txt"
    convert_checkpoint(GOLDENS / f"{name}.pt", tmp_path / "out", dictionary)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer) == 264

    symbols = [int(line.split()[0]) for line in dictionary.read_text().splitlines()]
    to_bytes = torch.tensor([257, 256, 258, symbols[0], *symbols])
    golden = load_file(GOLDENS / f"{name}.safetensors")
    ids, real = golden["input_ids"], golden["input_ids"] != PUBLISHED_PAD
    real_ids = ids[real]
    assert not (real_ids == 3).any(), "the golden would need <unk>, which has no single byte"
    logits = model(to_bytes[ids], attention_mask=real.long(), use_cache=False).logits
    known = torch.tensor([0, 1, 2, *range(4, 4 + len(symbols))])
    torch.testing.assert_close(
        logits[real][:, to_bytes[known]], golden["logits"][real][:, known], atol=1e-4, rtol=1e-4
    )


def test_bytes_that_the_dictionary_lacks_share_the_unknown_row_and_are_never_generated(tmp_path, checkpoint):
    convert_checkpoint(GOLDENS / "lm_rotary.pt", tmp_path / "out", GOLDENS / "lm_rotary.dict.txt")
    embedding = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    published = checkpoint["model"]["decoder.embed_tokens.weight"]
    symbols = [int(line.split()[0]) for line in (GOLDENS / "lm_rotary.dict.txt").read_text().splitlines()]
    lacking = sorted(set(range(256)) - set(symbols))
    assert torch.equal(embedding[lacking], published[3].expand(len(lacking), -1))
    assert torch.equal(embedding[[257, 256, 258]], published[:3])
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.suppress_tokens == lacking
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (256, 257, 258)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("%&'(", return_tensors="pt")["input_ids"]
    new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=True)
    assert not set(new[0, prompt.shape[1] :].tolist()) & set(lacking)


def test_the_checkpoint_in_the_checkout_is_converted_as_the_page_says(tmp_path, monkeypatch):
    """By the commands of docs/publishing.md and of the checkpoint's page, which find the bits per byte they say."""
    folder = ROOT / "examples/published"
    pages = [(ROOT / "docs/publishing.md").read_text("utf-8"), (folder / "README.md").read_text("utf-8")]
    lines = re.findall(r"^seqboat (.+outputs/converted.*)$", pages[0], re.M)
    assert [line.split()[0] for line in lines] == ["convert", "evaluate"]
    assert all(f"seqboat {line}" in pages[1] for line in lines)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 200_000
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert main(lines[0].split()) == 0
    (evaluate_lm,) = imported(monkeypatch, "evaluate_lm")
    found = evaluate_lm.main(lines[1].split()[1:])["results"][0]["metrics"][0]["value"]
    for page in pages:
        assert f"{found:.2f} bits per" in " ".join(page.split())


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_reproduces_its_golden(name, tmp_path):
    from transformers import AutoModelForSequenceClassification

    convert_checkpoint(GOLDENS / f"{name}.pt", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    golden = load_file(GOLDENS / f"{name}.safetensors")
    if "input_ids" in golden:
        inputs = {"input_ids": golden["input_ids"], "attention_mask": (golden["input_ids"] != PUBLISHED_PAD).long()}
    else:
        inputs = {"input_values": golden["input_values"]}
    output = model(**inputs, labels=golden["labels"])
    torch.testing.assert_close(output.logits, golden["logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, golden["loss"][0], atol=1e-4, rtol=1e-4)


def test_weights_keep_their_dtype(write, tmp_path):
    def halve(model):
        for name, tensor in model.items():
            model[name] = tensor.half()

    convert_checkpoint(write(edit=halve), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.dtype == torch.float16


def test_an_untied_output_matrix_is_kept(write, tmp_path):
    def untie(model):
        model["decoder.output_projection.weight"] = model["decoder.output_projection.weight"] + 1

    path = write({"share_decoder_input_output_embed": False}, untie)
    convert_checkpoint(path, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_always_active_checkpoints_have_no_router(write, tmp_path):
    def drop_router(model):
        for name in list(model):
            if ".q_router." in name:
                del model[name]
            elif ".hx_proj." in name:
                model[name] = model[name][2:].clone()

    convert_checkpoint(write({"always_act": True}, drop_router), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.router_type == "always"
    assert not [name for name, _ in model.named_parameters() if "router" in name]


def test_options_become_config_fields():
    described = read_options(
        Namespace(
            arch="slag_lm_enwik8_base",
            dropout=0.1,
            hidden_dropout=0.2,
            attention_dropout=0.3,
            activation_dropout=0.4,
            act_bias=0.5,
            init_temp_scale=0.6,
            decoder_ffn_embed_dim=-1,
            decoder_chunk_size=64,
            rel_pos_bias="simple",
            local_pos=True,
            max_target_positions=99,
            no_affine_final_norm=False,
            no_scale_embedding=True,
            lr=[0.005],
            seed=3,
        )
    )
    expected = {
        "hidden_dropout": 0.1,
        "value_dropout": 0.2,
        "attention_dropout": 0.3,
        "activation_dropout": 0.4,
        "activation_bias": 0.5,
        "router_temperature_init": 0.6,
        "intermediate_size": 0,
        "memory_size": 64,
        "position_embedding_type": "local",
        "max_position_embeddings": 99,
        "final_norm_affine": True,
        "scale_embeddings": False,
        "ssm_truncation": PUBLISHED_TRUNCATION,
        "num_hidden_layers": 14,
    }
    assert {name: described.fields[name] for name in expected} == expected
    assert described.warnings == []


def test_encoder_options_become_config_fields():
    described = read_options(
        Namespace(arch="slag_sc_raw", act_dropout=0.2, norm_type="syncbatchnorm", sen_rep_type="cls", use_nli=True)
    )
    expected = {
        "value_dropout": 0.2,
        "activation_dropout": 0.2,
        "norm_type": "batchnorm",
        "pooling_type": "first",
        "pair_features": "nli",
        "input_type": "values",
        "add_absolute_positions": True,
        "bidirectional": True,
        "hidden_size": 60,
        "num_labels": 10,
    }
    assert {name: described.fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adaptive_input": True}, "adaptive_input=True"),
        ({"adaptive_softmax_cutoff": "1,2"}, "adaptive_softmax_cutoff='1,2'"),
        ({"decoder_input_dim": 12}, "decoder_input_dim=12"),
        ({"normalize_embedding": True}, "normalize_embedding=True"),
        ({"decoder_chunk_size": 0}, "decoder_chunk_size=0"),
        ({"decoder_chunk_size": -1}, "decoder_chunk_size=-1"),
        ({"use_p": True}, "use_p=True"),
        ({"layer_type": "mega"}, "layer_type='mega'"),
        ({"rel_pos_bias": "alibi"}, "rel_pos_bias='alibi'"),
        ({"normalization_type": "groupnorm"}, "normalization_type='groupnorm'"),
        ({"attention_activation_fn": "sigmoid"}, "attention_activation='sigmoid'"),
        ({"arch": "transformer_lm"}, "arch='transformer_lm'"),
        ({"arch": ...}, "arch=None"),
    ],
)
def test_options_without_a_counterpart_are_refused_by_name_and_value(options, words, write, tmp_path):
    assert words in refused(write(options), tmp_path)


def test_deep_classifiers_are_refused():
    with pytest.raises(HubUploadError, match="classifier_layers=2"):
        read_options(Namespace(arch="slag_lra_listop", classifier_layers=2))


@pytest.mark.parametrize("option", ["feature_dropout", "decoder_layerdrop"])
def test_training_only_options_warn(option, write, tmp_path, capsys):
    path = write({option: 0.25})
    status = main(["convert", "--checkpoint", str(path), "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert status == 0
    assert f"{option}=0.25" in captured.err


def test_missing_options_take_the_published_defaults(write, tmp_path):
    path = write(dict.fromkeys(["rel_pos_bias", "normalize_before", "truncation_length", "dropout"], ...))
    convert_checkpoint(path, tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.position_embedding_type, config.norm_first) == ("rotary", True)
    assert (config.ssm_truncation, config.hidden_dropout) == (2048, 0.15)


def test_a_truncation_is_kept(write, tmp_path):
    convert_checkpoint(write({"truncation_length": 16}), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.ssm_truncation == 16


def test_buffers_and_further_entries_are_ignored(write, tmp_path):
    def add_buffers(model):
        model["decoder.pos_emb.inv_freq"] = torch.zeros(3)

    convert_checkpoint(write(edit=add_buffers, optimizer_history=[{"lr": 1.0}]), tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda model: model.pop("decoder.layers.1.slag_layer.mx_proj.weight"),
            "missing: model.layers.1.attention.in",
        ),
        (lambda model: model.update({"decoder.extra.weight": torch.zeros(2)}), "decoder.extra.weight"),
        (
            lambda model: model.update({"decoder.layers.7.slag_layer.gamma": torch.zeros(2, 8)}),
            "left over: decoder.layers.7.slag_layer.gamma (2, 8)",
        ),
        (
            lambda model: model.update({"decoder.layers.0.slag_layer.h_proj.weight": torch.zeros(24, 41)}),
            "decoder.layers.0.slag_layer.h_proj.weight gives (24, 41)",
        ),
        (lambda model: model["decoder.output_projection.weight"].mul_(2), "differs from decoder.embed_tokens.weight"),
        (lambda model: model.pop("decoder.embed_tokens.weight"), "decoder.embed_tokens.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(edit, words, write, tmp_path):
    assert words in refused(write(edit=edit), tmp_path)


class _Foreign:
    pass


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "foreign object", "no args", "no model", "list"])
def test_damaged_and_foreign_checkpoints_are_refused(damage, tmp_path, checkpoint):
    """A corrupt or foreign checkpoint is refused and nothing is left behind."""
    path = tmp_path / "x.pt"
    if damage == "truncated":
        content = (GOLDENS / "lm_rotary.pt").read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign object":
        path.write_bytes(pickle.dumps({"args": Namespace(), "model": _Foreign()}))
    elif damage == "no args":
        torch.save({"model": checkpoint["model"]}, path)
    elif damage == "no model":
        torch.save({"args": checkpoint["args"]}, path)
    elif damage == "list":
        torch.save([1, 2], path)
    assert "x.pt" in refused(path, tmp_path)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "x.pt"
    torch.save({"args": Namespace(), "model": {"w": Payload()}}, path)
    refused(path, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_safe_globals_are_taken_back(tmp_path):
    load_published(GOLDENS / "lm_rotary.pt")
    assert Namespace not in torch.serialization.get_safe_globals()


def test_an_existing_folder_is_not_overwritten_unasked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(HubUploadError, match="not empty"):
        convert_checkpoint(GOLDENS / "lm_rotary.pt", out)
    with pytest.raises(HubUploadError, match="no model folder"):
        convert_checkpoint(GOLDENS / "lm_rotary.pt", out, overwrite=True)
    assert [file.name for file in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").rename(out / "config.json")
    convert_checkpoint(GOLDENS / "lm_rotary.pt", out, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def fail(self, folder, **kwargs):
        (Path(folder) / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(modeling_seqboat.SeqBoatForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(GOLDENS / "lm_rotary.pt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_are_sharded(tmp_path):
    convert_checkpoint(GOLDENS / "lm_rotary.pt", tmp_path / "one")
    convert_checkpoint(GOLDENS / "lm_rotary.pt", tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_dictionary_lines_are_checked(tmp_path):
    file = tmp_path / "dict.txt"
    file.write_text("101 5\n0 4\nmadeupword0000 0\nmadeupword0001 0\n")
    symbols = read_byte_dictionary(file)
    assert symbols == [101, 0, None, None]
    permutation = byte_permutation(symbols, 264, pad=256, bos=257, eos=258, published_rows=8)
    assert [permutation.rows[i] for i in (101, 0, 1, 256, 257, 258, 259)] == [4, 5, 3, 1, 0, 2, 3]
    assert permutation.unknown_bytes == [byte for byte in range(256) if byte not in (0, 101)]
    with pytest.raises(HubUploadError, match="8 rows|ids, but the checkpoint's embedding has 9 rows"):
        byte_permutation(symbols, 264, pad=256, bos=257, eos=258, published_rows=9)


@pytest.mark.parametrize("text", ["the 12\n", "256 1\n", "-1 1\n", "7 1\n7 1\n", "²\n", "madeupword0000 0\n", "\n"])
def test_foreign_dictionaries_are_refused(text, tmp_path):
    file = tmp_path / "dict.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(HubUploadError, match="dict.txt"):
        read_byte_dictionary(file)


GAMMA = "decoder.layers.0.slag_layer.gamma"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_hidden_dim", 10**30), ("decoder_hidden_dim", 10**400), ("decoder_embed_dim", -5),
        ("decoder_layers", 10**6),
        ("decoder_layers", 2.5), ("decoder_layers", True), ("truncation_length", "x"),
        ("truncation_length", float("nan")),
        ("decoder_chunk_size", [1]), ("decoder_chunk_size", "1"), ("normalization_type", [1]), ("rel_pos_bias", {}),
        ("decoder_ffn_embed_dim", float("nan")), ("decoder_ffn_embed_dim", "x"), ("dropout", float("inf")),
        ("use_p", torch.zeros(2)), ("arch", torch.zeros(2)), ("arch", [1]), ("activation_fn", ["silu"]),
        ("max_target_positions", 10**18), ("share_decoder_input_output_embed", "yes"),
    ],
)  # fmt: skip
def test_options_of_any_kind_are_refused_by_name(name, value, write, tmp_path):
    others = "decoder_layers", "decoder_embed_dim", "dropout", "activation_fn", "share_decoder_input_output_embed"
    assert name in refused(write({name: value}), tmp_path) or name in others


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda old: torch.zeros(1).expand(10**6, 10**6), "claim"),
        (lambda old: old.to_sparse(), "no plain tensor"),
        (lambda old: old.to("meta"), "no plain tensor"),
        (lambda old: old.to(torch.int32), "is torch.int32"),
        (lambda old: old.to(torch.complex64), "is torch.complex64"),
        (lambda old: old.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (lambda old: torch.full_like(old, float("nan")), "not finite"),
        (lambda old: torch.full_like(old, float("-inf")), "not finite"),
        (lambda old: old.new_zeros(()), "wrong shape"),
        (lambda old: old[:0], "wrong shape"),
    ],
)
def test_weights_of_any_kind_are_refused_by_name(make, words, write, tmp_path):
    for name in (GAMMA, "decoder.layers.1.slag_layer.hx_proj.weight"):
        said = refused(write(edit=lambda model, name=name: model.update({name: make(model[name])})), tmp_path)
        assert words in said and (name in said or words == "claim")


def test_names_and_entries_of_any_kind_are_refused(write, tmp_path):
    assert "a weight without a name: 1" in refused(
        write(edit=lambda model: model.update({1: torch.zeros(1)})), tmp_path
    )
    huge = {"decoder.layers.99999999999999999999.slag_layer.gamma": torch.zeros(2, 8)}
    assert "left over" in refused(write(edit=lambda model: model.update(huge)), tmp_path)
    bomb = ()
    for _ in range(60):
        bomb = (bomb, bomb)
    torch.save({1: bomb, "args": [bomb]}, tmp_path / "bomb.pt")
    assert "no options under 'args'; it holds 'args', 1" in refused(tmp_path / "bomb.pt", tmp_path)
    assert "use_p=<list>" in refused(write({"use_p": [bomb]}), tmp_path)


def key_of_keys(depth: int, width: int) -> bytes:
    """A pickle of {t: 1} where t is a tuple of `width` times one tuple, which is one of `width` times one tuple,
    ..."""
    data = b"\x80\x02)q\x00"
    for level in range(depth):
        data += b"(" + b"h" + b"h".join([bytes([level])] * width) + b"tq" + bytes([level + 1]) + b"0"
    return data + b"}h" + bytes([depth]) + b"K\x01s."


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (key_of_keys(60, 2), "more than 20,000,000 entries"),
        (key_of_keys(3, 3000), "more than 20,000,000 entries"),
        (b"\x80\x02(" + b"K\x01" * 40_000 + b"tq\x000}(" + b"h\x00K\x01" * 40_000 + b"u.", "20,000,000 entries"),
        (key_of_keys(60, 2)[:-7] + b"ccollections\nOrderedDict\n]h<K\x01\x86a\x85R.", "more than 20,000,000 entries"),
        (b"\x80\x02)" + b"\x85" * 10**6 + b"q\x000}h\x00K\x01s.", "nested more than 200 deep"),
        (b"\x80\x02}.", "no options under 'args'"),
        (b"\x80\x02}h\x07.", "cannot be read"),
    ],
)
@pytest.mark.parametrize("old_format", [False, True])
def test_keys_that_would_take_for_ever_are_not_read(data, words, old_format, tmp_path):
    path = tmp_path / "slow.pt"
    if old_format:
        head = (pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(b"".join(head) + data + pickle.dumps([], 2))
    else:
        torch.save({}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, data if name.endswith("data.pkl") else content)
    assert words in refused(path, tmp_path)


def test_an_archive_that_unpacks_to_more_than_it_has_is_not_read(tmp_path):
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(GOLDENS / "lm_rotary.pt") as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        target.writestr("lm_rotary/data/999", bytes(1 << 22))
    assert "unpacks to" in refused(packed, tmp_path)


def test_tied_and_shared_numbers_are_converted_apart(write, tmp_path):
    def share(model):
        model["decoder.layers.0.slag_layer.move.delta"] = model["decoder.layers.0.slag_layer.move.alpha"]

    convert_checkpoint(write(edit=share), tmp_path / "out")
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(loaded["model.layers.0.ssm.delta"], loaded["model.layers.0.ssm.alpha"])
