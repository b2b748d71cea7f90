"""Requests to vLLM all at once against one after the other, on the machine at hand.

    .ci/vllm                                      # makes the environment, once
    .venv-vllm/bin/python benchmarks/bench_vllm.py --output benchmarks/results/cpu/vllm.md

Each round reads the same prompts both ways, one straight after the other, since other work on the machine slows both
down; what counts is the ratio. CPU seconds suffer less from such work. The engine runs in this process.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "docs" / "long_context.md"
# Read when vLLM is imported.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Threads that wait for one another lose more on a busy machine than they gain on so small a model.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "pretrained" / "seqboat-enwik8-small")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--shortest", type=int, default=20, help="bytes of the shortest prompt")
    parser.add_argument("--longest", type=int, default=100, help="bytes of the longest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="file for the table; it is printed in any case")
    a = parser.parse_args(argv)
    if min(a.requests, a.tokens, a.rounds, a.shortest) < 1 or a.longest < a.shortest:
        parser.error("requests, tokens, rounds and shortest are at least 1, and longest is at least shortest")
    import torch
    import vllm

    text = TEXT.read_text("utf-8").encode("ascii", "ignore").decode()
    spread = max(a.requests - 1, 1)
    lengths = [a.shortest + (a.longest - a.shortest) * i // spread for i in range(a.requests)]
    prompts = [text[200 * i :][:length] for i, length in enumerate(lengths)]
    llm = vllm.LLM(str(a.model), dtype=a.dtype, max_model_len=2048, max_num_seqs=a.requests)
    asked = vllm.SamplingParams(temperature=0, max_tokens=a.tokens, ignore_eos=True)

    def answers(some: list[str]) -> list[tuple[int, ...]]:
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(some, asked, use_tqdm=False)]

    def timed(groups: list[list[str]]) -> tuple[float, float, list[tuple[int, ...]]]:
        begin, used = time.perf_counter(), time.process_time()
        found = [answer for group in groups for answer in answers(group)]
        return time.perf_counter() - begin, time.process_time() - used, found

    answers(prompts[:2])
    lines, ratios = [], []
    for round_ in range(1, a.rounds + 1):
        together, used, found = timed([prompts])
        alone, used_alone, expected = timed([[prompt] for prompt in prompts])
        different = sum(x != y for x, y in zip(found, expected, strict=True))
        ratios.append((alone / together, used_alone / used))
        rates = [a.requests * a.tokens / seconds for seconds in (alone, together)]
        cells = [f"{rates[0]:.0f}", f"{rates[1]:.0f}", *(f"{ratio:.1f}" for ratio in ratios[-1])]
        lines.append(f"| {round_} | {' | '.join(cells)} | {different} |")
        print(lines[-1], flush=True)
    report = [
        f"# {a.requests} requests to vLLM at once, and one after the other",
        "",
        f"`python benchmarks/bench_vllm.py --requests {a.requests} --tokens {a.tokens} --shortest {a.shortest} "
        f"--longest {a.longest} --rounds {a.rounds} --dtype {a.dtype}`: {a.model.name}, prompts of {a.shortest} to "
        f"{a.longest} bytes, {a.tokens} new tokens each, greedy. vLLM {vllm.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads on {os.cpu_count()} cores. New tokens per second:",
        "",
        "| round | one after the other | at once | ratio | ratio of CPU seconds | answers that differ |",
        "| --- | --- | --- | --- | --- | --- |",
        *lines,
        "",
        f"Median ratios: {statistics.median(r for r, _ in ratios):.1f}, and of CPU seconds "
        f"{statistics.median(r for _, r in ratios):.1f}.",
    ]
    print("\n".join(report))
    if a.output is not None:
        a.output.parent.mkdir(parents=True, exist_ok=True)
        a.output.write_text("\n".join(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
