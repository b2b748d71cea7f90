"""Experiment 8: memory size against quality and span, with the routers held to a budget, at the published length.

python examples/experiments/memory_span.py --train_file enwik8.xz --output outputs/memory_span
"""

from experiment import Bases, Experiment, main
from memory_size import draw
from plan import Planned

SIZES = (2048, 256, 1024, 64, 4096)
SEEDS = (0, 1)


def grid(bases: Bases) -> list[Planned]:
    sizes = (bases.budget.config().memory_size, 4) if bases.toy else SIZES
    return [
        Planned(
            {"memory_size": size, "seed": seed},
            bases.budget.changed(memory_size=size, seed=seed),
            rank=10 * place + 3,
        )
        for size in sorted(sizes)
        for place, seed in enumerate(bases.few(SEEDS, 1))
    ]


EXPERIMENT = Experiment(
    "memory_span",
    "What does a larger memory buy where rows are long and half of the tokens attend? As `memory_size`, with the "
    "published shape, rows of 8,192 bytes and routers that are held to a budget. One size is that of `agreement`, "
    "whose runs are taken over in a common output folder.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
