"""Experiment 5: what decides how many tokens a model activates, and what a user can do about it.

python examples/experiments/activation_rate.py --train_file enwik8.xz --jobs 8 --output outputs/activation_rate
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import panels, quality_label, save
from plan import Planned
from tables import Row, by_setting, mean, quality

SEEDS = (0, 1)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TARGETS = (0.1, 0.3, 0.5, 0.7)
TARGET_WEIGHT = 1.0

# One thing at a time, from the recipe. `router learns alike`: the routers at the rate of everything else.
VARIED = {
    "router learns alike: learning_rate": [{"learning_rate": r, "router_learning_rate": None} for r in RATES],
    "router_target_rate": [
        {"router_target_rate": target, "router_target_weight": TARGET_WEIGHT, "router_learning_rate": None}
        for target in TARGETS
    ],
    "router_learning_rate": [{"router_learning_rate": r} for r in (1e-4, 2e-3)],
    "learning_rate": [{"learning_rate": r} for r in (1e-3, 8e-3)],
    "router_temperature_init": [{"router_temperature_init": t} for t in (0.3, 3.0)],
    "hidden_dropout": [{"hidden_dropout": p} for p in (0.1, 0.3)],
    "warmup_steps": [{"warmup_steps": w} for w in (10, 250)],
}
PATHFINDER_RATES = (1e-3, 8e-3)


def grid(bases: Bases) -> list[Planned]:
    planned = []
    varied = dict(list(VARIED.items())[:2]) if bases.toy else VARIED
    for place, seed in enumerate(bases.few(SEEDS, 1)):

        def add(task: str, name: str, value: str, changes: dict, rank: int, seed=seed, place=place) -> None:
            labels = {"task": task, "varied": name, "value": value, "seed": seed}
            planned.append(Planned(labels, bases.task(task).changed(seed=seed, **changes), rank=10 * place + rank))

        add("lm", "the recipe itself", "", {}, 0)
        for rank, (name, settings) in enumerate(varied.items()):
            for changes in bases.few(settings):
                value = f"{changes[name.split(': ')[-1]]:g}"
                add("lm", name, value, changes, 1 if rank < 2 else 4)
        if not bases.toy:
            add("pathfinder", "the recipe itself", "", {}, 3)
            for rate in PATHFINDER_RATES:
                add("pathfinder", "learning_rate", f"{rate:g}", {"learning_rate": rate}, 5)
    return planned


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """The language models: quality against rate by what was varied; rate against the learning rate; rate in training."""
    rows = [row for row in learnt if row[0]["task"] == "lm"]
    figure, (points, knob, course) = panels(3)
    groups: dict[str, list[tuple[dict, list[dict]]]] = {}
    for setting, records in by_setting(rows):
        groups.setdefault(setting["varied"], []).append((setting, records))
    for place, (name, members) in enumerate(groups.items()):
        x = [mean([r["mean_rate"] for r in records]) for _, records in members]
        y = [mean([quality(r) for r in records]) for _, records in members]
        points.plot(x, y, "o", color=f"C{place}", label=name)
        for (setting, _), rate, value in zip(members, x, y, strict=True):
            points.annotate(setting["value"], (rate, value), xytext=(3, 3), textcoords="offset points", fontsize=7)
        if name.endswith("learning_rate"):
            knob.plot([float(s["value"]) for s, _ in members], x, marker="o", color=f"C{place}", label=name)
        for setting, records in members:
            if name in ("the recipe itself", *list(VARIED)[:2]):
                steps = [point["step"] for point in records[0]["history"]]
                rates = [mean([mean(r["history"][i]["rates"]) for r in records]) for i in range(len(steps))]
                course.plot(steps, rates, marker=".", color=f"C{place}", alpha=0.7)
                course.annotate(setting["value"], (steps[-1], rates[-1]), fontsize=7)
    points.set(xlabel="mean activation rate", ylabel=quality_label(learnt))
    knob.set(xlabel="varied learning rate", ylabel="mean activation rate", ylim=(-0.03, 1.03), xscale="log")
    course.set(xlabel="step", ylabel="mean activation rate in training", ylim=(-0.03, 1.03))
    figure.legend(*points.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)


EXPERIMENT = Experiment(
    "activation_rate",
    "What decides the share of activated tokens: the task, or the optimiser? Each row differs from the recipe in what "
    "`varied` names. `router learns alike` gives the routers the learning rate of everything else, as the published "
    "training does. With `router_target_rate`, whose penalty has weight 1, the routers learn alike too: compare it with "
    "`router learns alike` at the recipe's learning rate.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
