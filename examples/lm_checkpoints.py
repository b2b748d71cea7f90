"""What a run of `train_lm.py` keeps: its progress and clock, checkpoints to resume from, models."""

import math
import random
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load, set_seed
from lm_arguments import TrainArguments
from run_folder import PARTIAL, RunFolder, read_manifest, weights_only
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import PreTrainedConfig

AVERAGED_FILE = "averaged.safetensors"


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
        best = None if math.isinf(self.best) else self.best
        return {"step": self.step, "best": best, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for what `state_dict` does not give."""
        step, best, seconds = (state.get(name) for name in ("step", "best", "seconds"))
        if type(step) is not int or step < 0 or not _is_number(seconds) or not (best is None or _is_number(best)):
            raise ValueError(f"step={step!r}, best={best!r}, seconds={seconds!r} is no progress of a run")
        self.step, self.best, self.seconds = step, math.inf if best is None else best, seconds


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


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
    """Writes checkpoints and models of a run.

    Args:
        folder: where they go; by default the folder of the arguments, for a run of its own.
        states: what a checkpoint keeps as JSON beside model, optimizer and random states, by name; each has
            `state_dict` and `load_state_dict`, and `gather` where the processes have different ones.
        averaged: a model that is an average of the trained one's weights, or None.
        rows: that all processes together read in a step.
    """

    def __init__(
        self,
        a: TrainArguments,
        accelerator: Accelerator,
        model,
        tokenizer,
        config: PreTrainedConfig,
        folder: RunFolder | None = None,
        states: dict[str, Any] | None = None,
        averaged: torch.nn.Module | None = None,
        rows: int | None = None,
    ):
        self.a, self.accelerator, self.model, self.rows = a, accelerator, model, rows
        self.tokenizer, self.config = tokenizer, config
        self.folder, self.states = folder or RunFolder(Path(a.output_dir)), states or {}
        self.averaged = averaged

    def checkpoint(self, step: int) -> None:
        stage = self.folder.path / f"{PARTIAL}checkpoint-{step}"
        try:
            self.accelerator.save_state(str(stage))
            for kept in self.states.values():
                if hasattr(kept, "gather"):
                    kept.gather(self.accelerator)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.config.save_pretrained(stage)
                if self.averaged is not None:
                    save_model(self.averaged, str(stage / AVERAGED_FILE))
                state = {name: kept.state_dict() for name, kept in self.states.items()}
                self.folder.seal(stage, step, self.accelerator.num_processes, state, self.rows)
                self.folder.keep_newest(self.a.save_total_limit)
        # torch and safetensors put a full disk into words of their own, which name no file.
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(f"checkpoint-{step} cannot be written to {str(self.folder.path)!r}: {error}") from error
        finally:
            if self.accelerator.is_main_process:
                shutil.rmtree(stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def model_folder(self, name: str, model=None) -> None:
        """Writes the trained model, or another one, to `name`."""
        model = self.model if model is None else model
        state = self.accelerator.get_state_dict(model)
        if self.accelerator.is_main_process:
            unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            try:
                with self.folder.replacing(name) as stage:
                    unwrapped.save_pretrained(stage, state_dict=state)
                    self.tokenizer.save_pretrained(stage)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise OSError(f"{name} cannot be written to {str(self.folder.path)!r}: {error}") from error
        self.accelerator.wait_for_everyone()


def resume(
    accelerator: Accelerator,
    checkpoint: Path,
    states: dict[str, Any],
    averaged: torch.nn.Module | None = None,
    seed: int = 0,
) -> None:
    """Takes up model, optimizer, random states, `states` and averaged weights of a checkpoint that `find_checkpoint`
    has verified. Written by another number of processes, it has no random states for this one: `seed` makes new ones.

    Nothing in it is executed. Raises ValueError where it holds something else than this run needs.
    """
    manifest = read_manifest(checkpoint)
    saved = manifest["state"]
    with weights_only(checkpoint):
        try:
            accelerator.load_state(str(checkpoint))
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"its optimizer has other groups of parameters ({error}): resume with the optimizer, muon_split, "
                "router_learning_rate and qk_learning_rate of its run"
            ) from error
        # Accelerate leaves the random states as they are if it cannot set them.
        if manifest["processes"] == accelerator.num_processes:
            _restore_random_states(checkpoint / f"random_states_{accelerator.process_index}.pkl")
        else:
            # There is not one for each process. Dropout goes on with other masks, but not with those of the beginning.
            set_seed(seed + manifest["step"], device_specific=True)
        if averaged is not None:
            if not (checkpoint / AVERAGED_FILE).is_file():
                raise ValueError(f"it has no {AVERAGED_FILE}: its run had no average_decay")
            load_model(averaged, checkpoint / AVERAGED_FILE)
        unknown = sorted(set(saved) - set(states))
        if unknown:
            raise ValueError(f"it keeps {', '.join(unknown)} of its run, which this run does not have")
        for name, kept in states.items():
            kept.load_state_dict(_like(kept.state_dict(), saved.get(name), name))


def _like(own: dict, saved: Any, name: str) -> dict:
    """`saved`, if it has the keys of `own` and plain numbers where `own` has them."""
    if not isinstance(saved, dict) or set(saved) != set(own):
        raise ValueError(f"its {name} must hold {', '.join(own)}, got {saved!r}")
    for key, value in saved.items():
        mine, theirs = (x if isinstance(x, list) else [x] for x in (own[key], value))
        if len(mine) != len(theirs) or not all(x is None or type(x) is bool or _is_number(x) for x in theirs):
            raise ValueError(f"its {name} has {key}={value!r}, this run's is {own[key]!r}")
    return saved


def _restore_random_states(path: Path) -> None:
    states = load(path, map_location="cpu")
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if torch.cuda.is_available():
        if "torch_cuda_manual_seed" not in states:
            raise ValueError(
                f"{path.name} has no random states of a GPU: it was written on the CPU, go on there (--cpu)"
            )
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])
