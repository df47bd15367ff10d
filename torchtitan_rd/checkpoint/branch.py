"""`load_step` and `exclude_from_loading` act once, however often the command that holds
them is started again.

Each checkpoint records what the command that wrote it had asked of loading. A later start with the same
request has been served by such a checkpoint already, and goes on from it like any other run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan_rd.checkpoint.folders import STATE, CheckpointFolder
from torchtitan_rd.checkpoint.manifest import check_file, read_manifest, second_look
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger

BRANCH = "branch"  # the key in state.json; absent where nothing was asked


def record(load_step: int, excluded: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint says of the request of the run that writes it: entries for state.json."""
    asked: dict[str, Any] = {}
    if load_step != -1:
        asked["branched_from"] = load_step
    if excluded:
        asked["excluded"] = list(excluded)
    return {BRANCH: asked} if asked else {}


def still_to_exclude(excluded: Sequence[str], state: Mapping[str, Any]) -> list[str]:
    """The names of `excluded` that did not start afresh on the way to the checkpoint with
    this `state` already.
    """
    done = state.get(BRANCH, {}).get("excluded", [])
    return [name for name in excluded if name not in done]


def descendants(root: Path, newer: Sequence[int], load_step: int) -> list[int]:
    """Those of the steps `newer` (newest first) that a run with this `load_step` wrote
    after it had gone back.

    The newest step that can be read tells of which branch all of them are, since the first save of a branch
    sets the other one aside. If it is this branch, steps above it that cannot be read count too:
    verification will say more.
    """
    for step in newer:
        try:
            branch = _branch_of(root / f"step-{step}")
        except CheckpointError:
            continue
        return list(newer) if branch.get("branched_from") == load_step else []
    return []


def steps_to_try(folder: CheckpointFolder, wanted: int) -> list[int]:
    """The steps that a run with `load_step = wanted` may go on from, in order. Raises CheckpointError."""
    steps = folder.steps()
    if wanted == -1 and not steps and (damaged := folder.quarantined()):
        raise CheckpointError(
            f"{folder.root} holds only damaged checkpoints ({', '.join(damaged)}); "
            f"move them, or set another checkpoint.folder, to start afresh"
        )
    if wanted == -1:
        return steps
    newer = [n for n in steps if n > wanted]
    if served := descendants(folder.root, newer, wanted):
        logger.info("checkpoint.load_step = %d has acted: steps %s branched from it", wanted, served)
    elif wanted not in steps:
        raise CheckpointError(f"checkpoint.load_step = {wanted}: {folder.root} has the steps {steps}")
    elif newer:
        logger.warning("going back to step %d: steps %s are set aside at the next save", wanted, newer)
    return served + [wanted] * (wanted in steps)


def steps_behind(folder: CheckpointFolder, before: int, load_step: int, excluded: Sequence[str]) -> list[int]:
    """The steps below `before`, newest first, to which a run may go back in its midst: none of a branch that
    it has left, whose steps stay until its first save, and none on which its exclusions would act anew, as
    what it excludes would then keep the values of now.
    """
    steps = folder.steps()
    newer = [n for n in steps if n > load_step] if load_step != -1 else []
    left = {*newer} - {*descendants(folder.root, newer, load_step)}

    def is_whole(step: int) -> bool:
        try:
            state = {BRANCH: _branch_of(folder.root / f"step-{step}")}
        except CheckpointError:
            return True  # verification will say more
        return not still_to_exclude(excluded, state)

    own = [n for n in steps if n < before and n not in left]
    return [n for n in own if is_whole(n)] if excluded else own


def _branch_of(folder: Path) -> dict[str, Any]:
    """The record of one checkpoint. Raises CheckpointError unless its state is what the manifest says."""
    manifest = read_manifest(folder)
    if STATE not in manifest.files:
        return {}
    if problems := check_file(folder, STATE, manifest.files[STATE], hashes=True):
        raise CheckpointError("; ".join(problems))
    try:
        return json.loads(second_look(lambda: (folder / STATE).read_bytes())).get(BRANCH, {})
    except OSError as error:
        raise CheckpointError(str(error)) from None
