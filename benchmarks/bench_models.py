"""SeqBoat against a Llama of equal size, side by side in one process: training step, prefill, decode.

    python benchmarks/bench_models.py --output benchmarks/results/models.csv

Runs on a GPU when there is one (the enwik8 shape, bfloat16 autocast), else on the CPU at a small shape. Times are
medians over repeats after a warm-up, measured with the device synchronised. A step is forward and backward without an
optimiser. Router biases are set so that a stated share of tokens is activated in every layer.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", default="train,rates,prefill,decode", help="comma-separated parts to run")
    parser.add_argument("--backends", default="triton,torch", help="SeqBoat kernel backends for the training step")
    return parser.parse_args()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def seqboat(device: torch.device, backend: str = "auto") -> SeqBoatForCausalLM:
    torch.manual_seed(0)
    if device.type == "cuda":
        config = SeqBoatConfig(kernel_backend=backend)
    else:
        config = SeqBoatConfig(
            hidden_size=256,
            num_hidden_layers=4,
            v_head_dim=512,
            qk_head_dim=64,
            memory_size=256,
            kernel_backend=backend,
        )
    return SeqBoatForCausalLM(config).to(device)


def llama(device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = (512, 12, 1368, 8) if device.type == "cuda" else (256, 4, 512, 4)
    config = LlamaConfig(
        vocab_size=264, hidden_size=shape[0], num_hidden_layers=shape[1], intermediate_size=shape[2],
        num_attention_heads=shape[3], max_position_embeddings=1 << 20, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


@torch.no_grad()
def set_activation_rate(model: SeqBoatForCausalLM, ids: torch.Tensor, rate: float) -> None:
    """Moves each router's bias so that this share of these tokens is activated, layer by layer in one forward."""

    def shift(router, args):
        logits = torch.nn.functional.linear(args[0].float(), router.weight.float())
        margin = (logits[..., 1] - logits[..., 0]).flatten()
        order = margin.sort().values
        cut = order[min(int((1 - rate) * len(order)), len(order) - 1)] - (1.0 if rate == 1 else 0)
        router.bias.copy_(torch.stack([cut, torch.zeros_like(cut)]).to(router.bias.dtype))

    for layer in model.model.layers:
        layer.router.weight.normal_(0, 0.02)
    handles = [layer.router.register_forward_pre_hook(shift) for layer in model.model.layers]
    with autocast(ids.device):
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    with autocast(ids.device):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def measure_training(name: str, model, shape: tuple[int, int], device, repeats: int) -> dict:
    model.train()
    ids = torch.randint(0, 256, shape, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = median_ms(lambda: train_step(model, ids), device, repeats)

    def forward():
        with torch.no_grad(), autocast(device):
            model(input_ids=ids, labels=ids, use_cache=False)

    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    ahead = median_ms(forward, device, repeats)
    tokens = shape[0] * shape[1]
    return {
        "part": "train", "model": name, "batch": shape[0], "length": shape[1], "step_ms": step, "forward_ms": ahead,
        "tokens_per_s": tokens / step * 1e3, "peak_gib": peak,
    }  # fmt: skip


@torch.no_grad()
def measure_decode(model: SeqBoatForCausalLM, batch: int, context: int, device, repeats: int, static: bool) -> dict:
    model.eval()
    cache = SeqBoatCache(model.config, static=static)
    with autocast(device):
        for start in range(0, context, 8192):
            width = min(8192, context - start)
            model(torch.randint(0, 256, (batch, width), device=device), past_key_values=cache, logits_to_keep=1)
    token = torch.randint(0, 256, (batch, 1), device=device)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if static else model.forward

    def run():
        with autocast(device):
            for _ in range(16):
                forward(token, past_key_values=cache)

    per_token = median_ms(run, device, repeats) / 16
    return {
        "part": "decode", "model": f"seqboat {'static, compiled' if static else 'eager'}", "batch": batch,
        "length": context, "step_ms": per_token, "tokens_per_s": batch / per_token * 1e3,
    }  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{card}; torch {torch.__version__}; transformers {transformers.__version__}", flush=True)
    parts = arguments.parts.split(",")
    shape = (4, 8192) if device.type == "cuda" else (2, 2048)
    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)

    if "train" in parts:
        keep(measure_training("llama sdpa", llama(device), shape, device, arguments.repeats))
        for backend in arguments.backends.split(","):
            if backend == "triton" and device.type == "cpu":
                continue
            model = seqboat(device, backend)
            set_activation_rate(model, torch.randint(0, 256, shape, device=device), 0.5)
            keep(measure_training(f"seqboat {backend}, 50 % active", model, shape, device, arguments.repeats))
    if "rates" in parts:
        for rate in (0.1, 1.0):
            model = seqboat(device)
            set_activation_rate(model, torch.randint(0, 256, shape, device=device), rate)
            keep(measure_training(f"seqboat auto, {rate:.0%} active", model, shape, device, arguments.repeats))
    if "prefill" in parts and device.type == "cuda":
        for length in (32768, 131072):
            model = seqboat(device)
            set_activation_rate(model, torch.randint(0, 256, (1, 8192), device=device), 0.5)
            keep(measure_training("seqboat auto, 50 % active", model, (1, length), device, 3))
    if "decode" in parts:
        model = seqboat(device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        set_activation_rate(model, torch.randint(0, 256, (1, 2048), device=device), 0.5)
        for batch, context, static in ((1, 1024, False), (1, 32768, False), (1, 32768, True), (64, 2048, True)):
            if device.type == "cpu" and (static or batch > 1):
                continue
            keep(measure_decode(model, batch, context, device, arguments.repeats, static))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        names = sorted({key for row in rows for key in row}, key=str)
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
