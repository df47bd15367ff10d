"""Runs the same test body on 1, 2 or more ranks: on the CPU over gloo, or on one GPU each over NCCL.

    def body(rank, world_size, extra): ...      # a module-level function; what it returns must pickle
    results = run_on_ranks(2, body, extra)      # [result of rank 0, result of rank 1]
    results = run_on_ranks(2, body, extra, device="cuda")       # CPU tensors still go over gloo, as in a run

The worker processes are started once for the test session and reused, since a start costs seconds. Each
call gets a fresh process group, torn down afterwards. A body that raises on any rank raises here with
that rank's traceback.
"""

import atexit
import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import current_process
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import start_python

_workers: dict[str, list["_Worker"]] = {"cpu": [], "cuda": []}


class _Worker:
    """A process that runs bodies. One for the CPU sees no GPU,
    so that its bodies do the same on every machine.
    """

    def __init__(self, device: str) -> None:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder) / "socket")) as listener:
            self.process = start_python(
                "-m", "tests.ranks", listener.address, device, env={**os.environ, **hidden}
            )
            self.pipe: Connection = listener.accept()
        # Where bodies are imported from, and what proves it a friend when it sends tensors.
        self.pipe.send((sys.path, bytes(current_process().authkey)))

    def stop(self) -> None:
        self.process.close()
        self.pipe.close()


def run_on_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, device: str = "cpu", timeout: float = 120.0
) -> list[Any]:
    """Calls `body(rank, world_size, *args)` on every rank of a fresh group;
    returns the results in rank order.

    device: "cpu", or "cuda", where rank r has GPU r as its current device;
    skips the test if there are fewer GPUs.
    """
    if device == "cuda":
        needs_gpus(world_size)
    workers = _workers[device]
    while len(workers) < world_size:
        workers.append(_Worker(device))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        try:
            for rank, worker in enumerate(workers[:world_size]):
                worker.pipe.send((body, args, rank, world_size, str(store)))
            return _collect(workers[:world_size], timeout)
        except BaseException:  # pytest's own limit too: the group is in any state, and answers may still come
            stop_workers()
            raise


# For `@EACH_DEVICE` above a test of (device, world_size): the same body on 1 and 2 CPU ranks
# and on 1 and 2 GPUs.
EACH_DEVICE = pytest.mark.parametrize(
    ("device", "world_size"),
    [
        pytest.param("cpu", 1, id="1 cpu rank"),
        pytest.param("cpu", 2, id="2 cpu ranks"),
        pytest.param("cuda", 1, id="1 gpu", marks=pytest.mark.gpu),
        pytest.param("cuda", 2, id="2 gpus", marks=pytest.mark.gpu),
    ],
)
# For a body that two ranks put to a harder test than one does, and that is long: one rank is tried at night.
TWO_FIRST = [pytest.param(1, marks=pytest.mark.slow), 2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def needs_gpus(count: int) -> None:
    """Skips the calling test on a machine with fewer."""
    import torch

    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    results, failures = [], []
    for rank, worker in enumerate(workers):
        try:
            if not worker.pipe.poll(5.0 if failures else timeout):
                raise TimeoutError(f"no answer within {timeout} s")
            ok, result = worker.pipe.recv()
        except (EOFError, OSError, TimeoutError) as error:
            ok, result = False, f"the process died or hung: {error!r}\n{worker.process.output()[1]}"
        results.append(result)
        if not ok:
            failures.append(f"rank {rank}:\n{result}")
    if failures:
        raise AssertionError("\n".join(failures))
    return results


def stop_workers() -> None:
    """Ends the worker processes; the next call starts new ones."""
    for workers in _workers.values():
        for worker in workers:
            worker.stop()
        workers.clear()


atexit.register(stop_workers)


def _serve(pipe: Connection, device: str) -> None:
    """The loop of one worker process."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sys.path[:], current_process().authkey = pipe.recv()
    gc.freeze()  # what is imported by now stays, and need not be looked through after each body
    while True:
        try:
            body, args, rank, world_size, store = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        options: dict[str, Any] = {"backend": "gloo"}
        try:
            if device == "cuda":
                torch.cuda.set_device(rank)
                options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", rank)}
            dist.init_process_group(
                init_method=f"file://{store}", rank=rank, world_size=world_size, **options
            )
            result = (True, body(rank, world_size, *args))
            dist.barrier()
        except BaseException:  # CheckpointException of torch is not an Exception
            result = (False, traceback.format_exc())
        finally:
            _forget_groups()
        pipe.send(result)


def _forget_groups() -> None:
    """Ends the process groups of a body, and all that would bring them into the next one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if "torchtitan_rd.job" in sys.modules:  # in whose place the harness makes groups
        from torchtitan_rd.job import forget_meshes

        forget_meshes()
    gc.collect()  # models in circles keep their groups, whose threads wake up a hundred times a second
    gc.freeze()  # what is left are modules and caches, and need not be looked through after each body


if __name__ == "__main__":
    _serve(Client(sys.argv[1]), sys.argv[2])
