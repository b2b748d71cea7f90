"""Compression and what surrounds it: the list of activated tokens, their rows, and how results return to the columns.

Letters: B batch, L columns, R = B * L tokens, D width, W memory size, M activated tokens of all rows, F memory
entries.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels_seqboat import Facts, needs_silu, op
from .ops_layout_seqboat import Packed, lead_with_memory, memory_before
from .triton_rows_seqboat import (
    extract_residual_triton,
    gather_rows_triton,
    linear_triton,
    norm_residual_triton,
    pack_triton,
    write_memory_triton,
)


def _needs_row_norm(facts: Facts) -> str | None:
    return "norm_type='batchnorm' has no kernel" if facts.norm_type == "batchnorm" else None


@op("pack", triton=pack_triton)
def pack(
    active: Tensor,
    memory_size: int,
    bidirectional: bool,
    bounds: Tensor | None = None,
    *,
    capacity: int | None = None,
    memory: tuple[Tensor, Tensor | None] | None = None,
) -> Packed:
    """Compresses a batch (arXiv 2306.11197, section 3.2).

    Args:
        active: (B, L) bool, True at activated (hence real) tokens.
        memory_size: W; a token attends to itself and the W activated tokens of its segment before it (and after it
            when `bidirectional`).
        bounds: first and last column of each token's segment, (2, R) int64 places among the R; None where every row is
            one segment.
        capacity: for the kernel alone, see `pack_triton`.
        memory: where a cache is continued, its `activated_count` (B,) int64, and the segments that have started in
            each row up to each column, (B, L) int64 or None where none starts.

    Returns:
        What `wait()` makes a `Packed` of, as it is one here. M depends on the data: this is the layer's one
        synchronisation with the device.
    """
    if capacity is not None:
        raise ValueError(
            "a list of fixed capacity needs the Triton kernels: kernel_backend 'auto' or 'triton' on a GPU"
        )
    length = active.shape[1]
    flat = active.flatten()
    index = flat.nonzero()[:, 0]
    total = flat.cumsum(0)
    place = torch.arange(index.shape[0], device=active.device)
    if bounds is None:
        first = index // length * length
        last = first + length - 1
    else:
        first, last = bounds[0][index], bounds[1][index]
    start = torch.maximum(place - memory_size, F.pad(total, (1, 0))[first])
    end = place + 1
    if bidirectional:
        end = torch.minimum(place + memory_size + 1, total[last])
    packed = Packed(index, None, start, end, total)
    if memory is not None:
        count, segment = memory
        filled = memory_before(active, count, memory_size)
        packed = lead_with_memory(packed, length, memory_size, count, filled, segment, int(filled.sum()))
    return packed


def pack_step(active: Tensor, all_rows: bool) -> Packed:
    """The rows that a decode step computes: those that are activated where looking for them is free, else all.

    Args:
        active: (B, 1) bool; all_rows: whether rows that are not activated cost nothing anyway.
    """
    if active.device.type == "cpu" and not all_rows and not torch.compiler.is_compiling():
        rows = active[:, 0].nonzero()[:, 0]
        if rows.shape[0] < active.shape[0]:
            return Packed(rows)
    return Packed(None)


@op("gather_rows", triton=gather_rows_triton)
def gather_rows(x: Tensor, index: Tensor, packed_index: Tensor | None) -> Tensor:
    """Compress: (R, D) -> (M, D), the rows of the activated tokens; arguments as in `Packed`."""
    return x.index_select(0, index)


@op("write_memory", triton=write_memory_triton, used=lambda facts: not facts.bidirectional)
def write_memory(
    ring: list[Tensor], new: list[Tensor], total: Tensor, first: Tensor | None, activated_count: Tensor
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Puts the activated tokens of some columns in the memory, in place: that with ordinal i of its segment in slot
    i % S, where a later one takes its place (arXiv 2306.11197, section 3.4).

    Args:
        ring: keys (B, S, Z), values (B, S, V) and positions (B, S).
        new: the same of the activated tokens, (M, Z), (M, V) and (M,), in order.
        total: (B, L) integer, activated tokens of the batch up to and including each.
        first: (B,) integer, activated tokens of the batch before each row's first that is to be written; None for all.
        activated_count: (B,) int64, activated tokens of each row's segment before these columns.

    Returns:
        The new activated_count (B,); and what was written over: (B, n) int64 slots, and the entries of each ring
        (B, n, ...). The kernel does not keep these: None and nothing.
    """
    batch, length = total.shape
    end = total[:, -1].long()
    begin = F.pad(end, (1, 0))[:-1] if first is None else first
    count, slots = end - begin, ring[0].shape[1]
    after = activated_count + count
    written = min(slots, length, new[0].shape[0])
    if written == 0:
        return after, None, []
    # The last tokens of each row, newest first, and where they stand in the memory.
    age = torch.arange(written, device=count.device)
    is_new = age < count[:, None]
    place = (end[:, None] - 1 - age).clamp_min(0)
    slot, overwritten = (after[:, None] - 1 - age) % slots, []
    for entries, rows in zip(ring, new, strict=True):
        shape = (batch, written, *[1] * (entries.dim() - 2))
        at = slot.view(shape).expand(batch, written, *entries.shape[2:])
        overwritten.append(entries.gather(1, at))
        entries.scatter_(1, at, torch.where(is_new.view(shape), rows[place].to(entries.dtype), overwritten[-1]))
    return after, slot, overwritten


@op("extract_residual", triton=extract_residual_triton, needs=(needs_silu,))
def extract_residual(
    hidden: Tensor,
    residual: Tensor,
    out: Tensor,
    confidence: Tensor,
    packed: Packed,
    dropout_p: float = 0.0,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """Extract and residual (arXiv 2306.11197, section 3.2):
    activation(dropout(hidden + confidence * out[packed_index]) + residual).

    Args:
        hidden, residual: (R, D); their dtypes may differ.
        out: (M, D), the attention's output for the activated tokens; M may be 0.
        confidence: (R,) float32, 0 where not activated.
        dropout_p: the dropout's probability, below 1.

    Returns:
        (R, D) of the wider dtype of hidden and residual.
    """
    if packed.index is None:
        hidden = hidden + (out * confidence[:, None]).to(hidden.dtype)
    elif not packed.skips:
        added = (out * confidence[packed.index, None]).to(hidden.dtype)
        hidden = hidden.index_add(0, packed.index, added)
    if dropout_p > 0:
        hidden = F.dropout(hidden, dropout_p)
    return activation(hidden + residual)


@op("norm_residual", triton=norm_residual_triton, needs=(_needs_row_norm,))
def norm_residual(
    x: Tensor,
    norm: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """A norm at the entry of a layer, and x itself for the residual, whose gradients meet in one kernel.

    Args:
        x: (B, L, D).
        norm: what the torch twin runs, (B, L, D) -> (B, L, D).
        weight, bias, eps, centered: what the kernel runs, see `norm_residual_triton`.
        dtype: of the normalised output.

    Returns:
        The normalised (B, L, D) of `dtype`, and x.
    """
    return norm(x).to(dtype), x


@op("linear", triton=linear_triton)
def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, x contiguous, which quantised layers rely on; the kernel makes the gradient of its bias."""
    return module(x.contiguous())
