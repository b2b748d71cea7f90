"""Texts for the example scripts: files and `datasets` datasets, tokenised and packed into rows of one length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safe_files import read_packed
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_seqboat import build_byte_tokenizer

# enwik8's usual split: 90, 5 and 5 million bytes.
ENWIK8_BYTES = 100_000_000
ENWIK8_SPLIT = (90_000_000, 95_000_000)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The byte tokenizer for `byte`, else what AutoTokenizer finds under `name`. Raises ValueError that names it."""
    if name == "byte":
        return build_byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    # Tokenizer files fail in as many ways as there are tokenizers, seldom naming the file.
    except Exception as error:
        # Of the Hub's long messages the first line says what is missing.
        reason = str(error).strip().split("\n")[0]
        if not Path(name).is_dir():
            missing = f"there is no folder {name!r}, and no tokenizer of that name on the Hub"
            raise ValueError(f"{missing}: {reason}") from error
        files = sorted(file.name for file in Path(name).glob("*token*.json"))
        where = f" (its files: {', '.join(files)})" if files else ""
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded{where}: {reason}") from error


def read_text_file(path: str) -> bytes:
    """The contents of a plain, .gz or .xz file. Raises FileNotFoundError, and ValueError for a damaged or empty
    one."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no text file {path!r}")
    text = read_packed(file)
    if not text:
        raise ValueError(f"text file {path!r} is empty")
    return text


@dataclass
class TokenSplits:
    """Token ids (1-D integer arrays) of a text's parts, and how many bytes of text a token of validation and test
    stands for; only enwik8 has a test part of its own."""

    train: np.ndarray
    validation: np.ndarray
    bytes_per_token: float
    test: np.ndarray | None = None
    test_bytes_per_token: float = 1.0


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[bytes], np.ndarray]:
    """A function from UTF-8 text to its ids, without special tokens; bytes are their own ids to the byte tokenizer."""
    if tokenizer.get_vocab() == build_byte_tokenizer().get_vocab():
        return lambda text: np.frombuffer(text, dtype=np.uint8)

    def encode(text: bytes) -> np.ndarray:
        decoded = text.decode("utf-8", errors="replace")
        return np.asarray(tokenizer(decoded, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    return encode


def split_text(
    text: bytes,
    tokenizer: PreTrainedTokenizerBase,
    validation_fraction: float,
    max_bytes: int | None = None,
    with_test: bool = False,
) -> TokenSplits:
    """The beginning of a text for training and its end for validation; enwik8 is known by its length of 100,000,000
    bytes and split as usual, its last 5,000,000 bytes being the test, which is left alone unless `with_test`.
    `max_bytes` cuts the text first."""
    encode, test = text_encoder(tokenizer), None
    if len(text) == ENWIK8_BYTES and max_bytes is None:
        train, validation = text[: ENWIK8_SPLIT[0]], text[ENWIK8_SPLIT[0] : ENWIK8_SPLIT[1]]
        test = text[ENWIK8_SPLIT[1] :]
    else:
        text = text[:max_bytes]
        border = len(text) - int(len(text) * validation_fraction)
        train, validation = text[:border], text[border:]
    ids = encode(validation)
    splits = TokenSplits(encode(train), ids, len(validation) / max(1, len(ids)))
    if with_test and test is not None:
        splits.test = encode(test)
        splits.test_bytes_per_token = len(test) / max(1, len(splits.test))
    return splits


class TokenBlocks(Dataset):
    """Rows of `length` consecutive tokens: {"input_ids": (length,) int64}; the remainder at the end is dropped.

    Raises ValueError if the tokens do not fill one row.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        if len(tokens) < length:
            raise ValueError(
                f"sequence_length {length} is longer than the training data, which has {len(tokens)} tokens"
            )
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.tokens[index * self.length : (index + 1) * self.length]
        return {"input_ids": torch.from_numpy(row.astype(np.int64))}


class TokenWindows(TokenBlocks):
    """Rows of `length` consecutive tokens, by their first token: {"input_ids": (length,) int64}.

    Raises ValueError if the tokens do not fill one row.
    """

    def __len__(self) -> int:
        return len(self.tokens) - self.length + 1

    def __getitem__(self, start: int) -> dict[str, torch.Tensor]:
        if not 0 <= start < len(self):
            raise IndexError(start)
        return {"input_ids": torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))}


class RowOrder(Sampler[int]):
    """First tokens of the rows of one process, for ever. Each pass over the text cuts it into rows at another random
    offset, and takes them in another random order, the same for the same seed.

    The order depends on the seed, on `start` and on the rows of a batch of all processes, so a run that resumes at
    batch `start` reads what an uninterrupted one would have read, whether the rows are shared out to as many processes
    or not. Rows that do not fill a batch of all processes wait for another epoch.
    """

    def __init__(
        self, tokens: int, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ):
        # As many rows as fit whatever the offset is, so that passes are of one length.
        rows = max(1, (tokens - length + 1) // length)
        self.offsets, self.length = min(length, tokens - rows * length + 1), length
        self.batches = rows // (batch_size * world)
        if self.batches == 0:
            raise ValueError(
                f"the training data has {rows} rows, too few for one batch of {batch_size} rows for each of {world} "
                "processes: lower batch_size or sequence_length"
            )
        self.rows, self.batch_size, self.seed, self.start = rows, batch_size, seed, start
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[int]:
        epoch, first = divmod(self.start, self.batches)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(self.offsets, (), generator=generator)
            order = (offset + self.length * torch.randperm(self.rows, generator=generator)).tolist()
            for batch in range(first, self.batches):
                begin = (batch * self.world + self.rank) * self.batch_size
                yield from order[begin : begin + self.batch_size]
            epoch, first = epoch + 1, 0


def text_of(example: dict, column: str) -> str:
    """A column of a dataset's row. Raises ValueError if the row does not have it, or has something else than a text
    there."""
    if column not in example:
        raise ValueError(f"the dataset has no column {column!r}; it has {', '.join(example)}")
    if not isinstance(example[column], str):
        raise ValueError(f"the dataset's column {column!r} must hold texts, it holds {example[column]!r:.80}")
    return example[column]


class StreamedBlocks(IterableDataset):
    """Rows of `length` tokens from an iterable of examples, for ever, each document followed by the tokenizer's
    end-of-text id. Documents are dealt out to the processes in turn, so that each is tokenised once a pass.

    A row comes with the place where the next one begins: how many passes are over, the document of this pass, and how
    many of its tokens have been used. Starting from that place loses and repeats nothing.
    """

    def __init__(self, examples: Iterable[dict], column: str, tokenizer: PreTrainedTokenizerBase, length: int):
        self.examples, self.column, self.encode = examples, column, text_encoder(tokenizer)
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.length = length
        self.rank, self.world, self.start = 0, 1, (0, 0, 0)

    def place(self, rank: int, world: int, start: Sequence[int] = (0, 0, 0)) -> None:
        """Which of how many processes this is, and where its next row begins."""
        self.rank, self.world, self.start = rank, world, tuple(start)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        passes, first, used = self.start
        row: list[int] = []
        while True:
            size = 0
            for document, example in enumerate(self._after(first), start=first):
                if document % self.world != self.rank:
                    continue
                ids = self.encode(text_of(example, self.column).encode("utf-8", "replace")).tolist() + self.end
                size += len(ids)
                while used < len(ids):
                    taken = ids[used : used + self.length - len(row)]
                    row += taken
                    used += len(taken)
                    if len(row) == self.length:
                        place = (passes, document, used)
                        yield {"input_ids": torch.tensor(row), "place": torch.tensor(place)}
                        row = []
                used = 0
            if not size and first == 0:
                raise ValueError(
                    f"the dataset has no text for process {self.rank} of {self.world}: it needs a document for each"
                )
            passes, first = passes + 1, 0

    def _after(self, count: int) -> Iterable[dict]:
        """The examples but the first `count`, which a dataset that can skips without reading them."""
        return self.examples.skip(count) if hasattr(self.examples, "skip") else islice(self.examples, count, None)


def joined_tokens(examples: Iterable[dict], column: str, tokenizer, limit: int) -> tuple[np.ndarray, float]:
    """Up to `limit` tokens of the examples' texts, end-of-text ids between them, and bytes of text a token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encode = text_encoder(tokenizer)
    ids: list[int] = []
    size = 0
    for example in examples:
        text = text_of(example, column).encode("utf-8", "replace")
        ids += encode(text).tolist() + end
        size += len(text) + 1
        if len(ids) >= limit:
            break
    return np.asarray(ids[:limit], dtype=np.int32), size / max(1, len(ids))
