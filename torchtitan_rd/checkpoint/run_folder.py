"""The folder that a whole run writes into is one run's alone, with checkpoints or without."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.checkpoint.rank_group import RankGroup
from torchtitan_rd.errors import CheckpointError


@contextmanager
def locked_run_folder(folder: Path, stale: str) -> Iterator[FolderLock | None]:
    """Holds the folder that a whole run writes into, making it if need be;
    gives the lock on rank 0, None elsewhere.

    Collective at the start, and not at the end. Raises CheckpointError on every rank if a living run
    holds it. stale: name of a file that an earlier run left and that would be taken for this one's; a
    refused run leaves it.
    """
    held: list[FolderLock] = []

    def take() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.append(FolderLock(folder))
        except OSError as error:  # the folder is nobody's: where a lock stands, it is found, not written
            _remove(folder / stale)
            raise CheckpointError(
                f"cannot write into {folder}: {error.strerror or error}; make room or permission there, "
                f"or set another job.dump_folder"
            ) from error
        _remove(folder / stale)

    ranks = RankGroup()
    try:
        ranks.from_rank0(take)
        yield held[0] if held else None
    finally:
        for lock in held:
            lock.release()
        ranks.close()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
