"""Where one training step of SeqBoat spends its time on a GPU, kernel by kernel.

python benchmarks/profile_training.py [--rate 0.5] [--batch 4] [--length 8192]
"""

import argparse

import torch
from competitors import seqboat, set_activation_rate
from measuring import autocast, median_ms, times_by_kernel, train_step

from modeling_seqboat.graphed_step_seqboat import GraphedStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=40)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    model = seqboat(device)
    ids = torch.randint(0, 256, (arguments.batch, arguments.length), device=device)
    set_activation_rate(model, ids, arguments.rate)
    model.train()
    torch.cuda.reset_peak_memory_stats()
    print(f"step {median_ms(lambda: train_step(model, ids), device, 7):.1f} ms")
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    layers = model.model.layers
    for capacity in (None, int(1.2 * arguments.rate * ids.numel()), ids.numel()):
        for layer in layers:
            layer.stream_capacity = capacity
        name = "waiting for the count" if capacity is None else f"padded to {capacity} tokens"
        print(f"launched one by one, {name}: step {median_ms(lambda: train_step(model, ids), device, 7):.1f} ms")
    for layer in layers:
        layer.stream_capacity = None
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    graphed = GraphedStep(model)

    def replay():
        model.zero_grad(set_to_none=True)
        with autocast(device):
            graphed(input_ids=ids, labels=ids)

    print(f"as one CUDA graph: step {median_ms(replay, device, 7):.1f} ms")
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    model.zero_grad(set_to_none=True)
    kernels = times_by_kernel(lambda: train_step(model, ids), device)
    total = sum(map(sum, kernels.values())) / 1e3
    print(f"kernels: {sum(map(len, kernels.values()))} launches, {total:.1f} ms on the device")
    for name, times in [*kernels.items()][: arguments.rows]:
        print(f"{sum(times) / 1e3:8.2f} ms {len(times):5d} x  {name}")


if __name__ == "__main__":
    main()
