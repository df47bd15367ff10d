"""The keys of [training] that the data room reads; `train_step.TrainingConfig` inherits them."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from torchtitan_rd.config_loader import MUST_MATCH, OptionalUserPath, Section
from torchtitan_rd.data.batch_dims import BatchKeys

# `tokens_<name>` of a source must be no other number of a row of metrics.
_TAKEN_NAMES = re.compile(r"seen|per_second.*")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

_OF_SCHEDULES = {
    "constant": (),
    "linear": ("end_weight", "end_step"),
    "cosine": ("end_weight", "end_step"),
    "step": ("period", "factor"),
}


def check_ranges(ranges: list[list[int]]) -> list[list[int]]:
    """The value of skip_ranges. Raises ValueError."""
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
            raise ValueError(f"{pair} is not a pair of the first and the last row to skip")
    return ranges


def _all_is_unset(source: str | None) -> str | None:
    return None if source == "all" else source


OptionalSource = Annotated[str | None, AfterValidator(_all_is_unset)]
RowRanges = Annotated[list[list[int]], AfterValidator(check_ranges)]


def _from_1(ranges: list[list[int]]) -> list[list[int]]:
    if any(first < 1 for first, _ in ranges):
        raise ValueError("batches are counted from 1")
    return ranges


BatchRanges = Annotated[RowRanges, AfterValidator(_from_1)]


class WeightSchedule(Section):
    weight: float = Field(ge=0.0)
    """The share of the source in each global batch is its weight over the sum of all weights.
    With a schedule, the weight at the beginning."""

    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the weight changes. linear, cosine: from `weight`, which it has up to `start_step`, to
    `end_weight`, which it has from `end_step` on. step: after every `period` steps since `start_step` it is
    multiplied by `factor`."""

    start_step: int = Field(0, ge=0)
    """The last step with the full `weight`, before the schedule sets in."""

    end_weight: float | None = Field(None, ge=0.0)
    """linear, cosine: the weight in the end."""

    end_step: int | None = Field(None, ge=1)
    """linear, cosine: the first step with `end_weight`."""

    period: int | None = Field(None, ge=1)
    """step: steps from one change to the next."""

    factor: float | None = Field(None, ge=0.0)
    """step: what the weight is multiplied by at each change."""

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> "WeightSchedule":
        needed = _OF_SCHEDULES[self.schedule]
        absent = [key for key in needed if getattr(self, key) is None]
        if absent:
            raise ValueError(f'schedule = "{self.schedule}" needs {" and ".join(absent)}')
        others = {key for keys in _OF_SCHEDULES.values() for key in keys} - {*needed}
        if surplus := sorted(key for key in others if getattr(self, key) is not None):
            raise ValueError(f'schedule = "{self.schedule}" has no {" and ".join(surplus)}')
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(f"end_step = {self.end_step} must come after start_step = {self.start_step}")
        return self


class MixtureSource(WeightSchedule):
    name: str
    """What the source is called in metrics, messages and checkpoints; a name of its own."""

    dataset: str
    """As training.dataset."""

    dataset_path: OptionalUserPath = None
    """As training.dataset_path."""

    dataset_revision: str | None = None
    """As training.dataset_revision."""

    column: str | None = None
    """As training.column."""

    source_dataset: OptionalSource = None
    """As training.source_dataset."""

    skip_ranges: RowRanges = Field(default_factory=list)
    """As training.skip_ranges, in the rows of this source."""

    pieces: list[WeightSchedule] = Field(default_factory=list)
    """Weights one after another, each with a schedule of its own: from its start_step on, the last piece that
    has begun decides. Before the first of them `weight` holds, which then has no schedule of its own."""

    fills: Literal["nothing", "rest", "gaps"] = "nothing"
    """rest: the weight is what the weights of all other sources leave of it, 0 where they leave nothing.
    gaps: the weight holds only where all others are 0. One source alone can be either."""

    max_epochs: int | None = Field(None, ge=1)
    """Each row of the global batch passes over the source once it has read its share of it so many times:
    its weight is 0 there. Unset: the source is read over and over."""

    @field_validator("name")
    @classmethod
    def _can_name_numbers(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must begin with a letter and hold letters, digits, _ and - alone")
        if _TAKEN_NAMES.fullmatch(name):
            raise ValueError(f"tokens_{name} is another number in metrics.jsonl; choose another name")
        return name

    @model_validator(mode="after")
    def _pieces_stand_alone_and_in_order(self) -> "MixtureSource":
        if self.pieces and self.schedule != "constant":
            raise ValueError(
                f'pieces have schedules of their own: schedule = "{self.schedule}" has no effect'
            )
        steps = [piece.start_step for piece in self.pieces]
        if steps != sorted({*steps}):
            raise ValueError(
                f"pieces begin at the steps {steps}: expected each to begin after the one before"
            )
        return self


class DatasetKeys(BatchKeys):
    dataset: str = Field("pydoc", json_schema_extra=MUST_MATCH)
    """Name of the data set: a row of the table in `torchtitan_rd/data/__init__.py` (see docs/data.md)."""

    dataset_path: OptionalUserPath = None
    """Where to read it instead: a `save_to_disk` folder, a folder, glob or file of .parquet, .arrow,
    .jsonl or .txt, or the name of a repository on the Hugging Face hub. Required for `text`, `packed` and
    `chat`.
    """

    dataset_revision: str | None = None
    """Branch, tag or commit of a data set on the hub. Unset: the commit that the run's checkpoints note,
    and in a new run the newest one.
    """

    column: str | None = Field(None, json_schema_extra=MUST_MATCH)
    """Column to read. Unset: `spike_counts` for spikes, `text` for text, `input_ids` for packed rows,
    `messages` for conversations.
    """

    source_dataset: OptionalSource = None
    """Only the rows whose column `source_dataset` holds this, in data gathered from several sources
    (the Neural Pile). Unset, or `all`: all rows.
    """

    question_column: str | None = Field(None, json_schema_extra=MUST_MATCH)
    """Conversations of one question and its answer: the column of the question, which is the user's turn.
    Together with answer_column, in place of `column`.
    """

    answer_column: str | None = Field(None, json_schema_extra=MUST_MATCH)
    """The column of the answer, which is the assistant's turn."""

    chat_loss: Literal["assistant", "all"] = "assistant"
    """Conversations: learn to predict the tokens of the assistant's turns alone, or all. A run that resumes
    cannot change it.
    """

    pack_samples: bool = True
    """Conversations: follow one another without a gap, as text does. False: each is a row of its own, which
    is cut off after `seq_len + 1` ids, or padded. A run that resumes cannot change it.
    """

    n_neurons: int | None = Field(None, ge=1, json_schema_extra=MUST_MATCH)
    """Spikes only: the neurons of every recording. Of more, the first so many are kept; fewer are repeated in
    order until there are enough. Unset: as many as each recording has.
    """

    seq_len: int = Field(2048, ge=1, json_schema_extra=MUST_MATCH)
    """Tokens of context. A window holds `seq_len + 1` ids; windows do not overlap."""

    shuffle_seed: int | None = Field(None, ge=0, lt=2**64, json_schema_extra=MUST_MATCH)
    """Seed of the order of the samples, another one in each epoch. Unset: the order of the files."""

    stream: bool = Field(False, json_schema_extra=MUST_MATCH)
    """Read Hugging Face data as a stream, without preparing it on disk first. A stream is bound to the number
    of ranks and cannot be shuffled. `STREAM_HF_DATA=1` in the environment sets this.
    """

    num_workers: int = Field(0, ge=0)
    """Reader processes per rank; 0 reads in a thread of the training process.
    The batches do not depend on it.
    """

    document_mask: bool = Field(False, json_schema_extra=MUST_MATCH)
    """Keep attention within a sample (a document, a recording) where a window holds parts of several."""

    pad_id: int | None = Field(None, json_schema_extra=MUST_MATCH)
    """Packed rows only: the id that marks padding.
    It becomes `eos_id` in the inputs and is ignored in the labels. May be `eos_id` itself:
    then padding is what follows the last document's eos at a row's end.
    """

    eos_id: int | None = Field(None, ge=0, json_schema_extra=MUST_MATCH)
    """Packed rows only: the id that ends a document. Needed by `pad_id` and by `document_mask`."""

    lane_per_file: bool = False
    """Packed rows in parquet or arrow files only: each row of the global batch is read from files of its own,
    in their order, so that with as many files as global_batch_size step s holds row s of every file. Their
    number must be a multiple of global_batch_size. Cannot change at a resume.
    """

    skip_ranges: RowRanges = Field(default_factory=list)
    """Rows that are known to be bad, as pairs of the first and the last one: `[[41, 41], [100, 120]]`. The
    numbers are those of error messages and of `torchtitan-rd data check`: from 0, over all files in order
    (the rows of `source_dataset` alone where it is set), before shuffling. Such a row is never read and
    counts as empty, so all others keep their place, and a resumed run may change this key.
    """

    skip_batches: BatchRanges = Field(default_factory=list)
    """Global batches to pass over, as pairs of the first and the last one: `[[41, 41], [100, 120]]`. Batch n
    is what step n of an undisturbed run trains on. It is read and dropped, so all others stay what they are;
    a step takes the next batch that is not passed over. A resumed run may change this key, for batches to
    come.
    """

    mixture: list[MixtureSource] = Field(default_factory=list)
    """Several data sets in one run, a table `[[training.mixture]]` each (docs/data.md). `dataset`,
    `dataset_path` and the like are then keys of each source, and must be left out here. At a resume weights
    and schedules may change and sources may be added, but none may be taken away: set its weight to 0.
    """

    cache_folder: OptionalUserPath = None
    """Where the ids of long documents are kept, which are encoded once and mapped by all ranks of a node.
    Unset: in the cache of the datasets library (HF_DATASETS_CACHE)."""

    on_rank_change: Literal["refuse", "restart"] = "refuse"
    """What to do when a stream resumes on another number of ranks, where its position has no meaning:
    stop with an error, or begin the data anew."""

    @field_validator("mixture")
    @classmethod
    def _each_name_once(cls, sources: list[MixtureSource]) -> list[MixtureSource]:
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called {', '.join(twice)}; give each a name of its own")
        if len(fill := [source.name for source in sources if source.fills != "nothing"]) > 1:
            raise ValueError(f"{', '.join(fill)} fill what the others leave; one source alone can")
        return sources
