"""transformers' Trainer in a run's own folder: checkpoints that are whole or not there, resumed from without running
what they hold, and signals that end a training with one."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from run_folder import PARTIAL, RunFolder, no_unpickling, verify_checkpoint, weights_only
from safe_files import read_json_object
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from hub_upload.folders import put_in_place
from modeling_seqboat.training_seqboat import SeqBoatTrainer

STATE_FILE = "trainer_state.json"


class StopOnSignal(TrainerCallback):
    """Ends a training after the step in which Ctrl-C or SIGTERM came, with a checkpoint; the second one ends it at
    once.

    Attributes:
        stopped: whether that has happened with steps left to do.
    """

    def __init__(self):
        self.stopped = self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        # Schedulers send SIGTERM before they kill.
        previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, number, frame):
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = self._asked
        if args.world_size > 1:
            # A signal may reach the processes in different steps.
            count = torch.tensor(float(asked), device=args.device)
            dist.all_reduce(count)
            asked = count.item() > 0
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"
        return control


class BestOfFolder(TrainerCallback):
    """After a resume, the best checkpoint is the one of that step beside the checkpoint, whatever path the state
    names."""

    def __init__(self, checkpoint: Path):
        self.folder = checkpoint.parent

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = None
        if state.best_global_step is None:
            return
        best = self.folder / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            verify_checkpoint(best)
            state.best_model_checkpoint = str(best)
        else:
            print(f"the best checkpoint so far, {best}, is gone: the next validation counts as the best one")
            state.best_metric = state.best_global_step = None


class RunTrainer(SeqBoatTrainer):
    """SeqBoatTrainer for `train_in`.

    Attributes:
        also: called with the folder of each checkpoint before it is closed, to put more into it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The Trainer's own rotation would go by file times and delete what it does not know.
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._folder: RunFolder | None = None
        self._stage: Path | None = None
        self.also: Callable[[Path], None] | None = None
        self.stop = StopOnSignal()
        self.add_callback(self.stop)

    def train_in(self, folder: RunFolder, checkpoint: Path | None = None) -> TrainOutput:
        """Trains, with checkpoints in `folder`, from a verified checkpoint on if one is given."""
        self._folder = folder
        if checkpoint is not None:
            self.add_callback(BestOfFolder(checkpoint))
        with self.stop.listening(), no_unpickling():
            return self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def farewell(self) -> str:
        """What to say of a training that was stopped."""
        step = self.state.global_step
        saved = (
            "nothing is saved (save_strategy no)" if self.args.save_strategy == "no" else f"checkpoint-{step} is saved"
        )
        return f"stopped after step {step}; {saved}"

    def keep_model(self, folder: RunFolder, name: str, also: Callable[[Path], None] | None = None) -> None:
        """Saves the model to `name` in the folder, in one step; `also` puts more into it. Every process has to call
        it."""
        stage = folder.path / f"{PARTIAL}{name}"
        self.save_model(str(stage))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if also is not None:
                also(stage)
            put_in_place(stage, folder.path / name)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._stage is None else str(self._stage)

    def _save_checkpoint(self, model, trial) -> None:
        if self._folder is None:
            super()._save_checkpoint(model, trial)
            return
        step, best, home = self.state.global_step, self.state.best_model_checkpoint, self._folder.path
        name = f"checkpoint-{step}"
        self._stage = home / f"{PARTIAL}{name}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            # Seen from the place it is written to, the best checkpoint is this one or none.
            chosen = home / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(chosen) if chosen.name == name or chosen.is_dir() else best
            if self.args.should_save:
                self.state.save_to_json(str(self._stage / name / STATE_FILE))
                if self.also is not None:
                    self.also(self._stage / name)
                self._folder.seal(self._stage / name, step, self.args.world_size, {})
                kept = self.state.best_model_checkpoint
                self._folder.keep_newest(self._limit, None if kept is None else Path(kept))
        finally:
            if self.args.should_save:
                shutil.rmtree(self._stage, ignore_errors=True)
            self._stage = None
        self.accelerator.wait_for_everyone()

    def get_batch_samples(self, *args, **kwargs):
        # Resumed from its last step, the Trainer would do one more before it looks at max_steps.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with weights_only(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            with weights_only(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            with weights_only(Path(checkpoint)):
                super()._load_rng_state(checkpoint)


def check_trainer_checkpoint(checkpoint: Path) -> None:
    """Raises ValueError where a verified checkpoint is not one that the Trainer goes on from."""
    path = checkpoint / STATE_FILE
    values = read_json_object(path)
    try:
        state = TrainerState(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no state of a Trainer: {error}") from error
    for name in ("global_step", "best_global_step", "max_steps", "train_batch_size"):
        value = getattr(state, name)
        if not (value is None or type(value) is int and value >= 0):
            raise ValueError(f"{str(path)!r}: {name}={value!r} is no number of steps")
