"""Pictures of a run: the confusion matrix, and which tokens the routers activate."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def write_confusion_matrix(matrix: np.ndarray, labels: list[str], path: Path) -> None:
    """Draws (C, C) counts, rows the true classes, columns the predicted ones."""
    size = 2.4 + 0.5 * len(labels)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(image, ax=axes, label="share of the true class")
    figure.savefig(path, dpi=150)


def write_activations(rates: list[float], confidence: np.ndarray, sequence: np.ndarray, path: Path) -> None:
    """Draws the share of activated tokens a layer, and where they are in one row.

    Args:
        rates: one number from 0 to 1 a layer.
        confidence: (layers, L), or (layers, H, W) for a picture; 0 where a token was skipped.
        sequence: (L,) or (H, W), the row itself.
    """
    layers = len(rates)
    if confidence.ndim == 3:
        figure = Figure(figsize=(2 * (layers + 2) + 1, 2.6), layout="constrained")
        grid = figure.subplots(1, layers + 2, width_ratios=[2] + [1] * (layers + 1))
        bars, maps = grid[0], grid[1:]
        maps[0].imshow(sequence, cmap="gray")
        maps[0].set_title("input", fontsize=9)
        for layer in range(layers):
            shown = maps[layer + 1].imshow(confidence[layer], cmap="magma", vmin=0, vmax=1)
            maps[layer + 1].set_title(f"layer {layer}", fontsize=9)
        for axes in maps:
            axes.set_xticks([])
            axes.set_yticks([])
        figure.colorbar(shown, ax=list(maps), label="confidence")
    else:
        figure = Figure(figsize=(9, 5), layout="constrained")
        bars, line, heat = figure.subplots(3, 1, height_ratios=[2, 1, 2])
        line.plot(sequence, linewidth=0.5, color="#2a6f97")
        line.set_ylabel("input")
        line.set_xlim(0, max(1, len(sequence) - 1))
        shown = heat.imshow(confidence, aspect="auto", interpolation="nearest", cmap="magma", vmin=0, vmax=1)
        heat.set_ylabel("layer")
        heat.set_xlabel("position")
        heat.set_yticks(range(layers))
        figure.colorbar(shown, ax=[line, heat], label="confidence")
    bars.bar(range(layers), [100 * rate for rate in rates], color="#2a6f97")
    bars.set_ylabel("activated tokens (%)")
    bars.set_xlabel("layer")
    bars.set_ylim(0, 100)
    bars.set_xticks(range(layers))
    figure.savefig(path, dpi=150)
