"""Experiment 3: ways to choose the tokens that attend.

python examples/experiments/configurators.py --train_file enwik8.xz --jobs 8 --output outputs/configurators
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import layers_and_rates, panels, quality_label, save
from plan import Planned
from tables import Row, by_setting, quality

ROUTERS = ("tempered_softmax", "always", "never", "random", "gumbel", "gumbel_straight_through")
SEEDS = (0, 1, 2)


def grid(bases: Bases) -> list[Planned]:
    planned = []
    for place, seed in enumerate(bases.few(SEEDS, 1)):
        like = bases.lm.changed(seed=seed)
        for router in ROUTERS:
            # The default is not spelled out, so that other experiments share the run.
            recipe = like if router == "tempered_softmax" else like.changed(router_type=router)
            if router == "random":
                recipe = recipe.changed(router_random_seed=seed)
            planned.append(
                Planned(
                    {"router": router, "seed": seed},
                    recipe,
                    rate_like=like if router == "random" else None,
                    rank=10 * place + (0 if router == "tempered_softmax" else 1),
                )
            )
    return planned


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Quality against rate, a point a seed; and the rate of each layer."""
    figure, (points, layers) = panels(2)
    for setting, records in by_setting(learnt):
        name = setting["router"]
        points.plot([r["mean_rate"] for r in records], [quality(r) for r in records], "o", label=name, alpha=0.8)
        rates = [sum(r["rates"][layer] for r in records) / len(records) for layer in range(len(records[0]["rates"]))]
        layers.plot(rates, marker="o", label=name, alpha=0.8)
    points.set(xlabel="mean activation rate", ylabel=quality_label(learnt))
    points.legend(fontsize="small")
    layers_and_rates(layers, "activation rate, mean over seeds")
    save(figure, path)


EXPERIMENT = Experiment(
    "configurators",
    "Is a learned choice of tokens worth more than attention at the same rate on tokens drawn by lot, and how near "
    "does it come to attention on all of them? The random router takes over the mean rate that the tempered softmax "
    "reached with the same seed, the same in every layer. Gumbel routers draw tokens in training and take the "
    "likelier decision when measured. `always` is the quality that attention on every token gives, `never` that of "
    "the recurrence alone.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
