"""This process among its peers: launcher variables, devices, generators."""

import random

import numpy as np
import pytest
import torch

from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, make
from torchtitan_rd import job
from torchtitan_rd.errors import ConfigError
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
    config, _, step = make(Setup(), world_size, asked_to_stop=stop.received, late=late)
    agreed = []
    for number in range(1, 5):
        if number == 3 and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        step(number, batches_of(number, rank, world_size, config, padded=False))
        agreed.append(step.stop_requested)
    stop.restore()
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
