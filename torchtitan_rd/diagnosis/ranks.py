"""Ranks one by one: who answers, how fast each computes, and the all-reduces of preflight.py, timed on each.

All is told through the store of the launcher, which a rank that hangs cannot block: what is missing there
names it.
"""

import json
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from torchtitan_rd.errors import ClusterError
from torchtitan_rd.job import raise_where_nccl_times_out
from torchtitan_rd.preflight import bus_bandwidth, ladder

SLOW = 2.0
"""A rank whose own work takes so many times that of the median is slow ..."""

SLOW_SECONDS = 0.02
"""... if it takes that much longer, too."""

GRACE = 5.0


@dataclass(frozen=True)
class Rank:
    """work: seconds of the same matrix products on each rank alone. seconds: of each all-reduce, smallest
    message first; empty until they are through.
    """

    rank: int
    host: str
    device: str
    work: float
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Findings:
    """ranks: those that answered, in order. dead: numbers of those that never did.
    stuck: of those that did, and then hung in the all-reduces. slow: of the slow ones.
    problem: what was raised instead, on rank 0.
    """

    ranks: Sequence[Rank]
    dead: Sequence[int]
    stuck: Sequence[int]
    slow: Sequence[int]
    problem: str = ""

    @property
    def is_good(self) -> bool:
        return not (self.dead or self.stuck or self.problem)


def look_at_ranks(
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    limit: float,
    work: Callable[[torch.device], float],
) -> Findings | None:
    """What rank 0 learns of all ranks; None on the others. Collective, and ends within about twice `limit`
    seconds whoever is missing.

    store: that all ranks reach. work: measures a rank alone, in seconds.
    """
    own = Rank(rank, socket.gethostname(), _name(device), work(device))
    store.set(f"doctor/here/{rank}", json.dumps(asdict(own)))
    if rank == 0:
        here = _collect(store, "here", world_size, limit)
        dead = [number for number in range(world_size) if number not in here]
        store.set("doctor/dead", json.dumps(dead))
    else:
        dead = json.loads(_wait_for(store, "doctor/dead", limit + GRACE) or "null")
    if dead != []:
        return Findings(_ranks(here), dead, [], slow_ones(_ranks(here))) if rank == 0 else None

    problem = ""
    try:
        own = replace(own, seconds=_reduce(store, rank, world_size, device, limit))
    except (ClusterError, RuntimeError) as error:
        problem = str(error)
    store.set(f"doctor/done/{rank}", json.dumps(asdict(own)))  # with or without its seconds: it does not hang
    if rank > 0:
        return None
    done = _collect(store, "done", world_size, GRACE)
    stuck = [number for number in range(world_size) if number not in done]
    ranks = _ranks({**here, **done})
    return Findings(ranks, [], stuck, slow_ones(ranks), problem)


def slow_ones(ranks: Sequence[Rank]) -> list[int]:
    """Those that compute much slower than the median of all."""
    if len(ranks) < 2:
        return []
    usual = statistics.median_low([one.work for one in ranks])
    return [one.rank for one in ranks if one.work > SLOW * usual and one.work > usual + SLOW_SECONDS]


def own_work(device: torch.device) -> float:
    """Seconds of eight products of 1024 x 1024 matrices in float32, the best of three tries."""
    matrix = torch.ones(1024, 1024, device=device)
    tries = []
    for _ in range(4):  # the first one starts libraries
        begun = time.perf_counter()
        for _ in range(8):
            product = matrix @ matrix
        product.sum().item()  # waits for a GPU
        tries.append(time.perf_counter() - begun)
    return min(tries[1:])


def bandwidth_of(rank: Rank, world_size: int, device: torch.device) -> float | None:
    """Bytes a second of the largest message; None on a lone rank, or one that did not get through."""
    return bus_bandwidth(world_size, device, rank.seconds[-1]) if world_size > 1 and rank.seconds else None


def _reduce(
    store: dist.Store, rank: int, world_size: int, device: torch.device, limit: float
) -> tuple[float, ...]:
    """The ladder in a process group of its own, or in the one that there is."""
    is_own = not dist.is_initialized()
    if is_own:
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            raise_where_nccl_times_out()  # else a rank that hangs would end those that are to name it

        dist.init_process_group(
            backend,
            store=dist.PrefixStore("doctor", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=limit),
        )
    try:
        group = dist.group.WORLD
        if group is None:
            raise RuntimeError("there is no process group")
        return tuple(ladder(group, device, f"all-reduce over {world_size} ranks"))
    finally:
        if is_own:
            dist.destroy_process_group()


def _collect(store: dist.Store, word: str, world_size: int, limit: float) -> dict[int, Rank]:
    """Rank -> what it told, of those that tell within `limit` seconds."""
    deadline = time.monotonic() + limit
    told = {}
    for rank in range(world_size):
        text = _wait_for(store, f"doctor/{word}/{rank}", max(deadline - time.monotonic(), 0.01))
        if text is not None:
            fields = json.loads(text)
            told[rank] = Rank(**{**fields, "seconds": tuple(fields["seconds"])})
    return told


def _wait_for(store: dist.Store, key: str, limit: float) -> str | None:
    try:
        store.wait([key], timedelta(seconds=limit))
        return store.get(key).decode()
    except RuntimeError:  # DistStoreError: the time is over, or the store's own rank is gone
        return None


def _ranks(told: Mapping[int, Rank]) -> list[Rank]:
    return [told[number] for number in sorted(told)]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
