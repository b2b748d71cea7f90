"""The file of a saved cache: a safetensors file of its buffers, whose metadata name its model and hold a checksum.

Whatever a file holds, reading it runs nothing, allocates no more than the file is long, and ends in the state that was
saved or in a ValueError.
"""

import hashlib
import json
import math
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "seqboat-cache-1"
# More columns than any state has seen; an int64 holds their number.
_MOST_COLUMNS = 2**53
COUNTS = ("activated_count", "token_count")


@dataclass
class SavedState:
    """What a file holds: the buffers by name, the config's signature, the columns fed, whether it was static."""

    tensors: dict[str, Tensor]
    signature: dict[str, Any]
    seen: int
    static: bool


def write_state(path: Path, state: SavedState) -> None:
    """Writes a state; an existing file is replaced only once the new one is complete."""
    meta = {
        "format": FORMAT,
        "signature": json.dumps(state.signature),
        "seen": str(state.seen),
        "static": str(state.static),
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    meta["sha256"] = _checksum(meta, tensors)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    with open(temporary, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        save_file(tensors, temporary, metadata=meta)
        # safetensors writes files that only their owner may read; as for any other file the umask decides.
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: str | os.PathLike) -> SavedState:
    """Reads a file that `write_state` wrote, onto the CPU. A file of an earlier version has no checksum.

    Raises FileNotFoundError where there is none, and ValueError where it is damaged or something else.
    """
    try:
        # The reader tells a missing file from a damaged one, but its errors name neither.
        with open(path, "rb"):
            pass
        with safe_open(path, "pt", device="cpu") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ValueError(f"{path} is not a SeqBoat cache: format {meta.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Names of dtypes that this torch does not have, and shapes that no tensor has, fail in the reader's own ways.
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    given = {"format", "signature", "seen", "static", "sha256"}
    if not given - {"sha256"} <= set(meta) <= given:
        raise ValueError(f"{path} is damaged: its metadata are {', '.join(sorted(meta))}")
    state = SavedState(
        tensors, _signature(path, meta["signature"]), _seen(path, meta["seen"]), meta["static"] == "True"
    )
    if meta["static"] not in ("True", "False"):
        raise ValueError(f"{path} is damaged: static is {meta['static']!r}, expected True or False")
    if "sha256" in meta and meta.pop("sha256") != _checksum(meta, tensors):
        raise ValueError(f"{path} is damaged: its contents are not those of its checksum")
    return state


def _signature(path: str | os.PathLike, text: str) -> dict[str, Any]:
    try:
        signature = json.loads(text)
    # A text nested too deeply is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its signature is no JSON: {error}") from None
    if not isinstance(signature, dict):
        raise ValueError(f"{path} is damaged: its signature is a {type(signature).__name__}, expected an object")
    return signature


def _seen(path: str | os.PathLike, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,17}", text, re.ASCII) is None or int(text) > _MOST_COLUMNS:
        raise ValueError(f"{path} is damaged: seen is {text!r:.40}, expected a number of columns")
    return int(text)


def _checksum(meta: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the metadata and every buffer's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_buffer(
    path: str | os.PathLike, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Raises ValueError unless a buffer has the shape, the dtype and numbers that a state can have."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} in {path} is {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} in {path} is {tensor.dtype}, expected {dtype}")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} in {path} holds numbers that are not finite")
    if name.rpartition(".")[2] in COUNTS and tensor.numel() and not 0 <= int(tensor.min()):
        raise ValueError(f"{name} in {path} holds a negative count: {int(tensor.min())}")


def check_counts(path: str | os.PathLike, prefix: str, tensors: dict[str, Tensor], seen: int) -> None:
    """Raises ValueError unless a layer has activated at most the tokens counted, and counted at most the columns."""
    activated, tokens = (tensors[f"{prefix}.{name}"] for name in COUNTS)
    if (activated > tokens).any() or (tokens > seen).any():
        raise ValueError(
            f"{prefix} in {path} counts {activated.tolist()} activated of {tokens.tolist()} tokens in {seen} columns"
        )


def memory_of(
    path: str | os.PathLike, name: str, tensors: dict[str, Tensor], shape: tuple[int, int]
) -> tuple[int, torch.dtype]:
    """Rows and dtype of a layer's memory, by its keys. Raises ValueError unless these are of `shape` in each row."""
    if name not in tensors:
        raise ValueError(f"{path} lacks {name}")
    keys = tensors[name]
    if keys.ndim != 3 or keys.shape[0] < 1 or not keys.is_floating_point() or math.prod(keys.shape) == 0:
        raise ValueError(f"{name} in {path} is {keys.dtype} {tuple(keys.shape)}: it is no memory of at least one row")
    check_buffer(path, name, keys, (keys.shape[0], *shape), keys.dtype)
    return keys.shape[0], keys.dtype
