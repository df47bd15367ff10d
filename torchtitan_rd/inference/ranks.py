"""What the ranks of an evaluation do together. Every rank holds the whole model: what no single device can
hold is not generated from here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchtitan_rd.conversion.hub import fetch_model
from torchtitan_rd.data import DataRanks
from torchtitan_rd.data.tokenizer import is_hub_name
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import PREPARING, CommConfig, Environment, gather, init_process_group

T = TypeVar("T")


@contextmanager
def process_group(environment: Environment, device: torch.device) -> Iterator[None]:
    """The process group of the launcher's ranks, or of this process alone;
    one that is there already is left alone. device: of the tensors that the ranks exchange.
    """
    if dist.is_initialized():
        yield
        return
    # One rank may fetch a model, convert data or generate for long while the others wait.
    init_process_group(environment, device, CommConfig(init_timeout_seconds=int(PREPARING)), Path())
    try:
        yield
    finally:
        dist.destroy_process_group()


def data_ranks(environment: Environment, states: Iterable[Path] = ()) -> DataRanks:
    """These ranks as readers of data; a lone one needs no process group. states: see `DataRanks`."""
    together = gather if environment.world_size > 1 else lambda value: [value]
    return DataRanks(together, environment.rank, environment.local_rank, tuple(states))


def model_folder(path: str, revision: str | None, environment: Environment) -> Path:
    """`path`; of the name of a repository on the hub the folder into which one rank of each node has fetched
    it, at the same commit. Collective, in a process group.

    revision: of the repository: a commit, branch or tag; None: the newest commit. Raises ConfigError for one
    of what lies here, CheckpointError if the repository cannot be had.
    """
    if not is_hub_name(path):
        if revision is not None:
            raise ConfigError(f"--revision has no effect on {path}, which is no repository on the hub")
        return Path(path)
    return data_ranks(environment).on_each_node(lambda: fetch_model(path, revision), Path.is_dir)


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
