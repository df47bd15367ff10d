"""Data sets: one row each in the table below; see docs/data.md.

dims = BatchDims.resolve(config.training, data_rank=0, data_degree=1)
loader = build_dataloader(config.training, dims, tokenizer=load_tokenizer("bytes"), vocab_size=258, seed=0,
                          pin_memory=False)
for batch in loader.next_step(): ...        # the microbatches of this rank's share of one global batch
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchtitan_rd.batch import Batch
from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.arrow import Encoder, check_path
from torchtitan_rd.data.batch_dims import BatchDims, BatchKeys
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.cursor import Cursor, LaneReader
from torchtitan_rd.data.file_lanes import check_file_lanes, file_order
from torchtitan_rd.data.files import FileList
from torchtitan_rd.data.hub import repository, tokenizer_revision
from torchtitan_rd.data.loader import BatchLoader, merge_states
from torchtitan_rd.data.ranks import DataRanks
from torchtitan_rd.data.sources import (
    Cutting,
    Dataset,
    build_encoder,
    open_rows,
    open_source,
    prepare,
    source_fingerprint,
    stream_fingerprint,
)
from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE, SyntheticRecordings
from torchtitan_rd.data.stream import STREAM_START, StreamReader
from torchtitan_rd.data.text import pydoc_topics
from torchtitan_rd.data.tokenizer import Tokenizer, is_hub_name, load_tokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger

__all__ = [
    "DATASETS",
    "Batch",
    "BatchDims",
    "BatchKeys",
    "BatchLoader",
    "DataRanks",
    "Dataset",
    "DatasetKeys",
    "Tokenizer",
    "build_dataloader",
    "build_encoder",
    "check_file_lanes",
    "dataset_vocab_size",
    "get_dataset",
    "is_hub_name",
    "load_tokenizer",
    "merge_states",
]

DATASETS: dict[str, Dataset] = {
    "primate": Dataset("spikes", hub="eminorhan/neural-pile-primate"),
    "rodent": Dataset("spikes", hub="eminorhan/neural-pile-rodent"),
    "synthetic": Dataset("spikes", samples=SyntheticRecordings),
    "c4": Dataset("text", hub="allenai/c4", subset="en"),
    "fineweb": Dataset("text", hub="HuggingFaceFW/fineweb", subset="sample-100BT"),
    "fineweb-edu": Dataset("text", hub="HuggingFaceFW/fineweb-edu", subset="sample-100BT"),
    "wikitext": Dataset("text", hub="Salesforce/wikitext", subset="wikitext-2-raw-v1"),
    "pydoc": Dataset("text", samples=pydoc_topics),
    "pydoc-train": Dataset("text", samples=partial(pydoc_topics, part="train")),
    "pydoc-validation": Dataset("text", samples=partial(pydoc_topics, part="validation")),
    "text": Dataset("text"),
    "packed": Dataset("packed"),
}


def get_dataset(config: DatasetKeys, section: str = "training", split: str = "train") -> Dataset:
    """The row of `config.dataset`, a key of `section`, of which `split` is read. Touches no data.

    Raises ConfigError with all that is wrong; DataError if dataset_path does not exist.
    """
    name = config.dataset
    if name not in DATASETS:
        raise ConfigError(f"{section}.dataset = {name!r} is not a data set{nearest(name, DATASETS)}")

    row = DATASETS[name]
    shuffled = config.shuffle_seed is not None
    packed_keys = config.pad_id is not None or config.eos_id is not None
    needs_eos = row.kind == "packed" and (config.pad_id is not None or config.document_mask)
    remarks = (
        (row.samples and config.dataset_path, f"is made here: {section}.dataset_path has no effect on it"),
        (row.samples and config.stream, "is made here: set training.stream (STREAM_HF_DATA) = false"),
        (not (row.samples or row.hub or config.dataset_path), f"needs {section}.dataset_path"),
        (
            config.stream and config.skip_ranges,
            "is streamed, so its rows have no numbers: unset training.skip_ranges",
        ),
        (config.stream and shuffled, "is streamed in order: unset training.shuffle_seed or training.stream"),
        (row.kind != "packed" and packed_keys, "is not packed: unset training.pad_id and training.eos_id"),
        # A made data set has no such column, and a stream is not searched for rows.
        (
            row.samples and config.source_dataset,
            "is made here and has one source: unset training.source_dataset",
        ),
        (
            config.stream and config.source_dataset,
            "is streamed whole: unset training.source_dataset or training.stream",
        ),
        (config.lane_per_file and row.kind != "packed", "is not packed: unset training.lane_per_file"),
        (
            config.lane_per_file and (config.stream or shuffled or config.source_dataset),
            "is read in the order of its files with training.lane_per_file: unset training.stream, "
            "shuffle_seed and source_dataset",
        ),
        (needs_eos and config.eos_id is None, "needs training.eos_id for training.pad_id or document_mask"),
    )
    if problems := [f"{section}.dataset = {name!r} {problem}" for wrong, problem in remarks if wrong]:
        raise ConfigError("\n".join(problems))

    if config.dataset_path:
        check_path(config.dataset_path, split, section)
    if config.dataset_revision and repository(config, row.hub, split) is None:
        raise ConfigError(
            f"{section}.dataset = {name!r} is not read from the hub here: unset training.dataset_revision"
        )
    return row


def dataset_vocab_size(config: DatasetKeys, tokenizer: Tokenizer | None) -> int:
    """What `model.vocab_size` is where it is left open: 256 for spikes, the tokenizer's size for text.

    tokenizer: that of the run; None where no data set is text.
    """
    kind = DATASETS[config.dataset].kind
    if kind == "packed":
        raise ConfigError(
            f"model.vocab_size must be given for training.dataset = {config.dataset!r}: "
            "packed ids say nothing about it"
        )
    if kind == "spikes":
        return SPIKE_VOCAB_SIZE
    if tokenizer is None:
        raise ValueError("text is read with a tokenizer, and none was given")
    return tokenizer.vocab_size


@dataclass(frozen=True)
class _OpenSet:
    """An indexable data set as this rank reads it: one reader a lane, what its rows are, and its files."""

    readers: list[LaneReader]
    fingerprint: dict[str, Any]
    found: FileList


def _open_lanes(
    config: DatasetKeys,
    row: Dataset,
    encoder: Encoder,
    dims: BatchDims,
    seed: int,
    split: str,
    ranks: DataRanks | None,
) -> _OpenSet:
    """Opens a data set and reads the first window of each lane of this rank. Raises DataError."""
    prepared = [] if ranks is None else ranks.prepared(config, row, split)
    source, found = open_source(config, row, encoder, seed, split, prepared)
    order = file_order(config, found, len(source), dims.rows_per_stage)
    cutting = Cutting(config, row.kind, len(source), dims.rows_per_stage, order)
    fingerprint = source_fingerprint(config, source, found, cutting)
    samples = prepare(config, source, cutting, fingerprint)
    readers = cutting.readers(samples, dims.lanes)
    for reader in readers:
        reader.read(Cursor())
    return _OpenSet(readers, fingerprint, found)


def _settings(config: DatasetKeys, dims: BatchDims) -> dict[str, Any]:
    """The part of a fingerprint that is not about data."""
    return {
        "dataset": config.dataset,
        "stream": config.stream,
        "seq_len": config.seq_len,
        "global_batch_size": config.global_batch_size if config.stream else dims.global_batch_size,
        "shuffle_seed": config.shuffle_seed,
        **({"batch_ramp_stages": dims.stages} if dims.stages > 1 else {}),
    }


def build_dataloader(
    config: DatasetKeys,
    dims: BatchDims,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    seed: int,
    pin_memory: bool,
    split: str = "train",
    ranks: DataRanks | None = None,
) -> BatchLoader:
    """The loader of one data rank, at the beginning of the data.

    tokenizer: for text. vocab_size: of the model. split: of data that has several. The first window of every
    row is read here, so that data that does not suit the model is found before anything expensive. ranks: all
    that build this loader together, of which one asks the hub, and which must read the same; without it this
    rank stands alone. Raises ConfigError or DataError.
    """
    row = get_dataset(config, split=split)
    check_file_lanes(config, dims, split)
    if ranks is not None:
        config = ranks.pinned(config, row, split)
    fingerprint = _settings(config, dims)

    readers: Sequence[LaneReader] | Sequence[StreamReader]
    start: list[Any]
    encoder = build_encoder(config, row.kind, tokenizer, vocab_size)
    if config.stream:
        table, found = open_rows(config, row, encoder, split)
        fingerprint |= stream_fingerprint(encoder, found)
        share = (dims.data_rank, dims.data_degree)
        readers = [StreamReader(config.dataset, table, encoder, config.seq_len, *share, config.document_mask)]
        start = [STREAM_START]
        logger.info("data: streaming; the position can be continued on %d data ranks only", dims.data_degree)
    else:
        opened = _open_lanes(config, row, encoder, dims, seed, split, ranks)
        readers, found = opened.readers, opened.found
        fingerprint |= opened.fingerprint
        start = [Cursor()] * len(readers)

    if row.kind == "text" and tokenizer is not None:
        fingerprint |= tokenizer_revision(tokenizer)
    if ranks is not None:
        ranks.compare(fingerprint)
    found.log(config.dataset, fingerprint.get("num_samples"))
    return BatchLoader(
        readers,
        start,
        dims,
        fingerprint=fingerprint,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        fill_id=config.eos_id,
        restart_on_rank_change=config.on_rank_change == "restart",
        record={"dataset": config.dataset, **found.record(fingerprint.get("num_samples"))},
    )
