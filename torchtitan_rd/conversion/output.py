"""Where a conversion is written: all of it, under its name, or nothing;
under another name if its proof fails.
"""

import itertools
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtitan_rd.checkpoint.folders import fsync
from torchtitan_rd.errors import CheckpointError

# One of these is in every folder that a conversion has written.
_MARKS = (".metadata", "config.json", "checkpoint.pth")


class Refused(CheckpointError):
    """The output is complete, but was not proven to be right."""


def check_output(output: Path, source: Path, needed: int, *, force: bool) -> None:
    """Raises CheckpointError unless `needed` bytes can be written to the folder `output`, and may be.

    source: where the weights are read from. force: a folder that holds a converted model is replaced.
    """
    output, source = output.absolute(), source.absolute()
    if source.is_relative_to(output):
        raise CheckpointError(f"--output_dir {output} is or holds the input {source}: name another folder")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise CheckpointError(f"--output_dir {output} is not a folder: name another one")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise CheckpointError(
                f"--output_dir {output} is not empty: name another folder, or replace it with --force"
            )
        if not any((output / mark).is_file() for mark in _MARKS):
            raise CheckpointError(
                f"--output_dir {output} holds no converted model, so --force does not replace it"
            )
    existing = next(folder for folder in output.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"--output_dir {output} needs {needed:,} bytes and {free:,} are free: free some space"
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that takes its place when the block ends well,
    and is removed otherwise.

    What `check_output` allowed to be replaced stays until then. If the block raises Refused, which ends
    it as another CheckpointError, the folder is kept as NAME.unverified, or NAME.unverified-2, ...
    where that is taken.
    """
    output = output.absolute()
    new_parents = [folder for folder in output.parents if not folder.is_dir()]
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".tmp-{output.name}-{uuid.uuid4().hex}")
    staging.mkdir()

    try:
        yield staging
        for path in staging.iterdir():
            fsync(path)
        fsync(staging)
        _replace(output, staging)
    except Refused as error:
        kept = _unverified(output)
        staging.rename(kept)
        raise CheckpointError(
            f"{error}. {output} was not written; what was converted is kept as {kept}"
        ) from error

    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # one that somebody else has put something into
            for folder in new_parents:
                folder.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{output} was not written: {error}") from error
        raise


def _unverified(output: Path) -> Path:
    """A name that is free."""
    numbers = itertools.count(2)
    kept = output.with_name(f"{output.name}.unverified")
    while kept.exists():
        kept = output.with_name(f"{output.name}.unverified-{next(numbers)}")
    return kept


def _replace(output: Path, staging: Path) -> None:
    old = output.with_name(f".old-{output.name}-{uuid.uuid4().hex}")
    if output.exists():
        output.rename(old)
    try:
        staging.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    fsync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
