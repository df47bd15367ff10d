"""Data sets: one row each in the table below; see docs/data.md.

loader = build_dataloader(config.training, tokenizer_path="bytes", vocab_size=258, data_rank=0, data_degree=1,
                          seed=0, pin_memory=False)
for batch in loader.next_step(): ...        # the microbatches of this rank's share of one global batch
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.arrow import Encoder, SampleSource, TableSource, check_path, open_table
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.cursor import Cursor, LaneReader, Source
from torchtitan_rd.data.loader import Batch, DataLoader, merge_states
from torchtitan_rd.data.packed import PackedEncoder
from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE, SpikeEncoder, SyntheticRecordings
from torchtitan_rd.data.stream import STREAM_START, StreamReader
from torchtitan_rd.data.text import TextEncoder, pydoc_topics
from torchtitan_rd.data.tokenizer import Tokenizer, load_tokenizer
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger

__all__ = [
    "DATASETS",
    "Batch",
    "DataLoader",
    "Dataset",
    "DatasetKeys",
    "Tokenizer",
    "accumulation_steps",
    "build_dataloader",
    "check_dataset",
    "dataset_vocab_size",
    "load_tokenizer",
    "merge_states",
]

# Data sets of any size have far more samples than this; small ones are cut into so many pieces for each row of a batch.
_UNITS_PER_LANE = 16


@dataclass(frozen=True)
class Dataset:
    """kind: how a sample becomes ids. Where samples come from: `hub` (and `subset`) on the Hugging Face hub unless
    training.dataset_path names another place, or `samples(seed)`, made here; neither: dataset_path is required."""

    kind: Literal["spikes", "text", "packed"]
    hub: str | None = None
    subset: str | None = None
    samples: Callable[[int], Sequence[Any]] | None = None


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


def check_dataset(config: DatasetKeys) -> Dataset:
    """The row of `training.dataset`. Touches no data. Raises ConfigError; DataError if dataset_path does not exist."""
    name = config.dataset
    if name not in DATASETS:
        raise ConfigError(f"training.dataset = {name!r} is not a data set{nearest(name, DATASETS)}")
    row = DATASETS[name]
    shuffled = config.shuffle_seed is not None
    packed_keys = config.pad_id is not None or config.eos_id is not None
    needs_eos = row.kind == "packed" and (config.pad_id is not None or config.document_mask)
    for wrong, problem in (
        (row.samples and config.dataset_path, "is made here: training.dataset_path has no effect on it"),
        (row.samples and config.stream, "is made here: set training.stream (STREAM_HF_DATA) = false"),
        (not (row.samples or row.hub or config.dataset_path), "needs training.dataset_path"),
        (config.stream and shuffled, "is streamed in order: unset training.shuffle_seed or training.stream"),
        (row.kind != "packed" and packed_keys, "is not packed: unset training.pad_id and training.eos_id"),
        (needs_eos and config.eos_id is None, "needs training.eos_id for training.pad_id or document_mask"),
    ):
        if wrong:
            raise ConfigError(f"training.dataset = {name!r} {problem}")
    if config.dataset_path:
        check_path(config.dataset_path)
    return row


def dataset_vocab_size(config: DatasetKeys, tokenizer_path: str) -> int:
    """What `model.vocab_size` is where it is left open: 256 for spikes, the tokenizer's size for text."""
    kind = check_dataset(config).kind
    if kind == "packed":
        raise ConfigError(
            "model.vocab_size must be given for training.dataset = 'packed': the ids say nothing about it"
        )
    return SPIKE_VOCAB_SIZE if kind == "spikes" else load_tokenizer(tokenizer_path).vocab_size


def accumulation_steps(config: DatasetKeys, data_degree: int) -> int:
    """Microbatches a step. Raises ConfigError unless the global batch is a whole number of them."""
    at_once = config.local_batch_size * data_degree
    if config.global_batch_size == -1:
        return 1
    if config.global_batch_size % at_once:
        raise ConfigError(
            f"training.global_batch_size = {config.global_batch_size} is not a multiple of "
            f"training.local_batch_size = {config.local_batch_size} times the {data_degree} data ranks = {at_once}"
        )
    return config.global_batch_size // at_once


def build_dataloader(
    config: DatasetKeys,
    *,
    tokenizer_path: str,
    vocab_size: int,
    data_rank: int,
    data_degree: int,
    seed: int,
    pin_memory: bool,
    split: str = "train",
) -> DataLoader:
    """The loader of one data rank, at the beginning of the data.

    vocab_size: of the model. split: of data that has several. The first window of every row is read here, so that
    data that does not suit the model is found before anything expensive. Raises ConfigError or DataError.
    """
    row = check_dataset(config)
    accumulation = accumulation_steps(config, data_degree)
    encoder = _encoder(config, row, tokenizer_path, vocab_size)
    rows = config.local_batch_size * accumulation
    fingerprint = {
        "dataset": config.dataset,
        "stream": config.stream,
        "seq_len": config.seq_len,
        "global_batch_size": config.global_batch_size if config.stream else rows * data_degree,
        "shuffle_seed": config.shuffle_seed,
    }
    readers: list[LaneReader] | list[StreamReader]
    if config.stream:
        table = open_table(config.dataset, *_place(config, row), stream=True, split=split)
        mask = config.document_mask
        readers = [StreamReader(config.dataset, table, encoder, config.seq_len, data_rank, data_degree, mask)]
        start: list[Any] = [STREAM_START]
        logger.info("data: streaming; the position can be continued on %d data ranks only", data_degree)
    else:
        source = _source(config, row, encoder, seed, split)
        fingerprint |= {"num_samples": len(source), "content": _digest(source)}
        readers = _lane_readers(config, source, range(data_rank * rows, (data_rank + 1) * rows), rows * data_degree)
        start = [Cursor()] * rows
        for reader in readers:
            reader.read(Cursor())
    return DataLoader(
        readers,
        start,
        fingerprint=fingerprint,
        local_batch_size=config.local_batch_size,
        accumulation_steps=accumulation,
        data_rank=data_rank,
        data_degree=data_degree,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        fill_id=config.eos_id,
        restart_on_rank_change=config.on_rank_change == "restart",
    )


def _place(config: DatasetKeys, row: Dataset) -> tuple[str, str | None]:
    """Path or hub name, and subset."""
    return (config.dataset_path, None) if config.dataset_path else (row.hub, row.subset)


def _encoder(config: DatasetKeys, row: Dataset, tokenizer_path: str, vocab_size: int) -> Encoder:
    column = {} if config.column is None else {"column": config.column}
    if row.kind == "spikes":
        return SpikeEncoder(vocab_size, **column)
    if row.kind == "packed":
        if config.eos_id is not None and config.eos_id >= vocab_size:
            raise ConfigError(f"training.eos_id = {config.eos_id} is not below model.vocab_size = {vocab_size}")
        return PackedEncoder(config.seq_len, vocab_size, config.pad_id, config.eos_id, **column)
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer_path!r} has ids up to {tokenizer.vocab_size - 1}, but model.vocab_size = "
            f"{vocab_size}: set it to {tokenizer.vocab_size} or more"
        )
    return TextEncoder(tokenizer, vocab_size, **column)


def _source(config: DatasetKeys, row: Dataset, encoder: Encoder, seed: int, split: str) -> Source:
    if row.samples:
        return SampleSource(config.dataset, row.samples(seed), encoder)
    table = open_table(config.dataset, *_place(config, row), stream=False, split=split)
    return TableSource(config.dataset, table, encoder)


def _lane_readers(config: DatasetKeys, source: Source, lanes: range, num_lanes: int) -> list[LaneReader]:
    if config.dataset == "packed" and len(source) < num_lanes:
        raise DataError(
            f"packed: holds {len(source)} rows, fewer than the {num_lanes} of one global batch; "
            f"lower training.global_batch_size"
        )
    seq_len, shuffle_seed, mask = config.seq_len, config.shuffle_seed, config.document_mask
    units = 1 if config.dataset == "packed" else _UNITS_PER_LANE  # a packed row is a window and never cut
    return [LaneReader(source, lane, num_lanes, seq_len, shuffle_seed, mask, units) for lane in lanes]


def _digest(source: Source) -> str:
    """Tells data and tokenizer apart from others by the first ids of the first and the last sample."""
    digest = hashlib.sha256()
    for index in (0, len(source) - 1):
        digest.update(source.tokens(index)[:4096].astype(np.int64).tobytes())
    return digest.hexdigest()[:16]
