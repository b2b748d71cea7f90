"""What the routers' decisions amount to: activation rates, attention spans, context and FLOPs (arXiv 2306.11197,
sections 4 and 5), from the `router_probs` that every model returns with `output_router_probs=True`.

Letters: B batch, L columns, n layers, W memory size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_seqboat import SeqBoatConfig
from .context_seqboat import Texts, build_context
from .flops_seqboat import LayerFlops, layer_flops
from .ops_layout_seqboat import segment_bounds
from .ops_packed_seqboat import pack


@dataclass(frozen=True)
class TokenClasses:
    """A partition of the vocabulary.

    Attributes:
        names: one name a class.
        assign: (...,) int64 token ids -> (...,) int64 places in `names`.
    """

    names: tuple[str, ...]
    assign: Callable[[Tensor], Tensor]


BYTE_CLASS_NAMES = ("letter", "digit", "whitespace", "punctuation", "non-ASCII", "other")


def _byte_class(byte: int) -> int:
    character = chr(byte)
    if byte >= 0x80:
        return 4
    if character.isalpha():
        return 0
    if character.isdigit():
        return 1
    if character in " \t\n\r\v\f":
        return 2
    return 3 if 0x20 < byte < 0x7F else 5


_BYTE_TABLE = [*map(_byte_class, range(256)), BYTE_CLASS_NAMES.index("other")]


def byte_classes(ids: Tensor) -> Tensor:
    """Places in `BYTE_CLASS_NAMES` of the byte tokenizer's ids.

    Args:
        ids: (...,) int64. ASCII bytes are letters, digits, whitespace, punctuation or other (control bytes); 0x80 to
            0xFF, leading and continuation bytes of UTF-8, are non-ASCII; ids from 256 on, the specials, are other.

    Raises:
        ValueError: for a negative id.
    """
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"token ids must be at least 0, got {int(ids.min())}")
    return torch.tensor(_BYTE_TABLE, device=ids.device)[ids.clamp_max(256)]


BYTE_CLASSES = TokenClasses(BYTE_CLASS_NAMES, byte_classes)


@dataclass(frozen=True)
class AttentionReach:
    """How far each activated token looks; 0 at every other token.

    Attributes:
        keys: (B, L) int64, keys seen, the token itself included.
        mean_distance: (B, L) float64, mean distance to these keys in real tokens.
        farthest: (B, L) int64, distance to the oldest key; bidirectional: to the farthest on either side.
    """

    keys: Tensor
    mean_distance: Tensor
    farthest: Tensor


def attention_reach(
    active: Tensor, memory_size: int, bidirectional: bool, *, real: Tensor | None = None, segment: Tensor | None = None
) -> AttentionReach:
    """Distances between queries and the activated keys in their windows (arXiv 2306.11197, section 3.3).

    Distances count real tokens: what padding there is in between adds nothing, tokens that are not activated do.

    Args:
        active: (B, L) bool, True at activated tokens, which are real.
        memory_size: W: a token sees itself and the W activated tokens of its segment before it, and when
            `bidirectional` the W after it.
        real: (B, L) bool, or None when every column is real.
        segment: (B, L) int64, segments started in the row up to each column, or None when none does.
    """
    bounds = None if segment is None else segment_bounds(F.pad(segment[:, 1:] != segment[:, :-1], (1, 0)))
    packed = pack(active, memory_size, bidirectional, bounds).wait()
    if real is None:
        real = torch.ones_like(active)
    place = (real.long().cumsum(1) - 1).flatten()[packed.index]
    # Sums over runs of keys are differences of running sums; places are integers, so nothing is rounded.
    total = F.pad(place.cumsum(0), (1, 0))
    own, start, end = torch.arange(len(place), device=place.device), packed.key_start, packed.key_end
    before = place * (own - start) - (total[own] - total[start])
    after = (total[end] - total[own + 1]) - place * (end - own - 1)
    keys = end - start
    farthest = torch.maximum(place - place[start], place[end - 1] - place)

    def spread(values: Tensor) -> Tensor:
        columns = values.new_zeros(active.numel())
        return columns.index_copy_(0, packed.index, values).view_as(active)

    return AttentionReach(spread(keys), spread((before + after).double() / keys), spread(farthest))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Quotients in float64; NaN where the whole is 0, for there is nothing to speak of."""
    return part.double() / whole.double()


@dataclass(frozen=True)
class ActivationReport:
    """Counts over the real tokens of some rows, and the averages that they give. Reports of several batches add up;
    `print` shows one as a table.

    Attributes:
        config: the model's.
        tokens: real tokens.
        activated: (n,) int64, activated tokens.
        bucket_size: tokens a position bucket: bucket b holds places b * bucket_size onwards of each segment.
        bucket_tokens: (buckets,) int64; bucket_activated: (n, buckets) int64.
        class_names: names of the token classes, empty where no ids were given.
        class_tokens: (classes,) int64; class_activated: (n, classes) int64.
        pairs: (n,) int64, keys seen, summed over the activated tokens; always_on_pairs: what would be seen if every
            real token was activated.
        distance: (n,) float64, mean distances to the keys seen, summed over the activated tokens.
        farthest: (n,) int64, distances to the oldest key, summed over the activated tokens.
    """

    config: SeqBoatConfig
    tokens: int
    activated: Tensor
    bucket_size: int
    bucket_tokens: Tensor
    bucket_activated: Tensor
    class_names: tuple[str, ...]
    class_tokens: Tensor
    class_activated: Tensor
    pairs: Tensor
    always_on_pairs: int
    distance: Tensor
    farthest: Tensor

    @property
    def rates(self) -> Tensor:
        """(n,) float64, the share of real tokens that each layer activates."""
        return _ratio(self.activated, torch.tensor(self.tokens))

    @property
    def bucket_rates(self) -> Tensor:
        """(n, buckets) float64, by place in the segment; NaN where there is no token."""
        return _ratio(self.bucket_activated, self.bucket_tokens)

    @property
    def class_rates(self) -> Tensor:
        """(n, classes) float64, by token class; NaN where there is no token."""
        return _ratio(self.class_activated, self.class_tokens)

    @property
    def spans(self) -> Tensor:
        """(n,) float64, average attention span in tokens: the mean distance between an activated token and the
        activated keys that it sees, itself at distance 0 included, averaged over the activated tokens; NaN where
        there are none."""
        return _ratio(self.distance, self.activated)

    @property
    def contexts(self) -> Tensor:
        """(n,) float64, effective context of the memory in tokens: the distance to the oldest key seen
        (bidirectional: the farthest on either side), averaged over the activated tokens; NaN where there are none."""
        return _ratio(self.farthest, self.activated)

    @property
    def flops(self) -> list[LayerFlops]:
        """What each layer needed."""
        counts = zip(self.activated.tolist(), self.pairs.tolist(), strict=True)
        return [layer_flops(self.config, self.tokens, activated, pairs) for activated, pairs in counts]

    @property
    def always_on_flops(self) -> LayerFlops:
        """What a layer needs without a router and with every real token activated."""
        return layer_flops(self.config, self.tokens, self.tokens, self.always_on_pairs, router=False)

    @property
    def flops_saved(self) -> list[int]:
        """A layer: always on less what was needed. The router's own cost is part of what was needed, so this is below
        0 for a layer that activates everything."""
        return [self.always_on_flops.total - layer.total for layer in self.flops]

    @property
    def share_saved(self) -> float:
        """Of the FLOPs of all layers with attention always on; NaN without a real token."""
        always_on = self.always_on_flops.total * len(self.flops)
        return sum(self.flops_saved) / always_on if always_on else float("nan")

    def __str__(self) -> str:
        lines = [f"{self.tokens:,} tokens", "layer  activated  span  context"]
        rows = zip(self.rates.tolist(), self.spans.tolist(), self.contexts.tolist(), strict=True)
        lines += [
            f"{layer:5}  {rate:9.1%}  {span:4.0f}  {context:7.0f}" for layer, (rate, span, context) in enumerate(rows)
        ]
        return "\n".join([*lines, f"FLOPs saved against attention that is always on: {self.share_saved:.1%}"])

    def __add__(self, other: "ActivationReport") -> "ActivationReport":
        """The report on both sets of rows. Raises ValueError where layers, buckets or classes are not the same."""
        for name in ("bucket_size", "class_names"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"reports differ in {name}: {getattr(self, name)!r} and {getattr(other, name)!r}")
        if self.config.to_diff_dict() != other.config.to_diff_dict():
            raise ValueError("reports of models with different configs do not add up")
        buckets = max(len(self.bucket_tokens), len(other.bucket_tokens))
        sums = {}
        for name in (field.name for field in fields(self)):
            pair = getattr(self, name), getattr(other, name)
            if name in ("bucket_tokens", "bucket_activated"):
                pair = [F.pad(counts, (0, buckets - counts.shape[-1])) for counts in pair]
            sums[name] = pair[0] if name in ("config", "bucket_size", "class_names") else pair[0] + pair[1]
        return ActivationReport(**sums)


def analyse_activations(
    router_probs: Sequence[Tensor] | nn.Module,
    config: SeqBoatConfig | Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    bucket_size: int | None = None,
    token_classes: TokenClasses = BYTE_CLASSES,
) -> ActivationReport:
    """Counts activations, spans and FLOPs of whole rows.

    `analyse_activations(model, input_ids)` runs a model that reads tokens on (B, L) ids, in evaluation mode and with
    the masks and positions given here, and counts what its routers chose.

    Args:
        router_probs: one (B, L) float tensor a layer, as the model returned it: above 0 at activated tokens. The rows
            must be whole: for a text fed in chunks through a cache, concatenate the chunks' tensors.
        config: the model's.
        input_ids: (B, L) int64, for the rates by token class.
        attention_mask, position_ids, seq_idx, cu_seq_lens_q: as they were given to the model.
        bucket_size: tokens a position bucket; an eighth of L, rounded up, when not given.
        token_classes: by default those of the byte tokenizer.

    Raises:
        ValueError: for shapes that do not fit each other, an activated pad, or a class outside `token_classes.names`.
        TypeError: for anything but router_probs with a config, or a model with ids.
    """
    texts = Texts(attention_mask, position_ids, seq_idx, cu_seq_lens_q)
    if isinstance(router_probs, nn.Module) and isinstance(config, Tensor):
        model, input_ids = router_probs, config
        router_probs, config = _run(model, input_ids, texts), model.config
    if isinstance(router_probs, nn.Module) or not isinstance(config, SeqBoatConfig):
        raise TypeError(
            "analyse_activations takes (outputs.router_probs, model.config) of a call with output_router_probs=True, "
            f"or (model, input_ids); got {type(router_probs).__name__} and {type(config).__name__}"
        )
    active = _active_tokens(router_probs, config)
    batch, length = active.shape[1:]
    bucket_size = -(-length // 8) if bucket_size is None else bucket_size
    if isinstance(bucket_size, bool) or not isinstance(bucket_size, int) or bucket_size < 1:
        raise ValueError(f"bucket_size must be an integer of at least 1, got {bucket_size!r}")
    if input_ids is not None and input_ids.shape != (batch, length):
        raise ValueError(f"input_ids must be of shape {(batch, length)}, got {tuple(input_ids.shape)}")
    context = build_context(config, batch, length, active.device, texts)
    real = torch.ones_like(active[0]) if context.real is None else context.real
    if bool((active & ~real).any()):
        layer, row, column = (active & ~real).nonzero()[0].tolist()
        raise ValueError(
            f"router_probs of layer {layer} is above 0 at padding (row {row}, column {column}): is attention_mask the "
            "one that the model was given?"
        )
    *reaches, always_on = (
        attention_reach(layer, config.memory_size, config.bidirectional, real=real, segment=context.segment)
        for layer in (*active, real)
    )
    buckets = _places(real, context.reset) // bucket_size
    classes, names = torch.zeros_like(buckets), ()
    if input_ids is not None:
        names = token_classes.names
        classes = _classes_of(input_ids, real, token_classes)
    count_of_buckets = int(buckets[real].max()) + 1 if bool(real.any()) else 0
    return ActivationReport(
        config=config,
        tokens=int(real.sum()),
        activated=active.sum((1, 2)).cpu(),
        bucket_size=bucket_size,
        bucket_tokens=_histogram(buckets, real[None], count_of_buckets)[0],
        bucket_activated=_histogram(buckets, active, count_of_buckets),
        class_names=names,
        class_tokens=_histogram(classes, real[None], len(names))[0],
        class_activated=_histogram(classes, active, len(names)),
        pairs=torch.stack([reach.keys.sum() for reach in reaches]).cpu(),
        always_on_pairs=int(always_on.keys.sum()),
        distance=torch.stack([reach.mean_distance.sum() for reach in reaches]).cpu(),
        farthest=torch.stack([reach.farthest.sum() for reach in reaches]).cpu(),
    )


@torch.no_grad()
def _run(model: nn.Module, input_ids: Tensor, texts: Texts) -> tuple[Tensor, ...]:
    """A model's `router_probs` for some rows."""
    was_training = model.training
    try:
        options = {name: value for name, value in texts._asdict().items() if value is not None}
        return model.eval()(input_ids, use_cache=False, output_router_probs=True, **options).router_probs
    finally:
        model.train(was_training)


def _active_tokens(router_probs: Sequence[Tensor], config: SeqBoatConfig) -> Tensor:
    """(n, B, L) bool."""
    if len(router_probs) != config.num_hidden_layers:
        raise ValueError(f"router_probs has {len(router_probs)} layers, the config {config.num_hidden_layers}")
    shapes = {tuple(probs.shape) for probs in router_probs}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"router_probs must hold one (batch, length) tensor a layer, got shapes {sorted(shapes)}")
    # Layers of one model may lie on several devices.
    return torch.stack([(probs > 0).to(router_probs[0].device) for probs in router_probs])


def _places(real: Tensor, reset: Tensor | None) -> Tensor:
    """(B, L) int64 places among the segment's real tokens; not above them at pads."""
    order = (real.long().cumsum(1) - 1).clamp_min(0)
    return order if reset is None else order - torch.where(reset & real, order, 0).cummax(1).values


def _classes_of(input_ids: Tensor, real: Tensor, token_classes: TokenClasses) -> Tensor:
    classes = token_classes.assign(input_ids.to(real.device).masked_fill(~real, 0))
    outside = real & ((classes < 0) | (classes >= len(token_classes.names)))
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"token_classes puts id {int(input_ids[row, column])} into class {int(classes[row, column])}; there are "
            f"classes 0 to {len(token_classes.names) - 1}"
        )
    return classes


def _histogram(values: Tensor, chosen: Tensor, size: int) -> Tensor:
    """values (B, L) in 0..size-1, chosen (n, B, L) bool -> (n, size) int64 counts."""
    if size == 0:
        return torch.zeros(len(chosen), 0, dtype=torch.long)
    return torch.stack([torch.bincount(values[marks], minlength=size) for marks in chosen]).cpu()
