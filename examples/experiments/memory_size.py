"""Experiment 2: memory size against quality and average attention span, on enwik8 bytes and on Pathfinder.

python examples/experiments/memory_size.py --train_file enwik8.xz --jobs 8 --output outputs/memory_size
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import of_task, panels, qualities, quality_label, save, tasks
from plan import Planned
from tables import Row, by_setting, mean

SIZES = {"lm": (4, 16, 64, 256, 1024), "pathfinder": (8, 32, 128, 512)}
SEEDS = (0, 1)


def grid(bases: Bases) -> list[Planned]:
    return [
        Planned(
            {"task": task, "memory_size": size, "seed": seed},
            bases.task(task).changed(memory_size=size, seed=seed),
            rank=10 * place + (3 if task == "pathfinder" else 2),
        )
        for task, sizes in SIZES.items()
        for size in bases.few(sizes)
        for place, seed in enumerate(bases.few(SEEDS, 1))
    ]


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """A row of axes a task: quality against memory size, and against the span that the model made of it."""
    names = tasks(learnt)
    figure, axes = panels(2, len(names))
    for place, task in enumerate(names):
        rows = of_task(learnt, task)
        by_size, by_span = axes[2 * place : 2 * place + 2]
        points = [(s["memory_size"], *qualities(r), mean([x["mean_span"] for x in r])) for s, r in by_setting(rows)]
        sizes, values, deviations, spans = zip(*points, strict=True)
        by_size.errorbar(sizes, values, deviations, marker="o", capsize=3)
        by_size.set(title=task, xlabel="memory size W", ylabel=quality_label(rows), xscale="log")
        by_size.set_xticks(sizes, [str(size) for size in sizes])
        by_size.minorticks_off()
        by_span.errorbar(spans, values, deviations, fmt="o", capsize=3)
        for size, value, span in zip(sizes, values, spans, strict=True):
            by_span.annotate(f"W {size}", (span, value), xytext=(5, 4), textcoords="offset points", fontsize=8)
        by_span.set(title=task, xlabel="average attention span, tokens", ylabel=quality_label(rows), xscale="log")
        by_span.margins(x=0.25)
        by_span.xaxis.set_major_formatter("{x:g}")
    save(figure, path)


EXPERIMENT = Experiment(
    "memory_size",
    "What does a larger memory buy? The memory size W is how many activated tokens one activated token sees (before "
    "it; an encoder also after it). The span is the mean distance to them in tokens: sparser layers reach further "
    "with the same W. The paper claims that local attention on activated tokens, at a cost linear in the length, "
    "gives an attention span without a bound and a better trade of quality against cost than chunked attention.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
