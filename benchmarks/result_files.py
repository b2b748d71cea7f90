"""The files that a run leaves: results as CSV, tables in markdown, and plots of time and memory against length."""

import csv
import importlib.util
from pathlib import Path
from types import TracebackType

from competitors import SIZES
from roofline import least_ms
from targets import judge, value

from modeling_seqboat import SeqBoatConfig

TEXT = ("part", "model", "mode", "status", "note")
NUMBERS = (
    "batch", "length", "active", "ms", "forward_ms", "tokens_per_s", "peak_gib", "cache_mib", "bytes_per_s",
    "flop_per_s", "repeats", "seconds",
)  # fmt: skip
COLUMNS = (
    "part", "model", "mode", "batch", "length", "active", "status", "ms", "forward_ms", "tokens_per_s", "peak_gib",
    "cache_mib", "bytes_per_s", "flop_per_s", "repeats", "seconds", "note",
)  # fmt: skip
WHOLE = ("batch", "length", "repeats")
COLORS = {
    "seqboat": "tab:blue", "llama": "tab:orange", "mistral": "tab:green", "mamba2": "tab:red", "gla": "tab:purple",
    "kda": "tab:pink", "gated_deltanet": "tab:brown",
}  # fmt: skip
# In pictures.
SHOWN = {
    "seqboat": "SeqBoat", "llama": "Llama", "mistral": "Mistral", "mamba2": "Mamba-2", "gla": "GLA",
    "kda": "KDA", "gated_deltanet": "GatedDeltaNet", "eager": "op by op",
}  # fmt: skip
TITLES = {
    "step": "Whole step (forward, backward, clipping, AdamW)",
    "train": "Training step (forward + backward)",
    "decode": "Decoding, one token",
    "forward": "Forward",
    "prefill": "Prefill in chunks, with a cache",
}


class CsvFile:
    """Rows that are on disk as soon as they are added."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "CsvFile":
        self.stream = self.path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.stream, COLUMNS)
        self.writer.writeheader()
        self.stream.flush()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.close()

    def add(self, row: dict) -> None:
        self.writer.writerow(row)
        self.stream.flush()


def read_rows(path: Path) -> list[dict]:
    """What `CsvFile` wrote; empty fields are None.

    Raises:
        ValueError: if the file has other columns.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is not a CSV of this benchmark: its columns are {reader.fieldnames}")
        return [{name: _parse(name, text) for name, text in row.items()} for row in reader]


def _parse(name: str, text: str) -> str | float | int | None:
    if text == "" or text is None:
        return None
    if name in TEXT:
        return text
    return int(text) if name in WHOLE else float(text)


def write_report(rows: list[dict], folder: Path) -> None:
    """Writes results.md and, where matplotlib is installed, both plots into `folder`, which may have to be made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(rows), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots; --from-csv draws them where it is")
        return
    draw_time(rows, folder / "time_against_length.png")
    draw_memory(rows, folder / "memory_against_length.png")


def run_facts(rows: list[dict]) -> dict[str, str]:
    return {row["model"]: row["note"] for row in rows if row["part"] == "run"}


def markdown(rows: list[dict]) -> str:
    facts = run_facts(rows)
    versions = ", ".join(f"{name} {facts.get(name, '?')}" for name in ("torch", "triton", "transformers", "python"))
    lines = [
        f"# SeqBoat and models of equal size on {facts.get('card', '?')}",
        "",
        f"{facts.get('date', '?')}, {versions}.",
        "",
        f"    {facts.get('command', '?')}",
        "",
        "## Targets",
        "",
        "| target | measured | met |",
        "| --- | --- | --- |",
    ]
    for target in judge(rows, facts.get("device", "cpu")):
        met = {True: "yes", False: "**no**", None: "—"}[target.met]
        lines.append(f"| {target.text} | {target.measured} | {met} |")
    for part, title in TITLES.items():
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            lines += ["", f"## {title}", "", *_table(part, chosen)]
    bandwidth, rate = roofs(rows)
    if bandwidth and rate:
        lines += [
            "",
            "## Roofline",
            "",
            f"Copy {bandwidth / 1e12:.2f} TB/s, matrix product {rate / 1e12:.1f} TFLOP/s.",
        ]
    missing = [row for row in rows if row["part"] != "run" and row["status"] != "ok"]
    if missing:
        lines += ["", "## Not measured", ""]
        lines += [f"* {_label(row)}: {row['status']}{', ' + row['note'] if row['note'] else ''}" for row in missing]
    return "\n".join(lines) + "\n"


def _label(row: dict) -> str:
    shape = f", {row['batch']} × {row['length']:,}" if row["length"] else ""
    active = "" if row["active"] is None else f", {row['active']:.0%} active"
    return f"{row['part']}: {row['model']}{' ' + row['mode'] if row['mode'] else ''}{shape}{active}"


def _table(part: str, rows: list[dict]) -> list[str]:
    heads = {"step": "step", "train": "step", "decode": "token", "forward": "forward", "prefill": "prompt"}
    columns = ["model", "mode", "batch × context" if part == "decode" else "batch × length", "active", heads[part]]
    columns += ["forward"] if part == "train" else []
    columns += ["µs a token"] if part != "decode" else []
    columns += ["tokens/s"] + ([] if part == "decode" else ["peak memory"])
    columns += ["cache"] if part in ("decode", "prefill") else []
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [row["model"], row["mode"], f"{row['batch']} × {row['length']:,}", _share(row["active"])]
        if row["status"] != "ok":
            cells += [row["status"]] + [""] * (len(columns) - len(cells) - 1)
        else:
            cells += [_milliseconds(row["ms"])]
            cells += [_milliseconds(row["forward_ms"])] if part == "train" else []
            cells += [f"{1e6 / row['tokens_per_s']:.3f}"] if part != "decode" else []
            cells += [_rate(row["tokens_per_s"])] + ([] if part == "decode" else [_unit(row["peak_gib"], "GiB")])
            cells += [_unit(row["cache_mib"], "MiB")] if part in ("decode", "prefill") else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _share(active: float | None) -> str:
    return "" if active is None else f"{active:.0%}"


def _milliseconds(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.3f} ms" if number < 10 else f"{number:,.1f} ms"


def _rate(number: float) -> str:
    return f"{number / 1e6:.3f} M" if number >= 1e5 else f"{number:,.0f}"


def _unit(number: float | None, unit: str) -> str:
    return "" if number is None else f"{number:,.2f} {unit}"


def roofs(rows: list[dict]) -> tuple[float | None, float | None]:
    """Bytes and FLOPs a second, as measured."""
    bandwidth = value(rows, "bytes_per_s", part="roofline", model="copy")
    return bandwidth, value(rows, "flop_per_s", part="roofline", model="matmul")


def _series(rows: list[dict], part: str, measure: str, batch: int = 1) -> dict[str, list[tuple[int, float]]]:
    """(length, number) by what the curve is called; for SeqBoat only where half of the tokens are active."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        usable = row["part"] == part and row["status"] == "ok" and row["batch"] == batch and row[measure] is not None
        if usable and row["active"] in (None, 0.5):
            found.setdefault(f"{row['model']}, {row['mode']}", []).append((row["length"], row[measure]))
    return {name: sorted(points) for name, points in sorted(found.items())}


def _curves(axes, series: dict[str, list[tuple[int, float]]], prefix: str = "", marker: str = "o") -> None:
    for name, points in series.items():
        eager = name.endswith("eager")
        # Hollow marks tell a mode apart also where it has a single point.
        style, fill = (f"{marker}--", "none") if eager else (f"{marker}-", "full")
        color = COLORS.get(name.split(",")[0])
        label = prefix + ", ".join(SHOWN.get(part, part) for part in name.split(", "))
        axes.plot(*zip(*points, strict=True), style, label=label, color=color, markersize=5, fillstyle=fill)


def _length_name(length: float, place: int | None = None) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if length >= size:
            return f"{length / size:g}{unit}"
    return f"{length:g}"


def _finish(axes, title: str, below: str, left: str) -> None:
    axes.set(title=title, xlabel=below, ylabel=left, yscale="log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_length_name)
    low, high = axes.get_ylim()
    if high < 10 * low:
        # What is flat is to look flat.
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
    axes.grid(True, which="major", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        # Below, where it covers nothing.
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _figure(panels: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot, *pyplot.subplots(1, panels, figsize=(3.9 * panels, 4.6), layout="constrained")


def _draw_roofline(axes, rows: list[dict], lengths: list[int], times: int) -> None:
    bandwidth, rate = roofs(rows)
    if not (bandwidth and rate and lengths):
        return
    facts = run_facts(rows)
    config = SeqBoatConfig(**SIZES[facts["size"]].seqboat)
    element_bytes = 2 if facts["device"] == "cuda" else 4
    line = [times * least_ms(config, length, 0.5, element_bytes, bandwidth, rate) for length in lengths]
    axes.plot(lengths, line, "k:", label="roofline, half active")


def draw_time(rows: list[dict], path: Path) -> None:
    """Milliseconds of a forward, a training step and a decoded token against length, on log axes."""
    pyplot, figure, panels = _figure(3)
    for axes, part, title, times in zip(
        panels, ("forward", "train", "decode"),
        ("forward, batch 1", "training step, batch 1", "a decoded token, batch 1"), (1, 3, 0), strict=True,
    ):  # fmt: skip
        series = _series(rows, part, "ms")
        _curves(axes, series)
        if part == "forward":
            _curves(axes, _series(rows, "prefill", "ms"), "chunks with a cache: ", "^")
        lengths = sorted({length for points in series.values() for length, _ in points})
        if times:
            _draw_roofline(axes, rows, lengths, times)
        _finish(axes, title, "tokens of context" if part == "decode" else "tokens", "milliseconds")
    figure.suptitle(run_facts(rows).get("card", ""), fontsize=10)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def draw_memory(rows: list[dict], path: Path) -> None:
    """Peak memory of training steps, forwards and chunked prefill, and the cache's size, on log axes."""
    pyplot, figure, panels = _figure(2)
    for part, marker in (("train", "o"), ("forward", "s"), ("prefill", "^")):
        _curves(panels[0], _series(rows, part, "peak_gib"), f"{part}: ", marker)
    _finish(panels[0], "peak memory, batch 1", "tokens", "GiB")
    _curves(panels[1], _series(rows, "decode", "cache_mib"))
    _finish(panels[1], "size of the cache, batch 1", "tokens of context", "MiB")
    figure.suptitle(run_facts(rows).get("card", ""), fontsize=10)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
