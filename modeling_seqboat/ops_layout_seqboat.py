"""Bookkeeping of padding and packing: which columns are real, where segments start, which position each token has.

Letters: B batch, L columns, R = B * L, C chunk length, S slots of a row (a multiple of C), G chunks of a row (S / C),
W memory size, M activated tokens of all rows, F memory entries, Mk keys (memory entries and activated tokens).

Nothing here knows of parameters or features; every function takes masks and positions and returns integers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


def is_exporting() -> bool:
    """Whether `torch.export` traces. `torch.compiler.is_exporting` is no answer: torch 2.11 has compilers take it for
    True under `torch.compile` too."""
    return torch.compiler._is_exporting_flag


def must_not_wait(device: torch.device) -> bool:
    """Whether no value may be read off the device: a compiler traces, or a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@dataclass
class ScanPlan:
    """Where each real token goes when rows are cut into chunks that never span two segments.

    Pads are dropped, every segment begins at a chunk border, and unused slots (at the end of a segment's last chunk)
    hold zeros. A row without pads and with one segment needs no index at all: `source` and `slot` are None.

    Attributes:
        chunk_size: C.
        num_chunks: G, the same for all rows.
        source: (B, S) int64, the column that each slot reads, L where the slot is unused; None for the identity.
        slot: (B, L) int64, the slot of each column (0 at pads); None for the identity.
        first_chunk: (B, G + 1) int64, for each chunk border the border at which its segment starts; None when no
            segment starts inside the row (then every border belongs to the segment that the state comes from).
        last_chunk: (B,) int64, the chunk of each row's last real token (0 for a row of pads).
        last_length: (B,) int64, how many tokens that chunk holds (0 for a row of pads).
    """

    chunk_size: int
    num_chunks: int
    source: Tensor | None
    slot: Tensor | None
    first_chunk: Tensor | None
    last_chunk: Tensor
    last_length: Tensor


@dataclass
class MemoryKeys:
    """How the memory of a cache joins the keys: each row's entries stand before its activated tokens.

    Attributes:
        row, ring_index: (F,) int64, where in the cache's ring each entry is, a row's oldest first.
        key_index: (F,) int64, its place among the Mk keys; new_index: (M,) int64, those of the activated tokens.
        num_keys: Mk.
    """

    row: Tensor
    ring_index: Tensor
    key_index: Tensor
    new_index: Tensor
    num_keys: int

    def join(self, ring: Tensor, new: Tensor) -> Tensor:
        """(B, W, ...) of the memory and (M, ...) of the activated tokens -> (Mk, ...)."""
        old = ring[self.row, self.ring_index].to(new.dtype)
        keys = new.new_empty(self.num_keys, *new.shape[1:])
        return keys.index_copy(0, self.key_index, old).index_copy(0, self.new_index, new)


@dataclass
class Packed:
    """The activated tokens of all rows, row after row (arXiv 2306.11197, section 3.2).

    Attributes:
        index: (M,) int64, where each is among the R tokens, -1 where a list that is longer than its tokens has none.
            In a decode step None means all rows, activated or not.
        packed_index: (R,) int64, the other way round, -1 for tokens that are not activated; None where only torch ops
            follow, which do without, and in a decode step of all rows.
        key_start, key_end: (M,) int64, the keys each attends to; None in a decode step.
        total: (R,) integer, activated tokens up to and including each; None in a decode step.
        memory: how a cache's entries join the keys, or None.
        padded: whether the list may be longer than its tokens.
    """

    index: Tensor | None
    packed_index: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    total: Tensor | None = None
    memory: MemoryKeys | None = None
    padded: bool = False

    def wait(self) -> "Packed":
        """As of a list that the device is still making."""
        return self

    @property
    def steps(self) -> bool:
        """Whether this is one column whose tokens attend to the cache's ring as it lies there."""
        return self.key_start is None

    @property
    def skips(self) -> bool:
        """Whether this is a step in which no row attends."""
        return self.key_start is None and self.index is not None and self.index.shape[0] == 0


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """(B, n, D) at (B, m) int64 -> (B, m, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def segment_bounds(reset: Tensor) -> Tensor:
    """First and last column of each token's segment as places among all B * L: (2, B * L) int64. Pads behind the last
    token of a segment count to it.

    Args:
        reset: (B, L) bool, True where a segment starts.
    """
    batch, length = reset.shape
    columns = torch.arange(length, device=reset.device)
    first = torch.where(reset, columns, 0).cummax(1).values
    following = F.pad(torch.where(reset, columns - 1, length - 1)[:, 1:], (0, 1), value=length - 1)
    last = following.flip(1).cummin(1).values.flip(1)
    row = torch.arange(batch, device=columns.device)[:, None] * length
    return torch.stack([first + row, last + row]).flatten(1)


def memory_before(active: Tensor, activated_count: Tensor, memory_size: int) -> Tensor:
    """(B,) int64: the memory entries that each row's new tokens may attend to, none for a row without new tokens.

    Args:
        active: (B, L) bool; activated_count: (B,) int64, activated tokens of the segment that a cache has seen.
    """
    return activated_count.clamp_max(memory_size) * active.any(1)


def lead_with_memory(
    packed: Packed, length: int, memory_size: int, activated_count: Tensor, filled: Tensor, segment, num_entries: int
) -> Packed:
    """Puts each row's memory before its activated tokens.

    Args:
        packed: of a causal model, without memory.
        length: L.
        activated_count, filled: (B,) int64, see `memory_before`.
        segment: (B, L) int64, segments started in the row up to each column; those of segment 0 continue the memory.
            None where none starts.
        num_entries: F, the sum of `filled`.
    """
    device, index = filled.device, packed.index
    row_end = packed.total.view(-1, length)[:, -1].long()
    row_start = F.pad(row_end, (1, 0))[:-1]
    shift = filled.cumsum(0)
    row = torch.repeat_interleave(filled, output_size=num_entries)
    age = torch.arange(num_entries, device=device) - (shift - filled)[row]
    ring_index = ((activated_count - filled)[row] + age) % memory_size
    entries = torch.arange(num_entries, device=device) + row_start[row]
    row_of = index // length
    own_shift = shift[row_of]
    new_index = torch.arange(index.shape[0], device=device) + own_shift
    start = packed.key_start + own_shift
    behind = torch.maximum(new_index - memory_size, (row_start + shift - filled)[row_of])
    start = behind if segment is None else torch.where(segment.flatten()[index] == 0, behind, start)
    memory = MemoryKeys(row, ring_index, entries, new_index, num_entries + index.shape[0])
    return replace(packed, key_start=start, key_end=packed.key_end + own_shift, memory=memory)


def build_scan_plan(
    batch: int, length: int, chunk_size: int, device: torch.device, real: Tensor | None, reset: Tensor | None
) -> ScanPlan:
    """Lays (B, L) columns out in chunks.

    Args:
        batch, length: B and L.
        chunk_size: C >= 1.
        device: of the index tensors.
        real: (B, L) bool, True at real tokens, or None when all are.
        reset: (B, L) bool, True where a segment starts (read at real tokens only), or None when none does.

    Returns:
        `ScanPlan`. With `reset` the number of chunks depends on the data, which synchronises with the device once.
    """
    # Of an exported graph that takes any length, no row is an even number of chunks.
    if real is None and reset is None and isinstance(length, int):
        chunks = max(1, -(-length // chunk_size))
        last = torch.full((batch,), chunks - 1, dtype=torch.long, device=device)
        tail = torch.full((batch,), length - (chunks - 1) * chunk_size, dtype=torch.long, device=device)
        return ScanPlan(chunk_size, chunks, None, None, None, last, tail)
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
    order = real.long().cumsum(1) - 1
    counts = order[:, -1] + 1
    if reset is None:
        slot = order
        # Sizes that may be 1 would make an exporter ask which it is.
        chunks = (length + chunk_size - 1) // chunk_size + (0 if isinstance(length, int) else 1)
        first_chunk = None
        last_chunk = (counts - 1).clamp_min(0) // chunk_size
        last_length = counts - last_chunk * chunk_size
    else:
        starts = reset & real
        ordinal = starts.long().cumsum(1)
        # Segment sizes, the tokens before the first start being segment 0, give each segment's first chunk.
        sizes = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
        sizes.scatter_add_(1, ordinal, real.long())
        chunks_of = -(-sizes // chunk_size)
        chunk_start = chunks_of.cumsum(1) - chunks_of
        chunks = max(1, int(chunks_of.sum(1).max()))
        before = sizes.cumsum(1) - sizes
        place = order - before.gather(1, ordinal)
        slot = chunk_start.gather(1, ordinal) * chunk_size + place
        last_ordinal = torch.where(real, ordinal, 0).amax(1, keepdim=True)
        last_size = sizes.gather(1, last_ordinal)[:, 0]
        last_in_segment = (last_size - 1).clamp_min(0) // chunk_size
        last_chunk = chunk_start.gather(1, last_ordinal)[:, 0] + last_in_segment
        last_length = last_size - last_in_segment * chunk_size
        # A border that a segment starts at: the state is dropped there. Segment 0 keeps border 0 and no drop.
        border = torch.zeros(batch, chunks + 1, dtype=torch.long, device=device)
        at = torch.where(starts, slot // chunk_size, 0)
        border.scatter_reduce_(1, at, torch.where(starts, at + 1, 0), "amax")
        # -1 marks "no segment has started yet": such borders continue the incoming state.
        first_chunk = border.cummax(1).values - 1
    slots = chunks * chunk_size
    slot = torch.where(real, slot, slots)
    source = torch.full((batch, slots + 1), length, dtype=torch.long, device=device)
    columns = torch.arange(length, device=device).expand(batch, -1)
    source.scatter_(1, slot, columns)
    slot = torch.where(real, slot, 0)
    return ScanPlan(chunk_size, chunks, source[:, :slots].contiguous(), slot, first_chunk, last_chunk, last_length)


def to_slots(x: Tensor, plan: ScanPlan) -> Tensor:
    """(B, L, D) columns -> (B, S, D) slots, zeros in unused ones. Values at pads are never read."""
    slots = plan.num_chunks * plan.chunk_size
    if plan.source is None:
        return F.pad(x, (0, 0, 0, slots - x.shape[1]))
    taken = rows_at(x, plan.source.clamp_max(x.shape[1] - 1))
    return taken.masked_fill((plan.source == x.shape[1])[:, :, None], 0)


def in_chunks(slots: Tensor, plan: ScanPlan) -> Tensor:
    """(B, S, ...) -> (B, G, C, ...)."""
    size, chunks = plan.chunk_size, plan.num_chunks
    if isinstance(chunks, int):
        return slots.view(slots.shape[0], chunks, size, *slots.shape[2:])
    # Of a length that it does not know, an exporter does not see that a view would fit.
    device = slots.device
    return slots[:, torch.arange(chunks, device=device)[:, None] * size + torch.arange(size, device=device)]


def to_columns(y: Tensor, plan: ScanPlan, length: int, real: Tensor | None) -> Tensor:
    """(B, S, D) slots -> (B, L, D) columns, zeros at pads."""
    if plan.slot is None:
        return y[:, :length]
    taken = rows_at(y, plan.slot)
    return taken if real is None else taken.masked_fill(~real[:, :, None], 0)


def _order(real: Tensor | None, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of (B, L) columns: which are real; how many real ones come before each, -1 at pads before the first; and, in (B,
    L + 1), the column of the n-th real token."""
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
    order = real.long().cumsum(1) - 1
    columns = torch.arange(length, device=device).expand(batch, -1)
    nth = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
    return real, order, nth.scatter_(1, torch.where(real, order, length), columns)


def shift_real_tokens(
    x: Tensor, lag: int, real: Tensor | None, reset: Tensor | None, history: Tensor | None
) -> Tensor:
    """x delayed by `lag` real tokens of the same segment.

    Args:
        x: (B, L, D); values at pads are not read.
        lag: T >= 1.
        real, reset: as in `build_scan_plan`.
        history: (B, T, D), the last T real tokens before column 0, oldest first, zeros where there were fewer, or
            None; the first L of them do where L < T.

    Returns:
        (B, L, D): at a real token the value T real tokens before it, 0 where its segment is younger than that;
        0 at pads.
    """
    batch, length, width = x.shape
    # An exported graph takes any length.
    short = not is_exporting() and length <= lag
    held = length if short else lag
    if history is None:
        history = x.new_zeros(batch, held, width)
    history = history[:, :held].to(x.dtype)
    if real is None and reset is None:
        return history if short else torch.cat([history, x], dim=1)[:, :length]
    # A row of at most T columns hears of tokens before it alone.
    extended = history if short else torch.cat([history, x], dim=1)
    known, order, nth = _order(real, batch, length, x.device)
    wanted = order - lag
    # The T history entries come first.
    source = torch.where(wanted < 0, wanted + lag, nth.gather(1, wanted.clamp_min(0)) + lag)
    source = source.clamp(0, extended.shape[1] - 1)
    if reset is not None:
        known = known & (wanted >= torch.where(reset & known, order, -lag).cummax(1).values)
    return rows_at(extended, source).masked_fill(~known[:, :, None], 0)


def last_real_tokens(x: Tensor, count: int, real: Tensor | None, reset: Tensor | None, history: Tensor) -> Tensor:
    """The last T real tokens of each row's last segment, continuing `history`.

    Args:
        x: (B, L, D); values at pads are not read.
        count: T.
        real, reset: as in `build_scan_plan`.
        history: (B, T, D), the last T before column 0, oldest first, zeros where there were fewer.

    Returns:
        (B, T, D) of `history`'s dtype, oldest first, zeros where the segment is shorter.
    """
    batch, length, width = x.shape
    if real is None and reset is None:
        newest = x[:, max(0, length - count) :].to(history.dtype)
        # A window would keep the whole forward's inputs alive; `contiguous` leaves that of a single row as it is.
        return torch.cat([history[:, length:], newest], dim=1) if length < count else newest.clone()
    extended = torch.cat([history, x.to(history.dtype)], dim=1)
    real_columns, order, nth = _order(real, batch, length, x.device)
    wanted = order[:, -1:] + 1 - count + torch.arange(count, device=x.device)
    source = torch.where(wanted < 0, wanted + count, nth.gather(1, wanted.clamp(0, length)) + count)
    source = source.clamp(0, count + length - 1)
    taken = rows_at(extended, source)
    if reset is None:
        return taken
    first = torch.where(reset & real_columns, order, -count).amax(1, keepdim=True)
    return taken.masked_fill((wanted < first)[:, :, None], 0)


def real_ordinals(
    batch: int, length: int, device: torch.device, real: Tensor | None, reset: Tensor | None, tokens: Tensor | None
) -> Tensor:
    """(B, L) int64: how many real tokens of its segment stand before each column's, and before a pad's next real token
    one less.

    Args:
        batch, length, device, real, reset: as in `build_scan_plan`.
        tokens: (B,) int64, real tokens of the segment before column 0, or None for none.
    """
    order = torch.arange(length, device=device).expand(batch, -1) if real is None else real.long().cumsum(1) - 1
    if reset is None:
        return order if tokens is None else order + tokens[:, None]
    starts = reset if real is None else reset & real
    first = torch.where(starts, order, 0 if tokens is None else -tokens[:, None]).cummax(1).values
    return order - first
