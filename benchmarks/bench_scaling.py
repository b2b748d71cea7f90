"""Several GPUs: steps as CUDA graphs under data parallelism beside one GPU, and larger models sharded by FSDP2.

    torchrun --nproc_per_node 2 benchmarks/bench_scaling.py --output outputs/scaling

Part `data`: the enwik8 shape (39.1 M parameters), 4 × 8,192 tokens a process, half of them activated in every layer;
a `GraphedStep`, clipping and fused AdamW. First one process alone, then all of them under DistributedDataParallel.

Part `sharded`: the presets 0.4b and 1.3b beside a Llama of about the same size, `fully_shard` layer by layer with
bfloat16 parameters and float32 reduction, gradient checkpointing, clipping and fused AdamW; 32,768 tokens a process
(or the longest of --lengths) as rows of each of --lengths.

FLOPs are the model's own: three times those of a forward, what checkpointing computes again left out. For SeqBoat
`modeling_seqboat.flops_seqboat` counts the activated tokens and the pairs that they see alone; for Llama it is 2 a
weight of its linears and token, and 4 D a layer and pair of a token with one before it. The output layer counts in
both. Utilisation is against --peak, dense bfloat16 of the card. Optimizer steps have a rate of 0, so that each is the
same work. Times are medians with all processes synchronised, after steps that are not counted; memory is what torch
has allocated on the process that has most. Rows are written as they are measured. Without a GPU, or with --toy, at
tiny shapes over gloo, without graphs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from competitors import SIZES, seqboat, set_activation_rate
from measuring import autocast, head_of_results, release_memory, synchronise
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.flops_seqboat import layer_flops
from modeling_seqboat.graphed_step_seqboat import GraphedStep, GraphedUpdate

PARTS = ("data", "sharded")
VOCAB = 32_768
LLAMAS = {
    "0.4b": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 2816, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 23, "intermediate_size": 5632, "num_attention_heads": 16},
    "toy": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2},
}
MODELS = ("seqboat-0.4b", "llama-0.4b", "seqboat-1.3b", "llama-1.3b")
TOY_MODELS = ("seqboat-toy", "llama-toy")
OUT_OF_MEMORY = "out of memory"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and results.md")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *TOY_MODELS), help="of part sharded; default: all")
    parser.add_argument("--lengths", nargs="+", type=int, help="of part sharded; by default 8192 32768")
    parser.add_argument("--rate", type=float, default=0.5, help="share of activated tokens (%(default)s)")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a card (%(default)s: H100 SXM)")
    parser.add_argument("--repeats", type=int, default=8, help="steps that are timed (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to try the benchmark itself")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.rate <= 1 or arguments.repeats < 1 or arguments.peak <= 0:
        parser.error("--rate must be from 0 to 1, --repeats at least 1 and --peak above 0")
    if any(length < 2 for length in arguments.lengths or ()):
        parser.error(f"--lengths must be at least 2, got {min(arguments.lengths)}")
    return arguments


def build(name: str, device: torch.device) -> nn.Module:
    kind, size = name.split("-")
    torch.manual_seed(0)
    with device:
        if kind == "llama":
            config = LlamaConfig(
                vocab_size=VOCAB, max_position_embeddings=1 << 17, tie_word_embeddings=True, use_cache=False,
                **LLAMAS[size],
            )  # fmt: skip
            return LlamaForCausalLM(config)
        config = SeqBoatConfig(vocab_size=VOCAB, **SIZES["toy"].seqboat) if size == "toy" else None
        return SeqBoatForCausalLM(config or SeqBoatConfig.from_preset(size))


def step_flops(model: nn.Module, rows: int, length: int, rate: float) -> float:
    """Of one forward and backward; see the head of this file. The model is whole, not sharded yet."""
    tokens, config = rows * length, model.config
    output = 2 * tokens * config.hidden_size * config.vocab_size
    if isinstance(model, SeqBoatForCausalLM):
        each = round(rate * length)
        full = min(each, config.memory_size)
        pairs = full * (full + 1) // 2 + (each - full) * config.memory_size
        layer = layer_flops(config, tokens, rows * each, rows * pairs).total
        return 3 * (config.num_hidden_layers * layer + output)
    linears = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, nn.Linear))
    pairs = rows * length * (length + 1) // 2
    return 3 * (2 * tokens * linears + 4 * config.hidden_size * config.num_hidden_layers * pairs + output)


class Report:
    """What process 0 writes."""

    def __init__(self, folder: Path, head: dict):
        self.folder, self.head, self.rows = folder, head, []

    def add(self, row: dict) -> None:
        if dist.get_rank() > 0:
            return
        self.rows.append(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n"
        (self.folder / "results.json").write_text(text, "utf-8")
        (self.folder / "results.md").write_text(table(self.head, self.rows), "utf-8")
        print(json.dumps(row), flush=True)


def table(head: dict, rows: list[dict]) -> str:
    lines = [
        head["command"], "",
        f"{head['date']}, {head['card']}, torch {head['torch']}, {head['rate']:.0%} of the tokens activated, peak "
        f"{head['peak']:.0f} TFLOP/s.", "",
        "| part | model | parameters | processes | a process | ms a step | tokens/s | against one | TFLOP a step and "
        "process | utilisation | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        cells = [row["part"], row["model"], f"{row['parameters']:,}", str(row["processes"])]
        cells.append(f"{row['rows']} × {row['length']:,}")
        if row.get("seconds") is None:
            cells += [row["status"], *[""] * 5]
        else:
            cells += [f"{row['seconds'] * 1e3:,.1f}", f"{row['tokens_per_s']:,.0f}"]
            cells += [f"{row['against_one']:.2f} x" if "against_one" in row else ""]
            cells += [f"{row['flops'] / 1e12:,.2f}", f"{row['utilisation']:.1%}"]
            cells += ["" if row["gib"] is None else f"{row['gib']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def timed(run: Callable[[], object], device: torch.device, repeats: int, warmups: int, together: bool):
    """Median seconds and peak GiB; with `together` of the slowest and largest process."""
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for turn in range(warmups + repeats):
        synchronise(device)
        if together:
            dist.barrier()
        start = time.perf_counter()
        run()
        synchronise(device)
        times += [time.perf_counter() - start] if turn >= warmups else []
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    found = torch.tensor([sorted(times)[len(times) // 2], gib], dtype=torch.float64, device=device)
    if together:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    seconds, gib = found.tolist()
    return seconds, gib if device.type == "cuda" else None


def whole_row(part: str, model: str, processes: int, rows: int, length: int, flops: float, found, head: dict) -> dict:
    seconds, gib = found
    return {
        "part": part, "model": model, "processes": processes, "rows": rows, "length": length, "seconds": seconds,
        "tokens_per_s": processes * rows * length / seconds, "flops": flops,
        "utilisation": flops / seconds / (head["peak"] * 1e12), "gib": gib,
    }  # fmt: skip


def measure_data(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    """One process alone, then all of them."""
    rows, length = (4, 8192) if device.type == "cuda" else (2, 32)
    model = seqboat(device, size="enwik8" if device.type == "cuda" else "toy").train()
    ids = torch.randint(0, 256, (rows, length), device=device)
    set_activation_rate(model, ids, arguments.rate)
    with torch.no_grad():
        for parameter in model.parameters():
            dist.broadcast(parameter, 0)
    flops, parameters = step_flops(model, rows, length, arguments.rate), model.num_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=device.type == "cuda")
    single = None
    for processes in (1, dist.get_world_size()):
        wrapped = model if processes == 1 else DistributedDataParallel(model)
        graphed = update = None
        if device.type == "cuda":
            graphed, update = GraphedStep(wrapped), GraphedUpdate(optimizer, 1.0)

        def run(wrapped=wrapped, graphed=graphed, update=update):
            if graphed is not None:
                with autocast(device):
                    graphed(input_ids=ids, labels=ids)
                update()
            else:
                with autocast(device):
                    wrapped(input_ids=ids, labels=ids).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # The first graphed call runs as usual, the second captures, as the third does for the optimizer.
        found = (1.0, None)
        if processes > 1 or dist.get_rank() == 0:
            found = timed(run, device, arguments.repeats, 4, together=processes > 1)
        dist.barrier()
        row = whole_row("data", "seqboat-enwik8", processes, rows, length, flops, found, report.head)
        if single is not None:
            row["against_one"] = row["tokens_per_s"] / single
        single = row["tokens_per_s"]
        report.add({**row, "parameters": parameters, "status": "ok"})
        if processes == dist.get_world_size() == 1:
            break


def shard(model: nn.Module) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def measure_sharded(report: Report, arguments: argparse.Namespace, device: torch.device, name: str) -> None:
    on_gpu = device.type == "cuda"
    model = build(name, device).train()
    parameters, processes = model.num_parameters(), dist.get_world_size()
    lengths = arguments.lengths or ((8192, 32_768) if on_gpu else (16, 64))
    tokens = max(32_768 if on_gpu else 64, *lengths)
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(0, 256, (1, tokens), device=device)
    if isinstance(model, SeqBoatForCausalLM):
        set_activation_rate(model, ids[:, :8192], arguments.rate)
    flops = {length: step_flops(model, tokens // length, length, arguments.rate) for length in lengths}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=on_gpu)

    def run(batch: Tensor):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for length in lengths:
        rows = tokens // length
        batch = ids[:, : rows * length].reshape(rows, length)
        row = {"part": "sharded", "model": name, "processes": processes, "rows": rows, "length": length}
        try:
            found = timed(lambda batch=batch: run(batch), device, arguments.repeats, 2, together=True)
            row = whole_row("sharded", name, processes, rows, length, flops[length], found, report.head)
            status = "ok"
        except torch.OutOfMemoryError:
            # The processes have batches of one shape, so that all of them run out of memory.
            optimizer.zero_grad(set_to_none=True)
            status = OUT_OF_MEMORY
        report.add({**row, "parameters": parameters, "status": status})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    on_gpu = torch.cuda.is_available() and not arguments.toy
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    head = head_of_results("bench_scaling.py", argv, arguments.output, dist.get_world_size(), device)
    head |= {"rate": arguments.rate, "peak": arguments.peak}
    report = Report(arguments.output, head)
    if "data" in arguments.parts:
        measure_data(report, arguments, device)
    if "sharded" in arguments.parts:
        for name in arguments.models or (MODELS if on_gpu else TOY_MODELS):
            release_memory(device)
            measure_sharded(report, arguments, device, name)
    if dist.get_rank() == 0:
        print(table(head, report.rows), flush=True)
    dist.barrier()
    # Wrapped models that lie in cycles hold on to the process group, and were they the last to do so, PyTorch's gloo
    # could deadlock.
    release_memory(device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
