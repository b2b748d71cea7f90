"""What the pictures of the experiments have in common."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402
from tables import Row, mean, quality, quality_name, spread  # noqa: E402


def panels(count: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """`rows` rows of `count` axes each, in reading order."""
    figure, axes = plt.subplots(rows, count, figsize=(4.6 * count, 3.8 * rows), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def layers_and_rates(axes: Axes, ylabel: str = "activation rate") -> None:
    axes.set(xlabel="layer", ylabel=ylabel, ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Where labels of the values go: each at its value, or `gap` above the one below it."""
    places = [0.0] * len(values)
    lowest = -math.inf
    for index in sorted(range(len(values)), key=values.__getitem__):
        places[index] = lowest = max(values[index], lowest + gap)
    return places


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(record["recipe"]["task"] for _, record in rows))


def of_task(rows: Sequence[Row], task: str) -> list[Row]:
    return [row for row in rows if row[1]["recipe"]["task"] == task]


def quality_label(rows: Sequence[Row]) -> str:
    name = quality_name(rows[0][1])
    return f"{name} ({'lower' if name == 'bits per byte' else 'higher'} is better)"


def qualities(records: Sequence[dict]) -> tuple[float, float]:
    """Mean and standard deviation, the latter 0 for a single run."""
    values = [quality(record) for record in records]
    deviation = spread(values)
    return mean(values), 0.0 if deviation != deviation else deviation
