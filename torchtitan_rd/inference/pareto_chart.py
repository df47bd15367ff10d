"""The table of `pareto` as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torchtitan_rd.errors import ConfigError


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

    Raises ConfigError without matplotlib, and if the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install 'torchtitan_rd[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    criteria = list(dict.fromkeys(point.criterion for point in points))
    strategies = list(dict.fromkeys(point.kv for point in points))
    figure, (by_steps, by_bytes) = pyplot.subplots(1, 2, sharey=True, figsize=(12, 5), layout="constrained")

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
            by_steps.plot([p.steps for p in own], [p.loss for p in own], label=label, **look)
            by_bytes.plot([p.kv_bytes / 1024 for p in own], [p.loss for p in own], **look)

    by_steps.set(xlabel="mean iterations a token", ylabel="loss (nats a token)")
    by_bytes.set(xlabel="KiB of keys and values a token")
    for axis in (by_steps, by_bytes):
        axis.grid(alpha=0.3)
    by_steps.legend(fontsize=7)

    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--png {path}: {error}") from None
    finally:
        pyplot.close(figure)
