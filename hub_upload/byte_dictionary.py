"""The dictionary of a byte corpus (`dict.txt`), and the order of the project's byte tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import HubUploadError

# Rows of a published embedding before the lines of its dictionary.
PUBLISHED_BOS, PUBLISHED_PAD, PUBLISHED_EOS, PUBLISHED_UNKNOWN = 0, 1, 2, 3
PUBLISHED_SPECIALS = 4
BYTE_COUNT = 256
PADDING_SYMBOL = "madeupword"


@dataclass(frozen=True)
class BytePermutation:
    """Where each row of the byte tokenizer's embedding comes from.

    Attributes:
        rows: for each id of the byte tokenizer the published row.
        unknown_bytes: bytes that the dictionary lacks; they share the row of `<unk>`.
    """

    rows: list[int]
    unknown_bytes: list[int]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """(published vocabulary, D) -> (byte tokenizer's vocabulary, D), same dtype."""
        return weight[torch.tensor(self.rows)].clone()


def read_byte_dictionary(path: Path) -> list[int | None]:
    """The byte that each line of a byte corpus's dictionary stands for, None for lines that only pad the vocabulary.

    Each line is `<symbol> <count>`; a symbol is a byte value written in decimal, or `madeupword...`.

    Raises HubUploadError naming file and line on anything else, and on a byte that comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HubUploadError(f"the dictionary {path} cannot be read: {error}") from error
    symbols: list[int | None] = []
    for number, line in enumerate(lines, start=1):
        symbol = line.split(" ")[0]
        if symbol.startswith(PADDING_SYMBOL):
            symbols.append(None)
            continue
        # str.isdigit alone would let other scripts' digits through
        if not (symbol.isascii() and symbol.isdigit() and int(symbol) < BYTE_COUNT):
            raise HubUploadError(
                f"{path}, line {number}: {line!r} is not a line of a byte corpus's dictionary; expected a byte value "
                "from 0 to 255 and its count, as in '101 1234'. Without --dict token ids stay as they are."
            )
        if int(symbol) in symbols:
            raise HubUploadError(f"{path}, line {number}: the byte {symbol} comes a second time.")
        symbols.append(int(symbol))
    if not any(symbol is not None for symbol in symbols):
        raise HubUploadError(f"the dictionary {path} names no byte.")
    return symbols


def byte_permutation(
    symbols: list[int | None], vocab_size: int, *, pad: int, bos: int, eos: int, published_rows: int
) -> BytePermutation:
    """The rows of a published embedding in the order of the byte tokenizer.

    Args:
        symbols: as `read_byte_dictionary` gives them.
        vocab_size, pad, bos, eos: of the byte tokenizer; its ids 0 to 255 are the bytes.
        published_rows: rows of the published embedding.

    Raises HubUploadError when dictionary and embedding disagree.
    """
    expected = PUBLISHED_SPECIALS + len(symbols)
    if expected != published_rows:
        raise HubUploadError(
            f"the dictionary has {len(symbols)} lines, which with {PUBLISHED_SPECIALS} special symbols makes "
            f"{expected} ids, but the checkpoint's embedding has {published_rows} rows: another model's dictionary."
        )
    rows = [PUBLISHED_UNKNOWN] * vocab_size
    known = {symbol: PUBLISHED_SPECIALS + line for line, symbol in enumerate(symbols) if symbol is not None}
    for byte, row in known.items():
        rows[byte] = row
    rows[pad], rows[bos], rows[eos] = PUBLISHED_PAD, PUBLISHED_BOS, PUBLISHED_EOS
    return BytePermutation(rows, sorted(set(range(BYTE_COUNT)) - set(known)))
