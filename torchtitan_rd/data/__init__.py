"""Data sets: one row each in the table below; see docs/data.md.

loader = build_dataloader(config.training, tokenizer_path="bytes", vocab_size=258, data_rank=0, data_degree=1,
                          seed=0, pin_memory=False)
for batch in loader.next_step(): ...        # the microbatches of this rank's share of one global batch
"""

from functools import partial
from typing import Any

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.arrow import check_path
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.cursor import Cursor, LaneReader
from torchtitan_rd.data.hub import repository, tokenizer_revision
from torchtitan_rd.data.loader import Batch, DataLoader, merge_states
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
from torchtitan_rd.data.tokenizer import Tokenizer, load_tokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger

__all__ = [
    "DATASETS",
    "Batch",
    "DataLoader",
    "DataRanks",
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


def check_dataset(config: DatasetKeys, split: str = "train") -> Dataset:
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
        (config.stream and config.skip_ranges, "is streamed, so its rows have no numbers: unset training.skip_ranges"),
        (config.stream and shuffled, "is streamed in order: unset training.shuffle_seed or training.stream"),
        (row.kind != "packed" and packed_keys, "is not packed: unset training.pad_id and training.eos_id"),
        (needs_eos and config.eos_id is None, "needs training.eos_id for training.pad_id or document_mask"),
    ):
        if wrong:
            raise ConfigError(f"training.dataset = {name!r} {problem}")
    if config.dataset_path:
        check_path(config.dataset_path, split)
    if config.dataset_revision and repository(config, row.hub, split) is None:
        raise ConfigError(f"training.dataset = {name!r} is not read from the hub here: unset training.dataset_revision")
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
    ranks: DataRanks | None = None,
) -> DataLoader:
    """The loader of one data rank, at the beginning of the data.

    vocab_size: of the model. split: of data that has several. The first window of every row is read here, so that
    data that does not suit the model is found before anything expensive. ranks: all that build this loader together, of
    which one asks the hub, and which must read the same; without it this rank stands alone.
    Raises ConfigError or DataError.
    """
    row = check_dataset(config, split)
    prepared: list[str] = []
    if ranks is not None:
        config = ranks.pinned(config, row, split)
        prepared = ranks.prepared(config, row, split)
    accumulation = accumulation_steps(config, data_degree)
    encoder = build_encoder(config, row.kind, tokenizer_path, vocab_size)
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
        table, found = open_rows(config, row, encoder, split)
        fingerprint |= stream_fingerprint(encoder, found)
        mask = config.document_mask
        readers = [StreamReader(config.dataset, table, encoder, config.seq_len, data_rank, data_degree, mask)]
        start: list[Any] = [STREAM_START]
        logger.info("data: streaming; the position can be continued on %d data ranks only", data_degree)
    else:
        source, found = open_source(config, row, encoder, seed, split, prepared)
        lanes = range(data_rank * rows, (data_rank + 1) * rows)
        cutting = Cutting(config, row.kind, len(source), num_lanes=rows * data_degree)
        fingerprint |= source_fingerprint(config, source, found, cutting)
        source = prepare(config, source, cutting, fingerprint)
        readers = cutting.readers(source, lanes)
        start = [Cursor()] * rows
        for reader in readers:
            reader.read(Cursor())
    fingerprint |= tokenizer_revision(tokenizer_path) if row.kind == "text" else {}
    if ranks is not None:
        ranks.compare(fingerprint)
    found.log(config.dataset, fingerprint.get("num_samples"))
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
        record={"dataset": config.dataset, **found.record(fingerprint.get("num_samples"))},
    )
