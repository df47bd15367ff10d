"""Documents -> packed rows of `block_size + 1` ids, for training and held out, in files of parquet.

The order of the documents is cut into tasks, a task into files, a file into jobs. Jobs are encoded in any
number of processes and come back in order; one process packs what they give, so the result does not depend
on their number. What does not fill a row at a file's end begins the next file of the task. After each file
the task's progress is noted, and a task that was killed goes on behind its last whole file.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from torchtitan_rd.data import load_tokenizer
from torchtitan_rd.data.chat import ChatEncoder
from torchtitan_rd.data.chat_template import ChatTemplate
from torchtitan_rd.data.cursor import piece_of
from torchtitan_rd.data.row_files import naming_the_file
from torchtitan_rd.data.text import check_ids
from torchtitan_rd.data.tokenizer import Tokenizer
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger
from torchtitan_rd.preparation.conversations import as_json
from torchtitan_rd.preparation.documents import RUN, Document, Documents, Entry, Source
from torchtitan_rd.preparation.manifest import Output, progress_bar
from torchtitan_rd.preparation.processes import ordered_results
from torchtitan_rd.preparation.rows import RowWriter

SPLITS = ("train", "val")
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Packing:
    """What is made of the documents.

    tokenizer: as `load_tokenizer` takes it. val_share: of the documents, which are held out. files: of each
    split that all tasks make together, about. tail: what becomes of a task's last ids that fill no row:
    `drop`, or `pad` with the tokenizer's pad token.
    """

    tokenizer: str
    block_size: int = 4096
    val_share: float = 0.05
    seed: int = 0
    tasks: int = 1
    files: int = 1
    tail: str = "drop"

    def __post_init__(self):
        if self.block_size < 1:
            raise ConfigError(f"--block-size {self.block_size}: must be at least 1")
        if not 0.0 <= self.val_share < 1.0:
            raise ConfigError(f"--val-share {self.val_share:g}: expected 0 or more, and less than 1")
        if self.tasks < 1 or self.files < 1:
            raise ConfigError(f"--tasks {self.tasks} --files {self.files}: must be at least 1")
        if self.tail not in ("drop", "pad"):
            raise ConfigError(f"--tail {self.tail!r}: expected drop or pad")

    @property
    def files_per_task(self) -> int:
        return -(-self.files // self.tasks)

    def runs_of(self, documents: Documents, task: int, file: int) -> range:
        """The places, in the order of the documents' runs, of those in one file of a task."""
        share = piece_of(range(documents.runs), task, self.tasks)
        return piece_of(share, file, self.files_per_task)


@dataclass
class Counts:
    """Of one source: documents (each copy counts), those without text, and tokens of both splits."""

    documents: int = 0
    empty: int = 0
    held_out: int = 0
    train_tokens: int = 0
    val_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass
class Encoded:
    """What a job gives: split -> ids one after another (int32), and the counts of each source."""

    ids: dict[str, np.ndarray]
    counts: list[Counts]


class Encoder:
    """Encodes the documents of some runs. A process of a pool has one."""

    def __init__(self, documents: Documents, packing: Packing):
        self.documents = documents
        self.packing = packing
        self.tokenizer = load_tokenizer(packing.tokenizer)
        self._chat = chat_encoder(self.tokenizer, documents.sources)
        self._border = math.ceil(packing.val_share * 2**64)

    def __call__(self, runs: range) -> Encoded:
        """Raises DataError, naming source and row, for a document that is no text, or that the chat template
        does not take.
        """
        entries = [entry for position in runs for entry in self.documents.entries(position)]
        counts = [Counts() for _ in self.documents.sources]
        parts: dict[str, list[Any]] = {split: [] for split in SPLITS}

        kept = []
        for entry, document in zip(entries, self.documents.read(entries), strict=True):
            count = counts[entry.source]
            held_out = self._is_held_out(document)
            # Copies are to be learned from; a measure wants each document once.
            if held_out and entry.copy:
                continue
            count.documents += 1
            count.held_out += held_out
            count.empty += not document
            if document:
                kept.append((entry, document, SPLITS[held_out]))

        encoded = self._encoded([(entry, document) for entry, document, _ in kept])
        for (entry, _, split), of_document in zip(kept, encoded, strict=True):
            parts[split] += of_document
            field = f"{split}_tokens"
            tokens = getattr(counts[entry.source], field) + sum(map(len, of_document))
            setattr(counts[entry.source], field, tokens)

        joined = {split: _joined(parts[split]) for split in SPLITS}
        for ids in joined.values():
            check_ids(ids, self.tokenizer.vocab_size, f"runs {runs}")
        return Encoded(joined, counts)

    def _encoded(self, documents: list[tuple[Entry, Document]]) -> Iterator[list[np.ndarray]]:
        """The ids of each, in parts: bos, a text, eos. Of a conversation the template writes all."""
        bos, eos = ([] if i is None else [i] for i in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        texts = iter(self.tokenizer.encode_batch([text for _, text in documents if isinstance(text, str)]))
        for entry, document in documents:
            if isinstance(document, str):
                yield [np.asarray(part, np.int32) for part in (bos, next(texts), eos)]
            elif self._chat is not None:
                source = self.documents.sources[entry.source]
                with naming_the_file(source.found, entry.row, len(source)):
                    ids = self._chat.encode(document, source.where(entry.row))
                yield [ids]

    def _is_held_out(self, document: Document) -> bool:
        """Decided by the text, so that no copy of a document, wherever it stands, is on the other side."""
        import xxhash

        text = document if isinstance(document, str) else as_json(document)
        return xxhash.xxh3_64_intdigest(text.encode(), seed=self.packing.seed & _MASK) < self._border


def chat_encoder(tokenizer: Tokenizer, sources: Sequence[Source]) -> ChatEncoder | None:
    """What encodes the conversations of the sources, every token of them to be learned; None if there are
    none. Raises ConfigError for a tokenizer without a chat template.
    """
    if not any(source.chat_columns for source in sources):
        return None
    if tokenizer.folder is None:
        raise ConfigError("--tokenizer: conversations need the folder of a tokenizer with a chat template")
    template = ChatTemplate.of_folder(tokenizer.folder)
    return ChatEncoder(template, tokenizer, tokenizer.vocab_size, learn_all=True)


def tokenize(
    documents: Documents, packing: Packing, output: Output, task: int = 0, processes: int = 1
) -> dict[str, Any] | None:
    """Does one task. Returns the finished folder's manifest, None while other tasks are not done.

    Raises ConfigError for a task or tail that cannot be, DataError for documents that cannot be read, for too
    few of them, and where there is no room.
    """
    if not 0 <= task < packing.tasks:
        raise ConfigError(f"--task {task}: tasks are 0..{packing.tasks - 1} (--tasks {packing.tasks})")
    if processes < 1:
        raise ConfigError(f"--processes {processes}: must be at least 1")

    with output.making(f"task {task}") as done:
        if done:
            return done
        progress = output.load(_note_of(task)) or _start(documents)
        files = range(progress["files_done"], packing.files_per_task)
        if files:
            _make_files(documents, packing, output, task, files, progress, processes)
        return _finish(documents, packing, output)


def _start(documents: Documents) -> dict[str, Any]:
    return {
        "files_done": 0,
        "files": {},
        "carried": {split: [] for split in SPLITS},
        "digests": dict.fromkeys(SPLITS, 0),
        "counts": [asdict(Counts()) for _ in documents.sources],
    }


def _make_files(
    documents: Documents,
    packing: Packing,
    output: Output,
    task: int,
    files: range,
    progress: dict[str, Any],
    processes: int,
) -> None:
    """The files of a task that are not there yet. `progress` is that of those before them, and is noted."""

    def jobs_of(file: int) -> Iterator[range]:
        return _jobs(packing.runs_of(documents, task, file), documents.run)

    jobs = (job for file in files for job in jobs_of(file))
    results = ordered_results(Encoder, (documents, packing), jobs, processes)
    began, tokens = time.monotonic(), 0

    share = piece_of(range(documents.runs), task, packing.tasks)
    before = packing.runs_of(documents, task, files.start).start - share.start
    with progress_bar(len(share), before, "run", f"tokenize task {task}") as bar, results as encoded:
        for file in files:
            last = file == packing.files_per_task - 1
            packers = {split: _Packer(packing, output, task, file, split, progress) for split in SPLITS}
            counts = [Counts(**count) for count in progress["counts"]]

            for job in jobs_of(file):
                result = next(encoded)
                for split in SPLITS:
                    packers[split].add(result.ids[split])
                    tokens += len(result.ids[split])
                counts = [a + b for a, b in zip(counts, result.counts, strict=True)]
                bar.update(len(job))

            for packer in packers.values():
                packer.close(progress, pads=last and packing.tail == "pad")
            progress |= {"files_done": file + 1, "counts": [asdict(count) for count in counts]}
            output.save(_note_of(task), progress)
            rate = tokens / (time.monotonic() - began)
            logger.info(
                "tokenize: task %d, file %d of %d, %.3g tokens/s",
                task,
                file + 1,
                packing.files_per_task,
                rate,
            )


class _Packer:
    """The rows of one split of one file."""

    def __init__(
        self, packing: Packing, output: Output, task: int, file: int, split: str, progress: dict[str, Any]
    ):
        self.split, self.name = split, f"{split}/{task:03d}_{file:05d}.parquet"
        self._packing = packing
        self._width = packing.block_size + 1
        self._rest = np.array(progress["carried"][split], np.int32)
        self._writer = RowWriter(output, output.folder / self.name)

    def add(self, ids: np.ndarray) -> None:
        ids = np.concatenate([self._rest, ids])
        whole = len(ids) // self._width * self._width
        self._writer.write(ids[:whole].reshape(-1, self._width))
        self._rest = ids[whole:]

    def close(self, progress: dict[str, Any], pads: bool) -> None:
        """Notes the finished file and what is carried on. pads: fill up the last row."""
        if pads and len(self._rest):
            missing = self._width - len(self._rest)
            self.add(np.full(missing, pad_id_of(self._packing.tokenizer), np.int32))
        if facts := self._writer.commit():
            progress["files"][self.name] = facts
        progress["carried"][self.split] = self._rest.tolist()
        progress["digests"][self.split] = (progress["digests"][self.split] + self._writer.digest) & _MASK


def pad_id_of(tokenizer: str) -> int:
    """Raises ConfigError for a tokenizer without a pad token."""
    loaded = load_tokenizer(tokenizer)
    special_id = getattr(loaded, "special_id", None)
    id_ = special_id(loaded.folder, "pad_token") if special_id and loaded.folder else None
    if id_ is None:
        raise ConfigError(f"--tail pad: the tokenizer {tokenizer} names no pad_token; use --tail drop")
    return id_


def _finish(documents: Documents, packing: Packing, output: Output) -> dict[str, Any] | None:
    """Commits the folder if all tasks are done."""
    notes = [output.load(_note_of(task)) for task in range(packing.tasks)]
    done = [note for note in notes if note and note["files_done"] == packing.files_per_task]
    if len(done) < packing.tasks:
        # They are gone once another task, which ended at the same time, has committed.
        return output.result
    files = {name: facts for note in done for name, facts in note["files"].items()}

    rows = {s: sum(facts["rows"] for name, facts in files.items() if name.startswith(s)) for s in SPLITS}
    if not rows["train"]:
        raise DataError(
            f"{output.folder}: the documents of a task do not fill one row of {packing.block_size + 1} ids; "
            "lower --block-size or --tasks, give more text, or use --tail pad"
        )
    if packing.val_share and not rows["val"]:
        logger.warning("tokenize: --val-share %g holds out too little for one row", packing.val_share)

    counts = [sum((Counts(**n["counts"][i]) for n in done), Counts()) for i in range(len(documents.sources))]
    sources = {
        source.name: {
            "weight": source.weight,
            "rows": len(source),
            **asdict(count),
            "left_out": source.found.noted_left_out if source.found else {},
        }
        for source, count in zip(documents.sources, counts, strict=True)
    }
    tokenizer = load_tokenizer(packing.tokenizer)

    return output.finish(
        {
            "files": dict(sorted(files.items())),
            "rows": rows,
            "tokens": {split: count * (packing.block_size + 1) for split, count in rows.items()},
            "left_over": {split: sum(len(note["carried"][split]) for note in done) for split in SPLITS},
            "rows_digest": {s: f"{sum(note['digests'][s] for note in done) & _MASK:016x}" for s in SPLITS},
            "sources": sources,
            "block_size": packing.block_size,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        }
    )


def _note_of(task: int) -> str:
    return f"task-{task:03d}.json"


def _jobs(runs: range, run: int) -> Iterator[range]:
    """About `RUN` documents each."""
    step = max(1, RUN // run)
    return (runs[i : i + step] for i in range(0, len(runs), step))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int32)
