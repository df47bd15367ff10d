"""Data sets: one row each in the table below; see docs/data.md.

dims = BatchDims.resolve(config.training, data_rank=0, data_degree=1)
loader = build_dataloader(config.training, dims, tokenizer=load_tokenizer("bytes"), vocab_size=258, seed=0,
                          pin_memory=False)
for batch in loader.next_step(): ...        # the microbatches of this rank's share of one global batch
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torchtitan_rd.batch import Batch
from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.arrow import check_path
from torchtitan_rd.data.batch_dims import BatchDims, BatchKeys
from torchtitan_rd.data.batch_queue import BatchQueue
from torchtitan_rd.data.chat_template import ChatTemplate
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.file_lanes import check_file_lanes
from torchtitan_rd.data.held_out import check_held_out, check_other_rows, shared_data
from torchtitan_rd.data.hub import repository, tokenizer_revision
from torchtitan_rd.data.loader import BatchLoader, merge_states
from torchtitan_rd.data.mixture import MIXTURE, Mixture, check_mixture, source_keys
from torchtitan_rd.data.opening import DataSet, Opening
from torchtitan_rd.data.ranks import DataRanks
from torchtitan_rd.data.sources import TOKENIZED, Dataset, build_encoder
from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE, SyntheticRecordings
from torchtitan_rd.data.text import pydoc_topics
from torchtitan_rd.data.tokenizer import Tokenizer, is_hub_name, load_tokenizer
from torchtitan_rd.errors import ConfigError, DataError

__all__ = [
    "DATASETS",
    "TOKENIZED",
    "Batch",
    "BatchDims",
    "BatchKeys",
    "BatchLoader",
    "BatchQueue",
    "ChatTemplate",
    "DataRanks",
    "DataSet",
    "Dataset",
    "DatasetKeys",
    "Tokenizer",
    "build_dataloader",
    "build_encoder",
    "check_file_lanes",
    "check_held_out",
    "check_other_rows",
    "dataset_vocab_size",
    "get_dataset",
    "is_hub_name",
    "load_tokenizer",
    "merge_states",
    "shared_data",
    "trained_kind",
    "training_sets",
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
    own = "training" if section == "validation" else section  # these keys are not given twice
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
            f"is made here and has one source: unset {own}.source_dataset",
        ),
        (
            config.stream and config.source_dataset,
            "is streamed whole: unset training.source_dataset or training.stream",
        ),
    )

    packed = "validation" if section == "validation" else "training"  # has these keys of its own
    packed_keys = config.pad_id is not None or config.eos_id is not None
    needs_eos = row.kind == "packed" and (config.pad_id is not None or config.document_mask)
    pair = (config.question_column, config.answer_column)
    chat_keys = any(pair) or config.chat_loss != "assistant" or not config.pack_samples
    of_its_kind = (
        (row.kind != "packed" and packed_keys, f"is not packed: unset {packed}.pad_id and {packed}.eos_id"),
        (
            row.kind != "chat" and chat_keys,
            "is no chat: unset training.question_column, answer_column, chat_loss and pack_samples",
        ),
        (any(pair) and None in pair, "needs both training.question_column and training.answer_column"),
        (any(pair) and config.column, "has no column beside question_column: unset training.column"),
        (row.kind != "spikes" and config.n_neurons, "holds no spikes: unset training.n_neurons"),
        # Files in their order, or none.
        (config.lane_per_file and row.kind != "packed", "is not packed: unset training.lane_per_file"),
        (
            config.lane_per_file and (config.stream or shuffled or config.source_dataset),
            "is read in the order of its files with training.lane_per_file: unset training.stream, "
            "shuffle_seed and source_dataset",
        ),
        (needs_eos and config.eos_id is None, f"needs {packed}.eos_id for {packed}.pad_id or document_mask"),
    )

    problems = [problem for wrong, problem in (*remarks, *of_its_kind) if wrong]
    if problems:
        raise ConfigError("\n".join(f"{section}.dataset = {name!r} {problem}" for problem in problems))

    if config.dataset_path:
        check_path(config.dataset_path, split, section)
    if config.dataset_revision and repository(config, row.hub, split) is None:
        raise ConfigError(
            f"{section}.dataset = {name!r} is not read from the hub here: unset {own}.dataset_revision"
        )
    return row


def training_sets(config: DatasetKeys, split: str = "train", steps: int = 1) -> list[DataSet]:
    """The one data set of [training], or the sources of its mixture. Touches no data.

    steps: of the run, at all of which some source must have a weight. Raises ConfigError with all that is
    wrong; DataError if a dataset_path does not exist.
    """
    if not config.mixture:
        return [DataSet(config, get_dataset(config, split=split))]
    kinds = [DATASETS[source.dataset].kind for source in config.mixture if source.dataset in DATASETS]
    sets, problems = [], []
    try:
        check_mixture(config, kinds, steps)
    except ConfigError as error:
        problems.append(str(error))
    for source in config.mixture:
        kind = DATASETS[source.dataset].kind if source.dataset in DATASETS else ""
        keys, section = source_keys(config, source, kind), f"training.mixture.{source.name}"
        try:
            row = get_dataset(keys, section, split)
            sets.append(DataSet(keys, row, source.name, section))
        except (ConfigError, DataError) as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return sets


def trained_kind(training: Mapping[str, Any]) -> str | None:
    """The kind of data, and so of ids, that a stored [training] table names; None if it is not known here.

    Of a mixture the kind that says what ids mean: packed rows beside text hold the tokenizer's.
    """
    names = [source.get("dataset") for source in training.get("mixture", [])] or [training.get("dataset")]
    kinds = {DATASETS[name].kind for name in names if name in DATASETS}
    return next((kind for kind in ("spikes", "text", "chat", "packed") if kind in kinds), None)


def dataset_vocab_size(config: DatasetKeys, tokenizer: Tokenizer | None) -> int:
    """What `model.vocab_size` is where it is left open: 256 for spikes, the tokenizer's size for text, which
    packed rows beside them in a mixture must keep to.

    tokenizer: that of the run; None where no data set is text.
    """
    names = [source.dataset for source in config.mixture] or [config.dataset]
    kinds = {DATASETS[name].kind for name in names}
    if kinds == {"packed"}:
        raise ConfigError(
            f"model.vocab_size must be given for training.dataset = {names[0]!r}: "
            "packed ids say nothing about it"
        )
    if "spikes" in kinds:
        return SPIKE_VOCAB_SIZE
    if tokenizer is None:
        raise ValueError("text is read with a tokenizer, and none was given")
    return tokenizer.vocab_size


def _settings(config: DatasetKeys, dims: BatchDims) -> dict[str, Any]:
    """The part of a fingerprint that is not about data."""
    return {
        "dataset": MIXTURE if config.mixture else config.dataset,
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
    check_file_lanes(config, dims, split)
    sets = training_sets(config, split)
    opening = Opening(dims, tokenizer, vocab_size, seed, split, ranks)
    fingerprint = _settings(config, dims)

    mixture = None
    if config.mixture:
        mixture = Mixture(config.mixture, seed, dims, config.seq_len)
        opened = opening.mixture(mixture, sets)
    elif config.stream:
        opened = opening.stream(sets[0])
    else:
        opened = opening.lanes(sets[0])
    fingerprint |= opened.fingerprint

    if tokenizer is not None and any(one.row.needs_tokenizer for one in sets):
        fingerprint |= tokenizer_revision(tokenizer)
    if ranks is not None:
        ranks.compare(fingerprint)
    return BatchLoader(
        opened.readers,
        [opened.start] * len(opened.readers),
        dims,
        fingerprint=fingerprint,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        restart_on_rank_change=config.on_rank_change == "restart",
        record={"dataset": fingerprint["dataset"], **opened.record},
        mixture=mixture,
    )
