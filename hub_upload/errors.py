"""The error that the command line prints as one message, and the removal of access tokens from text."""

import re
from collections.abc import Iterable

# User and organisation tokens of the Hub.
TOKEN_PATTERN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
REDACTED = "<token>"


class HubUploadError(Exception):
    """Something the user can put right: the message says what was found and what would be right."""


def redact(text: str, tokens: Iterable[str | None] = ()) -> str:
    """`text` without the given tokens and without anything that looks like a token of the Hub."""
    for token in tokens:
        if token:
            text = text.replace(token, REDACTED)
    return TOKEN_PATTERN.sub(REDACTED, text)
