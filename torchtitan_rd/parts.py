"""What a run is made of: built in order from its plan, each part once, nothing filled in later."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from torchtitan_rd import job
from torchtitan_rd.batch import Batch
from torchtitan_rd.build_model import build_model
from torchtitan_rd.checkpoint import Checkpointer
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.config import JobConfig
from torchtitan_rd.conversion.pipeline import open_released
from torchtitan_rd.conversion.reader import WeightsReader
from torchtitan_rd.data import BatchLoader, BatchQueue, DataRanks, build_dataloader
from torchtitan_rd.heartbeat import Heartbeat
from torchtitan_rd.metrics import Metrics
from torchtitan_rd.model_spec import ModelShape
from torchtitan_rd.models.attention import setup_attention
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import GradientExchange
from torchtitan_rd.preflight import preflight
from torchtitan_rd.reliability.stragglers import Stragglers
from torchtitan_rd.run_plan import RunPlan
from torchtitan_rd.signals import StopRequest
from torchtitan_rd.train_step import TrainStep
from torchtitan_rd.validation import held_out_set

LAST_WAIT_SECONDS = 30.0
"""For the save in flight of a run that has lost a rank: it may be beyond the part that needs all ranks."""


@dataclass(frozen=True)
class Parts:
    """mesh: of the ranks. queue: of the batches that `loader` reads. held_out: this rank's batches of the
    validation set. The others say it themselves.
    """

    mesh: DeviceMesh
    loader: BatchLoader
    queue: BatchQueue
    held_out: list[Batch]
    model: nn.Module
    optimizer: Optimizer
    stragglers: Stragglers
    heartbeat: Heartbeat
    metrics: Metrics
    checkpointer: Checkpointer
    train_step: TrainStep


@dataclass(frozen=True)
class Builder:
    """Where a run stands in the world; `closing` closes what was built, the last one first."""

    config: JobConfig
    environment: job.Environment
    device: torch.device
    plan: RunPlan
    ranks: DataRanks
    stop: StopRequest
    closing: ExitStack

    def build(self, lock_folder: Callable[[], FolderLock | None]) -> Parts:
        """Collective. lock_folder: called before the first writing to disk,
        when all of the input is known to be good.
        """
        config, plan = self.config, self.plan
        mesh = self._connect()
        loader, held_out = self._read(mesh)
        model = build_model(config, plan.spec, plan.shape, mesh, self.device)
        optimizer = build_optimizer(model, config.optimizer)

        # Before anything is written there: a run that is refused leaves no trace in the other one's folder.
        lock = lock_folder()
        job.make_traces_folder(self.device, config.comm, self._dump_folder)
        stragglers = Stragglers()
        heartbeat = self._heartbeat(stragglers)
        metrics = self._metrics()
        checkpointer = self._checkpointer(lock)

        train_step = TrainStep(
            model,
            optimizer,
            config.training,
            self.device,
            beat=heartbeat.beat,
            forward_inputs=plan.draws.training,
            asked_to_stop=self.stop.received,
            has_saved=checkpointer.has_saved,
            token_weights=plan.token_weights,
            exchange=GradientExchange(model, config.parallelism, config.training, mesh),
            counts=plan.dims.counts(self.environment.rank),
            positions=plan.positions,
        )
        data = (loader, BatchQueue(loader, plan.batch, config.training.skip_batches), held_out)
        watch = (stragglers, heartbeat)

        def allow_slow_ends(kind: object, error: BaseException | None, trace: object) -> None:
            if error is None:  # rank 0 may upload to a tracker while the others wait
                job.set_timeouts(mesh, config.comm.init_timeout_seconds)

        self.closing.push(allow_slow_ends)
        return Parts(mesh, *data, model, optimizer, *watch, metrics, checkpointer, train_step)

    @property
    def _dump_folder(self) -> Path:
        return Path(self.config.job.dump_folder)

    def _connect(self) -> DeviceMesh:
        config = self.config
        setup_attention(
            config.model.attention_backend,
            self.plan.dims.heads_in_kernel(self.plan.shape.attention_shape),
            self.device,
            getattr(torch, config.training.mixed_precision_param),
            config.training.document_mask,
        )
        mesh = self.plan.dims.build_mesh(self.device.type)
        job.set_timeouts(mesh, config.comm.init_timeout_seconds)
        preflight(mesh, self.device)
        return mesh

    def _read(self, mesh: DeviceMesh) -> tuple[BatchLoader, list[Batch]]:
        """All ranks read the same commit and must find the same data."""
        config, plan = self.config, self.plan
        job.set_timeouts(mesh, job.PREPARING)  # rank 0 may convert data for hours while the others wait
        reading: dict[str, Any] = {
            "ranks": self.ranks,
            "tokenizer": plan.tokenizer,
            "vocab_size": plan.vocab_size,
            "seed": config.training.seed,
        }
        loader = build_dataloader(
            config.training, plan.batch, **reading, pin_memory=self.device.type == "cuda"
        )
        self.closing.callback(loader.close)
        trained = loader.fingerprint
        held_out = held_out_set(config.validation, config.training, plan.batch, trained=trained, **reading)
        job.set_timeouts(mesh, config.comm.init_timeout_seconds)
        return loader, held_out

    def _heartbeat(self, stragglers: Stragglers) -> Heartbeat:
        comm, environment = self.config.comm, self.environment
        heartbeat = Heartbeat(
            self._dump_folder / "heartbeat",
            rank=environment.rank,
            world_size=environment.world_size,
            interval=comm.heartbeat_seconds,
            warn_after=comm.hang_warning_seconds,
            first_time=comm.init_timeout_seconds / 2,
            local_rank=environment.local_rank,
            local_world_size=environment.local_world_size,
            on_beat=stragglers.beat,
        )
        self.closing.callback(heartbeat.close)
        return heartbeat

    def _metrics(self) -> Metrics:
        config, plan = self.config, self.plan
        metrics = Metrics(
            config.metrics,
            dump_folder=self._dump_folder,
            job_config=config.as_dict(),
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            device=self.device,
            flops=plan.spec.flops(plan.shape, config.training.seq_len),
            total_steps=config.training.steps,
            flops_drawn=plan.draws.flops,
            own_depths=plan.draws.own_depths,
            gather=job.gather_numbers,
        )
        self.closing.callback(metrics.close)
        return metrics

    def _checkpointer(self, lock: FolderLock | None) -> Checkpointer:
        config, plan = self.config, self.plan
        checkpointer = Checkpointer(
            config.checkpoint,
            dump_folder=self._dump_folder,
            job_config=config.as_dict(),
            must_match=JobConfig.must_match_keys(),
            model_shape={
                "name": plan.spec.name,
                "flavor": config.model.flavor,
                **dataclasses.asdict(plan.shape),
            },
            shape_defaults=field_defaults(plan.shape),
            arithmetic=plan.spec.arithmetic,
            open_released=lambda path: WeightsReader(open_released(path, model=config.model.name)),
            run_lock=lock,
            row_orders=plan.row_orders,
            grace=self.environment.grace_seconds,
        )

        def close(kind: object, error: BaseException | None, trace: object) -> None:
            checkpointer.close(LAST_WAIT_SECONDS if job.is_of_a_lost_rank(error) else None)

        self.closing.push(close)
        return checkpointer


def field_defaults(shape: ModelShape) -> dict[str, Any]:
    """The fields of a shape that have a default."""
    fields = dataclasses.fields(shape)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
