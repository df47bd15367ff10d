"""Documents as tokens: bos (if the tokenizer has one), the text's ids, eos (if it has one)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from torchtitan_rd.data.column_types import is_text
from torchtitan_rd.data.cursor import piece_of
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

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def read(self, cell: "pa.Array", where: str) -> str:
        """One row's text from an arrow array of length 1."""
        if not is_text(cell.type) or not cell[0].is_valid:
            raise DataError(
                f"{where}: column {self.column!r} holds {cell.type} {cell[0].as_py()!r:.40}; expected text"
            )
        try:
            return cell[0].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: column {self.column!r} is not UTF-8: {error}") from None

    def check_type(self, column: "pa.ChunkedArray", name: str) -> None:
        """Raises DataError unless the column is declared as text; where JSON mixes types,
        it names the first culprit.

        `datasets` gives such a column the type JSON,
        in which every text is stored in quotes and with escapes.
        """
        if is_text(column.type):
            return
        culprit = f"column {self.column!r} holds {column.type}"
        if getattr(column.type, "extension_name", "") == "arrow.json":
            for row, value in enumerate(column):
                if value.is_valid and not value.value.as_py().startswith('"'):
                    culprit = f"row {row}: column {self.column!r} holds {value.value.as_py():.40}"
                    break
        raise DataError(f"{name}: {culprit}; expected text in every row")

    def check(self, text: str, where: str) -> int:
        """The number of characters. A tokenizer that fits the vocabulary makes no id that does not."""
        return len(text)

    def piece(self, text: str, where: str, part: int, parts: int) -> np.ndarray:
        """One of `parts` pieces of the ids; costs as much as all of them."""
        return piece_of(self.encode(text, where), part, parts)

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
            f"{where}: token {position} has id {ids[position]}, "
            f"but the model's vocabulary is 0..{vocab_size - 1}; "
            f"set model.vocab_size, or use the tokenizer (data set) that belongs to the model"
        )


def pydoc_topics(seed: int, part: Literal["all", "train", "validation"] = "all") -> list[str]:
    """The help texts of Python itself, sorted by name: real English prose that needs no file.
    `seed` is not used.

    Every tenth text is held out of `train` and makes up `validation`. Topics quote each other at length:
    half of what is held out stands in some other topic too. So `train` is without each paragraph that
    `validation` has.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    if part == "all":
        return texts

    held_out = texts[9::10]
    if part == "validation":
        return held_out

    known = {_words(paragraph) for text in held_out for paragraph in text.split("\n\n")}
    others = [text for i, text in enumerate(texts) if i % 10 != 9]
    return [
        "\n\n".join(paragraph for paragraph in text.split("\n\n") if _words(paragraph) not in known)
        for text in others
    ]


def _words(paragraph: str) -> str:
    """Without its indentation and line breaks, which differ where one topic quotes another."""
    return " ".join(paragraph.split())
