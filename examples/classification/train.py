"""Trains a bidirectional SeqBoat on a classification task: Long Range Arena's, or raw speech.

    python examples/classification/train.py configuration/recipes/classification/lra-text.yaml \
        --data_path aclImdb_v1.tar.gz --output_dir outputs/lra-text

Writes to `output_dir`: `checkpoint-N/` to resume from, `best/` (the model with the highest validation accuracy, ready
for pipelines), `results.json`, `confusion_matrix.png` and `activations.png`. Ctrl-C, or SIGTERM, saves a checkpoint
after the current step; interrupted in whatever way, it goes on from the last one with `--resume_from_checkpoint
latest`. With `--max_minutes` it ends in time, the learning rate run down.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
import math
import os
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
import transformers
from budget import TimeBudget
from optimizers import build_optimizer
from pictures import write_activations, write_confusion_matrix
from ranges import BETA, LARGEST_SEED, MAX_NORM, Range, at_least, check_ranges, from_to
from recipes import (
    check_output_folder,
    check_same_shape,
    checkpoint_folder,
    json_object,
    parse_arguments,
    refuse_unknown_fields,
    start_model,
)
from run_folder import RunFolder, take_folder_once
from run_record import published_name
from safe_files import read_json_object, replacing, write_json
from tasks import DATA_RANGES, DataArguments, EpochOrder, TaskData, load_task
from tqdm.auto import tqdm
from trainer_runs import RunTrainer, check_trainer_checkpoint
from transformers import TrainerCallback, TrainingArguments, set_seed

import modeling_seqboat
from modeling_seqboat import SeqBoatConfig
from modeling_seqboat.training_seqboat import RouterCallback


@dataclass
class ClassificationArguments(DataArguments):
    task: str = field(default="", metadata={"help": "text, image, listops, pathfinder, pathx, retrieval or speech"})
    preset: str = field(default="", metadata={"help": "a preset of configuration/"})
    output_dir: str = field(default="", metadata={"help": "must be new or empty, unless resuming"})
    config_overrides: str | None = field(default=None, metadata={"help": "JSON of config fields to change"})
    init_from: str | None = field(
        default=None,
        metadata={"help": "a model folder, such as best/ of another run, whose weights a run starts from"},
    )
    batch_size: int = field(default=32, metadata={"help": "rows a process and micro-batch"})
    eval_batch_size: int | None = field(default=None, metadata={"help": "default: batch_size"})
    gradient_accumulation_steps: int = field(default=1)
    max_steps: int = field(default=1000)
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "end in this time, test included, if max_steps take longer; resumed calls are counted in"},
    )
    learning_rate: float = field(default=4e-3)
    router_learning_rate: float | None = field(default=None, metadata={"help": "peak rate of the routers"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or muon for the matrices of the layers"})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "peak rate of what optimizer muon trains"})
    muon_row_beta: float | None = field(
        default=None,
        metadata={"help": "evens out the rows of Muon's updates, such as 0.95: their mean's factor; 0: no"},
    )
    muon_split: bool = field(
        default=False, metadata={"help": "attention's input projection is three matrices to Muon"}
    )
    qk_learning_rate: float | None = field(
        default=None, metadata={"help": "peak rate of the scales and offsets of queries and keys"}
    )
    router_gain: float = field(
        default=0.0,
        metadata={"help": "above 0 a budget of this gain holds the routers to router_target_rate, not the loss"},
    )
    beta1: float = field(default=0.9)
    beta2: float = field(default=0.98)
    weight_decay: float = field(default=0.01)
    warmup_steps: int = field(default=100)
    lr_scheduler_type: str = field(default="linear", metadata={"help": "how the rate falls: linear or cosine"})
    augment: bool = field(
        default=False,
        metadata={
            "help": "vary training rows: image, mirrored, moved, blanked in part; pathfinder and pathx, turned; "
            "speech, speed and tone; text, other bytes"
        },
    )
    max_grad_norm: float = field(default=1.0)
    mixed_precision: str | None = field(default=None, metadata={"help": "no, bf16 or fp16"})
    group_by_length: bool = field(default=False, metadata={"help": "batches of rows of like length"})
    easy_passes: int = field(
        default=0,
        metadata={"help": "how often the first epoch goes through the easy_rows before it takes rows of all kinds"},
    )
    gradient_checkpointing: bool = field(default=False)
    num_workers: int = field(default=0, metadata={"help": "processes that make batches"})
    use_cpu: bool = field(default=False)
    eval_steps: int = field(default=500, metadata={"help": "steps between validations, and between checkpoints"})
    save_total_limit: int = field(default=2)
    logging_steps: int = field(default=50)
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder, or 'latest'"})
    overwrite_output_dir: bool = field(default=False)
    cuda_graphs: bool = field(default=False, metadata={"help": "steps as CUDA graphs, for rows of one length"})
    seed: int = field(default=0)


# Of every argument that is a number.
RANGES: dict[str, Range] = {
    **DATA_RANGES,
    **dict.fromkeys(("batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_steps"), at_least(1)),
    **dict.fromkeys(("eval_steps", "logging_steps", "save_total_limit"), at_least(1)),
    **dict.fromkeys(("learning_rate", "router_learning_rate", "weight_decay"), at_least(0)),
    **dict.fromkeys(("muon_learning_rate", "qk_learning_rate", "router_gain"), at_least(0)),
    "muon_row_beta": BETA,
    **dict.fromkeys(("warmup_steps", "easy_passes", "num_workers"), at_least(0)),
    "max_grad_norm": MAX_NORM,
    "beta1": BETA,
    "beta2": BETA,
    "seed": from_to(0, LARGEST_SEED),
}


# Config fields in which a model may differ from the one it starts from.
FREE_FIELDS = (
    "router_target_rate", "router_target_scope", "router_target_weight", "router_temperature_init",
    "initializer_range", "qk_initializer_range", "router_initializer_range", "ssm_truncation", "hidden_dropout",
    "attention_dropout", "value_dropout", "activation_dropout", "id2label", "label2id",
)  # fmt: skip


class EpochOfOrder(TrainerCallback):
    """Tells an order of rows its epoch: in a resumed run of several processes the Trainer does not reach it."""

    def __init__(self, order: EpochOrder):
        self.order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.set_epoch(int(state.epoch or 0))


class ClassificationTrainer(RunTrainer):
    """Counts the real tokens it trains on and the time spent in evaluations.

    Args:
        build_optimizer: makes the optimizer of a model that is on a device.
        easy: that many training rows, the last ones, are easy.
        easy_passes: how often they are gone through before the others come.
        augment: turns a batch's inputs into variants of them, or None.
        budget: ends the training in time, and the learning rate follows it; or None.
    """

    def __init__(
        self,
        *args,
        build_optimizer: Callable[[torch.nn.Module, torch.device], torch.optim.Optimizer],
        group_by_length: bool,
        easy: int = 0,
        easy_passes: int = 0,
        augment: Callable[..., torch.Tensor] | None = None,
        budget: TimeBudget | None = None,
        **kwargs,
    ):
        self.build_optimizer, self.group_by_length = build_optimizer, group_by_length
        self.easy, self.easy_passes, self.augment, self.budget = easy, easy_passes, augment, budget
        self.tokens: torch.Tensor | int = 0
        self.evaluation_seconds = 0.0
        super().__init__(*args, **kwargs)
        if budget is not None:
            self.add_callback(budget)
            self.also = budget.write

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = self.build_optimizer(self.model, self.args.device)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.budget is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup, cosine = self.args.warmup_steps, self.args.lr_scheduler_type == "cosine"

        def factor(step: int) -> float:
            share = min(1.0, max(step / num_training_steps, self.budget.progress()))
            fall = 0.5 * (1 + math.cos(math.pi * share)) if cosine else 1 - share
            return fall * min(1.0, step / max(1, warmup))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        if not self.group_by_length and not self.easy_passes:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset
        order = EpochOrder(
            len(rows), self.args.train_batch_size * self.args.world_size, self.args.seed,
            [len(row["input_ids"]) for row in rows] if self.group_by_length else None, self.easy, self.easy_passes,
        )  # fmt: skip
        self.add_callback(EpochOfOrder(order))
        return order

    def training_step(self, model, inputs, *args, **kwargs):
        self.tokens = self.tokens + real_tokens(inputs)
        if self.augment is not None:
            inputs = self._prepare_inputs(inputs)
            name = next(key for key in ("pixel_values", "input_values", "input_ids") if key in inputs)
            mask = [inputs["attention_mask"]] if name == "input_ids" else []
            inputs = {**inputs, name: self.augment(inputs[name], *mask)}
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            self.evaluation_seconds += seconds
            if self.budget is not None:
                self.budget.evaluated(len(self.eval_dataset), seconds)


def real_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor | int:
    """Tokens of a batch that are not padding; on the batch's device, so that nothing waits for it."""
    masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
    if masks:
        return sum(mask.sum() for mask in masks)
    return next(value.numel() for name, value in inputs.items() if name in ("pixel_values", "input_values"))


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def check_arguments(a: ClassificationArguments) -> None:
    """Raises ValueError for values that no run can use, naming them."""
    for name in ("task", "preset", "output_dir"):
        if not getattr(a, name):
            raise ValueError(f"{name} is missing: give it by --{name} or in a recipe")
    check_ranges(a, RANGES)
    if a.easy_passes and not a.easy_rows:
        raise ValueError(f"easy_passes must be at least 0, and 0 without easy_rows, got {a.easy_passes}")
    if a.max_minutes is not None and not 0 < a.max_minutes < math.inf:
        raise ValueError(f"max_minutes must be greater than 0, got {a.max_minutes}")
    if a.max_minutes is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("max_minutes is for one process: several would read their clocks apart")
    if a.optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {a.optimizer!r}")
    if a.lr_scheduler_type not in ("linear", "cosine"):
        raise ValueError(f"lr_scheduler_type must be linear or cosine, got {a.lr_scheduler_type!r}")
    if a.mixed_precision not in (None, "no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision must be one of no, bf16, fp16, got {a.mixed_precision!r}")


def build_config(a: ClassificationArguments) -> SeqBoatConfig:
    overrides = json_object(a.config_overrides, "config_overrides")
    refuse_unknown_fields(overrides, SeqBoatConfig)
    config = SeqBoatConfig.from_preset(a.preset, **overrides)
    if a.router_gain and config.router_target_rate is None:
        raise ValueError(
            f"router_gain {a.router_gain} needs a rate to hold: give router_target_rate in config_overrides, or "
            "--router_gain 0"
        )
    return config


def fit_config(config: SeqBoatConfig, data: TaskData, a: ClassificationArguments) -> None:
    """Takes over the task's class names. Raises ValueError where the preset cannot read the task's data."""
    if data.labels is not None:
        config.id2label = dict(enumerate(data.labels))
        config.label2id = {name: index for index, name in enumerate(data.labels)}
    wanted = "tokens" if data.vocab_size else "values"
    if config.input_type != wanted:
        raise ValueError(f"task {a.task!r} needs input_type={wanted!r}, the preset has {config.input_type!r}")
    if data.vocab_size > config.vocab_size:
        raise ValueError(f"task {a.task!r} has {data.vocab_size} ids, the preset's vocab_size is {config.vocab_size}")
    if a.augment and data.augment is None:
        raise ValueError(
            f"augment is for image, pathfinder, pathx, speech and text; there are no variants for task {a.task!r}"
        )
    if a.easy_passes * data.easy > len(data.train):
        raise ValueError(
            f"easy_passes {a.easy_passes} times {data.easy} easy rows are more than the first epoch's "
            f"{len(data.train)} rows"
        )
    pairs = "pair_input_ids" in data.train[0]
    if a.group_by_length and "input_ids" not in data.train[0]:
        raise ValueError(f"group_by_length is for texts; all rows of task {a.task!r} have one length")
    if pairs != (config.pair_features != "none"):
        raise ValueError(
            f"task {a.task!r} reads {'two texts' if pairs else 'one input'} a row, the preset has "
            f"pair_features={config.pair_features!r}"
        )


@torch.no_grad()
def run_test(trainer: ClassificationTrainer, data: TaskData) -> dict:
    """Predictions and activations on the test rows, in one pass.

    Returns:
        labels, predictions: (rows,) int64; rates: one number a layer; confidence (layers, L) or (layers, H, W) and
        sequence (L,) or (H, W) of the first row.
    """
    model, accelerator = trainer.model, trainer.accelerator
    model.eval()
    predictions, labels, sums, first = [], [], 0, None
    loader = trainer.get_test_dataloader(data.test)
    for batch in tqdm(loader, desc="Test", disable=not accelerator.is_local_main_process):
        batch = trainer._prepare_inputs(batch)
        true = batch.pop("labels")
        with trainer.compute_loss_context_manager():
            output = model(**batch, output_router_probs=True)
        probs = torch.stack(output.router_probs).float()
        mask = batch.get("attention_mask")
        count = probs[0].numel() if mask is None else mask.sum()
        active = torch.stack([(layer > 0).sum() for layer in probs])
        sums = sums + torch.cat([active, active.new_tensor([int(count)])])
        if first is None:
            name = next(key for key in ("input_ids", "pixel_values", "input_values") if key in batch)
            length = probs.shape[2] if mask is None else int(mask[0].sum())
            first = probs[:, 0, :length].cpu().numpy(), batch[name][0].flatten()[:length].float().cpu().numpy()
        found = accelerator.gather_for_metrics((output.logits.argmax(-1), true))
        predictions.append(found[0].cpu())
        labels.append(found[1].cpu())
    *active, total = accelerator.reduce(sums, reduction="sum").tolist()
    confidence, sequence = first
    if data.shape is not None:
        confidence, sequence = confidence.reshape(-1, *data.shape), sequence.reshape(data.shape)
    return {
        "predictions": torch.cat(predictions).numpy(),
        "labels": torch.cat(labels).numpy(),
        "rates": [count / max(total, 1) for count in active],
        "confidence": confidence,
        "sequence": sequence,
    }


def build_trainer(
    a: ClassificationArguments, config: SeqBoatConfig, data: TaskData, budget: TimeBudget | None, fresh: bool
) -> ClassificationTrainer:
    """`fresh`: a run at its start, with the weights of `init_from` if that is given."""
    set_seed(a.seed)
    model = start_model(data.model_class, config, a.init_from if fresh else None)
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    steps = min(a.eval_steps, a.max_steps)
    trainer = ClassificationTrainer(
        model=model, build_optimizer=partial(build_optimizer, a), group_by_length=a.group_by_length,
        easy=data.easy, easy_passes=a.easy_passes, augment=data.augment if a.augment else None, budget=budget,
        cuda_graphs=a.cuda_graphs, router_gain=a.router_gain or None,
        compute_metrics=accuracy, data_collator=data.collate,
        train_dataset=data.train, eval_dataset=data.validation,
        args=TrainingArguments(
            output_dir=a.output_dir, per_device_train_batch_size=a.batch_size,
            per_device_eval_batch_size=a.eval_batch_size or a.batch_size,
            gradient_accumulation_steps=a.gradient_accumulation_steps, max_steps=a.max_steps,
            learning_rate=a.learning_rate, adam_beta1=a.beta1, adam_beta2=a.beta2, weight_decay=a.weight_decay,
            warmup_steps=a.warmup_steps, lr_scheduler_type=a.lr_scheduler_type, max_grad_norm=a.max_grad_norm,
            bf16=a.mixed_precision == "bf16", fp16=a.mixed_precision == "fp16",
            dataloader_num_workers=a.num_workers, dataloader_persistent_workers=a.num_workers > 0,
            # The thread that pins memory can hang the end of a process that stops in the middle of an epoch; batches
            # are small beside their step.
            dataloader_pin_memory=False,
            # Looking for NaN at every step would wait for the device at every step.
            logging_nan_inf_filter=False,
            use_cpu=a.use_cpu,
            eval_strategy="steps", eval_steps=steps, save_strategy="steps", save_steps=steps,
            save_total_limit=a.save_total_limit, load_best_model_at_end=True, metric_for_best_model="accuracy",
            greater_is_better=True, logging_steps=a.logging_steps, report_to="none", seed=a.seed,
        ),
    )  # fmt: skip
    RouterCallback.attach(trainer)
    return trainer


def training_before(start: str | None) -> dict[str, str | int]:
    """What results say of the training of the model `start`: steps up to the best one, where that run has results."""
    if start is None:
        return {}
    known, results = {"init_from": published_name(start)}, Path(start).resolve().parent / "results.json"
    if Path(start).name == "best" and results.is_file():
        record = read_json_object(results)
        known["steps_before"] = record.get("best_step", 0) + record.get("steps_before", 0)
    return known


def main(argv: list[str] | None = None) -> dict:
    began = time.monotonic()
    a = parse_arguments(ClassificationArguments, argv)
    check_arguments(a)
    if a.cuda_graphs and (a.use_cpu or not torch.cuda.is_available()):
        raise ValueError("cuda_graphs needs a GPU; add --cuda_graphs False")
    checkpoint = checkpoint_folder(a.resume_from_checkpoint, a.output_dir)
    check_output_folder(a.output_dir, checkpoint is not None, a.overwrite_output_dir)
    config = build_config(a)
    before = training_before(a.init_from)
    if a.init_from is not None and checkpoint is None:
        check_same_shape(Path(a.init_from), config, FREE_FIELDS)
    data = load_task(a.task, a, config.pad_token_id)
    fit_config(config, data, a)
    if checkpoint is not None:
        check_same_shape(checkpoint, config)
        check_trainer_checkpoint(checkpoint)
    budget = None
    if a.max_minutes is not None:
        rows = len(data.validation) + len(data.test)
        step_rows = a.batch_size * a.gradient_accumulation_steps
        budget = TimeBudget(a.max_minutes, began, rows, step_rows, checkpoint)
    trainer = build_trainer(a, config, data, budget, fresh=checkpoint is None)
    folder = take_folder_once(a.output_dir, checkpoint, a.overwrite_output_dir)
    try:
        return run(
            a,
            trainer,
            data,
            folder,
            checkpoint,
            began,
            before,
            shlex.join(["python", *sys.argv] if argv is None else ["train.py", *argv]),
        )
    finally:
        folder.close()


def run(
    a: ClassificationArguments,
    trainer: ClassificationTrainer,
    data: TaskData,
    folder: RunFolder,
    checkpoint: Path | None,
    began: float,
    before: dict[str, str | int],
    command: str,
) -> dict:
    """Trains, tests, and keeps the best model, pictures and results in the folder."""
    config, output = trainer.model.config, folder.path
    if trainer.is_world_process_zero():
        # Of an earlier call: whoever reads them would take them for this one's.
        (output / "results.json").unlink(missing_ok=True)
    start = time.perf_counter()
    trainer.train_in(folder, checkpoint)
    if trainer.stop.stopped:
        if trainer.is_world_process_zero():
            print(trainer.farewell())
        return {}
    seconds = time.perf_counter() - start - trainer.evaluation_seconds
    tokens = int(trainer.accelerator.reduce(torch.as_tensor(trainer.tokens, device=trainer.args.device)))
    test = run_test(trainer, data)
    trainer.keep_model(folder, "best", None if data.processor is None else data.processor.save_pretrained)
    if not trainer.is_world_process_zero():
        return {}
    names = [config.id2label[index] for index in range(config.num_labels)]
    matrix = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(matrix, (test["labels"], test["predictions"]), 1)
    with replacing(output / "confusion_matrix.png") as path:
        write_confusion_matrix(matrix, names, path)
    with replacing(output / "activations.png") as path:
        write_activations(test["rates"], test["confidence"], test["sequence"], path)
    device = trainer.args.device
    results = {
        "task": a.task,
        "test_accuracy": float((test["labels"] == test["predictions"]).mean()),
        "validation_accuracy": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        **before,
        "steps": trainer.state.global_step,
        "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "activation_rate": float(np.mean(test["rates"])),
        "activation_rate_by_layer": test["rates"],
        "confusion_matrix": matrix.tolist(),
        # Of this call; a resumed run counts what came after its checkpoint.
        "trained_tokens": tokens,
        "training_seconds": seconds,
        "minutes": (time.monotonic() - began) / 60,
        "tokens_per_second": tokens / seconds,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "command": command,
        "arguments": asdict(a),
        "versions": {
            "modeling_seqboat": modeling_seqboat.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_json(output / "results.json", results)
    rates = ", ".join(f"{rate:.0%}" for rate in test["rates"])
    print(f"test accuracy: {results['test_accuracy']:.2%} (best step {results['best_step']})")
    print(f"activated tokens by layer: {rates}")
    print(f"speed: {results['tokens_per_second']:,.0f} tokens/s")
    print(f"results: {output}")
    return results


if __name__ == "__main__":
    main()
