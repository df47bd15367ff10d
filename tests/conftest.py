"""Fixtures that every test may use."""

import signal

import pytest
import torch
import torch.distributed as dist

# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that: the tests of signals
# would see programs that nobody can interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread():
    """Two busy threads on two busy cores collapse; tests compare numbers, not speed."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A run that fails leaves its group to the end of the process; here the next test needs a new one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
