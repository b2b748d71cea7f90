"""Runs of `train_lm.py` side by side: bits per byte over training time, activation rates by layer, and a table.

    python examples/plot_training.py SeqBoat=outputs/boat Llama=outputs/llama --output curves.png
    python examples/plot_training.py SeqBoat=outputs/boat Llama=outputs/llama --output curves.png --over tokens

Each argument is a name and a run's folder or its `metrics.jsonl`. The curves are those of the test split where all
runs logged it (`--score_test True`), else of the validation split. The table goes to standard output as Markdown.
"""

from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

SPLITS = ("test/bits_per_byte", "validation/bits_per_byte")
RATE = "router/activation_rate_"
# What the pictures go over: the entry of a log, what divides it, and the axis' name.
AXES = {
    "minutes": ("train/seconds", 60, "minutes of training"),
    "tokens": ("train/tokens", 1e6, "million tokens"),
}


class Run(NamedTuple):
    """What a run logged: each list holds entries of `metrics.jsonl` in the order of training."""

    name: str
    scores: list[dict]
    losses: list[dict]

    @property
    def layers(self) -> int:
        """Layers with a router, 0 for models without."""
        return sum(key.startswith(RATE) for key in self.losses[-1]) if self.losses else 0

    @property
    def tokens_per_second(self) -> float:
        last = self.scores[-1]
        return last["train/tokens"] / last["train/seconds"]


def read_run(argument: str) -> Run:
    """Reads NAME=FOLDER. Raises ValueError where that is no run with a validation in it."""
    name, sign, place = argument.partition("=")
    if not sign or not name or not place:
        raise ValueError(f"a run is given as NAME=FOLDER, got {argument!r}")
    path = Path(place)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{name}: there is no {path}; a run of train_lm.py writes one")
    run = Run(name, [], [])
    wanted = ("step", "train/seconds", "train/tokens", "train/loss", *SPLITS)
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            entry = json.loads(line)
            step, _, _ = entry["step"], entry["train/seconds"], entry["train/tokens"]
            if not all(type(value) in (int, float) for key, value in entry.items() if key in wanted or RATE in key):
                raise ValueError("not a number")
        # A text nested too deeply is a RecursionError.
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{name}: line {number} of {path} is no entry of train_lm.py with step, train/seconds and "
                f"train/tokens: {line[:80]!r}"
            ) from error
        for entries, key in ((run.scores, SPLITS[1]), (run.losses, "train/loss")):
            # A run that was resumed from an earlier step says the steps after it again; the last word counts.
            while entries and (entries[-1]["step"] > step or key in entry and entries[-1]["step"] == step):
                entries.pop()
            if key in entry:
                entries.append(entry)
    if not run.scores:
        raise ValueError(f"{name}: {path} holds no validation yet; there is one every eval_steps steps and at the end")
    return run


def at_time(run: Run, key: str, seconds: float) -> float | None:
    """The value of `key` at a time: on the line between two validations, None before the first, and the last one's up
    to 1 % after it, since runs of one `max_minutes` end a step apart."""
    times = [entry["train/seconds"] for entry in run.scores]
    if not times[0] <= seconds <= 1.01 * times[-1]:
        return None
    return float(np.interp(seconds, times, [entry[key] for entry in run.scores]))


def shared_splits(runs: list[Run]) -> list[str]:
    """The splits that all runs were scored on at all validations."""
    return [key for key in SPLITS if all(key in entry for run in runs for entry in run.scores)]


def table(runs: list[Run]) -> str:
    """Markdown: every validation, run by run."""
    keys = shared_splits(runs)
    lines = ["| run | minutes | steps | million tokens | " + " | ".join(key.split("/")[0] for key in keys) + " |"]
    lines.append("| --- |" + " ---: |" * (3 + len(keys)))
    for run in runs:
        for entry in run.scores:
            values = [
                f"{entry['train/seconds'] / 60:.1f}",
                f"{entry['step']:,}",
                f"{entry['train/tokens'] / 1e6:,.0f}",
            ]
            lines.append(f"| {run.name} | " + " | ".join(values + [f"{entry[key]:.4f}" for key in keys]) + " |")
    return "\n".join(lines)


def comparison(runs: list[Run]) -> str:
    """The first run against each of the others at the times of the other's validations, a line each."""
    first, *others = runs
    lines = []
    for run in others:
        for key in shared_splits(runs):
            pairs = [(entry[key], at_time(first, key, entry["train/seconds"])) for entry in run.scores]
            gaps = [value - own for value, own in pairs if own is not None]
            if gaps:
                lower = sum(gap > 0 for gap in gaps)
                lines.append(
                    f"{key.split('/')[0]}: at equal time {first.name} is below {run.name} in {lower} of {len(gaps)} "
                    f"validations, in the last one by {gaps[-1]:.4f}"
                )
    return "\n".join(lines)


def plot(runs: list[Run], path: Path, over: str) -> None:
    place, unit, xlabel = AXES[over]
    key = shared_splits(runs)[0]
    routed = [run for run in runs if run.layers]
    figure, axes = plt.subplots(
        1, 1 + len(routed), figsize=(5.2 * (1 + len(routed)), 3.9), layout="constrained", squeeze=False
    )
    curves, *maps = axes.flat
    for run in runs:
        places = [entry[place] / unit for entry in run.scores]
        label = f"{run.name}, {run.tokens_per_second / 1000:,.0f} k tokens/s"
        curves.plot(places, [entry[key] for entry in run.scores], marker="o", markersize=3.5, label=label)
    # What is scored while training is a part of the split.
    curves.set(xlabel=xlabel, ylabel=f"bits per byte, a part of the {key.split('/')[0]} split")
    curves.grid(alpha=0.3)
    curves.legend()
    for run, ax in zip(routed, maps, strict=True):
        rates = [[entry[f"{RATE}{layer}"] for entry in run.losses] for layer in range(run.layers)]
        edges = [0.0] + [entry[place] / unit for entry in run.losses]
        layers = [layer - 0.5 for layer in range(run.layers + 1)]
        mesh = ax.pcolormesh(edges, layers, rates, vmin=0, vmax=1, cmap="viridis", rasterized=True)
        ax.set(xlabel=xlabel, ylabel="layer", title=f"{run.name}: activation rate")
        figure.colorbar(mesh, ax=ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--over", choices=AXES, default="minutes", help="what the pictures go over")
    arguments = parser.parse_args(argv)
    try:
        runs = [read_run(argument) for argument in arguments.runs]
    except ValueError as error:
        parser.error(str(error))
    plot(runs, arguments.output, arguments.over)
    print(table(runs))
    if len(runs) > 1:
        print("\n" + comparison(runs))


if __name__ == "__main__":
    main()
