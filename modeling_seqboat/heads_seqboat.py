"""Heads of the bidirectional SeqBoat (arXiv 2306.11197, section 4; Long Range Arena).

Letters: B batch, L columns, D hidden width, C labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import real_columns
from .modeling_seqboat import SeqBoatModel, SeqBoatPreTrainedModel


@dataclass
class SeqBoatClassifierOutput(ModelOutput):
    """loss (scalar, with labels), logits (B, C), pooled (B, features), and the first text's hidden_states and
    router_probs as in `SeqBoatModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooled: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None


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
        self.out_proj = nn.Linear(hidden or width, config.num_labels, bias=hidden == 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None:
            x = self.activation(F.dropout(self.dense(x), self.config.hidden_dropout, self.training))
        return self.out_proj(x)


class SeqBoatForSequenceClassification(SeqBoatPreTrainedModel):
    """One label a sequence, or a pair of sequences when `pair_features` says how to join them."""

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
        if isinstance(module, SeqBoatClassificationHead):
            for linear in (module.dense, module.out_proj):
                if linear is not None:
                    init.xavier_uniform_(linear.weight)
                    if linear.bias is not None:
                        init.zeros_(linear.bias)

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
        output_hidden_states: bool | None = None,
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
        packing = [name for name in ("seq_idx", "cu_seq_lens_q", "position_ids") if kwargs.get(name) is not None]
        if packing:
            raise ValueError(f"a head that pools takes one sequence a row, got {', '.join(packing)}: pad instead")
        wants_pair = self.config.pair_features != "none"
        if wants_pair != (pair_input_ids is not None):
            raise ValueError(
                f"pair_features is {self.config.pair_features!r}, so pair_input_ids must "
                + ("be given" if wants_pair else "not be given")
            )
        asked = {
            "output_hidden_states": output_hidden_states,
            "output_router_probs": output_router_probs,
            "output_attentions": output_attentions,
        }
        outputs, features = self._encode(input_ids, attention_mask, input_values, inputs_embeds, **asked)
        if wants_pair:
            _, other = self._encode(pair_input_ids, pair_attention_mask, None, None)
            joined = [other, features]
            if self.config.pair_features == "nli":
                joined += [features * other, features - other]
            features = torch.cat(joined, dim=-1)
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SeqBoatClassifierOutput(
            loss=loss,
            logits=logits,
            pooled=features,
            hidden_states=outputs.hidden_states,
            router_probs=outputs.router_probs,
        )

    def _encode(self, input_ids, attention_mask, input_values, inputs_embeds, **asked):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_values=input_values,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            return_dict=True,
            **asked,
        )
        hidden = outputs.last_hidden_state
        real = real_columns(attention_mask, hidden.shape[0], hidden.shape[1], None)
        return outputs, pool_real(hidden, real, self.config.pooling_type)
