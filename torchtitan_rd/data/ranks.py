"""What the ranks of a run do together before they read: ask the hub, prepare once a node,
compare what they hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torchtitan_rd.data.arrow import Encoder
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.fingerprint import check_same_data
from torchtitan_rd.data.hub import hub_tokenizer, pin_revision
from torchtitan_rd.data.sources import Dataset, prepared_files
from torchtitan_rd.errors import TorchtitanRDError

T = TypeVar("T")


@dataclass
class DataRanks:
    """This rank among those that read. Its methods are for all ranks to call together,
    and each raises on every rank what it raises on one.

    gather: the value of every rank, in rank order, on every rank. It may wait for hours: a large data set is
    converted by one rank while the others wait. rank: among all; local_rank: among those of this node,
    numbered in one row.
    states: the `state.json` of the run's checkpoints, the likeliest first,
        which note the commits that the run reads.
    """

    gather: Callable[[Any], list[Any]]
    rank: int
    local_rank: int
    states: Sequence[Path] = ()
    _commits: dict[Any, str | None] = field(default_factory=dict)

    def pinned(
        self, config: DatasetKeys, row: Dataset, split: str = "train", source: str | None = None
    ) -> DatasetKeys:
        """The keys with the commit to read, for data on the hub, which rank 0 alone asks,
        and once for a repository. source: its name in a mixture.
        """

        def pin() -> str | None:
            asked = (config.dataset_path or row.hub, config.dataset_revision, source)
            if asked not in self._commits:
                self._commits[asked] = pin_revision(config, row.hub, self.states, split, source)
            return self._commits[asked]

        return config.model_copy(update={"dataset_revision": self._once(pin, self.rank == 0)[0]})

    def tokenizer(self, path: str) -> str:
        """`model.tokenizer_path`, of the hub's repositories as the folder with their files;
        see `hub_tokenizer`.
        """
        return self.on_each_node(
            lambda: hub_tokenizer(path, self.states), lambda found: found == path or Path(found).is_dir()
        )

    def prepared(self, config: DatasetKeys, row: Dataset, split: str, encoder: Encoder) -> list[str]:
        """The arrow files into which data is converted, which takes long even where it was done before:
        the datasets library looks at every file. None for data that is mapped where it lies, and for streams.
        """
        if not row.samples:
            # Needed on every rank, and slow to import: now, at once, and not after one rank has converted.
            import datasets  # noqa: F401
        return self.on_each_node(
            lambda: prepared_files(config, row, split, encoder),
            lambda files: all(Path(file).is_file() for file in files),
        )

    def compare(self, fingerprint: dict[str, Any]) -> None:
        """Raises DataError unless all ranks read the same."""
        check_same_data(self.gather(fingerprint))

    def on_each_node(self, make: Callable[[], T], is_here: Callable[[T], bool]) -> T:
        """Made by rank 0, and on each node that does not see that by its first rank."""
        made = self._once(make, self.rank == 0)[0]
        lacks = self.local_rank == 0 and not is_here(made)
        on_nodes = self._once(make if lacks else lambda: made, self.local_rank == 0)
        return on_nodes[self.rank - self.local_rank]

    def _once(self, make: Callable[[], T], is_mine: bool) -> list[Any]:
        """What `make` returns on the ranks whose turn it is, by rank; None for the others."""
        result: T | None = None
        failure: TorchtitanRDError | None = None
        try:
            result = make() if is_mine else None
        except TorchtitanRDError as error:
            failure = error
        gathered = self.gather((result, failure))
        for _, failed in gathered:
            if failed is not None:
                raise failure or failed
        return [value for value, _ in gathered]
