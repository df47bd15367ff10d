"""What the command line names as input: files, folders, patterns, staging folders, the hub."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.data.arrow import open_table
from torchtitan_rd.data.files import HUB_NAME, FileList, find_files
from torchtitan_rd.data.hub import check_revision
from torchtitan_rd.data.json_text import JsonKind
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.preparation.conversations import CHAT_COLUMN
from torchtitan_rd.preparation.documents import Source
from torchtitan_rd.preparation.manifest import (
    MANIFEST,
    WORK,
    Output,
    describe,
    disk_errors,
    progress_bar,
    read_finished,
)

_HASHES = "inputs.json"


@dataclass(frozen=True)
class InputKeys:
    """How inputs are read. column, chat_columns, subset, split, revision: of each that is no staging folder.
    chat_columns: of conversations, in place of `column`. weights: name of a source -> its weight, in place of
    1 or of what its staging folder says.
    """

    paths: Sequence[str]
    column: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    weights: Mapping[str, float] | None = None
    chat_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """sources: what is read. contents: name -> size and sha256, or the commit, of all that they consist of.
    hashes: path -> size, time of change and sha256, so that a further run need not read all of it again.
    """

    sources: list[Source]
    contents: dict[str, dict[str, Any]]
    hashes: dict[str, list[Any]]


def open_inputs(keys: InputKeys, output: Path) -> Inputs:
    """Everything that is to be read for the folder `output`.

    Raises ConfigError for a weight of a source that there is not; DataError for what is not there, empty, not
    UTF-8 or not text.
    """
    weights = dict(keys.weights or {})
    known = _read_hashes(output)
    sources: list[Source] = []
    contents: dict[str, dict[str, Any]] = {}
    hashes: dict[str, list[Any]] = {}

    for number, path in enumerate(keys.paths):
        _check_apart(Path(path), output)
        mark = f"{number + 1}:" if len(keys.paths) > 1 else ""
        if _is_staging(Path(path)):
            found, facts = _open_staging(Path(path), weights)
        else:
            found, facts = _open_path(path, keys, weights.get(path, 1.0), known, hashes)
        sources += found
        contents |= {f"{mark}{name}": fact for name, fact in facts.items()}

    names = [source.name for source in sources]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"named twice as input: {', '.join(repeated)}; set --weight NAME=2 instead")
    for name in weights:
        if name not in names:
            raise ConfigError(f"--weight {name}={weights[name]:g}: is no source{nearest(name, names)}")
    return Inputs(sources, contents, hashes)


def keep_hashes(inputs: Inputs, output: Output) -> None:
    """For the next run, should this one be killed, and for other tasks of the same folder."""
    with disk_errors(output.folder):
        output.save(_HASHES, inputs.hashes)


def _check_apart(path: Path, output: Path) -> None:
    """Else a run that goes on would read what it has written itself."""
    if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"--output {output}: lies in the input {path}; name a folder outside of it")


def _read_hashes(output: Path) -> dict[str, list[Any]]:
    try:
        return json.loads((output / WORK / _HASHES).read_text())
    except (OSError, ValueError):
        return {}


def _is_staging(path: Path) -> bool:
    try:
        return json.loads((path / MANIFEST).read_text())["step"] == "download"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open_staging(
    folder: Path, weights: Mapping[str, float]
) -> tuple[list[Source], dict[str, dict[str, Any]]]:
    """The sources of a folder of `data download`, by its manifest, which knows their sha256."""
    manifest = read_finished(folder, "download")
    sources = []
    for name, facts in manifest["sources"].items():
        files = [folder / file for file in manifest["files"] if file.startswith(f"{name}/")]
        for file in files:
            expected = manifest["files"][str(file.relative_to(folder))]["size"]
            if not file.is_file() or file.stat().st_size != expected:
                raise DataError(f"{file}: is missing, or not of the {expected:,} bytes that {MANIFEST} notes")
        weight = weights.get(name, facts["weight"])
        if files:
            found = FileList(name, "train", folder, files)
            table = open_table(name, str(folder), None, False, found=found)
            is_chat = facts.get("needs_chat_templating", False)
            sources.append(Source(name, table, "text", weight, (CHAT_COLUMN,) if is_chat else (), found))
    return sources, manifest["files"]


def _open_path(
    path: str, keys: InputKeys, weight: float, known: dict[str, list[Any]], hashes: dict[str, list[Any]]
) -> tuple[list[Source], dict[str, dict[str, Any]]]:
    found = find_files(path, keys.split)
    if not found.files and not found.saved and not HUB_NAME.fullmatch(path):
        raise DataError(f"{path}: no such file or folder, and nothing matches it as a pattern")
    expected: dict[str, JsonKind] = {keys.column: "text"}
    if keys.chat_columns:
        expected = dict.fromkeys(keys.chat_columns, "messages" if len(keys.chat_columns) == 1 else "text")
    table = open_table(path, path, keys.subset, False, keys.split, found, keys.revision, expected)
    source = Source(path, table, keys.column, weight, keys.chat_columns, found)
    if not len(source):
        raise DataError(f"{path}: holds no rows")
    remedy = "name them as a further input, or their split with --split"
    found.log("preparation", f"{len(source)} rows", remedy)

    files = found.files
    if found.saved:
        files = sorted(Path(entry["filename"]) for entry in table.cache_files)
    if not files:
        return [source], {path: {"commit": check_revision(path, table, keys.revision)}}
    contents = {}
    with progress_bar(sum(file.stat().st_size for file in files), 0, "B", f"sha256 of {path}") as bar:
        for file in files:
            fact, key = file.stat(), str(file.resolve())
            noted = known.get(key, [])
            if noted[:2] != [fact.st_size, fact.st_mtime_ns]:
                noted = [fact.st_size, fact.st_mtime_ns, describe(file)["sha256"]]
            hashes[key] = noted
            contents[found.name(file)] = {"size": noted[0], "sha256": noted[2]}
            bar.update(fact.st_size)
    return [source], contents
