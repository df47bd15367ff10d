"""The table of `pareto` as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.whole_file import whole_file

EQUAL = 0.01
"""Nats a token, within which losses are called equal here: shaded, and linear."""


class Point(Protocol):
    """loss: nats per token. steps: mean iterations. kv_bytes: of the cache, a token."""

    @property
    def kv(self) -> str: ...

    @property
    def criterion(self) -> str: ...

    @property
    def loss(self) -> float: ...

    @property
    def steps(self) -> float: ...

    @property
    def kv_bytes(self) -> float: ...


def draw(path: Path, points: Sequence[Point]) -> None:
    """A PNG: loss against iterations, and against memory; a colour a criterion, a line style a strategy.

    points: those of the fixed depths among them.
    Raises ConfigError without matplotlib, and if the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install 'torchtitan_rd[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(12, 5), layout="constrained")
    plot(axes, points)
    try:
        with whole_file(path, "--png") as part:
            figure.savefig(part, dpi=110)
    except ValueError as error:  # of an unknown suffix
        raise ConfigError(f"--png {path}: {error}") from None
    finally:
        pyplot.close(figure)


def plot(axes: Sequence[Any], points: Sequence[Point]) -> None:
    """axes: two of matplotlib's, by iterations and by memory.

    Drawn is what a loss lies above that of all iterations for every token under the first strategy. Single
    iterations lose ten or a hundred times what is of interest, so the axis is logarithmic beyond EQUAL.
    """
    by_steps, by_bytes = axes
    criteria = list(dict.fromkeys(point.criterion for point in points))
    strategies = list(dict.fromkeys(point.kv for point in points))
    fixed = [point for point in points if (point.kv, point.criterion) == (strategies[0], "fixed")]
    full = max(fixed, key=lambda point: point.steps)

    for kv, style in zip(strategies, ("-", "--", ":", "-.") * len(strategies), strict=False):
        for number, criterion in enumerate(criteria):
            own = [point for point in points if (point.kv, point.criterion) == (kv, criterion)]
            is_fixed = criterion == "fixed"
            look = {
                "color": "black" if is_fixed else f"C{number}",
                "linestyle": style,
                "marker": ".",
                "markersize": 4,
            }
            label = f"{'every token alike' if is_fixed else criterion}, {kv}"
            above = [p.loss - full.loss for p in own]
            by_steps.plot([p.steps for p in own], above, label=label, **look)
            by_bytes.plot([p.kv_bytes / 1024 for p in own], above, **look)

    by_steps.set(
        xlabel="mean iterations a token",
        ylabel=f"nats a token above {full.loss:.4f}, the loss at {full.steps:g} iterations",
    )
    by_bytes.set(xlabel="KiB of keys and values a token")
    for axis in axes:
        axis.set_yscale("symlog", linthresh=EQUAL)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.axhspan(-EQUAL, EQUAL, color="black", alpha=0.06)
        axis.grid(alpha=0.3)
    by_steps.legend(fontsize=7)
