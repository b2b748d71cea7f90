"""Pretrains a causal SeqBoat with Accelerate, on one process or many.

    python examples/train_lm.py configuration/recipes/shakespeare.yaml --output_dir outputs/lm
    accelerate launch --config_file configuration/accelerate/ddp_cpu.yaml examples/train_lm.py RECIPE --flag value

Writes to `output_dir`: `checkpoint-N/` to resume from, `best/` (the model with the lowest validation loss), `final/`,
`metrics.jsonl`, `training_record.json` and TensorBoard logs. Ctrl-C saves a checkpoint after the current step and ends.

`--max_minutes` ends the run after that much training time: the clock stops during validation and saving, a resumed run
goes on with the time already used, and the learning rate falls by the share of time or of steps that is used,
whichever is larger. `--model_type llama` trains a LlamaForCausalLM in the same way, for comparison.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# Threads that wait for work would spin, which costs a machine shared with other programs most of its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from recipes import check_launch, check_output_folder, check_same_shape, parse_arguments
from run_record import hardware, published_command, write_record
from text_data import (
    RowOrder,
    StreamedBlocks,
    TokenBlocks,
    joined_tokens,
    load_tokenizer,
    read_text_file,
    split_text,
    text_of,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.graphed_step_seqboat import GraphedStep
from modeling_seqboat.training_seqboat import CollapseWarning, RouterMonitor, parameter_groups, statistics_as_logs


@dataclass
class TrainArguments:
    output_dir: str = field(metadata={"help": "must be new or empty, unless resuming"})
    model_type: str = field(default="seqboat", metadata={"help": "seqboat, or llama for comparison"})
    preset: str = field(default="small", metadata={"help": "a preset of configuration/; not used for llama"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "JSON of config fields to change; for llama: the fields of a LlamaConfig"}
    )
    tokenizer: str = field(default="byte", metadata={"help": "'byte' or a name for AutoTokenizer"})
    train_file: str | None = field(default=None, metadata={"help": "text or enwik8, plain, .gz or .xz"})
    max_bytes: int | None = field(default=None, metadata={"help": "use this much of train_file"})
    validation_fraction: float = field(default=0.05, metadata={"help": "end of train_file kept for validation"})
    dataset_name: str | None = field(default=None, metadata={"help": "instead of train_file: for load_dataset"})
    dataset_config: str | None = field(default=None)
    dataset_files: str | None = field(default=None, metadata={"help": "data_files of load_dataset"})
    dataset_split: str = field(default="train")
    validation_split: str | None = field(default=None, metadata={"help": "default: the first rows of dataset_split"})
    text_column: str = field(default="text")
    streaming: bool = field(default=False)
    sequence_length: int = field(default=1024)
    batch_size: int = field(default=8, metadata={"help": "rows a process and micro-batch"})
    gradient_accumulation_steps: int = field(default=1)
    max_steps: int | None = field(default=None, metadata={"help": "default: 500, or no limit with max_minutes"})
    max_minutes: float | None = field(
        default=None, metadata={"help": "end after this much training time, validation and saving not counted"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw or radam"})
    learning_rate: float = field(default=2e-3)
    router_learning_rate: float | None = field(default=None, metadata={"help": "peak rate of the routers"})
    beta1: float = field(default=0.9)
    beta2: float = field(default=0.98)
    weight_decay: float = field(default=0.1)
    warmup_steps: int = field(default=100)
    warmup_start: float = field(default=0.0, metadata={"help": "first learning rate, as a part of the peak"})
    schedule: str = field(default="cosine", metadata={"help": "linear or cosine decay after the warm-up"})
    final_rate: float = field(default=0.02, metadata={"help": "last learning rate, as a part of the peak"})
    max_grad_norm: float = field(default=0.25)
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16; default: Accelerate's"})
    gradient_checkpointing: bool = field(default=False)
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    cuda_graphs: bool = field(
        default=False, metadata={"help": "forward and backward as one CUDA graph; one process on a GPU"}
    )
    cpu: bool = field(default=False, metadata={"help": "do not use a GPU"})
    eval_steps: int = field(default=100)
    eval_context: int | None = field(
        default=None, metadata={"help": "tokens of each validation row that are context only; default: half"}
    )
    eval_tokens: int = field(default=100_000, metadata={"help": "validation tokens that are scored"})
    eval_batch_size: int = field(default=8)
    save_steps: int = field(default=100)
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints kept besides best and final"})
    logging_steps: int = field(default=10)
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder, or 'latest'"})
    overwrite_output_dir: bool = field(default=False)
    seed: int = field(default=0)

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = 500 if self.max_minutes is None else math.inf


def check_arguments(a: TrainArguments) -> None:
    """Raises ValueError for values that no run can use, naming them."""
    choices = {
        "model_type": (a.model_type, ("seqboat", "llama")),
        "optimizer": (a.optimizer, ("adamw", "radam")),
        "schedule": (a.schedule, ("linear", "cosine")),
        "mixed_precision": (a.mixed_precision, (None, "no", "bf16", "fp16")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(str(x) for x in allowed if x)}, got {value!r}")
    if (a.train_file is None) == (a.dataset_name is None):
        raise ValueError(f"give one of train_file and dataset_name, got {a.train_file!r} and {a.dataset_name!r}")
    for name in (
        "batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "eval_steps",
        "save_steps",
        "logging_steps",
    ):
        if getattr(a, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(a, name)}")
    if a.sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, got {a.sequence_length}")
    if a.eval_context is not None and not 1 <= a.eval_context < a.sequence_length:
        raise ValueError(f"eval_context must be from 1 to {a.sequence_length - 1}, got {a.eval_context}")
    if not 0 < a.validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {a.validation_fraction}")
    if a.max_minutes is not None and not 0 < a.max_minutes < math.inf:
        raise ValueError(f"max_minutes must be above 0, got {a.max_minutes}")


def build_config(a: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of the model to train. Raises ValueError for fields that a LlamaConfig does not have."""
    overrides = json.loads(a.config_overrides) if a.config_overrides else {}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if a.model_type == "seqboat":
        if a.tokenizer != "byte":
            overrides = {"vocab_size": len(tokenizer), **ids, **overrides}
        return SeqBoatConfig.from_preset(a.preset, **overrides)
    unknown = sorted(set(overrides) - set(LlamaConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"config_overrides: {', '.join(unknown)} is no field of LlamaConfig")
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": a.sequence_length, **ids, **overrides}
    return LlamaConfig(**fields)


def check_graphs(a: TrainArguments, on_cpu: bool) -> None:
    """Raises ValueError where `cuda_graphs` cannot be had, saying why."""
    reasons = {
        "it needs a GPU": on_cpu,
        "it is for SeqBoat": a.model_type != "seqboat",
        "it runs in one process": int(os.environ.get("WORLD_SIZE", 1)) > 1,
        "it does not go with compile": a.compile,
        "fp16 scales its loss outside the graph; use bf16": a.mixed_precision == "fp16",
    }
    reason = next((text for text, applies in reasons.items() if applies), None)
    if a.cuda_graphs and reason is not None:
        raise ValueError(f"cuda_graphs cannot be used: {reason}")


def load_data(a: TrainArguments, tokenizer):
    """Training rows, validation tokens, and bytes of text a validation token."""
    if a.train_file is not None:
        text = read_text_file(a.train_file)
        splits = split_text(text, tokenizer, a.validation_fraction, a.max_bytes)
        return TokenBlocks(splits.train, a.sequence_length), splits.validation, splits.bytes_per_token
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    def load(split: str):
        return load_dataset(
            a.dataset_name, a.dataset_config, data_files=a.dataset_files, split=split, streaming=a.streaming
        )

    try:
        train = load(a.dataset_split)
    except DatasetGenerationError as error:
        raise ValueError(f"dataset {a.dataset_name!r} cannot be read or is empty: {error.__cause__}") from error
    if next(iter(train), None) is None:
        raise ValueError(f"split {a.dataset_split!r} of dataset {a.dataset_name!r} is empty")
    if a.validation_split is not None:
        held_out = load(a.validation_split)
    else:
        # Rows at the beginning, since a streamed dataset has no known end.
        kept = 0
        size = 0
        for example in train:
            kept += 1
            size += len(text_of(example, a.text_column).encode("utf-8"))
            if size >= a.eval_tokens:
                break
        if not a.streaming:
            kept = min(kept, max(1, int(len(train) * a.validation_fraction)))
        if next(iter(train.skip(kept)), None) is None if a.streaming else kept == len(train):
            raise ValueError(f"dataset {a.dataset_name!r} is too small: validation takes all of its {kept} rows")
        held_out, train = train.take(kept), train.skip(kept)
    limit = a.eval_tokens + a.sequence_length
    validation, bytes_per_token = joined_tokens(held_out, a.text_column, tokenizer, limit)
    if not a.streaming:
        rows, _ = joined_tokens(train, a.text_column, tokenizer, 2**62)
        return TokenBlocks(rows, a.sequence_length), validation, bytes_per_token
    return StreamedBlocks(train, a.text_column, tokenizer, a.sequence_length), validation, bytes_per_token


def rate_factor(a: TrainArguments, step: int, time_share: float = 0.0) -> float:
    """Learning rate of step `step` (from 0) as a part of its peak; `time_share`: used part of `max_minutes`."""
    rise = 1.0
    if step < a.warmup_steps:
        rise = a.warmup_start + (1 - a.warmup_start) * (step + 1) / a.warmup_steps
    steps_done = max(0, step - a.warmup_steps) / max(1, a.max_steps - a.warmup_steps)
    done = min(1.0, max(steps_done, time_share))
    fall = done if a.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return min(rise, 1 - (1 - a.final_rate) * fall)


def build_optimizer(a: TrainArguments, model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    groups = parameter_groups(model, a.weight_decay, router_learning_rate=a.router_learning_rate)
    settings = dict(lr=a.learning_rate, betas=(a.beta1, a.beta2))
    if a.optimizer == "radam":
        return torch.optim.RAdam(groups, **settings, decoupled_weight_decay=True)
    # One launch for many parameters; the CPU keeps the arithmetic of its records.
    return torch.optim.AdamW(groups, **settings, fused=device.type == "cuda")


def build_loader(a: TrainArguments, accelerator: Accelerator, rows, start: int) -> DataLoader:
    """This process's batches from micro-batch `start` on. Not prepared by Accelerate: the order has to be a function
    of seed and position for an exact resume."""
    # Without a generator of its own, starting the loader would draw from the random state that dropout goes on with.
    generator = torch.Generator()
    place = {"start": start, "rank": accelerator.process_index, "world": accelerator.num_processes}
    if isinstance(rows, StreamedBlocks):
        rows.place(a.batch_size, **place)
        return DataLoader(rows, batch_size=a.batch_size, generator=generator)
    order = RowOrder(len(rows), a.batch_size, a.seed, **place)
    return DataLoader(rows, batch_size=a.batch_size, sampler=order, generator=generator)


@torch.no_grad()
def evaluate(a: TrainArguments, accelerator: Accelerator, model, tokens, bytes_per_token: float) -> float:
    """Bits per byte under a sliding context: of each row of `sequence_length` tokens only those after `eval_context`
    are scored, so that every scored token but the first rows' sees at least that many before it."""
    length = min(a.sequence_length, len(tokens))
    context = min(a.eval_context or length // 2, length - 1)
    stride = length - context
    starts = list(range(0, max(1, min(len(tokens) - length + 1, a.eval_tokens)), stride))
    # Sharded models run in lockstep: every process takes equally many rows, repeated rows count nothing.
    world, rank = accelerator.num_processes, accelerator.process_index
    share = math.ceil(len(starts) / world)
    mine = [starts[i % len(starts)] for i in range(rank * share, (rank + 1) * share)]
    counted = [i < len(starts) for i in range(rank * share, (rank + 1) * share)]
    total = torch.zeros(2, dtype=torch.float32, device=accelerator.device)
    model.eval()
    for first in range(0, share, a.eval_batch_size):
        chosen = mine[first : first + a.eval_batch_size]
        rows = [torch.as_tensor(tokens[s : s + length].astype("int64")) for s in chosen]
        ids = torch.stack(rows).to(accelerator.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, context - 1 : -1]
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, context:].flatten(), reduction="none")
        weight = torch.tensor(counted[first : first + a.eval_batch_size], device=ids.device, dtype=torch.float32)
        total += torch.stack([(losses.view(len(chosen), -1) * weight[:, None]).sum(), weight.sum() * stride])
    model.train()
    loss, scored = accelerator.reduce(total, "sum").tolist()
    return loss / scored / math.log(2) / bytes_per_token


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


def find_checkpoint(a: TrainArguments, config: PreTrainedConfig) -> Path | None:
    """The folder to resume from. Raises ValueError where there is none, or one of another shape."""
    if a.resume_from_checkpoint is None:
        return None
    folder = Path(a.resume_from_checkpoint)
    if a.resume_from_checkpoint == "latest":
        folders = sorted(Path(a.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        if not folders:
            raise ValueError(f"there is no checkpoint in output_dir {a.output_dir!r} to resume from")
        folder = folders[-1]
    check_same_shape(folder, config)
    return folder


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

    def model_folder(self, name: str) -> None:
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            unwrapped.save_pretrained(self.output / name, state_dict=state)
            self.tokenizer.save_pretrained(self.output / name)
        self.accelerator.wait_for_everyone()


def agreed(accelerator: Accelerator, asked: bool, seconds: float) -> tuple[bool, float]:
    """What all processes go by: whether any was asked to stop, and one reading of their clocks."""
    if accelerator.num_processes == 1:
        return asked, seconds
    mean = accelerator.reduce(torch.tensor([float(asked), seconds], device=accelerator.device), "mean")
    asked_share, seconds = mean.tolist()
    return asked_share > 0, seconds


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
    tokenizer = load_tokenizer(a.tokenizer)
    config = build_config(a, tokenizer)
    checkpoint = find_checkpoint(a, config)
    output = check_output_folder(a.output_dir, checkpoint is not None, a.overwrite_output_dir)
    train_rows, validation, bytes_per_token = load_data(a, tokenizer)
    if len(validation) < 2:
        raise ValueError(f"there are {len(validation)} validation tokens; at least 2 are needed")

    accelerator = Accelerator(
        # Told to use the CPU, Accelerate connects processes over gloo; else it would leave them unconnected.
        cpu=on_cpu,
        mixed_precision=a.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=a.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with="tensorboard",
        project_dir=str(output),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    set_seed(a.seed)
    model = SeqBoatForCausalLM(config) if a.model_type == "seqboat" else LlamaForCausalLM(config)
    parameters = model.num_parameters()
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monitor, collapse = RouterMonitor(model), CollapseWarning()
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
    accelerator.register_for_checkpointing(progress, schedule)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
    loader = build_loader(a, accelerator, train_rows, progress.step * a.gradient_accumulation_steps)
    accelerator.init_trackers("tensorboard")
    # Every process draws its own dropout masks; a resumed run takes up the saved random states.
    if checkpoint is None:
        set_seed(a.seed, device_specific=True)
    saver = Saver(a, accelerator, model, tokenizer, config)
    result = run(a, accelerator, model, optimizer, schedule, loader, progress, saver, monitor, collapse,
                 validation, bytes_per_token)  # fmt: skip
    monitor.close()
    if accelerator.is_main_process:
        write_record(output, run_record(a, argv, accelerator, progress))
    # Wrapped by DDP, a model holds on to the process group, and were it the last to do so, PyTorch's gloo could deadlock.
    del model, optimizer, schedule, saver
    accelerator.free_memory()
    accelerator.end_training()
    accelerator.print(
        f"{parameters:,} parameters, {progress.step} steps, validation {result['validation_bits_per_byte']:.4f} "
        f"bits per byte (best {progress.best:.4f}), {result['tokens_per_second']:,.0f} tokens/s"
    )
    return result


def run_record(a: TrainArguments, argv: list[str], accelerator: Accelerator, progress: Progress) -> dict:
    """What the model card tells of a run."""
    rows = a.batch_size * a.gradient_accumulation_steps * accelerator.num_processes
    tokens = progress.step * rows * a.sequence_length
    precision = accelerator.mixed_precision
    return {
        "dataset": Path(a.train_file).name.split(".")[0] if a.train_file else a.dataset_name,
        "command": published_command("examples/train_lm.py", argv),
        "hardware": hardware(accelerator.device, accelerator.num_processes),
        "precision": {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}.get(
            precision, precision
        ),
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
        "lr_scheduler_type": a.schedule,
        "warmup_steps": a.warmup_steps,
        "weight_decay": a.weight_decay,
        "betas": [a.beta1, a.beta2],
        "max_grad_norm": a.max_grad_norm,
        "seed": a.seed,
    }


def run(a, accelerator, model, optimizer, schedule, loader, progress, saver, monitor, collapse, validation,
        bytes_per_token) -> dict:  # fmt: skip
    """The training loop, from `progress.step` on."""
    stopping = {"asked": False}

    def ask_to_stop(number, frame):
        if stopping["asked"]:
            raise KeyboardInterrupt
        stopping["asked"] = True

    previous = signal.signal(signal.SIGINT, ask_to_stop)
    log = (saver.output / "metrics.jsonl").open("a", encoding="utf-8") if accelerator.is_main_process else None
    tokens_a_step = a.batch_size * a.gradient_accumulation_steps * accelerator.num_processes * a.sequence_length
    limit = None if math.isinf(a.max_steps) else a.max_steps
    bar = tqdm(total=limit, initial=progress.step, disable=not accelerator.is_local_main_process)
    device = accelerator.device
    losses, clock, counted_from, speed, validated = [], Clock(progress.seconds), progress.step, 0.0, None
    stop = False

    def write(values: dict) -> None:
        values = {**values, "train/seconds": progress.seconds, "train/tokens": progress.step * tokens_a_step}
        accelerator.log(values, step=progress.step)
        if log is not None:
            log.write(json.dumps({"step": progress.step, **values}) + "\n")
            log.flush()

    def validate() -> float:
        value = evaluate(a, accelerator, model, validation, bytes_per_token)
        write({"validation/bits_per_byte": value})
        if value < progress.best:
            progress.best = value
            saver.model_folder("best")
        return value

    batches = iter(loader)
    graphed = GraphedStep(model, divisor=a.gradient_accumulation_steps) if a.cuda_graphs else None
    model.train()
    try:
        while progress.step < a.max_steps and progress.time_share < 1 and not stop:
            step_loss = torch.zeros((), device=device)
            for _ in range(a.gradient_accumulation_steps):
                ids = next(batches)["input_ids"].to(device, non_blocking=True)
                with accelerator.accumulate(model):
                    if graphed is not None:
                        loss = graphed(input_ids=ids, labels=ids)
                    else:
                        loss = model(input_ids=ids, labels=ids).loss
                        accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), a.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                step_loss += loss.detach().float() / a.gradient_accumulation_steps
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            progress.step += 1
            losses.append(accelerator.reduce(step_loss, "mean"))
            bar.update()
            stop, progress.seconds = agreed(accelerator, stopping["asked"], clock.seconds)
            last = progress.step == a.max_steps or progress.time_share >= 1
            if progress.step % a.logging_steps == 0 or last:
                values = torch.stack(losses).tolist()
                if not all(map(math.isfinite, values)):
                    raise FloatingPointError(f"the loss is not finite near step {progress.step}: {values}")
                speed = (progress.step - counted_from) * tokens_a_step / (clock.seconds - clock.before)
                seen = monitor.read()
                if accelerator.is_main_process:
                    collapse.check(seen, progress.step)
                memory = device_memory(device)
                write(
                    {
                        "train/loss": sum(values) / len(values),
                        "train/learning_rate": schedule.get_last_lr()[0],
                        "train/tokens_per_second": speed,
                        **({} if memory is None else {"train/memory_gib": memory}),
                        **statistics_as_logs(seen),
                    }
                )
                bar.set_postfix(loss=f"{values[-1]:.3f}", tokens_s=f"{speed:,.0f}")
                losses = []
            validated = None
            if progress.step % a.eval_steps == 0 or last:
                with clock.paused():
                    validated = validate()
            if progress.step % a.save_steps == 0 or last or stop:
                with clock.paused():
                    saver.checkpoint(progress.step)
        if stop and not last:
            accelerator.print(f"stopped after step {progress.step}; checkpoint-{progress.step} is saved")
        else:
            saver.model_folder("final")
        if validated is None:
            validated = evaluate(a, accelerator, model, validation, bytes_per_token)
    finally:
        signal.signal(signal.SIGINT, previous)
        bar.close()
        if log is not None:
            log.close()
    return {"step": progress.step, "validation_bits_per_byte": validated, "best": progress.best,
            "tokens_per_second": speed}  # fmt: skip


if __name__ == "__main__":
    main()
