"""The classification tasks: where their data come from, how they become sequences, and which head reads them."""

import csv
import io
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import listops
import numpy as np
import pathfinder
import torch
from augmentation import turn_pictures, vary_pictures, vary_recordings, vary_texts
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, ViTImageProcessorPil, Wav2Vec2FeatureExtractor
from transformers.utils import is_vision_available

from modeling_seqboat import (
    SeqBoatForAudioClassification,
    SeqBoatForImageClassification,
    SeqBoatForSequenceClassification,
    build_byte_tokenizer,
)

# The examples share these modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from ranges import LARGEST_SEED, Range, at_least, check_ranges, from_to  # noqa: E402
from safe_files import decode_text, json_lines, read_packed  # noqa: E402

SAMPLING_RATE = 16000
# What `easy_rows` adds, a third of each kind: dashes of a contour, and lengths of a tree (exclusive).
SHORT_CONTOURS = (4, 7, 10)
SHORT_TREES = ((9, 40), (39, 150), (149, 501))

# How to come by what a task reads, for whoever has started it without.
SOURCES = {
    "text": "the archive of the Large Movie Review Dataset (aclImdb_v1.tar.gz of "
    "https://ai.stanford.edu/~amaas/data/sentiment/, or the same packed as .tar.xz): give --data_path ARCHIVE",
    "image": "CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html) as luminance: a uint8 array (pictures, 1024) and "
    "one of labels (pictures,), the training pictures first, each saved by numpy.save, plain, .gz or .xz: give "
    "--data_path PIXELS --labels_path LABELS",
    "listops": "generated data: give --data_path FOLDER, where they are kept after the first run",
    "pathfinder": "generated data: give --data_path FOLDER, where they are kept after the first run",
    "pathx": "generated data: give --data_path FOLDER, where they are kept after the first run",
    "retrieval": "any set of text pairs, a .csv, .tsv or .jsonl file with two columns of texts (plain, .gz or .xz; "
    "the published task pairs papers of the ACL Anthology Network, which its owners give out on request): give "
    "--data_path FILE, and --first_column, --second_column and --label_column where the first two columns are not "
    "meant",
    "speech": "recordings of Speech Commands v0.02 (https://arxiv.org/abs/1804.03209), packed by numpy.savez as "
    "`audio` "
    "(recordings, samples) int16 at 16 kHz, `label`, `is_test` and `words` (plain, .gz or .xz): give --data_path FILE",
}


@dataclass
class DataArguments:
    """What the tasks' loaders read of the command line."""

    data_path: str | None = field(default=None, metadata={"help": "file or folder of the task's data"})
    labels_path: str | None = field(default=None, metadata={"help": "task image: the labels' file"})
    first_column: str | None = field(default=None, metadata={"help": "task retrieval: default, the first column"})
    second_column: str | None = field(default=None, metadata={"help": "task retrieval: default, the second column"})
    label_column: str | None = field(
        default=None,
        metadata={"help": "task retrieval: 0 or 1; default, rows are pairs, and as many are made at random"},
    )
    max_length: int = field(default=4000, metadata={"help": "texts are cut here, in bytes"})
    train_size: int | None = field(default=None, metadata={"help": "use this many rows; generated data need it"})
    validation_size: int = field(default=1000, metadata={"help": "rows that choose the best checkpoint"})
    test_size: int | None = field(default=None, metadata={"help": "use this many rows; generated data need it"})
    easy_rows: int = field(
        default=0,
        metadata={
            "help": "training rows more that are easier than the task's. pathfinder and pathx: contours of 4, 7 or 10 "
            "dashes instead of 14 (those shorter than contour_length); listops: trees of 10 to 500 tokens"
        },
    )
    picture_height: int | None = field(
        default=None, metadata={"help": "pathx: rows of a picture, 128 by default; fewer are a strip of 128 columns"}
    )
    contour_length: int | None = field(
        default=None,
        metadata={"help": "pathx: dashes of a contour, 14 by default, in validation and test rows too"},
    )
    shift: int = field(default=2, metadata={"help": "image: varied pictures are moved by up to so many pixels"})
    cutout: int = field(default=0, metadata={"help": "image: varied pictures have a square of this side blanked"})
    data_seed: int = field(default=0, metadata={"help": "of splits, random pairs and generated data"})


DATA_RANGES: dict[str, Range] = {
    **dict.fromkeys(("train_size", "validation_size", "test_size", "max_length"), at_least(1)),
    **dict.fromkeys(("easy_rows", "shift", "cutout"), at_least(0)),
    "picture_height": from_to(16, pathfinder.PATHX.size),
    "contour_length": from_to(2, pathfinder.PATHX.contour_length),
    "data_seed": from_to(0, LARGEST_SEED),
}


class Rows(Dataset):
    """Rows by number; each is made when it is asked for."""

    def __init__(self, make: Callable[[int], dict], indices: np.ndarray):
        self.make, self.indices = make, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.make(int(self.indices[index]))


class EpochOrder(Sampler[int]):
    """Row numbers of an epoch: at random, in batches of rows of like length if there are lengths, easy rows first if
    asked.

    The order depends on the seed and the epoch alone, so a resumed run reads what an uninterrupted one would have
    read.

    Args:
        count: rows.
        batch_size: of all processes together, which take turns at batches.
        lengths: of each row, or None. Batches of like length have little padding; they come in random order.
        easy: that many rows at the end are easy ones.
        easy_passes: how often the first epoch goes through them before it takes rows of all kinds, as many as are left
            of an epoch's number.
    """

    POOL = 50

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        lengths: list[int] | None = None,
        easy: int = 0,
        easy_passes: int = 0,
    ):
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.easy, self.easy_passes = easy, easy_passes

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        left, rest = self.count, []
        for _ in range(self.easy_passes if self.epoch == 0 and self.easy else 0):
            order = self.count - self.easy + torch.randperm(self.easy, generator=generator)
            yield from self._batches(order[:left], generator, rest)
            left -= min(left, self.easy)
        yield from self._batches(torch.randperm(self.count, generator=generator)[:left], generator, rest)
        # A batch that is not full would shift the borders of those behind it.
        for batch in rest:
            yield from batch.tolist()

    def _batches(self, order: torch.Tensor, generator: torch.Generator, rest: list[torch.Tensor]) -> Iterator[int]:
        """Adds batches that are not full to `rest`."""
        if self.lengths is None:
            yield from order.tolist()
            return
        pools = [pool[self.lengths[pool].argsort()] for pool in order.split(self.POOL * self.batch_size)]
        batches = [batch for pool in pools for batch in pool.split(self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest += [batch for batch in batches if len(batch) < self.batch_size]
        for index in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[index].tolist()


@dataclass
class TaskData:
    """Attributes:
    model_class: the head that reads the rows.
    collate: rows -> tensors of a batch.
    processor: saved beside the model, so that pipelines read what it was trained on; or None.
    labels: names of the classes, where the preset's do not fit.
    vocab_size: ids that occur, 0 for real numbers.
    shape: height and width of a picture, or None.
    augment: inputs of a batch (texts: and their mask) -> random variants with the same labels, or None.
    easy: that many training rows, the last ones, are easier than the task's.
    """

    model_class: type[PreTrainedModel]
    train: Rows
    validation: Rows
    test: Rows
    collate: Callable[[list[dict]], dict[str, torch.Tensor]]
    processor: object = None
    labels: list[str] | None = None
    vocab_size: int = 0
    shape: tuple[int, int] | None = None
    augment: Callable[..., torch.Tensor] | None = None
    easy: int = 0


def pad_tokens(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Ids padded on the right to the longest row, with masks; `pair_` inputs likewise."""
    batch = {"labels": torch.tensor([row["labels"] for row in rows])}
    for name in [name for name in rows[0] if name.endswith("input_ids")]:
        width = max(len(row[name]) for row in rows)
        ids = torch.full((len(rows), width), pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row[name])
            ids[index, :length] = torch.from_numpy(row[name].astype(np.int64))
            mask[index, :length] = 1
        batch[name], batch[name.replace("input_ids", "attention_mask")] = ids, mask
    return batch


def stack_values(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of equal shape as one float32 batch."""
    name = next(key for key in rows[0] if key != "labels")
    values = torch.from_numpy(np.stack([row[name] for row in rows])).float()
    return {name: values, "labels": torch.tensor([row["labels"] for row in rows])}


def load_task(task: str, a: DataArguments, pad_id: int | None) -> TaskData:
    """The data of one task. Raises ValueError and FileNotFoundError that say what is wrong and where data come
    from."""
    loaders = {
        "text": load_text, "image": load_image, "listops": load_listops, "pathfinder": load_pathfinder,
        "pathx": load_pathx, "retrieval": load_retrieval, "speech": load_speech,
    }  # fmt: skip
    if task not in loaders:
        raise ValueError(f"task must be one of {', '.join(loaders)}, got {task!r}")
    check_ranges(a, DATA_RANGES)
    if a.easy_rows and task not in ("listops", "pathfinder", "pathx"):
        raise ValueError(
            f"easy_rows must be at least 0, and 0 for all but listops, pathfinder and pathx, got {a.easy_rows}"
        )
    for name in ("picture_height", "contour_length"):
        if getattr(a, name) is not None and task != "pathx":
            raise ValueError(f"{name} is for task 'pathx', got {getattr(a, name)} for task {task!r}")
    return loaders[task](a, pad_id or 0)


def _need(task: str, path: str | None, folder: bool = False) -> Path:
    """The path, if there is something. Raises FileNotFoundError that says how to come by the data."""
    if path is None or not (folder or Path(path).is_file()):
        found = "no data path was given" if path is None else f"there is no file {path!r}"
        raise FileNotFoundError(f"task {task!r}: {found}. It reads {SOURCES[task]}.")
    if folder and Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"task {task!r}: data_path {path!r} is a file; generated data are kept in a folder")
    return Path(path)


def _arrays(task: str, path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """What a plain or compressed file holds that numpy.save or numpy.savez wrote."""
    try:
        found = np.load(io.BytesIO(read_packed(path)), allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    # A header of a size that no memory has is a MemoryError, one of no size at all an OverflowError or a SyntaxError.
    except (
        ValueError, TypeError, OSError, EOFError, MemoryError, OverflowError, SyntaxError, KeyError,
        NotImplementedError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise ValueError(f"task {task!r}: {str(path)!r} holds no numpy arrays ({error})") from error


def _one_array(task: str, path: Path) -> np.ndarray:
    found = _arrays(task, path)
    if isinstance(found, dict):
        raise ValueError(f"task {task!r}: {str(path)!r} must hold one array, it holds {', '.join(found)}")
    return found


def _split(make, known: np.ndarray, test: np.ndarray | None, a: DataArguments) -> dict[str, Rows]:
    """Training and validation rows at random out of `known`; so are the test rows, if there are none yet."""
    rng = np.random.default_rng(a.data_seed)
    known = rng.permutation(known)
    if test is None:
        size = a.test_size or a.validation_size
        test, known = known[:size], known[size:]
    elif a.test_size is not None:
        test = rng.permutation(test)[: a.test_size]
    validation, train = known[: a.validation_size], known[a.validation_size :][: a.train_size]
    if not len(train) or not len(test):
        raise ValueError(
            f"validation_size {a.validation_size} and test_size {a.test_size} leave {len(train)} training rows and "
            f"{len(test)} test rows"
        )
    return {"train": Rows(make, train), "validation": Rows(make, validation), "test": Rows(make, test)}


def _pad_with(pad_id: int) -> Callable:
    return lambda rows: pad_tokens(rows, pad_id)


def load_text(a: DataArguments, pad_id: int) -> TaskData:
    """Movie reviews read as bytes: is one positive?"""
    archive = _need("text", a.data_path)
    member = re.compile(r"(?:^|/)(train|test)/(neg|pos)/[^/]+\.txt$")
    texts, labels, parts = [], [], []
    try:
        with tarfile.open(archive) as tar:
            for entry in tar:
                match = member.search(entry.name)
                if match and entry.isfile():
                    texts.append(np.frombuffer(tar.extractfile(entry).read(a.max_length), dtype=np.uint8))
                    parts.append(match[1] == "test")
                    labels.append(int(match[2] == "pos"))
    # A damaged number in a header is a ValueError of the archive's reader.
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise ValueError(f"task 'text': {str(archive)!r} is no tar archive ({error})") from error
    if not texts:
        raise ValueError(
            f"task 'text': {str(archive)!r} has no reviews under train/neg, train/pos, test/neg, test/pos"
        )
    parts = np.array(parts)

    def make(index: int) -> dict:
        return {"input_ids": texts[index], "labels": labels[index]}

    splits = _split(make, np.flatnonzero(~parts), np.flatnonzero(parts), a)
    return TaskData(
        SeqBoatForSequenceClassification, collate=_pad_with(pad_id), processor=build_byte_tokenizer(chat=False),
        vocab_size=256, augment=vary_texts,
        **splits,
    )  # fmt: skip


def load_listops(a: DataArguments, pad_id: int) -> TaskData:
    """Values of nested operations on digits."""
    folder = _need("listops", a.data_path, folder=True)
    count = _generated_rows("listops", a)
    trees, labels = listops.load(folder, a.data_seed, count)
    easy = [listops.load(folder, a.data_seed, share, lengths) for share, lengths in _easy_shares(a, SHORT_TREES)]
    trees = trees + [tree for more, _ in easy for tree in more]
    labels = np.concatenate([labels, *(values for _, values in easy)])

    def make(index: int) -> dict:
        return {"input_ids": trees[index], "labels": int(labels[index])}

    splits = _with_easy(_split(make, np.arange(count), None, a), make, count, a)
    return TaskData(
        SeqBoatForSequenceClassification, collate=_pad_with(pad_id), vocab_size=len(listops.TOKENS), easy=a.easy_rows,
        **splits,
    )  # fmt: skip


def _easy_shares(a: DataArguments, kinds: Sequence) -> list[tuple[int, Any]]:
    """How many of the easy rows are of each kind; no kind without rows."""
    share, more = divmod(a.easy_rows, max(1, len(kinds)))
    shares = [(share + (place < more), kind) for place, kind in enumerate(kinds)]
    return [(rows, kind) for rows, kind in shares if rows]


def _with_easy(splits: dict[str, Rows], make: Callable[[int], dict], count: int, a: DataArguments) -> dict[str, Rows]:
    """Adds the rows behind the first `count` to those for training; validation and test rows stay the task's own."""
    known = np.concatenate([splits["train"].indices, np.arange(count, count + a.easy_rows)])
    return splits | {"train": Rows(make, known)}


def _generated_rows(task: str, a: DataArguments) -> int:
    if a.train_size is None or a.test_size is None:
        raise ValueError(f"task {task!r} generates its data: give train_size and test_size")
    return a.train_size + a.validation_size + a.test_size


def _pictures(shape: tuple[int, int], mean: float, std: float, **others) -> TaskData:
    processor = None
    if is_vision_available():
        processor = ViTImageProcessorPil(
            size=dict(zip(("height", "width"), shape, strict=True)), image_mean=[mean], image_std=[std],
            do_convert_rgb=False,
        )  # fmt: skip
    return TaskData(SeqBoatForImageClassification, collate=stack_values, processor=processor, shape=shape, **others)


def _pixel_rows(
    pixels: np.ndarray, labels: np.ndarray, shape: tuple[int, int], mean: float, std: float
) -> Callable[[int], dict]:
    def make(index: int) -> dict:
        grey = (pixels[index].reshape(1, *shape).astype(np.float32) / 255 - mean) / std
        return {"pixel_values": grey, "labels": int(labels[index])}

    return make


def load_image(a: DataArguments, pad_id: int) -> TaskData:
    """CIFAR-10 in grey; of every six pictures in the file the last one's share is the test set."""
    pixels_path, labels_path = _need("image", a.data_path), _need("image", a.labels_path)
    pixels, labels = _one_array("image", pixels_path), _one_array("image", labels_path)
    if pixels.ndim != 2 or int(pixels.shape[1] ** 0.5) ** 2 != pixels.shape[1] or pixels.dtype != np.uint8:
        raise ValueError(
            f"task 'image': pixels must be uint8 (pictures, height * width) of square pictures, got {pixels.dtype} "
            f"{pixels.shape}"
        )
    if labels.shape != pixels.shape[:1]:
        raise ValueError(f"task 'image': {len(pixels)} pictures do not go with labels of shape {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"task 'image': labels must be whole numbers, got {labels.dtype}")
    known = len(pixels) * 5 // 6
    shape = (int(pixels.shape[1] ** 0.5),) * 2
    make = _pixel_rows(pixels, labels, shape, 0.48, 0.24)
    splits = _split(make, np.arange(known), np.arange(known, len(pixels)), a)
    return _pictures(shape, 0.48, 0.24, augment=partial(vary_pictures, shift=a.shift, cutout=a.cutout), **splits)


def load_pathfinder(
    a: DataArguments, pad_id: int, task: str = "pathfinder", drawing: pathfinder.Drawing | None = None
) -> TaskData:
    """Are two dots joined by a dashed path?"""
    folder = _need(task, a.data_path, folder=True)
    count, drawing = _generated_rows(task, a), drawing or pathfinder.Drawing()
    own = a.contour_length or drawing.contour_length
    # Rows as long as the task's own would be the task's own once more, those of validation and test among them.
    shorter = [dashes for dashes in SHORT_CONTOURS if dashes < own]
    if a.easy_rows and not shorter:
        raise ValueError(f"easy_rows must be 0 where contour_length is {own}: no shorter contours are drawn")

    def load(rows: int, dashes: int) -> tuple[np.ndarray, np.ndarray]:
        return pathfinder.load(folder, a.data_seed, rows, dashes, drawing, a.picture_height)

    parts = [load(count, own), *(load(share, dashes) for share, dashes in _easy_shares(a, shorter))]
    # Large pictures are not copied without need.
    pixels, labels = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    shape = drawing.strip(a.picture_height).shape
    make = _pixel_rows(pixels, labels, shape, 0.5, 0.5)
    splits = _with_easy(_split(make, np.arange(count), None, a), make, count, a)
    return _pictures(shape, 0.5, 0.5, augment=turn_pictures, easy=a.easy_rows, **splits)


def load_pathx(a: DataArguments, pad_id: int) -> TaskData:
    """The same on 128 x 128 pixels, or on fewer rows."""
    return load_pathfinder(a, pad_id, "pathx", pathfinder.PATHX)


def read_pairs(path: Path, a: DataArguments) -> tuple[list[tuple[str, str]], list[int] | None]:
    """Text pairs of a .csv, .tsv or .jsonl file, and their labels if `label_column` is given."""
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".xz") else path.suffix
    data = read_packed(path)
    if kind == ".jsonl":
        numbered = json_lines(data, str(path))
    elif kind in (".csv", ".tsv"):
        # Long documents are what this task is about.
        csv.field_size_limit(1 << 30)
        text = io.StringIO(decode_text(data, str(path)), newline="")
        reader = csv.DictReader(text, delimiter="," if kind == ".csv" else "\t")
        try:
            numbered = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise ValueError(f"task 'retrieval': line {reader.line_num} of {str(path)!r}: {error}") from None
    else:
        raise ValueError(f"task 'retrieval': {str(path)!r} must end in .csv, .tsv or .jsonl (and .gz or .xz)")
    rows = [row for _, row in numbered]
    if not rows:
        raise ValueError(f"task 'retrieval': {str(path)!r} has no rows")
    names = list(rows[0])
    if len(names) < 2:
        raise ValueError(f"task 'retrieval': {str(path)!r} has the column {', '.join(names)} only, two are needed")
    columns = [a.first_column or names[0], a.second_column or names[1]]
    if a.label_column:
        columns.append(a.label_column)
    for column in columns:
        if column not in names:
            raise ValueError(f"task 'retrieval': {str(path)!r} has no column {column!r}; it has {', '.join(names)}")
    for line, row in numbered:
        for column in columns:
            if column not in row:
                raise ValueError(f"task 'retrieval': line {line} of {str(path)!r} has no column {column!r}")
        for column in columns[:2]:
            if not isinstance(row[column], (str, type(None))):
                raise ValueError(
                    f"task 'retrieval': line {line} of {str(path)!r}: {column!r} must be a text, got "
                    f"{row[column]!r:.80}"
                )
    pairs = [(row[columns[0]], row[columns[1]]) for row in rows]
    empty = next((i for i, pair in enumerate(pairs) if not all(pair)), None)
    if empty is not None:
        raise ValueError(f"task 'retrieval': a text of row {empty + 1} of {str(path)!r} is empty")
    if not a.label_column:
        return pairs, None
    labels = [str(row[a.label_column]).strip() for row in rows]
    wrong = next((label for label in labels if label not in ("0", "1")), None)
    if wrong is not None:
        raise ValueError(f"task 'retrieval': labels must be 0 or 1, {a.label_column!r} has {wrong!r}")
    return pairs, [int(label) for label in labels]


def load_retrieval(a: DataArguments, pad_id: int) -> TaskData:
    """Do two texts belong together? Without labels each row of the file is one pair that does, and its first text with
    another row's second one, of the same split, is one that does not."""
    pairs, labels = read_pairs(_need("retrieval", a.data_path), a)
    # A lone half of a character, which JSON can spell, becomes a question mark.
    encoded = [
        tuple(np.frombuffer(text.encode("utf-8", "replace")[: a.max_length], dtype=np.uint8) for text in pair)
        for pair in pairs
    ]

    def make(index: int) -> dict:
        first, second = encoded[index]
        return {"input_ids": first, "pair_input_ids": second, "labels": labels[index]}

    splits = _split(make, np.arange(len(pairs)), None, a)
    if labels is None:
        rng = np.random.default_rng([a.data_seed, 1])
        splits = {name: _with_random_pairs(rows.indices, encoded, rng) for name, rows in splits.items()}
    return TaskData(
        SeqBoatForSequenceClassification, collate=_pad_with(pad_id), processor=build_byte_tokenizer(chat=False),
        vocab_size=256,
        **splits,
    )  # fmt: skip


def _with_random_pairs(rows: np.ndarray, encoded: list[tuple], rng: np.random.Generator) -> Rows:
    if len(rows) < 2:
        raise ValueError(
            "task 'retrieval': random pairs need at least 2 rows for each of training, validation and test"
        )
    others = rows[(np.arange(len(rows)) + rng.integers(1, len(rows), len(rows))) % len(rows)]

    def make(index: int) -> dict:
        place, random = divmod(index, 2)
        second = others[place] if random else rows[place]
        return {
            "input_ids": encoded[rows[place]][0], "pair_input_ids": encoded[second][1], "labels": 1 - random,
        }  # fmt: skip

    return Rows(make, np.arange(2 * len(rows)))


def load_speech(a: DataArguments, pad_id: int) -> TaskData:
    """Spoken words, sample by sample, each recording scaled to mean 0 and variance 1."""
    path = _need("speech", a.data_path)
    arrays = _arrays("speech", path)
    names = ("audio", "label", "is_test", "words")
    missing = [name for name in names if not isinstance(arrays, dict) or name not in arrays]
    if missing:
        raise ValueError(f"task 'speech': {str(path)!r} lacks {', '.join(missing)}. It reads {SOURCES['speech']}.")
    audio, label, is_test, words = (arrays[name] for name in names)
    shapes = {name: arrays[name].shape for name in names}
    if audio.ndim != 2 or label.shape != audio.shape[:1] or is_test.shape != audio.shape[:1] or words.ndim != 1:
        raise ValueError(f"task 'speech': the arrays of {str(path)!r} do not go together: {shapes}")
    if audio.dtype.kind not in "iuf" or label.dtype.kind not in "iu" or words.dtype.kind != "U":
        raise ValueError(
            f"task 'speech': audio, label and words must be numbers, whole numbers and texts in {str(path)!r}"
        )
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < len(words):
        raise ValueError(
            f"task 'speech': labels must be from 0 to {len(words) - 1}, the last word's, in {str(path)!r}"
        )
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True, sampling_rate=SAMPLING_RATE)

    # The extractor takes longer for a row than the row takes to travel, so it sees each once.
    heard = np.stack(
        [extractor(row.astype(np.float32), sampling_rate=SAMPLING_RATE)["input_values"][0] for row in audio]
    )

    def make(index: int) -> dict:
        return {"input_values": heard[index], "labels": int(label[index])}

    is_test = is_test.astype(bool)
    return TaskData(
        SeqBoatForAudioClassification, collate=stack_values, processor=extractor, labels=[str(word) for word in words],
        augment=vary_recordings,
        **_split(make, np.flatnonzero(~is_test), np.flatnonzero(is_test), a),
    )  # fmt: skip
