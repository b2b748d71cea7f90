"""Accuracy of trained models by distance, at lengths far beyond what they were trained on, in constant memory.

    python examples/long_context/evaluate_recall.py outputs/routed/final outputs/always/final \
        --lengths 1024 16384 131072 1048576 --texts 8 --output_dir outputs/recall

The task is the one that the first model was trained on (its `recall.json`), or what the flags say. Writes to
`output_dir`: `results.jsonl` (a line for each model, length and number of pairs), `results.md` and `accuracy.png`.
What `results.jsonl` holds already is not computed again. With flags after it, `train_recall.py` says what the task's
mean.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
import json
import math
import time
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
from reading import Reading, read_texts
from recall_models import TaskArguments, build_task, check_kernels, chosen_device
from recall_tasks import batch_of, example_of
from recipes import check_model_folder, parse_arguments
from run_folder import open_log
from safe_files import json_lines, read_json_object, replacing, write_text
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

import modeling_seqboat  # noqa: F401  (registers the architecture)

RECALL_FILE = "recall.json"
RESULTS = "results.jsonl"
# What an evaluation is known by.
IDENTITY = ("model", "length", "pairs", "seed", "task")
# Texts of an evaluation are of no training: a seed that train_recall.py does not take.
EVALUATION_SEED = 2**32


@dataclass
class EvaluateArguments:
    models: list[str] = field(metadata={"help": "folders that train_recall.py wrote"})
    output_dir: str = field(metadata={"help": "results are added to what lies there"})
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16_384, 65_536, 131_072])
    texts: int = field(default=8, metadata={"help": "texts a length"})
    batch_size: int = field(default=1, metadata={"help": "texts read at once"})
    chunk_size: int = field(default=8192)
    pairs: list[int] = field(default_factory=list, metadata={"help": "numbers of pairs; default: as trained"})
    task: str | None = field(default=None, metadata={"help": "another task than the model was trained on"})
    queries: int | None = field(default=None)
    within: float | None = field(default=None)
    data: str | None = field(default=None)
    clips: int | None = field(default=None)
    pictures: int | None = field(default=None)
    decimation: int | None = field(default=None)
    split: str = field(default="test", metadata={"help": "of the data: train, validation or test"})
    max_minutes: float = field(default=math.inf, metadata={"help": "begin no more texts after this time"})
    cpu: bool = field(default=False)
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    seed: int = field(default=0)


def trained_task(folder: str) -> TaskArguments:
    """The task in a folder's `recall.json`; the default one where there is none."""
    path = Path(folder) / RECALL_FILE
    saved = read_json_object(path) if path.is_file() else {}
    task = TaskArguments(**{f.name: saved[f.name] for f in fields(TaskArguments) if f.name in saved})
    for f in fields(TaskArguments):
        value, wanted = getattr(task, f.name), str if f.default is None else type(f.default)
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits and (value is not None or f.default is not None):
            raise ValueError(f"{str(path)!r}: {f.name} must be of type {wanted.__name__}, got {value!r}")
    return task


def task_of(a: EvaluateArguments, folder: str) -> TaskArguments:
    """The folder's task with what the flags change."""
    names = ("task", "queries", "within", "data", "clips", "pictures", "decimation")
    return replace(trained_task(folder), **{n: getattr(a, n) for n in names if getattr(a, n) is not None})


def distance_bucket(distance: int) -> str:
    """The power of two that a distance reaches, as text: JSON has no other keys."""
    return str(1 << max(0, int(distance).bit_length() - 1))


def summary(task, readings: list[Reading], batches: list) -> dict:
    """What texts of one length and number of pairs came to, for a line of `results.jsonl`."""
    right = torch.cat([r.right for r in readings]).numpy()
    distances, groups = (np.concatenate([getattr(b, n) for b in batches]) for n in ("distances", "groups"))
    buckets: dict[str, list[float]] = {}
    for distance, hit in zip(distances.flatten(), right.flatten(), strict=True):
        buckets.setdefault(distance_bucket(distance), []).append(float(hit))
    activated, tokens = sum(r.activated for r in readings), sum(r.tokens for r in readings)
    spans = torch.cat([r.spans for r in readings], 1)
    return {
        "accuracy": float(right.mean()),
        "answers": int(right.size),
        "bits_per_answer": float(torch.cat([r.bits for r in readings]).mean()),
        "by_distance": {
            key: [float(np.mean(hits)), len(hits)] for key, hits in sorted(buckets.items(), key=_as_number)
        },
        "by_group": {
            name: float(right[groups == place].mean())
            for place, name in enumerate(task.group_names)
            if (groups == place).any()
        },
        "activation_rates": [float(rate) for rate in activated.sum(1) / tokens.sum()],
        "rates_by_kind": {
            name: [float(layer) for layer in activated[:, place] / tokens[place]]
            for place, name in enumerate(task.kinds)
            if tokens[place]
        },
        "spans": [_quartiles(layer[~layer.isnan()]) for layer in spans],
        "cache_bytes": max(r.cache_bytes for r in readings),
    }


def _as_number(item: tuple[str, list]) -> int:
    return int(item[0])


def _quartiles(spans: torch.Tensor) -> dict[str, float] | None:
    """Median, upper quartile and longest; None where the layer never attends at an answer."""
    if not len(spans):
        return None
    return {"median": float(spans.median()), "upper": float(spans.quantile(0.75)), "longest": float(spans.max())}


def evaluate(a: EvaluateArguments, folder: str, model: nn.Module, length: int, pairs: int, stop: float) -> dict | None:
    """One line of results, or None where the time is up before the first text."""
    arguments = replace(task_of(a, folder), pairs=pairs)
    task = build_task(arguments, a.split)
    readings, batches, begin = [], [], time.perf_counter()
    for first in range(0, a.texts, a.batch_size):
        if time.monotonic() >= stop:
            break
        numbers = range(first, min(a.texts, first + a.batch_size))
        batches.append(batch_of(lambda number: example_of(task, length, EVALUATION_SEED + a.seed, number), numbers))
        readings.append(read_texts(model, batches[-1], len(task.kinds), a.chunk_size))
    if not readings:
        return None
    read = sum(len(batch.tokens) for batch in batches)
    return {
        "model": folder,
        "length": length,
        "pairs": pairs,
        "texts": read,
        "seed": a.seed,
        "task": asdict(arguments),
        "chance": task.chance,
        **summary(task, readings, batches),
        "tokens_per_second": read * length / (time.perf_counter() - begin),
        "memory_size": getattr(model.config, "memory_size", None) or getattr(model.config, "sliding_window", None),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() and not a.cpu else None,
    }


def results_page(results: list[dict]) -> str:
    """A Markdown page of tables: accuracy by length, by distance, activation by kind of token, and spans."""
    lengths = sorted({r["length"] for r in results})
    lines = ["# Recall over distance", "", "Accuracy in percent; in brackets the number of answers.", ""]
    lines += table(["model", "pairs", *(f"{n:,}" for n in lengths)], _by_length(results, lengths))
    buckets = sorted({int(key) for r in results for key in r["by_distance"]})
    lines += ["", "By distance, all lengths together: answers from at least so many tokens before.", ""]
    lines += table(["model", *(f"{n:,}" for n in buckets)], _by_distance(results, buckets))
    kinds = list(dict.fromkeys(name for r in results for name in r["rates_by_kind"]))
    lines += ["", "Activated tokens by layer and kind, in percent, and the distance in tokens from where an answer is"]
    lines += ["predicted to the activated key that is weighed most (median, longest), by layer.", ""]
    rows = []
    for r in results:
        rates = [" ".join(f"{100 * x:.2f}" for x in r["rates_by_kind"].get(kind, [])) for kind in kinds]
        spans = "; ".join("–" if s is None else f"{s['median']:,.0f}, {s['longest']:,.0f}" for s in r["spans"])
        rows.append([r["model"], f"{r['length']:,}", f"{r['pairs']}", *rates, spans, f"{r['cache_bytes']:,}"])
    lines += table(["model", "length", "pairs", *kinds, "span", "cache (bytes)"], rows)
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


def _by_length(results: list[dict], lengths: list[int]) -> list[list[str]]:
    rows = []
    for model, pairs in dict.fromkeys((r["model"], r["pairs"]) for r in results):
        found = {r["length"]: r for r in results if (r["model"], r["pairs"]) == (model, pairs)}
        cells = [f"{100 * found[n]['accuracy']:.1f} ({found[n]['answers']})" if n in found else "" for n in lengths]
        rows.append([model, f"{pairs}", *cells])
    return rows


def _by_distance(results: list[dict], buckets: list[int]) -> list[list[str]]:
    rows = []
    for model in dict.fromkeys(r["model"] for r in results):
        cells = []
        for bucket in buckets:
            found = [
                r["by_distance"][str(bucket)]
                for r in results
                if r["model"] == model and str(bucket) in r["by_distance"]
            ]
            count = sum(n for _, n in found)
            cells.append(f"{100 * sum(share * n for share, n in found) / count:.1f} ({count})" if count else "")
        rows.append([model, *cells])
    return rows


def write_picture(results: list[dict], path: Path) -> None:
    """Accuracy over length on the left and, for the first number of pairs, over distance on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for model, pairs in dict.fromkeys((r["model"], r["pairs"]) for r in results):
        found = sorted((r for r in results if (r["model"], r["pairs"]) == (model, pairs)), key=lambda r: r["length"])
        left.plot([r["length"] for r in found], [r["accuracy"] for r in found], "o-", label=f"{model}, {pairs} pairs")
    for model in dict.fromkeys(r["model"] for r in results):
        sums: dict[int, list[float]] = {}
        for r in results:
            for key, (share, count) in r["by_distance"].items() if r["model"] == model else ():
                total = sums.setdefault(int(key), [0.0, 0.0])
                total[0], total[1] = total[0] + share * count, total[1] + count
        right.plot(sorted(sums), [sums[key][0] / sums[key][1] for key in sorted(sums)], "o-", label=model)
    for axes, name in ((left, "length of the text (tokens)"), (right, "distance to what is asked for (tokens)")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(name)
        axes.axhline(results[0]["chance"], color="gray", linestyle=":", label="chance")
        axes.set_ylim(0, 1.02)
    left.set_ylabel("accuracy")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check_arguments(a: EvaluateArguments) -> None:
    """Raises ValueError, FileNotFoundError or ModuleNotFoundError for what cannot be evaluated, naming it."""
    for name in ("texts", "batch_size", "chunk_size"):
        if getattr(a, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(a, name)}")
    if a.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {a.dtype!r}")
    for folder in a.models:
        check_model_folder(folder)
        config = Path(folder) / "config.json"
        if config.is_file():
            check_kernels(read_json_object(config).get("model_type", ""), chosen_device(a.cpu))
        for length in a.lengths:
            for pairs in a.pairs or [task_of(a, folder).pairs]:
                task = build_task(replace(task_of(a, folder), pairs=pairs), a.split)
                # Before hours of other lengths, for texts that are too short for their pairs.
                if length == min(a.lengths):
                    example_of(task, length, 0, 0)


def main(argv: list[str] | None = None) -> list[dict]:
    a = parse_arguments(EvaluateArguments, argv)
    check_arguments(a)
    output = Path(a.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    path, stop = output / RESULTS, time.monotonic() + 60 * a.max_minutes
    results = read_results(path) if path.is_file() else []
    done = {identity(r) for r in results}
    device = chosen_device(a.cpu)
    progress = tqdm(desc="texts", total=len(a.models) * len(a.lengths) * max(1, len(a.pairs)) * a.texts)
    for folder in a.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, a.dtype)).to(device)
        for length in sorted(a.lengths):
            for pairs in a.pairs or [task_of(a, folder).pairs]:
                wanted = {
                    "model": folder, "length": length, "pairs": pairs, "seed": a.seed,
                    "task": asdict(replace(task_of(a, folder), pairs=pairs)),
                }  # fmt: skip
                if identity(wanted) not in done:
                    found = evaluate(a, folder, model, length, pairs, stop)
                    if found is None:
                        continue
                    results.append(found)
                    with open_log(path) as file:
                        file.write(json.dumps(found).encode("utf-8") + b"\n")
                progress.update(a.texts)
    progress.close()
    if results:
        write_text(output / "results.md", results_page(results))
        with replacing(output / "accuracy.png") as picture:
            write_picture(results, picture)
        print(results_page(results))
    return results


def read_results(path: Path) -> list[dict]:
    """The results of a file; what a killed evaluation has left of its last line counts as not there. Raises ValueError
    for lines that are none."""
    data = path.read_bytes()
    lines = json_lines(data[: data.rfind(b"\n") + 1], str(path))
    return [_expect_result(line, f"line {number} of {str(path)!r}") for number, line in lines]


def _expect_result(result: dict, where: str) -> dict:
    try:
        identity(result)
        results_page([result])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{where} is no result of an evaluation: {type(error).__name__}: {error}") from error
    return result


def identity(result: dict) -> str:
    """What an evaluation is known by: it is not made twice."""
    return json.dumps([result[name] for name in IDENTITY], sort_keys=True)


if __name__ == "__main__":
    main()
