"""Hugging Face and local files as arrow tables: memory-mapped and indexable, or streamed.

`datasets` is imported where it is used: importing this package must stay light.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.content import digest_of
from torchtitan_rd.data.files import HUB_NAME, FileList, find_files
from torchtitan_rd.data.json_text import JsonKind, check_json
from torchtitan_rd.data.read_errors import complaint, is_read_only
from torchtitan_rd.data.row_files import naming_the_file
from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SOURCE_COLUMN = "source_dataset"


class Encoder(Protocol):
    """How the cell of one row becomes ids: `read` the arrow value, `encode` it.
    `where` names the row in messages. columns: of several, a cell is the struct (`cells_of`).
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def border_id(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    def check_type(self, column: "pa.ChunkedArray", name: str) -> None: ...

    def read(self, cell: "pa.Array", where: str) -> Any: ...

    def check(self, value: Any, where: str) -> int: ...

    def encode(self, value: Any, where: str) -> np.ndarray: ...

    def piece(self, value: Any, where: str, part: int, parts: int) -> np.ndarray: ...


class TableSource:
    """The rows of a memory-mapped table, as ids. found: the files that hold them, for messages."""

    def __init__(self, name: str, table: "datasets.Dataset", encoder: Encoder, found: FileList | None = None):
        if not len(table):
            raise DataError(f"{name}: holds no rows")
        check_columns(table.column_names, encoder.columns, name)
        encoder.check_type(cells_of(table.data.table, encoder.columns), name)
        self.name = name
        self.found = found
        self.encoder = encoder
        self.border_id = encoder.border_id
        self.table = table.with_format("arrow", columns=list(encoder.columns))

    def __len__(self) -> int:
        return len(self.table)

    def tokens(self, index: int) -> np.ndarray:
        with naming_the_file(self.found, index, len(self)):
            return encode_row(self.table[index], self.encoder, self.where(index))

    def piece(self, index: int, part: int, parts: int) -> np.ndarray:
        where = self.where(index)
        with naming_the_file(self.found, index, len(self)):
            return self.encoder.piece(read_row(self.table[index], self.encoder, where), where, part, parts)

    def where(self, index: int) -> str:
        """What messages call a row."""
        return f"{self.name}: row {index}"


class SampleSource:
    """A sequence of samples that needs no files, as ids."""

    def __init__(self, name: str, samples: Any, encoder: Encoder):
        self.name = name
        self.samples = samples
        self.encoder = encoder
        self.border_id = encoder.border_id

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> np.ndarray:
        return self.encoder.encode(self.samples[index], self.where(index))

    def piece(self, index: int, part: int, parts: int) -> np.ndarray:
        return self.encoder.piece(self.samples[index], self.where(index), part, parts)

    def where(self, index: int) -> str:
        """What messages call a row."""
        return f"{self.name}: sample {index}"


def read_row(table: "pa.Table", encoder: Encoder, where: str) -> Any:
    """The value of a table of one row."""
    return encoder.read(cells_of(table, encoder.columns).combine_chunks(), where)


def cells_of(table: "pa.Table", columns: Sequence[str]) -> "pa.ChunkedArray":
    """One column, or of several the structs of their values; without a copy."""
    if len(columns) == 1:
        return table.column(columns[0])
    return table.select(list(columns)).to_struct_array()


def encode_row(table: "pa.Table", encoder: Encoder, where: str) -> np.ndarray:
    """The ids of a table of one row."""
    return encoder.encode(read_row(table, encoder, where), where)


def check_columns(
    present: Sequence[str], needed: Sequence[str], name: str | Path, key: str | None = None
) -> None:
    """Raises DataError for the first that is missing. key: what names them; None: a key of [training]."""
    for column in needed:
        if column not in present:
            if key is None:
                several = "training.question_column and answer_column"
                key = "training.column" if len(needed) == 1 else several
            raise DataError(f"{name}: has no column {column!r}, only {', '.join(present)}; set {key}")


def check_path(path: str, split: str = "train", section: str = "training") -> FileList:
    """What `path`, the dataset_path of `section`, names here; no files where it can be the name of a
    repository on the hub. Cheap.

    Raises DataError for a path that neither exists nor can be such a name.
    """
    found = find_files(path, split)
    if not found.files and not found.saved and not HUB_NAME.fullmatch(path):
        raise DataError(
            f"{section}.dataset_path = {path!r}: no such file or folder, and nothing matches it as a pattern"
        )
    return found


def open_table(
    name: str,
    path: str,
    subset: str | None,
    stream: bool,
    split: str = "train",
    found: FileList | None = None,
    revision: str | None = None,
    expected: Mapping[str, JsonKind] | None = None,
    prepared: Sequence[str] = (),
) -> "datasets.Dataset | datasets.IterableDataset":
    """One split of a local path or of a repository on the hub; only columns and rows, no format.

    found: what `check_path` says of the path and split, if that is known.
    revision: of a repository on the hub.
    expected: what columns of JSON must hold in every row. prepared: arrow files into which this split was
    converted already, which are mapped and nobody is asked.
    Raises DataError with the remedy if it cannot be had.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a log file each update is a line
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # opening a local file would ask the hub, once a rank
    found = found or check_path(path, split)
    try:
        if found.saved:
            table = _split_of(datasets.load_from_disk(path), path, split)
            return table.to_iterable_dataset() if stream else table
        if found.files:
            return _open_files(found, stream, expected or {}, prepared)
        if prepared:
            return datasets.concatenate_datasets([_mapped(Path(file)) for file in prepared])
        pinned = {} if revision is None else {"revision": revision}
        return _load(path, subset, split=split, streaming=stream, **pinned)
    except DataError:
        raise
    except Exception as error:  # of the hub, the network, the file system and arrow: a library boundary
        raise DataError(f"{name}: cannot read {complaint(error, found, subset)}") from error


def rows_of(table: "datasets.Dataset", source: str, name: str) -> "datasets.Dataset":
    """The rows whose column `source_dataset` holds `source`. Raises DataError if there are none."""
    if SOURCE_COLUMN not in table.column_names:
        raise DataError(
            f"{name}: training.source_dataset = {source!r}, but it has no column {SOURCE_COLUMN!r}"
        )
    column = table.with_format("arrow", columns=[SOURCE_COLUMN])[:].column(SOURCE_COLUMN)
    sources = np.array(column.to_pylist())
    rows = np.flatnonzero(sources == source)
    if not len(rows):
        known = sorted({str(one) for one in sources.tolist() if one is not None})
        raise DataError(f"{name}: no row is of training.source_dataset = {source!r}{nearest(source, known)}")
    return table.select(rows)


def _open_files(
    found: FileList, stream: bool, expected: Mapping[str, JsonKind], prepared: Sequence[str] = ()
) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    builder = found.builder()
    if builder in ("json", "text") and not any(file.stat().st_size for file in found.files):
        raise DataError(f"{found.path}: holds nothing but empty files ({found.name(found.files[0])}, ...)")
    if builder == "arrow" and not stream:  # mapped where they lie; load_dataset would copy them first
        return datasets.concatenate_datasets([_mapped(p) for p in found.files])
    options: dict[str, Any] = {}
    if builder == "text":  # a byte order mark is no text
        options = {"sample_by": "document", "encoding": "utf-8-sig"}
    options["data_files"] = {"train": _resolved(found.files)}
    if stream:
        if builder == "json" and expected and _refuses_mixed_types():
            options["on_mixed_types"] = None
        return _load(builder, split="train", streaming=True, **options)
    # The library keys its converted copies by path and time of change; a file that changed under the same
    # time would be served from the old copy. A copy of JSON is of files that were checked for these columns.
    checked = expected if builder == "json" else {}
    contents = [(name, c["digest"]) for name, c in found.contents.items()]
    options["name"] = f"content-{digest_of(*contents, *checked)}"
    # The library would look at each file once more. Files that differ from those of the rank that converted
    # its own have another name, and are converted here: the comparison of ranks finds that.
    if prepared and all(_is_copy_called(options["name"], Path(file)) for file in prepared):
        return datasets.concatenate_datasets([_mapped(Path(file)) for file in prepared])
    if checked and not _is_converted(builder, **options):
        for column, kind in checked.items():
            check_json(found.files, column, kind)
    return _load(builder, split="train", streaming=False, **options)


def _resolved(files: list[Path]) -> Any:
    """Files as the datasets library notes them once it has found them, each with the time of its last change.
    Names it would take for patterns, and look for every one of them, which takes a second for some thousands.
    """
    from datasets.data_files import DataFilesList

    changed = [(str(file.stat().st_mtime),) for file in files]
    return DataFilesList([str(file.absolute()) for file in files], changed)


def _is_copy_called(name: str, file: Path) -> bool:
    """Whether the library keeps a file under this name, to which it adds a digest of its own."""
    return any(part.startswith(f"{name}-") for part in file.parts)


def _mapped(file: Path) -> "datasets.Dataset":
    import datasets

    with file.open("rb") as opened:
        if opened.read(6) == b"ARROW1":
            raise DataError(
                f"{file}: an arrow file of the random access kind (Feather), and only the stream kind is "
                f"mapped: write it anew with pyarrow.ipc.new_stream, or as parquet"
            )
    return datasets.Dataset.from_file(str(file))


def _refuses_mixed_types() -> bool:
    """Whether the library can be told to; versions that cannot do nothing else."""
    from datasets.packaged_modules.json.json import JsonConfig

    return hasattr(JsonConfig, "on_mixed_types")


def _is_converted(builder: str, **options: Any) -> bool:
    import datasets

    try:
        return Path(datasets.load_dataset_builder(builder, **options).cache_dir).is_dir()
    except OSError as error:
        if is_read_only(error):  # nothing can be converted either
            return True
        raise


def _load(*arguments: Any, split: str, streaming: bool, **options: Any) -> Any:
    """`datasets.load_dataset`, also where its cache holds what is asked for and cannot be written."""
    import datasets

    try:
        return datasets.load_dataset(*arguments, split=split, streaming=streaming, **options)
    except OSError as error:
        if streaming or not is_read_only(error):
            raise
        prepared = _load_prepared(*arguments, split=split, **options)
        if prepared is None:
            raise
        return prepared


def _load_prepared(*arguments: Any, split: str, **options: Any) -> "datasets.Dataset | None":
    """What a cache that cannot be written holds already, or None.

    The library takes locks beside what it reads, so it is shown the cache through links in
    a temporary folder.
    """
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        for entry in Path(datasets.config.HF_DATASETS_CACHE).iterdir():
            if not entry.name.endswith(".lock"):
                Path(folder, entry.name).symlink_to(entry.resolve())
        builder = datasets.load_dataset_builder(*arguments, cache_dir=folder, **options)
        if not Path(builder.cache_dir, "dataset_info.json").is_file():
            return None
        files = [entry["filename"] for entry in builder.as_dataset(split=split).cache_files]
        return datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(Path(f).resolve())) for f in files]
        )


def _split_of(loaded: Any, path: str, split: str) -> "datasets.Dataset":
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise DataError(f"dataset_path = {path!r}: has no split {split!r}, only {', '.join(loaded)}")
    return loaded[split]
