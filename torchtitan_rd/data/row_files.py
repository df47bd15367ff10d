"""Which file a row lies in: counted when a message is to name it, so nobody keeps a list of all rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan_rd.data.files import FileList
from torchtitan_rd.errors import DataError

_READABLE_BYTES = 4 << 30  # of files whose rows only reading counts: some ten seconds


@contextmanager
def naming_the_file(found: FileList | None, row: int, rows: int) -> Iterator[None]:
    """Adds file and row to a DataError about number `row` of the `rows` that all files hold.

    found: the files, None for rows that lie in none.
    """
    try:
        yield
    except DataError as error:
        place = None if found is None else _place_of(found, row, rows)
        if place is None:
            raise
        raise DataError(f"{error} (row {place[1]} of {place[0]})") from None


def _place_of(found: FileList, row: int, rows: int) -> tuple[Path, int] | None:
    """The file, and the number of the row in it.

    None where the files do not add up to the rows that were read: some are selected, or a file changed; and
    where counting would take longer than anyone waits for a message that has the row number already.
    """
    try:
        if found.builder() == "json" and sum(p.stat().st_size for p in found.files) > _READABLE_BYTES:
            return None
        counts = found.rows
    except (DataError, OSError, ValueError):  # what was to be reported is worse
        return None
    if sum(counts) != rows:
        return None
    for file, count in zip(found.files, counts, strict=True):
        if row < count:
            return file, row
        row -= count
    return None
