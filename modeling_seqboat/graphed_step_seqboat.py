"""A training step as one CUDA graph: forward and backward without a launch from the host, nor a wait for the device.

A step of a SeqBoat launches some 70 kernels a layer, and on most hosts takes as long to launch as to run, or longer. A
graph needs shapes that do not depend on the data, whereas the number of activated tokens does: every layer gets a
capacity, measured with headroom, and its stream of activated tokens is filled up to it. The counts come back with the
loss; a step in which a layer had more tokens than room is computed again without a graph, so that results are those of
the model and not of the capacity.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Capacities are multiples of _STEP tokens, with _SPARE for layers that hardly activate any.
_STEP, _SPARE = 256, 512
# Steps over which the largest counts are remembered, for a smaller capacity.
_WINDOW = 500


class GraphedStep:
    """`loss = step(**batch)`: forward and backward of a model on a GPU, replayed as a CUDA graph.

    The loss of `model(**batch)` is computed, and gradients are added to the parameters' `.grad` as by
    `(loss / divisor).backward()`; clipping, optimiser and `zero_grad` (of either kind) stay the caller's. The first call
    runs as usual and measures, the second captures. A batch of another shape runs without a graph, and is captured in its
    place when it comes twice in a row, so rows should be of one length. Mixed precision: call it under `torch.autocast`, or give a model that autocasts itself, as
    Accelerate's `prepare` makes it.

    Args:
        model: a SeqBoat model with a head, on one CUDA device, not wrapped for data parallelism.
        divisor: micro-batches a step, for gradient accumulation.
        headroom: capacity of a layer as a multiple of the tokens that it was seen to activate.

    Attributes:
        captures: graphs captured so far. overflows: steps that were computed again without the graph.

    Raises:
        ValueError: for a model that is wrapped, not on a GPU, or whose layers cannot take the fused kernels.
    """

    def __init__(self, model: nn.Module, divisor: float = 1.0, headroom: float = 1.2):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("GraphedStep takes one process and its plain model, got a DistributedDataParallel")
        if headroom < 1 or divisor <= 0:
            raise ValueError(f"headroom must be at least 1 and divisor above 0, got {headroom} and {divisor}")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            raise ValueError(f"GraphedStep needs the whole model on one CUDA device, got {sorted(map(str, devices))}")
        if getattr(getattr(model, "config", None), "loss_implementation", "torch") != "torch":
            raise ValueError(
                f"loss_implementation={model.config.loss_implementation!r} waits for the device in every step, which a "
                "CUDA graph does not allow; use 'torch'"
            )
        self.model, self.divisor, self.headroom = model, divisor, headroom
        self.layers = [module for module in model.modules() if hasattr(module, "stream_capacity")]
        if not self.layers:
            raise ValueError(f"GraphedStep takes a SeqBoat model, got {type(model).__name__} without SeqBoat layers")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.captures = self.overflows = 0
        self._peaks: list[int] | None = None
        self._calls = 0
        self._other: dict | None = None
        self._forget()

    def _forget(self) -> None:
        self._graph = self._form = self._inputs = self._loss = self._counts = None
        self._grads: list[Tensor | None] = []
        self._capacities: list[int] = []

    def __call__(self, **batch: Tensor) -> Tensor:
        """batch: keyword arguments of the model, tensors on its device; returns the loss, (), detached."""
        form = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
        if form != self._form:
            if self._form is not None and form != self._other:
                # Once, as the last batch of an epoch: not worth a graph.
                self._other = form
                return self._backward(batch)
            self._forget()
            self._peaks, self._form, self._other = None, form, None
        if self._peaks is None:
            return self._eager(batch)
        if self._graph is None:
            self._capture(batch)
        return self._replay(batch)

    def _backward(self, batch: dict[str, Tensor], model: Callable | None = None) -> Tensor:
        kind = self.parameters[0].device.type
        # Casts of weights belong to a step: one that autocast kept for later would tie its graph to the current stream.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            loss = (model or self.model)(**batch).loss
        (loss / self.divisor if self.divisor != 1 else loss).backward()
        return loss.detach()

    def _on_aliases(self) -> tuple[Callable, list[nn.Parameter]]:
        """The model on leaves that share the parameters' memory, and these. Where autograd adds up a gradient is tied to
        the stream on which a leaf was first used, and the parameters may be in use by a graph that the caller holds."""
        aliases = {
            name: nn.Parameter(parameter.detach(), parameter.requires_grad)
            for name, parameter in self.model.named_parameters()
        }

        def run(**batch: Tensor):
            return torch.func.functional_call(self.model, aliases, (), batch)

        return run, [parameter for parameter in aliases.values() if parameter.requires_grad]

    def _eager(self, batch: dict[str, Tensor]) -> Tensor:
        for layer in self.layers:
            layer.stream_capacity = layer.stream_count = None
        loss = self._backward(batch)
        if any(layer.stream_count is None for layer in self.layers):
            raise ValueError(
                "GraphedStep needs the fused kernels in every layer: kernel_backend 'auto' or 'triton', hidden_act "
                "'silu', and no value_dropout, attention_dropout or laplace attention"
            )
        self._remember(torch.cat([layer.stream_count for layer in self.layers]).tolist())
        return loss

    def _remember(self, counts: list[int]) -> None:
        before = self._peaks or [0] * len(counts)
        self._peaks = [max(pair) for pair in zip(counts, before, strict=True)]

    def _room(self) -> list[int]:
        # More than all tokens is cut to that by the layer.
        return [-(-int(self.headroom * peak + _SPARE) // _STEP) * _STEP for peak in self._peaks]

    def _capture(self, batch: dict[str, Tensor]) -> None:
        self._capacities = self._room()
        self._inputs = {name: tensor.clone() for name, tensor in batch.items()}
        torch.clear_autocast_cache()
        try:
            for layer, capacity in zip(self.layers, self._capacities, strict=True):
                layer.stream_capacity = capacity
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                state = torch.cuda.get_rng_state()
                self._backward(self._inputs, self._on_aliases()[0])  # compiles the kernels that these shapes need
                torch.cuda.set_rng_state(state)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            model, aliases = self._on_aliases()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._loss = self._backward(self._inputs, model)
                self._counts = torch.cat([layer.stream_count for layer in self.layers])
            self._grads = [alias.grad for alias in aliases]
            self._graph = graph
        finally:
            for layer in self.layers:
                layer.stream_capacity = layer.stream_count = None
        self._peaks, self._calls = None, 0
        self.captures += 1

    def _replay(self, batch: dict[str, Tensor]) -> Tensor:
        for name, tensor in batch.items():
            self._inputs[name].copy_(tensor)
        # The graph writes its gradients over what its buffers hold.
        kept = [
            grad.clone() if grad is not None and grad is own else grad
            for grad, own in zip((parameter.grad for parameter in self.parameters), self._grads, strict=True)
        ]
        self._graph.replay()
        counts = self._counts.tolist()
        if any(count > capacity for count, capacity in zip(counts, self._capacities, strict=True)):
            for parameter, grad in zip(self.parameters, kept, strict=True):
                parameter.grad = grad
            self.overflows += 1
            self._forget_graph(counts)
            return self._eager(batch)
        self._remember(counts)
        old, new = [], []
        for parameter, grad, own in zip(self.parameters, kept, self._grads, strict=True):
            if own is None:
                continue
            if grad is not None:
                old.append(grad)
                new.append(own)
            parameter.grad = own
        if old:
            torch._foreach_add_(new, old)
        loss = self._loss.clone()
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
