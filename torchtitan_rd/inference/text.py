"""Prompts as ids, and ids as text while they come."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from torchtitan_rd.data import ChatTemplate, Tokenizer
from torchtitan_rd.errors import ConfigError

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for a part of a character's bytes


def encode_prompt(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """bos, if the tokenizer has one (training text begins with it), then the ids of the prompt. Raises
    ConfigError for a model without a tokenizer, and for a prompt that has no ids."""
    if tokenizer is None:
        raise ConfigError(
            "this model has no tokenizer: name one with --tokenizer, or give ids with --prompt-ids"
        )
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*start, *np.asarray(tokenizer.encode(prompt)).tolist()]
    if not ids:
        raise ConfigError("an empty prompt gives this model nothing to start from: its tokenizer has no bos")
    return ids


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The ids of a conversation ({"role", "content"} each) up to where the model answers.

    tokenizer: of the transformers library (`transformers_tokenizer`). Raises ConfigError if it has no chat
    template, DataError if that refuses them.
    """
    return ChatTemplate(tokenizer, "--chat: the tokenizer").prompt(messages, "--chat")


class TextRow:
    """The text of one row, token by token, up to the first stop string.

    The work of a token does not depend on how many there were before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(stop)
        self._held = max((len(text) for text in stop), default=1) - 1  # may be the beginning of a stop string
        self._ids: list[int] = []
        # ids[before:shown] are decoded once more with what follows them,
        # since neighbours decide about blanks.
        self._before, self._shown = 0, 0
        self._pending = ""
        self.pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def push(self, id_: int) -> str:
        """-> what is new and sure to stay. Sets `stopped` if a stop string is complete; the text ends before
        it."""
        self._ids.append(id_)
        known = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        if len(text) <= len(known) or text.endswith(_INCOMPLETE):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return self._take(text[len(known) :], self._held)

    def flush(self) -> str:
        """-> what was held back, at the end of the row."""
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._before : self._shown])
        return self._take(self._decode(self._ids[self._before :])[len(known) :], 0)

    def _take(self, new: str, held: int) -> str:
        self._pending += new
        ends = [place for stop in self._stop if (place := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            sure, self._pending = self._pending[: min(ends)], ""
        else:
            cut = max(len(self._pending) - held, 0)
            sure, self._pending = self._pending[:cut], self._pending[cut:]
        if sure:
            self.pieces.append(sure)
        return sure
