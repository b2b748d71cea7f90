"""Trains several tasks at the same time on one machine, one process each, and sums them up.

    python examples/classification/run_tasks.py text=aclImdb_v1.tar.gz image=pixels.npy.xz,labels.npy \
        listops=generated pathfinder=generated speech=words.npz.xz --output_dir outputs/tasks \
        --set max_minutes=8 --set text.batch_size=32

Each argument `TASK=DATA` is a task and its --data_path (image: and, behind a comma, its --labels_path). Writes to
`output_dir` a folder a task, its output as `TASK.log`, and `summary.json`. A task that fails does not stop the others.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import os
import shlex
import signal
import subprocess
import tarfile
import time

from safe_files import read_json_object, replacing, write_json

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent.parent / "configuration/recipes/classification"
RECIPE_NAMES = {
    "text": "lra-text", "image": "lra-image", "listops": "lra-listops", "pathfinder": "lra-pathfinder",
    "pathx": "lra-pathx", "retrieval": "lra-retrieval", "speech": "speech-commands",
}  # fmt: skip
RESULTS = ("results.json", "confusion_matrix.png", "activations.png")
# A line a minute says that a long run is alive; of a log that is collected, its end matters.
NEWS_SECONDS = 60
LOG_BYTES = 1_000_000


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK=DATA", help=f"a task: {', '.join(RECIPE_NAMES)}")
    parser.add_argument("--output_dir", required=True, type=Path, help="must be new or empty, unless a task resumes")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--published", action="store_true", help="the published recipes instead of the short ones")
    kinds.add_argument("--half_hour", action="store_true", help="the recipes for 30 minutes instead of the short ones")
    parser.add_argument(
        "--set", action="append", default=[], metavar="[TASK.]FLAG=VALUE",
        help="a flag of train.py, for all tasks or for one of them; may be repeated",
    )  # fmt: skip
    parser.add_argument("--limit_minutes", type=float, help="tasks still running then are ended")
    parser.add_argument(
        "--collect", type=Path, metavar="FILE.tar.gz", help="packs summary, results, pictures and logs"
    )
    return parser.parse_args(argv)


def read_settings(tasks: list[str], items: list[str]) -> dict[str, dict[str, str]]:
    """Flags of each task; those for one task come after those for all, and win."""
    settings: dict[str, dict[str, str]] = {task: {} for task in tasks}
    general: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        task, dot, flag = name.rpartition(".")
        if not equals or not flag or (dot and task not in settings):
            raise ValueError(
                f"--set {item!r} must be FLAG=VALUE or TASK.FLAG=VALUE with one of the tasks {', '.join(tasks)}"
            )
        (settings[task] if dot else general)[flag] = value
    return {task: general | own for task, own in settings.items()}


def read_tasks(items: list[str]) -> dict[str, list[str]]:
    """Paths of each task's data."""
    found: dict[str, list[str]] = {}
    for item in items:
        task, equals, paths = item.partition("=")
        if not equals or not paths or task not in RECIPE_NAMES:
            raise ValueError(f"{item!r} must be TASK=DATA, with a task of {', '.join(RECIPE_NAMES)}")
        if task in found:
            raise ValueError(f"task {task!r} is named twice")
        found[task] = paths.split(",")
        if len(found[task]) != (2 if task == "image" else 1):
            wanted = "PIXELS,LABELS" if task == "image" else "one path"
            raise ValueError(f"task {task!r} needs {wanted}, got {paths!r}")
    return found


def command(task: str, paths: list[str], flags: dict[str, str], output: Path, folder: str) -> list[str]:
    """The command line of one task, with paths relative to the working folder where they lie in it.

    Args:
        folder: of the recipe, beside the published ones.
    """
    recipe = RECIPES / folder / f"{RECIPE_NAMES[task]}.yaml"
    if not recipe.is_file():
        raise ValueError(f"task {task!r} has no recipe {recipe.name!r} for {folder} runs")
    named = dict(zip(("data_path", "labels_path"), paths, strict=False)) | {"output_dir": str(output)} | flags
    here = Path.cwd()
    script, recipe = (
        str(path.relative_to(here) if path.is_relative_to(here) else path) for path in (HERE / "train.py", recipe)
    )
    return [script, recipe, *(part for name, value in named.items() for part in (f"--{name}", value))]


def last_line(log: Path) -> str:
    """What the end of a log shows; progress bars overwrite their line."""
    with log.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 2000))
        lines = stream.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:150] for line in reversed(lines) if line.strip()), "")


def run_all(commands: dict[str, list[str]], output: Path, limit: float | None) -> dict[str, int]:
    """Runs all commands together, their output into `TASK.log`; exit codes by task."""
    # Left to itself, every process would start a thread for every core.
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    environment = {"OMP_NUM_THREADS": threads, "TQDM_MININTERVAL": "2"} | os.environ
    start, news, running, logs = time.monotonic(), NEWS_SECONDS, {}, {}
    try:
        for task, line in commands.items():
            logs[task] = (output / f"{task}.log").open("ab")
            running[task] = subprocess.Popen(
                [sys.executable, *line], stdout=logs[task], stderr=subprocess.STDOUT, env=environment
            )
        while any(process.poll() is None for process in running.values()):
            time.sleep(0.2)
            seconds = time.monotonic() - start
            if limit is not None and seconds > 60 * limit:
                break
            if seconds > news:
                news += NEWS_SECONDS
                for task, process in running.items():
                    if process.poll() is None:
                        print(f"[{seconds / 60:.0f} min] {task}: {last_line(output / f'{task}.log')}", flush=True)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        for process in running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in logs.values():
            log.close()
    return {task: process.returncode for task, process in running.items()}


def summarise(commands: dict[str, list[str]], codes: dict[str, int], output: Path, began: float) -> list[dict]:
    """One entry a task: the results that it wrote since `began` (seconds, as files have it), or the end of what it
    printed.

    Results are the last that a task writes: one that was ended after that has not failed.
    """
    summary = []
    for task, line in commands.items():
        entry: dict = {"task": task, "command": shlex.join(["python", *line]), "exit_code": codes[task]}
        path = output / task / "results.json"
        if path.is_file() and (codes[task] == 0 or path.stat().st_mtime >= began):
            entry["results"] = read_json_object(path)
        else:
            entry["error"] = last_line(output / f"{task}.log")
        summary.append(entry)
    return summary


def print_table(summary: list[dict]) -> None:
    for entry in summary:
        found = entry.get("results")
        if found is None:
            print(f"{entry['task']}: failed (exit code {entry['exit_code']}): {entry['error']}")
            continue
        rates = " ".join(f"{100 * rate:.0f}" for rate in found["activation_rate_by_layer"])
        print(
            f"{entry['task']}: test {found['test_accuracy']:.2%}, validation {found['validation_accuracy']:.2%} at "
            f"step {found['best_step']} of {found['steps']}, {found['minutes']:.1f} min, "
            f"{found['tokens_per_second']:,.0f} tokens/s, activated % by layer: {rates}"
        )
        print(f"    {entry['command']}")


def collect(summary: list[dict], output: Path, target: Path) -> None:
    """Packs what is worth keeping without the models."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial, tarfile.open(partial, "w:gz") as tar:
        tar.add(output / "summary.json", "summary.json")
        for entry in summary:
            task = entry["task"]
            for name in RESULTS:
                if (output / task / name).is_file():
                    tar.add(output / task / name, f"{task}/{name}")
            log = output / f"{task}.log"
            with log.open("rb") as stream:
                size = log.stat().st_size
                stream.seek(max(0, size - LOG_BYTES))
                info = tarfile.TarInfo(f"{task}.log")
                info.size, info.mtime = min(size, LOG_BYTES), int(time.time())
                tar.addfile(info, stream)


def _stop(number, frame):
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """0 if every task ended well, else 1."""
    a = parse(argv)
    tasks = read_tasks(a.tasks)
    settings = read_settings(list(tasks), a.set)
    folder = "" if a.published else "half-hour" if a.half_hour else "short"
    commands = {
        task: command(task, paths, settings[task], a.output_dir / task, folder) for task, paths in tasks.items()
    }
    a.output_dir.mkdir(parents=True, exist_ok=True)
    before, began = signal.signal(signal.SIGTERM, _stop), time.time()
    try:
        codes = run_all(commands, a.output_dir, a.limit_minutes)
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = summarise(commands, codes, a.output_dir, began)
    write_json(a.output_dir / "summary.json", summary)
    print_table(summary)
    if a.collect is not None:
        collect(summary, a.output_dir, a.collect)
        print(f"collected: {a.collect}")
    return int(any("error" in entry for entry in summary))


if __name__ == "__main__":
    sys.exit(main())
