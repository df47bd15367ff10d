"""Several data sets in one run: which of them each row of each step reads, and where it stands in each.

The source of row r of step s is drawn from (seed, s, r) and the weights of that step alone. A lane has a
cursor in each source and moves only the one it reads, so that the windows of one source come in the order in
which they would come without the others: nothing is lost or doubled when weights change.

The position of a lane is `{"stage": n, "sources": {name: [epoch, unit, offset, windows]}}`: the stages (of
steps; see BatchDims) that it has read, and per source its cursor and the windows that it gave.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torchtitan_rd.data.batch_dims import BatchDims
from torchtitan_rd.data.config import DatasetKeys, MixtureSource
from torchtitan_rd.data.cursor import Cursor, Reader, mixed
from torchtitan_rd.data.windows import Window
from torchtitan_rd.errors import ConfigError, DataError

MIXTURE = "mixture"  # what stands as the data set of such a run
START: dict[str, Any] = {"stage": 0, "sources": {}}
_DRAWS = 0x6D6978  # keeps the draws apart from the shuffling, whose seed may be the same
_UNREAD = [*Cursor(), 0]

# Keys of [training] that belong to one data set, and those that only some kinds of data have.
_OF_ONE_SET = ("dataset", "dataset_path", "dataset_revision", "column", "source_dataset", "skip_ranges")
_OF_KINDS = {
    "packed": ("pad_id", "eos_id"),
    "chat": ("question_column", "answer_column", "chat_loss", "pack_samples"),
    "spikes": ("n_neurons",),
}


def _default(key: str) -> Any:
    return DatasetKeys.model_fields[key].get_default(call_default_factory=True)


def source_keys(config: DatasetKeys, source: MixtureSource, kind: str) -> DatasetKeys:
    """[training] as it would be if it read this source alone. kind: of the source."""
    others = {key: _default(key) for of, keys in _OF_KINDS.items() if of != kind for key in keys}
    own = {key: getattr(source, key) for key in _OF_ONE_SET}
    # What is set of these is refused once, by `check_mixture`.
    return config.model_copy(update={**others, **own, "mixture": [], "stream": False, "lane_per_file": False})


def check_mixture(config: DatasetKeys, kinds: Sequence[str], steps: int = 1) -> None:
    """kinds: of the sources. steps: of the run. Raises one ConfigError with all that is wrong."""
    problems = []
    for key in (*_OF_ONE_SET, "stream", "lane_per_file"):
        if getattr(config, key) != _default(key):
            problems.append(f"training.{key} has no place beside [[training.mixture]]: unset it")
    if "spikes" in kinds and {*kinds} - {"spikes", "packed"}:
        problems.append(
            f"training.mixture: spikes and {', '.join(sorted({*kinds} - {'spikes'}))} have different "
            "vocabularies; mix data of one vocabulary"
        )
    for kind, keys in _OF_KINDS.items():
        if kind not in kinds:
            problems += [
                f"training.mixture: no source is {kind}: unset training.{key}"
                for key in keys
                if getattr(config, key) != _default(key)
            ]

    problems += _weight_problems(config.mixture, steps)
    if problems:
        raise ConfigError("\n".join(problems))


def _weight_problems(sources: Sequence[MixtureSource], steps: int) -> list[str]:
    for source in sources:
        try:
            is_finite = math.isfinite(weight_at(source, steps))  # those that grow are largest there
        except OverflowError:
            is_finite = False
        if not is_finite:
            return [f"training.mixture.{source.name}: its weight at step {steps} is beyond all numbers"]

    # Between two such steps a weight is zero throughout or nowhere.
    turns = {1, steps} | {
        step + later
        for source in sources
        for step in (source.start_step, source.end_step or 0, source.start_step + (source.period or 0))
        for later in (0, 1)
    }
    for step in sorted(turns):
        if 1 <= step <= steps and not any(weight_at(source, step) for source in sources):
            return [f"training.mixture: all weights are 0 at step {step}; give one source a weight"]
    return []


def weight_at(source: MixtureSource, step: int) -> float:
    """The weight of a source at `step` (the first is 1), whatever its epoch."""
    weight, since = source.weight, max(step - source.start_step, 0)
    if source.period is not None and source.factor is not None:
        return weight * source.factor ** (max(since - 1, 0) // source.period)
    if source.end_step is None or source.end_weight is None:
        return weight
    progress = min(since / (source.end_step - source.start_step), 1.0)
    if source.schedule == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return (1.0 - progress) * weight + progress * source.end_weight


class Mixture:
    """The draws of a run, the same on every rank.

    seed: decides the draws. dims: say which step a lane's n-th window belongs to.
    """

    def __init__(self, sources: Sequence[MixtureSource], seed: int, dims: BatchDims, seq_len: int):
        self.sources, self.seed = list(sources), seed
        self.dims, self.seq_len = dims, seq_len

    def weights(self, step: int, cursors: Mapping[str, Sequence[int]]) -> list[float]:
        """Of each source in a lane with these cursors: 0 where it has had its epochs."""
        return [
            0.0
            if source.max_epochs is not None and _at(cursors, source.name)[0] >= source.max_epochs
            else weight_at(source, step)
            for source in self.sources
        ]

    def draw(self, step: int, row: int, cursors: Mapping[str, Sequence[int]]) -> str:
        """The name of the source that a row of the global batch reads. Raises DataError if there is none."""
        weights = self.weights(step, cursors)
        total = math.fsum(weights)
        if not total > 0.0:
            raise DataError(
                f"training.mixture: step {step}, row {row}: every source has weight 0 or has been read "
                "max_epochs times; train for fewer steps, or raise max_epochs or a weight"
            )
        point = total * (mixed(_DRAWS, self.seed, step, row) >> 11) / (1 << 53)
        drawable = [(source, weight) for source, weight in zip(self.sources, weights, strict=True) if weight]
        for source, weight in drawable:
            point -= weight
            if point < 0.0:
                return source.name
        return drawable[-1][0].name  # the last one, where rounding has used up the total

    def progress(self, positions: Sequence[Mapping[str, Any]]) -> list[float]:
        """Of these lanes, for each source: the windows read, the latest epoch, and the sum of its shares in
        the weights of the last step.
        """
        found = []
        shares = [self._shares(position) for position in positions]
        for number, source in enumerate(self.sources):
            cursors = [_at(position["sources"], source.name) for position in positions]
            found += [
                float(sum(cursor[3] for cursor in cursors)),
                float(max(cursor[0] for cursor in cursors)),
                math.fsum(share[number] for share in shares),
            ]
        return found

    def row(self, gathered: Sequence[Sequence[float]]) -> dict[str, float]:
        """What a row of metrics says, from the `progress` of every rank: for each source its tokens since
        step 0, the epoch of the lane that is furthest, and its share in the weights, the mean over the lanes.
        Ranks that share rows are neighbours, and the first of them speaks.
        """
        gathered = gathered[:: len(gathered) // self.dims.data_degree]
        row: dict[str, float] = {}
        for number, source in enumerate(self.sources):
            of_ranks = [rank[3 * number : 3 * number + 3] for rank in gathered]
            windows, epochs, shares = zip(*of_ranks, strict=True)
            row[f"tokens_{source.name}"] = int(sum(windows)) * self.seq_len
            row[f"epoch_{source.name}"] = int(max(epochs))
            row[f"weight_{source.name}"] = math.fsum(shares) / self.dims.rows_per_stage
        return row

    def _shares(self, position: Mapping[str, Any]) -> list[float]:
        step, _ = self.dims.stage_of(max(position["stage"] - 1, 0))
        weights = self.weights(step, position["sources"])
        total = math.fsum(weights)
        return [weight / total if total else 0.0 for weight in weights]


class MixtureReader:
    """Reads the windows of one lane from the readers of its sources, by their names."""

    def __init__(self, mixture: Mixture, lane: int, readers: Mapping[str, Reader]):
        self.mixture, self.lane = mixture, lane
        self.readers = readers

    def read(self, position: Mapping[str, Any]) -> Window:
        """The window at `position`. Raises DataError, naming the source."""
        stage, cursors, dims = position["stage"], position["sources"], self.mixture.dims
        step, stage_in_step = dims.stage_of(stage)
        name = self.mixture.draw(step, stage_in_step * dims.rows_per_stage + self.lane, cursors)
        *cursor, windows = _at(cursors, name)
        with errors_of(name):
            window = self.readers[name].read(cursor)
        next_one: Any = window.position
        after = {**cursors, name: [*next_one, windows + 1]}
        return replace(window, position={"stage": stage + 1, "sources": after})

    def close(self) -> None:
        """Lets go of what the sources' readers hold."""
        for reader in self.readers.values():
            reader.close()


@contextmanager
def errors_of(name: str):
    """Errors inside say which source they are of."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"training.mixture.{name}: {error}") from error


def describe(
    mixture: Mixture | None,
    positions: Sequence[Mapping[str, Any]],
    gather: Callable[[list[float]], list[list[float]] | None],
) -> dict[str, float]:
    """`Mixture.row` of all ranks, on the rank to which `gather` brings their numbers; else, and without a
    mixture, nothing. Collective.
    """
    if mixture is None:
        return {}
    gathered = gather(mixture.progress(positions))
    return {} if gathered is None else mixture.row(gathered)


def _at(cursors: Mapping[str, Sequence[int]], name: str) -> Sequence[int]:
    """[epoch, unit, offset, windows]; of a source that is not read yet, its beginning."""
    return cursors.get(name, _UNREAD)
