"""Experiment 9: EMA, S4D, S5 and RG-LRU as the recurrence, each with learning rates of its own, under a budget.

python examples/experiments/fair_recurrences.py --train_file enwik8.xz --jobs 8 --output outputs/fair_recurrences
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import of_task, panels, quality_label, save
from plan import Planned
from tables import Row, by_setting, mean, quality

RECURRENCES = ("ema", "rglru", "s4d", "s5")
SEEDS = (0, 1)
# Of the recurrence's parameters; the first is that of everything else.
RATES = (None, 1e-3, 1e-2)
# On Pathfinder the EMA learns at the rate of everything else, the others at the one that is usual for them.
PATHFINDER_RATES = {"ema": None, "rglru": 1e-3, "s4d": 1e-3, "s5": 1e-3}
STEPS = 1000
TIMED_STEPS = 15


def grid(bases: Bases) -> list[Planned]:
    planned = []
    steps = {} if bases.toy else {"steps": STEPS, "warmup_steps": STEPS // 10}

    def add(task: str, name: str, rate: float | None, seed: int, rank: int) -> None:
        # The default is not spelled out, so that other experiments share the run.
        changed = ({} if name == "ema" else {"ssm_type": name}) | steps | {"ssm_learning_rate": rate, "seed": seed}
        recipe = bases.held(task).changed(**changed)
        labels = {"task": task, "recurrence": name, "rate": "shared" if rate is None else f"{rate:g}", "seed": seed}
        planned.append(Planned(labels, recipe, rank=rank))

    for place, seed in enumerate(bases.few(SEEDS, 1)):
        for name in bases.few(RECURRENCES):
            for order, rate in enumerate(bases.few(RATES, 1)):
                add("lm", name, rate, seed, 10 * place + 4 + order)
            if not bases.toy:
                add("pathfinder", name, PATHFINDER_RATES[name], seed, 10 * place + 5)
    # The published shape; the recurrences without any kernel would take its minutes for themselves.
    for name in RECURRENCES[:2]:
        labels = {"task": "lm, published shape", "recurrence": name, "rate": "shared", "seed": 0}
        timed = bases.budget.changed(timed_steps=1 if bases.toy else TIMED_STEPS)
        planned.append(Planned(labels, timed if name == "ema" else timed.changed(ssm_type=name)))
    return planned


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Quality of each recurrence by its learning rate, a panel a task; and speed, if any run was timed."""
    figure, axes_of = panels(3 if timed else 2)
    for axes, task in zip(axes_of[:2], ("lm", "pathfinder"), strict=True):
        rows = of_task(learnt, task)
        groups = by_setting(rows)
        for place, (setting, records) in enumerate(groups):
            color = f"C{RECURRENCES.index(setting['recurrence'])}"
            values = [quality(record) for record in records]
            axes.plot([mean(values)], [place], "|", color=color, markersize=16)
            axes.plot(values, [place] * len(values), "o", color=color, alpha=0.7)
        names = [f"{setting['recurrence']}, {setting['rate']}" for setting, _ in groups]
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.set(title=task, xlabel=quality_label(rows) if rows else "")
    if timed:
        speeds = axes_of[2]
        names = [labels["recurrence"] for labels, _ in timed]
        bars = speeds.barh(names, [record["tokens_per_second"] / 1e3 for _, record in timed])
        speeds.bar_label(bars, fmt="{:,.1f}", padding=3)
        speeds.set(xlabel="1,000 tokens/s of training, without a CUDA graph", title="published shape")
        speeds.margins(x=0.2)
    save(figure, path)


EXPERIMENT = Experiment(
    "fair_recurrences",
    "Which recurrence under the attention, if each may learn at a rate of its own? `rate` is that of the recurrence's "
    "parameters, `shared` the one of everything else that AdamW trains (4e-3); matrices are trained by Muon, and "
    "routers are held to a budget. The RG-LRU (arXiv 2402.19427) gates its decay by the input; it is an extension, "
    "written in `examples/experiments/rglru.py` by the protocol that `register_recurrence` takes. All have about as "
    "many parameters as the EMA. In training, EMA and RG-LRU replay a CUDA graph. `lm, published shape` is not "
    "trained: 39.1 M parameters on 4 rows of 8,192 bytes, whose steps are timed, launched kernel by kernel.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
