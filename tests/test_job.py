"""This process among its peers: launcher variables, devices, process groups and
their time-outs, generators.
"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, make
from torchtitan_rd import job
from torchtitan_rd.checkpoint.rank_group import RankGroup
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.parallelism import ParallelDims, ParallelismConfig
from torchtitan_rd.signals import StopRequest

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "STREAM_HF_DATA", "LOGLEVEL")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_the_process_is_alone():
    environment = job.Environment.read()
    assert (environment.rank, environment.world_size, environment.overrides) == (0, 1, {})


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False)])
def test_stream_hf_data_sets_its_key_under_its_documented_name(value, expected, monkeypatch):
    monkeypatch.setenv("STREAM_HF_DATA", value)
    assert job.Environment.read().overrides == {"training.stream": expected}


@pytest.mark.parametrize("variables", [{"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}])
def test_a_broken_launcher_environment_is_named(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"environment: .*torchrun"):
        job.Environment.read()


def test_the_state_of_all_generators_survives_json():
    import json

    job.set_determinism(7, False, torch.device("cpu"))
    random.gauss(0, 1), np.random.normal()
    state = json.loads(json.dumps(job.rng_state()))
    draws = (random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist())
    job.set_rng_state(state)
    assert draws == (random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist())


def test_values_are_gathered_in_rank_order():
    assert run_on_ranks(2, gathered) == [[{"rank": 0}, {"rank": 1}]] * 2


def gathered(rank, world_size):
    return job.gather({"rank": rank})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_to_the_last_rank_stops_every_rank_at_the_same_step(world_size, late):
    """At once where the host reads each step, one step later where it reads the step before."""
    expected = [False, False, not late, True]
    assert run_on_ranks(world_size, signalled, late) == [expected] * world_size


def signalled(rank, world_size, late):
    import os
    import signal

    stop = StopRequest()
    stop.ends_at_once = False
    config, _, step = make(Setup(), world_size, asked_to_stop=stop.received, late=late)
    agreed = []
    with stop:
        for number in range(1, 5):
            if number == 3 and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            step(number, batches_of(number, rank, world_size, config, padded=False))
            agreed.append(step.stop_requested)
    return agreed


def test_numbers_are_gathered_on_rank_0_in_rank_order():
    assert run_on_ranks(2, numbers_gathered) == [[[0.0, 0.5], [1.0, 0.5]], None]


def numbers_gathered(rank, world_size):
    return job.gather_numbers([float(rank), 0.5])


def test_determinism_can_be_switched_on():
    job.set_determinism(0, True, torch.device("cpu"))
    try:
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


COMM = job.CommConfig(init_timeout_seconds=701, train_timeout_seconds=101)


@pytest.mark.parametrize(
    ("world_size", "replicate", "groups"),
    [
        (1, 1, ["default_pg"]),
        (2, 1, ["default_pg"]),
        (4, 2, ["default_pg", "mesh_dp_replicate", "mesh_dp_shard"]),
    ],
)
def test_every_group_has_the_start_up_timeout_and_from_the_first_step_the_training_timeout(
    world_size, replicate, groups
):
    """Only a checkpoint's group keeps its own, since a slow file system is no hang."""
    for before, after in run_on_ranks(world_size, timeouts, replicate):
        assert before == {**dict.fromkeys(groups, 701.0), "checkpoint": 1234.0}
        assert after == {**dict.fromkeys(groups, 101.0), "checkpoint": 1234.0}


def timeouts(rank, world_size, replicate):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(master_port()))
    dist.destroy_process_group()  # the harness's; this one is made as a run makes it
    try:
        environment = job.Environment.read()
        job.init_process_group(environment, torch.device("cpu"), COMM, Path("unused"))
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    config = ParallelismConfig(data_parallel_replicate_degree=replicate)
    mesh = ParallelDims.resolve(config, world_size).build_mesh("cpu")
    job.set_timeouts(mesh, COMM.init_timeout_seconds)
    slow = RankGroup(1234)
    before = seconds_of_all_groups()
    job.shorten_timeouts(COMM, mesh)
    after = seconds_of_all_groups()
    slow.close()
    return before, after


@pytest.mark.parametrize(
    ("told", "attempt", "warns"),
    [
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "2", False),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "3"}, "2", True),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False", "GROUP_WORLD_SIZE": "3"}, "0", False),
    ],
)
def test_ranks_of_several_torchruns_do_not_tell_attempts_apart_by_their_counts(
    told, attempt, warns, monkeypatch, caplog
):
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in {**common, "TORCHELASTIC_RESTART_COUNT": "2", **told}.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(job, "meet", lambda meeting: asked.append(meeting) or dist.HashStore())
    job.init_process_group(job.Environment.read(), torch.device("cpu"), COMM, Path("unused"))
    dist.destroy_process_group()
    assert [(meeting.attempt, meeting.is_host) for meeting in asked] == [(attempt, attempt == "0")]
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in caplog.text) == warns


def test_sharded_tensors_use_the_groups_of_this_run_and_not_of_one_before_in_the_process():
    names = []
    for others in (0, 1):  # the second time the mesh's group has another name
        job.init_process_group(job.Environment.read(), torch.device("cpu"), COMM, Path("unused"))
        group = [dist.new_group([0]) for _ in range(1 + others)][-1]
        mesh = DeviceMesh.from_group(group, "cpu", mesh=[0], mesh_dim_names=("tensor",))
        tensor = distribute_tensor(torch.ones(2, 2), mesh, [Replicate()])
        names.append((mesh.get_group().group_name, (tensor @ tensor).device_mesh.get_group().group_name))
        dist.destroy_process_group()
    assert names == [("1", "1"), ("2", "2")]


def test_a_run_of_two_copies_has_start_up_s_timeouts_until_its_first_step_is_done(tmp_path):
    groups = ("default_pg", "mesh_dp_shard")
    for code, seen in run_on_ranks(2, run_with_watched_timeouts, str(tmp_path)):
        assert code == 0
        first, last, closing = ({name: found[name] for name in groups} for found in seen)
        assert first == dict.fromkeys(groups, 701.0) and last == dict.fromkeys(groups, 101.0)
        assert closing == first, "rank 0 may upload while the others wait"
        assert {found["checkpoint"] for found in seen[:2]} == {1234.0}, "it is closed before"


def run_with_watched_timeouts(rank, world_size, folder):
    """The trainer itself; what the time-outs are when each of its two steps begins, and when it closes."""
    from tests.test_bad_input import GOOD
    from torchtitan_rd import train
    from torchtitan_rd.metrics import Metrics
    from torchtitan_rd.train_step import TrainStep

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(master_port()))
    dist.destroy_process_group()
    seen, call, close = [], TrainStep.__call__, Metrics.close

    def watched(self, *arguments):
        seen.append(seconds_of_all_groups())
        return call(self, *arguments)

    def closed(self):
        seen.append(seconds_of_all_groups())
        close(self)

    arguments = [
        "--comm.init_timeout_seconds=701",
        "--comm.train_timeout_seconds=101",
        f"--job.dump_folder={folder}",
    ]
    arguments += ["--checkpoint.timeout_seconds=1234", "--parallelism.data_parallel_replicate_degree=2"]
    try:
        TrainStep.__call__, Metrics.close = watched, closed
        code = train.main([*GOOD, "--training.steps=2", *arguments])
    finally:
        TrainStep.__call__, Metrics.close = call, close
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the harness ends one
    return code, seen


def master_port() -> int:
    """Agreed among the ranks through the harness's process group."""
    from tests.launch import free_port

    port = torch.tensor(free_port())
    dist.broadcast(port, 0)
    return int(port)


def seconds_of_all_groups() -> dict[str, float]:
    """Of all that torch knows of, not only those that the code under test goes through."""
    groups = dist.distributed_c10d._world.pg_map
    return {
        group.group_desc: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in groups
        if not isinstance(group, int)
    }


def test_on_a_gpu_the_group_knows_its_device_and_nothing_is_written_before_the_outputs(tmp_path, monkeypatch):
    """Without a GPU: what torch is asked for, and what lies on the disk."""
    asked = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda **options: asked.update(options))
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    device, dump = torch.device("cuda", 0), tmp_path / "dump"
    job.init_process_group(job.Environment.read(), device, COMM, dump)
    assert asked["device_id"] == device and asked["backend"] == "cpu:gloo,cuda:nccl"
    assert asked["timeout"].total_seconds() == 701
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(dump / "comm_traces" / "rank_")
    assert not dump.exists()
    job.make_traces_folder(torch.device("cpu"), COMM, dump)
    assert not dump.exists()
    job.make_traces_folder(device, COMM, dump)
    assert (dump / "comm_traces").is_dir()
