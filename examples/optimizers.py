"""The optimizers that the training scripts and the experiments ask for, by arguments of the same names: `optimizer`,
the rates, `weight_decay`, `muon_split` and `muon_row_beta`."""

from typing import Any

import torch
from torch import nn

from modeling_seqboat.optimizer_seqboat import MuonAdamW
from modeling_seqboat.training_seqboat import parameter_groups


def groups_of(a: Any, model: nn.Module) -> list[dict]:
    """`parameter_groups` by the arguments; what Muon alone reads is left out of other optimizers."""
    muon = a.optimizer == "muon"
    return parameter_groups(
        model, a.weight_decay, router_learning_rate=a.router_learning_rate, qk_learning_rate=a.qk_learning_rate,
        muon_learning_rate=a.muon_learning_rate if muon else None, muon_split=muon and a.muon_split,
    )  # fmt: skip


def optimizer_of(
    a: Any, groups: list[dict], betas: tuple[float, float], row_beta: float | None, device: torch.device
) -> torch.optim.Optimizer:
    """adamw, radam or muon, of groups whose parameters are on `device`."""
    if a.optimizer == "radam":
        return torch.optim.RAdam(groups, lr=a.learning_rate, betas=betas, decoupled_weight_decay=True)
    if a.optimizer == "muon":
        return MuonAdamW(groups, lr=a.learning_rate, betas=betas, row_beta=row_beta)
    # One launch for many parameters; the CPU keeps the arithmetic of its records.
    return torch.optim.AdamW(groups, lr=a.learning_rate, betas=betas, fused=device.type == "cuda")


def build_optimizer(a: Any, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a script that has `beta1` and `beta2`, and to which a `muon_row_beta` of 0 is none."""
    return optimizer_of(a, groups_of(a, model), (a.beta1, a.beta2), a.muon_row_beta or None, device)
