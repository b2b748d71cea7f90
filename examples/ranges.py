"""Ranges of arguments: what lies outside is refused by name before any work starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What torch, numpy and Python take as a seed, with room for a process's number.
LARGEST_SEED = 2**32 - 2**16


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `above` leaves `low` out, `below` leaves `high` out. NaN lies outside, and
    infinity but where `endless`."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    endless: bool = False

    def __contains__(self, value: Any) -> bool:
        if not (math.isfinite(value) or (self.endless and value == math.inf)):
            return False
        return (self.low < value or (value == self.low and not self.above)) and (
            value < self.high or (value == self.high and not self.below)
        )

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"must be above {self.low}" if self.above else f"must be at least {self.low}"
        if self.above and self.below:
            return f"must lie between {self.low} and {self.high}"
        if self.below:
            return f"must be at least {self.low} and below {self.high}"
        return f"must be from {self.low} to {self.high}"


def at_least(low: float) -> Range:
    return Range(low)


def above(low: float) -> Range:
    return Range(low, above=True)


def from_to(low: float, high: float) -> Range:
    return Range(low, high)


# A share of something that leaves something over.
PART = Range(0, 1, above=True, below=True)
# Of Adam's running means.
BETA = Range(0, 1, below=True)
# Infinity stands for "no limit".
MAX_NORM = Range(0, above=True, endless=True)


def check_ranges(arguments: Any, ranges: Mapping[str, Range], flag: str = "{}") -> None:
    """Raises ValueError for a value outside its range. None, an argument that was not given, has none.

    Args:
        arguments: what holds the values, a dataclass or a namespace.
        ranges: by the name of the argument.
        flag: how an error calls an argument.
    """
    for name, allowed in ranges.items():
        value = getattr(arguments, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{flag.format(name)} {allowed}, got {value}")
