"""A few all-reduces before anything is built or written: do the ranks reach each other,
at a sane speed, and right?

A broken or misconfigured network otherwise shows as a hang in the first step, hours of queueing later.
The sizes grow as Huginn's did, so that a transport that fails only on large messages fails here too.
"""

import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_rd.errors import ClusterError
from torchtitan_rd.log import logger
from torchtitan_rd.parallelism import groups_of

# Bytes of the float32 messages; the largest one is timed.
MESSAGE_BYTES = {
    "cuda": (4, 1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 25, 1 << 26, 1 << 27),
    "cpu": (4, 1 << 16),
}

# Slower than this (bus bandwidth, bytes a second) cannot be what the machine was bought for:
# a tenth of the slowest link that GPUs are joined with, 100 Gbit/s.
LEAST_BANDWIDTH = {"cuda": 1.25e9, "cpu": 1e5}

# Seconds until the first message is through, connecting included, that are worth a warning.
SLOW_START = 60.0

WHERE_TO_LOOK = (
    "look at the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, scripts/profiles/), at the "
    "transport that NCCL_DEBUG=INFO names (NET/Socket means no RDMA), at `ulimit -n` and at each node alone"
)


def preflight(mesh: DeviceMesh, device: torch.device, least_bandwidth: float | None = None) -> None:
    """All-reduces messages of growing size over WORLD and over each group of `mesh`. Collective.

    least_bandwidth: bytes a second below which a group is called slow (a warning); by default that of
    the device. Raises ClusterError, naming the group and what to look at, where a sum is wrong or
    torch reports a failure.
    """
    least = LEAST_BANDWIDTH[device.type] if least_bandwidth is None else least_bandwidth
    world = dist.group.WORLD  # None without a process group, and then there is no mesh
    named: dict[dist.ProcessGroup, str] = {} if world is None else {world: "all ranks"}
    for dimension, group in groups_of(mesh).items():
        named.setdefault(group, dimension)

    for group, name in named.items():
        size = group.size()
        where = f"pre-flight all-reduce over {name} ({size} ranks)"
        logger.info("%s ...", where)

        seconds = ladder(group, device, where)
        bandwidth = bus_bandwidth(size, device, seconds[-1])
        logger.info(
            "%s: right; first %.3f s, last %.3f s (%.2f GB/s)",
            where,
            seconds[0],
            seconds[-1],
            bandwidth / 1e9,
        )

        if size > 1 and (bandwidth < least or seconds[0] > SLOW_START):
            logger.warning(
                "%s is slow: the first took %.1f s, the largest ran at %.3f GB/s; %s",
                where,
                seconds[0],
                bandwidth / 1e9,
                WHERE_TO_LOOK,
            )


def ladder(group: dist.ProcessGroup, device: torch.device, where: str) -> list[float]:
    """Seconds of an all-reduce of each of the MESSAGE_BYTES, the first with the time to connect. Collective.

    where: what is tried, for messages. Raises ClusterError where a sum is wrong or torch reports a failure.
    """
    try:
        return [_all_reduce(group, count, device, where) for count in MESSAGE_BYTES[device.type]]
    except RuntimeError as error:  # of gloo or NCCL; ClusterError is none
        raise ClusterError(f"{where} failed: {error}; {WHERE_TO_LOOK}") from error


def bus_bandwidth(size: int, device: torch.device, seconds: float) -> float:
    """Bytes a second that pass each rank's link in a ring of `size`, as NCCL's own tests count it, if the
    largest message took `seconds`.
    """
    return 2 * (size - 1) / size * MESSAGE_BYTES[device.type][-1] / seconds


def _all_reduce(group: dist.ProcessGroup, count: int, device: torch.device, where: str) -> float:
    """Seconds of one all-reduce of `count` bytes. Raises ClusterError where the sum is wrong."""
    # Small whole numbers that differ between ranks: their sum is exact in float32,
    # and a lost or doubled one shows.
    own = group.rank() % 64 + 1
    expected = sum(rank % 64 + 1 for rank in range(group.size()))
    message = torch.full((count // 4,), float(own), device=device)
    _wait_for(device)
    started = time.perf_counter()
    dist.all_reduce(message, group=group)
    _wait_for(device)
    seconds = time.perf_counter() - started
    wrong = int((message != expected).sum())
    if wrong:
        raise ClusterError(
            f"{where} gave a wrong sum: {wrong} of {message.numel()} numbers are not {expected}, "
            f"the first is {message[message != expected][0].item()}; {WHERE_TO_LOOK}"
        )
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
