"""What the processes of forks.py have imported before they start: what a test's process has, too."""

import gc
import importlib.util

if importlib.util.find_spec("triton") is not None:
    import kernel_checks
    import triton_interpreter  # noqa: F401

    kernel_checks.install()

import datasets  # noqa: F401
import peft  # noqa: F401
import torch.distributed.elastic.multiprocessing  # noqa: F401
import yaml  # noqa: F401
from accelerate import Accelerator  # noqa: F401
from transformers import Trainer, pipelines  # noqa: F401

import modeling_seqboat.training_seqboat  # noqa: F401

gc.freeze()
