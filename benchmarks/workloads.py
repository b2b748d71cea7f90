"""What the benchmark measures, row by row, and how."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from competitors import MODELS, PACKAGES, UNMASKED, build, set_activation_rate
from measuring import autocast, captured, fixed_streams, median_ms, peak_gib, synchronise, train_step
from roofline import copy_bytes_per_second, matmul_flops_per_second
from targets import COMPILED, DEFAULTS, GRAPH, PREFERRED
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

from modeling_seqboat import SeqBoatCache
from modeling_seqboat.graphed_step_seqboat import GraphedStep, GraphedUpdate

PARTS = ("roofline", "step", "train", "decode", "forward", "prefill")


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        size: of the models, see competitors.SIZES.
        train: (B, L) of the training step; train_lengths: L of further steps at batch 1.
        forward_lengths: L of forwards without a cache; llama_lengths: those that the Llama does too.
        chunk, prefill_lengths: columns a forward with a cache, and of the whole prompt; wide_chunk: columns of the
            forwards in which the longest prompt is read once more.
        contexts: tokens in the state before decoding; wide: (B, context) of a batch.
        graphs: whether CUDA graphs are there to be measured; compile_options: of `torch.compile`, None without it.
        compiled_steps, eager_steps: tokens that one timing of decoding takes.
    """

    size: str
    train: tuple[int, int]
    train_lengths: tuple[int, ...]
    forward_lengths: tuple[int, ...]
    llama_lengths: tuple[int, ...]
    chunk: int
    prefill_lengths: tuple[int, ...]
    wide_chunk: int
    contexts: tuple[int, ...]
    wide: tuple[int, int]
    repeats: int
    compiled_steps: int = 64
    eager_steps: int = 16
    graphs: bool = False
    compile_options: dict[str, str] | None = None

    def steps(self, mode: str) -> int:
        return self.compiled_steps if mode == COMPILED else self.eager_steps


GPU = Scale(
    "enwik8", (4, 8192), (32768, 131072, 8192, 1024), (8192, 131072, 1 << 20, 32768, 1 << 19), (8192, 32768, 131072),
    8192, (8192, 131072, 1 << 20), 131072, (1024, 32768, 1 << 20), (64, 32768), 5, graphs=True,
    compile_options={"mode": "reduce-overhead"},
)  # fmt: skip
CPU = Scale(
    "small", (2, 2048), (1024, 8192), (2048, 16384, 65536), (2048, 8192), 2048, (2048, 16384, 65536),
    16384, (1024, 16384, 65536), (8, 16384), 3, eager_steps=64,
)  # fmt: skip
TOY = Scale(
    "toy", (2, 32), (16, 48), (16, 40), (16,), 16, (16, 40), 32, (8, 24, 40), (3, 24), 1, 2, 2,
    compile_options={"backend": "eager"},
)  # fmt: skip


@dataclass
class Row:
    """One thing to measure; `measure` gives the numbers.

    Rows of a lower `rank` come first, whatever their part: 0 are the headlines, 1 what else a target needs, 2 the
    rest.
    """

    part: str
    model: str
    mode: str
    batch: int
    length: int
    measure: Callable[["Workbench", "Row"], dict] = field(repr=False)
    active: float | None = None
    rank: int = 2
    repeats: int = 5
    warmups: int = 1

    @property
    def name(self) -> str:
        where = f"{self.model} {self.mode}, {self.batch} × {self.length:,}" if self.length else self.model
        return f"{self.part}: {where}" + ("" if self.active is None else f", {self.active:.0%} active")


class Workbench:
    """Models that are built once; only the one in use is on the device, so that a peak of memory is its own."""

    def __init__(self, device: torch.device, scale: Scale):
        self.device, self.scale = device, scale
        self.models: dict[str, nn.Module] = {}
        self.rates: dict[str, tuple] = {}
        self.compiled: dict[str, Callable] = {}
        self.states: dict[int, dict[str, Tensor]] = {}
        self.filled: tuple[int, SeqBoatCache] | None = None

    def ids(self, batch: int, length: int) -> Tensor:
        return torch.randint(0, 256, (batch, length), device=self.device)

    def model(self, name: str, active: float | None = None, shape: tuple[int, int] | None = None, half: bool = False):
        """The model, with `active` of the tokens of a random batch of `shape` activated; in bfloat16 with `half`."""
        if not half and (self.compiled or self.states):
            self.forget_decoding()
        key = f"{name} in bfloat16" if half and self.device.type == "cuda" else name
        for other, model in self.models.items():
            model.zero_grad(set_to_none=True)
            if other != key:
                model.to("cpu")
        if key not in self.models:
            model = build(name, self.device, self.scale.size)
            self.models[key] = model.to(torch.bfloat16) if key != name else model
        model = self.models[key].to(self.device)
        if active is not None and self.rates.get(key) != (active, shape):
            set_activation_rate(model, self.ids(*shape), active)
            self.rates[key] = (active, shape)
        return model

    def forget_decoding(self) -> None:
        """Frees caches and compiled steps, whose memory would count for what is measured next."""
        self.compiled, self.states, self.filled = {}, {}, None
        torch._dynamo.reset()

    def decoder(self, name: str, model: nn.Module, mode: str) -> Callable:
        if mode != COMPILED:
            return model.forward
        if name not in self.compiled:
            self.compiled[name] = torch.compile(
                model.forward, dynamic=False, fullgraph=name == "seqboat", **self.scale.compile_options
            )
        return self.compiled[name]

    def seqboat_state(self, model: nn.Module, context: int) -> dict[str, Tensor]:
        """The cache's tensors after `context` random tokens of one row; a longer context goes on from a shorter
        one."""
        if context not in self.states:
            done, cache = self.filled or (0, SeqBoatCache(model.config))
            if done > context:
                done, cache = 0, SeqBoatCache(model.config)
            fill(model, cache, self, context - done)
            self.filled = (context, cache)
            self.states[context] = {name: tensor.clone() for name, tensor in cache.tensors()}
        return self.states[context]


def fill(model: nn.Module, cache, bench: Workbench, length: int, chunk: int | None = None) -> None:
    """Feeds `length` random tokens of one row, `chunk` columns at a time, by default the scale's."""
    chunk = chunk or bench.scale.chunk
    for start in range(0, length, chunk):
        ids = bench.ids(1, min(chunk, length - start))
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def measure_roofline(bench: Workbench, row: Row) -> dict:
    if row.model == "copy":
        return {"bytes_per_s": copy_bytes_per_second(bench.device)}
    return {"flop_per_s": matmul_flops_per_second(bench.device)}


def tune_kernels(row: Row, run: Callable[[], None]) -> None:
    """Runs once a model whose kernels are compiled and tuned in the first call with a shape: the tuning has buffers of
    its own, which would count for the peak of memory."""
    if row.model in PACKAGES:
        run()


def measure_training(bench: Workbench, row: Row) -> dict:
    device, ours = bench.device, row.model.startswith("seqboat")
    model = bench.model(row.model, row.active, bench.scale.train).train()
    ids = bench.ids(row.batch, row.length)
    if row.mode == GRAPH and ours:
        graphed = GraphedStep(model)

        def run():
            model.zero_grad(set_to_none=True)
            with autocast(device):
                graphed(input_ids=ids, labels=ids)

        # The first call runs as usual, the second captures; a replay allocates nothing.
        peak = peak_gib(lambda: (run(), run()), device)
    elif row.mode == GRAPH:
        usual = model.config._attn_implementation
        model.set_attn_implementation(UNMASKED)
        replays = []
        try:
            peak = peak_gib(lambda: replays.append(captured(lambda: train_step(model, ids))), device)
        finally:
            model.set_attn_implementation(usual)
        run = replays[0]
    else:

        def run():
            train_step(model, ids)

        tune_kernels(row, run)
        peak = peak_gib(run, device)
    step = median_ms(run, device, row.repeats, row.warmups)
    found = {"ms": step, "tokens_per_s": row.batch * row.length / step * 1e3, "peak_gib": peak}
    if row.mode == "eager":
        found["forward_ms"] = median_ms(lambda: forward(model, ids, labels=ids), device, row.repeats, row.warmups)
    model.zero_grad(set_to_none=True)
    return found


def measure_step(bench: Workbench, row: Row) -> dict:
    """What a user waits for: forward, backward, clipping and a fused AdamW."""
    device = bench.device
    model = bench.model(row.model, row.active, bench.scale.train).train()
    ids = bench.ids(row.batch, row.length)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=device.type == "cuda")
    graphed = update = None
    if row.mode == GRAPH:
        graphed, update = GraphedStep(model), GraphedUpdate(optimizer, 1.0)

    def run():
        if graphed is None:
            train_step(model, ids)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        else:
            with autocast(device):
                graphed(input_ids=ids, labels=ids)
            update()
        optimizer.zero_grad(set_to_none=True)

    tune_kernels(row, run)
    peak = peak_gib(lambda: (run(), run()), device)
    step = median_ms(run, device, row.repeats, row.warmups)
    return {"ms": step, "tokens_per_s": row.batch * row.length / step * 1e3, "peak_gib": peak}


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor, use_cache: bool | None = False, **options) -> None:
    with autocast(ids.device):
        model(input_ids=ids, use_cache=use_cache, **options)


def measure_forward(bench: Workbench, row: Row) -> dict:
    device = bench.device
    model = bench.model(row.model, row.active, bench.scale.train).eval()
    ids = bench.ids(row.batch, row.length)

    def run():
        forward(model, ids, use_cache=None if row.mode == DEFAULTS else False, logits_to_keep=1)

    if row.mode == GRAPH:
        with fixed_streams(model, run):
            replays = []
            peak = peak_gib(lambda: replays.append(captured(run)), device)
            run = replays[0]
    else:
        tune_kernels(row, run)
        peak = peak_gib(run, device)
    taken = median_ms(run, device, row.repeats, row.warmups)
    return {"ms": taken, "tokens_per_s": row.batch * row.length / taken * 1e3, "peak_gib": peak}


@torch.no_grad()
def measure_prefill(bench: Workbench, row: Row) -> dict:
    device = bench.device
    model = bench.model(row.model, row.active, (1, bench.scale.chunk), half=True).eval()
    caches = []

    chunk = None if row.mode == "eager" else bench.scale.wide_chunk

    def run():
        caches[:] = [SeqBoatCache(model.config)]
        fill(model, caches[0], bench, row.length, chunk)

    taken = []
    for _ in range(row.warmups):
        run()
    peak = peak_gib(lambda: taken.append(median_ms(run, device, row.repeats, 0)), device)
    return {
        "ms": taken[0], "tokens_per_s": row.batch * row.length / taken[0] * 1e3, "peak_gib": peak,
        "cache_mib": caches[0].memory_bytes() / 2**20,
    }  # fmt: skip


@torch.no_grad()
def measure_decode(bench: Workbench, row: Row) -> dict:
    device, scale = bench.device, bench.scale
    half_shape = (1, scale.chunk)
    model = bench.model(row.model, row.active, half_shape, half=True).eval()
    steps = scale.steps(row.mode)
    # A token that is always the same might always be skipped; and contexts compare where all get the same tokens.
    drawn = torch.randint(0, 256, (steps, row.batch, 1), generator=torch.Generator().manual_seed(0)).to(device)
    cache = (seqboat_cache if row.model == "seqboat" else attention_cache)(bench, model, row)
    step = bench.decoder(row.model, model, row.mode)
    counters = torch._dynamo.utils.counters
    skipped = counters["inductor"]["cudagraph_skips"]

    def run():
        for token in drawn:
            step(input_ids=token, past_key_values=cache, use_cache=True)

    with without_plans(row):
        taken = median_ms(run, device, row.repeats, 2) / steps
    synchronise(device)
    found = {"ms": taken, "tokens_per_s": row.batch / taken * 1e3, "cache_mib": cache_mib(cache)}
    if counters["inductor"]["cudagraph_skips"] > skipped:
        found["note"] = "compiled without CUDA graphs"
    return found


def without_plans(row: Row) -> AbstractContextManager:
    """Keeps cuDNN from attention with a growing number of keys.

    PyTorch prefers it on Hopper (check_prefer_cudnn_attention), and it builds a plan for each number of keys that it
    has not met: tens of milliseconds of the host for every token, where the flash kernel has nothing to build.
    """
    if row.model == "seqboat" or row.mode != "eager":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def seqboat_cache(bench: Workbench, model: nn.Module, row: Row) -> SeqBoatCache:
    """The state after `row.length` tokens of one row, repeated to `row.batch` rows.

    A compiled step is tied to the addresses of a static cache, so that all contexts of a batch size share one.
    """
    state = bench.seqboat_state(model, row.length)
    key = f"cache of {row.batch} rows"
    cache = bench.compiled.get(key) if row.mode == COMPILED else None
    if cache is None:
        cache = SeqBoatCache(model.config, static=row.mode == COMPILED)
        for layer in cache.layers:
            layer.initialize(row.batch, model.dtype, bench.device)
        if row.mode == COMPILED:
            bench.compiled[key] = cache
    for name, tensor in cache.tensors():
        tensor.copy_(state[name].expand_as(tensor))
    for layer in cache.layers:
        if isinstance(layer.seen, Tensor):
            layer.seen.fill_(row.length)
        else:
            layer.seen = row.length
    return cache


def attention_cache(bench: Workbench, model: nn.Module, row: Row) -> StaticCache | DynamicCache:
    """Keys and values of `row.length` tokens, with room for those that are decoded in all timings."""
    room = (row.repeats + 2) * bench.scale.steps(row.mode)
    if row.mode == COMPILED:
        cache = StaticCache(config=model.config, max_cache_len=row.length + room)
    else:
        cache = DynamicCache(config=model.config)
    fill(model, cache, bench, row.length)
    return cache


def cache_mib(cache) -> float:
    if isinstance(cache, SeqBoatCache):
        return cache.memory_bytes() / 2**20
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def plan(scale: Scale, parts: list[str], models: tuple[str, ...] = MODELS) -> list[Row]:
    """The rows of these parts and models, the most important first. The roofline is no model's and always there."""
    makers = {
        "roofline": _roofline, "step": _steps, "train": _training, "decode": _decoding, "forward": _forwards,
        "prefill": _prefills,
    }  # fmt: skip
    rows = [row for part in PARTS if part in parts for row in makers[part](scale)]
    rows = [row for row in rows if row.part == "roofline" or row.model in models]
    return sorted(rows, key=lambda row: row.rank)


def _roofline(scale: Scale) -> list[Row]:
    return [Row("roofline", name, "", 0, 0, measure_roofline, rank=0) for name in ("copy", "matmul")]


def _steps(scale: Scale) -> list[Row]:
    kinds = [("seqboat", "eager", 0.5), ("llama", "eager", None)]
    kinds += [("seqboat", GRAPH, 0.5)] if scale.graphs else []
    repeats = 2 * scale.repeats
    rows = [
        Row("step", model, mode, *scale.train, measure_step, active, rank=0, repeats=repeats)
        for model, mode, active in kinds
    ]
    return rows + [Row("step", name, "eager", *scale.train, measure_step, repeats=repeats) for name in PACKAGES]


def _training(scale: Scale) -> list[Row]:
    repeats, modes = scale.repeats, ("eager", GRAPH) if scale.graphs else ("eager",)

    def row(model: str, mode: str, shape: tuple[int, int], active: float | None, **options) -> Row:
        return Row("train", model, mode, *shape, measure_training, active, **{"repeats": repeats, **options})

    rows = [row("seqboat", mode, scale.train, 0.5, rank=0) for mode in modes]
    rows += [row("llama", mode, scale.train, None, rank=0) for mode in modes]
    few = min(3, repeats)
    rows += [row("seqboat", modes[-1], scale.train, rate, rank=1) for rate in (0.0, 0.1, 1.0)]
    long, short = scale.train_lengths[:2], scale.train_lengths[2:]
    rows += [row("seqboat", mode, (1, length), 0.5, repeats=few, rank=1) for length in long for mode in modes]
    rows += [row("mistral", "eager", scale.train, None, repeats=few)]
    rows += [row("llama", "eager", (1, long[0]), None, repeats=few)]
    rows += [row(name, "eager", scale.train, None, repeats=few) for name in PACKAGES]
    if scale.graphs:
        rows += [row("seqboat", "eager", scale.train, rate, repeats=few) for rate in (0.1, 1.0)]
        rows += [row("seqboat-torch", "eager", scale.train, 0.5, repeats=1, warmups=0)]
    rows += [row("seqboat", mode, (1, length), 0.5, repeats=few) for length in short for mode in modes]
    return rows + [row("llama", "eager", (1, length), None, repeats=few) for length in (*short, *long[1:])]


def _decoding(scale: Scale) -> list[Row]:
    def row(model: str, mode: str, batch: int, context: int, **options) -> Row:
        active = 0.5 if model == "seqboat" else None
        repeats = scale.repeats if mode == COMPILED else min(3, scale.repeats)
        return Row("decode", model, mode, batch, context, measure_decode, active, repeats=repeats, **options)

    first, second, *_ = scale.contexts
    if scale.compile_options is None:
        rows = [row("seqboat", "eager", 1, context, rank=0) for context in scale.contexts]
        rows += [row("llama", "eager", 1, context) for context in (first, second)]
        return rows + [row("seqboat", "eager", *scale.wide)]
    rows = [row("seqboat", COMPILED, 1, context, rank=0) for context in scale.contexts]
    rows += [row("seqboat", COMPILED, *scale.wide, rank=0), row("llama", COMPILED, 1, second, rank=0)]
    rows += [row("seqboat", "eager", 1, first), row("llama", "eager", 1, first)]
    return rows + [row("llama", PREFERRED, 1, first)]


def _forwards(scale: Scale) -> list[Row]:
    def row(model: str, mode: str, length: int, active: float | None) -> Row:
        repeats = 1 if length > 1 << 18 else min(3, scale.repeats) if length > 1 << 16 else scale.repeats
        wanted = mode == modes[0] and length in scale.prefill_lengths or length == scale.forward_lengths[0]
        rank = 1 if wanted and model == "seqboat" else 2
        return Row("forward", model, mode, 1, length, measure_forward, active, repeats=repeats, rank=rank)

    modes = (GRAPH, "eager") if scale.graphs else ("eager",)
    rows = [row("seqboat", mode, length, 0.5) for mode in modes for length in scale.forward_lengths]
    # A call that does not say whether it wants a cache gets one.
    rows.insert(0, row("seqboat", DEFAULTS, scale.forward_lengths[0], 0.5))
    return rows + [row(name, "eager", length, None) for name in ("llama", *PACKAGES) for length in scale.llama_lengths]


def _prefills(scale: Scale) -> list[Row]:
    rows = []
    for length in scale.prefill_lengths:
        chunks = -(-length // scale.chunk)
        repeats, warmups = (scale.repeats, 1) if chunks == 1 else (1, 0)
        rows.append(Row("prefill", "seqboat", "eager", 1, length, measure_prefill, 0.5, 1, repeats, warmups))
    wide = f"chunks of {scale.wide_chunk:,}"
    return [*rows, Row("prefill", "seqboat", wide, 1, scale.prefill_lengths[-1], measure_prefill, 0.5, 0, 2, 1)]
