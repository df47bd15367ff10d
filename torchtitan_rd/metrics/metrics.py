"""Turns what steps return into one row of numbers, and hands the row to the console,
metrics.jsonl and the sinks.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from torchtitan_rd.config_loader import Section, Subfolder
from torchtitan_rd.log import logger
from torchtitan_rd.metrics.console import Console
from torchtitan_rd.metrics.devices import PeakMemory, peak_flops
from torchtitan_rd.metrics.journal import Journal
from torchtitan_rd.metrics.results import StepResult
from torchtitan_rd.metrics.sinks import TensorBoardSink, WandbSink
from torchtitan_rd.model_spec import FlopCount, NumSteps


class MetricsConfig(Section):
    """[metrics]: what is logged, how often and where. `metrics.jsonl` in the dump folder
    is always written.
    """

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
    """Peak TFLOP/s of one device, for the MFU. Unset: known devices by name, dense bf16;
    on others the MFU is n/a.
    """


class Metrics:
    """Built on every rank; only rank 0 writes.

        metrics = Metrics(config, ...)
        metrics.start(step, tokens_seen)        # where the run begins: 0, 0 or what the checkpoint holds
        while step < total_steps:
            step += 1
            with metrics.time_data():
                batches = loader.next_step()
            metrics.add(train_step(step, batches, tokens_seen))
            if metrics.should_log(step):
                metrics.log(step, lr=lr, tokens_seen=tokens_seen)
            with metrics.pause("checkpoint"):
                checkpointer.save(...)
        metrics.close()

    A row describes its step, and the interval since the row before; a resumed run begins a new interval,
    so its first row covers the steps since the checkpoint alone.

    - loss, loss_hex, loss_max, loss_max_rank, grad_norm, consecutive_skips:
      of the step itself (`StepNumbers`).
    - loss_mean, loss_max_interval: the mean of the steps' losses, and the largest of their `loss_max`.
      Steps whose update was skipped are left out; skipped_steps counts them.
    - Rates and MFU are end to end: the wall time of the interval, data loading included, but not what was
      paused for. That stands beside them as validation_seconds and checkpoint_seconds. A save follows the row
      of its step, so it counts in the next row.
    - Where ranks draw depths of their own, the deepest of each microbatch is what counts,
      since the others wait for it.
    - memory_*: the highest value of all ranks; memory_max_rank is the rank with the most memory reserved
      (on a CPU, resident).
    - resumed_from: in the first row after a restart, the step of its checkpoint.
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
        flops: FlopCount,
        total_steps: int,
        flops_drawn: Callable[[Sequence[Sequence[NumSteps]]], FlopCount | None] = lambda depths: None,
        own_depths: bool = False,
        gather: Callable[[list[float]], list[list[float]] | None] = lambda numbers: [numbers],
    ):
        """flops: count at the mean depth. own_depths: whether ranks may differ in depth.

        flops_drawn: the interval's depths, for each rank those of its microbatches -> the mean count,
        or None where nothing is drawn.
        gather: numbers of this rank -> those of every rank on rank 0, None on others.
            A collective, once a row.
        """
        self._config = config
        self._dump_folder = dump_folder
        self._job_config = job_config
        self._writes = rank == 0
        self._world_size = world_size
        self._device = device
        self._flops = flops
        self._flops_drawn = flops_drawn
        self._own_depths = own_depths
        self._gather = gather
        self._total_steps = total_steps
        self._sinks: list[TensorBoardSink | WandbSink] = []
        self._journal: Journal | None = None
        self._console: Console | None = None
        self._results: list[StepResult] = []
        self._data_seconds = 0.0
        self._paused: defaultdict[str, float] = defaultdict(float)

    def start(self, step: int, tokens_seen: int, *, differs: bool = False) -> None:
        """Opens the outputs for the steps after `step` (0: a new run) and starts the clock.

        Rows that an earlier run left beyond `step` are dropped, since those steps are computed again.
        differs: to other values. Raises ConfigError if wandb is enabled and not installed.
        """
        if self._writes:
            self._open(step, differs)
        self._memory = PeakMemory(self._device)
        self._resumed_from = step
        self._begin_interval(step, tokens_seen)

    def _open(self, step: int, differs: bool) -> None:
        config = self._config
        self._peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(self._device)
        if self._peak is None and self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
            logger.warning("MFU is n/a: the peak FLOP/s of %r are not known; set metrics.peak_tflops", name)
        self._dump_folder.mkdir(parents=True, exist_ok=True)

        if config.enable_wandb:
            self._sinks.append(
                WandbSink(
                    self._dump_folder,
                    0 if differs else step,
                    project=config.wandb_project,
                    job_config=self._job_config,
                )
            )
        if config.enable_tensorboard:
            self._sinks.append(TensorBoardSink(self._dump_folder / config.save_tb_folder, step))
        self._journal = Journal(self._dump_folder / "metrics.jsonl")
        self._journal.open(step)
        self._console = Console(
            step=step, total_steps=self._total_steps, color=not config.disable_color_printing
        )

    def should_log(self, step: int) -> bool:
        """The first step, every `log_freq`-th and the last. A function of the step alone:
        a restart logs the same.
        """
        return step == 1 or step % self._config.log_freq == 0 or step == self._total_steps

    @contextmanager
    def time_data(self) -> Iterator[None]:
        """Counts the time inside as time spent waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._data_seconds += time.perf_counter() - begin

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Keeps the time inside out of the rates; the row has it as `<name>_seconds`.

        Waits for the GPU first: work that was launched before belongs to training.
        """
        self._drain()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._drain()
            self._paused[name] += time.perf_counter() - begin

    def add(self, result: StepResult) -> None:
        """Each step, in order; reads nothing."""
        self._results.append(result)

    def log(
        self,
        step: int,
        *,
        lr: float,
        tokens_seen: int,
        data_hash: str | None = None,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Writes one row for `step`, the last that was added.
        Every rank calls it: it gathers memory peaks and depths.

        tokens_seen: tokens of all ranks since step 0, every input position counted, since each costs FLOPs.
        extra: more numbers for the row.
        """
        memory, flops = self._of_all_ranks()
        if self._writes:
            # Reading waits for the device, so the clock is read after it:
            # the interval covers work, not launches.
            losses = self._losses()
            row: dict[str, Any] = {
                "step": step,
                **losses,
                "lr": lr,
                "tokens_seen": tokens_seen,
                **({"data_hash": data_hash} if data_hash is not None else {}),
                **(extra or {}),
                **self._speed(step, tokens_seen, flops or self._flops),
                **{f"{name}_seconds": seconds for name, seconds in self._paused.items()},
                **memory,
                **({"resumed_from": self._resumed_from} if self._resumed_from else {}),
            }
            # JSON has no NaN or infinity: such a number becomes null; loss_hex still tells which it was.
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._write(row)
        self._resumed_from = 0
        self._begin_interval(step, tokens_seen)

    def _write(self, row: dict[str, Any]) -> None:
        if self._journal is None or self._console is None:
            raise RuntimeError("a row is logged before the outputs are opened (`start`) or after `close`")
        self._journal.append(row)
        for sink in self._sinks:
            sink.log(row)
        self._console.log(row)

    def close(self) -> None:
        """Flushes and closes every output. May be called twice, and before `start`."""
        for output in (self._console, self._journal, *self._sinks):
            if output is not None:
                output.close()
        self._console = None
        self._journal = None
        self._sinks = []

    def _begin_interval(self, step: int, tokens_seen: int) -> None:
        self._first_step, self._first_token = step, tokens_seen
        self._results = []
        self._data_seconds = 0.0
        self._paused.clear()
        self._begin = time.perf_counter()

    def _losses(self) -> dict[str, Any]:
        """Of the last step, and of the interval."""
        numbers = [result.numbers for result in self._results]
        last, taken = numbers[-1], [step for step in numbers if not step.skipped]
        return {
            "loss": last.loss,
            "loss_hex": last.loss.hex(),
            "loss_mean": math.fsum(step.loss for step in taken) / len(taken) if taken else math.nan,
            "loss_max": last.loss_max,
            "loss_max_rank": last.loss_max_rank,
            "loss_max_interval": max((step.loss_max for step in taken), default=math.nan),
            "grad_norm": last.grad_norm,
            "consecutive_skips": last.consecutive_skips,
            "skipped_steps": len(numbers) - len(taken),
        }

    def _of_all_ranks(self) -> tuple[dict[str, float], FlopCount | None]:
        """The highest peaks of memory, and the mean FLOPs per token of the interval. Collective.

        One gather for both. On other ranks than the first the answer is empty.
        """
        peaks = self._memory.read()
        depths = [draw for result in self._results for draw in result.depths]
        sent = [number for draw in depths for number in draw] if self._own_depths else []
        gathered = self._gather([*peaks.values(), *sent])
        if gathered is None:
            return {}, None

        memories = [dict(zip(peaks, numbers, strict=False)) for numbers in gathered]
        fullest = max(range(len(memories)), key=lambda rank: memories[rank][self._memory.leading])
        drawn = [depths]
        if self._own_depths:
            flat = [[int(number) for number in numbers[len(peaks) :]] for numbers in gathered]
            drawn = [list(zip(numbers[::2], numbers[1::2], strict=True)) for numbers in flat]
        memory = {key: max(rank[key] for rank in memories) for key in peaks}
        return {**memory, "memory_max_rank": fullest}, self._flops_drawn(drawn)

    def _drain(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _speed(self, step: int, tokens_seen: int, flops: FlopCount) -> dict[str, float | None]:
        """Rates of the interval, what it paused for left out.

        MFU is model FLOPs per second over the device's peak, in 0..1, recomputation not counted (PaLM
        paper, arXiv:2204.02311, appendix B). `full` counts attention over all S x S pairs, as that
        paper and Megatron do; `causal` only the pairs that a causal mask leaves. `tflops` is per
        device, full convention.
        """
        seconds = time.perf_counter() - self._begin - math.fsum(self._paused.values())
        steps = step - self._first_step
        per_device = (tokens_seen - self._first_token) / seconds / self._world_size
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
