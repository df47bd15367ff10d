"""Lists the checkpoints of a run, and clears away what was set aside.

torchtitan-rd checkpoints outputs/debug
torchtitan-rd checkpoints outputs/debug/checkpoint --verify
torchtitan-rd checkpoints outputs/debug --prune
torchtitan-rd checkpoints outputs/debug --json

complete: all files are there with their sizes. verified: their checksums are right, too (--verify reads every
byte; else `-`). config: the first digits of the sha256 of the config that wrote it; equal digits, equal
configs. Status 1 if a step-N is incomplete or damaged.
"""

import json
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from torchtitan_rd.checkpoint.inventory import Entry, checkpoint_folder, inventory, prune
from torchtitan_rd.commands.parsers import parser_of

_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0))


def main(arguments: list[str]) -> int:
    parser = parser_of("checkpoints", __doc__)
    parser.add_argument("dir", type=Path, help="folder of a run, or of its checkpoints")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    parser.add_argument("--json", action="store_true", help="one object an entry, and those of --prune")
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove .corrupt and .superseded folders and what killed runs left (.tmp-, .trash-)",
    )
    chosen = parser.parse_args(arguments)
    root = checkpoint_folder(chosen.dir.resolve())
    removed = [path.name for path in prune(root)] if chosen.prune else []
    entries = inventory(root, hashes=chosen.verify)

    if chosen.json:
        listed = [asdict(entry) for entry in entries]
        print(json.dumps({"folder": str(root), "checkpoints": listed, "removed": removed}, indent=1))
    else:
        for name in removed:
            print(f"removed {name}")
        print(_table(entries) if entries else f"{root} holds no checkpoint")
        for entry in entries:
            for problem in entry.problems:
                print(f"{entry.name}: {problem}")
    is_bad = any(False in (entry.complete, entry.verified) for entry in entries if entry.kind == "checkpoint")
    return int(is_bad)


def _table(entries: list[Entry]) -> str:
    rows = [
        (
            entry.name,
            entry.kind,
            f"{entry.bytes / 1e6:,.1f} MB",
            _word(entry.complete),
            _word(entry.verified),
            entry.config or "-",
            _age(entry.seconds),
        )
        for entry in entries
    ]
    return tabulate(rows, headers=("name", "kind", "size", "complete", "verified", "config", "age"))


def _word(answer: bool | None) -> str:
    return "-" if answer is None else "yes" if answer else "NO"


def _age(seconds: float) -> str:
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
