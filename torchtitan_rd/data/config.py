"""The keys of [training] that the data room reads; `train_step.TrainingConfig` inherits them."""

from typing import Literal

from pydantic import Field, field_validator

from torchtitan_rd.config_loader import MUST_MATCH, OptionalUserPath
from torchtitan_rd.data.batch_dims import BatchKeys


class DatasetKeys(BatchKeys):
    dataset: str = Field("pydoc", json_schema_extra=MUST_MATCH)
    """Name of the data set: a row of the table in `torchtitan_rd/data/__init__.py` (see docs/data.md)."""

    dataset_path: OptionalUserPath = None
    """Where to read it instead: a `save_to_disk` folder, a folder, glob or file of .parquet, .arrow,
    .jsonl or .txt, or the name of a repository on the Hugging Face hub. Required for `text` and `packed`.
    """

    dataset_revision: str | None = None
    """Branch, tag or commit of a data set on the hub. Unset: the commit that the run's checkpoints note,
    and in a new run the newest one.
    """

    column: str | None = Field(None, json_schema_extra=MUST_MATCH)
    """Column to read. Unset: `spike_counts` for spikes, `text` for text, `input_ids` for packed rows."""

    source_dataset: str | None = None
    """Only the rows whose column `source_dataset` holds this, in data gathered from several sources
    (the Neural Pile). Unset, or `all`: all rows.
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
    It becomes `eos_id` in the inputs and is ignored in the labels.
    """

    eos_id: int | None = Field(None, ge=0, json_schema_extra=MUST_MATCH)
    """Packed rows only: the id that ends a document. Needed by `pad_id` and by `document_mask`."""

    lane_per_file: bool = False
    """Packed rows in parquet or arrow files only: each row of the global batch is read from files of its own,
    in their order, so that with as many files as global_batch_size step s holds row s of every file. Their
    number must be a multiple of global_batch_size. Cannot change at a resume.
    """

    skip_ranges: list[list[int]] = Field(default_factory=list)
    """Rows that are known to be bad, as pairs of the first and the last one: `[[41, 41], [100, 120]]`. The
    numbers are those of error messages and of `torchtitan-rd data check`: from 0, over all files in order
    (the rows of `source_dataset` alone where it is set), before shuffling. Such a row is never read and
    counts as empty, so all others keep their place, and a resumed run may change this key.
    """

    cache_folder: OptionalUserPath = None
    """Where the ids of long documents are kept, which are encoded once and mapped by all ranks of a node.
    Unset: in the cache of the datasets library (HF_DATASETS_CACHE)."""

    on_rank_change: Literal["refuse", "restart"] = "refuse"
    """What to do when a stream resumes on another number of ranks, where its position has no meaning:
    stop with an error, or begin the data anew."""

    @field_validator("source_dataset")
    @classmethod
    def _all_is_unset(cls, value: str | None) -> str | None:
        return None if value == "all" else value

    @field_validator("skip_ranges")
    @classmethod
    def _pairs(cls, ranges: list[list[int]]) -> list[list[int]]:
        for pair in ranges:
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
                raise ValueError(f"{pair} is not a pair of the first and the last row to skip")
        return ranges
