"""Fixtures that every test may use, and which tests run in which order."""

import gc
import random
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# A shell starts what it puts in the background with Ctrl-C and Ctrl-\ ignored, nohup with SIGHUP, and
# children inherit that: the tests of signals would see programs that nobody can interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# Python looks for circles after each 700 new objects: a seventh of the time of a test that builds models.
gc.set_threshold(100_000, 20, 100)

# What a file says that starts processes, compiles, or imports a library which takes seconds.
NOT_QUICK = re.compile(
    r"tests\.(ranks|launch|fork_server|checkpoint\.forked|inference\.runs|test_read_outs)"
    r"|subprocess|multiprocessing|num_workers|torch\.compile|CompileConfig|transformers|stream=True"
    r"|distributed\.checkpoint|fake_pg"
)
# The files that take longest begin, so that no worker is left with one of them when the others are done.
LONGEST = (
    "test_resume.py",
    "test_scripts.py",
    "test_chain.py",
    "test_precision.py",
    "test_parallelism.py",
    "test_stream.py",
    "test_recurrent_runs.py",
    "test_crash.py",
    "test_ellis_adam.py",
    "test_devices.py",
    "test_loader.py",
    "test_sharding.py",
    "test_bad_input.py",
    "test_shutdown.py",
    "test_collectives.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="only files that start no process and compile nothing"
    )
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="files, and the tests within a file, in random order"
    )


def pytest_ignore_collect(collection_path: Path, config):
    """With --quick the other files are not even imported."""
    if config.getoption("quick") and collection_path.name.startswith("test_"):
        return True if NOT_QUICK.search(collection_path.read_text()) else None
    return None


def pytest_collection_modifyitems(items, config):
    seed = config.getoption("shuffle")
    if seed is None:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    else:
        shuffle(items, seed)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def shuffle(items: list, seed: int) -> None:
    """Tests of a file stay together, as their fixtures would be made again and again."""
    generator = random.Random(seed)
    files: dict[Path, list] = {}
    for item in sorted(items, key=lambda item: item.nodeid):
        files.setdefault(item.path, []).append(item)
    groups = list(files.values())
    generator.shuffle(groups)
    for group in groups:
        generator.shuffle(group)
    items[:] = [item for group in groups for item in group]


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_is_no_garbage():
    """Else each collection (a closed stream makes one) walks through all of torch, for tenths of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Two busy threads on two busy cores collapse; tests compare numbers, not speed."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def only_tests_of_the_gpu_see_it(request, monkeypatch):
    """A run inside this process would take it: tests mean the same on every machine."""
    if "gpu" not in request.keywords and torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A run that fails leaves its group to the end of the process; here the next test needs a new one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
