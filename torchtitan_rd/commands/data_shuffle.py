"""Writes packed rows anew in a random order, held-out rows apart, in bounded memory.

torchtitan-rd data shuffle packed --output shuffled
torchtitan-rd data shuffle packed --output shuffled --files 4096 --memory 8 --seed 1

It needs as much room on disk again as the rows take uncompressed while it runs. Run the same line again after
an interruption: it goes on. docs/preparation.md describes it.
"""

import argparse
import math
from pathlib import Path

import pyarrow

from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.preparation.manifest import Output, Recipe
from torchtitan_rd.preparation.shuffle import Order, Packed, shuffle


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    if not 0 < chosen.memory < math.inf:
        raise ConfigError(f"--memory {chosen.memory:g}: expected a number of GiB above 0")
    packed = Packed.open(Path(chosen.input))
    memory = int(chosen.memory * 2**30)
    order = Order.of(packed, chosen.seed, chosen.files, chosen.val_files, memory)
    decided = {"seed": order.seed, "files": order.files["train"], "val-files": order.files["val"]}
    tokenizer, libraries = packed.facts.get("tokenizer"), {"pyarrow": pyarrow.__version__}
    recipe = Recipe("shuffle", decided, packed.contents, tokenizer, libraries)
    manifest = shuffle(packed, order, Output.open(Path(chosen.output), recipe))
    for split, rows in manifest["rows"].items():
        digest = manifest["rows_digest"].get(split)
        print(f"{split}: {rows:,} rows in {order.files[split]:,} files, digest {digest}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("data shuffle", __doc__, allow_abbrev=False)
    parser.add_argument("input", metavar="FOLDER", help="with train/*.parquet and val/*.parquet")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the result is written")
    parser.add_argument("--files", type=int, help="of train (default: as many as there are)")
    parser.add_argument("--val-files", type=int, help="of val (default: as many as there are)")
    parser.add_argument(
        "--memory", type=float, default=1.0, help="GiB, beside the program and 8192 rows (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    return parser
