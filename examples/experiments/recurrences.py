"""Experiment 4: the damped EMA, S4D and S5 as the recurrence, at equal parameters.

python examples/experiments/recurrences.py --train_file enwik8.xz --jobs 8 --output outputs/recurrences
"""

from pathlib import Path

from experiment import Bases, Experiment, main
from figures import layers_and_rates, panels, qualities, quality_label, save
from plan import Planned
from tables import Row, by_setting, quality

RECURRENCES = ("ema", "s4d", "s5")
SEEDS = (0, 1)
TIMED_STEPS = 15


def grid(bases: Bases) -> list[Planned]:
    planned = []
    for place, seed in enumerate(bases.few(SEEDS, 1)):
        for name in RECURRENCES:
            changed = {} if name == "ema" else {"ssm_type": name}
            # Without a kernel these take longest, so they begin first.
            planned.append(
                Planned(
                    {"recurrence": name, "backend": "auto", "seed": seed},
                    bases.lm.changed(seed=seed, **changed),
                    rank=10 * place,
                )
            )
    steps = 1 if bases.toy else TIMED_STEPS
    for name, backend in (("ema", "auto"), *((name, "torch") for name in RECURRENCES)):
        planned.append(
            Planned(
                {"recurrence": name, "backend": backend, "seed": 0},
                bases.lm.changed(ssm_type=name, kernel_backend=backend, timed_steps=steps),
            )
        )
    return planned


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Quality and rates by recurrence; speed where it was timed."""
    figure, (values, rates, speeds) = panels(3)
    for place, (setting, records) in enumerate(by_setting(learnt)):
        middle, deviation = qualities(records)
        values.errorbar([place], [middle], [deviation], marker="o", capsize=3)
        values.plot([place] * len(records), [quality(record) for record in records], ".", color="black", alpha=0.5)
        for record in records:
            rates.plot(record["rates"], marker="o", alpha=0.6, color=f"C{place}", label=setting["recurrence"])
    if learnt:
        values.set(ylabel=quality_label(learnt), xlabel="recurrence")
        names = [setting["recurrence"] for setting, _ in by_setting(learnt)]
        values.set_xticks(range(len(names)), names)
        values.margins(x=0.4)
        handles = {label: handle for handle, label in zip(*rates.get_legend_handles_labels(), strict=True)}
        rates.legend(handles.values(), handles.keys(), fontsize="small")
    layers_and_rates(rates)
    names = [f"{labels['recurrence']}, {labels['backend']}" for labels, _ in timed]
    bars = speeds.barh(names, [record["tokens_per_second"] / 1e3 for _, record in timed])
    speeds.bar_label(bars, fmt="{:,.1f}", padding=3)
    speeds.set(xlabel="1,000 tokens/s of training, without a CUDA graph")
    speeds.margins(x=0.2)
    save(figure, path)


EXPERIMENT = Experiment(
    "recurrences",
    "What does the recurrence under the attention matter? Each has 4·D·N parameters a layer (but for terms without "
    "that product): N real states a channel in the EMA, N complex ones a channel in S4D, N complex ones for all "
    "channels together in S5. S4D and S5 have no Triton kernel. So the speeds compare all three on the torch path "
    "(`kernel_backend=torch`, the attention included), and beside them the EMA with its kernels (`auto`). Timed steps "
    "are launched kernel by kernel; where the EMA trains for quality, it replays a CUDA graph and is faster.",
    grid,
    draw,
)

if __name__ == "__main__":
    main([EXPERIMENT], description=__doc__)
