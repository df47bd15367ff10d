"""Prints the resolved config with the origin of every value, and what it runs;
status 1 and every contradiction if any.

torchtitan-rd config --job.config_file X.toml [--section.key value ...]
torchtitan-rd config X.toml [--section.key value ...]
torchtitan-rd config --ranks 144 X.toml                      # as that many ranks would run it
torchtitan-rd config --print-key job.dump_folder X.toml      # one value alone, for scripts
torchtitan-rd config --schema                                # every key, its default and meaning (Markdown)

Without --ranks they are as many as WORLD_SIZE says, else the fewest that [parallelism] allows.
Whether this machine has the devices is not asked: it need not be the one that trains.
"""

import json
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic.fields import FieldInfo
from tabulate import tabulate

from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.config_loader import Section, section_type
from torchtitan_rd.config_values import entry_type
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.log import logger
from torchtitan_rd.run_plan import RunPlan, fewest_ranks, resolve


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    if arguments == ["--schema"]:
        print(schema_page())
        return 0

    key, arguments = _option("--print-key", "a section.key", arguments)
    ranks, arguments = _option("--ranks", "a number", arguments)
    if arguments and not arguments[0].startswith("--"):
        arguments = ["--job.config_file", *arguments]

    environment = _on(ranks, Environment.read())  # a file of Huginn's means something else on other ranks
    loaded = load(arguments, environment)
    rows = _rows(loaded.config.as_dict())
    if key is not None:
        if key not in rows:
            raise ConfigError(f"--print-key: unknown key {key!r}")
        _plan(loaded.config, environment, ranks)
        print(rows[key])
        return 0

    for warning in loaded.warnings:
        logger.warning("%s", warning)
    table = [(name, json.dumps(value), _origin(name, loaded.origins)) for name, value in rows.items()]
    sys.stdout.write(tabulate(table, headers=("key", "value", "origin"), disable_numparse=True) + "\n\n")
    sys.stdout.flush()

    plan = _plan(loaded.config, environment, ranks)
    model = f"model: {plan.spec.name} {loaded.config.model.flavor}, {plan.count_parameters():,} parameters"
    sys.stdout.write("\n".join([*plan.report(), f"{model}, vocabulary {plan.shape.vocab_size}"]) + "\n")
    return 0


def _option(name: str, needs: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """(its value or None, the arguments without it), before or after the file and the keys."""
    if name not in arguments:
        return None, arguments
    at = arguments.index(name)
    if at + 1 == len(arguments):
        raise ConfigError(f"{name} needs {needs}")
    return arguments[at + 1], arguments[:at] + arguments[at + 2 :]


def _on(ranks: str | None, environment: Environment) -> Environment:
    """`environment` with as many ranks as --ranks says, if it does."""
    if ranks is None:
        return environment
    if not ranks.isdecimal() or int(ranks) == 0:
        raise ConfigError(f"--ranks {ranks}: must be a positive whole number")
    return replace(environment, rank=0, world_size=int(ranks))


def _plan(config: JobConfig, environment: Environment, ranks: str | None) -> RunPlan:
    """What `config` runs. Raises ConfigError with every contradiction."""
    if ranks is None and environment.world_size == 1:
        environment = replace(environment, world_size=fewest_ranks(config.parallelism))
    return resolve(config, environment)


def _rows(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`section.key` -> value; of a list of tables `section.key.name.field`, those that are set."""
    rows: dict[str, Any] = {}
    for section, keys in sections.items():
        for key, value in keys.items():
            if not (isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)):
                rows[f"{section}.{key}"] = value
                continue
            for number, entry in enumerate(value):
                prefix = f"{section}.{key}.{entry.get('name', number)}"
                rows |= {f"{prefix}.{field}": set_ for field, set_ in entry.items() if set_ is not None}
    return rows


def _origin(name: str, origins: dict[str, str]) -> str:
    """Where a value came from; a table's entries (model.overrides.dim) may each have an origin
    of their own, and fields that stand in a list of tables have that of the list.
    """
    found = [origin for key, origin in origins.items() if key == name or key.startswith(name + ".")]
    found = found or [origin for key, origin in origins.items() if name.startswith(key + ".")]
    return ", ".join(dict.fromkeys(found)) or "default"


_PAGE_HEAD = """# Configuration

Every key, as `python -m torchtitan_rd config --schema` prints it. A TOML file sets keys in sections;
`--section.key value` on the command line overrides it (also `--section.key=value`, `--section.flag`,
`--no-section.flag`). Unknown keys and wrong values are errors, all reported at once.
`python -m torchtitan_rd config FILE.toml [overrides]` prints the resolved config with the origin of every
value; the same config is stored in the dump folder and in each checkpoint. Names of the older torchtitan 0.1
schema load with a warning that says today's name (torchtitan_rd/old_keys.py). STREAM_HF_DATA=1 in the
environment sets training.stream.

Credentials are hidden in every config that is written or printed: the login and the query of an address
(`https://***@host/path?***`) and texts under names such as `api_key`. Such a file still loads, with a warning
for each key that had one; a run that needs the value must be given it again, as on the command line.

Keys marked * cannot change between a checkpoint and the run that resumes from it.
"""


def schema_page() -> str:
    """docs/configuration.md, from the section classes themselves."""
    fixed = JobConfig.must_match_keys()
    parts = [_PAGE_HEAD]
    for section, info in JobConfig.model_fields.items():
        fields = section_type(info).fields_in_order()
        parts.append(f"## [{section}]\n\n{_table(fields, section, fixed)}\n")
        parts += _lists_of_tables(fields, section, fixed)
    return "\n".join(parts).removesuffix("\n")


def _lists_of_tables(
    fields: list[tuple[str, FieldInfo]], section: str, fixed: frozenset[str]
) -> Iterator[str]:
    """What the tables may hold that stand in lists in a section, and in such tables in their turn."""
    for key, field in fields:
        entries = entry_type(field.annotation)
        if entries is not None and issubclass(entries, Section):
            name, of_entry = f"{section}.{key}", entries.fields_in_order()
            yield f"## [[{name}]]\n\n{_table(of_entry, name, fixed)}\n"
            yield from _lists_of_tables(of_entry, name, fixed)


def _table(fields: list[tuple[str, FieldInfo]], section: str, fixed: frozenset[str]) -> str:
    rows = [
        (
            f"`{key}`" + ("*" if f"{section}.{key}" in fixed else ""),
            _type_name(field.annotation),
            _default(field),
            " ".join((field.description or "").split()).replace("|", "\\|"),
        )
        for key, field in fields
    ]
    headers = ("key", "type", "default", "meaning")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def _type_name(annotation: object) -> str:
    """`int`, `str or none`, `"a" or "b"` for choices."""
    if entry_type(annotation):
        return "list of tables"
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "")
