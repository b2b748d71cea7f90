"""Compression: which activated tokens form the stream that attention runs over, and where each stands in it.

Letters: B batch, L columns, R = B * L, W memory size, M activated tokens of all rows, Mk keys (memory entries and new tokens).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ActivatedStream:
    """The activated tokens of all rows, row after row, each row led by its memory (arXiv 2306.11197, section 3.2).

    Attributes:
        flat: (M,) int64, places of the activated tokens in (B * L); row, column: (M,) int64.
        ordinal: (M,) int64, how many activated tokens the token's segment had before it, memory included.
        current: (M,) bool, whether its segment is the last of the row.
        key_index: (M,) int64, place of each new token among the Mk keys.
        key_start, key_end: (M,) int64, the keys each token attends to.
        memory_row, memory_slot, memory_index: where each memory entry comes from and its place among the keys; None
            without a memory.
        num_keys: Mk.
    """

    flat: Tensor
    row: Tensor
    column: Tensor
    ordinal: Tensor
    current: Tensor
    key_index: Tensor
    key_start: Tensor
    key_end: Tensor
    memory_row: Tensor | None
    memory_slot: Tensor | None
    memory_index: Tensor | None
    num_keys: int

    def with_memory(self, new: Tensor, memory: Tensor | None) -> Tensor:
        """(M, ...) of the new tokens and (B, W, ...) of the memory -> (Mk, ...) keys in stream order."""
        if self.memory_row is None:
            return new
        old = memory[self.memory_row, self.memory_slot].to(new.dtype)
        stream = new.new_empty(self.num_keys, *new.shape[1:])
        return stream.index_copy(0, self.memory_index, old).index_copy(0, self.key_index, new)


@dataclass
class TokenStream:
    """The activated tokens of a batch, none of which has a memory before it.

    Attributes:
        slot: (R,) int64, the place of each activated token in the stream, -1 for the others.
        index: (M,) int64, places of the activated tokens among the R; -1 where a padded stream has none.
        key_start, key_end: (M,) int64, the keys each attends to.
        padded: whether the stream may be longer than its tokens.
    """

    slot: Tensor
    index: Tensor
    key_start: Tensor
    key_end: Tensor
    padded: bool


def build_stream(
    active: Tensor, segment: Tensor | None, memory_size: int, bidirectional: bool, activated_count: Tensor | None
) -> ActivatedStream:
    """Compresses a batch.

    Args:
        active: (B, L) bool, True at activated (hence real) tokens.
        segment: (B, L) int64, how many segments have started in the row up to each column (0: the one that the
            cache holds), or None when none starts.
        memory_size: W; a token attends to itself and the W activated tokens of its segment before it (and after it
            when `bidirectional`).
        activated_count: (B,) int64 of the cache (see SeqBoatCacheLayer), or None without one.

    Returns:
        `ActivatedStream`. M depends on the data: this is the layer's one synchronisation with the device.
    """
    length = active.shape[1]
    flat = active.flatten().nonzero()[:, 0]
    row = flat // length
    count = flat.shape[0]
    part = None if segment is None else segment.flatten()[flat]
    label = row * (length + 1) if part is None else row * (length + 1) + part
    new_index = torch.arange(count, device=active.device)
    memory_row = memory_slot = memory_index = None
    skipped = None
    if activated_count is None:
        key_index, key_label, num_keys = new_index, label, count
    else:
        new_counts = active.sum(1)
        # A row without a new token needs no memory.
        filled = activated_count.clamp_max(memory_size) * (new_counts > 0)
        memory_row, age = (torch.arange(memory_size, device=active.device) < filled[:, None]).nonzero(as_tuple=True)
        skipped = activated_count - filled
        memory_slot = (skipped[memory_row] + age) % memory_size
        key_index = new_index + filled.cumsum(0)[row]
        memory_index = torch.arange(memory_row.shape[0], device=active.device)
        memory_index = memory_index + (new_counts.cumsum(0) - new_counts)[memory_row]
        num_keys = count + memory_row.shape[0]
        key_label = label.new_empty(num_keys)
        key_label[memory_index] = memory_row * (length + 1)
        key_label[key_index] = label
    first = torch.searchsorted(key_label, label)
    key_start = torch.maximum(key_index - memory_size, first)
    key_end = key_index + 1
    if bidirectional:
        key_end = torch.minimum(key_index + memory_size + 1, torch.searchsorted(key_label, label, right=True))
    ordinal = key_index - first
    if skipped is not None:
        ordinal = ordinal + (skipped[row] if part is None else torch.where(part == 0, skipped[row], 0))
    current = torch.ones_like(row, dtype=torch.bool) if part is None else part == segment[row, -1]
    return ActivatedStream(
        flat, row, flat % length, ordinal, current, key_index, key_start, key_end,
        memory_row, memory_slot, memory_index, num_keys,
    )  # fmt: skip
