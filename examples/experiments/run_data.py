"""The data of a run, as tensors on its device: bytes of a text, or generated pictures and trees."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from example_paths import listops, pad_tokens, pathfinder, read_text_file, split_text
from run_recipe import RunRecipe
from torch import Tensor

from modeling_seqboat import build_byte_tokenizer

Batch = dict[str, Tensor]
DATA_SEED = 0
EVALUATION_BATCH = 32
PICTURE_BLOCK = 1024


@dataclass(frozen=True)
class Sources:
    """Where data come from.

    Attributes:
        train_file: text for `lm`, plain, .gz or .xz; its last 5 % validate, unless `validation_file` is given.
        data_folder: keeps what was generated.
    """

    train_file: str | None = None
    validation_file: str | None = None
    data_folder: str = "outputs/experiments/data"


class TextData:
    """Rows at random places of a text; the validation rows overlap by half, and their second halves are scored."""

    def __init__(self, recipe: RunRecipe, sources: Sources, device: torch.device):
        train, validation = _texts(sources.train_file, sources.validation_file)
        self.length, self.batch_size, self.device = recipe.sequence_length, recipe.batch_size, device
        for name, part in (("training", train), ("validation", validation)):
            if len(part) < self.length:
                raise ValueError(
                    f"sequence_length {self.length} is longer than the {name} text, which has {len(part)} bytes"
                )
        self.train, self.validation = torch.from_numpy(train).to(device), torch.from_numpy(validation).to(device)
        self.evaluation_rows = recipe.evaluation_rows

    def _rows(self, text: Tensor, starts: Tensor) -> Batch:
        ids = text[starts.to(self.device)[:, None] + torch.arange(self.length, device=self.device)].long()
        return {"input_ids": ids, "labels": ids}

    def batch(self, generator: torch.Generator) -> Batch:
        high = len(self.train) - self.length + 1
        return self._rows(self.train, torch.randint(high, (self.batch_size,), generator=generator))

    def evaluation(self) -> Iterator[Batch]:
        starts = torch.arange(0, len(self.validation) - self.length + 1, max(1, self.length // 2))
        for chosen in starts[: self.evaluation_rows].split(EVALUATION_BATCH):
            yield self._rows(self.validation, chosen)

    @property
    def tokens_a_step(self) -> int:
        return self.batch_size * self.length


class LabelledRows:
    """Rows with one label each, those to evaluate on last."""

    def __init__(self, recipe: RunRecipe, inputs: list[Tensor], labels: Tensor, collate):
        self.inputs, self.labels, self.collate = inputs, labels, collate
        self.batch_size, self.train_rows = recipe.batch_size, recipe.train_rows
        # Mean length, for rows of several lengths.
        self.tokens_a_step = round(self.batch_size * sum(map(len, inputs)) / len(inputs))

    def _rows(self, chosen: list[int]) -> Batch:
        return self.collate([self.inputs[row] for row in chosen]) | {"labels": self.labels[chosen]}

    def batch(self, generator: torch.Generator) -> Batch:
        return self._rows(torch.randint(self.train_rows, (self.batch_size,), generator=generator).tolist())

    def evaluation(self) -> Iterator[Batch]:
        for chosen in torch.arange(self.train_rows, len(self.inputs)).split(EVALUATION_BATCH):
            yield self._rows(chosen.tolist())


def load_data(recipe: RunRecipe, sources: Sources, device: torch.device) -> TextData | LabelledRows:
    """Raises FileNotFoundError and ValueError that say what is missing."""
    if recipe.task == "lm":
        return TextData(recipe, sources, device)
    if recipe.task == "pathfinder":
        pixels, labels = _pictures(recipe, sources)
        rows = torch.from_numpy(pixels).to(device)
        return LabelledRows(recipe, list(rows), torch.from_numpy(labels).to(device), _collate_pixels)
    trees, labels = _trees(recipe, sources)
    rows = [torch.from_numpy(tree[: recipe.sequence_length].astype(np.int64)) for tree in trees]

    def collate(chosen: list[Tensor]) -> Batch:
        batch = pad_tokens([{"input_ids": row.numpy(), "labels": 0} for row in chosen], listops.PAD)
        return {name: value.to(device) for name, value in batch.items()}

    return LabelledRows(recipe, rows, torch.from_numpy(labels).to(device), collate)


def prepare(recipe: RunRecipe, sources: Sources) -> None:
    """Reads or generates the data, so that several processes find them done. Raises as `load_data` does."""
    if recipe.task == "lm":
        _texts(sources.train_file, sources.validation_file)
    else:
        (_pictures if recipe.task == "pathfinder" else _trees)(recipe, sources)


def _collate_pixels(rows: list[Tensor]) -> Batch:
    return {"pixel_values": (torch.stack(rows).float() / 127.5 - 1).view(len(rows), 1, 32, 32)}


@lru_cache(maxsize=1)
def _texts(train_file: str | None, validation_file: str | None) -> tuple[np.ndarray, np.ndarray]:
    if train_file is None:
        raise FileNotFoundError("task 'lm' reads a text: give --train_file, a plain, .gz or .xz file")
    text = read_text_file(train_file)
    if validation_file is not None:
        parts = text, read_text_file(validation_file)
        return tuple(np.frombuffer(bytearray(part), np.uint8) for part in parts)
    splits = split_text(text, build_byte_tokenizer(), 0.05)
    return splits.train.copy(), splits.validation.copy()


def _pictures(recipe: RunRecipe, sources: Sources) -> tuple[np.ndarray, np.ndarray]:
    count = recipe.train_rows + recipe.evaluation_rows
    drawing = pathfinder.Drawing(contour_length=recipe.contour_length, distractors=recipe.distractors)

    def draw() -> dict[str, np.ndarray]:
        drawn, made, block = [], 0, min(PICTURE_BLOCK, count)
        while made < count:
            drawn.append(pathfinder.draw(np.random.default_rng([DATA_SEED, len(drawn)]), block, drawing))
            made += len(drawn[-1][0])
        pixels, labels = (np.concatenate(part)[:count] for part in zip(*drawn, strict=True))
        return {"pixels": pixels.reshape(count, -1), "labels": labels}

    name = f"pathfinder32-dashes{recipe.contour_length}-distractors{recipe.distractors}-seed{DATA_SEED}-{count}.npz"
    arrays = pathfinder.cached(Path(sources.data_folder) / name, draw)
    return arrays["pixels"], arrays["labels"]


def _trees(recipe: RunRecipe, sources: Sources) -> tuple[list[np.ndarray], np.ndarray]:
    return listops.load(Path(sources.data_folder), DATA_SEED, recipe.train_rows + recipe.evaluation_rows)
