"""Bits per byte against the length of the context, and generation after long prompts.

    python benchmarks/bench_long_context.py examples/pretrained/seqboat-enwik8-small --data enwik8.xz --split test \
        --output outputs/long_context

Quality: blocks of bytes, evenly spaced over the split, are scored after contexts of several lengths. The blocks are
the same for every length; the state starts empty, reads the context's bytes before the block, then the block, so that
a scored byte sees the context and what precedes it in its block. Generation: the split's first bytes are read as a
prompt, and a continuation is sampled. Runs on a GPU where there is one, else on the CPU.

Writes `long_context.json`, from which `python -m hub_upload build --records` makes a section of the model card,
`long_context.csv` and `long_context.md`. What the JSON holds already is not measured again, so that a run that was
interrupted goes on.
"""

import argparse
import csv
import json
import math
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import script_start  # noqa: F401, before torch

# isort: split
import numpy as np
import torch
from evaluate_lm import cut_split
from recipes import check_model_folder
from run_record import published_command
from text_data import read_text_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, set_seed

from hub_upload.long_context import long_context_section
from modeling_seqboat import SeqBoatCache, SeqBoatForCausalLM

NAME = "long_context"
WORD = re.compile(rb"[A-Za-z]{2,}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a byte-level SeqBoat language model")
    parser.add_argument("--data", required=True, help="text file, plain, .gz or .xz")
    parser.add_argument("--split", choices=("all", "validation", "test"), default="all", help="as in evaluate_lm.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18])
    parser.add_argument("--blocks", type=int, default=32, help="blocks that are scored")
    parser.add_argument("--block-bytes", type=int, default=1024, help="scored bytes a block")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1_000, 1_000_000], help="bytes before generation")
    parser.add_argument("--new-tokens", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--chunk-size", type=int, default=4096, help="bytes a forward reads; the result is the same")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks read side by side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", help="cpu or cuda; by default the GPU where there is one")
    parser.add_argument("--overwrite", action="store_true", help="forget what the folder holds of another run")
    a = parser.parse_args(argv)
    for name in ("blocks", "block_bytes", "new_tokens", "chunk_size", "batch_size"):
        if getattr(a, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(a, name)}")
    for name in ("contexts", "prompts"):
        if any(length < 2 for length in getattr(a, name)):
            parser.error(f"--{name} must be at least 2, got {min(getattr(a, name))}")
    if a.temperature <= 0:
        parser.error(f"--temperature must be above 0, got {a.temperature}")
    a.device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return a


def check_lengths(a: argparse.Namespace, size: int) -> None:
    """Raises ValueError where the split is too short for what is asked for."""
    needed = max([context + a.blocks * a.block_bytes for context in a.contexts] + a.prompts)
    if needed > size:
        raise ValueError(
            f"the split has {size:,} bytes, but {needed:,} are needed: lower --contexts, --prompts or --blocks"
        )


def block_starts(a: argparse.Namespace, size: int) -> list[int]:
    """Where the scored blocks begin: the same for every context, since each is preceded by the longest."""
    first = max(a.contexts)
    step = (size - first) // a.blocks
    return [first + number * step for number in range(a.blocks)]


def read(model: SeqBoatForCausalLM, ids: Tensor, chunk_size: int, label: str) -> SeqBoatCache:
    """The cache after `ids` (rows, length)."""
    cache = SeqBoatCache(model.config)
    chunks = ids.split(chunk_size, dim=1)
    for chunk in tqdm(chunks, desc=label, unit="chunk", disable=len(chunks) < 2, leave=False):
        model(input_ids=chunk.to(model.device), past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def bits_per_byte(
    model: SeqBoatForCausalLM, tokens: Tensor, starts: list[int], context: int, a: argparse.Namespace
) -> float:
    """Mean of -log2 p over the blocks of `tokens` (size,) that begin at `starts`, each after `context` bytes."""
    total = 0.0
    for first in range(0, len(starts), a.batch_size):
        chosen = starts[first : first + a.batch_size]
        rows = torch.stack([tokens[start - context : start + a.block_bytes] for start in chosen])
        # The context's last byte predicts the block's first.
        cache = read(model, rows[:, : context - 1], a.chunk_size, f"context of {context:,} bytes")
        for at in range(context - 1, rows.shape[1] - 1, a.chunk_size):
            end = min(at + a.chunk_size, rows.shape[1] - 1)
            ids = rows[:, at : end + 1].to(model.device)
            logits = model(input_ids=ids[:, :-1], past_key_values=cache).logits.float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).item()
    return total / math.log(2) / (len(starts) * a.block_bytes)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Of the GPU since the last reset, else of the process since it began; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def generate(model: SeqBoatForCausalLM, tokens: Tensor, length: int, words: set[bytes], a: argparse.Namespace) -> dict:
    """Reads the first `length` of `tokens` and samples on; what that took, and the text."""
    if a.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(a.device)
    prompt = tokens[None, :length]
    synchronise(a.device)
    start = time.perf_counter()
    cache = read(model, prompt[:, :-1], a.chunk_size, f"prompt of {length:,} bytes")
    synchronise(a.device)
    read_seconds = time.perf_counter() - start
    set_seed(0)
    start = time.perf_counter()
    result = model.generate(
        prompt.to(a.device),
        past_key_values=cache,
        max_new_tokens=a.new_tokens,
        do_sample=True,
        temperature=a.temperature,
        eos_token_id=None,
        # Special ids are no text.
        suppress_tokens=list(range(256, model.config.vocab_size)),
    )
    synchronise(a.device)
    seconds = time.perf_counter() - start
    written = bytes(result[0, length:].tolist())
    found = WORD.findall(written)
    return {
        "prompt_bytes": length,
        "prefill_seconds": round(read_seconds, 3),
        "tokens_per_second": round(len(written) / seconds, 2),
        "cache_bytes": cache.memory_bytes(),
        "peak_memory_mib": peak_memory_mib(a.device),
        "known_words": round(sum(word in words for word in found) / len(found), 4) if found else None,
        "sample": written.decode("utf-8", errors="replace"),
    }


class Results:
    """The files in the output folder; written after every measurement."""

    def __init__(self, folder: Path, settings: dict, overwrite: bool):
        self.folder, self.settings = folder, settings
        self.measured: dict = {"quality": [], "generation": []}
        file = folder / f"{NAME}.json"
        if file.exists() and not overwrite:
            known = json.loads(file.read_text(encoding="utf-8"))
            for name, value in settings.items():
                there = known.get("settings", {}).get(name)
                if there != value:
                    raise ValueError(
                        f"{file} was measured with {name}={there!r}, not {value!r}: name another --output, or add "
                        "--overwrite"
                    )
            self.measured = known[NAME]

    def has(self, kind: str, key: str, length: int) -> bool:
        return any(row[key] == length for row in self.measured[kind])

    def add(self, kind: str, row: dict, **described: str) -> None:
        key = next(iter(row))
        self.measured[kind] = sorted([*self.measured[kind], row], key=lambda each: each[key])
        self.measured.update(described)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(f"{NAME}.json", json.dumps({NAME: self.measured, "settings": self.settings}, indent=2) + "\n")
        self._write(f"{NAME}.md", long_context_section(self.measured) + "\n")
        with (self.folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["kind", "bytes_before", "measure", "value"])
            for kind, rows in (("quality", self.measured["quality"]), ("generation", self.measured["generation"])):
                for each in rows:
                    (_, before), *values = each.items()
                    writer.writerows([kind, before, name, value] for name, value in values if name != "sample")

    def _write(self, name: str, text: str) -> None:
        partial = self.folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.folder / name)


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    a = parse_arguments(argv)
    check_model_folder(a.model)
    text = cut_split(read_text_file(a.data), a.split)
    check_lengths(a, len(text))
    starts = block_starts(a, len(text)) if a.contexts else []
    described = {
        "protocol": f"{a.blocks} blocks of {a.block_bytes:,} bytes, evenly spaced over the split, are scored in "
        f"{a.dtype}, the same for every length of context. The state starts empty and reads that many bytes before "
        "each block, then the block.",
        "command": published_command("benchmarks/bench_long_context.py", argv),
        "hardware": torch.cuda.get_device_name(a.device)
        if a.device.type == "cuda"
        else f"a CPU with {torch.get_num_threads()} threads",
    }
    settings = {
        "model": Path(a.model).resolve().name, "data": Path(a.data).name, "split": a.split, "split_bytes": len(text),
        "first_block": starts[0] if starts else None, "blocks": a.blocks, "block_bytes": a.block_bytes,
        "dtype": a.dtype, "hardware": described["hardware"], "new_tokens": a.new_tokens, "temperature": a.temperature,
    }  # fmt: skip
    results = Results(a.output, settings, a.overwrite)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).eval().to(a.device)
    tokens = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    words = set(WORD.findall(text))
    # Generation first and in this order: a process's peak of memory never falls.
    for length in sorted(a.prompts):
        if not results.has("generation", "prompt_bytes", length):
            row = generate(model, tokens, length, words, a)
            results.add("generation", row, **described)
            print(
                f"after {length:,} bytes, read in {row['prefill_seconds']:.1f} s: {row['tokens_per_second']:.1f} "
                f"tokens/s, cache of {row['cache_bytes']:,} bytes"
            )
            print(f"---\n{row['sample']}\n---", flush=True)
    for context in sorted(a.contexts):
        if not results.has("quality", "context_bytes", context):
            value = bits_per_byte(model, tokens, starts, context, a)
            row = {"context_bytes": context, "scored_bytes": len(starts) * a.block_bytes, "bits_per_byte": value}
            results.add("quality", row, **described)
            print(f"context of {context:,} bytes: {value:.4f} bits per byte", flush=True)
    return results.measured


if __name__ == "__main__":
    main()
