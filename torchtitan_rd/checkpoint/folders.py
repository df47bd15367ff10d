"""The folder of a run's checkpoints: names, staging, the one commit, retention.

Rank 0 alone makes, renames and removes here; all ranks write into what it made. A checkpoint is a real folder
`step-N` with a manifest. Everything that this module makes, renames or removes has one of the names below;
whatever else lies in the folder, symbolic links included, is the user's and is never touched.
"""

import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from torchtitan_rd.checkpoint.config import CheckpointConfig
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger

STEP = re.compile(r"step-(0|[1-9][0-9]*)")
EXPORT = re.compile(r"step-([1-9][0-9]*)-(model|hf)")
MODEL_ONLY = re.compile(r"step-([1-9][0-9]*)-model")
CORRUPT = re.compile(r"step-[0-9]+\.corrupt(-[0-9a-f]{32})?")
SET_ASIDE = re.compile(r"step-[0-9]+(-model|-hf)?\.(?P<suffix>corrupt|superseded)(-[0-9a-f]{32})?")
LEFTOVER = re.compile(r"\.(tmp|trash)-step-[0-9]+(-model|-hf)?-[0-9a-f]{32}")
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.toml"
# Of the damaged ones, and of the superseded ones: enough to look at, and to go back to after a slip.
SET_ASIDE_KEPT = 3


class CheckpointFolder:
    """The checkpoints in `root`."""

    def __init__(self, root: Path):
        self.root = root

    def steps(self) -> list[int]:
        """The N > 0 of every entry named step-N, newest first, whether it is a good checkpoint or not."""
        return sorted((int(m[1]) for m in self._named(STEP) if m[1] != "0"), reverse=True)

    def quarantined(self) -> list[str]:
        """Names of the checkpoints that were set aside as damaged."""
        return sorted(m[0] for m in self._named(CORRUPT))

    def incomplete(self, above: int) -> list[str]:
        """Names of the folders of later steps that have no manifest, as after a copy that was cut off."""
        later = (self.root / f"step-{n}" for n in self.steps() if n > above)
        return [path.name for path in later if _is_real_folder(path) and not (path / MANIFEST).exists()]

    def new_staging(self, name: str) -> Path:
        """A fresh, empty folder to write checkpoint `name` in."""
        staging = self.root / f".tmp-{name}-{uuid.uuid4().hex}"
        staging.mkdir()
        return staging

    def commit(self, staging: Path, name: str) -> None:
        """Makes the finished `staging` the checkpoint `name`. The rename is the only commit."""
        target = self.root / name
        if target.is_symlink() or target.exists():
            raise CheckpointError(f"{target} is in the way and is not a checkpoint; move it")
        fsync(staging)
        staging.rename(target)
        fsync(self.root)

    def discard(self, staging: Path) -> None:
        """Removes an unfinished staging folder."""
        shutil.rmtree(staging, ignore_errors=True)

    def set_aside(self, name: str, suffix: str) -> str:
        """Renames checkpoint `name` to `name.suffix`, a name that nothing is loaded from;
        returns the new name.
        """
        source = self.root / name
        if not _is_real_folder(source):
            return name
        target = self.root / f"{name}.{suffix}"
        if target.exists():
            target = self.root / f"{name}.{suffix}-{uuid.uuid4().hex}"
        source.rename(target)
        fsync(self.root)
        return target.name

    def set_aside_from(self, step: int, own_name: str | None) -> None:
        """Sets aside what an abandoned branch left at `step` or later, before `own_name` is committed there;
        None: after `step`, where the checkpoint stays.

        It happens after `checkpoint.load_step` went back: a later resume must not mix the two branches,
        and an export of the abandoned one must not pass for this one's.
        """
        later = sorted(n for n in self.steps() if n > step)
        stale = [*([own_name] if own_name else []), *(f"step-{n}" for n in later)]
        exports = {m[0]: int(m[1]) for m in self._named(EXPORT)}
        for name, of_step in sorted(exports.items()):
            if of_step > step or (of_step == step and own_name and _is_checkpoint(self.root / own_name)):
                stale.append(name)
        for name in dict.fromkeys(stale):
            if _is_checkpoint(self.root / name) or (name in exports and _is_real_folder(self.root / name)):
                moved = self.set_aside(name, "superseded")
                logger.warning("%s is of an earlier run that this one replaces; it is now %s", name, moved)

    def purge(self, keep: int, is_good: Callable[[Path], bool]) -> None:
        """Removes checkpoints older than the newest `keep` good ones,
        and all but the last few that were set aside.

        A damaged checkpoint is nothing to fall back to: it does not count,
        and goes with the good ones of its age. Seeds and exports stay. keep: 0 removes nothing.
        """
        if keep == 0:
            return
        good = 0
        for step in self.steps():
            path = self.root / f"step-{step}"
            if not _is_checkpoint(path):
                continue
            if good == keep:
                self._remove(path)
            else:
                good += is_good(path)
        for suffix in ("corrupt", "superseded"):
            for path in self._set_aside_as(suffix)[SET_ASIDE_KEPT:]:
                logger.warning("removing %s: the last %d that were set aside are kept", path, SET_ASIDE_KEPT)
                self._remove(path)

    def _set_aside_as(self, suffix: str) -> list[Path]:
        """What was set aside under `suffix`, the last first; of one branch its newest step first."""
        paths = [self.root / m[0] for m in self._named(SET_ASIDE) if m["suffix"] == suffix]
        paths = [path for path in paths if _is_real_folder(path)]
        return sorted(paths, key=lambda path: (path.stat().st_ctime_ns, step_of(path.name)), reverse=True)

    def _remove(self, path: Path) -> None:
        trash = self.root / f".trash-step-{step_of(path.name)}-{uuid.uuid4().hex}"
        path.rename(trash)  # from here on no reader takes it for a checkpoint
        shutil.rmtree(trash)

    def remove_leftovers(self) -> None:
        """Removes the staging and trash folders of runs that died. Only for the owner of the lock."""
        for match in self._named(LEFTOVER):
            if _is_real_folder(self.root / match[0]):
                logger.warning("removing %s, left by a run that died", self.root / match[0])
                shutil.rmtree(self.root / match[0])

    def remove_unwanted(self) -> list[Path]:
        """Removes all that was set aside and all leftovers; returns what it was. As `remove_leftovers`."""
        removed = []
        for match in [*self._named(SET_ASIDE), *self._named(LEFTOVER)]:
            path = self.root / match[0]
            if _is_real_folder(path):
                shutil.rmtree(path)
                removed.append(path)
        return sorted(removed)

    def require_free(self, needed: int) -> None:
        """Raises CheckpointError unless `needed` bytes are free."""
        free = self.free_bytes()
        if free < needed:
            raise CheckpointError(
                f"{self.root}: a checkpoint needs {needed:,} bytes and {free:,} are free; free some space, "
                f"lower checkpoint.keep_latest_k or move job.dump_folder"
            )

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def _named(self, pattern: re.Pattern[str]) -> list[re.Match[str]]:
        if not self.root.is_dir():
            return []
        return [m for entry in self.root.iterdir() if (m := pattern.fullmatch(entry.name))]


def step_of(name: str) -> int | None:
    """The N of step-N, step-N-model, step-N.corrupt; None of other names."""
    match = re.match(r"step-([0-9]+)(?![0-9])", name)
    return int(match[1]) if match else None


def fsync(path: Path) -> None:
    """Forces a file's bytes, or a folder's list of names, to permanent storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Writes a new file, text as UTF-8, and forces it to permanent storage."""
    with path.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    fsync(path)


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_checkpoint(path: Path) -> bool:
    return _is_real_folder(path) and (path / MANIFEST).is_file()


def saved_states(config: CheckpointConfig, dump_folder: Path) -> list[Path]:
    """The `state.json` that a run may resume from, the likeliest first; none of them is verified."""
    checkpoints = CheckpointFolder(dump_folder / config.folder)
    steps = checkpoints.steps() if config.enable else []
    return [
        checkpoints.root / f"step-{n}" / STATE for n in sorted(steps, key=lambda n: n != config.load_step)
    ]
