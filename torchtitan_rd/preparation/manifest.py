"""The folder that a step of preparation writes: what it is made of, how far it has come, and its commit.

`manifest.json` says at first what the folder is being made of (`Recipe`) and at last what it holds. Until
then `.work` keeps what a further run of the same line needs; nothing in there is ever left in the result, so
a step that was killed and run again ends with the bytes of one that was not.
"""

import fcntl
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_rd import __version__
from torchtitan_rd.checkpoint.folders import fsync, write_durably
from torchtitan_rd.checkpoint.manifest import hash_files
from torchtitan_rd.errors import DataError
from torchtitan_rd.whole_file import NO_ROOM, reason_of

MANIFEST, WORK = "manifest.json", ".work"
_SHOWN = 4  # differences in one message


@dataclass(frozen=True)
class Recipe:
    """All that decides the bytes of a step's output.

    step: its name on the command line. arguments: flag -> value, plain. inputs: name of a file or source ->
    `{"size", "sha256"}` or what else tells its content. tokenizer: its digest. libraries: name -> version of
    those that the bytes depend on.
    """

    step: str
    arguments: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    tokenizer: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {
            "step": self.step,
            "version": __version__,
            "libraries": self.libraries,
            "arguments": self.arguments,
            "inputs": self.inputs,
            "tokenizer": self.tokenizer,
        }


class Output:
    """The folder of one step. `open` begins it, or continues what the same recipe began."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder = folder
        self.work = folder / WORK
        self._recipe = recipe

    @classmethod
    def open(cls, folder: Path, recipe: Recipe) -> "Output":
        """Raises DataError if the folder holds something else, was made of something else, or cannot be."""
        output = cls(folder, recipe)
        with disk_errors(folder):
            try:
                output._begin()
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise
                raise DataError(
                    f"{folder}: cannot be written: {error.strerror or error}; name another output folder"
                ) from None
        output.require_same()
        if output.result:
            shutil.rmtree(output.work, ignore_errors=True)  # of a run that was killed between the two
        return output

    def _begin(self) -> None:
        """Writes the manifest of a folder that has none yet."""
        folder = self.folder
        # Listed first: another task that begins the same folder writes its manifest before anything else.
        listed = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if not (folder / MANIFEST).exists():
            if others := [name for name in listed if name not in (WORK, MANIFEST)]:
                raise DataError(
                    f"{folder}: is not empty ({', '.join(sorted(others)[:_SHOWN])}) and has no {MANIFEST}; "
                    "name another output folder"
                )
            self.work.mkdir(parents=True, exist_ok=True)
            begun = json.dumps({**self._recipe.as_dict(), "complete": False}, indent=1, sort_keys=True)
            self.write_first(folder / MANIFEST, begun + "\n")

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished folder holds, None before that."""
        content = read_manifest(self.folder)
        return content if content["complete"] else None

    def require_same(self) -> None:
        """Raises DataError, naming what differs, unless the folder is made of this recipe."""
        begun = read_manifest(self.folder)
        wanted = json.loads(json.dumps(self._recipe.as_dict()))
        lines = _differences(begun, wanted)
        if lines:
            more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            raise DataError(
                f"{self.folder}: was made with something else: {'; '.join(lines[:_SHOWN])}{more}. "
                "Name another output folder, or remove this one"
            )

    def write_first(self, path: Path, text: str) -> None:
        """Writes a file unless another process was first; either way it is complete when it has the name."""
        staged = self.work / f"{path.name}.{uuid.uuid4().hex}"
        write_durably(staged, text)
        try:
            os.link(staged, path)
        except FileExistsError:
            pass
        finally:
            staged.unlink()
        fsync(path.parent)

    def write(self, path: Path, content: str | bytes) -> None:
        """Writes or replaces a file below the folder, in one step and durably."""
        staged = self.stage(path)
        try:
            write_durably(staged, content)
            self.commit(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise

    def stage(self, path: Path) -> Path:
        """A name in `.work` that a new file can be written under."""
        self.work.mkdir(exist_ok=True)
        return self.work / f"{'-'.join(path.relative_to(self.folder).parts)}.{uuid.uuid4().hex}"

    def commit(self, staged: Path, path: Path) -> None:
        """Gives the finished file its name, in place of one that has it."""
        fsync(staged)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(path)
        fsync(path.parent)

    @contextmanager
    def making(self, name: str) -> Iterator[dict[str, Any] | None]:
        """What the finished folder holds; else None, and no second process is at the same part of the work.
        Raises DataError if one is, and where there is no room.
        """
        with disk_errors(self.folder):
            if done := self.result:
                yield done
                return
            with self.locked(name):
                # Another process may have finished the folder between the two.
                yield self.result

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keeps a second process from the same part of the work. Raises DataError if one is at it."""
        self.work.mkdir(exist_ok=True)
        with (self.work / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            except BlockingIOError:
                raise DataError(
                    f"{self.folder}: another process is making {name} of it; wait for it, or stop it"
                ) from None
            yield
        if self.result:  # and another process had finished the folder before this one made `.work` anew
            shutil.rmtree(self.work, ignore_errors=True)

    def load(self, name: str) -> dict[str, Any] | None:
        """The progress kept as `name`, None if there is none."""
        path = self.work / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, name: str, progress: dict[str, Any]) -> None:
        self.write(self.work / name, json.dumps(progress, sort_keys=True))

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Commits: the manifest says what the folder holds, and what only the work needed goes."""
        content = {**read_manifest(self.folder), **results, "complete": True}
        self.write(self.folder / MANIFEST, json.dumps(content, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(self.work, ignore_errors=True)
        return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises DataError if there is none that can be read."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: has no {MANIFEST}; was it made by `torchtitan-rd data`?") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or "complete" not in content or "step" not in content:
        raise DataError(f"{path}: is no manifest of `torchtitan-rd data`")
    return content


def read_finished(folder: Path, step: str) -> dict[str, Any]:
    """The manifest of what `step` has made. Raises DataError unless it is complete."""
    content = read_manifest(folder)
    if content["step"] != step or not content["complete"]:
        found = f"is of `data {content['step']}`" if content["step"] != step else "is not complete"
        raise DataError(f"{folder}: {MANIFEST} {found}; run `torchtitan-rd data {step}` to its end")
    return content


def describe(file: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    return hash_files(file.parent, [file.name])[file.name].model_dump()


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Raises DataError unless a file is what the manifest of `folder` says; reads every byte."""
    if not (folder / name).is_file():
        raise DataError(f"{folder / name}: is missing, but stands in {MANIFEST}")
    found = describe(folder / name)
    if any(found[key] != expected[key] for key in found):
        raise DataError(
            f"{folder / name}: is not the file that {MANIFEST} describes (size {found['size']:,}, expected "
            f"{expected['size']:,}): it is damaged, or was replaced"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk into one message."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DataError(
            f"{folder}: no room to write ({reason_of(error, folder)}): free some space or raise the quota, "
            "then run the same line again: it goes on where it stopped"
        ) from error


def progress_bar(total: int, done: int, unit: str, title: str) -> Any:
    """A bar with the time that remains, on stderr where that is a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=done, unit=unit, unit_scale=True, desc=title, disable=not sys.stderr.isatty()
    )


def _differences(begun: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    if begun["step"] != wanted["step"]:
        return [f"it is of `data {begun['step']}`, not `data {wanted['step']}`"]
    lines = []
    for name in sorted({*begun["arguments"], *wanted["arguments"]}):
        before, now = begun["arguments"].get(name), wanted["arguments"].get(name)
        if before != now:
            lines.append(f"--{name} was {_short(before)} and is {_short(now)}")
    for name in sorted({*begun["inputs"], *wanted["inputs"]}):
        before, now = begun["inputs"].get(name), wanted["inputs"].get(name)
        if before is None or now is None:
            lines.append(f"input {name} is {'new' if before is None else 'gone'}")
        elif before != now:
            keys = [key for key in {*before, *now} if before.get(key) != now.get(key)]
            lines.append(f"input {name} has another {' and '.join(sorted(keys))}")
    if begun["tokenizer"] != wanted["tokenizer"]:
        lines.append("the tokenizer is another one")

    # A finished folder is what it is; half of one must not be continued by a program that writes otherwise.
    if not begun["complete"]:
        made_by = [{"torchtitan_rd": c["version"], **c["libraries"]} for c in (begun, wanted)]
        lines += [
            f"{name} was {made_by[0].get(name)} and is {made_by[1].get(name)}"
            for name in sorted({*made_by[0], *made_by[1]})
            if made_by[0].get(name) != made_by[1].get(name)
        ]
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
