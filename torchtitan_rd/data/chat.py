"""Conversations as samples: a list of messages, or a question and its answer, written by the chat template of
the tokenizer. What the assistant did not say is read and not learned.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.chat_template import ASSISTANTS, ChatTemplate, Message
from torchtitan_rd.data.column_types import is_list, is_text
from torchtitan_rd.data.content import digest_of
from torchtitan_rd.data.cursor import piece_of
from torchtitan_rd.data.text import check_ids
from torchtitan_rd.data.tokenizer import Tokenizer
from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = ("system", "developer", "user", *ASSISTANTS, "tool")


@dataclass(frozen=True)
class ChatEncoder:
    """template: of `tokenizer`. vocab_size: of the model; every id must be smaller.

    columns: one, of lists of messages {role, content}, or two, of questions and of answers.
    learn_all: whether every id is a label, or only the assistant's.
    row_length: ids of a sample that is one row, cut or padded; None: a sample has its own length.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    vocab_size: int
    columns: tuple[str, ...] = ("messages",)
    learn_all: bool = False
    row_length: int | None = None
    border_id: int | None = None

    @property
    def digest(self) -> str:
        """Of what decides the ids of a conversation."""
        return digest_of(self.tokenizer.digest, self.template.digest)

    def check_type(self, column: "pa.ChunkedArray", name: str) -> None:
        """Raises DataError unless the column can hold conversations. Reads no row."""
        check_conversations(column, self.columns, name)

    def read(self, cell: "pa.Array", where: str) -> list[Message]:
        """One row's messages from an arrow array of length 1.
        Raises DataError for what is no conversation.
        """
        return read_conversation(cell, self.columns, where)

    def check(self, messages: list[Message], where: str) -> int:
        """The number of ids. Raises DataError as `encode` does."""
        return len(self._stored(messages, where))

    def piece(self, messages: list[Message], where: str, part: int, parts: int) -> np.ndarray:
        """One of `parts` pieces of the ids; costs as much as all of them."""
        return piece_of(self.encode(messages, where), part, parts)

    def encode(self, messages: list[Message], where: str) -> np.ndarray:
        """Messages -> ids, those that are no labels as complements (windows.py).

        Raises DataError for a conversation without a label, or that the template does not take.
        """
        stored = self._stored(messages, where)
        if self.row_length is None:
            return stored
        # Nothing attends back from padding, and nothing is predicted there: any id will do.
        padding = ~(self.tokenizer.eos_id or 0)
        row = np.full(self.row_length, padding, np.int32)
        row[: len(stored)] = stored[: self.row_length]
        return row

    def _stored(self, messages: list[Message], where: str) -> np.ndarray:
        if self.learn_all:
            ids = self.template.encode(messages, where)
            check_ids(ids, self.vocab_size, where)
            return ids

        if not any(message["role"] in ASSISTANTS for message in messages):
            raise DataError(
                f"{where}: no message is the assistant's, so nothing of it would be learned: leave it out "
                'with training.skip_ranges, or set training.chat_loss = "all"'
            )
        ids, spoken = self.template.encode_turns(messages, where)
        if not spoken.any():
            raise DataError(f"{where}: the chat template marks nothing of it as said by the assistant")
        check_ids(ids, self.vocab_size, where)
        return np.where(spoken, ids, ~ids)


def check_conversations(column: "pa.ChunkedArray", columns: Sequence[str], name: str) -> None:
    """Raises DataError unless a column can hold conversations. Reads no row.

    columns: one, or those of questions and of answers, which are then a struct. `datasets` gives messages
    that do not all have the same fields the type JSON.
    """
    kind = column.type
    if len(columns) == 2:
        if not all(is_text(kind.field(place).type) for place in range(2)):
            raise DataError(f"{name}: the columns {_named(columns)} hold {kind}; expected text in both")
    elif not _is_json(kind) and not (is_list(kind) and _is_message(kind.value_type)):
        raise DataError(
            f"{name}: column {_named(columns)} holds {kind}; expected lists of messages "
            "{role, content}, or set training.question_column and training.answer_column"
        )


def read_conversation(cell: "pa.Array", columns: Sequence[str], where: str) -> list[Message]:
    """The messages of an arrow array of length 1. Raises DataError for what is no conversation."""
    value = decoded(cell[0].as_py(), cell.type)
    if len(columns) == 2:
        question, answer = (value[column] for column in columns)
        value = [message_of("user", question), message_of("assistant", answer)]
    return checked_messages(value, f"{where}: column {_named(columns)}", where)


def checked_messages(value: Any, what: str, where: str) -> list[Message]:
    """A list of messages, each without fields that are null. Raises DataError for anything else.

    what, where: what messages call the value, and the row.
    """
    if not isinstance(value, list):
        raise DataError(f"{what} holds {_shown(value)}; expected a list of messages")
    if not value:
        raise DataError(f"{what} holds no message")
    return [_checked(message, f"{where}, message {number}") for number, message in enumerate(value)]


def _named(columns: Sequence[str]) -> str:
    return " and ".join(map(repr, columns))


def message_of(role: str, text: Any) -> Message:
    """Of a column that holds what one of the two said."""
    return {"role": role, "content": text.strip() if isinstance(text, str) else text}


def _checked(message: Any, where: str) -> Message:
    """The message without fields that are null, which a table has where other messages have something."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: is {_shown(message)}; expected an object with role and content")
    role, content = (message.get(key) for key in ("role", "content"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: has the role {_shown(role)}{nearest(str(role), ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where} ({role}): has the content {_shown(content)}; expected text")
    return {key: value for key, value in message.items() if value is not None}


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def decoded(value: Any, type_: "pa.DataType") -> Any:
    """`value` of an arrow type, of which any part may be JSON."""
    import pyarrow as pa

    if value is None:
        return None
    if _is_json(type_):
        return json.loads(value)
    if is_list(type_):
        return [decoded(item, type_.value_type) for item in value]
    if pa.types.is_struct(type_):
        return {field.name: decoded(value[field.name], field.type) for field in type_}
    return value


def _is_json(type_: "pa.DataType") -> bool:
    return getattr(type_, "extension_name", "") == "arrow.json"


def _is_message(type_: "pa.DataType") -> bool:
    import pyarrow as pa

    if _is_json(type_):
        return True
    return pa.types.is_struct(type_) and all(type_.get_field_index(key) >= 0 for key in ("role", "content"))
