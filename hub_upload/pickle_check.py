"""A look at the pickle of a torch file before it is read: what it would cost to read.

Reading with `weights_only=True` runs no code of a file. But a few kilobytes can name one tuple in the next over and
over, and hashing the last of them, as a key of a dictionary, never ends; or nest tuples so deeply
that the interpreter's stack ends. Sizes are added up here without anything being built.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import HubUploadError

# What published checkpoints have is far below all of these.
MOST_BYTES = 64 << 20
MOST_STEPS = 4_000_000
MOST_ENTRIES = 20_000_000
DEEPEST = 200
# The older format has its magic number, protocol, system, object and the names of the storages as a pickle each.
_PICKLES_OF_OLD_FILES = 5
_MARK = object()
# Steps that may hash all that they are given; keys of dictionaries are hashed too.
_HASHES = ("REDUCE", "NEWOBJ", "BINPERSID", "ADDITEMS", "FROZENSET")


@dataclass
class _Size:
    """Of an object that a pickle makes: entries, shared ones counted as often as they are named, and nesting."""

    entries: int = 1
    depth: int = 0

    def add(self, parts: list["_Size"]) -> None:
        self.entries += sum(part.entries for part in parts)
        self.depth = max([self.depth, *(part.depth + 1 for part in parts)])


def check_pickles(path: Path) -> None:
    """Raises HubUploadError where the pickles of a torch file would take too long to read, or are none."""
    try:
        with path.open("rb") as stream:
            # By which torch tells the two formats apart.
            is_archive = stream.read(4) == b"PK\x03\x04"
        if is_archive:
            with closing(zipfile.ZipFile(path)) as archive:
                names = [name for name in archive.namelist() if name.endswith(".pkl")]
                _expect(len(names) == len(set(names)), "it has two files of one name")
                for name in names:
                    _expect(
                        archive.getinfo(name).file_size <= MOST_BYTES, f"{name} has more than {MOST_BYTES:,} bytes"
                    )
                    _check(io.BytesIO(archive.read(name)), 1)
        else:
            with path.open("rb") as stream:
                _check(stream, _PICKLES_OF_OLD_FILES)
    except HubUploadError as error:
        raise HubUploadError(f"the checkpoint {path} is not read: {error}") from None
    # Damaged files fail in the readers' own ways.
    except Exception as error:
        raise HubUploadError(
            f"the checkpoint {path} cannot be read as a published SeqBoat checkpoint (a torch file of plain tensors "
            f"and options, loaded with weights_only=True): "
            f"{(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error


def _expect(holds: bool, reason: str) -> None:
    if not holds:
        raise HubUploadError(reason)


def _check(stream: BinaryIO, pickles: int) -> None:
    steps = work = 0
    for size in _sizes(stream, pickles):
        steps += 1
        work += size.entries
        _expect(size.depth <= DEEPEST, f"its values are nested more than {DEEPEST} deep")
        _expect(
            steps <= MOST_STEPS and work <= MOST_ENTRIES,
            f"reading it means going through more than {MOST_ENTRIES:,} entries, since its keys name each other",
        )


def _sizes(stream: BinaryIO, pickles: int) -> Iterator[_Size]:
    """What each step of the pickles goes through, and how deeply that is nested."""
    for _ in range(pickles):
        stack: list = []
        memo: dict[int, _Size] = {}
        for code, argument, _ in pickletools.genops(stream):
            name = code.name
            if name == "MARK":
                stack.append(_MARK)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("DUP", "POP", "POP_MARK", "STOP", "PROTO", "FRAME"):
                if name == "DUP":
                    stack.append(stack[-1])
                elif name in ("POP", "STOP"):
                    stack.pop()
                elif name == "POP_MARK":
                    _take(stack)
            else:
                yield _made(code, stack)
                continue
            yield _Size()


def _made(code: pickletools.OpcodeInfo, stack: list) -> _Size:
    """Does to the stack what an opcode does, and returns what that goes through."""
    before = code.stack_before
    if pickletools.markobject in before:
        parts = _take(stack)
        below = before.index(pickletools.markobject)
    else:
        below, parts = len(before), []
    taken = [stack.pop() for _ in range(below)][::-1]
    changes = code.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
    # What is changed stays the same object, named elsewhere or not.
    result = taken.pop(0) if changes else _Size()
    result.add(taken + parts)
    if code.stack_after:
        stack.append(result)
    if code.name in ("SETITEM", "SETITEMS"):
        pairs = taken + parts
        return _Size(1 + sum(key.entries for key in pairs[::2]), result.depth)
    return result if code.name in _HASHES else _Size(1, result.depth)


def _take(stack: list) -> list[_Size]:
    """Takes the stack off down to its last mark."""
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    parts = stack[at + 1 :]
    del stack[at:]
    return parts
