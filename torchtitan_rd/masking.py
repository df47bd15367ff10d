"""Credentials never reach a file or a log line: what is written of a config or a message goes
through here first.

Hidden are the login and the query of every address (`https://user:password@host/path?token=...`), and
each text under a name such as `api_key`, `hf_token`, `password`. Names like `num_tokens`, `tokenizer_path`
and `token_weights` are not meant.
"""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_SECRET_WORDS = {"apikey", "secret", "password", "passwd", "credential", "credentials"}
# Elsewhere in a name they say whose weights or which file is meant.
_SECRET_ENDS = {("token",), ("key",), ("key", "id")}
# scheme://, login up to the last @ before the path, host and path, query or fragment
_ADDRESS = re.compile(r"""([a-zA-Z][a-zA-Z0-9+.-]*://)([^\s/?#"'<>]*@)?([^\s?#"'<>]*)([?#][^\s"'<>]*)?""")


def mask_text(text: str) -> str:
    """`text` with the login and the query of every address in it hidden."""
    return _ADDRESS.sub(_mask_address, text)


def mask_values(value: Any, name: str = "") -> Any:
    """A config, or a part of it under the key `name`, as it may be written: same structure,
    credentials hidden.
    """
    if isinstance(value, Mapping):
        return {key: mask_values(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [mask_values(entry, name) for entry in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if is_secret_name(name) else mask_text(value)


def is_masked(value: Any) -> bool:
    """Whether a value that was read back had something hidden in it when it was written."""
    if isinstance(value, Mapping):
        return any(is_masked(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(is_masked(entry) for entry in value)
    return isinstance(value, str) and (value == MASK or ("://" in value and MASK in value))


def is_secret_name(name: str) -> bool:
    """Whether a key of this name holds a credential: one of its words says so, or how it ends."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    ends = {tuple(words[-1:]), tuple(words[-2:])}
    return not _SECRET_WORDS.isdisjoint(words) or not _SECRET_ENDS.isdisjoint(ends)


def _mask_address(found: re.Match[str]) -> str:
    scheme, login, place, query = found.groups()
    return scheme + (f"{MASK}@" if login else "") + place + (query[0] + MASK if query else "")
