"""The models that are compared, all of about the same number of parameters, with random weights.

Sizes: `enwik8` is the published SeqBoat shape (39.1 M parameters; the others have 36 to 40 M), `small` is for CPUs,
    `toy` for tests.

Mamba-2 is compared where mamba_ssm is installed, and GLA, KDA and GatedDeltaNet where flash-linear-attention is.
Without mamba_ssm Mamba-2 would run a slow path that nobody uses, in transformers as in flash-linear-attention.
"""

import importlib.util
from dataclasses import dataclass

import torch
from measuring import autocast
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM

VOCAB = 264
# Package that brings the kernels of a model.
PACKAGES = {"mamba2": "mamba_ssm", "gla": "fla", "kda": "fla", "gated_deltanet": "fla"}
MODELS = ("seqboat", "seqboat-torch", "llama", "mistral", *PACKAGES)
# SDPA's causal flag in place of a mask: transformers builds one where it sees a stream being captured, which would
# keep a graph from the flash kernel that the same model takes outside of it.
UNMASKED = "unmasked_sdpa"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True)
class Size:
    """Shapes of one size of every model."""

    seqboat: dict[str, int]
    hidden: int
    layers: int
    intermediate: int
    heads: int
    window: int
    mamba_layers: int


SIZES = {
    "enwik8": Size({}, 512, 12, 1368, 8, 1024, 22),
    "small": Size(
        {"hidden_size": 256, "num_hidden_layers": 4, "v_head_dim": 512, "qk_head_dim": 64, "memory_size": 256},
        256, 4, 512, 4, 256, 6,
    ),
    "toy": Size(
        {
            "hidden_size": 16, "num_hidden_layers": 2, "v_head_dim": 24, "qk_head_dim": 8, "memory_size": 8,
            "state_size": 2,
        },
        16, 2, 32, 2, 8, 2,
    ),
}  # fmt: skip


def default_size(device: torch.device) -> str:
    return "enwik8" if device.type == "cuda" else "small"


def seqboat(device: torch.device, backend: str = "auto", size: str | None = None) -> SeqBoatForCausalLM:
    torch.manual_seed(0)
    config = SeqBoatConfig(kernel_backend=backend, **SIZES[size or default_size(device)].seqboat)
    return SeqBoatForCausalLM(config).to(device)


def _transformer_shape(size: Size) -> dict[str, int | bool]:
    return {
        "vocab_size": VOCAB, "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "intermediate_size": size.intermediate, "num_attention_heads": size.heads,
        "max_position_embeddings": 1 << 20, "tie_word_embeddings": True,
    }  # fmt: skip


def build(name: str, device: torch.device, size: str | None = None) -> nn.Module:
    """A model by its name, of MODELS; seqboat-torch is SeqBoat without kernels.

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: where the package that it needs is not installed.
    """
    size = size or default_size(device)
    shape = SIZES[size]
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        raise ModuleNotFoundError(f"{name} needs the package {PACKAGES[name]}, which is not installed")
    if name in ("seqboat", "seqboat-torch"):
        return seqboat(device, "torch" if name == "seqboat-torch" else "auto", size)
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_transformer_shape(shape), attn_implementation="sdpa"))
    elif name == "mistral":
        config = MistralConfig(
            **_transformer_shape(shape), num_key_value_heads=shape.heads, sliding_window=shape.window,
            attn_implementation="sdpa",
        )  # fmt: skip
        model = MistralForCausalLM(config)
    elif name == "mamba2":
        model = Mamba2ForCausalLM(mamba2_config(shape))
    elif name == "gla":
        from fla.models import GLAConfig, GLAForCausalLM

        model = GLAForCausalLM(
            GLAConfig(
                vocab_size=VOCAB, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_heads=4,
                intermediate_size=shape.intermediate, tie_word_embeddings=True,
            )
        )  # fmt: skip
    elif name == "kda":
        from fla.models import KDAConfig, KDAForCausalLM

        model = KDAForCausalLM(
            KDAConfig(
                vocab_size=VOCAB, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_heads=shape.heads,
                head_dim=shape.hidden // shape.heads, intermediate_size=shape.intermediate, tie_word_embeddings=True,
            )
        )  # fmt: skip
    elif name == "gated_deltanet":
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

        # Keys and values as wide as the GLA's: its own default has heads of 256 and six matrices of hidden².
        model = GatedDeltaNetForCausalLM(
            GatedDeltaNetConfig(
                vocab_size=VOCAB, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_heads=4,
                head_dim=shape.hidden // 8, expand_v=2.0, intermediate_size=shape.intermediate,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    else:
        raise ValueError(f"no model {name!r}: known are {', '.join(MODELS)}")
    return model.to(device)


def mamba2_config(shape: Size) -> Mamba2Config:
    head = min(64, shape.hidden)
    return Mamba2Config(
        vocab_size=VOCAB, hidden_size=shape.hidden, num_hidden_layers=shape.mamba_layers, head_dim=head,
        num_heads=2 * shape.hidden // head, expand=2, n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip


@torch.no_grad()
def set_activation_rate(model: SeqBoatForCausalLM, ids: Tensor, rate: float) -> None:
    """Moves each router's bias so that this share of these tokens is activated, layer by layer in one forward."""

    def shift(router, args):
        logits = torch.nn.functional.linear(args[0].float(), router.weight.float())
        margin = (logits[..., 1] - logits[..., 0]).flatten()
        order = margin.sort().values
        cut = order[min(int((1 - rate) * len(order)), len(order) - 1)] + {0: 1.0, 1: -1.0}.get(rate, 0.0)
        router.bias.copy_(torch.stack([cut, torch.zeros_like(cut)]).to(router.bias.dtype))

    for layer in model.model.layers:
        layer.router.weight.normal_(0, 0.02)
    handles = [layer.router.register_forward_pre_hook(shift) for layer in model.model.layers]
    with autocast(ids.device):
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
