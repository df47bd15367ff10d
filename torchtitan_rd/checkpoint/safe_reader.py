"""Reads torch.distributed.checkpoint folders without trusting them.

torch's own reader unpickles `.metadata` and byte entries without restriction, which runs whatever code they
name, and follows a `relative_path` out of the folder. This one builds only the classes that torch writes for
tensors, checks every name and number against the files, and gives each problem as a CheckpointError.
"""

import io
import json
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.parallelism.local_part import narrowed

METADATA = ".metadata"
MODEL_SHAPE = "model.json"
# torch.save frames each tensor in a zip file of its own;
# more than this above the data would be something else.
MAX_FRAME_BYTES = 1 << 20


class TensorInfo(NamedTuple):
    """Shape of the whole tensor, and its type."""

    shape: torch.Size
    dtype: torch.dtype


class PlainReader(StorageReader):
    """What every `storage_reader` must answer and ours have nothing to say to."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing to prepare: the metadata is this reader's own."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept from one load to the next."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class SafeReader(PlainReader):
    """A `storage_reader` for `torch.distributed.checkpoint.load`.

    Call `tensors()` or `read_metadata()` first: their CheckpointError is clear,
    while torch hides one raised inside its own load in a CheckpointException, which is not even an Exception.

    folder: holds `.metadata` and its data files.
    prefix: only the tensors whose key starts with it are there at all; what a foreign program stored beside
        them (an optimizer, pickled loader states) is neither checked nor read. Where no key starts with it,
        as in a model that torchtitan 0.1 saved alone, all tensors are there as if theirs did.
    """

    def __init__(self, folder: Path | str, prefix: str = ""):
        self.folder = Path(folder)
        self.prefix = prefix
        self._metadata: Metadata | None = None

    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and type of every tensor by its flat key (`model.layers.0...`), without reading any data."""
        entries = {key: self._entry(key) for key in self.read_metadata().state_dict_metadata}
        return {key: TensorInfo(entry.size, entry.properties.dtype) for key, entry in entries.items()}

    def model_shape(self) -> dict[str, Any]:
        """The fields of `model.json`; empty in a folder of another program. Raises CheckpointError."""
        path = self.folder / MODEL_SHAPE
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None

    def read_metadata(self) -> Metadata:
        """The checked metadata; read once. Raises CheckpointError."""
        if self._metadata is None:
            path = self.folder / METADATA
            if not _is_regular(path):
                raise CheckpointError(f"{self.folder} is not a checkpoint: it has no {METADATA}")
            try:
                found = _Unpickler(io.BytesIO(path.read_bytes())).load()
                self._metadata = self._checked(found)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
            except Exception as error:  # a damaged pickle can raise any
                raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
        return self._metadata

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor, put together from its parts, each checked against the checksum that
        torch stored with it.

        key: as in `tensors()`. Raises CheckpointError. Memory: the tensor and twice its largest part.
        """
        metadata = self.read_metadata()
        entry = self._entry(key)
        whole: torch.Tensor | None = None
        for chunk in entry.chunks:
            info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            path = self.folder / info.relative_path
            with path.open("rb") as file:
                file.seek(info.offset)
                part = _load_tensor(file.read(info.length), f"{path}: {key}", check_sum=True)
            if part.shape != chunk.sizes or part.dtype != entry.properties.dtype:
                raise CheckpointError(
                    f"{path}: {key} holds {part.dtype} {tuple(part.shape)}, not what {METADATA} says"
                )

            if chunk.sizes == entry.size:
                return part
            whole = torch.empty(entry.size, dtype=part.dtype) if whole is None else whole
            narrowed(whole, chunk.offsets, chunk.sizes).copy_(part)

        if whole is None:
            raise CheckpointError(f"{self.folder}: {key} has no parts")
        return whole

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the requested slices into the planner's tensors, one file after another."""
        files = self.read_metadata().storage_data

        def place(item: ReadItem) -> tuple[str, int]:
            info = files[item.storage_index]
            return info.relative_path, info.offset

        for name, items in groupby(sorted(plan.items, key=place), key=lambda item: place(item)[0]):
            with (self.folder / name).open("rb") as file:
                for item in items:
                    self._read_item(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)
        self._metadata = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return (Path(checkpoint_id) / METADATA).is_file()

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.read_metadata().state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata):  # `_checked` has refused it
            raise CheckpointError(f"{self.folder}: {key} is not described as a tensor")
        return entry

    def _read_item(self, file: io.BufferedReader, item: ReadItem, planner: LoadPlanner) -> None:
        key = item.storage_index.fqn
        if item.type != LoadItemType.TENSOR:
            raise CheckpointError(f"{self.folder}: {key} is asked for as bytes; only tensors are read")
        info = self.read_metadata().storage_data[item.storage_index]
        file.seek(info.offset)
        tensor = _load_tensor(file.read(info.length), f"{file.name}: {key}")
        tensor = narrowed(tensor, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{file.name}: {key} has shape {tuple(tensor.shape)}, not {tuple(target.shape)}"
            )
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    def _checked(self, found: Any) -> Metadata:
        """The part of `found` under the prefix, after checking every number in it against the files."""
        if not isinstance(found, Metadata):
            raise CheckpointError(f"holds a {type(found).__name__}, not the metadata of a checkpoint")
        if not any(key.startswith(self.prefix) for key in found.state_dict_metadata):
            found = _prefixed(found, self.prefix)
        entries = {key: e for key, e in found.state_dict_metadata.items() if key.startswith(self.prefix)}
        storage = {index: info for index, info in found.storage_data.items() if index.fqn in entries}

        sizes: dict[str, int] = {}
        for key, entry in entries.items():
            if isinstance(entry, BytesStorageMetadata):
                raise CheckpointError(
                    f"{key} is a pickled Python object, which is never loaded; only tensors are"
                )
            if not isinstance(entry, TensorStorageMetadata) or not isinstance(
                entry.properties.dtype, torch.dtype
            ):
                raise CheckpointError(f"{key} is not described as a tensor")
            if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
                raise CheckpointError(f"{key}: its parts do not add up to shape {tuple(entry.size)}")

            for chunk in entry.chunks:
                index = MetadataIndex(key, chunk.offsets)
                if index not in storage:
                    raise CheckpointError(f"{key}: the part at {tuple(chunk.offsets)} is in no file")
                _check_chunk(key, entry, chunk)
                name = storage[index].relative_path
                if name not in sizes:
                    sizes[name] = self._size_of(name)
                _check_place(
                    key, storage[index], sizes[name], prod(chunk.sizes) * entry.properties.dtype.itemsize
                )

        planner_data = {key: path for key, path in (found.planner_data or {}).items() if key in entries}
        return Metadata(entries, planner_data, storage, version=found.version)

    def _size_of(self, name: Any) -> int:
        """Size in bytes of a data file. Raises CheckpointError for anything but a regular file in
        the folder itself.
        """
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CheckpointError(f"it refers to {name!r}, which is outside the folder")
        if not _is_regular(self.folder / name):
            raise CheckpointError(f"{name} is missing, or not a regular file")
        return (self.folder / name).stat().st_size


def _prefixed(found: Metadata, prefix: str) -> Metadata:
    """The same tensors, each under its key with the prefix; what is no tensor is left out."""
    entries: dict[str, STORAGE_TYPES] = {
        prefix + key: entry
        for key, entry in found.state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    storage = {
        MetadataIndex(prefix + index.fqn, index.offset, index.index): info
        for index, info in found.storage_data.items()
    }
    return Metadata(entries, storage_data=storage, version=found.version)


def _check_chunk(key: str, entry: TensorStorageMetadata, chunk: dcp_metadata.ChunkStorageMetadata) -> None:
    if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
        raise CheckpointError(f"{key}: a part has another number of dimensions than the whole")
    for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
        if offset < 0 or size < 0 or offset + size > whole:
            raise CheckpointError(
                f"{key}: the part at {tuple(chunk.offsets)} reaches beyond shape {tuple(entry.size)}"
            )


def _check_place(key: str, info: Any, file_size: int, data_bytes: int) -> None:
    """A claimed length beyond the file, or a claimed tensor beyond its length,
    would be read as gigabytes of memory.
    """
    if not isinstance(info, _StorageInfo) or info.transform_descriptors:
        raise CheckpointError(f"{key} is stored in a way that this program does not write")
    if info.offset < 0 or info.length < 0 or info.offset + info.length > file_size:
        raise CheckpointError(f"{key}: {info.relative_path} has no {info.length} bytes at {info.offset}")
    if not data_bytes <= info.length <= data_bytes + MAX_FRAME_BYTES:
        raise CheckpointError(f"{key}: {info.length} bytes are not those of a tensor of {data_bytes} bytes")


def _load_tensor(record: bytes, place: str, *, check_sum: bool = False) -> torch.Tensor:
    """One tensor as torch.save wrote it. A compressed zip, which could unfold to any size, is refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise CheckpointError(f"{place}: the data are compressed, which torch does not write")
            if check_sum and archive.testzip() is not None:
                raise CheckpointError(f"{place} is damaged: its bytes do not match their checksum")
        tensor = torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise any
        raise CheckpointError(
            f"{place} is damaged: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{place} is a {type(tensor).__name__}, not a tensor")
    return tensor


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise CheckpointError(f"tensor layout {name!r} is not supported")
    return torch.strided


def _path_text(*parts: str) -> str:
    return "/".join(parts)


_METADATA_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{(dcp_metadata.__name__, name): getattr(dcp_metadata, name) for name in _METADATA_CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    # The path of the folder at the time of writing: kept as text, since nothing here uses it.
    ("pathlib", "PosixPath"): _path_text,
    ("pathlib._local", "PosixPath"): _path_text,
}


_BUILD: Callable[[Any], None] = pickle._Unpickler.dispatch[pickle.BUILD[0]]


class _Unpickler(pickle._Unpickler):
    """Builds only what stands in the table above, and torch's types.

    The pure-Python unpickler, because the C one fills memory up to any memo index that a damaged file names.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(f"refused: it names {module}.{name}, which the metadata of tensors do not need")

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):
            raise CheckpointError("refused: it would change a class")
        _BUILD(self)

    dispatch[pickle.BUILD[0]] = load_build
