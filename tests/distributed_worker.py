"""Started by test_distributed.py through `accelerate launch`: trains a few steps while the processes' routers activate
nothing, about half and everything, and compares each step with one process that sees all the data. A `RouterBudget`
holds the rate of all processes together; Muon takes the place of SGD where parameters are whole. All in float64.
Besides, runs of examples/train_lm.py, which on the CPU needs help with FSDP2.

Usage: distributed_worker.py JOBS.json, a list of ["adversarial", REPORT.json] and ["train_lm", FLAGS...], which run
one after the other: a launch costs more than what it runs.
"""

import copy
import gc
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.optimizer_seqboat import MuonAdamW
from modeling_seqboat.training_seqboat import RouterBudget, RouterMonitor, parameter_groups

# Added to the logit for skipping a token; read at every forward, so that it may differ from process to process.
BIASES = {"none": 1e4, "half": 0.0, "all": -1e4}
SCENARIOS = (
    ("none", "all", "half", "all"),
    ("half", "none", "none", "all"),
    ("none", "none", "none", "none"),
    ("all", "none", "all", "half"),
)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's whole; every process has to ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rows(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(100 * step + rank))


@contextmanager
def single_process():
    """Hides the other processes from what would add up their counts."""
    usual, torch.distributed.get_world_size = torch.distributed.get_world_size, lambda *args: 1
    try:
        yield
    finally:
        torch.distributed.get_world_size = usual


def make_optimizer(model: torch.nn.Module, sharded: bool) -> torch.optim.Optimizer:
    if sharded:
        return torch.optim.SGD(parameter_groups(model, 0.01), lr=0.1, momentum=0.9)
    return MuonAdamW(parameter_groups(model, 0.01, muon_learning_rate=0.02), lr=1e-2)


def make_accelerator(**settings) -> Accelerator:
    """On the CPU Accelerate takes no notice of an FSDP config, though all that `prepare` does for FSDP2 runs there. So
    its state is told by hand, as it tells itself on a GPU; the plugin reads what `accelerate launch` took from the
    yaml."""
    accelerator = Accelerator(**{**settings, "cpu": True})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def run(path: str) -> None:
    accelerator = make_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    config = SeqBoatConfig.from_preset("tiny", intermediate_size=48, router_target_rate=0.3)
    model = SeqBoatForCausalLM(config).double().train()
    reference = copy.deepcopy(model)
    monitor, budget, reference_budget = RouterMonitor(model), RouterBudget(model), RouterBudget(reference)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    optimizer, reference_optimizer = make_optimizer(model, sharded), make_optimizer(reference, sharded)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)
    report = {
        "type": str(accelerator.distributed_type.value),
        "world": world,
        "sharded": any(hasattr(parameter, "full_tensor") for parameter in model.parameters()),
        "sharded_layers": sum(isinstance(module, FSDPModule) for module in plain.model.layers),
        "find_unused_parameters": getattr(model, "find_unused_parameters", False),
        "losses": [],
        "reference_losses": [],
        "gradient_errors": [],
        "rates": [],
        "without_gradient": [],
    }
    for step, scenario in enumerate(SCENARIOS):
        plain.config.activation_bias = BIASES[scenario[rank]]
        ids = rows(step, rank).to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        reference_loss = 0.0
        for other in range(world):
            reference.config.activation_bias = BIASES[scenario[other]]
            part = reference(input_ids=rows(step, other), labels=rows(step, other)).loss / world
            part.backward()
            reference_loss += float(part.detach())
        errors = []
        pairs = zip(plain.named_parameters(), reference.parameters(), strict=True)
        for (name, parameter), expected in pairs:
            if parameter.grad is None:
                report["without_gradient"].append(name)
                continue
            errors.append(float((full(parameter.grad).cpu() - expected.grad).abs().max()))
        optimizer.step()
        optimizer.zero_grad()
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        # Only the reference counts the parts of all processes by itself.
        with single_process():
            reference_budget.step()
        budget.step()
        report["losses"].append(float(accelerator.reduce(loss.detach(), "mean")))
        report["reference_losses"].append(reference_loss)
        report["gradient_errors"].append(max(errors))
        report["rates"].append([seen.activation_rate for seen in monitor.read().values()])
    weights = [float((full(a).cpu() - b).abs().max()) for a, b in
               zip(plain.parameters(), reference.parameters(), strict=True)]  # fmt: skip
    report["weight_error"] = max(weights)
    report["biases"] = [full(layer.router.bias).tolist() for layer in plain.model.layers]
    if accelerator.is_main_process:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file)
    accelerator.wait_for_everyone()
    # Wrapped by DDP, a model holds on to the process group, and were it the last to do so, PyTorch's gloo could
    # deadlock.
    del model, plain, optimizer, monitor
    accelerator.free_memory()
    accelerator.end_training()


def run_train_lm(*flags: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import train_lm

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        train_lm.Accelerator = make_accelerator
        train_lm.check_launch = lambda cpu: None
    train_lm.main(flags)


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        jobs = json.load(file)
    # A job leaves the group to the next one.
    leave, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *args: None
    for kind, *arguments in jobs:
        {"adversarial": run, "train_lm": run_train_lm}[kind](*arguments)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    gc.collect()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
