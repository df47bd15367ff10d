"""Data sets: one row each in the table below; see docs/data.md.

dims = BatchDims.resolve(config.training, data_rank=0, data_degree=1)
loader = build_dataloader(config.training, dims, tokenizer=load_tokenizer("bytes"), vocab_size=258, seed=0,
                          pin_memory=False)
for batch in loader.next_step(): ...        # the microbatches of this rank's share of one global batch
"""

from functools import partial
from typing import Any

from torchtitan_rd.batch import Batch
from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.arrow import check_path
from torchtitan_rd.data.batch_dims import BatchDims, BatchKeys
from torchtitan_rd.data.chat_template import ChatTemplate
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.cursor import Cursor, LaneReader
from torchtitan_rd.data.hub import repository, tokenizer_revision
from torchtitan_rd.data.loader import BatchLoader, merge_states
from torchtitan_rd.data.ranks import DataRanks
from torchtitan_rd.data.sources import (
    TOKENIZED,
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
    "TOKENIZED",
    "Batch",
    "BatchDims",
    "BatchKeys",
    "BatchLoader",
    "ChatTemplate",
    "DataRanks",
    "Dataset",
    "DatasetKeys",
    "Tokenizer",
    "build_dataloader",
    "build_encoder",
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
    "chat": Dataset("chat"),
    "gsm8k": Dataset("chat", hub="openai/gsm8k", subset="main"),
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
    remarks = (
        (row.samples and config.dataset_path, f"is made here: {section}.dataset_path has no effect on it"),
        (row.samples and config.stream, "is made here: set training.stream (STREAM_HF_DATA) = false"),
        (not (row.samples or row.hub or config.dataset_path), f"needs {section}.dataset_path"),
        (
            config.stream and config.skip_ranges,
            "is streamed, so its rows have no numbers: unset training.skip_ranges",
        ),
        (config.stream and shuffled, "is streamed in order: unset training.shuffle_seed or training.stream"),
        # A made data set has no such column, and a stream is not searched for rows.
        (
            row.samples and config.source_dataset,
            "is made here and has one source: unset training.source_dataset",
        ),
        (
            config.stream and config.source_dataset,
            "is streamed whole: unset training.source_dataset or training.stream",
        ),
    )

    packed_keys = config.pad_id is not None or config.eos_id is not None
    needs_eos = row.kind == "packed" and (config.pad_id is not None or config.document_mask)
    pair = (config.question_column, config.answer_column)
    chat_keys = any(pair) or config.chat_loss != "assistant" or not config.pack_samples
    of_its_kind = (
        (row.kind != "packed" and packed_keys, "is not packed: unset training.pad_id and training.eos_id"),
        (
            row.kind != "chat" and chat_keys,
            "is no chat: unset training.question_column, answer_column, chat_loss and pack_samples",
        ),
        (any(pair) and None in pair, "needs both training.question_column and training.answer_column"),
        (any(pair) and config.column, "has no column beside question_column: unset training.column"),
        (row.kind != "spikes" and config.n_neurons, "holds no spikes: unset training.n_neurons"),
        (needs_eos and config.eos_id is None, "needs training.eos_id for training.pad_id or document_mask"),
    )

    problems = [problem for wrong, problem in (*remarks, *of_its_kind) if wrong]
    if problems:
        raise ConfigError("\n".join(f"{section}.dataset = {name!r} {problem}" for problem in problems))

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
    prepared: list[str] = []
    if ranks is not None:
        config = ranks.pinned(config, row, split)
        prepared = ranks.prepared(config, row, split)
    encoder = build_encoder(config, row.kind, tokenizer, vocab_size)
    fingerprint: dict[str, Any] = {
        "dataset": config.dataset,
        "stream": config.stream,
        "seq_len": config.seq_len,
        "global_batch_size": config.global_batch_size if config.stream else dims.global_batch_size,
        "shuffle_seed": config.shuffle_seed,
        **({"batch_ramp_stages": dims.stages} if dims.stages > 1 else {}),
    }

    readers: list[LaneReader] | list[StreamReader]
    if config.stream:
        table, found = open_rows(config, row, encoder, split)
        fingerprint |= stream_fingerprint(config, encoder, found)
        share = (dims.data_rank, dims.data_degree)
        readers = [StreamReader(config.dataset, table, encoder, config.seq_len, *share, config.document_mask)]
        start: list[Any] = [STREAM_START]
        logger.info("data: streaming; the position can be continued on %d data ranks only", dims.data_degree)

    else:
        source, found = open_source(config, row, encoder, seed, split, prepared)
        cutting = Cutting(config, row.kind, len(source), num_lanes=dims.rows_per_stage)
        fingerprint |= source_fingerprint(config, source, found, cutting)
        samples = prepare(config, source, cutting, fingerprint)
        readers = cutting.readers(samples, dims.lanes)
        start = [Cursor()] * len(readers)
        for reader in readers:
            reader.read(Cursor())

    if row.needs_tokenizer and tokenizer is not None:
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
        restart_on_rank_change=config.on_rank_change == "restart",
        record={"dataset": config.dataset, **found.record(fingerprint.get("num_samples"))},
    )
