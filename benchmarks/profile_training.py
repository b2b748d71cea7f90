"""Where one training step of SeqBoat spends its time on a GPU, kernel by kernel.

python benchmarks/profile_training.py [--rate 0.5] [--batch 4] [--length 8192]
"""

import argparse

import torch
from bench_models import median_ms, seqboat, set_activation_rate, train_step


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
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        train_step(model, ids)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name[:90], []).append(event.device_time / 1e3)
    total = sum(sum(times) for times in kernels.values())
    print(f"kernels: {sum(map(len, kernels.values()))} launches, {total:.1f} ms on the device")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[: arguments.rows]:
        print(f"{sum(times):8.2f} ms {len(times):5d} x  {name}")


if __name__ == "__main__":
    main()
