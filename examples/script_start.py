"""What every script does first: `import script_start`, before torch.

It takes one thread on two cores and lets waiting ones sleep on more, leaves out warnings that no user can act on, and
ends what users can put right in one line instead of a traceback: a wrong value or file that the code here refused, and
a package that is not installed. `SEQBOAT_TRACEBACK=1` in front of a command shows the traceback of those too.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from types import FrameType, TracebackType

# Threads that wait for work would spin, which costs a machine shared with other programs most of its speed. On two
# cores putting them to sleep and waking them up takes longer than one thread takes for all of the work.
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if _cores <= 2 and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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
