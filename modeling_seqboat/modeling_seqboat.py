"""SeqBoat models for transformers (arXiv 2306.11197): the base model and the causal language model.

Letters: B batch, L columns, D hidden width.
"""

import copy
import difflib
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .attention_seqboat import SeqBoatAttention, SeqBoatPositionBias
from .cache_seqboat import SeqBoatCache, count_steps
from .configuration_seqboat import SeqBoatConfig, is_integer
from .context_seqboat import SequenceContext, Texts, build_context, leave_marks, marks_of
from .generation_seqboat import CACHE_NAME, CACHE_NAMES, SeqBoatGenerationMixin, one_cache
from .layers_seqboat import (
    SeqBoatAbsolutePositions,
    SeqBoatDecoderLayer,
    SeqBoatScaleNorm,
    SeqBoatValueEmbedding,
    build_norm,
)
from .loss_seqboat import expect_liger, fused_linear_cross_entropy
from .ops_layout_seqboat import is_exporting, must_not_wait
from .router_seqboat import SeqBoatRouter
from .ssm_seqboat import Recurrence

logger = logging.get_logger(__name__)

# Which Auto class loads which class: registered on import, and written into a published folder's auto_map.
AUTO_CLASSES: dict[str, str] = {
    "AutoModel": "SeqBoatModel",
    "AutoModelForCausalLM": "SeqBoatForCausalLM",
    "AutoModelForSequenceClassification": "SeqBoatForSequenceClassification",
    "AutoModelForImageClassification": "SeqBoatForImageClassification",
    "AutoModelForAudioClassification": "SeqBoatForAudioClassification",
    "AutoModelForTokenClassification": "SeqBoatForTokenClassification",
    "AutoModelForQuestionAnswering": "SeqBoatForQuestionAnswering",
    "AutoModelForMaskedLM": "SeqBoatForMaskedLM",
}

# What every model takes that says what else to return.
OUTPUT_FLAGS = ("output_hidden_states", "output_router_probs", "output_attentions")
# Arguments that may come along and say nothing that the model does not know: the longest packed segment, and the
# columns that the cache counts itself.
_IMPLIED_ARGUMENTS = ("max_length_q", "max_length_k", "cache_position")
# Arguments of other models under which ours would be looked for.
_OTHER_NAMES = {"cu_seqlens": "cu_seq_lens_q", "cu_seqlens_q": "cu_seq_lens_q", "sequence_ids": "seq_idx"}


@dataclass
class RouterOutput(ModelOutput):
    """What every output has besides the fields of transformers' own class.

    Attributes:
        router_probs: one (B, L) float32 a layer, the confidence of activated tokens and 0 elsewhere, with
            `output_router_probs`.
        router_penalty: scalar, with `router_target_rate`: the term that heads add to a training loss, weight included.
    """

    router_probs: tuple[Tensor, ...] | None = None
    router_penalty: Tensor | None = None


@dataclass
class SeqBoatModelOutput(RouterOutput, BaseModelOutputWithPast):
    """Output of `SeqBoatModel`: last_hidden_state (B, L, D); the `SeqBoatCache` with `use_cache`, from transformers
    5.24 on the field `cache`, which is read as `past_key_values` too, before that `past_key_values`; with
    `output_hidden_states` hidden_states, one (B, L, D) for the embeddings and one a layer, the last one normalised;
    attentions always None."""


@dataclass
class SeqBoatCausalLMOutput(RouterOutput, CausalLMOutputWithPast):
    """Output of `SeqBoatForCausalLM`: loss (scalar, with labels), logits (B, kept columns, vocab) or None where
    `loss_implementation` does without them, and the rest of `SeqBoatModelOutput`."""


def refuse_unknown_arguments(forward: Callable, kwargs: dict, also: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a keyword argument that `forward` would swallow, with the name that was probably meant.

    Args:
        kwargs: what `forward` took by `**kwargs`; None counts as not given, and so do token types that are all 0.
        also: further names that `forward` reads from them.
    """
    taken = (*OUTPUT_FLAGS, *also)
    for name, value in kwargs.items():
        if value is None or name in _IMPLIED_ARGUMENTS or name in taken:
            continue
        if name == "token_type_ids" and isinstance(value, Tensor) and not must_not_wait(value.device):
            if bool((value == 0).all()):
                continue
            raise ValueError("token_type_ids must be all 0: SeqBoat has no embeddings of token types")
        if name in ("read_index", "write_index", "block_table"):
            raise ValueError(
                f"SeqBoat does not run under paged continuous batching (got {name}): its state has no pages; use "
                "generate() with a padded batch"
            )
        known = [*taken, *(own for own in inspect.signature(forward).parameters if own not in ("self", "kwargs"))]
        near = _OTHER_NAMES.get(name) or difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name!r} is not an argument of this model, and would be ignored; the nearest is {near!r}")


def selected_states(output_hidden_states: bool | int | list[int] | None, count: int) -> set[int]:
    """Indices of the hidden states to return.

    Args:
        output_hidden_states: True for all, or one index or several as transformers takes them from 5.23 on: negative
            ones count from the end, those out of range select nothing.
        count: how many there are.

    Raises:
        ValueError: for anything else.
    """
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    chosen = output_hidden_states if isinstance(output_hidden_states, (list, tuple)) else [output_hidden_states]
    if not all(map(is_integer, chosen)):
        raise ValueError(
            f"output_hidden_states must be True, False, an index or a list of indices, got {output_hidden_states!r}"
        )
    return {index % count for index in chosen if -count <= index < count}


def _trunc_normal(tensor: Tensor, std: float) -> None:
    """Every truncated normal of the model is cut at two standard deviations."""
    if std == 0:
        init.zeros_(tensor)
    else:
        init.trunc_normal_(tensor, mean=0.0, std=std, a=-2 * std, b=2 * std)


def expect_class_ids(name: str, labels: Tensor, shape: tuple[int, ...], count: int) -> None:
    """Raises ValueError unless `labels` are int64 of this shape and, where looking is free, -100 or below `count`."""
    if labels.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(
            f"{name} must be of dtype int64, got {labels.dtype}: -100, which marks what is ignored, needs a sign and "
            "room"
        )
    if labels.device.type != "cpu" or must_not_wait(labels.device) or labels.numel() == 0:
        return
    wrong = (labels != -100) & ((labels < 0) | (labels >= count))
    if bool(wrong.any()):
        raise ValueError(f"{name} must be -100 or lie in 0..{count - 1}, got {int(labels[wrong][0])}")


def _expect_same_borders(queries: Tensor | None, keys: Tensor | None) -> None:
    """Raises ValueError where cu_seq_lens_k says something else than cu_seq_lens_q."""
    if keys is None or must_not_wait(keys.device):
        return
    if queries is None or queries.tolist() != keys.tolist():
        raise ValueError("cu_seq_lens_k must be given with, and equal, cu_seq_lens_q: keys are the same tokens")


def count_labels(labels: Tensor, num_items: Tensor | int | None, part: Any = None) -> Tensor | int:
    """What a loss summed over labels is divided by: all batches' number of labels where given, else this batch's, but
    1 where it is 0, so that batches without any label have the loss 0 and not NaN. `part`: see `SequenceContext`."""
    if num_items is None:
        count = (labels != -100).sum()
        num_items = count if part is None else part.total(count)
    return num_items + (num_items == 0)


def _warn_of_another_window(config: SeqBoatConfig, name: str | os.PathLike, options: dict[str, Any]) -> None:
    """Says where a model was loaded with another memory than its weights were saved with."""
    where = {key: options[key] for key in ("cache_dir", "revision", "subfolder") if options.get(key) is not None}
    try:
        # What was read a moment ago: no request is made for it.
        saved, _ = SeqBoatConfig.get_config_dict(name, local_files_only=True, **where)
    # Weights can come without a file of their config.
    except (OSError, TypeError, ValueError):
        return
    trained = saved.get("memory_size", config.memory_size)
    if trained != config.memory_size:
        logger.warning(
            f"memory_size is {config.memory_size}, but {trained} in {name}: another window than "
            "a model was saved with mostly makes it worse; measure it on texts of your length."
        )


def _hint_at_waiting_threads() -> None:
    """Says once that OpenMP's threads spin while they wait, where that can cost most of the speed: few cores, and no
    accelerator. Only the environment of a process that starts can change it."""
    few = sys.platform == "linux" and (os.cpu_count() or 1) <= 4 and torch.get_num_threads() > 1
    chosen = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if few and not chosen and not torch.accelerator.is_available():
        logger.warning_once(
            "SeqBoat on few CPU cores: start Python with GOMP_SPINCOUNT=10000, which is as fast on idle cores and can "
            "be ten times faster on busy ones, or with OMP_NUM_THREADS=1 if other programs run beside it."
        )


class SeqBoatPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and the capability sheet shared by all SeqBoat models."""

    config_class = SeqBoatConfig
    config: SeqBoatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SeqBoatDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _is_stateful = False
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        std = config.initializer_range
        if isinstance(module, nn.Linear):
            _trunc_normal(module.weight, std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            values = torch.empty_like(module.weight).normal_(0.0, config.hidden_size**-0.5)
            pad = config.pad_token_id
            if pad is not None and pad < values.shape[0]:
                values[pad] = 0
            init.copy_(module.weight, values)
        elif isinstance(module, Recurrence):
            module.draw_initial_values()
        elif isinstance(module, SeqBoatRouter):
            if module.learned:
                own = config.router_initializer_range
                _trunc_normal(module.weight, std if own is None else own)
                init.zeros_(module.bias)
                start = config.router_temperature_init * math.sqrt(config.hidden_size)
                init.constant_(module.log_temperature, math.log(start))
        elif isinstance(module, SeqBoatAttention):
            own = config.qk_initializer_range
            _trunc_normal(module.qk_scale, std if own is None else own)
            init.zeros_(module.qk_offset)
        elif isinstance(module, SeqBoatPositionBias):
            _trunc_normal(module.weight, std)
        elif isinstance(module, SeqBoatValueEmbedding):
            init.normal_(module.weight, 0.0, 1.0)
            init.normal_(module.bias, 0.0, 0.1)
        elif isinstance(module, SeqBoatAbsolutePositions):
            init.constant_(module.scale, config.hidden_size**-0.5)
        elif isinstance(module, SeqBoatScaleNorm) and module.weight is not None:
            init.ones_(module.weight)

    def _with_router_penalty(
        self, loss: Tensor, penalty: Tensor | None, labels: Tensor | None, num_items: Tensor | int | None, part=None
    ) -> Tensor:
        """Adds the pull to `router_target_rate` to a training loss; in eval mode the loss stays the task's alone.

        Args:
            labels: what `loss` was made of, -100 where ignored; read with `num_items` only.
            num_items: how many labels all the batches have whose gradients are summed, or None. As in the loss, this
                batch then counts by its share of them.
            part: where the labels are those of one part of a sequence, see `SequenceContext`.
        """
        if penalty is None or not self.training:
            return loss
        share = 1
        if num_items is not None:
            count = (labels != -100).sum()
            share = (count if part is None else part.total(count)) / count_labels(labels, num_items)
        return loss + share * penalty.to(loss.device)

    def _output(
        self, kind: type[RouterOutput], outputs: SeqBoatModelOutput, loss: Tensor | None, *labelled, **results
    ) -> RouterOutput:
        """A head's output: its results, the loss with the routers' term, and what the model's outputs hold beside.
        labelled: labels, num_items and part, as in `_with_router_penalty`."""
        if loss is not None:
            loss = self._with_router_penalty(loss, outputs.router_penalty, *labelled)
        kept = {name: outputs[name] for name in ("hidden_states", "router_probs", "router_penalty") if name in outputs}
        return kind(loss=loss, **results, **kept)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """`PreTrainedModel.from_pretrained`, which would only warn of a checkpoint that is no SeqBoat's.

        Warns where `memory_size` is not the one that the weights were saved with.

        Raises:
            ValueError: if the checkpoint holds none of the layers' tensors but others; with `output_loading_info` the
                report that is returned says so.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _warn_of_another_window(model.config, args[0] if args else kwargs["pretrained_model_name_or_path"], kwargs)
        if output_loading_info:
            return model, info
        layers = {name for name in model.state_dict() if "layers." in name}
        unexpected = sorted(info["unexpected_keys"])
        if unexpected and layers and layers <= set(info["missing_keys"]):
            raise ValueError(
                f"the checkpoint holds no tensor of a SeqBoat layer: it has {unexpected[0]}, expected names such as "
                f"{min(layers)}"
            )
        return model

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """`PreTrainedModel.resize_token_embeddings`.

        Raises:
            ValueError: before anything changes, if a number is no positive integer, if a special id of the config
                would have no row, or if the model reads no tokens.
        """
        if self.config.input_type != "tokens":
            raise ValueError(f"input_type={self.config.input_type!r} has no token embeddings to resize")
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (not is_integer(value) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1 or None, got {value!r}")
        if new_num_tokens is not None:
            multiple = pad_to_multiple_of or 1
            copy.deepcopy(self.config).vocab_size = -(-new_num_tokens // multiple) * multiple
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)


def main_input_name(config: SeqBoatConfig) -> str:
    """The argument that transformers counts as the input."""
    return "input_ids" if config.input_type == "tokens" else "input_values"


class SeqBoatModel(SeqBoatPreTrainedModel):
    """The layers between embeddings and heads, causal or bidirectional as the config says."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        _hint_at_waiting_threads()
        if config.input_type == "tokens":
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        else:
            self._input_embed_layer = "embed_values"
            self.embed_values = SeqBoatValueEmbedding(config.hidden_size)
        self.absolute_positions = (
            SeqBoatAbsolutePositions(config.hidden_size) if config.add_absolute_positions else None
        )
        self.layers = nn.ModuleList([SeqBoatDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = build_norm(config, config.final_norm_affine) if config.norm_first else None
        self.gradient_checkpointing = False
        self.main_input_name = main_input_name(config)
        # Set by a RouterBudget, here and at each router.
        self.rate_is_held = False
        # Set by `context_parallel`.
        self.parts = None
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: SeqBoatCache | None = None,
        inputs_embeds: Tensor | None = None, input_values: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None, output_router_probs: bool = False,
        output_attentions: bool | None = None, cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None, seq_idx: Tensor | None = None, cache: SeqBoatCache | None = None,
        cache_params: SeqBoatCache | None = None, **kwargs,
    ) -> SeqBoatModelOutput:  # fmt: skip
        """Runs the model.

        Args:
            input_ids: (B, L) int64, or input_values: (B, L) float where the config's `input_type` is values, or
                inputs_embeds: (B, L, D); exactly one.
            attention_mask: (B, L), or (B, past + L) with a cache; 0 at padding, which may stand anywhere.
            position_ids: (B, L) or (1, L) int64, ignored at padding; counted over real tokens when not given. A
                position not above the one before it starts a new segment of a packed row.
            past_key_values, cache, cache_params: three names of one argument, a `SeqBoatCache` to continue, which is
                updated in place.
            use_cache: whether to return a cache; by default as the config says, and never in training.
            output_hidden_states, output_router_probs: what else to return; a hidden state's index, or several, returns
                these and None in place of the others.
            cu_seq_lens_q: (segments + 1,) borders of a single packed row (cu_seq_lens_k, if given, must be the same);
                seq_idx: (B, L) segment numbers.

        Raises:
            ValueError: for arguments that contradict each other or that SeqBoat cannot honour.
        """
        config = self.config
        refuse_unknown_arguments(type(self).forward, kwargs)
        self._refuse_unsupported(output_attentions)
        self._expect_one_input(input_ids=input_ids, input_values=input_values, inputs_embeds=inputs_embeds)
        _expect_same_borders(cu_seq_lens_q, cu_seq_lens_k)
        past = one_cache(past_key_values=past_key_values, cache=cache, cache_params=cache_params)
        cache = self._cache_for(past, use_cache)
        if input_ids is not None:
            self._check_ids(input_ids)
        if input_values is not None and attention_mask is not None and attention_mask.shape == input_values.shape:
            # The gradient of the embedding is a sum of products with them: a NaN under a pad would stay in it.
            input_values = input_values.masked_fill(attention_mask.to(input_values.device) == 0, 0)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_values if input_ids is None else input_ids)
        batch, length = inputs_embeds.shape[:2]
        if cache is not None and cache.layers[0].is_initialized and cache.batch_size != batch:
            raise ValueError(
                f"past_key_values holds {cache.batch_size} rows, the input has {batch}; they must be equal (see "
                "SeqBoatCache.batch_repeat_interleave and batch_select_indices)"
            )
        texts = Texts(attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        facts = inputs_embeds.dtype, self.training, self.rate_is_held, self.parts
        context = build_context(config, batch, length, inputs_embeds.device, texts, cache, *facts)
        if cache is not None and context.reset is not None:
            cache.restarted = True
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        wanted = selected_states(output_hidden_states, len(self.layers[: config.num_hidden_layers]) + 1)
        hidden, states, probs, rates = self._run_layers(inputs_embeds, context, cache, wanted)
        if context.part is not None and cache is not None:
            context.part.share_cache(cache)
        outputs = SeqBoatModelOutput(
            last_hidden_state=hidden,
            **{CACHE_NAME: cache},
            hidden_states=states if wanted else None,
            router_probs=probs if output_router_probs else None,
            router_penalty=self._router_penalty(rates, context, hidden.device),
        )
        leave_marks(outputs, context)
        return outputs

    def _run_layers(
        self, embeds: Tensor, context: SequenceContext, cache: SeqBoatCache | None, wanted: set[int]
    ) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor, ...], list[Tensor | None]]:
        """Embeddings (B, L, D) through all layers: the last hidden state, the hidden states of which those `wanted`
        are there, and each layer's confidence and rate."""
        config = self.config
        hidden = embeds * math.sqrt(config.hidden_size) if config.scale_embeddings else embeds
        if self.absolute_positions is not None:
            hidden = hidden + self.absolute_positions(context.positions).to(hidden.dtype)
        hidden = F.dropout(hidden, config.hidden_dropout, self.training)
        if context.real is not None:
            hidden = hidden.masked_fill(~context.real[..., None], 0)
        states, probs, rates = [hidden if 0 in wanted else None], [], []
        # An exported graph runs where such sums of many tensors may not be known.
        context.stepped = None if cache is None or is_exporting() else []
        for index, layer in enumerate(self.layers[: config.num_hidden_layers]):
            # A layer in a module of the user's own need not have the attribute.
            if cache is not None and layer.training and getattr(layer, "gradient_checkpointing", False):
                # Nothing is computed twice without gradients, but the wrapper drops a cache that it knows by name.
                hidden, confidence, rate = layer(hidden, context, cache)
            else:
                hidden, confidence, rate = layer(hidden, context, past_key_values=cache)
            states.append(hidden if index + 1 in wanted else None)
            probs.append(confidence)
            rates.append(rate)
        if context.stepped:
            count_steps(context.stepped, context.real)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden, context.real)
            states[-1] = hidden if len(probs) in wanted else None
        return hidden, tuple(states), tuple(probs), rates

    def _router_penalty(
        self, rates: list[Tensor | None], context: SequenceContext, device: torch.device
    ) -> Tensor | None:
        """The term that pulls the layers' rates to `router_target_rate`, or None without one."""
        if rates[0] is None:
            return None
        config, rates = self.config, torch.stack([rate.to(device) for rate in rates])
        if context.part is not None:
            rates = context.part.total(rates * context.part.share)
        if config.router_target_scope == "model":
            missed = len(rates) * (rates.mean() - config.router_target_rate).square()
        else:
            missed = (rates - config.router_target_rate).square().mean()
        return config.router_target_weight * missed

    def _expect_one_input(self, **inputs: Tensor | None) -> None:
        """Raises ValueError unless there is exactly one input, of the config's type and of a shape that fits."""
        config, own = self.config, main_input_name(self.config)
        given = [name for name, value in inputs.items() if value is not None]
        if len(given) != 1 or given[0] not in (own, "inputs_embeds"):
            raise ValueError(f"give exactly one of {own} and inputs_embeds (input_type is {config.input_type!r})")
        (name,), shape = given, tuple(inputs[given[0]].shape)
        width = () if name == own else (config.hidden_size,)
        if len(shape) != 2 + len(width) or 0 in shape or shape[2:] != width:
            expected = ", ".join(("batch >= 1", "length >= 1", *map(str, width)))
            raise ValueError(f"{name} must be of shape ({expected}), got {shape}")

    def _refuse_unsupported(self, output_attentions: bool | None) -> None:
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions=True is not supported: attention runs over activated tokens in blocks and keeps no "
                "weights; output_router_probs=True shows which tokens attend"
            )
        if torch.jit.is_tracing():
            raise ValueError(
                "SeqBoat cannot be traced by torch.jit.trace: how many tokens attend depends on the data, and a trace "
                "would hold the number of its example; use torch.compile or torch.export"
            )

    def _cache_for(self, past_key_values: SeqBoatCache | None, use_cache: bool | None) -> SeqBoatCache | None:
        config = self.config
        if config.bidirectional:
            if past_key_values is not None or use_cache:
                raise ValueError(
                    "a bidirectional SeqBoat has no cache: use_cache must be False and past_key_values None"
                )
            return None
        kept = len(past_key_values.layers) if past_key_values is not None else config.num_hidden_layers
        if kept != len(self.layers[: config.num_hidden_layers]) and (
            past_key_values is not None or use_cache is not False
        ):
            raise ValueError(
                f"the model has {len(self.layers)} layers, the cache {kept}: set config.num_hidden_layers to the "
                "number of layers that run, and make the cache of that config"
            )
        # Without gradients, as in generate(), nothing is computed twice and a cache is as good as ever.
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError(
                    "a filled past_key_values cannot be continued under gradient checkpointing, which runs every "
                    "layer twice: use torch.no_grad(), model.eval() or model.gradient_checkpointing_disable()"
                )
            if past_key_values is not None or use_cache:
                logger.warning_once("no cache is kept under gradient checkpointing")
            return None
        if past_key_values is not None:
            past_key_values.check_config(config)
            return past_key_values
        if use_cache is None:
            # A training step that nobody asked a cache of does not pay for one, nor does a copy of the model that
            # nn.DataParallel made for one batch, and whose outputs it gathers. An exported graph has no cache of its
            # own.
            use_cache = config.use_cache and not self.training and not getattr(self, "_is_replica", False)
            use_cache = use_cache and not is_exporting()
        return SeqBoatCache(config) if use_cache else None

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be of dtype int64, got {input_ids.dtype}")
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        # An adapter or a wrapper in the embeddings' place has their weight, if anything.
        weight = getattr(self.embed_tokens, "weight", None)
        size = self.config.vocab_size if weight is None or weight.ndim != 2 else weight.shape[0]
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= size:
            raise ValueError(f"input_ids must lie in 0..{size - 1}, got {low if low < 0 else high}")


class SeqBoatForCausalLM(SeqBoatPreTrainedModel, SeqBoatGenerationMixin):
    """A causal SeqBoat with an output matrix, tied to the embeddings by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SeqBoatConfig):
        if config.bidirectional:
            raise ValueError("SeqBoatForCausalLM needs bidirectional=False, got bidirectional=True")
        super().__init__(config)
        self.model = SeqBoatModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: SeqBoatCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0, output_hidden_states: bool | int | list[int] | None = None,
        output_router_probs: bool = False, output_attentions: bool | None = None, cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None, seq_idx: Tensor | None = None, skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None, cache: SeqBoatCache | None = None,
        cache_params: SeqBoatCache | None = None, **kwargs,
    ) -> SeqBoatCausalLMOutput:  # fmt: skip
        """Runs the model and its output matrix.

        Args:
            labels: (B, L) int64 next-token targets before shifting (labels[t] is compared with what is predicted at
                the real token before t); -100, padding and the first token of a segment are ignored.
            shift_labels: (B, L) int64, by keyword only, in place of what is made of `labels`: the target of each
                column itself, as training with a sequence cut over processes passes them; -100 is ignored.
            use_cache: as in `SeqBoatModel.forward`, but by default not with labels.
            num_items_in_batch: how many targets all batches have whose gradients are summed; the loss is then the sum
                over this batch divided by it.
            logits_to_keep: how many of the last columns get logits (0: all), or the (n,) indices of those that do.
            skip_logits: whether `loss_implementation` liger computes the loss, and logits are None; by default in
                training only. The others, and calls without labels, have logits either way.

        The other arguments are those of `SeqBoatModel.forward`.

        Raises:
            ValueError: also where `loss_implementation` liger cannot run (the package is missing, the model is not on
                a GPU or in float64, lm_head has adapters, is quantised or sharded), with the reason.
        """
        # Not in the signature: Trainer takes every name there that holds "label" for a column that evaluation needs.
        shift_labels = kwargs.pop("shift_labels", None)
        refuse_unknown_arguments(type(self).forward, kwargs)
        given = input_ids if inputs_embeds is None else inputs_embeds
        self._expect_targets({"labels": labels, "shift_labels": shift_labels}, given, logits_to_keep)
        has_targets = labels is not None or shift_labels is not None
        # Whoever scores a text does not go on writing it, and would pay for a state.
        use_cache = False if use_cache is None and has_targets else use_cache
        wanted = self.training if skip_logits is None else skip_logits
        fused = has_targets and wanted and self.config.loss_implementation == "liger"
        if fused:
            expect_liger(self.lm_head)
        texts = Texts(attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "cu_seq_lens_k": cu_seq_lens_k}
        past = one_cache(past_key_values=past_key_values, cache=cache, cache_params=cache_params)
        extras = {"output_hidden_states": output_hidden_states, "output_router_probs": output_router_probs}
        extras |= {"output_attentions": output_attentions, "use_cache": use_cache, "return_dict": True}
        outputs = self.model(**inputs, **texts._asdict(), past_key_values=past, **extras)
        logits = None
        if not fused:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept, :].contiguous())
        loss = part = None
        if has_targets:
            marks = marks_of(outputs, self.config, texts)
            part, shift_labels = marks.part, self._next_labels(labels, marks) if shift_labels is None else shift_labels
            loss = self._loss(outputs.last_hidden_state, logits, shift_labels, num_items_in_batch, part)
        results = {"logits": logits, CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None}
        return self._output(SeqBoatCausalLMOutput, outputs, loss, shift_labels, num_items_in_batch, part, **results)

    def _expect_targets(self, targets: dict[str, Tensor | None], given: Tensor | None, kept: int | Tensor) -> None:
        """Raises ValueError for labels that do not fit the input, and for columns to keep that are none or do not fit
        the labels."""
        for name, labels in targets.items():
            if labels is None or given is None:
                continue
            expect_class_ids(name, labels, given.shape[:2], self.config.vocab_size)
            if not isinstance(kept, int) or 0 < kept < labels.shape[1]:
                raise ValueError(f"{name} need the logits of every column: logits_to_keep=0, got {kept}")
        if isinstance(kept, int):
            if kept < 0:
                raise ValueError(f"logits_to_keep must be at least 0 (0: all columns), got {kept}")
        elif getattr(kept, "dtype", None) not in (torch.int64, torch.int32) or kept.ndim != 1:
            raise ValueError(
                f"logits_to_keep must be an integer or int64 indices of columns, of shape (n,), got {kept!r}"
            )

    def _loss(
        self, hidden: Tensor, logits: Tensor | None, targets: Tensor, num_items: Tensor | int | None, part: Any
    ) -> Tensor:
        """Mean cross entropy of each column's target, over all parts of a sequence, from logits or, where there are
        none, by Liger."""
        counted = count_labels(targets, num_items, part)
        if logits is None:
            loss = fused_linear_cross_entropy(hidden, self.lm_head, targets, counted)
        else:
            options = {"vocab_size": self.config.vocab_size, "num_items_in_batch": counted}
            loss = self.loss_function(logits=logits, labels=targets, shift_labels=targets, **options)
        return loss if part is None else part.total(loss)

    @staticmethod
    def _next_labels(labels: Tensor, context: SequenceContext) -> Tensor:
        """Each real token's target is the next real token of its segment, so padding and packing cost no target."""
        batch, length = labels.shape
        if context.reset is not None:
            labels = labels.masked_fill(context.reset.to(labels.device), -100)
        # Of the last real token, whose target lies behind these columns.
        last = labels.new_full((batch, 1), -100)
        if context.part is not None:
            last = context.part.following_label(labels, context.real)
        if context.real is None:
            return torch.cat([labels[:, 1:], last], dim=1)
        real = context.real.to(labels.device)
        columns = torch.arange(length, device=labels.device)
        following = torch.where(real, columns, length).flip(1).cummin(1).values.flip(1)
        following = torch.cat([following[:, 1:], torch.full_like(following[:, :1], length)], dim=1)
        shifted = torch.cat([labels, last], dim=1).gather(1, following)
        return shifted.masked_fill(~real, -100)


def __getattr__(name: str) -> type:
    """Classes of the other file that `AUTO_CLASSES` names, without a circular import.

    Saving a model copies the files that its module imports; without this one a saved language model would name other
    heads in its auto_map and not bring their files.
    """
    if name in AUTO_CLASSES.values():
        from .heads_seqboat import HEADS

        return HEADS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Trainer's label smoothing shifts labels for the classes in this table only, and takes all others to predict the token
# that they read.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(SeqBoatConfig.model_type, SeqBoatForCausalLM.__name__)
