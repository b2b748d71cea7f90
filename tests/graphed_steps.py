"""What the tests of graphed steps share, on a GPU and of one that is emulated on the CPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

from modeling_seqboat.graphed_step_seqboat import GraphedStep, GraphedUpdate

_nothing = SimpleNamespace(wait_stream=lambda other: None)
# torch.cuda without a device: streams and captures do nothing.
CUDA_STAND_INS = {
    "Stream": lambda: _nothing,
    "current_stream": lambda *args: _nothing,
    "stream": lambda stream: nullcontext(),
    "get_rng_state": lambda: None,
    "set_rng_state": lambda state: None,
    "synchronize": lambda *args: None,
    "empty_cache": lambda: None,
    "CUDAGraph": SimpleNamespace,
    "graph": lambda graph, **options: nullcontext(),
}


class EmulatedGraph(GraphedStep):
    """On a CPU: a replay runs the captured step again and writes where the graph would have written."""

    def __init__(self, model, divisor=1.0, headroom=1.2):
        self.given, self.divisor, self.headroom, self.device = model, divisor, headroom, torch.device("cpu")
        self.parallel = model if isinstance(model, DistributedDataParallel) else None
        self.model = model if self.parallel is None else model.module
        self.layers = list(self.model.model.layers)
        self._modules = list(self.model.modules())
        self.captures = self.overflows = self._calls = 0
        self._peaks = self._other = None
        self._in_capture = 0
        self._forget()

    def _backward(self, batch, model=None, check=False):
        counted = [(tensor, tensor.clone()) for tensor in self._written_by_hooks()]
        loss = super()._backward(batch, model, check)
        if self._in_capture:
            self._in_capture -= 1
            if not self._in_capture:
                # The second of a capture's calls is recorded, and runs nothing.
                for tensor, before in counted:
                    tensor.copy_(before)
        return loss

    def _capture(self, batch):
        self._in_capture = 2
        super()._capture(batch)
        capacities = self._capacities

        def replay():
            with self._counting(capacities):
                run, aliases = self._on_aliases({})
                self._loss.copy_(self._backward(self._inputs, run))
                self._counts.copy_(torch.cat([layer.stream_count for layer in self.layers]))
                for own, alias in zip(self._grads, aliases, strict=True):
                    own.copy_(alias.grad)

        self._graph.replay = replay


class EmulatedUpdate(GraphedUpdate):
    """On a CPU: a capture runs nothing, and a replay runs what was captured."""

    recording = False
    replays = 0

    def _run(self):
        if not self.recording:
            super()._run()

    def _capture(self):
        self.recording = True
        graph = super()._capture()
        self.recording = False

        def replay():
            self.replays += 1
            with self._rates_on_device():
                self._run()

        graph.replay = replay
        return graph


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def set_rates(model, bias: float) -> None:
    """The larger the bias, the fewer tokens are activated, in all layers."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.bias.copy_(torch.tensor([bias, 0.0]))


def check_that_an_overflow_is_computed_again(step, model, ids, few: float, **tolerance) -> None:
    """Captures a graph with the router bias `few`, then has all tokens activated."""
    set_rates(model, few)
    for _ in range(2):
        step(input_ids=ids, labels=ids)
    set_rates(model, -30.0)
    model.zero_grad()
    loss = step(input_ids=ids, labels=ids)
    found = gradients(model)
    model.zero_grad()
    expected = model(ids, labels=ids, use_cache=False).loss
    expected.backward()
    assert step.overflows == 1 and torch.equal(loss, expected.detach())
    torch.testing.assert_close(found, gradients(model), **tolerance)
    assert all(layer.stream_capacity is None and layer.stream_count is None for layer in model.model.layers)
    step(input_ids=ids, labels=ids)
    assert step.captures == 2 and step.overflows == 1
