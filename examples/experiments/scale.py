"""Experiment 6: 5, 10, 20, 40 and 100 million parameters at equal tokens.

python examples/experiments/scale.py --train_file enwik8.xz --output outputs/scale
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import panels, quality_label, save
from plan import Planned
from tables import Row, quality

# Layers and width for each size; the value width is twice the width, as published.
SHAPES = {"5M": (8, 288), "10M": (10, 368), "20M": (12, 480), "40M": (14, 624), "100M": (18, 872)}
LEARNING_RATE = 2e-3


def grid(bases: Bases) -> list[Planned]:
    shapes = {"2 layers": (2, 8), "3 layers": (3, 12)} if bases.toy else SHAPES
    planned = []
    for name, (layers, width) in shapes.items():
        shape = {"num_hidden_layers": layers, "hidden_size": width, "v_head_dim": 2 * width}
        # The widest model bears no higher one, and the sizes are to differ in nothing else.
        shape |= {} if bases.toy else {"learning_rate": LEARNING_RATE, "qk_head_dim": 128}
        planned.append(Planned({"size": name, "seed": 0}, bases.lm.changed(**shape)))
    return planned


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Quality, rates and spans over the number of parameters; rates also by relative depth."""
    figure, (values, rates, spans, depth) = panels(2, 2)
    sizes = [record["parameters"] for _, record in learnt]
    for axes, label, get in (
        (values, quality_label(learnt), quality),
        (rates, "mean activation rate", lambda record: record["mean_rate"]),
        (spans, "average attention span, tokens", lambda record: record["mean_span"] or float("nan")),
    ):
        axes.plot(sizes, [get(record) for _, record in learnt], marker="o")
        axes.set(xlabel="parameters", ylabel=label, xscale="log")
    for labels, record in learnt:
        last = len(record["rates"]) - 1
        depth.plot([layer / last for layer in range(last + 1)], record["rates"], marker=".", label=labels["size"])
    depth.set(xlabel="depth, first to last layer", ylabel="activation rate", ylim=(-0.03, 1.03))
    depth.legend(fontsize="small")
    save(figure, path)


EXPERIMENT = Experiment(
    "scale",
    "How do rates and spans move with the size of the model? All sizes read the same bytes in the same order, at one "
    "learning rate.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
