"""Files of torch.save: read without trust and without reading the data, written one tensor at a time.

Such a file is a zip archive without compression: `<any>/data.pkl` describes the objects, `<any>/data/<key>`
holds the bytes of one storage. The reader maps the file, so a tensor costs memory only where it is touched.
It runs the pickle with a table of its own: what is not in it becomes an `Inert` object, so no function that a
file names is called.
"""

import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger

STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
GGUF_REMEDY = (
    "download the Hugging Face folder that it was made from, or let transformers write one: "
    "AutoModelForCausalLM"
    ".from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(OUTPUT), which cannot undo its quantization"
)
_ALIGNMENT = 64  # of each storage in the file, as torch.save has it
# Of a zip member: the lengths of its name and of its extra field come last.
_LOCAL_HEADER = struct.Struct("<26xHH")
_ZIP64_BYTES = 20  # the extra field in which zipfile keeps sizes beyond 4 GiB


class Inert:
    """Stands for an object of any class but the few in the table. Calling it or filling it does nothing;
    it remembers the attributes that the file gives it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    append = extend = add = update = __init__

    def remember(self, state: Any) -> None:
        """Attributes, perhaps followed by those in slots; a state of any other form is dropped."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                vars(self).update({key: value for key, value in part.items() if isinstance(key, str)})


def open_pth(path: Path) -> Any:
    """The object in a file of torch.save;
    its tensors are views of the mapped file (private: changes stay in memory).

    Dictionaries of every kind become dict, sizes tuples; other foreign objects become `Inert`. Raises
    CheckpointError for a file that is missing, damaged or of another format. The checksums of all its parts
    are checked, which reads the whole file once, a piece at a time.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
            if not zipfile.is_zipfile(file):
                raise CheckpointError(f"{path} {_what_else(head)}")
            with zipfile.ZipFile(file) as archive:
                _check_checksums(archive, path)
                records = _Records(file, archive)
        return _Unpickler(records).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can raise any
        raise CheckpointError(
            f"{path} is damaged, or no file of torch.save ({type(error).__name__}: {error}): "
            "download it again"
        ) from None


def _check_checksums(archive: zipfile.ZipFile, path: Path) -> None:
    unknown = 0
    for member in archive.infolist():
        if member.CRC == 0:  # torch.serialization.set_crc32_options(False) writes so
            unknown += member.file_size
        elif member.compress_type == zipfile.ZIP_STORED:
            try:
                with archive.open(member) as part:
                    while part.read(1 << 20):
                        pass
            except zipfile.BadZipFile:
                raise CheckpointError(
                    f"{path}: the bytes of {member.filename} do not match their checksum: download it again"
                ) from None
    if unknown:
        logger.warning("%s: %d bytes in it have no checksum: damage to them would not be seen", path, unknown)


def _what_else(head: bytes) -> str:
    """What a file is that is no zip archive, and what to do."""
    if head.startswith(b"version https://git-lfs"):
        return "is only a pointer of git LFS: download the file itself (git lfs pull)"
    if head.startswith(b"GGUF"):
        return f"is a GGUF file, which is not read here; {GGUF_REMEDY}"
    if head.lstrip()[:1] == b"<":
        remedy = "download it again, with access rights if it asks for them"
        return f"is a web page, not a file of torch.save: {remedy}"
    if head.startswith(b"PK"):
        return "is cut off: download it again"
    if head.startswith(b"\x80\x02"):
        return "has the format from before torch 1.6: torch.load and torch.save it once with a newer torch"
    return f"is {'no file of torch.save' if head else 'empty'}: download it again"


def named_tensors(found: Any, place: str) -> dict[str, torch.Tensor]:
    """`found`, if it is a dictionary of tensors by name. Raises CheckpointError."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{place} holds no dictionary of tensors by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{place}: {name!r} is no plain tensor")
    return found


class _Records:
    """The members of the archive, as parts of one mapping of the file."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile):
        self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("is a zip archive, but not of torch.save: it has no data.pkl")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.members = {member.filename: member for member in archive.infolist()}
        if f"{self.prefix}byteorder" in self.members and self.bytes_of("byteorder") != b"little":
            raise CheckpointError("was written on a big-endian machine, which is not supported")

    def place(self, name: str) -> tuple[int, int]:
        """Offset in the file and length, in bytes."""
        member = self.members.get(self.prefix + name)
        if member is None:
            raise CheckpointError(f"the part {name} is missing: download it again")
        if member.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"the part {name} is compressed, which torch.save does not do")
        start = member.header_offset + _LOCAL_HEADER.size
        start += sum(_LOCAL_HEADER.unpack_from(self.mapped, member.header_offset))
        if start + member.file_size > len(self.mapped):
            raise CheckpointError(f"the part {name} is cut off: download it again")
        return start, member.file_size

    def bytes_of(self, name: str) -> bytes:
        start, length = self.place(name)
        return self.mapped[start : start + length]


class _Unpickler(pickle._Unpickler):
    """Builds dictionaries, lists, sets, plain values, tensors and `Inert` objects, and calls nothing else.

    The pure-Python unpickler, because there each instruction that could reach further can be replaced.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, records: _Records):
        super().__init__(BytesIO(records.bytes_of("data.pkl")), encoding="utf-8")
        self.records = records

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            value = STORAGES.get(name, vars(torch).get(name))
            if isinstance(value, torch.dtype):
                return value
        return _ALLOWED.get((module, name), Inert)

    def get_extension(self, code: int) -> None:
        raise CheckpointError("refused: it uses the extension registry of pickle, which torch.save does not")

    def persistent_load(self, pid: Any) -> Any:
        """A storage, as a 1-D tensor."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            return Inert()
        start, length = self.records.place(f"data/{key}")
        if not isinstance(numel, int) or not 0 <= numel * dtype.itemsize <= length:
            raise CheckpointError(f"data/{key} has {length} bytes, too few for {numel} numbers of {dtype}")
        if not numel:  # torch.frombuffer refuses
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.records.mapped, dtype=dtype, count=numel, offset=start)

    def load_build(self) -> None:
        # The original calls what the file made `__setstate__`, or sets attributes of any object,
        # a class or a function.
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].remember(state)

    dispatch[pickle.BUILD[0]] = load_build


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """rest: requires_grad, hooks and, in newer files, marks of a lazy conjugate or negative."""
    if not isinstance(storage, torch.Tensor):
        return Inert()
    numbers = (offset, *size, *stride)
    if (
        len(size) != len(stride)
        or any(type(number) is not int or number < 0 for number in numbers)
        or any(rest[2:])
    ):
        raise CheckpointError(f"a tensor of size {size}, stride {stride}, offset {offset} is not supported")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if prod(size) and last >= storage.numel():
        raise CheckpointError(f"a tensor of size {size} reaches beyond its {storage.numel()} numbers")
    return storage.as_strided(size, stride, offset) if prod(size) else storage.new_empty(size)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _dict(*args: Any) -> dict:
    return dict(*args)


def _default_dict(factory: Any = None, *args: Any) -> dict:
    return dict(*args)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): _default_dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
}


class _Storage(NamedTuple):
    key: str
    info: TensorInfo


class _Entry:
    """Stands for a tensor while the pickle is written."""

    def __init__(self, key: str, info: TensorInfo):
        self.storage = _Storage(key, info)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = next(name for name, dtype in STORAGES.items() if dtype == value.info.dtype)
        return "storage", getattr(torch, kind), value.key, "cpu", prod(value.info.shape)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Entry):
            return NotImplemented
        shape = tuple(value.storage.info.shape)
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (value.storage, 0, shape, stride, False, OrderedDict())


def write_pth(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> None:
    """Writes {name: tensor} so that `torch.load(path, weights_only=True)` reads it, mapped too,
    checksums included.

    One tensor is in memory at a time. Raises CheckpointError for a type that is not supported,
    before anything is written, and for a tensor that is not as announced.
    """
    for name, info in tensors.items():
        if info.dtype not in STORAGES.values():
            raise CheckpointError(f"{name}: {info.dtype} cannot be written to {path.name}")
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        described = BytesIO()
        entries = {name: _Entry(str(key), info) for key, (name, info) in enumerate(tensors.items())}
        _Pickler(described, protocol=2).dump(entries)
        for name, content in (
            ("data.pkl", described.getvalue()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            _add(archive, file, name, content)
        for name, entry in entries.items():
            # In one expression: a variable would keep the last tensor while the next one is read.
            _add(archive, file, f"data/{entry.storage.key}", _content(name, read(name), entry.storage.info))


def _content(name: str, tensor: torch.Tensor, info: TensorInfo) -> memoryview:
    if TensorInfo(tensor.shape, tensor.dtype) != info:
        raise CheckpointError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {info}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: bytes | memoryview) -> None:
    """One member whose content starts at a multiple of the alignment,
    so that a mapping of the file is aligned.
    """
    member = zipfile.ZipInfo(f"archive/{name}")
    fixed = _LOCAL_HEADER.size + len(member.filename) + _ZIP64_BYTES + 4  # 4: the head of the padding below
    padding = -(file.tell() + fixed) % _ALIGNMENT
    member.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    with archive.open(member, "w", force_zip64=True) as target:
        target.write(content)
