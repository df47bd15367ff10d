"""Turns what a step returns into one row of numbers, and hands the row to the console, metrics.jsonl and the sinks.

Metrics formats; it runs no collective. What a row says of all ranks was reduced before it arrives.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from torchtitan_rd.config_loader import Section, Subfolder
from torchtitan_rd.log import logger
from torchtitan_rd.metrics.console import Console
from torchtitan_rd.metrics.devices import PeakMemory, peak_flops
from torchtitan_rd.metrics.journal import Journal
from torchtitan_rd.metrics.sinks import TensorBoardSink, WandbSink


class MetricsConfig(Section):
    """[metrics]: what is logged, how often and where. `metrics.jsonl` in the dump folder is always written."""

    log_freq: int = Field(10, ge=1)
    """Log every so many steps; the first step of a run and the last are logged too."""

    enable_tensorboard: bool = False
    """Write TensorBoard event files."""

    save_tb_folder: Subfolder = "tb"
    """Folder inside the dump folder for TensorBoard."""

    enable_wandb: bool = False
    """Log to Weights & Biases. A restart continues the same run."""

    wandb_project: str | None = None
    """Weights & Biases project. Unset: wandb's own choice (WANDB_PROJECT in the environment)."""

    disable_color_printing: bool = False
    """No colours on a terminal. Without a terminal there are none anyway."""

    log_data_hash: bool = False
    """Log the sha256 of the global batch's ids in row order, to compare the data of two runs."""

    peak_tflops: float | None = Field(None, gt=0)
    """Peak TFLOP/s of one device, for the MFU. Unset: known devices by name, dense bf16; on others the MFU is n/a."""


class FlopsPerToken(Protocol):
    """The three counts of `models.spec.FlopCount`: FLOPs of a training step per token."""

    @property
    def matmul(self) -> float: ...
    @property
    def attention_full(self) -> float: ...
    @property
    def attention_causal(self) -> float: ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step returns. Each value is the same on every rank.

    Values may be one-element tensors on the device (plain ones: a DTensor must be made full before). Nobody reads them
    until the step is logged, because reading one makes the host wait for the device.

    loss: mean over the valid tokens of the global batch, in nats.
    loss_max: the largest of the ranks' own mean losses.
    grad_norm: L2 norm of all gradients before clipping.
    """

    loss: float | Tensor
    loss_max: float | Tensor
    grad_norm: float | Tensor


class Metrics:
    """Built on every rank; only rank 0 measures and writes.

        metrics = Metrics(config, ...)
        metrics.start(step, tokens_seen)        # where the run begins: 0, 0 or what the checkpoint holds
        while step < total_steps:
            step += 1
            with metrics.time_data():
                batches = loader.next_step()
            result = train_step(batches)
            if metrics.should_log(step):
                metrics.log(step, result, lr=lr, tokens_seen=tokens_seen)
        metrics.close()

    Throughput and MFU are end to end: the wall time between two logged steps, data loading and checkpoints included.
    """

    def __init__(
        self,
        config: MetricsConfig,
        *,
        dump_folder: Path,
        job_config: Mapping[str, Any],
        rank: int,
        world_size: int,
        device: torch.device,
        flops: FlopsPerToken,
        total_steps: int,
    ):
        self._config = config
        self._dump_folder = dump_folder
        self._job_config = job_config
        self._writes = rank == 0
        self._world_size = world_size
        self._device = device
        self._flops = flops
        self._total_steps = total_steps
        self._sinks: list[TensorBoardSink | WandbSink] = []
        self._journal: Journal | None = None
        self._console: Console | None = None
        self._data_seconds = 0.0

    def start(self, step: int, tokens_seen: int) -> None:
        """Opens the outputs for the steps after `step` (0: a new run) and starts the clock.

        Rows that an earlier run left beyond `step` are dropped, since those steps are computed again.
        Raises ConfigError if wandb is enabled and not installed.
        """
        if not self._writes:
            return
        config = self._config
        self._peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(self._device)
        if self._peak is None and self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
            logger.warning("MFU is n/a: the peak FLOP/s of %r are not known; set metrics.peak_tflops", name)
        self._dump_folder.mkdir(parents=True, exist_ok=True)
        if config.enable_wandb:
            self._sinks.append(
                WandbSink(self._dump_folder, step, project=config.wandb_project, job_config=self._job_config)
            )
        if config.enable_tensorboard:
            self._sinks.append(TensorBoardSink(self._dump_folder / config.save_tb_folder, step))
        self._journal = Journal(self._dump_folder / "metrics.jsonl")
        self._journal.open(step)
        self._console = Console(step=step, total_steps=self._total_steps, color=not config.disable_color_printing)
        self._memory = PeakMemory(self._device)
        self._begin_window(step, tokens_seen)

    def should_log(self, step: int) -> bool:
        """The first step, every `log_freq`-th and the last. A function of the step alone: a restart logs the same."""
        return step == 1 or step % self._config.log_freq == 0 or step == self._total_steps

    @contextmanager
    def time_data(self) -> Iterator[None]:
        """Counts the time inside as time spent waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._data_seconds += time.perf_counter() - begin

    def log(
        self,
        step: int,
        result: StepResult,
        *,
        lr: float,
        tokens_seen: int,
        data_hash: str | None = None,
        extra: Mapping[str, float] | None = None,
        flops: FlopsPerToken | None = None,
    ) -> None:
        """Reads `result` from the device and writes one row.

        tokens_seen: tokens of all ranks since step 0, every input position counted, since each costs FLOPs.
        extra: more numbers for the row, such as a count of skipped updates.
        flops: mean count of the steps since the last row, where it differs from step to step (drawn depths).
        """
        if not self._writes:
            return
        # Reading waits for the device, so the clock is read after it: the window then covers work, not launches.
        loss, loss_max, grad_norm = float(result.loss), float(result.loss_max), float(result.grad_norm)
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "loss_hex": loss.hex(),
            "loss_max": loss_max,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_seen": tokens_seen,
            **({"data_hash": data_hash} if data_hash is not None else {}),
            **(extra or {}),
            **self._speed(step, tokens_seen, flops or self._flops),
            **self._memory.read(),
        }
        # JSON has no NaN or infinity: such a number becomes null; loss_hex still tells which it was.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._journal.append(row)
        for sink in self._sinks:
            sink.log(row)
        self._console.log(row)
        self._begin_window(step, tokens_seen)

    def close(self) -> None:
        """Flushes and closes every output. May be called twice, and before `start`."""
        for output in (self._console, self._journal, *self._sinks):
            if output is not None:
                output.close()
        self._console, self._journal, self._sinks = None, None, []

    def _begin_window(self, step: int, tokens_seen: int) -> None:
        self._window_step, self._window_tokens = step, tokens_seen
        self._data_seconds = 0.0
        self._window_begin = time.perf_counter()

    def _speed(self, step: int, tokens_seen: int, flops: FlopsPerToken) -> dict[str, float | None]:
        """Rates since the last logged step.

        MFU is model FLOPs per second over the device's peak, in 0..1, recomputation not counted (PaLM paper,
        arXiv:2204.02311, appendix B). `full` counts attention over all S x S pairs, as that paper and Megatron do;
        `causal` only the pairs that a causal mask leaves. `tflops` is per device, full convention.
        """
        seconds = time.perf_counter() - self._window_begin
        steps = step - self._window_step
        per_device = (tokens_seen - self._window_tokens) / seconds / self._world_size
        full = per_device * (flops.matmul + flops.attention_full)
        causal = per_device * (flops.matmul + flops.attention_causal)
        usual = self._flops.matmul + self._flops.attention_full
        return {
            "tokens_per_second_per_device": per_device,
            # What it would be at the mean depth: a deep draw does not look like a slow machine.
            "tokens_per_second_per_device_at_mean_depth": full / usual,
            "tflops": full / 1e12,
            "mfu_full": full / self._peak if self._peak else None,
            "mfu_causal": causal / self._peak if self._peak else None,
            "step_seconds": seconds / steps,
            "data_loading_seconds": self._data_seconds / steps,
            "data_loading_share": self._data_seconds / seconds,
        }
