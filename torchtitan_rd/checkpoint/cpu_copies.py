"""Copies of a save's tensors in CPU memory, so that training may change the originals meanwhile."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class CpuCopies:
    """pinned: through page-locked buffers (CUDA only), which are kept from one save to the next."""

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._kept: DefaultStager | None = None

    def make(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The same nested dict with CPU tensors. All copies are complete when it returns."""
        stager = self._kept or _stager(pinned=self._pinned)
        copies = stager.stage(dict(tensors))
        copies = copies.result() if isinstance(copies, Future) else copies

        if self._pinned:
            self._kept = stager
        else:
            stager.close()
        return copies

    def close(self) -> None:
        """Frees what is kept."""
        if self._kept is not None:
            self._kept.close()


def _stager(*, pinned: bool) -> DefaultStager:
    """Copies in the calling thread: the next step may begin as soon as it returns."""
    options = StagingOptions(
        use_pinned_memory=pinned,
        use_non_blocking_copy=pinned,
        use_shared_memory=False,
        use_async_staging=False,
    )
    return DefaultStager(options)
