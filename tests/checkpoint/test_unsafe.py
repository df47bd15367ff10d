"""A checkpoint from elsewhere runs no code, reaches no other file,
and takes no more memory than it has bytes.
"""

import io
import os
import pickle
import random
import resource
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp

from torchtitan_rd.checkpoint import SafeReader
from torchtitan_rd.checkpoint.loading import read_tensors
from torchtitan_rd.checkpoint.rank_group import RankGroup
from torchtitan_rd.errors import CheckpointError

VALUE = torch.arange(12.0).reshape(3, 4)


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "weights"
    dcp.save({"model": {"a": VALUE, "b": VALUE.to(torch.bfloat16)}}, checkpoint_id=path)
    return path


def rewrite(folder, change):
    """Edits the metadata as a forger could, with torch's own classes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def load(folder, prefix=""):
    target = {"model": {"a": torch.zeros(3, 4)}}
    read_tensors(SafeReader(folder, prefix), target, RankGroup())
    return target["model"]["a"]


def storage(metadata, key="model.a"):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def test_an_honest_folder_is_read_in_whole_and_listed_without_reading_data(folder):
    assert torch.equal(load(folder), VALUE)
    found = SafeReader(folder).tensors()
    assert {key: (tuple(i.shape), i.dtype) for key, i in found.items()} == {
        "model.a": ((3, 4), torch.float32),
        "model.b": ((3, 4), torch.bfloat16),
    }


def test_a_code_object_in_the_metadata_is_refused_unexecuted(folder, tmp_path):
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match=r"refused: it names posix\.mkdir"):
        SafeReader(folder).read_metadata()
    rewrite_target = {"planner_data": Evil(tmp_path / "canary")}
    (folder / ".metadata").write_bytes(pickle.dumps(rewrite_target))
    with pytest.raises(CheckpointError, match="refused"):
        SafeReader(folder).read_metadata()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "os system", "torch load", "torch.hub load", "builtins getattr"]
)
def test_no_function_can_be_named(folder, name):
    module, function = name.split()
    (folder / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(CheckpointError, match="refused"):
        SafeReader(folder).read_metadata()


def test_a_class_cannot_be_changed_through_its_pickle(folder):
    attack = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}Vversion\nV666\nstb."
    (folder / ".metadata").write_bytes(attack)
    with pytest.raises(CheckpointError, match="refused: it would change a class"):
        SafeReader(folder).read_metadata()
    assert dcp.metadata.Metadata.version is None


def test_pickled_objects_among_the_values_are_refused_where_wanted_and_left_alone_elsewhere(tmp_path):
    evil = Evil(tmp_path / "canary")
    dcp.save({"model": {"a": VALUE}, "train_state": evil}, checkpoint_id=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"^[^:]*\.metadata: train_state is a pickled Python object"):
        load(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run", prefix="model."), VALUE)
    dcp.save({"model": {"a": VALUE, "b": evil}}, checkpoint_id=tmp_path / "worse")
    with pytest.raises(CheckpointError, match=r"model\.b is a pickled Python object"):
        load(tmp_path / "worse", prefix="model.")
    assert not (tmp_path / "canary").exists()


def test_paths_out_of_the_folder_are_refused(folder, tmp_path):
    outside = tmp_path / "outside.distcp"
    outside.write_bytes((folder / "__0_0.distcp").read_bytes())
    for path in ("../outside.distcp", str(outside), "..", "", "sub/../../outside.distcp", "a\0b"):
        rewrite(folder, lambda metadata, path=path: setattr(storage(metadata), "relative_path", path))
        with pytest.raises(CheckpointError, match="outside the folder"):
            SafeReader(folder).read_metadata()


def test_a_symlinked_shard_or_metadata_is_refused(folder, tmp_path):
    for name in ("__0_0.distcp", ".metadata"):
        (folder / name).rename(tmp_path / "real")
        (folder / name).symlink_to(tmp_path / "real")
        with pytest.raises(CheckpointError, match=r"not a regular file|has no \.metadata"):
            SafeReader(folder).read_metadata()
        (folder / name).unlink()
        (tmp_path / "real").rename(folder / name)


@pytest.mark.parametrize("field", ["length", "offset"])
def test_a_place_beyond_the_file_is_refused(folder, field):
    rewrite(folder, lambda metadata: setattr(storage(metadata), field, 10 << 30))
    with pytest.raises(CheckpointError, match=r"has no \d+ bytes at \d+"):
        SafeReader(folder).read_metadata()


def test_a_tensor_that_claims_gigabytes_of_a_small_file_is_refused(folder):
    def enlarge(metadata):
        entry = metadata.state_dict_metadata["model.a"]
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 31, 4])

    rewrite(folder, enlarge)
    with pytest.raises(CheckpointError, match="are not those of a tensor"):
        SafeReader(folder).read_metadata()


def test_parts_that_leave_a_gap_are_refused(folder):
    rewrite(folder, lambda m: setattr(m.state_dict_metadata["model.a"], "size", torch.Size([6, 4])))
    with pytest.raises(CheckpointError, match="do not add up"):
        SafeReader(folder).read_metadata()


def test_compressed_data_that_could_unfold_to_any_size_are_refused(folder):
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(3, 4), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, source.read(member))
    (folder / "__0_0.distcp").write_bytes(packed.getvalue())

    def point(metadata):
        del metadata.state_dict_metadata["model.b"]
        info = storage(metadata)
        info.offset, info.length = 0, len(packed.getvalue())

    rewrite(folder, point)
    with pytest.raises(CheckpointError, match="the data are compressed"):
        load(folder)


def test_500_mutated_metadata_give_a_checkpoint_error_or_tensors_and_never_much_memory(folder):
    good = (folder / ".metadata").read_bytes()
    rng = random.Random(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 4))):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        if rng.random() < 0.1:
            del bad[rng.randrange(len(bad)) :]
        (folder / ".metadata").write_bytes(bad)
        try:
            SafeReader(folder).tensors()
        except CheckpointError:
            refused += 1
    assert refused > 250
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: 1 GiB
