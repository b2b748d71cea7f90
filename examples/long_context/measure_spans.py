"""How far back attention looks in a text: by layer, against the size of the memory.

    python examples/long_context/measure_spans.py --model examples/pretrained/seqboat-enwik8-small \
        --data enwik8.xz --length 262144 --output outputs/spans.json

Reads the first bytes of the test split through the cache. One token in `every`, once the first `warm` tokens are read,
is a sample: where it is activated, the distances from it to the key that the layer weighs most, to its keys in the
mean by weight, and to the oldest key that the memory still holds are noted. The last of these is what the layer can
see; with a share r of activated tokens it is about W / r tokens.
"""

import sys
from pathlib import Path

# The examples share modules, which lie one folder up.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import script_start  # noqa: F401, before torch

# isort: split
from dataclasses import dataclass, field

import torch
from reading import SpanWatch
from recall_models import chosen_device, new_cache
from recipes import check_model_folder, parse_arguments
from safe_files import write_json
from text_data import read_text_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_seqboat import SeqBoatConfig, SeqBoatForCausalLM
from modeling_seqboat.generation_seqboat import CACHE_NAME

QUANTILES = (0.5, 0.9, 1.0)


@dataclass
class SpanArguments:
    model: str = field(metadata={"help": "folder of a byte-level SeqBoat language model"})
    data: str = field(metadata={"help": "text file, plain, .gz or .xz"})
    output: str = field(metadata={"help": "the JSON file to write; a table is printed"})
    length: int = field(default=262_144, metadata={"help": "bytes to read, from the last 5 % of the file"})
    every: int = field(default=512, metadata={"help": "one token in so many is a sample"})
    warm: int = field(default=32_768, metadata={"help": "bytes before the first sample"})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    cpu: bool = field(default=False)


def check_arguments(a: SpanArguments) -> None:
    """Raises ValueError or FileNotFoundError for what cannot be measured, naming it."""
    if a.every < 2 or not 0 <= a.warm <= a.length - a.every:
        raise ValueError(f"every {a.every} must be at least 2, and warm {a.warm} at most length {a.length} less it")
    if a.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {a.dtype!r}")
    check_model_folder(a.model)


@torch.no_grad()
def measure(model: SeqBoatForCausalLM, tokens: torch.Tensor, every: int, warm: int) -> list[dict]:
    """For each layer its share of activated tokens and quantiles of the three distances over the samples.

    Args:
        tokens: (1, L) int64.

    Raises:
        ValueError: for a model whose positions do not enter through queries and keys alone.
    """
    if model.config.position_embedding_type not in ("rotary", "none"):
        raise ValueError(
            "spans are measured where position_embedding_type is rotary or none, the model has "
            f"{model.config.position_embedding_type!r}"
        )
    cache, length = new_cache(model), tokens.shape[1]
    activated = torch.zeros(model.config.num_hidden_layers, dtype=torch.long)
    with SpanWatch(model) as watch, tqdm(total=length, unit="tokens", unit_scale=True, mininterval=2) as bar:
        for first in range(0, length, every):
            end = min(length, first + every)
            # The last token of a piece is the sample, read by itself.
            for begin, stop in ((first, end - 1), (end - 1, end)):
                if begin == stop:
                    continue
                watch.noting = begin == end - 1 and begin >= warm
                output = model(
                    input_ids=tokens[:, begin:stop], use_cache=True, logits_to_keep=1, output_router_probs=True,
                    **{CACHE_NAME: cache},
                )  # fmt: skip
                activated += torch.stack([(probs > 0).sum() for probs in output.router_probs]).cpu()
            bar.update(end - first)
    return [
        {
            "activation_rate": float(activated[layer]) / length,
            "samples": sum(not kept.isnan().any() for kept in watch.spans[layer]),
            "most_weighed": _quantiles(watch.spans[layer]),
            "mean": _quantiles(watch.means[layer]),
            "oldest": _quantiles(watch.reaches[layer]),
        }
        for layer in range(model.config.num_hidden_layers)
    ]


def _quantiles(noted: list[torch.Tensor]) -> list[float] | None:
    """Median, 90 % and longest; None where the layer attended at no sample."""
    values = torch.cat(noted)
    values = values[~values.isnan()]
    return [float(values.quantile(q)) for q in QUANTILES] if len(values) else None


def table(layers: list[dict], memory_size: int) -> str:
    lines = [
        f"Memory of {memory_size:,} activated tokens; distances in tokens: median, 90 %, longest.",
        "",
        "| layer | activated | samples | to the key weighed most | mean by weight | to the oldest key held |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, layer in enumerate(layers, 1):
        cells = [
            "–" if layer[name] is None else ", ".join(f"{x:,.0f}" for x in layer[name])
            for name in ("most_weighed", "mean", "oldest")
        ]
        rate = f"{100 * layer['activation_rate']:.1f} %"
        lines.append("| " + " | ".join([str(number), rate, str(layer["samples"]), *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    a = parse_arguments(SpanArguments, argv)
    check_arguments(a)
    text = read_text_file(a.data)
    text = text[len(text) * 95 // 100 :][: a.length]
    if len(text) < a.length:
        raise ValueError(f"the last 5 % of {a.data!r} have {len(text)} bytes, length {a.length} asks for more")
    device = chosen_device(a.cpu)
    config = AutoConfig.from_pretrained(a.model)
    if config.model_type != SeqBoatConfig.model_type or config.vocab_size not in range(256, 512):
        raise ValueError(
            f"model must be a byte-level SeqBoat, {a.model!r} is a {config.model_type!r} with {config.vocab_size} ids"
        )
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).to(device).eval()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None].to(device)
    layers = measure(model, tokens, a.every, a.warm)
    memory = model.config.memory_size
    write_json(Path(a.output), {"length": a.length, "every": a.every, "memory_size": memory, "layers": layers})
    print(table(layers, memory))
    return layers


if __name__ == "__main__":
    main()
