"""The config class: values and contradictions are refused by name, what is accepted survives every way of copying."""

import copy
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM

PRESETS = [
    "0.4b",
    "1.3b",
    "enwik8",
    "lra-image",
    "lra-listops",
    "lra-pathfinder",
    "lra-pathx",
    "lra-retrieval",
    "lra-text",
    "small",
    "speech-commands-10",
    "tiny",
]
LOGGER = "modeling_seqboat.configuration_seqboat.logger.warning_once"


def test_defaults_are_the_enwik8_shape_with_the_byte_vocabulary():
    config = SeqBoatConfig()
    preset = SeqBoatConfig.from_preset("enwik8")
    assert preset.hidden_dropout == 0.15 and config.hidden_dropout == 0
    preset.hidden_dropout = 0
    own = config.to_dict()
    assert {name: value for name, value in preset.to_dict().items() if name in own} == {
        **own,
        "architectures": ["SeqBoatForCausalLM"],
    }
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (264, 256, 257, 258)
    assert (config.num_attention_heads, config.head_dim) == (1, 128)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_dropout", 2),
        ("hidden_dropout", True),
        ("hidden_dropout", "0.1"),
        ("hidden_dropout", float("nan")),
        ("value_dropout", 1.0),
        ("hidden_size", 0),
        ("hidden_size", 16.0),
        ("hidden_size", True),
        ("num_hidden_layers", "2"),
        ("ssm_truncation", 0),
        ("qk_initializer_range", -0.1),
        ("router_initializer_range", "0.02"),
        ("intermediate_size", -1),
        ("norm_eps", 0),
        ("rope_theta", 10**400),
        ("router_temperature_init", float("inf")),
        ("activation_bias", float("-inf")),
        ("norm_first", 1),
        ("use_cache", "yes"),
        ("norm_type", "layer_norm"),
        ("ssm_type", "s4"),
        ("router_type", "top_k"),
        ("attention_activation", None),
        ("position_embedding_type", "alibi"),
        ("hidden_act", "swoosh"),
        ("kernel_backend", "cuda"),
        ("pooling_type", "max"),
        ("pair_features", True),
        ("pad_token_id", -1),
        ("bos_token_id", 1.0),
        ("eos_token_id", []),
        ("num_attention_heads", 0),
        # Of transformers' own, which takes them.
        ("num_labels", -1),
        ("num_labels", "3"),
        ("num_labels", 10**7),
        ("problem_type", "classification"),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_changes_nothing(field, value):
    with pytest.raises(ValueError, match=rf"{field}="):
        SeqBoatConfig(**{field: value})
    config = SeqBoatConfig()
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match=rf"{field}="):
        setattr(config, field, value)
    assert config == before


# From which config, what is set, and whether it can be.
UPDATES = [
    ({}, {"bidirectional": True, "use_cache": False}, True),
    ({}, {"bidirectional": True, "use_cache": None}, True),
    ({"bidirectional": True}, {"bidirectional": False, "use_cache": True}, True),
    ({}, {"bidirectional": True, "use_cache": False, "norm_type": "batchnorm", "input_type": "values"}, True),
    ({}, {"bidirectional": True, "use_cache": False, "norm_type": "batchnorm", "add_absolute_positions": True}, True),
    ({"ssm_truncation": 5}, {"ssm_type": "s4d", "ssm_truncation": None}, True),
    ({}, {"ssm_type": "s4d", "ssm_truncation": 5}, False),
    ({"router_target_rate": 0.5}, {"router_type": "always", "router_target_rate": None}, True),
    ({}, {"qk_head_dim": 7, "position_embedding_type": "none", "head_dim": 7}, True),
    ({}, {"qk_head_dim": 7, "position_embedding_type": "none", "head_dim": 8}, False),
    ({}, {"vocab_size": 20, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": [3, 4]}, True),
    ({}, {"vocab_size": 20, "pad_token_id": 20, "bos_token_id": 2, "eos_token_id": [3, 4]}, False),
    ({}, {"vocab_size": 300, "pad_token_id": 299}, True),
    ({}, {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}, True),
    ({}, {"hidden_dropout": 0.1, "num_labels": -1}, False),
]


@pytest.mark.parametrize(("base", "changes", "accepted"), UPDATES)
def test_update_does_not_depend_on_the_order_of_its_keys(base, changes, accepted):
    found = []
    for names in itertools.permutations(changes):
        config = SeqBoatConfig(**base)
        before = copy.deepcopy(config)
        if not accepted:
            with pytest.raises(ValueError, match=r"^SeqBoatConfig: "):
                config.update({name: changes[name] for name in names})
            assert vars(config) == vars(before)
            continue
        config.update({name: changes[name] for name in names})
        expected = {name: value for name, value in changes.items() if value is not None or name != "use_cache"}
        assert {name: getattr(config, name) for name in expected} == expected
        found.append(vars(config))
        assert found[-1] == found[0]


def test_update_from_a_string_does_not_depend_on_its_order():
    for text in ("use_cache=false,bidirectional=true,head_dim=128", "head_dim=128,bidirectional=true,use_cache=false"):
        config = SeqBoatConfig()
        config.update_from_string(text)
        assert config.bidirectional and not config.use_cache
    config.update_from_string("output_attentions=true,num_labels=5")
    assert config.output_attentions and config.num_labels == 5
    with pytest.raises(ValueError, match="hidden_sise"):
        config.update_from_string("hidden_sise=8")


def test_other_fields_are_set_while_an_id_waits_for_its_row():
    config = SeqBoatConfig()
    config.pad_token_id = 300
    config.use_cache = False
    config.update({"hidden_dropout": 0.1})
    with pytest.raises(ValueError, match="pad_token_id=300"):
        config.vocab_size = 280
    config.vocab_size = 301
    assert (config.pad_token_id, config.use_cache, config.hidden_dropout) == (300, False, 0.1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_cache": True, "bidirectional": True}, ["use_cache=True", "bidirectional=True"]),
        ({"norm_type": "batchnorm"}, ["norm_type='batchnorm'", "bidirectional=False"]),
        ({"input_type": "values"}, ["input_type='values'", "bidirectional=False"]),
        ({"add_absolute_positions": True}, ["add_absolute_positions=True", "bidirectional=False"]),
        ({"qk_head_dim": 7}, ["position_embedding_type='rotary'", "qk_head_dim=7"]),
        (
            {"bidirectional": True, "add_absolute_positions": True, "hidden_size": 33},
            ["add_absolute_positions=True", "hidden_size=33"],
        ),
        ({"vocab_size": 300, "pad_token_id": 300}, ["pad_token_id=300", "vocab_size=300"]),
        ({"eos_token_id": [3, 999]}, ["eos_token_id=[3, 999]", "vocab_size=264"]),
        ({"head_dim": 64, "qk_head_dim": 32}, ["head_dim=64", "qk_head_dim=32"]),
    ],
)
def test_contradictions_name_both_fields_and_values(settings, named):
    """P15: contradictory values are refused by a message that names the fields and both values."""
    with pytest.raises(ValueError) as refused:
        SeqBoatConfig(**settings)
    for name in named:
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"), [("bidirectional", True), ("norm_type", "batchnorm"), ("qk_head_dim", 3), ("vocab_size", 99)]
)
def test_an_assignment_that_contradicts_another_field_changes_nothing(field, value):
    config = SeqBoatConfig()
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match=field):
        setattr(config, field, value)
    assert config == before


def test_numbers_are_stored_as_plain_python_numbers():
    config = SeqBoatConfig(hidden_size=np.int64(32), hidden_dropout=0, norm_eps=np.float64(1e-6), norm_first=np.True_)
    config.attention_dropout = np.float64(0.5)
    config.eos_token_id = (np.int64(1), 2)
    for field, kind in {
        "hidden_size": int,
        "hidden_dropout": float,
        "norm_eps": float,
        "norm_first": bool,
        "attention_dropout": float,
        "eos_token_id": list,
    }.items():
        assert type(getattr(config, field)) is kind
    assert SeqBoatConfig(**json.loads(config.to_json_string())).eos_token_id == [1, 2]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_none_means_the_default_of_scale_embeddings_and_use_cache(bidirectional):
    config = SeqBoatConfig(bidirectional=bidirectional, scale_embeddings=None, use_cache=None)
    assert config.scale_embeddings is config.use_cache is (not bidirectional)
    config.use_cache = False
    config.use_cache = None
    assert config.use_cache is (not bidirectional)


def test_the_default_special_ids_give_way_to_a_smaller_vocabulary_but_explicit_ones_do_not():
    config = SeqBoatConfig(vocab_size=258)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (256, 257, None)
    assert SeqBoatConfig(vocab_size=50, pad_token_id=1).pad_token_id == 1
    with pytest.raises(ValueError, match="pad_token_id=256 contradicts vocab_size=50"):
        SeqBoatConfig(vocab_size=50, pad_token_id=256)


def test_every_way_of_copying_restores_the_config(tmp_path):
    config = SeqBoatConfig(
        bidirectional=True,
        norm_type="batchnorm",
        ssm_truncation=7,
        activation_bias=-0.5,
        num_labels=3,
        own_note="kept",
    )
    config.save_pretrained(tmp_path)
    copies = [
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        SeqBoatConfig.from_pretrained(tmp_path),
        SeqBoatConfig.from_pretrained(str(tmp_path / "config.json")),
        AutoConfig.from_pretrained(tmp_path),
        SeqBoatConfig.from_dict(config.to_dict()),
        SeqBoatConfig(**config.to_diff_dict()),
    ]
    for other in copies:
        assert type(other) is SeqBoatConfig
        assert other.to_diff_dict() == config.to_diff_dict()
    assert copies[2].num_labels == 3 and copies[2].own_note == "kept"


@pytest.mark.parametrize("text", ["7", "null", "[1, 2]", '"a"', "true"])
def test_a_file_that_holds_no_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json' must hold a JSON object, got"):
        SeqBoatConfig.from_pretrained(tmp_path)


def test_overrides_of_from_pretrained_are_checked_together_in_any_order(tmp_path):
    SeqBoatConfig().save_pretrained(tmp_path)
    for names in (("use_cache", "bidirectional"), ("bidirectional", "use_cache")):
        values = {"use_cache": False, "bidirectional": True}
        config = AutoConfig.from_pretrained(tmp_path, **{name: values[name] for name in names})
        assert config.bidirectional and not config.use_cache
    config.update_from_string("output_attentions=true,num_labels=5")
    assert config.output_attentions and config.num_labels == 5
    with pytest.raises(ValueError, match="use_cache=True contradicts bidirectional=True"):
        SeqBoatConfig.from_pretrained(tmp_path, bidirectional=True)
    config, unused = SeqBoatConfig.from_pretrained(
        tmp_path, hidden_size=32, num_labels=4, revision_note="x", return_unused_kwargs=True
    )
    assert (config.hidden_size, config.num_labels, unused) == (32, 4, {"revision_note": "x"})


def test_the_config_of_another_architecture_is_refused():
    """P17: what is foreign is refused before any work."""
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        SeqBoatConfig.from_dict({"model_type": "gpt2", "hidden_size": 32})


def test_layers_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="per_layer_config"):
        SeqBoatConfig(per_layer_config={0: {"hidden_size": 8}})


def test_an_unknown_key_is_kept_with_a_warning_that_names_the_nearest_field(config_warnings):
    config = SeqBoatConfig(hiden_dropout=0.3)
    assert config.hiden_dropout == 0.3
    config.activation_bais = 1.0
    assert ["'hiden_dropout'" in text and "'hidden_dropout'" in text for text in config_warnings] == [True, False]
    assert "'activation_bais'" in config_warnings[1] and "'activation_bias'" in config_warnings[1]


def test_what_transformers_itself_writes_causes_no_warning(config_warnings, tmp_path):
    config = SeqBoatConfig(
        architectures=["SeqBoatForCausalLM"],
        auto_map={"AutoConfig": "configuration_seqboat.SeqBoatConfig"},
        torch_dtype="float32",
        num_labels=3,
        problem_type="regression",
        output_attentions=False,
        output_hidden_states=True,
        attn_implementation="eager",
        name_or_path="somewhere",
        do_sample=True,
        model_type="seqboat",
        _private=1,
    )
    config.quantization_config = {"quant_method": "torchao"}
    config.is_causal = True
    config.save_pretrained(tmp_path)
    SeqBoatConfig.from_pretrained(tmp_path)
    assert config_warnings == []


@pytest.fixture
def config_warnings(monkeypatch):
    """The config's own warnings, each as often as it is given."""
    texts = []
    monkeypatch.setattr(LOGGER, texts.append)
    return texts


def test_preset_names_are_those_of_the_folders():
    assert SeqBoatConfig.preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_the_same_by_name_and_by_folder(name, tmp_path):
    config = SeqBoatConfig.from_preset(name)
    folder = Path(__file__).parents[1] / "configuration" / name
    assert SeqBoatConfig.from_pretrained(folder).to_dict() == config.to_dict()
    known = {field for field in SeqBoatConfig().to_dict()}
    assert set(json.loads((folder / "config.json").read_text())) <= known | {"architectures", "id2label", "label2id"}
    config.save_pretrained(tmp_path)
    assert SeqBoatConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("name", "layers", "width", "value", "key", "window", "truncation", "positions", "labels"),
    [
        ("lra-listops", 6, 80, 160, 64, 128, 1024, 2002, 10),
        ("lra-text", 4, 128, 256, 64, 128, 1024, 4002, 2),
        ("lra-retrieval", 6, 128, 256, 64, 128, 1024, 4002, 2),
        ("lra-image", 8, 160, 320, 96, 128, 1024, 1024, 10),
        ("lra-pathfinder", 6, 128, 256, 64, 128, 1024, 1024, 2),
        ("lra-pathx", 6, 128, 256, 64, 256, 16384, 16384, 2),
        ("speech-commands-10", 8, 60, 120, 30, 128, 4000, 16000, 10),
    ],
)
def test_the_encoder_presets_have_the_published_shapes(
    name, layers, width, value, key, window, truncation, positions, labels
):
    config = SeqBoatConfig.from_preset(name)
    assert config.bidirectional and not config.use_cache and not config.scale_embeddings
    assert (config.num_hidden_layers, config.hidden_size, config.v_head_dim) == (layers, width, value)
    assert (config.qk_head_dim, config.state_size, config.memory_size) == (key, 16, window)
    assert (config.ssm_truncation, config.max_position_embeddings) == (truncation, positions)
    assert (config.num_labels, config.classifier_hidden_size) == (labels, value)


@pytest.mark.parametrize(("name", "millions"), [("enwik8", 39.1), ("0.4b", 390.8), ("1.3b", 1289.0)])
def test_presets_have_the_size_that_they_are_named_for(name, millions):
    with torch.device("meta"):
        model = SeqBoatForCausalLM(SeqBoatConfig.from_preset(name))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)


def test_overrides_of_a_preset():
    config = SeqBoatConfig.from_preset("lra-text", num_labels=5, hidden_dropout=0)
    assert (config.num_labels, config.hidden_dropout) == (5, 0.0)
    assert SeqBoatConfig.from_preset("enwik8", bidirectional=True).use_cache is False
    with pytest.raises(ValueError, match="hidden_dropout=2"):
        SeqBoatConfig.from_preset("tiny", hidden_dropout=2)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError) as refused:
        SeqBoatConfig.from_preset("enwik9")
    assert all(name in str(refused.value) for name in ["enwik9", *PRESETS])
