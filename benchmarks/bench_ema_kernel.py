"""Times the EMA scan and decode kernels alone, on one GPU: `python benchmarks/bench_ema_kernel.py [--only PART]`.

Times are medians of CUDA graph replays, the L2 cache flushed in between; GB/s counts x, y and their gradients once.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from modeling_seqboat import triton_decode_seqboat as decode  # noqa: E402
from modeling_seqboat import triton_ema_seqboat as ema  # noqa: E402

D, N, Z, V, W = 616, 16, 128, 1232, 1024
# BLOCK_D, warps, tokens loaded at a time
EMA_SWEEP = ((64, 2, 4), (64, 2, 8), (64, 2, 16), (32, 1, 8))
_flush = None


def graph_time(function, repeats=20, inner=1):
    """Median microseconds of one call."""
    global _flush
    if _flush is None:
        _flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            function()
    times = []
    for _ in range(repeats):
        _flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / inner)
    return statistics.median(times)


def ema_inputs(batch, length, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    p = torch.sigmoid(0.2 * randn(D, N))
    decay = 1 - p * torch.sigmoid(0.2 * randn(D, N)) * torch.logspace(-4, 0, D, device="cuda")[:, None]
    x = randn(batch, length, D).to(dtype)
    return x, decay, p * randn(D, N), randn(D, N) / N**0.5, randn(D)


def reference(x, decay, input_gain, output_gain, skip, grad):
    """Outputs, final state and gradients in float64 by a chunked product form, independent of the kernels."""
    leaves = [t.double().requires_grad_() for t in (x, decay, input_gain, output_gain, skip)]
    x, decay, input_gain, output_gain, skip = leaves
    size = 64
    batch, length, _ = x.shape
    steps = torch.arange(size, device="cuda", dtype=torch.float64)
    lag = steps[:, None] - steps[None, :]
    powers = torch.where(lag >= 0, decay[..., None, None] ** lag.clamp_min(0), 0)
    matrix = torch.einsum("dn,dnij->dij", input_gain * output_gain, powers)
    state = x.new_zeros(batch, D, N)
    ys = []
    for start in range(0, length, size):
        part = x[:, start : start + size]
        y = torch.einsum("dij,bjd->bid", matrix, part) + skip * part
        ys.append(y + torch.einsum("dn,dni,bdn->bid", output_gain, decay[..., None] ** (steps + 1), state))
        taps = decay[..., None] ** steps.flip(0)
        state = decay**size * state + torch.einsum("dn,dnj,bjd->bdn", input_gain, taps, part)
    y = torch.nn.functional.silu(torch.cat(ys, 1))
    y.backward(grad.double())
    return [y.detach(), state.detach()] + [t.grad for t in leaves]


def check(length=8192, dtype=torch.bfloat16):
    inputs = ema_inputs(1, length, dtype)
    grad = torch.randn_like(inputs[0])
    expected = reference(*inputs, grad)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, state = ema.ema_scan_triton(*leaves, activation="silu")
    y.backward(grad)
    found = [y, state] + [t.grad for t in leaves]
    names = ("y", "state", "x", "decay", "input_gain", "output_gain", "skip")
    pairs = zip(names, found, expected, strict=True)
    errors = {name: f"{float((a.detach().double() - b).norm() / b.norm()):.1e}" for name, a, b in pairs}
    print(f"error against float64, L {length}, {dtype}: {errors}", flush=True)


def time_ema(batch, length, label="", backward=True, **options):
    inputs = ema_inputs(batch, length)
    with torch.no_grad():
        forward = graph_time(lambda: ema.ema_scan_triton(*inputs, activation="silu", **options))
        plain = graph_time(lambda: ema.ema_scan_triton(*inputs, **options))
    size = inputs[0].numel() * 2
    text = (
        f"{label:24s} B{batch} L{length}: forward with silu {forward:7.1f} us ({2 * size / forward / 1e3:5.0f} GB/s)"
    )
    text += f" plain {plain:7.1f}"
    if backward:
        leaves = [t.clone().requires_grad_() for t in inputs]
        grad = torch.randn_like(inputs[0])

        def step():
            y, _ = ema.ema_scan_triton(*leaves, activation="silu", **options)
            torch.autograd.grad(y, leaves, grad)

        both = graph_time(step)
        text += f" training fwd+bwd {both:7.1f} us ({7 * size / both / 1e3:5.0f} GB/s)"
    print(text, flush=True)


def profile(batch, length, **options):
    leaves = [t.requires_grad_() for t in ema_inputs(batch, length)]
    grad = torch.randn_like(leaves[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            y, _ = ema.ema_scan_triton(*leaves, activation="silu", **options)
            torch.autograd.grad(y, leaves, grad)
        torch.cuda.synchronize()
    rows = [(e.key, e.device_time_total / 5, e.count // 5) for e in profiler.key_averages()]
    print("   " + ", ".join(f"{k[:24]} {t:.1f}" for k, t, _ in sorted(rows, key=lambda r: -r[1])[:9]), flush=True)


def decode_inputs(batch, share):
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    layers = 14 if batch <= 16 else 4
    count = torch.full((batch,), 5000, device="cuda")
    active = torch.rand(batch, generator=generator, device="cuda") < share
    caches = [
        (randn(batch, W, Z), randn(batch, W, V), torch.arange(W, device="cuda").expand(batch, W).contiguous())
        for _ in range(layers)
    ]
    return (randn(batch, Z), randn(batch, Z), randn(batch, V)), caches, (count, active, count.clone())


def time_decode(batch, share=1.0, activation="softmax", label=""):
    new, caches, rows = decode_inputs(batch, share)

    def step():
        for cache in caches:
            decode.memory_step_triton(*new, *cache, *rows, activation=activation, scale=Z**-0.5)

    with torch.no_grad():
        time = graph_time(step) / len(caches)
    size = int(rows[1].sum()) * W * (Z + V) * 2
    text = f"{label:24s} attention B{batch} active {share}: {time:6.2f} us a layer ({size / time / 1e3:5.0f} GB/s)"
    print(text, flush=True)


def time_step(batch):
    x, decay, input_gain, output_gain, skip = ema_inputs(batch, 1)
    states = [torch.randn(batch, D, N, device="cuda") for _ in range(14)]

    def step():
        for state in states:
            decode.ema_step_triton(x, decay, input_gain, output_gain, skip, state, activation="silu")

    with torch.no_grad():
        print(f"ema_step B{batch}: {graph_time(step) / 14:.2f} us a layer", flush=True)


def check_compiled_attention():
    new, caches, rows = decode_inputs(2, 1.0)
    kwargs = {"activation": "softmax", "scale": Z**-0.5}
    with torch.no_grad():
        # The memory, and the count of its tokens: both are written.
        clones = [[t.clone() for t in (*caches[0], rows[0])] for _ in range(2)]
        eager = decode.memory_step_triton(*new, *clones[0], *rows[1:], **kwargs)
        compiled = torch.compile(decode.memory_step_compiled, fullgraph=True)(*new, *clones[1], *rows[1:], **kwargs)
        return torch.equal(eager, compiled) and all(torch.equal(a, b) for a, b in zip(*clones, strict=True))


def time_host():
    """Microseconds of host time a call, launches included, while the GPU is far behind or idle."""
    inputs = ema_inputs(1, 256)
    leaves = [t.clone().requires_grad_() for t in inputs]
    grad = torch.randn_like(inputs[0])
    new, caches, rows = decode_inputs(1, 1.0)

    def train():
        torch.autograd.grad(ema.ema_scan_triton(*leaves, activation="silu")[0], leaves, grad)

    calls = {"scan": lambda: ema.ema_scan_triton(*inputs, activation="silu"), "scan fwd+bwd": train}
    options = {"activation": "softmax", "scale": 1.0}
    calls["attention step"] = lambda: decode.memory_step_triton(*new, *caches[0], *rows, **options)
    calls["ema step"] = lambda: decode.ema_step_triton(inputs[0][:, :1], *inputs[1:], state, activation="silu")
    state = torch.zeros(1, D, N, device="cuda")
    for name, call in calls.items():
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            call()
        print(f"host time, {name}: {(time.perf_counter() - start) / 50 * 1e6:.0f} us", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=["times", "compile", "decode", *map(str, range(len(EMA_SWEEP)))], default=None
    )
    only = parser.parse_args().only
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if only == "compile":
        print("the compiled attention step is the eager one:", check_compiled_attention(), flush=True)
    if only in (None, "times"):
        times()
    if only in (None, "decode"):
        sweep_decode()
    for index, setting in enumerate(EMA_SWEEP):
        if only in (None, str(index)):
            sweep_ema(*setting)


def times():
    check()
    check(dtype=torch.float32)
    time_ema(4, 8192)
    profile(4, 8192)
    for batch, length in ((1, 8192), (1, 32768), (1, 131072)):
        time_ema(batch, length)
    time_ema(1, 1 << 20, backward=False)
    real = torch.ones(4, 8192, dtype=torch.bool, device="cuda")
    real[:, :100] = False
    time_ema(4, 8192, "padded", real=real)
    time_ema(4, 8192, "packed", reset=torch.rand(4, 8192, device="cuda") < 1e-3)
    for batch in (1, 4, 16, 64):
        time_decode(batch)
    time_decode(64, 0.5)
    time_decode(1, activation="relu2")
    for batch in (1, 64):
        time_step(batch)
    time_host()


def sweep_decode():
    table = decode._SPLITS
    few = ((16, 256, 8, 4), (32, 256, 8, 4), (32, 128, 16, 4), (32, 128, 16, 2), (64, 256, 8, 8))
    many = ((32, 1024, 2, 4), (64, 256, 1, 4), (64, 128, 5, 2), (32, 256, 5, 2), (32, 1024, 1, 4), (64, 256, 1, 8))
    for batch, entries in ((1, few), (16, few[1:3] + many), (64, many)):
        for entry in entries:
            decode._SPLITS = ((1 << 31, *entry),)
            time_decode(batch, label=str(entry))
    decode._SPLITS = table


def sweep_ema(block, warps, unroll):
    ema._BLOCK_D, ema._WARPS = block, {"num_warps": warps}
    ema._UNROLL = dict.fromkeys(ema._UNROLL, (unroll, unroll))
    for batch, chunk in ((4, 128), (4, 256), (1, 64), (1, 128)):
        ema._CHUNKS = ((1 << 30, chunk),)
        print(f"B {batch} BLOCK_D {block} warps {warps} unroll {unroll} chunk {chunk}")
        profile(batch, 8192)


if __name__ == "__main__":
    main()
