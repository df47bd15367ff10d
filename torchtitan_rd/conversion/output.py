"""Where a conversion is written: all of it, under its name, or nothing;
under another name if its proof fails.
"""

import itertools
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtitan_rd.checkpoint.folders import fsync
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.checkpoint.safe_reader import METADATA
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger

# One of these is in every folder that a conversion has written.
_MARKS = (METADATA, "config.json", "checkpoint.pth")
_NEW, _REPLACED = "new", "replaced"  # in the folder beside an output: what it will be, and what it was


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
    """An empty folder that takes the place of `output` when the block ends well, and is removed otherwise.

    What `check_output` allowed to be replaced stays until then. What a conversion to `output` that was killed
    has left is cleared away first, and what it was about to replace comes back. If the block raises Refused,
    which ends it as another CheckpointError, the folder is kept as NAME.unverified, or NAME.unverified-2, ...
    where that is taken. Raises CheckpointError if a living conversion writes to `output`.
    """
    output = output.absolute()
    new_parents = [folder for folder in output.parents if not folder.is_dir()]
    output.parent.mkdir(parents=True, exist_ok=True)
    _clear_away(output)
    # All that is to be cleared away after a kill lies in one folder beside `output`.
    # Its lock tells whose it is.
    around = output.with_name(f".tmp-{output.name}-{uuid.uuid4().hex}")
    staging = around / _NEW
    staging.mkdir(parents=True)
    lock = FolderLock(around)

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
        shutil.rmtree(around, ignore_errors=True)
        with suppress(OSError):  # one that somebody else has put something into
            for folder in new_parents:
                folder.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{output} was not written: {error}") from error
        raise
    finally:
        lock.release()
        shutil.rmtree(around, ignore_errors=True)


def _clear_away(output: Path) -> None:
    """What conversions to `output` left that were killed. Raises CheckpointError if one of them lives."""
    ours = re.compile(rf"\.tmp-{re.escape(output.name)}-[0-9a-f]{{32}}")
    for around in [path for path in output.parent.iterdir() if ours.fullmatch(path.name)]:
        if around.is_symlink() or not around.is_dir():
            continue
        try:
            FolderLock(around).release()
        except CheckpointError as error:
            raise CheckpointError(f"another conversion to {output} is running: {error}") from None
        replaced = around / _REPLACED
        if replaced.is_dir() and not output.exists():
            replaced.rename(output)
            logger.warning("%s is back, which a conversion that was killed was about to replace", output)
        logger.warning("removing %s, left by a conversion that was killed", around)
        shutil.rmtree(around)


def _unverified(output: Path) -> Path:
    """A name that is free."""
    numbers = itertools.count(2)
    kept = output.with_name(f"{output.name}.unverified")
    while kept.exists():
        kept = output.with_name(f"{output.name}.unverified-{next(numbers)}")
    return kept


def _replace(output: Path, staging: Path) -> None:
    replaced = staging.with_name(_REPLACED)
    if output.exists():
        output.rename(replaced)
    try:
        staging.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    fsync(output.parent)
