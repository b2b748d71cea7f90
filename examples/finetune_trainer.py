"""Fine-tunes a saved causal SeqBoat with transformers' Trainer, on a text or on an instruction set.

    python examples/finetune_trainer.py configuration/recipes/gsm8k.yaml \
        --model outputs/lm/final --output_dir outputs/gsm8k

Every argument of TrainingArguments is one here. Examples of a batch are packed into one row without padding, state and
attention stopping at their borders. Writes checkpoints, `final/` and `report.json` to `output_dir`. Ctrl-C, or
SIGTERM, saves a checkpoint after the current step and ends.
"""

import script_start  # noqa: F401, before torch

# isort: split
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from instruction_data import Instructions, read_instructions
from ranges import BETA, LARGEST_SEED, PART, Range, above, at_least, check_ranges, from_to
from recipes import (
    check_launch,
    check_model,
    check_model_folder,
    check_output_folder,
    find_checkpoint,
    parse_arguments,
)
from run_folder import RunFolder, take_folder_once
from safe_files import write_json
from text_data import TokenBlocks, load_tokenizer, read_text_file, split_text
from torch.nn import functional as F
from torch.utils.data import Dataset
from trainer_runs import RunTrainer, check_trainer_checkpoint
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from modeling_seqboat.training_seqboat import RouterCallback, parameter_groups


@dataclass
class FinetuneArguments(TrainingArguments):
    model: str | None = field(default=None, metadata={"help": "folder or Hub name of a causal SeqBoat"})
    tokenizer: str | None = field(default=None, metadata={"help": "'byte' or for AutoTokenizer; default: the model's"})
    train_file: str | None = field(default=None, metadata={"help": ".jsonl of instructions, or a text (.gz, .xz too)"})
    eval_file: str | None = field(
        default=None, metadata={"help": "the same for evaluation; default: a part of train_file"}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "of a .jsonl without 'messages'"})
    completion_column: str = field(default="completion", metadata={"help": "of a .jsonl without 'messages'"})
    validation_fraction: float = field(default=0.1, metadata={"help": "end of train_file kept, without eval_file"})
    max_bytes: int | None = field(default=None, metadata={"help": "use this much of a text"})
    sequence_length: int = field(default=1024, metadata={"help": "tokens of an example at most; of a text's rows"})
    packing: bool = field(default=True, metadata={"help": "join a batch into one row instead of padding it"})
    router_learning_rate: float | None = field(default=None, metadata={"help": "peak rate of the routers, with AdamW"})
    overwrite_output_dir: bool = field(default=False)

    def __post_init__(self):
        # Told to use the CPU, Accelerate connects processes over gloo; else it would leave them unconnected.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        check_launch(self.use_cpu)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        # Trainer.evaluate() ahead of train() would leave the model unwrapped by DDP, without an error.
        self.eval_on_start = True
        super().__post_init__()


# Of every number among the arguments that are not the Trainer's, and of those of the Trainer's that it takes unseen.
RANGES: dict[str, Range] = {
    "validation_fraction": PART,
    "sequence_length": at_least(2),
    **dict.fromkeys(("max_bytes", "save_total_limit", "gradient_accumulation_steps"), at_least(1)),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps"), at_least(1)
    ),
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps", "num_train_epochs"), above(0)),
    **dict.fromkeys(
        ("learning_rate", "router_learning_rate", "weight_decay", "warmup_steps", "eval_delay"), at_least(0)
    ),
    **dict.fromkeys(("max_grad_norm", "adam_epsilon", "dataloader_num_workers", "neftune_noise_alpha"), at_least(0)),
    **dict.fromkeys(("label_smoothing_factor", "adam_beta1", "adam_beta2"), BETA),
    **dict.fromkeys(("seed", "data_seed"), from_to(0, LARGEST_SEED)),
}


class LeftPadding:
    """Rows of different lengths -> one batch, padded on the left; without labels every token is its own."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def stack(name: str, value: int) -> torch.Tensor:
            tensors = [row.get(name, row["input_ids"]) for row in rows]
            return torch.stack([F.pad(tensor, (length - len(tensor), 0), value=value) for tensor in tensors])

        mask = [torch.arange(length) >= length - len(row["input_ids"]) for row in rows]
        return {
            "input_ids": stack("input_ids", self.pad_token_id),
            "labels": stack("labels", -100),
            "attention_mask": torch.stack(mask).long(),
        }


def load_data(a: FinetuneArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Training and evaluation examples. Raises FileNotFoundError and ValueError that name what is wrong."""
    if a.train_file is None:
        raise ValueError("train_file is missing")
    if a.train_file.endswith(".jsonl"):
        columns = (a.prompt_column, a.completion_column)
        train = read_instructions(a.train_file, *columns)
        if a.eval_file is not None:
            held_out = read_instructions(a.eval_file, *columns)
        else:
            border = len(train) - max(1, int(len(train) * a.validation_fraction))
            train, held_out = train[:border], train[border:]
            if not train:
                raise ValueError(f"instruction file {a.train_file!r} has 1 example; evaluation needs another")
        return Instructions(train, tokenizer, a.sequence_length), Instructions(held_out, tokenizer, a.sequence_length)
    splits = split_text(read_text_file(a.train_file), tokenizer, a.validation_fraction, a.max_bytes)
    validation = splits.validation
    if a.eval_file is not None:
        validation = split_text(read_text_file(a.eval_file), tokenizer, 0.0, a.max_bytes).train
    if len(validation) < 2:
        raise ValueError(f"there are {len(validation)} validation tokens; at least 2 are needed")
    return TokenBlocks(splits.train, a.sequence_length), TokenBlocks(
        validation, min(a.sequence_length, len(validation))
    )


def token_scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, L, vocabulary) logits and (B, L) labels -> (B, L - 1, 2): whether the likeliest token is right, and -log p
    of the label; -100 where there is no label, as in the Trainer's own padding."""
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    hits = (logits[:, :-1].argmax(-1) == targets).float()
    return torch.stack([hits, losses], dim=-1).masked_fill((targets == -100)[..., None], -100.0)


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Means over all labelled tokens, whatever batch they came in."""
    scores = prediction.predictions[prediction.predictions[..., 0] >= 0]
    accuracy, loss = scores.mean(axis=0, dtype="float64").tolist()
    return {"token_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy}


def main(argv: list[str] | None = None) -> dict:
    a = parse_arguments(FinetuneArguments, argv)
    check_ranges(a, RANGES)
    if a.max_steps != -1 and a.max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {a.max_steps}")
    if a.model is None:
        raise ValueError("model is missing: the folder or Hub name of a causal SeqBoat")
    check_model_folder(a.model)
    check_output_folder(a.output_dir, a.resume_from_checkpoint is not None, a.overwrite_output_dir)
    tokenizer = load_tokenizer(a.tokenizer or a.model)
    train, validation = load_data(a, tokenizer)
    # Weights are often stored in bfloat16, in which small steps are rounded away; --bf16 is autocast.
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    check_model(a.model, model.config, tokenizer)
    checkpoint = find_checkpoint(a.resume_from_checkpoint, a.output_dir, model.config)
    if checkpoint is not None:
        check_trainer_checkpoint(checkpoint)
    optimizer = None
    if a.router_learning_rate is not None:
        groups = parameter_groups(model, a.weight_decay, router_learning_rate=a.router_learning_rate)
        betas = (a.adam_beta1, a.adam_beta2)
        optimizer = torch.optim.AdamW(groups, lr=a.learning_rate, betas=betas, eps=a.adam_epsilon)
    trainer = RunTrainer(
        model=model, args=a, train_dataset=train, eval_dataset=validation, processing_class=tokenizer,
        data_collator=DataCollatorWithFlattening() if a.packing else LeftPadding(tokenizer.pad_token_id),
        compute_metrics=metrics, preprocess_logits_for_metrics=token_scores, optimizers=(optimizer, None),
    )  # fmt: skip
    RouterCallback.attach(trainer)
    folder = take_folder_once(a.output_dir, checkpoint, a.overwrite_output_dir)
    try:
        return finetune(trainer, folder, checkpoint)
    finally:
        folder.close()


def finetune(trainer: RunTrainer, folder: RunFolder, checkpoint: Path | None) -> dict:
    """Trains, evaluates, and keeps model and report in the folder."""
    model, train, validation = trainer.model, trainer.train_dataset, trainer.eval_dataset
    use_cache = model.config.use_cache
    trained = trainer.train_in(folder, checkpoint)
    if trainer.stop.stopped:
        if trainer.is_world_process_zero():
            print(trainer.farewell())
        return {"steps": trainer.state.global_step, "stopped": True}
    before = next(entry for entry in trainer.state.log_history if "eval_token_loss" in entry)
    after = trainer.evaluate()
    # Off for the training; the model that is kept shall generate with its cache.
    model.config.use_cache = use_cache
    trainer.keep_model(folder, "final")
    names = ("eval_token_loss", "eval_perplexity", "eval_accuracy")
    report = {
        "examples": len(train), "cut_examples": getattr(train, "cut", 0),
        "dropped_examples": getattr(train, "dropped", 0), "steps": trainer.state.global_step,
        **{f"before_{name}": before[name] for name in names},
        **{name: after[name] for name in names},
    }  # fmt: skip
    if trainer.is_world_process_zero():
        write_json(folder.path / "report.json", report)
        counts = f"{report['cut_examples']} cut, {report['dropped_examples']} dropped"
        print(f"{len(train)} examples to train on ({counts}), {len(validation)} to evaluate on")
        print(f"{report['steps']} steps, {trained.metrics['train_runtime']:.0f} s")
        for name in names:
            print(f"{name.removeprefix('eval_')}: {before[name]:.4f} before, {after[name]:.4f} after")
    return report


if __name__ == "__main__":
    main()
