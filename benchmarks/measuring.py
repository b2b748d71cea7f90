"""Time and memory of a piece of work: medians, peaks, and CUDA graphs around what would wait for the host."""

import gc
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from modeling_seqboat.graphed_step_seqboat import stream_capacity


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def head_of_results(script: str, argv: list[str], output: Path, processes: int, device: torch.device) -> dict:
    """What stands above the results of a benchmark under torchrun: when, where, and by which command."""
    arguments = shlex.join(part.replace(str(output), "FOLDER") for part in argv)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "command": f"torchrun --nproc_per_node {processes} benchmarks/{script} {arguments}",
    }


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def median_ms(run: Callable[[], object], device: torch.device, repeats: int, warmups: int = 2) -> float:
    """Median time of `run` in milliseconds, host and device, after `warmups` runs that are not counted."""
    for _ in range(warmups):
        run()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def times_by_kernel(run: Callable[[], object], device: torch.device) -> dict[str, list[float]]:
    """Microseconds of each launch by kernel, those that take most first; without a GPU by operation of PyTorch."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
        run()
        synchronise(device)
    times: dict[str, list[float]] = {}
    for event in found.events():
        if not on_gpu:
            times.setdefault(event.name[:90], []).append(event.self_cpu_time_total)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name[:90], []).append(event.device_time)
    return dict(sorted(times.items(), key=lambda item: -sum(item[1])))


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_gib(run: Callable[[], object], device: torch.device) -> float | None:
    """Most memory allocated while `run` runs, in GiB, what was there before included; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    synchronise(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated() / 2**30


def train_step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward of next-token prediction on ids (B, L), without an optimiser."""
    model.zero_grad(set_to_none=True)
    with autocast(ids.device):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph: returns what replays it. `run` must not wait for the device, and enters autocast
    itself."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def fixed_streams(model: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """Gives every SeqBoat layer a capacity with headroom over what it activates in `run`, so that `run` can be
    captured."""
    layers = [module for module in model.modules() if hasattr(module, "stream_capacity")]
    for layer in layers:
        layer.counts_stream = True
    run()
    counts = torch.cat([layer.stream_count for layer in layers]).tolist()
    try:
        for layer, count in zip(layers, counts, strict=True):
            layer.stream_capacity = stream_capacity(count)
        yield
    finally:
        for layer in layers:
            layer.stream_capacity = layer.stream_count = None
            layer.counts_stream = False
