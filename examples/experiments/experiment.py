"""The frame that the experiments share: options, the plan, runs, tables, pictures and pages for docs/."""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The package beside the examples, installed or not.
sys.path.append(str(ROOT))

import torch  # noqa: E402
from driver import Settings, make_runs  # noqa: E402
from example_paths import write_text  # noqa: E402
from plan import Planned, Results  # noqa: E402
from run_data import Sources  # noqa: E402
from run_recipe import RunRecipe, load_recipe  # noqa: E402
from script_start import ArgumentParser  # noqa: E402
from tables import Row, conditions, finished, is_timed, runs_table, settings_table, speed_table  # noqa: E402

RECIPES = ROOT / "configuration/recipes/experiments"
TOY_TEXT = ROOT / "examples/data/tinyshakespeare.txt"
OUTPUT = Path("outputs/experiments")
# What a recipe takes over of `budget` to have its routers held as well.
BUDGET = (
    "optimizer", "muon_learning_rate", "router_learning_rate", "router_gain", "beta2", "schedule", "final_rate",
    "router_target_rate", "router_target_scope", "router_temperature_init",
)  # fmt: skip


@dataclass(frozen=True)
class Bases:
    """The recipes that grids start from.

    Attributes:
        folder: holds `lm.yaml`, `pathfinder.yaml`, `listops.yaml` and `budget.yaml`.
        toy: whether grids should be as small as they can.
    """

    folder: Path
    toy: bool

    def task(self, name: str) -> RunRecipe:
        return load_recipe(self.folder / f"{name}.yaml")

    @property
    def lm(self) -> RunRecipe:
        return self.task("lm")

    @property
    def pathfinder(self) -> RunRecipe:
        return self.task("pathfinder")

    @property
    def budget(self) -> RunRecipe:
        """The language model of the published shape, its routers held to a budget, under Muon."""
        return self.task("budget")

    def held(self, task: str) -> RunRecipe:
        """A task's recipe, with optimizer and routers as in `budget`."""
        budget = self.budget.flat()
        return self.task(task).changed(**{name: budget[name] for name in BUDGET})

    def few(self, values: Sequence[Any], count: int = 2) -> list[Any]:
        """All values, or the first ones of a toy run."""
        return list(values)[:count] if self.toy else list(values)


@dataclass(frozen=True)
class Sequel:
    """What an experiment measures on the models of its runs, once they are made.

    Attributes:
        measure: measures what is not in the folder yet, until the clock (`time.monotonic`) shows the last argument.
        read: runs whose records have what the folder holds of them.
        tables: titles and tables of such runs.
    """

    measure: Callable[[list[Row], Path, Settings, float], None]
    read: Callable[[list[Row], Path], list[Row]]
    tables: Callable[[list[Row]], list[tuple[str, str]]]


@dataclass(frozen=True)
class Experiment:
    """Attributes:
    name: of the script, the page and the picture.
    question: what it asks, a paragraph in markdown.
    grid: the runs it needs.
    draw: writes the picture of finished, untimed and timed, runs; what they hold is not empty.
    sequel: more that it measures, or None.
    """

    name: str
    question: str
    grid: Callable[[Bases], list[Planned]]
    draw: Callable[[list[Row], list[Row], Path], None]
    sequel: Sequel | None = None


def page(experiment: Experiment, rows: list[Row], missing: int = 0) -> str:
    """Question, conditions and tables in markdown, and the commands that made the runs."""
    parts = [f"# {experiment.name.replace('_', ' ').capitalize()}\n", experiment.question.strip() + "\n"]
    if not rows:
        return "\n".join([*parts, "No run of this experiment has been made.\n"])
    parts += [f"![{experiment.name}]({experiment.name}.png)\n", "## Conditions\n", conditions(rows)]
    if missing:
        parts.append(f"{missing} of the {len(rows) + missing} planned runs were not made.\n")
    learnt, timed = parted(rows)
    for title, table in (
        *([] if experiment.sequel is None else experiment.sequel.tables(learnt)),
        ("Settings", settings_table(learnt)),
        ("Speed, nothing else on the device", speed_table(timed)),
        ("Runs", runs_table(learnt)),
    ):
        if table:
            parts += [f"## {title}\n", table]
    commands = dict.fromkeys(record["command"].replace(" --", " \\\n    --") for _, record in rows)
    return "\n".join([*parts, "## Command\n", "```", *commands, "```\n"])


def parted(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Runs that learnt something, and those that were only timed."""
    return [row for row in rows if not is_timed(row)], [row for row in rows if is_timed(row)]


def write_page(experiment: Experiment, rows: list[Row], missing: int, folder: Path) -> None:
    """Prints the tables and writes `folder`/NAME.md and NAME.png, which are made from the records alone."""
    text = page(experiment, rows, missing)
    print("\n" + text)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{experiment.name}.md", text)
    if rows:
        experiment.draw(*parted(rows), folder / f"{experiment.name}.png")
    print(f"written to {folder}: {experiment.name}.md" + (f", {experiment.name}.png" if rows else ""))


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"folder of results and pages, {OUTPUT} by default"
    )
    parser.add_argument("--toy", action="store_true", help="tiny models, a few steps, to see that all of it runs")
    parser.add_argument("--recipes", type=Path, help=f"folder of recipes, {RECIPES.relative_to(ROOT)} by default")
    parser.add_argument("--train_file", help="text for language models, plain, .gz or .xz")
    parser.add_argument("--validation_file", help="default: the last 5 %% of train_file")
    parser.add_argument("--data_folder", help="keeps generated data; default: data/ in the output folder")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the one device")
    parser.add_argument("--minutes", type=float, help="start no run later than this")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process on the CPU")
    parser.add_argument("--from-results", type=Path, help="make no runs: tables and pictures of this results.jsonl")
    parser.add_argument(
        "--write-docs", type=Path, help="write pages and pictures to this folder instead of the output"
    )
    return parser


def main(experiments: list[Experiment], argv: list[str] | None = None, description: str | None = None) -> Results:
    """The command line of one experiment."""
    return launch(experiments, build_parser(description).parse_args(argv))


def launch(experiments: list[Experiment], arguments: argparse.Namespace) -> Results:
    """Makes what runs are missing, prints tables, writes pages and pictures."""
    try:
        return run(experiments, arguments)
    except (ValueError, FileNotFoundError) as error:
        # What the user can put right is said without a traceback.
        sys.exit(f"error: {error}")


def bases_of(arguments: argparse.Namespace) -> Bases:
    return Bases(arguments.recipes or (RECIPES / "toy" if arguments.toy else RECIPES), arguments.toy)


def run(experiments: list[Experiment], arguments: argparse.Namespace) -> Results:
    """Raises ValueError and FileNotFoundError for recipes, options and data that do not do."""
    bases, folder = bases_of(arguments), arguments.output
    end = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    plans = {experiment.name: experiment.grid(bases) for experiment in experiments}
    if arguments.from_results is not None:
        if not arguments.from_results.is_file():
            raise FileNotFoundError(f"there is no file {str(arguments.from_results)!r}")
        results, folder = Results(arguments.from_results), arguments.from_results.parent
    else:
        every = [run for plan in plans.values() for run in plan]
        results = make_runs(every, arguments.output, settings_of(arguments), command_line())
    for experiment in experiments:
        plan = plans[experiment.name]
        rows, sequel = finished(plan, results.records), experiment.sequel
        if sequel is not None:
            if arguments.from_results is None:
                sequel.measure(rows, folder, settings_of(arguments), end)
            rows = sequel.read(rows, folder)
        write_page(experiment, rows, len(plan) - len(rows), arguments.write_docs or arguments.output)
    return results


def command_line() -> str:
    """How this script was called, for records: without the folders of the machine it ran on."""
    return shlex.join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)])


def settings_of(arguments: argparse.Namespace) -> Settings:
    text = arguments.train_file or (str(TOY_TEXT) if arguments.toy else None)
    sources = Sources(text, arguments.validation_file, arguments.data_folder or str(arguments.output / "data"))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(sources, arguments.jobs, arguments.minutes, device, arguments.threads)
