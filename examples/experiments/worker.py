"""Started by the driver: reads settings and then recipes as lines of JSON, answers each recipe by a line."""

import json
import os
import sys
import traceback
from pathlib import Path

# The package beside the examples, installed or not.
sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
import script_start  # noqa: F401, before torch

# isort: split
import torch
from run_data import Sources
from run_recipe import from_flat
from runs import execute


def main() -> None:
    # Whatever a library prints goes to the log; the pipe is for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    device = torch.device(settings.pop("device"))
    torch.set_num_threads(settings.pop("threads"))
    sources = Sources(**settings)
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            answer = execute(from_flat(asked["recipe"]), sources, device, asked["keep"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer, allow_nan=False) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
