"""Runs the same test body on 1, 2 or more gloo ranks.

    def body(rank, world_size, extra): ...      # a module-level function; what it returns must pickle
    results = run_on_ranks(2, body, extra)      # [result of rank 0, result of rank 1]

The worker processes are started once for the test session and reused, since a start costs seconds. Each call gets
a fresh process group, torn down afterwards. A body that raises on any rank raises here with that rank's traceback.
"""

import atexit
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_context = get_context("spawn")
_workers: list["_Worker"] = []


class _Worker:
    def __init__(self) -> None:
        self.pipe, child = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(child,), daemon=True)
        self.process.start()
        child.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_on_ranks(world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `body(rank, world_size, *args)` on every rank of a fresh gloo group; returns the results in rank order."""
    while len(_workers) < world_size:
        _workers.append(_Worker())
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        for rank, worker in enumerate(_workers[:world_size]):
            worker.pipe.send((body, args, rank, world_size, str(store)))
        return _collect(_workers[:world_size], timeout)


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    results, failures = [], []
    for rank, worker in enumerate(workers):
        try:
            if not worker.pipe.poll(5.0 if failures else timeout):
                raise TimeoutError(f"no answer within {timeout} s")
            ok, result = worker.pipe.recv()
        except (EOFError, OSError, TimeoutError) as error:
            ok, result = False, f"the process died or hung: {error!r}"
        results.append(result)
        if not ok:
            failures.append(f"rank {rank}:\n{result}")
    if failures:
        stop_workers()  # their process group may be in any state
        raise AssertionError("\n".join(failures))
    return results


def stop_workers() -> None:
    """Ends the worker processes; the next call starts new ones."""
    for worker in _workers:
        worker.kill()
    _workers.clear()


atexit.register(stop_workers)


def _serve(pipe) -> None:
    """The loop of one worker process."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            body, args, rank, world_size, store = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            result = (True, body(rank, world_size, *args))
            dist.barrier()
        except BaseException:  # CheckpointException of torch is not an Exception
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(result)
