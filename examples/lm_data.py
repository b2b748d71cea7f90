"""Training rows and validation tokens of `train_lm.py`, and the order in which a process reads them."""

from typing import NamedTuple

import numpy as np
import torch
from lm_arguments import TrainArguments
from lm_parts import Parts
from text_data import (
    RowOrder,
    StreamedBlocks,
    TokenWindows,
    joined_tokens,
    read_text_file,
    split_text,
    text_of,
)
from torch.utils.data import DataLoader, Dataset


class HeldOut(NamedTuple):
    """Tokens that are only scored, and how many bytes of text one stands for."""

    tokens: np.ndarray
    bytes_per_token: float


def load_data(a: TrainArguments, tokenizer) -> tuple[Dataset, dict[str, HeldOut]]:
    """Training rows, and what models are scored on: `validation`, and with `score_test` also `test`."""
    if a.train_file is not None:
        text = read_text_file(a.train_file)
        splits = split_text(text, tokenizer, a.validation_fraction, a.max_bytes, with_test=a.score_test)
        held_out = {"validation": HeldOut(splits.validation, splits.bytes_per_token)}
        if a.score_test:
            if splits.test is None:
                raise ValueError(
                    f"score_test is for enwik8, whole, whose test split is known; train_file {a.train_file!r} has none"
                )
            held_out["test"] = HeldOut(splits.test, splits.test_bytes_per_token)
        return TokenWindows(splits.train, a.sequence_length), held_out
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    def load(split: str):
        return load_dataset(
            a.dataset_name, a.dataset_config, data_files=a.dataset_files, split=split, streaming=a.streaming
        )

    try:
        train = load(a.dataset_split)
    except DatasetGenerationError as error:
        raise ValueError(f"dataset {a.dataset_name!r} cannot be read or is empty: {error.__cause__}") from error
    if next(iter(train), None) is None:
        raise ValueError(f"split {a.dataset_split!r} of dataset {a.dataset_name!r} is empty")
    if a.validation_split is not None:
        held_out = load(a.validation_split)
    else:
        # Rows at the beginning, since a streamed dataset has no known end.
        kept = 0
        size = 0
        for example in train:
            kept += 1
            size += len(text_of(example, a.text_column).encode("utf-8"))
            if size >= a.eval_tokens:
                break
        if not a.streaming:
            kept = min(kept, max(1, int(len(train) * a.validation_fraction)))
        if next(iter(train.skip(kept)), None) is None if a.streaming else kept == len(train):
            raise ValueError(f"dataset {a.dataset_name!r} is too small: validation takes all of its {kept} rows")
        held_out, train = train.take(kept), train.skip(kept)
    limit = a.eval_tokens + a.sequence_length
    scored = {"validation": HeldOut(*joined_tokens(held_out, a.text_column, tokenizer, limit))}
    if not a.streaming:
        rows, _ = joined_tokens(train, a.text_column, tokenizer, 2**62)
        return TokenWindows(rows, a.sequence_length), scored
    return StreamedBlocks(train, a.text_column, tokenizer, a.sequence_length), scored


def build_loader(a: TrainArguments, parts: Parts, rows, start: int) -> DataLoader:
    """This process's batches from micro-batch `start` on. Not prepared by Accelerate: the order has to be a function
    of seed and position for an exact resume."""
    # Without a generator of its own, starting the loader would draw from the random state that dropout goes on with.
    generator = torch.Generator()
    place = {"start": start, "rank": parts.data_rank, "world": parts.data_size}
    if isinstance(rows, StreamedBlocks):
        rows.place(a.batch_size, **place)
        return DataLoader(rows, batch_size=a.batch_size, generator=generator)
    order = RowOrder(len(rows.tokens), a.sequence_length, a.batch_size, a.seed, **place)
    return DataLoader(rows, batch_size=a.batch_size, sampler=order, generator=generator)
