"""Show which tokens of a text, or pixels of a picture, a SeqBoat pays attention for: an HTML page and a PNG.

    python examples/activation_map.py outputs/train_from_scratch examples/data/tinyshakespeare.txt
    python examples/activation_map.py outputs/train_from_scratch "To be, or not to be"
    python examples/activation_map.py outputs/lra-image picture.png --size 32x32

The page opens in any browser, needs no network, and works with the keyboard alone. Runs on the CPU.
"""

from script_start import ArgumentParser  # before torch

# isort: split
import argparse
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from activation_cells import Token, tokens_of, visible
from activation_page import ActivationMap, build_page, write_png
from recipes import check_model_folder
from safe_files import read_json_object, replacing, write_text
from text_data import load_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_seqboat import SeqBoatConfig, SeqBoatModel, build_byte_tokenizer
from modeling_seqboat.analysis_seqboat import BYTE_CLASS_NAMES, TokenClasses, analyse_activations, byte_classes

DEFAULT_OUTPUT = Path("outputs/activation_map")
PAGE, PICTURE = "activation_map.html", "activation_map.png"


def load_config(name: str) -> SeqBoatConfig:
    """Raises ValueError where there is no SeqBoat under `name`."""
    try:
        check_model_folder(name)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    try:
        config = AutoConfig.from_pretrained(name)
    # A config of any content fails in as many ways.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"there is no folder {name!r}, and no model of that name on the Hub: {reason}") from error
    if not isinstance(config, SeqBoatConfig):
        raise ValueError(f"{name!r} is a {config.model_type!r}, not a SeqBoat")
    return config


def read_source(text_or_file: str, as_text: bool) -> tuple[str, bytes]:
    """A name to show and the bytes. Raises ValueError for what is neither a file nor likely to be meant as a text."""
    if as_text:
        data, name = text_or_file.encode("utf-8", "surrogateescape"), "the text given"
    elif text_or_file == "-":
        data, name = sys.stdin.buffer.read(), "standard input"
    # os.path, for pathlib fails on a text that is too long for a path.
    elif os.path.isdir(text_or_file):
        raise ValueError(f"{text_or_file!r} is a folder; name a file or give a text")
    elif os.path.isfile(text_or_file):
        data, name = Path(text_or_file).read_bytes(), Path(text_or_file).name
    elif re.fullmatch(r"\S+\.\w{1,5}|\S*/\S+", text_or_file):
        raise ValueError(f"there is no file {text_or_file!r}; if it is the text itself, add --text")
    else:
        return read_source(text_or_file, True)
    if not data:
        raise ValueError(f"{name} is empty: there is nothing to show")
    return name, data


def load_model(name: str, config: SeqBoatConfig) -> SeqBoatModel:
    """The layers alone, without a head, in float32."""
    verbosity = logging.get_verbosity()
    # Weights that are left over belong to the head, which is of no interest here.
    logging.set_verbosity_error()
    try:
        return AutoModel.from_pretrained(name, config=config, dtype=torch.float32).eval()
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def confidences(model: SeqBoatModel, **inputs: Tensor) -> Tensor:
    """(layers, T) of a single row."""
    probs = model(**inputs, use_cache=False, output_router_probs=True).router_probs
    return torch.cat(probs).float()


def text_tokens(tokenizer: PreTrainedTokenizerBase, data: bytes) -> tuple[list[int], list[Token]]:
    """Ids and tokens of a text; to the byte tokenizer any bytes are a text. Raises ValueError where they are none."""
    if tokenizer.get_vocab() == build_byte_tokenizer().get_vocab():
        return list(data), [Token(bytes([byte])) for byte in data]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 ({error}), which the model's tokenizer needs") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, tokens_of(tokenizer, ids)


def class_of_tokens(tokens: list[Token]) -> Tensor:
    """(T,) int64, the class of each token's first byte that is no blank."""
    firsts = [(token.text.lstrip() or token.text or b"\0")[0] if token.special is None else 256 for token in tokens]
    return byte_classes(torch.tensor(firsts))


def map_text(name: str, config: SeqBoatConfig, source: str, data: bytes, limit: int) -> ActivationMap:
    """Raises ValueError where model and tokenizer do not fit."""
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"{name!r} has no tokenizer: {error}") from error
    ids, tokens = text_tokens(tokenizer, data)
    if len(ids) > limit:
        print(f"{visible(source)} has {len(ids):,} tokens; the first {limit:,} are shown (--max-tokens)")
        source += f", the first {limit:,} of {len(ids):,} tokens"
        ids, tokens = ids[:limit], tokens[:limit]
    if not ids:
        raise ValueError(f"{source} gives no token")
    if max(ids) >= config.vocab_size:
        raise ValueError(f"the tokenizer gives id {max(ids)}, the model's vocab_size is {config.vocab_size}")
    row = torch.tensor([ids])
    found = confidences(load_model(name, config), input_ids=row)
    classes = class_of_tokens(tokens)
    names = TokenClasses(BYTE_CLASS_NAMES, lambda _: classes[None])
    report = analyse_activations(found[:, None], config, input_ids=row, token_classes=names)
    return ActivationMap(name, source, found, report, tokens=tokens, classes=classes)


def picture_settings(name: str) -> dict:
    """What the model's image processor says of size, mean and standard deviation, if it has one: `size` (height,
    width), `mean`, `std`. Raises ValueError for a file that says something else."""
    file = Path(name) / "preprocessor_config.json"
    if not file.is_file():
        return {}
    found, settings = read_json_object(file), {}
    size = found.get("size")
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        settings["size"] = size["height"], size["width"]
        if not all(type(side) is int and side > 0 for side in settings["size"]):
            raise ValueError(f"{str(file)!r}: size={size!r} must hold whole numbers above 0")
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        values = found.get(f"image_{key}")
        if values is not None:
            one = values[0] if isinstance(values, list) and values else values
            if type(one) not in (int, float) or not math.isfinite(one) or one <= least:
                raise ValueError(
                    f"{str(file)!r}: image_{key}={values!r:.80} must hold a number" + " above 0" * (least == 0)
                )
            settings[key] = one
    return settings


def read_pixels(path: str, size: tuple[int, int] | None, limit: int) -> np.ndarray:
    """(H, W) uint8 of a picture file, made grey. Raises ValueError for what is no picture or has too many pixels."""
    from PIL import Image

    if not Path(path).is_file():
        raise ValueError(f"the model reads pixels: name a picture file, got {path!r}")

    def check(height: int, width: int) -> None:
        if height * width > limit:
            raise ValueError(
                f"{path!r} has {height} x {width} pixels, more than {limit:,}: make it smaller by --size "
                "HEIGHTxWIDTH, as the model was trained, or raise --max-tokens"
            )

    if size is not None:
        check(*size)
    try:
        with Image.open(path) as image:
            shape = image.height, image.width
            grey = image.convert("L") if size is not None or shape[0] * shape[1] <= limit else None
    # Damaged pictures fail in their readers' own ways; one that claims to be huge is an error of PIL's own.
    except Exception as error:
        raise ValueError(f"{path!r} is not a picture: {error}") from error
    if grey is None:
        check(*shape)
    if size is not None:
        grey = grey.resize((size[1], size[0]))
    return np.asarray(grey)


def map_picture(name: str, config: SeqBoatConfig, arguments: argparse.Namespace) -> ActivationMap:
    """Raises ValueError for what is no picture that the model can read."""
    if any("Audio" in architecture for architecture in config.architectures or ()):
        raise ValueError(f"{name!r} reads recordings, which are not shown: give a model of texts or pictures")
    settings = picture_settings(name)
    size = arguments.size if arguments.size is not None else settings.get("size")
    mean, std = (
        given if given is not None else settings.get(key, 0.5)
        for key, given in (("mean", arguments.mean), ("std", arguments.std))
    )
    pixels = read_pixels(arguments.source, size, arguments.max_tokens)
    values = (torch.from_numpy(pixels.copy()).float().flatten() / 255 - mean) / std
    found = confidences(load_model(name, config), input_values=values[None])
    report = analyse_activations(found[:, None], config)
    return ActivationMap(name, Path(arguments.source).name, found, report, pixels=pixels)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for instance 32x32")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a SeqBoat")
    parser.add_argument("source", metavar="TEXT-OR-FILE", help="a text, a file, or - for standard input")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help=f"folder, {DEFAULT_OUTPUT} by default")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {PAGE} and {PICTURE} in the folder")
    parser.add_argument("--text", action="store_true", help="TEXT-OR-FILE is the text, whatever it looks like")
    parser.add_argument("--max-tokens", type=_positive, default=4_096, help="show this many tokens (default 4096)")
    parser.add_argument("--size", type=_size, help="HEIGHTxWIDTH to which a picture is resized")
    parser.add_argument(
        "--mean", type=_finite, help="of pixels from 0 to 1, by default the image processor's, else 0.5"
    )
    parser.add_argument("--std", type=_above_zero, help="likewise")
    return parser


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises ValueError where writing would need a folder that cannot be, or destroy a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; name a folder")
    existing = [name for name in (PAGE, PICTURE) if (folder / name).exists()]
    if existing and not overwrite:
        raise ValueError(f"--output {folder} holds {' and '.join(existing)} already; add --overwrite to replace")


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error('drawing needs matplotlib: pip install -c constraints.txt -e ".[train]"')
    try:
        check_output(arguments.output, arguments.overwrite)
        config = load_config(arguments.model)
        if config.input_type == "values":
            shown = map_picture(arguments.model, config, arguments)
        else:
            source, data = read_source(arguments.source, arguments.text)
            shown = map_text(arguments.model, config, source, data, arguments.max_tokens)
    except ValueError as error:
        parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    page = build_page(shown)
    with replacing(arguments.output / PICTURE) as partial:
        write_png(shown, partial)
    write_text(arguments.output / PAGE, page)
    print(shown.report)
    print(visible(f"wrote {arguments.output / PAGE} and {arguments.output / PICTURE}"))


if __name__ == "__main__":
    main()
