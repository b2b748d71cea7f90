"""Times the EMA scan against a float32 FFT convolution with the same kernel, on the CPU.

    python benchmarks/bench_scan_cpu.py [--length 8192] [--width 256] [--states 16] [--repeats 15] [--threads N]

The two alternate within every repeat, so that a change of the machine's load meets both; medians are printed, and the
largest difference between their outputs and gradients first.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

# Threads that wait for work would spin and slow other programs down, this benchmark's next measurement included.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from modeling_seqboat.ops_ema_seqboat import ema_parameters, ema_scan

Op = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def scan(x: Tensor, decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor) -> Tensor:
    """(B, L, D) by `ema_scan`, without the final state."""
    return ema_scan(x, decay, input_gain, output_gain, skip, need_state=False)[0]


def fft_convolution(x: Tensor, decay: Tensor, input_gain: Tensor, output_gain: Tensor, skip: Tensor) -> Tensor:
    """(B, L, D): the kernel k[l] = sum_n o_n*g_n*q_n^l of all L taps, applied by a padded real FFT."""
    length = x.shape[1]
    steps = torch.arange(length, dtype=torch.float32)
    powers = torch.exp(decay.log()[:, :, None] * steps)
    kernel = torch.einsum("dn,dnl->dl", output_gain * input_gain, powers)
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)
    return y + skip * x


def forward(op: Op, inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return op(*inputs)


def forward_and_backward(op: Op, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(op(*inputs).sum(), inputs)


def largest_difference(first: Tensor, second: Tensor) -> float:
    """Of two tensors, relative to the largest entry."""
    return ((first - second).abs().max() / second.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 8192), ("width", 256), ("states", 16), ("repeats", 15), ("threads", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = (arguments.width, arguments.states)
    delta, alpha, beta = (0.2 * torch.randn(*shape, 1) for _ in range(3))
    parameters = ema_parameters(delta, alpha, beta + 1, torch.randn(shape))
    tensors = [torch.randn(1, arguments.length, arguments.width), *parameters, torch.randn(arguments.width)]
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]

    print(f"L {arguments.length}, D {arguments.width}, N {arguments.states}, batch 1, float32")
    print(f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}")
    # Both ops are the same function: without this the times would compare nothing.
    print(f"outputs differ by {largest_difference(forward(scan, inputs), forward(fft_convolution, inputs)):.1e}")
    pairs = zip(forward_and_backward(scan, inputs), forward_and_backward(fft_convolution, inputs), strict=True)
    print(f"gradients differ by {max(largest_difference(*pair) for pair in pairs):.1e}")
    for name, measure in (("forward", forward), ("forward and backward", forward_and_backward)):
        times: dict[Op, list[float]] = {scan: [], fft_convolution: []}
        for _ in range(arguments.repeats):
            for op, taken in times.items():
                start = time.perf_counter()
                measure(op, inputs)
                taken.append(1000 * (time.perf_counter() - start))
        ours, theirs = (statistics.median(taken) for taken in times.values())
        print(f"{name}: scan {ours:.0f} ms, FFT convolution {theirs:.0f} ms ({theirs / ours:.1f} times)")


if __name__ == "__main__":
    main()
