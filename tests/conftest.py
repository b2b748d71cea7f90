"""Settings that hold for every test, made before torch and triton are imported."""

import importlib.util
import os

# The models here are tiny: one thread is faster than two, and threads that wait for work would slow a busy machine
# down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What reaches a kernel is checked here, see also below, and not in a user's process.
os.environ.setdefault("SEQBOAT_CHECK_KERNELS", "1")

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py", "test_kernels.py"]
else:
    # Kernels are made for the interpreter or for a GPU when they are defined, so this comes before all test modules.
    import kernel_checks
    import triton_interpreter  # noqa: F401

    kernel_checks.install()

# Files that take long, the longest first: one of them at the end would keep all processes but one waiting. Of the
# first two all tests are slow ones.
LONGEST = (
    "fuzz", "long_context", "export", "hub_build", "distributed", "kernels", "pretrained", "classification_runs",
    "generation", "compile", "router_types", "run_folder", "context_parallel", "experiments", "graphed_step",
    "router_budget", "long_context_runs",
)  # fmt: skip


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        # Else xdist begins with the files that have the most tests; these have few.
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
