"""A picture of how many tokens each layer's router lets through to the attention."""

from pathlib import Path

FILE_NAME = "activation_rates.png"


def write_activation_plot(rates: list[float], path: Path) -> bool:
    """Draw the share of activated tokens a layer as bars.

    Args:
        rates: one number from 0 to 1 a layer.
        path: PNG file to write.

    Returns:
        False, with nothing written, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # Without pyplot no display is looked for and no global state is touched.
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(rates)), [100 * rate for rate in rates], color="#2a6f97")
    axes.set_xlabel("layer")
    axes.set_ylabel("activated tokens (%)")
    axes.set_ylim(0, 100)
    axes.set_xticks(range(0, len(rates), max(1, len(rates) // 16)))
    axes.spines[["top", "right"]].set_visible(False)
    # No date and no version: the same rates give the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True
