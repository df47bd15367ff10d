"""The profiler: which steps are traced, where the files go, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.ranks import run_on_ranks
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.profiling import Profiler, ProfilingConfig

CPU = torch.device("cpu")


def train(folder: Path, start: int, stop: int, *, rank: int = 0, **keys) -> None:
    with Profiler(ProfilingConfig(**keys), dump_folder=folder, rank=rank, device=CPU, step=start) as profiler:
        for step in range(start + 1, stop + 1):
            with torch.profiler.record_function(f"training step {step}"):
                torch.ones(4).sum()
            profiler.step()


def traced(folder: Path) -> dict[str, list[int]]:
    """File -> the training steps that it recorded."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
        steps = {
            int(name.removeprefix("training step ")) for name in names if name.startswith("training step ")
        }
        found[str(path.relative_to(folder))] = sorted(steps)
    return found


def test_the_last_step_of_each_cycle_is_traced(tmp_path):
    train(tmp_path, 0, 12, enable_profiling=True, profile_freq=5)
    assert traced(tmp_path) == {
        "profile_traces/iteration_10/rank0_trace.json": [10],
        "profile_traces/iteration_5/rank0_trace.json": [5],
    }


def test_a_resumed_run_traces_the_same_steps_as_an_uninterrupted_one(tmp_path):
    train(tmp_path, 7, 10, enable_profiling=True, profile_freq=5, save_traces_folder="traces")
    assert traced(tmp_path) == {"traces/iteration_10/rank0_trace.json": [10]}


def test_a_recording_cut_short_is_kept_under_its_own_name(tmp_path):
    train(tmp_path, 0, 5, enable_profiling=True, profile_freq=6, profiler_warmup=1, profiler_active=3)
    assert traced(tmp_path) == {"profile_traces/iteration_5_exit/rank0_trace.json": [4, 5]}


def train_on_rank(rank, world_size, folder):
    train(Path(folder), 0, 4, rank=rank, enable_profiling=True, profile_freq=4)


def test_every_rank_writes_its_own_trace(tmp_path):
    run_on_ranks(2, train_on_rank, str(tmp_path))
    folder = "profile_traces/iteration_4"
    assert traced(tmp_path) == {f"{folder}/rank0_trace.json": [4], f"{folder}/rank1_trace.json": [4]}


def test_nothing_is_written_when_nothing_is_enabled(tmp_path):
    train(tmp_path, 0, 20)
    assert list(tmp_path.iterdir()) == []


def test_memory_snapshots_without_cuda_are_refused_with_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"profiling.enable_memory_snapshot = true needs a CUDA device"):
        train(tmp_path, 0, 1, enable_memory_snapshot=True)


def test_a_cycle_too_short_for_warm_up_and_recording_is_refused():
    with pytest.raises(ValidationError, match="= 5 steps do not fit in profile_freq = 4"):
        ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_active=2)
    ProfilingConfig(enable_profiling=False, profile_freq=1)


@pytest.mark.gpu
def test_memory_snapshots_are_written_each_cycle_and_when_out_of_memory(tmp_path):
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)
    cuda = torch.device("cuda", 0)
    with (
        pytest.raises(torch.OutOfMemoryError),
        Profiler(config, dump_folder=tmp_path, rank=0, device=cuda, step=0) as profiler,
    ):
        for _ in range(3):
            torch.ones(4, device=cuda)
            profiler.step()
        torch.empty(2**50, dtype=torch.uint8, device=cuda)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pickle"))
    assert found == [
        "memory_snapshot/iteration_2/rank0_memory_snapshot.pickle",
        "memory_snapshot/iteration_3_exit/rank0_memory_snapshot.pickle",
    ]
