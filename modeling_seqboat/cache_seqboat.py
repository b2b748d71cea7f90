"""The decoding state of SeqBoat as a transformers `Cache`: bounded in size whatever the context.

Letters: B batch, L columns of one forward, D channels, N states a channel, W memory size, Z key width, V value width,
T truncation, M activated tokens of one forward.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_file_seqboat import COUNTS, SavedState, check_buffer, check_counts, memory_of, read_state, write_state
from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import SequenceContext
from .ops_ema_seqboat import without_autocast
from .ops_layout_seqboat import Packed, is_exporting, last_real_tokens, rows_at
from .ops_packed_seqboat import write_memory
from .ssm_seqboat import RECURRENCES, Before, Replay

# Config fields that a state's shape or meaning depends on: a cache made under other values is refused.
_SIGNATURE = tuple(
    "num_hidden_layers hidden_size intermediate_size hidden_act norm_type norm_first scale_embeddings state_size "
    "memory_size qk_head_dim v_head_dim ssm_type ssm_truncation router_type attention_activation "
    "position_embedding_type rope_theta".split()
)


def _signature(config: SeqBoatConfig) -> dict[str, Any]:
    names = _SIGNATURE
    if config.router_type == "random":
        # They decide which tokens the memory holds, as a learned router's parameters do.
        names += ("router_random_rate", "router_random_seed")
    return {name: getattr(config, name) for name in names}


def _ordinary_tensors() -> AbstractContextManager:
    """Buffers made in inference mode could not be updated outside of it."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _grown(ring: Tensor, slots: int) -> Tensor:
    """(B, n, ...) with zeros behind it, (B, slots, ...)."""
    grown = ring.new_zeros(ring.shape[0], slots, *ring.shape[2:])
    if ring.shape[1] > 0:
        grown[:, : ring.shape[1]] = ring
    return grown


def _kept(tensor: Tensor) -> Tensor:
    """Without a graph. Detaching what has none costs a forward of a short text as much as a kernel's launch."""
    return tensor.detach() if tensor.requires_grad else tensor


@dataclass
class _Columns:
    """What one forward gives one layer of the cache.

    Attributes:
        hidden: (B, L, D), inputs of the recurrence.
        real: (B, L) bool or None; reset: (B, L) bool or None, True where a segment starts.
        active: (B, L) bool; total: (B, L) integer, activated tokens of the batch up to and including each.
        index: (M,) int64, places of the activated tokens among the B * L, in order.
        keys, values: (M, Z), (M, V); positions: (M,) int64.
        replay: how to compute the state after columns like these.
    """

    hidden: Tensor
    real: Tensor | None
    reset: Tensor | None
    active: Tensor
    total: Tensor
    index: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    replay: Replay

    @property
    def length(self) -> int:
        return self.hidden.shape[1]

    def part(self, first: int, end: int) -> "_Columns":
        """Some of the columns, in memory of their own: a window would keep the whole forward alive."""
        length = self.length
        column = self.index % length
        chosen = (column >= first) & (column < end)
        index = (self.index // length * (end - first) + column - first)[chosen]
        marks = [None if t is None else t[:, first:end].clone() for t in (self.real, self.reset, self.active)]
        total = marks[2].flatten().cumsum(0).view_as(marks[2])
        rows = (t[chosen] for t in (self.keys, self.values, self.positions))
        return _Columns(self.hidden[:, first:end].clone(), *marks, total, index, *rows, self.replay)


@dataclass
class _Undo:
    """A recorded forward, and what was there before it.

    Attributes:
        columns: the forward, for a crop that takes back only its last columns.
        before: buffers by name.
        ring_index: (B, n) int64 and overwritten: the entries of the memory that were written over, by buffer; where a
            segment started the memory is in `before`.
    """

    columns: _Columns
    before: dict[str, Tensor]
    ring_index: Tensor | None
    overwritten: dict[str, Tensor]


class PartMemory(NamedTuple):
    """The memory before a part of a sequence that is cut over processes, with the names and all W slots of a
    `SeqBoatCacheLayer`: keys (B, W, Z) and values (B, W, V), which may carry gradients, positions (B, W) and
    activated_count (B,)."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    activated_count: Tensor


_RING = ("keys", "values", "positions")


class SeqBoatCacheLayer(CacheLayerMixin):
    """State of one layer.

    The activated token with ordinal i of a row's current segment stands in slot i % W of the memory; slots that were
    never filled hold zeros. A static cache has its full size from the first forward on. The memory of a dynamic one
    grows until it holds W tokens; `tensors` gives it with W slots whatever its size.

    Attributes:
        ssm_state: (B, *state_shape) float32, see `Recurrence`.
        keys: (B, W, Z), rotated when the positions are rotary; values: (B, W, V); both of the model's dtype.
        positions: (B, W) int64, the places of those tokens among their segment's real tokens.
        activated_count: (B,) int64, activated tokens of the current segment; min(activated_count, W) slots are valid.
        token_count: (B,) int64, real tokens of the current segment.
        ssm_inputs: (B, T, D), the last T real SSM inputs of the current segment, the n-th in slot n % T; only with
            `ssm_truncation`.
        is_blank: whether no column was fed since the buffers were made or zeroed.
    """

    is_sliding = False
    supports_early_init = False
    # Columns that can be taken back at most: assisted decoding drops the rejected candidates of its last forward.
    rollback_limit = 1024
    # See `memory_step`.
    pages: Tensor | None = None
    renewed_columns = 16_384

    def __init__(self, config: SeqBoatConfig, static: bool = False):
        super().__init__()
        self.state_shape = RECURRENCES[config.ssm_type].state_shape(config)
        self.shapes = config.hidden_size, config.qk_head_dim, config.v_head_dim
        self.memory_size = config.memory_size
        self.truncation = config.ssm_truncation
        self.static = static
        self.is_compileable = static
        self.is_croppable = not static
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.ssm_state = self.keys = self.values = self.positions = None
        self.activated_count = self.token_count = self.ssm_inputs = None
        self.seen: int | Tensor = 0
        self._journal: list[_Undo] = []
        # No row has had more activated tokens than this.
        self._most_activated = 0
        self.is_initialized, self.is_blank = False, True

    def initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the buffers for `batch_size` rows; later calls only check that the batch is the same."""
        if self.is_initialized:
            if batch_size != self.batch_size:
                raise ValueError(f"past_key_values holds {self.batch_size} rows, the input has {batch_size}")
            self._leave_inference_mode()
            return
        with _ordinary_tensors():
            self._allocate(batch_size, self.memory_size if self.static else 0, dtype, device)

    def _allocate(self, batch_size: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        width, key_width, value_width = self.shapes
        self.dtype, self.device = dtype, device
        self.ssm_state = torch.zeros(batch_size, *self.state_shape, dtype=torch.float32, device=device)
        self.keys = torch.zeros(batch_size, slots, key_width, dtype=dtype, device=device)
        self.values = torch.zeros(batch_size, slots, value_width, dtype=dtype, device=device)
        self.positions = torch.zeros(batch_size, slots, dtype=torch.long, device=device)
        self.activated_count = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.token_count = torch.zeros(batch_size, dtype=torch.long, device=device)
        if self.truncation is not None:
            self.ssm_inputs = torch.zeros(batch_size, self.truncation, width, dtype=dtype, device=device)
        if self.static:
            self.seen = torch.zeros((), dtype=torch.long, device=device)
            if not torch.compiler.is_compiling():
                for tensor in (*self._buffers().values(), self.seen):
                    torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def make_room(self, count: int) -> None:
        """Lets the memory of a dynamic cache grow before each row gets up to `count` activated tokens. How many there
        are is asked of the device only when a bound that the host keeps is reached."""
        slots = self.keys.shape[1]
        if slots == self.memory_size:
            return
        self._most_activated += count
        if self._most_activated <= slots:
            return
        if torch.compiler.is_compiling():
            wanted = self.memory_size
        else:
            self._most_activated = count if self.is_blank else int(self.activated_count.max()) + count
            wanted = self._ring_size(self._most_activated)
        if wanted > slots:
            with _ordinary_tensors():
                for name in _RING:
                    setattr(self, name, _grown(getattr(self, name), wanted))

    def _ring_size(self, count: int) -> int:
        """W, or W divided by a power of 4 where that is enough: a decode kernel is compiled for each size."""
        size = self.memory_size
        while size > 16 and -(-size // 4) >= count:
            size = -(-size // 4)
        return size

    def _leave_inference_mode(self) -> None:
        """What was computed in inference mode becomes ordinary tensors once that mode has been left."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        for name, tensor in self._buffers().items():
            if tensor.is_inference():
                setattr(self, name, tensor.clone())

    @property
    def batch_size(self) -> int:
        return -1 if self.ssm_state is None else self.ssm_state.shape[0]

    def _buffers(self) -> dict[str, Tensor]:
        names = ("ssm_state", *_RING, *COUNTS, "ssm_inputs")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, the memory with all its W slots; empty before the first forward."""
        tensors = self._buffers()
        for name in _RING:
            if name in tensors and tensors[name].shape[1] < self.memory_size:
                tensors[name] = _grown(tensors[name], self.memory_size)
        return tensors

    def recent_inputs(self, count: int | None = None) -> Tensor | None:
        """The last T real SSM inputs (B, T, D), oldest first, zeros where there were fewer, or the first `count` of
        them; None without truncation."""
        if self.ssm_inputs is None:
            return None
        whole = count is None or is_exporting()
        span = self.truncation if whole else min(count, self.truncation)
        slots = (self.token_count[:, None] + torch.arange(span, device=self.token_count.device)) % self.truncation
        return rows_at(self.ssm_inputs, slots)

    def _inputs_in_slots(self, inputs: Tensor) -> Tensor:
        """(B, T, D), oldest first, the last of them the last of `token_count` -> as `ssm_inputs` holds them."""
        # No number below 0 is divided: runtimes of exported graphs may differ in the sign of its remainder.
        size = self.truncation
        order = (torch.arange(size, device=inputs.device) + size - self.token_count[:, None] % size) % size
        return rows_at(inputs, order)

    @torch.no_grad()
    def start_at(self, token_count: Tensor, inputs: Tensor | None, memory: PartMemory) -> None:
        """Brings an empty layer to where columns begin that other processes have read the columns before: all but the
        state, which `advance` takes.

        Args:
            token_count: as the buffer; inputs: (B, T, D), the last T real inputs, oldest first, or None without
                truncation.
        """
        self.make_room(self.memory_size)
        for name, value in (memory._asdict() | {"token_count": token_count}).items():
            self._store(name, value.detach().to(getattr(self, name).dtype).clone())
        if inputs is not None:
            self._store("ssm_inputs", self._inputs_in_slots(inputs.detach().to(self.ssm_inputs.dtype)))

    def before(self, length: int) -> Before:
        """What a recurrence continues over `length` columns."""
        state = self.ssm_state
        if self.static and torch.is_grad_enabled():
            # The graph keeps what the cache is about to overwrite.
            state = state.clone()
        window = self.recent_inputs() if self._renews(length) else None
        tokens = None if self.truncation is None else self.token_count
        return Before(state, self.recent_inputs(length), self.steps_in_place(length), window, tokens=tokens)

    def _renews(self, length: int) -> bool:
        """Whether a truncated state is made anew from its inputs before these columns, lest rounding pile up in it:
        whenever the columns pass a multiple of `renewed_columns`, however they are cut. Where their number is on the
        device or in a graph, before each prompt: one column puts the state right by itself."""
        if self.truncation is None:
            return False
        if isinstance(self.seen, Tensor) or torch.compiler.is_compiling():
            return length > 1
        return self.seen // self.renewed_columns != (self.seen + length) // self.renewed_columns

    def steps_in_place(self, length: int) -> bool:
        """Whether these columns are one that may overwrite the state: a recorded forward keeps what a rollback needs,
        and a graph of autograd must not see its inputs overwritten."""
        return length == 1 and not self.record_past and not torch.is_grad_enabled()

    def start_segments(self, reset: Tensor) -> None:
        """Empties the rows in which a segment starts, in place, before a step. reset: (B, 1) bool."""
        for name, buffer in self._buffers().items():
            if name != "ssm_state":
                buffer.masked_fill_(reset.view(-1, *[1] * (buffer.dim() - 1)), 0)

    def _store(self, name: str, value: Tensor) -> None:
        """A static cache keeps its addresses (CUDA graphs replay them); a dynamic one takes the new tensor."""
        if self.static:
            getattr(self, name).copy_(value)
        else:
            setattr(self, name, value)

    @torch.no_grad()
    def advance(
        self, context: SequenceContext, hidden: Tensor, state: Tensor, replay: Replay | None, active: Tensor,
        packed: Packed, keys: Tensor | None, values: Tensor | None,
    ) -> None:  # fmt: skip
        """Moves the state past the columns of one forward, recording how to undo it while `record_past` is set.

        Args:
            hidden: (B, L, D), inputs of the recurrence; state: after the last column; replay: see `Recurrence`.
            active: (B, L) bool; packed: their list; keys (M, Z), values (M, V): of the activated tokens. A decode step
                has written them into the memory already: None.
        """
        if self._journal and not self.record_past:
            self._journal = []
        if packed.steps:
            self._step(context, hidden, state)
            return
        positions = context.positions.flatten()[packed.index]
        marks = context.real, context.reset, active, packed.total.view_as(active), packed.index
        columns = _Columns(_kept(hidden), *marks, _kept(keys), _kept(values), positions, replay)
        # Autograd may keep the state, and a later step may overwrite the cache's.
        state = state.detach().clone() if state.requires_grad else state
        if not self.record_past:
            self._write(columns, state, context.ops.write_memory)
            return
        extra = columns.length - self.rollback_limit
        if extra > 0:
            # What no crop can ask for is not kept: the state moves up to where the recording starts.
            self._journal = []
            self._replay(columns.part(0, extra))
            columns = columns.part(extra, columns.length)
        self._journal.append(self._write(columns, state))
        total = sum(entry.columns.length for entry in self._journal)
        while total - self._journal[0].columns.length >= self.rollback_limit:
            total -= self._journal.pop(0).columns.length

    def advance_in_graph(self, context, hidden, state, count, keys, values, places) -> None:
        """`advance` of a static cache in an exported graph, without a shape that depends on the data.

        Args:
            hidden, state: as in `advance`.
            count: (B, 1) int64, how many tokens each row activates: the first so many of keys (B, L, Z), values (B, L,
                V) and places (B, L).
        """
        size, before = self.memory_size, self.activated_count[:, None]
        last = before + count - 1
        # The newest token whose ordinal leaves the rest of its slot.
        newest = last - (last + size - torch.arange(size, device=last.device)) % size
        is_new, taken = newest >= before, (newest - before).clamp_min(0)
        taken = torch.minimum(taken, torch.full_like(taken, 1) * (keys.shape[1] - 1))
        for name, rows in (("keys", keys), ("values", values), ("positions", places[:, :, None])):
            ring = getattr(self, name)
            new = rows_at(rows, taken).to(ring.dtype).view(ring.shape)
            self._store(name, torch.where(is_new.view(*is_new.shape, *[1] * (ring.dim() - 2)), new, ring))
        real, inputs = context.real, None
        if real is None:
            real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.ssm_inputs is not None:
            inputs = last_real_tokens(hidden, self.truncation, real, None, self.recent_inputs())
        self._store("token_count", self.token_count + real.sum(1))
        if inputs is not None:
            self._store("ssm_inputs", self._inputs_in_slots(inputs))
        self._store("activated_count", self.activated_count + count[:, 0])
        self._store("ssm_state", state.to(self.ssm_state.dtype))
        self._count(hidden.shape[1])

    def _step(self, context: SequenceContext, hidden: Tensor, state: Tensor) -> None:
        """One column, without a shape or a branch that depends on data, in place. Attention has counted who is
        activated."""
        real = context.real
        if self.ssm_inputs is not None:
            at = (self.token_count % self.truncation)[:, None, None].expand(-1, 1, hidden.shape[2])
            new = hidden.to(self.ssm_inputs.dtype)
            if real is not None:
                new = torch.where(real[:, :, None], new, self.ssm_inputs.gather(1, at))
            self.ssm_inputs.scatter_(1, at, new)
        if state is not self.ssm_state:
            self._store("ssm_state", state)
        if context.stepped is not None:
            context.stepped.append(self)
            return
        self.token_count.add_(1 if real is None else real[:, 0])
        self._count(1)

    def _count(self, length: int) -> None:
        self.is_blank = False
        if isinstance(self.seen, Tensor):
            self.seen.add_(length)
        else:
            self.seen = self.seen + length

    def _replay(self, columns: _Columns) -> _Undo:
        with without_autocast(columns.hidden.device):
            history = self.recent_inputs(columns.length)
            extra = {} if history is None else {"tokens": self.token_count}
            state = columns.replay(columns.hidden, columns.real, columns.reset, self.ssm_state, history, **extra)
        return self._write(columns, state)

    def _write(self, columns: _Columns, state: Tensor, write_memory: Callable = write_memory) -> _Undo:
        """Takes the columns in, and returns how to take them out again. No value is read off the device."""
        length = columns.length
        before = {} if self.static else {name: getattr(self, name) for name in ("ssm_state", "ssm_inputs", *COUNTS)}
        inputs = self.recent_inputs()
        tokens = length if columns.real is None else columns.real.sum(1)
        counts, first = {name: getattr(self, name) for name in COUNTS}, None
        self.make_room(min(length, columns.index.shape[0]))
        if columns.reset is not None:
            begun = columns.reset.any(1)
            last = torch.where(columns.reset, torch.arange(length, device=begun.device), 0).amax(1, keepdim=True)
            # Activated tokens of all rows before the row's last segment; before the row where none starts.
            first = torch.where(begun, last[:, 0], 0)[:, None]
            first = (columns.total - columns.active.to(columns.total.dtype)).gather(1, first)[:, 0]
            counted = torch.arange(length, device=begun.device) >= last
            tokens = (counted if columns.real is None else counted & columns.real).sum(1)
            counts = {name: count.masked_fill(begun, 0) for name, count in counts.items()}
            for name in _RING:
                ring = getattr(self, name)
                if self.record_past:
                    before[name] = ring.clone()
                ring.masked_fill_(begun.view(-1, *[1] * (ring.dim() - 1)), 0)
        self._store("token_count", counts["token_count"] + tokens)
        ring, new = ([getattr(owner, name) for name in _RING] for owner in (self, columns))
        activated, ring_index, overwritten = write_memory(ring, new, columns.total, first, counts["activated_count"])
        self._store("activated_count", activated)
        if inputs is not None:
            inputs = last_real_tokens(columns.hidden, self.truncation, columns.real, columns.reset, inputs)
            # To the slots that the new counts give.
            self._store("ssm_inputs", self._inputs_in_slots(inputs))
        self._store("ssm_state", state.to(self.ssm_state.dtype))
        self._count(length)
        return _Undo(columns, before, ring_index, dict(zip(_RING, overwritten, strict=False)))

    def _drop_empty_slots(self) -> None:
        if not self.static:
            self._most_activated = int(self.activated_count.max())
            slots = self._ring_size(self._most_activated)
            for name in _RING:
                setattr(self, name, getattr(self, name)[:, :slots].clone())

    def activate_past_recording(self) -> None:
        """From now on each forward can be taken back by `crop`, until the next crop."""
        if self.static:
            raise ValueError("a static SeqBoatCache cannot roll back; use cache_implementation=None or 'dynamic'")
        self.record_past = True

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` columns back. What was recorded before them can be taken back later on.

        Args:
            tokens_to_remove: 0 or negative; at most the columns recorded, of which 1,024 are kept.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of columns, got {tokens_to_remove}")
        remove = -tokens_to_remove
        recorded = sum(entry.columns.length for entry in self._journal)
        if remove > recorded:
            raise RuntimeError(
                f"cannot take {remove} columns back: {recorded} are recorded; call activate_past_recording() before "
                f"the forwards to be undone (at most {self.rollback_limit} columns are kept)"
            )
        while remove > 0:
            entry = self._journal.pop()
            length = entry.columns.length
            self._undo(entry)
            self._leave_inference_mode()
            if remove < length:
                # Recorded again: the next crop may reach into it.
                self._journal.append(self._replay(entry.columns.part(0, length - remove)))
            remove -= min(remove, length)

    def _undo(self, entry: _Undo) -> None:
        for name, old in entry.overwritten.items():
            if name not in entry.before:
                at = entry.ring_index.view(*entry.ring_index.shape, *[1] * (old.dim() - 2)).expand_as(old)
                getattr(self, name).scatter_(1, at, old)
        for name, value in entry.before.items():
            setattr(self, name, value)
        self._count(-entry.columns.length)

    def get_seq_length(self) -> int:
        """Columns fed so far, padding included."""
        return int(self.seen)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("SeqBoatCacheLayer is filled by SeqBoat's own layers, see `initialize`")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("SeqBoatCacheLayer is filled by SeqBoat's own layers, see `advance`")

    def reset(self) -> None:
        """Back to before the first forward; a static cache keeps its buffers and zeroes them."""
        if not self.static or not self.is_initialized:
            self._clear()
            return
        self._leave_inference_mode()
        for tensor in (*self._buffers().values(), self.seen):
            tensor.zero_()
        self.is_blank = True

    def _map_rows(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self._journal = []
        for name, tensor in self._buffers().items():
            changed = change(tensor)
            if self.static and changed.shape == tensor.shape:
                tensor.copy_(changed)
            else:
                setattr(self, name, changed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, torch.as_tensor(beam_idx, device=tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda tensor: tensor[torch.as_tensor(indices, device=tensor.device)])

    def _move(self, device: torch.device | str, non_blocking: bool = False) -> None:
        for name, tensor in self._buffers().items():
            setattr(self, name, tensor.to(device, non_blocking=non_blocking))
        if isinstance(self.seen, Tensor):
            self.seen = self.seen.to(device)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SeqBoatCacheLayer":
        """Moves the state; returns self, as Accelerate's hooks expect of whatever a module is given."""
        if self.is_initialized:
            before = self.ssm_state.device
            self._move(device, non_blocking)
            self.device = self.ssm_state.device
            if self.device != before:
                self._journal = []
        return self


def count_steps(layers: list[SeqBoatCacheLayer], real: Tensor | None) -> None:
    """Moves the counters of layers that have made a step past its column, in one launch for all that is on a device.

    Args:
        real: (B, 1) bool, or None.
    """
    seen = [layer.seen for layer in layers if isinstance(layer.seen, Tensor)]
    counts = [layer.token_count for layer in layers]
    if real is not None:
        tokens = real[:, 0].long()
        torch._foreach_add_(counts, [tokens.to(count.device) for count in counts])
        counts = []
    if counts or seen:
        torch._foreach_add_(counts + seen, 1)
    for layer in layers:
        layer.is_blank = False
        if not isinstance(layer.seen, Tensor):
            layer.seen = layer.seen + 1


class SeqBoatCache(Cache):
    """State of a causal SeqBoat, one `SeqBoatCacheLayer` a layer.

    Args:
        config: of the model that fills it.
        static: in-place updates at fixed addresses, for `torch.compile` and CUDA graphs; cannot roll back.

    Example:
        >>> cache = SeqBoatCache(model.config)
        >>> model(input_ids, past_key_values=cache)
        >>> cache.save("document.safetensors")
        >>> cache = SeqBoatCache.load("document.safetensors", model.config)
    """

    # Checked instead of the class: code that came with a checkpoint has a class object of its own.
    is_seqboat_cache = True

    def __init__(self, config: SeqBoatConfig | Iterator, static: bool = False):
        if not isinstance(config, SeqBoatConfig) and isinstance(config, Iterator):
            self._join(list(config))
            return
        # Not by class, for the same reason.
        if getattr(config, "model_type", None) != SeqBoatConfig.model_type:
            raise ValueError(f"SeqBoatCache is made of a SeqBoatConfig (model.config), got {type(config).__name__}")
        if config.bidirectional:
            raise ValueError("a bidirectional SeqBoat has no cache: bidirectional must be False, got True")
        super().__init__(layers=[SeqBoatCacheLayer(config, static) for _ in range(config.num_hidden_layers)])
        self.config = config
        self.signature = _signature(config)
        # Whether a packed segment may have started anew: a layer counts the tokens of a row's last segment only.
        self.restarted = False

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The state in tensors with one entry a row, for libraries that join the outputs of several devices
        (nn.DataParallel): `SeqBoatCache(iterator)` makes a cache of what they joined."""
        if not self.is_initialized:
            raise ValueError("an empty cache has no tensors to go through")
        rows, device = self.batch_size, self.layers[0].ssm_state.device
        settings = json.dumps([self.config.to_dict(), self.layers[0].static, self.get_seq_length()], default=str)
        written = torch.tensor(list(settings.encode()), dtype=torch.uint8, device=device)
        yield (written.expand(rows, -1),)
        for layer in self.layers:
            yield tuple(layer.tensors().values())

    def _join(self, parts: list[tuple[Tensor, ...]]) -> None:
        settings, static, seen = json.loads(bytes(parts[0][0][0].tolist()))
        self.__init__(SeqBoatConfig.from_dict(settings), static)
        self.restarted = True
        for layer, tensors in zip(self.layers, parts[1:], strict=True):
            state, keys = tensors[0], tensors[1]
            layer._allocate(state.shape[0], layer.memory_size, keys.dtype, state.device)
            for buffer, tensor in zip(layer.tensors().values(), tensors, strict=True):
                buffer.copy_(tensor)
            layer._count(seen)

    def check_config(self, config: SeqBoatConfig) -> None:
        """Raises ValueError unless the cache was made for a model of this shape."""
        for name, expected in _signature(config).items():
            if self.signature.get(name) != expected:
                raise ValueError(
                    f"past_key_values was made for another model: its {name} is {self.signature.get(name)!r}, "
                    f"this model's is {expected!r}"
                )

    @property
    def is_initialized(self) -> bool:
        return all(layer.is_initialized for layer in self.layers)

    @property
    def batch_size(self) -> int:
        return self.layers[0].batch_size

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()
        self.restarted = False

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state as (`layers.{i}.{name}`, tensor), the memory with all its W slots."""
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                yield f"layers.{index}.{name}", tensor

    def memory_bytes(self) -> int:
        """Bytes of all buffers: of a static cache always the same, of a dynamic one once W tokens were activated."""
        buffers = [tensor for layer in self.layers for tensor in layer._buffers().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in buffers)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves one layer's state to the CPU."""
        self.layers[layer_idx].offload()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves one layer's state back to its device."""
        self.layers[layer_idx % len(self.layers)].prefetch()

    def to(self, device: torch.device | str) -> "SeqBoatCache":
        """Moves every layer's state."""
        for layer in self.layers:
            layer.to(device)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state to one safetensors file; an existing file is replaced only once the new one is complete."""
        if not self.is_initialized:
            raise ValueError("the cache is empty: feed at least one token before saving it")
        state = SavedState(dict(self.tensors()), self.signature, self.get_seq_length(), self.layers[0].static)
        write_state(Path(path), state)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: SeqBoatConfig, device: torch.device | str = "cpu"
    ) -> "SeqBoatCache":
        """Reads a state written by `save`, bit for bit.

        Args:
            config: of the model that will continue.
            device: where the buffers go.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, holds something else, or the state of another model.
        """
        state = read_state(path)
        cache = cls(config, static=state.static)
        cache.signature = state.signature
        cache.check_config(config)
        left = set(state.tensors)
        for index, layer in enumerate(cache.layers):
            prefix = f"layers.{index}"
            # Keys of the right shape are as large as the file says; of another shape nothing is allocated.
            rows, dtype = memory_of(path, f"{prefix}.keys", state.tensors, (layer.memory_size, layer.shapes[1]))
            layer._allocate(rows, layer.memory_size, dtype, torch.device(device))
            for name, buffer in layer.tensors().items():
                key = f"{prefix}.{name}"
                if key not in left:
                    raise ValueError(f"{path} lacks {key}")
                left.remove(key)
                check_buffer(path, key, state.tensors[key], tuple(buffer.shape), buffer.dtype)
                buffer.copy_(state.tensors[key])
            check_counts(path, prefix, state.tensors, state.seen)
            layer._count(state.seen)
            layer._drop_empty_slots()
        if left:
            raise ValueError(f"{path} holds what no cache of this model has: {', '.join(sorted(left))}")
        if len({layer.batch_size for layer in cache.layers}) > 1:
            raise ValueError(f"{path} holds layers of different numbers of rows")
        # The file does not say.
        cache.restarted = True
        return cache
