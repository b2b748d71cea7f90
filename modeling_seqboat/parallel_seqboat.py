"""Context parallelism: a sequence is cut into parts that follow one another, one for each process of a group.

    with context_parallel(model, mesh["context"]):
        model(**sequence_part(batch, mesh["context"])).loss.backward()

What a part needs of those before it does not grow with the sequence. The recurrence hands over one state a layer: each
process scans its part from nothing, the states go round, and each puts together its own initial state, since a state
decays over a part by a factor that the number of its real tokens tells (Mega, arXiv 2209.10655, equation 4, is linear
in the state). The attention hands over the inputs of a part's last W activated tokens, from several parts back where
one activates fewer (arXiv 2306.11197, section 3.2). Positions and counts are sums over the parts before. Gradients
take the same ways back. Nothing here is needed to run a model in one process.

Letters: P processes of the group, B batch, L columns of this process, D hidden width, W memory size, T truncation.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .attention_seqboat import wants_whole_texts
from .cache_seqboat import PartMemory, SeqBoatCache
from .context_seqboat import SequenceContext, Texts
from .kernels_seqboat import Ops
from .ops_layout_seqboat import last_real_tokens, rows_at
from .ssm_seqboat import Before, Recurrence
from .training_seqboat import model_and_head

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TARGETS = ("no labels", "labels", "shift_labels")
_TEXT = 400

# What the processes of a group must have alike, and how a value is shown.
_ALIKE: dict[str, Callable[[int], Any]] = {
    "the number of rows": int,
    "the embeddings' dtype": lambda index: str(_DTYPES[index]).removeprefix("torch."),
    "autocast": bool,
    "model.training": bool,
    "gradients being recorded": bool,
    "gradient checkpointing": bool,
    "the number of trainable parameters": int,
    "the targets": _TARGETS.__getitem__,
    "num_items_in_batch being given": bool,
    "a RouterBudget being attached": bool,
    "position_ids being given": bool,
    "seq_idx being given": bool,
    "use_cache": bool,
    "the EMA's kernels": bool,
}


class _Gather(torch.autograd.Function):
    """(...) -> (P, ...), what every process gives; backward sums up what all of them made of it, in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        found = x.new_empty(group.size(), *x.shape)
        dist.all_gather(list(found.unbind()), x.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        found = torch.empty_like(grad)
        dist.all_to_all_single(found, grad, group=ctx.group)
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        return found.sum(0, dtype=dtype).to(grad.dtype), None


class StateRelay:
    """Hands states over amid a scan, see `ema_scan_triton`: then no process reads its part twice.

    Here it is the state after a part that counts, others' states included; so its gradient is what all later parts
    make of it, and reaches the parameters through the scan's own backward alone.

    Args:
        decayed: a state (B, D, N) and a number of real tokens (B,) to what is left of it, as `Recurrence.decayed`.
    """

    def __init__(self, part: "Part", decayed: Callable[[Tensor, Tensor], Tensor]):
        self.part, self.decayed = part, decayed

    def forward(self, state: Tensor) -> Tensor:
        """The state after this part alone, (B, D, N) -> the one before it."""
        return self._sum(state, self.part.linked, self.part.gaps)

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient that this part alone gives the state before it -> that of the state after it."""
        return self._sum(grad, self.part.linked_behind, self.part.gaps_behind)

    def _sum(self, own: Tensor, linked: Tensor, gaps: Tensor) -> Tensor:
        found = _Gather.apply(own, self.part.group)
        decayed = self.decayed(found.flatten(0, 1), gaps.flatten()).view_as(found)
        return torch.where(linked.view(*linked.shape, *[1] * (found.dim() - 2)), decayed, 0).sum(0)


@dataclass(frozen=True)
class Part:
    """What one forward knows of the parts of the other processes.

    Attributes:
        group: the processes, in the order of their parts; rank: the place of this one.
        linked: (P, B) bool, which parts lie before this one with no segment starting in the parts between.
        gaps: (P, B) int64, real tokens between the end of such a part and the start of this one.
        linked_behind, gaps_behind: the same for the parts behind this one.
        tails: (P, B) int64, real tokens of each part's last segment that lie in it.
        offset: (B,) int64, real tokens that the row's segment has before this part.
        share: this part's share of all real tokens.
        other_columns: columns of all other parts.
        restarted: whether a segment starts inside a row.
    """

    group: dist.ProcessGroup
    rank: int
    linked: Tensor
    gaps: Tensor
    linked_behind: Tensor
    gaps_behind: Tensor
    tails: Tensor
    offset: Tensor
    share: float
    other_columns: int
    restarted: bool

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, with gradients where x is floating."""
        return _Gather.apply(x[None], self.group).sum((0, 1))

    def before(self, ssm: Recurrence, x: Tensor, context: SequenceContext) -> tuple[Before, Tensor | None]:
        """What the recurrence continues, and with truncation the last T real inputs (B, T, D), oldest first.
        x: (B, L, D), its inputs here."""
        truncation = ssm.config.ssm_truncation
        if truncation is None and ssm.takes_relay(context):
            return Before(None, None, False, relay=functools.partial(StateRelay, self)), None
        if truncation is None:
            return Before(StateRelay(self, ssm.decayed).forward(ssm.state_after(x, context)), None, False), None
        nothing = x.new_zeros(x.shape[0], truncation, x.shape[2])
        newest = last_real_tokens(x, truncation, context.real, context.reset, nothing)
        index, filled = self._newest(self.tails.clamp_max(truncation), truncation, 0)
        window = self._collect(newest, index).masked_fill(~filled[:, :, None], 0)
        state = ssm.state_of(window, self.offset)
        return Before(state, window[:, : x.shape[1]], False, tokens=self.offset), window

    def memory(self, attention: nn.Module, x: Tensor, active: Tensor, context: SequenceContext) -> PartMemory:
        """What the attention finds before this part. x: (B, L, D), its inputs; active: (B, L) bool."""
        size = attention.config.memory_size
        batch, length = active.shape
        last = active
        if context.segment is not None:
            last = active & (context.segment == context.segment.amax(1, keepdim=True))
        # The last W activated tokens, the newest in the last place.
        seen = last.cumsum(1)
        count = seen[:, -1:]
        place = seen - 1 + size - count
        place = torch.where(last & (place >= 0), place, size)
        columns = torch.arange(length, device=x.device).expand(batch, -1)
        index = columns.new_zeros(batch, size + 1).scatter(1, place, columns)[:, :size]
        newest = rows_at(x, index)
        marks = torch.cat([count, context.positions.gather(1, index)], dim=1)
        marks = _Gather.apply(marks, self.group)
        counts, positions = marks[:, :, 0], marks[:, :, 1:]
        activated = torch.where(self.linked, counts, 0).sum(0)
        index, filled = self._newest(counts.clamp_max(size), size, activated)
        positions = positions.transpose(0, 1).flatten(1).gather(1, index)
        rows = self._collect(newest, index)
        given = (*attention.keys_of(rows, positions, context), positions[:, :, None])
        keys, values, positions = (tensor.masked_fill(~filled[:, :, None], 0) for tensor in given)
        return PartMemory(keys, values, positions[:, :, 0], activated)

    def _newest(self, kept: Tensor, size: int, end: Tensor | int) -> tuple[Tensor, Tensor]:
        """Where the last tokens before this part are.

        Args:
            kept: (P, B) int64, how many tokens each part gives; they are the last of its `size` places.
            end: (B,) int64, or 0: the newest token goes to slot (end - 1) % size, the one before it to the slot
                before.

        Returns:
            (B, size) int64, places among the P * size that all parts give, and bool: whether the slot is filled.
        """
        places = torch.arange(size, device=kept.device)
        given = (places >= size - kept[:, :, None]) & self.linked[:, :, None]
        given = given.transpose(0, 1).flatten(1)
        age = given.sum(1, keepdim=True) - given.cumsum(1)
        if isinstance(end, Tensor):
            end = end[:, None]
        slot = torch.where(given & (age < size), (end - 1 - age) % size, size)
        sources = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
        index = slot.new_full((slot.shape[0], size + 1), -1).scatter(1, slot, sources)[:, :size]
        return index.clamp_min(0), index >= 0

    def _collect(self, newest: Tensor, index: Tensor) -> Tensor:
        """(B, size, D) that each part gives -> (B, size, D) at `index` among all of them."""
        found = _Gather.apply(newest, self.group).transpose(0, 1).flatten(1, 2)
        return rows_at(found, index)

    @torch.no_grad()
    def share_cache(self, cache: SeqBoatCache) -> None:
        """Gives every process the cache of the last one, which has read the whole sequence."""
        source = dist.get_global_rank(self.group, self.group.size() - 1)
        for layer in cache.layers:
            for name, buffer in layer._buffers().items():
                whole = buffer.contiguous()
                dist.broadcast(whole, source, group=self.group)
                layer._store(name, whole)
            layer._count(self.other_columns)
        cache.restarted = cache.restarted or self.restarted

    def following_label(self, labels: Tensor, real: Tensor | None) -> Tensor:
        """(B, 1): the label of the first real token behind this part, -100 where there is none.

        Args:
            labels: (B, L), -100 where a segment starts; real: as in `SequenceContext`.
        """
        if real is None:
            first, any_real = labels[:, 0], torch.ones_like(labels[:, 0])
        else:
            real = real.to(labels.device)
            first = labels.gather(1, real.int().argmax(1, keepdim=True))[:, 0]
            any_real = real.any(1).to(labels.dtype)
        found = _Gather.apply(torch.stack([first, any_real], dim=1).to(self.linked.device), self.group)
        label = torch.full_like(found[0, :, 0], -100)
        for theirs in found[self.rank + 1 :].flip(0):
            label = torch.where(theirs[:, 1] > 0, theirs[:, 0], label)
        return label[:, None].to(labels.device)


class Parts:
    """Set at a model by `context_parallel`: makes a `Part` of each forward, once all processes agree on it.

    A forward that fails before, in whatever process, fails in all: each call exchanges one header, with the reason
    where the call was refused.
    """

    def __init__(self, base: nn.Module, group: dist.ProcessGroup, device: torch.device):
        self.base, self.group, self.device = base, group, device
        self._calls: list[nn.Module] = []
        self._met, self._targets, self._counts = False, 0, False

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Called before the forward of the model, and of its head."""
        if not self._calls:
            self._met = False
            given = [name for name in _TARGETS[1:] if kwargs.get(name) is not None]
            self._targets = max((_TARGETS.index(name) for name in given), default=0)
            self._counts = kwargs.get("num_items_in_batch") is not None
        self._calls.append(module)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Called behind it, also where it failed."""
        if self._calls and self._calls[-1] is module:
            self._calls.pop()
        if not self._met and not self._calls:
            error = sys.exception()
            reason = "its forward ended early" if error is None else f"{type(error).__name__}: {error}"
            self._exchange([0] * len(_ALIKE), 0, reason)

    def _exchange(self, values: list[int], columns: int, error: str | None = None) -> list[int]:
        """Columns of all parts. Raises ValueError where a process failed or the values differ."""
        self._met = True
        text = list((error or "").encode()[:_TEXT])
        own = [int(error is None), columns, *values, *text, *[0] * (_TEXT - len(text))]
        table = _Gather.apply(torch.tensor(own, device=self.device), self.group).tolist()
        if error is not None:
            return []
        for rank, (succeeded, _, *rest) in enumerate(table):
            if not succeeded:
                reason = bytes(rest[len(values) :]).rstrip(b"\0").decode(errors="replace")
                raise ValueError(f"process {rank} of the context group refused its part of the sequence: {reason}")
        for index, (name, show) in enumerate(_ALIKE.items()):
            for rank, (_, _, *theirs) in enumerate(table):
                if theirs[index] != table[0][2 + index]:
                    raise ValueError(
                        f"the processes of a context group must agree on {name}: process 0 has "
                        f"{show(table[0][2 + index])}, process {rank} {show(theirs[index])}"
                    )
        return [row[1] for row in table]

    def meet(
        self, real: Tensor | None, reset: Tensor | None, texts: Texts, shape: tuple[int, int], dtype, cache, ops: Ops
    ) -> tuple[Part, Tensor | None]:
        """Exchanges what the parts need to know of one another.

        Args:
            real, reset, texts: of this part alone, (B, L) or None; shape: B and L.
            dtype: of the embeddings; cache: the `SeqBoatCache` that they fill, or None; ops: that the layers take.

        Returns:
            The part, and `reset` with the segment starts that only the part before shows.
        """
        base, (_, position_ids, seq_idx, cu_seq_lens_q) = self.base, texts
        if torch.compiler.is_compiling():
            raise ValueError("context parallelism does not go with torch.compile")
        if cu_seq_lens_q is not None:
            raise ValueError("cu_seq_lens_q cannot be cut over processes; give seq_idx, as sequence_part makes it")
        if cache is not None and (cache.get_seq_length() > 0 or any(layer.record_past for layer in cache.layers)):
            raise ValueError(
                "a prompt that is cut over processes needs an empty past_key_values that is not recorded for rollback"
            )
        kind = self.device.type
        values = [shape[0], _DTYPES.index(dtype), torch.is_autocast_enabled(kind), base.training]
        values += [torch.is_grad_enabled(), base.gradient_checkpointing]
        values += [sum(p.requires_grad for p in base.parameters()), self._targets, self._counts, base.rate_is_held]
        values += [position_ids is not None, seq_idx is not None, cache is not None, ops.runs_triton("ema_scan")]
        columns = self._exchange([int(value) for value in values], shape[1])
        known = torch.ones(shape, dtype=torch.bool, device=self.device) if real is None else real
        marks = _Gather.apply(_edges(known, reset, position_ids, seq_idx), self.group).cpu()
        count, tails, inner, *edges = marks.unbind(-1)
        starts = _starts(count > 0, edges, position_ids is not None, seq_idx is not None)
        resets = starts | (inner > 0)
        rank = self.group.rank()
        linked, gaps = _links(reversed(range(rank)), resets, count)
        behind = _links(range(rank + 1, self.group.size()), resets, count)
        offset = torch.where(linked, tails, 0).sum(0)
        if bool(starts[rank].any()):
            first = known.int().argmax(1)
            columns_here = torch.arange(shape[1], device=self.device)
            begun = (columns_here == first[:, None]) & starts[rank].to(self.device)[:, None]
            reset = begun if reset is None else reset | begun
        tensors = (t.to(self.device) for t in (linked, gaps, *behind, tails, offset))
        share = float(count[rank].sum()) / max(1, int(count.sum()))
        others = sum(columns) - shape[1]
        return Part(self.group, rank, *tensors, share, others, restarted=bool(resets.any())), reset


def _links(order: Iterable[int], resets: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(P, B) bool: which parts, taken in this order away from here, are reached before a segment starts in between;
    and (P, B) int64: the real tokens in between. resets: (P, B) bool; count: (P, B)."""
    linked, gaps = torch.zeros_like(resets), torch.zeros_like(count)
    unbroken, gap = torch.ones_like(resets[0]), torch.zeros_like(count[0])
    for index in order:
        linked[index], gaps[index] = unbroken, gap
        unbroken, gap = unbroken & ~resets[index], gap + count[index]
    return linked, gaps


def _edges(known: Tensor, reset: Tensor | None, position_ids: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """(B, 7) int64: real tokens, those of the last segment, whether one starts behind the first real token, and
    position and segment number of the first and the last real token."""
    count = known.sum(1)
    order = known.long().cumsum(1)
    begun, inner = torch.ones_like(count), torch.zeros_like(count)
    if reset is not None:
        begun = torch.where(reset, order, 1).amax(1)
        inner = reset.any(1).long()
    ends = torch.stack([known.int().argmax(1), known.shape[1] - 1 - known.flip(1).int().argmax(1)], dim=1)
    values = [torch.zeros_like(ends) if given is None else given.gather(1, ends) for given in (position_ids, seq_idx)]
    tail = (count - begun + 1).clamp_min(0)
    return torch.cat([torch.stack([count, torch.minimum(tail, count), inner], dim=1), *values], dim=1)


def _starts(filled: Tensor, edges: list[Tensor], by_position: bool, by_number: bool) -> Tensor:
    """(P, B) bool: at which parts' first real token a segment starts, as `segment_starts` would find it.

    Args:
        filled: (P, B) bool, which parts have real tokens; edges: four (P, B), see `_edges`.
    """
    first_position, last_position, first_number, last_number = edges
    starts = torch.zeros_like(filled)
    position, number = torch.zeros_like(first_position[0]), torch.zeros_like(first_position[0])
    seen = torch.zeros_like(filled[0])
    for index, here in enumerate(filled):
        lower = here & seen & (first_position[index] <= position)
        other = here & seen & (first_number[index] != number)
        if by_position and by_number and not torch.equal(lower, other):
            row = int((lower != other).nonzero()[0])
            raise ValueError(
                f"position_ids and seq_idx disagree on whether a segment starts at part {index} of the sequence "
                f"(row {row})"
            )
        starts[index] = lower if by_position else other & by_number
        position = torch.where(here, last_position[index], position)
        number = torch.where(here, last_number[index], number)
        seen = seen | here
    return starts


def _group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"context parallelism takes a mesh of one dimension, such as mesh['context'], got {mesh}")
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise ValueError(f"context parallelism takes a DeviceMesh of one dimension or a process group, got {mesh!r}")
    return mesh


def _check(model: nn.Module, base: nn.Module, head: nn.Module) -> None:
    """Raises ValueError for a model that cannot run on parts of a sequence, naming what stands in the way."""
    config = base.config
    ssm = base.layers[0].ssm
    compiled = any(
        module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
        for module in model.modules()
    )
    projections = [module for layer in base.layers for module in (layer.attention.in_proj, layer.attention.out_proj)]
    foreign = next((module for module in projections if wants_whole_texts(module)), None)
    reasons = {
        "bidirectional=True: its layers look at what follows a part too": config.bidirectional,
        f"{type(head).__name__}: only SeqBoatForCausalLM has a loss over parts of a sequence": head is not base
        and not any(cls.__name__ == "SeqBoatForCausalLM" for cls in type(head).__mro__),
        f"ssm_type={config.ssm_type!r}: {type(ssm).__name__} has no `decayed`, which tells how its state decays over "
        "a part": config.ssm_truncation is None and not _defines(ssm, "decayed"),
        f"ssm_truncation={config.ssm_truncation}: {type(ssm).__name__} has no `state_of`, which makes the state of "
        "the last inputs": config.ssm_truncation is not None and not _defines(ssm, "state_of"),
        "nn.DataParallel: each part needs a process of its own": isinstance(model, nn.DataParallel),
        "torch.compile: processes would break their graphs at different places": compiled,
        f"an adapter that looks at whole texts, {type(foreign).__name__}": foreign is not None,
        "a model on several devices: each process has one": len({p.device for p in model.parameters()}) != 1,
        "a model that is in a context_parallel() already": base.parts is not None,
    }
    if reason := next((text for text, applies in reasons.items() if applies), None):
        raise ValueError(f"context parallelism cannot run {reason}")


def _defines(ssm: nn.Module, name: str) -> bool:
    """Whether a recurrence has the method. `Recurrence` itself declares it and only raises; code that came with a
    checkpoint has a class of that name of its own."""
    owner = next((cls for cls in type(ssm).__mro__ if name in vars(cls)), None)
    return owner is not None and owner.__name__ != Recurrence.__name__


@contextmanager
def context_parallel(model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup) -> Iterator[None]:
    """Within it, each process of a group gives `model` a part of a sequence, and gets what the whole would give there.

    Every process passes its part, in the order of the ranks, of any length from 1 on, with the arguments that belong
    to these columns (`attention_mask`, `position_ids`, `seq_idx`, `labels`, `shift_labels`); `sequence_part` cuts
    them. Logits, hidden states and `router_probs` are those of the part; loss and `router_penalty` those of the whole,
    in every process. Gradients are those of the mean over the group of what `backward` is called on: average them over
    its processes, as DDP and FSDP2 do over all of theirs. Backward may be called behind the `with` block.

    With a cache all processes end up with that of the whole, so that generate() goes on in any of them.

    Args:
        model: SeqBoatModel or SeqBoatForCausalLM, or what wraps it (DDP, FSDP2, PEFT), on one device a process.
        mesh: a DeviceMesh of one dimension, such as mesh["context"], or a process group.

    Raises:
        ValueError: for models that cannot be run so, by name. In a forward: in all processes where one's part is
            wrong, where they differ in what they must have alike, and for `cu_seq_lens_q` and caches that are not
            empty.
    """
    group = _group_of(mesh)
    base, head = model_and_head(model)
    _check(model, base, head)
    base.parts = parts = Parts(base, group, next(base.parameters()).device)
    handles = []
    for module in {id(base): base, id(head): head}.values():
        handles.append(module.register_forward_pre_hook(parts.enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(parts.leave, always_call=True))
    try:
        yield
    finally:
        base.parts = None
        for handle in handles:
            handle.remove()


_COLUMNS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "seq_idx", "labels", "shift_labels")


def sequence_part(
    batch: Mapping[str, Any], mesh: DeviceMesh | dist.ProcessGroup, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """This process's part of a batch that every process of the group holds whole.

    Args:
        batch: keyword arguments of the model. Tensors are cut along dimension 1; `cu_seq_lens_q` becomes `seq_idx`,
            which can be cut. Plain numbers, and tensors without a dimension 1, stay as they are.
        lengths: columns of each process's part; by default they differ by one at most.

    Raises:
        ValueError: where there are fewer columns than processes, or `lengths` do not add up to them.
    """
    group = _group_of(mesh)
    given = batch.get("input_ids", batch.get("inputs_embeds"))
    if given is None:
        raise ValueError(f"sequence_part needs input_ids or inputs_embeds, got {', '.join(batch)}")
    columns, size = given.shape[1], group.size()
    if lengths is None:
        lengths = [columns // size + (rank < columns % size) for rank in range(size)]
    if len(lengths) != size or sum(lengths) != columns or min(lengths) < 1:
        raise ValueError(
            f"{columns} columns cannot be cut into the {size} parts of lengths {list(lengths)}: each process needs at "
            "least one, and all of them together the whole"
        )
    first = sum(lengths[: group.rank()])
    part = {}
    for name, value in batch.items():
        if name == "cu_seq_lens_q" and value is not None:
            borders = value.to(given.device)
            places = torch.arange(columns, device=given.device, dtype=borders.dtype)
            name, value = "seq_idx", torch.searchsorted(borders, places, right=True)[None]
        elif name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
            continue
        if isinstance(value, Tensor) and value.ndim > 1:
            if name not in _COLUMNS or value.shape[1] != columns:
                raise ValueError(
                    f"sequence_part cannot cut {name} of shape {tuple(value.shape)} into {columns} columns"
                )
            value = value[:, first : first + lengths[group.rank()]]
        part[name] = value
    return part
