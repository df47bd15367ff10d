"""Compares a checkpoint, or every checkpoint of a folder, with its checksums.

torchtitan-rd verify outputs/debug/checkpoint
"""

import os
from pathlib import Path

from torchtitan_rd.checkpoint import read_manifest, verify
from torchtitan_rd.checkpoint.folders import MANIFEST, MODEL_ONLY, STEP, step_of
from torchtitan_rd.checkpoint.manifest import FileTable
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import CheckpointError


def main(arguments: list[str]) -> int:
    """Prints a line for each good checkpoint and for each damaged file; 1 if anything is damaged."""
    parser = parser_of("verify", __doc__)
    parser.add_argument("dir", type=Path, help="a step-N folder, or a folder of them")
    folders = _checkpoints(parser.parse_args(arguments).dir.resolve())
    damaged = False
    for folder in folders:
        problems, files = verify(folder), _files(folder)
        if not os.path.lexists(folder):
            print(f"gone {folder}: a run has removed or renamed it meanwhile")
            continue
        damaged = damaged or bool(problems)
        for problem in problems:
            print(f"DAMAGED {folder}: {problem}")
        if not problems:
            print(f"ok {folder} ({len(files)} files, {sum(f.size for f in files.values()):,} bytes)")
    return int(damaged)


def _files(folder: Path) -> FileTable:
    """Of the manifest; none where `verify` has a problem with it."""
    try:
        return read_manifest(folder).files
    except CheckpointError:
        return {}


def _checkpoints(path: Path) -> list[Path]:
    """The folder itself, or the step folders in it, oldest first."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if (path / MANIFEST).exists() or STEP.fullmatch(path.name) or MODEL_ONLY.fullmatch(path.name):
        return [path]
    found = [p for p in path.iterdir() if STEP.fullmatch(p.name) or MODEL_ONLY.fullmatch(p.name)]
    if not found:
        raise CheckpointError(f"{path} has neither a {MANIFEST} nor any step-N folder")
    return sorted(found, key=lambda p: (step_of(p.name), p.name))
