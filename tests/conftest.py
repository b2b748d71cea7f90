"""Settings that hold for every test, made before torch is imported."""

import os

# The models here are tiny: one thread is faster than two, and threads that wait for work would slow a busy machine down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
