"""Heads that give an answer a token: token classification, question answering, masked language modelling.

Letters: B batch, L columns, D hidden width, C labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import marks_of, must_not_wait
from .heads_seqboat import SeqBoatClassificationHead, init_classification_head, refuse_swallowed
from .modeling_seqboat import (
    SeqBoatModel,
    SeqBoatPreTrainedModel,
    expect_class_ids,
    main_input_name,
    refuse_unknown_arguments,
)


@dataclass
class SeqBoatTokenOutput(ModelOutput):
    """loss (scalar, with labels), logits (B, L, C) or (B, L, vocab), and hidden_states, router_probs and
    router_penalty as in `SeqBoatModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None
    router_penalty: Tensor | None = None


@dataclass
class SeqBoatQuestionAnsweringOutput(ModelOutput):
    """loss (scalar, with positions), start_logits and end_logits (B, L), and hidden_states, router_probs and
    router_penalty as in `SeqBoatModelOutput`."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None
    router_penalty: Tensor | None = None


def _ignore_padding(labels: Tensor, real: Tensor | None) -> Tensor:
    """Labels at padding are -100, whatever the collator wrote there. real: (B, L) bool, or None for all."""
    return labels if real is None else labels.masked_fill(~real, -100)


def _loss_arguments(kwargs: dict, labels: Tensor) -> dict:
    """How many labels the loss is a mean over; at least one, so that a batch without any gives 0 and not NaN."""
    count = kwargs.get("num_items_in_batch")
    return {"num_items_in_batch": (labels != -100).sum().clamp_min(1) if count is None else count}


class SeqBoatForTokenClassification(SeqBoatPreTrainedModel):
    """One label a token."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        self.main_input_name = main_input_name(config)
        self.num_labels = config.num_labels
        self.model = SeqBoatModel(config)
        self.classifier = SeqBoatClassificationHead(config, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_classification_head(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_probs: bool = False,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs,
    ) -> SeqBoatTokenOutput:
        """Classifies every token.

        Args:
            input_ids: (B, L) int64, or input_values: (B, L) float for `input_type` values, or inputs_embeds.
            labels: (B, L) int64; -100 and padding are ignored.

        The other arguments are those of `SeqBoatModel.forward`; rows may be packed.
        """
        refuse_unknown_arguments(type(self).forward, kwargs, also=("num_items_in_batch",))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            input_values=input_values,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
            output_attentions=output_attentions,
            cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx,
            return_dict=True,
        )
        hidden = F.dropout(outputs.last_hidden_state, self.config.hidden_dropout, self.training)
        logits = self.classifier(hidden)
        loss = None
        if labels is not None:
            expect_class_ids("labels", labels, hidden.shape[:2], self.config.num_labels)
            labels = _ignore_padding(labels, marks_of(outputs, self.config, attention_mask).real)
            loss = self.loss_function(logits, labels, self.config, **_loss_arguments(kwargs, labels))
            loss = self._with_router_penalty(loss, outputs.router_penalty, labels, kwargs.get("num_items_in_batch"))
        return SeqBoatTokenOutput(loss, logits, outputs.hidden_states, outputs.router_probs, outputs.router_penalty)


def _expect_real(name: str, positions: Tensor, real: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises ValueError where a column that holds padding is said to be an end of the answer."""
    batch, length = shape
    columns = positions.flatten()
    if columns.shape != (batch,):
        raise ValueError(f"{name} must be of shape {(batch,)}, got {tuple(positions.shape)}")
    if must_not_wait(columns.device):
        return
    if bool((columns < 0).any()):
        raise ValueError(
            f"{name} must be at least 0 ({length} or more: no answer in this row), got {columns.tolist()}"
        )
    if real is None:
        return
    padding = (columns < length) & ~real.gather(1, columns.clamp_max(length - 1)[:, None])[:, 0]
    if bool(padding.any()):
        row = int(padding.nonzero()[0])
        raise ValueError(
            f"{name} is {int(columns[row])} in row {row}, where attention_mask has padding: positions are columns of the "
            "padded row, so padding on the left moves them"
        )


def _answer_loss(logits: Tensor, at: Tensor) -> Tensor:
    """Mean cross entropy of (B, L) logits over the rows whose column `at` (B,) is below L; 0 where there is none."""
    length = logits.shape[1]
    at = at.to(logits.device).clamp(max=length)
    total = F.cross_entropy(logits, at, ignore_index=length, reduction="sum")
    return total / (at < length).sum().clamp(min=1)


class SeqBoatForQuestionAnswering(SeqBoatPreTrainedModel):
    """The first and the last token of a row's answer."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        self.main_input_name = main_input_name(config)
        self.model = SeqBoatModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_probs: bool = False,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SeqBoatQuestionAnsweringOutput:
        """Scores every token as the start and the end of the answer.

        Args:
            input_ids: (B, L) int64, or input_values: (B, L) float for `input_type` values, or inputs_embeds.
            start_positions, end_positions: (B,) int64 columns, padding counted; L or more means no answer in this row.

        Returns:
            Logits that are the least finite number at padding, so that padding takes no part in a softmax.

        Raises:
            ValueError: for packed rows (a row has one answer), and where one of the positions is missing.
        """
        refuse_swallowed(type(self).forward, kwargs)
        if (start_positions is None) != (end_positions is None):
            missing = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(f"{missing} is missing: give both positions or none")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_values=input_values,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.qa_outputs(outputs.last_hidden_state)
        real = marks_of(outputs, self.config, attention_mask).real
        if real is not None:
            logits = logits.masked_fill(~real[..., None], torch.finfo(logits.dtype).min)
        start, end = logits.unbind(-1)
        loss = None
        if start_positions is not None:
            for name, at in (("start_positions", start_positions), ("end_positions", end_positions)):
                _expect_real(name, at, real, logits.shape[:2])
            # The library's mean over no answer at all would be NaN.
            parts = [_answer_loss(start.float(), start_positions), _answer_loss(end.float(), end_positions)]
            loss = (parts[0] + parts[1]) / 2
            loss = self._with_router_penalty(loss, outputs.router_penalty, start_positions, None)
        return SeqBoatQuestionAnsweringOutput(
            loss, start, end, outputs.hidden_states, outputs.router_probs, outputs.router_penalty
        )


class SeqBoatForMaskedLM(SeqBoatPreTrainedModel):
    """A bidirectional SeqBoat with an output matrix, tied to the embeddings by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SeqBoatConfig):
        if not config.bidirectional:
            raise ValueError("SeqBoatForMaskedLM needs bidirectional=True, got bidirectional=False")
        if config.input_type != "tokens":
            raise ValueError(f"SeqBoatForMaskedLM needs input_type='tokens', got input_type={config.input_type!r}")
        super().__init__(config)
        self.model = SeqBoatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_probs: bool = False,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs,
    ) -> SeqBoatTokenOutput:
        """Predicts the token at every column from both sides.

        Args:
            labels: (B, L) int64, the original ids where tokens were masked; -100 elsewhere, and padding, are ignored.

        The other arguments are those of `SeqBoatModel.forward`; rows may be packed.
        """
        refuse_unknown_arguments(type(self).forward, kwargs, also=("num_items_in_batch",))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
            output_attentions=output_attentions,
            cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx,
            return_dict=True,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            expect_class_ids("labels", labels, logits.shape[:2], self.config.vocab_size)
            labels = _ignore_padding(labels, marks_of(outputs, self.config, attention_mask).real)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **_loss_arguments(kwargs, labels)
            )
            loss = self._with_router_penalty(loss, outputs.router_penalty, labels, kwargs.get("num_items_in_batch"))
        return SeqBoatTokenOutput(loss, logits, outputs.hidden_states, outputs.router_probs, outputs.router_penalty)


TOKEN_HEADS = (SeqBoatForTokenClassification, SeqBoatForQuestionAnswering, SeqBoatForMaskedLM)
