"""What `train_lm.py` can be told, and what it refuses before it starts."""

import math
import os
from dataclasses import dataclass, field

from ranges import BETA, LARGEST_SEED, MAX_NORM, PART, Range, above, at_least, check_ranges, from_to
from recipes import json_object


@dataclass
class TrainArguments:
    output_dir: str = field(metadata={"help": "must be new or empty, unless resuming"})
    model_type: str = field(default="seqboat", metadata={"help": "seqboat, or llama for comparison"})
    preset: str = field(
        default="small", metadata={"help": "a preset of configuration/; not used for llama, nor with init_from"}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "a model's folder or name on the Hub, to start from its weights and config"}
    )
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
    batch_size: int = field(
        default=8, metadata={"help": "rows a process (or context_parallel processes) and micro-batch"}
    )
    gradient_accumulation_steps: int = field(default=1)
    max_steps: int | None = field(default=None, metadata={"help": "default: 500, or no limit with max_minutes"})
    max_minutes: float | None = field(
        default=None, metadata={"help": "end after this much training time, validation and saving not counted"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw, radam or muon"})
    learning_rate: float = field(default=2e-3)
    router_learning_rate: float | None = field(default=None, metadata={"help": "peak rate of the routers"})
    muon_learning_rate: float = field(
        default=0.02, metadata={"help": "peak rate of the layers' matrices with optimizer muon"}
    )
    muon_row_beta: float | None = field(
        default=None,
        metadata={"help": "evens out the rows of Muon's updates, such as 0.95: their mean's factor; 0: no"},
    )
    muon_split: bool = field(
        default=False,
        metadata={"help": "attention's input projection is three matrices to Muon"},
    )
    qk_learning_rate: float | None = field(
        default=None, metadata={"help": "peak rate of the scales and offsets of queries and keys"}
    )
    router_gain: float = field(
        default=0.1,
        metadata={"help": "holds router_target_rate by moving the routers' biases; 0: by a term of the loss"},
    )
    average_decay: float | None = field(
        default=None, metadata={"help": "also keep, score and save an average of the weights, such as 0.999 a step"}
    )
    teacher_labels: str | None = field(
        default=None,
        metadata={"help": "folder written by teacher_labels.py: also learn another model's predictions"},
    )
    teacher_share: float | None = field(
        default=None, metadata={"help": "weight of these predictions in the loss, default 0.5; the rest is the text's"}
    )
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
        default=False, metadata={"help": "forward and backward as one CUDA graph, in each process"}
    )
    context_parallel: int = field(
        default=1, metadata={"help": "processes that share each row, a part of its columns each; 1: none do"}
    )
    cpu: bool = field(default=False, metadata={"help": "do not use a GPU"})
    eval_steps: int = field(default=100)
    eval_context: int | None = field(
        default=None, metadata={"help": "tokens of each validation row that are context only; default: half"}
    )
    eval_tokens: int = field(default=100_000, metadata={"help": "validation tokens that are scored"})
    eval_batch_size: int = field(default=8)
    score_test: bool = field(
        default=False,
        metadata={"help": "log bits per byte on enwik8's test split too, at every validation; it chooses nothing"},
    )
    save_steps: int = field(default=100)
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints kept besides best and final"})
    logging_steps: int = field(default=10)
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder, or 'latest'"})
    overwrite_output_dir: bool = field(default=False)
    seed: int = field(default=0)

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = 500 if self.max_minutes is None else math.inf


# Those that optimizer muon alone reads.
MUON_ARGUMENTS = ("muon_learning_rate", "muon_row_beta", "muon_split")

# Of every argument that is a number.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "eval_batch_size"), at_least(1)),
    "context_parallel": at_least(1),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps", "eval_tokens", "max_bytes"), at_least(1)),
    # Infinity where max_minutes alone ends the run.
    "max_steps": Range(1, endless=True),
    "max_minutes": above(0),
    "sequence_length": at_least(2),
    "eval_context": at_least(1),
    "save_total_limit": at_least(1),
    "validation_fraction": PART,
    "learning_rate": at_least(0),
    **dict.fromkeys(("router_learning_rate", "muon_learning_rate", "qk_learning_rate", "router_gain"), at_least(0)),
    "muon_row_beta": BETA,
    "average_decay": PART,
    "teacher_share": from_to(0, 1),
    "weight_decay": at_least(0),
    "warmup_steps": at_least(0),
    "warmup_start": from_to(0, 1),
    "final_rate": from_to(0, 1),
    "max_grad_norm": MAX_NORM,
    "beta1": BETA,
    "beta2": BETA,
    "seed": from_to(0, LARGEST_SEED),
}


def check_arguments(a: TrainArguments) -> None:
    """Raises ValueError for values that no run can use, naming them."""
    choices = {
        "model_type": (a.model_type, ("seqboat", "llama")),
        "optimizer": (a.optimizer, ("adamw", "radam", "muon")),
        "schedule": (a.schedule, ("linear", "cosine")),
        "mixed_precision": (a.mixed_precision, (None, "no", "bf16", "fp16")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(str(x) for x in allowed if x)}, got {value!r}")
    if (a.train_file is None) == (a.dataset_name is None):
        raise ValueError(f"give one of train_file and dataset_name, got {a.train_file!r} and {a.dataset_name!r}")
    if a.score_test and a.train_file is None:
        raise ValueError("score_test is for enwik8 as train_file; a dataset_name has no test split here")
    if a.model_type == "llama" and (a.muon_split or a.qk_learning_rate is not None):
        raise ValueError("muon_split and qk_learning_rate are for SeqBoat's attention, this run trains a llama")
    check_ranges(a, RANGES)
    check_teacher(a)
    if a.eval_context is not None and a.eval_context >= a.sequence_length:
        raise ValueError(f"eval_context must be from 1 to {a.sequence_length - 1}, got {a.eval_context}")
    json_object(a.config_overrides, "config_overrides")


def _refuse(name: str, reasons: dict[str, bool]) -> None:
    """Raises ValueError with the first of the reasons that applies."""
    reason = next((text for text, applies in reasons.items() if applies), None)
    if reason is not None:
        raise ValueError(f"{name} cannot be used: {reason}")


def check_teacher(a: TrainArguments) -> None:
    """Raises ValueError where no teacher's predictions can be learned, saying why."""
    if a.teacher_labels is None:
        if a.teacher_share is not None:
            raise ValueError(f"teacher_share {a.teacher_share} needs teacher_labels, whose part of the loss it is")
        return
    reasons = {
        f"they are for a train_file, not for dataset_name {a.dataset_name!r}": a.train_file is None,
        f"they are for SeqBoat, not for model_type {a.model_type!r}": a.model_type != "seqboat",
        f"they do not go with context_parallel {a.context_parallel}": a.context_parallel > 1,
    }
    _refuse("teacher_labels", reasons)


def check_parts(a: TrainArguments) -> None:
    """Raises ValueError where rows cannot be shared by processes, saying why."""
    reasons = {"it is for SeqBoat": a.model_type != "seqboat", "it does not go with compile": a.compile,
               "it does not go with cuda_graphs": a.cuda_graphs}  # fmt: skip
    if a.context_parallel > 1:
        _refuse("context_parallel", reasons)


def check_graphs(a: TrainArguments, on_cpu: bool) -> None:
    """Raises ValueError where `cuda_graphs` cannot be had, saying why."""
    reasons = {
        "it needs a GPU": on_cpu,
        "it is for SeqBoat": a.model_type != "seqboat",
        "a sharded model is not whole in any process": os.environ.get("ACCELERATE_USE_FSDP") == "true"
        or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
        "it does not go with compile": a.compile,
        "it does not go with gradient_checkpointing": a.gradient_checkpointing,
        "fp16 scales its loss outside the graph; use bf16": a.mixed_precision == "fp16",
    }
    if a.cuda_graphs:
        _refuse("cuda_graphs", reasons)
