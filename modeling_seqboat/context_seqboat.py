"""What every layer needs to know about the columns of one forward, made once from masks, positions and packing
arguments.

Letters: B batch, L columns, Z query/key width.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_seqboat import SeqBoatConfig
from .kernels_seqboat import Ops, select_ops
from .ops_attention_seqboat import rotary_tables
from .ops_ema_seqboat import chunk_size_for
from .ops_layout_seqboat import ScanPlan, build_scan_plan, is_exporting, must_not_wait, real_ordinals, segment_bounds

if TYPE_CHECKING:
    from .cache_seqboat import SeqBoatCache


class Texts(NamedTuple):
    """What a caller says of the texts in the columns, all as in `SeqBoatModel.forward`."""

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None


class SequenceContext:
    """What every layer needs to know about the columns of one forward.

    Not a dataclass: FSDP2 takes those apart that a layer is given, and casts their tensors to its own precision.

    Attributes:
        real: (B, L) bool, False at pads; None when every column is real.
        reset: (B, L) bool, True at real tokens whose segment starts there; None when none does.
        segment: (B, L) int64, segments started in the row up to each column; None with `reset`.
        positions: (B, L) int64, places among the segment's real tokens, or the caller's `position_ids`.
        cos, sin: (B, L, Z/2) float32 rotary tables, or None.
        ops: the ops that the layers take, or None where nothing is run.
        dtype: in which layers compute what is not float32: that of the embeddings, or autocast's.
        places: (B, L) int64, real tokens of the segment before each, where a router asks for them; else None.
        plan, reverse_plan: layouts of the EMA scan and of the one that runs backwards, or None.
        bounds: what `segment_bounds` found, once asked.
        part: where these columns are one of the parts that a sequence is cut into, one for each process: what is known
            of the others (`parallel_seqboat.Part`); else None.
        stepped: a list for the layers of a cache that make a step, whose counters the model then moves all at once;
            None where each moves its own.
    """

    def __init__(
        self,
        real: Tensor | None,
        reset: Tensor | None,
        segment: Tensor | None,
        positions: Tensor,
        ops: Ops | None = None,
        part: Any = None,
    ):
        self.real, self.reset, self.segment, self.positions = real, reset, segment, positions
        self.ops, self.part = ops, part
        self.dtype = torch.float32
        self.cos = self.sin = self.places = self.plan = self.reverse_plan = self.bounds = self.stepped = None

    def but(self, **changes: Any) -> SequenceContext:
        """A copy with other values of these attributes."""
        other = copy(self)
        vars(other).update(changes)
        return other

    def segment_bounds(self) -> Tensor | None:
        """`segment_bounds` of these columns; None where every row is one segment."""
        if self.reset is not None and self.bounds is None:
            self.bounds = segment_bounds(self.reset)
        return self.bounds

    def reversed_marks(self) -> tuple[Tensor | None, Tensor | None]:
        """Real marks and segment starts of the row read backwards: a segment then starts at its last real token."""
        real = None if self.real is None else self.real.flip(1)
        if self.segment is None:
            return real, None
        segment = self.segment.flip(1)
        if real is None:
            return None, F.pad(segment[:, 1:] != segment[:, :-1], (1, 0))
        before = _real_before(real)
        return real, real & (before >= 0) & (segment != segment.gather(1, before.clamp_min(0)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceContext:
        """A copy on `device`: layers of one model may live on several."""

        def moved(value: Any) -> Any:
            if isinstance(value, ScanPlan):
                return replace(value, **{name: moved(part) for name, part in vars(value).items()})
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        ops = None if self.ops is None else self.ops.but(device=torch.device(device).type)
        return self.but(**{name: moved(value) for name, value in vars(self).items()} | {"ops": ops})


def _real_before(real: Tensor) -> Tensor:
    """(B, L) bool -> (B, L) int64, the column of the real token before each, -1 for none."""
    latest = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).cummax(1).values
    return F.pad(latest[:, :-1], (1, 0), value=-1)


def real_columns(attention_mask: Tensor | None, batch: int, length: int, cache: SeqBoatCache | None) -> Tensor | None:
    """The padding mask of the new columns.

    Args:
        attention_mask: (B, L) or, with a cache, (B, past + L), nonzero at real tokens; or None.

    Returns:
        (B, L) bool, or None when every column is known to be real.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be of shape (batch, length), got {tuple(attention_mask.shape)}: SeqBoat makes its "
            "own windows and needs to know only which columns are padding"
        )
    width = attention_mask.shape[1]
    stepping = must_not_wait(attention_mask.device) or (cache is not None and length == 1)
    if attention_mask.shape[0] != batch or width < length:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit {batch} rows of {length} new columns"
        )
    # A static cache keeps its length on the device; reading it would synchronise, so the width is not checked.
    unknown = torch.compiler.is_compiling() or (stepping and cache is not None and cache.layers[0].static)
    if width != length and not unknown:
        past = 0 if cache is None else cache.get_seq_length()
        if width != past + length:
            raise ValueError(
                f"attention_mask has {width} columns; expected {length} (the new ones)"
                + (f" or {past + length} (with the {past} in past_key_values)" if past else "")
            )
        if past and (length > 1 or attention_mask.device.type == "cpu"):
            expect_same_past(attention_mask[:, :past], cache)
    mask = attention_mask[:, width - length :]
    if stepping and (mask.device.type != "cpu" or torch.compiler.is_compiling()):
        # A decode step does not wait for the device to say whether a row is padded.
        return mask.bool()
    real = mask.bool()
    every, plain = real.all(), ((mask == 0) | (mask == 1)).all()
    # One wait for the device.
    every, plain = torch.stack([every, plain]).tolist()
    if not plain:
        value = mask[(mask != 0) & (mask != 1)][0].item()
        raise ValueError(
            f"attention_mask must be 1 at real tokens and 0 at padding, got {value}: number packed texts by seq_idx "
            "or by position_ids that start anew, and give no mask that is added to scores"
        )
    return None if every else real


def expect_same_past(mask: Tensor, cache: SeqBoatCache) -> None:
    """Raises ValueError where a mask of columns that the cache has read marks another number of real tokens in a row.

    The state has taken up the real tokens, and cannot leave one out afterwards: for instance the padding that
    generate() wrote behind a row that ended before its batch did.

    Args:
        mask: (B, past), nonzero at real tokens.
    """
    read = cache.layers[0].token_count.to(mask.device)
    marked = (mask != 0).sum(1)
    # A row whose segment started anew counts the tokens of this one alone.
    differs = marked < read if cache.restarted else marked != read
    if bool(differs.any()):
        row = int(differs.nonzero()[0])
        raise ValueError(
            f"attention_mask marks {int(marked[row])} real tokens in the columns that past_key_values has read, which "
            f"took {int(read[row])} for real (row {row}): the state cannot leave out or add a token afterwards. Give "
            "the mask that the cache was filled under, or read the whole text anew"
        )


def segment_starts(
    real: Tensor | None, batch: int, length: int, device: torch.device, texts: Texts, cache: SeqBoatCache | None
) -> Tensor | None:
    """Where packed segments start.

    A segment starts at a real token whose position is not greater than the real token's before it, at a real token
    with position 0 behind a cache, where `seq_idx` changes, or at an entry of `cu_seq_lens_q`. The first real token of
    a row without a cache is no start: nothing precedes it.

    Returns:
        (B, L) bool, or None when no argument speaks of segments.
    """
    _, position_ids, seq_idx, cu_seq_lens_q = texts
    if position_ids is None and seq_idx is None and cu_seq_lens_q is None:
        return None
    filled = cache is not None and cache.is_initialized
    starts_by: dict[str, Tensor] = {}
    known = torch.ones(batch, length, dtype=torch.bool, device=device) if real is None else real
    before = _real_before(known)
    has_before = known & (before >= 0)

    def previous(values: Tensor) -> Tensor:
        return values.gather(1, before.clamp_min(0))

    if position_ids is not None:
        starts = has_before & (position_ids <= previous(position_ids))
        if filled:
            started_before = cache.layers[0].token_count.to(device)[:, None] > 0
            starts = starts | (known & (before < 0) & (position_ids == 0) & started_before)
        starts_by["position_ids"] = starts
    for name, given in (("seq_idx", seq_idx), ("cu_seq_lens_q", cu_seq_lens_q)):
        if given is not None and (given.is_floating_point() or given.is_complex()):
            raise ValueError(f"{name} must be integers, got dtype {given.dtype}")
    if seq_idx is not None:
        if seq_idx.shape != (batch, length):
            raise ValueError(f"seq_idx must be of shape {(batch, length)}, got {tuple(seq_idx.shape)}")
        starts_by["seq_idx"] = has_before & (seq_idx != previous(seq_idx))
    if cu_seq_lens_q is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q needs a batch of one packed row, got {batch} rows")
        borders = cu_seq_lens_q.to(device=device, dtype=torch.long).flatten()
        if not must_not_wait(device) and (
            borders.numel() < 2 or borders[0] != 0 or borders[-1] != length or bool((borders.diff() < 0).any())
        ):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the row's length {length}, got {borders.tolist()}")
        index = torch.searchsorted(borders, torch.arange(length, device=device), right=True)[None]
        starts_by["cu_seq_lens_q"] = has_before & (index != previous(index))
    if filled and (seq_idx is not None or cu_seq_lens_q is not None) and cache.get_seq_length() > 0:
        given = "seq_idx" if seq_idx is not None else "cu_seq_lens_q"
        raise ValueError(
            f"{given} cannot continue a filled past_key_values: it does not say whether its first segment is new; "
            "use position_ids"
        )
    names = list(starts_by)
    for name in names[1:]:
        if not must_not_wait(device) and not torch.equal(starts_by[names[0]], starts_by[name]):
            at = (starts_by[names[0]] != starts_by[name]).nonzero()[0].tolist()
            raise ValueError(f"{names[0]} and {name} disagree on where segments start (row {at[0]}, column {at[1]})")
    return starts_by[names[0]] if names else None


def build_context(
    config: SeqBoatConfig, batch: int, length: int, device: torch.device, texts: Texts,
    cache: SeqBoatCache | None = None, dtype: torch.dtype | None = None, training: bool = False,
    rate_is_held: bool = False, parts: Any = None,
) -> SequenceContext:  # fmt: skip
    """Works out padding, segments, positions, layouts and the choice of ops once for all layers.

    Args:
        dtype: of the embeddings, and training: whether the model is in training mode; None for a context that no layer
            is run with, which then lacks ops, rotary tables and scan layouts.
        rate_is_held: see `select_ops`.
        parts: `parallel_seqboat.Parts` within `context_parallel`, else None: the columns are this process's part of a
            sequence.

    Raises:
        ValueError: for arguments that contradict each other, and where an op cannot run on the requested backend.
    """
    ops = None if dtype is None else select_ops(config, device, dtype, training, rate_is_held)
    real, position_ids = real_columns(texts.attention_mask, batch, length, cache), texts.position_ids
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
            raise ValueError(f"position_ids must be of shape {(batch, length)}, got {tuple(position_ids.shape)}")
        if position_ids.is_floating_point():
            raise ValueError(f"position_ids must be integers, got dtype {position_ids.dtype}")
        position_ids = position_ids.to(device=device, dtype=torch.long).expand(batch, -1)
        texts = Texts(texts.attention_mask, position_ids, *texts[2:])
    reset = segment_starts(real, batch, length, device, texts, cache)
    part = None
    if parts is not None:
        part, reset = parts.meet(real, reset, texts, (batch, length), dtype, cache, ops)
    stepping = must_not_wait(device) or (length == 1 and device.type != "cpu")
    if reset is not None and not stepping and not bool(reset.any()):
        reset = None
    if reset is not None and length > 1 and is_exporting():
        raise ValueError(
            "an exported SeqBoat reads one text a row: position_ids, seq_idx and cu_seq_lens_q, which may begin "
            "another, cannot be given with more than one column"
        )
    segment = None if reset is None else reset.long().cumsum(1)
    counts_places = ops is not None and config.router_type == "random"
    places = None
    if position_ids is None or counts_places:
        before = None if part is None else part.offset
        if part is None and cache is not None and cache.is_initialized:
            before = cache.layers[0].token_count.to(device)
        places = real_ordinals(batch, length, device, real, reset, before)
    context = SequenceContext(real, reset, segment, places if position_ids is None else position_ids, ops, part=part)
    if ops is None:
        return context
    kind = device.type
    autocast = kind in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(kind)
    context.dtype = torch.get_autocast_dtype(kind) if autocast else dtype
    if counts_places:
        context.places = places
    if config.position_embedding_type == "rotary":
        context.cos, context.sin = rotary_tables(context.positions, config.qk_head_dim, config.rope_theta)
    # The kernels make no use of a layout.
    if length > 1 and not ops.runs_triton(f"{config.ssm_type}_scan"):
        size = chunk_size_for(length)
        context.plan = build_scan_plan(batch, length, size, device, real, reset)
        if config.bidirectional:
            context.reverse_plan = build_scan_plan(batch, length, size, device, *context.reversed_marks())
    return context


def leave_marks(outputs: ModelOutput, context: SequenceContext) -> None:
    """Leaves real columns and segments with the outputs of `SeqBoatModel`, for a head to read. An attribute and no
    entry: what gathers or unpacks outputs does not meet it."""
    if not torch.compiler.is_compiling():
        outputs.marks = SequenceContext(
            context.real, context.reset, context.segment, context.positions, part=context.part
        )


def marks_of(outputs: ModelOutput, config: SeqBoatConfig, texts: Texts) -> SequenceContext:
    """Real columns and segments of a forward: those that it left with its outputs, or, where these were made anew on
    their way here, found once more in its arguments."""
    marks = getattr(outputs, "marks", None)
    if marks is not None:
        return marks
    hidden = outputs.last_hidden_state
    batch, length = hidden.shape[:2]
    mask = None if texts.attention_mask is None else texts.attention_mask[:, -length:]
    return build_context(config, batch, length, hidden.device, Texts(mask, *texts[1:]))
