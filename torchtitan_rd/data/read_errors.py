"""What an error of the datasets library means, in one line with the remedy."""

import errno
from pathlib import Path

from torchtitan_rd.data.files import FileList
from torchtitan_rd.whole_file import NO_ROOM, reason_of


def complaint(error: Exception, found: FileList, subset: str | None) -> str:
    """What was looked for, what is wrong with it, in one line, and the remedy."""
    if is_read_only(error):
        return (
            f"{found.path}: {_first_line(error)}; the cache of the datasets library cannot be written "
            "and holds no converted copy: set HF_DATASETS_CACHE to a folder that can be written, "
            "or name a save_to_disk folder or .arrow files with training.dataset_path, "
            "which are mapped where they lie"
        )
    if full := _no_room(error):
        import datasets

        cache = Path(datasets.config.HF_DATASETS_CACHE)
        return (
            f"{found.path}: a converted copy has no room in the cache of the datasets library "
            f"({reason_of(full, cache)}): free some space, or set HF_DATASETS_CACHE to a folder that has it"
        )
    reason, file = causes(error), _file_being_read(error)
    if found.files or found.saved:
        return f"{file or found.path}: {reason}; is the file damaged or of another format?"
    return (
        f"{found.path!r} (subset {subset or 'default'}, split {found.split}) on the hub or in its cache: "
        f"{reason}; download it where the hub can be reached, or name an existing local copy "
        "with training.dataset_path; with HF_HUB_OFFLINE=1 only the cache is looked at"
    )


def causes(error: BaseException) -> str:
    """An error of the datasets library with those that led to it, in one line."""
    reasons: list[str] = []
    shown: BaseException | None = error
    while shown is not None:
        if _first_line(shown) not in reasons:
            reasons.append(_first_line(shown))
        shown = shown.__cause__
    return ", caused by ".join(reasons)


def _first_line(error: BaseException) -> str:
    line = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if "BatchSize must be greater than 0" in line:
        return f"{line} (a parquet file without rows: remove it)"
    if "Couldn't cast array of type" in line:
        return f"{line} (a column has another type than in the first file: write it anew, or leave it out)"
    here, expected = (set(getattr(error, f"{whose}_column_names", ())) for whose in ("table", "requested"))
    if here != expected:
        return (
            f"{line}: the files have different columns: here {_listed(here - expected)} more and "
            f"{_listed(expected - here)} less than in the first"
        )
    return line


def _listed(columns: set[str]) -> str:
    return ", ".join(sorted(columns)) or "none"


def _file_being_read(error: BaseException | None) -> str | None:
    """The file that a reader of `datasets` had open when it failed;
    the library says so only in its own log.
    """
    file = None
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_name == "_generate_tables":
                file = trace.tb_frame.f_locals.get("file", file)
            trace = trace.tb_next
        error = error.__cause__
    return None if file is None else str(getattr(file, "name", file))


def _no_room(error: BaseException | None) -> OSError | None:
    """The full disk that led to an error of the datasets library."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None


def is_read_only(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
