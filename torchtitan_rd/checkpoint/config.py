"""The `[checkpoint]` section."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from torchtitan_rd.config_loader import OptionalUserPath, Section, Subfolder


class CheckpointConfig(Section):
    """Saving, resuming, initial weights and export."""

    enable: bool = False
    """Save checkpoints, and resume from the newest good one when the same command runs again."""

    folder: Subfolder = "checkpoint"
    """Where the checkpoints go, inside `job.dump_folder`."""

    interval: int = Field(500, ge=1)
    """Steps or seconds between two saves. The last step is always saved."""

    interval_type: Literal["steps", "seconds"] = "steps"
    """Unit of `interval`. In seconds, rank 0's clock decides for all ranks."""

    keep_latest_k: int = Field(10, ge=0)
    """How many of the newest good checkpoints to keep, beside the last 3 that were set aside as damaged and
    the last 3 as superseded; 0 keeps all. 1 is refused: it leaves nothing to fall back to.
    """

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """`async`: copy the state to CPU memory, then write in the background while training goes on.
    `async_with_pinned_mem`: the same through page-locked buffers, kept between saves (CUDA only)."""

    on_save_error: Literal["raise", "warn"] = "raise"
    """What a save that fails does to the run. `raise`: it ends. `warn`: it goes on, counts it (`failed_saves`
    of a row), and tries again at the next interval; `max_save_errors` in a row end it. The last save of a
    run, a seed, and a save that lost a rank or the folder's lock end it in any case."""

    max_save_errors: int = Field(3, ge=1)
    """With on_save_error = "warn": the run ends once so many saves in a row have failed."""

    grace_seconds: float | None = Field(None, gt=0)
    """Seconds from the signal that ends a job to the kill. Saves that take longer than half of it are warned
    about. None: what torchrun waits (TORCH_ELASTIC_SHUTDOWN_TIMEOUT, else 30), without torchrun nothing."""

    load_step: int = Field(-1, ge=-1)
    """Go back to exactly this step, once: the same command again goes on from the checkpoints written since.
    -1: from the newest good checkpoint."""

    initial_load_path: OptionalUserPath = None
    """Initial weights for a run that has no checkpoint yet: a step folder,
    a checkpoint folder (its newest step), a Hugging Face folder, or one of Meta's Llama files.
    """

    exclude_from_loading: list[str] = Field(default_factory=list)
    """Names, or prefixes of names, not to load. `model.*` names keep their initial values in an initial
    load; other names (`optimizer`, `data`, `rng`, ...) start afresh at a resume, once: not when the
    same command goes on.
    """

    last_save_model_only: bool = False
    """Write only the model at the last step, as `step-N-model`: for export, not for resuming."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the floating-point tensors in `step-N-model` and `step-N-hf`."""

    last_save_in_hf: bool = False
    """After the last step, write the model as the Hugging Face folder `step-N-hf` too, in `export_dtype`."""

    create_seed_checkpoint: bool = False
    """Write the freshly initialised model as `step-0` and stop."""

    timeout_seconds: int = Field(1800, ge=1)
    """The longest that a rank waits for another one to read, write or hash its share of a checkpoint.
    It replaces the time-outs of [comm], since a slow file system is no hang.
    """

    verify_hashes: bool = True
    """Compare every file with its sha256 before loading. If false, only names and sizes are compared."""

    @field_validator("keep_latest_k")
    @classmethod
    def _something_to_fall_back_to(cls, k: int) -> int:
        if k == 1:
            raise ValueError(
                "1 would leave no older checkpoint to fall back to; use 2 or more, or 0 to keep all"
            )
        return k

    @field_validator("load_step")
    @classmethod
    def _a_seed_is_not_resumed(cls, step: int) -> int:
        if step == 0:
            raise ValueError(
                "step-0 is a seed: it is loaded without being named, by a run that has no other step"
            )
        return step

    @model_validator(mode="after")
    def _needs_enable(self) -> "CheckpointConfig":
        if not self.enable and self.create_seed_checkpoint:
            raise ValueError("create_seed_checkpoint needs checkpoint.enable = true")
        if not self.enable and self.last_save_in_hf:
            raise ValueError("last_save_in_hf needs checkpoint.enable = true")
        if not self.enable and self.load_step != -1:
            raise ValueError(f"load_step = {self.load_step} needs checkpoint.enable = true")
        return self
