"""Fetches the sources that a file lists into one staging folder of parquet, row by row and checked.

torchtitan-rd data download sources.yaml --output staging

    sources:
      manuals:
        address: corpus/*.jsonl     # or the name of a repository on the Hugging Face hub
        features: text
        weight: 2.5
        license: PSF

Bad rows are left out, counted and reported. Run the same line again after an interruption: it goes on.
docs/preparation.md describes it.
"""

import argparse
from pathlib import Path

import pyarrow

from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.preparation.download import arguments_of, download, open_source, read_sources
from torchtitan_rd.preparation.manifest import Output, Recipe


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    file = Path(chosen.sources)
    listed = {name: keys for name, keys in read_sources(file).items() if keys.weight}
    if not listed:
        raise ConfigError(f"{file}: every weight is 0, so nothing is to be fetched")
    sources = [open_source(name, keys, file.parent) for name, keys in listed.items()]

    contents = {name: fact for source in sources for name, fact in source.contents().items()}
    recipe = Recipe("download", arguments_of(listed), contents, None, {"pyarrow": pyarrow.__version__})
    manifest = download(sources, Output.open(Path(chosen.output), recipe))

    for name, facts in manifest["sources"].items():
        bad = ", ".join(f"{count:,} {reason}" for reason, count in facts["bad"].items())
        left_out = f"; left out: {bad}" if bad else ""
        print(f"{name}: {facts['rows']:,} rows, {facts['characters']:,} characters{left_out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("data download", __doc__, allow_abbrev=False)
    parser.add_argument("sources", metavar="SOURCES.yaml", help="the list of sources")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the staging folder")
    return parser
