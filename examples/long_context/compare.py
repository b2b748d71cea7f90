r"""Tables and a picture of several models' results, seeds together: by length, distance, pairs and kind of question.

    python examples/long_context/compare.py --results outputs/recall/eval/*/results.jsonl \
        --output_dir docs/long_context

The runs of a plan are named TASK-KIND-SEED, as recall-routed-0; runs that differ in their seed alone are one row, with
the mean over the seeds and, in brackets, the lowest and the highest of them where they differ. Lengths that a model
was not read at are left empty. Writes `comparison.md` and `accuracy.png`.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from evaluate_recall import identity, read_results, table
from recipes import parse_arguments
from safe_files import replacing, write_text


@dataclass
class CompareArguments:
    results: list[str] = field(metadata={"help": "files results.jsonl of evaluate_recall.py"})
    output_dir: str = field(metadata={"help": "where comparison.md and accuracy.png are written"})


@dataclass(frozen=True)
class Run:
    """task, kind and seed of the model that a result is of, by the name of its folder."""

    task: str
    kind: str
    seed: str


def run_of(model: str) -> Run:
    """Raises ValueError for a folder whose name is not TASK-KIND-SEED."""
    path = Path(model)
    name = path.parent.name if path.name == "final" else path.name
    found = re.fullmatch(r"([^-]+)-(.+)-(\d+)", name)
    if found is None:
        raise ValueError(f"the model {model!r} must lie in a folder named TASK-KIND-SEED, as recall-routed-0")
    return Run(*found.groups())


def collect(results: list[dict], column: str) -> dict[str, dict[int, list[dict]]]:
    """The results by kind, and then by the value of `column`: length or pairs."""
    found: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        found[run_of(result["model"]).kind][result[column]].append(result)
    return found


def accuracies(results: list[dict]) -> list[float]:
    return [result["accuracy"] for result in results]


def cell(values: list[float]) -> str:
    mean, lowest, highest = (f"{100 * value:.1f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def accuracy_table(results: list[dict], column: str) -> list[str]:
    found = collect(results, column)
    columns = sorted({key for cells in found.values() for key in cells})
    rows = []
    for kind, cells in found.items():
        seeds = {run_of(result["model"]).seed for own in cells.values() for result in own}
        rows.append([kind, str(len(seeds)), *(cell(accuracies(cells[n])) if n in cells else "" for n in columns)])
    first = next(iter(found.values()))
    answers = [str(sum(result["answers"] for result in first[n])) if n in first else "" for n in columns]
    rows.append(["answers, all seeds of the first row", "", *answers])
    return table(["model", "seeds", *(f"{n:,}" for n in columns)], rows)


def distance_table(results: list[dict]) -> list[str]:
    """Accuracy by distance in tokens to what is asked for, answers of all lengths and seeds together."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0]))
    for result in results:
        for distance, (share, count) in result["by_distance"].items():
            # Fourfold steps: with two a table is twice as wide.
            place = found[run_of(result["model"]).kind][4 ** ((int(distance).bit_length() - 1) // 2)]
            place[0], place[1] = place[0] + share * count, place[1] + count
    columns = sorted({key for cells in found.values() for key in cells})
    rows = [
        [kind, *(f"{100 * cells[n][0] / cells[n][1]:.1f} ({cells[n][1]})" if n in cells else "" for n in columns)]
        for kind, cells in found.items()
    ]
    return table(["model", *(f"from {n:,}" for n in columns)], rows)


def question_table(results: list[dict]) -> list[str]:
    """Accuracy by kind of question, where a task has several."""
    groups = list(dict.fromkeys(name for r in results for name in r["by_group"]))
    rows = []
    for kind, cells in collect(results, "length").items():
        for length in sorted(cells):
            own = [result["by_group"] for result in cells[length]]
            rows.append([kind, f"{length:,}", *(cell([o[name] for o in own if name in o]) for name in groups)])
    return table(["model", "length", *groups], rows)


def kept_table(results: list[dict]) -> list[str]:
    """What the routed models keep, in percent by layer, and how far back they look, at their longest texts."""
    rows = []
    kinds = list(dict.fromkeys(name for r in results for name in r["rates_by_kind"]))
    for name in dict.fromkeys(r["model"] for r in results):
        r = max((r for r in results if r["model"] == name), key=lambda r: r["length"])
        if not any(r["activation_rates"]) or min(r["activation_rates"]) == 1:
            continue
        rates = [" ".join(f"{100 * x:.2f}" for x in r["rates_by_kind"].get(kind, [])) for kind in kinds]
        spans = "; ".join("–" if s is None else f"{s['median']:,.0f}, {s['longest']:,.0f}" for s in r["spans"])
        run = run_of(name)
        rows.append([f"{run.kind}, seed {run.seed}", f"{r['length']:,}", *rates, spans, f"{r['memory_size']:,}"])
    return table(["model", "length", *kinds, "distances: median, longest", "memory"], rows) if rows else []


def trained_pairs(results: list[dict]) -> int:
    """The number of pairs that the task was trained with: models are read at every length with it."""
    return Counter(r["pairs"] for r in results).most_common(1)[0][0]


def page(results: list[dict]) -> str:
    lines = ["Accuracy in percent; the mean over seeds, and where they differ the lowest and the highest."]
    for task in dict.fromkeys(run_of(r["model"]).task for r in results):
        own = [r for r in results if run_of(r["model"]).task == task]
        pairs = trained_pairs(own)
        trained = [r for r in own if r["pairs"] == pairs]
        lines += ["", f"## {task}: by length, {pairs} pairs, chance {100 * own[0]['chance']:.1f} %", ""]
        lines += accuracy_table(trained, "length")
        lines += ["", f"## {task}: by distance; in brackets the number of answers", "", *distance_table(trained)]
        if len({name for r in own for name in r["by_group"]}) > 1:
            lines += ["", f"## {task}: by question", "", *question_table(trained)]
        if len(own) > len(trained):
            length = next(r["length"] for r in own if r["pairs"] != pairs)
            lines += ["", f"## {task}: by number of pairs, at {length:,} tokens", ""]
            lines += accuracy_table([r for r in own if r["length"] == length], "pairs")
        kept = kept_table(trained)
        if kept:
            lines += ["", f"## {task}: activated tokens by layer and kind, in percent, and distances", "", *kept]
    return "\n".join(lines) + "\n"


def write_picture(results: list[dict], path: Path) -> None:
    """A panel a task: the mean over seeds against the length, with the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [run_of(r["model"]) for r in results]
    tasks, kinds = (list(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("task", "kind"))
    rows, columns = -(-len(tasks) // 3), min(3, len(tasks))
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3.6 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(panels.flat, tasks, strict=False):
        own = [r for r in results if run_of(r["model"]).task == task]
        for kind, cells in collect([r for r in own if r["pairs"] == trained_pairs(own)], "length").items():
            lengths, color = sorted(cells), f"C{kinds.index(kind)}"
            values = [accuracies(cells[n]) for n in lengths]
            means = [sum(v) / len(v) for v in values]
            axes.plot(lengths, means, "o-", label=kind, markersize=4, color=color)
            axes.fill_between(lengths, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=color)
        axes.axhline(own[0]["chance"], color="gray", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set(title=task, xlabel="length of the text (tokens)", ylim=(-0.02, 1.04))
        axes.legend(fontsize=7)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> str:
    a = parse_arguments(CompareArguments, argv)
    # One that two files hold counts once.
    results = list({identity(result): result for path in a.results for result in read_results(Path(path))}.values())
    if not results:
        raise ValueError(f"there are no results in {', '.join(a.results)}")
    text, output = page(results), Path(a.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "comparison.md", text)
    with replacing(output / "accuracy.png") as picture:
        write_picture(results, picture)
    print(text)
    return text


if __name__ == "__main__":
    main()
