"""The HTML page and the PNG that `activation_map.py` writes."""

import base64
import json
import math
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from activation_cells import Token, cells_of, visible
from torch import Tensor

from modeling_seqboat.analysis_seqboat import ActivationReport

TEMPLATE = Path(__file__).with_suffix(".html")
PNG_COLUMNS = 1_024


@dataclass
class ActivationMap:
    """One row through one model.

    Attributes:
        model: its name; source: what was read.
        confidence: (layers, T) float, 0 at tokens that are not activated.
        report: on that row.
        tokens: the T tokens of a text, or None.
        classes: (T,) int64, places of the tokens in the report's class names, or None.
        pixels: (H, W) uint8 picture with H * W = T, or None.
    """

    model: str
    source: str
    confidence: Tensor
    report: ActivationReport
    tokens: list[Token] | None = None
    classes: Tensor | None = None
    pixels: np.ndarray | None = None

    @property
    def scale(self) -> float:
        """The confidence that gets the strongest colour: the largest found, for most lie near the least one, 0.5."""
        return max(float(self.confidence.max()), 0.51)


def build_page(shown: ActivationMap) -> str:
    """The page as one string: nothing in it refers to another file or to the network."""
    data = json.dumps(_data(shown), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": escape(f"Activation map: {visible(shown.source)}"),
        "model": escape(visible(shown.model)),
        "last": str(len(shown.confidence) - 1),
        "body": _text(shown.tokens) if shown.pixels is None else _picture(shown.pixels),
        "unit": _unit(shown),
        "summary": escape(_summary(shown)),
        "data": data,
    }
    # One pass: what a text contains is never taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text("utf-8"))


def _unit(shown: ActivationMap) -> str:
    if shown.pixels is not None:
        return "pixel"
    return "byte" if all(len(token.text) == 1 for token in shown.tokens) else "token"


def _text(tokens: list[Token]) -> str:
    spans = []
    for cell in cells_of(tokens):
        several = f' data-n="{cell.last - cell.first + 1}"' if cell.last > cell.first else ""
        spans.append(f"<span{several}>{cell.html}</span>")
    return (
        '<div id="map" class="text" role="application" tabindex="0" aria-label="The text, coloured by confidence" '
        f'aria-describedby="keys">{"".join(spans)}</div>'
    )


def _picture(pixels: np.ndarray) -> str:
    height, width = pixels.shape
    return (
        f'<canvas id="map" class="picture" width="{width}" height="{height}" role="application" tabindex="0" '
        'aria-label="The picture, activated pixels coloured by confidence" aria-describedby="keys"></canvas>'
    )


def _summary(shown: ActivationMap) -> str:
    report = shown.report
    rate = float(report.rates.mean())
    return (
        f"{report.tokens:,} {_unit(shown)}s, {len(report.rates)} layers, memory of {report.config.memory_size:,} "
        f"activated {_unit(shown)}s. On average a layer activates {rate:.1%} of them, which "
        f"{_share(report.share_saved)} of what the layers cost with attention always on."
    )


def _share(saved: float) -> str:
    return f"saves {saved:.1%}" if saved >= 0 else f"adds {-saved:.1%} (the routers' own cost)"


def _numbers(values: Tensor) -> list:
    """Nested lists, NaN as null."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.uint8).tobytes()).decode("ascii")


def _data(shown: ActivationMap) -> dict:
    report = shown.report
    confidence = shown.confidence.double()
    # 0 is "skipped"; 1 to 255 stand for confidences from 0.5, the least that activates, to 1.
    coded = torch.where(confidence > 0, 1 + ((confidence - 0.5) * 508).round().clamp(0, 254), 0)
    always_on = report.always_on_flops.total
    return {
        "unit": _unit(shown),
        "memory": report.config.memory_size,
        "bidirectional": report.config.bidirectional,
        "scale": round(shown.scale, 4),
        "confidence": [_bytes(layer) for layer in coded.numpy()],
        "rates": _numbers(report.rates),
        "spans": _numbers(report.spans),
        "contexts": _numbers(report.contexts),
        "saved": [round(saved / always_on, 6) for saved in report.flops_saved],
        "bucketSize": report.bucket_size,
        "bucketRates": _numbers(report.bucket_rates),
        "classNames": list(report.class_names),
        "classTokens": report.class_tokens.tolist(),
        "classRates": _numbers(report.class_rates),
        "labels": None if shown.tokens is None else [token.label for token in shown.tokens],
        "classes": None if shown.classes is None else _bytes(shown.classes.numpy()),
        "pixels": None if shown.pixels is None else _bytes(shown.pixels),
    }


def write_png(shown: ActivationMap, path: Path) -> None:
    """Layers by positions, coloured by confidence, with each layer's rate beside it; for a picture, the picture and
    each layer's activated pixels."""
    # Without pyplot no display is looked for and no global state is touched.
    from matplotlib.figure import Figure

    draw = _draw_positions if shown.pixels is None else _draw_pixels
    figure = Figure(layout="constrained")
    draw(figure, shown)
    # No date and no version: the same decisions give the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_positions(figure, shown: ActivationMap) -> None:
    confidence, count = shown.confidence, shown.confidence.shape[1]
    layers = len(confidence)
    figure.set_size_inches(9, 1.6 + 0.3 * layers)
    grid, rates = figure.subplots(1, 2, width_ratios=[5, 1], sharey=True)
    # A column is the mean of a whole number of tokens, skipped ones at 0.
    each = -(-count // PNG_COLUMNS)
    activation = torch.nn.functional.avg_pool1d(confidence[None].double(), each, ceil_mode=True)[0].numpy()
    image = grid.imshow(
        activation, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=shown.scale,
        extent=(0, activation.shape[1] * each, layers - 0.5, -0.5),
    )  # fmt: skip
    grid.set_xlim(0, count)
    grid.set_xlabel(f"{_unit(shown)} position")
    grid.set_ylabel("layer")
    grid.set_yticks(range(0, layers, max(1, layers // 16)))
    rates.barh(range(layers), [100 * rate for rate in shown.report.rates.tolist()], color="#2a6f97")
    rates.set_xlim(0, 100)
    rates.set_xlabel("activated (%)")
    rates.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=[grid, rates], label="mean confidence", pad=0.01)


def _draw_pixels(figure, shown: ActivationMap) -> None:
    height, width = shown.pixels.shape
    layers = len(shown.confidence)
    columns = min(layers + 1, 5)
    rows = -(-(layers + 1) // columns)
    figure.set_size_inches(2 * columns + 0.6, 2.2 * rows * max(0.5, min(2.0, height / width)) + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for place, axis in enumerate(axes):
        axis.set_axis_off()
        if place > layers:
            continue
        axis.imshow(shown.pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if place == 0:
            axis.set_title("picture", fontsize=9)
            continue
        confidence = shown.confidence[place - 1].view(height, width).double().numpy()
        image = axis.imshow(
            np.ma.masked_equal(confidence, 0), cmap="viridis", vmin=0.5, vmax=shown.scale,
            interpolation="nearest",
            alpha=0.8
        )  # fmt: skip
        axis.set_title(f"layer {place - 1}: {shown.report.rates[place - 1]:.0%}", fontsize=9)
    figure.colorbar(image, ax=axes.tolist(), label="confidence")
