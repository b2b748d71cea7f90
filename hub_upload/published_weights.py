"""From the weight names of a published checkpoint to those of this package.

Letters: D width, N state size, Z query/key width, V value width.
"""

import re

import torch

from .errors import HubUploadError

ROUTER_ROWS = 2

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
    dtypes are left alone.

    Returns:
        The weights under this package's names, and for each of these the published name it came from.

    Raises:
        HubUploadError: a weight has no counterpart; all of them are named.
    """
    weights: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    unknown = []

    def put(name: str, tensor: torch.Tensor, source: str) -> None:
        weights[name], origin[name] = tensor.contiguous().clone(), source

    for source, tensor in published.items():
        if _DROPPED.fullmatch(source):
            continue
        layer = _LAYER.fullmatch(source)
        if layer and layer[2] in ("hx_proj.weight", "hx_proj.bias"):
            prefix, kind = f"model.layers.{layer[1]}", layer[2].removeprefix("hx_proj.")
            if not always_active:
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
    if problems:
        raise HubUploadError("the checkpoint's weights do not fit its options:\n  " + "\n  ".join(problems))
