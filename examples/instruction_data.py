"""Instruction sets for the example scripts: JSON lines of a prompt and its completion, or of chat messages, as token
ids whose labels cover the answers alone."""

from pathlib import Path
from typing import Any

import torch
from safe_files import json_lines
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase


def read_instructions(path: str, prompt_column: str, completion_column: str) -> list[list[dict]]:
    """Conversations of a .jsonl file: its `messages`, or a user's and an assistant's turn from two columns.

    Raises FileNotFoundError, and ValueError that names the line at fault or says that the file holds no example.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no instruction file {path!r}")
    conversations = []
    for number, row in json_lines(file.read_bytes(), path):
        if "messages" in row:
            conversations.append(_checked_messages(row["messages"], f"line {number} of {path!r}"))
            continue
        for column in (prompt_column, completion_column):
            if column not in row:
                raise ValueError(f"line {number} of {path!r} has no {column!r}; it has {', '.join(row)}")
            if not isinstance(row[column], str):
                raise ValueError(f"line {number} of {path!r}: {column!r} must be a text, got {row[column]!r:.80}")
        conversations.append(
            [
                {"role": "user", "content": row[prompt_column]},
                {"role": "assistant", "content": row[completion_column]},
            ]
        )
    if not conversations:
        raise ValueError(f"instruction file {path!r} is empty")
    return conversations


def _checked_messages(messages: Any, where: str) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of messages, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: a message must hold the texts 'role' and 'content', got {message!r:.80}")
    return messages


class Instructions(Dataset):
    """Conversations as {"input_ids": (L,), "labels": (L,)} int64, at most `length` tokens each. Labels are -100
    outside the assistant's turns. What is longer is cut, and dropped where that leaves no label; `cut` and `dropped`
    count.

    Raises ValueError if the tokenizer's chat template does not mark these turns, or if no answer begins within
    `length`.
    """

    def __init__(self, conversations: list[list[dict]], tokenizer: PreTrainedTokenizerBase, length: int):
        self.rows = []
        self.cut = self.dropped = 0
        for messages in conversations:
            encoded = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, answer = encoded["input_ids"], encoded["assistant_masks"]
            if 1 not in answer:
                raise ValueError(
                    "the tokenizer's chat template marks no assistant turn: it needs {% generation %} around them"
                )
            # The first token of a row has nothing before it to be predicted from.
            if 1 not in answer[1:length]:
                self.dropped += 1
                continue
            self.cut += len(ids) > length
            labels = [token if own else -100 for token, own in zip(ids, answer, strict=True)]
            self.rows.append((ids[:length], labels[:length]))
        if not self.rows:
            raise ValueError(f"no answer begins within sequence_length {length}: give more")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, labels = self.rows[index]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
