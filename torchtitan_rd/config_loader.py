"""TOML file -> environment -> command line -> one validated, frozen config. Knows no section by name.

A section is a subclass of `Section` that stands in the room that uses it; `config.JobConfig` composes them.
Every problem found is gathered, and all are raised as one ConfigError before anything expensive starts.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from torchtitan_rd.config_file import Translator, Value, present_section, read_file
from torchtitan_rd.config_values import entry_type, guess, is_table, nest, parse, place, with_field
from torchtitan_rd.errors import ConfigError, nearest
from torchtitan_rd.masking import is_masked

MUST_MATCH: JsonDict = {"on_resume": "must_match"}
"""`json_schema_extra` of a key that a resumed run may not change."""


class Section(BaseModel):
    """Base of a config section: frozen, strictly typed, no unknown keys, no infinite numbers.

    Attribute docstrings are the documentation.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def fields_in_order(cls) -> list[tuple[str, FieldInfo]]:
        """Every key as it is shown: the section's own ones first, then those that it has from other rooms."""
        declared = [
            key for base in cls.__mro__ for key in inspect.get_annotations(base) if key in cls.model_fields
        ]
        return [(key, cls.model_fields[key]) for key in dict.fromkeys(declared)]


def section_type(info: FieldInfo) -> type[Section]:
    """The class of a section, from a schema's field."""
    if not isinstance(info.annotation, type) or not issubclass(info.annotation, Section):
        raise TypeError(f"{info.annotation} is no Section")
    return info.annotation


def _expand_home(path: str | None) -> str | None:
    """`~` and `~user` as a shell would read them, which it does not do within `--key=~/folder` or
    in a file.
    """
    if path is not None and (not path or "\0" in path):
        raise ValueError("is not a path; is a variable of the script unset?")
    if path is None or not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError("there is no such user, or the home folder is not known") from None


def _inside_the_dump_folder(folder: str) -> str:
    path = PurePath(folder)
    strange = not folder.isprintable() or folder.startswith("~")
    if path.is_absolute() or ".." in path.parts or not path.parts or strange:
        raise ValueError("must name a folder inside job.dump_folder, without '..'")
    return folder


# Types of keys. A path may be anywhere; a sub-folder lies below job.dump_folder.
UserPath = Annotated[str, AfterValidator(_expand_home)]
OptionalUserPath = Annotated[str | None, AfterValidator(_expand_home)]
Subfolder = Annotated[str, AfterValidator(_inside_the_dump_folder)]

C = TypeVar("C", bound=Section)


@dataclass(frozen=True)
class RenamedKey:
    """A key of an older schema. `new` is its present `section.key` (None: removed).

    `convert` turns the old value into the new one, and is called with values of `value_type` only (None: of
    any type, since the present key checks it). A removed key is accepted only with a value in `harmless` (it
    asked for what happens anyway); `remedy` says what to do otherwise.
    """

    new: str | None
    value_type: type | None = None
    convert: Callable[[Any], Any] = lambda value: value
    harmless: tuple[Any, ...] = ()
    remedy: str = ""


@dataclass
class Loaded(Generic[C]):
    """A validated config, the origin of each key that does not have its default, and the warnings to log."""

    config: C
    origins: dict[str, str]
    warnings: list[str]


@dataclass
class _Reader(Generic[C]):
    schema: type[C]
    renamed: Mapping[str, RenamedKey]
    values: dict[str, Value] = field(default_factory=dict)
    field_origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def take(self, key: str, value: Value) -> None:
        """Records `section.key = value`, translated if the key is of an older schema;
        a later call overrides.
        """
        if key in self.renamed:
            old, where = self.renamed[key], f"{value.origin}: {key}"
            if value.origin == "command line" and isinstance(value.raw, str):
                value = Value(guess(value.raw), value.origin)  # the old key's type is not declared anywhere
            if old.new is None:
                if not any(type(value.raw) is type(one) and value.raw == one for one in old.harmless):
                    self.problems.append(f"{where} = {value.raw!r} is no longer supported: {old.remedy}")
                else:
                    self.warnings.append(f"{where} is no longer a key and is ignored ({old.remedy})")
                return
            if old.value_type is not None and not isinstance(value.raw, old.value_type):
                self.problems.append(f"{where} = {value.raw!r}: must be of type {old.value_type.__name__}")
                return
            self.warnings.append(f"{where} is now {old.new}")
            key, value = old.new, Value(old.convert(value.raw), value.origin)

        problem = self.unknown(key)
        if problem:
            self.problems.append(f"{value.origin}: {problem}")
            return
        section, name, *below = key.split(".")
        annotation = section_type(self.schema.model_fields[section]).model_fields[name].annotation
        if below and entry_type(annotation):
            self._take_field(f"{section}.{name}", annotation, below, value)
        else:
            self.values[key] = value

    def _take_field(self, key: str, annotation: Any, path: list[str], value: Value) -> None:
        """Sets a field (`path`: entry, field) in the list of tables that the file gave."""
        base = self.values.get(key, Value([], value.origin))
        try:
            entries, entry = with_field(base.raw, annotation, path, value.raw)
        except ConfigError as error:
            self.problems.append(f"{value.origin}: {'.'.join([key, *path])}: {error}")
            return
        self.values[key] = Value(entries, base.origin)
        self.field_origins[f"{key}.{entry}.{path[1]}"] = value.origin

    def unknown(self, key: str) -> str | None:
        """What is wrong with the name `section.key` (or `section.key.entry` of a table), or None."""
        section, _, name = key.partition(".")
        sections = self.schema.model_fields
        if section not in sections:
            return f"unknown section [{section}]{nearest(section, sections)}"
        fields = section_type(sections[section]).model_fields
        if name in fields:
            return None
        key, *path = name.split(".")
        if key in fields and is_table(fields[key].annotation):
            return None
        if len(path) == 2 and key in fields and (entries := entry_type(fields[key].annotation)):
            known = entries.model_fields
            if path[1] in known:
                return None
            return f"unknown key {path[1]!r} in [[{section}.{key}]]{nearest(path[1], known)}"
        elsewhere = [f"{s}.{name}" for s, f in sections.items() if name in section_type(f).model_fields]
        hint = f"; did you mean {elsewhere[0]}?" if elsewhere else nearest(name, fields)
        return f"unknown key {name!r} in section [{section}]{hint}"

    def build(self) -> C | None:
        """The validated config, or None after adding every section's problems."""
        sections = {}
        for name, info in self.schema.model_fields.items():
            raw: dict[str, Any] = {}
            section = section_type(info)
            for key, value in self.values.items():
                if not key.startswith(name + "."):
                    continue
                if not nest(raw, key.split(".")[1:], self._typed(section, key, value)):
                    parent = key.rpartition(".")[0]
                    self.problems.append(
                        f"{value.origin}: {key}: {parent} has a value already and cannot hold entries"
                    )
            try:
                sections[name] = section.model_validate(raw)
            except ValidationError as error:
                self.problems += [self._explain(name, entry) for entry in error.errors()]
        if self.problems:
            return None
        return self.schema(**sections)

    def _typed(self, section: type[Section], key: str, value: Value) -> Any:
        """Command-line values arrive as strings: read them as the type that the key declares."""
        if value.origin != "command line" or not isinstance(value.raw, str):
            return value.raw
        name, _, entry = key.partition(".")[2].partition(".")
        annotation = section.model_fields[name].annotation
        return guess(value.raw) if entry else parse(value.raw, annotation)

    def _explain(self, section: str, entry: Mapping[str, Any]) -> str:
        name = key = str(entry["loc"][0]) if entry["loc"] else ""
        found = [
            v
            for k, v in self.values.items()
            if k == f"{section}.{name}" or k.startswith(f"{section}.{name}.")
        ]
        origin = found[0].origin if found else "default"
        message = entry["msg"].removeprefix("Value error, ")
        if len(entry["loc"]) > 1 and found:
            name = place(found[0].raw, entry["loc"])
            entries = entry_type(section_type(self.schema.model_fields[section]).model_fields[key].annotation)
            if entry["type"] == "extra_forbidden" and entries:
                message = f"is no key of it{nearest(str(entry['loc'][-1]), entries.model_fields)}"
        return (
            f"{origin}: [{section}] {name} = {entry['input']!r}: {message}"
            if name
            else f"[{section}]: {message}"
        )


def load_config(
    schema: type[C],
    arguments: Sequence[str],
    *,
    renamed: Mapping[str, RenamedKey] | None = None,
    environment: Mapping[str, Any] | None = None,
    file_key: str = "job.config_file",
    translate: Translator | None = None,
) -> Loaded[C]:
    """Reads the file named by `--{file_key}`, then `environment`, then the command line,
    each overriding the last.

    translate: for files of other programs. Raises ConfigError with every problem, one a line.
    """
    reader = _Reader(schema, renamed or {})
    overrides = parse_overrides(arguments, reader.problems)
    files = [value for key, value in overrides if key == file_key]
    if files and (not isinstance(files[-1], str) or not files[-1]):
        reader.problems.append(
            f"command line: --{file_key} needs the name of a file; is a variable of the script unset?"
        )
    elif files:
        settings, warnings = read_file(Path(str(files[-1])), translate)
        reader.warnings += warnings
        for key, value in settings:
            reader.take(key, value)

    for key, raw in (environment or {}).items():
        reader.take(key, Value(raw, "environment"))
    for key, raw in overrides:
        reader.take(key, Value(raw, "command line"))
    config = reader.build()
    if config is None or reader.problems:
        raise ConfigError("\n".join(reader.problems))

    origins = {key: value.origin for key, value in reader.values.items()} | reader.field_origins
    masked = [
        f"{value.origin}: {key} had credentials, which were hidden (***) when this was written: "
        "give them again"
        for key, value in reader.values.items()
        if is_masked(value.raw)
    ]
    return Loaded(config, origins, list(dict.fromkeys([*reader.warnings, *masked])))


def parse_overrides(arguments: Sequence[str], problems: list[str]) -> list[tuple[str, str | bool]]:
    """`--a.b 1`, `--a.b=1`, `--a.b` (true) and `--no-a.b` (false), in order;
    anything else goes to `problems`. `--a_args.b` is `--a.b`, as in the files.
    """
    found: list[tuple[str, str | bool]] = []
    i = 0
    while i < len(arguments):
        name, equals, raw = arguments[i].partition("=")
        i += 1
        if not re.fullmatch(r"--[\w-]+(\.[\w-]+)+", name):
            problems.append(f"command line: {arguments[i - 1]!r} is not of the form --section.key value")
        elif name.startswith("--no-"):
            if equals:
                problems.append(f"command line: {arguments[i - 1]!r}: --no- takes no value")
            found.append((name.removeprefix("--no-"), False))
        elif equals:
            found.append((name[2:], raw))
        elif i < len(arguments) and not arguments[i].startswith("--"):
            found.append((name[2:], arguments[i]))
            i += 1
        else:
            found.append((name[2:], True))
    return [(_present_key(key), raw) for key, raw in found]


def _present_key(key: str) -> str:
    section, dot, name = key.partition(".")
    return present_section(section) + dot + name
