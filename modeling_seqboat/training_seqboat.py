"""Training helpers: which parameters decay, and what the routers do. Nothing here is needed to run a model.

Parts of a model are recognised by class and parameter name, so that the helpers also serve a model whose code came
with its checkpoint (`trust_remote_code=True`), one wrapped by DDP, FSDP2 or torch.compile, and one with adapters.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .graphed_step_seqboat import GraphedStep, GraphedUpdate, captures_group
from .optimizer_seqboat import MuonAdamW

logger = logging.get_logger(__name__)

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def _modules(model: nn.Module, kind: str) -> Iterator[tuple[str, nn.Module]]:
    """By the name of their class: code that came with a checkpoint has classes of its own."""
    for name, module in model.named_modules():
        if any(cls.__name__ == kind for cls in type(module).__mro__):
            yield name, module


def _routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in _modules(model, "SeqBoatRouter") if module.learned)


def model_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The SeqBoatModel of a model with a head, and the head, however wrapped."""
    found = [module for module in model.modules() if hasattr(module, "_with_router_penalty")]
    base = next(module for module in found if any(cls.__name__ == "SeqBoatModel" for cls in type(module).__mro__))
    return base, found[0]


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter once (a tied one under its first name), with the module that owns it."""
    for name, parameter in model.named_parameters():
        yield name, model.get_submodule(name.rpartition(".")[0]), parameter


def decay_parameter_names(model: nn.Module, decay_embeddings: bool = False) -> list[str]:
    """Names of the parameters that weight decay is meant for: the matrices of linear layers (adapters' included).

    EMA, norm, router, bias and attention-scale parameters set time constants, thresholds and scales: 0 is no neutral
    value for them. Embeddings, and an output matrix tied to them, decay with `decay_embeddings` only.
    """
    kinds = (nn.Linear, nn.Embedding) if decay_embeddings else (nn.Linear,)
    return [
        name
        for name, module, _ in _owned_parameters(model)
        if isinstance(module, kinds) and name.rpartition(".")[2] == "weight"
    ]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_embeddings: bool = False,
    router_learning_rate: float | None = None,
    muon_learning_rate: float | None = None,
    muon_split: bool = False,
    qk_learning_rate: float | None = None,
) -> list[dict]:
    """Parameter groups for any torch optimizer, in model order; frozen parameters are left out, empty groups too.

    Args:
        weight_decay: for the parameters of `decay_parameter_names`; all others get 0.
        router_learning_rate: peak rate of the routers' weight, bias and temperature, which then are a group of their
            own; by default they learn at the optimizer's rate.
        muon_learning_rate: peak rate of the matrices of the layers' linears, which then are a group of their own that
            `MuonAdamW` trains by Muon.
        muon_split: a group of its own for the input projections of attention, which `MuonAdamW` then orthogonalises as
            what they are: the matrices of queries and keys, gate, and values, one below the other.
        qk_learning_rate: peak rate of the scales and offsets of queries and keys, which then are a group of their own.

    Raises:
        ValueError: for `muon_split` without Muon; for it, or a rate of queries and keys, with a model of another kind.

    Example: `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 0.1), lr=2e-3), None))`.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    if muon_split and muon_learning_rate is None:
        raise ValueError("muon_split splits the matrices that Muon trains; give muon_learning_rate, got None")
    units = [unit for _, unit in _modules(model, "SeqBoatAttention")]
    if (muon_split or qk_learning_rate is not None) and not units:
        raise ValueError(f"muon_split and qk_learning_rate are for SeqBoat's attention, got a {type(model).__name__}")
    decaying = set(decay_parameter_names(model, decay_embeddings))
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    router_group = {"params": [], "weight_decay": 0.0, "lr": router_learning_rate}
    qk_group = {"params": [], "weight_decay": 0.0, "lr": qk_learning_rate}
    muon_group = {"params": [], "weight_decay": weight_decay, "lr": muon_learning_rate, "muon": True}
    split_groups: dict[tuple[int, ...], dict] = {}
    # Of parameters that have a rate of their own, by their identity.
    own: dict[int, dict] = {}
    if router_learning_rate is not None:
        own |= {id(parameter): router_group for _, router in _routers(model) for parameter in router.parameters()}
    for unit in units:
        if qk_learning_rate is not None:
            own |= {id(unit.qk_scale): qk_group, id(unit.qk_offset): qk_group}
        # Some quantised layers have no weight.
        if muon_split and hasattr(unit.in_proj, "weight"):
            sections = unit.config.qk_head_dim, unit.config.v_head_dim, unit.config.v_head_dim
            split_group = {**muon_group, "params": [], "sections": sections}
            own[id(unit.in_proj.weight)] = split_groups.setdefault(sections, split_group)
    for name, module, parameter in _owned_parameters(model):
        if not parameter.requires_grad:
            continue
        by_muon = muon_learning_rate is not None and isinstance(module, nn.Linear) and name in decaying
        if by_muon and _LAYER.search(name):
            own.setdefault(id(parameter), muon_group)
        own.get(id(parameter), groups[name not in decaying])["params"].append(parameter)
    found = (*groups, router_group, qk_group, muon_group, *split_groups.values())
    return [group for group in found if group["params"]]


@dataclass
class RouterStatistics:
    """What one layer's router did: activated share of the real tokens in [0, 1], and its temperature (NaN where the
    parameter is sharded away, as ZeRO-3 does)."""

    activation_rate: float
    temperature: float


class _ActivationCounter:
    """Counts, on the device and without waiting for it, what every learned router does in training forwards: activated
    tokens, real tokens, and the temperature last seen, summed since the last `take`."""

    def __init__(self, model: nn.Module):
        self.routers = {int(_LAYER.search(f"{name}.")[1]): router for name, router in _routers(model)}
        self._sums: dict[int, Tensor] = {}
        self._handles = [router.register_forward_hook(self._hook(layer)) for layer, router in self.routers.items()]

    def _hook(self, layer: int):
        @torch.compiler.disable
        def count(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            if not module.training:
                return
            active, real = output[1], args[1]
            with torch.no_grad():
                # Written in place, so that a CUDA graph goes on counting where it was captured.
                sums = self._sums[layer] if layer in self._sums else self._place(layer, active.device)
                sums[0].add_(active.sum())
                sums[1].add_(active.numel() if real is None else real.sum())
                if module.log_temperature.numel() > 0:
                    sums[2].copy_(module.log_temperature.detach().double().exp()[0])
                else:
                    sums[2].fill_(torch.nan)

        return count

    def _place(self, layer: int, device: torch.device) -> Tensor:
        """Three numbers of a table that all layers of a device share. `GraphedStep` finds it at the router."""
        others = [sums._base for sums in self._sums.values() if sums.device == device]
        table = others[0] if others else torch.zeros(max(self.routers) + 1, 3, dtype=torch.float64, device=device)
        router = self.routers[layer]
        router.written_by_hooks = [*getattr(router, "written_by_hooks", ()), table]
        self._sums[layer] = table[layer]
        return self._sums[layer]

    def take(self) -> tuple[list[int], Tensor]:
        """Numbers of the layers that were run, and their (layers, 3) float64, the counts of all processes; every
        process has to call it."""
        layers = sorted(self._sums)
        if not layers:
            return [], torch.empty(0, 3, dtype=torch.float64)
        device = self._sums[layers[0]].device
        table = torch.stack([self._sums[layer].to(device) for layer in layers])
        for sums in self._sums.values():
            sums[:2].zero_()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            counts = table[:, :2].contiguous()
            dist.all_reduce(counts)
            table[:, :2] = counts
        return layers, table

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        tables = [sums._base for sums in self._sums.values()]
        for router in self.routers.values():
            kept = getattr(router, "written_by_hooks", ())
            router.written_by_hooks = [table for table in kept if not any(table is own for own in tables)]


class _Counting:
    """What counts activations until `close`, or the end of a `with` block, takes its hooks off again."""

    def __init__(self, model: nn.Module):
        self._counter = _ActivationCounter(model)

    def close(self) -> None:
        self._counter.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class RouterMonitor(_Counting):
    """Counts activations of every router during training forwards. Nothing is synchronised until `read`."""

    def read(self) -> dict[int, RouterStatistics]:
        """Statistics per layer since the last call, over all processes; every process has to call it."""
        layers, table = self._counter.take()
        return {
            layer: RouterStatistics(active / tokens, temperature)
            for layer, (active, tokens, temperature) in zip(layers, table.tolist(), strict=True)
            if tokens > 0
        }


class RouterBudget(_Counting):
    """Holds a model's routers to the config's `router_target_rate` by moving their biases, without a term in the loss.

    `step`, called after each optimiser step, moves the threshold of every router by
    gain * (r - target), where r is the share of all real tokens that all layers together activated since the last
    call, over micro-batches and processes. So layers may share the budget out among themselves, what they choose is
    learned from the task's loss alone, and a step's parts add up exactly, however it is cut. With
    `router_target_scope` layer each layer is held by its own rate.

    With scope `model`, a layer that comes within `floor` of activating nothing, or everything, is also pushed back: at
    the very end as if its rate were off by 1, at `floor` not at all. Nothing else would reopen a layer that has shut,
    since tokens that are not activated have no gradient.

    Nothing else is kept from step to step, so that a checkpoint of the parameters is all that a resumed run needs.
    While a budget is attached, the loss has no term for the rate and `router_penalty` is None. `close` takes it off.

    Args:
        model: with trainable routers, before or after it is wrapped by DDP or FSDP2. DeepSpeed keeps parameters of its
            own, which would undo the moves.
        gain: move of a step, in units of the two logits' difference, for a rate that is off by 1. The loss pushes
            back: the rate settles where both are even, nearer to the target with more gain or slower routers.
        floor: layers are kept from rates below it and above 1 - floor; 0 for no limit. Less for targets near these.

    Raises:
        ValueError: if the config has no `router_target_rate`, or routers have no bias that can be moved (other router
            types, frozen or sharded by ZeRO-3).
    """

    def __init__(self, model: nn.Module, gain: float = 0.1, floor: float = 0.02):
        if not gain > 0:
            raise ValueError(f"gain must be above 0, got {gain}")
        if not 0 <= floor < 0.5:
            raise ValueError(f"floor must be from 0 up to, but not including, 0.5, got {floor}")
        self._base = model_and_head(model)[0]
        self.config = self._base.config
        if self.config.router_target_rate is None:
            raise ValueError("RouterBudget needs a config with router_target_rate, got None")
        routers = [router for _, router in _routers(model)]
        if any(not router.bias.requires_grad or router.bias.numel() != 2 for router in routers):
            raise ValueError("RouterBudget moves the routers' biases, which are frozen or sharded away in this model")
        self.gain, self.floor = gain, floor
        super().__init__(model)
        for part in (self._base, *routers):
            part.rate_is_held = True

    @torch.no_grad()
    def step(self) -> None:
        """Moves the biases by what was counted since the last call; every process has to call it."""
        layers, table = self._counter.take()
        if not layers:
            return
        target = self.config.router_target_rate
        active, tokens = table[:, 0], table[:, 1]
        rates = active / tokens.clamp_min(1)
        if self.config.router_target_scope == "layer":
            missed = rates - target
        else:
            floor = min(self.floor, target / 2, (1 - target) / 2)
            missed = active.sum() / tokens.sum().clamp_min(1) - target
            if floor > 0:
                shut, open_ = (rates - floor) / floor, (rates - (1 - floor)) / floor
                missed = missed + shut.clamp_max(0) + open_.clamp_min(0)
        moves = torch.where(tokens > 0, self.gain / 2 * missed, 0)
        biases = [self._counter.routers[layer].bias for layer in layers]
        pairs = torch.stack([moves, -moves], 1).to(biases[0].dtype).unbind()
        torch._foreach_add_(biases, [_like(pair, bias) for pair, bias in zip(pairs, biases, strict=True)])

    def close(self) -> None:
        super().close()
        for part in (self._base, *self._counter.routers.values()):
            part.rate_is_held = False


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A value that every process holds, of the dtype, device and sharding of a parameter."""
    value = value.to(parameter.device, parameter.dtype)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=parameter.placements
    )


class CollapseWarning:
    """Warns when a router stops choosing: (nearly) no token or (nearly) every token of a layer is activated.

    It warns once a layer and side, and again only after that layer's rate has come back in between.

    Args:
        patience: checks in a row that must find the layer there: at the beginning of a training many come back soon.
    """

    def __init__(self, low: float = 0.001, high: float = 0.999, patience: int = 1):
        if not 0 <= low < high <= 1:
            raise ValueError(f"0 <= low < high <= 1 must hold, got low={low} and high={high}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.low, self.high, self.patience = low, high, patience
        # Of each layer the side, and how many checks in a row have found it there.
        self._found: dict[int, tuple[int, int]] = {}

    def check(self, statistics: dict[int, RouterStatistics], step: int) -> list[str]:
        """Logs, and returns, one message for each layer that has newly collapsed."""
        messages = []
        for layer, seen in statistics.items():
            side = -1 if seen.activation_rate <= self.low else int(seen.activation_rate >= self.high)
            before, times = self._found.get(layer, (0, 0))
            times = times + 1 if side == before else 1
            self._found[layer] = side, times
            if side and times == self.patience:
                consequence = "its attention is off" if side < 0 else "it no longer selects"
                messages.append(
                    f"step {step}: the router of layer {layer} activates {seen.activation_rate:.1%} of the tokens: "
                    f"{consequence}. A lower learning rate for the routers, a longer warm-up or another "
                    "router_temperature_init may help"
                )
                logger.warning(messages[-1])
        return messages


def statistics_as_logs(statistics: dict[int, RouterStatistics]) -> dict[str, float]:
    """`router/activation_rate_{layer}`, `router/temperature_{layer}` and the mean rate `router/activation_rate`."""
    logs = {}
    for layer, seen in statistics.items():
        logs[f"router/activation_rate_{layer}"] = round(seen.activation_rate, 6)
        logs[f"router/temperature_{layer}"] = round(seen.temperature, 6)
    if statistics:
        rates = [seen.activation_rate for seen in statistics.values()]
        logs["router/activation_rate"] = round(sum(rates) / len(rates), 6)
    return logs


class RouterCallback(TrainerCallback):
    """Adds activation rate and temperature of each layer to the Trainer's training logs, and warns of collapse.

    `RouterCallback.attach(trainer)` puts it before the callbacks that write to TensorBoard and the like, so that these
    see the numbers; given as `callbacks=[RouterCallback()]` the numbers reach `trainer.state.log_history` only.
    """

    def __init__(self, low: float = 0.001, high: float = 0.999):
        self._warning = CollapseWarning(low, high)
        self._monitor: RouterMonitor | None = None

    @classmethod
    def attach(cls, trainer: Trainer, **kwargs) -> "RouterCallback":
        callback = cls(**kwargs)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Not a subclass's, which would be told of an end at the beginning.
        RouterCallback.on_train_end(self, args, state, control)
        self._monitor = RouterMonitor(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._monitor is None or logs is None or "loss" not in logs:
            return
        statistics = self._monitor.read()
        added = statistics_as_logs(statistics)
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)
        if state.is_world_process_zero:
            self._warning.check(statistics, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


class _BudgetCallback(TrainerCallback):
    """Keeps a `RouterBudget` while a Trainer trains."""

    def __init__(self, gain: float):
        self._gain, self._budget = gain, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        self._budget = RouterBudget(model, self._gain)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._budget.step()

    def on_train_end(self, args, state, control, **kwargs):
        if self._budget is not None:
            self._budget.close()
            self._budget = None


class _OptimizerSteps(GraphedUpdate):
    """Stands in the place of an optimizer's `step`, which a Trainer calls, and replays it where it can."""

    # A scheduler warns where its mark is missing from `step`.
    _wrapped_by_lr_sched = True

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer)
        self._step = optimizer.step

    @classmethod
    def install(cls, optimizer: torch.optim.Optimizer) -> None:
        """Does nothing for an optimizer whose steps cannot be captured, or that has hooks."""
        if isinstance(optimizer.step, cls):
            return
        own = vars(optimizer).get("step")
        # A step that others have written may do more than a graph holds, such as count on the host.
        known = type(optimizer) is MuonAdamW or type(optimizer).__module__.startswith("torch.optim.")
        if known and (own is None or hasattr(own, "_wrapped_by_lr_sched")) and _can_be_captured(optimizer):
            optimizer.step = cls(optimizer)

    @classmethod
    def remove(cls, optimizer: torch.optim.Optimizer | None) -> None:
        """Gives an optimizer its own `step` back; graph and gradients are freed with this one."""
        if isinstance(getattr(optimizer, "step", None), cls):
            before = optimizer.step._step
            del optimizer.step
            if optimizer.step != before:
                # As a scheduler has wrapped it.
                optimizer.step = before

    def __call__(self, closure=None):
        # Hooks may have come, and a checkpoint may have brought other settings.
        if closure is not None or not _can_be_captured(self.optimizer):
            self.forget()
            return self._step(closure)
        return super().__call__()

    def _run(self) -> None:
        self._step()


def _can_be_captured(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a graph of an optimizer's step does what its step does: it waits for nothing, and no hook runs."""
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return (
        "capturable" in optimizer.defaults
        and all(map(captures_group, optimizer.param_groups))
        and not (own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)
    )


def refuse_other_parallelism(config: Any) -> None:
    """Raises ValueError where Accelerate's `ParallelismConfig` asks for what it cannot do to a SeqBoat."""
    asked = [] if config is None else config.non_dp_dim_names
    if asked:
        name = f"{asked[0]}_size"
        raise ValueError(
            f"ParallelismConfig {name}={getattr(config, name)} cannot be used: Accelerate cuts attention layers of "
            "other kinds, and no recurrence. For rows longer than a GPU holds see context_parallel and train_lm "
            "--context_parallel (docs/scaling.md)"
        )


class SeqBoatTrainerMixin:
    """Gives a Trainer the right weight decay: `class MyTrainer(SeqBoatTrainerMixin, SFTTrainer): pass`. The argument
    `use_liger_kernel` sets the config's `loss_implementation`. Where the loss is not the model's own (SFTTrainer's,
    one of `compute_loss_func`, label smoothing), the pull to `router_target_rate` is added to it.

    Args:
        cuda_graphs: run forward and backward of a batch as one CUDA graph (`GraphedStep`), and the optimizer as
            another where it is `MuonAdamW` or one of torch's own, fused or capturable: with one GPU a process, in
            float32 or bf16, where batches are of one shape. True: or raise ValueError; the loss is then the model's
            own, whatever `compute_loss` is. "auto": where this can be had and gives what the Trainer would compute,
            else op by op, with one warning that says why; on a CPU silently so.
        router_gain: hold the routers to the config's `router_target_rate` by a `RouterBudget` of this gain.
    """

    def __init__(self, *args, cuda_graphs: bool | str = False, router_gain: float | None = None, **kwargs):
        if cuda_graphs not in (True, False, "auto"):
            raise ValueError(f"cuda_graphs must be True, False or 'auto', got {cuda_graphs!r}")
        super().__init__(*args, **kwargs)
        refuse_other_parallelism(getattr(self.accelerator, "parallelism_config", None))
        if router_gain is not None:
            if self.is_deepspeed_enabled:
                raise ValueError("router_gain does not go with DeepSpeed, which keeps parameters of its own")
            if self.model is not None:
                # Says at once what cannot be held.
                RouterBudget(self.model, router_gain).close()
            self.add_callback(_BudgetCallback(router_gain))
        if self.args.use_liger_kernel:
            # The Trainer looks a model type up in Liger's own table, which does not have this one.
            self.model.config.loss_implementation = "liger"
        self._graphed: GraphedStep | None = None
        self.cuda_graphs, self._graphs_are_optional = bool(cuda_graphs), cuda_graphs == "auto"
        self._graphed_scale, self._graphed_calls = 1.0, 0
        self._head, self._added, self._penalty = None, False, None
        reasons = {
            "it needs a GPU": self.args.device.type != "cuda",
            "each process has one GPU": self.args.n_gpu > 1,
            "a sharded model is not whole in any process": self.is_fsdp_enabled or self.is_deepspeed_enabled,
            "fp16 scales its loss outside the graph; use bf16": self.accelerator.mixed_precision == "fp16",
            "a compiled model makes graphs of its own": self.args.torch_compile,
            "gradient_checkpointing reads the random state in every step": self.args.gradient_checkpointing,
            "the loss must be the model's": self.compute_loss_func is not None or self.label_smoother is not None,
            "compute_loss is not Trainer's own": self._graphs_are_optional and not self._computes_the_models_loss(),
        }
        reason = next((text for text, applies in reasons.items() if applies), None)
        if cuda_graphs and reason is not None:
            if not self._graphs_are_optional:
                raise ValueError(f"cuda_graphs cannot be used: {reason}")
            self._run_op_by_op(reason)

    def _computes_the_models_loss(self) -> bool:
        inherited = super().compute_loss.__func__ is Trainer.compute_loss
        return inherited and type(self).compute_loss is SeqBoatTrainerMixin.compute_loss

    def _run_op_by_op(self, reason: str) -> None:
        self.cuda_graphs, self._graphed = False, None
        # It would keep the gradients of a step until the next has computed its own.
        _OptimizerSteps.remove(self._plain_optimizer())
        if self.args.device.type == "cuda":
            logger.warning_once(f"training steps run op by op, not as CUDA graphs: {reason}")

    def _plain_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that Accelerate has wrapped."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            # An optimizer may live longer than its Trainer, and go on elsewhere.
            _OptimizerSteps.remove(self._plain_optimizer())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None, **kwargs
    ):
        compute = super().compute_loss
        target = getattr(getattr(self.model, "config", None), "router_target_rate", None)
        replaced = self.compute_loss_func is not None or self.label_smoother is not None
        own = compute.__func__ is Trainer.compute_loss and not replaced
        if own or target is None or not model.training or "labels" not in inputs:
            return compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if self._head is None:
            base, self._head = model_and_head(model)
            base.register_forward_hook(self._keep_penalty)
            self._head.register_forward_hook(self._notice_loss)
        labels, self._penalty, self._added = inputs["labels"], None, False
        result = compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        penalty, self._penalty = self._penalty, None
        if penalty is None or self._added:
            return result
        term = self._head._with_router_penalty(torch.zeros_like(penalty), penalty, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # As the Trainer does for a loss that is a mean over the labels of all processes.
            term = term * self.accelerator.num_processes
        if return_outputs:
            loss, outputs = result
            return loss + term.to(loss.device), outputs
        return result + term.to(result.device)

    def _keep_penalty(self, module: nn.Module, args: tuple, output) -> None:
        penalty = getattr(output, "router_penalty", None)
        # A second forward without gradients, for metrics, is none that the loss was made of.
        if penalty is not None and penalty.requires_grad:
            self._penalty = penalty

    def _notice_loss(self, module: nn.Module, args: tuple, output) -> None:
        # A head that was given labels has added the term itself; TRL's forward in its place has not.
        if getattr(output, "router_penalty", None) is not None and output.loss is not None:
            self._added = True

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self.cuda_graphs:
            try:
                return self._graphed_step(model, inputs, num_items_in_batch)
            except ValueError as error:
                if not self._graphs_are_optional:
                    raise
                self._run_op_by_op(str(error))
        return super().training_step(model, inputs, num_items_in_batch)

    def _graphed_step(self, model: nn.Module, inputs: dict, num_items: Tensor | int | None) -> Tensor:
        """What `Trainer.training_step` returns, and the gradients that it leaves."""
        model.train()
        batch = dict(self._prepare_inputs(inputs))
        if num_items is None:
            scale = 1 / self.current_gradient_accumulation_steps
        else:
            batch["num_items_in_batch"] = torch.as_tensor(num_items, device=self.args.device)
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1.0
        if self._graphed is None or self._graphed.given is not model or self._graphed_scale != scale:
            self._graphed, self._graphed_scale, self._graphed_calls = GraphedStep(model, 1 / scale), scale, 0
        optimizer = self._plain_optimizer()
        if not self._graphed.captured and isinstance(optimizer.step, _OptimizerSteps):
            # Its gradients lie in the memory of the graph before, which the next one needs.
            optimizer.step.forget()
        loss = self._graphed(**batch) * scale
        self._graphed_calls += 1
        # In each step: `MuonAdamW` finds out in its first one whether it can be fused.
        _OptimizerSteps.install(optimizer)
        # A capture costs as much as many steps. Those behind an overflow come to an end by themselves.
        changes = self._graphed.captures - self._graphed.overflows
        if self._graphs_are_optional and 50 * changes > 200 + self._graphed_calls:
            self._run_op_by_op("batches change their shape")
        return loss


class SeqBoatTrainer(SeqBoatTrainerMixin, Trainer):
    """transformers' Trainer, with weight decay on the matrices only, and with `cuda_graphs`."""
