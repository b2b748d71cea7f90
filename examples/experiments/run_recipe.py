"""What one run of an experiment trains: a flat mapping of names to values, checked by name before anything starts."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import rglru  # noqa: F401, gives a recurrence its name
from example_paths import read_yaml

from modeling_seqboat import SeqBoatConfig
from modeling_seqboat.configuration_seqboat import FIELD_CHECKS, LEARNED_ROUTERS

TASKS = ("lm", "pathfinder", "listops")
POSITIVE = ("sequence_length", "batch_size", "steps", "evaluation_rows", "history_points")
# Fields younger than the records in docs/: at these values they are no part of a run's key.
YOUNGER = {
    "optimizer": "adamw", "muon_learning_rate": 0.02, "ssm_learning_rate": None, "router_gain": 0.0,
    "schedule": "cosine", "beta2": 0.98, "muon_split": False, "muon_row_beta": None, "qk_learning_rate": None,
}  # fmt: skip

RATES = ("learning_rate", "router_learning_rate", "ssm_learning_rate", "muon_learning_rate", "qk_learning_rate")
_NOTHING = object()


@dataclass(frozen=True)
class RunRecipe:
    """One run. In a file or in `changed`, fields of `SeqBoatConfig` stand beside these fields.

    Attributes:
        task: `lm` (bytes of a text, causal), `pathfinder` or `listops` (generated, bidirectional).
        preset: the model's, of configuration/; `model` are the fields of it that are changed.
        sequence_length: bytes a row (lm), or longest row (listops); pictures have 1,024 pixels.
        batch_size: rows a step.
        router_learning_rate: peak rate of the routers' parameters, None for `learning_rate`.
        ssm_learning_rate: peak rate of the recurrences' parameters, which then do not decay; None for `learning_rate`.
        optimizer: `adamw`, or `muon` for the matrices of the layers' linears, at `muon_learning_rate`.
        muon_split, qk_learning_rate: of `parameter_groups`; muon_row_beta: `row_beta` of `MuonAdamW`.
        router_gain: above 0 a `RouterBudget` of this gain holds the routers to `router_target_rate`.
        schedule: after a linear warm-up of `warmup_steps` the rate falls to `final_rate` times the peak, as a
            `cosine` or `linear`.
        precision: `bf16` (autocast) or `float32`.
        evaluation_rows: validation rows measured at the end.
        history_points: times that the rates are measured during the training, on one batch.
        contour_length, distractors: of Pathfinder, dashes of a long snake and number of short ones.
        train_rows: rows that are generated to train on.
        seed: of weights, order and dropout.
        timed_steps: above 0 the run measures speed alone: steps timed after as many untimed ones.
    """

    task: str
    preset: str
    batch_size: int
    steps: int
    learning_rate: float
    evaluation_rows: int
    sequence_length: int = 1024
    router_learning_rate: float | None = None
    warmup_steps: int = 0
    final_rate: float = 0.02
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    precision: str = "float32"
    history_points: int = 5
    contour_length: int = 14
    distractors: int = 5
    train_rows: int = 0
    seed: int = 0
    timed_steps: int = 0
    optimizer: str = YOUNGER["optimizer"]
    muon_learning_rate: float = YOUNGER["muon_learning_rate"]
    ssm_learning_rate: float | None = YOUNGER["ssm_learning_rate"]
    router_gain: float = YOUNGER["router_gain"]
    schedule: str = YOUNGER["schedule"]
    beta2: float = YOUNGER["beta2"]
    muon_split: bool = YOUNGER["muon_split"]
    muon_row_beta: float | None = YOUNGER["muon_row_beta"]
    qk_learning_rate: float | None = YOUNGER["qk_learning_rate"]
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _one_of("task", self.task, TASKS)
        _one_of("precision", self.precision, ("bf16", "float32"))
        _one_of("optimizer", self.optimizer, ("adamw", "muon"))
        _one_of("schedule", self.schedule, ("cosine", "linear"))
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} must be at least 1, got {getattr(self, name)}")
        if self.task != "lm" and self.train_rows < self.batch_size:
            raise ValueError(
                f"recipe: task {self.task!r} generates its data: train_rows must be at least batch_size "
                f"{self.batch_size}, got {self.train_rows}"
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"recipe: warmup_steps must be from 0 to steps {self.steps}, got {self.warmup_steps}")
        for name in RATES:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"recipe: {name} must be above 0, got {getattr(self, name)}")
        for name in ("beta2", "muon_row_beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"recipe: {name} must be from 0 up to, but not including, 1, got {value}")
        if self.router_gain < 0:
            raise ValueError(f"recipe: router_gain must be at least 0, got {self.router_gain}")
        config = self.config()
        if self.router_gain and (config.router_target_rate is None or config.router_type not in LEARNED_ROUTERS):
            raise ValueError(
                f"recipe: router_gain {self.router_gain} needs a router_target_rate and a learned router_type, got "
                f"{config.router_target_rate} and {config.router_type!r}"
            )

    def config(self) -> SeqBoatConfig:
        """The model's config. Raises ValueError for values that it does not take."""
        # The results on file were made with a target for every layer, when there was no other.
        return SeqBoatConfig.from_preset(self.preset, **{"router_target_scope": "layer", **self.model})

    def flat(self) -> dict[str, Any]:
        values = asdict(self)
        return values | values.pop("model")

    def changed(self, **changes: Any) -> "RunRecipe":
        """The recipe with other values of its own fields or of the config's."""
        return from_flat(self.flat() | changes)

    @property
    def key(self) -> str:
        """Equal for equal recipes: names a run's record."""
        values = {name: value for name, value in self.flat().items() if YOUNGER.get(name, _NOTHING) != value}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"recipe: {name} must be one of {', '.join(allowed)}, got {value!r}")


def from_flat(values: dict[str, Any]) -> RunRecipe:
    """Raises ValueError that names the key at fault: unknown, missing, or with a value of another type."""
    own = {field.name: field for field in fields(RunRecipe) if field.name != "model"}
    for name in values:
        if name not in own and name not in FIELD_CHECKS:
            raise ValueError(
                f"recipe: {name!r} is neither a field of a run ({', '.join(own)}) nor one of SeqBoatConfig"
            )
    missing = [name for name, known in own.items() if known.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"recipe: {', '.join(missing)} must be given")
    given = {name: _typed(name, values[name], own[name].type) for name in values if name in own}
    return RunRecipe(**given, model={name: value for name, value in values.items() if name not in own})


def _typed(name: str, value: Any, kind: Any) -> Any:
    if value is None and kind == float | None:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (float, float | None):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not isinstance(value, bool):
        return value
    wanted = {int: "an integer", str: "a text", bool: "true or false"}.get(kind, "a number")
    raise ValueError(f"recipe: {name} must be {wanted}, got {value!r}")


def load_recipe(path: Path) -> RunRecipe:
    """Raises FileNotFoundError and ValueError that name the file."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping of names to values")
    try:
        return from_flat(values)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
