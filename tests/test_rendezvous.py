"""Ranks that do not meet: who is missing is said while the others wait, and a wrong meeting ends at once."""

import logging
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.fork_server import start_python
from tests.launch import Run, free_port
from torchtitan_rd import job
from torchtitan_rd.errors import ClusterError, ConfigError
from torchtitan_rd.reliability.rendezvous import Meeting, meet

SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.mixed_precision_param=float32",
    "--training.steps=2",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
]


@pytest.fixture
def meeting() -> Meeting:
    """Of rank 0 of three, which makes the store."""
    return Meeting(
        *("127.0.0.1", free_port(), 0, 3),
        is_host=True,
        attempt="0",
        run="a",
        connect_seconds=20.0,
        warn_seconds=30.0,
        limit_seconds=30.0,
    )


@pytest.fixture
def store(meeting):
    """Somebody else's, as torchrun's, so that every rank of a test is a guest."""
    return dist.TCPStore("127.0.0.1", meeting.port, is_master=True, wait_for_workers=False)


def as_rank(meeting: Meeting, rank: int, **changes) -> Meeting:
    return replace(meeting, rank=rank, is_host=False, **changes)


def in_threads(*meetings: Meeting) -> list[object]:
    """What each meeting gives, or the error it raises; all at once."""
    found: list[object] = [None] * len(meetings)

    def run(number: int) -> None:
        try:
            found[number] = meet(meetings[number])
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(meetings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_all_come_share_one_store(meeting):
    stores = in_threads(meeting, as_rank(meeting, 1), as_rank(meeting, 2))
    stores[2].set("word", "of rank 2")
    assert [store.get("word") for store in stores] == [b"of rank 2"] * 3


@pytest.mark.parametrize("present", [(0, 1), (1, 2)])
def test_a_rank_that_does_not_come_is_named_once_while_the_others_wait_and_in_their_error(
    present, meeting, store, caplog
):
    [missing] = {0, 1, 2} - {*present}
    waiting = [as_rank(meeting, rank, warn_seconds=0.3, limit_seconds=1.2) for rank in present]
    with caplog.at_level(logging.WARNING, logger="torchtitan_rd"):
        errors = in_threads(*waiting)
    named = f"rank {missing} has not come to the rendezvous at 127.0.0.1:{meeting.port}"
    assert all(isinstance(error, ClusterError) and named in str(error) for error in errors), errors
    assert all("where 2 of 3 are" in str(error) and "init_timeout_seconds" in str(error) for error in errors)
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings and all(named in warning and "the others wait" in warning for warning in warnings)
    assert len(warnings) <= 2, "one of those that wait speaks, again when the wait has doubled"


def test_an_address_where_nobody_listens_ends_in_its_time_and_is_named_before(meeting, caplog):
    guest = as_rank(meeting, 1, connect_seconds=2.0, warn_seconds=0.3)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="torchtitan_rd"), pytest.raises(ClusterError) as error:
        meet(guest)
    assert time.monotonic() - started < 15
    assert f"127.0.0.1:{meeting.port}" in str(error.value) and "a run that has ended" in str(error.value)
    assert "rank 1 still waits for the rendezvous" in caplog.text


def test_a_port_that_is_in_use_is_named(meeting):
    with socket.socket() as other:
        other.bind(("127.0.0.1", meeting.port))
        other.listen()
        with pytest.raises(ClusterError, match="is the port another run's"):
            meet(meeting)


def test_a_rank_that_is_there_already_is_refused_at_once_with_its_process(meeting, store):
    store.set("torchtitan_rd/0/2", '{"host": "elsewhere", "pid": 77}')
    with pytest.raises(ClusterError, match=r"rank 2 is at the rendezvous .* process 77 on elsewhere"):
        meet(as_rank(meeting, 2))


def test_what_an_earlier_attempt_left_is_nobody_s_business(meeting, store):
    store.set("torchtitan_rd/0/2", '{"host": "elsewhere", "pid": 77}')
    again = [as_rank(meeting, rank, attempt="1") for rank in range(3)]
    stores = in_threads(*again)
    assert not [found for found in stores if isinstance(found, Exception)]

    # Where a process of that attempt listened must not be found by the group of this one.
    stores[0].set("address", "of a process that lives")
    third = in_threads(*(as_rank(meeting, rank, attempt="2") for rank in range(3)))
    assert [found.check(["address"]) for found in third] == [False] * 3
    assert stores[1].check(["address"])


@pytest.mark.parametrize("change", [{"world_size": 4}, {"run": "b"}], ids=str)
def test_a_rank_of_another_run_is_refused_at_once_with_who_meets_there(change, meeting, store):
    with pytest.raises(ClusterError, match="ranks 1, 2 have not come"):
        meet(as_rank(meeting, 0, limit_seconds=0.1))
    with pytest.raises(
        ClusterError, match=r"came to the wrong rendezvous: .* a run of 3 ranks meets .a; rank 0"
    ):
        meet(as_rank(meeting, 1, **change))


def test_a_rendezvous_that_goes_away_is_an_error_and_not_a_wait(meeting):
    """As when torchrun, which holds it, dies meanwhile."""
    holder = start_python("-c", HOLDER, meeting.port)
    with holder:
        deadline = time.monotonic() + 30
        while not holder.output()[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        threading.Timer(0.5, holder.kill).start()
        [error] = in_threads(as_rank(meeting, 1))
    assert isinstance(error, ClusterError) and "is gone" in str(error), error


HOLDER = """
import sys, time
import torch
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("variables", [{"MASTER_PORT": "x"}, {"MASTER_PORT": ""}, {}], ids=str)
def test_a_half_given_rendezvous_is_a_mistake_of_the_launcher(variables, monkeypatch, tmp_path):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    if variables:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="MASTER_PORT" if variables else "MASTER_ADDR is not set"):
        job.init_process_group(job.Environment.read(), torch.device("cpu"), job.CommConfig(), tmp_path)


def test_a_run_names_the_rank_that_never_came_and_ends(tmp_path):
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}"]
    arguments += ["--comm.hang_warning_seconds=0.5", "--comm.init_timeout_seconds=3"]
    with Run(2, arguments) as run:
        run.signal(1, signal.SIGKILL)  # before it has come anywhere
        error = run.wait(60).errors[0]
    assert run.processes[0].returncode == 1
    assert "rank 1 has not come to the rendezvous" in error and "the others wait for it" in error
    assert "ClusterError: rank 1 has not come" in error and "within 3 s" in error
