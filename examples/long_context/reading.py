"""Reads a long text once through a model's cache, and scores the questions at its end.

What comes before the questions goes through in chunks of one size, of which no logits are kept, so that the memory
needed does not depend on the length. The rest goes token by token, and what the attention of each layer weighs most is
noted where an answer is predicted.

Letters: B texts, L tokens, Q questions, A tokens of an answer, n layers, W memory size.
"""

from dataclasses import dataclass

import torch
from recall_models import cache_argument, cache_bytes, new_cache
from recall_tasks import Batch
from torch import Tensor, nn

from modeling_seqboat import SeqBoatForCausalLM
from modeling_seqboat.ops_attention_seqboat import apply_rotary, attention_weights


@dataclass(frozen=True)
class Reading:
    """What a model made of some texts.

    Attributes:
        right: (B, Q) bool, all tokens of the answer are the most likely ones.
        bits: (B, Q) float64, bits that the answer costs.
        activated: (n, kinds) int64 and tokens (kinds,) int64: activated and all tokens by kind; no layers for a model
            without routers.
        spans: (n, S) float64, tokens from where an answer is predicted to the activated key that the layer weighs most
            there; NaN where the layer does not attend.
        cache_bytes: of the cache after the last token.
    """

    right: Tensor
    bits: Tensor
    activated: Tensor
    tokens: Tensor
    spans: Tensor
    cache_bytes: int


class SpanWatch:
    """Notes, while a SeqBoat decodes token by token, how far back each layer's attention looks.

    Only where positions enter through queries and keys (`position_embedding_type` rotary or none); `spans` stays empty
    for other models. Use it as a context manager.

    Attributes:
        noting: whether the next token counts.
        spans: one list a layer of (B,) float64: tokens back to the key that is weighed most; NaN in rows that do not
            attend.
        means: the same of the distances' mean, by the attention's weights.
        reaches: the same of the oldest key that the memory holds.
    """

    def __init__(self, model: nn.Module):
        self.spans: list[list[Tensor]] = []
        self.means: list[list[Tensor]] = []
        self.reaches: list[list[Tensor]] = []
        self.noting = False
        self._handles = []
        if isinstance(model, SeqBoatForCausalLM) and model.config.position_embedding_type in ("rotary", "none"):
            for layer in model.model.layers:
                lists = [], [], []
                for kept, new in zip((self.spans, self.means, self.reaches), lists, strict=True):
                    kept.append(new)
                # Before the layer's attention runs, its memory does not hold the token yet.
                self._handles.append(layer.attention.register_forward_pre_hook(self._look(*lists)))

    def _look(self, spans: list[Tensor], means: list[Tensor], reaches: list[Tensor]):
        def look(attention: nn.Module, arguments: tuple) -> None:
            if not self.noting:
                return
            x, active, _, context, cache, _ = arguments
            rows, config = active[:, 0].nonzero()[:, 0], attention.config
            z = attention.activation(attention.in_proj(x[rows, 0]))[:, : config.qk_head_dim]
            q, k = (z * s + o for s, o in zip(attention.qk_scale, attention.qk_offset, strict=True))
            if context.cos is not None:
                q, k = (apply_rotary(part, context.cos[rows, 0], context.sin[rows, 0]) for part in (q, k))
            keys = torch.cat([cache.keys[rows].to(k.dtype), k[:, None]], dim=1)
            scores = (keys @ q[:, :, None])[:, :, 0].float() * attention.scale
            size = keys.shape[1] - 1
            slots = torch.arange(size + 1, device=x.device)
            # The ring's slots that are filled, and the token itself.
            visible = (slots < cache.activated_count[rows, None].clamp_max(size)) | (slots == size)
            weights = attention_weights(scores, visible, config.attention_activation)
            here = context.positions[rows, :1]
            distances = here - torch.cat([cache.positions[rows], here], dim=1)
            # Weights of squared ReLU need not sum to one, and may all be zero.
            total = weights.sum(1).clamp_min(torch.finfo(weights.dtype).tiny)
            found = (
                distances.gather(1, weights.argmax(1, keepdim=True))[:, 0].double(),
                (weights * distances).sum(1).double() / total,
                distances.masked_fill(~visible, 0).amax(1).double(),
            )
            for kept, values in zip((spans, means, reaches), found, strict=True):
                all_rows = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
                all_rows[rows] = values
                kept.append(all_rows.cpu())

        return look

    def __enter__(self) -> "SpanWatch":
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def read_texts(model: nn.Module, batch: Batch, kinds: int, chunk_size: int = 8192) -> Reading:
    """Reads texts through the cache and scores their answers, each predicted with the right tokens before it.

    Args:
        batch: texts of one length, with as many questions each, at their end.
        kinds: how many kinds of tokens there are.
        chunk_size: tokens of one forward before the questions.

    Raises:
        ValueError: for a chunk size below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    model.eval()
    device = next(model.parameters()).device
    tokens, cache = torch.from_numpy(batch.tokens), new_cache(model)
    answers, kind = torch.from_numpy(batch.answers), torch.from_numpy(batch.kinds)
    # The first column that predicts an answer, and the chunks before it.
    tail = int(answers.min()) - 1
    borders = [*range(0, tail, chunk_size), *range(tail, tokens.shape[1])]
    watches_routers = isinstance(model, SeqBoatForCausalLM)
    layers = model.config.num_hidden_layers if watches_routers else 0
    activated, predicted = torch.zeros(layers, kinds, dtype=torch.long), []
    wanted = {cache_argument(model): cache} | ({"output_router_probs": True} if watches_routers else {})
    answering = {int(column) - 1 for column in answers[:, :, 0].flatten()}
    with SpanWatch(model) as watch:
        for first, end in zip(borders[:-1], borders[1:], strict=True):
            watch.noting = first in answering and end == first + 1
            chunk = tokens[:, first:end].to(device)
            output = model(input_ids=chunk, use_cache=True, logits_to_keep=1, **wanted)
            if first >= tail:
                predicted.append(output.logits[:, 0].float().cpu())
            for layer, probs in enumerate(output.router_probs if watches_routers else ()):
                marks = (probs > 0).cpu()
                activated[layer] += torch.bincount(kind[:, first:end][marks], minlength=kinds)
        # Where questions differ in length, rows answer in different columns.
        answers_there = (answers[:, :, 0, None] - 1 == torch.tensor(sorted(answering))).any(1)
        spans = [torch.stack(layer, 1)[answers_there] for layer in watch.spans]
    logits = torch.stack(predicted, 1)
    columns, rows = answers - 1 - tail, torch.arange(len(tokens))[:, None, None]
    chosen, target = logits[rows, columns], tokens[rows, answers]
    loss = -chosen.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return Reading(
        right=(chosen.argmax(-1) == target).all(-1),
        bits=loss.double().sum(-1) / torch.tensor(2.0).double().log(),
        activated=activated,
        tokens=torch.bincount(kind[:, :-1].flatten(), minlength=kinds),
        spans=torch.stack(spans) if spans else torch.zeros(0, 0, dtype=torch.float64),
        cache_bytes=cache_bytes(cache),
    )
