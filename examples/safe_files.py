"""Reading files that may be anything, and writing files that are whole or not there.

Readers raise FileNotFoundError and ValueError that name the file, and the line where there is one.
"""

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_packed(path: Path) -> bytes:
    """The contents of a plain, .gz or .xz file."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as stream:
            return stream.read()
    # gzip reports a cut file by EOFError, a damaged one by zlib.error or BadGzipFile, which is an OSError.
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{str(path)!r} is damaged or no {path.suffix} file: {error}") from error


def decode_text(data: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark at its beginning."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} of {name!r} is no UTF-8: {error.reason}, byte 0x{data[error.start]:02X}"
        ) from None


def read_text(path: Path) -> str:
    return decode_text(path.read_bytes(), str(path))


def parse_json(text: str, name: str) -> Any:
    """`name` says in errors what the text is: a file, a line of one, or an argument."""
    try:
        return json.loads(text)
    # A text nested too deeply is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    value = parse_json(read_text(path), repr(str(path)))
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def json_lines(data: bytes, name: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file's contents, each with the number of its line; empty lines are left out.

    Lines end at a line feed and nowhere else: a JSON text may hold every other separator of Unicode.
    """
    rows = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {name!r}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is no UTF-8: {error.reason}, byte 0x{line[error.start]:02X}") from None
        value = parse_json(text, where)
        if not isinstance(value, dict):
            raise ValueError(f"{where} must hold a JSON object, it holds a {type(value).__name__}")
        rows.append((number, value))
    return rows


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once the block has ended well: whoever reads `path` finds
    the old contents or the new ones, whole."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")
