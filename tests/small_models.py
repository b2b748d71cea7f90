"""Small causal models whose routers and attention really decide something, for tests of generation and caches."""

import copy
from collections.abc import Callable

import torch

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.ssm_seqboat import RECURRENCES

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 2,
    "qk_head_dim": 8,
    "v_head_dim": 24,
    "memory_size": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


_MADE: dict[tuple, tuple[torch.nn.Module, torch.Tensor]] = {}


def copy_of(make: Callable[..., torch.nn.Module], *arguments, **overrides) -> torch.nn.Module:
    """What `make` makes of these and of nothing else, with the random numbers that come after it. The first one is
    kept, for a copy takes a third to a tenth of the time."""
    recurrence = RECURRENCES.get(overrides.get("ssm_type", "ema"))
    defaults = torch.get_default_dtype(), torch.get_default_device()
    key = make, recurrence, repr((arguments, sorted(overrides.items()), defaults))
    if key not in _MADE:
        _MADE[key] = make(*arguments, **overrides), torch.get_rng_state()
    model, numbers = _MADE[key]
    torch.set_rng_state(numbers)
    return copy.deepcopy(model)


def small_lm(seed: int = 0, **overrides) -> SeqBoatForCausalLM:
    """A causal model in eval mode. Its parameters are wider than at the start of training: about half of the tokens
    are activated, and attention and positions change the logits."""
    return copy_of(_small_lm, seed, **overrides)


def _small_lm(seed: int, **overrides) -> SeqBoatForCausalLM:
    torch.manual_seed(seed)
    model = SeqBoatForCausalLM(SeqBoatConfig(**{**SMALL, **overrides})).eval()
    stds = {"router.weight": 1.0, "router.bias": 0.1, "qk_scale": 0.5, "qk_offset": 0.2, "position_bias.weight": 0.5}
    # transformers' versions draw the initial values in different orders.
    torch.manual_seed(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, model.config.hidden_size**-0.5)
        for name, parameter in model.named_parameters():
            std = next((value for key, value in stds.items() if name.endswith(key)), None)
            if std is None and "proj" in name:
                std = 0.3
            if std is not None:
                parameter.normal_(0, std)
        for layer in model.model.layers:
            _activate_half(model, layer.router)
    return model


def _activate_half(model: SeqBoatForCausalLM, router: torch.nn.Module) -> None:
    """Sets the bias so that the router activates half of the tokens of a sample."""
    if not router.learned:
        return
    inputs = []
    handle = router.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    model(random_ids(4, 40, seed=99, vocab_size=model.config.vocab_size), use_cache=False)
    handle.remove()
    skip, run = (inputs[0] @ router.weight.T).unbind(-1)
    router.bias.copy_(torch.stack([torch.zeros(()), (skip - run).median()]))


def random_ids(batch: int, length: int, seed: int = 0, vocab_size: int = 40) -> torch.Tensor:
    """(batch, length) int64 in 3..vocab_size - 1."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[torch.Tensor], pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of several lengths as `input_ids` and `attention_mask`, padded on the left."""
    width = max(row.shape[0] for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - row.shape[0] :] = row
        mask[index, width - row.shape[0] :] = 1
    return {"input_ids": ids, "attention_mask": mask}
