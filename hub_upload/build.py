"""Building the folder that goes to the Hub: weights, config with `auto_map`, tokenizer, code, licence, model card."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_seqboat.configuration_seqboat import SeqBoatConfig

from .code_files import auto_classes, auto_map, code_files, license_file, link_code
from .errors import TOKEN_PATTERN, HubUploadError
from .folders import check_output, staged_folder
from .model_card import CardOptions, Published, write_card

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
# A byte tokenizer of 264 ids with its chat template has 10 kB; nothing that is read as text comes near this.
LARGEST_SCANNED_FILE = 64 << 20


@dataclass
class BuiltFolder:
    """What was built: the folder, its files by name, the class of the model, and remarks for the user."""

    output: Path
    files: list[str]
    model_class: str
    parameters: int
    remarks: list[str] = field(default_factory=list)


def read_config(folder: Path) -> tuple[SeqBoatConfig, type[PreTrainedModel]]:
    """Config and class of a saved model. Loads no weights.

    Raises HubUploadError when the folder is missing or holds no complete SeqBoat model: an adapter, another
    architecture, no weights.
    """
    if not folder.is_dir():
        raise HubUploadError(f"the model folder {folder} does not exist or is not a folder.")
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise HubUploadError(
                f"{folder} holds a PEFT adapter, not a model; merge it first: "
                "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)."
            )
        raise HubUploadError(f"the model folder {folder} has no config.json; save a model by save_pretrained first.")
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    # A text nested too deeply is a RecursionError.
    except (ValueError, AttributeError, RecursionError) as error:
        raise HubUploadError(f"{config_file} is not a JSON object: {error}") from error
    if model_type != "seqboat":
        raise HubUploadError(
            f"{config_file} has model_type={model_type!r:.200}; only 'seqboat' models can be published here."
        )
    names = values.get("architectures") or []
    known = {cls.__name__: cls for auto, cls in auto_classes().items() if auto != "AutoConfig"}
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in known:
        raise HubUploadError(f"{config_file} has architectures={names!r:.200}; expected one of {sorted(known)}.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise HubUploadError(f"the model folder {folder} has no weights (model.safetensors).")
    _check_shards(folder)
    try:
        return SeqBoatConfig.from_pretrained(folder), known[names[0]]
    # transformers takes any value for the fields that are not this package's, and fails in as many ways.
    except Exception as error:
        raise HubUploadError(f"{config_file} is not valid: {error}") from error


def _check_shards(folder: Path) -> None:
    """Raises HubUploadError where an index of weights names a file that is not in the folder."""
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise HubUploadError(f"{index} is no index of weights: {error!r}") from error
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise HubUploadError(f"{index} names {shard!r:.200}, which is no file of the folder.")


def build_folder(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    dtype: str | None = None,
    linked_code: bool = False,
    card: CardOptions | None = None,
) -> BuiltFolder:
    """Build a folder that loads with `trust_remote_code=True` where this package is not installed.

    Args:
        model: a folder that `save_pretrained`, a Trainer or the converter wrote.
        output: folder to write. It appears complete or not at all.
        overwrite: replace an existing model folder.
        max_shard_size: largest safetensors file; beyond it weights are split, with an index.
        dtype: `float32`, `bfloat16` or `float16`, to which the weights are rounded; by default they stay as they are.
        linked_code: the Python files are links to this package's, for a folder that stays in its checkout.
        card: what the model card says beyond config and trainer state.

    Raises:
        HubUploadError: the model is incomplete, damaged or of another architecture, a file that would go along holds
            an access token, or the output is not free. Nothing is left behind.
    """
    model, output, card = Path(model), Path(output), card or CardOptions()
    check_output(output, overwrite, keep=model)
    config, model_class = read_config(model)
    remarks = []
    tokenizer_files = _checked_tokenizer(model, config, remarks)
    licence, sources = license_file(), code_files()
    loaded = load_model(model, model_class)
    if dtype is not None:
        loaded.to(getattr(torch, dtype))
    count = sum(parameter.numel() for parameter in loaded.parameters())
    with staged_folder(output, overwrite, keep=model) as stage:
        loaded.config.auto_map = auto_map()
        loaded.save_pretrained(stage, max_shard_size=max_shard_size)
        for file in tokenizer_files:
            shutil.copyfile(file, stage / file.name)
        if linked_code:
            link_code(stage, output)
        else:
            for file in sources:
                shutil.copyfile(file, stage / file.name)
        shutil.copyfile(licence, stage / "LICENSE")
        published = Published(loaded.config, model_class.__name__, count, bool(tokenizer_files))
        remarks += write_card(stage, model, published, card)
        _refuse_tokens(stage)
        files = sorted(file.name for file in stage.iterdir())
    return BuiltFolder(output, files, model_class.__name__, count, remarks)


def load_model(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Load a model in the dtype it was saved in, on the CPU.

    Raises HubUploadError when weights are damaged, missing, left over, of another shape, or not finite; names them.
    """
    verbosity = transformers_logging.get_verbosity()
    # transformers would print a report of the same findings.
    transformers_logging.set_verbosity_error()
    try:
        model, report = model_class.from_pretrained(
            folder, dtype="auto", output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True
        )
    # Damaged files fail in the reader's own ways (safetensors, pickle, JSON of the index).
    except Exception as error:
        raise HubUploadError(f"the weights in {folder} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    problems = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    problems += [f"left over: {name}" for name in sorted(report["unexpected_keys"])]
    problems += [
        f"wrong shape: {entry[0]} {tuple(entry[1])}, not {tuple(entry[2])}" for entry in report["mismatched_keys"]
    ]
    if not problems:
        problems = [
            f"not finite: {name}"
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and not torch.isfinite(tensor).all()
        ]
    if problems:
        raise HubUploadError(f"the weights in {folder} are not those of its config:\n  " + "\n  ".join(problems))
    return model


def _checked_tokenizer(folder: Path, config: SeqBoatConfig, remarks: list[str]) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if config.input_type == "values":
        return []
    if not any(file.name.startswith(("tokenizer", "vocab", "spiece")) for file in files):
        remarks.append(
            "the model folder has no tokenizer, so none is published; save one into it by tokenizer.save_pretrained."
        )
        return []
    try:
        size = len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    # Tokenizer files fail in as many ways as there are tokenizers.
    except Exception as error:
        raise HubUploadError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if size > config.vocab_size:
        raise HubUploadError(
            f"the tokenizer in {folder} has {size} ids, but the model's vocab_size is {config.vocab_size}; "
            "it is another model's tokenizer."
        )
    return files


def _refuse_tokens(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".png") or file.stat().st_size > LARGEST_SCANNED_FILE:
            continue
        if TOKEN_PATTERN.search(file.read_text(encoding="utf-8", errors="replace")):
            raise HubUploadError(
                f"{file.name} would hold something that looks like an access token of the Hub; remove it from the "
                "model folder or the card's sources first."
            )
