"""From the weight names of a published checkpoint to those of this package.

Letters: D width, N state size, Z query/key width, V value width.
"""

import re

import torch

from .errors import HubUploadError, shown

ROUTER_ROWS = 2
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_PROBLEMS = 40
# Batch norm counts its batches.
_INTEGERS = re.compile(r".*\.num_batches_tracked|decoder\.version|.*\.inv_freq")
_OWN_LAYER = re.compile(r"model\.layers\.(\d+)\.")

# Buffers of the published code that carry no weights.
_DROPPED = re.compile(r"decoder\.version|.*\.inv_freq")
_LAYER = re.compile(r"(?:decoder|encoder\.encoder)\.layers\.(\d+)\.(?:slag_layer|mega_layer)\.(.+)")
_FFN = re.compile(r"(?:decoder|encoder\.encoder)\.layers\.(\d+)\.nffn\.(.+)")

_LAYER_NAMES = {
    "gamma": "attention.qk_scale",
    "beta": "attention.qk_offset",
    "q_router.temp": "router.log_temperature",
    "rel_pos_bias.rel_pos_bias": "attention.position_bias.weight",
    "rel_pos_bias.relative_attention_bias": "attention.position_bias.weight",
    "rel_pos_bias.relative_attention_bias.weight": "attention.position_bias.weight",
    **{f"move.{name}": f"ssm.{name}" for name in ("delta", "alpha", "beta", "gamma", "omega")},
    **{f"mx_proj.{name}": f"attention.in_proj.{name}" for name in ("weight", "bias")},
    **{f"h_proj.{name}": f"attention.out_proj.{name}" for name in ("weight", "bias")},
}
_OTHER_NAMES = {
    "decoder.embed_tokens.weight": "model.embed_tokens.weight",
    "decoder.output_projection.weight": "lm_head.weight",
    "encoder.encoder.embed_tokens.embed.weight": "model.embed_tokens.weight",
    "encoder.encoder.embed_tokens.weight": "model.embed_values.weight",
    "encoder.encoder.embed_tokens.bias": "model.embed_values.bias",
    "encoder.encoder.pos_emb.scale": "model.absolute_positions.scale",
    "classifier.0.0.weight": "classifier.dense.weight",
    "classifier.0.0.bias": "classifier.dense.bias",
    "sentence_projection_layer.weight": "classifier.output.weight",
}


def translate_weights(
    published: dict[str, torch.Tensor], *, norm_type: str, always_active: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Rename and split the weights of a published checkpoint.

    `hx_proj` (2 + D, D) holds the two router logits first; they become `router`, the rest `hidden_proj`. Values and
    dtypes are left alone, and nothing is copied: shapes are yet to be compared.

    Returns:
        The weights under this package's names, and for each of these the published name it came from.

    Raises:
        HubUploadError: a weight has no counterpart; all of them are named.
    """
    weights: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    unknown = []

    def put(name: str, tensor: torch.Tensor, source: str) -> None:
        weights[name], origin[name] = tensor, source

    for source, tensor in published.items():
        if _DROPPED.fullmatch(source):
            continue
        layer = _LAYER.fullmatch(source)
        if layer and layer[2] in ("hx_proj.weight", "hx_proj.bias"):
            prefix, kind = f"model.layers.{layer[1]}", layer[2].removeprefix("hx_proj.")
            if not always_active and tensor.ndim > 0:
                put(f"{prefix}.router.{kind}", tensor[:ROUTER_ROWS], source)
                tensor = tensor[ROUTER_ROWS:]
            put(f"{prefix}.hidden_proj.{kind}", tensor, source)
            continue
        name = _name_of(source, layer, norm_type)
        if name is None:
            unknown.append(source)
        else:
            put(name, tensor, source)
    if unknown:
        raise HubUploadError(f"the checkpoint has weights that no SeqBoat model has: {', '.join(sorted(unknown))}.")
    return weights, origin


def _name_of(source: str, layer: re.Match | None, norm_type: str) -> str | None:
    if layer:
        inner = layer[2]
        if inner.startswith("norm.norm."):
            return f"model.layers.{layer[1]}.norm.{_norm_name(inner.removeprefix('norm.norm.'), norm_type)}"
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[inner]}" if inner in _LAYER_NAMES else None
    ffn = _FFN.fullmatch(source)
    if ffn:
        inner = ffn[2]
        if inner.startswith("norm.norm."):
            inner = f"norm.{_norm_name(inner.removeprefix('norm.norm.'), norm_type)}"
        return f"model.layers.{ffn[1]}.ffn.{inner}"
    final = re.fullmatch(r"(?:decoder|encoder\.encoder)\.final_norm\.norm\.(.+)", source)
    if final:
        return f"model.final_norm.{_norm_name(final[1], norm_type)}"
    return _OTHER_NAMES.get(source)


def _norm_name(name: str, norm_type: str) -> str:
    """`weight`, `bias` or a statistic of a norm, as this package's norm of that type calls it."""
    if norm_type == "batchnorm":
        return f"norm.{name}"
    return "weight" if norm_type == "scalenorm" and name in ("scalar", "weight") else name


def check_plain(published: dict[str, torch.Tensor], size: int) -> None:
    """Refuse what is no plain weight, before anything is computed from it.

    Args:
        published: the weights of a checkpoint.
        size: of its file in bytes. A tensor may claim to be larger than what is stored of it.

    Raises HubUploadError naming a weight that is sparse, on no device, or not made of floating point numbers.
    """
    claimed = 0
    for name, tensor in published.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise HubUploadError(
                f"the checkpoint's weight {shown(name)} is no plain tensor: {tensor.layout}, {tensor.device}."
            )
        if tensor.dtype not in FLOATS and not _INTEGERS.fullmatch(name):
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise HubUploadError(f"the checkpoint's weight {shown(name)} is {tensor.dtype}; weights are {known}.")
        claimed += tensor.numel() * tensor.element_size()
    # An output matrix may share its numbers with the embedding.
    if claimed > 2 * size + (1 << 20):
        raise HubUploadError(f"the checkpoint's weights claim {claimed:,} bytes, but its file has {size:,}.")


def layer_count(weights: dict[str, torch.Tensor]) -> int:
    """Layers that converted weights have anything of."""
    return len({match[1] for match in map(_OWN_LAYER.match, weights) if match})


def all_layers(one_layer: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The state dict of a model of `count` equal layers, from that of a model of one; of tensors only shapes
    matter."""
    expected = {}
    for name, tensor in one_layer.items():
        if name.startswith("model.layers.0."):
            rest = name.removeprefix("model.layers.0.")
            expected |= {f"model.layers.{layer}.{rest}": tensor for layer in range(count)}
        else:
            expected[name] = tensor
    return expected


def check_finite(weights: dict[str, torch.Tensor], origin: dict[str, str]) -> None:
    """Raises HubUploadError naming the weights that hold NaN or infinity."""
    wrong = [origin[name] for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise HubUploadError("the checkpoint's weights are not finite:\n  " + "\n  ".join(wrong))


def check_weights(
    weights: dict[str, torch.Tensor], origin: dict[str, str], expected: dict[str, torch.Tensor], tied: set[str]
) -> None:
    """Compare converted weights with what the model has.

    Args:
        weights, origin: as `translate_weights` gives them.
        expected: the model's state dict, of which only names and shapes are read.
        tied: names that share another's tensor and may be absent.

    Raises HubUploadError naming every missing, superfluous or misshapen weight, published names included.
    """
    problems = []
    for name in sorted(set(expected) - set(weights) - tied):
        problems.append(f"missing: {name} {tuple(expected[name].shape)}")
    for name in sorted(set(weights) - set(expected)):
        problems.append(f"left over: {origin.get(name, name)} {tuple(weights[name].shape)}")
    for name in sorted(set(weights) & set(expected)):
        if weights[name].shape != expected[name].shape:
            problems.append(
                f"wrong shape: {origin.get(name, name)} gives {tuple(weights[name].shape)} for {name}, which the "
                f"options make {tuple(expected[name].shape)}"
            )
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    if problems:
        raise HubUploadError("the checkpoint's weights do not fit its options:\n  " + "\n  ".join(problems))
