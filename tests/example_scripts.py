"""Scripts of `examples/` as modules of a test."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def imported(monkeypatch: pytest.MonkeyPatch, name: str, *siblings: str) -> Iterator[ModuleType]:
    """The script `name`, for a fixture to `yield from`; it and the siblings that it imports are forgotten
    afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module(name)
    for module in (name, *siblings):
        sys.modules.pop(module, None)
