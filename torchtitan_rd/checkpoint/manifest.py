"""`manifest.json`: what a checkpoint holds, with a sha256 of every file and of itself; and its verification.

torch.distributed.checkpoint keeps no checksums: a flipped bit,
a zeroed page or another step's shard loads in silence.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from torchtitan_rd.checkpoint.folders import MANIFEST, step_of, write_durably
from torchtitan_rd.checkpoint.safe_reader import TensorInfo
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger

FORMAT = 1
CHUNK_BYTES = 1 << 20
SECOND_LOOK_SECONDS = 1.0
T = TypeVar("T")


class Unreadable(str):
    """A problem of the storage and not, as far as one can see, of the checkpoint: it may pass."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Entry):
    """Size in bytes and sha256 in hex."""

    size: int
    sha256: str


class TensorEntry(_Entry):
    """Shape of the whole tensor (not of a shard), and type as `float32`."""

    shape: list[int]
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor | TensorInfo) -> "TensorEntry":
        return cls(shape=list(tensor.shape), dtype=dtype_name(tensor.dtype))


FileTable = dict[str, FileEntry]  # by file name
TensorTable = dict[str, TensorEntry]  # by `group.name`


class Manifest(_Entry):
    """What one checkpoint holds.

    resumable: it holds the whole training state; otherwise only the model (a seed or an export).
    files: every file but the manifest itself. The digest of the config is that of `config.toml`.
    """

    step: int
    resumable: bool
    world_size: int
    torch_version: str
    program_version: str
    files: FileTable
    tensors: TensorTable
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_durably(folder / MANIFEST, _serialise(self.model_dump()))


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError if the manifest of `folder` is missing, unreadable,
    damaged or of an unknown format.
    """
    try:
        return _read_manifest(folder)
    except OSError as error:
        raise CheckpointError(_unreadable(MANIFEST, error)) from None


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError("it is a symbolic link or not a folder")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"it has no {MANIFEST}: incomplete, or not written by this program")
    text = second_look(lambda: path.read_bytes())
    try:
        content = json.loads(text)["manifest"]
        if text != _serialise(content).encode():
            raise CheckpointError(f"{MANIFEST} is damaged: it does not match its own sha256")
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{MANIFEST} has format {content['format']}; this program reads format {FORMAT}"
            )
        return Manifest.model_validate(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {type(error).__name__}: {error}") from None


def verify(folder: Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Every way in which the checkpoint `folder` differs from its manifest, one line each; [] if it is good.

    What could not be read, twice, is `Unreadable`.

    hashes: read every byte; otherwise only names and sizes are compared.
    share: (i, n) checks only every n-th file, from the i-th, so that n ranks share the work;
        and always the manifest.
    """
    try:
        manifest = _read_manifest(folder)
    except OSError as error:
        return [_unreadable(MANIFEST, error)]
    except CheckpointError as error:
        return [str(error)]
    problems = []
    if step_of(folder.name) not in (None, manifest.step):
        problems.append(f"{MANIFEST} is of step {manifest.step}")
    first, stride = share
    for name in sorted(manifest.files)[first::stride]:
        problems += check_file(folder, name, manifest.files[name], hashes)
    return problems


def hash_files(folder: Path, names: list[str]) -> FileTable:
    """Size and sha256 of files of `folder`, read back from storage."""
    return {
        name: FileEntry(size=(folder / name).stat().st_size, sha256=_sha256(folder / name)) for name in names
    }


def tensor_table(tensors: dict[str, dict[str, torch.Tensor]]) -> TensorTable:
    """What a manifest says of `{group: {name: tensor}}`."""
    return {
        f"{group}.{name}": TensorEntry.of(tensor)
        for group, members in tensors.items()
        for name, tensor in members.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_file(folder: Path, name: str, expected: FileEntry, hashes: bool) -> list[str]:
    """How one file of a checkpoint differs from its entry in the manifest, as `verify` says it."""
    path = folder / name
    if Path(name).name != name:
        return [f"{MANIFEST} names {name!r}, which is outside the folder"]
    try:
        if path.is_symlink() or not path.is_file():
            return [f"{name}: missing, or not a regular file"]
        size = path.stat().st_size
        if size != expected.size:
            return [f"{name}: has {size} bytes, {MANIFEST} says {expected.size}"]
        if not hashes:
            return []
        actual = second_look(lambda: _sha256(path))
        # Perhaps only as it was read: what is set aside must be damaged where it lies.
        if actual != expected.sha256:
            actual = second_look(lambda: _sha256(path))
    except OSError as error:
        return [_unreadable(name, error)]
    return (
        []
        if actual == expected.sha256
        else [f"{name}: sha256 is {actual}, {MANIFEST} says {expected.sha256}"]
    )


def _unreadable(name: str, error: OSError) -> Unreadable:
    return Unreadable(f"{name}: unreadable: {error.strerror or error}")


def second_look(read: Callable[[], T]) -> T:
    """What `read()` returns, the second time if storage fails it the first time:
    a single EIO says little of a disk.
    """
    try:
        return read()
    except OSError as error:
        logger.warning("%s; trying once more", error)
        time.sleep(SECOND_LOOK_SECONDS)
        return read()


def _serialise(content: dict[str, Any]) -> str:
    """The one text of a manifest: any other, down to a blank, is damage."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"manifest": content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def is_damage(problems: Iterable[str]) -> bool:
    """Whether any of them is more than storage that did not let be read."""
    return not all(isinstance(problem, Unreadable) for problem in problems)
