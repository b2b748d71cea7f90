"""Settings that hold for every test, made before torch and triton are imported."""

import importlib.util
import os

# The models here are tiny: one thread is faster than two, and threads that wait for work would slow a busy machine
# down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What reaches a kernel is checked here, and not in a user's process.
os.environ.setdefault("SEQBOAT_CHECK_KERNELS", "1")

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py", "test_kernels.py"]
else:
    # Kernels are made for the interpreter or for a GPU when they are defined, so this comes before all test modules.
    import triton_interpreter  # noqa: F401
