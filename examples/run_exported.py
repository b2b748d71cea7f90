"""Continues a text with a model that `python -m hub_upload export` wrote, in onnxruntime and without this package.

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
from pathlib import Path

import numpy as np


class ExportedModel:
    """A language model's `prompt` and `step` in onnxruntime, with its state."""

    def __init__(self, folder: Path, threads: int = 0):
        import onnxruntime

        described = json.loads((folder / "export.json").read_text("utf-8"))
        if described["format"] != "onnx" or "step" not in described["graphs"]:
            raise SystemExit(f"{folder} holds no language model in the format onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.sessions = {
            name: onnxruntime.InferenceSession(str(folder / graph["file"]), options)
            for name, graph in described["graphs"].items()
        }
        # Names of the state's tensors, behind ids and mask, with their shapes but for the rows.
        self.state_inputs = described["graphs"]["prompt"]["inputs"][2:]
        self.outputs = [output["name"] for output in described["graphs"]["prompt"]["outputs"]]
        self.state: list[np.ndarray] = []

    def reset(self, rows: int) -> None:
        """Forgets what was read."""
        self.state = [np.zeros((rows, *each["shape"][1:]), each["dtype"]) for each in self.state_inputs]

    def read(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """(B, L) int64 ids onto the state -> (B, vocabulary) logits behind each row's last real token."""
        session = self.sessions["step" if ids.shape[1] == 1 else "prompt"]
        names = [each["name"] for each in self.state_inputs]
        given = dict(zip(names, self.state, strict=True))
        given |= {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
        # A graph does without what it does not read.
        known = {each.name for each in session.get_inputs()}
        logits, *self.state = session.run(self.outputs, {name: given[name] for name in given if name in known})
        return logits


def main(argv: list[str] | None = None) -> list[int]:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that export wrote")
    parser.add_argument("--prompt", default="The [[Mediterranean Sea]] is")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
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
