"""SeqBoat against the models that people would pick instead, of equal size, in one process.

    python benchmarks/bench_models.py --output outputs/benchmark --minutes 6

Measures whole steps, the training step without an optimiser, decoding, forwards without a cache and prefill in chunks
with one: SeqBoat launched op by op ("eager"), as a CUDA graph and compiled, a Llama, a Mistral with a sliding window,
Mamba-2 where `mamba_ssm` is installed, and GLA, KDA and GatedDeltaNet where `flash-linear-attention` is. On a GPU at
the enwik8 shape (39.1 M parameters), under bfloat16 autocast for training and forwards and in bfloat16 for prefill and
decoding; without a GPU at a small shape in float32. Tokens are random; router biases are set so that the stated share
of tokens is activated in every layer.

Parts, in order of importance, with the time that each is expected to take on an H200 behind a slow host (10 to 20 µs a
launch, 25 s to compile a model, empty Triton cache):

    start     imports, first use of the device                                          25 s
    roofline  copy bandwidth and bfloat16 matmul rate, in the same run                   2 s
    step      whole steps of 4 x 8,192: forward, backward, clipping, fused AdamW         10 s
    train     4 x 8,192 at 0, 10, 50 and 100 %, 1 x 1,024 to 131,072; the others       110 s
    decode    contexts of 1k to 1M at batch 1, 32k at batch 64; Llama (3 compilations) 110 s
    forward   1 x 8k to 1M without a cache                                              30 s
    prefill   8k to 1M in chunks of 8,192 with a cache, 1M also in chunks of 131,072     15 s

Rows that a target depends on come first, whatever their part. `--minutes` bounds the whole: a row that would start
later is skipped, and named in the results. A row that runs out of memory or fails is recorded as such. Every row is in
the CSV as soon as it is measured, so that an interrupted run keeps what it has; `--from-csv` draws tables and plots of
it.

`--models seqboat,gla` measures these alone. The kernels of the four recurrent models take minutes to compile and tune
when a process first meets them, so that each gets a process of its own, with SeqBoat beside it on the same card:

    for model in gla kda gated_deltanet; do
        timeout 420 python benchmarks/bench_models.py --output outputs/benchmark-$model --parts step,forward \
            --models seqboat,$model --minutes 6
    done

They choose among many settings of each kernel. With at most 4 of each, by a patch of triton's Autotuner, and three
such processes at a time, GLA and KDA took 244 and 275 s on an H100; TRITON_CACHE_AUTOTUNING=1 keeps the choice for the
next process. The backward pass of GatedDeltaNet refuses Hopper GPUs with a Triton from 3.4 to 3.7.0, which makes wrong
gradients of it.

Times are medians with the device synchronised, so they include waiting for the host. Peak memory is what torch has
allocated, weights and gradients included; that of a CUDA graph is taken while it is captured. Decoding is the forward
of one token, the choice of the next left out; the state of a batch of rows is one row's, repeated. Op by op the Llama
decodes twice: without cuDNN's attention, whose plan for each new number of keys takes the host longer than all else,
and with the attention that PyTorch prefers, which on a Hopper is cuDNN's. The line of the least time in the plot is
bytes / copy bandwidth + matmul FLOPs / matmul rate, see roofline.py.

Writes results.csv, results.md, time_against_length.png and memory_against_length.png.
"""

import argparse
import gc
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from competitors import MODELS
from measuring import release_memory
from result_files import CsvFile, read_rows, write_report
from workloads import CPU, GPU, PARTS, TOY, Row, Scale, Workbench, plan


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of %(default)s")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated, of %(default)s")
    parser.add_argument(
        "--minutes", type=float, help="start no row this long after the imports; by default all are measured"
    )
    parser.add_argument("--from-csv", type=Path, help="draw tables and plots of these results instead of measuring")
    parser.add_argument("--toy", action="store_true", help="tiny models on the CPU, to try the benchmark itself")
    arguments = parser.parse_args(argv)
    for name, known in (("parts", PARTS), ("models", MODELS)):
        given = getattr(arguments, name).split(",")
        setattr(arguments, name, given)
        unknown = [part for part in given if part not in known]
        if unknown:
            parser.error(f"--{name} must be of {', '.join(known)}, got {', '.join(unknown)}")
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes}")
    if arguments.from_csv is not None and not arguments.from_csv.is_file():
        parser.error(f"--from-csv names no file: {arguments.from_csv}")
    return arguments


def scale_of(device: torch.device, arguments: argparse.Namespace) -> Scale:
    return TOY if arguments.toy else GPU if device.type == "cuda" else CPU


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def describe(device: torch.device, arguments: argparse.Namespace, argv: list[str]) -> dict[str, str]:
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "not installed"
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    shown = [part.replace(str(arguments.output), "FOLDER") for part in argv]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name() if device.type == "cuda" else threads,
        "device": device.type,
        "size": scale_of(device, arguments).size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        **{name: version(name) for name in ("flash-linear-attention", "mamba-ssm") if installed(name)},
        "command": f"python benchmarks/bench_models.py {shlex.join(shown)}",
    }


def attempt(bench: Workbench, row: Row) -> dict:
    """What was measured, or why it was not."""
    try:
        return {"status": "ok", **row.measure(bench, row)}
    except torch.cuda.OutOfMemoryError:
        return {"status": "out of memory"}
    except ModuleNotFoundError as error:
        return {"status": "not installed", "note": str(error)}
    except Exception as error:  # noqa: BLE001
        message = " ".join(str(error).split())[:300]
        return {"status": "failed", "note": f"{type(error).__name__}: {message}"}


def measure_all(arguments: argparse.Namespace, device: torch.device, file: CsvFile, started: float) -> None:
    scale = scale_of(device, arguments)
    bench = Workbench(device, scale)
    # What is there by now stays: the collections between rows need not look at it.
    gc.freeze()
    for row in plan(scale, arguments.parts, arguments.models):
        begun = time.perf_counter()
        late = arguments.minutes is not None and begun - started > 60 * arguments.minutes
        found = {"status": "skipped", "note": f"after {arguments.minutes:g} minutes"} if late else attempt(bench, row)
        if not late:
            release_memory(device)
        fields = {
            name: getattr(row, name) for name in ("part", "model", "mode", "batch", "length", "active", "repeats")
        }
        seconds = time.perf_counter() - begun
        file.add({**fields, **found, "seconds": round(seconds, 2)})
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
        said = numbers or f"{found['status']} {found.get('note', '')}"
        print(f"[{time.perf_counter() - started:6.1f} s] {row.name}: {said}", flush=True)
    gc.unfreeze()


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.from_csv is not None:
        write_report(read_rows(arguments.from_csv), arguments.output)
        return
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.toy else "cpu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "results.csv"
    with CsvFile(path) as file:
        for name, value in describe(device, arguments, argv).items():
            file.add({"part": "run", "model": name, "note": value})
        measure_all(arguments, device, file, started)
    write_report(read_rows(path), arguments.output)


if __name__ == "__main__":
    main()
