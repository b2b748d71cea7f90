"""Checks the attention and fused kernels against float64 on a GPU, then times them.

python benchmarks/bench_attention_kernel.py [check] [blocks] [time]
"""

import statistics
import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from modeling_seqboat import triton_attention_seqboat as attention
from modeling_seqboat import triton_rows_seqboat as rows
from modeling_seqboat import triton_unit_seqboat as unit_kernels
from modeling_seqboat.ops_layout_seqboat import Packed
from modeling_seqboat.triton_launch_seqboat import Kernel

GPU = "cuda"


def ranges(counts, window, memory=0, ahead=0):
    """key_start, key_end and key count of rows of `counts` new tokens, each row led by `memory` keys."""
    starts, ends, first = [], [], 0
    for count in counts:
        for i in range(first + memory, first + memory + count):
            starts.append(max(first, i - window))
            ends.append(min(first + memory + count, i + ahead + 1))
        first += count + memory
    return torch.tensor(starts, device=GPU), torch.tensor(ends, device=GPU), first


def reference(q, k, v, start, end, activation, scale, table, center, q_place, k_place, block=1024):
    pieces = []
    for a in range(0, q.shape[0], block):
        b = min(a + block, q.shape[0])
        lo, hi = int(start[a:b].min()), int(end[a:b].max())
        scores = (q[a:b] * scale) @ k[lo:hi].T
        if table is not None:
            scores = scores + table[(center + k_place[None, lo:hi] - q_place[a:b, None]).clamp(0, len(table) - 1)]
        keys = torch.arange(lo, hi, device=GPU)
        visible = (keys >= start[a:b, None]) & (keys < end[a:b, None])
        if activation == "softmax":
            weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible
        else:
            weights = scores.relu() ** 2 * visible
        pieces.append(weights @ v[lo:hi])
    return torch.cat(pieces)


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def check_attention(dtype, activation, counts, window, z, width, memory=0, ahead=0, with_table=False):
    torch.manual_seed(0)
    start, end, mk = ranges(counts, window, memory, ahead)
    m = len(start)
    scale = z**-0.5 if activation == "softmax" else 1 / window
    tensors = [torch.randn(n, c, device=GPU).to(dtype) for n, c in ((m, z), (mk, z), (mk, width))]
    table = torch.randn(2 * window - 1, device=GPU) * 0.1 if with_table else None
    q_place, k_place = torch.arange(m, device=GPU) * 2, torch.arange(mk, device=GPU) * 2
    wide = [t.double().requires_grad_() for t in tensors] + ([table.double().requires_grad_()] if with_table else [])
    narrow = [t.requires_grad_() for t in tensors] + ([table.requires_grad_()] if with_table else [])
    out = reference(
        *wide[:3], start, end, activation, scale, wide[3] if with_table else None, window, q_place, k_place
    )
    grad = torch.randn(out.shape, device=GPU).to(dtype)
    expected = (out, *torch.autograd.grad(out, wide, grad.double()))

    def run():
        found = attention.windowed_attention_triton(
            *narrow[:3], start, end, activation=activation, scale=scale, bias_table=narrow[3] if with_table else None,
            bias_center=window, q_place=q_place, k_place=k_place, max_keys=window + 1 + ahead,
        )  # fmt: skip
        return (found, *torch.autograd.grad(found, narrow, grad))

    first, second = run(), run()
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    errors = " ".join(f"{error(a, b):.1e}" for a, b in zip(first, expected, strict=True))
    print(
        f"{str(dtype)[6:]:9s} {activation:8s} m {m} mk {mk} w {window} z {z} v {width}: {errors} repeatable {same}",
        flush=True,
    )


def check_unit(dtype, activation, counts, window, z, width):
    torch.manual_seed(1)
    start, end, m = ranges(counts, window)
    projected = torch.randn(m, z + 2 * width, device=GPU).to(dtype)
    scale, offset = torch.randn(2, z, device=GPU), torch.randn(2, z, device=GPU)
    angles = torch.rand(m, z // 2, device=GPU) * 6
    wide = [t.double().requires_grad_() for t in (projected, scale, offset)]
    narrow = [t.requires_grad_() for t in (projected, scale, offset)]
    hidden, gate, v = F.silu(wide[0]).split([z, width, width], -1)
    cos, sin = angles.cos().double(), angles.sin().double()

    def rotate(x):
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    q, k = (rotate(hidden * wide[1][i] + wide[2][i]) for i in range(2))
    factor = z**-0.5 if activation == "softmax" else 1 / window
    out = reference(q, k, v, start, end, activation, factor, None, 0, None, None) * gate
    grad = torch.randn(out.shape, device=GPU).to(dtype)
    expected = (out, *torch.autograd.grad(out, wide, grad.double()))
    found, _, _ = unit_kernels.gated_unit_triton(
        *narrow, start, end, attention=activation, attention_scale=factor, cos=angles.cos(), sin=angles.sin(),
        max_keys=window + 1,
    )  # fmt: skip
    found = (found, *torch.autograd.grad(found, narrow, grad))
    errors = " ".join(f"{error(a, b):.1e}" for a, b in zip(found, expected, strict=True))
    print(f"unit {str(dtype)[6:]:9s} {activation:8s} m {m} w {window} z {z} v {width}: {errors}", flush=True)


def check():
    mixed = (0, 1, 199, 200, 201, 537, 64, 300)
    check_attention(torch.bfloat16, "softmax", mixed, 200, 30, 120, memory=200, ahead=200, with_table=True)
    for activation in ("softmax", "relu2"):
        check_unit(torch.bfloat16, activation, mixed, 200, 128, 1232)
        check_attention(torch.bfloat16, activation, (4096,) * 4, 1024, 128, 1232)


def profile(function, repeats=20, rows=30):
    """Mean device time of each kernel in microseconds."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    events = [(e.key, e.device_time_total / repeats) for e in record.key_averages() if e.device_time_total > 0]
    return sorted(events, key=lambda e: -e[1])[:rows]


def timed(function, repeats=30):
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def attention_case(counts, window, activation, dtype=torch.bfloat16, z=128, width=1232):
    start, end, m = ranges(counts, window)
    scale = z**-0.5 if activation == "softmax" else 1 / window
    q, k, v = (torch.randn(m, c, device=GPU, dtype=dtype, requires_grad=True) for c in (z, z, width))
    grad = torch.randn_like(v)
    pairs = int((end - start).sum())

    def forward():
        return attention.windowed_attention_triton(
            q, k, v, start, end, activation=activation, scale=scale, max_keys=window + 1
        )

    def step():
        torch.autograd.grad(forward(), (q, k, v), grad)

    return forward, step, pairs * (z + width) * 2


def short(name):
    return name.replace("void ", "").replace("at::native::", "").split("<")[0].split("(")[0][:40]


def try_blocks():
    """Mean times of a unit's kernels under other launch options than the table's."""
    base = attention._BLOCKS_16BIT
    wide = {"num_warps": 8, "num_stages": 3}
    variants = {
        "table": {},
        "256 columns": {"values": 256, "options": base.options | {"values": wide, "input_grads": wide}},
        "weights 168": {"options": base.options | {"weights": {"num_warps": 4, "num_stages": 2, "maxnreg": 168}}},
    }
    table = {}
    for name, change in variants.items():
        attention._BLOCKS_16BIT = replace(base, **change)
        for key, value in profile(unit_case()):
            table.setdefault(short(key), {})[name] = value
    attention._BLOCKS_16BIT = base
    for key, found in table.items():
        print(f"{key:28s}", " ".join(f"{name} {value:7.1f}" for name, value in found.items()), flush=True)


def time_all():
    x, y = torch.empty(2, 2**30, dtype=torch.uint8, device=GPU)
    print(f"copy {2 * x.numel() / timed(lambda: y.copy_(x)) / 1e6:.2f} TB/s")
    cases = (
        ((4096,) * 4, 1024, "softmax"), ((4096,) * 4, 1024, "relu2"), ((8192,) * 8, 1024, "softmax"),
        ((819,) * 4, 1024, "softmax"), ((500,) * 32, 128, "softmax"),
    )  # fmt: skip
    for counts, window, activation in cases:
        forward, step, work = attention_case(counts, window, activation)
        one, both = timed(captured(forward)), timed(captured(step))
        print(
            f"attention {len(counts)}x{counts[0]} W {window} {activation:8s} forward {one:8.1f} us "
            f"({work / one / 1e6:.0f} TFLOP/s), with backward {both:8.1f} us ({3 * work / both / 1e6:.0f} TFLOP/s)",
            flush=True,
        )
    time_fused()


def captured(function):
    """The function as a CUDA graph: its time is the device's, and capture fails where something waits for the
    device."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def leaf(*shape, kind=torch.bfloat16):
    return torch.randn(*shape, device=GPU, dtype=kind, requires_grad=True)


def extract_cases(tokens=32768, m=16384, d=616, dtype=torch.bfloat16):
    index = torch.randperm(tokens, device=GPU)[:m].sort().values
    slot = torch.full((tokens,), -1, device=GPU)
    slot[index] = torch.arange(m, device=GPU)
    x = leaf(tokens, d)
    grad = torch.randn(m, d, device=GPU, dtype=dtype)
    hidden, residual, out = leaf(tokens, d), leaf(tokens, d), leaf(m, d)
    confidence = torch.rand(tokens, device=GPU) * (slot >= 0)
    confidence.requires_grad_()
    wide = torch.randn(tokens, d, device=GPU, dtype=dtype)

    def torch_extract():
        total = hidden.index_add(0, index, (out * confidence[index, None]).to(dtype))
        torch.autograd.grad(F.silu(total + residual), (hidden, residual, out, confidence), wide)

    def triton_extract():
        found = rows.extract_residual_triton(hidden, residual, out, confidence, Packed(index, slot))
        torch.autograd.grad(found, (hidden, residual, out, confidence), wide)

    return {
        "gather torch": lambda: torch.autograd.grad(x.index_select(0, index), x, grad),
        "gather triton": lambda: torch.autograd.grad(rows.gather_rows_triton(x, index, slot), x, grad),
        "extract torch": torch_extract,
        "extract triton": triton_extract,
    }


def unit_case(parts=False, tokens=32768, counts=(4096,) * 4, z=128, width=1232, window=1024):
    start, end, m = ranges(counts, window)
    index = torch.randperm(tokens, device=GPU)[:m].sort().values
    projected, scale, offset = leaf(m, z + 2 * width), leaf(2, z, kind=torch.float32), leaf(2, z, kind=torch.float32)
    cos, sin = torch.rand(tokens, z // 2, device=GPU), torch.rand(tokens, z // 2, device=GPU)
    grad = torch.randn(m, width, device=GPU, dtype=projected.dtype)

    def run():
        if parts:
            q, k, v, gate = unit_kernels.project_unit_triton(projected, scale, offset, cos, sin, index)
            found = attention.windowed_attention_triton(
                q, k, v, start, end, activation="softmax", scale=z**-0.5, gate=gate, max_keys=window + 1
            )
        else:
            found, _, _ = unit_kernels.gated_unit_triton(
                projected, scale, offset, start, end, attention="softmax", attention_scale=z**-0.5, cos=cos, sin=sin,
                table_rows=index, max_keys=window + 1,
            )  # fmt: skip
        torch.autograd.grad(found, (projected, scale, offset), grad)

    return run


def host_time(function, repeats=100):
    """Microseconds the host needs to queue a call, for a case whose device time is shorter."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    total = time.perf_counter() - begin
    torch.cuda.synchronize()
    return total / repeats * 1e6


def profile_host():
    """Where the host's time goes: launches one by one, and a unit with its backward in one thread."""
    plain = Kernel.__call__
    spent = {}

    def launch(self, *args, **kwargs):
        begin = time.perf_counter()
        plain(self, *args, **kwargs)
        spent.setdefault(self.function.fn.__name__, []).append(time.perf_counter() - begin)

    unit = unit_case(counts=(60,) * 4, window=32)
    x = torch.empty(8, device=GPU)
    with torch.autograd.set_multithreading_enabled(False):
        whole = host_time(unit)
        Kernel.__call__ = launch
        host_time(unit)
        Kernel.__call__ = plain
    medians = ", ".join(f"{name} {statistics.median(times) * 1e6:.0f}" for name, times in spent.items())
    empty, add = host_time(lambda: torch.empty(8, 8, device=GPU)), host_time(lambda: x.add_(1))
    print(f"host: unit {whole:.0f} us, torch.empty {empty:.1f} us, add_ {add:.1f} us; launches: {medians}", flush=True)


def time_fused():
    cases = extract_cases() | {"project + attention": unit_case(parts=True), "gated unit": unit_case()}
    for name, case in cases.items():
        found = profile(case)
        print(
            f"{name}: {timed(case):.1f} us by events, {timed(captured(case)):.1f} us as a graph, kernels "
            f"{sum(t for _, t in found):.1f} us",
            flush=True,
        )
        print("   ", ", ".join(f"{short(key)} {value:.1f}" for key, value in found), flush=True)
    profile_host()


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    wanted = sys.argv[1:] or ["check", "time"]
    if "check" in wanted:
        check()
    if "blocks" in wanted:
        try_blocks()
    if "time" in wanted:
        time_all()
