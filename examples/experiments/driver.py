"""Makes the runs of a plan: one after the other in this process, or several at a time in processes of their own.

A run of a small model waits for its launches, so one device serves many of them. A worker process takes run after run:
imports and compiled kernels are paid for once.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from example_paths import write_text
from plan import Planned, Results, in_order
from run_data import Sources, prepare
from run_recipe import RunRecipe
from runs import execute

WORKER = Path(__file__).with_name("worker.py")
RESULTS, FAILURES, LOG, MODELS = "results.jsonl", "failures.jsonl", "workers.log", "models"


@dataclass(frozen=True)
class Settings:
    """How runs are made.

    Attributes:
        jobs: runs at a time; 1 makes them in this process.
        minutes: after this no run is started; None for no limit.
        device: a torch device.
        threads: of torch on the CPU, in each process.
    """

    sources: Sources
    jobs: int = 1
    minutes: float | None = None
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self):
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")


class Queue:
    """Hands out runs to threads: in order, none before the run that it depends on, timed ones with nothing beside."""

    def __init__(self, waiting: list[Planned], results: Results, settings: Settings):
        self.waiting, self.results = waiting, results
        self.deadline = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
        self.running: set[str] = set()
        self.alone = False
        self.failed: dict[str, str] = {}
        self.changed = threading.Condition()

    def take(self) -> Planned | None:
        """The next run, or None when there is none left or the time is up."""
        with self.changed:
            while True:
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    return None
                self._drop_orphans()
                if not self.waiting:
                    return None
                run = self._ready()
                if run is not None:
                    self.waiting.remove(run)
                    self.running.add(run.key)
                    self.alone = run.alone
                    return run
                self.changed.wait()

    def _ready(self) -> Planned | None:
        if self.alone and self.running:
            return None
        for run in self.waiting:
            if run.alone and self.running:
                return None
            if run.rate_like is None or run.rate_like.key in self.results.records:
                return run
        return None

    def _drop_orphans(self) -> None:
        """Runs whose model run has failed, or is not in the plan, cannot be made."""
        coming = {run.key for run in self.waiting} | self.running | self.results.records.keys()
        for run in [run for run in self.waiting if run.rate_like and run.rate_like.key not in coming]:
            self.waiting.remove(run)
            self.failed[run.key] = f"the run {run.rate_like.key}, whose rate it takes over, was not made"

    def finish(self, run: Planned, record: dict[str, Any] | None, error: str | None) -> None:
        with self.changed:
            self.running.discard(run.key)
            try:
                if error is None:
                    self.results.add(record)
            except (OSError, ValueError) as failure:
                error = f"the record cannot be written: {failure}"
            if error is not None:
                self.failed[run.key] = error
            self.changed.notify_all()


class LocalWorker:
    """Makes runs in this process."""

    def __init__(self, settings: Settings):
        self.settings = settings
        torch.set_num_threads(settings.threads)

    def __call__(self, recipe: RunRecipe, keep: Path | None = None) -> dict[str, Any]:
        return execute(recipe, self.settings.sources, torch.device(self.settings.device), keep)

    def close(self) -> None:
        pass


class ProcessWorker:
    """Makes runs in another process, by lines of JSON. One that has died is replaced by the next call."""

    def __init__(self, settings: Settings, log: Path):
        self.settings, self.log = settings, log
        self.process: subprocess.Popen | None = None
        self._start()

    def _start(self) -> None:
        with self.log.open("a", encoding="utf-8") as stream:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True,
            )  # fmt: skip
        self._send({"device": self.settings.device, "threads": self.settings.threads, **asdict(self.settings.sources)})

    def _send(self, values: dict) -> None:
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()

    def __call__(self, recipe: RunRecipe, keep: Path | None = None) -> dict[str, Any]:
        """Raises RuntimeError where the run failed; the process is ended, for its device may be in no state to go
        on."""
        if self.process is None:
            self._start()
        try:
            self._send({"recipe": recipe.flat(), "keep": None if keep is None else str(keep)})
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"the worker process died; {self.log.name} may say why"}
        if "error" in answer:
            self.close()
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def make_runs(
    planned: list[Planned], output: Path, settings: Settings, command: str, say: Callable[[str], None] = print
) -> Results:
    """Makes the runs whose records are not in `output`/results.jsonl yet; `command` is kept in the records.

    Raises ValueError where that file has runs on other data; FileNotFoundError and ValueError for data that are not
    there.
    """
    results = Results(output / RESULTS)
    names = [settings.sources.train_file, settings.sources.validation_file]
    data = {"files": [Path(name).name if name else None for name in names]}
    for record in results.records.values():
        if record["recipe"]["task"] == "lm" and record["data"] != data:
            raise ValueError(f"{results.path} has runs on {record['data']['files']}, not on {data['files']}")
    runs = in_order(planned)

    def kept_in(run: Planned) -> Path | None:
        return output / MODELS / run.key if run.keep else None

    def is_made(run: Planned) -> bool:
        return run.key in results.records and (not run.keep or (kept_in(run) / "config.json").is_file())

    waiting = [run for run in runs if not is_made(run)]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them made before")
    if not waiting:
        return results
    for run in waiting:
        prepare(run.recipe, settings.sources)
    output.mkdir(parents=True, exist_ok=True)
    (output / FAILURES).unlink(missing_ok=True)
    queue = Queue(list(waiting), results, settings)
    jobs, began = min(settings.jobs, len(waiting)), time.monotonic()

    def work(worker: LocalWorker | ProcessWorker) -> None:
        while (run := queue.take()) is not None:
            record, error = None, None
            try:
                facts = {"key": run.key, "data": data, "command": command, "jobs": 1 if run.alone else jobs}
                record = facts | worker(run.resolved(results.records), kept_in(run))
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
            queue.finish(run, record, error)
            outcome = error or f"{record['seconds']:.0f} s, {record.get('quality') or 'speed'}"
            say(f"[{(time.monotonic() - began) / 60:.1f} min, {len(queue.waiting)} waiting] {run.labels}: {outcome}")

    if jobs == 1:
        work(LocalWorker(settings))
    else:
        _in_threads(work, [ProcessWorker(settings, output / LOG) for _ in range(jobs)])
    if queue.failed:
        lines = [json.dumps({"key": key, "error": error}) + "\n" for key, error in queue.failed.items()]
        write_text(output / FAILURES, "".join(lines))
        say(f"{len(queue.failed)} runs failed: {output / FAILURES}")
    if queue.waiting:
        say(f"{len(queue.waiting)} runs were not started; the same command goes on with them")
    return results


def _in_threads(work: Callable, workers: list[ProcessWorker]) -> None:
    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.close()
