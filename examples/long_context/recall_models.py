"""The models that the long-context tasks compare, of about equal size, and what they share: a cache to read a text
with, and the tasks by name.

Letters: W memory size, which is the window of the transformer with one.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from mixed_stream import MixedTask, load_pieces
from recall_tasks import CopyTask, NeedleTask, RecallTask
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from modeling_seqboat import SeqBoatCache, SeqBoatConfig, SeqBoatForCausalLM

# The examples share this module, which lies one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from text_data import read_text_file  # noqa: E402

SEQBOAT_KINDS = ("routed", "always", "never")
MODEL_KINDS = (*SEQBOAT_KINDS, "mistral", "llama")
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

    model: str = field(default="routed", metadata={"help": "routed, always, never, mistral or llama"})
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

    A transformer has as many layers as SeqBoat, four heads, and a feed-forward block that brings it to SeqBoat's
    number of parameters, as far as whole channels do.

    Raises ValueError for a kind that does not exist.
    """
    if a.model not in MODEL_KINDS:
        raise ValueError(f"model must be one of {', '.join(MODEL_KINDS)}, got {a.model!r}")
    if a.model in SEQBOAT_KINDS:
        return SeqBoatForCausalLM(seqboat_config(a, vocabulary))
    if a.hidden_size % 8:
        raise ValueError(f"hidden_size must be a multiple of 8 for the four heads of {a.model}, got {a.hidden_size}")
    shape = dict(
        vocab_size=vocabulary, hidden_size=a.hidden_size, num_hidden_layers=a.layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=a.hidden_size, max_position_embeddings=1 << 20,
        tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    if a.model == "mistral":
        shape["sliding_window"] = a.memory_size
    kind, config = (MistralForCausalLM, MistralConfig) if a.model == "mistral" else (LlamaForCausalLM, LlamaConfig)
    with torch.device("meta"):
        goal = parameter_count(SeqBoatForCausalLM(seqboat_config(a, vocabulary)))
        missing = goal - parameter_count(kind(config(**shape)))
    # Three matrices of hidden_size a channel and layer.
    shape["intermediate_size"] = max(8, a.hidden_size + round(missing / (3 * a.hidden_size * a.layers)))
    return kind(config(**shape))


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
    """What a model remembers of a text that it is fed in chunks: constant for SeqBoat and behind a sliding window."""
    if isinstance(model, SeqBoatForCausalLM):
        return SeqBoatCache(model.config)
    return DynamicCache(config=model.config)


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's buffers."""
    tensors = []
    for layer in cache.layers:
        tensors += layer.tensors().values() if hasattr(layer, "tensors") else [layer.keys, layer.values]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
