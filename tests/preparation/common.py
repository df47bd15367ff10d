"""What the tests of preparation have in common."""

import json
import resource
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.checkpoint.forked import CRASHED, crash, run_forked
from torchtitan_rd.__main__ import main
from torchtitan_rd.data.text import pydoc_topics
from torchtitan_rd.data.tokenizer import Tokenizer


def run(*arguments) -> int:
    """`torchtitan-rd data ...`, in this process; the exit status."""
    return main(["data", *map(str, arguments)])


def write_corpus(path: Path, texts: list[str] | None = None) -> Path:
    """A .jsonl of texts: by default of some of Python's help topics, without the longest."""
    texts = texts or [text for text in pydoc_topics(0) if len(text) < 9000][:60]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(arguments, owner: type, method: str, call: int, store: Path, after: bool = False) -> bool:
    """Runs `torchtitan-rd data ...` in a process that dies at the `call`-th call of a method, as of kill -9:
    nothing is flushed or closed. False if it came to its end before that.
    """

    def body(rank, world_size):
        real, calls = getattr(owner, method), count(1)

        def dying(*args, **kwargs):
            dies = next(calls) == call
            if dies and not after:
                crash()
            result = real(*args, **kwargs)
            if dies:
                crash()
            return result

        setattr(owner, method, dying)
        assert run(*arguments) == 0

    (status,) = run_forked(1, body, store=store, timeout=120)
    assert status in (0, CRASHED)
    return status == CRASHED


def without_room(arguments, size: int, folder: Path, capfd) -> str:
    """What `torchtitan-rd data ...` says in a process that cannot write files of more than `size` bytes."""

    def body(rank, world_size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        assert run(*arguments) == 1

    assert run_forked(1, body, store=folder / "store", timeout=120) == [0]
    return capfd.readouterr().err


def rows_of(folder: Path, split: str) -> np.ndarray:
    """All rows of a split in the order of its files: (N, width)."""
    files = sorted((folder / split).glob("*.parquet"))
    return np.concatenate([pq.read_table(file)["input_ids"].to_pylist() for file in files])


def documents_of(folder: Path, split: str, tokenizer: Tokenizer, pad_id: int) -> list[str]:
    """The texts that the rows of a split consist of, sorted. For one task, whose tail was padded."""
    ids = rows_of(folder, split).reshape(-1)
    ids = ids[ids != pad_id]
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert ends[-1] == len(ids) - 1
    texts = []
    for part in np.split(ids, ends + 1)[:-1]:
        assert part[0] == tokenizer.bos_id
        texts.append(tokenizer.decode(part[1:-1]))
    return sorted(texts)
