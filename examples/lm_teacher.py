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
    is no prediction; teacher: the model's name."""

    tokens: np.ndarray
    probabilities: np.ndarray
    teacher: str


def checksum(tokens: np.ndarray) -> int:
    """Of a text's tokens, whatever integers hold them."""
    return zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32))


def read_labels(folder: str, tokens: np.ndarray, vocab_size: int) -> TeacherLabels:
    """What `teacher_labels.py` wrote, left on the disk and read as it is asked for.

    Raises FileNotFoundError for a folder that is not one of it, or unfinished; ValueError for one of another text or
    of a larger vocabulary.
    """
    path = Path(folder)
    record = read_json_object(path / RECORD_FILE)
    labels = [np.load(path / name, mmap_mode="r") for name in (TOKENS_FILE, PROBABILITIES_FILE)]
    if record.get("checksum") != checksum(tokens) or any(len(array) != len(tokens) for array in labels):
        raise ValueError(
            f"teacher_labels {folder!r} are of another text: of {len(labels[0])} tokens, the training text has "
            f"{len(tokens)}, or as many others"
        )
    if record.get("vocab_size", vocab_size) > vocab_size:
        raise ValueError(
            f"teacher_labels {folder!r} are of a vocabulary of {record['vocab_size']}, the model has {vocab_size}"
        )
    return TeacherLabels(*labels, str(record.get("teacher")))


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
        self.own, self.share = own, share
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.probabilities = torch.zeros(shape, dtype=torch.float32, device=device)

    def take(self, batch: dict[str, Tensor]) -> None:
        """The predictions of the batch that the model is given next, of `TaughtWindows`."""
        self.tokens.copy_(batch["teacher_tokens"], non_blocking=True)
        self.probabilities.copy_(batch["teacher_probabilities"], non_blocking=True)

    def __call__(self, logits: Tensor, labels: Tensor, shift_labels: Tensor, **options: Any) -> Tensor:
        """logits (B, L, V); shift_labels (B, L) int64, the token after each column, -100 where none is."""
        loss = self.own(logits=logits, labels=labels, shift_labels=shift_labels, **options)
        counted = shift_labels != -100
        expected = logits.float().log_softmax(-1).gather(-1, self.tokens)
        taught = -((self.probabilities * expected).sum(-1) * counted).sum() / counted.sum()
        return (1 - self.share) * loss + self.share * taught
