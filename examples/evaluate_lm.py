"""Bits per byte of a causal language model on a text, read once from front to back.

    python examples/evaluate_lm.py outputs/train_from_scratch --split validation \
        --data examples/data/tinyshakespeare.txt

Protocol: the text is tokenised without special tokens and fed in chunks through the cache, so that every token but the
first is scored once, with everything before it as context (`--context N`: the state starts afresh every N tokens,
whose first is not scored). Bits per byte = sum of -log2 p over the scored tokens / bytes that those tokens stand for.
The result is printed, and written as the JSON that `python -m hub_upload build --evaluation` reads.

With `--context N --stride S` windows of N tokens start every S tokens, each read afresh, and the last S tokens of
every window are scored (of the first, all but its first token): each token once, with N - S to N - 1 tokens before it
(those of the first window with what there is). Any causal language model can be scored so, a Llama too.
"""

from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes import check_model_folder
from run_record import published_command
from safe_files import write_json
from text_data import ENWIK8_BYTES, ENWIK8_SPLIT, load_tokenizer, read_text_file, text_encoder
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_seqboat import SeqBoatCache, SeqBoatForCausalLM


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model with its tokenizer, or a Hub name")
    parser.add_argument("--data", required=True, help="text file, plain, .gz or .xz")
    parser.add_argument(
        "--split",
        choices=("all", "validation", "test"),
        default="all",
        help="enwik8, known by its length: bytes 90-95 M or 95-100 M; any other text: its last tenth for both",
    )
    parser.add_argument("--max-bytes", type=int, help="read only the first bytes of the split")
    parser.add_argument("--context", type=int, help="tokens after which the state starts afresh; by default never")
    parser.add_argument("--stride", type=int, help="score windows of --context tokens, one every this many tokens")
    parser.add_argument("--batch-size", type=int, default=4, help="with --stride: windows a forward reads")
    parser.add_argument("--chunk-size", type=int, default=4096, help="without --stride: tokens a forward reads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    for name in ("max_bytes", "context", "chunk_size"):
        value = getattr(arguments, name)
        if value is not None and value < 2:
            parser.error(f"--{name.replace('_', '-')} must be at least 2, got {value}")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {arguments.batch_size}")
    if arguments.stride is not None:
        if arguments.context is None:
            parser.error(f"--stride {arguments.stride} needs --context, the length of the windows")
        check_stride(parser, arguments.context, arguments.stride)
    if arguments.output is not None and arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already; name another file")
    try:
        check_model_folder(arguments.model)
    except FileNotFoundError as error:
        parser.error(str(error))
    return arguments


def check_stride(parser: argparse.ArgumentParser, context: int, stride: int) -> None:
    """Ends the program where windows of `context` tokens cannot start every `stride` tokens."""
    if not 1 <= stride < context:
        parser.error(f"--stride must be from 1 to {context - 1}, below --context; got {stride}")


def cut_split(text: bytes, split: str) -> bytes:
    """The part of a text that `split` names."""
    if split == "all":
        return text
    if len(text) == ENWIK8_BYTES:
        first, second = ENWIK8_SPLIT
        return text[first:second] if split == "validation" else text[second:]
    return text[len(text) - len(text) // 10 :]


@torch.no_grad()
def score(
    model: SeqBoatForCausalLM, tokens: np.ndarray, chunk_size: int, context: int | None
) -> tuple[float, int, list[float]]:
    """Reads `tokens` once.

    Args:
        tokens: (T,) integers, T >= 2.
        chunk_size: tokens a forward.
        context: tokens after which the cache is emptied, or None for never.

    Returns:
        The sum of -log2 p over the scored tokens, their number, and the share of activated tokens a layer.
    """
    length = context or len(tokens)
    bits, scored = 0.0, 0
    activated = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    for start in range(0, len(tokens), length):
        piece = tokens[start : start + length]
        cache = SeqBoatCache(model.config)
        last = None
        steps = range(0, len(piece), chunk_size)
        for first in tqdm(steps, desc="bits per byte", disable=len(steps) < 2, leave=False):
            ids = torch.as_tensor(piece[first : first + chunk_size].astype("int64"), device=model.device)[None]
            out = model(ids, past_key_values=cache, output_router_probs=True)
            logits = out.logits[0].float()
            # The chunk's first token is predicted by the chunk before it.
            ahead = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
            targets = ids[0, 1:] if last is None else ids[0]
            losses = torch.nn.functional.cross_entropy(ahead, targets, reduction="sum")
            bits += float(losses) / math.log(2)
            scored += len(targets)
            last = logits[-1:]
            activated += torch.stack([(probs > 0).sum().double().cpu() for probs in out.router_probs])
    return bits, scored, (activated / len(tokens)).tolist()


def read_windows(
    model: PreTrainedModel, tokens: np.ndarray, context: int, stride: int, batch_size: int, what: str, **options: Any
) -> Iterator[tuple[Any, list[tuple[int, int, int]]]]:
    """Reads windows of `context` tokens, one every `stride`, `batch_size` a forward, each afresh.

    Args:
        tokens: (T,) integers, T >= 2. what: the progress bar's name. options: for the model's forward.

    Yields:
        The model's output for some windows, and (start, end, known) of each: tokens[start:end] are read, and its own
        are those from `known` on, `stride` of them; the first window's are all but its first token, the last one ends
        with the text and may have fewer.
    """
    # A window for every `stride` tokens after the first window's.
    ends = [*range(min(context, len(tokens)), len(tokens), stride), len(tokens)]
    windows = [(max(0, end - context), end, known) for end, known in zip(ends, [1, *ends[:-1]], strict=True)]
    for first in tqdm(range(0, len(windows), batch_size), desc=what, leave=False):
        batch = windows[first : first + batch_size]
        ids = torch.stack([torch.as_tensor(tokens[start:end].astype("int64")) for start, end, _ in batch])
        yield model(ids.to(model.device), use_cache=False, **options), batch


@torch.no_grad()
def score_windows(
    model: PreTrainedModel, tokens: np.ndarray, context: int, stride: int, batch_size: int
) -> tuple[float, int, list[float]]:
    """Reads windows of `context` tokens, one every `stride`, and scores the last `stride` of each; of the first, all.

    Args:
        tokens: (T,) integers, T >= 2.
        context, stride: tokens, 1 <= stride < context.
        batch_size: windows a forward.

    Returns:
        As `score`; the share of activated tokens is over all that is read, and empty for models without routers.
    """
    options = {"output_router_probs": True} if isinstance(model, SeqBoatForCausalLM) else {}
    bits, scored, read, activated = 0.0, 0, 0, 0
    for out, batch in read_windows(model, tokens, context, stride, batch_size, "bits per byte", **options):
        for row, (start, end, known) in enumerate(batch):
            logits = out.logits[row, known - start - 1 : -1].float()
            targets = torch.as_tensor(tokens[known:end].astype("int64"), device=logits.device)
            bits += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")) / math.log(2)
            scored += len(targets)
        read += out.logits.shape[:2].numel()
        if options:
            activated += torch.stack([(probs > 0).sum() for probs in out.router_probs]).double().cpu()
    return bits, scored, (activated / read).tolist() if options else []


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    text = cut_split(read_text_file(arguments.data), arguments.split)[: arguments.max_bytes]
    tokenizer = load_tokenizer(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    if arguments.stride is None and not isinstance(model, SeqBoatForCausalLM):
        raise ValueError(
            f"{arguments.model} is a {type(model).__name__}, whose cache this does not know; "
            "give --context and --stride to score it in windows"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = text_encoder(tokenizer)(text)
    if len(tokens) < 2:
        raise ValueError(f"the split has {len(tokens)} tokens; at least 2 are needed to score one")
    start = time.perf_counter()
    if arguments.stride is not None:
        bits, scored, rates = score_windows(model, tokens, arguments.context, arguments.stride, arguments.batch_size)
    else:
        bits, scored, rates = score(model, tokens, arguments.chunk_size, arguments.context)
    seconds = time.perf_counter() - start
    value = bits / scored * len(tokens) / len(text)
    context = "everything before it" if arguments.context is None else f"up to {arguments.context - 1} tokens"
    if arguments.stride is not None and len(tokens) > arguments.context:
        context = f"{arguments.context - arguments.stride} to {arguments.context - 1} tokens after the first window"
    print(
        f"{value:.4f} bits per byte over {scored:,} tokens, context: {context}; {len(tokens) / seconds:,.0f} tokens/s"
    )
    for layer, rate in enumerate(rates):
        print(f"layer {layer}: {rate:.1%} of the tokens activate attention")
    name = Path(arguments.data).name.split(".")[0]
    result = {
        "results": [
            {
                "task": "text-generation",
                "dataset": {"name": name, "type": name, "split": arguments.split},
                "metrics": [{"type": "bits_per_byte", "name": "Bits per byte", "value": round(value, 4)}],
            }
        ],
        "activation_rates": [round(rate, 4) for rate in rates],
        "protocol": {
            "scored_tokens": scored,
            "bytes": len(text),
            "context": arguments.context,
            "stride": arguments.stride,
            "dtype": arguments.dtype,
        },
        "command": published_command("examples/evaluate_lm.py", argv),
    }
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)
    return result


if __name__ == "__main__":
    main()
