"""The states of many texts in one pool, one page each, read and written where they lie. Knows nothing of vLLM.

Letters: B rows of a step, L tokens, P pages, D channels, W memory size, T truncation.
"""

import torch
from torch import Tensor

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.cache_seqboat import SeqBoatCacheLayer
from modeling_seqboat.context_seqboat import SequenceContext
from modeling_seqboat.ssm_seqboat import RECURRENCES, Before


def page_layout(config: SeqBoatConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a page, by name. Their bytes follow one another in this order, the widest
    first, so that each begins where its dtype may.

    Args:
        dtype: the model's.
    """
    layers, memory = config.num_hidden_layers, config.memory_size
    layout = {
        "activated_count": ((layers,), torch.int64),
        "positions": ((layers, memory), torch.int64),
        "ssm_state": ((layers, *RECURRENCES[config.ssm_type].state_shape(config)), torch.float32),
        "keys": ((layers, memory, config.qk_head_dim), dtype),
        "values": ((layers, memory, config.v_head_dim), dtype),
    }
    if config.ssm_truncation is not None:
        layout["ssm_inputs"] = ((layers, config.ssm_truncation, config.hidden_size), dtype)
    return layout


def empty_pages(config: SeqBoatConfig, count: int, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """`count` pages of zeros, as `PagedCache` takes them: each tensor (P, *shape)."""
    layout = page_layout(config, dtype).values()
    return [torch.zeros(count, *shape, dtype=kind, device=device) for shape, kind in layout]


class _PagedLayer(SeqBoatCacheLayer):
    """One layer of pages, for one forward: either one text's page (a view, B = 1), or one column of B texts, whose
    memory, state and inputs are looked up by `pages`."""

    def __init__(self, config: SeqBoatConfig):
        super().__init__(config, static=True)
        self.is_initialized = True

    def initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """The pages are there."""

    @property
    def batch_size(self) -> int:
        return self.token_count.shape[0]

    def recent_inputs(self, count: int | None = None) -> Tensor | None:
        if self.ssm_inputs is None:
            return None
        span = self.truncation if count is None else min(count, self.truncation)
        tokens = self.token_count[:, None] + torch.arange(span, device=self.token_count.device)
        pages = torch.zeros_like(self.token_count) if self.pages is None else self.pages
        # A page may hold inputs of the text that had it before.
        return self.ssm_inputs[pages[:, None], tokens % self.truncation].masked_fill(
            (tokens < self.truncation)[:, :, None], 0
        )

    def before(self, length: int) -> Before:
        before = super().before(length)
        if self.pages is None:
            return before
        return before._replace(state=self.ssm_state.index_select(0, self.pages))

    def start_segments(self, reset: Tensor) -> None:
        """`PagedCache.step` has emptied what the counts say."""

    def _step(self, context: SequenceContext, hidden: Tensor, state: Tensor) -> None:
        if self.pages is None:
            super()._step(context, hidden, state)
            return
        if self.ssm_inputs is not None:
            at = context.positions[:, 0] % self.truncation
            self.ssm_inputs[self.pages, at] = hidden[:, 0].to(self.ssm_inputs.dtype)
        self.ssm_state.index_copy_(0, self.pages, state)


class PagedCache(SeqBoatCache):
    """Runs texts whose states are the pages of a pool. No page is copied: texts go on within their own, and a step of
    many texts finds theirs by number.

    Args:
        config: of the model; pages: what `page_layout` names, each (P, *shape), the pages in any stride.
    """

    def __init__(self, config: SeqBoatConfig, pages: list[Tensor]):
        super().__init__(config, static=True)
        self.layers = [_PagedLayer(config) for _ in range(config.num_hidden_layers)]
        self.pool = dict(zip(page_layout(config, pages[-1].dtype), pages, strict=True))

    def _lay(self, chosen: dict[str, Tensor], pages: Tensor | None) -> None:
        """Gives the layers their tensors, the layers being the second dimension of each."""
        for index, layer in enumerate(self.layers):
            for name, tensor in chosen.items():
                setattr(layer, name, tensor[:, index])
            layer.pages, layer.is_blank = pages, False

    def prompts(
        self, model: SeqBoatForCausalLM, texts: list[Tensor], pages: list[int], starts: list[int]
    ) -> list[Tensor]:
        """Reads the next tokens of several texts. Those that begin are read together, padded to no more than twice
        their tokens, and written into their pages; the others go on within their pages one by one.

        Args:
            texts: (L,) int64 each; pages: one each; starts: how many tokens each text has had.

        Returns:
            (L, D) each, the last hidden states.
        """
        found: list[Tensor | None] = [None] * len(texts)
        waiting = sorted((i for i, start in enumerate(starts) if start == 0), key=lambda i: len(texts[i]))
        while waiting:
            group = [i for i in waiting if len(texts[i]) <= 2 * len(texts[waiting[0]])]
            waiting = waiting[len(group) :]
            hidden = self._begin(model, [texts[i] for i in group], [pages[i] for i in group])
            for i, row in zip(group, hidden, strict=True):
                found[i] = row[: len(texts[i])]
        for i, start in enumerate(starts):
            if start > 0:
                found[i] = self._go_on(model, texts[i], pages[i], start)
        return found

    def _begin(self, model: SeqBoatForCausalLM, texts: list[Tensor], pages: list[int]) -> Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        cache = SeqBoatCache(self.config)
        hidden = model.model(input_ids=ids, attention_mask=mask, past_key_values=cache).last_hidden_state
        at = torch.tensor(pages, device=ids.device)
        for index, layer in enumerate(cache.layers):
            for name, tensor in self.pool.items():
                state, target = getattr(layer, name), tensor[:, index]
                # A memory that has not yet had W tokens may be shorter.
                target = target if state.dim() == 1 else target[:, : state.shape[1]]
                target[at] = state
        return hidden

    def _go_on(self, model: SeqBoatForCausalLM, text: Tensor, page: int, start: int) -> Tensor:
        self._lay({name: tensor[page : page + 1] for name, tensor in self.pool.items()}, None)
        for layer in self.layers:
            layer.token_count, layer.seen = torch.full((1,), start, device=text.device), start
        return model.model(input_ids=text[None], past_key_values=self).last_hidden_state[0]

    def step(self, model: SeqBoatForCausalLM, ids: Tensor, pages: Tensor, positions: Tensor) -> Tensor:
        """Reads one token of each of B texts. No shape and, on a GPU, no branch depends on the data.

        Args:
            ids: (B,) int64; pages: (B,) int64, which may repeat where nobody will read the page; positions: (B,)
                int64, how many tokens each text has had: at 0 its page counts as empty.

        Returns:
            (B, D), the last hidden states.
        """
        counts = self.pool["activated_count"].index_select(0, pages).mul_((positions > 0)[:, None]).t().contiguous()
        # `position_ids` of 0 restart a text; where none was read there would be nothing to restart.
        seen = positions.clamp_min(1)
        self._lay(self.pool, pages)
        for layer, count in zip(self.layers, counts, strict=True):
            layer.activated_count, layer.token_count = count, seen
        hidden = model.model(
            input_ids=ids[:, None], position_ids=positions[:, None], past_key_values=self
        ).last_hidden_state
        self.pool["activated_count"].index_copy_(0, pages, counts.t())
        return hidden[:, 0]
