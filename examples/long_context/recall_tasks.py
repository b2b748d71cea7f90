"""Texts whose answers lie far back: key-value recall among noise, facts planted in real text, selective copying.

Every text is a function of task, seed and number, of any length, in the byte tokenizer's 264 ids. Questions stand at
the end, each followed by its answer, so that one forward over a text scores all of them.

Letters: L tokens of a text, Q questions, A tokens of an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("noise", "key", "value", "query")
NOISE, KEY, VALUE, QUERY = range(len(KINDS))

# Ids of the generated tasks. Bytes below 32 do not occur in text, so that a question's mark cannot be mistaken.
QUESTION = 1
_VALUES, _KEYS, _NOISE = 32, 64, 128
FACT_START, FACT_END = 2, 3


@dataclass(frozen=True)
class Example:
    """One text and its questions.

    Attributes:
        tokens: (L,) int64 ids.
        kinds: (L,) int64 places in `KINDS` (for mixed streams in the names that their builder gives).
        answers: (Q, A) int64, the columns that the answers stand in; each is predicted at the column before it.
        distances: (Q,) int64, tokens from the last token of what is asked for to the column that predicts the answer.
        groups: (Q,) int64, which kind of question each is; 0 where there is one kind.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    answers: np.ndarray
    distances: np.ndarray
    groups: np.ndarray


def spread(generator: np.random.Generator, count: int, size: int, room: int) -> np.ndarray:
    """Starts of `count` pieces of `size` tokens in `room` tokens, uniform among those that do not overlap, in order.

    Raises ValueError where they do not fit.
    """
    free = room - count * size
    if free < 0:
        raise ValueError(f"{count} pieces of {size} tokens do not fit into {room} tokens: use a longer text or fewer")
    # Gaps between pieces are the differences of sorted draws from the places that are left.
    chosen = np.sort(generator.integers(0, free + 1, count))
    return chosen + size * np.arange(count)


@dataclass(frozen=True)
class RecallTask:
    """Pairs of a key and a value among noise; at the end some of the keys are asked for.

    A question is its mark, a key, and the value. The three alphabets do not overlap.

    Attributes:
        pairs, queries: how many; queries are of different pairs.
        keys, values, noise: sizes of the alphabets. Chance is 1 / values.
        within: pairs lie in this share of the text, at its beginning.
    """

    pairs: int = 6
    queries: int = 4
    keys: int = 64
    values: int = 16
    noise: int = 64
    within: float = 1.0

    def __post_init__(self):
        _expect(self, "pairs", 1, self.keys)
        _expect(self, "queries", 1, self.pairs)
        _expect(self, "keys", 1, _NOISE - _KEYS)
        _expect(self, "values", 2, _KEYS - _VALUES)
        _expect(self, "noise", 1, 128)
        if not 0 < self.within <= 1:
            raise ValueError(f"within must lie in (0, 1], got {self.within}")

    chance = property(lambda self: 1 / self.values)
    needed = property(lambda self: 2 * self.pairs + 2 * self.queries)
    vocabulary = 264
    kinds = KINDS
    group_names = ("recall",)

    def example(self, length: int, generator: np.random.Generator) -> Example:
        """A text of exactly `length` tokens. Raises ValueError where it is too short."""
        body = length - 3 * self.queries
        tokens = _NOISE + generator.integers(0, self.noise, length)
        kinds = np.full(length, NOISE)
        starts = spread(generator, self.pairs, 2, int(body * self.within) if body > 0 else body)
        keys = _KEYS + generator.permutation(self.keys)[: self.pairs]
        values = _VALUES + generator.integers(0, self.values, self.pairs)
        tokens[starts], tokens[starts + 1] = keys, values
        kinds[starts], kinds[starts + 1] = KEY, VALUE
        asked = generator.permutation(self.pairs)[: self.queries]
        places = body + 3 * np.arange(self.queries)
        tokens[places], tokens[places + 1], tokens[places + 2] = QUESTION, keys[asked], values[asked]
        kinds[body:] = QUERY
        distances = places + 1 - (starts[asked] + 1)
        return Example(tokens, kinds, places[:, None] + 2, distances, np.zeros(self.queries, np.int64))


@dataclass(frozen=True)
class CopyTask:
    """Selective copying (arXiv 2312.00752): values among noise, to be written down in order after the question's
    mark."""

    items: int = 8
    values: int = 16
    noise: int = 64

    def __post_init__(self):
        _expect(self, "items", 1, 10**6)
        _expect(self, "values", 2, _KEYS - _VALUES)
        _expect(self, "noise", 1, 128)

    chance = property(lambda self: 1 / self.values)
    needed = property(lambda self: 2 * self.items + 1)
    vocabulary = 264
    kinds = KINDS
    group_names = ("copy",)

    def example(self, length: int, generator: np.random.Generator) -> Example:
        """A text of exactly `length` tokens. Raises ValueError where it is too short."""
        body = length - 1 - self.items
        tokens = _NOISE + generator.integers(0, self.noise, length)
        kinds = np.full(length, NOISE)
        starts = spread(generator, self.items, 1, body)
        tokens[starts] = _VALUES + generator.integers(0, self.values, self.items)
        kinds[starts] = VALUE
        tokens[body] = QUESTION
        tokens[body + 1 :] = tokens[starts]
        kinds[body:] = QUERY
        answers = body + 1 + np.arange(self.items)
        return Example(tokens, kinds, answers[:, None], answers - 1 - starts, np.zeros(self.items, np.int64))


@dataclass(frozen=True)
class NeedleTask:
    """Facts planted in real text: a name of letters and a number of digits between marks; at the end some names are
    asked for.

    Attributes:
        text: (bytes,) uint8; a text begins at a random byte of it, and goes round its end.
        facts, queries: how many; name_size, digits: letters of a name, digits of a number.
    """

    text: np.ndarray
    facts: int = 6
    queries: int = 4
    name_size: int = 3
    digits: int = 2

    def __post_init__(self):
        if len(self.text) == 0:
            raise ValueError("the text that facts are planted in is empty")
        _expect(self, "facts", 1, 26**self.name_size)
        _expect(self, "queries", 1, self.facts)
        _expect(self, "name_size", 1, 8)
        _expect(self, "digits", 1, 8)

    chance = property(lambda self: 10.0**-self.digits)
    needed = property(lambda self: (self.facts + self.queries) * (2 + self.name_size + self.digits))
    vocabulary = 264
    kinds = KINDS
    group_names = ("fact",)

    def example(self, length: int, generator: np.random.Generator) -> Example:
        """A text of exactly `length` tokens. Raises ValueError where it is too short."""
        size = 1 + self.name_size + self.digits
        body = length - self.queries * size
        starts = spread(generator, self.facts, size + 1, body)
        first = int(generator.integers(0, len(self.text)))
        tokens = np.take(self.text, np.arange(first, first + length), mode="wrap").astype(np.int64)
        kinds = np.full(length, NOISE)
        # Names differ: a number in base 26 each.
        drawn = generator.choice(26**self.name_size, self.facts, replace=False)
        names = ord("a") + drawn[:, None] // 26 ** np.arange(self.name_size) % 26
        numbers = ord("0") + generator.integers(0, 10, (self.facts, self.digits))
        inside = starts[:, None] + 1 + np.arange(self.name_size)
        tokens[starts], tokens[inside], kinds[starts], kinds[inside] = FACT_START, names, KEY, KEY
        inside = starts[:, None] + 1 + self.name_size + np.arange(self.digits)
        tokens[inside], kinds[inside] = numbers, VALUE
        tokens[starts + size], kinds[starts + size] = FACT_END, VALUE
        asked = generator.permutation(self.facts)[: self.queries]
        places = body + size * np.arange(self.queries)
        tokens[places] = QUESTION
        tokens[places[:, None] + 1 + np.arange(self.name_size)] = names[asked]
        answers = places[:, None] + 1 + self.name_size + np.arange(self.digits)
        tokens[answers] = numbers[asked]
        kinds[body:] = QUERY
        distances = answers[:, 0] - 1 - (starts[asked] + self.name_size + self.digits)
        return Example(tokens, kinds, answers, distances, np.zeros(self.queries, np.int64))


def _expect(task, name: str, least: int, most: int) -> None:
    value = getattr(task, name)
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {value}")


def example_of(task, length: int, seed: int, number: int) -> Example:
    """Text `number` of a task: the same for the same seed and length, whatever was made before."""
    return task.example(length, np.random.default_rng((seed, length, number)))


@dataclass(frozen=True)
class Batch:
    """Examples of one length, stacked; `Example` says what the fields are. (B, L), (B, Q, A) and (B, Q) int64."""

    tokens: np.ndarray
    kinds: np.ndarray
    answers: np.ndarray
    distances: np.ndarray
    groups: np.ndarray


def batch_of(make: Callable[[int], Example], numbers: Sequence[int]) -> Batch:
    """The examples `make(number)`, which have as many questions each, stacked."""
    examples = [make(number) for number in numbers]
    return Batch(*(np.stack([getattr(e, name) for e in examples]) for name in Batch.__dataclass_fields__))
