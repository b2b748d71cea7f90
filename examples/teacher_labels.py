"""What a trained model expects at each token of a training text, for `train_lm.py --teacher_labels`.

    python examples/teacher_labels.py outputs/large/final --data enwik8 --output outputs/labels
    python examples/train_lm.py configuration/recipes/enwik8-small.yaml --train_file enwik8 \
        --teacher_labels outputs/labels --output_dir outputs/small

The text is that which `train_lm.py` trains on, by the same --max_bytes and --validation_fraction. It is read in
windows of --context tokens, one every --stride, each afresh; of a window the last --stride tokens are labelled, of the
first all but its first token: with the --top tokens that the model held most likely there, and their probabilities,
which are scaled to add up to 1. --top 16 of bytes takes 48 bytes a token.
"""

from script_start import ArgumentParser  # before torch

# isort: split
import argparse
from pathlib import Path

import numpy as np
import torch
from evaluate_lm import check_stride, read_windows
from lm_teacher import PROBABILITIES_FILE, RECORD_FILE, TOKENS_FILE, checksum
from recipes import check_model_folder
from run_folder import RunFolder
from run_record import published_name
from safe_files import write_json
from text_data import load_tokenizer, read_text_file, split_text
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling_seqboat import SeqBoatConfig


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model with its tokenizer, or a Hub name")
    parser.add_argument("--data", required=True, help="text file, plain, .gz or .xz: train_file of the training")
    parser.add_argument("--output", required=True, type=Path, help="folder to write, must be new")
    parser.add_argument("--max_bytes", type=int, help="that of the training")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="that of the training")
    parser.add_argument("--top", type=int, default=16, help="predictions that are kept of each token")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--stride", type=int, help="default: half of --context")
    parser.add_argument("--batch_size", type=int, default=8, help="windows a forward reads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(argv)
    for name, least in {"max_bytes": 2, "top": 1, "context": 2, "batch_size": 1}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if not 0 <= arguments.validation_fraction < 1:
        parser.error(f"--validation_fraction must be at least 0 and below 1, got {arguments.validation_fraction}")
    if arguments.stride is None:
        arguments.stride = arguments.context // 2
    check_stride(parser, arguments.context, arguments.stride)
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already; name another folder")
    try:
        check_model_folder(arguments.model)
    except FileNotFoundError as error:
        parser.error(str(error))
    return arguments


@torch.no_grad()
def write_labels(
    model: PreTrainedModel,
    tokens: np.ndarray,
    vocabulary: int,
    a: argparse.Namespace,
    top_tokens: np.ndarray,
    top_probabilities: np.ndarray,
) -> None:
    """Fills top_tokens and top_probabilities, (T, K), for tokens (T,) below `vocabulary`; the first has none, 0."""
    for out, batch in read_windows(model, tokens, a.context, a.stride, a.batch_size, "labels"):
        for row, (start, end, known) in enumerate(batch):
            # Of the columns that are labelled alone: with a large vocabulary the logits are most of what is held.
            likely = out.logits[row, known - start - 1 : -1, :vocabulary].float().softmax(-1)
            likely, found = likely.topk(top_tokens.shape[1], dim=-1)
            top_tokens[known:end] = found.to(torch.int32).cpu().numpy()
            top_probabilities[known:end] = (likely / likely.sum(-1, keepdim=True)).half().cpu().numpy()


def main(argv: list[str] | None = None) -> Path:
    a = parse_arguments(argv)
    tokenizer = load_tokenizer(a.model)
    config = AutoConfig.from_pretrained(a.model).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(config, SeqBoatConfig) and longest is not None and a.context > longest:
        raise ValueError(f"context must be at most {longest}, the longest text of {a.model}, got {a.context}")
    tokens = split_text(read_text_file(a.data), tokenizer, a.validation_fraction, a.max_bytes).train
    if len(tokens) < 2:
        raise ValueError(f"the training text has {len(tokens)} tokens; at least 2 are needed to label one")
    # A model may have more outputs than its tokenizer has tokens, and a text of bytes holds no special ones.
    vocabulary = min(config.vocab_size, 256 if tokens.dtype == np.uint8 else len(tokenizer))
    if a.top > vocabulary:
        raise ValueError(f"top must be at most the vocabulary's size, {vocabulary}, got {a.top}")
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {TOKENS_FILE: np.uint8 if vocabulary <= 256 else np.int32, PROBABILITIES_FILE: np.float16}
    with RunFolder(a.output.parent).replacing(a.output.name) as stage:
        shape = len(tokens), a.top
        arrays = [np.lib.format.open_memmap(stage / name, "w+", kind, shape) for name, kind in kinds.items()]
        write_labels(model, tokens, vocabulary, a, *arrays)
        for array in arrays:
            array.flush()
        record = {"teacher": published_name(a.model), "context": a.context, "stride": a.stride, "top": a.top}
        write_json(stage / RECORD_FILE, {**record, "vocab_size": vocabulary, "checksum": checksum(tokens)})
    return a.output


if __name__ == "__main__":
    main()
