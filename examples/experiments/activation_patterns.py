"""Experiment 1: which layers attend, for which tokens, on which task.

    python examples/experiments/activation_patterns.py --train_file enwik8.xz --output outputs/activation_patterns
    python examples/experiments/activation_patterns.py --train_file enwik8.xz --output outputs/activation_patterns \\
        --model lm=outputs/lm/final --model text=outputs/tasks/text --model pathx=outputs/tasks/pathx

The first trains small models of three tasks. The second measures models that are there: a language model's folder, by
`save_pretrained`, and output folders of examples/classification/train.py, on the test rows that their results.json
names. What it measures is kept in activation_patterns.jsonl of the output folder, and the page has all that is kept
there; `--from-results` makes the page of such a file.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from example_paths import DataArguments, TaskData, load_task, read_json_object
from experiment import Bases, Experiment, bases_of, build_parser, command_line, launch, settings_of, write_page
from figures import panels, save
from plan import Planned, Results
from run_data import EVALUATION_BATCH, Batch, Sources, load_data
from run_recipe import TASKS
from runs import MODELS, describe, identity, measure
from tables import GENERATED, Row

from modeling_seqboat import SeqBoatConfig

SEEDS = (0, 1)
CLASSIFICATION = ("text", "image", "listops", "pathfinder", "pathx", "speech")
# Rates and spans want no more.
TEST_ROWS = 2000
# What is measured on models that are there, by task and name of the model.
KEPT = "activation_patterns.jsonl"


def grid(bases: Bases) -> list[Planned]:
    return [
        Planned(
            {"task": task, "seed": seed},
            (bases.budget if task == "lm" else bases.held(task)).changed(seed=seed),
            rank=10 * place + 6,
        )
        for place, seed in enumerate(bases.few(SEEDS, 1))
        for task in TASKS
    ]


def draw(learnt: list[Row], timed: list[Row], path: Path) -> None:
    """Rates and spans, layers by tasks; and the language model's rates by class of the byte."""
    figure, (rates, spans, classes) = panels(3)
    # Four digits a cell.
    figure.set_size_inches(19, 4)
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


def measure_language_model(folder: str, bases: Bases, sources: Sources, device: torch.device, command: str) -> Row:
    """Raises ValueError where the folder has no language model."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder!r} holds no config.json; name a folder that save_pretrained has written")
    if SeqBoatConfig.from_pretrained(folder).bidirectional:
        raise ValueError(f"{folder!r} has bidirectional=True, which task 'lm' does not use")
    recipe = bases.budget
    model = MODELS["lm"].from_pretrained(folder).to(device)
    quality, report = measure(model, recipe, load_data(recipe, sources, device))
    files = [Path(name).name for name in (sources.train_file, sources.validation_file) if name]
    facts = {"command": command, "jobs": 1, "recipe": recipe.flat(), "data": {"files": files}}
    record = facts | {"parameters": model.num_parameters(), "quality": quality} | describe(report) | identity(device)
    return {"task": "lm", "model": Path(folder).name}, record


@dataclass
class HeldOutRows:
    """Test rows of a task as `measure` reads them: all, or `most` of them, evenly spread, for files go by class."""

    data: TaskData
    device: torch.device
    most: int

    def evaluation(self) -> Iterator[Batch]:
        known = len(self.data.test)
        count = min(known, self.most)
        for first in range(0, count, EVALUATION_BATCH):
            rows = [self.data.test[row * known // count] for row in range(first, min(first + EVALUATION_BATCH, count))]
            yield {name: value.to(self.device) for name, value in self.data.collate(rows).items()}


def measure_classifier(task: str, folder: str, device: torch.device, command: str, rows: int | None = None) -> Row:
    """Raises ValueError and FileNotFoundError where the folder has no finished run of the task, or data are gone.

    Args:
        rows: of generated data, draw so many by the next seed, rather than all that the run had; of other data, take
            no more. All rows of a run are drawn if it is None.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{folder!r} holds no results.json; name an output folder of examples/classification/train.py"
        )
    found = read_json_object(path)
    given = found.get("arguments")
    if not isinstance(given, dict) or given.get("task") != task:
        raise ValueError(f"{str(path)!r} is of task {found.get('task')!r}, not {task!r}")
    named = {known.name for known in fields(DataArguments)}
    arguments = DataArguments(**{name: value for name, value in given.items() if name in named})
    if rows is not None and task in GENERATED:
        # The same seed would begin with rows that the model has been trained on.
        arguments = replace(
            arguments, data_seed=arguments.data_seed + 1, train_size=1, validation_size=1, test_size=rows, easy_rows=0
        )
    best = Path(folder) / "best"
    data = load_task(task, arguments, SeqBoatConfig.from_pretrained(best).pad_token_id)
    model = data.model_class.from_pretrained(best).to(device)
    precision = "bf16" if given.get("mixed_precision") == "bf16" and device.type == "cuda" else "float32"
    recipe = SimpleNamespace(task=task, precision=precision)
    quality, report = measure(model, recipe, HeldOutRows(data, device, rows or TEST_ROWS))
    files = [Path(name).name for name in (arguments.data_path, arguments.labels_path) if name]
    facts = {"command": command, "jobs": 1, "data": {"files": files}}
    facts["recipe"] = {"task": task, "seed": given.get("seed", 0), "steps": found.get("steps", 0), "timed_steps": 0}
    record = facts | {"parameters": model.num_parameters(), "quality": quality} | describe(report) | identity(device)
    return {"task": task, "model": Path(folder).name}, record


def _named(text: str) -> tuple[str, str]:
    task, _, folder = text.partition("=")
    known = ("lm", *CLASSIFICATION)
    if task not in known or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FOLDER with a task of {', '.join(known)}")
    return task, folder


def kept(results: Results) -> list[Row]:
    """Raises ValueError for a record of anything but a model that was there."""
    for record in results.records.values():
        if not {"task", "model", "quality"} <= record.keys():
            raise ValueError(f"record {record['key']!r} of {str(results.path)!r} names no task, model and quality")
    return [({name: record[name] for name in ("task", "model")}, record) for record in results.records.values()]


EXPERIMENT = Experiment(
    "activation_patterns",
    "Which layers attend, and does it depend on the task? A row is a task's model, its routers held to a budget, with "
    "the share of tokens that each layer activates and the distance in tokens that its attention covers.",
    grid,
    draw,
)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--model", action="append", type=_named, metavar="TASK=FOLDER", help="measure, do not train")
    parser.add_argument(
        "--rows",
        type=int,
        help="of --model, test rows at most; generated rows are new ones, by the next data_seed",
    )
    arguments = parser.parse_args(argv)
    given = arguments.from_results
    if not arguments.model and (given is None or given.name != KEPT):
        launch([EXPERIMENT], arguments)
        return
    try:
        if arguments.rows is not None and arguments.rows < 1:
            raise ValueError(f"--rows must be at least 1, got {arguments.rows}")
        if given is not None and not given.is_file():
            raise FileNotFoundError(f"there is no file {str(given)!r}")
        results = Results(given or arguments.output / KEPT)
        settings, bases = settings_of(arguments), bases_of(arguments)
        device = torch.device(settings.device)
        command = command_line()
        for task, folder in [] if given else arguments.model:
            labels, record = (
                measure_language_model(folder, bases, settings.sources, device, command)
                if task == "lm"
                else measure_classifier(task, folder, device, command, arguments.rows)
            )
            results.add({"key": "=".join(labels.values())} | labels | record)
        rows = kept(results)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    write_page(EXPERIMENT, rows, 0, arguments.write_docs or arguments.output)


if __name__ == "__main__":
    main()
