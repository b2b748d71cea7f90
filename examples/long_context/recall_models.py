"""The models that the long-context tasks compare, of about equal size, and what they share: a cache to read a text
with, and the tasks by name.

Letters: W memory size, which is the window of the transformer with one.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from mixed_stream import MixedTask, load_pieces
from recall_tasks import CopyTask, NeedleTask, RecallTask
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.generation_seqboat import CACHE_NAME

# The examples share this module, which lies one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from text_data import read_text_file  # noqa: E402

SEQBOAT_KINDS = ("routed", "always", "never")
# Linear recurrences of flash-linear-attention, which calls them so in `config.json` too. Its Mamba-2 is not among
# them: without the binaries of mamba_ssm and causal_conv1d it runs a path without kernels, and it cannot go on from a
# state by more than one token. The backward pass of GatedDeltaNet refuses Hopper GPUs with a Triton from 3.4 to 3.7.0,
# whose compiler makes wrong gradients of it; GLA and KDA have kernels of their own.
FLA_KINDS = ("gated_deltanet", "gla", "kda")
MODEL_KINDS = (*SEQBOAT_KINDS, "mistral", "llama", *FLA_KINDS)
TASKS = ("recall", "copy", "needle", "mixed")
EXCERPT = Path(__file__).resolve().parent.parent / "data" / "enwik8_excerpt.txt"


@dataclass
class TaskArguments:
    """Which texts are made; `build_task` reads it."""

    task: str = field(default="recall", metadata={"help": "recall, copy, needle or mixed"})
    pairs: int = field(default=6, metadata={"help": "pairs, facts or items of a text"})
    queries: int = field(default=4, metadata={"help": "questions of a text; mixed: of each kind"})
    within: float = field(
        default=1.0, metadata={"help": "recall: pairs lie in this share of the text, at its beginning"}
    )
    data: str | None = field(
        default=None, metadata={"help": "needle: a text file, default the excerpt of enwik8; mixed: a folder"}
    )
    clips: int = field(default=2, metadata={"help": "mixed: clips of a stream"})
    pictures: int = field(default=8, metadata={"help": "mixed: pictures of a stream"})
    decimation: int = field(default=4, metadata={"help": "mixed: average so many samples of a clip to one"})


@dataclass
class ModelArguments:
    """The shape of a model; `build_model` reads it."""

    model: str = field(default="routed", metadata={"help": ", ".join(MODEL_KINDS)})
    hidden_size: int = field(default=64)
    layers: int = field(default=2)
    memory_size: int = field(default=64, metadata={"help": "activated tokens remembered; the window of mistral"})
    state_size: int = field(default=4)
    position_embedding_type: str = field(
        default="none", metadata={"help": "SeqBoat's; without positions nothing is longer than what was trained"}
    )
    router_type: str = field(default="gumbel_straight_through", metadata={"help": "of a routed model"})
    router_temperature_init: float = field(default=0.1)


def build_task(a: TaskArguments, split: str):
    """The task that the arguments name, on one split of the data. Raises ValueError for one that does not exist."""
    if a.task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {a.task!r}")
    if a.task == "recall":
        return RecallTask(pairs=a.pairs, queries=a.queries, within=a.within)
    if a.task == "copy":
        return CopyTask(items=a.pairs)
    if a.task == "needle":
        return NeedleTask(_text_of_split(a.data or str(EXCERPT), split), facts=a.pairs, queries=a.queries)
    if a.data is None:
        raise ValueError("task mixed needs data: a folder with a text, and what there is of pictures and clips")
    pieces = load_pieces(a.data, split, a.decimation)
    return MixedTask(pieces, facts=a.pairs, clips=a.clips, pictures=a.pictures, queries=a.queries)


def _text_of_split(path: str, split: str) -> np.ndarray:
    """90, 5 and 5 % of a text are train, validation and test."""
    text = np.frombuffer(read_text_file(path), np.uint8)
    part = ("train", "validation", "test").index(split)
    borders = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    return text[borders[part] : borders[part + 1]]


def build_model(a: ModelArguments, vocabulary: int) -> nn.Module:
    """A model with random weights, for training.

    The others have as many layers as SeqBoat, and a feed-forward block that brings them to SeqBoat's number of
    parameters as far as whole channels do: at the shapes of the recipes to within 0.7 %.

    A transformer has four heads. A linear recurrence has keys of half the hidden size and values of the whole, as
    SeqBoat has, in heads of at most 64 and 128 channels: the wider a head, the more its state holds. Else it is as
    flash-linear-attention configures it. KDA has values of half the hidden size too, for its gates have the parameters
    that wider ones would take.

    Raises:
        ValueError: for a kind that does not exist, and a hidden size that its heads do not divide.
        ModuleNotFoundError: if the kind needs flash-linear-attention and that is not installed.
    """
    if a.model not in MODEL_KINDS:
        raise ValueError(f"model must be one of {', '.join(MODEL_KINDS)}, got {a.model!r}")
    if a.model in SEQBOAT_KINDS:
        return SeqBoatForCausalLM(seqboat_config(a, vocabulary))
    kind, config, heads = (_fla_parts if a.model in FLA_KINDS else _transformer_parts)(a)
    shape = dict(
        vocab_size=vocabulary, hidden_size=a.hidden_size, num_hidden_layers=a.layers, intermediate_size=a.hidden_size,
        tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None, **heads,
    )  # fmt: skip
    with torch.device("meta"):
        goal = parameter_count(SeqBoatForCausalLM(seqboat_config(a, vocabulary)))
        missing = goal - parameter_count(kind(config(**shape)))
    # Three matrices of hidden_size a channel and layer.
    shape["intermediate_size"] = max(8, a.hidden_size + round(missing / (3 * a.hidden_size * a.layers)))
    return kind(config(**shape))


def _transformer_parts(a: ModelArguments) -> tuple[type, type, dict[str, int]]:
    """Model, configuration, and the arguments of its heads."""
    if a.hidden_size % 8:
        raise ValueError(f"hidden_size must be a multiple of 8 for the four heads of {a.model}, got {a.hidden_size}")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1 << 20}
    if a.model == "llama":
        return LlamaForCausalLM, LlamaConfig, heads
    return MistralForCausalLM, MistralConfig, {**heads, "sliding_window": a.memory_size}


def _fla_parts(a: ModelArguments) -> tuple[type, type, dict[str, float]]:
    """As `_transformer_parts`. The kernels take keys of 16 channels a head or more."""
    if a.hidden_size not in (32, 64) and (a.hidden_size % 128 or a.hidden_size < 128):
        raise ValueError(
            f"hidden_size must be 32, 64 or a multiple of 128 for the heads of {a.model}, got {a.hidden_size}"
        )
    models, heads = fla_models(a.model), max(1, a.hidden_size // 128)
    if a.model == "gla":
        return models.GLAForCausalLM, models.GLAConfig, {"num_heads": heads, "expand_k": 0.5, "expand_v": 1.0}
    width = {"num_heads": heads, "head_dim": a.hidden_size // 2 // heads}
    if a.model == "kda":
        return models.KDAForCausalLM, models.KDAConfig, {**width, "expand_v": 1.0}
    return models.GatedDeltaNetForCausalLM, models.GatedDeltaNetConfig, {**width, "expand_v": 2.0}


def fla_models(kind: str) -> ModuleType:
    """`fla.models`, whose import makes its architectures known to transformers.

    Raises ModuleNotFoundError where it is missing.
    """
    try:
        from fla import models
    except ImportError as error:
        raise ModuleNotFoundError(
            f"model {kind} needs flash-linear-attention (pip install flash-linear-attention): {error}"
        ) from error
    return models


def chosen_device(cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def check_kernels(kind: str, device: torch.device) -> None:
    """Raises ModuleNotFoundError or ValueError if a model of this kind cannot run on this device."""
    if kind in FLA_KINDS:
        fla_models(kind)
        if device.type != "cuda":
            raise ValueError(f"model {kind} needs a CUDA device, got {device.type}: its kernels run on nothing else")


def seqboat_config(a: ModelArguments, vocabulary: int) -> SeqBoatConfig:
    routers = {"routed": a.router_type}.get(a.model, a.model if a.model in SEQBOAT_KINDS else "always")
    return SeqBoatConfig(
        vocab_size=vocabulary, hidden_size=a.hidden_size, num_hidden_layers=a.layers, v_head_dim=a.hidden_size,
        qk_head_dim=max(2, a.hidden_size // 2), state_size=a.state_size, memory_size=a.memory_size,
        position_embedding_type=a.position_embedding_type, router_type=routers,
        router_temperature_init=a.router_temperature_init,
    )  # fmt: skip


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def new_cache(model: nn.Module) -> Cache:
    """What a model remembers of a text that it is fed in chunks: constant for SeqBoat, a linear recurrence, and behind
    a sliding window."""
    if isinstance(model, SeqBoatForCausalLM):
        return SeqBoatCache(model.config)
    if model.config.model_type in FLA_KINDS:
        from fla.models.utils import Cache as FlaCache

        # Recurrence and convolution of all kinds go on from its state by any number of tokens.
        return FlaCache()
    return DynamicCache(config=model.config)


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache. The models of flash-linear-attention ignore other names without an
    error."""
    return "past_key_values" if model.config.model_type in FLA_KINDS else CACHE_NAME


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's buffers."""
    tensors = [tensor for layer in cache.layers for tensor in _layer_tensors(layer) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _layer_tensors(layer) -> list[torch.Tensor | None]:
    if hasattr(layer, "tensors"):
        return list(layer.tensors().values())
    if hasattr(layer, "state"):
        # Of flash-linear-attention: a tensor, a tuple of them or None by what they are for.
        return [t for part in layer.state.values() for t in (part if isinstance(part, tuple) else (part,))]
    return [layer.keys, layer.values]
