"""Prompts over ranks. Every rank holds the whole model: what no single device can hold is not generated from
here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from torchtitan_rd.job import Environment

T = TypeVar("T")


@contextmanager
def process_group(environment: Environment) -> Iterator[None]:
    """A gloo group of the launcher's ranks; none for a process alone.
    Answers are small, so they go by the CPU.
    """
    if environment.world_size == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", rank=environment.rank, world_size=environment.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def over_ranks(
    count: int, environment: Environment, run: Callable[[Sequence[int]], Sequence[T]]
) -> list[T] | None:
    """run: numbers of prompts -> their results; called with this rank's numbers. -> results of all 0 ..
    count - 1 on rank 0, None on the others.
    """
    own = range(environment.rank, count, environment.world_size)
    results = list(run(own))
    if environment.world_size == 1:
        return results
    gathered: list[Any] | None = [None] * environment.world_size if environment.rank == 0 else None
    dist.gather_object(results, gathered)
    if gathered is None:
        return None
    return [
        gathered[number % environment.world_size][number // environment.world_size] for number in range(count)
    ]
