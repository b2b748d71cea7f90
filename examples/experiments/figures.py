"""What the pictures of the experiments have in common."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from tables import Row, mean, quality, quality_name, spread  # noqa: E402


def panels(count: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """`rows` rows of `count` axes each, in reading order."""
    figure, axes = plt.subplots(rows, count, figsize=(4.6 * count, 3.8 * rows), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


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
