"""One training step of one long row whose columns are shared by all processes, beside one GPU that has them all.

    torchrun --nproc_per_node 2 benchmarks/bench_context_parallel.py --output outputs/context_parallel

At the enwik8 shape (39.1 M parameters) under bfloat16 autocast: forward with gradient checkpointing, backward,
gradients averaged by DDP, and AdamW with a rate of 0, so that each step is the same work. Tokens are random; router
biases are set so that the stated share of tokens is activated in every layer. The loss is computed from 16,384
columns at a time. Without a GPU, or with --toy, at a small shape in float32 over gloo.

For each length first one process reads the row alone, until it runs out of memory, then all of them its parts. Times
are medians with the devices synchronised, after one step that is not counted. Peak memory is what torch has allocated
on the process that has most. Rows are written as they are measured; a length for which the processes together run out
of memory is the last one. --minutes ends the run before the next length.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from competitors import seqboat, set_activation_rate
from measuring import autocast, head_of_results, release_memory, synchronise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modeling_seqboat.parallel_seqboat import context_parallel, sequence_part

GPU_LENGTHS = (131_072, 262_144, 524_288, 1_048_576, 2_097_152)
TOY_LENGTHS = (64, 128)
LOSS_COLUMNS = 16_384
OUT_OF_MEMORY = "out of memory"


class Measured(NamedTuple):
    """A row of the table; seconds None where the status is not ok, GiB None on a CPU."""

    length: int
    processes: int
    status: str
    seconds: float | None = None
    gib: float | None = None


class Step(nn.Module):
    """The model and its loss without the logits of all columns at once: the mean over this process's targets,
    weighted so that the mean over the processes of a group is that over the row."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, weight: float) -> Tensor:
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        total = hidden.new_zeros((), dtype=torch.float32)
        for part, wanted in zip(hidden.split(LOSS_COLUMNS, 1), targets.split(LOSS_COLUMNS, 1), strict=True):
            total = total + checkpoint(self._loss, part, wanted, use_reentrant=False)
        return total * weight

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and results.md")
    parser.add_argument("--lengths", help="comma-separated; by default 131072 to 2097152")
    parser.add_argument("--rate", type=float, default=0.3, help="share of activated tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed (%(default)s)")
    parser.add_argument("--minutes", type=float, default=3.5, help="begin no length later than this (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU, to try the benchmark itself")
    arguments = parser.parse_args(argv)
    try:
        arguments.lengths = [int(part) for part in (arguments.lengths or "").split(",") if part]
    except ValueError:
        parser.error(f"--lengths must be integers with commas between, got {arguments.lengths!r}")
    if any(length < 2 for length in arguments.lengths):
        parser.error(f"--lengths must be at least 2, got {min(arguments.lengths)}")
    if not 0 <= arguments.rate <= 1 or arguments.repeats < 1 or arguments.minutes <= 0:
        parser.error("--rate must be from 0 to 1, --repeats at least 1 and --minutes above 0")
    return arguments


class Report:
    """The results of the first process; a thread of every process ends it where another one ran out of memory in the
    middle of a step, as those that wait for it would never know."""

    def __init__(self, folder: Path, head: dict, store: dist.Store):
        self.folder, self.head, self.store = folder, head, store
        self.rows: list[Measured] = []
        self.length = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def add(self, row: Measured) -> None:
        self.rows.append(row)
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            results = {**self.head, "rows": [row._asdict() for row in self.rows]}
            (self.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            (self.folder / "results.md").write_text(table(self.head, self.rows), "utf-8")

    def give_up(self) -> None:
        """Ends all processes: the parts of this length do not fit."""
        self.store.set("given up", str(self.length))
        time.sleep(3600)

    def _watch(self) -> None:
        while not self.store.check(["given up"]):
            time.sleep(0.5)
        self.add(Measured(self.length, dist.get_world_size(), OUT_OF_MEMORY))
        if dist.get_rank() == 0:
            print(table(self.head, self.rows), flush=True)
        time.sleep(2)
        os._exit(0)


def table(head: dict, rows: list[Measured]) -> str:
    """The results in Markdown; speed-up against one process that had the row alone."""
    alone = {row.length: row.seconds for row in rows if row.processes == 1}
    lines = [
        f"{head['command']}", "",
        f"{head['date']}, {head['card']}, torch {head['torch']}, {head['parameters']:,} parameters, "
        f"{head['rate']:.0%} of the tokens activated.", "",
        "| tokens of the row | processes | ms a step | tokens/s | against one | peak GiB a process |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        cells = [f"{row.length:,}", str(row.processes)]
        if row.seconds is None:
            cells += [row.status, "", "", ""]
        else:
            single = alone.get(row.length)
            cells += [f"{row.seconds * 1e3:,.1f}", f"{row.length / row.seconds:,.0f}"]
            cells += ["" if not single or row.processes == 1 else f"{single / row.seconds:.2f} x"]
            cells += ["" if row.gib is None else f"{row.gib:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def timed(run, device: torch.device, repeats: int, group: dist.ProcessGroup | None) -> tuple[float, float | None]:
    """Median seconds and peak GiB of the slowest and largest process."""
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for turn in range(repeats + 1):
        synchronise(device)
        if group is not None:
            dist.barrier(group)
        start = time.perf_counter()
        run()
        synchronise(device)
        times += [time.perf_counter() - start] if turn else []
    seconds = sorted(times)[len(times) // 2]
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    found = torch.tensor([seconds, gib], device=device)
    if group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    seconds, gib = found.tolist()
    return seconds, gib if device.type == "cuda" else None


def measure(step: nn.Module, optimizer, ids: Tensor, arguments, group: dist.ProcessGroup | None):
    """One length: by one process without a group, else by all processes of it."""
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    batch = {"input_ids": ids, "labels": targets}
    size = 1 if group is None else group.size()
    if group is not None:
        batch = sequence_part(batch, group)

    def run():
        with autocast(ids.device):
            if group is None:
                loss = step(*batch.values(), 1 / (ids.shape[1] - 1))
            else:
                with context_parallel(step, group):
                    loss = step(*batch.values(), size / (ids.shape[1] - 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(run, ids.device, arguments.repeats, group)


def connect(on_gpu: bool) -> tuple[torch.device, dist.Store]:
    """This process's device, and what all processes read notes from."""
    store, rank, world = next(dist.rendezvous("env://"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend, bound = ("nccl", device) if on_gpu else ("gloo", None)
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, device_id=bound
    )
    return device, dist.PrefixStore("benchmark", store)


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    on_gpu = torch.cuda.is_available() and not arguments.toy
    device, store = connect(on_gpu)
    group, size = dist.group.WORLD, dist.get_world_size()
    lengths = arguments.lengths or (GPU_LENGTHS if on_gpu else TOY_LENGTHS)
    model = seqboat(device, size="enwik8" if on_gpu else "toy").train()
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (1, max(lengths))).to(device)
    with torch.no_grad():
        set_activation_rate(model, ids[:, :8192], arguments.rate)
        for parameter in model.parameters():
            dist.broadcast(parameter, 0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = Step(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=on_gpu)
    wrapped = DistributedDataParallel(step)
    head = head_of_results("bench_context_parallel.py", argv, arguments.output, size, device)
    head |= {"parameters": model.num_parameters(), "rate": arguments.rate}
    report, alone_fits = Report(arguments.output, head, store), True
    for length in lengths:
        late = torch.tensor([time.perf_counter() - started > 60 * arguments.minutes], dtype=torch.int64, device=device)
        dist.all_reduce(late, dist.ReduceOp.MAX)
        if int(late):
            break
        report.length = length
        if alone_fits:
            row = Measured(length, 1, OUT_OF_MEMORY)
            if dist.get_rank() == 0:
                try:
                    row = Measured(length, 1, "ok", *measure(step, optimizer, ids[:, :length], arguments, None))
                except torch.OutOfMemoryError:
                    optimizer.zero_grad(set_to_none=True)
            told = [row]
            dist.broadcast_object_list(told, 0)
            report.add(told[0])
            alone_fits = told[0].status == "ok"
        if size > 1:
            try:
                found = measure(wrapped, optimizer, ids[:, :length], arguments, group)
            except torch.OutOfMemoryError:
                report.give_up()
            report.add(Measured(length, size, "ok", *found))
    if dist.get_rank() == 0:
        print(table(head, report.rows), flush=True)
    dist.barrier()
    # It holds on to the process group, and were it the last to do so, PyTorch's gloo could deadlock.
    del wrapped
    release_memory(device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
