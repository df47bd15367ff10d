"""What a benchmark of CPU time on one thread needs before it imports torch."""

import os
import sys

SETTINGS = {  # malloc: keep freed blocks, else every large activation costs page faults
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


def start_with_settings() -> None:
    """Starts this program anew unless its environment has SETTINGS: they are read when a process starts."""
    if any(os.environ.get(key) != value for key, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})
