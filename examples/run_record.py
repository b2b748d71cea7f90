"""The record of a training run, `training_record.json`, from which `python -m hub_upload` writes the model card."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from safe_files import read_json_object, write_json

RECORD_FILE = "training_record.json"
ROOT = Path(__file__).resolve().parent.parent
# Where a run read and wrote is nobody's business: of these only the last part of the path is kept.
_PATHS = ("train_file", "dataset_files", "output_dir", "tokenizer", "init_from", "teacher_labels", "data", "output")
# Folders of a run that hold a model.
PARTS = ("best", "final", "averaged")
_LEFT_OUT = ("resume_from_checkpoint", "overwrite_output_dir")


def published_name(path: str) -> str:
    """The last part of a path, and for the model of a run the run's folder before it."""
    last = Path(path).name
    return f"{Path(path).resolve().parent.name}/{last}" if last in PARTS else last


def published_command(script: str, argv: Sequence[str]) -> str:
    """The command line of a run as it can be published: a recipe or model given first relative to the checkout, no
    other folders, and as if the run had not been interrupted."""
    words = [script]
    arguments = iter(argv)
    for word in arguments:
        name, separator, value = word.partition("=")
        option = name.removeprefix("--").replace("-", "_")
        if not word.startswith("--") and len(words) == 1:
            path = Path(word).resolve()
            words.append(path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name)
        elif option in _LEFT_OUT:
            if not separator:
                next(arguments, None)
        elif option in _PATHS:
            words += [name, published_name(value if separator else next(arguments, ""))]
        else:
            words.append(word)
    return f"python {shlex.join(words)}"


def hardware(device: torch.device, processes: int) -> str:
    """What a run was computed on, for instance `1 x NVIDIA H200`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{processes} x {name}"


def training_before(start: str | None) -> dict[str, str | int]:
    """What a record says of the training of the model that a run starts from, as far as that model has a record; how
    long the best model of a run was trained is not in it."""
    if start is None:
        return {}
    folder = Path(start).resolve()
    run = folder.parent if folder.name in PARTS else folder
    known: dict[str, str | int] = {"init_from": published_name(start)}
    if folder.name != "best" and (run / RECORD_FILE).is_file():
        record = read_json_object(run / RECORD_FILE)
        for name in ("steps", "tokens_seen"):
            if isinstance(record.get(name), int):
                earlier = record.get(f"{name}_before")
                known[f"{name}_before"] = record[name] + (earlier if isinstance(earlier, int) else 0)
    return known


def write_record(folder: Path, record: dict) -> None:
    """Writes `training_record.json` in a run's folder; values that are None are left out."""
    known = {name: value for name, value in record.items() if value is not None}
    write_json(folder / RECORD_FILE, known)
