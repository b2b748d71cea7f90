"""Tiny random models for the tests, with routers that activate a chosen share of the tokens."""

import subprocess
from types import SimpleNamespace

import strangers
import torch
from small_models import copy_of
from torch import Tensor

from hub_upload import verify
from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM, SeqBoatModel

MEMORY = 4


def tiny_config(**overrides) -> SeqBoatConfig:
    """Two layers, D 12, N 3, Z 6, V 10, W 4: every mechanism at a size that costs nothing."""
    values = dict(
        vocab_size=32,
        hidden_size=12,
        num_hidden_layers=2,
        state_size=3,
        qk_head_dim=6,
        v_head_dim=10,
        memory_size=MEMORY,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return SeqBoatConfig(**(values | overrides))


def randomise(model: torch.nn.Module, seed: int = 0, rate: float = 0.5) -> torch.nn.Module:
    """Moves every parameter well away from its initial value, so that each one shows in the outputs.

    Args:
        rate: 0 or 1 activates no or every token through the router's bias, anything between about half of them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if name.endswith("router.weight"):
                parameter.copy_(noise)
            elif name.endswith("router.bias"):
                parameter.copy_(torch.tensor({0: [1e3, -1e3], 1: [-1e3, 1e3]}.get(rate, [0.0, 0.0])))
            elif "qk_" in name or "position_bias" in name:
                parameter.add_(0.7 * noise)
            else:
                parameter.add_(0.2 * noise)
    return model


def tiny_model(kind: type, config: SeqBoatConfig, seed: int = 0, rate: float = 0.5) -> torch.nn.Module:
    """A model that the seed alone decides, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(kind(config), seed, rate).eval()


def _tiny(kind: type, seed: int, rate: float, **overrides) -> torch.nn.Module:
    return tiny_model(kind, tiny_config(**overrides), seed, rate)


def tiny_lm(seed: int = 0, rate: float = 0.5, **overrides) -> SeqBoatForCausalLM:
    with torch.random.fork_rng(devices=[]):
        return copy_of(_tiny, SeqBoatForCausalLM, seed, rate, **overrides)


def tiny_encoder(seed: int = 0, rate: float = 0.5, **overrides) -> SeqBoatModel:
    with torch.random.fork_rng(devices=[]):
        return copy_of(_tiny, SeqBoatModel, seed, rate, bidirectional=True, **overrides)


def token_ids(*shape: int, seed: int = 0, vocab_size: int = 32) -> Tensor:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def spread_row(ids: Tensor, real: Tensor, fill: Tensor) -> Tensor:
    """(n,) ids to the real columns of an (L,) row whose other columns are `fill`'s."""
    row = fill.clone()
    row[real] = ids
    return row


def cache_tensors(cache) -> dict[str, Tensor]:
    """A copy of every buffer by name."""
    return {name: tensor.clone() for name, tensor in cache.tensors()}


def assert_same_cache(found, expected, tolerance: float = 1e-4) -> None:
    """Every buffer equal, unused slots included; `get_seq_length` counts padding and is not compared."""
    found, expected = (item if isinstance(item, dict) else cache_tensors(item) for item in (found, expected))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def verify_by_forks(monkeypatch) -> None:
    """`verify_folder` forks its processes from one that has the libraries."""
    forked = SimpleNamespace(DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE, Popen=strangers.Popen)
    monkeypatch.setattr("hub_upload.verify.subprocess", forked)


def verify_once(monkeypatch) -> None:
    """Leaves out `verify_folder`'s second process, which reads what the first one saved."""
    run = verify._run_child
    monkeypatch.setattr(verify, "_run_child", lambda *given: run(*given) if given[2] == "first" else iter(()))
