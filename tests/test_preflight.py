"""The pre-flight all-reduce: which groups it tries, what it says,
and that it stops a run whose sums are wrong.
"""

import logging
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.ranks import run_on_ranks
from tests.test_bad_input import GOOD
from torchtitan_rd import parts, train
from torchtitan_rd import preflight as module
from torchtitan_rd.errors import ClusterError
from torchtitan_rd.log import logger
from torchtitan_rd.parallelism import ParallelDims, ParallelismConfig


def checked(rank, world_size, replicate, least_bandwidth=None, spoil=None):
    """(level, message) of each record, or the error."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    level, real = logger.level, dist.all_reduce
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def spoiled(message, group):
        real(message, group=group)
        if message.numel() > 1:
            spoil(message, rank)

    mesh = ParallelDims.resolve(
        ParallelismConfig(data_parallel_replicate_degree=replicate), world_size
    ).build_mesh("cpu")
    try:
        dist.all_reduce = real if spoil is None else spoiled
        module.preflight(mesh, torch.device("cpu"), least_bandwidth)
    except ClusterError as error:
        return str(error)
    finally:
        dist.all_reduce = real
        logger.removeHandler(handler)
        logger.setLevel(level)
    return records


@pytest.mark.parametrize(
    ("world_size", "replicate", "names"),
    [(1, 1, ["all ranks"]), (2, 1, ["all ranks"]), (4, 2, ["all ranks", "dp_replicate", "dp_shard"])],
)
def test_every_group_is_tried_and_its_time_is_logged(world_size, replicate, names):
    for records in run_on_ranks(world_size, checked, replicate):
        found = [
            re.search(r"over ([a-z_ ]+) \((\d+) ranks\): right; .* s \(.* GB/s\)", text)
            for _, text in records
        ]
        groups = [(match[1], int(match[2])) for match in found if match]
        assert groups == [(name, world_size if name == "all ranks" else 2) for name in names]
        assert {level for level, _ in records} == {"INFO"}


def test_a_slow_group_is_a_warning_that_says_where_to_look():
    for records in run_on_ranks(2, checked, 1, 1e15):
        (warning,) = [text for level, text in records if level == "WARNING"]
        assert "all ranks (2 ranks) is slow" in warning and "NCCL_SOCKET_IFNAME" in warning


def test_a_group_whose_first_message_takes_long_is_slow_however_fast_it_is_then():
    for records in run_on_ranks(2, slow_to_connect):
        (warning,) = [text for level, text in records if level == "WARNING"]
        assert "all ranks (2 ranks) is slow" in warning


def slow_to_connect(rank, world_size):
    """As if any time were long; every bandwidth will do."""
    patience, module.SLOW_START = module.SLOW_START, 0.0
    try:
        return checked(rank, world_size, 1, 0.0)
    finally:
        module.SLOW_START = patience


def test_the_bandwidth_is_what_passes_the_link_of_a_rank_in_a_ring(monkeypatch, caplog):
    """Of 4 ranks, each sends and receives 3 quarters of the message twice."""
    message = module.MESSAGE_BYTES["cpu"][-1]
    monkeypatch.setattr(module, "_all_reduce", lambda *arguments: 2 * 0.75 * message / 5e9)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    with caplog.at_level(logging.INFO, "torchtitan_rd"):
        module.preflight(init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",)), torch.device("cpu"))
    assert "(5.00 GB/s)" in caplog.messages[-1]


def test_a_lone_rank_has_no_network_to_be_slow():
    assert {level for level, _ in run_on_ranks(1, checked, 1, 1e15)[0]} == {"INFO"}


def lose_one(message, rank):
    if rank == 1:
        message[7] += 1


def test_a_wrong_sum_on_one_rank_stops_it_with_the_group_the_number_and_where_to_look():
    fine, wrong = run_on_ranks(2, checked, 1, None, lose_one)
    assert isinstance(fine, list)
    assert (
        "over all ranks (2 ranks) gave a wrong sum: 1 of 16384 numbers are not 3, the first is 4.0" in wrong
    )
    assert "NCCL_DEBUG=INFO" in wrong


def fail(message, rank):
    raise dist.DistBackendError("no route")


def test_a_failure_of_torch_names_the_group_and_where_to_look():
    for error in run_on_ranks(2, checked, 1, None, fail):
        assert "over all ranks (2 ranks) failed: no route" in error and "ulimit -n" in error


def test_a_run_whose_ranks_cannot_add_ends_before_anything_is_built_or_written(tmp_path, monkeypatch, capfd):
    real = dist.all_reduce

    def spoiled(message, *arguments, **options):
        real(message, *arguments, **options)
        message += 1

    monkeypatch.setattr(dist, "all_reduce", spoiled)
    monkeypatch.setattr(parts, "build_model", None)  # never reached
    assert train.main([*GOOD, f"--job.dump_folder={tmp_path / 'dump'}"]) == 1
    assert (
        "ClusterError: pre-flight all-reduce over all ranks (1 ranks) gave a wrong sum"
        in capfd.readouterr().err
    )
    assert not (tmp_path / "dump").exists()
