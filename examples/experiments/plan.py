"""Which runs experiments need, and the file in which finished ones are kept."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from example_paths import json_lines, open_log
from run_recipe import RunRecipe

# Activates too few tokens to matter, and is a rate that a random router takes.
LEAST_RATE = 1e-3


@dataclass(frozen=True)
class Planned:
    """A run of an experiment.

    Attributes:
        labels: what the experiment varies and to which value; the first columns of its table.
        recipe: what is trained.
        rate_like: a run whose mean activation rate this one's random router takes over, once it is known.
        rank: runs with lower ranks come first.
        keep: whether the trained model is kept, for what an experiment measures behind its runs.
    """

    labels: dict[str, Any]
    recipe: RunRecipe
    rate_like: RunRecipe | None = None
    rank: int = field(default=0, compare=False)
    keep: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        return self.recipe.key + (f"-{self.rate_like.key}" if self.rate_like else "")

    @property
    def alone(self) -> bool:
        """Whether nothing else may use the device meanwhile."""
        return self.recipe.timed_steps > 0

    def resolved(self, records: dict[str, dict]) -> RunRecipe:
        """The recipe with every value known."""
        if self.rate_like is None:
            return self.recipe
        rate = records[self.rate_like.key]["mean_rate"]
        return self.recipe.changed(router_random_rate=max(rate or 0.0, LEAST_RATE))


def in_order(planned: Iterable[Planned]) -> list[Planned]:
    """Each run once, those that are timed alone first, then by rank."""
    unique = {}
    for run in planned:
        known = unique.setdefault(run.key, run)
        first = run if run.rank < known.rank else known
        unique[run.key] = replace(first, keep=run.keep or known.keep)
    return sorted(unique.values(), key=lambda run: (not run.alone, run.rank))


class Results:
    """Finished runs, one JSON object a line, each written when its run has ended.

    Raises ValueError for a file that is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict] = {}
        data = path.read_bytes() if path.is_file() else b""
        # An interrupted write leaves a line without its end; that run counts as not made.
        try:
            lines = json_lines(data[: data.rfind(b"\n") + 1], str(path))
        except ValueError as error:
            raise ValueError(f"{error}; this is no record of a run") from error
        for number, record in lines:
            if not isinstance(record.get("key"), str):
                raise ValueError(
                    f"line {number} of {str(path)!r} is no record of a run: its key is {record.get('key')!r}"
                )
            self.records[record["key"]] = record

    def add(self, record: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_log(self.path) as stream:
            stream.write(json.dumps(record, allow_nan=False).encode("utf-8") + b"\n")
        self.records[record["key"]] = record
