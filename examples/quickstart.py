"""Use the trained model in this checkout: continue a long document, see where attention is spent, fine-tune by LoRA.

    python examples/quickstart.py            # under two minutes on two cores
    python examples/quickstart.py --fast     # less of everything, to see that it runs

Needs no network. Adapter, merged model and the activation picture are written to `outputs/quickstart`, which git
ignores. The picture as a PNG needs matplotlib, the fine-tuning PEFT: both come with
`pip install -c constraints.txt -e ".[train]"`,
and what is missing is left out.
"""

from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from activation_map import PAGE, PICTURE, map_text
from activation_page import build_page, write_png
from recipes import check_model_folder
from torch import Tensor
from tqdm import tqdm
from train_from_scratch import Plan, make_output, train, validate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextStreamer, set_seed

from modeling_seqboat import SeqBoatCache, SeqBoatForCausalLM

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = ROOT / "examples/pretrained/seqboat-enwik8-small"
DEFAULT_OUTPUT = ROOT / "outputs/quickstart"
DOCUMENT = ROOT / "examples/data/enwik8_excerpt.txt"
SHAKESPEARE = ROOT / "examples/data/tinyshakespeare.txt"
PREFILL_CHUNK = 2_048
TARGETS = ["hidden_proj", "in_proj", "out_proj"]
EXTRAS = 'pip install -c constraints.txt -e ".[train]"'
# float32 logits of one model whose adapter is added beside the matrices or into them.
LARGEST_DIFFERENCE = 1e-2


@dataclass(frozen=True)
class Amounts:
    """How much of each part is done; `fine_tuning` trains for its seconds or steps, whichever end first."""

    document_bytes: int
    new_tokens: int
    shown_bytes: int
    fine_tuning: Plan


FULL = Amounts(
    document_bytes=30_000,
    new_tokens=400,
    shown_bytes=2_048,
    fine_tuning=Plan(steps=2_000, seconds=60, validation_rows=4, new_tokens=200, timed_steps=0, learning_rate=3e-3),
)
FAST = Amounts(
    document_bytes=6_000,
    new_tokens=60,
    shown_bytes=512,
    fine_tuning=Plan(steps=20, seconds=10, validation_rows=1, new_tokens=60, timed_steps=0, learning_rate=3e-3),
)


def load(folder: Path) -> SeqBoatForCausalLM:
    """The model in float32, which CPUs compute faster than the bfloat16 that it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def read(model: SeqBoatForCausalLM, document: Tensor) -> SeqBoatCache:
    """A cache of all of `document` (1, length) but its last token, which `generate` reads itself."""
    cache = SeqBoatCache(model.config)
    for chunk in tqdm(document[:, :-1].split(PREFILL_CHUNK, dim=1), desc="reading", unit="chunk", leave=False):
        model(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
    return cache


def continue_document(
    model: SeqBoatForCausalLM, tokenizer: PreTrainedTokenizerBase, document: Tensor, amounts: Amounts
) -> None:
    """Reads the document, prints what the model writes on, and what reading and writing cost."""
    start = time.perf_counter()
    cache = read(model, document)
    seconds = time.perf_counter() - start
    print(f"read {document.shape[1]:,} bytes in {seconds:.1f} s; cache of {cache.memory_bytes():,} bytes", flush=True)
    beginning = bytes(document[0, -200:].tolist()).decode("utf-8", errors="replace")
    print(f"they end with:\n---\n{beginning}\n---\ncontinuation:\n---", flush=True)
    start = time.perf_counter()
    tokens = model.generate(
        document,
        past_key_values=cache,
        max_new_tokens=amounts.new_tokens,
        do_sample=True,
        temperature=0.7,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    speed = (tokens.shape[1] - document.shape[1]) / (time.perf_counter() - start)
    print(f"---\n{speed:.0f} tokens/s; cache of {cache.memory_bytes():,} bytes", flush=True)


def draw_activations(model: SeqBoatForCausalLM, folder: Path, text: bytes, output: Path) -> None:
    """Writes the page, and the PNG where matplotlib is installed, for a text; prints the rates."""
    shown = map_text(str(folder), model.config, f"the document's last {len(text):,} bytes", text, len(text))
    shown.model = folder.name
    (output / PAGE).write_text(build_page(shown), encoding="utf-8")
    try:
        write_png(shown, output / PICTURE)
    except ImportError:
        print(f"no {PICTURE}: drawing it needs matplotlib; {EXTRAS}")
    for layer, rate in enumerate(shown.report.rates):
        print(f"layer {layer}: {rate:.1%} of these bytes activate attention")
    print(f"the picture is {shorten(output / PAGE)}", flush=True)


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


def fine_tune(folder: Path, tokenizer: PreTrainedTokenizerBase, plan: Plan, output: Path) -> SeqBoatForCausalLM | None:
    """Trains an adapter on Tiny Shakespeare, saves it, loads it again and merges it. Returns the merged model, or None
    where PEFT is not installed. Raises RuntimeError if the merged model computes something else."""
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        print(f"no fine-tuning: it needs PEFT; {EXTRAS}")
        return None
    data = torch.from_numpy(np.fromfile(SHAKESPEARE, np.uint8).astype(np.int64))
    held_out = len(data) // 20
    tail = data[-held_out:]
    rows = tail[: plan.validation_rows * plan.validation_length].view(-1, plan.validation_length)
    adapted = get_peft_model(load(folder), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    trainable, total = adapted.get_nb_trainable_parameters()
    print(f"LoRA on Tiny Shakespeare: {trainable:,} of {total:,} parameters are trained")
    print(f"held-out bits per byte before: {validate(adapted, rows)[0]:.3f}", flush=True)
    start = time.perf_counter()
    steps = train(adapted, data[:-held_out], plan)
    seconds = time.perf_counter() - start
    size = steps * plan.batch_size * plan.length
    print(
        f"held-out bits per byte after: {validate(adapted, rows)[0]:.3f} ({steps} steps, {size:,} bytes, "
        f"{seconds:.0f} s)"
    )
    adapted.save_pretrained(output / "adapter")

    expected = logits_of(adapted, rows[:1, :512])
    reloaded = PeftModel.from_pretrained(load(folder), output / "adapter")
    from_file = (logits_of(reloaded, rows[:1, :512]) - expected).abs().max().item()
    merged = reloaded.merge_and_unload()
    difference = (logits_of(merged, rows[:1, :512]) - expected).abs().max().item()
    if max(from_file, difference) > LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"logits differ by {from_file} after reloading the adapter and by {difference} after merging it"
        )
    print(
        f"largest difference of logits: {from_file:.1e} after reloading the adapter, {difference:.1e} after merging it"
    )
    merged.save_pretrained(output / "merged")
    tokenizer.save_pretrained(output / "merged")
    print(f"saved to {shorten(output / 'adapter')} and {shorten(output / 'merged')}", flush=True)
    return merged


def shorten(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="less of everything, under a minute")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="another byte-level SeqBoat")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder for adapter, model and picture")
    parser.add_argument("--overwrite", action="store_true", help="write into an --output that holds files already")
    arguments = parser.parse_args()
    try:
        check_model_folder(str(arguments.model.absolute()))
    except FileNotFoundError as error:
        parser.error(f"--model: {error}")
    make_output(parser, arguments, DEFAULT_OUTPUT)
    return arguments


def main() -> None:
    start = time.perf_counter()
    arguments = parse_arguments()
    amounts = FAST if arguments.fast else FULL
    set_seed(0)
    model, tokenizer = load(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {shorten(arguments.model)}, {size:,} parameters, {model.config.num_hidden_layers} layers; "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    # The bytes themselves are the ids; the text never passes through the tokenizer, so no spelling in it is special.
    text = DOCUMENT.read_bytes()[: amounts.document_bytes]
    document = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))[None]
    continue_document(model, tokenizer, document, amounts)

    draw_activations(model, arguments.model, text[-amounts.shown_bytes :], arguments.output)

    merged = fine_tune(arguments.model, tokenizer, amounts.fine_tuning, arguments.output)
    if merged is not None:
        print("the fine-tuned model writes:\n---", flush=True)
        prompt = tokenizer("ROMEO:\n", return_tensors="pt", add_special_tokens=False)
        streamer = TextStreamer(tokenizer)
        merged.generate(
            **prompt, max_new_tokens=amounts.fine_tuning.new_tokens, do_sample=True, temperature=0.7, streamer=streamer
        )
        print("---")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
