"""Configuration of SeqBoat models (arXiv 2306.11197): the fields, what each accepts, and the named presets.

Letters: D width, N state size, Z query/key width, V value width, W memory size, P positions, T truncation.
"""

import difflib
import json
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

Check = Callable[[str, Any], Any]


class _DefaultTokenId(int):
    """A byte tokenizer's special id that nobody asked for: it gives way where the vocabulary is too small for it."""


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(f"SeqBoatConfig: {name}={value!r} is not valid; {name} must be {expected}.")


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check(expected: str, accepts: Callable[[Any], bool], make: Callable[[Any], Any], optional: bool = False) -> Check:
    """A check that refuses what is not accepted, and makes its own type of the rest."""
    expected += " or None" if optional else ""

    def check(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        if not accepts(value):
            _refuse(name, value, expected)
        return make(value)

    return check


def _integer(minimum: int, optional: bool = False, maximum: float = math.inf) -> Check:
    limits = f"of at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
    return _check(f"an integer {limits}", lambda it: is_integer(it) and minimum <= it <= maximum, int, optional)


def _real(expected: str, accepts: Callable[[float], bool] = lambda value: True, optional: bool = False) -> Check:
    def is_valid(value: Any) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        try:
            return math.isfinite(value) and accepts(float(value))
        except OverflowError:
            return False

    return _check(expected, is_valid, float, optional)


def _one_of(*allowed: str, optional: bool = False) -> Check:
    def check(name: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        if not isinstance(value, str) or value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            _refuse(name, value, "one of " + ", ".join(map(repr, allowed)) + " or None" * optional + hint)
        return value

    return check


def _token_id(several: bool = False) -> Check:
    expected = "a token id (an integer of at least 0)" + (", a list of them" if several else "")

    def is_valid(value: Any) -> bool:
        given = value if several and isinstance(value, (list, tuple)) else [value]
        return len(given) > 0 and all(is_integer(item) and item >= 0 for item in given)

    def make(value: Any) -> int | list[int]:
        return list(map(int, value)) if isinstance(value, (list, tuple)) else int(value)

    return _check(expected, is_valid, make, optional=True)


# Router types with parameters; the others decide without looking at the token.
LEARNED_ROUTERS = ("tempered_softmax", "gumbel", "gumbel_straight_through")

# Recurrences; `register_recurrence` adds to them.
SSM_TYPES = ["ema", "s4d", "s5"]


def _ssm_type(name: str, value: Any) -> str:
    return _one_of(*SSM_TYPES)(name, value)


_PositiveInteger = Annotated[int, _integer(1)]
_Positive = Annotated[float, _real("a finite number above 0", lambda value: value > 0)]
_AT_LEAST_0 = ("a finite number of at least 0", lambda value: value >= 0)
_NotNegative = Annotated[float, _real(*_AT_LEAST_0)]
_OptionalNotNegative = Annotated[float | None, _real(*_AT_LEAST_0, optional=True)]
_Probability = Annotated[float, _real("a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)]
_boolean = _check("True or False", lambda value: isinstance(value, (bool, np.bool_)), bool)
_Boolean = Annotated[bool, _boolean]
_Activation = Annotated[str, _one_of(*sorted(ACT2FN))]

# Keys that transformers and its companions put into a config without declaring them on the base class.
_COMPANION_KEYS = frozenset(
    "adapter_path attn_implementation auto_map base_model_name_or_path custom_pipelines dtype experts_implementation "
    "finetuning_task gguf_file gradient_checkpointing is_causal is_decoder layer_types mlp_layer_types pretraining_tp "
    "processor_class quantization_config sep_token_id task_specific_params tokenizer_class torchscript "
    "transformers_weights use_bfloat16".split()
)


# Fields of transformers' own that would fail, or do nothing, only where they are used. A name is made for each label.
_INHERITED_CHECKS: dict[str, Check] = {
    "num_labels": _integer(0, maximum=1_000_000),
    "problem_type": _one_of("regression", "single_label_classification", "multi_label_classification", optional=True),
}


def _contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one message for each pair of field values that cannot go together, naming both."""

    encoder, learned = config["bidirectional"], config["router_type"] in LEARNED_ROUTERS
    routers = ", ".join(map(repr, LEARNED_ROUTERS))
    # Whether it applies, the two fields, why and what to do.
    rules = (
        (encoder and config["use_cache"], "use_cache", "bidirectional",
         "a bidirectional model has no cache; set use_cache=False"),
        (encoder and config["loss_implementation"] == "liger", "loss_implementation", "bidirectional",
         "it is made for the causal language model's loss; use loss_implementation='torch'"),
        (not encoder and config["norm_type"] == "batchnorm", "norm_type", "bidirectional",
         "batch statistics leak the future into a causal model; use layernorm, scalenorm or rmsnorm, or "
         "bidirectional=True"),
        (not encoder and config["input_type"] == "values", "input_type", "bidirectional",
         "a causal language model reads tokens; use input_type='tokens', or bidirectional=True"),
        (not encoder and config["add_absolute_positions"], "add_absolute_positions", "bidirectional",
         "absolute positions belong to encoders; use add_absolute_positions=False, or bidirectional=True"),
        (config["ssm_truncation"] is not None and config["ssm_type"] != "ema", "ssm_truncation", "ssm_type",
         "only the EMA's kernel can be cut; use ssm_truncation=None or ssm_type='ema'"),
        (config["router_target_rate"] is not None and not learned, "router_target_rate", "router_type",
         f"this router has no parameters that a target could move; use router_target_rate=None or one of {routers}"),
        (config["position_embedding_type"] == "rotary" and config["qk_head_dim"] % 2,
         "position_embedding_type", "qk_head_dim",
         "rotary turns pairs of channels; use an even qk_head_dim or another position_embedding_type"),
        (config["add_absolute_positions"] and config["hidden_size"] % 2, "add_absolute_positions", "hidden_size",
         "half of the channels are sines, half cosines; use an even hidden_size"),
    )  # fmt: skip
    for applies, first, second, advice in rules:
        if applies:
            yield f"{first}={config[first]!r} contradicts {second}={config[second]!r}: {advice}."


def _ids_without_rows(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one message for each special id that the vocabulary is too small for."""
    if config["input_type"] != "tokens":
        return
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = config[name] if isinstance(config[name], list) else [config[name]]
        if any(item is not None and item >= config["vocab_size"] for item in ids):
            yield (
                f"{name}={config[name]!r} contradicts vocab_size={config['vocab_size']!r}: ids run from 0 to "
                f"{config['vocab_size'] - 1}; use one of these or None, or a larger vocab_size."
            )


def _with_default(name: str, value: Any, others: Mapping[str, Any]) -> Any:
    """The value of a field that was left open, given the fields that it follows from."""
    if value is None and name in ("scale_embeddings", "use_cache"):
        return not others["bidirectional"]
    if isinstance(value, _DefaultTokenId) and (value >= others["vocab_size"] or others["input_type"] == "values"):
        return None
    return value


class SeqBoatConfig(PreTrainedConfig):
    r"""Configuration of a SeqBoat model: a damped EMA in every layer, and a gated attention unit that only the tokens
    chosen by a router go through (arXiv 2306.11197). Without arguments: the published enwik8 language model's shape
    with the byte tokenizer's vocabulary and no dropout.

    Values are checked on construction and on assignment alike: a field takes an int where a float is meant; an unknown
    value, or one that contradicts another field, raises ValueError and leaves the config as it was. `update` sets
    several fields that depend on each other. A special id that is assigned before the embeddings have its row gets a
    warning only.

    Args:
        bidirectional: False builds a causal model with a cache, True an encoder.
        input_type: `tokens` (ids through an embedding) or `values` (real numbers, encoders only).
        vocab_size: number of token ids.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: number of layers.
        state_size: N, real states a channel (`ema`), complex states a channel (`s4d`), or complex states a layer
            (`s5`): the same N gives all three `4*D*N` parameters a layer and direction, but for smaller terms.
        qk_head_dim: Z, width of queries and keys; readable as `head_dim` too.
        v_head_dim: V, width of values.
        memory_size: W, activated tokens that one activated token sees before itself (encoders: after itself too).
        intermediate_size: width of the feed-forward block, 0 for none.
        hidden_act: activation of the layers, a name that transformers knows.
        attention_activation: `softmax`, `relu2` or `laplace`.
        position_embedding_type: `rotary`, `simple` (learned, by distance), `local` (learned, by distance in activated
            tokens), `t5` (32 learned buckets) or `none`.
        max_position_embeddings: P, for `simple` the distance beyond which it no longer tells distances apart.
        rope_theta: base of the rotary angles.
        ssm_type: the recurrence over all tokens. `ema`: the multi-dimensional damped EMA. `s4d`: complex diagonal
            states for each channel (arXiv 2206.11893). `s5`: complex diagonal states that all channels write to and
            read from (arXiv 2208.04933). The last two: zero-order hold, S4D-Lin initial values, no Triton kernel.
        ssm_truncation: T, length in tokens at which the EMA's kernel is cut, None for never; `ema` only.
        norm_type: `layernorm`, `scalenorm`, `rmsnorm` or `batchnorm` (encoders only).
        norm_first: normalise before a layer (True) or after it.
        norm_affine: learned scale and shift in the layers' norms.
        final_norm_affine: the same for the norm after the last layer, which exists with `norm_first` only.
        norm_eps: added to variances.
        router_type: how tokens are chosen. Learned: `tempered_softmax` (the larger of two logits), `gumbel` (in
            training with Gumbel noise on both, so that a token is drawn with probability sigmoid(u_1 - u_0)) and
            `gumbel_straight_through` (the same, the attention's output enters with weight 1 instead of the soft
            probability, and with the gradient of it). Without router parameters: `always`, `never`, and `random` (at
            `router_random_rate`, whatever the token is).
        router_temperature_init: the router's temperature starts at this times sqrt(D).
        router_random_rate: share of tokens in (0, 1] that a `random` router activates.
        router_random_seed: of the `random` router. Its draw is a function of seed, layer and the token's place in its
            text, so the same tokens are drawn each time.
        router_target_rate: share of activated tokens in [0, 1] that learned routers are held to in training, or None.
            Best by `training_seqboat.RouterBudget`, which moves their biases after each optimiser step. Without one,
            the loss of every head has a term for it with labels, also returned as `router_penalty`. Let r be the share
            of the batch's real tokens that a layer activates, with the gradient of the mean soft probability
            sigmoid((u_1 - u_0) / temperature), the temperature held fixed. The term is router_target_weight * layers *
            (mean over layers of r - router_target_rate)^2 with scope `model`, and
            router_target_weight * mean over layers of (r - router_target_rate)^2 with scope `layer`.
        router_target_scope: `model`: the mean rate of all layers has the target, and the layers share it out among
            themselves; `layer`: every layer has it.
        router_target_weight: see `router_target_rate`.
        activation_bias: added to the logit for skipping a token; positive means fewer activations. Read at every
            forward.
        scale_embeddings: multiply embeddings by sqrt(D); None means `not bidirectional`.
        add_absolute_positions: sinusoidal positions with a learned scale (encoders only).
        pooling_type: what a classifier reads: `mean` over real tokens, the `first` or the `last` real token.
        pair_features: how a classifier joins two texts: `none`, `concat` ([b, a]) or `nli` ([b, a, a*b, a-b]).
        classifier_hidden_size: width of the classifier's hidden layer, 0 for a single linear.
        classifier_act: activation of the classifier, a name that transformers knows.
        hidden_dropout, attention_dropout, value_dropout, activation_dropout: probabilities in [0, 1).
        initializer_range: standard deviation of the truncated normal that linears start from.
        qk_initializer_range: that of the scales of queries and keys, router_initializer_range: that of the routers'
            weights; None for `initializer_range`.
        tie_word_embeddings: the output matrix is the embedding matrix.
        use_cache: return a cache; None means `not bidirectional`, True is an error for an encoder.
        pad_token_id, bos_token_id, eos_token_id: ids or None. The defaults are the byte tokenizer's, and None where
            `vocab_size` is too small for them.
        kernel_backend: `auto`, `torch` or `triton`; the environment variable SEQBOAT_KERNEL_BACKEND overrides it.
        loss_implementation: `torch`, or `liger` for large vocabularies: in training, `SeqBoatForCausalLM` then has its
            loss from Liger's fused linear cross entropy (the package liger-kernel, on a GPU), never holds the logits
            of all tokens, and returns logits None. Where that cannot run, forward raises ValueError. Other heads have
            no such loss and do not read it. Read at every forward.
    """

    model_type = "seqboat"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_probs", "router_penalty"]

    # Fields are set in this order: those that others take their default from come first.
    bidirectional: _Boolean = False
    input_type: Annotated[str, _one_of("tokens", "values")] = "tokens"
    vocab_size: _PositiveInteger = 264
    hidden_size: _PositiveInteger = 616
    num_hidden_layers: _PositiveInteger = 14
    state_size: _PositiveInteger = 16
    qk_head_dim: _PositiveInteger = 128
    v_head_dim: _PositiveInteger = 1232
    memory_size: _PositiveInteger = 1024
    intermediate_size: Annotated[int, _integer(0)] = 0
    hidden_act: _Activation = "silu"
    attention_activation: Annotated[str, _one_of("softmax", "relu2", "laplace")] = "softmax"
    position_embedding_type: Annotated[str, _one_of("rotary", "simple", "local", "t5", "none")] = "rotary"
    max_position_embeddings: _PositiveInteger = 10384
    rope_theta: _Positive = 10000.0
    ssm_type: Annotated[str, _ssm_type] = "ema"
    ssm_truncation: Annotated[int | None, _integer(1, optional=True)] = None
    norm_type: Annotated[str, _one_of("layernorm", "scalenorm", "rmsnorm", "batchnorm")] = "layernorm"
    norm_first: _Boolean = True
    norm_affine: _Boolean = True
    final_norm_affine: _Boolean = False
    norm_eps: _Positive = 1e-5
    router_type: Annotated[str, _one_of(*LEARNED_ROUTERS, "always", "never", "random")] = "tempered_softmax"
    router_temperature_init: _Positive = 1.0
    router_random_rate: Annotated[float, _real("a number above 0, up to 1", lambda value: 0 < value <= 1)] = 0.5
    router_random_seed: Annotated[int, _integer(0)] = 0
    router_target_rate: Annotated[
        float | None, _real("a number from 0 to 1", lambda value: 0 <= value <= 1, optional=True)
    ] = None
    router_target_scope: Annotated[str, _one_of("model", "layer")] = "model"
    router_target_weight: _NotNegative = 1.0
    activation_bias: Annotated[float, _real("a finite number")] = 0.0
    scale_embeddings: Annotated[bool | None, _boolean] = None
    add_absolute_positions: _Boolean = False
    pooling_type: Annotated[str, _one_of("mean", "first", "last")] = "mean"
    pair_features: Annotated[str, _one_of("none", "concat", "nli")] = "none"
    classifier_hidden_size: Annotated[int, _integer(0)] = 0
    classifier_act: _Activation = "gelu"
    hidden_dropout: _Probability = 0.0
    attention_dropout: _Probability = 0.0
    value_dropout: _Probability = 0.0
    activation_dropout: _Probability = 0.0
    initializer_range: _NotNegative = 0.02
    qk_initializer_range: _OptionalNotNegative = None
    router_initializer_range: _OptionalNotNegative = None
    tie_word_embeddings: _Boolean = True
    use_cache: Annotated[bool | None, _boolean] = None
    pad_token_id: Annotated[int | None, _token_id()] = _DefaultTokenId(256)
    bos_token_id: Annotated[int | None, _token_id()] = _DefaultTokenId(257)
    eos_token_id: Annotated[int | list[int] | None, _token_id(several=True)] = _DefaultTokenId(258)
    kernel_backend: Annotated[str, _one_of("auto", "torch", "triton")] = "auto"
    loss_implementation: Annotated[str, _one_of("torch", "liger")] = "torch"

    def __post_init__(self, **kwargs: Any) -> None:
        given_type = kwargs.pop("model_type", self.model_type)
        if given_type not in (self.model_type, "", None):
            raise ValueError(
                f"SeqBoatConfig: model_type={given_type!r} is another architecture's configuration; "
                f"model_type must be {self.model_type!r}."
            )
        if kwargs.get("per_layer_config") is not None:
            raise ValueError(
                f"SeqBoatConfig: per_layer_config={kwargs['per_layer_config']!r} is not supported; "
                "all SeqBoat layers of a model share one configuration."
            )
        if kwargs.get("num_labels") is not None:
            # With names of labels beside it, transformers warns at most.
            _INHERITED_CHECKS["num_labels"]("num_labels", kwargs["num_labels"])
        # TRL reads it off the config of every class that is none of transformers' own.
        self.auto_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        if key in _INHERITED_CHECKS:
            value = _INHERITED_CHECKS[key](key, value)
        elif key in FIELD_CHECKS:
            value = self._checked({key: value})[key]
        else:
            self._warn_if_unknown(key)
        super().__setattr__(key, value)

    def _checked(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Values for some fields, checked one by one and together with those of all others."""
        # Read once: transformers' lookup of an attribute is slow.
        own = self.__dict__
        values = {name: own[name] for name in FIELD_CHECKS if name in own}
        for name, check in FIELD_CHECKS.items():
            if name in changed:
                values[name] = check(name, _with_default(name, changed[name], values))
        # During construction the last field to be set finds all the others in place.
        if len(values) == len(FIELD_CHECKS):
            for message in _contradictions(values):
                raise ValueError(f"SeqBoatConfig: {message}")
            for message in _ids_without_rows(values):
                # Scripts take over a tokenizer's ids first and make room for them then.
                if not changed.keys() <= own.keys() or not changed.keys().isdisjoint(("vocab_size", "input_type")):
                    raise ValueError(f"SeqBoatConfig: {message}")
                logger.warning_once(f"SeqBoatConfig: {message} resize_token_embeddings makes room for it.")
        return {name: values[name] for name in changed}

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Sets several attributes at once: fields that depend on each other are checked together, in any order (and
        without the `__setattr__` of a subclass).

        Raises ValueError as assignment does; the config is then as it was.
        """
        before = dict(self.__dict__)
        fields = {name: config_dict[name] for name in FIELD_CHECKS if name in config_dict}
        # What follows from fields comes after them, and names of labels after their number.
        rest = sorted(config_dict.keys() - fields.keys(), key=lambda name: (name != "num_labels", name))
        try:
            for name, value in self._checked(fields).items():
                super().__setattr__(name, value)
            for name in rest:
                setattr(self, name, config_dict[name])
        except Exception:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def update_from_string(self, update_str: str) -> None:
        """`update` by "name=value,name=value", of attributes that are numbers, booleans or strings."""
        given = [pair.split("=")[0] for pair in update_str.split(",")]
        parsed = SimpleNamespace(**{name: getattr(self, name) for name in given if hasattr(self, name)})
        PreTrainedConfig.update_from_string(parsed, update_str)
        self.update({name: getattr(parsed, name) for name in given})

    def _warn_if_unknown(self, name: str) -> None:
        if name.startswith("_") or name in self.__dict__ or hasattr(type(self), name) or name in _COMPANION_KEYS:
            return
        if name in GenerationConfig._get_default_generation_params():
            return
        near = difflib.get_close_matches(name, FIELD_CHECKS, n=1, cutoff=0.0)[0]
        logger.warning_once(
            f"SeqBoatConfig: {name!r} is not a field of SeqBoat and changes nothing in the model; it is kept as an "
            f"attribute. The nearest field is {near!r}."
        )

    @property
    def num_attention_heads(self) -> int:
        """1: the gated attention unit has a single head."""
        return 1

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        if not is_integer(value) or value < 1:
            _refuse("num_attention_heads", value, "an integer of at least 1")
        if value != 1:
            # Tools for sharding set it on any config.
            logger.warning_once(
                f"SeqBoatConfig: num_attention_heads={value!r} changes nothing: the gated attention unit has a single "
                "head"
            )

    @property
    def head_dim(self) -> int:
        """Z, another name for `qk_head_dim`."""
        return self.qk_head_dim

    @head_dim.setter
    def head_dim(self, value: int) -> None:
        if value != self.qk_head_dim:
            raise ValueError(
                f"SeqBoatConfig: head_dim={value!r} contradicts qk_head_dim={self.qk_head_dim!r}; set qk_head_dim, "
                "head_dim follows it."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `num_attention_heads`, which PEFT's prompt learning looks for here."""
        return super().to_dict() | {"num_attention_heads": self.num_attention_heads}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: without what follows from the fields."""
        values = super().to_diff_dict()
        values.pop("num_attention_heads", None)
        if not values.get("auto_map"):
            values.pop("auto_map", None)
        return values

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError, before anything is written, for a special id without a row: it could not be loaded."""
        for message in _ids_without_rows(self.__dict__):
            raise ValueError(f"SeqBoatConfig: {message}")
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        values = super()._dict_from_json_file(json_file)
        if not isinstance(values, dict):
            raise ValueError(f"{str(json_file)!r} must hold a JSON object, got {values!r:.80}")
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "SeqBoatConfig":
        """Build a config from a dictionary; keyword arguments override it, and are checked together, in any order.

        Raises ValueError on a value that a field does not take, on fields that contradict each other and on the
        dictionary of another architecture.
        """
        if not isinstance(config_dict, Mapping):
            raise ValueError(f"SeqBoatConfig: a config is a dictionary of fields, got a {type(config_dict).__name__}")
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELD_CHECKS}
        for name in ("dtype", "torch_dtype"):
            # Taken unseen, it would fail only when the config is shown or saved.
            if isinstance(config_dict.get(name), (bool, numbers.Number, list, dict)):
                _refuse(name, config_dict[name], "the name of a dtype, such as float32")
        try:
            return super().from_dict({**config_dict, **overrides}, **kwargs)
        # transformers reads its own fields unseen: `dtype`, `id2label` and the like of a config.json of any content.
        except (TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"SeqBoatConfig: these are no values of a config: {error!r}") from error

    @classmethod
    def preset_names(cls) -> list[str]:
        """Names that `from_preset` takes. Raises FileNotFoundError where the presets are not installed."""
        return sorted(_preset_files())

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "SeqBoatConfig":
        """Build the config of a named preset, for instance `enwik8` or `lra-text`; keyword arguments override it.

        Raises ValueError on an unknown name, FileNotFoundError where the presets are not installed (they come with the
        package `modeling_seqboat`, not with a model folder of the Hub).
        """
        files = _preset_files()
        if name not in files:
            raise ValueError(
                f"SeqBoatConfig: there is no preset {name!r}; the presets are {', '.join(sorted(files))}."
            )
        preset = json.loads(files[name].read_text(encoding="utf-8"))
        if overrides.get("num_labels") is not None and "id2label" not in overrides:
            preset.pop("id2label", None)
            preset.pop("label2id", None)
        return cls(**{**preset, **overrides})


FIELD_CHECKS: dict[str, Check] = {
    name: kind.__metadata__[0] for name, kind in SeqBoatConfig.__annotations__.items() if hasattr(kind, "__metadata__")
}


def _preset_files() -> dict[str, Path]:
    here = Path(__file__).resolve().parent
    # An installed package holds the presets, in a checkout (editable installs too) they lie beside it.
    for folder in (here / "configuration", here.parent / "configuration"):
        files = {path.parent.name: path for path in folder.glob("*/config.json")}
        if files:
            return files
    raise FileNotFoundError(
        f"SeqBoatConfig: no presets beside {Path(__file__).name}: they come with the package modeling_seqboat, not "
        "with a model folder. Install the package, or read a configuration by SeqBoatConfig.from_pretrained(folder)."
    )
