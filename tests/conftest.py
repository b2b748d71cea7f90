"""Settings that hold for every test, made before torch and triton are imported."""

import gc
import importlib.util
import os

import pytest

# The models here are tiny: one thread is faster than two, and threads that wait for work would slow a busy machine
# down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What reaches a kernel is checked here, see also below, and not in a user's process.
os.environ.setdefault("SEQBOAT_CHECK_KERNELS", "1")

HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_TRITON:
    collect_ignore_glob = ["test_triton_*.py", "test_kernels.py"]

# Files that take long, the longest first: one of them at the end would keep all processes but one waiting. Of the
# first two all tests are slow ones.
LONGEST = (
    "fuzz", "long_context", "export", "hub_build", "generation", "compile", "benchmarks", "classification_runs",
    "batches", "experiments", "context_parallel", "classification_examples", "robustness", "graphed_step", "kernels",
    "cache", "router_types", "distributed", "train_lm", "router_budget", "long_context_runs", "ssm_types",
    "triton_ema", "pretrained", "triton_attention", "hub_push", "quickstart", "heads", "training_compile", "packaging",
)  # fmt: skip
# Of the slow tests those that take longest, by their place in the order: each process is given two tests at first.
SLOWEST = {
    0: "test_every_block_runs_in_order_and_again",
    2: "test_more_parts_equal_the_whole",
    3: "test_guides_and_notebook_run",
}


def pytest_configure(config):
    # The process that hands tests to others runs none: they would wait while it imports torch.
    hands_out = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
    if hands_out:
        import strangers

        strangers.share()
    else:
        # Imports make much and throw little away. What they have made is frozen when all tests are collected.
        gc.disable()
    if HAS_TRITON and (config.option.collectonly or not hands_out):
        # Kernels are made for the interpreter or for a GPU when they are defined, so this comes before all test
        # modules.
        import kernel_checks
        import triton_interpreter  # noqa: F401

        kernel_checks.install()
    if hasattr(config.option, "loadscopereorder"):
        # Else xdist begins with the files that have the most tests; these have few.
        config.option.loadscopereorder = False
        if config.option.markexpr == "slow" and config.option.maxschedchunk is None:
            # A process that was given many tests at once would keep them while others wait.
            config.option.maxschedchunk = 1


def pytest_collection_modifyitems(config, items):
    place = {f"test_{name}": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
    if config.option.markexpr == "slow":
        for index, name in SLOWEST.items():
            found = [item for item in items if item.name == name]
            items[:] = [item for item in items if item.name != name]
            items[index:index] = found


def forget_garbage():
    """What is left stays until the end: each later collection would go through it, which takes a third of a second
    and more, and libraries ask for one after each run."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session):
    forget_garbage()
    # Garbage in cycles is rare, and may wait a little longer.
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    found = yield
    if nextitem is None or nextitem.path != item.path:
        # Its fixtures are gone. What the tests of a file have imported and compiled stays.
        forget_garbage()
    return found
