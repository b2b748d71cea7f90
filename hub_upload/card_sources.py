"""What is known about a model beyond its config: the trainer's state, a run record and an evaluation file.

Nothing is estimated here: a value that no source states is None or absent, and the card leaves it out.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .errors import HubUploadError
from .long_context import checked_long_context
from .markdown import code_block, escaped, one_line

EVALUATION_FILE = "evaluation.json"
RECORD_FILE = "training_record.json"
STATE_FILE = "trainer_state.json"
METRICS_FILE = "metrics.jsonl"
# In the folder of a run: several evaluations, and the file of `benchmarks/bench_long_context.py`.
RUN_EVALUATIONS = ("evaluation*.json", "long_context.json")

# Keys of a run record that the card prints, and how it calls them. Others are not printed: a record may hold paths
# and names of machines that are nobody's business.
RECORD_LABELS = {
    "dataset": "Data",
    "init_from": "Started from the model",
    "steps_before": "Its optimizer steps",
    "tokens_seen_before": "Tokens it had seen",
    "tokens_seen": "Tokens seen",
    "sequence_length": "Sequence length",
    "batch_size": "Sequences a step",
    "tokens_per_step": "Tokens a step",
    "gradient_accumulation_steps": "Gradient accumulation steps",
    "steps": "Optimizer steps",
    "epochs": "Epochs",
    "optimizer": "Optimizer",
    "learning_rate": "Peak learning rate",
    "router_learning_rate": "Peak learning rate of the routers",
    "muon_learning_rate": "Peak learning rate of Muon",
    "muon_row_beta": "Even rows of Muon's updates: factor of their mean",
    "muon_split": "Attention's input projection is three matrices to Muon",
    "qk_learning_rate": "Peak learning rate of the scales of queries and keys",
    "weight_decay": "Weight decay",
    "average_decay": "Decay of the average of the weights",
    "teacher": "Learned from the predictions of",
    "teacher_share": "Their part of the loss",
    "betas": "Betas",
    "max_grad_norm": "Gradient clipping",
    "lr_scheduler_type": "Schedule",
    "warmup_steps": "Warm-up steps",
    "precision": "Precision",
    "seed": "Seed",
    "hardware": "Hardware",
    "wall_clock_hours": "Wall-clock time (h)",
    "training_hours": "Training time without validation and saving (h)",
    "tokens_per_second": "Tokens a second",
    "train_loss": "Last training loss",
}
# Names in the log of `examples/train_lm.py` -> names in Trainer's.
_TRAINER_NAMES = {"train/loss": "loss", "train/learning_rate": "learning_rate"}
LARGEST = 1e300
_VALIDATION = "validation/bits_per_byte"
# A run that averages its weights scores both models; the folder `averaged` holds the average.
_AVERAGED_VALIDATION = "validation/averaged_bits_per_byte"
# Measurements of the evaluation run that say nothing about the model.
_NOT_RESULTS = re.compile(r"eval_(runtime|samples_per_second|steps_per_second|model_preparation_time)|epoch|step")
_RATE_KEY = re.compile(r"(?:.*/)?(?:layers?[._/]?(\d+)[._/])?activation_rate(?:\D*?(\d+))?")


@dataclass
class Sources:
    """Everything the card may state.

    Attributes:
        procedure: label -> value, for the training table.
        command: that started the training.
        results: for the metadata's model-index and the table of results.
        protocols: how the results were measured, one paragraph an evaluation.
        long_context: measurements of `benchmarks/bench_long_context.py`.
        plain_results: metric -> value where the data that was evaluated on is not named.
        activation_rates: mean share of activated tokens, one a layer, from 0 to 1.
        remarks: for the user, not for the card.
    """

    procedure: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    results: list[EvalResult] = field(default_factory=list)
    protocols: list[str] = field(default_factory=list)
    long_context: dict[str, Any] | None = None
    plain_results: dict[str, float] = field(default_factory=dict)
    activation_rates: list[float] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_sources(
    model: Path,
    layers: int,
    *,
    records: Path | None = None,
    evaluations: Sequence[Path] = (),
    record: Path | None = None,
    state: Path | None = None,
) -> Sources:
    """Read what lies beside a model, or where the caller says.

    Args:
        model: the model folder, searched for `evaluation.json`, `training_record.json` and `trainer_state.json` (also
            that of its last `checkpoint-*`).
        layers: number of layers, which the activation rates must have.
        records: folder of a run of `examples/train_lm.py`, searched for `metrics.jsonl`, `training_record.json`,
            `evaluation*.json` and `long_context.json`; for models called `best`, `final` and `averaged` the folder
            they are in, whose evaluations are not those of `averaged`.
        evaluations, record, state: files to use instead.

    Raises HubUploadError when a file that was named does not exist, or one that exists is not what it should be.
    """
    sources = Sources()
    run = _run_folder(model, records)
    state_file = _existing(state) or _trainer_state(model)
    run_state: dict[str, Any] = {}
    if state_file is not None:
        _read_state(_read_object(state_file), sources, layers)
    elif run is not None and (run / METRICS_FILE).is_file():
        run_state = _state_of_metrics(run / METRICS_FILE, model.name)
        _read_state(run_state, sources, layers)
    record_file = _existing(record) or _if_file(model / RECORD_FILE)
    if record_file is not None:
        _read_record(_read_object(record_file), record_file, sources)
    elif run is not None and (run / RECORD_FILE).is_file():
        _read_record(_read_object(run / RECORD_FILE) | _reached(run_state), run / RECORD_FILE, sources)
    for file in _evaluation_files(model, run, evaluations):
        _read_evaluation(_read_object(file), file, sources, layers)
    return sources


def format_number(value: float) -> str:
    """A number as the card prints it: whole numbers with separators, others with at most five significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.5g}"


def _run_folder(model: Path, records: Path | None) -> Path | None:
    if records is None:
        return model.absolute().parent if model.name in ("best", "final", "averaged") else None
    if not (records / METRICS_FILE).is_file():
        raise HubUploadError(f"{records} is not the folder of a run of train_lm.py: it has no {METRICS_FILE}.")
    return records


def _evaluation_files(model: Path, run: Path | None, named: Sequence[Path]) -> list[Path]:
    if named:
        return [_existing(file) for file in named]
    if (model / EVALUATION_FILE).is_file() or run is None:
        return [file for file in [model / EVALUATION_FILE] if file.is_file()]
    # Of a run's models these are of the trained one.
    patterns = () if model.name == "averaged" else RUN_EVALUATIONS
    return [file for pattern in patterns for file in sorted(run.glob(pattern))]


def _reached(run_state: dict[str, Any]) -> dict[str, Any]:
    """What a run's record says of its end, for the step whose weights are published."""
    last: dict[str, Any] = {}
    for entry in run_state.get("log_history", []):
        last |= entry
    reached = {
        "steps": run_state.get("global_step"),
        "tokens_seen": last.get("train/tokens"),
        "training_hours": round(last["train/seconds"] / 3600, 4) if _is_number(last.get("train/seconds")) else None,
    }
    return {name: value for name, value in reached.items() if _is_number(value) and value > 0}


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _existing(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise HubUploadError(f"the file {path} does not exist.")
    return path


def _trainer_state(model: Path) -> Path | None:
    if (model / STATE_FILE).is_file():
        return model / STATE_FILE
    found = {}
    for file in model.glob(f"checkpoint-*/{STATE_FILE}"):
        number = re.fullmatch(r"checkpoint-([0-9]+)", file.parent.name)
        if number:
            found[int(number[1])] = file
    return found[max(found)] if found else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    # A text nested too deeply is a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise HubUploadError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise HubUploadError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _state_of_metrics(path: Path, folder: str) -> dict[str, Any]:
    """The log of `examples/train_lm.py` in the form of Trainer's state, up to the step whose weights `folder`
    holds."""
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not _is_number(entry["step"]):
                raise ValueError(f"step={entry['step']!r:.80}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HubUploadError(
                f"{path} is not a log of JSON objects with a 'step': line {number}: {error!r}"
            ) from error
        entries.append(entry)
    entries.sort(key=lambda entry: entry["step"])
    validated = [entry for entry in entries if _is_number(entry.get(_VALIDATION))]
    if folder == "best" and validated:
        last = min(validated, key=lambda entry: (entry[_VALIDATION], entry["step"]))["step"]
        entries = [entry for entry in entries if entry["step"] <= last]
    history = []
    for entry in entries:
        if folder == "averaged":
            # The average is another model, whose rates and loss were not logged.
            kept = [name for name in entry if name != "train/loss" and not _RATE_KEY.fullmatch(name)]
            entry = {name: entry[name] for name in kept}
        renamed = {_TRAINER_NAMES.get(name, name): value for name, value in entry.items()}
        scores = [renamed.pop(name, None) for name in (_VALIDATION, _AVERAGED_VALIDATION)]
        score = scores[folder == "averaged"]
        if score is not None:
            renamed["eval_bits_per_byte"] = score
        history.append(renamed)
    return {"global_step": entries[-1]["step"] if entries else 0, "log_history": history}


def _is_number(value: Any) -> bool:
    # Compared, for no float holds some whole numbers of JSON; NaN compares with nothing.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _read_state(state: dict[str, Any], sources: Sources, layers: int) -> None:
    # Trainer saves 0 for what it did not count.
    for key, label in (
        ("global_step", "Optimizer steps"),
        ("epoch", "Epochs"),
        ("train_batch_size", "Sequences a device and step"),
        ("num_input_tokens_seen", "Tokens seen"),
        ("total_flos", "Floating point operations (Trainer's estimate)"),
    ):
        if _is_number(state.get(key)) and state[key] > 0:
            sources.procedure[label] = format_number(state[key])
    history = state.get("log_history")
    history = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    rates = [entry["learning_rate"] for entry in history if _is_number(entry.get("learning_rate"))]
    if rates:
        sources.procedure["Highest logged learning rate"] = format_number(max(rates))
    losses = [entry["loss"] for entry in history if _is_number(entry.get("loss"))]
    if losses:
        sources.procedure["Last logged training loss"] = format_number(losses[-1])
    evaluations = [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    if evaluations:
        _take_plain_results(evaluations[-1], sources)
    for entry in reversed(history):
        by_layer = _rates_of(entry)
        if by_layer and sorted(by_layer) == list(range(layers)):
            sources.activation_rates = [by_layer[layer] for layer in range(layers)]
            break


def _rates_of(entry: dict[str, Any]) -> dict[int, float]:
    rates = {}
    for key, value in entry.items():
        match = _RATE_KEY.fullmatch(key)
        number = match and (match[1] or match[2])
        if number and _is_number(value) and 0 <= value <= 1:
            rates[int(number)] = float(value)
    return rates


def _take_plain_results(values: dict[str, Any], sources: Sources) -> None:
    for key, value in values.items():
        if key.startswith("eval_") and _is_number(value) and not _NOT_RESULTS.fullmatch(key):
            if _RATE_KEY.fullmatch(key) is None:
                sources.plain_results[key.removeprefix("eval_")] = float(value)


def _read_record(record: dict[str, Any], path: Path, sources: Sources) -> None:
    command = record.get("command")
    if command is not None and not (isinstance(command, str) and command.strip()):
        raise HubUploadError(f"{path}: command={command!r} must be a text.")
    sources.command = command and one_line(command)
    ignored = sorted(set(record) - set(RECORD_LABELS) - {"command"})
    if ignored:
        sources.remarks.append(f"{path.name}: not printed in the card: {one_line(', '.join(ignored))}.")
    for key, label in RECORD_LABELS.items():
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, list) and value and all(_is_number(v) or isinstance(v, str) for v in value):
            sources.procedure[label] = ", ".join(format_number(v) if _is_number(v) else one_line(v) for v in value)
        elif key == "muon_split" and isinstance(value, bool):
            sources.procedure[label] = "yes" if value else "no"
        elif _is_number(value):
            sources.procedure[label] = str(value) if key == "seed" else format_number(value)
        elif isinstance(value, str) and value.strip():
            sources.procedure[label] = one_line(value)
        else:
            raise HubUploadError(f"{path}: {key}={value!r:.200} must be a number, a text or a list of them.")


def _read_evaluation(evaluation: dict[str, Any], path: Path, sources: Sources, layers: int) -> None:
    rates = evaluation.get("activation_rates")
    if rates is not None:
        if (
            not isinstance(rates, list)
            or len(rates) != layers
            or not all(_is_number(r) and 0 <= r <= 1 for r in rates)
        ):
            raise HubUploadError(
                f"{path}: activation_rates={rates!r:.200} must be a list of {layers} numbers from 0 to 1, one a layer."
            )
        # Of several evaluations the first one's stand in the card.
        if not sources.results:
            sources.activation_rates = [float(rate) for rate in rates]
    if "long_context" in evaluation:
        sources.long_context = checked_long_context(evaluation["long_context"], path)
        return
    if "results" not in evaluation:
        # The flat file that Trainer's save_metrics writes.
        _take_plain_results(evaluation, sources)
        if not sources.plain_results and rates is None:
            raise HubUploadError(f"{path}: found neither 'results', 'activation_rates' nor any 'eval_...' number.")
        return
    results = evaluation["results"]
    if not isinstance(results, list):
        raise HubUploadError(f"{path}: results must be a list, not a {type(results).__name__}.")
    for number, entry in enumerate(results):
        sources.results += _eval_results(entry, f"{path}: results[{number}]")
    sources.protocols += _protocol(evaluation, path)


def _protocol(evaluation: dict[str, Any], path: Path) -> list[str]:
    """How `examples/evaluate_lm.py` measured, in words; nothing for files that do not say so."""
    protocol = evaluation.get("protocol")
    if protocol is None:
        return []
    try:
        scored, size, context, dtype = (protocol[key] for key in ("scored_tokens", "bytes", "context", "dtype"))
        stride = protocol.get("stride")
        if not isinstance(dtype, str) or not all(
            value is None or (_is_number(value) and float(value).is_integer())
            for value in (scored, size, context, stride)
        ):
            raise ValueError("numbers of tokens and bytes, and the name of a dtype, are needed")
        seen = "everything before it" if context is None else f"up to {context - 1:,} tokens before it"
        if stride is not None and scored >= context:
            seen = f"{context - stride:,} to {context - 1:,} tokens before it (fewer in the first {context:,} tokens)"
        words = f"{scored:,} tokens of {size:,} bytes scored once each, with {seen} as context, in {escaped(dtype)}"
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise HubUploadError(
            f"{path}: protocol={protocol!r:.200} is not what examples/evaluate_lm.py writes."
        ) from error
    names = {escaped(entry["dataset"]["name"]) for entry in evaluation["results"]}
    command = evaluation.get("command")
    block = f":\n\n{code_block(one_line(command))}" if isinstance(command, str) else "."
    return [f"{', '.join(sorted(names))}: {words}{block}"]


def _eval_results(entry: Any, where: str) -> list[EvalResult]:
    try:
        dataset, metrics = entry["dataset"], entry["metrics"]
        task, _ = entry["task"], dataset["name"]
    except (TypeError, KeyError) as error:
        raise HubUploadError(
            f"{where} must hold 'task' (a Hub task such as 'text-generation'), 'dataset' (an object with 'name') and "
            f"'metrics' (a list of objects with 'type' and 'value'); missing: {error}."
        ) from error
    if not isinstance(dataset, dict) or not isinstance(metrics, list):
        raise HubUploadError(f"{where}: 'dataset' must be an object and 'metrics' a list.")
    texts = {"task": task} | {key: dataset.get(key) for key in ("name", "type", "config", "split", "revision")}
    for key, text in texts.items():
        if not (isinstance(text, str) and one_line(text)) and (text is not None or key in ("task", "name")):
            raise HubUploadError(f"{where}: {key}={text!r:.200} must be a text.")
    texts = {key: text and one_line(text) for key, text in texts.items()}
    found = []
    for metric in metrics:
        if (
            not isinstance(metric, dict)
            or not (isinstance(metric.get("type"), str) and one_line(metric["type"]))
            or not isinstance(metric.get("name"), (str, type(None)))
            or not _is_number(metric.get("value"))
        ):
            raise HubUploadError(
                f"{where}: metric {metric!r:.200} must hold a text 'type', a finite number 'value', and may hold a "
                "text 'name'."
            )
        name = metric.get("name")
        found.append(
            EvalResult(
                task_type=texts["task"],
                dataset_type=texts["type"] or texts["name"],
                dataset_name=texts["name"],
                dataset_config=texts["config"],
                dataset_split=texts["split"],
                metric_type=one_line(metric["type"]),
                metric_name=name and one_line(name),
                metric_value=metric["value"],
            )
        )
    return found
