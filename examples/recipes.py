"""Arguments of the example scripts: a dataclass read from flags, from a YAML recipe, or from a recipe with flags after
it that override it."""

import datetime
import difflib
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import yaml
from run_folder import MANIFEST_FILE, check_free, latest_checkpoint, verify_checkpoint
from safe_files import parse_json, read_json_object, read_text
from script_start import ArgumentParser
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_seqboat import SeqBoatConfig

Arguments = TypeVar("Arguments")
# Of transformers' report on loading weights.
_NOT_LOADED = ("missing_keys", "mismatched_keys")


class _Parser(HfArgumentParser):
    """An HfArgumentParser whose errors are one line, without the list of all options."""

    error = ArgumentParser.error

    def add_argument(self, *names, **options):
        # A field's help is plain text, in which argparse would take % for the start of a format.
        if isinstance(options.get("help"), str):
            options["help"] = options["help"].replace("%", "%%")
        return super().add_argument(*names, **options)


def parse_arguments(kind: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """`script.py recipe.yaml --flag value` or `script.py --flag value` -> one instance of the dataclass `kind`.

    Raises FileNotFoundError and ValueError that name the recipe and the key at fault.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(kind)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = _recipe_flags(Path(argv[0]), set(kind.__dataclass_fields__)) + argv[1:]
    return parser.parse_args_into_dataclasses(args=argv)[0]


def read_yaml(path: Path, what: str = "recipe") -> Any:
    """What a YAML file holds. Raises FileNotFoundError and ValueError that call it `what` and name it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {str(path)!r}")
    try:
        return yaml.safe_load(read_text(path))
    # Its message names the line; a date that no calendar has is a ValueError, a text nested too deeply a
    # RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} {str(path)!r} is no YAML: {error}") from None


def _recipe_flags(path: Path, known: set[str]) -> list[str]:
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping of argument names to values")
    flags = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"recipe {str(path)!r}: {name!r} is no argument; arguments are {', '.join(sorted(known))}"
            )
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(one, (str, int, float, datetime.date)) for one in listed if value is not None):
            raise ValueError(f"recipe {str(path)!r}: {name} must be a text or a number, got a {type(value).__name__}")
        if value is not None:
            flags += [f"--{name}", *map(str, listed)]
    return flags


def check_output_folder(folder: str, resuming: bool, overwrite: bool) -> Path:
    """The folder to write to. Raises ValueError where something else lies there already."""
    check_free(Path(folder), resuming, overwrite)
    return Path(folder)


def checkpoint_folder(given: str | None, output_dir: str, rows: int | None = None) -> Path | None:
    """The folder to resume from: the one given, or for 'latest' the one that the run in `output_dir` wrote last; None
    where none is given.

    Raises ValueError where there is none, or a damaged one, naming the file.
    """
    if given is None:
        return None
    folder = Path(given)
    if given == "latest":
        folder = latest_checkpoint(Path(output_dir))
        if folder is None:
            raise ValueError(f"there is no checkpoint in output_dir {output_dir!r} to resume from")
    if not (folder / "config.json").is_file() and not (folder / MANIFEST_FILE).is_file():
        raise ValueError(f"{str(folder)!r} is no checkpoint folder of this script: it has no config.json")
    verify_checkpoint(folder, int(os.environ.get("WORLD_SIZE", "1")), rows)
    return folder


def find_checkpoint(
    given: str | None, output_dir: str, config: PreTrainedConfig, rows: int | None = None
) -> Path | None:
    """`checkpoint_folder`; raises ValueError also where that holds a model of another shape than `config`."""
    if given not in (None, "latest") and not (Path(given) / MANIFEST_FILE).is_file():
        # That it is no checkpoint at all, or another model's, says more than that it has no manifest.
        check_same_shape(Path(given), config)
    folder = checkpoint_folder(given, output_dir, rows)
    if folder is not None:
        check_same_shape(folder, config)
    return folder


def json_object(text: str | None, name: str) -> dict:
    """The object that an argument holds as JSON, an empty one where it was not given. Raises ValueError by name."""
    value = parse_json(text, f"{name} {text!r}") if text else {}
    if not isinstance(value, dict):
        raise ValueError(f'{name} must be a JSON object such as {{"hidden_size": 64}}, got {text!r}')
    return value


def refuse_unknown_fields(overrides: dict, kind: type[PreTrainedConfig]) -> None:
    """Raises ValueError for fields that a config of this kind does not have, and would keep though they change
    nothing."""
    for name in sorted(set(overrides) - set(kind.__dataclass_fields__)):
        near = difflib.get_close_matches(name, kind.__dataclass_fields__, n=1, cutoff=0.0)[0]
        raise ValueError(f"config_overrides: {name} is no field of {kind.__name__}; the nearest is {near}")


def check_same_shape(folder: Path, config: PreTrainedConfig, free: Collection[str] = ()) -> None:
    """Raises ValueError if `folder` is no checkpoint of these scripts, or one of a model that `config` does not
    describe; fields in `free` may differ."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is no checkpoint folder of this script: it has no config.json")
    kind = read_json_object(folder / "config.json").get("model_type")
    if kind != config.model_type:
        raise ValueError(f"checkpoint {str(folder)!r} is of a {kind!r} model, this run trains a {config.model_type!r}")
    try:
        saved, ours = type(config).from_pretrained(folder).to_dict(), config.to_dict()
    # transformers reads a config of any content, and fails in as many ways.
    except Exception as error:
        raise ValueError(f"{str(folder / 'config.json')!r} is no valid config: {error}") from error
    fields = set(type(config).__dataclass_fields__) & set(ours)
    # The Trainer turns use_cache off for the time of the training; the first loss sets problem_type.
    ignored = {"dtype", "transformers_version", "architectures", "kernel_backend", "loss_implementation", "use_cache"}
    # What weights are drawn from says nothing once they are there.
    ignored |= {"initializer_range", "qk_initializer_range", "router_initializer_range", "problem_type", *free}
    for name in sorted(fields - ignored):
        if saved.get(name) != ours[name]:
            raise ValueError(
                f"checkpoint {str(folder)!r} is of another shape: {name} is {saved.get(name)!r} there and "
                f"{ours[name]!r} in this run"
            )


def start_model(kind: type[PreTrainedModel], config: PreTrainedConfig, start: str | None) -> PreTrainedModel:
    """A float32 model with the weights of the model `start`, or new ones for None. Raises ValueError where not all of
    its weights come from there."""
    if start is None:
        return kind(config)
    model, found = kind.from_pretrained(
        start, config=config, dtype="float32", ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = [name[0] if isinstance(name, tuple) else name for key in _NOT_LOADED for name in found[key]]
    if names:
        raise ValueError(
            f"init_from {start!r} holds other weights than this run's {kind.__name__}: {sorted(names)[0]}"
        )
    return model


def check_model_folder(name: str) -> None:
    """Raises FileNotFoundError if `name` means a local folder, rather than a repository of the Hub, and no model is
    there."""
    folder = Path(name)
    # A name on the Hub has one slash; where the examples write to is none's.
    beside_others = len(folder.parts) > 1 and (Path(folder.parts[0]).is_dir() or folder.parts[0] == "outputs")
    beside_others = beside_others or len(folder.parts) > 2
    if folder.exists() or folder.is_absolute() or name.startswith(".") or beside_others:
        if not folder.exists():
            raise FileNotFoundError(f"there is no model in {name!r}: the folder does not exist")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"there is no model in {name!r}: it has no config.json (train_lm.py writes models to best/ and final/)"
            )


def check_model(name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the model `name` is no SeqBoat, or has fewer ids than the tokenizer may give it."""
    if config.model_type != SeqBoatConfig.model_type:
        raise ValueError(f"model {name!r} is a {config.model_type!r} model, not a SeqBoat")
    check_vocabulary(config, tokenizer)


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if a model of this config has fewer ids than the tokenizer may give it."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, the model's vocabulary {config.vocab_size}: they do not belong "
            "together"
        )


def check_launch(cpu: bool) -> None:
    """Raises ValueError where `accelerate launch` was given an FSDP config for the CPU: Accelerate would not shard
    there."""
    if cpu and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "this launch asks for FSDP, but Accelerate shards on accelerators only: on the CPU launch with "
            "configuration/accelerate/ddp_cpu.yaml"
        )
