"""Training for a stated time: the learning rate follows the clock, and what comes after the last step still fits."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

# The examples share this module, which lies one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from safe_files import read_json_object, write_json  # noqa: E402

CLOCK_FILE = "clock.json"
# Share of the budget that is kept for the last checkpoint, the pictures and the end of the process.
MARGIN = 0.02
# Estimates of an evaluation are stretched by this.
CAUTION = 1.2


class TimeBudget(TrainerCallback):
    """Ends a training so early that the last validation, and the test after it, end within the budget.

    A row of the test is taken to cost what one of the latest validation did. Before there were two of them (a GPU
    compiles during the first) what the quickest training step spent on a row is a bound as well.

    Args:
        minutes: of all calls of a run together, from its data to its results.
        start: the clock's reading when this call began.
        rows: of the validation and the test together; step_rows: of a training step.
        checkpoint: the folder that a resumed run goes on from.
        clock: seconds that go on; another one for tests.
    """

    def __init__(
        self,
        minutes: float,
        start: float,
        rows: int,
        step_rows: int,
        checkpoint: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds, self.rows, self.step_rows, self.clock = 60 * minutes, rows, step_rows, clock
        self._begin: float | None = None
        self._progress, before = 0.0, 0.0
        if checkpoint is not None:
            path = Path(checkpoint) / CLOCK_FILE
            if not path.is_file():
                raise ValueError(f"checkpoint {checkpoint!r} is of a run without max_minutes: it has no {CLOCK_FILE}")
            saved = read_json_object(path)
            values = [saved.get(name) for name in ("spent", "begin", "progress")]
            if not all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in values):
                raise ValueError(
                    f"{str(path)!r} must hold spent, begin and progress, numbers from 0 on, got {saved!r}"
                )
            before, self._begin, self._progress = values
            if before >= self.seconds:
                raise ValueError(
                    f"max_minutes {minutes} is used up: checkpoint {checkpoint!r} was written after "
                    f"{before / 60:.1f} minutes"
                )
        self._start = start - before
        self._evaluations: list[float] = []
        self._steps: list[float] = []
        self._latest: float | None = None

    def spent(self) -> float:
        """Seconds of all calls together."""
        return self.clock() - self._start

    def progress(self) -> float:
        """Share of the time for training that is over, from 0 to 1; it never falls. The first call starts it."""
        now = self.spent()
        if self._begin is None:
            self._begin = now
        whole = self.seconds - self._reserve() - self._begin
        share = (now - self._begin) / whole if whole > 0 else 1.0
        self._progress = max(self._progress, min(1.0, share))
        return self._progress

    def _reserve(self) -> float:
        """Seconds between the last step and the end."""
        a_row = min(self._steps[1:], default=0.0) / self.step_rows
        if len(self._evaluations) > 1:
            a_row = self._evaluations[-1]
        elif self._evaluations:
            a_row = min(a_row, self._evaluations[0])
        return MARGIN * self.seconds + CAUTION * a_row * self.rows

    def evaluated(self, rows: int, seconds: float) -> None:
        """Takes note of a validation."""
        self._evaluations.append(seconds / max(rows, 1))
        # Its time is no training step's.
        self._latest = None

    def on_step_end(self, args, state, control, **kwargs):
        now = self.clock()
        if self._latest is not None:
            self._steps.append(now - self._latest)
        self._latest = now
        if self.progress() >= 1.0:
            control.should_evaluate = control.should_save = control.should_training_stop = True
        return control

    def write(self, checkpoint: Path) -> None:
        """Puts the clock into a checkpoint's folder."""
        write_json(checkpoint / CLOCK_FILE, {"spent": self.spent(), "begin": self._begin, "progress": self._progress})

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # `RunTrainer` has it written before the checkpoint is closed.
        if not (checkpoint / CLOCK_FILE).exists():
            self.write(checkpoint)
