"""Agreement of all ranks, through gloo: what one rank decides or suffers, every rank learns."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan_rd.errors import CheckpointError

T = TypeVar("T")


class RankGroup:
    """All ranks of the job; without a process group, this one process. Collective: make it on every rank.

    seconds: None shares WORLD, with training's own time-outs: for brief questions of the training thread. A
        number makes a gloo group of its own in which one rank may wait so long for another's work, and which
        another thread may use while training goes on. Each such group is one more connection from every rank
        to every other, so there should be few; no two threads may use a group at once.
    """

    def __init__(self, seconds: float | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self._own = False
        self.group: dist.ProcessGroup | None = dist.group.WORLD if distributed else None
        if distributed and seconds is not None:
            self._own = True
            self.group = dist.new_group(
                backend="gloo", timeout=timedelta(seconds=seconds), group_desc="checkpoint"
            )
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1

    def from_rank0(self, make: Callable[[], T]) -> T:
        """What `make()` returns on rank 0, on every rank.
        Raises CheckpointError on every rank if it fails there.
        """
        answer: list[Any] = [None, None]  # the result, or what failed
        cause: Exception | None = None
        if self.rank == 0:
            try:
                answer[0] = make()
            except Exception as error:
                answer[1], cause = describe(error), error

        if self.group is not None:
            dist.broadcast_object_list(answer, src=0, group=self.group)
        result, failure = answer
        if failure is not None:
            raise CheckpointError(failure) from cause
        return result

    def agree(self, action: Callable[[], T]) -> list[T]:
        """What `action()` returned on each rank. Raises CheckpointError on every rank if it fails on any."""
        result: Any = None
        failures: dict[int, str] = {}
        cause: BaseException | None = None
        try:
            result = action()
        except CheckpointException as error:  # of torch; a BaseException, which names the ranks that failed
            cause = error
            failures = {rank: describe(wrapped[0]) for rank, wrapped in error.failures.items()}
        except Exception as error:
            cause = error
            failures = {self.rank: describe(error)}
        gathered = self._gather((result, failures))
        merged = {rank: text for _, found in gathered for rank, text in found.items()}
        if merged:
            raise _as_checkpoint_error(merged) from cause
        return [value for value, _ in gathered]

    def agree_on_own(self, action: Callable[[], T]) -> T:
        """The same, but what it returned on this rank, which is sent nowhere."""
        own: list[T] = []
        self.agree(lambda: own.append(action()))
        return own[0]

    def close(self) -> None:
        """Leaves the group. Not a collective."""
        if self._own and self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    def _gather(self, value: T) -> list[T]:
        if self.group is None:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


def describe(error: BaseException) -> str:
    """One line for a user: our own errors as they are, others with their type."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _as_checkpoint_error(failures: dict[int, str]) -> CheckpointError:
    if len(set(failures.values())) == 1:
        return CheckpointError(next(iter(failures.values())))
    return CheckpointError("; ".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
