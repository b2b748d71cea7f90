"""Pretrains a causal SeqBoat with Accelerate, on one process or many.

    python examples/train_lm.py configuration/recipes/shakespeare.yaml --output_dir outputs/lm
    accelerate launch --config_file configuration/accelerate/ddp_cpu.yaml examples/train_lm.py RECIPE --flag value

`--context_parallel N` has N processes share each row, a part of its columns each, where a row is too long for one.

Writes to `output_dir`: `checkpoint-N/` to resume from, `best/` (the model with the lowest validation loss), `final/`,
`metrics.jsonl`, `training_record.json` and TensorBoard logs. Ctrl-C, or SIGTERM, saves a checkpoint after the current
step, or of several processes the next one, and ends. A checkpoint is read without running anything in it, and resumed
from only if every file is as it was written.

`--teacher_labels FOLDER` learns from another model's predictions too, which `teacher_labels.py` has written.

`--average_decay` keeps an average of the weights beside them, scores it at each validation and writes it to
`averaged/`. A layer whose router stops choosing is an entry `router/collapse` of `metrics.jsonl`.

`--init_from FOLDER` starts from a trained model, with a new optimizer and schedule; a run that was interrupted goes on
by `--resume_from_checkpoint`.

`--max_minutes` ends the run after that much training time: the clock stops during validation and saving, a resumed run
goes on with the time already used, and the learning rate falls by the share of time or of steps that is used,
whichever is larger. `--model_type llama` trains a LlamaForCausalLM in the same way, for comparison.
"""

import script_start  # noqa: F401, before torch

# isort: split
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, set_seed
from lm_arguments import MUON_ARGUMENTS, TrainArguments, check_arguments, check_graphs, check_parts
from lm_checkpoints import Clock, Progress, Saver, resume
from lm_data import HeldOut, StreamPlaces, build_loader, load_data
from lm_parts import Parts
from lm_teacher import TaughtWindows, TeacherLoss, read_labels
from optimizers import build_optimizer
from recipes import (
    check_launch,
    check_model_folder,
    check_output_folder,
    check_vocabulary,
    find_checkpoint,
    json_object,
    parse_arguments,
    refuse_unknown_fields,
    start_model,
)
from run_folder import RunFolder, open_log, take_folder_once
from run_record import hardware, published_command, training_before, write_record
from text_data import StreamedBlocks, load_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.graphed_step_seqboat import GraphedStep, GraphedUpdate
from modeling_seqboat.training_seqboat import (
    CollapseWarning,
    RouterBudget,
    RouterMonitor,
    statistics_as_logs,
)


def build_config(a: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of the model to train. Raises ValueError for fields that its kind does not have."""
    overrides = json_object(a.config_overrides, "config_overrides")
    refuse_unknown_fields(overrides, SeqBoatConfig if a.model_type == "seqboat" else LlamaConfig)
    if a.init_from is not None:
        return config_to_start_from(a, overrides, tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if a.model_type == "seqboat":
        if a.tokenizer != "byte":
            overrides = {"vocab_size": len(tokenizer), **ids, **overrides}
        return SeqBoatConfig.from_preset(a.preset, **overrides)
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": a.sequence_length, **ids, **overrides}
    return LlamaConfig(**fields)


def config_to_start_from(a: TrainArguments, overrides: dict, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of the model `init_from`, changed by `overrides`. Raises ValueError and FileNotFoundError where the
    run cannot start from it."""
    check_model_folder(a.init_from)
    training_before(a.init_from)  # a record that cannot be read is refused now, not after the training
    config = AutoConfig.from_pretrained(a.init_from)
    if config.model_type != a.model_type:
        raise ValueError(
            f"init_from {a.init_from!r} is a {config.model_type!r} model, this run trains a {a.model_type!r}"
        )
    check_vocabulary(config, tokenizer)
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def build_model(a: TrainArguments, config: PreTrainedConfig, fresh: bool) -> nn.Module:
    """The model to train; `fresh`: a run at its start, with the weights of `init_from` if that is given."""
    kind = SeqBoatForCausalLM if a.model_type == "seqboat" else LlamaForCausalLM
    return start_model(kind, config, a.init_from if fresh else None)


def rate_factor(a: TrainArguments, step: int, time_share: float = 0.0) -> float:
    """Learning rate of step `step` (from 0) as a part of its peak; `time_share`: used part of `max_minutes`."""
    rise = 1.0
    if step < a.warmup_steps:
        rise = a.warmup_start + (1 - a.warmup_start) * (step + 1) / a.warmup_steps
    steps_done = max(0, step - a.warmup_steps) / max(1, a.max_steps - a.warmup_steps)
    done = min(1.0, max(steps_done, time_share))
    fall = done if a.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return min(rise, 1 - (1 - a.final_rate) * fall)


def check_sharding(a: TrainArguments, kind: DistributedType) -> None:
    """Raises ValueError for what needs whole parameters where they are in parts, or copies."""
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if a.optimizer == "muon":
            raise ValueError(f"optimizer muon takes whole matrices, which {kind.value} does not keep; use adamw")
        if a.average_decay is not None:
            raise ValueError(f"average_decay averages whole parameters, which {kind.value} does not keep")


def build_budget(a: TrainArguments, model: torch.nn.Module, accelerator: Accelerator) -> RouterBudget | None:
    """What holds the routers to the config's target rate; None where there is no target, or the loss has a term for
    it."""
    if not a.router_gain or getattr(model.config, "router_target_rate", None) is None:
        return None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "router_gain: DeepSpeed keeps parameters of its own and would undo its moves; give --router_gain 0"
        )
    return RouterBudget(model, a.router_gain)


def build_teacher(
    a: TrainArguments, model: torch.nn.Module, rows: Dataset, device: torch.device
) -> TeacherLoss | None:
    """Gives the model a loss that learns from the teacher's predictions too; None without `teacher_labels`."""
    if not isinstance(rows, TaughtWindows):
        return None
    own = model.loss_function
    share = 0.5 if a.teacher_share is None else a.teacher_share
    model.loss_function = TeacherLoss(own, share, rows.labels, a.batch_size, a.sequence_length, device)
    return model.loss_function


@torch.no_grad()
def evaluate(a: TrainArguments, accelerator: Accelerator, parts: Parts, model, held_out: HeldOut) -> float:
    """Bits per byte under a sliding context: of each row of `sequence_length` tokens only those after `eval_context`
    are scored, so that every scored token but the first rows' sees at least that many before it."""
    tokens = held_out.tokens
    length = min(a.sequence_length, len(tokens))
    context = min(a.eval_context or length // 2, length - 1)
    stride = length - context
    starts = list(range(0, max(1, min(len(tokens) - length + 1, a.eval_tokens)), stride))
    # Sharded models run in lockstep: every process takes equally many rows, repeated rows count nothing.
    world, rank = parts.data_size, parts.data_rank
    # Of the columns here, those whose next token is scored.
    here = parts.columns(length)
    first_scored, end = max(context - 1, here.start), min(length - 1, here.stop)
    scored = slice(first_scored - here.start, max(first_scored, end) - here.start)
    share = math.ceil(len(starts) / world)
    mine = [starts[i % len(starts)] for i in range(rank * share, (rank + 1) * share)]
    counted = [i < len(starts) for i in range(rank * share, (rank + 1) * share)]
    total = torch.zeros(2, dtype=torch.float32, device=accelerator.device)
    model.eval()
    for first in range(0, share, a.eval_batch_size):
        chosen = mine[first : first + a.eval_batch_size]
        rows = [torch.as_tensor(tokens[s : s + length].astype("int64")) for s in chosen]
        ids = torch.stack(rows).to(accelerator.device)
        with parts.running(model):
            logits = model(**parts.of({"input_ids": ids}), use_cache=False).logits[:, scored]
        targets = ids[:, here.start + 1 + scored.start : here.start + 1 + scored.stop]
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        weight = torch.tensor(counted[first : first + a.eval_batch_size], device=ids.device, dtype=torch.float32)
        losses = losses.view(targets.shape) * weight[:, None]
        total += torch.stack([losses.sum(), weight.sum() * targets.shape[1]])
    model.train()
    loss, count = accelerator.reduce(total, "sum").tolist()
    return loss / count / math.log(2) / held_out.bytes_per_token


class Agreement:
    """What all processes go by: whether any was asked to stop, and one reading of their clocks.

    Of several processes it is that of the step before, which has come to the host meanwhile: waiting for the present
    one would keep each host from launching the next step before its device is done.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.before = accelerator, None

    def __call__(self, asked: bool, seconds: float) -> tuple[bool, float]:
        if self.accelerator.num_processes == 1:
            return asked, seconds
        told, arrived = torch.tensor([float(asked), seconds]), None
        if self.accelerator.device.type == "cuda":
            mean = self.accelerator.reduce(told.pin_memory().to(self.accelerator.device, non_blocking=True), "mean")
            told, arrived = torch.empty(2, pin_memory=True), torch.cuda.Event()
            told.copy_(mean, non_blocking=True)
            arrived.record()
        else:
            told = self.accelerator.reduce(told, "mean")
        (read, ready), self.before = self.before or (told, arrived), (told, arrived)
        if ready is not None:
            ready.synchronize()
        asked_share, seconds = read.tolist()
        return asked_share > 0, seconds


def rows_of_a_step(a: TrainArguments, processes: int) -> int:
    return a.batch_size * a.gradient_accumulation_steps * (processes // a.context_parallel)


def device_memory(device: torch.device) -> float | None:
    """Peak GiB of accelerator memory, or None on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    a = parse_arguments(TrainArguments, argv)
    check_arguments(a)
    on_cpu = a.cpu or not torch.accelerator.is_available()
    check_launch(on_cpu)
    check_graphs(a, on_cpu)
    check_parts(a)
    tokenizer = load_tokenizer(a.tokenizer)
    config = build_config(a, tokenizer)
    rows = rows_of_a_step(a, int(os.environ.get("WORLD_SIZE", "1")))
    checkpoint = find_checkpoint(a.resume_from_checkpoint, a.output_dir, config, rows)
    check_output_folder(a.output_dir, checkpoint is not None, a.overwrite_output_dir)
    if a.teacher_labels is not None and config.loss_implementation == "liger":
        raise ValueError("teacher_labels cannot be used: loss_implementation 'liger' has no logits to compare")
    train_rows, held_out = load_data(a, tokenizer)
    if a.teacher_labels is not None:
        labels = read_labels(a.teacher_labels, train_rows.tokens, config.vocab_size)
        train_rows = TaughtWindows(train_rows.tokens, a.sequence_length, labels)
    if len(held_out["validation"].tokens) < 2:
        raise ValueError(f"there are {len(held_out['validation'].tokens)} validation tokens; at least 2 are needed")

    accelerator = Accelerator(
        # Told to use the CPU, Accelerate connects processes over gloo; else it would leave them unconnected.
        cpu=on_cpu,
        mixed_precision=a.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=a.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with="tensorboard",
        project_dir=a.output_dir,
        step_scheduler_with_optimizer=False,
    )
    check_sharding(a, accelerator.distributed_type)
    parts = Parts(accelerator, a.context_parallel, a.sequence_length)
    if a.cuda_graphs and accelerator.mixed_precision == "fp16":
        raise ValueError("cuda_graphs cannot be used: fp16 scales its loss outside the graph; use bf16")
    folder = take_folder_once(a.output_dir, checkpoint, a.overwrite_output_dir)
    try:
        return train(a, argv, accelerator, parts, tokenizer, config, folder, checkpoint, train_rows, held_out)
    finally:
        folder.close()


def train(
    a: TrainArguments,
    argv: list[str],
    accelerator: Accelerator,
    parts: Parts,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    folder: RunFolder,
    checkpoint: Path | None,
    train_rows: Dataset,
    held_out: dict[str, HeldOut],
) -> dict:
    """Builds the model, trains it and keeps it in `folder`."""
    set_seed(a.seed)
    model = build_model(a, config, fresh=checkpoint is None)
    parameters, averaged = model.num_parameters(), None
    if a.average_decay is not None:
        # Before anything is hooked to the model: the copy is not to run it.
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(a.average_decay))
        # The count of steps stays on the CPU, where asking for it waits for nothing.
        averaged.module.to(accelerator.device)
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monitor = RouterMonitor(model)
    budget = build_budget(a, model, accelerator)
    optimizer = build_optimizer(a, model, accelerator.device)
    if a.compile:
        model.compile()
    if accelerator.state.deepspeed_plugin is not None:
        # Accelerate reads it off a prepared DataLoader otherwise.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = a.batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress(a.max_minutes)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer.optimizer, lambda step: rate_factor(a, step, progress.time_share)
    )
    states = {"progress": progress, "schedule": schedule, **({"parts": parts} if a.context_parallel > 1 else {})}
    places = StreamPlaces(parts) if isinstance(train_rows, StreamedBlocks) else None
    if places is not None:
        states["stream"] = places
    if checkpoint is not None:
        resume(accelerator, checkpoint, states, averaged, a.seed)
        for group in optimizer.param_groups if a.optimizer == "muon" else ():
            # The groups are the checkpoint's now.
            group["row_beta"] = a.muon_row_beta or None
        if not (folder.path / "best").is_dir():
            # The model of that value lies elsewhere: this folder's best one is still to come.
            progress.best = math.inf
    loader = build_loader(a, parts, train_rows, progress.step * a.gradient_accumulation_steps, places)
    accelerator.init_trackers("tensorboard")
    if accelerator.is_main_process:
        accelerator.get_tracker("tensorboard", unwrap=True).add_text("run", folder.run, progress.step)
    # Every process draws its own dropout masks; a resumed run takes up the saved random states.
    if checkpoint is None:
        set_seed(a.seed, device_specific=True)
    rows = rows_of_a_step(a, accelerator.num_processes)
    saver = Saver(a, accelerator, model, tokenizer, config, folder, states, averaged, rows)
    teacher = build_teacher(a, accelerator.unwrap_model(model), train_rows, accelerator.device)
    result = Training(
        a, accelerator, parts, model, optimizer, schedule, progress, saver, monitor, held_out, budget, averaged,
        places, teacher,
    ).run(loader)  # fmt: skip
    monitor.close()
    if accelerator.is_main_process:
        write_record(folder.path, run_record(a, argv, accelerator, parts, progress, teacher))
    # Wrapped by DDP, a model holds on to the process group, and were it the last to do so, PyTorch's gloo could
    # deadlock.
    del model, optimizer, schedule, saver
    accelerator.free_memory()
    accelerator.end_training()
    accelerator.print(
        f"{parameters:,} parameters, {progress.step} steps, validation {result['validation_bits_per_byte']:.4f} "
        f"bits per byte (best {progress.best:.4f}), {result['tokens_per_second']:,.0f} tokens/s"
    )
    return result


def run_record(
    a: TrainArguments, argv: list[str], accelerator: Accelerator, parts: Parts, progress: Progress,
    teacher: TeacherLoss | None,
) -> dict:  # fmt: skip
    """What the model card tells of a run."""
    rows = rows_of_a_step(a, accelerator.num_processes)
    tokens = progress.step * rows * a.sequence_length
    precision = accelerator.mixed_precision
    return {
        "dataset": Path(a.train_file).name.split(".")[0] if a.train_file else a.dataset_name,
        "command": published_command("examples/train_lm.py", argv),
        "hardware": hardware(accelerator.device, accelerator.num_processes),
        "precision": {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}.get(
            precision, precision
        ),
        **training_before(a.init_from),
        "steps": progress.step,
        "tokens_seen": tokens,
        "sequence_length": a.sequence_length,
        "batch_size": rows,
        "tokens_per_step": rows * a.sequence_length,
        "training_hours": round(progress.seconds / 3600, 4),
        "tokens_per_second": round(tokens / progress.seconds) if progress.seconds else None,
        "optimizer": a.optimizer,
        "learning_rate": a.learning_rate,
        "router_learning_rate": a.router_learning_rate,
        **({} if a.qk_learning_rate is None else {"qk_learning_rate": a.qk_learning_rate}),
        **({name: getattr(a, name) for name in MUON_ARGUMENTS} if a.optimizer == "muon" else {}),
        **({} if a.average_decay is None else {"average_decay": a.average_decay}),
        **({} if teacher is None else {"teacher": teacher.teacher, "teacher_share": teacher.share}),
        "lr_scheduler_type": a.schedule,
        "warmup_steps": a.warmup_steps,
        "weight_decay": a.weight_decay,
        "betas": [a.beta1, a.beta2],
        "max_grad_norm": a.max_grad_norm,
        "seed": a.seed,
    }


@dataclass
class Training:
    """A run, from `progress.step` on.

    Attributes:
        budget: what holds the routers' rate, None where nothing or the loss does.
        averaged: an average of the weights, or None; places: of a streamed dataset, or None; teacher: the loss that
            has to know a batch's predictions, or None.
    """

    a: TrainArguments
    accelerator: Accelerator
    parts: Parts
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    progress: Progress
    saver: Saver
    monitor: RouterMonitor
    held_out: dict[str, HeldOut]
    budget: RouterBudget | None
    averaged: AveragedModel | None
    places: StreamPlaces | None
    teacher: TeacherLoss | None

    def __post_init__(self):
        self.tokens_a_step = rows_of_a_step(self.a, self.accelerator.num_processes) * self.a.sequence_length
        self.collapse = CollapseWarning(patience=3)
        self.graphed = self.graphed_update = None
        if self.a.cuda_graphs:
            self.graphed = GraphedStep(self.model, divisor=self.a.gradient_accumulation_steps)
            # torch's RAdam is not made for it.
            if self.a.optimizer != "radam":
                # A budget of several processes has them wait for one another, which a graph must not.
                alone = self.budget is not None and self.accelerator.num_processes == 1
                then = [self.budget.step] if alone else []
                self.graphed_update = GraphedUpdate(self.optimizer.optimizer, self.a.max_grad_norm, then)
        self.log = None
        self.asked_to_stop = False

    def run(self, loader: DataLoader) -> dict:
        """Trains until the last step, the end of the time, or a signal."""

        def ask_to_stop(number, frame):
            if self.asked_to_stop:
                raise KeyboardInterrupt
            self.asked_to_stop = True

        if self.accelerator.is_main_process:
            self.log = open_log(self.saver.folder.path / "metrics.jsonl")
        # What ends by time is counted in seconds.
        total, done, unit = self.a.max_steps, self.progress.step, "it"
        if math.isinf(total):
            total, done, unit = round(60 * self.a.max_minutes), round(self.progress.seconds), "s"
        hidden = not self.accelerator.is_local_main_process
        # Schedulers send SIGTERM before they kill.
        previous = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=total, initial=done, unit=unit, disable=hidden) as bar:
                return self._loop(iter(loader), bar)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self.log is not None:
                self.log.close()

    def _loop(self, batches: Iterator[dict], bar: tqdm) -> dict:
        a, progress, clock = self.a, self.progress, Clock(self.progress.seconds)
        losses, counted_from, speed, validated, stop, last = [], progress.step, 0.0, None, False, False
        agreement = Agreement(self.accelerator)
        self.model.train()
        while progress.step < a.max_steps and progress.time_share < 1 and not stop:
            loss = self._step(batches)
            progress.step += 1
            losses.append(self.accelerator.reduce(loss, "mean"))
            stop, progress.seconds = agreement(self.asked_to_stop, clock.seconds)
            bar.update(min(round(progress.seconds), bar.total) - bar.n if math.isinf(a.max_steps) else 1)
            last = progress.step == a.max_steps or progress.time_share >= 1
            if progress.step % a.logging_steps == 0 or last:
                speed = (progress.step - counted_from) * self.tokens_a_step / (clock.seconds - clock.before)
                bar.set_postfix(loss=f"{self._report(losses, speed):.3f}", tokens_s=f"{speed:,.0f}")
                losses = []
            validated = None
            if progress.step % a.eval_steps == 0 or last:
                with clock.paused():
                    validated = self._validate()
            if progress.step % a.save_steps == 0 or last or stop:
                with clock.paused():
                    self.saver.checkpoint(progress.step)
        if stop and not last:
            self.accelerator.print(f"stopped after step {progress.step}; checkpoint-{progress.step} is saved")
        else:
            self.saver.model_folder("final")
            if self.averaged is not None:
                self.saver.model_folder("averaged", self.averaged.module)
        if validated is None:
            validated = evaluate(a, self.accelerator, self.parts, self.model, self.held_out["validation"])
        return {
            "step": progress.step, "validation_bits_per_byte": validated, "best": progress.best,
            "tokens_per_second": speed,
        }  # fmt: skip

    def _step(self, batches: Iterator[dict]) -> Tensor:
        """One step of the optimizer. Returns the loss of this process's rows."""
        a, accelerator, model = self.a, self.accelerator, self.model
        total = torch.zeros((), device=accelerator.device)
        for _ in range(a.gradient_accumulation_steps):
            batch = next(batches)
            if self.places is not None:
                self.places.reached(batch)
            if self.teacher is not None:
                self.teacher.take(batch)
            ids = batch["input_ids"].to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(model):
                if self.graphed is not None:
                    if self.graphed_update is not None and not self.graphed.captured:
                        # Its gradients lie in the memory of the graph before, which the next one needs.
                        self.graphed_update.forget()
                    loss = self.graphed(input_ids=ids, labels=ids)
                else:
                    with self.parts.running(model):
                        loss = model(**self.parts.of({"input_ids": ids, "labels": ids})).loss
                    accelerator.backward(loss)
                if self.graphed_update is None:
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), a.max_grad_norm)
                    self.optimizer.step()
                elif accelerator.sync_gradients:
                    self.graphed_update()
                self.optimizer.zero_grad()
            total += loss.detach().float() / a.gradient_accumulation_steps
        if self.budget is not None and (self.graphed_update is None or not self.graphed_update.then):
            self.budget.step()
        if self.averaged is not None:
            self.averaged.update_parameters(accelerator.unwrap_model(model))
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        return total

    def _report(self, losses: list[Tensor], speed: float) -> float:
        """Logs what the steps since the last report did. Returns the last loss."""
        progress = self.progress
        values = torch.stack(losses).tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(f"the loss is not finite near step {progress.step}: {values}")
        seen = self.monitor.read()
        for message in self.collapse.check(seen, progress.step) if self.accelerator.is_main_process else ():
            self._write({"router/collapse": message})
        memory = device_memory(self.accelerator.device)
        self._write(
            {
                "train/loss": sum(values) / len(values),
                "train/learning_rate": self.schedule.get_last_lr()[0],
                "train/tokens_per_second": speed,
                **({} if memory is None else {"train/memory_gib": memory}),
                **statistics_as_logs(seen),
            }
        )
        return values[-1]

    def _write(self, values: dict) -> None:
        progress = self.progress
        values = {**values, "train/seconds": progress.seconds, "train/tokens": progress.step * self.tokens_a_step}
        self.accelerator.log(values, step=progress.step)
        if self.log is not None:
            entry = {"run": self.saver.folder.run, "step": progress.step, **values}
            self.log.write(json.dumps(entry).encode("utf-8") + b"\n")
            self.log.flush()

    def _validate(self) -> float:
        """Scores the held-out texts and keeps the model if it is the best so far. Returns validation bits per byte."""
        a, accelerator, scores = self.a, self.accelerator, {}
        for split, texts in self.held_out.items():
            scores[f"{split}/bits_per_byte"] = evaluate(a, accelerator, self.parts, self.model, texts)
        if self.averaged is not None:
            with accelerator.autocast():
                for split, texts in self.held_out.items():
                    score = evaluate(a, accelerator, self.parts, self.averaged.module, texts)
                    scores[f"{split}/averaged_bits_per_byte"] = score
        self._write(scores)
        value = scores["validation/bits_per_byte"]
        if value < self.progress.best:
            self.progress.best = value
            self.saver.model_folder("best")
        return value


if __name__ == "__main__":
    main()
