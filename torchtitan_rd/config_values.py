"""Values of a config that are no plain TOML: strings of the command line, and keys that hold tables.

These are `[model.overrides]`, a table, and `[[training.mixture]]`, a list of small sections; none is known
by name here. On the command line an entry of such a list is named by its number or its `name`:
`--training.mixture.0.weight 0.5`, `--training.mixture.web.weight 0.5`.
"""

import ast
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import tomli
from pydantic import BaseModel, TypeAdapter, ValidationError

from torchtitan_rd.errors import ConfigError


def parse(text: str, annotation: Any) -> Any:
    """A command-line string as `annotation`; unchanged where it does not fit,
    so that validation can complain.
    """
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(annotation) in (list, tuple, dict):
        return guess(text if text[:1] in "[{(" else f"[{text}]")
    for option in options:
        if option is type(None):
            continue
        try:
            return TypeAdapter(option).validate_strings(text)
        except ValidationError:
            continue
    return text


def guess(text: str) -> Any:
    """A value whose type no key declares, read as TOML would: true, 3, 0.5, [1, 2], else a string."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text.strip("[]").split(",") if text.startswith("[") else text


def is_table(annotation: Any) -> bool:
    """Whether a key holds a table of its own (`[model.overrides]`)."""
    return typing.get_origin(annotation) is dict


def entry_type(annotation: Any) -> type[BaseModel] | None:
    """The class of the entries of a key that holds a list of tables, None for any other key."""
    if typing.get_origin(annotation) is not list:
        return None
    [entry] = typing.get_args(annotation)
    is_class = isinstance(entry, type) and typing.get_origin(entry) is None  # Python 3.10: list[int] is both
    return entry if is_class and issubclass(entry, BaseModel) else None


def nest(table: dict[str, Any], path: list[str], value: Any) -> bool:
    """Sets the entry at `path`; False, with nothing set, if a part of the path is a value and no table."""
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            return False
    last, present = path[-1], table.get(path[-1])
    table[last] = {**present, **value} if isinstance(value, dict) and isinstance(present, dict) else value
    return True


def with_field(entries: Any, annotation: Any, path: Sequence[str], raw: Any) -> tuple[list[Any], str]:
    """A copy of `entries`, the value of a key of type `annotation`, with one field set, and the entry's name.

    path: number or name of the entry, and the field. raw: as it stands on the command line.
    Raises ConfigError where there is no such entry.
    """
    which, field = path
    if isinstance(entries, str):
        entries = parse(entries, annotation)
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError("is a field of a table in a list, and there is no list of tables")
    tables = [dict(entry) for entry in entries]
    names = [str(table.get("name", number)) for number, table in enumerate(tables)]
    if which in names:
        at = names.index(which)
    elif which.isdecimal() and int(which) < len(tables):
        at = int(which)
    else:
        raise ConfigError(f"there is no entry {which!r}; there are: {', '.join(names) or 'none'}")
    if isinstance(raw, str) and (declared := entry_type(annotation)):
        raw = parse(raw, declared.model_fields[field].annotation)
    tables[at][field] = raw
    return tables, names[at]


def place(entries: Any, location: Sequence[str | int]) -> str:
    """`mixture.web.weight` for pydantic's ("mixture", 1, "weight"). entries: the value of `mixture`."""
    shown = [str(part) for part in location]
    if len(location) > 1 and isinstance(location[1], int) and isinstance(entries, list):
        entry = entries[location[1]]
        shown[1] = str(entry.get("name", location[1])) if isinstance(entry, Mapping) else shown[1]
    return ".".join(shown)


def without_none(value: Any) -> Any:
    """Tables within tables and lists, less the keys that are None, which TOML cannot hold."""
    if isinstance(value, Mapping):
        return {key: without_none(entry) for key, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, list) else value
