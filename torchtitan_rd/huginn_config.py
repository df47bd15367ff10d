"""Reads the run configs of Huginn's trainer (recurrent-pretraining), flat YAML tables, as ours.

Counts of microbatches become counts of updates by the rule of docs/migration.md. A setting that asks for
what is not built is an error, all of them in one; those on which no result depends are named in one warning.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan_rd import huginn_keys as keys
from torchtitan_rd.config_file import Foreign
from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import expand_variables
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.raven.released import BLOCK_OF


def translate(path: Path, table: Mapping[str, Any], *, ranks: int) -> Foreign | None:
    """What a run config says in our keys, on so many ranks; None for any other file.

    Raises one ConfigError with all that cannot be carried over.
    """
    marks = ("model_name", "world_batch_size", "micro_batch_size", "optim_config", "model_overwrite")
    if not any(mark in table for mark in marks):
        return None
    reading = _Reading(dict(table), ranks)
    reading.single_fields()
    reading.model()
    reading.optimizer()
    reading.schedule()
    reading.data()
    reading.fabric()
    reading.rest()
    if reading.problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(reading.problems)))
    notes = list(reading.notes)
    if reading.ignored:
        notes.append(f"not carried over, as no result depends on it here: {', '.join(reading.ignored)}")
    return Foreign(reading.settings, [f"{path}: {note}" for note in notes])


@dataclass
class _Reading:
    """One config on its way. ignored: fields as they were written, without effect here."""

    table: dict[str, Any]
    ranks: int
    settings: list[tuple[str, Any, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, name: str) -> None:
        """None: ours keeps its default."""
        if value is not None:
            self.settings.append((key, value, name))

    def take(self, name: str, default: Any) -> Any:
        value = self.table.get(name, default)
        return default if value is None else value

    def number(self, name: str, default: float, least: float = 0) -> float:
        """A number, and `default` with a problem noted where it is none."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            self.problems.append(f"{name} = {value!r} must be a number of at least {least:g}")
            return default
        return value

    def group(self, name: str) -> dict[str, Any]:
        """A nested table; empty where there is none."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            self.problems.append(f"{name} = {value!r} must be a table of settings")
            return {}
        return value

    def refuse(self, name: str, value: Any, remedy: str) -> None:
        self.problems.append(f"{name} = {value!r} cannot be carried over: {remedy}")

    def single_fields(self) -> None:
        for name, row in keys.FIELDS.items():
            theirs = self.take(name, row.default)
            try:
                self.set(row.new, None if theirs is None else row.convert(theirs), name)
            except (ConfigError, TypeError, ValueError) as error:
                self.refuse(name, theirs, str(error))
        if self.take("logger_project", None) is not None:
            self.set("metrics.enable_wandb", True, "logger_project")
        self.set("recurrence.draw_per", "microbatch", "model_name")

    def model(self) -> None:
        if self.take("model_name", None) is None:
            self.problems.append("model_name is missing")
            return
        name = str(self.table["model_name"])
        flavor = keys.FLAVORS.get(name, name)
        self.set("model.name", "raven", "model_name")
        self.set("model.flavor", flavor, "model_name")
        shapes = get_spec("raven").flavors
        if flavor not in shapes:
            self.problems.append(f"model_name = {name!r} is no flavor of raven{nearest(name, shapes)}")
            return

        given = self.group("model_overwrite")
        rope = given.get("rope_settings")
        if isinstance(rope, dict):
            given = {key: value for key, value in given.items() if key != "rope_settings"}
            given |= {f"rope_settings.{key}": value for key, value in rope.items()}
        if "vocab_size" not in given:  # packed rows do not say it
            self.set("model.vocab_size", shapes[flavor].vocab_size, "model_name")
        for key, value in given.items():
            self.model_field(key, value)
        self.lockstep(given)

    def model_field(self, key: str, value: Any) -> None:
        place = f"model_overwrite.{key}"
        if key in ("lockstep_n", "lockstep_k"):
            return
        if key == "block_size":
            if value != self.take("block_size", keys.FIELDS["block_size"].default):
                self.refuse(place, value, "it must be block_size, the context that is trained")
        elif key == "block_class_name" and str(value) in BLOCK_OF:
            self.set("model.overrides.block", BLOCK_OF[value], place)
        elif key == "activation_checkpoint_impl" and str(value) in keys.REGIONS:
            self.set("activation_checkpoint.recurrent_region", keys.REGIONS[value], place)
        elif key in keys.MODEL_FIELDS:
            self.set(keys.MODEL_FIELDS[key], value, place)
        elif key in keys.MODEL_WITHOUT_EFFECT:
            self.ignored.append(f"{place} = {value!r}")
        elif value not in keys.MODEL_HARMLESS.get(key, ()):
            self.refuse(place, value, self.remedy_of(key))

    def remedy_of(self, key: str) -> str:
        """For a field of the model whose value is not built, or that there is not."""
        if key in keys.MODEL_HARMLESS:
            return "leave it out, or " + " or ".join(map(repr, keys.MODEL_HARMLESS[key]))
        known = {*keys.MODEL_FIELDS, *keys.MODEL_HARMLESS, *keys.MODEL_WITHOUT_EFFECT, "block_class_name"}
        return f"there is no such field here{nearest(key, sorted(known))}"

    def lockstep(self, given: Mapping[str, Any]) -> None:
        n, k = (given.get(name, False) for name in ("lockstep_n", "lockstep_k"))
        if n is not k:
            self.refuse("model_overwrite.lockstep_n", n, f"lockstep_k is {k!r}; here both are one key")
        self.set("recurrence.lockstep", n, "model_overwrite.lockstep_n")

    def optimizer(self) -> None:
        name = str(self.take("optimizer", "AdamW"))
        if name not in keys.OPTIMIZERS:
            self.refuse(
                "optimizer", name, f"here are {', '.join(keys.OPTIMIZERS)}; for Kellers and SOAP, Muon"
            )
            return
        self.set("optimizer.name", name, "optimizer")
        given = self.group("optim_config") if "optim_config" in self.table else keys.OPTIM_CONFIG
        values = {**keys.OPTIMIZERS[name], **given}

        betas, buffer = values.pop("betas"), values.pop("buffer_dtype", None)
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            self.refuse("optim_config.betas", betas, "it must be a pair of numbers")
        else:
            self.set("optimizer.beta1", betas[0], "optim_config.betas")
            self.set("optimizer.beta2", betas[1], "optim_config.betas")
        if buffer is not None:
            self.set(
                "optimizer.buffer_dtype", keys.BUFFERS.get(str(buffer), buffer), "optim_config.buffer_dtype"
            )

        known = ("lr", "eps", "weight_decay", *(keys.ELLIS_FLAGS if name == "ELLISAdam" else ()))
        for key, value in values.items():
            if key in known:
                self.set(f"optimizer.{key}", value, f"optim_config.{key}")
            elif key in ("fused", "foreach", "amsgrad") and not (key == "amsgrad" and value):
                self.ignored.append(f"optim_config.{key} = {value!r}")
            else:
                self.refuse(f"optim_config.{key}", value, f"no option of {name} here{nearest(key, known)}")

        lr, floor = values["lr"], self.number("min_lr", 4e-5)
        if isinstance(lr, int | float) and lr > 0:
            self.set("lr_scheduler.min_lr_factor", floor / lr, "min_lr")

    def schedule(self) -> None:
        world, micro = (
            int(self.number(name, keys.FIELDS[name].default, 1))
            for name in ("world_batch_size", "micro_batch_size")
        )
        if world % (micro * self.ranks):
            self.problems.append(
                f"world_batch_size = {world} is not a multiple of micro_batch_size = {micro} times the "
                f"{self.ranks} ranks"
            )
            return
        block = self.number("block_size", keys.FIELDS["block_size"].default, 1)
        if "max_tokens" in self.table and "max_steps" in self.table:
            self.problems.append("max_tokens and max_steps both say how long to train: leave one of them out")
        tokens = self.number("max_tokens", 1e12, 1)
        length = int(self.number("max_steps", tokens // (self.ranks * micro * block), 1))
        updates = Updates(world // (micro * self.ranks), int(self.number("batch_size_ramp", 0)))

        names = ("warmup_steps", "cooldown_steps")
        warmup, cooldown = (int(self.number(name, 0)) for name in names)
        whole, flat = updates.in_first(length), updates.in_first(max(length - cooldown, 0))
        steps, ramps = int(whole), (round(updates.in_first(warmup)), round(whole - flat))
        self.set("training.steps", steps, "max_steps" if "max_steps" in self.table else "max_tokens")
        self.set("lr_scheduler.convention", "huginn", "lr_schedule")
        for name, count in zip(names, ramps, strict=True):
            self.set(f"lr_scheduler.{name}", count, name)
        if updates.ramp:
            self.set("training.batch_ramp_steps", updates.ramp, "batch_size_ramp")
            self.set("training.batch_ramp_stages", updates.microbatches, "batch_size_ramp")

        for name, key, default in (
            ("log_step_interval", "metrics.log_freq", 1),
            ("save_step_interval", "checkpoint.interval", 2000),
            ("eval_step_interval", "validation.freq", 2000),
        ):
            self.set(key, max(1, round(self.number(name, default, 1) / updates.microbatches)), name)
        self.set("checkpoint.enable", True, "save_step_interval")
        self.set("checkpoint.keep_latest_k", 0, "save_step_interval")
        self.notes.append(
            f"an update is {updates.microbatches} x {micro} sequences on each of {self.ranks} ranks"
            f"{' once the batch has grown' if updates.ramp else ''}: {length} microbatches are {steps} "
            f"updates, {ramps[0]} of them to warm up, {ramps[1]} to cool down (docs/migration.md)"
        )

    def data(self) -> None:
        config = self.take("data_config", {})
        if isinstance(config, str):
            config = self.read_data_config(Path(expand_variables(config)))
        if not isinstance(config, dict):
            self.problems.append(f"data_config = {config!r} must be a table, or the path of one as JSON")
            config = {}
        self.set("training.dataset", "packed", "data_config")
        self.source(config.get("train_data"), "training", "data_config.train_data")
        shuffled = self.take("shuffle_filenames", True) or self.take("shuffle_blocks", True)
        self.set("training.shuffle_seed", self.take("seed", 1337) if shuffled else None, "shuffle_blocks")
        if self.take("pad_to_block_size", False):
            self.notes.append(
                "pad_to_block_size: the ids of padding and of the end of a text are the tokenizer's there; "
                "set training.pad_id and training.eos_id (of Huginn's tokenizer: 65509 and 65505)"
            )

        held_out = config.get("val_data")
        batches = int(self.number("eval_iters", 100))
        if held_out and batches:
            micro = int(self.number("micro_batch_size", keys.FIELDS["micro_batch_size"].default, 1))
            self.set("validation.enable", True, "data_config.val_data")
            self.set("validation.dataset", "packed", "data_config.val_data")
            self.set("validation.sequences", batches * micro * self.ranks, "eval_iters")
            self.source(held_out, "validation", "data_config.val_data")

    def read_data_config(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.problems.append(f"data_config = {str(path)!r} cannot be read: {error}")
            return {}

    def source(self, entries: Any, section: str, name: str) -> None:
        """Parquet of packed rows goes to dataset_path; what has no reader there or here is told."""
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            self.notes.append(f"{name} names no data: give --{section}.dataset_path")
            return
        if len(entries) > 1:
            self.refuse(
                name, [entry.get("name") for entry in entries], "one source is read; name one of them"
            )
            return
        kind, folder = entries[0].get("type"), entries[0].get("data_dir")
        if kind not in keys.PACKED or not folder:
            self.notes.append(
                f"{name} of type {kind!r} is not carried over: give the packed rows as "
                f"--{section}.dataset_path"
            )
            return
        path = Path(expand_variables(str(folder))) / str(entries[0].get("prefix") or "")
        # A pattern is read whole, whatever its files are named after.
        self.set(f"{section}.dataset_path", str(path / "*.parquet"), name)

    def fabric(self) -> None:
        """How ranks work together. Where the weights lie is ours to decide, and no result depends on it."""
        strategy, options = str(self.take("fabric_strategy", "ddp")), dict(self.group("fabric"))
        reduce = options.pop("all_reduce_dtype", None)
        if reduce is not None and reduce not in ("fp32", "bf16"):
            self.refuse("fabric.all_reduce_dtype", reduce, "fp32 and bf16 have a counterpart here")
        elif reduce is not None:
            self.set("training.mixed_precision_reduce", keys.BUFFERS[reduce], "fabric.all_reduce_dtype")
        sizes = {name: options.pop(name) for name in list(options) if name.endswith("tensor_parallel_size")}
        if strategy.startswith("axonn") or any(size not in (1, None) for size in sizes.values()):
            self.refuse("fabric_strategy", strategy, "use ddp, and set parallelism.tensor_parallel_degree")
        self.ignored += [f"fabric.{name} = {value!r}" for name, value in options.items()]

    def rest(self) -> None:
        goldfish = self.group("goldfish")
        strategy = goldfish.get("strategy") and str(goldfish["strategy"])
        if strategy is not None and strategy not in keys.GOLDFISH_USED:
            self.refuse("goldfish.strategy", strategy, f"here are {', '.join(keys.GOLDFISH_USED)}")
        elif strategy is not None:
            self.set("training.goldfish_strategy", strategy, "goldfish.strategy")
            for theirs, ours in keys.GOLDFISH.items():
                if ours in keys.GOLDFISH_USED[strategy]:
                    self.set(f"training.goldfish_{ours}", goldfish.get(theirs), f"goldfish.{theirs}")

        for name, value in self.table.items():
            if name in keys.HARMLESS:
                if value is not None and value not in keys.HARMLESS[name]:
                    self.refuse(name, value, f"only {keys.HARMLESS[name][0]!r} has a counterpart here")
            elif name in keys.WITHOUT_EFFECT:
                self.ignored.append(f"{name} = {value!r}")
            elif name not in keys.FIELDS and name not in keys.TOGETHER:
                known = [*keys.FIELDS, *keys.TOGETHER, *keys.HARMLESS, *keys.WITHOUT_EFFECT]
                self.problems.append(f"unknown field {name!r}{nearest(str(name), known)}")


@dataclass(frozen=True)
class Updates:
    """Counts updates where that trainer counts microbatches of one rank.

    microbatches: of a full update. their_ramp: over how many microbatches updates grow to that.
    """

    microbatches: int
    their_ramp: int = 0

    @property
    def ramp(self) -> int:
        """Updates over which the batch grows in as many stages as a full update has microbatches, such that
        it has had the same tokens at the end: with A stages of r / A updates these are r (A + 1) / 2
        microbatches. 0: it does not grow.
        """
        return round(2 * self.their_ramp / (self.microbatches + 1)) if self.microbatches > 1 else 0

    def in_first(self, count: int) -> float:
        """The updates that the first `count` microbatches of a rank make, those of a growing batch too."""
        updates, done = 0, 0
        for size in range(1, self.microbatches):
            stage = size * self.ramp // self.microbatches - (size - 1) * self.ramp // self.microbatches
            if done + stage * size >= count:
                return updates + (count - done) / size
            updates, done = updates + stage, done + stage * size
        return updates + (count - done) / self.microbatches
