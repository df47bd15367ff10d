"""Configs on disk: TOML, or YAML as the ancestors wrote it; a table of settings in, a table of settings out.

Knows no section by name. What a file holds is judged by config_loader.py.
"""

import codecs
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import tomli
import tomli_w
import yaml

from torchtitan_rd.errors import ConfigError

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
YAML_SUFFIXES = (".yaml", ".yml")
SUFFIXES = (*YAML_SUFFIXES, ".toml")


@dataclass(frozen=True)
class Value:
    """One setting as it was found: the raw value, and where (`file.toml:12`, `command line`, ...)."""

    raw: Any
    origin: str


@dataclass(frozen=True)
class Foreign:
    """What a file of another program says in our keys.

    settings: (`section.key`, value, the name in that file that it came from). warnings: what to tell.
    """

    settings: list[tuple[str, Any, str]]
    warnings: list[str] = field(default_factory=list)


Translator: TypeAlias = Callable[[Path, Mapping[str, Any]], Foreign | None]
"""(path, table of a file) -> what it says in our keys; None for a file of ours. Raises ConfigError."""


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's numbers: 4e-5 is one here too, where YAML 1.1 wants 4.0e-5 and reads a text otherwise. And
    its rule that a key stands once: PyYAML takes the last of several, and drops the others without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.value != "<<" else None
            if name in seen:
                problem = f"the key {name!r} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


class _YamlDumper(yaml.SafeDumper):
    """Puts quotes around texts that the loader would take for such numbers."""


for _one in (_YamlLoader, _YamlDumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+|[-+]?\.\d+[eE][-+]?\d+"),
        list("-+0123456789."),
    )


def load_yaml(text: str) -> Any:
    """What YAML text holds: plain values alone. Raises yaml.YAMLError, for a key that stands twice too;
    RecursionError.
    """
    return yaml.load(text, Loader=_YamlLoader)  # a SafeLoader


def read_file(path: Path, translate: Translator | None = None) -> tuple[list[tuple[str, Value]], list[str]]:
    """The settings of a TOML or YAML file in order, and warnings. A section may end in `_args`, as in
    the YAML of the CLM ancestor. translate: for files of other programs.

    Raises ConfigError.
    """
    path, text, table = _read_table(path)
    if translate is not None and (foreign := translate(path, table)) is not None:
        return [(key, Value(raw, _origin(path, text, name))) for key, raw, name in foreign.settings], (
            foreign.warnings
        )

    found = []
    for section, keys in table.items():
        if not isinstance(section, str) or not isinstance(keys, dict):
            raise ConfigError(f"{path}: {section} = {keys!r} stands outside a [section]; put it in one")
        for key, raw in keys.items():
            origin = f"{path}:{_line_of(text, section, str(key))}"
            found.append((f"{present_section(section)}.{key}", Value(raw, origin)))
    if not found:
        raise ConfigError(f"{path}: has sections and no key in them; was it cut off when it was copied?")
    return found, []


def present_section(name: str) -> str:
    """The section that a name stands for: those of the CLM ancestor end in `_args`."""
    return name.removesuffix("_args")


def config_text(path: Path, sections: Mapping[str, Mapping[str, Any]], comment: str = "") -> str:
    """What to write to `path`, in the format that its name says, so that it loads to `sections`.

    comment: lines to put above. Raises ConfigError for any other name.
    """
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    tables = {name: dict(keys) for name, keys in sections.items()}
    if path.suffix in YAML_SUFFIXES:
        return head + yaml.dump(tables, Dumper=_YamlDumper, sort_keys=False)
    if path.suffix == ".toml":
        return head + tomli_w.dumps(tables)
    raise ConfigError(f"{path}: a config ends in {', '.join(SUFFIXES)}")


def _read_table(path: Path) -> tuple[Path, str, dict[Any, Any]]:
    """-> the path without `~`, the text, and what it holds."""
    try:
        path = path.expanduser()
        content = path.read_bytes()
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if content.startswith(mark):
                raise ConfigError(
                    f"{path}: begins with a byte order mark ({encoding}); save it as UTF-8 without one"
                )
        text = content.decode()
        table = load_yaml(text) if path.suffix in YAML_SUFFIXES else tomli.loads(text)
    except OSError as error:
        raise ConfigError(f"--job.config_file {path}: {error.strerror or error}") from None
    except (tomli.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a valid config file: {error}") from None
    except RuntimeError as error:  # of expanduser
        raise ConfigError(f"--job.config_file {path}: {error}") from None

    if table is None or table == {}:
        raise ConfigError(f"{path}: is empty: it sets no key; was it cut off when it was copied?")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: expected sections of keys, found {type(table).__name__}")
    return path, text, table


def _line_of(text: str, section: str, key: str) -> int:
    """The 1-based line at which `key` stands in `section`; the section's own line if the key is not found."""
    inside, header = False, 1
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if re.match(rf"(\[\s*{re.escape(section)}\s*\]|{re.escape(section)}\s*:)", stripped):
            inside, header = True, number
        elif re.match(rf"\[{{1,2}}\s*{re.escape(section)}\.{re.escape(key)}\s*\]", stripped):
            return number
        elif stripped.startswith("[") or (stripped.endswith(":") and not line[:1].isspace()):
            inside = False
        elif inside and re.match(rf"[\"']?{re.escape(key)}[\"']?\s*[=:.]", stripped):
            return number
    return header


def _origin(path: Path, text: str, name: str) -> str:
    """The line on which `a` or, below it, the last part of `a.b` stands; or that it does not."""
    lines, found = text.splitlines(), 0
    for part in name.split("."):
        pattern = re.compile(rf"[\s{{-]*[\"']?{re.escape(part)}[\"']?\s*[:=]")
        found = next((n for n in range(found + 1, len(lines) + 1) if pattern.match(lines[n - 1])), 0)
        if not found:
            return f"{path}: default of {name} there"
    return f"{path}:{found}: {name}"
