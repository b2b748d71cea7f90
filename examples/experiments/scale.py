"""Experiment 6: 5, 10, 20, 40 and 100 million parameters at equal tokens.

python examples/experiments/scale.py --train_file enwik8.xz --output outputs/scale
"""

from collections.abc import Callable
from pathlib import Path

from experiment import Bases, Experiment, main
from figures import panels, quality_label, save
from matplotlib.axes import Axes
from plan import Planned
from tables import Row, by_setting, mean, quality

# Layers and width for each size; the value width is twice the width, as published.
SHAPES = {"5M": (8, 288), "10M": (10, 368), "20M": (12, 480), "40M": (14, 624), "100M": (18, 872)}
SEEDS = (0, 1)
# One pass over the training split of enwik8, and a bit more.
STEPS = 3000


def grid(bases: Bases) -> list[Planned]:
    shapes = {"2 layers": (2, 8), "3 layers": (3, 12)} if bases.toy else SHAPES
    base = bases.budget if bases.toy else bases.budget.changed(steps=STEPS, warmup_steps=STEPS // 10)
    return [
        Planned(
            {"size": name, "seed": seed},
            base.changed(num_hidden_layers=layers, hidden_size=width, v_head_dim=2 * width, seed=seed),
            rank=10 * place + 2,
        )
        for name, (layers, width) in shapes.items()
        for place, seed in enumerate(bases.few(SEEDS, 1))
    ]


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Quality, rates and spans over the number of parameters, a point a seed; rates also by relative depth."""
    figure, (values, rates, spans, depth) = panels(2, 2)
    groups = by_setting(learnt)
    sizes = [records[0]["parameters"] for _, records in groups]

    def plot(axes: Axes, label: str, get: Callable[[dict], float | None]) -> None:
        axes.plot(sizes, [mean([get(record) for record in records]) for _, records in groups], marker="")
        points = [(record["parameters"], get(record)) for _, records in groups for record in records]
        axes.plot(*zip(*points, strict=True), ".", color="black", alpha=0.5)
        axes.set(xlabel="parameters", ylabel=label, xscale="log")

    plot(values, quality_label(learnt), quality)
    plot(rates, "mean activation rate", lambda record: record["mean_rate"])
    plot(spans, "average attention span, tokens", lambda record: record["mean_span"] or float("nan"))
    for place, (setting, records) in enumerate(groups):
        for number, record in enumerate(records):
            last = len(record["rates"]) - 1
            depth.plot(
                [layer / last for layer in range(last + 1)], record["rates"], marker=".", color=f"C{place}",
                alpha=0.7, label=setting["size"] if number == 0 else None,
            )  # fmt: skip
    depth.set(xlabel="depth, first to last layer", ylabel="activation rate", ylim=(-0.03, 1.03))
    depth.legend(fontsize="small")
    save(figure, path)


EXPERIMENT = Experiment(
    "scale",
    "How do quality, spans and the layers' shares of attention move with the size of the model? All sizes read the "
    "same bytes in the same order, at the same learning rates, and are held to one budget: half of all tokens and "
    "layers attend, whatever the size.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
