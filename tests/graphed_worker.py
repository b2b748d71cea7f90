"""Started by test_distributed.py under torchrun: graphed steps, emulated on the CPU, in processes whose routers
activate now few, now all tokens, so that they capture and overflow at different steps; each step against one process
with all data.

Usage: graphed_worker.py REPORT.json
"""

import copy
import json
import sys
from contextlib import nullcontext

import triton_interpreter  # noqa: F401, before anything imports triton

# isort: split
import torch
import torch.distributed as dist
from graphed_steps import CUDA_STAND_INS, EmulatedGraph
from small_models import random_ids, small_lm
from torch.nn.parallel import DistributedDataParallel

from modeling_seqboat import graphed_step_seqboat

# Added to the logit for skipping a token, by step and rank: few, half, all. Ranks 2 and 3 do as 0 and 1.
BIASES = [(2.0, 2.0), (-30.0, 2.0), (30.0, -30.0), (0.0, 2.0)]
MICRO_BATCHES = 2


def main(path: str) -> None:
    for name, stand_in in CUDA_STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    graphed_step_seqboat._STEP, graphed_step_seqboat._SPARE = 4, 0
    # Several buckets, one of them of a single tensor.
    graphed_step_seqboat._BUCKET = 2048
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = small_lm(num_hidden_layers=1).train()
    reference = copy.deepcopy(model)
    # A graph needs the kernels; their twins in torch are faster here.
    model.config.kernel_backend, reference.config.kernel_backend = "triton", "torch"
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    step = EmulatedGraph(wrapped, divisor=MICRO_BATCHES, headroom=1.0)
    errors, overflowed = [], []
    for turn, biases in enumerate(BIASES):
        for part in range(MICRO_BATCHES):
            model.config.activation_bias = biases[rank % 2]
            ids = random_ids(1, 12, seed=100 * turn + 10 * part + rank)
            with wrapped.no_sync() if part + 1 < MICRO_BATCHES else nullcontext():
                step(input_ids=ids, labels=ids)
            for process in range(world):
                reference.config.activation_bias = biases[process % 2]
                ids = random_ids(1, 12, seed=100 * turn + 10 * part + process)
                (reference(ids, labels=ids, use_cache=False).loss / (MICRO_BATCHES * world)).backward()
        overflowed.append(step.overflows)
        pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
        errors.append(max(float((ours.grad - expected.grad).abs().max()) for ours, expected in pairs))
        # Clipping is the caller's, and the same everywhere once gradients are.
        for trained in (wrapped, reference):
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.5)
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    mine = {"captures": step.captures, "overflows": overflowed, "errors": errors}
    reports = [None] * world
    dist.all_gather_object(reports, mine)
    if rank == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(reports, file)
    dist.barrier()
    # Wrapped by DDP, a model holds on to the process group, and were it the last to do so, PyTorch's gloo could
    # deadlock.
    del wrapped, step
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
