"""What every kind of router and recurrence has to keep, as checks on one model: batches, packing, chunks, the
cache."""

import torch
from helpers import assert_same_cache, cache_tensors, spread_row, token_ids
from torch import Tensor

from modeling_seqboat import SeqBoatCache

LENGTHS = (5, 1, 9, 2, 70)
SPREAD = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def packed_forms() -> list[dict[str, Tensor]]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    index = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
    return [{"position_ids": positions}, {"seq_idx": index}, {"cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0)}]


@torch.no_grad()
def check_padding(model) -> None:
    """Outputs, cache and what follows equal the unpadded row's; what stands under the pads is not read."""
    ids, following = token_ids(11), token_ids(1, 3, seed=5)
    expected = model(ids[None])
    state = cache_tensors(expected.past_key_values)
    continued = model(following, past_key_values=expected.past_key_values).logits
    for real in (SPREAD, torch.arange(17) >= 6, torch.arange(17) < 11):
        fills = token_ids(2, 17, seed=8)
        padded, other = (model(spread_row(ids, real, fill)[None], attention_mask=real.long()[None]) for fill in fills)
        close(padded.logits[0, real], expected.logits[0])
        assert torch.equal(padded.logits[0, real], other.logits[0, real])
        assert_same_cache(padded.past_key_values, state)
        assert_same_cache(other.past_key_values, padded.past_key_values, tolerance=0)
        close(model(following, past_key_values=padded.past_key_values).logits, continued)


@torch.no_grad()
def check_batch_mates(model) -> None:
    """A row of a padded batch equals the row alone."""
    ids = token_ids(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    outputs = model(ids, attention_mask=mask)
    for row in range(3):
        expected = model(ids[row, mask[row].bool()][None])
        close(outputs.logits[row, mask[row].bool()], expected.logits[0])
        tensors = {name: t[row : row + 1] for name, t in cache_tensors(outputs.past_key_values).items()}
        assert_same_cache(tensors, expected.past_key_values)


def check_packing(model) -> None:
    """Packed rows equal separate ones, gradients included; the cache keeps the last segment."""
    rows = [token_ids(n, seed=n) for n in LENGTHS]
    row = torch.cat(rows)[None]
    separate = [model(part[None], use_cache=True) for part in rows]
    torch.cat([single.logits[0] for single in separate]).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for form in packed_forms():
        model.zero_grad()
        outputs = model(row, use_cache=True, **form)
        close(outputs.logits[0], torch.cat([single.logits[0] for single in separate]))
        assert_same_cache(outputs.past_key_values, separate[-1].past_key_values)
        outputs.logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            scale = max(1.0, float(gradients[name].abs().max()))
            torch.testing.assert_close(
                parameter.grad, gradients[name], atol=1e-4 * scale, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
            )
    embeds = model.get_input_embeddings()(row).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **packed_forms()[1]).logits
    (gradient,) = torch.autograd.grad(logits[0, 6:15].square().sum(), embeds)
    assert torch.equal(gradient[0, :6], torch.zeros_like(gradient[0, :6]))
    assert torch.equal(gradient[0, 15:], torch.zeros_like(gradient[0, 15:]))
    model.zero_grad()


@torch.no_grad()
def check_chunks(model) -> None:
    """Any split gives the same logits and cache, in eager decode steps and in a static cache too; a position of 0
    behind a cache starts a text."""
    ids = token_ids(2, 90)
    expected = model(ids)
    splits = ([90], [1] * 8 + [82], [3, 64, 1, 1, 21], [80] + [1] * 10)
    for static in (False, True):
        for sizes in splits:
            cache = SeqBoatCache(model.config, static=static)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
            close(torch.cat(parts, dim=1), expected.logits)
            assert_same_cache(cache, expected.past_key_values)
    again, cache = token_ids(2, 6, seed=3), expected.past_key_values
    for first, end in ((0, 1), (1, 6)):
        model(again[:, first:end], position_ids=torch.arange(first, end)[None], past_key_values=cache)
    assert_same_cache(cache, model(again).past_key_values)


@torch.no_grad()
def check_causality(model) -> None:
    """What a token does depends on tokens up to it only."""
    ids = token_ids(1, 80)
    expected = model(ids, output_router_probs=True)
    for cut in (1, 13, 66):
        changed = torch.cat([ids[:, :cut], token_ids(1, 80 - cut, seed=cut)], dim=1)
        outputs = model(changed, output_router_probs=True)
        close(outputs.logits[:, :cut], expected.logits[:, :cut])
        for found, probs in zip(outputs.router_probs, expected.router_probs, strict=True):
            assert torch.equal(found[:, :cut] > 0, probs[:, :cut] > 0)


def check_gradients(model) -> None:
    """Every parameter gets a finite gradient at every length; rows of pads alone stay finite."""
    mode = model.training
    model.train()
    for length in (1, 2, 5, 65):
        model.zero_grad()
        ids, mask = token_ids(2, length), torch.ones(2, length, dtype=torch.long)
        mask[1] = 0
        outputs = model(ids, attention_mask=mask)
        (outputs.logits if "logits" in outputs else outputs.last_hidden_state).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (name, length)
    model.zero_grad()
    model.train(mode)


@torch.no_grad()
def check_rollback(model) -> None:
    """Forwards are taken back whole and in part."""
    ids, mask = token_ids(2, 46), torch.ones(2, 46, dtype=torch.long)
    mask[0, 33:37] = 0
    for remove in (0, 3, 6, 9, 16):
        cache = SeqBoatCache(model.config)
        model(ids[:, :30], past_key_values=cache)
        cache.activate_past_recording()
        for first, end in ((30, 40), (40, 41), (41, 46)):
            model(ids[:, first:end], attention_mask=mask[:, first:end], past_key_values=cache)
        cache.crop(-remove)
        assert_same_cache(cache, model(ids[:, : 46 - remove], attention_mask=mask[:, : 46 - remove]).past_key_values)


@torch.no_grad()
def check_files(model, folder) -> None:
    """Model and cache are restored bit for bit."""
    model.save_pretrained(folder / "model")
    again = type(model).from_pretrained(folder / "model").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    cache = model(token_ids(2, 30)).past_key_values
    cache.save(folder / "state.safetensors")
    loaded = SeqBoatCache.load(folder / "state.safetensors", again.config)
    assert_same_cache(loaded, cache, tolerance=0)
    step = token_ids(2, 1, seed=4)
    close(again(step, past_key_values=loaded).logits, model(step, past_key_values=cache).logits)


@torch.no_grad()
def check_generation(model) -> None:
    """Greedy search of a left-padded batch, with either cache, and beams equal their cache-free counterparts."""
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for beams in (1, 2):
        expected = model.generate(ids, use_cache=False, num_beams=beams, **options)
        for implementation in (None, "static") if beams == 1 else (None,):
            found = model.generate(ids, cache_implementation=implementation, num_beams=beams, **options)
            assert torch.equal(found, expected)
    alone = model.generate(ids[1:, 4:], **(options | {"attention_mask": mask[1:, 4:]}))
    assert torch.equal(alone[0, 5:], model.generate(ids, **options)[1, 9:])


@torch.no_grad()
def check_compiled_step(model) -> None:
    """The decode step is one graph, and does what the eager model does."""
    ids = token_ids(2, 20)
    caches = [SeqBoatCache(model.config, static=True) for _ in range(2)]
    for cache in caches:
        model(ids[:, :12], past_key_values=cache)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    for column in range(12, 20):
        token = ids[:, column : column + 1]
        found, expected = (
            run(token, past_key_values=cache).logits for run, cache in zip((compiled, model), caches, strict=True)
        )
        close(found, expected)
    assert_same_cache(*caches)
    torch._dynamo.reset()


@torch.no_grad()
def check_encoder(model) -> None:
    """Padding changes nothing, and packing resets both directions."""
    ids = token_ids(11)
    expected = model(ids[None]).last_hidden_state[0]
    for real in (SPREAD, torch.arange(17) >= 6, torch.arange(17) < 11):
        found = model(spread_row(ids, real, token_ids(17, seed=8))[None], attention_mask=real.long()[None])
        close(found.last_hidden_state[0, real], expected)
    rows = [token_ids(n, seed=n) for n in LENGTHS]
    separate = torch.cat([model(part[None]).last_hidden_state[0] for part in rows])
    for form in packed_forms():
        close(model(torch.cat(rows)[None], **form).last_hidden_state[0], separate)


# What a recurrence of any kind has to keep, in a causal model.
OF_A_RECURRENCE = (
    check_padding, check_batch_mates, check_packing, check_chunks, check_causality, check_gradients, check_rollback,
    check_generation,
)  # fmt: skip
