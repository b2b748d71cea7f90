"""The states of many texts in one pool, one page each, read and written where they lie. Knows nothing of vLLM.

Letters: B rows of a step, P pages, K layers, D channels, N states a channel, W memory size, Z key width, V value width,
T truncation.
"""

from collections.abc import Iterator

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

    def _step(self, context: SequenceContext, hidden: Tensor, state: Tensor, active: Tensor) -> None:
        if self.pages is None:
            super()._step(context, hidden, state, active)
            return
        if self.ssm_inputs is not None:
            at = context.positions[:, 0] % self.truncation
            self.ssm_inputs[self.pages, at] = hidden[:, 0].to(self.ssm_inputs.dtype)
        self.activated_count.add_(active[:, 0])
        self.ssm_state.index_copy_(0, self.pages, state)


class PagedCache(SeqBoatCache):
    """Runs texts whose states are the pages of a pool. No page is copied: prompts write into their own, and a step of
    many texts finds theirs by number.

    Args:
        config: of the model; pages: what `page_layout` names, each (P, *shape), the pages in any stride.
    """

    def __init__(self, config: SeqBoatConfig, pages: list[Tensor]):
        super().__init__(config, static=True)
        self.layers = [_PagedLayer(config) for _ in range(config.num_hidden_layers)]
        self.pool = dict(zip(page_layout(config, pages[-1].dtype), pages, strict=True))

    def _lay(self, chosen: dict[str, Tensor], token_count: Tensor, pages: Tensor | None, blank: bool) -> None:
        """Gives the layers their tensors, the layers being the second dimension of each."""
        for index, layer in enumerate(self.layers):
            for name, tensor in chosen.items():
                setattr(layer, name, tensor[:, index])
            layer.token_count, layer.pages, layer.is_blank = token_count, pages, blank
            layer.seen = 0

    def prompt(self, model: SeqBoatForCausalLM, ids: Tensor, page: int, start: int) -> Tensor:
        """Reads the next tokens of one text.

        Args:
            ids: (L,) int64; page: the text's; start: how many tokens it has had, 0 empties the page first.

        Returns:
            (L, D), the last hidden states.
        """
        chosen = {name: tensor[page : page + 1] for name, tensor in self.pool.items()}
        if start == 0:
            for tensor in chosen.values():
                tensor.zero_()
        self._lay(chosen, torch.full((1,), start, device=ids.device), None, start == 0)
        for layer in self.layers:
            layer.token_count = layer.token_count.clone()
        return model.model(input_ids=ids[None], past_key_values=self).last_hidden_state[0]

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
        self._lay(self.pool, positions.clamp_min(1), pages, False)
        for layer, count in zip(self.layers, counts, strict=True):
            layer.activated_count = count
        hidden = model.model(
            input_ids=ids[:, None], position_ids=positions[:, None], past_key_values=self
        ).last_hidden_state
        self.pool["activated_count"].index_copy_(0, pages, counts.t())
        return hidden[:, 0]

    def __iter__(self) -> Iterator:
        raise TypeError("the pages of a pool are no outputs to be joined")
