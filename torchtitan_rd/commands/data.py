"""Prepares data, and looks at it. `torchtitan-rd data ACTION --help` says more of each."""

import importlib

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError

ACTIONS = {
    "check": ("torchtitan_rd.commands.data_check", "read every row of a run's data for what would stop it"),
    "train-tokenizer": ("torchtitan_rd.commands.data_train_tokenizer", "text -> a byte-level tokenizer"),
    "download": ("torchtitan_rd.commands.data_download", "the sources of a file -> a folder of parquet"),
    "tokenize": ("torchtitan_rd.commands.data_tokenize", "documents -> packed rows of token ids"),
    "shuffle": ("torchtitan_rd.commands.data_shuffle", "the same packed rows in a random order"),
    "inspect": ("torchtitan_rd.commands.data_inspect", "rows, histograms, rates and rasters of any data"),
    "prepare-spikes": (
        "torchtitan_rd.commands.data_prepare_spikes",
        "recordings of neurons -> a folder of spike counts",
    ),
}


def main(arguments: list[str]) -> int:
    """Runs one action; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<16} {text}" for name, (_, text) in ACTIONS.items())
        print(f"usage: torchtitan-rd data ACTION [arguments]\n\nactions:\n{lines}")
        return 0
    action, *rest = arguments
    if action not in ACTIONS:
        raise ConfigError(f"torchtitan-rd data: unknown action {action!r}{nearest(action, ACTIONS)}")
    return importlib.import_module(ACTIONS[action][0]).main(rest)
