"""Folders and disks: whether a folder takes a file, and how fast."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from torchtitan_rd.errors import ConfigError

GIB = 2**30
_BLOCK = 8 << 20


class Speed(NamedTuple):
    """Bytes a second, to storage (fsync included), and back. The latter may be memory's."""

    write: float
    read: float


def nearest_folder(path: Path) -> Path:
    """`path`, or the folder above it that exists. Raises ConfigError where a file stands in the way."""
    place = path.absolute()
    while not place.exists():
        if place.is_symlink():
            raise ConfigError(f"{place} is a link to nothing")
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{place} is a file, not a folder")
    return place


def check_writable(path: Path, key: str) -> str:
    """Free space where `path` lies or would be made, as text. A file without a name is made there, and gone.

    key: whose value `path` is. Raises ConfigError.
    """
    try:
        place = nearest_folder(path)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
    except ConfigError as error:
        raise ConfigError(f"{key} = {str(path)!r} cannot be made: {error}; name another folder") from None
    except OSError as error:
        raise ConfigError(
            f"{key} = {str(path)!r}: {place} cannot be written: {error.strerror or error}; "
            "make room or permission there, or name another folder"
        ) from None
    free = shutil.disk_usage(place).free
    return f"{path} can be written, {free / GIB:.1f} GiB are free there"


def measure(folder: Path, size: int = 256 << 20) -> Speed:
    """Writes a temporary file of `size` bytes to `folder`, and reads it. Raises OSError."""
    block = os.urandom(_BLOCK)  # what a file system cannot compress
    with tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        for _ in range(max(size // _BLOCK, 1)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()

        if hasattr(os, "posix_fadvise"):  # so that it is read from storage where the system agrees
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun_reading = time.perf_counter()
        while file.read(_BLOCK):
            pass
        done = time.perf_counter()
    size = max(size // _BLOCK, 1) * _BLOCK
    return Speed(size / (written - begun), size / (done - begun_reading))
