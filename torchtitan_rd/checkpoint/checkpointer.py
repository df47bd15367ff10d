"""Saves and loads the state of a run, exactly and safely.
docs/checkpoints.md tells the protocol and its promises.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tomli
import tomli_w
import torch
from torch import Tensor

from torchtitan_rd.checkpoint import branch, contract, loading, rank_state
from torchtitan_rd.checkpoint.arranged_rows import RowOrders
from torchtitan_rd.checkpoint.config import CheckpointConfig
from torchtitan_rd.checkpoint.folders import CONFIG, STATE, CheckpointFolder
from torchtitan_rd.checkpoint.loading import TensorReader, Tensors
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.checkpoint.manifest import is_damage, tensor_table, verify
from torchtitan_rd.checkpoint.rank_group import RankGroup
from torchtitan_rd.checkpoint.safe_reader import METADATA, MODEL_SHAPE, SafeReader
from torchtitan_rd.checkpoint.save_time import SaveTime
from torchtitan_rd.checkpoint.saves import Saves
from torchtitan_rd.checkpoint.writer import Snapshot, Writer, find_aliases
from torchtitan_rd.config_values import without_none
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.log import logger


class Checkpointer:
    """The checkpoints of one run. Collective: every rank makes it and calls its methods alike.

    job_config: {section: {key: value}}, stored with each checkpoint and compared on resume.
    must_match: the `section.key` that must not change within a run.
    model_shape: name, flavor and every field of the model, as JSON values.
    shape_defaults: fields of it that have a default, which a checkpoint may be too old to know.
    arithmetic: those of its fields that are told if initial weights were made with others
        (`ModelSpec.arithmetic`).
    open_released: folder of released weights -> a reader of them, for `initial_load_path`;
        raises CheckpointError.
    run_lock: rank 0's lock of a folder around this one, which is then enough.
        The checkpoints have a lock of their own without it, and where a symbolic link leads them elsewhere.
    row_orders: of the matrices whose rows this run has arranged otherwise than checkpoints have them.
    grace: seconds from a signal to the kill, where the launcher says it and `grace_seconds` does not.

    Raises CheckpointError if a living run uses the folder, ConfigError if `async_mode` cannot work here.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        dump_folder: Path,
        job_config: Mapping[str, Mapping[str, Any]],
        must_match: frozenset[str],
        model_shape: Mapping[str, Any],
        shape_defaults: Mapping[str, Any] | None = None,
        arithmetic: Collection[str] = (),
        open_released: Callable[[Path], TensorReader] | None = None,
        run_lock: FolderLock | None = None,
        row_orders: RowOrders | None = None,
        grace: float | None = None,
    ):
        if config.async_mode == "async_with_pinned_mem" and not torch.cuda.is_available():
            raise ConfigError('checkpoint.async_mode = "async_with_pinned_mem" needs CUDA; use "async" here')

        self.config = config
        # `model.*` names are of initial weights only: a resume that reset the head would not be one.
        self._excluded = [n for n in config.exclude_from_loading if not contract.is_excluded(n, ["model"])]
        self.must_match = must_match
        self._open_released = open_released
        self._config_text = tomli_w.dumps(without_none(job_config))
        self._arithmetic = arithmetic
        self._shape_defaults = shape_defaults or {}
        self._model_text = json.dumps(model_shape, indent=1, sort_keys=True)

        self._folder = CheckpointFolder(Path(dump_folder) / config.folder)
        # A group must not be used by two threads at once: while a save is in flight `_ranks` is its writer's,
        # and this thread asks `_world`; at all other times this thread may use both.
        self._world = RankGroup()
        self._ranks = RankGroup(config.timeout_seconds) if config.enable else self._world
        self._run_lock = run_lock
        self._lock = run_lock
        if config.enable:
            self._ranks.from_rank0(self._take_folder)
        self._row_orders = row_orders or {}
        writer = Writer(self._folder, self._ranks, self._lock, config.keep_latest_k, self._row_orders)
        saves_here = config.enable and self._world.rank == 0
        save_time = SaveTime(Path(dump_folder), (config.grace_seconds or grace) if saves_here else None)
        self._saves = Saves(config, writer, save_time)
        self._last_save = time.monotonic()

    def should_save(self, step: int, *, last_step: bool) -> bool:
        """Whether to save now. In seconds mode rank 0's clock decides, so every rank must ask
        at every step.
        """
        if not self.config.enable:
            return False
        if self.config.interval_type == "steps":
            return last_step or step % self.config.interval == 0
        due = self._world.from_rank0(lambda: time.monotonic() - self._last_save >= self.config.interval)
        return last_step or due

    def save(
        self,
        step: int,
        tensors: Tensors,
        state: Mapping[str, Any],
        *,
        own_state: Mapping[str, Any] | None = None,
        last_step: bool = False,
        required: bool = False,
    ) -> None:
        """Saves step `step`; in the async modes it returns once the tensors are copied.

        tensors: {"model": {fqn: tensor}, "optimizer": {...}},
            DTensors or tensors that are equal on every rank.
        state: JSON values, equal on every rank. own_state: those of this rank, with the same keys on every
        rank; `load` gives them back among the others, if the number of ranks is the same.
        Step 0 is a seed and holds only `tensors["model"]`, as does the last step under
        `last_save_model_only`. required: no later save makes up for this one, so it may not fail.
        Raises CheckpointError, on every rank, if this save or the previous one failed, unless
        `checkpoint.on_save_error` lets the run go on.
        """
        self.wait()
        export = last_step and self.config.last_save_model_only
        if step == self._saves.step and not export:
            logger.info("step %d is saved already", step)
            return
        self._last_save = time.monotonic()
        snapshot = self._snapshot(step, tensors, state, own_state or {}, export)
        self._saves.begin(snapshot, self._last_save, required=required)

    def has_saved(self) -> bool:
        """Whether this rank's share of the save in flight is written, or has failed;
        False if none is in flight.
        """
        return self._saves.has_ended()

    def wait(self) -> None:
        """Waits for the save in flight. Raises CheckpointError on every rank if it failed, unless
        `checkpoint.on_save_error` lets the run go on.
        """
        self._saves.wait()

    def describe(self) -> dict[str, int]:
        """For a row of metrics, where a run goes on after a failed save: how many have failed."""
        return {"failed_saves": self._saves.errors.total} if self.config.on_save_error == "warn" else {}

    def is_committed(self, step: int) -> bool:
        """Whether the run can go on from `step`. Not while its save is in flight."""
        return not self._saves.is_in_flight() and self._saves.step == step

    def lost_at(self, step: int) -> str:
        """What a run that ended now, at `step`, would lose; for any thread."""
        saved = self._folder.steps() if self.config.enable else []
        newest = max((one for one in saved if one <= step), default=0)  # not of a branch that was left
        if newest == step:
            return "nothing is lost"
        if newest:
            return f"the steps after {newest} are lost"
        return f"all {step} steps are lost: there is no checkpoint"

    def load(self, tensors: Tensors) -> dict[str, Any] | None:
        """Resumes: fills `tensors` in place from the newest good checkpoint, and returns its state.

        Returns None if there is no checkpoint. Damaged ones newer than the one loaded are renamed to
        `step-N.corrupt`; those that the storage did not let be read stay, and are superseded by the next
        save. Raises CheckpointError if all are damaged (and changes nothing), if the one named by
        `checkpoint.load_step` is, or if the checkpoint is of another model, other tensors or settings
        that must not change.
        """
        if not self.config.enable:
            return None
        return self._load_first(
            tensors,
            self._ranks.from_rank0(lambda: branch.steps_to_try(self._folder, self.config.load_step)),
        )

    def go_back(self, tensors: Tensors, before: int) -> dict[str, Any] | None:
        """As `load`, in the midst of a run, from its newest good checkpoint of a step below `before`; all
        later ones are set aside as superseded. Without one it changes nothing and returns None.
        """
        self.wait()
        asked = (self.config.load_step, self._excluded)
        older = self._ranks.from_rank0(lambda: branch.steps_behind(self._folder, before, *asked))
        state = self._load_first(tensors, older)
        if state is not None:
            self._ranks.from_rank0(lambda: self._folder.set_aside_from(state["step"], None))
        return state

    def _load_first(self, tensors: Tensors, candidates: Iterable[int]) -> dict[str, Any] | None:
        refused: dict[str, list[str]] = {}
        for step in candidates:
            path = self._folder.root / f"step-{step}"
            problems = self._verify(path)
            if not problems:
                damaged = [name for name, found in refused.items() if is_damage(found)]
                # `load_step` passes over these without a look;
                # the save of such a step would find them in its way.
                passed_over = self._ranks.from_rank0(partial(self._folder.incomplete, step))
                return self._resume(path, tensors, list(dict.fromkeys(damaged + passed_over)))

            refused[path.name] = problems
            logger.warning("%s is damaged: %s", path, "; ".join(problems))

        if not refused:
            return None
        lines = "\n".join(f"  {name}: {'; '.join(problems)}" for name, problems in refused.items())
        raise CheckpointError(
            f"no checkpoint to resume from in {self._folder.root}:\n{lines}\nnothing was changed; "
            f"repair or move these, or set another checkpoint.folder to start afresh"
        )

    def load_initial(self, model: Mapping[str, Tensor]) -> Path | None:
        """Fills `model` in place from the `step-0` seed or `checkpoint.initial_load_path`;
        returns what was loaded.

        Tensors that it lacks, or that `exclude_from_loading` names, keep their values, and each is logged; a
        type may differ and is converted, which is logged. Raises CheckpointError if it is missing, damaged,
        has other shapes or is cut into heads of another width.
        """
        own = self._folder.root if self.config.enable else None
        candidates = self._ranks.from_rank0(
            lambda: loading.initial_candidates(own, self.config.initial_load_path)
        )

        refused = []
        for path in candidates:
            if self._ranks.from_rank0(partial(loading.has_checksums, path)):
                problems = self._verify(path)
            else:
                logger.warning("%s has no checksums: damage to it would not be seen", path)
                problems = []

            if not problems:
                self._load_initial_from(path, model)
                return path
            refused.append(f"{path} is damaged: {'; '.join(problems)}")
            logger.warning("%s", refused[-1])

        if refused:
            raise CheckpointError("no initial weights:\n  " + "\n  ".join(refused))
        return None

    def _load_initial_from(self, path: Path, model: Mapping[str, Tensor]) -> None:
        reader = self._reader_of(path)
        saved, wanted = reader.model_shape(), json.loads(self._model_text)
        contract.check_heads(saved, wanted, str(path))
        for line in contract.arithmetic_differences(saved, wanted, self._arithmetic):
            logger.warning("initial weights: %s", line)
        excluded = self.config.exclude_from_loading
        loading.load_initial_weights(reader, path, model, excluded, self._ranks, self._row_orders)

    def close(self, patience: float | None = None) -> None:
        """Waits for the save in flight and gives the folder free. Idempotent;
        before destroy_process_group.

        patience: seconds after which the save is given up; for a run that has lost a rank, without which no
        save ends (`leave_stuck_saves`).
        """
        given_up = patience is not None and self._saves.give_up_after(patience)
        try:
            self.wait()
        finally:
            self._saves.close()
            if self._lock is not None and self._lock is not self._run_lock:
                self._lock.release()
            self._lock = None
            if not given_up:  # its thread still uses the group
                self._ranks.close()

    def _reader_of(self, path: Path) -> TensorReader:
        if (path / METADATA).exists() or self._open_released is None:
            return SafeReader(path, prefix="model.")
        return self._ranks.agree_on_own(partial(self._open_released, path))

    def export(self, step: int, write: Callable[[Path, Path], None]) -> None:
        """Calls `write(checkpoint, folder to make)` on rank 0 for the saved step,
        unless its export exists already.

        Collective. Raises CheckpointError on every rank if it fails.
        """
        self.wait()
        source, target = (self._folder.root / f"step-{step}{end}" for end in ("", "-hf"))
        exported = self._folder.root / f"step-{step}-model"

        def convert() -> None:
            if target.exists():
                logger.info("%s is there already", target)
            else:
                write(exported if exported.is_dir() else source, target)

        self._ranks.from_rank0(convert)

    def _take_folder(self) -> None:
        self._folder.root.mkdir(parents=True, exist_ok=True)
        if self._run_lock is None or not self._run_lock.covers(self._folder.root):
            self._lock = FolderLock(self._folder.root)
        self._folder.remove_leftovers()

    def _snapshot(
        self,
        step: int,
        tensors: Tensors,
        state: Mapping[str, Any],
        own_state: Mapping[str, Any],
        export: bool,
    ) -> Snapshot:
        resumable = step > 0 and not export
        kept = {
            group: {name: tensor.detach() for name, tensor in members.items()}
            for group, members in tensors.items()
            if resumable or group == "model"
        }
        aliases = self._ranks.from_rank0(lambda: find_aliases(kept))
        stored = loading.select(kept, list(aliases))
        if export:
            dtype = getattr(torch, self.config.export_dtype)
            kept, stored = ({"model": loading.converted(found["model"], dtype)} for found in (kept, stored))
        documents = {CONFIG: self._config_text, MODEL_SHAPE: self._model_text}
        own_documents: dict[str, str] = {}
        if resumable:
            own, own_documents = rank_state.divide(own_state, self._ranks)
            asked = branch.record(self.config.load_step, self._excluded)
            documents[STATE] = json.dumps({**state, **own, **asked}, indent=1)
        name = f"step-{step}-model" if export else f"step-{step}"
        return Snapshot(name, step, resumable, stored, aliases, tensor_table(kept), documents, own_documents)

    def _verify(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint; collective, each rank reads its share of the files."""
        share = (self._ranks.rank, self._ranks.world_size)
        found = self._ranks.agree(lambda: verify(path, hashes=self.config.verify_hashes, share=share))
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    def _resume(self, path: Path, tensors: Tensors, damaged: list[str]) -> dict[str, Any]:
        manifest, shape, config, state = self._ranks.from_rank0(lambda: loading.read_documents(path))
        contract.check_model_shape(shape, json.loads(self._model_text), str(path), self._shape_defaults)
        for line in contract.check_config(config, tomli.loads(self._config_text), self.must_match, str(path)):
            logger.warning("setting changed since the checkpoint: %s", line)

        excluded = branch.still_to_exclude(self._excluded, state)
        contract.check_exclusions(excluded, [*manifest.tensors, *contract.flat_keys(state)], str(path))
        wanted = loading.select(tensors, excluded)
        saved = {
            key: entry for key, entry in manifest.tensors.items() if not contract.is_excluded(key, excluded)
        }
        contract.check_tensors(saved, tensor_table(wanted), str(path))
        if excluded:
            logger.warning("not loading %s: checkpoint.exclude_from_loading", ", ".join(excluded))

        loading.read_tensors(SafeReader(path), wanted, self._ranks, self._row_orders)

        # Not before: a checkpoint that turns out to be another run's leaves the folder as it was.
        for name in damaged:
            moved = self._ranks.from_rank0(partial(self._folder.set_aside, name, "corrupt"))
            if moved != name:
                logger.warning("%s is now %s", name, moved)

        self._saves.step = manifest.step
        logger.info("resumed from %s", path)
        state = rank_state.unite(state, path, manifest, self._ranks)
        state.pop(branch.BRANCH, None)
        return contract.prune(state, excluded)
