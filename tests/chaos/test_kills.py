"""Whole runs that are killed, stopped or damaged: rows 1, 3, 4, 12, 14, 15, 17 of docs/reliability.md."""

import json
import os
import random
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos import rank as rank_module
from tests.chaos.harness import LIMIT, Job, flip_a_bit
from tests.fork_server import start_python
from tests.launch import free_port
from tests.whole_run import FAMILIES
from torchtitan_rd.train_step import TrainStep


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("undisturbed"))
    started = time.monotonic()
    job.finish(2)
    assert [step for step, _ in job.history()] == list(range(1, 61))
    return job, time.monotonic() - started


def test_without_options_a_rank_is_the_program_itself():
    call = TrainStep.__call__
    rank_module.install([])
    assert TrainStep.__call__ is call
    write = rank_module.FileSystemWriter.write_data
    rank_module.install(["--slow-steps", "0", "--slow-saves", "0"])
    assert (TrainStep.__call__, rank_module.FileSystemWriter.write_data) == (call, write)


@pytest.mark.slow
def test_20_kills_at_random_times_leave_no_trace(undisturbed, tmp_path):
    """Of one rank or of both. A save follows each step, in the background: at most two steps are lost."""
    rng, job = random.Random(1), Job(tmp_path)
    expected, seconds = undisturbed[0].history(), undisturbed[1]
    for kill in range(20):
        before = job.last_step()
        with job.start(2, ("--slow-steps", "0.1")) as run:
            run.sleep(rng.uniform(0, seconds + 1))
            for victim in rng.choice([[0], [1], [0, 1]]):
                run.strike(victim, signal.SIGKILL)
            errors = run.wait(LIMIT).errors
        if found := re.search(r"resuming after step (\d+) ", errors[0]):
            assert before - int(found.group(1)) <= 2, f"kill {kill}: {before} steps were done before it"
    job.finish(2)
    assert job.history() == expected


@pytest.mark.slow
def test_a_run_that_draws_at_random_goes_on_to_the_very_same_state(tmp_path):
    """A raven draws depths and states. Stopped after its first step, after the seventh, in an epoch and near
    its end, and before its last.
    """
    keys = {"model__name": "raven", "model__flavor": "debug-demo", "model__overrides__n_layers": None}
    keys |= {
        f"model__overrides__{name}": value for name, value in FAMILIES["raven"]["model.overrides"].items()
    }
    keys |= {"checkpoint__async_mode": "disabled", "checkpoint__keep_latest_k": 0, "training__steps": 20}
    whole, pieces = Job(tmp_path / "whole", **keys), Job(tmp_path / "pieces", **keys)
    whole.finish(1)
    for steps in (1, 7, 14, 19, 20):
        pieces.finish(1, f"--training.steps={steps}")
    assert pieces.history() == whole.history() and len(pieces.history()) == 20
    for name in ("__0_0.distcp", "state.json"):
        first, second = (job.dump / "checkpoint" / "step-20" / name for job in (whole, pieces))
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.slow
def test_ten_runs_whose_newest_checkpoint_has_a_flipped_bit_take_the_one_before(tmp_path):
    rng, job = random.Random(4), Job(tmp_path, training__steps=12, checkpoint__async_mode="disabled")
    job.finish(1)
    expected = job.history()
    names = ["__0_0.distcp", ".metadata", "state.json", "config.toml", "model.json", "manifest.json"]
    for trial in range(10):
        flipped = job.checkpoints()[-1] / names[trial % len(names)]
        assert flipped.parent.name == "step-12"
        flip_a_bit(flipped, rng)
        finished = job.finish(1)
        assert "resuming after step 11 " in finished.errors[0]
        (line,) = [line for line in finished.errors[0].splitlines() if "step-12 is damaged" in line]
        assert flipped.name in line
        if flipped.name != "manifest.json":  # which holds its own
            assert re.search("sha256 is [0-9a-f]{8,}.*says [0-9a-f]{8,}", line), line
        assert job.history() == expected


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_other_within_5_seconds(victim, tmp_path):
    job = Job(tmp_path)
    with job.start(2, ("--slow-steps", "0.2")) as run:
        while job.last_step() < 5:
            assert run.sleep(0.05), "the run ended before it was attacked"
        run.strike(victim, signal.SIGKILL)
        killed = time.monotonic()
        assert run.processes[1 - victim].wait(LIMIT) > 0
        assert time.monotonic() - killed < 5


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [False, True], ids=["without a save", "with a save in flight"])
def test_a_rank_that_is_stopped_is_named_and_ends_the_run_at_the_time_out(in_flight, tmp_path):
    """A save needs all ranks, and may wait half an hour for one of them; a run that has lost it does not."""
    waits = {"train_timeout_seconds": 6, "heartbeat_seconds": 0.5, "hang_warning_seconds": 2}
    keys = {f"comm__{name}": seconds for name, seconds in waits.items()}
    job = Job(tmp_path, checkpoint__interval=5 if in_flight else 1000, **keys)
    with job.start(2, ("--slow-steps", "0.2", "--slow-saves", "30" if in_flight else "0")) as run:
        while job.last_step() < 5 + in_flight:
            assert run.sleep(0.05), "the run ended before it was attacked"
        run.strike(1, signal.SIGSTOP)
        stopped = time.monotonic()
        assert run.processes[0].wait(LIMIT) > 0
        took, error = time.monotonic() - stopped, run.processes[0].output()[1]
    assert "no sign of life from rank 1" in error
    assert list((job.dump / "heartbeat").glob("*")), "the stacks of the living"
    assert ("the save in flight is given up" in error) == in_flight
    assert "rank 0 failed:" in error and "RuntimeError: " in error, "what failed is said all the same"
    assert json.loads((job.dump / "exit_status.json").read_text())["status"] == "failed"
    assert 4 < took < 6 + 45


@pytest.mark.slow
def test_a_kill_in_the_save_after_a_signal_loses_that_step_alone_and_the_next_start_warns(tmp_path):
    job = Job(tmp_path, training__steps=12, checkpoint__async_mode="disabled", checkpoint__grace_seconds=0.5)
    with job.start(2, ("--slow-saves", "1.0")) as run:
        while job.last_step() < 4:
            assert run.sleep(0.05), "the run ended before it was attacked"
        for rank in range(2):
            run.strike(rank, signal.SIGTERM)
        time.sleep(0.5)
        for rank in range(2):
            run.strike(rank, signal.SIGKILL)
        assert run.wait(LIMIT).codes == [-signal.SIGKILL] * 2
    last = job.last_step()
    (error, _) = job.finish(2).errors
    before, _, after = error.partition(f"resuming after step {last - 1} of 12")
    assert "a job is killed 0.5 s after the signal" in before and after, error
    assert len(job.history()) == 12


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_the_torchruns_of_two_nodes_restart_a_killed_run_though_their_counts_differ(undisturbed, tmp_path):
    """As scripts/launch.sh starts them. A torchrun counts restarts of which its own ranks are the cause."""
    job, port = Job(tmp_path), free_port()
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=2"]
    launcher += ["--rdzv_id=4711", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    program = ("-m", "tests.chaos.rank", "--slow-steps", "0.1", "--", *job.arguments)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with ExitStack() as nodes:
        torchruns = [nodes.enter_context(start_python(*launcher, *program, env=environment)) for _ in "ab"]
        for _ in range(2):
            wanted, deadline = job.last_step() + 5, time.monotonic() + LIMIT
            while job.last_step() < wanted:
                assert time.monotonic() < deadline, [node.output()[1] for node in torchruns]
                time.sleep(0.05)
            [rank] = children(torchruns[1].pid)
            os.kill(rank, signal.SIGKILL)
        codes = [node.wait(LIMIT) for node in torchruns]
        assert codes == [0, 0], [node.output()[1] for node in torchruns]
    assert job.history() == undisturbed[0].history()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 3])
def test_torchrun_restarts_a_killed_run_as_often_as_it_may(kills, undisturbed, tmp_path):
    """Two restarts: two kills of a rank are survived, the third ends it."""
    job = Job(tmp_path)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=2", "--standalone")
    program = ("-m", "tests.chaos.rank", "--slow-steps", "0.1", "--", *job.arguments)
    rng = random.Random(kills)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with start_python(*launcher, *program, env=environment) as torchrun:
        for _ in range(kills):
            wanted = job.last_step() + 5
            deadline = time.monotonic() + LIMIT
            while job.last_step() < wanted:
                assert torchrun.poll() is None and time.monotonic() < deadline, torchrun.output()[1]
                time.sleep(0.05)
            os.kill(rng.choice(children(torchrun.pid)), signal.SIGKILL)
            assert job.last_step() < 60, "the run was too fast for its attacker"
            ranks = children(torchrun.pid)
        code = torchrun.wait(LIMIT)
        errors = torchrun.output()[1]
    assert (code == 0) == (kills == 2), errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    if kills == 3:
        job.finish(2)
    assert job.history() == undisturbed[0].history()
    assert not [p for p in (job.dump / "checkpoint").iterdir() if p.name.startswith(".tmp-")]
