"""[profiling]: torch profiler traces and CUDA memory snapshots, one file a rank,
every `profile_freq` steps.
"""

from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch.profiler import ProfilerActivity, profile, schedule

from torchtitan_rd.config_loader import Section, Subfolder
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.log import logger

_SNAPSHOT_ENTRIES = 100_000  # allocator events kept; a few hundred bytes each


class ProfilingConfig(Section):
    """[profiling]: traces show where the time of a step goes, snapshots where the memory goes."""

    enable_profiling: bool = False
    """Write a torch profiler trace (Chrome format, for Perfetto) every `profile_freq` steps."""

    save_traces_folder: Subfolder = "profile_traces"
    """Folder inside the dump folder for traces."""

    profile_freq: int = Field(10, ge=1)
    """Steps from one trace, or memory snapshot, to the next."""

    profiler_warmup: int = Field(3, ge=0)
    """Steps that the profiler runs and throws away before it records, since its first ones are slow."""

    profiler_active: int = Field(1, ge=1)
    """Steps in one trace: the last ones of each `profile_freq`."""

    enable_memory_snapshot: bool = False
    """Write a CUDA memory snapshot (for pytorch.org/memory_viz) every `profile_freq` steps and
    when out of memory.
    """

    save_memory_snapshot_folder: Subfolder = "memory_snapshot"
    """Folder inside the dump folder for memory snapshots."""

    @model_validator(mode="after")
    def _cycle_holds_warmup_and_active(self) -> "ProfilingConfig":
        needed = self.profiler_warmup + self.profiler_active
        if self.enable_profiling and needed > self.profile_freq:
            raise ValueError(
                f"profiler_warmup + profiler_active = {needed} steps do not fit in profile_freq = "
                f"{self.profile_freq}"
            )
        return self


def check_profiling(config: ProfilingConfig, device: torch.device) -> None:
    """Raises ConfigError if memory snapshots are enabled and `device` is not a CUDA device."""
    if config.enable_memory_snapshot and device.type != "cuda":
        raise ConfigError(
            "profiling.enable_memory_snapshot = true needs a CUDA device, "
            f"and this run trains on {device.type}: set it to false"
        )


class Profiler:
    """A context around the training loop; call `step` after every optimizer step.
    Idle when nothing is enabled.

    Files: `{dump_folder}/{save_traces_folder}/iteration_N/rankR_trace.json` and
    `{dump_folder}/{save_memory_snapshot_folder}/iteration_N/rankR_memory_snapshot.pickle`, N being the last
    step in it. Leaving the loop during a recording, or out of memory, writes `iteration_N_exit`, N being
    the last whole step.

    step: the steps already done; cycles are counted from step 0, so a restart profiles the same steps.
    Raises ConfigError if memory snapshots are enabled and `device` is not a CUDA device.
    """

    def __init__(
        self, config: ProfilingConfig, *, dump_folder: Path, rank: int, device: torch.device, step: int
    ):
        check_profiling(config, device)
        self._config = config
        self._traces = dump_folder / config.save_traces_folder
        self._snapshots = dump_folder / config.save_memory_snapshot_folder
        self._rank = rank
        self._step = step
        self._suffix = ""
        self._profile = self._build_profile(device) if config.enable_profiling else None

    def __enter__(self) -> "Profiler":
        if self._config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        if self._profile is not None:
            self._profile.start()
        return self

    def step(self) -> None:
        self._step += 1
        if self._profile is not None:
            self._profile.step()
        if self._config.enable_memory_snapshot and self._step % self._config.profile_freq == 0:
            self._write_snapshot()

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._suffix = "_exit"
        if self._config.enable_memory_snapshot:
            if error_type is not None and issubclass(error_type, torch.OutOfMemoryError):
                self._write_snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._profile is not None:
            self._profile.stop()

    def _build_profile(self, device: torch.device) -> profile:
        config, done = self._config, self._step
        warmup, active = config.profiler_warmup, config.profiler_active
        cycle = schedule(wait=config.profile_freq - warmup - active, warmup=warmup, active=active)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        return profile(
            activities=activities,
            schedule=lambda step: cycle(done + step),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )

    def _write_trace(self, recorded: profile) -> None:
        path = self._path(self._traces, "trace.json")
        recorded.export_chrome_trace(str(path))
        logger.info("profiler trace: %s", path)

    def _write_snapshot(self) -> None:
        path = self._path(self._snapshots, "memory_snapshot.pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        logger.info("memory snapshot: %s", path)

    def _path(self, folder: Path, name: str) -> Path:
        folder = folder / f"iteration_{self._step}{self._suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"rank{self._rank}_{name}"
