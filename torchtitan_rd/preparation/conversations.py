"""Conversations on their way to packed rows: what a source may hold, and how they are staged."""

import json
from collections.abc import Sequence
from typing import Any

from torchtitan_rd.data.chat import checked_messages, message_of
from torchtitan_rd.data.chat_template import Message
from torchtitan_rd.errors import DataError
from torchtitan_rd.preparation.raw import SURROGATE, RawRow

CHAT_COLUMN = "messages"  # of a staged source

# Two ways to write a message are usual, and Huginn's preparation reads both: {role, content}, and
# {from, value} with these names of the two who speak.
_FIELDS = {"from": "role", "value": "content"}
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def as_json(messages: Sequence[Message]) -> str:
    """One text for one conversation, whatever the order of its fields."""
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)


def as_conversation(row: RawRow, columns: Sequence[str]) -> tuple[str, str | None, str]:
    """A row as the JSON of a list of messages; or "", why that cannot be, and what exactly is wrong.

    One column holds lists of messages. Of several, the first is what the user says and the others what the
    assistant answers, as in Huginn's sources files.
    """
    if row.value is None:
        return "", row.bad, ""
    value: Any = row.value[0]
    if len(columns) > 1:
        roles = ("user", *["assistant"] * (len(columns) - 1))
        value = [message_of(role, said) for role, said in zip(roles, row.value, strict=True)]
    elif isinstance(value, list):
        value = [_renamed(message) if isinstance(message, dict) else message for message in value]
    try:
        text = as_json(checked_messages(value, "the row", "the conversation"))
    except DataError as error:
        return "", "no conversation", str(error)
    return (text, None, "") if not SURROGATE.search(text) else ("", "not UTF-8", "")


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    """Fields and speakers under the usual names."""
    given = {key: value for key, value in message.items() if value is not None}
    for theirs, ours in _FIELDS.items():
        if theirs in given and ours not in given:
            given[ours] = given.pop(theirs)
    role = given.get("role")
    return given | ({"role": _SPEAKERS[role]} if isinstance(role, str) and role in _SPEAKERS else {})
