"""Heads: one answer a row (arXiv 2306.11197, section 4; Long Range Arena: texts, pictures, recordings) or one a token.

Letters: B batch, L columns, D hidden width, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import Texts, marks_of
from .modeling_seqboat import (
    AUTO_CLASSES,
    OUTPUT_FLAGS,
    RouterOutput,
    SeqBoatModel,
    SeqBoatModelOutput,
    SeqBoatPreTrainedModel,
    count_labels,
    expect_class_ids,
    main_input_name,
    refuse_unknown_arguments,
)
from .ops_layout_seqboat import must_not_wait


@dataclass
class SeqBoatClassifierOutput(RouterOutput, SequenceClassifierOutput):
    """loss (scalar, with labels), logits (B, C), and the first text's hidden_states, router_probs and router_penalty
    (of a pair: the mean of both texts') as in `SeqBoatModelOutput`; with `output_hidden_states` also pooled (B,
    features), what the classifier reads."""

    pooled: Tensor | None = None


@dataclass
class SeqBoatTokenOutput(RouterOutput, TokenClassifierOutput):
    """loss (scalar, with labels), logits (B, L, C) or (B, L, vocab), and the rest of `SeqBoatModelOutput`."""


@dataclass
class SeqBoatQuestionAnsweringOutput(RouterOutput, QuestionAnsweringModelOutput):
    """loss (scalar, with positions), start_logits and end_logits (B, L), and the rest of `SeqBoatModelOutput`."""


def pool_real(hidden: Tensor, real: Tensor | None, pooling_type: str) -> Tensor:
    """(B, L, D) -> (B, D): mean over real positions, or the first or last real position.

    Args:
        real: (B, L) bool, or None when every column is real. A row of pads gives 0.
    """
    if real is None:
        return hidden.mean(1) if pooling_type == "mean" else hidden[:, 0 if pooling_type == "first" else -1]
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


def refuse_unknown_of_head(forward: Callable, kwargs: dict) -> None:
    """Raises ValueError for arguments that no head takes, and for a cache, which none returns."""
    if kwargs.get("use_cache"):
        raise ValueError("this head reads a text once and returns no cache: use_cache must be False")
    refuse_unknown_arguments(forward, kwargs, also=("num_items_in_batch", "use_cache"))


def refuse_swallowed(forward: Callable, kwargs: dict) -> None:
    """Raises ValueError for arguments that a head with one answer a row would ignore."""
    packing = [name for name in ("seq_idx", "cu_seq_lens_q", "position_ids") if kwargs.get(name) is not None]
    if packing:
        raise ValueError(f"a head that pools takes one sequence a row, got {', '.join(packing)}: pad instead")
    refuse_unknown_of_head(forward, kwargs)


class SeqBoatHead(SeqBoatPreTrainedModel):
    """What the heads without a cache share."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        if type(self).main_input_name == "input_ids":
            self.main_input_name = main_input_name(config)
        self.num_labels = config.num_labels
        self.model = SeqBoatModel(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # By the linears: transformers does not ask for modules without parameters of their own, as the classifier is.
        head = getattr(self, "classifier", None)
        if isinstance(head, SeqBoatClassificationHead) and isinstance(module, nn.Linear) and module in head.children():
            init.xavier_uniform_(module.weight)

    def _run_model(self, kwargs: dict, **inputs) -> tuple[SeqBoatModelOutput, Tensor | None]:
        """The model's outputs for these inputs, extras of `kwargs` too, and the real columns (B, L) bool or None."""
        flags = {name: kwargs[name] for name in OUTPUT_FLAGS if name in kwargs}
        outputs = self.model(use_cache=False, return_dict=True, **inputs, **flags)
        return outputs, marks_of(outputs, self.config, Texts(inputs.get("attention_mask"))).real


class SeqBoatPooledClassifier(SeqBoatHead):
    """What the heads share that give one answer a row: pooling, the classifier and the loss."""

    def __init__(self, config: SeqBoatConfig):
        name = type(self).__name__
        if type(self).main_input_name != "input_ids":
            if config.input_type != "values":
                raise ValueError(f"{name} needs input_type='values', got input_type={config.input_type!r}")
            if config.pair_features != "none":
                got = f"got {config.pair_features!r}"
                raise ValueError(f"{name} reads one input a row: pair_features must be 'none', {got}")
        super().__init__(config)
        parts = {"none": 1, "concat": 2, "nli": 4}[config.pair_features]
        self.classifier = SeqBoatClassificationHead(config, parts * config.hidden_size)
        self.post_init()

    def _encode(self, kwargs: dict, **inputs) -> tuple[SeqBoatModelOutput, Tensor]:
        outputs, real = self._run_model(kwargs, **inputs)
        return outputs, pool_real(outputs.last_hidden_state, real, self.config.pooling_type)

    def _answer(
        self, outputs: SeqBoatModelOutput, features: Tensor, labels: Tensor | None, kwargs: dict
    ) -> SeqBoatClassifierOutput:
        logits, num_items = self.classifier(features), kwargs.get("num_items_in_batch")
        loss = None if labels is None else self._loss(logits, labels, num_items)
        # Trainer's evaluation gathers every tensor of an output that nobody asked to leave out.
        pooled = None if outputs.hidden_states is None else features
        return self._output(SeqBoatClassifierOutput, outputs, loss, labels, num_items, logits=logits, pooled=pooled)

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        classes = self._expect_answers(labels, logits.shape)
        counted = {"num_items_in_batch": count_labels(labels, num_items)} if classes else {}
        loss = self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config, **counted)
        if num_items is not None and not classes:
            # The losses of regression and of several labels at once are means and know no count: under gradient
            # accumulation each has to be weighted by its share of the labels.
            loss = loss * labels.numel() / count_labels(labels, num_items)
        return loss

    def _expect_answers(self, labels: Tensor, shape: tuple[int, int]) -> bool:
        """Whether the labels are one class a row, by the rules of transformers' loss. Raises ValueError unless shape
        and dtype fit: the losses of numbers would broadcast other shapes without a word.

        Args:
            shape: (B, C), of the logits.
        """
        problem, numbers = self.config.problem_type, [tuple(shape)]
        if problem is None:
            several = labels.is_floating_point() or labels.shape == shape
            problem = "multi_label_classification" if several else "single_label_classification"
            problem = "regression" if shape[1] == 1 else problem
        if problem == "single_label_classification":
            expect_class_ids("labels", labels, shape[:1], shape[1])
            return True
        if problem == "regression" and shape[1] == 1:
            numbers.insert(0, (shape[0],))
        if tuple(labels.shape) not in numbers:
            wanted = " or ".join(map(str, numbers))
            raise ValueError(f"labels must be of shape {wanted} for {problem}, got {tuple(labels.shape)}")
        if problem != "regression" and not labels.is_floating_point():
            raise ValueError(
                f"labels for several classes a row must be floating point, 0.0 or 1.0 each, got {labels.dtype}"
            )
        return False


class SeqBoatForSequenceClassification(SeqBoatPooledClassifier):
    """One label a sequence, or a pair of sequences when `pair_features` says how to join them."""

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
        if pair_attention_mask is not None and not wants_pair:
            raise ValueError("pair_attention_mask must not be given: pair_features is 'none', there is no second text")
        first = input_ids if inputs_embeds is None else inputs_embeds
        if wants_pair and first is not None and first.shape[:1] != pair_input_ids.shape[:1]:
            raise ValueError(
                f"pair_input_ids must have a row for each of the {first.shape[0]} first texts, got shape "
                f"{tuple(pair_input_ids.shape)}"
            )
        inputs = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        outputs, features = self._encode(kwargs, attention_mask=attention_mask, **inputs)
        if wants_pair:
            paired, other = self._encode({}, input_ids=pair_input_ids, attention_mask=pair_attention_mask)
            if paired.router_penalty is not None:
                outputs.router_penalty = (outputs.router_penalty + paired.router_penalty) / 2
            joined = [other, features]
            if self.config.pair_features == "nli":
                joined += [features * other, features - other]
            features = torch.cat(joined, dim=-1)
        return self._answer(outputs, features, labels, kwargs)


class SeqBoatForImageClassification(SeqBoatPooledClassifier):
    """One label a picture of one channel, read as a sequence of pixels, row by row (Long Range Arena)."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs
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
                f"pixel_values must be of shape (batch, 1, height, width), got {tuple(pixel_values.shape)}: each "
                "pixel is one step of the sequence, so a picture has one channel; make it grey first, for instance by "
                "np.asarray(image.convert('L'))"
            )
        return self._answer(*self._encode(kwargs, input_values=pixel_values.flatten(1)), labels, kwargs)


class SeqBoatForAudioClassification(SeqBoatPooledClassifier):
    """One label a recording, read sample by sample (the paper's raw speech task)."""

    main_input_name = "input_values"
    input_modalities = ("audio",)

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SeqBoatClassifierOutput:
        """Classifies recordings.

        Args:
            input_values: (B, L) float samples, as feature extractors return them.
            attention_mask: (B, L), 0 at padding; without it padding would be heard as silence.
            labels: as in `SeqBoatForSequenceClassification.forward`.
        """
        refuse_swallowed(type(self).forward, kwargs)
        encoded = self._encode(kwargs, input_values=input_values, attention_mask=attention_mask)
        return self._answer(*encoded, labels, kwargs)


class SeqBoatTokenHead(SeqBoatHead):
    """What the heads share that give one answer a token."""

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, input_values: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None, **kwargs,
    ) -> SeqBoatTokenOutput:  # fmt: skip
        """Scores every token.

        Args:
            input_ids: (B, L) int64, or input_values: (B, L) float for `input_type` values, or inputs_embeds.
            labels: (B, L) int64: a token's class, or of a masked one the original id; -100 and padding are ignored.

        The other arguments are those of `SeqBoatModel.forward`; rows may be packed.
        """
        refuse_unknown_of_head(type(self).forward, kwargs)
        inputs = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        texts = Texts(attention_mask, position_ids, seq_idx, cu_seq_lens_q)._asdict()
        outputs, real = self._run_model(kwargs, cu_seq_lens_k=cu_seq_lens_k, **inputs, **texts)
        logits, options = self._logits(outputs.last_hidden_state)
        loss, num_items = None, kwargs.get("num_items_in_batch")
        if labels is not None:
            expect_class_ids("labels", labels, logits.shape[:2], logits.shape[2])
            # Whatever the collator wrote there.
            labels = labels if real is None else labels.masked_fill(~real, -100)
            counted = count_labels(labels, num_items)
            loss = self.loss_function(logits=logits, labels=labels, num_items_in_batch=counted, **options)
        return self._output(SeqBoatTokenOutput, outputs, loss, labels, num_items, logits=logits)

    def _logits(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, L, D) -> logits (B, L, C), and options of the loss function."""
        raise NotImplementedError


class SeqBoatForTokenClassification(SeqBoatTokenHead):
    """One label a token."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
        self.classifier = SeqBoatClassificationHead(config, config.hidden_size)
        self.post_init()

    def _logits(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        hidden = F.dropout(hidden, self.config.hidden_dropout, self.training)
        return self.classifier(hidden), {"config": self.config}


def _real_columns(name: str, positions: Tensor, real: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """(B,) or (B, 1) positions as (B,). Raises ValueError where a column that holds padding is said to be an end of
    the answer."""
    batch, length = shape
    columns = positions.flatten()
    if columns.shape != (batch,):
        raise ValueError(f"{name} must be of shape {(batch,)}, got {tuple(positions.shape)}")
    if columns.dtype != torch.int64:
        raise ValueError(f"{name} must be of dtype int64, got {columns.dtype}")
    if must_not_wait(columns.device):
        return columns
    if bool((columns < 0).any()):
        raise ValueError(
            f"{name} must be at least 0 ({length} or more: no answer in this row), got {columns.tolist()}"
        )
    if real is None:
        return columns
    padding = (columns < length) & ~real.gather(1, columns.clamp_max(length - 1)[:, None])[:, 0]
    if bool(padding.any()):
        row = int(padding.nonzero()[0])
        raise ValueError(
            f"{name} is {int(columns[row])} in row {row}, where attention_mask has padding: positions are columns of "
            "the padded row, so padding on the left moves them"
        )
    return columns


def _answer_loss(logits: Tensor, at: Tensor) -> Tensor:
    """Mean cross entropy of (B, L) logits over the rows whose column `at` (B,) is below L; 0 where there is none."""
    length = logits.shape[1]
    at = at.to(logits.device).clamp(max=length)
    total = F.cross_entropy(logits, at, ignore_index=length, reduction="sum")
    return total / (at < length).sum().clamp(min=1)


class SeqBoatForQuestionAnswering(SeqBoatHead):
    """The first and the last token of a row's answer."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config)
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
        inputs = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        outputs, real = self._run_model(kwargs, attention_mask=attention_mask, **inputs)
        logits = self.qa_outputs(outputs.last_hidden_state)
        if real is not None:
            logits = logits.masked_fill(~real[..., None], torch.finfo(logits.dtype).min)
        start, end = logits.unbind(-1)
        loss = None
        if start_positions is not None:
            first = _real_columns("start_positions", start_positions, real, start.shape)
            last = _real_columns("end_positions", end_positions, real, end.shape)
            # The library's mean over no answer at all would be NaN.
            loss = (_answer_loss(start.float(), first) + _answer_loss(end.float(), last)) / 2
        return self._output(
            SeqBoatQuestionAnsweringOutput, outputs, loss, start_positions, None, start_logits=start, end_logits=end
        )


class SeqBoatForMaskedLM(SeqBoatTokenHead):
    """A bidirectional SeqBoat with an output matrix, tied to the embeddings by default: the token at every column is
    predicted from both sides. Labels are the original ids where tokens were masked."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SeqBoatConfig):
        if not config.bidirectional:
            raise ValueError("SeqBoatForMaskedLM needs bidirectional=True, got bidirectional=False")
        if config.input_type != "tokens":
            raise ValueError(f"SeqBoatForMaskedLM needs input_type='tokens', got input_type={config.input_type!r}")
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _logits(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.lm_head(hidden), {"vocab_size": self.config.vocab_size}


# What `__getattr__` of modeling_seqboat looks up.
HEADS = {name: globals()[name] for name in AUTO_CLASSES.values() if name in globals()}
