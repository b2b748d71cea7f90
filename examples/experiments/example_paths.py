"""What the experiments use of the examples beside them, which are scripts in folders and no packages."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent
for folder in (EXAMPLES, EXAMPLES / "classification"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import listops  # noqa: E402
import pathfinder  # noqa: E402
from recipes import read_yaml  # noqa: E402
from run_folder import open_log  # noqa: E402
from safe_files import json_lines, read_json_object, write_text  # noqa: E402
from tasks import DataArguments, TaskData, load_task, pad_tokens  # noqa: E402
from text_data import read_text_file, split_text  # noqa: E402

__all__ = [
    "EXAMPLES", "DataArguments", "TaskData", "json_lines", "listops", "load_task", "open_log", "pad_tokens",
    "pathfinder", "read_json_object", "read_text_file", "read_yaml", "split_text", "write_text",
]  # fmt: skip
