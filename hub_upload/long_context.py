"""The card's section on long contexts, from what `benchmarks/bench_long_context.py` measured."""

from pathlib import Path
from typing import Any

from .errors import HubUploadError
from .markdown import code_block, escaped, one_line

_QUALITY = (
    ("context_bytes", "context (bytes)", "{:,}"),
    ("scored_bytes", "bytes scored", "{:,}"),
    ("bits_per_byte", "bits per byte", "{:.4f}"),
)
_GENERATION = (
    ("prompt_bytes", "prompt (bytes)", "{:,}"),
    ("prefill_seconds", "reading it (s)", "{:.1f}"),
    ("tokens_per_second", "tokens/s after it", "{:.0f}"),
    ("cache_bytes", "cache (bytes)", "{:,}"),
    ("peak_memory_mib", "peak memory (MiB)", "{:,.0f}"),
)


def checked_long_context(measured: Any, path: Path) -> dict[str, Any]:
    """The value of `long_context` in a file. Raises HubUploadError where it does not have the form that is printed."""
    try:
        for kind, columns in (("quality", _QUALITY), ("generation", _GENERATION)):
            _rows(measured[kind], columns)
        if not (isinstance(measured["quality"], list) and isinstance(measured["generation"], list)):
            raise TypeError("quality and generation must be lists")
        for row in measured["generation"]:
            row["sample"].strip()
            row["prompt_bytes"] + 0
        measured["protocol"].strip()
        measured["command"].strip()
        measured["hardware"].strip()
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise HubUploadError(
            f"{path}: long_context is not what benchmarks/bench_long_context.py writes: {error!r}"
        ) from error
    return measured


def long_context_section(measured: dict[str, Any] | None) -> str:
    """Tables and a sample, or nothing where nothing was measured."""
    if measured is None:
        return ""
    parts = [f"## Long context\n\n{escaped(measured['protocol'])}\n\n{code_block(one_line(measured['command']))}"]
    parts.append(_table(measured["quality"], _QUALITY))
    if measured["generation"]:
        longest = max(measured["generation"], key=lambda row: row["prompt_bytes"])
        parts.append(f"Generation, on {escaped(measured['hardware'])}:")
        parts.append(_table(measured["generation"], _GENERATION))
        parts.append(
            f"After {longest['prompt_bytes']:,} bytes it wrote:\n\n{code_block(longest['sample'], 'text', least=4)}"
        )
    return "\n\n".join(parts)


def _rows(rows: list[dict[str, Any]], columns: tuple) -> list[str]:
    """One line of a table a row; what was not measured (None) stays empty."""
    return [
        "| " + " | ".join("" if row[key] is None else form.format(row[key]) for key, _, form in columns) + " |"
        for row in rows
    ]


def _table(rows: list[dict[str, Any]], columns: tuple) -> str:
    head = "| " + " | ".join(name for _, name, _ in columns) + " |\n|" + " --- |" * len(columns)
    return "\n".join([head, *_rows(rows, columns)])
