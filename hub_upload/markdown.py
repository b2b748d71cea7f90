"""Texts of anybody in a model card: one line without markup, or a block of code that they cannot end."""

import re

# What begins markup within a line of Markdown, or ends a cell of a table; as entities they are shown as they are.
_MARKUP = {character: f"&#{ord(character)};" for character in "\\`[]|"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def one_line(text: str) -> str:
    """The text with every run of blanks, line ends and characters that cannot be seen as one blank."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def escaped(text: str) -> str:
    """The text as Markdown shows it, in a paragraph or a cell of a table."""
    return "".join(_MARKUP.get(character, character) for character in one_line(text))


def code_block(text: str, language: str = "", least: int = 3) -> str:
    """A block of code; its fence is longer than any in the text, and what cannot be seen is shown as U+FFFD."""
    shown = "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(least, longest + 1)
    return f"{fence}{language}\n{shown}\n{fence}"
