"""What every script does first: `import script_start`, before torch.

It takes as many threads as there are idle cores, where cores are few, leaves out warnings that no user can act on, and
ends what users can put right in one line instead of a traceback: a wrong value or file that the code here refused, and
a package that is not installed. `SEQBOAT_TRACEBACK=1` in front of a command shows the traceback of those too.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from types import FrameType, TracebackType

_FEW_CORES = 4
# How often a waiting thread looks again before it sleeps: some 0.2 ms, longer than most waits. Threads that stay
# awake hold the cores that the awaited one needs; threads that sleep at once are woken thousands of times a step.
_SPIN_COUNT = "10000"


def idle_cores(seconds: float = 0.1) -> int | None:
    """How many of the cores that this process may use do nothing, over so many seconds, at least 1; None where the
    system does not tell, as only Linux does."""

    def times() -> dict[str, list[int]]:
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu"))
        return {name: [int(value) for value in values] for name, *values in lines}

    try:
        cores = [f"cpu{number}" for number in os.sched_getaffinity(0)]
        before = times()
        time.sleep(seconds)
        after = times()
        idle = 0.0
        for core in cores:
            passed = [late - early for early, late in zip(before[core], after[core], strict=True)]
            # The fourth is idle, the fifth waits for a disk; time of guests, behind the eighth, is counted twice.
            idle += sum(passed[3:5]) / max(1, sum(passed[:8]))
    except (AttributeError, OSError, KeyError, ValueError):
        return None
    return max(1, round(idle))


def choose_threads(environment: MutableMapping[str, str]) -> None:
    """Sets what OpenMP reads when torch is loaded: threads that look again for a while before they sleep and, on few
    cores, as many as there are idle ones, since all wait for one that shares its core. Leaves what is set already."""
    if environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return
    # GNU's runtime goes by the count, others by the policy.
    environment.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=_SPIN_COUNT)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in environment and cores <= _FEW_CORES:
        idle = idle_cores()
        if idle is not None:
            environment["OMP_NUM_THREADS"] = str(idle)


choose_threads(os.environ)

# Kernels of torchao that this machine's torch cannot load, which nothing here calls; remarks of torch on torchao; and
# that output and embedding share a weight, as the config says, in every checkpoint.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
logging.getLogger("accelerate.utils.other").addFilter(lambda record: "Removed shared tensor" not in str(record.msg))

HERE = Path(__file__).resolve().parent
# Packages that the scripts import, and the extra that brings each.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "matplotlib", "peft", "PIL", "tensorboard", "trl"), "train"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "liger_kernel": "liger",
    "torchao": "test",
}


def install_command(extra: str) -> str:
    """What installs an extra: in a checkout from there, else from the index."""
    if (HERE.parent / "setup.py").is_file():
        return f'pip install -c constraints.txt -e ".[{extra}]"'
    return f'pip install "seqboat-transformers[{extra}]"'


def one_line(error: BaseException) -> str | None:
    """What to say of an error that a user can put right; None for any other."""
    if isinstance(error, ImportError):
        # transformers and Accelerate raise errors of their own for what they miss, and name it in them.
        named = [error.name.split(".")[0]] if error.name else str(error).replace("`", " ").split()
        for name in named:
            package = name.split(">")[0].split("[")[0]
            if package in EXTRAS:
                return f"the package {package} is not installed: {install_command(EXTRAS[package])}"
        return None
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError):
        # Of the Hub's long messages the first line says what is missing.
        return str(error).strip().split("\n")[0]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # What was raised elsewhere is a fault, and the traceback is needed.
    ours = trace is not None and _is_ours(trace.tb_frame)
    return str(error) if ours and isinstance(error, (ValueError, FloatingPointError)) else None


def _is_ours(frame: FrameType) -> bool:
    package = frame.f_globals.get("__name__", "").split(".")[0]
    return package in ("modeling_seqboat", "hub_upload") or _is_script(frame.f_code.co_filename)


def _is_script(file: str | None) -> bool:
    folders = (HERE, HERE.parent / "benchmarks")
    return file is not None and any(Path(file).resolve().is_relative_to(folder) for folder in folders)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    line = None if os.environ.get("SEQBOAT_TRACEBACK") else one_line(error)
    if line is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)


class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the list of all options."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


# Not in a test or another program that imports a script.
if _is_script(getattr(sys.modules.get("__main__"), "__file__", None)):
    sys.excepthook = _report
