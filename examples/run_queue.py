"""Runs a list of trainings on one or more GPUs, one at a time on each, and goes on where it was interrupted.

    python examples/run_queue.py configuration/recipes/long_context/plan.yaml \
        --output_dir outputs/recall --gpus 0 1 --set data=enwik8
    python examples/run_queue.py configuration/recipes/experiments/plan.yaml --output_dir outputs/open --gpus 0 1 2 3 \
        --stop_after 25 --set experiments.train_file=enwik8 --set text.data_path=aclImdb_v1.tar.gz

A plan is a list of runs, each a mapping with `name`, optionally `script`, `minutes` and arguments of the script:

* `recall`, the default, is examples/long_context/train_recall.py, `classification` is
  examples/classification/train.py, and `lm` examples/train_lm.py; all have a `recipe`, a file named from the plan's
  folder. An `lm` with `max_steps` trains for these, and not for its minutes.
* `experiments` is examples/experiments/run_all.py, with the `experiment` that it makes.

Each run writes to its folder in `output_dir`, with its output in `run.log`; one that is finished is left out, one that
was interrupted goes on. A run that fails or takes longer than its minutes and five more is noted in `queue.jsonl`, and
the next one begins. Runs start in the order of the plan. After `stop_after` minutes no run is started, and those under
way are ended (classification and lm save a checkpoint then): the same command goes on from what they have saved.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent))
import script_start  # noqa: F401, before torch

# isort: split
import json
import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recipes import parse_arguments, read_yaml
from run_folder import open_log

EXAMPLES = Path(__file__).resolve().parent
# Seconds that a run may take beside its training: starting, validation, saving.
GRACE = 300
# Seconds that a run has to save a checkpoint when it is ended.
FAREWELL = 60


@dataclass
class QueueArguments:
    plan: str = field(metadata={"help": "a YAML list of runs"})
    output_dir: str = field()
    gpus: list[str] = field(default_factory=lambda: ["0"], metadata={"help": "numbers of GPUs, or cpu"})
    only: list[str] = field(default_factory=list, metadata={"help": "names of runs; default: all"})
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "name=value for every run that does not set it, or KIND.name=value for some of them"},
    )
    grace: int = field(default=GRACE, metadata={"help": "seconds beside training after which a run is ended"})
    stop_after: float | None = field(
        default=None, metadata={"help": "minutes after which no run is started and running ones are interrupted"}
    )


@dataclass(frozen=True)
class Run:
    name: str
    script: str
    # A recipe's file, or the name of an experiment.
    subject: str
    minutes: float
    arguments: dict


@dataclass(frozen=True)
class Script:
    """Attributes:
    path: of the script in examples/.
    subject: the key of a plan's entry that says what it runs, and comes first in its command.
    done: whether a run's folder holds a finished run.
    flags: of a run in its folder on a GPU, beside the arguments that the plan gives.
    """

    path: str
    subject: str
    done: Callable[[Run, Path], bool]
    flags: Callable[[Run, Path, str], dict[str, Any]]


def _recall_flags(run: Run, folder: Path, gpu: str) -> dict[str, Any]:
    return {"max_minutes": run.minutes, "output_dir": folder, "resume": True, "cpu": gpu == "cpu"}


def _classification_flags(run: Run, folder: Path, gpu: str) -> dict[str, Any]:
    # The script wants a folder of its own, without a log.
    flags = {"max_minutes": run.minutes, "output_dir": folder / "run", "use_cpu": gpu == "cpu"}
    if any((folder / "run").glob("checkpoint-*")):
        flags["resume_from_checkpoint"] = "latest"
    elif (folder / "run").is_dir():
        # Of a run that was ended before it had saved anything.
        flags["overwrite_output_dir"] = True
    return flags


def _lm_flags(run: Run, folder: Path, gpu: str) -> dict[str, Any]:
    flags = _classification_flags(run, folder, gpu)
    flags["cpu"] = flags.pop("use_cpu")
    if "max_steps" in run.arguments:
        flags.pop("max_minutes")
    return flags


def _experiment_flags(run: Run, folder: Path, gpu: str) -> dict[str, Any]:
    return {"output": folder, "device": "cpu" if gpu == "cpu" else "cuda"}


SCRIPTS = {
    "recall": Script(
        "long_context/train_recall.py", "recipe", lambda run, folder: (folder / "final").is_dir(), _recall_flags
    ),
    "classification": Script(
        "classification/train.py", "recipe", lambda run, folder: (folder / "run/results.json").is_file(),
        _classification_flags,
    ),
    "lm": Script("train_lm.py", "recipe", lambda run, folder: (folder / "run/final").is_dir(), _lm_flags),
    # Pages are written when all runs of an experiment were made.
    "experiments": Script(
        "experiments/run_all.py", "experiment", lambda run, folder: (folder / f"{run.subject}.md").is_file(),
        _experiment_flags,
    ),
}  # fmt: skip


def read_plan(path: str, only: list[str], defaults: list[str]) -> list[Run]:
    """The runs of a plan. Raises ValueError and FileNotFoundError that name the entry at fault.

    Args:
        only: names of runs, or none for all.
        defaults: `name=value` for every run that does not set it, or `KIND.name=value` for those of a script of this
            name, and those whose names are KIND or KIND and a dash with more.
    """
    file = Path(path)
    entries = read_yaml(file, "plan")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "name" in e for e in entries):
        raise ValueError(f"plan {path!r} must be a list of mappings, each with a name")
    runs = [_read_run(file, entry, defaults) for entry in entries]
    names = [run.name for run in runs]
    repeated = {name for name in names if names.count(name) > 1}
    unknown = set(only) - set(names)
    if repeated or unknown:
        raise ValueError(
            f"plan {path!r}: "
            + (f"{sorted(repeated)} occur twice" if repeated else f"there are no runs {sorted(unknown)}")
        )
    return [run for run in runs if not only or run.name in only]


def _read_run(plan: Path, entry: dict[str, Any], defaults: list[str]) -> Run:
    where, name = f"plan {str(plan)!r}", entry["name"]
    # It becomes the name of a folder.
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"{where}: a name must be letters, digits, -, _ and dots, got {name!r}")
    kind = entry.get("script", "recall")
    if not isinstance(kind, str) or kind not in SCRIPTS:
        raise ValueError(f"{where}: run {name!r}: script must be one of {', '.join(SCRIPTS)}, got {kind!r}")
    key = SCRIPTS[kind].subject
    subject, minutes = entry.get(key), entry.get("minutes", 10)
    if type(minutes) not in (int, float) or not 0 < minutes < math.inf or not isinstance(subject, str):
        wanted = "a recipe's file" if key == "recipe" else f"an {key}"
        raise ValueError(
            f"{where}: run {name!r} must have {wanted} and minutes above 0, got {subject!r} and {minutes!r}"
        )
    if key == "recipe":
        subject = str(plan.parent / subject)
        if not Path(subject).is_file():
            raise FileNotFoundError(f"run {name!r}: there is no recipe {subject!r}")
    arguments = {}
    for text in defaults:
        flag, equals, value = text.partition("=")
        group, _, flag = flag.rpartition(".")
        if not equals or not flag:
            raise ValueError(f"set must be name=value or KIND.name=value, got {text!r}")
        if not group or group in (kind, name) or name.startswith(f"{group}-"):
            arguments[flag] = value
    own = {flag: value for flag, value in entry.items() if flag not in ("name", "script", "minutes", key)}
    return Run(name, kind, subject, float(minutes), arguments | own)


def command(run: Run, folder: Path, gpu: str) -> list[str]:
    script = SCRIPTS[run.script]
    flags = {**run.arguments, **script.flags(run, folder, gpu)}
    words = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
    return [sys.executable, str(EXAMPLES / script.path), run.subject, *words]


def carry_out(run: Run, folder: Path, gpu: str, grace: int, end: float) -> str:
    """`done`, `there already`, `too long`, `interrupted` or `failed`; `end` is of the clock `time.monotonic`."""
    script = SCRIPTS[run.script]
    if script.done(run, folder):
        return "there already"
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if gpu != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    too_late = time.monotonic() + 60 * run.minutes + grace
    with (folder / "run.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command(run, folder, gpu), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(max(0.0, min(too_late, end) - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if code is None:
        return "interrupted" if end < too_late else "too long"
    return "done" if code == 0 and script.done(run, folder) else "failed"


def _end(process: subprocess.Popen) -> None:
    """Ends a process, if it has not ended, with time to save what it has."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(argv: list[str] | None = None) -> dict[str, str]:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        # A plan is a list; what recipes.py reads is a mapping of arguments.
        argv = ["--plan", *argv]
    a = parse_arguments(QueueArguments, argv)
    if a.stop_after is not None and not 0 < a.stop_after < math.inf:
        raise ValueError(f"stop_after must be above 0, got {a.stop_after}")
    runs = read_plan(a.plan, a.only, a.set)
    end = math.inf if a.stop_after is None else time.monotonic() + 60 * a.stop_after
    output, lock, outcomes = Path(a.output_dir), threading.Lock(), {}
    output.mkdir(parents=True, exist_ok=True)
    waiting = list(runs)

    def work(gpu: str) -> None:
        while True:
            with lock:
                if not waiting or time.monotonic() >= end:
                    return
                run = waiting.pop(0)
            begin = time.monotonic()
            outcome = carry_out(run, output / run.name, gpu, a.grace, end)
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
