"""A decode step over states in pages, as the plug-in for vLLM runs it, against one over states in a row; on a GPU.

    python benchmarks/bench_paged_step.py --output benchmarks/results/h100/paged_step.md

Both steps are CUDA graphs of the same model with full memories. The pages are taken in a shuffled order from a pool
that has more of them than there are rows. `copied` is what a plug-in would do that gathers each row's state and
puts it back. Before anything is timed, the hidden states of the first two are compared. Without a GPU `--toy` runs a
small model eagerly, to see that it works. `--kernels 20` tells of the step in a row where its time goes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from competitors import SIZES
from measuring import captured, median_ms, times_by_kernel
from torch import Tensor

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM
from vllm_seqboat.pages import PagedCache, empty_pages

SEEN = 5000


class Steps:
    """The same B rows in pages and in a cache of their own, with full memories."""

    def __init__(self, model: SeqBoatForCausalLM, rows: int):
        config, device, dtype = model.config, model.device, model.dtype
        self.model, self.rows = model, rows
        generator = torch.Generator(device).manual_seed(0)
        self.ids = torch.randint(0, 250, (rows,), device=device, generator=generator)
        self.positions = torch.full((rows,), SEEN, device=device)
        self.pages = torch.randperm(2 * rows, device=device, generator=generator)[:rows] + 1
        self.paged = PagedCache(config, empty_pages(config, 2 * rows + 1, dtype, device))
        pool = self.paged.pool
        for name in ("keys", "values", "ssm_state"):
            pool[name].normal_(generator=generator)
        pool["positions"].copy_(SEEN - config.memory_size + torch.arange(config.memory_size, device=device))
        pool["activated_count"].fill_(SEEN // config.memory_size * config.memory_size)
        self.plain = SeqBoatCache(config, static=True)
        for index, layer in enumerate(self.plain.layers):
            layer.initialize(rows, dtype, torch.device(device))
            for name, tensor in pool.items():
                getattr(layer, name).copy_(tensor[self.pages, index])
            layer.token_count.fill_(SEEN)
            layer.is_blank = False

    def in_pages(self) -> Tensor:
        return self.paged.step(self.model, self.ids, self.pages, self.positions)

    def in_a_row(self) -> Tensor:
        return self.model.model(input_ids=self.ids[:, None], past_key_values=self.plain).last_hidden_state[:, 0]

    def copied(self) -> Tensor:
        pool = self.paged.pool
        for index, layer in enumerate(self.plain.layers):
            for name, tensor in pool.items():
                getattr(layer, name).copy_(tensor[:, index].index_select(0, self.pages))
        hidden = self.in_a_row()
        for index, layer in enumerate(self.plain.layers):
            for name, tensor in pool.items():
                tensor[:, index].index_copy_(0, self.pages, getattr(layer, name))
        return hidden


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--kernels", type=int, default=0, help="print as many kernels, those that take most first")
    parser.add_argument("--toy", action="store_true", help="a small model, on the CPU where there is no GPU")
    parser.add_argument("--output", type=Path, help="file for the table; it is printed in any case")
    a = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not a.toy:
        parser.error("there is no GPU; --toy runs without one")
    device = torch.device("cuda" if on_gpu else "cpu")
    published = SeqBoatConfig.from_preset("enwik8", ssm_truncation=None)
    config = SeqBoatConfig(**SIZES["toy"].seqboat) if a.toy else published
    torch.manual_seed(0)
    model = SeqBoatForCausalLM(config).to(device, torch.bfloat16 if on_gpu else torch.float32).eval()
    lines = []
    for rows in a.rows:
        steps = Steps(model, rows)
        difference = (steps.in_pages() - steps.in_a_row()).abs().max().item()
        active = (steps.paged.pool["activated_count"][steps.pages] % config.memory_size).float().mean().item()
        times = [_time(run, device, a.repeats) for run in (steps.in_a_row, steps.in_pages, steps.copied)]
        cells = [f"{ms:.3f}" for ms in times] + [f"{1e3 * rows / times[1]:.0f}", f"{active:.2f}", f"{difference:.1e}"]
        lines.append(f"| {rows} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if a.kernels:
            print("\n".join(_kernels(steps.in_a_row, device, a.kernels)), flush=True)
        del steps
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    report = [
        "# One decode step, states in a row and in pages",
        "",
        f"`python benchmarks/bench_paged_step.py{' --toy' if a.toy else ''}`: {where}, torch {torch.__version__}, "
        f"{size:.1f} M parameters, {model.dtype}, memories full, medians of {a.repeats} steps"
        f"{' as CUDA graphs' if on_gpu else ''}, in ms. Active: the share of tokens that attend. Difference: of "
        "hidden states between the first two.",
        "",
        "| rows | in a row | in pages | copied out and back | tokens/s in pages | active | difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *lines,
    ]
    print("\n".join(report))
    if a.output is not None:
        a.output.parent.mkdir(parents=True, exist_ok=True)
        a.output.write_text("\n".join(report) + "\n", encoding="utf-8")


def _kernels(run: Callable[[], Tensor], device: torch.device, count: int) -> list[str]:
    """Microseconds and launches of a step by kernel."""
    times = times_by_kernel(captured(run) if device.type == "cuda" else run, device)
    head = f"{sum(map(sum, times.values())):9.1f} {sum(map(len, times.values())):5d} all"
    return [head] + [f"{sum(each):9.1f} {len(each):5d} {name}" for name, each in [*times.items()][:count]]


def _time(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    return median_ms(captured(run) if device.type == "cuda" else run, device, repeats)


if __name__ == "__main__":
    main()
