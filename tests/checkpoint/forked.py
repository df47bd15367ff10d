"""Runs a body on ranks that may die: forked processes, so that none pays for importing torch again."""

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.distributed as dist

CRASHED = 9


def run_forked(
    world_size: int, body: Callable[..., Any], *args: Any, store: Path, timeout: float = 30.0
) -> list[int]:
    """The exit status of each rank: 0, CRASHED from `crash()`, 1 after an exception, which is printed."""
    context = get_context("fork")
    processes = [
        context.Process(target=_run, args=(body, rank, world_size, store, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} ranks hung for {timeout} s"
    return [process.exitcode for process in processes]


def crash(*_: Any, **__: Any) -> None:
    """Dies like a kill -9: nothing is flushed, closed or waited for."""
    os._exit(CRASHED)


def _run(body: Callable[..., Any], rank: int, world_size: int, store: Path, args: tuple[Any, ...]) -> None:
    try:
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        body(rank, world_size, *args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
