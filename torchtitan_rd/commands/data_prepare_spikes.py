"""Recordings of neurons (.nwb, .npz, .csv, .txt) -> a folder of spike counts to train on.

torchtitan-rd data prepare-spikes recordings/ --output data/spikes
torchtitan-rd data prepare-spikes areaV1=day1.csv areaV1=day2.csv --unit ms --bin-ms 10 --output data/v1

An input is a file or a folder, or SOURCE=PATH to name the data set that it is part of (otherwise the name of
its folder). docs/spikes.md describes the formats and what becomes of them. The same line goes on where an
earlier one was ended.
"""

import argparse
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torchtitan_rd.commands.data_arguments import given_for
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError

_SHOWN = 40


def main(arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    # Not before the arguments are good: --help needs no parquet.
    from torchtitan_rd.preparation.spike_folder import prepare
    from torchtitan_rd.preparation.spikes import Settings

    settings = Settings(**given_for(Settings, chosen) | {"where": _conditions(chosen.where)})
    manifest = prepare(chosen.inputs, chosen.output, settings)
    print(_summary(manifest))
    print(f"training.dataset_path = {str(chosen.output)!r}")
    return 0


def _conditions(texts: list[str]) -> dict[str, list[str]]:
    """COLUMN=VALUE,VALUE -> column -> values."""
    conditions: dict[str, list[str]] = {}
    for text in texts:
        column, separator, values = text.partition("=")
        if not (column and separator and values):
            raise ConfigError(f"--where {text}: expected COLUMN=VALUE or COLUMN=VALUE,VALUE")
        conditions.setdefault(column, []).extend(values.split(","))
    return conditions


def _summary(manifest: dict[str, Any]) -> str:
    """One line a session and one a split."""
    sessions = manifest["sessions"]
    columns = ("units", "spikes", "outside", "clipped", "bins", "rows", "tokens")
    table = [
        [fact["source"], fact["session"], *(fact[column] for column in columns), len(fact["silent"])]
        for fact in sessions
    ]
    lines = [tabulate(table[:_SHOWN], ["source", "session", *columns, "silent units"], intfmt=",")]
    if len(table) > _SHOWN:
        lines.append(f"... and {len(table) - _SHOWN} more sessions (manifest.json has them all)")
    for name, split in manifest["splits"].items():
        lines.append(f"{name}: {split['rows']:,} rows, {split['tokens']:,} tokens")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("data prepare-spikes", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="[SOURCE=]PATH", help="files, or folders that are searched through")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the result is written")

    add = parser.add_argument_group("recordings").add_argument
    add(
        "--unit",
        default="s",
        help="of the times: s, ms, us or ns; .nwb files always hold seconds (default s)",
    )
    add("--bin-ms", type=float, default=20.0, help="length of a time bin (default 20)")
    add("--start", type=float, help="seconds; default: the bin of a session's first spike")
    add("--stop", type=float, help="seconds; default: behind the bin of its last spike")
    add("--clip", action="store_true", help="counts over 254 become 254; otherwise they are an error")
    add(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE[,VALUE]",
        help=".nwb: only units with such a value, such as location=V1 or quality=good; may be repeated",
    )
    add("--intervals", metavar="TABLE", help=".nwb: a row for each interval of a table, such as trials")

    add = parser.add_argument_group("rows").add_argument
    add("--max-tokens", type=int, default=10_000_000, help="longer sessions are cut equally (default 10 M)")
    add(
        "--test-share",
        type=float,
        default=0.01,
        help="of the rows, held out as the split test (default 0.01)",
    )
    add("--seed", type=int, default=0, help="of the order of the rows, and so of the test split (default 0)")
    return parser
