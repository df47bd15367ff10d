"""How ranks find each other, with words for each way in which they do not.

torch waits in silence: for the store's address to answer, then for every rank, ten minutes each. Here each
rank signs in at the store before the process group is made. What is missing is named while the others wait,
and a rank that comes to a store where another one has its number, or a run of another size meets, ends at
once.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from torchtitan_rd.errors import ClusterError, listed
from torchtitan_rd.log import logger

_MAX_NAMED = 8  # ranks named in one message
_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 1.0  # seconds between two questions to the store


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a run meet, and how long they wait.

    is_host: whether this process makes the store; else it is made by rank 0, or by torchrun before any rank.
    attempt: torchrun's count of restarts. run: what else tells runs apart that end up at one address.
    Seconds: connect_seconds until the store answers; warn_seconds until the missing are named, again each
    time that the wait has doubled; limit_seconds until the wait for them fails.
    """

    address: str
    port: int
    rank: int
    world_size: int
    is_host: bool
    attempt: str
    run: str
    connect_seconds: float
    warn_seconds: float
    limit_seconds: float

    @property
    def place(self) -> str:
        return f"{self.address}:{self.port} (MASTER_ADDR, MASTER_PORT)"


def meet(meeting: Meeting) -> dist.Store:
    """The store of the process group, once all ranks have signed in at it.

    Raises ClusterError if it does not answer, if this rank does not belong to who meets there, or if a rank
    does not come.
    """
    store = _connect(meeting)
    _sign_in(store, meeting)
    _wait_for_all(store, meeting)
    # torchrun's store outlives a restart, with the addresses of processes that have died: a group of the next
    # attempt that found them there would connect to nobody, for ever.
    return dist.PrefixStore(f"torchtitan_rd/group/{meeting.attempt}", store)


def _connect(meeting: Meeting) -> dist.Store:
    waiting = threading.Timer(
        meeting.warn_seconds,
        logger.warning,
        ("rank %d still waits for the rendezvous at %s to answer", meeting.rank, meeting.place),
    )
    waiting.daemon = True
    waiting.start()

    try:
        return dist.TCPStore(
            meeting.address,
            meeting.port,
            meeting.world_size,
            is_master=meeting.is_host,
            timeout=timedelta(seconds=meeting.connect_seconds),
            wait_for_workers=False,  # which would be waited for without a name
            multi_tenant=meeting.is_host,
        )
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0]

        if meeting.is_host:
            raise ClusterError(
                f"rank {meeting.rank} cannot open the rendezvous at {meeting.place}: {reason}; is the port "
                "another run's, or the address another machine's?"
            ) from error
        raise ClusterError(
            f"rank {meeting.rank}: no rendezvous answers at {meeting.place} within "
            f"{meeting.connect_seconds:.0f} s (comm.rendezvous_timeout_seconds): {reason}; it may be that of "
            "a run that has ended, or the address is wrong or not reachable from here"
        ) from error
    finally:
        waiting.cancel()


def _sign_in(store: dist.Store, meeting: Meeting) -> None:
    """Raises ClusterError where somebody else has this rank's number, or another run meets."""
    own = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **{key: value for key, value in asdict(meeting).items() if key in ("rank", "world_size", "run")},
    }
    first = json.loads(_set_once(store, _key(meeting, "run"), json.dumps(own)))
    if (first["world_size"], first["run"]) != (own["world_size"], own["run"]):
        raise ClusterError(
            f"rank {meeting.rank} of {meeting.world_size} ({own['run']}) came to the wrong rendezvous: at "
            f"{meeting.place} a run of {first['world_size']} ranks meets ({first['run']}; rank "
            f"{first['rank']} is process {first['pid']} on {first['host']}); give each run a port of its own"
        )
    there = json.loads(_set_once(store, _key(meeting, meeting.rank), json.dumps(own)))
    if there != own:
        raise ClusterError(
            f"rank {meeting.rank} is at the rendezvous {meeting.place} already: process {there['pid']} on "
            f"{there['host']}; end that run if it is an earlier one, else RANK is given twice"
        )
    if store.add(_key(meeting, "count"), 1) == meeting.world_size:
        store.set(_key(meeting, "complete"), "yes")


def _set_once(store: dist.Store, key: str, value: str) -> str:
    """Sets `key` unless it is set already; returns what it holds."""
    return store.compare_set(key, "", value).decode()


def _wait_for_all(store: dist.Store, meeting: Meeting) -> None:
    started, pause, warn_at = time.monotonic(), _SHORTEST_WAIT, meeting.warn_seconds
    while not _ask(meeting, lambda: store.check([_key(meeting, "complete")])):
        waited = time.monotonic() - started
        if waited >= meeting.limit_seconds:
            raise ClusterError(
                f"{_missing(store, meeting)} within {meeting.limit_seconds:.0f} s "
                "(comm.init_timeout_seconds); look for errors of its own, or for a machine that hangs"
            )
        if waited >= warn_at:
            warn_at *= 2
            if _is_first_there(store, meeting):
                logger.warning("%s after %.0f s; the others wait for it", _missing(store, meeting), waited)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT)


def _ask(meeting: Meeting, question: Callable[[], bool]) -> bool:
    try:
        return question()
    except RuntimeError as error:
        raise ClusterError(
            f"rank {meeting.rank}: the rendezvous at {meeting.place} is gone ({str(error).splitlines()[0]}): "
            "the process that held it, torchrun or rank 0, has ended"
        ) from error


def _is_first_there(store: dist.Store, meeting: Meeting) -> bool:
    """Whether this rank is to speak for all that wait."""
    return not any(store.check([_key(meeting, rank)]) for rank in range(meeting.rank))


def _missing(store: dist.Store, meeting: Meeting) -> str:
    ranks = [rank for rank in range(meeting.world_size) if not store.check([_key(meeting, rank)])]
    noun, verb = ("rank", "has") if len(ranks) == 1 else ("ranks", "have")
    joined = meeting.world_size - len(ranks)
    return (
        f"{noun} {listed(ranks, _MAX_NAMED)} {verb} not come to the rendezvous at {meeting.place}, where "
        f"{joined} of {meeting.world_size} are,"
    )


def _key(meeting: Meeting, name: object) -> str:
    return f"torchtitan_rd/{meeting.attempt}/{name}"
