"""Continues a text with a model that `python -m hub_upload export` wrote, in onnxruntime or ExecuTorch, without this
package.

    python -m hub_upload export examples/pretrained/seqboat-enwik8-small --format onnx --output outputs/onnx
    python examples/run_exported.py outputs/onnx --prompt "The [[Mediterranean Sea]] is" --tokens 50 \
        --compare examples/pretrained/seqboat-enwik8-small

The state goes from each call to the next: zeros, then what the last call returned. With `--compare` the same text is
continued by `generate()`, and the tokens must be equal.
"""

from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


class ExportedModel:
    """A language model's `prompt` and `step` in onnxruntime or ExecuTorch, with its state."""

    def __init__(self, folder: Path, threads: int = 0):
        described = json.loads((folder / "export.json").read_text("utf-8"))
        kind, graphs = described["format"], described["graphs"]
        if kind not in _RUNTIMES or "step" not in graphs:
            raise SystemExit(f"{folder} holds no language model in the format onnx or executorch")
        self.runs = {name: _RUNTIMES[kind](folder, graph, threads) for name, graph in graphs.items()}
        ids, _, *self.state_inputs = graphs["prompt"]["inputs"]
        # Columns of a prompt, where the graph takes no other number.
        self.columns = ids["shape"][1] if isinstance(ids["shape"][1], int) else None
        self.state: list[np.ndarray] = []

    def reset(self, rows: int) -> None:
        """Forgets what was read."""
        self.state = [np.zeros((rows, *each["shape"][1:]), each["dtype"]) for each in self.state_inputs]

    def read(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """(B, L) int64 ids onto the state -> (B, vocabulary) logits behind each row's last real token."""
        mask = np.ones_like(ids) if mask is None else mask
        if ids.shape[1] == 1 or self.columns is None:
            return self._read("step" if ids.shape[1] == 1 else "prompt", ids, mask)
        if len(ids) > 1 and ids.shape[1] > self.columns:
            raise ValueError(f"rows of more than {self.columns} columns, which this graph takes, are read one by one")
        for first in range(0, ids.shape[1], self.columns):
            missing = max(0, first + self.columns - ids.shape[1])
            part = [np.pad(each[:, first : first + self.columns], ((0, 0), (0, missing))) for each in (ids, mask)]
            logits = self._read("prompt", *part)
        return logits

    def _read(self, name: str, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        logits, *self.state = self.runs[name]([ids, mask, *self.state])
        return logits


def _in_onnxruntime(folder: Path, graph: dict, threads: int) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / graph["file"]), options)
    names, outputs = ([each["name"] for each in graph[part]] for part in ("inputs", "outputs"))
    # A graph does without what it does not read.
    known = {each.name for each in session.get_inputs()}

    def run(values: list[np.ndarray]) -> list[np.ndarray]:
        given = dict(zip(names, values, strict=True))
        return session.run(outputs, {name: given[name] for name in given if name in known})

    return run


def _in_executorch(folder: Path, graph: dict, threads: int) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / graph["file"]).load_method("forward")

    def run(values: list[np.ndarray]) -> list[np.ndarray]:
        found = method.execute([torch.from_numpy(np.ascontiguousarray(value)) for value in values])
        # The next call writes over what this one returned.
        return [tensor.numpy().copy() for tensor in found]

    return run


_RUNTIMES = {"onnx": _in_onnxruntime, "executorch": _in_executorch}


def main(argv: list[str] | None = None) -> list[int]:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that export wrote")
    parser.add_argument("--prompt", default="The [[Mediterranean Sea]] is")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0, help="for onnxruntime; 0: as many as there are cores")
    parser.add_argument("--compare", type=Path, help="folder of the model, to compare with its generate()")
    a = parser.parse_args(argv)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(a.folder / "tokenizer.json"))
    prompt = tokenizer.encode(a.prompt, add_special_tokens=False).ids
    if len(prompt) < 2 or a.tokens < 1:
        parser.error(f"a prompt has 2 tokens or more and is continued by 1 or more, got {len(prompt)} and {a.tokens}")
    model, new = ExportedModel(a.folder, a.threads), []
    model.reset(1)
    begin = time.perf_counter()
    logits = model.read(np.array([prompt]))
    first = time.perf_counter() - begin
    for _ in range(a.tokens):
        new.append(int(logits[0].argmax()))
        logits = model.read(np.array([new[-1:]]))
    seconds = time.perf_counter() - begin - first
    print(a.prompt + tokenizer.decode(new))
    print(f"{len(prompt)} tokens read in {1000 * first:.1f} ms, {1000 * seconds / a.tokens:.1f} ms a token after them")
    if a.compare is not None:
        expected = generated(a.compare, prompt, a.tokens)
        if new != expected:
            raise SystemExit(f"generate() continues otherwise: {expected}, not {new}")
        print("equal to generate()")
    return new


def generated(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What `generate()` continues a prompt with, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    import modeling_seqboat  # noqa: F401  (registers the architecture)

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return text[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main()
