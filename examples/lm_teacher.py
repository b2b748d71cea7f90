"""A trained model's predictions as a part of the loss of `train_lm.py` (distillation, arXiv 1503.02531).

`teacher_labels.py` writes them once, before the training: for each token of the training text the K tokens that the
teacher held most likely in its place, and their probabilities. Letters: B rows, L columns, K predictions, V
vocabulary.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safe_files import read_json_object
from text_data import TokenWindows
from torch import Tensor

TOKENS_FILE, PROBABILITIES_FILE, RECORD_FILE = "tokens.npy", "probabilities.npy", "teacher.json"


class TeacherLabels(NamedTuple):
    """tokens: (N, K) uint8 or int32; probabilities: (N, K) float16, those of a token adding up to 1, or 0 where there
    is no prediction; teacher: the model's name as it can be published."""

    tokens: np.ndarray
    probabilities: np.ndarray
    teacher: str


def checksum(tokens: np.ndarray) -> int:
    """Of a text's tokens, whatever integers hold them."""
    return zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32))


def read_labels(folder: str, tokens: np.ndarray, vocab_size: int) -> TeacherLabels:
    """What `teacher_labels.py` wrote, left on the disk and read as it is asked for.

    Raises FileNotFoundError for a folder that it did not write; ValueError for labels of another text or of a larger
    vocabulary, or that are damaged.
    """
    path, named = Path(folder), f"teacher_labels {folder!r}"
    if not (path / RECORD_FILE).is_file():
        raise FileNotFoundError(f"{named} is no folder that teacher_labels.py wrote: it has no {RECORD_FILE}")
    record, arrays = read_json_object(path / RECORD_FILE), []
    for name in (TOKENS_FILE, PROBABILITIES_FILE):
        try:
            arrays.append(np.load(path / name, mmap_mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{name} of {named} is missing or damaged: {error}") from error
    found = len(arrays[0])
    if found != len(tokens) or record.get("checksum") != checksum(tokens):
        what = "as many, but others" if found == len(tokens) else len(tokens)
        raise ValueError(
            f"{named} are of {found} tokens, this run trains on {what}: give both scripts the same text, tokenizer, "
            "max_bytes and validation_fraction"
        )
    if arrays[0].ndim != 2 or arrays[0].shape != arrays[1].shape:
        raise ValueError(f"{named} are damaged: arrays of shapes {arrays[0].shape} and {arrays[1].shape}")
    if record.get("vocab_size", vocab_size) > vocab_size:
        raise ValueError(f"{named} are of a vocabulary of {record['vocab_size']}, the model has {vocab_size}")
    return TeacherLabels(*arrays, str(record.get("teacher")))


class TaughtWindows(TokenWindows):
    """`TokenWindows` with what the teacher expects after each of a row's tokens: teacher_tokens (L, K) int32 or uint8
    and teacher_probabilities (L, K) float16, 0 after the last."""

    def __init__(self, tokens: np.ndarray, length: int, labels: TeacherLabels):
        super().__init__(tokens, length)
        self.labels = labels

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        row = super().__getitem__(start)
        for name in ("tokens", "probabilities"):
            source = getattr(self.labels, name)
            ahead = np.zeros((self.length, source.shape[1]), source.dtype)
            ahead[:-1] = source[start + 1 : start + self.length]
            row[f"teacher_{name}"] = torch.from_numpy(ahead)
        return row


class TeacherLoss:
    """`loss_function` of a model: 1 - share of its own loss, and share of the cross entropy of the teacher's
    predictions. What it reads of them lies where a CUDA graph finds it in every step.

    Args:
        own: the model's loss function.
        share: in [0, 1].
        labels: of the training text, for their K.
        rows, length: B and L of a micro-batch.
    """

    def __init__(
        self, own: Callable, share: float, labels: TeacherLabels, rows: int, length: int, device: torch.device
    ):
        shape = rows, length, labels.tokens.shape[1]
        self.own, self.share, self.teacher = own, share, labels.teacher
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.probabilities = torch.zeros(shape, dtype=torch.float32, device=device)

    def take(self, batch: dict[str, Tensor]) -> None:
        """The predictions of the batch that the model is given next, of `TaughtWindows`."""
        for name, place in (("tokens", self.tokens), ("probabilities", self.probabilities)):
            given = batch[f"teacher_{name}"]
            if place.device.type == "cuda":
                # Moved as they are, a quarter of the bytes; from memory that is not pinned the host would wait.
                given = given.pin_memory().to(place.device, non_blocking=True)
            place.copy_(given)

    def __call__(self, logits: Tensor, labels: Tensor, shift_labels: Tensor, **options: Any) -> Tensor:
        """logits (B, L, V); shift_labels (B, L) int64, the token after each column, -100 where none is; their number,
        num_items_in_batch, is among the options."""
        loss = self.own(logits=logits, labels=labels, shift_labels=shift_labels, **options)
        expected = logits.float().log_softmax(-1).gather(-1, self.tokens)
        taught = -((self.probabilities * expected).sum(-1) * (shift_labels != -100)).sum()
        taught = taught / options["num_items_in_batch"]
        return (1 - self.share) * loss + self.share * taught
