"""Train a small byte-level SeqBoat on Tiny Shakespeare on a CPU, save it, load it back, and continue a long prompt.

    python examples/train_from_scratch.py            # under three minutes on two cores
    python examples/train_from_scratch.py --fast     # a few training steps, to see that everything runs

Needs no network. The model and its tokenizer are written to `outputs/train_from_scratch`, which git ignores.
"""

from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM, build_byte_tokenizer
from modeling_seqboat.training_seqboat import parameter_groups

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples/data/tinyshakespeare.txt"
DEFAULT_OUTPUT = ROOT / "outputs/train_from_scratch"
PROMPT_BYTES = 20_000
PREFILL_CHUNK = 2_048


@dataclass(frozen=True)
class Plan:
    """How long to train, and how much to measure."""

    steps: int
    seconds: float  # training ends here even if steps are left, and the learning rate falls in time for it
    validation_rows: int
    new_tokens: int
    timed_steps: int
    batch_size: int = 8
    length: int = 256
    validation_length: int = 2_048
    learning_rate: float = 4e-3
    router_learning_rate: float = 1e-3
    warmup: float = 0.1


FULL = Plan(steps=1_000, seconds=100, validation_rows=16, new_tokens=400, timed_steps=100)
FAST = Plan(steps=30, seconds=12, validation_rows=2, new_tokens=60, timed_steps=20)


def train(model: SeqBoatForCausalLM, data: Tensor, plan: Plan) -> int:
    """Trains on random windows of `data` (int64 bytes); returns the number of steps taken."""
    # Routers learn more slowly, or they may switch attention off before it is of use.
    groups = parameter_groups(model, weight_decay=0.1, router_learning_rate=plan.router_learning_rate)
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98))
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    generator = torch.Generator().manual_seed(0)
    windows = data.unfold(0, plan.length, 1)
    model.train()
    start = time.perf_counter()
    # Seconds, for time ends a run on most machines; one that does all steps before goes to the end at once.
    bar = tqdm(total=round(plan.seconds), desc="training", unit="s", mininterval=1.0)
    for step in range(plan.steps):
        seconds = time.perf_counter() - start
        done = max(step / plan.steps, seconds / plan.seconds)
        bar.update(min(round(seconds), bar.total) - bar.n)
        if done >= 1:
            bar.close()
            return step
        factor = min((done + 1 / plan.steps) / plan.warmup, (1 - done) / (1 - plan.warmup), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        batch = windows[torch.randint(len(windows), (plan.batch_size,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(step=step, bits_per_byte=f"{loss.item() / math.log(2):.3f}", refresh=False)
    bar.update(bar.total - bar.n)
    bar.close()
    return plan.steps


@torch.no_grad()
def validate(model: SeqBoatForCausalLM, rows: Tensor) -> tuple[float, list[float]]:
    """Bits per byte on `rows` (rows, length), and each layer's share of activated tokens."""
    model.eval()
    losses, active = [], []
    for row in rows.split(4):
        outputs = model(input_ids=row, labels=row, use_cache=False, output_router_probs=True)
        losses.append(outputs.loss.item() * len(row))
        active.append(torch.stack([(probs > 0).float().mean() for probs in outputs.router_probs]) * len(row))
    rates = (torch.stack(active).sum(0) / len(rows)).tolist()
    return sum(losses) / len(rows) / math.log(2), rates


@torch.no_grad()
def decode_speed(model: SeqBoatForCausalLM, prompt: Tensor, steps: int) -> tuple[float, int]:
    """Greedy decoding after `prompt` (1, length): median tokens a second, and bytes of the cache at the end."""
    cache = SeqBoatCache(model.config)
    for chunk in prompt.split(PREFILL_CHUNK, dim=1):
        logits = model(input_ids=chunk, past_key_values=cache, logits_to_keep=1).logits
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        token = logits[:, -1].argmax(-1, keepdim=True)
        logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times), cache.memory_bytes()


def make_output(parser: argparse.ArgumentParser, arguments: argparse.Namespace, own: Path) -> None:
    """Makes the folder `arguments.output`, or ends the script with what is wrong with it.

    Args:
        own: the script's default folder, into which it may write again without an option.
    """
    output = arguments.output.resolve()
    if output.exists() and not output.is_dir():
        parser.error(f"--output {arguments.output} is a file; name a folder")
    if output != own and output.is_dir() and any(output.iterdir()) and not arguments.overwrite:
        parser.error(f"--output {arguments.output} is not empty; name another folder or add --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {arguments.output} cannot be made: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few steps and short measurements, about 20 seconds")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder for model and tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="write into an --output that holds files already")
    arguments = parser.parse_args()
    make_output(parser, arguments, DEFAULT_OUTPUT)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    plan = FAST if arguments.fast else FULL
    set_seed(0)
    # The bytes themselves are the ids; the text never passes through the tokenizer, so no spelling in it is special.
    data = torch.from_numpy(np.frombuffer(DATA.read_bytes(), np.uint8).astype(np.int64))
    held_out = len(data) // 20
    training, tail = data[:-held_out], data[-held_out:]
    rows = tail[: plan.validation_rows * plan.validation_length].view(-1, plan.validation_length)

    model = SeqBoatForCausalLM(SeqBoatConfig.from_preset("small"))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {size:,} parameters, {model.config.num_hidden_layers} layers; {torch.get_num_threads()} threads")
    print(f"data: {len(training):,} bytes to train on, {rows.numel():,} of the held-out tail to validate on")
    print(f"validation bits per byte before training: {validate(model, rows)[0]:.3f}", flush=True)
    start = time.perf_counter()
    steps = train(model, training, plan)
    seconds = time.perf_counter() - start
    trained = steps * plan.batch_size * plan.length
    bits, rates = validate(model, rows)
    print(f"validation bits per byte after training: {bits:.3f} ({steps} steps, {trained:,} bytes, {seconds:.0f} s)")

    model.save_pretrained(arguments.output)
    build_byte_tokenizer().save_pretrained(arguments.output)
    output = arguments.output.resolve()
    print(f"saved to {output.relative_to(ROOT) if output.is_relative_to(ROOT) else output}")

    model = AutoModelForCausalLM.from_pretrained(arguments.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    text = bytes(tail[:PROMPT_BYTES].tolist()).decode("utf-8")
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    print(f"continuation of a prompt of {prompt['input_ids'].shape[1]:,} bytes:\n---", flush=True)
    model.generate(
        **prompt,
        max_new_tokens=plan.new_tokens,
        do_sample=True,
        temperature=0.7,
        prefill_chunk_size=PREFILL_CHUNK,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    print("---")
    for layer, rate in enumerate(rates):
        print(f"layer {layer}: {rate:.1%} of the validation bytes activate attention")
    for context in (1_000, PROMPT_BYTES):
        speed, held = decode_speed(model, prompt["input_ids"][:, :context], plan.timed_steps)
        print(f"after {context:,} bytes: cache of {held:,} bytes, {speed:.0f} tokens/s")


if __name__ == "__main__":
    main()
