"""Fetches a data set from the Hugging Face hub into its cache, where training reads it without a network.

torchtitan-rd download-dataset fineweb-edu
torchtitan-rd download-dataset HuggingFaceFW/fineweb-edu --allow_pattern "sample/10BT/000_*.parquet" \\
    --allow_pattern README.md --symlink_to data/fineweb-edu
HF_HUB_CACHE=/large/disk torchtitan-rd download-dataset wikitext

DATASET is a row of the table of data sets, of which the subset is fetched that training reads, or a
repository OWNER/NAME. Run again, it fetches what is missing.
With --symlink_to the files also stand under a path of your choice, for training.dataset_path.
docs/commands.md describes it.
"""

import argparse
from pathlib import Path

from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.data.download import download, files_on_hub


def main(arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    repository, patterns = files_on_hub(chosen.dataset, chosen.allow_pattern)
    link = Path(chosen.symlink_to).expanduser() if chosen.symlink_to else None
    folder = download(repository, patterns, chosen.revision, link)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{repository}: {len(files):,} files, {size / 2**20:,.1f} MiB in {folder}")
    if link is not None:
        print(f"{link} -> {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("download-dataset", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("dataset", nargs="?", default="fineweb-edu", help="default fineweb-edu")
    add(
        "--allow_pattern",
        action="append",
        help="fetch only the files that match; may be given several times (default: the subset's, else all)",
    )
    add("--symlink_to", help="make this path a link to the folder of the data")
    add("--revision", help="branch, tag or commit (default: the newest)")
    return parser
