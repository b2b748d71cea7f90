"""Experiment 10: what makes attention learn early, one change at a time and together, in small models under a budget.

python examples/experiments/early_attention.py --train_file enwik8.xz --jobs 8 --output outputs/early_attention
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import of_task, panels, quality_label, save
from plan import Planned
from tables import Row, by_setting, mean, quality

SEEDS = (0, 1)
STEPS = 1000
# Of the recipe `enwik8-base`; the routers start as they do without it.
CHANGES = {
    "none": {},
    "three matrices": {"muon_split": True},
    "queries and keys at 4 times": {"qk_learning_rate": 1.6e-2},
    "even rows": {"muon_row_beta": 0.95},
    "linears from 0.04": {"initializer_range": 0.04, "qk_initializer_range": 0.02, "router_initializer_range": 0.02},
    "scales from 0.3": {"qk_initializer_range": 0.3},
}
ALL = {name: value for change in CHANGES.values() for name, value in change.items()}


def grid(bases: Bases) -> list[Planned]:
    steps = {} if bases.toy else {"steps": STEPS, "warmup_steps": STEPS // 10}
    changes = CHANGES | {"all": ALL}
    planned = []
    for task in ("lm", "pathfinder"):
        names = ("none", "all") if bases.toy or task != "lm" else changes
        for name in names:
            for place, seed in enumerate(bases.few(SEEDS, 1)):
                recipe = bases.held(task).changed(**steps, **changes[name], seed=seed)
                labels = {"task": task, "change": name, "seed": seed}
                planned.append(Planned(labels, recipe, rank=10 * place + (task != "lm")))
    return planned


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Quality of each change, a panel a task."""
    figure, axes = panels(2)
    for ax, task in zip(axes, ("lm", "pathfinder"), strict=True):
        rows = of_task(learnt, task)
        groups = by_setting(rows)
        for place, (_, records) in enumerate(groups):
            values = [quality(record) for record in records]
            ax.plot([mean(values)], [place], "|", color=f"C{place}", markersize=16)
            ax.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.7)
        ax.set_yticks(range(len(groups)), [setting["change"] for setting, _ in groups], fontsize="small")
        ax.set(title=task, xlabel=quality_label(rows) if rows else None)
        ax.invert_yaxis()
    save(figure, path)


EXPERIMENT = Experiment(
    "early_attention",
    "Do the changes that let attention learn early in the published shape ([routers](../pretraining/routers.md)) help "
    "small models, too? `three matrices`: Muon takes attention's input projection as queries and keys, gate and "
    "values; `queries and keys at 4 times`: their scales and offsets learn at 1.6e-2; `even rows`: of Muon's updates "
    "(NorMuon, 0.95); `scales from 0.3` and `linears from 0.04`: standard deviations of what they start from, "
    "published 0.02. Routers are held to a budget; `none` is the EMA of `fair_recurrences` at the shared rate.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
