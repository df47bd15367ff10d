"""Documents that are cut into pieces, encoded once: the ids of all of them in a file that every reader maps.

A tokenizer turns whole documents into ids, so a piece would cost as much as its document. The file is written
by whichever process of a node comes first; its name is a digest of the data and of the encoder, so that it
never serves another one, and any file of the folder may be deleted when no run reads it.
"""

import fcntl
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np

from torchtitan_rd.data.cursor import Source, piece_of
from torchtitan_rd.log import logger


class EncodedSource:
    """A source whose documents are encoded already;
    `ids` (all documents one after another), `ends` (of each).
    """

    def __init__(self, source: Source, ids: np.ndarray, ends: np.ndarray):
        self.name, self.border_id = source.name, source.border_id
        self._ids, self._ends = ids, ends

    def __len__(self) -> int:
        return len(self._ends)

    def tokens(self, index: int) -> np.ndarray:
        return self._ids[self._ends[index - 1] if index else 0 : self._ends[index]]

    def piece(self, index: int, part: int, parts: int) -> np.ndarray:
        return piece_of(self.tokens(index), part, parts)


def encode_in_memory(source: Source, dtype: np.dtype) -> EncodedSource:
    """For small data. dtype: an integer type that holds every id. Raises DataError for the first bad row."""
    documents = [source.tokens(i).astype(dtype) for i in range(len(source))]
    return EncodedSource(source, np.concatenate(documents), np.cumsum([len(ids) for ids in documents]))


def encode_once(source: Source, dtype: np.dtype, folder: Path, key: str) -> EncodedSource:
    """The same in `folder / key`, mapped. key: names data and encoder.

    Where the folder cannot be written, the ids are kept in this process's memory, with a warning.
    """
    target = folder / key
    if not _is_whole(target, dtype):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{key}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
                if not _is_whole(target, dtype):
                    _write(source, dtype, target)
        except OSError as error:
            logger.warning(
                "data: %s: encoded documents cannot be kept in %s (%s), so this rank encodes them in its own "
                "memory; set training.cache_folder to a folder that can be written",
                source.name,
                folder,
                error,
            )
            return encode_in_memory(source, dtype)

    logger.info("data: %s: encoded documents are mapped from %s", source.name, target)
    ends = np.load(target / "ends.npy")
    ids = np.memmap(target / "ids.bin", dtype, mode="r") if ends[-1] else np.empty(0, dtype)
    return EncodedSource(source, ids, ends)


def _is_whole(target: Path, dtype: np.dtype) -> bool:
    try:
        ends = np.load(target / "ends.npy")
        return (target / "ids.bin").stat().st_size == int(ends[-1]) * dtype.itemsize
    except (OSError, ValueError, EOFError, IndexError):
        return False


def _write(source: Source, dtype: np.dtype, target: Path) -> None:
    """Beside `target`, then renamed: what has the name is complete. The caller holds the lock."""
    began = time.monotonic()
    logger.info("data: %s: encoding %d documents once, into %s", source.name, len(source), target)
    staged = target.with_name(f"{target.name}.{socket.gethostname()}.staged")
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    shutil.rmtree(target, ignore_errors=True)  # damaged
    staged.mkdir()

    ends: list[int] = []
    try:
        with (staged / "ids.bin").open("wb") as file:
            for index in range(len(source)):
                ids = source.tokens(index).astype(dtype)
                file.write(ids.data)
                ends.append((ends[-1] if ends else 0) + len(ids))
            _sync(file)
        with (staged / "ends.npy").open("wb") as file:
            np.save(file, np.array(ends, np.int64))
            _sync(file)
        staged.rename(target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)  # on a full disk, gigabytes that nothing reads
        raise

    logger.info("data: %s: %d ids in %.1f s", source.name, ends[-1], time.monotonic() - began)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
