"""Signals: whenever they come, the run ends as it should, says how, and can be gone on with."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.fork_server import run_python
from tests.launch import Run, launch, wait_for_step
from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, make
from torchtitan_rd import job, parts, run_state, signals, train, validation
from torchtitan_rd.checkpoint.writer import Writer
from torchtitan_rd.config import load
from torchtitan_rd.model_spec import SINGLE_READ_OUT
from torchtitan_rd.signals import HANDLED, Interrupted, StopRequest, remove_exit_status, write_exit_status

SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.mixed_precision_param=float32",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--metrics.log_freq=1",
    "--comm.heartbeat_seconds=0",
    "--comm.init_timeout_seconds=60",
]
ASYNC_SAVES = ["--checkpoint.enable", "--checkpoint.async_mode=async"]


def tell(number: signal.Signals = signal.SIGTERM) -> None:
    """A signal to this very process."""
    os.kill(os.getpid(), number)


def tell_at_microbatch(monkeypatch, count: int, then=lambda: None) -> None:
    """A SIGTERM in the step whose microbatch is the `count`th of the run."""
    backward, seen = parts.TrainStep._backward, []

    def watched(self, *arguments):
        seen.append(1)
        if len(seen) == count:
            tell()
            then()
        return backward(self, *arguments)

    monkeypatch.setattr(parts.TrainStep, "_backward", watched)


def status_of(folder: Path) -> dict:
    return json.loads((folder / "exit_status.json").read_text())


# ---- one rank's state machine


@pytest.mark.parametrize("number", HANDLED)
def test_before_the_first_step_a_signal_interrupts_once_and_the_handlers_come_back_last(number):
    before = [signal.getsignal(n) for n in HANDLED]
    with StopRequest() as stop:
        assert not stop.received() and not stop.explains_an_end()
        with pytest.raises(Interrupted, match=number.name):
            tell(number)
            time.sleep(5)
        tell(number)  # while things are closed
        time.sleep(0.01)
        assert stop.received() and stop.explains_an_end()
    assert [signal.getsignal(n) for n in HANDLED] == before


@pytest.mark.parametrize("number", HANDLED)
def test_from_the_first_step_on_signals_are_remembered_and_change_nothing(number):
    with StopRequest() as stop:
        stop.ends_at_once = False
        for _ in range(2):
            for _ in range(5):  # passed on by a terminal, by torchrun, by srun: one event
                tell(number)
            time.sleep(0.15)
        assert stop.signal_name == number.name and not stop.explains_an_end()


# In a process of its own; the main thread hangs in C, where Python's own handlers would not run.
DEAF = """
import ctypes, sys, threading, time, signal, os
from pathlib import Path
from torchtitan_rd import signals
from torchtitan_rd.log import init_logging
init_logging()
signals.UNWINDING = 0.3
def send():
    for gap in map(float, sys.argv[3:]):
        time.sleep(gap)
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2)
    os._exit(7)
with signals.StopRequest() as stop:
    stop.ends_at_once = sys.argv[2] == "starting"
    stop.lost = lambda: "the steps after 7 are lost"
    stop.record = lambda reason: signals.write_exit_status(Path(sys.argv[1]), "stopped", 9, reason)
    threading.Thread(target=send, daemon=True).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("phase", "gaps", "code"),
    [("training", "0.2 0.3 0.3", 130), ("training", "0.2 0.3 2.2", 7), ("starting", "0.2", 130)],
)
def test_a_hasty_third_signal_and_a_deaf_start_end_even_a_rank_that_hangs(phase, gaps, code, tmp_path):
    found = run_python("-c", DEAF, tmp_path, phase, *gaps.split(), timeout=60)
    assert found.returncode == code, found.stderr
    if code == 130:
        assert "ended at once; the steps after 7 are lost" in found.stderr
        assert status_of(tmp_path)["status"] == "stopped" and "steps after 7" in status_of(tmp_path)["reason"]
    if phase == "training":
        assert "received SIGINT again: still stopping" in found.stderr


@pytest.mark.parametrize("storage", ["fails", "hangs"])
def test_storage_that_is_gone_does_not_keep_a_rank_from_ending(storage, monkeypatch, caplog):
    def gone(*_):
        if storage == "fails":
            raise OSError(116, "Stale file handle")
        time.sleep(3)

    ended = []
    monkeypatch.setattr(signals, "PATIENCE", 0.1)
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = StopRequest()
    stop.lost = stop.record = gone
    started = time.monotonic()
    stop.end("the launcher has died")
    assert ended == [130] and time.monotonic() - started < 2
    [line] = [line for line in caplog.messages if "ended at once" in line]
    assert "the launcher has died" in line and "what is lost is not known" in line


def test_a_rank_that_ends_at_once_says_whether_the_run_can_go_on(tmp_path):
    """As one that waits while rank 0 exports: its word may come first, and a requeue depends on it."""
    for name, keys in {"stopped": [], "preempted": ["--checkpoint.enable"]}.items():
        arguments = [*SMALL, f"--job.dump_folder={tmp_path / name}", "--training.steps=2", *keys]
        environment = job.Environment.read()
        run = train.Trainer(load(arguments, environment), environment)
        assert run.run() == "finished"
        run.stop.record("received SIGTERM while waiting")
        assert status_of(tmp_path / name)["status"] == name


def test_the_rank_that_ends_first_is_the_one_that_tells(tmp_path):
    write_exit_status(tmp_path / "dump", "failed", 3, "its row 7 is bad", rank=1)
    write_exit_status(tmp_path / "dump", "failed", 3, "rank 1 is gone", rank=0)
    status = status_of(tmp_path / "dump")
    assert (status["rank"], status["reason"]) == (1, "its row 7 is bad")
    assert [path.name for path in (tmp_path / "dump").iterdir()] == ["exit_status.json"]
    assert remove_exit_status(tmp_path / "dump") and not remove_exit_status(tmp_path / "dump")


# ---- whole runs


def test_two_signals_around_a_slow_save_in_the_background_keep_it(tmp_path, monkeypatch):
    write = Writer.write

    def slowed(self, snapshot):
        time.sleep(0.3)
        tell()
        time.sleep(0.3)
        write(self, snapshot)

    monkeypatch.setattr(Writer, "write", slowed)
    tell_at_microbatch(monkeypatch, 2)
    arguments = [*SMALL, *ASYNC_SAVES, f"--job.dump_folder={tmp_path}"]
    assert train.main([*arguments, "--training.steps=50"]) == 0
    status = status_of(tmp_path)
    assert (status["status"], status["step"], status["reason"]) == ("preempted", 2, "received SIGTERM")
    assert (tmp_path / "checkpoint" / "step-2" / "manifest.json").exists()


def test_a_failed_save_after_a_signal_is_not_called_preempted(tmp_path, monkeypatch):
    def full(self, snapshot):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "write", full)
    tell_at_microbatch(monkeypatch, 2)
    arguments = [*SMALL, *ASYNC_SAVES, f"--job.dump_folder={tmp_path}"]
    assert train.main([*arguments, "--training.steps=50"]) == 1
    assert status_of(tmp_path)["status"] == "failed"


def test_without_checkpoints_a_signal_stops_and_claims_nothing(tmp_path, monkeypatch, capfd):
    tell_at_microbatch(monkeypatch, 3)
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path}", "--training.steps=50"]) == 130
    assert (status_of(tmp_path)["status"], status_of(tmp_path)["step"]) == ("stopped", 3)
    assert "stopping after step 3: nothing is saved" in capfd.readouterr().err


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_while_data_is_converted_ends_the_run_and_replaces_a_stale_status(
    number, tmp_path, monkeypatch
):
    def slow(*arguments, **options):
        tell(number)
        time.sleep(30)

    write_exit_status(tmp_path, "finished", 7)
    monkeypatch.setattr(parts, "build_dataloader", slow)
    started = time.monotonic()
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path}"]) == 130
    assert time.monotonic() - started < 10
    assert (status_of(tmp_path)["status"], status_of(tmp_path)["step"]) == ("stopped", 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_before_the_ranks_have_met_ends_the_run_as_stopped_and_replaces_a_stale_status(
    rank, tmp_path, monkeypatch
):
    def waiting(*_):
        tell()
        time.sleep(5)

    write_exit_status(tmp_path, "finished", 999)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.job, "init_process_group", waiting)
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path}"]) == 130
    told = status_of(tmp_path)
    assert (told["status"], told["step"], told["rank"]) == ("stopped", 0, rank)


def test_ranks_that_never_meet_leave_no_stale_status(tmp_path, monkeypatch):
    def refused(*_):
        raise RuntimeError("the peer did not come")

    monkeypatch.setattr(train.job, "init_process_group", refused)
    write_exit_status(tmp_path, "preempted", 999)
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path}"]) == 1
    assert status_of(tmp_path)["status"] == "failed" and "did not come" in status_of(tmp_path)["reason"]
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path / 'new'}"]) == 1
    assert not (tmp_path / "new").exists()


def test_a_status_that_another_run_leaves_while_this_one_starts_is_removed(tmp_path, monkeypatch):
    """The other one held the folder until it had written it, as where a requeue overlaps with its end."""
    build, seen = parts.build_dataloader, []

    def build_while_another_ends(*arguments, **options):
        write_exit_status(tmp_path, "preempted", 999)
        return build(*arguments, **options)

    def look(*_, **__):
        seen.append((tmp_path / "exit_status.json").exists())

    monkeypatch.setattr(parts, "build_dataloader", build_while_another_ends)
    monkeypatch.setattr(train.Trainer, "_restore", look)
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path}", "--training.steps=1"]) == 0
    assert seen == [False] and status_of(tmp_path)["status"] == "finished"


def test_a_killed_start_leaves_no_stale_status(tmp_path, monkeypatch):
    write_exit_status(tmp_path, "finished", 7)

    class Killed(BaseException):
        """What no handler of the run expects."""

    seen = []

    def killed(*arguments, **options):
        seen.append((tmp_path / "exit_status.json").exists())
        raise Killed

    monkeypatch.setattr(parts, "build_dataloader", killed)
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path}"]) == 1
    assert seen == [False] and status_of(tmp_path)["status"] == "failed"


def test_a_run_that_was_turned_away_does_not_have_the_last_word_on_the_one_that_went_on(
    tmp_path, monkeypatch
):
    """A second run in the same folder, interrupted while it waits for the lock, tells that it has stopped."""
    monkeypatch.setattr(train.Trainer, "_begin", lambda run: write_exit_status(tmp_path, "stopped", 0))
    monkeypatch.setattr(train.Trainer, "_work", lambda run: True)
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path}"]) == 0
    assert status_of(tmp_path)["status"] == "finished"


def test_a_second_signal_does_not_interrupt_what_unwinds_for_one_before_the_export(monkeypatch):
    unwound = []
    monkeypatch.setattr(StopRequest, "agree", lambda stop, device: stop.received())
    with StopRequest() as stop:
        stop.ends_at_once = False
        tell()
        time.sleep(0.05)
        with pytest.raises(Interrupted), stop.at_once(torch.device("cpu")):
            raise AssertionError("nothing is exported")
        try:
            raise KeyError
        except KeyError:
            tell()
            time.sleep(0.05)
            unwound.append(True)
    assert unwound == [True]


def test_a_signal_during_the_export_stops_it_and_the_same_command_makes_it(tmp_path, monkeypatch):
    to_hf = run_state.to_hf

    def told(*arguments, **options):
        tell()
        time.sleep(30)

    arguments = [
        *SMALL,
        "--checkpoint.enable",
        "--checkpoint.last_save_in_hf",
        f"--job.dump_folder={tmp_path}",
    ]
    monkeypatch.setattr(run_state, "to_hf", told)
    assert train.main([*arguments, "--training.steps=2"]) == 0
    assert (status_of(tmp_path)["status"], status_of(tmp_path)["step"]) == ("preempted", 2)
    dist.destroy_process_group()
    monkeypatch.setattr(run_state, "to_hf", to_hf)
    assert train.main([*arguments, "--training.steps=2"]) == 0
    assert status_of(tmp_path)["status"] == "finished"
    assert (tmp_path / "checkpoint" / "step-2-hf" / "config.json").exists()


def test_a_signal_during_validation_cuts_it_short_and_saves(tmp_path, monkeypatch):
    counted, batches = validation.count_valid, []

    def watched(labels):
        batches.append(1)
        if len(batches) == 2:
            tell()
        return counted(labels)

    monkeypatch.setattr(validation, "count_valid", watched)
    arguments = [*SMALL, "--validation.enable", "--validation.freq=3", "--validation.sequences=8"]
    arguments += [
        "--training.dataset=pydoc-train",
        "--validation.dataset=pydoc-validation",
        "--checkpoint.enable",
    ]
    assert train.main([*arguments, "--training.steps=50", f"--job.dump_folder={tmp_path}"]) == 0
    assert (status_of(tmp_path)["status"], status_of(tmp_path)["step"]) == ("preempted", 3)
    assert len(batches) == 2, "of 8"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3 and "val_loss" not in rows[-1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_leave_a_validation_before_the_same_batch(world_size):
    assert run_on_ranks(world_size, validated) == [({}, 2, True)] * world_size


def validated(rank, world_size):
    sections = {"training": {"local_batch_size": 1}}
    config, model, step = make(Setup(sections=sections), world_size)
    held_out = batches_of(99, rank, world_size, config, padded=False)
    assert len(held_out) >= 4
    forwards = []

    def hear(module, arguments):
        forwards.append(1)
        if rank == world_size - 1 and len(forwards) == 2:
            stop.signal_name = "SIGTERM"

    stop = StopRequest()
    handle = model.register_forward_pre_hook(hear)
    losses = validation.validate(model, held_out, torch.device("cpu"), SINGLE_READ_OUT, stop)
    handle.remove()
    step(1, batches_of(1, rank, world_size, config, padded=False))  # the model is fit to train
    return losses, len(forwards), model.training


def test_the_rank_that_fails_first_says_why(tmp_path):
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}", "--training.steps=50"]
    finished = launch(2, arguments, ("--fail-at", "1", "2"))
    assert finished.codes == [1, 1], finished.errors
    status = status_of(tmp_path)
    assert (status["status"], status["rank"], status["step"]) == ("failed", 1, 2)
    assert status["reason"] == "ValueError: told to fail"


def test_a_signal_to_one_of_two_ranks_during_start_up_ends_both_as_stopped(tmp_path):
    """The other one fails for want of its peer, and must not be the one that tells."""
    write_exit_status(tmp_path, "finished", 7)
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}", "--training.steps=50"]
    with Run(2, arguments, ("--slow-start", "1", str(tmp_path / "reading"))) as run:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("reading.*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not (tmp_path / "exit_status.json").exists()
        run.signal(1, signal.SIGINT)
        finished = run.wait()
    assert finished.codes == [1, 130], finished.errors
    assert (status_of(tmp_path)["status"], status_of(tmp_path)["rank"]) == ("stopped", 1)


def test_three_hasty_signals_to_all_ranks_of_a_run_say_what_is_lost(tmp_path):
    arguments = [*SMALL, "--checkpoint.enable", f"--job.dump_folder={tmp_path}", "--training.steps=500"]
    with Run(2, [*arguments, "--checkpoint.interval=2"], ("--slow", "5", "4")) as run:
        wait_for_step(tmp_path, 3)
        time.sleep(0.3)  # in the fourth, which is slow
        for _ in range(3):
            for rank in (0, 1):
                run.signal(rank, signal.SIGINT)
            time.sleep(0.3)
        finished = run.wait(timeout=4)
    assert finished.codes == [130, 130], finished.errors
    assert "ended at once; the steps after 2 are lost" in finished.errors[0]
    assert status_of(tmp_path)["status"] == "stopped"
