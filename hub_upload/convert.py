"""Reading the published checkpoints: a torch file of options and weights becomes a folder for `from_pretrained`."""

import copy
import logging
import zipfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import modeling_seqboat
from modeling_seqboat import SeqBoatConfig
from modeling_seqboat.tokenization_seqboat import build_byte_tokenizer

from .byte_dictionary import (
    PUBLISHED_BOS,
    PUBLISHED_EOS,
    PUBLISHED_PAD,
    BytePermutation,
    byte_permutation,
    read_byte_dictionary,
)
from .errors import HubUploadError, shown
from .folders import check_output, staged_folder
from .pickle_check import check_pickles
from .published_options import PublishedModel, read_options
from .published_weights import (
    all_layers,
    check_finite,
    check_plain,
    check_weights,
    layer_count,
    translate_weights,
)

logger = logging.getLogger(__name__)

MODEL_CLASSES = {"language_model": "SeqBoatForCausalLM", "encoder": "SeqBoatForSequenceClassification"}
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


@dataclass
class Conversion:
    """What was converted: the folder, the model's class, the number of weights, and warnings for the user."""

    output: Path
    model_class: str
    parameters: int
    warnings: list[str]


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    dictionary: str | Path | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Conversion:
    """Convert a published SeqBoat checkpoint (a language model or a classification encoder) to a model folder.

    Args:
        checkpoint: torch file with entries `args` (a Namespace) and `model`; read with `weights_only=True`.
        output: folder to write. It appears complete or not at all.
        dictionary: the `dict.txt` of a byte corpus. With it the embedding is put into the order of the byte tokenizer,
            which is written too; bytes that it lacks get the row of `<unk>` and are never generated. Without it token
            ids stay as they are.
        overwrite: replace an existing model folder.
        max_shard_size: largest safetensors file.

    Raises:
        HubUploadError: nothing is left behind; the message names what was wrong.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_output(output, overwrite, keep=checkpoint)
    args, published = load_published(checkpoint)
    described = read_options(args)
    symbols = read_byte_dictionary(Path(dictionary)) if dictionary is not None else None
    model_class = getattr(modeling_seqboat, MODEL_CLASSES[described.kind], None)
    if model_class is None:
        raise HubUploadError(f"this version of modeling_seqboat has no {MODEL_CLASSES[described.kind]}.")
    check_plain(published, checkpoint.stat().st_size)
    weights, origin = translate_weights(
        published,
        norm_type=described.fields.get("norm_type", "layernorm"),
        always_active=described.fields.get("router_type") == "always",
    )
    _check_counts(described, weights)
    _check_output_matrix(weights, described.fields)
    tokenizer, permutation = _byte_order(weights, symbols)
    config = _config_of(described, weights, permutation, tokenizer)
    tied = set(getattr(model_class, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    expected = all_layers(_meta_model(model_class, config, layers=1).state_dict(), config.num_hidden_layers)
    check_weights(weights, origin, expected, tied)
    check_finite(weights, origin)
    model = _meta_model(model_class, config)
    # Of their own: a weight may be a part of another's numbers.
    weights = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if described.kind == "language_model":
        model.generation_config = _generation_config(config, permutation)
    with staged_folder(output, overwrite, keep=checkpoint) as stage:
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Conversion(output, model_class.__name__, count, described.warnings)


def _meta_model(model_class: type, config: SeqBoatConfig, layers: int | None = None) -> torch.nn.Module:
    """A model without numbers, of `layers` layers or as many as its config says."""
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
    # On the meta device neither time nor memory goes into weights that are replaced at once.
    try:
        with torch.device("meta"):
            return model_class(config)
    # Sizes whose product no number holds.
    except (RuntimeError, TypeError, OverflowError) as error:
        raise HubUploadError(f"the checkpoint's options make no model: {error}") from error


def _check_counts(described: PublishedModel, weights: dict[str, torch.Tensor]) -> None:
    """Refuse options that say more layers or other classes than there are, before as many are built."""
    layers, found = described.fields.get("num_hidden_layers"), layer_count(weights)
    if not isinstance(layers, int) or layers > found:
        raise HubUploadError(f"the checkpoint's options say {shown(layers)} layers, its weights are of {found}.")
    classes, last = described.fields.get("num_labels"), weights.get("classifier.output.weight")
    if described.kind == "encoder" and (last is None or last.ndim == 0 or classes != last.shape[0]):
        found = "none" if last is None else f"the shape {tuple(last.shape)}"
        raise HubUploadError(
            f"the checkpoint's options say {shown(classes)} classes, sentence_projection_layer.weight has {found}."
        )


def load_published(path: Path) -> tuple[Namespace, dict[str, torch.Tensor]]:
    """The options and weights of a published checkpoint. No code of the file is run.

    Raises HubUploadError when the file is missing, damaged, holds other objects than tensors and plain values, or
    lacks `args` or `model`.
    """
    if not path.is_file():
        raise HubUploadError(f"the checkpoint {path} does not exist or is not a file.")
    _check_archive(path)
    check_pickles(path)
    try:
        with torch.serialization.safe_globals([Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file fails in many ways: unpickling, zip and end-of-file errors, and plain bugs of the reader.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise HubUploadError(
            f"the checkpoint {path} cannot be read as a published SeqBoat checkpoint (a torch file of plain tensors "
            f"and options, loaded with weights_only=True): {reason[0]}"
        ) from error
    found = type(loaded).__name__
    if isinstance(loaded, dict):
        found = ", ".join(sorted(shown(name) for name in loaded)[:20]) or "nothing"
    if not isinstance(loaded, dict) or not isinstance(loaded.get("args"), Namespace):
        raise HubUploadError(f"the checkpoint {path} has no options under 'args'; it holds {found}.")
    model = loaded.get("model")
    if not isinstance(model, dict) or not model or not all(isinstance(t, torch.Tensor) for t in model.values()):
        raise HubUploadError(f"the checkpoint {path} has no weights under 'model'; it holds {found}.")
    for name in model:
        if not isinstance(name, str):
            raise HubUploadError(f"the checkpoint {path} has a weight without a name: {shown(name)}.")
    return loaded["args"], model


def _check_archive(path: Path) -> None:
    """torch writes what it stores as it is: an archive that unpacks to more than its size is no file of torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    # An older format, or damaged: for torch.load to say.
    except Exception:
        return
    if unpacked > path.stat().st_size:
        raise HubUploadError(f"the checkpoint {path} unpacks to {unpacked:,} bytes, more than the file has.")


def _check_output_matrix(weights: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    """Drop a tied output matrix after comparing it with the embedding."""
    if OUTPUT not in weights or not fields.get("tie_word_embeddings", True):
        return
    embedding = weights.get(EMBEDDING)
    if embedding is None or not torch.equal(weights[OUTPUT], embedding):
        raise HubUploadError(
            "the options say share_decoder_input_output_embed=True, but decoder.output_projection.weight differs from "
            "decoder.embed_tokens.weight."
        )
    del weights[OUTPUT]


def _byte_order(weights: dict[str, torch.Tensor], symbols: list[int | None] | None):
    if symbols is None:
        return None, None
    if EMBEDDING not in weights:
        raise HubUploadError("--dict was given, but the checkpoint has no token embedding to put into its order.")
    tokenizer = build_byte_tokenizer()
    permutation = byte_permutation(
        symbols,
        len(tokenizer),
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        published_rows=weights[EMBEDDING].shape[0],
    )
    for name in (EMBEDDING, OUTPUT):
        if name in weights:
            weights[name] = permutation.apply(weights[name])
    return tokenizer, permutation


def _config_of(
    described: PublishedModel, weights: dict[str, torch.Tensor], permutation: BytePermutation | None, tokenizer
) -> SeqBoatConfig:
    fields = dict(described.fields)
    if EMBEDDING in weights:
        fields["vocab_size"] = weights[EMBEDDING].shape[0]
        if permutation is None:
            fields |= {"pad_token_id": PUBLISHED_PAD, "bos_token_id": PUBLISHED_BOS, "eos_token_id": PUBLISHED_EOS}
        else:
            fields |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if not dtypes:
        raise HubUploadError("the checkpoint has no weights of floating point numbers.")
    # Where dtypes are mixed, the widest is the one that loses nothing on loading.
    fields["dtype"] = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    try:
        return SeqBoatConfig(**fields)
    except ValueError as error:
        raise HubUploadError(f"the checkpoint's options make no valid configuration. {error}") from error


def _generation_config(config: SeqBoatConfig, permutation: BytePermutation | None) -> GenerationConfig:
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    if permutation is not None and permutation.unknown_bytes:
        generation.suppress_tokens = permutation.unknown_bytes
    return generation
