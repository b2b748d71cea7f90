"""From tokens to what a page can show: characters, with the tokens that each is made of.

A token may be a part of a character (a byte of UTF-8), a character, or a word; bytes that are no UTF-8, control
characters and invisible ones are shown by their numbers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_NAMED = {b"\n": "newline", b"\t": "tab", b" ": "space"}


def visible(text: str) -> str:
    """The text with what cannot be seen, or turns the text around it (bidirectional controls), by its number: names of
    files and of tokens may hold anything, and file names bytes that are no UTF-8 too."""
    return "".join(character if character.isprintable() else _number(character) for character in text)


def _number(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:
        # Python's stand-in for a byte of a file name.
        return f"\\x{number - 0xDC00:02X}"
    return f"U+{number:04X}"


@dataclass
class Token:
    """One token: its bytes, or its name where it stands for no text."""

    text: bytes
    special: str | None = None

    @property
    def label(self) -> str:
        """Short and printable: the name, the text, or bytes in hexadecimal."""
        if self.special is not None:
            return visible(self.special)
        if self.text in _NAMED:
            return _NAMED[self.text]
        try:
            shown = self.text.decode("utf-8")
        except UnicodeDecodeError:
            return "0x" + self.text.hex(" ").upper()
        if not shown.isprintable():
            return "0x" + self.text.hex(" ").upper()
        return f"“{shown}”"


@dataclass
class Cell:
    """What is shown for the tokens first..last: HTML, made of whole characters."""

    first: int
    last: int
    html: str


def _pieces(data: bytes) -> Iterator[tuple[int, str]]:
    """Splits bytes into (length, HTML) of characters, or of single bytes that are no UTF-8."""
    at = 0
    while at < len(data):
        for length in range(1, 5):
            try:
                character = data[at : at + length].decode("utf-8")
            except UnicodeDecodeError:
                continue
            if character:
                yield length, _character(character)
                at += length
                break
        else:
            yield 1, f"<b>{data[at]:02X}</b>"
            at += 1


def _character(character: str) -> str:
    if character == "\n":
        return "<i>↵</i>\n"
    if character == "\t":
        return "<i>⇥</i>"
    if character.isprintable():
        return escape(character)
    number = ord(character)
    return f"<b>{number:02X}</b>" if number < 0x80 else f"<b>{_number(character)}</b>"


def cells_of(tokens: Sequence[Token]) -> list[Cell]:
    """The smallest runs of tokens that hold whole characters, in order, each token in exactly one."""
    cells: list[Cell] = []
    start = 0
    # Specials cut the text: bytes on both sides of one are not a character.
    for end in range(len(tokens) + 1):
        if end < len(tokens) and tokens[end].special is None:
            continue
        cells.extend(_text_cells(tokens, start, end))
        if end < len(tokens):
            cells.append(Cell(end, end, f"<b>{escape(visible(tokens[end].special))}</b>"))
        start = end + 1
    return cells


def _text_cells(tokens: Sequence[Token], start: int, end: int) -> list[Cell]:
    owner = [index for index in range(start, end) for _ in tokens[index].text]
    cells: list[Cell] = []
    at, expected = 0, start
    for length, html in _pieces(b"".join(token.text for token in tokens[start:end])):
        first, last = owner[at], owner[at + length - 1]
        at += length
        # Tokens without any byte are shown empty, lest later ones take their place.
        cells.extend(Cell(index, index, "") for index in range(expected, first))
        if cells and first <= cells[-1].last:
            cells[-1].last = last
            cells[-1].html += html
        else:
            cells.append(Cell(first, last, html))
        expected = last + 1
    cells.extend(Cell(index, index, "") for index in range(expected, end))
    return cells


def tokens_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Token]:
    """The tokens of `ids` with their bytes, as far as the tokenizer tells."""
    specials = set(tokenizer.all_special_ids)
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    byte_level = '"ByteLevel"' in json.dumps(backend.get("decoder"))
    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()} if byte_level else {}
    tokens = []
    for index, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if index in specials:
            tokens.append(Token(b"", name))
        elif byte_of:
            tokens.append(Token(bytes(byte_of.get(symbol, 0x3F) for symbol in name)))
        else:
            # A leading blank is written as U+2581 by SentencePiece, and lost by decoding the token alone.
            shown = name.replace("\u2581", " ") if "\u2581" in name else tokenizer.decode([index])
            tokens.append(Token(shown.encode("utf-8")))
    return tokens
