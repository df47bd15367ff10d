"""Spike counts as a picture: neurons by time bins, darker where a neuron spikes more often."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.whole_file import whole_file

_HEIGHT, _NEURONS_PER_INCH, _TALLEST = 3.2, 60, 20.0  # of a panel, in inches


def draw(
    path: Path, panels: Mapping[str, np.ndarray], *, most: int, label: str, line: float | None = None
) -> None:
    """Writes a PNG: for each title the counts (neurons, time bins), below each other.

    most: the count that is black. label: of the axis of time. line: a time bin that is marked.
    Raises ConfigError without matplotlib, and if the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("a raster needs matplotlib: pip install 'torchtitan_rd[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    # As many pixels as neurons, or a row of them would be left out of the picture.
    neurons = max(len(counts) for counts in panels.values())
    height = min(max(_HEIGHT, neurons / _NEURONS_PER_INCH), _TALLEST)
    size = (9, height * len(panels))
    figure, axes = pyplot.subplots(
        len(panels), sharex=True, squeeze=False, figsize=size, layout="constrained"
    )
    for axis, (title, counts) in zip(axes[:, 0], panels.items(), strict=True):
        image = axis.imshow(
            counts, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=max(most, 1)
        )
        if line is not None:
            axis.axvline(line, color="tab:red", linewidth=1)
        axis.set(title=title, ylabel="neuron")
        # Neurons and counts are whole numbers, however few there are.
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    axes[-1, 0].set_xlabel(label)
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="spikes", ticks=MaxNLocator(integer=True), aspect=40)
    try:
        with whole_file(path, "the raster") as part:
            figure.savefig(part, dpi=110)
    finally:
        pyplot.close(figure)
