"""The error that the command line prints as one message, and the removal of access tokens from text."""

import re
from collections.abc import Iterable
from typing import Any

# User and organisation tokens of the Hub.
TOKEN_PATTERN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{20,}")
REDACTED = "<token>"


class HubUploadError(Exception):
    """Something the user can put right: the message says what was found and what would be right."""


def redact(text: str, tokens: Iterable[str | None] = ()) -> str:
    """`text` without the given tokens and without anything that looks like a token of the Hub."""
    for token in tokens:
        if token:
            text = text.replace(token, REDACTED)
    return TOKEN_PATTERN.sub(REDACTED, text)


def shown(value: Any) -> str:
    """A value of a file for an error: plain ones as they are, cut short, of others the type alone."""
    if isinstance(value, (bool, float, type(None))) or (isinstance(value, int) and abs(value) < 10**30):
        return repr(value)
    if isinstance(value, str):
        return repr(value[:200])
    return f"<{type(value).__name__}>"
