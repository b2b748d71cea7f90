"""ListOps by the rules of Long Range Arena (arXiv 2011.04006): nested operations on digits, written as one sequence.

Vocabulary of 19 ids: `<s> <pad> </s> <unk>`, the digits, `[MIN [MAX [MED [SM` and the closing bracket.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from synthetic import cached
from tqdm.auto import tqdm

TOKENS = ("<s>", "<pad>", "</s>", "<unk>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
IDS = {token: index for index, token in enumerate(TOKENS)}
PAD, ZERO, CLOSE = IDS["<pad>"], IDS["0"], IDS["]"]
OPERATORS = (IDS["[MIN"], IDS["[MAX"], IDS["[MED"], IDS["[SM"])

DEEPEST = 10
OPERATOR_PROBABILITY = 0.25
ARGUMENTS = (2, 10)
# A tree is kept when its length lies between these, exclusive.
LENGTHS = (500, 2000)
BLOCK = 2000


def evaluate(ids) -> int:
    """The value, 0 to 9, of one tree given as token ids.

    MED is the integer part of the median, SM the sum modulo 10. Raises ValueError for what is no tree.
    """
    stack: list[tuple[int, list[int]]] = []
    values: list[int] = []
    for place, token in enumerate(ids):
        token = int(token)
        if ZERO <= token < ZERO + 10 and stack:
            values.append(token - ZERO)
        elif token in OPERATORS and (stack or place == 0):
            stack.append((token, values))
            values = []
        elif token == CLOSE and stack and values:
            operator, outer = stack.pop()
            outer.append(_apply(operator, values))
            values = outer
        else:
            raise ValueError(f"token {place} of {len(ids)} is misplaced: {token}")
    if stack or len(values) != 1:
        raise ValueError("the tree is not closed")
    return values[0]


def _apply(operator: int, values: list[int]) -> int:
    if operator == IDS["[MIN"]:
        return min(values)
    if operator == IDS["[MAX"]:
        return max(values)
    if operator == IDS["[SM"]:
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def encode(text: str) -> list[int]:
    """`[MAX 2 9 [MIN 4 7 ] 0 ]` -> ids; symbols are separated by blanks."""
    return [IDS[symbol] for symbol in text.split()]


def random_trees(
    rng: np.random.Generator, count: int = BLOCK, lengths: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """Those of `count` random trees whose length is within the limits (exclusive; default LENGTHS), as token ids
    (uint8).

    The root is an operator at depth 1; below, a node is an operator with probability 0.25, and at depth 10 always a
    digit. All trees grow together, level by level: one at a time would take hours for a whole data set.
    """
    owner, parent = [np.arange(count)], [np.zeros(count, dtype=np.int64)]
    is_operator = [np.ones(count, dtype=bool)]
    for depth in range(2, DEEPEST + 1):
        operators = np.flatnonzero(is_operator[-1])
        arguments = rng.integers(ARGUMENTS[0], ARGUMENTS[1] + 1, size=len(operators))
        parent.append(np.repeat(operators, arguments))
        owner.append(owner[-1][parent[-1]])
        chosen = rng.random(len(parent[-1])) < OPERATOR_PROBABILITY
        is_operator.append(chosen if depth < DEEPEST else np.zeros_like(chosen))
    # From the leaves up: how many tokens each node takes.
    sizes = [np.where(operator, 2, 1) for operator in is_operator]
    for depth in range(len(sizes) - 1, 0, -1):
        sizes[depth - 1] = sizes[depth - 1] + np.bincount(
            parent[depth], sizes[depth], minlength=len(sizes[depth - 1])
        ).astype(np.int64)
    total = sizes[0]
    first = np.concatenate([[0], np.cumsum(total)])
    tokens = np.empty(first[-1], dtype=np.uint8)
    # From the root down: children stand in order behind their operator.
    start = first[:-1]
    for depth, size in enumerate(sizes):
        if depth:
            before = np.cumsum(size) - size
            eldest = np.r_[True, parent[depth][1:] != parent[depth][:-1]] if len(size) else np.zeros(0, dtype=bool)
            offset = before - before[np.maximum.accumulate(np.where(eldest, np.arange(len(size)), 0))]
            start = start[parent[depth]] + 1 + offset
        operator = is_operator[depth]
        drawn = np.where(
            operator, rng.choice(OPERATORS, size=len(size)), ZERO + rng.integers(0, 10, size=len(size))
        )  # fmt: skip
        tokens[start] = drawn
        tokens[start[operator] + size[operator] - 1] = CLOSE
    shortest, longest = lengths or LENGTHS
    for index in np.flatnonzero((total > shortest) & (total < longest)):
        yield tokens[first[index] : first[index + 1]]


def generate(seed: int, count: int, lengths: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """`count` distinct trees: tokens (all of them in a row, uint8), lengths (int64) and labels (int64)."""
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    trees: list[np.ndarray] = []
    with tqdm(total=count, desc="ListOps trees", unit="tree") as progress:
        for tree in itertools.chain.from_iterable(random_trees(rng, BLOCK, lengths) for _ in itertools.count()):
            key = tree.tobytes()
            if key in seen:
                continue
            seen.add(key)
            trees.append(tree)
            progress.update()
            if len(trees) == count:
                break
    return {
        "tokens": np.concatenate(trees),
        "lengths": np.array([len(tree) for tree in trees]),
        "labels": np.array([evaluate(tree.tolist()) for tree in tqdm(trees, desc="ListOps values", unit="tree")]),
    }


def load(
    folder: Path, seed: int, count: int, lengths: tuple[int, int] | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Trees and labels, generated into `folder` the first time; lengths (exclusive) other than the task's are
    named."""
    which = "" if lengths is None else f"-lengths{lengths[0]}-{lengths[1]}"
    arrays = cached(folder / f"listops-seed{seed}-{count}{which}.npz", lambda: generate(seed, count, lengths))
    borders = np.cumsum(arrays["lengths"])[:-1]
    return np.split(arrays["tokens"], borders), arrays["labels"]
