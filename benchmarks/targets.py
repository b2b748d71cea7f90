"""Whether the targets are met, judged from the rows of a run.

A target whose rows are missing or failed is not judged. The published code is no part of a run: the time that a step
took it was measured once on an H200, at the same shape.
"""

from dataclasses import dataclass

Rows = list[dict]

GRAPH, COMPILED, DEFAULTS = "CUDA graph", "compiled", "eager, cache by default"
# Attention by whatever kernel PyTorch prefers.
PREFERRED = "eager, attention as PyTorch chooses"
SHAPE = (4, 8192)
LENGTHS = (8192, 131072, 1 << 20)
CONTEXTS = (1024, 32768, 1 << 20)
MODES = {"eager": "launched op by op", GRAPH: "as a CUDA graph"}


@dataclass(frozen=True)
class Target:
    """met is None where the run has not measured it."""

    text: str
    measured: str
    met: bool | None


def judge(rows: Rows, device: str) -> list[Target]:
    """The targets of a GPU or of a CPU (`device` is `cuda` or `cpu`)."""
    if device != "cuda":
        return _on_cpu(rows)
    return [
        *_whole_step(rows), *_training_step(rows), *_with_a_cache(rows), *_forward(rows), *_memory(rows),
        *_decoding(rows), *_long_rows(rows), _rates(rows),
    ]  # fmt: skip


def value(rows: Rows, name: str, **wanted) -> float | None:
    """The number `name` of the row whose fields are as wanted, or None if it was not measured."""
    for row in rows:
        if row.get("status") == "ok" and all(row.get(key) == given for key, given in wanted.items()):
            return row.get(name)
    return None


def _step(
    rows: Rows, model: str, mode: str, name: str = "ms", active: float | None = 0.5, shape=SHAPE
) -> float | None:
    active = active if model == "seqboat" else None
    return value(rows, name, part="train", model=model, mode=mode, active=active, batch=shape[0], length=shape[1])


def _target(text: str, numbers: list[float | None], show, met) -> Target:
    """Shows and judges `numbers`, unless one of them is missing."""
    if any(number is None for number in numbers):
        return Target(text, "not measured", None)
    return Target(text, show(*numbers), bool(met(*numbers)))


def _spread(*numbers: float) -> float:
    return max(numbers) / min(numbers) - 1


def _whole_step(rows: Rows) -> list[Target]:
    """Forward, backward, clipping and AdamW, over the Llama's launched op by op."""
    llama = value(rows, "ms", part="step", model="llama", mode="eager")
    peak = value(rows, "peak_gib", part="step", model="seqboat", mode="eager")
    targets = []
    for mode, most in (("eager", 0.65), (GRAPH, 0.36)):
        ours = value(rows, "ms", part="step", model="seqboat", mode=mode, active=0.5)
        targets.append(
            _target(
                f"whole step, {MODES[mode]}: ≤ {most} of the Llama's", [ours, llama],
                lambda ours, llama: f"{ours / llama:.2f} ({ours:.1f} against {llama:.1f} ms)",
                lambda ours, llama, most=most: ours <= most * llama,
            )
        )  # fmt: skip
    return [
        *targets,
        _target("whole step, peak memory: ≤ 7 GiB", [peak], lambda gib: f"{gib:.2f} GiB", lambda gib: gib <= 7),
    ]


def _with_a_cache(rows: Rows) -> list[Target]:
    """What the cache of a forward costs."""
    defaults, plain = (
        value(rows, "ms", part="forward", model="seqboat", mode=mode, batch=1, length=LENGTHS[0])
        for mode in (DEFAULTS, "eager")
    )
    chunked = [
        row["ms"]
        for row in rows
        if row.get("part") == "prefill" and row.get("length") == LENGTHS[-1] and row.get("status") == "ok"
    ]
    return [
        _target(
            "forward of 1 × 8,192 that makes a cache by default: ≤ 1.1 × the same with use_cache=False",
            [defaults, plain],
            lambda ours, plain: f"{ours / plain:.2f} × ({ours:.1f} against {plain:.1f} ms)",
            lambda ours, plain: ours <= 1.1 * plain,
        ),
        _target(
            "prefill of 1,048,576 tokens with a cache: ≤ 600 ms", [min(chunked, default=None)],
            lambda ms: f"{ms:,.0f} ms", lambda ms: ms <= 600,
        ),
    ]  # fmt: skip


def _training_step(rows: Rows) -> list[Target]:
    targets = []
    for mode, how in MODES.items():
        targets.append(
            _target(
                f"training step, 4 × 8,192, half of the tokens active, {how}: ≤ 22 ms (10 × the published code's 226 "
                "ms)",
                [_step(rows, "seqboat", mode)], lambda ms: f"{ms:.1f} ms ({226 / ms:.1f} ×)", lambda ms: ms <= 22,
            )
        )  # fmt: skip
    for mode, how in MODES.items():
        targets.append(
            _target(
                f"training step: ≥ 3 × the Llama of equal size, the Llama {how}, SeqBoat as a CUDA graph",
                [_step(rows, "seqboat", GRAPH), _step(rows, "llama", mode)],
                lambda ours, llama: f"{llama / ours:.2f} × ({llama:.1f} against {ours:.1f} ms)",
                lambda ours, llama: llama >= 3 * ours,
            )
        )
    peak = _step(rows, "seqboat", "eager", "peak_gib")
    targets.append(
        _target("training step, peak memory: ≤ 7 GiB", [peak], lambda gib: f"{gib:.2f} GiB", lambda gib: gib <= 7)
    )
    return targets


def _forward(rows: Rows) -> list[Target]:
    targets = []
    for mode, how in MODES.items():
        rates = [
            value(rows, "tokens_per_s", part="forward", model="seqboat", mode=mode, batch=1, length=length)
            for length in LENGTHS
        ]
        targets.append(
            _target(
                f"forward, 8k → 128k → 1M tokens, {how}: time per token flat within 10 %", rates,
                lambda *all: " → ".join(f"{1e6 / rate:.3f}" for rate in all) + f" µs (spread {_spread(*all):.1%})",
                lambda *rates: _spread(*rates) <= 0.1,
            )
        )  # fmt: skip
    return targets


def _memory(rows: Rows) -> list[Target]:
    lengths = (32768, 131072)
    peaks = [_step(rows, "seqboat", "eager", "peak_gib", shape=(1, length)) for length in lengths]
    chunked = [
        value(rows, "peak_gib", part="prefill", model="seqboat", mode="eager", batch=1, length=length)
        for length in LENGTHS
    ]
    return [
        _target(
            "training, 32k → 128k tokens: memory linear (per token at most 10 % more)", peaks,
            lambda *peaks: " → ".join(f"{peak:.2f} GiB" for peak in peaks),
            lambda short, long: long / lengths[1] <= 1.1 * short / lengths[0],
        ),
        _target(
            "chunked prefill, 8k → 128k → 1M tokens: memory constant within 10 %", chunked,
            lambda *peaks: " → ".join(f"{peak:.3f} GiB" for peak in peaks), lambda *peaks: _spread(*peaks) <= 0.1,
        ),
    ]  # fmt: skip


def _decoding(rows: Rows) -> list[Target]:
    def decode(name: str, model: str, batch: int, context: int) -> float | None:
        return value(rows, name, part="decode", model=model, mode=COMPILED, batch=batch, length=context)

    times = [decode("ms", "seqboat", 1, context) for context in CONTEXTS]
    return [
        _target(
            "decode, batch 1: time per token independent of context, 1k → 32k → 1M within 5 %", times,
            lambda *times: " → ".join(f"{time:.3f}" for time in times) + f" ms (spread {_spread(*times):.1%})",
            lambda *times: _spread(*times) <= 0.05,
        ),
        _target(
            "decode, batch 1, bfloat16: ≤ 1 ms a token at every context", times,
            lambda *times: f"{max(times):.3f} ms", lambda *times: max(times) <= 1,
        ),
        _target(
            "decode, batch 64 at 32k of context: ≥ 50,000 tokens/s", [decode("tokens_per_s", "seqboat", 64, 32768)],
            lambda rate: f"{rate:,.0f} tokens/s", lambda rate: rate >= 50_000,
        ),
        _target(
            "decode, batch 1 at 32k of context: ≥ 2 × the Llama (static cache, compiled)",
            [decode("ms", "seqboat", 1, 32768), decode("ms", "llama", 1, 32768)],
            lambda ours, llama: f"{llama / ours:.2f} × ({llama:.3f} against {ours:.3f} ms)",
            lambda ours, llama: llama >= 2 * ours,
        ),
    ]  # fmt: skip


def _long_rows(rows: Rows) -> list[Target]:
    targets = []
    base = _step(rows, "seqboat", GRAPH, "tokens_per_s")
    for length in (32768, 131072):
        targets.append(
            _target(
                f"training at 1 × {length:,}, as a CUDA graph: the tokens/s of 4 × 8,192, at most 10 % fewer",
                [base, _step(rows, "seqboat", GRAPH, "tokens_per_s", shape=(1, length))],
                lambda base, rate: f"{rate / base:.2f} × ({rate / 1e6:.3f} M against {base / 1e6:.3f} M)",
                lambda base, rate: rate >= 0.9 * base,
            )
        )
    return targets


def _rates(rows: Rows) -> Target:
    """What attention adds to a step in which no token is activated, at 10 % of what it adds at 100 %."""
    none, some, every = (_step(rows, "seqboat", GRAPH, active=rate) for rate in (0.0, 0.1, 1.0))
    return _target(
        "activation rate 10 % against 100 %, as a CUDA graph: the gated attention's time, over a step without "
        "activated tokens, falls in proportion (to at most 15 %)",
        [none, some, every],
        lambda none, some, every: (
            f"{(some - none) / (every - none):.1%} ({some - none:.1f} of {every - none:.1f} ms)"
            if every > none
            else f"no more time at 100 % ({every:.1f} ms) than at 0 % ({none:.1f} ms)"
        ),
        lambda none, some, every: every > none and some - none <= 0.15 * (every - none),
    )


def _on_cpu(rows: Rows) -> list[Target]:
    contexts = [row for row in rows if row.get("part") == "decode" and row.get("batch") == 1]
    times = [
        row.get("ms")
        for row in sorted(contexts, key=lambda row: row["length"])
        if row["model"] == "seqboat" and row["mode"] == "eager"
    ]
    steps = [_step(rows, model, "eager", shape=(2, 2048)) for model in ("seqboat", "llama")]
    published = "training step, 2 × 2,048, D 256: ≥ 3 × the published code"
    ours, llama = steps
    beside = (
        "" if None in steps else f"; the Llama takes {llama / ours:.1f} × as long ({llama:.0f} against {ours:.0f} ms)"
    )
    return [
        Target(published, f"not measured, the published code is no part of a run{beside}", None),
        _target(
            "decode: cost flat in context (within 10 %)", times if len(times) > 1 else [None],
            lambda *times: " → ".join(f"{time:.2f}" for time in times) + f" ms (spread {_spread(*times):.1%})",
            lambda *times: _spread(*times) <= 0.1,
        ),
    ]  # fmt: skip
