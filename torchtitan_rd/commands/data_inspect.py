"""Shows what data holds: of text and packed rows some that are decoded and the histogram of their tokens, of
recordings firing rates, counts that collide with the separator, and a raster.

torchtitan-rd data inspect data/spikes --png raster.png
torchtitan-rd data inspect data/packed --tokenizer data/tokenizer --rows 5
torchtitan-rd data inspect train_configs/debug.toml --training.dataset pydoc-train

A path is a file, a folder or a pattern as training.dataset_path takes it. Of a TOML file, which may be
followed by its overrides, the data that it trains on is shown, all sources of a mixture, with the tokenizer
of the run.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torchtitan_rd.checkpoint import saved_states
from torchtitan_rd.commands.arguments import check_outputs
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.config import load_and_warn
from torchtitan_rd.data import (
    DataRanks,
    build_encoder,
    dataset_vocab_size,
    load_tokenizer,
    training_sets,
)
from torchtitan_rd.data.sources import open_source
from torchtitan_rd.data.spikes import SpikeEncoder
from torchtitan_rd.data.tokenizer import Tokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.log import logger
from torchtitan_rd.preparation.inspect import (
    Source,
    draw_row,
    look_at_spikes,
    look_at_tokens,
    open_path,
)
from torchtitan_rd.preparation.manifest import MANIFEST, read_manifest

_USUAL_BIN_MS = 20.0  # of the Neural Pile


@dataclass(frozen=True)
class _Opened:
    """path: where the rows lie, if that is known. name: of a source of a mixture."""

    source: Source
    tokenizer: Tokenizer | None
    path: str | None
    name: str | None = None

    @property
    def holds_spikes(self) -> bool:
        return isinstance(self.source.encoder, SpikeEncoder)


def main(arguments: list[str]) -> int:
    chosen, rest = _parser().parse_known_args(arguments)
    for name, least in (("rows", 0), ("max_rows", 1), ("bins", 1)):
        value = getattr(chosen, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    check_outputs(chosen, "png")
    if chosen.png and chosen.png.suffix.lower() != ".png":
        raise ConfigError(f"--png {chosen.png}: the name must end in .png")
    if chosen.bin_ms is not None and not 0 < chosen.bin_ms < math.inf:
        raise ConfigError(f"--bin-ms {chosen.bin_ms}: must be above 0")

    if chosen.path.endswith(".toml"):
        if chosen.tokenizer or chosen.column or chosen.split != "train":
            raise ConfigError(
                f"{chosen.path} says itself what is read: leave out --tokenizer, --column and --split, "
                "or override model.tokenizer_path and training.column"
            )
        opened = _open_run([f"--job.config_file={chosen.path}", *rest])
    elif rest:
        raise ConfigError(f"unknown arguments {' '.join(rest)}: overrides follow a TOML file alone")
    else:
        tokenizer = load_tokenizer(chosen.tokenizer) if chosen.tokenizer else None
        source, _ = open_path(chosen.path, chosen.split, chosen.column, tokenizer)
        opened = [_Opened(source, tokenizer, chosen.path)]

    # First: reading all rows takes longer than finding that there is no such row.
    if chosen.png:
        _draw(opened, chosen)
    found = {one.name: _look_at(one, chosen) for one in opened}
    # Of a mixture by the names of its sources.
    of_all: Any = found if opened[0].name is not None else next(iter(found.values()))
    if chosen.json:
        print(json.dumps(of_all))
    else:
        print("\n\n".join(_printed(one, name) for name, one in found.items()))
    return 0


def _draw(opened: list[_Opened], chosen: argparse.Namespace) -> None:
    recordings = [one for one in opened if one.holds_spikes]
    if not recordings:
        raise ConfigError(f"--png: {opened[0].source.name} holds no recordings")
    if len(opened) > 1:
        raise ConfigError(f"--png: {chosen.path} is a mixture; name the path of the recordings to draw")
    draw_row(recordings[0].source, chosen.png, row=chosen.row, most_bins=chosen.bins)
    logger.info("%s: row %d", chosen.png, chosen.row)


def _look_at(one: _Opened, chosen: argparse.Namespace) -> dict[str, Any]:
    common = {"shown": chosen.rows, "most_rows": chosen.max_rows}
    if one.holds_spikes:
        return look_at_spikes(one.source, bin_ms=chosen.bin_ms or _bin_ms(one.path), **common)
    return look_at_tokens(one.source, one.tokenizer, **common)


def _open_run(arguments: list[str]) -> list[_Opened]:
    """What a run trains on, read as the run would."""
    loaded = load_and_warn(arguments, Environment.read())
    config = loaded.config
    if config.training.stream:
        raise ConfigError("a stream is not looked at: set --training.stream=false")
    sets = training_sets(config.training, steps=config.training.steps)

    states = saved_states(config.checkpoint, Path(config.job.dump_folder))
    alone = DataRanks(lambda value: [value], 0, 0, states)
    # A run on packed rows needs no tokenizer, and where it names none they are not those of the default.
    named = "model.tokenizer_path" in loaded.origins
    on_text = any(one.row.needs_tokenizer or (named and one.row.kind == "packed") for one in sets)
    tokenizer = load_tokenizer(alone.tokenizer(config.model.tokenizer_path)) if on_text else None
    vocab_size = config.model.vocab_size or dataset_vocab_size(config.training, tokenizer)

    opened = []
    for one in sets:
        keys = alone.pinned(one.keys, one.row, "train", one.name)
        encoder = build_encoder(keys, one.row.kind, tokenizer, vocab_size)
        source, _ = open_source(keys, one.row, encoder, config.training.seed, "train")
        opened.append(_Opened(source, tokenizer, keys.dataset_path, one.name))
    return opened


def _bin_ms(path: str | None) -> float:
    """What `data prepare-spikes` noted beside the rows."""
    if path is not None and (Path(path) / MANIFEST).is_file():
        return float(read_manifest(Path(path))["arguments"].get("bin-ms", _USUAL_BIN_MS))
    return _USUAL_BIN_MS


def _printed(found: dict[str, Any], source: str | None) -> str:
    """As tables. source: its name in a mixture."""
    of_all = "" if found["rows"] == found["rows_in_all"] else f" of {found['rows_in_all']:,}"
    name = found["name"] if source is None else f"{source} ({found['name']})"
    lines = [f"{name}: {found['rows']:,}{of_all} rows, {found['tokens']:,} tokens"]
    lines += [f"{found['empty']:,} rows are empty, {found['unreadable']:,} cannot be read"]
    lines += [f"  {problem}" for problem in found["problems"]]
    if found["sources"]:
        lines += ["", tabulate(found["sources"].items(), ["source", "rows"], intfmt=",")]
    lines.append("")
    lines += _spikes(found) if found["kind"] == "spikes" else _tokens(found)
    return "\n".join(lines)


def _spikes(found: dict[str, Any]) -> list[str]:
    named = {
        "neurons of a row": found["neurons"],
        "time bins of a row": found["bins"],
        "spikes per second of a neuron": found["rates_hz"],
    }
    return [
        _table_of_quantiles(named),
        "",
        f"{found['spikes']:,} spikes in bins of {found['bin_ms']:g} ms; at most {found['largest']} in one",
        f"{found['silent']:,} of {found['neuron_rows']:,} neurons (of each row) are silent",
        f"{found['collisions']:,} counts collide with the separator (255 or more), "
        f"{found['negative']:,} are negative",
        "",
        tabulate([row.values() for row in found["shown"]], ["row", "neurons", "bins", "spikes"], intfmt=","),
    ]


def _tokens(found: dict[str, Any]) -> list[str]:
    lines = [
        _table_of_quantiles({"tokens of a row": found["lengths"]}),
        "",
        f"{found['used']:,} of the {found['vocabulary']:,} tokens of the vocabulary are used, "
        f"{found['outside']:,} tokens lie outside of it",
    ]
    for title, key in (("most frequent", "most"), ("rarest", "least")):
        rows = [
            [token["id"], repr(token["piece"]), token["count"], f"{token['share']:.4%}"]
            for token in found[key]
        ]
        lines += ["", tabulate(rows, [title, "piece", "count", "share"], intfmt=",", disable_numparse=[1])]
    for row in found["shown"]:
        lines += ["", f"row {row['row']}, {row['length']:,} tokens:", row["text"]]
    return lines


def _table_of_quantiles(named: dict[str, dict[str, float]]) -> str:
    columns = next(iter(named.values())).keys()
    rows = [[name, *values.values()] for name, values in named.items()]
    return tabulate(rows, ["", *columns], floatfmt=",.6g")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("data inspect", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("path", metavar="PATH_OR_TOML")
    add("--rows", type=int, default=3, help="rows to show (default 3)")
    add("--max-rows", type=int, help="rows to read, from the first on (default all)")
    add("--split", default="train", help="of a path (default train)")
    add("--column", help="of a path (default: spike_counts, input_ids or text, whichever there is)")
    add("--tokenizer", help="of a path to text or packed rows: as model.tokenizer_path")
    add("--json", action="store_true", help="print one JSON object")
    add = parser.add_argument_group("recordings").add_argument
    add("--bin-ms", type=float, help="length of a bin (default: what manifest.json says, or 20)")
    add("--png", type=Path, metavar="FILE", help="draw a raster there (needs the extra `plots`)")
    add("--row", type=int, default=0, help="of the raster (default 0)")
    add("--bins", type=int, default=500, help="of the raster (default 500)")
    return parser
