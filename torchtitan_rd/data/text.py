"""Documents as tokens: bos (if the tokenizer has one), the text's ids, eos (if it has one)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from torchtitan_rd.data.tokenizer import Tokenizer
from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TextEncoder:
    """vocab_size: of the model; every id must be smaller."""

    tokenizer: Tokenizer
    vocab_size: int
    column: str = "text"
    border_id: int | None = None

    def read(self, cell: "pa.Array", where: str) -> str:
        """One row's text from an arrow array of length 1."""
        text = cell[0].as_py()
        if not isinstance(text, str):
            raise DataError(f"{where}: column {self.column!r} holds {cell.type} {text!r:.40}; expected text")
        return text

    def encode(self, text: str, where: str) -> np.ndarray:
        """Text -> ids. An empty text has none: no bos, no eos."""
        if not text:
            return np.empty(0, np.int32)
        parts = [self.tokenizer.bos_id, self.tokenizer.encode(text), self.tokenizer.eos_id]
        ids = np.concatenate([np.atleast_1d(part) for part in parts if part is not None], dtype=np.int32)
        check_ids(ids, self.vocab_size, where)
        return ids


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises DataError, naming the first culprit, unless every id is in 0..vocab_size - 1."""
    if ids.size and (ids.max() >= vocab_size or ids.min() < 0):
        position = int(np.argmax((ids >= vocab_size) | (ids < 0)))
        raise DataError(
            f"{where}: token {position} has id {ids[position]}, but the model's vocabulary is 0..{vocab_size - 1}; "
            f"set model.vocab_size, or use the tokenizer (data set) that belongs to the model"
        )


def pydoc_topics(seed: int, part: Literal["all", "train", "validation"] = "all") -> list[str]:
    """The help texts of Python itself, sorted by name: real English prose that needs no file. `seed` is not used.

    Every tenth text is held out of `train` and makes up `validation`.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    if part == "validation":
        return texts[9::10]
    return [text for i, text in enumerate(texts) if part == "all" or i % 10 != 9]
