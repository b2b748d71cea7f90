"""A training step as two CUDA graphs: `GraphedStep` runs forward and backward, `GraphedUpdate` clipping and the
optimizer, without launches from the host, and with one wait for the device between them.

A step of a SeqBoat launches some 70 kernels a layer, and on most hosts takes as long to launch as to run, or longer. A
graph needs shapes that do not depend on the data, whereas the number of activated tokens does: every layer gets a
capacity, measured with headroom, and its stream of activated tokens is filled up to it. The counts come back with the
loss; a step in which a layer had more tokens than room is computed again without a graph, so that results are those of
the model and not of the capacity.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Capacities are multiples of _STEP tokens, with _SPARE for layers that hardly activate any.
_STEP, _SPARE = 256, 512
# Steps over which the largest counts are remembered, for a smaller capacity.
_WINDOW = 500
# Gradients are averaged over processes in pieces of about this many bytes, the next being copied while one travels.
_BUCKET = 32 * 2**20


def stream_capacity(count: int, headroom: float = 1.2) -> int:
    """Room of a layer's stream that was seen to hold `count` tokens; the layer cuts it to all its tokens."""
    return -(-int(headroom * count + _SPARE) // _STEP) * _STEP


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in their order, cut into lists of one dtype and device and about `_BUCKET` bytes. Every process cuts
    alike."""
    buckets: list[list[nn.Parameter]] = []
    size, kind = 0, None
    for parameter in parameters:
        if not buckets or size + parameter.nbytes > _BUCKET or (parameter.dtype, parameter.device) != kind:
            buckets.append([])
            size, kind = 0, (parameter.dtype, parameter.device)
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def _flattened(bucket: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """A copy of a bucket's gradients in one vector, zeros where there is none, and views of it in their shapes."""
    flat = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in bucket])
    return flat, [part.view_as(p) for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True)]


def _average(flats: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replaces vectors by their means over the processes."""
    share = 1 / dist.get_world_size(group)
    for work in [dist.all_reduce(flat.mul_(share), group=group, async_op=True) for flat in flats]:
        work.wait()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replaces each parameter's gradient by its mean over the processes of `group`, in place; every process has to
    call it with the same parameters. One that has no gradient on a process counts as zero there."""
    buckets = _buckets(parameters)
    copies = [_flattened(bucket) for bucket in buckets]
    _average([flat for flat, _ in copies], group)
    for bucket, (_, views) in zip(buckets, copies, strict=True):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_([parameter.grad for parameter in bucket], views)


def _captured_by(graph: torch.cuda.CUDAGraph) -> AbstractContextManager:
    # Other threads may ask the device meanwhile, as the one that watches over NCCL does.
    return torch.cuda.graph(graph, capture_error_mode="thread_local" if dist.is_initialized() else "global")


class GraphedStep:
    """`loss = step(**batch)`: forward and backward of a model on a GPU, replayed as a CUDA graph.

    The loss of `model(**batch)` is computed, and gradients are added to the parameters' `.grad` as by
    `(loss / divisor).backward()`; clipping, optimiser and `zero_grad` (of either kind) stay the caller's. The first
    call runs as usual and measures, the second captures. A batch of another shape, or a call under other circumstances
    (training or eval mode, autocast, trainable parameters, their memory, forward hooks), runs without a graph; when it
    comes twice in a row, it is captured in its place. So rows should be of one length. Mixed precision: call it under
    `torch.autocast`, or give a model that autocasts itself, as Accelerate's `prepare` makes it.

    Forward hooks run in captures, and what they do to tensors in place is part of the graph. A module's list
    `written_by_hooks` names tensors that count each batch once, as buffers do, though it was captured or computed
    again: `RouterMonitor` and `RouterBudget` count so.

    Under data parallelism each process has a graph of its own, and captures and overflows when it does: nothing in it
    waits for another process. Gradients are averaged after the backward pass, as DistributedDataParallel does: summed
    up over micro-batches first, and not under its `no_sync()`.

    Args:
        model: a SeqBoat model with a head, on one CUDA device, as it is or wrapped by DistributedDataParallel.
        divisor: micro-batches a step, for gradient accumulation.
        headroom: capacity of a layer as a multiple of the tokens that it was seen to activate.

    Attributes:
        captures: graphs captured so far.
        overflows: steps that were computed again without the graph.

    Raises:
        ValueError: for what a graph cannot hold, before work starts: a model that is wrapped otherwise, sharded,
            compiled or not on a GPU, communication hooks, layers without the fused kernels, gradient checkpointing,
            float16 under autocast, hooks on parameters, `loss_implementation` liger, batch norm under a mask.
    """

    def __init__(self, model: nn.Module, divisor: float = 1.0, headroom: float = 1.2):
        if headroom < 1 or divisor <= 0:
            raise ValueError(f"headroom must be at least 1 and divisor above 0, got {headroom} and {divisor}")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            raise ValueError(f"GraphedStep needs the whole model on one CUDA device, got {sorted(map(str, devices))}")
        self.given, self.divisor, self.headroom = model, divisor, headroom
        self.parallel = model if isinstance(model, DistributedDataParallel) else None
        self.model = model if self.parallel is None else model.module
        self.device = next(iter(devices))
        self.layers = [module for module in model.modules() if hasattr(module, "stream_capacity")]
        if not self.layers:
            raise ValueError(f"GraphedStep takes a SeqBoat model, got {type(model).__name__} without SeqBoat layers")
        self._modules = list(model.modules())
        self.captures = self.overflows = 0
        self._peaks: list[int] | None = None
        self._calls = 0
        self._other: tuple | None = None
        self._forget()

    @property
    def captured(self) -> bool:
        """Whether there is a graph. If not, the next call may capture one."""
        return self._graph is not None

    def _forget(self) -> None:
        self._graph = self._form = self._inputs = self._loss = self._counts = None
        self._parameters: list[nn.Parameter] = []
        self._grads: list[Tensor | None] = []
        # Under data parallelism the gradients are views of these vectors, which travel as they are.
        self._flats: list[Tensor] = []
        self._capacities: list[int] = []
        # What a graph writes to must live as long as it does.
        self._hooks: list[Callable] = []

    def __call__(self, **batch: Any) -> Tensor:
        """batch: keyword arguments of the model, tensors on its device or plain values; returns the loss, ()."""
        parallel = self.parallel
        if parallel is not None and parallel.broadcast_buffers and parallel.require_forward_param_sync:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, dist.get_global_rank(parallel.process_group, 0), parallel.process_group)
        self._replayed = None
        loss = self._step(batch)
        if parallel is not None and parallel.require_backward_grad_sync:
            if self._replayed is not None:
                _average(self._replayed, parallel.process_group)
            else:
                average_gradients((p for p in self.model.parameters() if p.requires_grad), parallel.process_group)
        return loss

    def _step(self, batch: dict[str, Any]) -> Tensor:
        form = self._form_of(batch)
        if form == self._form:
            self._other = None
        elif self._form is not None and form != self._other:
            # Once, as the last batch of an epoch: not worth a graph.
            self._other = form
            return self._backward(batch)
        else:
            self._forget()
            self._peaks, self._form, self._other = None, form, None
        if self._peaks is None:
            return self._eager(batch)
        if self._graph is None:
            self._capture(batch)
        return self._replay(batch)

    def _form_of(self, batch: dict[str, Any]) -> tuple:
        """All that a graph of this call would take for granted."""
        inputs = tuple(
            (name, (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value)
            for name, value in sorted(batch.items())
        )
        kind = self.device.type
        casts = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        weights = tuple((parameter.data_ptr(), parameter.requires_grad) for parameter in self.model.parameters())
        return inputs, self.model.training, casts, weights, tuple(map(id, self._forward_hooks()))

    def _forward_hooks(self) -> list[Callable]:
        return [hook for module in self._modules for hook in module._forward_hooks.values()]

    def _written_by_hooks(self) -> list[Tensor]:
        found = {id(tensor): tensor for module in self._modules for tensor in getattr(module, "written_by_hooks", ())}
        return list(found.values())

    def _refuse(self, batch: dict[str, Any]) -> None:
        """Raises ValueError for what a graph cannot hold."""
        model, kind = self.model, self.device.type
        loss = getattr(getattr(model, "config", None), "loss_implementation", "torch")
        wrappers = (nn.DataParallel, DistributedDataParallel, torch._dynamo.eval_frame.OptimizedModule)
        sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
        masked = any(name.endswith("attention_mask") and value is not None for name, value in batch.items())
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        reasons = {
            "it takes a model that is whole in every process, as it is or wrapped by DistributedDataParallel, got "
            f"{'a sharded ' * sharded}{type(model).__name__}": isinstance(model, wrappers) or sharded,
            "gradients are averaged by the step itself, not by a communication hook": self.parallel is not None
            and bool(self.parallel._comm_hooks),
            "a sequence that is cut over processes (context_parallel) has them wait for one another": any(
                getattr(module, "parts", None) is not None for module in self._modules
            ),
            "a compiled model makes graphs of its own": any(
                module._compiled_call_impl is not None for module in self._modules
            ),
            "gradient checkpointing reads the random state in every step": model.training
            and any(getattr(module, "gradient_checkpointing", False) for module in self._modules),
            "float16 wants its loss scaled, outside the graph; use bfloat16": half,
            "hooks on parameters would not run": any(
                parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
                for parameter in model.parameters()
            ),
            f"loss_implementation={loss!r} waits for the device in every step; use 'torch'": loss != "torch",
            "batch norm under an attention_mask picks the real positions, which waits for the device; where all rows "
            "are of one length, leave the mask out": masked
            and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self._modules),
            "no parameter is trainable": not any(parameter.requires_grad for parameter in model.parameters()),
        }
        if reason := next((text for text, applies in reasons.items() if applies), None):
            raise ValueError(f"GraphedStep cannot run this: {reason}")

    def _backward(self, batch: dict[str, Any], model: Callable | None = None, check: bool = False) -> Tensor:
        kind = self.device.type
        # Casts of weights belong to a step: one that autocast kept for later would tie its graph to a stream.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            loss = (model or self.model)(**batch).loss
        if check and any(layer.stream_count is None for layer in self.layers):
            raise ValueError(
                "GraphedStep needs the fused kernels in every layer: kernel_backend 'auto' or 'triton', hidden_act "
                "'silu', and no value_dropout, attention_dropout or laplace attention"
            )
        (loss / self.divisor if self.divisor != 1 else loss).backward()
        return loss.detach()

    def _on_aliases(self, buffers: dict[str, Tensor]) -> tuple[Callable, list[nn.Parameter]]:
        """The model on leaves that share the parameters' memory, and those of them that are trained. Where autograd
        adds up a gradient is tied to the stream on which a leaf was first used, and the parameters may be in use by a
        graph that the caller holds.

        Args:
            buffers: what to use for buffers of these names.
        """
        aliases = {
            name: nn.Parameter(parameter.detach(), parameter.requires_grad)
            for name, parameter in self.model.named_parameters()
        }

        def run(**batch: Any):
            return torch.func.functional_call(self.model, aliases | buffers, (), batch)

        return run, [parameter for parameter in aliases.values() if parameter.requires_grad]

    @contextmanager
    def _counting(self, capacities: list[int] | None) -> Iterator[None]:
        """Within it layers report their counts, with these capacities; or, with None, as they come."""
        try:
            for place, layer in enumerate(self.layers):
                layer.stream_capacity = None if capacities is None else capacities[place]
                layer.counts_stream, layer.stream_count = True, None
            yield
        finally:
            for layer in self.layers:
                layer.stream_capacity = layer.stream_count = None
                layer.counts_stream = False

    def _eager(self, batch: dict[str, Any]) -> Tensor:
        self._refuse(batch)
        with self._counting(None):
            loss = self._backward(batch, check=True)
            self._remember(torch.cat([layer.stream_count for layer in self.layers]).tolist())
        return loss

    def _remember(self, counts: list[int]) -> None:
        before = self._peaks or [0] * len(counts)
        self._peaks = [max(pair) for pair in zip(counts, before, strict=True)]

    def _room(self) -> list[int]:
        return [stream_capacity(peak, self.headroom) for peak in self._peaks]

    def _capture(self, batch: dict[str, Any]) -> None:
        capacities = self._room()
        self._inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        torch.clear_autocast_cache()
        with self._counting(capacities):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                state = torch.cuda.get_rng_state()
                # Compiles the kernels that these shapes need, and leaves no trace in buffers, counts or random states.
                copies = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
                counted = [(tensor, tensor.clone()) for tensor in self._written_by_hooks()]
                self._backward(self._inputs, self._on_aliases(copies)[0])
                for tensor, before in counted:
                    tensor.copy_(before)
                torch.cuda.set_rng_state(state)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            model, aliases = self._on_aliases({})
            graph = torch.cuda.CUDAGraph()
            with _captured_by(graph):
                self._loss = self._backward(self._inputs, model)
                self._counts = torch.cat([layer.stream_count for layer in self.layers])
                copies = [] if self.parallel is None else [_flattened(bucket) for bucket in _buckets(aliases)]
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._flats = [flat for flat, _ in copies]
        self._grads = [view for _, views in copies for view in views] if copies else [alias.grad for alias in aliases]
        self._hooks = self._forward_hooks()
        self._graph, self._capacities, self._peaks, self._calls = graph, capacities, None, 0
        self.captures += 1

    def _replay(self, batch: dict[str, Any]) -> Tensor:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)
        # The graph writes its gradients over what its buffers hold.
        kept = [
            grad.clone() if grad is not None and grad is own else grad
            for grad, own in zip((parameter.grad for parameter in self._parameters), self._grads, strict=True)
        ]
        buffers = [(buffer, buffer.clone()) for buffer in (*self.model.buffers(), *self._written_by_hooks())]
        self._graph.replay()
        counts = self._counts.tolist()
        if any(count > capacity for count, capacity in zip(counts, self._capacities, strict=True)):
            for parameter, grad in zip(self._parameters, kept, strict=True):
                parameter.grad = grad
            for buffer, before in buffers:
                buffer.copy_(before)
            self.overflows += 1
            self._forget_graph(counts)
            return self._eager(batch)
        self._remember(counts)
        old, new = [], []
        for parameter, grad, own in zip(self._parameters, kept, self._grads, strict=True):
            if own is None:
                continue
            if grad is not None:
                old.append(grad)
                new.append(own)
            parameter.grad = own
        if old:
            torch._foreach_add_(new, old)
        loss = self._loss.clone()
        # The graph may be given up below, before its gradients travel.
        self._replayed = self._flats
        self._calls += 1
        if self._calls == _WINDOW:
            self._calls = 0
            if sum(self._room()) < 0.8 * sum(self._capacities):
                self._forget_graph(self._peaks)
            else:
                self._peaks = None
                self._remember(counts)
        return loss

    def _forget_graph(self, counts: list[int]) -> None:
        form = self._form
        # Gradients in the graph's memory stay valid as long as somebody holds them.
        self._forget()
        self._form = form
        self._remember(counts)


def captures_group(group: dict[str, Any]) -> bool:
    """Whether the steps of an optimizer's parameter group can be captured."""
    return bool(group["capturable"] or group.get("fused") or group.get("muon"))


class GraphedUpdate:
    """`update()`: clips gradients and steps an optimizer, replayed as a CUDA graph behind a `GraphedStep`.

    Launched one by one, clipping and an optimizer of two kinds took 9 ms of a step of 47: the host has waited for the
    step's counts, and launches while the device has nothing to do.

    A call captures once it is the second in a row with the same gradients (the same tensors, as those that a
    `GraphedStep` replays into), optimizer state and settings, and runs as usual until then, and in the steps that a
    `GraphedStep` computes again. Learning rates may change from call to call: the graph reads them from the device, in
    float32. Clearing gradients stays the caller's.

    Args:
        optimizer: on one CUDA device; `MuonAdamW`, or one of torch's that is `fused` or `capturable`. What Accelerate
            has wrapped is at its `.optimizer`.
        max_grad_norm: gradients are clipped to this norm, all parameters of the optimizer together; None for no
            clipping.
        then: functions without arguments to run behind the optimizer, in the same graph, such as the `step` of a
            `RouterBudget` in a single process. They must not wait for the device, nor for other processes.

    Attributes:
        captures: graphs captured so far.

    Raises:
        ValueError: for an optimizer whose steps cannot be captured.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None = None,
        then: Iterable[Callable[[], object]] = (),
    ):
        if "capturable" not in optimizer.defaults:
            raise ValueError(f"GraphedUpdate cannot capture the steps of {type(optimizer).__name__}: not capturable")
        self.optimizer, self.max_grad_norm, self.then = optimizer, max_grad_norm, tuple(then)
        self.captures = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._seen: tuple | None = None
        self._held: tuple = ()
        self._sent: list[float] = []
        self._rates: Tensor | None = None

    def __call__(self) -> None:
        groups, state, skipped = self.optimizer.param_groups, self.optimizer.state, ("params", "lr", "initial_lr")
        grads = [p.grad for group in groups for p in group["params"]]
        settings = [[item for item in group.items() if item[0] not in skipped] for group in groups]
        seen = tuple(map(id, grads)), id(state), settings
        if seen != self._seen:
            # Held, so that no other tensor can take an identity over.
            self._seen, self._held, self._graph = seen, (grads, state), None
            self._run()
            return
        if self._graph is None:
            self._graph = self._capture()
            self.captures += 1
        rates = [float(group["lr"]) for group in groups]
        if rates != self._sent:
            self._rates.copy_(torch.tensor(rates))
            self._sent = rates
        self._graph.replay()

    def forget(self) -> None:
        """Gives up the graph, and with it gradients, which keep a `GraphedStep`'s memory after its graph is gone."""
        self._graph = self._seen = None
        self._held = ()

    def _run(self) -> None:
        if self.max_grad_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        for function in self.then:
            function()

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Groups whose rate is a tensor, which the optimizer then does not read on the host."""
        groups = self.optimizer.param_groups
        kept = [(group["lr"], group["capturable"]) for group in groups]
        try:
            for group, rate in zip(groups, self._rates.unbind(), strict=True):
                group["lr"], group["capturable"] = rate, True
            yield
        finally:
            for group, (rate, capturable) in zip(groups, kept, strict=True):
                group["lr"], group["capturable"] = rate, capturable

    def _capture(self) -> torch.cuda.CUDAGraph:
        for group in self.optimizer.param_groups:
            if not captures_group(group):
                raise ValueError(
                    f"GraphedUpdate cannot capture the steps of this {type(self.optimizer).__name__}: make it with "
                    "fused=True or capturable=True"
                )
        device = self.optimizer.param_groups[0]["params"][0].device
        self._rates, self._sent = torch.zeros(len(self.optimizer.param_groups), device=device), []
        graph = torch.cuda.CUDAGraph()
        with self._rates_on_device(), _captured_by(graph):
            self._run()
        return graph
