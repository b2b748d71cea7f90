"""Heads that give one answer a row (arXiv 2306.11197, section 4; Long Range Arena): texts, pictures, recordings.

Letters: B batch, L columns, D hidden width, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import marks_of
from .modeling_seqboat import (
    SeqBoatModel,
    SeqBoatModelOutput,
    SeqBoatPreTrainedModel,
    expect_class_ids,
    main_input_name,
    refuse_unknown_arguments,
)


@dataclass
class SeqBoatClassifierOutput(ModelOutput):
    """loss (scalar, with labels), logits (B, C), and the first text's hidden_states, router_probs and
    router_penalty (of a pair: the mean of both texts') as in `SeqBoatModelOutput`; with `output_hidden_states` also pooled (B, features), what the classifier reads."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooled: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None
    router_penalty: Tensor | None = None


def pool_real(hidden: Tensor, real: Tensor | None, pooling_type: str) -> Tensor:
    """(B, L, D) -> (B, D): mean over real positions, or the first or last real position.

    Args:
        real: (B, L) bool, or None when every column is real. A row of pads gives 0.
    """
    if real is None:
        return {"mean": lambda: hidden.mean(1), "first": lambda: hidden[:, 0], "last": lambda: hidden[:, -1]}[
            pooling_type
        ]()
    if pooling_type == "mean":
        summed = hidden.masked_fill(~real[..., None], 0).sum(1)
        return summed / real.sum(1, keepdim=True).clamp_min(1)
    columns = torch.arange(real.shape[1], device=real.device)
    if pooling_type == "first":
        at = torch.where(real, columns, real.shape[1] - 1).amin(1)
    else:
        at = torch.where(real, columns, 0).amax(1)
    picked = hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
    return picked.masked_fill(~real.any(1, keepdim=True), 0)


class SeqBoatClassificationHead(nn.Module):
    """linear, dropout, activation, linear without bias; or one linear with bias when `classifier_hidden_size` is 0."""

    def __init__(self, config: SeqBoatConfig, width: int):
        super().__init__()
        self.config = config
        hidden = config.classifier_hidden_size
        self.dense = nn.Linear(width, hidden) if hidden else None
        self.activation = ACT2FN[config.classifier_act]
        self.output = nn.Linear(hidden or width, config.num_labels, bias=hidden == 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None:
            x = self.activation(F.dropout(self.dense(x), self.config.hidden_dropout, self.training))
        return self.output(x)


def init_classification_head(module: nn.Module) -> None:
    """Xavier weights and zero biases, where `module` is a `SeqBoatClassificationHead`."""
    if isinstance(module, SeqBoatClassificationHead):
        for linear in (module.dense, module.output):
            if linear is not None:
                init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    init.zeros_(linear.bias)


def refuse_packing(kwargs: dict) -> None:
    """Raises ValueError where arguments speak of several sequences in one row."""
    packing = [name for name in ("seq_idx", "cu_seq_lens_q", "position_ids") if kwargs.get(name) is not None]
    if packing:
        raise ValueError(f"a head that pools takes one sequence a row, got {', '.join(packing)}: pad instead")


def refuse_swallowed(forward: Callable, kwargs: dict) -> None:
    """Raises ValueError for arguments that a head with one answer a row would ignore."""
    refuse_packing(kwargs)
    if kwargs.get("use_cache"):
        raise ValueError("this head reads a text once and returns no cache: use_cache must be False")
    refuse_unknown_arguments(forward, kwargs, also=("num_items_in_batch", "use_cache"))


def refuse_other_than_values(config: SeqBoatConfig, name: str) -> None:
    """Raises ValueError unless the config is that of a single sequence of real numbers."""
    if config.input_type != "values":
        raise ValueError(f"{name} needs input_type='values', got input_type={config.input_type!r}")
    if config.pair_features != "none":
        raise ValueError(f"{name} reads one input a row: pair_features must be 'none', got {config.pair_features!r}")


class SeqBoatPooledClassifier(SeqBoatPreTrainedModel):
    """What the heads share that give one answer a row: the model, pooling, the classifier and the loss."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SeqBoatModel(config)
        parts = {"none": 1, "concat": 2, "nli": 4}[config.pair_features]
        self.classifier = SeqBoatClassificationHead(config, parts * config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_classification_head(module)

    def _encode(self, attention_mask: Tensor | None, **kwargs) -> tuple[SeqBoatModelOutput, Tensor]:
        outputs = self.model(attention_mask=attention_mask, use_cache=False, return_dict=True, **kwargs)
        real = marks_of(outputs, self.config, attention_mask).real
        return outputs, pool_real(outputs.last_hidden_state, real, self.config.pooling_type)

    def _answer(
        self, outputs: SeqBoatModelOutput, features: Tensor, labels: Tensor | None, num_items_in_batch=None
    ) -> SeqBoatClassifierOutput:
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
            loss = self._with_router_penalty(loss, outputs.router_penalty, labels, num_items_in_batch)
        return SeqBoatClassifierOutput(
            loss=loss,
            logits=logits,
            # Trainer's evaluation gathers every tensor of an output that nobody asked to leave out.
            pooled=None if outputs.hidden_states is None else features,
            hidden_states=outputs.hidden_states,
            router_probs=outputs.router_probs,
            router_penalty=outputs.router_penalty,
        )

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        counted = {} if num_items is None else {"num_items_in_batch": num_items}
        classes = self.config.problem_type in (None, "single_label_classification") and self.num_labels > 1
        if classes and labels.dtype == torch.int64:
            expect_class_ids("labels", labels, logits.shape[:1], self.num_labels)
            # At least one, so that a batch without any label has the loss 0 and not NaN.
            counted = counted or {"num_items_in_batch": (labels != -100).sum().clamp(min=1)}
        loss = self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config, **counted)
        if num_items is not None and self.config.problem_type != "single_label_classification":
            # The losses of regression and of several labels at once are means and know no count: under gradient
            # accumulation each has to be weighted by its share of the labels.
            loss = loss * labels.numel() / num_items
        return loss


class SeqBoatForSequenceClassification(SeqBoatPooledClassifier):
    """One label a sequence, or a pair of sequences when `pair_features` says how to join them."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        self.main_input_name = main_input_name(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_probs: bool = False,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SeqBoatClassifierOutput:
        """Classifies sequences.

        Args:
            input_ids: (B, L) int64, or input_values: (B, L) float for `input_type` values, or inputs_embeds.
            attention_mask: (B, L), 0 at padding.
            pair_input_ids, pair_attention_mask: the second text, with `pair_features`.
            labels: (B,) int64 classes, (B, C) float for several at once, or (B,) float for regression.

        Raises:
            ValueError: for packed rows (a pooled head has one output a row) and for a missing or unwanted pair.
        """
        refuse_swallowed(type(self).forward, kwargs)
        wants_pair = self.config.pair_features != "none"
        if wants_pair != (pair_input_ids is not None):
            raise ValueError(
                f"pair_features is {self.config.pair_features!r}, so pair_input_ids must "
                + ("be given" if wants_pair else "not be given")
            )
        outputs, features = self._encode(
            attention_mask,
            input_ids=input_ids,
            input_values=input_values,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
            output_attentions=output_attentions,
        )
        if wants_pair:
            paired, other = self._encode(pair_attention_mask, input_ids=pair_input_ids)
            if paired.router_penalty is not None:
                outputs.router_penalty = (outputs.router_penalty + paired.router_penalty) / 2
            joined = [other, features]
            if self.config.pair_features == "nli":
                joined += [features * other, features - other]
            features = torch.cat(joined, dim=-1)
        return self._answer(outputs, features, labels, kwargs.get("num_items_in_batch"))


class SeqBoatForImageClassification(SeqBoatPooledClassifier):
    """One label a picture of one channel, read as a sequence of pixels, row by row (Long Range Arena's image tasks)."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: SeqBoatConfig):
        refuse_other_than_values(config, type(self).__name__)
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_probs: bool = False,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SeqBoatClassifierOutput:
        """Classifies pictures.

        Args:
            pixel_values: (B, 1, H, W) float, as image processors return them; column t of the sequence is row t // W,
                column t % W of the picture.
            labels: as in `SeqBoatForSequenceClassification.forward`.

        Raises:
            ValueError: for more than one channel, another shape, or a mask: a picture has no padding.
        """
        refuse_swallowed(type(self).forward, kwargs)
        if pixel_values is None:
            raise ValueError("give pixel_values of shape (batch, 1, height, width)")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 1:
            raise ValueError(
                f"pixel_values must be of shape (batch, 1, height, width), got {tuple(pixel_values.shape)}: each pixel "
                "is one step of the sequence, so a picture has one channel; make it grey first, for instance by "
                "np.asarray(image.convert('L'))"
            )
        if kwargs.get("attention_mask") is not None:
            raise ValueError("a picture has no padding: attention_mask must not be given")
        outputs, features = self._encode(
            None,
            input_values=pixel_values.flatten(1),
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
            output_attentions=output_attentions,
        )
        return self._answer(outputs, features, labels, kwargs.get("num_items_in_batch"))


class SeqBoatForAudioClassification(SeqBoatPooledClassifier):
    """One label a recording, read sample by sample (the paper's raw speech task)."""

    main_input_name = "input_values"
    input_modalities = ("audio",)

    def __init__(self, config: SeqBoatConfig):
        refuse_other_than_values(config, type(self).__name__)
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_probs: bool = False,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SeqBoatClassifierOutput:
        """Classifies recordings.

        Args:
            input_values: (B, L) float samples, as feature extractors return them.
            attention_mask: (B, L), 0 at padding; without it padding would be heard as silence.
            labels: as in `SeqBoatForSequenceClassification.forward`.
        """
        refuse_swallowed(type(self).forward, kwargs)
        outputs, features = self._encode(
            attention_mask,
            input_values=input_values,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
            output_attentions=output_attentions,
        )
        return self._answer(outputs, features, labels, kwargs.get("num_items_in_batch"))


POOLED_HEADS = (SeqBoatForSequenceClassification, SeqBoatForImageClassification, SeqBoatForAudioClassification)
