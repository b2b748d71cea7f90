"""Experiment 1: which layers attend, for which tokens, on which task.

    python examples/experiments/activation_patterns.py --train_file enwik8.xz --output outputs/activation_patterns
    python examples/experiments/activation_patterns.py --model lm=outputs/lm/final \\
        --model pathfinder=outputs/lra-pathfinder/best --train_file enwik8.xz --output outputs/activation_patterns

The first trains a model a task, the second measures folders that `save_pretrained` has written.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from experiment import Bases, Experiment, bases_of, build_parser, command_line, launch, settings_of, write_page
from figures import panels, save
from plan import Planned
from run_data import Sources, load_data
from run_recipe import TASKS
from runs import MODELS, describe, identity, measure
from tables import Row

from modeling_seqboat import SeqBoatConfig


def grid(bases: Bases) -> list[Planned]:
    return [Planned({"task": task, "seed": 0}, bases.task(task)) for task in TASKS]


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Rates and spans, layers by tasks; and the language model's rates by class of the byte."""
    figure, (rates, spans, classes) = panels(3)
    names = [labels["task"] for labels, _ in learnt]
    for axes, key, form, title in (
        (rates, "rates", ".0%", "activation rate"),
        (spans, "spans", ".0f", "span, tokens"),
    ):
        heat(axes, [record[key] for _, record in learnt], names, form)
        axes.set(title=title, xlabel="layer")
    by_class = next((record["class_rates"] for _, record in learnt if record["class_rates"]), {})
    heat(classes, list(by_class.values()), list(by_class), ".0%")
    classes.set(title="activation rate by byte, lm", xlabel="layer")
    save(figure, path)


def heat(axes, values: list[list[float | None]], names: list[str], form: str) -> None:
    """A row a name, a column a layer, empty where there is nothing."""
    width = max(map(len, values), default=1)
    table = [
        [math.nan if value is None else value for value in row] + [math.nan] * (width - len(row)) for row in values
    ]
    darkest = max((value for row in table for value in row if not math.isnan(value)), default=0.0)
    if table:
        axes.imshow(table, aspect="auto", cmap="Blues", vmin=0)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if not math.isnan(value):
                axes.text(
                    x,
                    y,
                    format(value, form),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.6 * darkest else "black",
                )
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=range(width))


def measure_folder(task: str, folder: str, bases: Bases, sources: Sources, device: torch.device, command: str) -> Row:
    """Raises ValueError where the folder has no model for the task."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder!r} holds no config.json; name a folder that save_pretrained has written")
    config = SeqBoatConfig.from_pretrained(folder)
    wanted = bases.task(task)
    expected = wanted.config()
    for name in ("bidirectional", "input_type"):
        if getattr(config, name) != getattr(expected, name):
            raise ValueError(f"{folder!r} has {name}={getattr(config, name)!r}, which task {task!r} does not use")
    model = MODELS[task].from_pretrained(folder).to(device)
    quality, report = measure(model, wanted, load_data(wanted, sources, device))
    files = [Path(name).name for name in (sources.train_file, sources.validation_file) if name]
    facts = {"command": command, "jobs": 1, "recipe": wanted.flat(), "data": {"files": files}}
    record = facts | {"parameters": model.num_parameters(), "quality": quality} | describe(report) | identity(device)
    return {"task": task, "model": Path(folder).name}, record


def _named(text: str) -> tuple[str, str]:
    task, _, folder = text.partition("=")
    if task not in TASKS or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FOLDER with a task of {', '.join(TASKS)}")
    return task, folder


EXPERIMENT = Experiment(
    "activation_patterns",
    "Which layers attend, and does it depend on the task? A row is a task's model, with the share of tokens that each "
    "layer activates and the distance in tokens that its attention covers.",
    grid,
    draw,
)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--model", action="append", type=_named, metavar="TASK=FOLDER", help="measure, do not train")
    arguments = parser.parse_args(argv)
    if not arguments.model:
        launch([EXPERIMENT], arguments)
        return
    try:
        settings, bases = settings_of(arguments), bases_of(arguments)
        device = torch.device(settings.device)
        rows = [measure_folder(*named, bases, settings.sources, device, command_line()) for named in arguments.model]
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    write_page(EXPERIMENT, rows, 0, arguments.write_docs or arguments.output)


if __name__ == "__main__":
    main()
