"""The decoding state of SeqBoat as a transformers `Cache`: constant size whatever the context.

Letters: B batch, L columns of one forward, D channels, N states a channel, W memory size, Z key width, V value width,
T truncation, M activated tokens of one forward.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_seqboat import SeqBoatConfig
from .ops_layout_seqboat import last_real_tokens, shift_real_tokens
from .ops_s4d_seqboat import s4d_scan
from .ops_s5_seqboat import s5_scan
from .ops_ssm_seqboat import ema_scan

# Config fields that a state's shape or meaning depends on: a cache made under other values is refused.
_SIGNATURE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "norm_type",
    "norm_first",
    "scale_embeddings",
    "state_size",
    "memory_size",
    "qk_head_dim",
    "v_head_dim",
    "ssm_type",
    "ssm_truncation",
    "router_type",
    "attention_activation",
    "position_embedding_type",
    "rope_theta",
)
_FORMAT = "seqboat-cache-1"


def _signature(config: SeqBoatConfig) -> dict[str, Any]:
    names = _SIGNATURE
    if config.router_type == "random":
        # They decide which tokens the memory holds, as a learned router's parameters do.
        names += ("router_random_rate", "router_random_seed")
    return {name: getattr(config, name) for name in names}


def ssm_state_shape(config: SeqBoatConfig) -> tuple[int, ...]:
    """Shape of one row's SSM state: (D, N) for `ema`, (D, N, 2) for `s4d` and (N, 2) for `s5`, real and imaginary
    parts last."""
    width, states = config.hidden_size, config.state_size
    return {"ema": (width, states), "s4d": (width, states, 2), "s5": (states, 2)}[config.ssm_type]


@dataclass
class CacheUpdate:
    """What one forward of one layer adds to the state.

    Attributes:
        hidden: (B, L, D), inputs of the SSM.
        real: (B, L) bool or None; reset: (B, L) bool or None, True where a segment starts.
        decay, input_gain: what the scan of `ssm_type` takes as its second and third argument, float32.
        delay_decay: (D, N) float32 with truncation, else None.
        ssm_state: after the last column, of the shape that `ssm_state_shape` gives.
        row, column: (M,) int64 of the activated tokens, in order.
        ordinal: (M,) int64, how many activated tokens their segment has before each.
        current: (M,) bool, whether that segment is the row's last.
        keys, values: (M, Z), (M, V); positions: (M,) int64.
    """

    hidden: Tensor
    real: Tensor | None
    reset: Tensor | None
    decay: Tensor
    input_gain: Tensor
    delay_decay: Tensor | None
    ssm_state: Tensor
    row: Tensor
    column: Tensor
    ordinal: Tensor
    current: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor

    def columns(self, first: int, end: int) -> "CacheUpdate":
        """The same update cut to some of its columns; `ssm_state` is left to the caller."""
        chosen = (self.column >= first) & (self.column < end)
        cut = {name: getattr(self, name) for name in (field.name for field in fields(self))}
        for name in ("hidden", "real", "reset"):
            cut[name] = None if cut[name] is None else cut[name][:, first:end]
        for name in ("row", "column", "ordinal", "current", "keys", "values", "positions"):
            cut[name] = cut[name][chosen]
        # A window of the columns would keep the whole forward alive.
        cut["hidden"] = cut["hidden"].clone()
        cut["column"] = cut["column"] - first
        if cut["reset"] is not None:
            # A token is of the last segment of what is left only if no later segment starts in there.
            starts = cut["reset"] if cut["real"] is None else cut["reset"] & cut["real"]
            later = starts.flip(1).long().cumsum(1).flip(1)
            later = torch.cat([later[:, 1:], torch.zeros_like(later[:, :1])], dim=1)
            cut["current"] = later[cut["row"], cut["column"]] == 0
        return CacheUpdate(**cut)


@dataclass
class _Undo:
    """How to take one recorded forward back, and what to put in again if only its last columns go."""

    update: CacheUpdate
    before: dict[str, Tensor]
    row: Tensor
    slot: Tensor
    overwritten: tuple[Tensor, Tensor, Tensor]


class SeqBoatCacheLayer(CacheLayerMixin):
    """State of one layer.

    All buffers have their full size from the first forward on. The activated token with ordinal i of a row's current
    segment stands in slot i % W; slots that were never filled hold zeros.

    Attributes:
        ssm_state: (B, *ssm_state_shape(config)) float32.
        keys: (B, W, Z), rotated when the positions are rotary; values: (B, W, V); both of the model's dtype.
        positions: (B, W) int64, the places of those tokens among their segment's real tokens.
        activated_count: (B,) int64, activated tokens of the current segment; min(activated_count, W) slots are valid.
        token_count: (B,) int64, real tokens of the current segment.
        ssm_inputs: (B, T, D), the last T real SSM inputs of the current segment, the n-th in slot n % T; only with
            `ssm_truncation`.
    """

    is_sliding = False
    supports_early_init = False
    # Columns that can be taken back at most: assisted decoding drops the rejected candidates of its last forward.
    rollback_limit = 1024

    def __init__(self, config: SeqBoatConfig, static: bool = False):
        super().__init__()
        self.ssm_type = config.ssm_type
        self.state_shape = ssm_state_shape(config)
        self.shapes = (
            config.hidden_size,
            config.memory_size,
            config.qk_head_dim,
            config.v_head_dim,
        )
        self.truncation = config.ssm_truncation
        self.static = static
        self.is_compileable = static
        self.is_croppable = not static
        self.record_past = False
        self._journal: list[_Undo] = []
        self._clear()

    def _clear(self) -> None:
        self.ssm_state = self.keys = self.values = self.positions = None
        self.activated_count = self.token_count = self.ssm_inputs = None
        self.seen: int | Tensor = 0
        self._journal = []
        self.is_initialized = False

    def initialize(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates every buffer for `batch_size` rows; later calls only check that the batch is the same."""
        if self.is_initialized:
            if batch_size != self.batch_size:
                raise ValueError(
                    f"past_key_values holds {self.batch_size} rows, the input has {batch_size}; "
                    "they must be equal (see SeqBoatCache.batch_repeat_interleave and batch_select_indices)"
                )
            self._leave_inference_mode()
            return
        # Buffers made in inference mode could not be updated outside of it.
        with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
            self._allocate(batch_size, dtype, device)
        self.is_initialized = True

    def _allocate(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        width, memory, key_width, value_width = self.shapes
        self.dtype, self.device = dtype, device
        self.ssm_state = torch.zeros(batch_size, *self.state_shape, dtype=torch.float32, device=device)
        self.keys = torch.zeros(batch_size, memory, key_width, dtype=dtype, device=device)
        self.values = torch.zeros(batch_size, memory, value_width, dtype=dtype, device=device)
        self.positions = torch.zeros(batch_size, memory, dtype=torch.long, device=device)
        self.activated_count = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.token_count = torch.zeros(batch_size, dtype=torch.long, device=device)
        if self.truncation is not None:
            self.ssm_inputs = torch.zeros(batch_size, self.truncation, width, dtype=dtype, device=device)
        if self.static:
            self.seen = torch.zeros((), dtype=torch.long, device=device)
            if not torch.compiler.is_compiling():
                for tensor in (*self.tensors().values(), self.seen):
                    torch._dynamo.mark_static_address(tensor)

    def _leave_inference_mode(self) -> None:
        """What was computed in inference mode becomes ordinary tensors once that mode has been left."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        for name, tensor in self.tensors().items():
            if tensor.is_inference():
                setattr(self, name, tensor.clone())

    @property
    def batch_size(self) -> int:
        return -1 if self.ssm_state is None else self.ssm_state.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer by name; empty before the first forward."""
        names = ("ssm_state", "keys", "values", "positions", "activated_count", "token_count", "ssm_inputs")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def recent_inputs(self, count: int | None = None) -> Tensor | None:
        """The last T real SSM inputs (B, T, D), oldest first, zeros where there were fewer, or the first `count` of them;
        None without truncation."""
        if self.ssm_inputs is None:
            return None
        span = self.truncation if count is None else min(count, self.truncation)
        slots = (self.token_count[:, None] + torch.arange(span, device=self.token_count.device)) % self.truncation
        return self.ssm_inputs.gather(1, slots[:, :, None].expand(-1, -1, self.ssm_inputs.shape[2]))

    def _store(self, name: str, value: Tensor) -> None:
        """A static cache keeps its addresses (CUDA graphs replay them); a dynamic one takes the new tensor."""
        if self.static:
            getattr(self, name).copy_(value)
        else:
            setattr(self, name, value)

    @torch.no_grad()
    def commit(self, update: CacheUpdate) -> None:
        """Advances the state by one forward, recording how to undo it while `record_past` is set."""
        length = update.hidden.shape[1]
        extra = length - self.rollback_limit
        if self.record_past and extra > 0:
            # What no crop can ask for is not kept: the state moves up to where the recording starts.
            head = update.columns(0, extra)
            head.ssm_state = self._rescan(head)
            self._apply(head)
            self._journal = []
            update = update.columns(extra, length)
        if self.record_past:
            self._record(update)
        else:
            self._journal = []
        self._apply(update)

    @torch.no_grad()
    def commit_step(
        self,
        hidden: Tensor,
        real: Tensor | None,
        reset: Tensor | None,
        ssm_state: Tensor,
        active: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
    ) -> None:
        """Advances by one column without a shape or a branch that depends on data, in place.

        Args:
            hidden: (B, 1, D); real, reset: (B, 1) bool or None; ssm_state: of the buffer's shape.
            active: (B,) bool; key: (B, Z); value: (B, V); position: (B,) int64.
        """
        if reset is not None:
            starts = reset[:, 0] if real is None else (reset & real)[:, 0]
            if self.ssm_inputs is not None:
                self.ssm_inputs.masked_fill_(starts[:, None, None], 0)
            self.keys.masked_fill_(starts[:, None, None], 0)
            self.values.masked_fill_(starts[:, None, None], 0)
            self.positions.masked_fill_(starts[:, None], 0)
            self.activated_count.masked_fill_(starts, 0)
            self.token_count.masked_fill_(starts, 0)
        slot = (self.activated_count % self.keys.shape[1])[:, None]
        chosen = active[:, None]
        writes = [(self.keys, slot, chosen, key), (self.values, slot, chosen, value)]
        if self.ssm_inputs is not None:
            known = torch.ones_like(chosen) if real is None else real
            writes.append((self.ssm_inputs, (self.token_count % self.truncation)[:, None], known, hidden[:, 0]))
        for buffer, at, written, new in writes:
            index = at[:, :, None].expand(-1, -1, buffer.shape[2])
            old = buffer.gather(1, index)
            buffer.scatter_(1, index, torch.where(written[:, :, None], new[:, None].to(buffer.dtype), old))
        old = self.positions.gather(1, slot)
        self.positions.scatter_(1, slot, torch.where(chosen, position[:, None], old))
        self.count_step(real, ssm_state, active)

    def count_step(self, real: Tensor | None, ssm_state: Tensor, active: Tensor) -> None:
        """The end of a step whose key, value and position stand in the memory already; arguments as in `commit_step`."""
        if self._journal:
            self._journal = []
        self.activated_count.add_(active.long())
        self.token_count.add_(1 if real is None else real[:, 0].long())
        self._store("ssm_state", ssm_state)
        self._advance(1)

    @property
    def steps_in_place(self) -> bool:
        """Whether one column may overwrite the state: a recorded forward keeps what a rollback needs, and a graph of
        autograd must not see its inputs overwritten."""
        return not self.record_past and not torch.is_grad_enabled()

    def _advance(self, length: int) -> None:
        if isinstance(self.seen, Tensor):
            self.seen.add_(length)
        else:
            self.seen = self.seen + length

    def _apply(self, update: CacheUpdate) -> None:
        memory = self.keys.shape[1]
        counted = torch.zeros_like(self.activated_count)
        counted.scatter_add_(0, update.row, update.current.long())
        length = update.hidden.shape[1]
        inputs = self.recent_inputs()
        if update.reset is None:
            self.token_count += length if update.real is None else update.real.sum(1)
            self.activated_count += counted
        else:
            real = torch.ones_like(update.reset) if update.real is None else update.real
            starts = update.reset & real
            begun = starts.any(1)
            passed = starts.flip(1).long().cumsum(1).flip(1)
            after = torch.cat([passed[:, 1:], torch.zeros_like(passed[:, :1])], dim=1) == 0
            tokens = (real & after).sum(1)
            for name, new in (("token_count", tokens), ("activated_count", counted)):
                old = getattr(self, name)
                old.copy_(torch.where(begun, new, old + new))
            for buffer in (self.keys, self.values, self.positions):
                buffer[begun] = 0
        kept = update.current & (update.ordinal >= self.activated_count[update.row] - memory)
        row, slot = update.row[kept], update.ordinal[kept] % memory
        self.keys[row, slot] = update.keys[kept].to(self.keys.dtype)
        self.values[row, slot] = update.values[kept].to(self.values.dtype)
        self.positions[row, slot] = update.positions[kept]
        if inputs is not None:
            inputs = last_real_tokens(update.hidden, self.truncation, update.real, update.reset, inputs)
            # From oldest first to the slots that the new counts give.
            order = (torch.arange(self.truncation, device=inputs.device) - self.token_count[:, None]) % self.truncation
            self._store("ssm_inputs", inputs.gather(1, order[:, :, None].expand_as(inputs)))
        self._store("ssm_state", update.ssm_state.detach().to(self.ssm_state.dtype))
        self._advance(length)

    def _rescan(self, update: CacheUpdate) -> Tensor:
        if self.ssm_type != "ema":
            scan, gain = (
                (s4d_scan, update.input_gain)
                if self.ssm_type == "s4d"
                else (s5_scan, update.input_gain.transpose(0, 1))
            )
            marks = {"real": update.real, "reset": update.reset, "state": self.ssm_state}
            return scan(update.hidden, update.decay, update.input_gain, torch.zeros_like(gain), None, **marks)[1]
        delayed = None
        if update.delay_decay is not None:
            history = self.recent_inputs(update.hidden.shape[1])
            delayed = shift_real_tokens(update.hidden, self.truncation, update.real, update.reset, history)
        return ema_scan(
            update.hidden,
            update.decay,
            update.input_gain,
            torch.zeros_like(update.decay),
            None,
            real=update.real,
            reset=update.reset,
            state=self.ssm_state,
            delayed=delayed,
            delay_decay=update.delay_decay,
        )[1]

    def _record(self, update: CacheUpdate) -> None:
        memory = self.keys.shape[1]
        before = {"ssm_state": self.ssm_state, "ssm_inputs": self.ssm_inputs}
        before |= {name: getattr(self, name).clone() for name in ("activated_count", "token_count")}
        if update.reset is not None:
            # A new segment empties the memory, so all of it is needed to go back.
            before |= {name: getattr(self, name).clone() for name in ("keys", "values", "positions")}
        row, slot = update.row, update.ordinal % memory
        old = (self.keys[row, slot], self.values[row, slot], self.positions[row, slot])
        self._journal.append(_Undo(update, before, row, slot, old))
        total = sum(entry.update.hidden.shape[1] for entry in self._journal)
        while total - self._journal[0].update.hidden.shape[1] >= self.rollback_limit:
            total -= self._journal.pop(0).update.hidden.shape[1]

    def activate_past_recording(self) -> None:
        """From now on each forward can be taken back by `crop`, until the next crop."""
        if self.static:
            raise ValueError("a static SeqBoatCache cannot roll back; use cache_implementation=None or 'dynamic'")
        self.record_past = True

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` columns back and forgets how to go back further.

        Args:
            tokens_to_remove: 0 or negative; at most the columns fed since the last crop, and at most 1,024.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of columns, got {tokens_to_remove}")
        remove = -tokens_to_remove
        recorded = sum(entry.update.hidden.shape[1] for entry in self._journal)
        if remove > recorded:
            raise RuntimeError(
                f"cannot take {remove} columns back: {recorded} are recorded; call activate_past_recording() before "
                f"the forwards to be undone (at most {self.rollback_limit} columns are kept)"
            )
        while remove > 0:
            entry = self._journal.pop()
            length = entry.update.hidden.shape[1]
            self._undo(entry)
            self._leave_inference_mode()
            if remove < length:
                kept = entry.update.columns(0, length - remove)
                kept.ssm_state = self._rescan(kept)
                self._apply(kept)
            remove -= min(remove, length)
        self._journal = []

    def _undo(self, entry: _Undo) -> None:
        if "keys" not in entry.before:
            # Where several tokens of one forward shared a slot each holds the same older content.
            for buffer, old in zip((self.keys, self.values, self.positions), entry.overwritten, strict=True):
                buffer[entry.row, entry.slot] = old
        for name, value in entry.before.items():
            setattr(self, name, value)
        self._advance(-entry.update.hidden.shape[1])

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
        raise NotImplementedError("SeqBoatCacheLayer is filled by SeqBoat's own layers, see `commit`")

    def reset(self) -> None:
        """Back to before the first forward; a static cache keeps its buffers and zeroes them."""
        if not self.static or not self.is_initialized:
            self._clear()
            return
        self._leave_inference_mode()
        for tensor in (*self.tensors().values(), self.seen):
            tensor.zero_()

    def _map_rows(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self._journal = []
        for name, tensor in self.tensors().items():
            changed = change(tensor)
            if self.static and changed.shape == tensor.shape:
                tensor.copy_(changed)
            else:
                setattr(self, name, changed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _move(self, device: torch.device | str, non_blocking: bool = False) -> None:
        for name, tensor in self.tensors().items():
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

    def __init__(self, config: SeqBoatConfig, static: bool = False):
        if config.bidirectional:
            raise ValueError("a bidirectional SeqBoat has no cache: bidirectional must be False, got True")
        super().__init__(layers=[SeqBoatCacheLayer(config, static) for _ in range(config.num_hidden_layers)])
        self.signature = _signature(config)
        # Whether a packed segment may have started anew: a layer counts the tokens of a row's last segment only.
        self.restarted = False

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
        """Every buffer as (`layers.{i}.{name}`, tensor)."""
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                yield f"layers.{index}.{name}", tensor

    def memory_bytes(self) -> int:
        """Bytes of all buffers; the same after the first token and after the millionth."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included."""
        return self.layers[layer_idx].get_seq_length()

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
        path = Path(path)
        meta = {
            "format": _FORMAT,
            "signature": json.dumps(self.signature),
            "seen": str(self.get_seq_length()),
            "static": str(self.layers[0].static),
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        try:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors()}, temporary, metadata=meta)
            # safetensors writes files that only their owner may read; as for any other file the umask decides.
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: SeqBoatConfig, device: torch.device | str = "cpu"
    ) -> "SeqBoatCache":
        """Reads a state written by `save`, bit for bit.

        Args:
            path: the file.
            config: of the model that will continue.
            device: where the buffers go.

        Raises:
            ValueError: if the file is damaged, holds something else, or the state of another model.
        """
        try:
            opened = safe_open(path, "pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        with opened as file:
            meta = file.metadata() or {}
            if meta.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a SeqBoat cache: format {meta.get('format')!r}, expected {_FORMAT!r}")
            cache = cls(config, static=meta["static"] == "True")
            cache.signature = json.loads(meta["signature"])
            cache.check_config(config)
            names = set(file.keys())
            if "layers.0.keys" not in names:
                raise ValueError(f"{path} lacks layers.0.keys")
            first = file.get_tensor("layers.0.keys")
            for index, layer in enumerate(cache.layers):
                layer.initialize(first.shape[0], first.dtype, first.device)
                for name, buffer in layer.tensors().items():
                    key = f"layers.{index}.{name}"
                    if key not in names:
                        raise ValueError(f"{path} lacks {key}")
                    loaded = file.get_tensor(key)
                    if loaded.shape != buffer.shape:
                        raise ValueError(f"{key} in {path} is {tuple(loaded.shape)}, expected {tuple(buffer.shape)}")
                    buffer.copy_(loaded)
                layer._advance(int(meta["seen"]))
        # The file does not say.
        cache.restarted = True
        return cache
