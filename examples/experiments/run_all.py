"""Several experiments in one go; a run that two of them need is made once.

    python examples/experiments/run_all.py memory_size configurators recurrences activation_rate \\
        --train_file enwik8.xz --jobs 8 --minutes 8.5 --output outputs/experiments

Without names: all of them. Each finished run is a line of results.jsonl in the output folder; the same command goes on
with what is missing.
"""

import argparse

import activation_patterns
import activation_rate
import agreement
import configurators
import early_attention
import fair_recurrences
import memory_size
import memory_span
import recurrences
import scale
from experiment import build_parser, launch

MODULES = (
    activation_patterns, memory_size, configurators, recurrences, activation_rate, scale, agreement, memory_span,
    fair_recurrences, early_attention,
)  # fmt: skip
EXPERIMENTS = {module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}")
    arguments = parser.parse_args(argv)
    for name in arguments.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return arguments


def main(argv: list[str] | None = None):
    arguments = parse(argv)
    return launch([EXPERIMENTS[name] for name in arguments.experiments or EXPERIMENTS], arguments)


if __name__ == "__main__":
    main()
