"""Runs a list of trainings on one or more GPUs, one at a time on each, and goes on where it was interrupted.

    python examples/long_context/run_queue.py configuration/recipes/long_context/plan.yaml \
        --output_dir outputs/recall --gpus 0 1 --set data=enwik8

A plan is a list of runs, each a mapping with `name` and `recipe` (beside the plan), optionally `minutes`, and
arguments of `train_recall.py`. Each run writes to its folder in `output_dir`, with its output in `run.log`; one that
has `final/` already is left out, one that has a checkpoint goes on from it. A run that fails or takes longer than its
minutes and five more is noted in `queue.jsonl`, and the next one begins. Runs start in the order of the plan.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
import json
import math
import os
import re
import subprocess
import threading
import time
from dataclasses import dataclass, field

from recipes import parse_arguments, read_yaml
from run_folder import open_log

SCRIPT = Path(__file__).resolve().parent / "train_recall.py"
# Seconds that a run may take beside its training: starting, validation, saving.
GRACE = 300


@dataclass
class QueueArguments:
    plan: str = field(metadata={"help": "a YAML list of runs"})
    output_dir: str = field()
    gpus: list[str] = field(default_factory=lambda: ["0"], metadata={"help": "numbers of GPUs, or cpu"})
    only: list[str] = field(default_factory=list, metadata={"help": "names of runs; default: all"})
    set: list[str] = field(default_factory=list, metadata={"help": "name=value for every run that does not set it"})
    grace: int = field(default=GRACE, metadata={"help": "seconds beside training after which a run is ended"})


@dataclass(frozen=True)
class Run:
    name: str
    recipe: Path
    minutes: float
    arguments: dict


def read_plan(path: str, only: list[str], defaults: list[str]) -> list[Run]:
    """The runs of a plan. Raises ValueError and FileNotFoundError that name the entry at fault."""
    file = Path(path)
    entries = read_yaml(file, "plan")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and {"name", "recipe"} <= set(e) for e in entries):
        raise ValueError(f"plan {path!r} must be a list of mappings, each with name and recipe")
    names = [entry["name"] for entry in entries]
    for entry in entries:
        # It becomes the name of a folder.
        if not isinstance(entry["name"], str) or not re.fullmatch(r"[\w-][\w.-]*", entry["name"]):
            raise ValueError(f"plan {path!r}: a name must be letters, digits, -, _ and dots, got {entry['name']!r}")
        minutes = entry.get("minutes", 10)
        if type(minutes) not in (int, float) or not 0 < minutes < math.inf or not isinstance(entry["recipe"], str):
            raise ValueError(
                f"plan {path!r}: run {entry['name']!r} must have a recipe's file and minutes above 0, got "
                f"{entry['recipe']!r} and {minutes!r}"
            )
    repeated = {name for name in names if names.count(name) > 1}
    unknown = set(only) - set(names)
    if repeated or unknown:
        raise ValueError(
            f"plan {path!r}: "
            + (f"{sorted(repeated)} occur twice" if repeated else f"there are no runs {sorted(unknown)}")
        )
    wrong = [text for text in defaults if "=" not in text]
    if wrong:
        raise ValueError(f"set must be name=value, got {wrong[0]!r}")
    runs = []
    for entry in entries:
        recipe = file.parent / entry["recipe"]
        if not recipe.is_file():
            raise FileNotFoundError(f"run {entry['name']!r}: there is no recipe {str(recipe)!r}")
        given = {key: value for key, value in entry.items() if key not in ("name", "recipe", "minutes")}
        arguments = dict(text.split("=", 1) for text in defaults) | given
        if not only or entry["name"] in only:
            runs.append(Run(entry["name"], recipe, float(entry.get("minutes", 10)), arguments))
    return runs


def command(run: Run, folder: Path, gpu: str) -> list[str]:
    flags = {**run.arguments, "max_minutes": run.minutes, "output_dir": folder, "resume": True, "cpu": gpu == "cpu"}
    return [sys.executable, str(SCRIPT), str(run.recipe), *(w for k, v in flags.items() for w in (f"--{k}", str(v)))]


def carry_out(run: Run, folder: Path, gpu: str, grace: int) -> str:
    """`done`, `there already`, `too long` or `failed`."""
    if (folder / "final").is_dir():
        return "there already"
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if gpu != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with (folder / "run.log").open("a", encoding="utf-8") as log:
        try:
            words = command(run, folder, gpu)
            code = subprocess.run(
                words, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=60 * run.minutes + grace
            ).returncode
        except subprocess.TimeoutExpired:
            return "too long"
    return "done" if code == 0 else "failed"


def main(argv: list[str] | None = None) -> dict[str, str]:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        # A plan is a list; what recipes.py reads is a mapping of arguments.
        argv = ["--plan", *argv]
    a = parse_arguments(QueueArguments, argv)
    runs = read_plan(a.plan, a.only, a.set)
    output, lock, outcomes = Path(a.output_dir), threading.Lock(), {}
    output.mkdir(parents=True, exist_ok=True)
    waiting = list(runs)

    def work(gpu: str) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                run = waiting.pop(0)
            begin = time.monotonic()
            outcome = carry_out(run, output / run.name, gpu, a.grace)
            line = {"run": run.name, "outcome": outcome, "gpu": gpu, "seconds": round(time.monotonic() - begin, 1)}
            with lock:
                outcomes[run.name] = outcome
                with open_log(output / "queue.jsonl") as log:
                    log.write(json.dumps(line).encode("utf-8") + b"\n")
                print(f"{run.name}: {outcome} after {line['seconds']:.0f} s", flush=True)

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in a.gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return outcomes


if __name__ == "__main__":
    main()
