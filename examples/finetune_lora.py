"""LoRA on a saved causal SeqBoat: trains an adapter on a text, saves it, reloads it, merges it, and prints what that
cost and brought.

    python examples/finetune_lora.py --model outputs/lm/final --train_file examples/data/tinyshakespeare.txt \
        --output_dir outputs/adapter
"""

import script_start  # noqa: F401, before torch

# isort: split
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from ranges import LARGEST_SEED, PART, Range, at_least, check_ranges, from_to
from recipes import check_model, check_model_folder, check_output_folder, parse_arguments
from run_folder import PARTIAL, RunFolder, take_folder
from safe_files import read_json_object, write_json
from text_data import TokenBlocks, load_tokenizer, read_text_file, split_text
from trainer_runs import RunTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainingArguments, set_seed

from modeling_seqboat.training_seqboat import RouterCallback

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configuration/peft/seqboat_lora.json"


@dataclass
class LoraArguments:
    model: str = field(metadata={"help": "folder or Hub name of a causal SeqBoat"})
    train_file: str = field(metadata={"help": "text file, plain, .gz or .xz"})
    output_dir: str = field(metadata={"help": "where the adapter goes; must be empty or new"})
    tokenizer: str = field(default="byte", metadata={"help": "'byte' or a name for AutoTokenizer"})
    peft_config: str = field(default=str(DEFAULT_CONFIG), metadata={"help": "JSON file of a PEFT LoRA config"})
    target_modules: str | None = field(
        default=None, metadata={"help": "'all-linear' or comma-separated names, instead of those in peft_config"}
    )
    rank: int | None = field(default=None, metadata={"help": "LoRA rank, instead of that in peft_config"})
    use_dora: bool = field(default=False, metadata={"help": "weight-decomposed LoRA (DoRA)"})
    quantization: str = field(default="none", metadata={"help": "base weights: none, int8 or int4 (torchao)"})
    int4_group_size: int = field(default=32, metadata={"help": "must divide the width of every linear layer"})
    sequence_length: int = field(default=1024, metadata={"help": "tokens a row"})
    validation_fraction: float = field(default=0.1, metadata={"help": "part of the text kept for validation"})
    max_bytes: int | None = field(default=None, metadata={"help": "use this much of the text"})
    batch_size: int = field(default=4)
    max_steps: int = field(default=200)
    learning_rate: float = field(default=1e-3)
    warmup_steps: int = field(default=10)
    max_grad_norm: float = field(default=1.0)
    bf16: bool = field(default=False)
    use_cpu: bool = field(default=False)
    logging_steps: int = field(default=10)
    seed: int = field(default=0)
    save_merged: bool = field(default=False, metadata={"help": "also save the merged model, under merged/"})
    overwrite_output_dir: bool = field(default=False)


# Of every argument that is a number.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("rank", "int4_group_size", "max_bytes", "batch_size", "max_steps", "logging_steps"), at_least(1)),
    **dict.fromkeys(("learning_rate", "warmup_steps"), at_least(0)),
    "sequence_length": at_least(2),
    "validation_fraction": PART,
    "max_grad_norm": at_least(0),
    "seed": from_to(0, LARGEST_SEED),
}


def load_base(arguments: LoraArguments) -> torch.nn.Module:
    """The base model, its linear layers quantised if asked for. Raises ValueError for an unknown setting."""
    if arguments.quantization not in ("none", "int8", "int4"):
        raise ValueError(f"quantization must be none, int8 or int4, got {arguments.quantization!r}")
    # Weights are often stored in bfloat16, in which merging an adapter rounds it away; --bf16 is autocast.
    settings = {"dtype": torch.float32}
    if arguments.quantization != "none":
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        if arguments.quantization == "int8":
            settings["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
        else:
            kind = IntxWeightOnlyConfig(torch.int4, PerGroup(arguments.int4_group_size))
            settings["quantization_config"] = TorchAoConfig(kind)
    return AutoModelForCausalLM.from_pretrained(arguments.model, **settings)


def lora_config(arguments: LoraArguments) -> LoraConfig:
    """The PEFT config file with what the flags change. Raises FileNotFoundError if there is none."""
    path = Path(arguments.peft_config)
    if not path.is_file():
        raise FileNotFoundError(f"there is no PEFT config {str(path)!r}")
    settings = read_json_object(path)
    settings.pop("peft_type", None)
    settings["use_dora"] = arguments.use_dora
    if arguments.rank is not None:
        settings["r"] = arguments.rank
    if arguments.target_modules is not None:
        names = arguments.target_modules.split(",")
        settings["target_modules"] = names[0] if names == ["all-linear"] else names
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no config of PEFT's LoRA: {error}") from error


def refuse_tied_targets(model: PeftModel) -> None:
    """Raises ValueError where an adapter changes a matrix that is both embeddings and output: merged, it would change
    both, and the merged model would compute something else."""
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        raise ValueError(
            f"target_modules={model.peft_config['default'].target_modules!r} takes in embed_tokens or lm_head, which "
            "are one matrix here (tie_word_embeddings=True), so that the adapter could not be merged: name them in "
            "modules_to_save of the PEFT config, with ensure_weight_tying, or untie them first "
            "(docs/guides/adapters.md)"
        )


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def main(argv: list[str] | None = None) -> dict:
    arguments = parse_arguments(LoraArguments, argv)
    check_ranges(arguments, RANGES)
    output = check_output_folder(arguments.output_dir, False, arguments.overwrite_output_dir)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("finetune_lora.py runs in one process; examples/finetune_trainer.py runs in several")
    check_model_folder(arguments.model)
    config = lora_config(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer)
    text = read_text_file(arguments.train_file)
    splits = split_text(text, tokenizer, arguments.validation_fraction, arguments.max_bytes)
    if len(splits.validation) < 2:
        raise ValueError(f"there are {len(splits.validation)} validation tokens; at least 2 are needed")
    train = TokenBlocks(splits.train, arguments.sequence_length)
    validation = TokenBlocks(splits.validation, min(arguments.sequence_length, len(splits.validation)))
    base = load_base(arguments)
    check_model(arguments.model, base.config, tokenizer)
    # The adapter's first weights are drawn before the Trainer sets its seed.
    set_seed(arguments.seed)
    model = get_peft_model(base, config)
    refuse_tied_targets(model)
    trainable, total = model.get_nb_trainable_parameters()
    trainer = RunTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output), per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size, max_steps=arguments.max_steps,
            learning_rate=arguments.learning_rate, warmup_steps=arguments.warmup_steps,
            max_grad_norm=arguments.max_grad_norm, lr_scheduler_type="cosine", bf16=arguments.bf16,
            use_cpu=arguments.use_cpu, logging_steps=arguments.logging_steps, save_strategy="no", report_to="none",
            seed=arguments.seed, prediction_loss_only=True,
        ),
        train_dataset=train, eval_dataset=validation, data_collator=collate,
    )  # fmt: skip
    RouterCallback.attach(trainer)
    folder = take_folder(arguments.output_dir, overwrite=arguments.overwrite_output_dir)
    try:
        report = finetune(arguments, trainer, folder, tokenizer)
    finally:
        folder.close()
    report = {"trainable_parameters": trainable, "trainable_share": trainable / total, **report}
    write_json(output / "report.json", report)
    print(f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    print(f"speed: {report['tokens_per_second']:,.0f} tokens/s")
    print(f"validation loss: {report['loss_before']:.4f} before, {report['loss_after']:.4f} after")
    print(f"largest difference of logits after reloading the adapter: {report['reloaded_difference']:.1e}")
    if "merged_difference" in report:
        print(f"largest difference of logits after merging it: {report['merged_difference']:.1e}")
    print(f"adapter: {output}")
    return report


def finetune(
    arguments: LoraArguments, trainer: RunTrainer, folder: RunFolder, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """Trains the adapter, keeps it in the folder, and compares it with what is read from there."""
    model, output, length = trainer.model, folder.path, arguments.sequence_length
    before = trainer.evaluate()["eval_loss"]
    start = time.perf_counter()
    trainer.train_in(folder)
    seconds = time.perf_counter() - start
    # First of all: a training that was stopped may not have much time left.
    stage = output / f"{PARTIAL}adapter"
    model.save_pretrained(stage)
    # Last the file by which an adapter is known.
    for path in sorted(stage.iterdir(), key=lambda path: path.name == "adapter_config.json"):
        path.replace(output / path.name)
    stage.rmdir()
    after = trainer.evaluate()["eval_loss"]
    probe = next(model.parameters())
    ids = trainer.train_dataset[0]["input_ids"][None, : min(256, length)].to(probe.device)
    adapted = _logits(model, ids)
    reloaded = PeftModel.from_pretrained(load_base(arguments).to(probe.device), output)
    report = {
        "steps": trainer.state.global_step,
        "tokens_per_second": trainer.state.global_step * arguments.batch_size * length / seconds,
        "loss_before": before,
        "loss_after": after,
        "reloaded_difference": float((_logits(reloaded, ids) - adapted).abs().max()),
    }
    if arguments.quantization == "none":
        merged = reloaded.merge_and_unload()
        report["merged_difference"] = float((_logits(merged, ids) - adapted).abs().max())
        if arguments.save_merged:
            with folder.replacing("merged") as stage:
                merged.save_pretrained(stage)
                tokenizer.save_pretrained(stage)
    return report


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    return model(input_ids=ids, use_cache=False).logits.float()


if __name__ == "__main__":
    main()
