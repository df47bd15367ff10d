"""Files that are there whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtitan_rd.errors import ConfigError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, an exhausted quota, a file above the size that is allowed."""


def reason_of(error: OSError, path: Path) -> str:
    """Why `path` cannot be written; where there is no room, with the bytes that are left."""
    reason = error.strerror or str(error)
    if error.errno not in NO_ROOM:
        return reason
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return f"{reason}: {shutil.disk_usage(folder).free:,} bytes are free in {folder}"


def replace_file(path: Path, text: str) -> None:
    """A small file of a run in one step: whoever reads it meets the old text or the new. Raises OSError."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text)
    fresh.replace(path)


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends. Until then, and for good if
    the block raises or the disk is full, `path` is what it was.

    what: whose value the path is, such as "--output", for the message. What is no regular file (/dev/stdout)
    is written to directly. Raises ConfigError if the file cannot be written.
    """
    target = path.resolve()  # a link stays one
    if target.exists() and not target.is_file():
        part = target
    else:
        # The suffix stays: by it matplotlib and numpy know the format.
        part = target.with_name(f".part-{os.getpid()}-{target.name}")

    try:
        yield part
        if part != target:
            part.replace(target)
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be written: {reason_of(error, path)}") from None
    finally:
        if part != target:
            with suppress(OSError):
                part.unlink()  # there only if it did not take its place
