"""Muon for the matrices of a model's layers and AdamW for everything else, as one optimizer.

Letters: S matrices of one shape, R rows, C columns.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices with the singular vectors of the given ones and singular values near 1 (between 0.7 and 1.2 mostly).

    Args:
        matrices: (S, R, C). steps: Newton-Schulz steps, in bfloat16, which is enough for an update, but on a CPU in
            the matrices' own dtype: without instructions for bfloat16 it takes less than a tenth of the time.

    Returns:
        (S, R, C) bfloat16, or on a CPU in the dtype given.
    """
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    # The product of a matrix with itself is smaller on this side.
    x = x.mT if tall else x
    # No singular value is above the Frobenius norm.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    # The quintic of Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/), as in torch.optim.Muon.
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _expect_matrices(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.ndim != 2 or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"Muon takes whole matrices, got a {type(parameter).__name__} of shape {tuple(parameter.shape)}: "
                "sharded training (FSDP2, ZeRO-3) goes with AdamW"
            )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with `muon: True`, as `parameter_groups(..., muon_learning_rate=...)` makes them, and AdamW for
    the others, in one object: schedules, clipping, checkpoints and Accelerate see a single optimizer.

    The update is that of `torch.optim.Muon` (Nesterov momentum, decoupled weight decay, a rate times
    sqrt(max(1, rows / columns))), but all matrices of one shape are orthogonalised together: torch's goes through them
    one by one, some 30 kernels each. A group with `sections`, row counts, has matrices that are several, one below the
    other: each is orthogonalised by itself, with a rate by its own shape.

    Args:
        groups: parameters, or dictionaries of parameters and their settings.
        lr, betas, eps, weight_decay: AdamW's, where a group has none of its own; `lr` and `weight_decay` also Muon's.
        momentum: Muon's. ns_steps: Newton-Schulz steps.
        row_beta: in [0, 1), or None. Each row of an orthogonalised matrix is divided by the root of its mean square, a
            running mean by this factor a step, and the matrix gets its norm back: neurons learn at rates that are
            more alike (NorMuon, arXiv 2510.05491). One number more a row is kept.
        fused: AdamW as one kernel; by default for groups whose parameters are all on a GPU when `step` is called.

    Raises:
        ValueError: for a `muon` group with a tensor that is no whole matrix: of another rank, or sharded; for
            `sections` that do not add up to its rows.
    """

    def __init__(
        self, groups: Iterable, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.1, momentum: float = 0.95, ns_steps: int = 5, fused: bool | None = None,
        row_beta: float | None = None,
    ):  # fmt: skip
        groups = list(groups)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        groups = [{**group, "params": list(group["params"])} for group in groups]
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be from 0 up to, but not including, 1, got {momentum}")
        if ns_steps < 1:
            raise ValueError(f"ns_steps must be at least 1, got {ns_steps}")
        if row_beta is not None and not 0 <= row_beta < 1:
            raise ValueError(f"row_beta must be from 0 up to, but not including, 1, or None, got {row_beta}")
        self._fused = fused
        # It holds the AdamW groups' settings under their names and steps them; the state is kept here.
        stand_in = nn.Parameter(torch.zeros(1))
        self._adamw = torch.optim.AdamW([stand_in], lr, betas, eps, weight_decay, fused=fused)
        own = {"momentum": momentum, "ns_steps": ns_steps, "muon": False, "row_beta": row_beta, "sections": None}
        super().__init__(groups, self._adamw.defaults | own)

    def __getstate__(self) -> dict:
        # torch's has groups, state and defaults alone: a copy could not step.
        return {**super().__getstate__(), "_fused": self._fused, "_adamw": self._adamw}

    def add_param_group(self, group: dict) -> None:
        if group.get("muon"):
            group["params"] = list(group["params"])
            _expect_matrices(group["params"])
            sections = group.get("sections")
            for parameter in group["params"] if sections is not None else ():
                if sum(sections) != parameter.shape[0]:
                    raise ValueError(
                        f"sections {sections} add up to {sum(sections)} rows, a matrix has {len(parameter)}"
                    )
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        # Both may be new objects since the last step: loading a checkpoint replaces them.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        if self._fused is None:
            for group in self._adamw.param_groups:
                self._fuse_on_a_gpu(group)
        self._adamw.step()
        return loss

    def _fuse_on_a_gpu(self, group: dict) -> None:
        """Not decided when the optimizer is made: Accelerate and Trainer move the model afterwards."""
        group["fused"] = all(parameter.device.type == "cuda" for parameter in group["params"]) or None
        if group["fused"]:
            for parameter in group["params"]:
                state = self.state[parameter] if parameter in self.state else {}
                # A checkpoint of steps that were not fused has its count on the CPU.
                if "step" in state and state["step"].device != parameter.device:
                    state["step"] = state["step"].to(parameter.device)

    def _step_matrices(self, group: dict) -> None:
        # FSDP2 shards parameters after an optimizer was made.
        _expect_matrices(group["params"])
        shapes: dict[tuple, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                key = parameter.shape, parameter.device, parameter.dtype
                shapes.setdefault(key, []).append(parameter)
        momentum, rate = group["momentum"], group["lr"]
        # On the device it is left there: a CUDA graph reads it in every step.
        rate = float(rate) if not isinstance(rate, Tensor) or rate.device.type == "cpu" else rate
        for (shape, *_), parameters in shapes.items():
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in parameters]
            averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_lerp_(averages, grads, 1 - momentum)
            ahead = torch.stack(torch._foreach_lerp(grads, averages, momentum))
            parts = ahead.split(group.get("sections") or shape[0], dim=1)
            factors = [math.sqrt(max(1, part.shape[1] / shape[1])) for part in parts]
            found = [orthogonalized(part, group["ns_steps"]).to(ahead.dtype) for part in parts]
            update = torch.cat([part * factor for part, factor in zip(found, factors, strict=True)], 1)
            if group.get("row_beta") is not None:
                update = self._with_even_rows(update, parameters, group["row_beta"])
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            if isinstance(rate, Tensor):
                torch._foreach_sub_(parameters, list((update * rate).unbind()))
            else:
                torch._foreach_add_(parameters, list(update.unbind()), alpha=-rate)

    def _with_even_rows(self, update: Tensor, parameters: list[nn.Parameter], beta: float) -> Tensor:
        """update: (S, R, C), the matrices of `parameters`. The same with rows divided, as `row_beta` says."""
        squares = update.float().square().mean(2, keepdim=True)
        means = []
        for parameter, square in zip(parameters, squares, strict=True):
            kept = self.state[parameter].get("row_square")
            # float32, which loading a checkpoint turns into the parameter's dtype: a mean of many steps needs it.
            means.append(torch.zeros_like(square) if kept is None else kept.to(square.dtype))
            self.state[parameter]["row_square"] = means[-1]
        torch._foreach_lerp_(means, list(squares.unbind()), 1 - beta)
        even = update * (torch.stack(means) + 1e-10).rsqrt()
        before, after = (rows.float().norm(dim=(1, 2), keepdim=True) for rows in (update, even))
        return (even * (before / after.clamp_min(1e-7))).to(update.dtype)
