"""A truncated EMA stays cut, however long the text: its state is made anew from the inputs that it stands for, in a
long forward, over chunks and while decoding (P9, P18)."""

import copy

import pytest
import torch

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM, cache_seqboat, ssm_seqboat

TRUNCATION = 7


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(ssm_seqboat, "RENEWED_COLUMNS", 16)
    monkeypatch.setattr(cache_seqboat.SeqBoatCacheLayer, "renewed_columns", 8)


def model_of(**overrides):
    torch.manual_seed(0)
    return SeqBoatForCausalLM(SeqBoatConfig.from_preset("tiny", ssm_truncation=TRUNCATION, **overrides)).eval()


def text_and_mask():
    ids = torch.randint(0, 200, (3, 81), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :20], mask[1, -10:], mask[2, 25:45] = 0, 0, 0
    return ids, mask


def logits_and_gradients(model, ids, **inputs):
    model.zero_grad()
    logits = model(ids, use_cache=False, **inputs).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_forward_in_pieces_is_the_same_forward(packed, monkeypatch):
    model = model_of()
    ids, mask = text_and_mask()
    inputs = {"attention_mask": mask}
    if packed:
        ids, inputs = ids[:1], {"cu_seq_lens_q": torch.tensor([0, 13, 16, 40, 81])}
    want, expected = logits_and_gradients(model, ids, **inputs)
    monkeypatch.setattr(ssm_seqboat, "RENEWED_COLUMNS", 16)
    got, found = logits_and_gradients(model, ids, **inputs)
    real = mask.bool() if not packed else torch.ones_like(ids).bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("recording", [False, True])
def test_chunks_and_steps_equal_the_full_forward(static, recording, often):
    if static and recording:
        pytest.skip("a static cache cannot roll back")
    model = model_of()
    ids, mask = text_and_mask()
    cache, logits = SeqBoatCache(model.config, static=static), []
    if recording:
        cache.activate_past_recording()
    borders = [0, 5, 40, 41, 42, 60, *range(61, 82)]
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        for first, end in zip(borders, borders[1:], strict=False):
            chunk = {"attention_mask": mask[:, :end], "past_key_values": cache}
            logits.append(model(ids[:, first:end], **chunk).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], want[real], rtol=1e-4, atol=1e-5)


def test_the_state_depends_on_the_columns_fed_alone(often, tmp_path):
    """A saved and resumed state goes on bit for bit, wherever it was cut."""
    model = model_of()
    ids, _ = text_and_mask()
    with torch.no_grad():
        whole = SeqBoatCache(model.config)
        cut = SeqBoatCache(model.config)
        for at in range(30):
            model(ids[:, at : at + 1], past_key_values=whole)
            model(ids[:, at : at + 1], past_key_values=cut)
            if at % 3 == 0:
                cut.save(tmp_path / "state")
                cut = SeqBoatCache.load(tmp_path / "state", model.config)
    for (name, mine), (_, theirs) in zip(whole.tensors(), cut.tensors(), strict=True):
        assert torch.equal(mine, theirs), name


def test_rounding_does_not_pile_up_with_slow_decays(monkeypatch):
    """Against float64 on the last tokens alone, which are all that the kernel sees."""
    torch.manual_seed(0)
    config = SeqBoatConfig(
        vocab_size=29, hidden_size=8, num_hidden_layers=1, state_size=3, qk_head_dim=4, v_head_dim=6, memory_size=5,
        ssm_truncation=8, router_type="never", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = SeqBoatForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].ssm.alpha.fill_(-17.0)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(3, 29, (1, 60_000), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = exact(ids[:, -30:], use_cache=False).logits[:, -5:]

        def error(renewed):
            monkeypatch.setattr(ssm_seqboat, "RENEWED_COLUMNS", renewed)
            got = model(ids, use_cache=False, logits_to_keep=5).logits
            return float((got - want).abs().max() / want.abs().max())

        often, never = error(1_000), error(10**9)
    assert often < 1e-5 and often < 0.5 * never


@pytest.mark.parametrize("static", [False, True])
def test_rounding_does_not_pile_up_while_decoding(static, monkeypatch):
    """Step by step, without the state being made anew from the last inputs; against float64 on these alone."""
    monkeypatch.setattr(cache_seqboat.SeqBoatCacheLayer, "renewed_columns", 10**9)
    torch.manual_seed(0)
    config = SeqBoatConfig.from_preset(
        "tiny", ssm_truncation=8, router_type="never", num_hidden_layers=1, state_size=3
    )
    model = SeqBoatForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].ssm.alpha.fill_(-17.0)
        exact, cache = copy.deepcopy(model).double(), SeqBoatCache(config, static=static)
        ids = torch.randint(3, 29, (1, 3_000), generator=torch.Generator().manual_seed(1))
        model(ids[:, :5], past_key_values=cache)
        # What a million steps would have left behind.
        cache.layers[0].ssm_state[:, 0] += 1e-2
        got = torch.cat([model(column, past_key_values=cache).logits for column in ids[:, 5:].split(1, dim=1)], dim=1)
        for end in (20, 400, 3_000):
            want = exact(ids[:, end - 16 : end], use_cache=False).logits[:, -1]
            assert (got[:, end - 6] - want).abs().max() < 3e-6 * want.abs().max()
