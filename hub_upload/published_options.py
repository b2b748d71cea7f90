"""From the training options of a published checkpoint to the fields of SeqBoatConfig.

Published checkpoints carry the options of the run as `args`. Options that describe the model are translated; those of
the training run (learning rate, seed, ...) are ignored; model options that SeqBoatConfig cannot express are refused.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modeling_seqboat.configuration_seqboat import FIELD_CHECKS, SeqBoatConfig

from .errors import HubUploadError, shown

LANGUAGE_MODEL_PREFIX = "slag_lm"
ENCODER_PREFIXES = ("slag_lra", "slag_sc")

# Parts of architecture names -> the preset whose values stand in for options that `args` lacks. First match wins.
_PRESET_OF_ARCHITECTURE = (
    ("slag_lm", "enwik8"),
    ("listop", "lra-listops"),
    ("imdb", "lra-text"),
    ("text", "lra-text"),
    ("aan", "lra-retrieval"),
    ("retrieval", "lra-retrieval"),
    ("cifar", "lra-image"),
    ("image", "lra-image"),
    ("pf128", "lra-pathx"),
    ("pathx", "lra-pathx"),
    ("pf32", "lra-pathfinder"),
    ("pathfinder", "lra-pathfinder"),
    ("slag_sc", "speech-commands-10"),
)
PUBLISHED_TRUNCATION = 2048  # of the language models; the enwik8 preset here leaves it unset

# Sizes of the vocabulary and token ids come from the weights and the dictionary, the backend from the user.
_NOT_FROM_PRESETS = (
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "kernel_backend",
    "loss_implementation",
)
# Options added late in the published code: checkpoints may lack them whatever their task.
_OPTIONAL = ("act_bias", "hidden_dropout", "activation_dropout", "attention_dropout", "add_apos")

LARGEST_NUMBER = 2**31

# Option -> field where the value is taken as it stands.
_LANGUAGE_MODEL_FIELDS = {
    "decoder_layers": "num_hidden_layers",
    "decoder_embed_dim": "hidden_size",
    "decoder_hidden_dim": "v_head_dim",
    "decoder_z_dim": "qk_head_dim",
    "decoder_n_dim": "state_size",
    "decoder_chunk_size": "memory_size",
    "decoder_ffn_embed_dim": "intermediate_size",
    "max_target_positions": "max_position_embeddings",
    "normalization_type": "norm_type",
    "normalize_before": "norm_first",
    "share_decoder_input_output_embed": "tie_word_embeddings",
    # `hidden_dropout` is the dropout of the values there; what is hidden_dropout here is called `dropout`.
    "hidden_dropout": "value_dropout",
    "activation_dropout": "activation_dropout",
}
_ENCODER_FIELDS = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_hidden_dim": "v_head_dim",
    "z_dim": "qk_head_dim",
    "n_dim": "state_size",
    "chunk_size": "memory_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_type": "norm_type",
    "encoder_normalize_before": "norm_first",
    "add_apos": "add_absolute_positions",
    "sentence_class_num": "num_labels",
    "classifier_out_dim": "classifier_hidden_size",
    "classifier_activation_fn": "classifier_act",
}
_COMMON_FIELDS = {
    "activation_fn": "hidden_act",
    "attention_activation_fn": "attention_activation",
    "act_bias": "activation_bias",
    "init_temp_scale": "router_temperature_init",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
}
_NORM_TYPES = {name: name for name in ("layernorm", "scalenorm", "rmsnorm", "batchnorm")} | {
    "syncbatchnorm": "batchnorm"
}
_POSITION_TYPES = ("simple", "rotary", "t5")
_POOLING_TYPES = {"mp": "mean", "cls": "first"}
_INPUT_TYPES = {"text": "tokens", "image": "values"}


@dataclass
class PublishedModel:
    """What the options of a checkpoint say.

    Attributes:
        kind: `language_model` or `encoder`.
        fields: keyword arguments of SeqBoatConfig, `vocab_size` and token ids left out.
        warnings: options that matter in training only and have no counterpart here.
    """

    kind: str
    fields: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


class _Options(Mapping):
    """The options as a mapping that names an option's value in every error."""

    def __init__(self, args: Namespace) -> None:
        self._values = vars(args)

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        # Pickles hold tensors, lists that are nested without end, and numbers that fill a disk when written out.
        if not (value is None or isinstance(value, (bool, int, float, str))):
            self.refuse(name, "it must be a number, a text, True, False or None")
        if isinstance(value, (int, float)) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            self.refuse(name, f"numbers from -{LARGEST_NUMBER} to {LARGEST_NUMBER} are taken")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def refuse(self, name: str, reason: str) -> None:
        raise HubUploadError(
            f"the checkpoint's option {name}={shown(self._values.get(name))} cannot be converted: {reason}."
        )

    def choose(self, name: str, choices: Mapping[str, str]) -> str:
        if self[name] not in choices:
            self.refuse(name, "known values are " + ", ".join(map(repr, choices)))
        return choices[self[name]]

    def number(self, name: str) -> float | None:
        value = self.get(name)
        if value is not None and (isinstance(value, (bool, str))):
            self.refuse(name, "a number is needed")
        return value


def read_options(args: Namespace) -> PublishedModel:
    """Translate the options of a published checkpoint (arXiv 2306.11197, released code's names).

    Raises:
        HubUploadError: the architecture is unknown, or an option has a value that SeqBoatConfig cannot express; names
            the option and its value.
    """
    options = _Options(args)
    arch = options.get("arch")
    kind = _kind_of(arch)
    if kind is None:
        raise HubUploadError(
            f"the checkpoint's arch={shown(arch)} is not a published SeqBoat model; known names begin with "
            f"{LANGUAGE_MODEL_PREFIX}, {' or '.join(ENCODER_PREFIXES)}."
        )
    _refuse_what_cannot_be_expressed(options, kind)
    names = _COMMON_FIELDS | (_LANGUAGE_MODEL_FIELDS if kind == "language_model" else _ENCODER_FIELDS)
    fields = _published_defaults(options, names)
    for option, name in names.items():
        if options.get(option) is not None:
            fields[name] = options[option]
    prefix = "decoder" if kind == "language_model" else "encoder"
    options.number(f"{prefix}_ffn_embed_dim")
    fields["intermediate_size"] = max(0, fields.get("intermediate_size", 0))
    if "truncation_length" in options:
        length = options.number("truncation_length")
        fields["ssm_truncation"] = length if length is not None and length > 0 else None
    _translate_common(options, fields, names)
    if kind == "language_model":
        _translate_language_model(options, fields)
    else:
        _translate_encoder(options, fields)
    return PublishedModel(kind, fields, _training_only(options))


def _kind_of(arch: Any) -> str | None:
    if isinstance(arch, str):
        if arch.startswith(LANGUAGE_MODEL_PREFIX):
            return "language_model"
        if arch.startswith(ENCODER_PREFIXES):
            return "encoder"
    return None


def _published_defaults(options: _Options, names: Mapping[str, str]) -> dict[str, Any]:
    arch = options["arch"]
    preset = next((preset for part, preset in _PRESET_OF_ARCHITECTURE if part in arch), None)
    if preset is None:
        missing = [option for option in names if option not in options and option not in _OPTIONAL]
        if missing:
            raise HubUploadError(
                f"the checkpoint's arch={arch!r} names no published task whose values could stand in for the options "
                f"that its args lack: {', '.join(missing)}."
            )
        return {}
    config = SeqBoatConfig.from_preset(preset)
    fields = {name: getattr(config, name) for name in FIELD_CHECKS if name not in _NOT_FROM_PRESETS}
    if preset == "enwik8":
        fields["ssm_truncation"] = PUBLISHED_TRUNCATION
    else:
        fields["num_labels"] = config.num_labels
    return fields


def _refuse_what_cannot_be_expressed(options: _Options, kind: str) -> None:
    prefix = "decoder" if kind == "language_model" else "encoder"
    width = options.get(f"{prefix}_embed_dim")
    chunk = "decoder_chunk_size" if kind == "language_model" else "chunk_size"
    if options.number(chunk) is not None and options[chunk] <= 0:
        options.refuse(chunk, "a window of at least 1 is needed")
    if options.get("layer_type", "slag") not in ("slag", None):
        options.refuse("layer_type", "only 'slag' layers are SeqBoat layers")
    if options.get("use_p"):
        options.refuse("use_p", "SeqBoatConfig has no such option; it must be False")
    if options.get("normalize_embedding"):
        options.refuse("normalize_embedding", "SeqBoat does not normalise embeddings; it must be False")
    if kind == "language_model":
        if options.get("adaptive_input"):
            options.refuse("adaptive_input", "adaptive input embeddings are not supported; it must be False")
        if options.get("adaptive_softmax_cutoff"):
            options.refuse("adaptive_softmax_cutoff", "adaptive softmax is not supported; it must be None")
        for name in ("decoder_input_dim", "decoder_output_dim"):
            if width is not None and options.get(name) not in (None, width):
                options.refuse(name, f"it must equal decoder_embed_dim={width}")
    elif options.get("classifier_layers") not in (None, 1):
        options.refuse("classifier_layers", "a classifier of one hidden layer is needed, so it must be 1")


def _translate_common(options: _Options, fields: dict[str, Any], names: Mapping[str, str]) -> None:
    norm_option = next(option for option, name in names.items() if name == "norm_type")
    if options.get(norm_option) is not None:
        fields["norm_type"] = options.choose(norm_option, _NORM_TYPES)
    bias = options.get("rel_pos_bias")
    if bias is not None:
        if bias not in _POSITION_TYPES:
            options.refuse("rel_pos_bias", "known values are " + ", ".join(map(repr, _POSITION_TYPES)))
        if options.get("local_pos") and bias != "simple":
            options.refuse("local_pos", f"local positions go with rel_pos_bias='simple', not {bias!r}")
        fields["position_embedding_type"] = "local" if options.get("local_pos") else bias
    elif "local_pos" in options and fields.get("position_embedding_type") in ("simple", "local"):
        fields["position_embedding_type"] = "local" if options["local_pos"] else "simple"
    if options.get("always_act") is not None:
        fields["router_type"] = "always" if options["always_act"] else "tempered_softmax"


def _translate_language_model(options: _Options, fields: dict[str, Any]) -> None:
    fields["bidirectional"] = False
    if options.get("no_affine_final_norm") is not None:
        fields["final_norm_affine"] = not options["no_affine_final_norm"]
    if options.get("no_scale_embedding") is not None:
        fields["scale_embeddings"] = not options["no_scale_embedding"]
    if options.get("hidden_dropout") is None and options.get("act_dropout") is not None:
        fields["value_dropout"] = options["act_dropout"]


def _translate_encoder(options: _Options, fields: dict[str, Any]) -> None:
    fields |= {"bidirectional": True, "scale_embeddings": False, "use_cache": False, "final_norm_affine": True}
    if options.get("sen_rep_type") is not None:
        fields["pooling_type"] = options.choose("sen_rep_type", _POOLING_TYPES)
    if options.get("input_type") is not None:
        fields["input_type"] = options.choose("input_type", _INPUT_TYPES)
    if options["arch"].startswith("slag_sc"):
        fields |= {"input_type": "values", "add_absolute_positions": True}
    if options.get("act_dropout") is not None:
        fields["value_dropout"] = fields["activation_dropout"] = options["act_dropout"]
    elif options.get("hidden_dropout") is not None:
        fields["value_dropout"] = options["hidden_dropout"]
    if options.get("use_nli"):
        fields["pair_features"] = "nli"
    elif "use_nli" in options and fields.get("pair_features") == "nli":
        fields["pair_features"] = "concat"


def _training_only(options: _Options) -> list[str]:
    found = []
    for name in ("feature_dropout", "decoder_layerdrop", "encoder_layerdrop", "layerdrop"):
        if options.get(name):
            found.append(
                f"the option {name}={options[name]!r} acts in training only and has no counterpart; it is dropped"
            )
    return found
