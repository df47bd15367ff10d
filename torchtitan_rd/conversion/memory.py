"""How much memory this process can still take, before a model is loaded into it."""

import math
from pathlib import Path

import psutil


def available_bytes() -> float:
    """What the machine has free, and what the limits of the job leave of it."""
    return min(
        psutil.virtual_memory().available, *cgroup_bytes(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    )


def cgroup_bytes(mount: Path, membership: Path) -> list[float]:
    """What each memory limit above this process leaves (Slurm sets such limits); [inf] without any.

    mount, membership: /sys/fs/cgroup and /proc/self/cgroup, whose lines are `number:controllers:path`;
    version 2 has no controllers there. Cached files count as free.
    """
    found = [math.inf]
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = mount / "memory" if controllers else mount
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        cached = "total_cache" if controllers else "file"
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(base):
                break
            try:
                most, used = (int((folder / f"memory.{name}").read_text()) for name in (limit, usage))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
            found.append(most - used + int(stat.get(cached, 0)))
    return found
