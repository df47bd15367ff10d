"""Runs as one HTML page: charts as SVG within it, so that it needs neither network nor other files."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.metrics.read import RunRecord, is_number

_POINTS = 1500  # of a line; more cannot be seen, and make the page heavy
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Chart:
    """keys: those of rows that are drawn, with their labels. log: whether the axis is logarithmic."""

    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]
    log: bool = False


CHARTS = (
    Chart("Loss", "nats per token", (("loss_mean", "training"), ("val_loss", "validation"))),
    Chart("Learning rate", "", (("lr", ""),)),
    Chart("Gradient norm", "before clipping", (("grad_norm", ""),), log=True),
    Chart("Throughput", "tokens per second and device", (("tokens_per_second_per_device", ""),)),
    Chart("Model FLOPs utilisation", "share of the peak", (("mfu_full", "full"), ("mfu_causal", "causal"))),
    Chart(
        "Memory",
        "GiB, the fullest rank",
        (
            ("memory_max_reserved_gib", "reserved"),
            ("memory_max_active_gib", "active"),
            ("memory_max_rss_gib", "resident"),
        ),
    ),
    Chart(
        "Time of a step", "seconds", (("step_seconds", "step"), ("data_loading_seconds", "waiting for data"))
    ),
    Chart(
        "Depth drawn",
        "iterations, mean of a logged step",
        (("num_steps_no_grad", "without gradient"), ("num_steps_with_grad", "with gradient")),
    ),
    Chart("Residual of the recurrence", "norm", (("recurrent_residual", ""),), log=True),
    Chart(
        "Relative residual of the recurrence", "share of the state's norm", (("rel_residual", ""),), log=True
    ),
    Chart(
        "Correlation of tokens",
        "",
        (("recurrent_state_token_corr", "state"), ("last_hidden_token_corr", "last hidden")),
    ),
)


def page(runs: Sequence[RunRecord], pictures: Sequence[Path] = ()) -> str:
    """The HTML of some runs, overlaid. pictures: PNG files to show (rasters).
    Raises ConfigError without matplotlib.
    """
    pyplot = _pyplot()
    names = _names(runs)
    charts = [
        _chart(pyplot, runs, names, chart)
        for chart in CHARTS
        if any(run.series(k)[0] for run in runs for k, _ in chart.keys)
    ]
    charts += [draw for draw in (_depths(pyplot, runs, names), _by_depth(pyplot, runs, names)) if draw]
    body = [
        "<h1>Training runs</h1>",
        _summary(runs, names),
        '<div class="charts">',
        *charts,
        "</div>",
        "<p>A dotted vertical line: the run was restarted from the checkpoint of that step.</p>",
        *(_picture(path) for path in pictures),
        _differences(runs, names),
    ]
    return _PAGE.replace("BODY", "\n".join(body))


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("report needs matplotlib: pip install 'torchtitan_rd[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text: smaller, and it can be searched. A `$` in the name of a run begins no formula.
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "report"})
    matplotlib.rcParams["text.parse_math"] = False
    return pyplot


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Of the folders; of equal ones the whole path."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)
    ]


def _chart(pyplot: Any, runs: Sequence[RunRecord], names: Sequence[str], chart: Chart) -> str:
    # A CPU has no reserved memory, a run without validation no second loss: the first line is a full one.
    keys = [(key, label) for key, label in chart.keys if any(run.series(key)[0] for run in runs)]

    def draw(axis: Any) -> None:
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            for dash, (key, label) in zip(_DASHES, keys, strict=False):
                steps, values = _thinned(*run.series(key))
                if not steps:
                    continue
                both = ", ".join(part for part in (name if len(runs) > 1 else "", label) if part)
                marker = {"marker": "."} if len(steps) < 30 else {}
                axis.plot(
                    steps, values, dash, color=f"C{number}", label=both or None, linewidth=1.2, **marker
                )
            for step in run.restarts():
                axis.axvline(step, color=f"C{number}", linestyle=":", linewidth=0.8)
        if chart.log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(pyplot.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(pyplot.NullFormatter())
        axis.set(xlabel="step", ylabel=chart.unit)

    return _figure(pyplot, chart.title, draw)


def _depths(pyplot: Any, runs: Sequence[RunRecord], names: Sequence[str]) -> str | None:
    """How often each number of iterations was drawn, over the logged steps."""
    drawn = []
    for run in runs:
        parts = [(row.get("num_steps_no_grad"), row.get("num_steps_with_grad")) for row in run.rows]
        drawn.append([no_grad + grad for no_grad, grad in parts if is_number(no_grad) and is_number(grad)])
    if not any(drawn):
        return None

    def draw(axis: Any) -> None:
        # Bars stand over their number of iterations, one each as long as they can be told apart.
        most = math.ceil(max(max(depths) for depths in drawn if depths))
        bars = {"bins": min(40, most + 1), "range": (-0.5, most + 0.5), "alpha": 0.6}
        for number, (name, depths) in enumerate(zip(names, drawn, strict=True)):
            if depths:
                axis.hist(depths, color=f"C{number}", label=name, **bars)
                axis.axvline(sum(depths) / len(depths), color=f"C{number}", linewidth=1)
        axis.set(xlabel="iterations of a logged step (line: mean)", ylabel="steps")

    return _figure(pyplot, "Histogram of depths", draw)


def _by_depth(pyplot: Any, runs: Sequence[RunRecord], names: Sequence[str]) -> str | None:
    """The last validation's loss against depth, and the first one's, faint."""
    found = [_validations(run) for run in runs]
    if not any(found):
        return None

    def draw(axis: Any) -> None:
        for number, (name, validations) in enumerate(zip(names, found, strict=True)):
            last_and_first = validations[-1:] + validations[:-1][:1]
            for (step, losses), alpha in zip(last_and_first, (1.0, 0.3), strict=False):
                depths = sorted(losses)
                label = f"{name}, step {step}"
                axis.plot(
                    depths,
                    [losses[d] for d in depths],
                    marker=".",
                    color=f"C{number}",
                    alpha=alpha,
                    label=label,
                )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="iterations", ylabel="nats per token")

    return _figure(pyplot, "Validation loss per depth", draw)


def _validations(run: RunRecord) -> list[tuple[int, dict[int, float]]]:
    found = []
    for row in run.rows:
        depths = {
            int(key.removeprefix("val_loss_")): value
            for key, value in row.items()
            if re.fullmatch(r"val_loss_\d+", key) and is_number(value)
        }
        if depths:
            found.append((row["step"], depths))
    return found


def _figure(pyplot: Any, title: str, draw: Callable[[Any], None]) -> str:
    figure, axis = pyplot.subplots(figsize=(5.6, 3.1), layout="constrained")
    draw(axis)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    # Within one page the charts share a namespace of ids,
    # by which they draw their marks and clip their lines.
    prefix = re.sub(r"\W+", "_", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}_", svg)
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most _POINTS of them, the last one included."""
    stride = -(-len(steps) // _POINTS)
    if stride < 2:
        return steps, values
    places = sorted({*range(0, len(steps), stride), len(steps) - 1})
    return [steps[i] for i in places], [values[i] for i in places]


def _summary(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        model, last = run.config.get("model", {}), run.rows[-1]
        validation = run.series("val_loss")[1]
        rows.append(
            [
                name,
                f"{model.get('name', '')} {model.get('flavor', '')}",
                f"{last['step']}",
                _number(last.get("tokens_seen")),
                _number(last.get("loss_mean")),
                _number(validation[-1] if validation else None),
                ", ".join(map(str, run.restarts())) or "none",
            ]
        )
    return _table(["run", "model", "steps", "tokens", "loss", "validation loss", "restarts at step"], rows)


def _differences(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Keys of the configs that are not the same in all runs; of a single run, all that it states."""
    flat = [{f"{s}.{k}": v for s, keys in run.config.items() for k, v in keys.items()} for run in runs]
    keys = sorted({key for config in flat for key in config})
    if len(runs) > 1:
        keys = [key for key in keys if any(config.get(key) != flat[0].get(key) for config in flat)]
    rows = [
        [key, *(json.dumps(config[key]) if key in config else "unset" for config in flat)] for key in keys
    ]
    title = "Differences of the configs" if len(runs) > 1 else "Config"
    table = _table(["key", *names], rows) if rows else "<p>None.</p>"
    return f"<details{' open' if len(runs) > 1 else ''}><summary><h2>{title}</h2></summary>{table}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _picture(path: Path) -> str:
    """Raises ConfigError if it is no PNG that can be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--picture {path}: {error.strerror}") from None
    if not data.startswith(b"\x89PNG"):
        raise ConfigError(f"--picture {path} is no PNG")
    encoded = base64.b64encode(data).decode("ascii")
    name = html.escape(path.name)
    image = f'<img alt="{name}" src="data:image/png;base64,{encoded}">'
    return f"<figure><figcaption>{name}</figcaption>{image}</figure>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Training runs</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 1.5em auto; max-width: 1240px; padding: 0 1em; color: #222; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 1em; }
figure { margin: 0; border: 1px solid #ddd; border-radius: 4px; padding: .5em; }
figcaption { font-weight: bold; }
figure svg, figure img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ddd; padding: .25em .6em; text-align: left; overflow-wrap: anywhere; }
th { background: #f4f4f4; }
summary h2 { display: inline; }
</style></head><body>
BODY
</body></html>
"""
