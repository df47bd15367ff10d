"""What lies in a folder of checkpoints, for people: nothing is loaded, and nothing changed but by `prune`."""

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from torchtitan_rd.checkpoint.folders import (
    CONFIG,
    EXPORT,
    LEFTOVER,
    SET_ASIDE,
    STEP,
    CheckpointFolder,
    step_of,
)
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.checkpoint.manifest import read_manifest, verify
from torchtitan_rd.errors import CheckpointError

# What a run leaves in its dump folder, one above its checkpoints.
_OF_A_RUN = (".lock", "config.toml")


@dataclass(frozen=True)
class Entry:
    """One folder.

    kind: checkpoint | seed | export | corrupt | superseded | leftover (of a save or a removal that was
    killed). bytes: on disk. complete: all files of the manifest are there with their sizes. verified: their
    hashes were compared and are right. None: not to be said, as of a Hugging Face folder, which has no
    manifest; or not looked at. config: the first 12 digits of the sha256 of the config that wrote it.
    seconds: since it was written. problems: why it is not complete, or not verified.
    """

    name: str
    kind: str
    step: int
    bytes: int
    complete: bool | None
    verified: bool | None
    config: str | None
    seconds: float
    problems: tuple[str, ...] = ()


def checkpoint_folder(path: Path) -> Path:
    """The folder of checkpoints that `path` is, or that lies in it where it is a dump folder.

    Raises CheckpointError.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    inner = path / "checkpoint"
    return inner if inner.is_dir() and not _kinds(path) else path


def inventory(root: Path, *, hashes: bool) -> list[Entry]:
    """All that runs have made in `root`, by step. hashes: read every byte of what has a manifest.

    A run may live there: what it renames or removes under this look is left out.
    """
    kinds = _kinds(root)
    ordered = sorted(kinds, key=lambda name: (_step(name), name))
    entries = (_entry_if_there(root / name, kinds[name], hashes) for name in ordered)
    return [entry for entry in entries if entry is not None]


def prune(root: Path) -> list[Path]:
    """Removes what was set aside as corrupt or superseded and what a killed run left; returns what it was.

    Raises CheckpointError if a living run uses the folder.
    """
    with ExitStack() as held:
        for folder in (root, root.parent):
            if folder == root or any((folder / name).exists() for name in _OF_A_RUN):
                held.callback(FolderLock(folder).release)
        return CheckpointFolder(root).remove_unwanted()


def _kinds(root: Path) -> dict[str, str]:
    """Of each folder that bears one of our names."""
    kinds = {}
    for path in root.iterdir():
        kind = _kind(path.name)
        if kind and path.is_dir() and not path.is_symlink():
            kinds[path.name] = kind
    return kinds


def _kind(name: str) -> str | None:
    if STEP.fullmatch(name):
        return "seed" if name == "step-0" else "checkpoint"
    if EXPORT.fullmatch(name):
        return "export"
    if aside := SET_ASIDE.fullmatch(name):
        return aside["suffix"]
    return "leftover" if LEFTOVER.fullmatch(name) else None


def _entry_if_there(path: Path, kind: str, hashes: bool) -> Entry | None:
    entry = None
    with suppress(FileNotFoundError):
        entry = _entry(path, kind, hashes)
    return entry if path.is_dir() else None


def _entry(path: Path, kind: str, hashes: bool) -> Entry:
    files = []
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # as torch gives `.metadata` its name
            if file.is_file() and not file.is_symlink():
                files.append(file.stat())
    size = sum(file.st_size for file in files)
    written = max((file.st_mtime for file in files), default=path.stat().st_mtime)

    complete: bool | None = None
    verified: bool | None = None
    problems: list[str] = []
    if kind == "leftover":
        complete = False
    elif not path.name.endswith("-hf"):
        problems = verify(path, hashes=False)
        complete = not problems
        if hashes and complete:
            problems = verify(path)
            verified = not problems

    return Entry(
        path.name,
        kind,
        _step(path.name),
        size,
        complete,
        verified,
        _config_digest(path),
        max(time.time() - written, 0.0),
        tuple(problems),
    )


def _config_digest(path: Path) -> str | None:
    try:
        return read_manifest(path).files[CONFIG].sha256[:12]
    except (CheckpointError, KeyError):  # a part of it, or an export of weights alone
        return None


def _step(name: str) -> int:
    found = step_of(name.removeprefix(".tmp-").removeprefix(".trash-"))
    return -1 if found is None else found
