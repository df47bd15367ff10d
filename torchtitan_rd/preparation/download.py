"""Sources of many kinds -> one staging folder of parquet, with the columns text (of conversations, messages)
and source.

A source is read row by row and written in parts of bounded size; after each part the source's progress is
noted. Bad rows are left out, counted by reason, and the first of them named.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torchtitan_rd.config_file import load_yaml
from torchtitan_rd.data.arrow import check_columns, open_table
from torchtitan_rd.data.files import HUB_NAME, FileList, find_files
from torchtitan_rd.data.hub import check_revision
from torchtitan_rd.errors import ConfigError, DataError, nearest
from torchtitan_rd.log import logger
from torchtitan_rd.preparation.conversations import CHAT_COLUMN, as_conversation
from torchtitan_rd.preparation.manifest import MANIFEST, Output, describe, progress_bar
from torchtitan_rd.preparation.raw import FEATURES, RawRow, as_text, read_raw, row_at

ROWS_A_FILE = 100_000
CHARACTERS_A_FILE = 256 << 20
_EXAMPLES = 5  # bad rows of a source that are named
_ROWS_TOGETHER = 1000


class SourceKeys(BaseModel):
    """One source, as a sources file describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    """A file, folder or pattern as training.dataset_path takes it, from the place of the sources file; or a
    repository on the hub."""
    subset: str | None = None
    """Of a repository on the hub."""
    split: str = "train"
    """Of a folder or repository."""
    revision: str | None = None
    """Commit, branch or tag of a repository on the hub."""
    features: str | list[str] = "text"
    """The columns that make the text, with an empty line between them."""
    weight: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    """How often its documents count when they are tokenised. A source of weight 0 is not fetched."""
    category: str = ""
    license: str = ""
    citation: str = ""
    machine_generated: bool = False
    every_token_is_sacred: bool = False
    """Kept in the manifest. Packing discards no token of any source, so it changes nothing."""
    needs_chat_templating: bool = False
    """Rows are conversations: `features` is the column of their messages, or names the columns of what the
    user says and of what the assistant answers. They are staged as they are, and the chat template of the
    tokenizer writes them when they are packed."""
    requires_software_heritage_aws_download: bool = False
    """Content that lies elsewhere: refused."""

    @property
    def columns(self) -> list[str]:
        return [self.features] if isinstance(self.features, str) else self.features

    def usable(self, row: RawRow) -> tuple[str, str | None, str]:
        """What is staged of a row; or "", why it is left out, and what exactly is wrong with it."""
        if self.needs_chat_templating:
            return as_conversation(row, self.columns)
        return (*as_text(row, self.columns), "")


def read_sources(file: Path) -> dict[str, SourceKeys]:
    """The sources of a YAML file, by name: `sources: {name: {address: ...}}`.

    Raises ConfigError with all that is wrong in it.
    """
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    listed = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{file}: expected `sources:` with a name and an `address` for each")

    found: dict[str, SourceKeys] = {}
    problems: list[str] = []
    for name, keys in listed.items():
        if not HUB_NAME.fullmatch(f"a/{name}"):
            problems.append(f"{name}: a name may hold letters, digits, _, . and -")
        elif name == MANIFEST:
            problems.append(f"{name}: is the name of the file that describes the folder")
        try:
            found[str(name)] = SourceKeys.model_validate(keys)
        except ValidationError as error:
            for problem in error.errors():
                key = ".".join(map(str, problem["loc"])) or "it"
                known = nearest(key, SourceKeys.model_fields) if problem["type"] == "extra_forbidden" else ""
                problems.append(f"{name}: {key}: {problem['msg']}{known}")
            continue
        problems += _refused(str(name), found[str(name)])
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    return found


def _refused(name: str, keys: SourceKeys) -> list[str]:
    remarks = (
        (
            keys.requires_software_heritage_aws_download,
            "requires_software_heritage_aws_download: is not offered; fetch it, and give its local address",
        ),
        (not keys.columns, "features: name at least one column"),
    )
    return [f"{name}: {remark}" for wrong, remark in remarks if wrong]


@dataclass(frozen=True)
class OpenSource:
    """A source that is there. table: of what is no list of files."""

    name: str
    keys: SourceKeys
    found: FileList
    table: Any = None

    def contents(self) -> dict[str, dict[str, Any]]:
        """Name -> size and sha256, or the commit."""
        if self.table is not None and not self.found.saved:
            return {self.name: {"address": self.keys.address, "commit": self.found.commit}}
        files = self.found.files
        if self.found.saved:
            files = sorted(Path(entry["filename"]) for entry in self.table.cache_files)
        return {f"{self.name}/{self.found.name(file)}": describe(file) for file in files}

    def rows(self, file: int, start: int) -> Iterator[tuple[int, int, RawRow]]:
        """Number of the file, of the row in it, and the row, from a place on."""
        if self.table is not None:
            cells = self.table.with_format("arrow", columns=self.keys.columns)
            for first in range(start, len(cells), _ROWS_TOGETHER):
                batch = cells[first : first + _ROWS_TOGETHER]
                for i in range(len(batch)):
                    yield 0, first + i, row_at(batch, i, self.keys.columns, 1)
            return
        for number in range(file, len(self.found.files)):
            first = start if number == file else 0
            rows = read_raw(self.found.files[number], self.keys.columns, first)
            for row, value in enumerate(rows, first):
                yield number, row, value

    def size(self) -> int:
        """Bytes of its files, or its rows."""
        return len(self.table) if self.table is not None else sum(f.stat().st_size for f in self.found.files)

    def place(self, file: int, row: int) -> str:
        """What messages call a row."""
        name = self.keys.address if self.table is not None else self.found.name(self.found.files[file])
        return f"{name}: row {row}"


def open_source(name: str, keys: SourceKeys, base: Path) -> OpenSource:
    """base: the folder that local addresses start from. Raises DataError for what is not there."""
    path = keys.address if Path(keys.address).is_absolute() else str(base / keys.address)
    found = find_files(path, keys.split)
    if found.files:
        found.builder()
        return _logged(OpenSource(name, keys, found))
    if not found.saved:
        if not HUB_NAME.fullmatch(keys.address):
            raise DataError(f"{name}: address {keys.address!r}: no such file or folder ({path})")
        path, found = keys.address, FileList(keys.address, keys.split, Path())
    table = open_table(name, path, keys.subset, False, keys.split, found, keys.revision)
    check_columns(table.column_names, keys.columns, name, FEATURES)
    if not found.saved:
        found.commit = check_revision(name, table, keys.revision)
    return _logged(OpenSource(name, keys, found, table))


def _logged(source: OpenSource) -> OpenSource:
    size = f"{source.size():,} {'bytes' if source.table is None else 'rows'}"
    remedy = "name them as a source of their own, or their `split` in the sources file"
    source.found.log(source.name, size, remedy)
    return source


def download(sources: list[OpenSource], output: Output) -> dict[str, Any]:
    """Writes the staging folder. Returns its manifest.

    Raises DataError for a source of which no row can be used, and where there is no room.
    """
    with output.making("staging") as done:
        if done:
            return done
        files: dict[str, Any] = {}
        notes: dict[str, Any] = {}
        for source in sources:
            note = _stage(source, output)
            files |= note["files"]
            counts = {key: note[key] for key in ("rows", "characters", "bad", "examples")}
            left_out = {"left_out": source.found.noted_left_out}
            notes[source.name] = {**source.keys.model_dump(), **counts, **left_out}
        return output.finish({"files": files, "sources": notes})


def _stage(source: OpenSource, output: Output) -> dict[str, Any]:
    """All parts of one source. Goes on behind the last that is noted."""
    name_of_note = f"source-{source.name}.json"
    begin = {"done": False, "file": 0, "row": 0, "rows": 0, "characters": 0}
    note = output.load(name_of_note) or {**begin, "bad": {}, "examples": [], "files": {}}
    if note["done"]:
        return note

    bad, texts, characters = Counter(note["bad"]), [], 0
    unit = "row" if source.table is not None else "B"
    with progress_bar(source.size(), 0, unit, source.name) as bar:
        for file, row, raw in source.rows(note["file"], note["row"]):
            text, reason, exactly = source.keys.usable(raw)
            bar.update(raw.size)
            if reason is None:
                texts.append(text)
                characters += len(text)
            else:
                bad[reason] += 1
                if len(note["examples"]) < _EXAMPLES:
                    shown = f"{reason}: {exactly}" if exactly else reason
                    note["examples"].append(f"{source.place(file, row)}: {shown}")
            if len(texts) >= ROWS_A_FILE or characters >= CHARACTERS_A_FILE:
                note |= {"file": file, "row": row + 1, "bad": dict(bad)}
                _write_part(source, output, texts, note)
                output.save(name_of_note, note)
                texts, characters = [], 0

    note |= {"done": True, "bad": dict(bad)}
    if texts:
        _write_part(source, output, texts, note)
    if not note["rows"]:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in bad.items()) or "it has none"
        raise DataError(f"{source.name}: no row of {source.keys.address} can be used: {reasons}")
    for example in note["examples"]:
        logger.warning("%s: left out: %s", source.name, example)
    output.save(name_of_note, note)
    return note


def _write_part(source: OpenSource, output: Output, texts: list[str], note: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{source.name}/{len(note['files']):05d}.parquet"
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * len(texts), pa.int32()), [source.name])
    column, values = "text", pa.array(texts, pa.large_string())
    if source.keys.needs_chat_templating:
        # Messages of one source need not all have the same fields, so they have no type in common but JSON.
        json_type = pa.json_(pa.large_string())
        column, values = CHAT_COLUMN, pa.ExtensionArray.from_storage(json_type, values)
    table = pa.table({column: values, "source": labels.cast(pa.string())})
    staged = output.stage(output.folder / name)
    with staged.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
    output.commit(staged, output.folder / name)
    note["files"][name] = {"rows": len(texts), **describe(output.folder / name)}
    note["rows"] += len(texts)
    note["characters"] += sum(map(len, texts))


def arguments_of(sources: dict[str, SourceKeys]) -> dict[str, Any]:
    """For the recipe: all that a sources file says but the addresses, as data may move."""
    return {name: keys.model_dump(exclude={"address"}) for name, keys in sources.items()}
