"""What a run of `train_lm.py` keeps: its progress and clock, checkpoints to resume from, models."""

import math
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from lm_arguments import TrainArguments
from transformers import PreTrainedConfig


class Progress:
    """What a checkpoint keeps besides model, optimizer, schedule and random states."""

    def __init__(self, max_minutes: float | None = None):
        self.step = 0
        self.best = math.inf
        self.seconds = 0.0
        self.max_minutes = max_minutes

    @property
    def time_share(self) -> float:
        """Used part of `max_minutes`; 0 without a limit."""
        return 0.0 if self.max_minutes is None else self.seconds / (60 * self.max_minutes)

    def state_dict(self) -> dict:
        return {"step": self.step, "best": self.best, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.best, self.seconds = state["step"], state["best"], state.get("seconds", 0.0)


class Clock:
    """Seconds of training, those of the runs before included; stands still while `paused`."""

    def __init__(self, before: float):
        self.before = before
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._start

    @contextmanager
    def paused(self):
        # What is queued on a GPU is training that would be counted as part of the pause.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pause = time.perf_counter()
        yield
        self._start += time.perf_counter() - pause


class Saver:
    """Writes checkpoints and models of a run."""

    def __init__(self, a: TrainArguments, accelerator: Accelerator, model, tokenizer, config: PreTrainedConfig):
        self.a, self.accelerator, self.model = a, accelerator, model
        self.tokenizer, self.config = tokenizer, config
        self.output = Path(a.output_dir)

    def checkpoint(self, step: int) -> None:
        folder, partial = self.output / f"checkpoint-{step}", self.output / f"partial-{step}"
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.config.save_pretrained(partial)
            # Renamed last: an interrupted save never looks like a checkpoint.
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            folders = sorted(self.output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            for old in folders[: -self.a.save_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def model_folder(self, name: str, model=None) -> None:
        """Writes the trained model, or another one, to `name`."""
        model = self.model if model is None else model
        state = self.accelerator.get_state_dict(model)
        if self.accelerator.is_main_process:
            unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            unwrapped.save_pretrained(self.output / name, state_dict=state)
            self.tokenizer.save_pretrained(self.output / name)
        self.accelerator.wait_for_everyone()
