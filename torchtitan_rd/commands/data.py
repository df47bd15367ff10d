"""Prepares data, and looks at it. `torchtitan-rd data ACTION --help` says more of each."""

import importlib

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError

# Each is the module data_ACTION.
ACTIONS = {
    "check": "read every row of a run's data for what would stop it",
    "train-tokenizer": "text -> a byte-level tokenizer",
    "download": "the sources of a file -> a folder of parquet",
    "tokenize": "documents -> packed rows of token ids",
    "shuffle": "the same packed rows in a random order",
    "inspect": "rows, histograms, rates and rasters of any data",
    "prepare-spikes": "recordings of neurons -> a folder of spike counts",
}


def main(arguments: list[str]) -> int:
    """Runs one action; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<16} {text}" for name, text in ACTIONS.items())
        print(f"usage: torchtitan-rd data ACTION [arguments]\n\nactions:\n{lines}")
        return 0
    action, *rest = arguments
    if action not in ACTIONS:
        raise ConfigError(f"torchtitan-rd data: unknown action {action!r}{nearest(action, ACTIONS)}")
    return importlib.import_module(f"torchtitan_rd.commands.data_{action.replace('-', '_')}").main(rest)
