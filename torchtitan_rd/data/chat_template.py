"""Conversations as ids, by the chat template that lies with a tokenizer.

Which of them the assistant said:

- A template with `{% generation %}` markers says so itself, as transformers' `return_assistant_tokens_mask`
  reads them.
- Of any other, a turn is what its message adds: the conversation up to the message is rendered with the
  prompt for an answer, and the conversation up to and with the message; the turn is what lies between their
  ends. That needs a template that writes a beginning of a conversation as it writes it within the whole one;
  only what it writes at the end of every conversation may be missing in the middle. One that is not so (it
  leaves out thoughts of earlier turns, say) is refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_rd.data.content import digest_of
from torchtitan_rd.errors import ConfigError, DataError

Message = dict[str, Any]

ASSISTANTS = ("assistant", "Huginn")
"""The roles whose turns are the model's own: the usual name, and that of the released Huginn."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer of the transformers library with its chat template.

    digest: of the template. marks_turns: whether it says which tokens are the assistant's.
    """

    def __init__(self, tokenizer: Any, what: str):
        """what: the tokenizer in words, for the ConfigError that says that it has no template."""
        self._tokenizer = tokenizer
        # Of a text that the template has written, it would only change where tokens are said to begin and
        # end: some leave out spaces, and transformers then finds no token where a turn begins or ends.
        tokenizer.backend_tokenizer.post_processor = None
        template = tokenizer.chat_template
        if isinstance(template, dict) and "default" in template:  # as transformers chooses
            template = tokenizer.chat_template = template["default"]
        if not template:
            raise ConfigError(
                f"{what} has no chat template (chat_template.jinja, or `chat_template` in "
                "tokenizer_config.json)"
            )
        if not isinstance(template, str):
            raise ConfigError(
                f"{what} has several chat templates ({', '.join(template)}), none called default: leave one"
            )
        self.digest = digest_of(template, str(sorted(self._tokenizer.special_tokens_map.items())))
        self.marks_turns = _MARKER.search(template) is not None

    @classmethod
    def of_folder(cls, folder: Path) -> "ChatTemplate":
        """tokenizer.json decides the ids, whatever class the folder asks for; no Python code in it is run.
        Raises ConfigError if there is no such tokenizer or it has no template.
        """
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"no tokenizer that transformers can read lies in {folder}: {error}") from None
        return cls(tokenizer, f"the tokenizer in {folder}")

    def prompt(self, messages: Sequence[Message], where: str) -> list[int]:
        """The ids of a conversation up to where the model answers. Raises DataError, which begins with
        `where`, if the template refuses it.
        """
        return self._ids(self._text(messages, where, answer_follows=True))

    def encode(self, messages: Sequence[Message], where: str) -> np.ndarray:
        """The ids of a whole conversation, int32. Raises DataError, as `prompt`."""
        return np.array(self._ids(self._text(messages, where)), np.int32)

    def encode_turns(self, messages: Sequence[Message], where: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a whole conversation, int32, and which of them the assistant said, bool; (S,) both.

        Raises DataError, as `prompt`, and where that cannot be told.
        """
        if not self.marks_turns:
            return self._turns_by_prefixes(messages, where)
        encoded = self._render(
            messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], bool)

    def _turns_by_prefixes(self, messages: Sequence[Message], where: str) -> tuple[np.ndarray, np.ndarray]:
        whole = self._text(messages, where)
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        # Of each token, its first character in the text and the one behind its last.
        begins, ends = np.array(encoded["offset_mapping"], int).reshape(-1, 2).T
        spoken = np.zeros(len(begins), bool)

        for number, message in enumerate(messages):
            if message["role"] not in ASSISTANTS:
                continue
            if number == 0:
                raise DataError(
                    f"{where}, message 0: is the assistant's, and no prompt comes before it, so what the "
                    "assistant said cannot be told: put {% generation %} and {% endgeneration %} around it "
                    "in the template"
                )
            before = self._text(messages[:number], where, answer_follows=True)
            after = self._text(messages[: number + 1], where)
            common = _common(after, whole)
            # What is missing in the middle must be what every conversation ends with.
            if not whole.startswith(before) or common <= len(before) or not whole.endswith(after[common:]):
                raise DataError(
                    f"{where}, message {number}: the chat template writes the conversation up to here "
                    "otherwise than within the whole one, so what the assistant said cannot be told: put "
                    "{% generation %} and {% endgeneration %} around it in the template"
                )
            # A token that is partly of the turn is of it, as transformers has it. But where the end of all
            # conversations is missing in the middle, `common` may lie within what is there in its place.
            until = begins < common if common == len(after) else ends <= common
            spoken |= until & (ends > len(before))
        return np.array(encoded["input_ids"], np.int32), spoken

    def _text(self, messages: Sequence[Message], where: str, *, answer_follows: bool = False) -> str:
        return self._render(messages, where, tokenize=False, add_generation_prompt=answer_follows)

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # of jinja and of whatever the template does: a library boundary
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{where}: the chat template cannot write it: {reason}") from None

    def _ids(self, text: str) -> list[int]:
        """Names of special tokens in it are these tokens; the template has written bos and eos."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _common(some: str, others: str) -> int:
    """How many characters at their beginning are the same."""
    for number, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return number
    return min(len(some), len(others))
