"""Training rows and validation tokens of `train_lm.py`, and the order in which a process reads them."""

import os
import signal
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
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


class StreamPlaces:
    """Where each group of processes that share rows goes on in a streamed dataset; what a checkpoint keeps of it."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.own = torch.zeros(3, dtype=torch.long)
        self.all = torch.zeros(parts.data_size, 3, dtype=torch.long)

    def reached(self, batch: dict[str, torch.Tensor]) -> None:
        """Takes note of the batch that is trained on."""
        self.own = batch["place"][-1]

    def gather(self, accelerator: Accelerator) -> None:
        """Called by all processes before `state_dict` is."""
        self.all = accelerator.gather(self.own.to(accelerator.device)[None])[:: self.parts.context].cpu()

    def state_dict(self) -> dict:
        return {f"place_of_{rank}": place for rank, place in enumerate(self.all.tolist())}

    def load_state_dict(self, state: dict) -> None:
        self.own = torch.tensor(state[f"place_of_{self.parts.data_rank}"])


def _outlast_signals(worker: int) -> None:
    """The training process ends its last step when it is told to stop, and may need rows for that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def build_loader(a: TrainArguments, parts: Parts, rows, start: int, places: StreamPlaces | None) -> DataLoader:
    """This process's batches from micro-batch `start` on, those of a stream from `places` on. Not prepared by
    Accelerate: the order has to be a function of seed and position for an exact resume."""
    # Without a generator of its own, starting the loader would draw from the random state that dropout goes on with.
    generator = torch.Generator()
    if places is not None:
        rows.place(parts.data_rank, parts.data_size, places.own.tolist())
        # It has been used, so that tokenizers would say at the fork that they go on without threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # One process tokenises while the model trains; a second one would have to deal out documents once more.
        return DataLoader(
            rows, a.batch_size, generator=generator, num_workers=1, prefetch_factor=8, worker_init_fn=_outlast_signals
        )
    order = RowOrder(
        len(rows.tokens), a.sequence_length, a.batch_size, a.seed, start, parts.data_rank, parts.data_size
    )
    return DataLoader(rows, batch_size=a.batch_size, sampler=order, generator=generator)
