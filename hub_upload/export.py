"""Models as graphs for other runtimes: `python -m hub_upload export FOLDER --format torch|onnx|executorch`.

A language model becomes two graphs, `prompt` for several columns and `step` for one. Both take the state of what came
before, and give it back moved on: constant in size, zeros before the first prompt. Every other model is one graph,
`model`. What goes in and out of each stands in `export.json`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from modeling_seqboat import SeqBoatCache

from .build import read_config
from .errors import HubUploadError
from .folders import check_output, staged_folder

FORMATS = ("torch", "onnx", "executorch")
# What was tried, and why it is not offered.
_REFUSED = {"aoti": "AOTInductor compiles these graphs, but what it compiled gave other logits"}
FILE = "export.json"
# Files of a folder that say how a text becomes ids.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
_SUFFIX = {"torch": ".pt2", "onnx": ".onnx", "executorch": ".pte"}


@dataclass
class Graph:
    """A graph's file, and its inputs and outputs in order: name, dtype and shape, where a text is a size of any
    value."""

    file: str
    inputs: list[dict]
    outputs: list[dict]


def state_names(config) -> list[str]:
    """Names of the state's tensors, as `SeqBoatCache.tensors` has them."""
    return [name for name, _ in _empty_cache(config, 1).tensors()]


def _empty_cache(config, rows: int, dtype: torch.dtype = torch.float32) -> SeqBoatCache:
    cache = SeqBoatCache(config, static=True)
    for layer in cache.layers:
        layer.initialize(rows, dtype, torch.device("cpu"))
    return cache


def empty_state(config, rows: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The state before the first prompt, in the order of `state_names`."""
    return [tensor for _, tensor in _empty_cache(config, rows, dtype).tensors()]


class LanguageModelGraph(nn.Module):
    """forward(input_ids (B, L) int64, attention_mask (B, L) int64, *state) -> logits (B, vocabulary) at each row's
    last real token, and the state after it. With one column it is a decode step."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        config = self.model.config
        cache, given = SeqBoatCache(config, static=True), iter(state)
        for layer in cache.layers:
            layer.initialize(input_ids.shape[0], self.model.dtype, input_ids.device)
            for name in layer.tensors():
                # A copy: the graph's inputs are the caller's.
                setattr(layer, name, next(given).clone())
        hidden = self.model.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(attention_mask != 0, columns, 0).amax(1)
        picked = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        return self.model.lm_head(picked), *(tensor for _, tensor in cache.tensors())


class HeadGraph(nn.Module):
    """forward(inputs (B, L), attention_mask (B, L) int64) -> logits, or the hidden states where a model has no
    head."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.model(**{self.name: inputs, "attention_mask": attention_mask})
        return found["logits"] if "logits" in found else found.last_hidden_state


def export_model(
    model: nn.Module, *, rows: int | None = 1, length: int | None = None
) -> dict[str, tuple[ExportedProgram, list[str], list[str]]]:
    """The graphs of a model by name, each with the names of its inputs and outputs.

    Args:
        model: on the CPU; it is put into evaluation mode.
        rows, length: B and the prompt's L, or None for any; a step has one column in any case.

    Raises HubUploadError for a model that no graph can hold.
    """
    config, model = model.config, model.eval()
    if (rows is not None and rows < 1) or (length is not None and length < 2):
        raise HubUploadError(f"a graph has at least 1 row and 2 columns, got {rows} and {length}.")
    batch = None if rows is not None else Dim("rows", min=1, max=2**16)
    columns = None if length is not None else Dim("columns", min=2, max=2**21)
    count, width = rows or 2, length or 150
    whole = {axis: dim for axis, dim in ((0, batch), (1, columns)) if dim is not None}
    if type(model).__name__.endswith("ForCausalLM"):
        names = state_names(config)
        wrapper, state = LanguageModelGraph(model), empty_state(config, count, model.dtype)
        inputs, outputs = ["input_ids", "attention_mask", *names], ["logits", *(f"new.{name}" for name in names)]
        rest = [{0: batch} if batch is not None else {} for _ in names]
        graphs = {}
        step = {axis: dim for axis, dim in whole.items() if axis == 0}
        for kind, columns_of, sizes in (("prompt", width, whole), ("step", 1, step)):
            ids = torch.zeros(count, columns_of, dtype=torch.long)
            shapes = {"input_ids": sizes, "attention_mask": sizes, "state": tuple(rest)}
            graphs[kind] = _exported(wrapper, (ids, torch.ones_like(ids), *state), shapes), inputs, outputs
        return graphs
    name = model.main_input_name
    if name not in ("input_ids", "input_values") or config.pair_features != "none":
        raise HubUploadError(
            f"{type(model).__name__} reads {name} or pairs; only one text or row of values is exported."
        )
    ids = torch.zeros(count, width, dtype=torch.long if name == "input_ids" else torch.float32)
    arguments = ids, torch.ones(count, width, dtype=torch.long)
    shapes = {"inputs": whole, "attention_mask": whole}
    program = _exported(HeadGraph(model, name), arguments, shapes)
    return {"model": (program, [name, "attention_mask"], ["logits"])}


def _exported(wrapper: nn.Module, arguments: tuple, shapes: dict) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(wrapper, arguments, dynamic_shapes=shapes, strict=False)


def export_folder(
    model: str | Path,
    output: str | Path,
    kind: str,
    *,
    rows: int | None = 1,
    length: int | None = None,
    overwrite: bool = False,
) -> dict[str, Graph]:
    """Writes a model's graphs, `export.json` and the files of its tokenizer to a folder, which appears complete or not
    at all.

    Args:
        model: folder with a saved or built model; output: folder to write.
        kind: torch (for `torch.export.load`), onnx (for onnxruntime) or executorch, whose graphs have no size of any
            value.
        rows, length: as in `export_model`.
        overwrite: replace an existing folder.

    Raises HubUploadError for what cannot be exported, and where a package is missing.
    """
    model, output = Path(model), Path(output)
    if kind in _REFUSED:
        raise HubUploadError(f"--format {kind} is not offered: {_REFUSED[kind]}. Use {', '.join(FORMATS)}.")
    if kind not in FORMATS:
        raise HubUploadError(f"--format must be one of {', '.join(FORMATS)}, got {kind!r}.")
    if kind == "executorch" and (rows is None or length is None):
        raise HubUploadError(
            "--format executorch sets memory aside for the largest size: give --rows of at least 1 and --length, "
            "the columns that a prompt is cut into or padded to."
        )
    check_output(output, overwrite, keep=model)
    config, model_class = read_config(model)
    write = _writer(kind)
    loaded = model_class.from_pretrained(model, dtype=torch.float32)
    graphs = {}
    with staged_folder(output, overwrite, keep=model) as stage:
        for name, (program, inputs, outputs) in export_model(loaded, rows=rows, length=length).items():
            file = f"{name}{_SUFFIX[kind]}"
            write(program, stage / file, inputs, outputs)
            graphs[name] = Graph(file, *_signature(program, inputs, outputs))
        described = {name: asdict(graph) for name, graph in graphs.items()}
        text = json.dumps({"format": kind, "model_class": model_class.__name__, "graphs": described}, indent=2)
        (stage / FILE).write_text(text + "\n", encoding="utf-8")
        for name in _TOKENIZER:
            if (model / name).is_file():
                (stage / name).write_bytes((model / name).read_bytes())
    return graphs


def _signature(program: ExportedProgram, inputs: list[str], outputs: list[str]) -> tuple[list[dict], list[dict]]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}

    def described(names: list[str], nodes: tuple[str, ...]) -> list[dict]:
        return [
            {
                "name": name,
                "dtype": str(values[node].dtype).removeprefix("torch."),
                "shape": [size if isinstance(size, int) else str(size) for size in values[node].shape],
            }
            for name, node in zip(names, nodes, strict=True)
        ]

    signature = program.graph_signature
    return described(inputs, signature.user_inputs), described(outputs, signature.user_outputs)


def _writer(kind: str) -> Callable[[ExportedProgram, Path, list[str], list[str]], None]:
    """What writes such a graph. Raises HubUploadError where its package is missing."""
    try:
        if kind == "onnx":
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        elif kind == "executorch":
            import executorch.exir  # noqa: F401
    except ImportError as error:
        packages = "pip install executorch" if kind == "executorch" else "pip install -e '.[export]'"
        raise HubUploadError(f"--format {kind} needs more packages ({packages}): {error}") from error
    return {"torch": _write_torch, "onnx": _write_onnx, "executorch": _write_executorch}[kind]


def _write_torch(program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str]) -> None:
    torch.export.save(program, path)


def _write_onnx(program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str]) -> None:
    torch.onnx.export(
        program, (), str(path), input_names=inputs, output_names=outputs, external_data=False, verbose=False
    )


def _write_executorch(program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str]) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
