"""The page of charts: what it shows comes from the runs' files, and it needs nothing else."""

import json
import re
from xml.etree import ElementTree

import pytest

from torchtitan_rd.__main__ import main
from torchtitan_rd.metrics.read import read_run
from torchtitan_rd.metrics.report import page

pytest.importorskip("matplotlib")


def write_run(folder, steps=20, lr=0.001, resumed=None, recurrent=True):
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss_mean": 5 / step,
            "lr": lr,
            "grad_norm": 1.0 / step,
            "tokens_seen": step * 100,
        }
        row |= {"tokens_per_second_per_device": 50.0, "memory_max_rss_gib": 0.5, "mfu_full": None}
        if recurrent:
            row |= {"num_steps_no_grad": float(step % 5), "num_steps_with_grad": 4.0, "rel_residual": 0.1}
        if recurrent and step % 10 == 0:
            row |= {"val_loss": 4 / step, "val_loss_1": 6 / step, "val_loss_8": 4 / step}
        if step == resumed:
            row["resumed_from"] = step - 1
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(f'[optimizer]\nlr = {lr}\n[model]\nname = "raven"\nflavor = "a<b"\n')
    return folder


def captions(text: str) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", text)


def test_one_page_shows_all_charts_of_a_recurrent_run_and_needs_nothing_else(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(out)]) == 0
    assert "page.html (" in capsys.readouterr().out
    text = out.read_text()
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory", "Depth drawn"):
        assert title in captions(text)
    assert {"Histogram of depths", "Validation loss per depth"} <= set(captions(text))
    assert "Model FLOPs utilisation" not in captions(text), "no row has a number of it"
    addresses = set(re.findall(r'(?:src|href)="(?!#)[^"]*"', text))
    assert not addresses and "<script" not in text and "<link" not in text and "@import" not in text
    assert "a&lt;b" in text and out.stat().st_size < 600_000


def test_every_chart_is_well_formed_and_no_id_is_used_twice(tmp_path):
    text = page([read_run(write_run(tmp_path / "run"))])
    charts = re.findall("<svg.*?</svg>", text, flags=re.DOTALL)
    ids = [
        element.get("id")
        for chart in charts
        for element in ElementTree.fromstring(chart).iter()
        if element.get("id")
    ]
    assert len(charts) > 7 and len(ids) == len(set(ids))
    for used in re.findall(r"url\(#(.*?)\)|href=\"#(.*?)\"", text):
        assert "".join(used) in ids


def line_of(text: str, title: str) -> list[tuple[float, float]]:
    """The points of the first line of a chart, in the units of the page."""
    chart = re.search(rf"<figcaption>{title}</figcaption>(<svg.*?</svg>)", text, flags=re.DOTALL)[1]
    paths = re.findall(r'<path d="(M[^"]*?)"[^>]*?style="fill: none; stroke: #1f77b4', chart)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", max(paths, key=len))]


def test_a_line_follows_the_numbers(tmp_path):
    """The y axis points down and is linear: distances are in proportion to the differences of the values."""
    points = line_of(page([read_run(write_run(tmp_path / "run", recurrent=False))]), "Loss")
    values = [5 / step for step in range(1, 21)]
    assert len(points) == 20
    share = [(y - points[-1][1]) / (points[0][1] - points[-1][1]) for _, y in points]
    expected = [(value - values[-1]) / (values[0] - values[-1]) for value in values]
    assert share == pytest.approx(expected, abs=1e-3)


def test_runs_are_overlaid_with_what_differs_and_where_they_restarted(tmp_path):
    runs = [write_run(tmp_path / "first", resumed=11), write_run(tmp_path / "second", lr=0.002)]
    records = [read_run(folder) for folder in runs]
    text = page(records)
    assert [record.restarts() for record in records] == [[10], []]
    table = text[text.index("Differences of the configs") :]
    assert re.findall("<td>(.*?)</td>", table) == ["optimizer.lr", "0.001", "0.002"]
    loss = text[text.index("<figcaption>Loss") : text.index("<figcaption>Learning rate")]
    assert "first, training" in loss and "second, training" in loss
    plain = page([read_run(write_run(tmp_path / "third"))])
    dotted = [len(re.findall("stroke-dasharray: 0.8", page_)) for page_ in (page(records[:1]), plain)]
    assert dotted[0] > dotted[1]


def test_the_one_line_of_a_chart_is_a_full_one(tmp_path):
    """As of memory on a CPU, where only the last key is measured: dots are for restarts."""
    text = page([read_run(write_run(tmp_path / "run", recurrent=False))])
    memory = text[text.index("<figcaption>Memory") :]
    line = re.search(r'style="fill: none; (stroke-dasharray: [^"]*?)?stroke: #1f77b4', memory)
    assert line and line[1] is None


def test_a_logarithmic_axis_is_labelled_with_plain_numbers(tmp_path):
    """Gradient norms of 1 down to 0.05."""
    text = page([read_run(write_run(tmp_path / "run"))])
    chart = re.search(r"Gradient norm</figcaption>(<svg.*?</svg>)", text, flags=re.DOTALL)[1]
    assert {"0.05", "0.1", "0.2", "0.5", "1"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", chart))
    assert "tspan" not in chart, "powers of ten are written as such"


def test_bars_and_ticks_stand_at_whole_iterations(tmp_path):
    """Depths of 4 to 8 in turn: their mean is 6, and so is the middle of their bars."""
    text = page([read_run(write_run(tmp_path / "run"))])
    histogram = re.search(r"Histogram of depths</figcaption>(<svg.*?</svg>)", text, flags=re.DOTALL)[1]
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*z\n" clip-path', histogram)
    edges = [(float(left), float(right)) for left, right in bars]
    mean = re.search(
        r'<path d="M ([\d.]+) [\d.]+ \nL \1 [\d.]+ \n" clip-path="[^"]*" style="fill: none; stroke: #1f',
        histogram,
    )
    assert len(edges) == 9 and sum(edges[6]) / 2 == pytest.approx(float(mean[1]), abs=0.01)

    by_depth = re.search(r"Validation loss per depth</figcaption>(<svg.*?</svg>)", text, flags=re.DOTALL)[1]
    assert {"1", "8"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", by_depth))


def test_long_runs_are_thinned_to_what_can_be_seen(tmp_path):
    text = page([read_run(write_run(tmp_path / "run", steps=20_000, recurrent=False))])
    points = line_of(text, "Gradient norm")
    assert len(points) <= 1502 and len(text) < 900_000


def test_a_picture_stands_in_the_page(tmp_path):
    png = tmp_path / "raster.png"
    png.write_bytes(b"\x89PNG\r\n rest")
    assert "data:image/png;base64,iVBORw0K" in page([read_run(write_run(tmp_path / "run"))], [png])


def test_rows_of_another_program_or_version_are_drawn_as_far_as_they_can_be(tmp_path):
    """JSON of others may hold NaN and infinity; a row may lack what another one has."""
    run = write_run(tmp_path / "a $x_$ of_others", steps=3)
    strange = ['{"step": 4, "num_steps_no_grad": NaN, "num_steps_with_grad": 4.0, "val_loss_1": NaN}']
    strange += ['{"step": 5, "num_steps_no_grad": 3.0, "val_loss": Infinity}', '{"step": 1e999}']
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(strange) + "\n")
    read = read_run(run)
    assert [row["step"] for row in read.rows] == [1, 2, 3, 4, 5]
    assert read.series("num_steps_no_grad") == ([1, 2, 3, 5], [1.0, 2.0, 3.0, 3.0])
    text = page([read, read_run(write_run(tmp_path / "b"))])
    assert "Histogram of depths" in captions(text) and "a $x_$ of_others, training" in text


def test_torn_lines_are_left_out_and_bad_input_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss_')
    assert len(read_run(run).rows) == 20
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    for arguments, message in (
        ([str(tmp_path / "empty")], "holds no run: it has no metrics.jsonl"),
        ([str(tmp_path / "new")], "has no rows yet"),
        ([str(run), "--picture", str(run / "config.toml")], "is no PNG"),
        ([str(run), "--output", "/nowhere/page.html"], "/nowhere/page.html: there is no such folder"),
    ):
        assert main(["report", *arguments]) == 1
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
