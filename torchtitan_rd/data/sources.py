"""From a row of the table of data sets to samples that lanes can read, and what tells these samples apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from torchtitan_rd.data.arrow import Encoder, SampleSource, TableSource, check_path, open_table, rows_of
from torchtitan_rd.data.chat import ChatEncoder
from torchtitan_rd.data.chat_template import ChatTemplate
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.content import digest_of, digest_of_samples, digest_of_table
from torchtitan_rd.data.cursor import FileOrder, LaneReader, SkippingSource, Source, pieces_per_sample
from torchtitan_rd.data.files import FileList
from torchtitan_rd.data.hub import cached_commit, check_revision
from torchtitan_rd.data.ids import encode_in_memory, encode_once
from torchtitan_rd.data.json_text import JsonKind
from torchtitan_rd.data.prepacked import PackedEncoder
from torchtitan_rd.data.spikes import SpikeEncoder
from torchtitan_rd.data.text import TextEncoder
from torchtitan_rd.data.tokenizer import Tokenizer, fits
from torchtitan_rd.errors import ConfigError, DataError

Kind = Literal["spikes", "text", "packed", "chat"]

TOKENIZED: tuple[Kind, ...] = ("text", "chat")
"""The kinds that are read with a tokenizer."""

# Data sets of any size have far more samples than this;
# small ones are cut into so many pieces for each row of a batch.
_UNITS_PER_LANE = 16
_FILES_NOTED = 1000  # of more files a checkpoint holds no names


class Samples(Protocol):
    """Samples that are made here, by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Dataset:
    """kind: how a sample becomes ids. Where samples come from: `hub` (and `subset`) on the Hugging Face
    hub unless training.dataset_path names another place, or `samples(seed)`, made here; neither:
    dataset_path is required.
    """

    kind: Kind
    hub: str | None = None
    subset: str | None = None
    samples: Callable[[int], Samples] | None = None

    @property
    def needs_tokenizer(self) -> bool:
        return self.kind in TOKENIZED


def build_encoder(config: DatasetKeys, kind: Kind, tokenizer: Tokenizer | None, vocab_size: int) -> Encoder:
    """Raises ConfigError where the tokenizer or eos_id does not fit the model's vocabulary, and where
    conversations have no chat template.
    """
    column: dict[str, Any] = {} if config.column is None else {"column": config.column}
    if kind == "spikes":
        return SpikeEncoder(vocab_size, n_neurons=config.n_neurons, **column)
    if kind == "packed":
        if config.eos_id is not None and config.eos_id >= vocab_size:
            raise ConfigError(
                f"training.eos_id = {config.eos_id} is not below model.vocab_size = {vocab_size}"
            )
        return PackedEncoder(config.seq_len, vocab_size, config.pad_id, config.eos_id, **column)
    if tokenizer is None:
        raise ValueError(f"{kind} is read with a tokenizer, and none was given")
    if not fits(tokenizer, vocab_size):
        raise ConfigError(
            f"the tokenizer (model.tokenizer_path) has ids up to {tokenizer.vocab_size - 1}, "
            f"but model.vocab_size = {vocab_size}: set it to {tokenizer.needed_vocab_size} or more"
        )
    if kind == "text":
        return TextEncoder(tokenizer, vocab_size, **column)
    return _chat_encoder(config, tokenizer, vocab_size)


def _chat_encoder(config: DatasetKeys, tokenizer: Tokenizer, vocab_size: int) -> ChatEncoder:
    if tokenizer.folder is None:
        raise ConfigError(
            "model.tokenizer_path: conversations need the folder of a tokenizer.json with a chat template"
        )
    try:
        template = ChatTemplate.of_folder(tokenizer.folder)
    except ConfigError as error:
        raise ConfigError(f"model.tokenizer_path: {error}") from None
    columns: tuple[str, ...] = (config.column or "messages",)
    if config.question_column is not None and config.answer_column is not None:
        columns = (config.question_column, config.answer_column)
    row_length = None if config.pack_samples else config.seq_len + 1
    learn_all = config.chat_loss == "all"
    return ChatEncoder(template, tokenizer, vocab_size, columns, learn_all, row_length)


def prepared_files(config: DatasetKeys, row: Dataset, split: str, encoder: Encoder) -> list[str]:
    """The arrow files into which data is converted, after fetching it from the hub if need be. Raises
    DataError.

    None for data that is mapped where it lies, that is made here, or that is streamed.
    """
    if row.samples or config.stream:
        return []
    here = None
    if config.dataset_path is not None:
        here = check_path(config.dataset_path, split)
        if here.saved or (here.files and here.builder() == "arrow"):
            return []
    # Of all sources: the files are the same, and which rows count is asked when they are read.
    table, _ = open_rows(config.model_copy(update={"source_dataset": None}), row, encoder, split, found=here)
    return [entry["filename"] for entry in table.cache_files]


def open_rows(
    config: DatasetKeys,
    row: Dataset,
    encoder: Encoder | None,
    split: str,
    prepared: Sequence[str] = (),
    found: FileList | None = None,
) -> tuple[Any, FileList]:
    """The table (or stream) of a data set that has files, and these files. prepared: see `open_table`.
    found: the files, where they were looked for already.

    Raises DataError.
    """
    path = config.dataset_path or row.hub
    if path is None:
        raise ConfigError(f"training.dataset = {config.dataset!r} needs training.dataset_path")
    subset = None if config.dataset_path else row.subset
    if found is None:
        found = check_path(path, split) if config.dataset_path else FileList(path, split, Path(path))
    revision = config.dataset_revision
    table = open_table(
        config.dataset, path, subset, config.stream, split, found, revision, _expected_json(encoder), prepared
    )
    if not found.files and not found.saved:
        found.commit = check_revision(config.dataset, table, revision)
        if found.commit is None and config.stream:
            found.commit = cached_commit(path, subset)
    if found.saved and not config.stream:
        found.files = sorted(Path(entry["filename"]) for entry in table.cache_files)
    if config.source_dataset is not None:
        table = rows_of(table, config.source_dataset, config.dataset)
    return table, found


def _expected_json(encoder: Encoder | None) -> dict[str, JsonKind]:
    """What the columns of an encoder must hold where their types would not show what else they held."""
    if isinstance(encoder, ChatEncoder) and len(encoder.columns) == 1:
        return {encoder.columns[0]: "messages"}
    if isinstance(encoder, TextEncoder | ChatEncoder):
        return dict.fromkeys(encoder.columns, "text")
    return {}


def open_source(
    config: DatasetKeys, row: Dataset, encoder: Encoder, seed: int, split: str, prepared: Sequence[str] = ()
) -> tuple[TableSource | SampleSource, FileList]:
    """All samples, and the files they come from. Raises DataError."""
    if row.samples:
        return SampleSource(config.dataset, row.samples(seed), encoder), FileList(
            "this program", split, Path()
        )
    table, found = open_rows(config, row, encoder, split, prepared)
    return TableSource(config.dataset, table, encoder, found), found


@dataclass(frozen=True)
class Cutting:
    """How the samples of a data set are shared out to lanes. Raises DataError for too few of those that
    are a row each.

    files: where each lane owns files (`training.lane_per_file`).
    """

    config: DatasetKeys
    kind: Kind
    num_samples: int
    num_lanes: int
    files: FileOrder | None = None

    def __post_init__(self):
        if self.is_row and self.num_samples < self.num_lanes:
            raise DataError(
                f"{self.config.dataset}: holds {self.num_samples} rows, fewer than the {self.num_lanes} of "
                "one global batch; lower training.global_batch_size (validation.sequences of a held-out set)"
            )

    @property
    def is_row(self) -> bool:
        """Whether a sample is one window, which is never cut."""
        return self.kind == "packed" or not self.config.pack_samples

    @property
    def units_per_lane(self) -> int:
        return 1 if self.is_row else _UNITS_PER_LANE

    @property
    def unit(self) -> str | None:
        """Where samples are cut: anywhere between `tokens`, or between `time bins`; None: not at all."""
        if pieces_per_sample(self.num_samples, self.num_lanes, self.units_per_lane) == 1:
            return None
        return "time bins" if self.kind == "spikes" else "tokens"

    def readers(self, source: Source, lanes: range) -> list[LaneReader]:
        """One reader a lane."""
        c = self.config
        common = (self.num_lanes, c.seq_len, c.shuffle_seed, c.document_mask, self.units_per_lane)
        return [
            LaneReader(source, lane, *common, files=self.files, skip_ranges=c.skip_ranges) for lane in lanes
        ]


def source_fingerprint(
    config: DatasetKeys, source: TableSource | SampleSource, found: FileList, cutting: Cutting
) -> dict[str, Any]:
    """What the samples are; see fingerprint.py."""
    files: dict[str, Any] = {}
    if isinstance(source, SampleSource):
        rows = digest_of_samples(source.samples)
    else:
        rows = digest_of_table(source.table, *source.encoder.columns)
        converted = found.files and not found.saved and found.builder() != "arrow"
        files = found.contents if converted else found.sizes(times=not rows["whole"])
    lanes: dict[str, Any] = {}
    if cutting.files is not None:
        lanes = {"lane_per_file": True, "file_borders": digest_of(cutting.files.rows_in_files)}
    return {
        **lanes,
        "num_samples": len(source),
        "rows": rows,
        **_tokenizer(config, source.encoder),
        "cut": cutting.unit,
        "skip_ranges": config.skip_ranges,
        "files": files if len(files) <= _FILES_NOTED else {},
        **_revision(found),
    }


def stream_fingerprint(config: DatasetKeys, encoder: Encoder, found: FileList) -> dict[str, Any]:
    """The same of a stream: the contents of its files; of the hub, the commit."""
    files = {} if found.saved else found.contents
    content = {"content": digest_of(sorted(files.items()))} if files else {}
    return {
        **content,
        "cut": None,
        "files": files if len(files) <= _FILES_NOTED else {},
        **_revision(found),
        **_tokenizer(config, encoder),
    }


def _revision(found: FileList) -> dict[str, dict[str, str]]:
    return {"revision": {"repository": found.path, "commit": found.commit}} if found.commit else {}


def _tokenizer(config: DatasetKeys, encoder: Encoder) -> dict[str, Any]:
    if isinstance(encoder, TextEncoder):
        return {"tokenizer": encoder.tokenizer.digest}
    if isinstance(encoder, ChatEncoder):
        settings = {"chat_loss": config.chat_loss, "pack_samples": config.pack_samples}
        return {"tokenizer": encoder.digest, **settings}
    return {}


def prepare(
    config: DatasetKeys, source: TableSource | SampleSource, cutting: Cutting, fingerprint: dict[str, Any]
) -> Source:
    """The samples without those to skip; documents that lanes share are encoded. Raises DataError."""
    encoder, is_table = source.encoder, isinstance(source, TableSource)
    samples: Source = source
    if config.skip_ranges:
        last = max(last for _, last in config.skip_ranges)
        if last >= len(source):
            raise DataError(
                f"training.skip_ranges: {source.name} has no row {last}, its last is {len(source) - 1}"
            )
        samples = SkippingSource(source, config.skip_ranges)

    if cutting.unit != "tokens":
        return samples
    # Of conversations there are complements too, down to that of the last id.
    extreme = -encoder.vocab_size if isinstance(encoder, ChatEncoder) else encoder.vocab_size - 1
    dtype = np.min_scalar_type(extreme)
    if not is_table:
        return encode_in_memory(samples, dtype)

    facts = ["rows", "skip_ranges", "tokenizer"]
    if not fingerprint["rows"]["whole"]:
        facts.append("files")
    if "chat_loss" in fingerprint:  # decides which ids are complements
        facts.append("chat_loss")
    key = digest_of(str(dtype), *encoder.columns, *(fingerprint[fact] for fact in facts))
    return encode_once(samples, dtype, _cache_folder(config) / "encoded_documents", key)


def _cache_folder(config: DatasetKeys) -> Path:
    import datasets

    return Path(config.cache_folder or datasets.config.HF_DATASETS_CACHE)
