"""Experiment 5: what decides how many tokens a model activates, and what a user can do about it.

python examples/experiments/activation_rate.py --train_file enwik8.xz --jobs 8 --output outputs/activation_rate
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import apart, panels, quality_label, save
from matplotlib.axes import Axes
from plan import Planned
from run_recipe import RunRecipe
from tables import Row, by_setting, mean, quality, spread

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
# Whose points say their value in the picture, and where, in points from them.
LABELLED = {
    "router learns alike: learning_rate": (-9, -11),
    "router_target_rate": (8, -11),
    "learning_rate": (12, 4),
    "hidden_dropout": (-12, 3),
}


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
    """The language models: quality against rate by what was varied; rate against the learning rate; rate in
    training."""
    rows = [row for row in learnt if row[0]["task"] == "lm"]
    figure, axes = panels(3)
    groups: dict[str, list[tuple[str, list[dict]]]] = {}
    for setting, records in by_setting(rows):
        groups.setdefault(setting["varied"], []).append((setting["value"], records))
    colors = {name: f"C{place}" for place, name in enumerate(groups)}
    draw_points(axes[0], groups, colors)
    axes[0].set(xlabel="mean activation rate", ylabel=quality_label(learnt))
    draw_knobs(axes[1], groups, colors)
    axes[1].set(
        xlabel="the learning rate that is varied", ylabel="mean activation rate", ylim=(-0.03, 1.03), xscale="log"
    )
    draw_course({name: groups.get(name, []) for name in ("the recipe itself", *list(VARIED)[:2])}, axes[2], colors)
    axes[2].set(xlabel="step", ylabel="mean activation rate in training", ylim=(-0.03, 1.08))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)


def draw_points(axes: Axes, groups: dict, colors: dict) -> None:
    """Quality against rate; points that stand by themselves say their value, the legend has all values."""
    for name, members in groups.items():
        x, y = ([mean([f(r) for r in records]) for _, records in members] for f in (mean_rate, quality))
        values = ", ".join(value for value, _ in members)
        line = "-" if len(members) > 2 else ""
        axes.plot(x, y, marker="o", linestyle=line, color=colors[name], alpha=0.8, label=f"{name} {values}".strip())
        if name in LABELLED:
            for (value, _), rate, height in zip(members, x, y, strict=True):
                place = {"xytext": LABELLED[name], "textcoords": "offset points", "ha": "center"}
                axes.annotate(value, (rate, height), fontsize=7, color=colors[name], **place)


def draw_knobs(axes: Axes, groups: dict, colors: dict) -> None:
    """Rate against a learning rate, with the deviation over seeds; the recipe's own value belongs to two of the
    lines."""
    for name, members in groups.items():
        if not name.endswith("learning_rate"):
            continue
        points = [(float(value), records) for value, records in members]
        if name in RunRecipe.__dataclass_fields__:
            points += [(records[0]["recipe"][name], records) for _, records in groups.get("the recipe itself", [])]
        points.sort(key=lambda point: point[0])
        rates = [[mean_rate(r) for r in records] for _, records in points]
        deviations = [0.0 if len(seeds) < 2 else spread(seeds) for seeds in rates]
        x = [value for value, _ in points]
        axes.errorbar(x, [mean(seeds) for seeds in rates], deviations, marker="o", capsize=3, color=colors[name])


def draw_course(groups: dict, axes: Axes, colors: dict) -> None:
    """Rate in the course of the training, each line with its value at its end."""
    ends = []
    for name, members in groups.items():
        for value, records in members:
            steps = [point["step"] for point in records[0]["history"]]
            rates = [mean([mean(r["history"][i]["rates"]) for r in records]) for i in range(len(steps))]
            axes.plot(steps, rates, marker=".", color=colors[name], alpha=0.7)
            ends.append((rates[-1], f" {value or 'recipe'}", colors[name]))
    for place, (_, text, color) in zip(apart([end[0] for end in ends], 0.035), ends, strict=True):
        axes.text(1.0, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7, color=color)


def mean_rate(record: dict) -> float:
    return record["mean_rate"]


EXPERIMENT = Experiment(
    "activation_rate",
    "What decides the share of activated tokens: the task, or the optimiser? Each row differs from the recipe in what "
    "`varied` names. `router learns alike` gives the routers the learning rate of everything else, as the published "
    "training does. With `router_target_rate`, whose penalty has weight 1, the routers learn alike too: compare it "
    "with `router learns alike` at the recipe's learning rate.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
