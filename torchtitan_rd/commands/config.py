"""Prints the resolved config with the origin of every value.

torchtitan-rd config --job.config_file X.toml [--section.key value ...]
torchtitan-rd config X.toml [--section.key value ...]
torchtitan-rd config --print-key job.dump_folder X.toml      # one value alone, for scripts
torchtitan-rd config --schema                                # every key, its default and meaning (Markdown)
"""

import json
import sys
import types
import typing

from tabulate import tabulate

from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.log import logger


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    if arguments == ["--schema"]:
        print(schema_page())
        return 0
    key = None
    if arguments[:1] == ["--print-key"]:
        if len(arguments) < 2:
            raise ConfigError("--print-key needs a section.key")
        key, arguments = arguments[1], arguments[2:]
    if arguments and not arguments[0].startswith("--"):
        arguments = ["--job.config_file", *arguments]
    loaded = load(arguments, Environment.read())
    rows = {f"{s}.{k}": value for s, keys in loaded.config.as_dict().items() for k, value in keys.items()}
    if key is not None:
        if key not in rows:
            raise ConfigError(f"--print-key: unknown key {key!r}")
        print(rows[key])
        return 0
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    table = [(name, json.dumps(value), _origin(name, loaded.origins)) for name, value in rows.items()]
    sys.stdout.write(tabulate(table, headers=("key", "value", "origin"), disable_numparse=True) + "\n")
    return 0


def _origin(name: str, origins: dict[str, str]) -> str:
    """Where a value came from; a table's entries (model.overrides.dim) may each have an origin of their own."""
    found = [origin for key, origin in origins.items() if key == name or key.startswith(name + ".")]
    return ", ".join(dict.fromkeys(found)) or "default"


_PAGE_HEAD = """# Configuration

Every key, as `python -m torchtitan_rd config --schema` prints it. A TOML file sets keys in sections;
`--section.key value` on the command line overrides it (also `--section.key=value`, `--section.flag`,
`--no-section.flag`). Unknown keys and wrong values are errors, all reported at once.
`python -m torchtitan_rd config FILE.toml [overrides]` prints the resolved config with the origin of every value;
the same config is stored in the dump folder and in each checkpoint. Names of the
older torchtitan 0.1 schema load with a warning that says today's name (torchtitan_rd/old_keys.py). STREAM_HF_DATA=1 in
the environment sets training.stream.

Credentials are hidden in every config that is written or printed: the login and the query of an address
(`https://***@host/path?***`) and texts under names such as `api_key`. Such a file still loads, with a warning for each
key that had one; a run that needs the value must be given it again, as on the command line.

Keys marked * cannot change between a checkpoint and the run that resumes from it.
"""


def schema_page() -> str:
    """docs/configuration.md, from the section classes themselves."""
    fixed = JobConfig.must_match_keys()
    parts = [_PAGE_HEAD]
    for section, info in JobConfig.model_fields.items():
        rows = [
            (
                f"`{key}`" + ("*" if f"{section}.{key}" in fixed else ""),
                _type_name(field.annotation),
                f"`{json.dumps(field.get_default(call_default_factory=True))}`",
                " ".join((field.description or "").split()).replace("|", "\\|"),
            )
            for key, field in info.annotation.model_fields.items()
        ]
        table = tabulate(rows, headers=("key", "type", "default", "meaning"), tablefmt="github", disable_numparse=True)
        parts.append(f"## [{section}]\n\n{table}\n")
    return "\n".join(parts).removesuffix("\n")


def _type_name(annotation: object) -> str:
    """`int`, `str or none`, `"a" or "b"` for choices."""
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    return annotation.__name__ if typing.get_origin(annotation) is None else str(annotation).replace("typing.", "")
