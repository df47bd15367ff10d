"""Hugging Face and local files as arrow tables: memory-mapped and indexable, or streamed.

`datasets` is imported where it is used: importing this package must stay light.
"""

import glob
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from torchtitan_rd.errors import DataError
from torchtitan_rd.log import logger

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".txt": "text"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SPLIT_NAMES = {"train": "train(ing)?", "validation": "val(id|idation)?|dev", "test": "test(ing)?"}


class Encoder(Protocol):
    """How the cell of one row becomes ids: `read` the arrow value, `encode` it. `where` names the row in messages."""

    column: str
    border_id: int | None

    def read(self, cell: "pa.Array", where: str) -> Any: ...

    def encode(self, value: Any, where: str) -> np.ndarray: ...


class TableSource:
    """The rows of a memory-mapped table, as ids."""

    def __init__(self, name: str, table: "datasets.Dataset", encoder: Encoder):
        if not len(table):
            raise DataError(f"{name}: holds no rows")
        check_column(table.column_names, encoder.column, name)
        self.name, self.encoder, self.border_id = name, encoder, encoder.border_id
        self._table = table.with_format("arrow", columns=[encoder.column])

    def __len__(self) -> int:
        return len(self._table)

    def tokens(self, index: int) -> np.ndarray:
        return encode_row(self._table[index], self.encoder, f"{self.name}: row {index}")


class SampleSource:
    """A sequence of samples that needs no files, as ids."""

    def __init__(self, name: str, samples: Any, encoder: Encoder):
        self.name, self.samples, self.encoder, self.border_id = name, samples, encoder, encoder.border_id

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> np.ndarray:
        return self.encoder.encode(self.samples[index], f"{self.name}: sample {index}")


def encode_row(table: "pa.Table", encoder: Encoder, where: str) -> np.ndarray:
    """The ids of a table of one row."""
    cell = table.column(encoder.column).combine_chunks()
    return encoder.encode(encoder.read(cell, where), where)


def check_column(columns: list[str], column: str, name: str) -> None:
    if column not in columns:
        raise DataError(f"{name}: has no column {column!r}, only {', '.join(columns)}; set training.column")


def check_path(path: str) -> None:
    """Raises DataError for a path that neither exists nor can be the name of a repository on the hub. Cheap."""
    if not local_files(path) and not _HUB_NAME.fullmatch(path):
        raise DataError(
            f"training.dataset_path = {path!r}: no such file or folder, and nothing matches it as a pattern"
        )


def open_table(
    name: str, path: str, subset: str | None, stream: bool, split: str = "train"
) -> "datasets.Dataset | datasets.IterableDataset":
    """One split of a local path or of a repository on the hub; only columns and rows, no format.

    Raises DataError with the remedy if it cannot be had.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a log file each update is a line
    check_path(path)
    local = local_files(path, split)
    try:
        if Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file():
            table = _split_of(datasets.load_from_disk(path), path, split)
            return table.to_iterable_dataset() if stream else table
        if local:
            return _open_files(path, local, stream)
        return datasets.load_dataset(path, subset, split=split, streaming=stream)
    except DataError:
        raise
    except Exception as error:  # of the hub, the network, the file system and arrow: a library boundary
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        looked_for = (
            path if local else f"{path!r} (subset {subset or 'default'}, split {split}) on the hub or in its cache"
        )
        remedy = (
            "is the file damaged or of another format?"
            if local
            else "download it where the hub can be reached, or name an existing local copy with training.dataset_path; "
            "with HF_HUB_OFFLINE=1 only the cache is looked at"
        )
        raise DataError(f"{name}: cannot read {looked_for}: {reason}; {remedy}") from error


def local_files(path: str, split: str = "train") -> list[Path]:
    """The data files that a file, folder or glob names, sorted; of a folder, those named after the split.

    A folder in which no file is named after it is read whole to train on. Raises DataError for any other split.
    """
    root = Path(path)
    if not root.is_dir():
        return [root] if root.is_file() else sorted(Path(p) for p in glob.glob(path, recursive=True))  # noqa: PTH207 (absolute patterns too)
    files = sorted(p for p in root.rglob("*") if p.suffix in BUILDERS and p.is_file())
    name = re.compile(rf"(^|[^a-z])({_SPLIT_NAMES.get(split, re.escape(split))})([^a-z]|$)", re.IGNORECASE)
    named = [p for p in files if name.search(str(p.relative_to(root)))]
    if files and not named and split != "train":
        raise DataError(f"{path}: none of its {len(files)} data files is named after the split {split!r}")
    return named or files or [root]


def _open_files(path: str, files: list[Path], stream: bool) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    kinds = {BUILDERS.get(p.suffix) for p in files}
    if len(kinds) > 1 or None in kinds:
        found = ", ".join(sorted({p.suffix or p.name for p in files}))
        raise DataError(
            f"training.dataset_path = {path!r}: expected files of one kind of {', '.join(BUILDERS)}, found {found}"
        )
    builder = kinds.pop()
    if builder == "arrow" and not stream:  # mapped where they lie; load_dataset would copy them first
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(p)) for p in files])
    options = {"sample_by": "document"} if builder == "text" else {}
    logger.info("data: %d %s files in %s", len(files), builder, path)
    return datasets.load_dataset(
        builder, data_files=[str(p) for p in files], split="train", streaming=stream, **options
    )


def _split_of(loaded: Any, path: str, split: str) -> "datasets.Dataset":
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise DataError(f"dataset_path = {path!r}: has no split {split!r}, only {', '.join(loaded)}")
    return loaded[split]
