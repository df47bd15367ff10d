"""JobConfig: every section in one place. What is wrong between sections is found in run_plan.py."""

from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from torchtitan_rd.checkpoint import CheckpointConfig
from torchtitan_rd.config_loader import Loaded, Section, load_config, section_type
from torchtitan_rd.config_values import without_none
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.huginn_config import translate
from torchtitan_rd.job import CommConfig, Environment, JobKeys
from torchtitan_rd.log import logger
from torchtitan_rd.lr_scheduler import LRSchedulerConfig, schedule_warnings
from torchtitan_rd.masking import mask_values
from torchtitan_rd.metrics import MetricsConfig
from torchtitan_rd.models.config import ModelConfig
from torchtitan_rd.models.raven.recurrence import RecurrenceConfig
from torchtitan_rd.old_keys import OLD_KEYS
from torchtitan_rd.optimizer import OptimizerConfig
from torchtitan_rd.parallelism import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from torchtitan_rd.profiling import ProfilingConfig
from torchtitan_rd.train_step import TrainingConfig
from torchtitan_rd.validation import ValidationConfig


class JobConfig(Section):
    job: JobKeys = JobKeys()
    model: ModelConfig = ModelConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    training: TrainingConfig = TrainingConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    metrics: MetricsConfig = MetricsConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    comm: CommConfig = CommConfig()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> plain value, with credentials hidden: for whatever is written or shown."""
        values = self.model_dump(mode="json")
        fields = type(self).model_fields
        ordered = {
            section: {key: keys[key] for key in dict(section_type(fields[section]).fields_in_order())}
            for section, keys in values.items()
        }
        return mask_values(ordered)

    def changes(self) -> dict[str, dict[str, Any]]:
        """As `as_dict`, of the keys alone that do not have their default."""
        defaults = type(self)().as_dict()
        changed = {
            section: {key: value for key, value in keys.items() if value != defaults[section][key]}
            for section, keys in self.as_dict().items()
        }
        return {section: keys for section, keys in changed.items() if keys}

    def write(self, path: Path) -> None:
        """Writes a TOML file that loads to this same config,
        but for credentials (keys that are None are left out).
        """
        path.write_text(tomli_w.dumps(without_none(self.as_dict())), encoding="utf-8")

    @classmethod
    def must_match_keys(cls) -> frozenset[str]:
        """`section.key` of every key that a resumed run may not change."""
        return frozenset(
            f"{section}.{key}"
            for section, info in cls.model_fields.items()
            for key, field in section_type(info).model_fields.items()
            if isinstance(field.json_schema_extra, dict)
            and field.json_schema_extra.get("on_resume") == "must_match"
        )


def load(arguments: list[str], environment: Environment) -> Loaded[JobConfig]:
    """The config of a run. Raises ConfigError with every unknown key and wrong value at once.

    What the keys mean together is `run_plan.resolve`'s to judge.
    """
    loaded = load_config(
        JobConfig,
        arguments,
        renamed=OLD_KEYS,
        environment=environment.overrides,
        translate=partial(translate, ranks=environment.world_size),
    )
    if loaded.config.job.config_file is None and not loaded.origins:
        raise ConfigError(
            "no config: pass --job.config_file FILE.toml (see train_configs/) or --section.key value"
        )
    loaded.warnings += schedule_warnings(loaded.config.lr_scheduler)
    return loaded


def load_and_warn(arguments: list[str], environment: Environment) -> Loaded[JobConfig]:
    """The same, with its warnings in the log."""
    loaded = load(arguments, environment)
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    return loaded
