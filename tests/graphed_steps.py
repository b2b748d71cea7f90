"""What the tests of graphed steps share, on a GPU and of one that is emulated on the CPU."""

import torch


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
