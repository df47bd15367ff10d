"""The global batches of a run in their order, less those that are passed over."""

from collections.abc import Iterable, Sequence

from torchtitan_rd.batch import Batch
from torchtitan_rd.data.batch_dims import BatchDims
from torchtitan_rd.data.loader import BatchLoader
from torchtitan_rd.log import logger


class BatchQueue:
    """Counts the batches of `loader`: number n (from 1) is what step n of an undisturbed run trains on.

    A batch that is passed over is read and dropped, so that all others are what they would be without it.
    passed: pairs of the first and the last number.
    """

    def __init__(self, loader: BatchLoader, dims: BatchDims, passed: Iterable[Sequence[int]] = ()):
        self._loader, self._dims = loader, dims
        self._passed = [(first, last) for first, last in passed]
        self.number = 0
        """Of the batch that `next` returned last, or passed over."""

    @property
    def passes_over(self) -> bool:
        """Whether numbers and steps may differ."""
        return bool(self._passed)

    def pass_over(self, ranges: Iterable[Sequence[int]]) -> None:
        """These, too, from here on; what was trained on already is not undone by it."""
        self._passed += [(first, last) for first, last in ranges]

    def next(self) -> list[Batch]:
        """This rank's microbatches of the next batch that is not passed over. Raises DataError."""
        self.number += 1
        first = self.number
        while any(low <= self.number <= high for low, high in self._passed):
            self._read()
            self.number += 1
        if self.number > first:
            logger.warning("data: passed over batches %d to %d", first, self.number - 1)
        return self._read()

    def rows(self) -> int:
        """Of the last batch, over all ranks."""
        return self._dims.rows_at(self.number)

    def _read(self) -> list[Batch]:
        return self._loader.next_step(self._dims.stages_at(self.number))
