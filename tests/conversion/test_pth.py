"""Files of torch.save: read as torch reads them, no code of a file runs,
writing needs the memory of one tensor.
"""

import contextlib
import copyreg
import functools
import operator
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from io import BytesIO

import numpy as np
import pytest
import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.conversion import pth
from torchtitan_rd.conversion.pth import STORAGES, Inert, open_pth, write_pth
from torchtitan_rd.errors import CheckpointError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "fp32": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "int64": torch.arange(6).reshape(2, 3),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    return tensors | {str(dtype): torch.arange(3).to(dtype) for dtype in STORAGES.values()}


def write(path, tensors: dict[str, torch.Tensor]) -> None:
    write_pth(path, {name: TensorInfo(t.shape, t.dtype) for name, t in tensors.items()}, tensors.__getitem__)


def assert_same(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].stride() == tensor.stride()
        assert torch.equal(found[name], tensor), name


def test_what_torch_saved_is_read_bit_by_bit(tmp_path):
    tensors = some_tensors()
    base = torch.randn(6, 4)
    views = {"transposed": base.T, "part": base[2:4, 1:3], "parameter": torch.nn.Parameter(base)}
    torch.save(tensors | views, tmp_path / "a.pth")
    assert_same(open_pth(tmp_path / "a.pth"), tensors | views)


def test_views_of_one_storage_stay_views_of_one_storage(tmp_path):
    weight = torch.randn(4, 4)
    torch.save({"a": weight, "b": weight}, tmp_path / "a.pth")
    found = open_pth(tmp_path / "a.pth")
    assert found["a"].data_ptr() == found["b"].data_ptr()


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_what_was_written_bit_by_bit(tmp_path, mapped):
    tensors = some_tensors()
    write(tmp_path / "a.pth", tensors)
    found = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
    assert_same(found, tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_what_was_written_is_read_back_and_its_checksums_hold(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "a.pth", tensors)
    assert_same(open_pth(tmp_path / "a.pth"), tensors)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    tensors = {"a": torch.arange(400.0), "b": torch.arange(10)}
    torch.save(tensors, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        place = whole.index(tensors["a"].numpy().tobytes())
        assert any(member.filename.endswith("data/0") for member in archive.infolist())
    for offset in (0, 799, 1599):
        damaged = bytearray(whole)
        damaged[place + offset] ^= 4
        (tmp_path / "b.pth").write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"b\.pth: the bytes of a/data/0 do not match their checksum"
        ):
            open_pth(tmp_path / "b.pth")


def test_a_file_that_was_saved_without_checksums_is_read_and_it_is_said(tmp_path, caplog):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(400.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_pth(tmp_path / "a.pth")["a"], torch.arange(400.0))
    assert "have no checksum: damage to them would not be seen" in caplog.text


def test_a_tensor_that_does_not_lie_in_one_piece_is_written_as_it_reads(tmp_path):
    tensor = torch.randn(4, 6).T
    write(tmp_path / "a.pth", {"a": tensor})
    assert torch.equal(torch.load(tmp_path / "a.pth")["a"], tensor)


def test_a_type_that_cannot_be_written_is_refused_before_the_file_exists(tmp_path):
    with pytest.raises(CheckpointError, match=r"complex64 cannot be written to a\.pth"):
        write(tmp_path / "a.pth", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "a.pth").exists()


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a is torch.float32 \(3,\), not"):
        write_pth(
            tmp_path / "a.pth",
            {"a": TensorInfo(torch.Size([2]), torch.float32)},
            {"a": torch.zeros(3)}.__getitem__,
        )


PEAK = """
import resource, sys
from pathlib import Path
import torch
from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.conversion.pth import open_pth, write_pth
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path, numel = Path(sys.argv[1]), 4 << 20
make = lambda name: torch.full((numel,), float(name))
write_pth(path, {"0": TensorInfo(torch.Size([4]), torch.float32)}, lambda name: torch.zeros(4))
before = peak()
write_pth(path, {str(i): TensorInfo(torch.Size([numel]), torch.float32) for i in range(8)}, make)
written = peak()
found = open_pth(path)
opened = peak()
assert float(found["7"][-1]) == 7.0
print(written - before, opened - written, peak() - opened)
"""


def test_writing_needs_the_memory_of_one_tensor_and_opening_none(tmp_path):
    """8 tensors of 16 MB; ru_maxrss is in KiB."""
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a.pth")]
    written, opened, touched = map(
        int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    )
    assert written < 32 << 10
    assert opened < 4 << 10
    assert touched < 4 << 10


class Anything:
    """A class that the reader does not know, in every way that objects are pickled."""

    def __init__(self):
        self.number = 3
        self.nested = {"names": ["a"]}


class WithState(Anything):
    called = False

    def __setstate__(self, state):
        type(self).called = True


class Table(dict):
    pass


class Row(list):
    pass


def test_other_objects_become_inert_and_keep_their_attributes(tmp_path):
    state = {
        "object": Anything(),
        "table": Table(a=1),
        "row": Row([1]),
        "counts": defaultdict(list, a=[1]),
        "ordered": OrderedDict(a=1),
        "number": np.float64(1.5),
        "array": np.arange(3),
        "function": functools.partial(print, "x"),
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "bytes": b"abc",
        "set": {1, 2},
        "path": tmp_path,
        "weight": torch.arange(3),
    }
    torch.save(state, tmp_path / "a.pth")
    found = open_pth(tmp_path / "a.pth")
    assert (found["object"].number, found["object"].nested) == (3, {"names": ["a"]})
    for name in ("object", "table", "row", "number", "array", "function", "device", "bytes", "path"):
        assert type(found[name]) is Inert, name
    plain = {
        "counts": {"a": [1]},
        "ordered": {"a": 1},
        "size": (2, 3),
        "dtype": torch.bfloat16,
        "set": {1, 2},
    }
    assert {name: found[name] for name in plain} == plain
    assert torch.equal(found["weight"], torch.arange(3))


def test_the_setstate_of_a_file_is_not_called(tmp_path):
    torch.save({"object": WithState()}, tmp_path / "a.pth")
    assert open_pth(tmp_path / "a.pth")["object"].number == 3
    assert not WithState.called


class Calls:
    """Pickles as the call of `function` with `args`, followed by `state`."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """Never called: the pickler wants to see that a call could be."""


def gadgets(canary) -> dict:
    """Ways to make the file `canary`, or to come closer to it."""
    touch = f"touch {canary}"
    return {
        "os.system": Calls(os.system, touch),
        "exec": Calls(exec, f"open({str(canary)!r}, 'w')"),
        "open": Calls(open, str(canary), "w"),
        "Popen": Calls(subprocess.Popen, ["touch", str(canary)]),
        "partial": Calls(Calls(functools.partial, os.system, touch)),
        "attrgetter": Calls(Calls(Calls(operator.attrgetter, "system"), os), touch),
        "methodcaller": Calls(Calls(operator.methodcaller, "system", touch), os),
        "getattr": Calls(Calls(getattr, os, "system"), touch),
        "map": Calls(set, Calls(map, os.system, [touch])),
        "torch.load": Calls(torch.load, f"{canary}.pkl", None, pickle),
        "numpy.save": Calls(np.save, f"{canary}", 1),
        "setstate": Calls(Anything, state={"__setstate__": Calls(functools.partial, os.system, touch)}),
        "factory": Calls(defaultdict, Calls(functools.partial, os.system, touch)),
        "storage": Calls(torch._utils._rebuild_tensor_v2, Calls(os.system, touch), 0, (1,), (1,), False, {}),
    }


class _GadgetPickler(pickle._Pickler):
    def reducer_override(self, value):
        """A module by its name, which no pickler writes by itself."""
        return (__import__, (value.__name__,)) if isinstance(value, type(os)) else NotImplemented


def dump(value, protocol: int = 2) -> bytes:
    target = BytesIO()
    _GadgetPickler(target, protocol).dump(value)
    return target.getvalue()


def save(path, content: bytes, **storages: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("kind", gadgets(""))
def test_no_function_that_a_file_names_is_called(tmp_path, kind, protocol):
    canary = tmp_path / "canary"
    (tmp_path / "canary.pkl").write_bytes(dump(gadgets(canary)["os.system"]))
    path = save(tmp_path / "a.pth", dump({"model": gadgets(canary)[kind]}, protocol))
    with contextlib.suppress(CheckpointError):
        open_pth(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "canary.pkl"]


def test_the_unpickler_of_python_does_run_these(tmp_path):
    for kind in ("os.system", "attrgetter", "partial"):
        pickle.loads(dump(gadgets(tmp_path / kind)[kind]))
        assert (tmp_path / kind).exists()


@pytest.mark.parametrize(
    "opcodes", [b"cposix\nsystem\n(S'%b'\ntR.", b"(S'%b'\niposix\nsystem\n.", b"(cposix\nsystem\nS'%b'\no."]
)
def test_no_instruction_that_calls_reaches_a_function(tmp_path, opcodes):
    content = opcodes.replace(b"%b", f"touch {tmp_path}/canary".encode())
    found = open_pth(save(tmp_path / "a.pth", content))
    assert type(found) is Inert
    assert not (tmp_path / "canary").exists()
    pickle.loads(content)
    assert (tmp_path / "canary").exists()


def test_a_file_cannot_change_the_functions_of_the_reader(tmp_path):
    before = dict(vars(pth._tensor)), dict(vars(Inert))
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"any\nthing"):
        slots = b"c" + name + b"\n(NS'remember'\nN(dS'remember'\nI1\nstb."
        with contextlib.suppress(CheckpointError):
            open_pth(save(tmp_path / "a.pth", slots))
        open_pth(save(tmp_path / "a.pth", b"c" + name + b"\n}S'remember'\nI1\nsb."))
    assert (dict(vars(pth._tensor)), dict(vars(Inert))) == before


def test_the_extension_registry_of_pickle_is_refused(tmp_path):
    copyreg.add_extension("os", "system", 7)
    try:
        with pytest.raises(CheckpointError, match=r"a.pth: refused.*extension registry"):
            open_pth(save(tmp_path / "a.pth", b"\x82\x07."))
    finally:
        copyreg.remove_extension("os", "system", 7)


class _StoragePickler(pickle.Pickler):
    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


def claimed(numel=4, offset=0, size=(2, 2), stride=(2, 1)) -> bytes:
    target = BytesIO()
    storage = ("storage", torch.FloatStorage, "0", "cpu", numel)
    _StoragePickler(target, 2).dump(
        Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    )
    return target.getvalue()


def test_a_claimed_tensor_within_its_data_is_read(tmp_path):
    path = save(tmp_path / "a.pth", claimed(), **{"0": np.arange(4, dtype=np.float32).tobytes()})
    assert torch.equal(open_pth(path), torch.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"numel": 5}, "16 bytes, too few for 5"),
        ({"numel": -1}, "too few"),
        ({"numel": 1 << 62}, "too few"),
        ({"offset": 1}, "reaches beyond its 4 numbers"),
        ({"offset": -1}, "not supported"),
        ({"size": (3, 2)}, "reaches beyond"),
        ({"size": (1 << 62, 1 << 62)}, "reaches beyond"),
        ({"stride": (-2, 1)}, "not supported"),
        ({"stride": (1 << 62, 1)}, "reaches beyond"),
        ({"stride": (2,)}, "not supported"),
        ({"size": (2.0, 2)}, "not supported"),
        ({"size": 4}, "damaged"),
    ],
    ids=str,
)
def test_a_tensor_that_claims_more_than_its_data_is_refused(tmp_path, wrong, message):
    path = save(tmp_path / "a.pth", claimed(**wrong), **{"0": bytes(16)})
    with pytest.raises(CheckpointError, match=rf"a\.pth.*{message}"):
        open_pth(path)


def test_a_missing_or_compressed_part_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.pth: the part data/0 is missing"):
        open_pth(save(tmp_path / "a.pth", claimed()))
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", claimed())
    with pytest.raises(CheckpointError, match=r"b\.pth: the part data\.pkl is compressed"):
        open_pth(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: download it again"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "only a pointer of git LFS"),
        (b"some words", "no file of torch.save: download it again"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.pth .*{message}"):
        open_pth(tmp_path / "a.pth")


def test_a_file_is_refused_wherever_it_is_cut_off(tmp_path):
    torch.save(some_tensors(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for length in (len(whole) - 1, len(whole) - 200, len(whole) // 2, 100):
        (tmp_path / "b.pth").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"b\.pth.*download it again"):
            open_pth(tmp_path / "b.pth")


def test_a_damaged_pickle_is_one_message(tmp_path):
    torch.save(some_tensors(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        content = archive.read("a/data.pkl")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        place, value = torch.randint(len(content), (2,), generator=generator).tolist()
        damaged = content[:place] + bytes([value % 256]) + content[place + 1 :]
        with contextlib.suppress(CheckpointError):
            open_pth(save(tmp_path / "b.pth", damaged, **{str(key): bytes(60) for key in range(16)}))


def test_a_zip_archive_of_another_program_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("words.txt", "words")
    with pytest.raises(CheckpointError, match=r"a\.pth: .*no data\.pkl"):
        open_pth(tmp_path / "a.pth")


@pytest.mark.parametrize(("name", "why"), [("absent.pth", "No such file"), (".", "Is a directory")])
def test_what_cannot_be_read_is_refused(tmp_path, name, why):
    with pytest.raises(CheckpointError, match=f"cannot be read: {why}"):
        open_pth(tmp_path / name)


def test_the_format_from_before_torch_1_6_is_named(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"format from before torch 1\.6: torch\.load and torch\.save it once"
    ):
        open_pth(tmp_path / "a.pth")


def test_changing_a_tensor_in_place_leaves_the_file_alone(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    open_pth(tmp_path / "a.pth")["a"].fill_(1)
    assert (tmp_path / "a.pth").read_bytes() == before
