"""The device that is measured."""

import platform
import time
from typing import Any

import torch

GIB = 2**30


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def environment(tiny: bool) -> dict[str, Any]:
    """What a figure depends on."""
    found: dict[str, Any] = {
        "sizes": "tiny: nothing here is a measurement" if tiny else "full",
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        at = torch.cuda.get_device_properties(0)
        found |= {
            "device": at.name,
            "memory GiB": round(at.total_memory / GIB, 1),
            "capability": f"{at.major}.{at.minor}",
            "CUDA": torch.version.cuda or f"ROCm {torch.version.hip}",
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Any, *, warm_up: int, times: int) -> float:
    """The least of some calls, each waited for."""
    least = float("inf")
    for number in range(warm_up + times):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        if number >= warm_up:
            least = min(least, time.perf_counter() - begin)
    return least


def peak_of(work: Any) -> int:
    """The most bytes that the allocator gave out at one time during `work`, with what lived before it on a
    GPU, and without it on a CPU.
    """
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        synchronize()
        return torch.cuda.max_memory_allocated()

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    kineto = profile.profiler
    assert kineto is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
