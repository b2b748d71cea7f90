"""One stream of text, recorded words and grey pictures, all as bytes, with questions about each at its end.

    python examples/long_context/mixed_stream.py data --length 131072 --output outputs/stream.npz

reads a folder of the user's data and writes one stream with its questions. What the folder may hold, each in the form
that `PARTS` names:

    enwik8.xz, enwik8, or any .txt       text, cut 90/5/5 into train, validation and test as enwik8 is
    cifar10_gray_pixels.npy[.xz]         uint8 (pictures, pixels), with cifar10_labels.npy, integers below 10; the last
                                         sixth is the test
    speech_commands_*.npz[.xz]           audio int16 (clips, samples), label, is_test, words

A picture is `PICTURE number pixels END`, a clip `AUDIO number samples END`, the text between them `TEXT bytes`.
Numbers are two digits. A question is `QUESTION`, the mark of what it is about, the number (for a fact its name), and
the answer: the class as a digit, the word's place as a letter, or the fact's digits.

Letters: L tokens of a stream.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
import io
import zipfile
import zlib
from dataclasses import dataclass, field

import numpy as np
from recall_tasks import FACT_END, FACT_START, Example, spread
from recipes import parse_arguments
from safe_files import read_packed, replacing

# Marks of the modalities are ids of the byte tokenizer's specials: no byte can be mistaken for one.
TEXT, AUDIO, PICTURE, END, QUESTION = 257, 260, 261, 263, 262
KINDS = ("text", "audio", "picture", "fact", "label", "query")
_TEXT, _AUDIO, _PICTURE, _FACT, _LABEL, _QUERY = range(len(KINDS))
GROUPS = ("fact", "clip", "picture")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pieces:
    """What streams of one split are made of; a modality that there is no data for has no rows.

    Attributes:
        text: (bytes,) uint8.
        clips: (clips, samples) uint8, mu-law; words: (clips,) int64.
        pictures: (pictures, pixels) uint8; classes: (pictures,) int64, below 10.
    """

    text: np.ndarray
    clips: np.ndarray
    words: np.ndarray
    pictures: np.ndarray
    classes: np.ndarray


def mu_law(audio: np.ndarray) -> np.ndarray:
    """int16 samples -> uint8 by the 8-bit mu-law (mu 255): finer near silence, 128 at it."""
    x = audio.astype(np.float64) / 32768
    coded = np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256)
    return np.clip(np.round((coded + 1) * 127.5), 0, 255).astype(np.uint8)


def _arrays(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """What a plain or .xz file holds that numpy.save or numpy.savez wrote. Raises ValueError that names it."""
    try:
        found = np.load(io.BytesIO(read_packed(path)), allow_pickle=False)
        return found if isinstance(found, np.ndarray) else dict(found)
    # Damaged files fail in the reader's own ways.
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is damaged or not written by numpy: {error}") from error


def _found(folder: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def load_pieces(folder: str | Path, split: str = "train", decimation: int = 1) -> Pieces:
    """Reads the folder's data, as the module's head describes it; the text is needed, pictures and clips are not.

    Args:
        decimation: every so many samples of a clip are averaged to one, which makes clips shorter.

    Raises:
        FileNotFoundError: where there is no such folder, no text, or pictures without labels.
        ValueError: for a split that is not one of `SPLITS`, or arrays of another form.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if decimation < 1:
        raise ValueError(f"decimation must be at least 1, got {decimation}")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data folder {str(folder)!r}")
    path = _found(folder, "enwik8", "enwik8.xz", "*.txt", "*.txt.xz")
    if path is None:
        raise FileNotFoundError(f"data folder {str(folder)!r} has no text: neither enwik8, enwik8.xz nor a .txt file")
    text = np.frombuffer(read_packed(path), np.uint8)
    borders = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    part = SPLITS.index(split)
    clips, words = _clips(folder, split, decimation)
    pictures, classes = _pictures(folder, split)
    return Pieces(text[borders[part] : borders[part + 1]], clips, words, pictures, classes)


def _pictures(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    path = _found(folder, "cifar10_gray_pixels.npy", "cifar10_gray_pixels.npy.xz")
    if path is None:
        return np.zeros((0, 0), np.uint8), np.zeros(0, np.int64)
    labels = folder / "cifar10_labels.npy"
    if not labels.is_file():
        raise FileNotFoundError(f"{path.name} has no cifar10_labels.npy beside it in {str(folder)!r}")
    pixels, classes = _arrays(path), _arrays(labels)
    if not isinstance(pixels, np.ndarray) or not isinstance(classes, np.ndarray) or classes.dtype.kind not in "iu":
        raise ValueError(f"{path.name} and {labels.name} must hold one array of pixels and one of integers")
    classes = classes.astype(np.int64)
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or classes.shape != pixels.shape[:1]:
        raise ValueError(
            f"{path.name} must be uint8 (pictures, pixels) with one label a picture, got {pixels.dtype} "
            f"{pixels.shape} and labels {classes.shape}"
        )
    if classes.size and not 0 <= classes.min() <= classes.max() < 10:
        raise ValueError(f"labels must lie in 0..9, got {classes.min()}..{classes.max()}")
    rows = _rows_of_split(np.arange(len(pixels)) >= len(pixels) * 5 // 6, split)
    return pixels[rows], classes[rows]


def _clips(folder: Path, split: str, decimation: int) -> tuple[np.ndarray, np.ndarray]:
    path = _found(folder, "speech_commands_*.npz", "speech_commands_*.npz.xz")
    if path is None:
        return np.zeros((0, 0), np.uint8), np.zeros(0, np.int64)
    data = _arrays(path)
    missing = {"audio", "label", "is_test"} - set(data if isinstance(data, dict) else ())
    if missing:
        raise ValueError(f"{path.name} must hold audio, label and is_test; {', '.join(sorted(missing))} is missing")
    rows = _rows_of_split(data["is_test"].astype(bool), split)
    audio = data["audio"][rows]
    samples = audio.shape[1] // decimation
    if samples == 0:
        raise ValueError(f"decimation {decimation} leaves no sample of clips of {audio.shape[1]}")
    audio = audio[:, : samples * decimation].reshape(len(audio), samples, decimation).mean(2)
    return mu_law(audio), data["label"][rows].astype(np.int64)


def _rows_of_split(is_test: np.ndarray, split: str) -> np.ndarray:
    """Validation is the last tenth of the rows that are not test."""
    rows = np.flatnonzero(is_test if split == "test" else ~is_test)
    border = len(rows) - len(rows) // 10
    return {"test": rows, "train": rows[:border], "validation": rows[border:]}[split]


@dataclass(frozen=True)
class MixedTask:
    """Streams of text, clips and pictures, with questions about facts, clips and pictures.

    Attributes:
        pieces: of one split.
        facts, clips, pictures: how many of each lie in a stream. One that is too short for all has fewer: all facts,
            and by turns a picture and a clip, as many as fit. So a model can begin with short streams, of facts alone.
        queries: how many of each are asked for, at most.
    """

    pieces: Pieces
    facts: int = 4
    clips: int = 2
    pictures: int = 8
    queries: int = 2
    name_size: int = 3
    digits: int = 2

    kinds = KINDS
    group_names = GROUPS
    vocabulary = 264
    chance = property(lambda self: 0.1)
    # Eight tokens a piece and a question: more than a label needs, less than a picture has.
    needed = property(lambda self: 8 * (self.facts + self.clips + self.pictures + 3 * self.queries))

    def __post_init__(self):
        for name, rows in (("clips", self.pieces.clips), ("pictures", self.pieces.pictures)):
            count = getattr(self, name)
            if not 0 <= count <= 100:
                raise ValueError(f"{name} must be from 0 to 100, got {count}: their numbers have two digits")
            if count and not len(rows):
                raise ValueError(f"{name} is {count}, but the data has none")
        if self.facts < 0 or self.queries < 1 or not (self.facts or self.clips or self.pictures):
            raise ValueError(
                f"there must be something to ask for: facts {self.facts}, clips {self.clips}, pictures "
                f"{self.pictures}, queries {self.queries}"
            )

    def example(self, length: int, generator: np.random.Generator) -> Example:
        """A stream of exactly `length` tokens. Raises ValueError where it is too short for its facts or, where it has
        none, for its first picture (without pictures, its first clip)."""
        blocks = self._blocks(generator, *self._fitting(length))
        asked = []
        for group in range(len(GROUPS)):
            own = [block for block in blocks if block.group == group]
            asked += [own[i] for i in generator.permutation(len(own))[: self.queries]]
        asked = [asked[i] for i in generator.permutation(len(asked))]
        # Answers of a stream are of one width: a class or a word is one token, and what follows it an END.
        tail = sum(len(block.question) + self.digits for block in asked)
        room = length - tail - sum(len(block.tokens) for block in blocks)
        order = generator.permutation(len(blocks))
        cuts = spread(generator, len(blocks), 0, room)
        first = int(generator.integers(0, len(self.pieces.text)))
        text = np.take(self.pieces.text, np.arange(first, first + room), mode="wrap").astype(np.int64)
        tokens, kinds, ends, begin, column = [], [], {}, 0, 0
        for cut, index in zip(cuts, order, strict=True):
            block = blocks[index]
            tokens += [text[begin:cut], block.tokens]
            kinds += [np.full(cut - begin, _TEXT), block.kinds]
            column += cut - begin + len(block.tokens)
            ends[index], begin = column - 1, cut
        tokens.append(text[begin:])
        kinds.append(np.full(room - begin, _TEXT))
        column = length - tail
        answers, distances, groups = [], [], []
        for block in asked:
            tokens += [block.question, block.answer]
            kinds.append(np.full(len(block.question) + self.digits, _QUERY))
            column += len(block.question)
            answers.append(column + np.arange(self.digits))
            distances.append(column - 1 - ends[block.index])
            groups.append(block.group)
            column += self.digits
        return Example(
            np.concatenate(tokens), np.concatenate(kinds), np.stack(answers), np.array(distances), np.array(groups)
        )

    def _fitting(self, length: int) -> tuple[int, int]:
        """How many clips and pictures a stream of this length has."""
        counts, most = [0, 0], (self.clips, self.pictures)
        sizes = [rows.shape[1] + 5 for rows in (self.pieces.clips, self.pieces.pictures)]

        def needed(clips: int, pictures: int) -> int:
            asked = [min(count, self.queries) for count in (self.facts, clips, pictures)]
            questions = asked[0] * (2 + self.name_size) + (asked[1] + asked[2]) * 4 + sum(asked) * self.digits
            facts = self.facts * (2 + self.name_size + self.digits)
            return facts + clips * sizes[0] + pictures * sizes[1] + questions

        turn = 1
        for _ in range(sum(most)):
            # A kind that has all of its pieces leaves its turn to the other.
            turn = turn if counts[turn] < most[turn] else 1 - turn
            more = [count + (place == turn) for place, count in enumerate(counts)]
            if needed(*more) > length:
                break
            counts, turn = more, 1 - turn
        if needed(*counts) > length or not (self.facts or sum(counts)):
            # Without facts the first piece must fit: a picture, where there are any.
            least = needed(0, 0) if self.facts else needed(*((0, 1) if self.pictures else (1, 0)))
            raise ValueError(f"a stream of {length} tokens is too short for its pieces, it needs at least {least}")
        return counts[0], counts[1]

    def _blocks(self, generator: np.random.Generator, clips: int, pictures: int) -> list["_Block"]:
        blocks, pieces = [], self.pieces
        names = generator.choice(26**self.name_size, self.facts, replace=False) if self.facts else []
        for name in names:
            letters = ord("a") + name // 26 ** np.arange(self.name_size) % 26
            number = ord("0") + generator.integers(0, 10, self.digits)
            tokens = np.concatenate([[FACT_START], letters, number, [FACT_END]])
            question = np.concatenate([[QUESTION, FACT_START], letters])
            blocks.append(_Block(len(blocks), 0, tokens, np.full(len(tokens), _FACT), question, number))
        for group, mark, kind, rows, labels, count, zero in (
            (1, AUDIO, _AUDIO, pieces.clips, pieces.words, clips, ord("A")),
            (2, PICTURE, _PICTURE, pieces.pictures, pieces.classes, pictures, ord("0")),
        ):
            for number, row in enumerate(generator.integers(0, len(rows), count) if count else []):
                digits = ord("0") + np.array([number // 10, number % 10])
                tokens = np.concatenate([[mark], digits, rows[row], [END, TEXT]])
                kinds = np.full(len(tokens), kind)
                kinds[:3], kinds[-2:] = _LABEL, _LABEL
                # A short answer is filled up with END, which a model learns at once.
                answer = np.array([zero + labels[row]] + [END] * (self.digits - 1))
                blocks.append(_Block(len(blocks), group, tokens, kinds, np.array([QUESTION, mark, *digits]), answer))
        return blocks


@dataclass(frozen=True)
class _Block:
    index: int
    group: int
    tokens: np.ndarray
    kinds: np.ndarray
    question: np.ndarray
    answer: np.ndarray


@dataclass
class StreamArguments:
    data: str = field(metadata={"help": "folder with a text, and what there is of pictures and clips"})
    output: str = field(metadata={"help": "the .npz file to write; it must not exist"})
    length: int = field(default=131_072)
    split: str = field(default="train", metadata={"help": "train, validation or test"})
    decimation: int = field(default=1, metadata={"help": "average so many samples of a clip to one"})
    facts: int = field(default=4)
    clips: int = field(default=2)
    pictures: int = field(default=8)
    queries: int = field(default=2, metadata={"help": "questions of each kind, at most"})
    seed: int = field(default=0)


def main(argv: list[str] | None = None) -> Example:
    a = parse_arguments(StreamArguments, argv)
    if Path(a.output).exists():
        raise ValueError(f"output {a.output!r} exists already")
    task = MixedTask(load_pieces(a.data, a.split, a.decimation), a.facts, a.clips, a.pictures, a.queries)
    example = task.example(a.length, np.random.default_rng((a.seed, a.length, 0)))
    Path(a.output).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(a.output)) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, **vars(example))
    shares = np.bincount(example.kinds, minlength=len(KINDS)) / a.length
    print(f"{a.length:,} tokens: " + ", ".join(f"{100 * s:.1f}% {k}" for k, s in zip(KINDS, shares, strict=True)))
    for answer, distance, group in zip(example.answers, example.distances, example.groups, strict=True):
        print(
            f"{GROUPS[group]}: {bytes(int(t) % 256 for t in example.tokens[answer])!r} from {distance:,} tokens before"
        )
    return example


if __name__ == "__main__":
    main()
