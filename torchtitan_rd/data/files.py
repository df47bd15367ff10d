"""Which files a path names: those that are read, those that are not and why,
and what tells their contents apart.
"""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from torchtitan_rd.data.content import digest_of_file, stride_of
from torchtitan_rd.data.json_text import COMPRESSIONS, rows_of_json
from torchtitan_rd.data.library_files import CACHES, LIBRARY_JSON, SAVED, LibraryFiles
from torchtitan_rd.errors import DataError
from torchtitan_rd.log import logger

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".txt": "text"}
_COMPRESSIBLE = ("json", "text")
_OTHER_COMPRESSIONS = (".bz2", ".xz", ".lz4", ".zip", ".7z", ".rar")
_SPLITS = {
    "train": "train(?:ing)?",
    "validation": "val(?:id|idation)?|dev",
    "test": "test(?:ing)?|eval(?:uation)?",
}
_LISTED = 1000  # names that a record holds at most
_OTHER_SPLIT = "named after another split"


@dataclass
class FileList:
    """What `path` holds for one split. files: sorted; left_out: reason -> names, relative to `path`.

    saved: a folder of `save_to_disk`, whose files the `datasets` library knows.
        No files and not saved: not here.
    commit: of a repository on the hub, once it is known.
    """

    path: str
    split: str
    root: Path
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    saved: bool = False
    commit: str | None = None

    def builder(self) -> str:
        """The one kind of all files, as `datasets` calls it. Raises DataError unless there is one."""
        kinds = {BUILDERS.get(_data_suffix(p)) for p in self.files}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None:
            found = ", ".join(sorted({_data_suffix(p) or p.name for p in self.files}))
            raise DataError(
                f"dataset_path = {self.path!r}: expected files of one kind of {', '.join(BUILDERS)} "
                f"(.jsonl and .txt also as .gz or .zst), found {found}"
            )
        return kind

    def name(self, file: Path) -> str:
        """A file's name relative to the folder, if it lies below it."""
        # As text: of thousands of files, pathlib's own way takes longer than to look for them.
        return str(file).removeprefix(self._above)

    @cached_property
    def _above(self) -> str:
        """What the path of a file below the folder begins with."""
        return "" if self.root == Path() else f"{str(self.root).rstrip(os.sep)}{os.sep}"

    @cached_property
    def contents(self) -> dict[str, dict[str, Any]]:
        """Name -> size in bytes and digest of the content, of every file."""
        sizes = {p: p.stat().st_size for p in self.files}
        stride = stride_of(sum(sizes.values()))
        return {
            self.name(p): {"size": size, "digest": digest_of_file(p, stride)} for p, size in sizes.items()
        }

    def sizes(self, times: bool) -> dict[str, dict[str, int]]:
        """Name -> size in bytes, and with `times` the time of the last change in ns, of every file."""
        facts = {self.name(p): p.stat() for p in self.files}
        return {
            name: {"size": f.st_size} | ({"time": f.st_mtime_ns} if times else {})
            for name, f in facts.items()
        }

    @cached_property
    def rows(self) -> list[int]:
        """How many rows each file holds, read from the files themselves. Raises what opening them raises."""
        builder = self.builder()  # looks at all files
        return [_rows_in(file, builder) for file in self.files]

    def add(self, file: Path, why_not: str | None) -> None:
        """Notes a file that is read, or why it is not."""
        if why_not is None:
            self.files.append(file)
        else:
            self.left_out.setdefault(why_not, []).append(self.name(file))

    def log(self, name: str, size: str, remedy: str = "name them alone in dataset_path") -> None:
        """Says what is read and what is not. remedy: how to read what is named otherwise."""
        listed = (
            f", {len(self.files)} files: {some([self.name(p) for p in self.files])}" if self.files else ""
        )
        logger.info("data: %s reads split %s of %s: %s%s", name, self.split, self.path, size, listed)
        for reason, names in self.left_out.items():
            by_name = reason in (_OTHER_SPLIT, self.not_as_others)
            how = f"; a whole word of a name tells the split: rename them, or {remedy}" if by_name else ""
            logger.info(
                "data: %s does not read %d files (%s): %s%s", name, len(names), reason, some(names), how
            )

    @property
    def not_as_others(self) -> str:
        """Why a file is left out that names no split, beside others that do."""
        return f"not named {self.split!r} as others are"

    @property
    def noted_left_out(self) -> dict[str, list[str]]:
        """Reason -> names that are not read, of very many the first."""
        return {reason: names[:_LISTED] for reason, names in self.left_out.items()}

    def record(self, rows: int | None) -> dict[str, Any]:
        """The same as plain values, for the folder of the run."""
        names = [self.name(p) for p in self.files]
        return {
            "path": self.path,
            "split": self.split,
            "rows": rows,
            **({"commit": self.commit} if self.commit else {}),
            "number_of_files": len(names),
            "files": names[:_LISTED],
            "left_out": self.noted_left_out,
        }


def find_files(path: str, split: str = "train") -> FileList:
    """The data files that a file, folder or glob names.

    Of a folder, those named after the split; a folder in which no file is named after `train` is read whole
    to train on, less the files that are named after other splits. Raises DataError where that leaves nothing,
    for a link to a file that is gone, or for data that is compressed in a way that is not read.
    """
    root, of_library = Path(path), LibraryFiles()
    if root.is_file():
        found = FileList(path, split, root.parent, [root])
    elif root.is_dir():
        found = FileList(path, split, root, saved=any((root / name).is_file() for name in SAVED))
        if found.saved:
            return found
        for file in sorted(_walk(root), key=attrgetter("parts")):  # the order of paths, found faster
            found.add(file, _not_data(file) or of_library.reason(file))
        if not found.files:
            raise DataError(f"{path}: a folder without data files (looked for {', '.join(BUILDERS)})")
        _keep_split(found)
    else:
        # Path.glob would take no absolute pattern.
        matches = sorted(Path(p) for p in glob.glob(path, recursive=True))  # noqa: PTH207
        found = FileList(path, split, Path(_plain_part(path)))
        wants_caches = root.name.startswith(CACHES)
        for file in matches:
            if file.is_file() or (_is_data(file) and _is_lost(file)):
                found.add(file, None if wants_caches else of_library.reason(file))
        _keep_split(found)
    _refuse_lost(found)
    _refuse_compressed(found)
    return found


def _walk(root: Path) -> Iterator[Path]:
    """Every file below `root`, through links to folders too, none of them twice.

    Hidden folders, and those that were entered by another name, are not entered and stand for themselves.
    """
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above
            folders.clear()
            yield Path(folder)
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in names)
        yield from (Path(folder, name) for name in folders if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _not_data(file: Path) -> str | None:
    """Why a file of a folder is not read."""
    if file.name.startswith("."):
        return "hidden"
    if file.name in LIBRARY_JSON:
        return "metadata of the datasets library"
    if not file.is_file() and not (_is_data(file) and _is_lost(file)):
        return "a link to a folder that is read already" if file.is_dir() else "not a file"
    return None if _is_data(file) else "not a data file"


def _is_data(file: Path) -> bool:
    """By its name; also what would be data if it were not compressed."""
    return _data_suffix(file) in BUILDERS or _is_refused(file)


def _is_lost(file: Path) -> bool:
    """Whether it is a link to what is not there."""
    return file.is_symlink() and not file.exists()


def _refuse_lost(found: FileList) -> None:
    """A cache that was cleared leaves links behind: data that would be missed without a word."""
    for file in found.files:
        if _is_lost(file):
            raise DataError(
                f"{file}: is a link to {file.readlink()}, which is not there (a cache that was cleared?): "
                "fetch the file again, or remove the link"
            )


def _keep_split(found: FileList) -> None:
    """Leaves only the files of the split.

    A glob of which none is named after it is read whole to train on: it was written out. As held-out data
    nothing of it is read that is named after another split, which may be what was trained on.
    """
    owner = {p: _split_of(found.name(p), found.split) for p in found.files}
    named = [p for p in found.files if owner[p] == found.split]
    unnamed = [p for p in found.files if owner[p] is None]
    is_folder = Path(found.path).is_dir()

    if not found.files:
        return

    if named:
        kept = named
    elif is_folder and found.split != "train":
        count = len(found.files)
        raise DataError(
            f"{found.path}: none of its {count} data files is named after the split {found.split!r}"
        )
    else:
        kept = unnamed

    if not kept and is_folder:
        raise DataError(
            f"{found.path}: each of its {len(found.files)} data files is named after another split than "
            f"{found.split!r} ({some([found.name(p) for p in found.files])}); "
            "name them with a pattern to read them"
        )
    if not kept and found.split != "train":
        raise DataError(
            f"{found.path}: each of the {len(found.files)} files that match is named after another split "
            f"than {found.split!r} ({some([found.name(p) for p in found.files])}); name other files, or the "
            "split that these are of"
        )

    kept = kept or found.files
    kept_set, files = set(kept), found.files  # thousands of files are usual, and each is looked up
    found.files = []
    for file in files:
        by_name = _OTHER_SPLIT if owner[file] else found.not_as_others
        found.add(file, None if file in kept_set else by_name)


def _split_of(name: str, wanted: str) -> str | None:
    """The split that a name belongs to, decided by the innermost folder or file that names one.

    Where that names several splits, it is one of the others: better too little to train on than a test set.
    """
    patterns = _patterns(wanted)
    for part in reversed(Path(name).parts):
        splits = [split for split, pattern in patterns.items() if pattern.search(part)]
        if splits:
            return next((split for split in splits if split != wanted), wanted)
    return None


@cache
def _patterns(wanted: str) -> dict[str, re.Pattern[str]]:
    """How a part of a name says that it is of a split: of each known one, and of `wanted`."""
    words = {**_SPLITS, wanted: _SPLITS.get(wanted, re.escape(wanted))}
    return {
        split: re.compile(rf"(?:^|[^a-z])(?:{word})(?:[^a-z]|$)", re.IGNORECASE)
        for split, word in words.items()
    }


def _data_suffix(file: Path) -> str:
    """The suffix that says what a file holds, in lower case: the one before .gz or .zst of
    a compressed file.
    """
    suffix = file.suffix.lower()
    if suffix not in COMPRESSIONS:
        return suffix
    inner = Path(file.stem).suffix.lower()
    return inner if BUILDERS.get(inner) in _COMPRESSIBLE else suffix


def _is_refused(file: Path) -> bool:
    """Whether a file holds data, compressed in a way that is not read."""
    inner = Path(file.stem).suffix.lower()
    if file.suffix.lower() in COMPRESSIONS:  # such as .parquet.gz, which nobody maps
        return BUILDERS.get(inner, "json") not in _COMPRESSIBLE
    return file.suffix.lower() in _OTHER_COMPRESSIONS and inner in BUILDERS


def _refuse_compressed(found: FileList) -> None:
    for file in found.files:
        suffix = file.suffix.lower()
        if _is_refused(file):
            if suffix in COMPRESSIONS:
                raise DataError(f"{file}: {''.join(file.suffixes[-2:])} files are not read: unpack it")
            raise DataError(
                f"{file}: {suffix} files are not read: unpack it, or compress it with gzip or zstd"
            )
        if suffix == ".zst":
            try:
                import zstandard  # noqa: F401
            except ImportError:
                raise DataError(
                    f"{file}: reading .zst needs the package zstandard: install or unpack it"
                ) from None


def _rows_in(file: Path, builder: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if builder == "text":
        return 1
    if builder == "json":
        return rows_of_json(file)
    if builder == "parquet":
        return pq.read_metadata(file).num_rows
    with pa.memory_map(str(file)) as mapped:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(mapped))


def _plain_part(pattern: str) -> str:
    """The folders of a glob before its first wildcard."""
    plain = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return str(Path(*plain)) if plain else "."


def some(names: list[str]) -> str:
    """`a, b, ... y, z`, for messages."""
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])
