"""torch.compile of a training step: same gradients as eager, and no recompilation once 0, 1, some and all tokens of a
batch have been activated."""

import copy

import pytest
import torch

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM

COUNTS = ("none", "one", "some", "all")


def set_activated(model, batch, wanted: str) -> None:
    """Sets the routers' biases, layer by layer, so that `wanted` of the batch's tokens activate in each."""
    tokens = batch["input_ids"].numel()
    count = {"none": 0, "one": 1, "some": tokens // 3, "all": tokens}[wanted]
    for layer in model.model.layers:
        seen = []
        handle = layer.router.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        router = layer.router
        with torch.no_grad():
            difference = (seen[0] @ (router.weight[1] - router.weight[0])).flatten().sort(descending=True).values
            edges = torch.cat([difference[:1] + 1, difference, difference[-1:] - 1])
            router.bias.copy_(torch.stack([edges[count : count + 2].mean(), torch.zeros(())]))


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_step_compiles_once(checkpointing):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny")).train()
    model = copy.deepcopy(eager)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")

    def step(wanted: str, seed: int) -> None:
        ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids, "labels": ids}
        set_activated(eager, batch, wanted)
        model.load_state_dict(eager.state_dict())
        results = []
        for one in (eager, compiled):
            one.zero_grad()
            out = one(**batch, output_router_probs=True)
            out.loss.backward()
            results.append((out.loss.detach(), {n: p.grad.clone() for n, p in one.named_parameters()}))
        expected = {"none": 0, "one": 1, "some": ids.numel() // 3, "all": ids.numel()}[wanted]
        assert all(int((probs > 0).sum()) == expected for probs in out.router_probs)
        gradients = {name.removeprefix("_orig_mod."): grad for name, grad in results[1][1].items()}
        torch.testing.assert_close((results[1][0], gradients), results[0], rtol=1e-4, atol=1e-5)

    for seed, wanted in enumerate(COUNTS):
        step(wanted, seed)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, wanted in enumerate(reversed(COUNTS)):
            step(wanted, 10 + seed)
