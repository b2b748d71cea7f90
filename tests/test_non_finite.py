"""A NaN or an infinity stays where it belongs: no token before it, no other row and no other text hears of it."""

import pytest
import torch
from helpers import tiny_config, tiny_lm, tiny_model
from torch import Tensor

from modeling_seqboat import SeqBoatCache, SeqBoatForCausalLM, SeqBoatForTokenClassification

BATCH, LENGTH, PLACE = 2, 150, 100
# The text of the token at PLACE ends before this one.
NEXT = 121
TEXTS = torch.cat([torch.full((n,), i) for i, n in enumerate((50, 1, NEXT - 51, 1, LENGTH - NEXT - 1))])
POSITIONS = torch.cat([torch.arange(NEXT), torch.arange(LENGTH - NEXT)]).expand(BATCH, -1)
CHUNKS = (90, 1, 28, 1, 1, 29)


def in_chunks(model, embeds: Tensor) -> Tensor:
    cache, parts = SeqBoatCache(model.config), zip(embeds.split(CHUNKS, 1), POSITIONS.split(CHUNKS, 1), strict=True)
    return torch.cat(
        [model(inputs_embeds=part, position_ids=at, past_key_values=cache).logits for part, at in parts], dim=1
    )


def at_once(**kwargs):
    return lambda model, embeds: model(inputs_embeds=embeds, **kwargs).logits


RUNS = {
    "plain": at_once(),
    "without_cache": at_once(use_cache=False),
    "padded": at_once(attention_mask=(torch.arange(LENGTH) != 70).long().expand(BATCH, -1)),
    "packed": at_once(seq_idx=TEXTS.expand(BATCH, -1)),
    "training": lambda model, embeds: model.train()(inputs_embeds=embeds).logits,
    "chunks": torch.no_grad()(in_chunks),
}
MODELS = {
    "ema": {},
    "truncated": {"ssm_truncation": 16},
    "s4d": {"ssm_type": "s4d"},
    "s5": {"ssm_type": "s5"},
    "relu2": {"attention_activation": "relu2", "norm_first": False},
    "laplace": {"attention_activation": "laplace", "position_embedding_type": "local"},
}


@pytest.mark.parametrize("router_type", ["tempered_softmax", "always"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_token_that_is_not_finite_reaches_no_other_text(run, overrides, router_type):
    model = tiny_lm(router_type=router_type, **overrides)
    embeds = torch.randn(BATCH, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = run(model, embeds)
    for value in (torch.nan, torch.inf):
        for channels in (slice(None), 3):
            changed = embeds.clone()
            changed[0, PLACE, channels] = value
            found = run(model, changed)
            same = [(0, slice(0, PLACE)), (1, slice(None))]
            if run in (RUNS["packed"], RUNS["chunks"]):
                same.append((0, slice(NEXT, None)))
            for row, columns in same:
                torch.testing.assert_close(found[row, columns], expected[row, columns], atol=1e-5, rtol=1e-5)
            # Nor is it hidden.
            assert not found[0, PLACE : PLACE + 5].isfinite().any()


@pytest.mark.parametrize("router_type", ["tempered_softmax", "always"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_gradients_of_other_rows_are_theirs(overrides, router_type):
    """Those of a loss over the second row, while the first has a NaN."""
    model = tiny_lm(router_type=router_type, **overrides)
    embeds = torch.randn(BATCH, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = []
    for value in (0.5, torch.nan):
        embeds[0, PLACE] = value
        given = embeds.clone().requires_grad_()
        model(inputs_embeds=given).logits[1].square().sum().backward()
        found.append(given.grad[1])
    torch.testing.assert_close(found[1], found[0])


PADDED = [
    (SeqBoatForCausalLM, {}),
    (SeqBoatForCausalLM, {"ssm_truncation": 5}),
    (SeqBoatForCausalLM, {"ssm_type": "s5", "router_type": "always"}),
    (SeqBoatForTokenClassification, {"bidirectional": True, "input_type": "values"}),
    (SeqBoatForTokenClassification, {"bidirectional": True, "input_type": "values", "norm_type": "batchnorm"}),
]


@pytest.mark.parametrize(("kind", "overrides"), PADDED)
def test_nan_under_pads_reaches_neither_loss_nor_gradients(kind, overrides):
    model, mask = tiny_model(kind, tiny_config(**overrides)).train(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = mask[1, 9:12] = mask[1, 17:] = 0
    name, width = ("input_values", ()) if "input_type" in overrides else ("inputs_embeds", (12,))
    inputs = torch.randn(2, 20, *width, generator=torch.Generator().manual_seed(3))
    found = []
    for value in (0.5, torch.nan):
        model.zero_grad()
        inputs[mask == 0] = value
        loss = model(**{name: inputs}, attention_mask=mask, labels=mask.masked_fill(mask == 0, -100)).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0])
