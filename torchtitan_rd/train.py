"""The entry that torchrun starts: builds everything in order, then runs the loop. No maths here.

torchrun --nproc_per_node 2 -m torchtitan_rd.train --job.config_file train_configs/debug.toml
python -m torchtitan_rd.train --job.config_file train_configs/debug.toml      # one process, no launcher
"""

import dataclasses
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan_rd import job
from torchtitan_rd.build_model import build_model, resolve_shape
from torchtitan_rd.checkpoint import Checkpointer, locked_run_folder, saved_states
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.config_loader import Loaded
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import open_released, to_hf, warn_of_another_tokenizer, with_tokenizer
from torchtitan_rd.conversion.reader import WeightsReader
from torchtitan_rd.conversion.weights import cast
from torchtitan_rd.data import (
    Batch,
    DataRanks,
    accumulation_steps,
    build_dataloader,
    check_dataset,
    dataset_vocab_size,
    merge_states,
)
from torchtitan_rd.data.batch_ramp import BatchRamp
from torchtitan_rd.draws import Draws
from torchtitan_rd.errors import CheckpointError, ConfigError, report
from torchtitan_rd.heartbeat import Heartbeat
from torchtitan_rd.log import init_logging, logger
from torchtitan_rd.lr_scheduler import lr_factor
from torchtitan_rd.masking import mask_text
from torchtitan_rd.metrics import Metrics, StepResult
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.attention import setup_attention
from torchtitan_rd.optimizer import build_optimizer, optimizer_state, set_lr
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.preflight import preflight
from torchtitan_rd.profiling import Profiler, check_profiling
from torchtitan_rd.signals import (
    EXIT_STATUS,
    STOPPED,
    Interrupted,
    Status,
    StopRequest,
    remove_exit_status,
    write_exit_status,
)
from torchtitan_rd.train_step import TrainStep, hash_ids
from torchtitan_rd.validation import held_out_set, validate


def main(arguments: list[str] | None = None) -> int:
    """Trains; returns the exit status. A user's mistake is one message, any other error a traceback naming the rank."""
    # First of all and until all is closed: whatever this waits for, a signal must not end it in the midst.
    with StopRequest() as stop:
        return _main(sys.argv[1:] if arguments is None else arguments, stop)


def _main(arguments: list[str], stop: StopRequest) -> int:
    rank = 0
    try:
        environment = job.Environment.read()
        rank = environment.rank
        init_logging(rank, environment.log_level)
        loaded = load(arguments, environment)
        return STOPPED if Trainer(loaded, environment, stop).run() == "stopped" else 0
    except Interrupted:
        return STOPPED
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception (T17)
        # No collective here: the other ranks may be anywhere. torchrun ends them when this one exits.
        print(mask_text(report(error, rank)), file=sys.stderr, flush=True)
        return 1


class Trainer:
    """Everything of one run. `__init__` checks what can be checked without touching a disk or a peer; `run` trains."""

    def __init__(self, loaded: Loaded[JobConfig], environment: job.Environment, stop: StopRequest | None = None):
        """stop: the signals to answer; without it none are."""
        config = self.config = loaded.config
        self.environment, self.stop = environment, stop or StopRequest()
        logger.info("%s", config.job.description or "torchtitan_rd")
        for warning in loaded.warnings:
            logger.warning("%s", warning)
        self.device = environment.device()
        if config.training.enable_cpu_offload and self.device.type == "cpu":
            raise ConfigError("training.enable_cpu_offload needs a GPU to offload from; set it to false here")
        check_profiling(config.profiling, self.device)
        self.dims = ParallelDims.resolve(config.parallelism, environment.world_size)
        self.ramp = BatchRamp(config.training, config.training.global_batch_size)
        # The loader's batch is one stage of the ramp, the whole batch where there is none.
        stage = config.training.global_batch_size // self.ramp.stages if self.ramp.steps else None
        self.data_keys = config.training.model_copy(update={} if stage is None else {"global_batch_size": stage})
        self.accumulation = accumulation_steps(self.data_keys, self.dims.data_degree)
        check_dataset(config.training)
        self.spec = get_spec(config.model.name)
        # Ids that the data may hold; the model may have more rows.
        self.vocab_size = config.model.vocab_size or dataset_vocab_size(config.training, config.model.tokenizer_path)
        self.shape = resolve_shape(config, self.spec, self.vocab_size)
        self.dump_folder = Path(config.job.dump_folder)
        self.draws = Draws(
            self.spec,
            self.shape,
            config.recurrence,
            seed=config.training.seed,
            total_steps=config.training.steps,
            seq_len=config.training.seq_len,
            ramp=self.ramp,
            accumulation=self.accumulation,
            rank=environment.rank,
            data_degree=self.dims.data_degree,
            device=self.device,
            dtype=getattr(torch, config.training.mixed_precision_param),
        )
        if self.draws.family is not None:
            logger.info("%s", self.draws.family.report())
        elif config.training.throttle:
            raise ConfigError(f"training.throttle is for recurrent models, not for {self.spec.name}: leave it unset")
        self.step = self.tokens_seen = 0
        self.has_opened_outputs = False
        self.checkpointer: Checkpointer | None = None

    def run(self) -> Status:
        """Builds in order, trains to the last step or until all ranks agree to stop; returns how it ended."""
        training, rank = self.config.training, self.environment.rank
        job.set_determinism(training.seed, training.deterministic, self.device)
        # An earlier run's status must not stand for this one's, however early this one ends.
        had_status = rank == 0 and remove_exit_status(self.dump_folder)
        self.stop.record = lambda reason: self._tell("stopped", reason)
        with ExitStack() as holding:  # the dump folder, until this run's status stands in it
            return self._run(holding, had_status)

    def _run(self, holding: ExitStack, had_status: bool) -> Status:
        try:
            job.init_process_group(self.environment, self.device, self.config.comm, self.dump_folder)
            had_status = any(job.gather(had_status))  # from here on any rank may write its own
            with ExitStack() as closing:
                self._build(closing, holding)
                is_finished = self._work()
            dist.barrier()  # all ranks have closed, so what rank 0 writes holds for each
        except BaseException as error:
            if self.stop.explains_an_end():  # that of a peer too, which looks like an error of its own
                status = "preempted" if self._is_saved() else "stopped"
                self._tell(status, self.stop.reason())
                return status
            # Nothing is written for a mistake in the input.
            if self.has_opened_outputs or had_status:
                self._tell("failed", f"{type(error).__name__}: {error}")
            raise
        status = "finished" if is_finished else "preempted" if self._is_saved() else "stopped"
        if self.environment.rank == 0:
            self._tell(status, "" if is_finished else self.stop.reason())
        dist.destroy_process_group()
        return status

    def _tell(self, status: Status, reason: str) -> None:
        may_be_stale = not dist.is_initialized()  # before the ranks have met
        write_exit_status(self.dump_folder, status, self.step, reason, self.environment.rank, replace=may_be_stale)

    def _work(self) -> bool:
        """All between building and closing; returns False if a signal cut it short."""
        if self.config.checkpoint.create_seed_checkpoint:
            self._save_seed()
            return True
        is_finished = self._train()
        if is_finished and self.config.checkpoint.last_save_in_hf:
            with self.stop.at_once(self.device):
                self.checkpointer.export(self.step, self._write_hf)
        return is_finished

    def _is_saved(self) -> bool:
        return self.checkpointer is not None and self.checkpointer.is_committed(self.step)

    def _build(self, closing: ExitStack, holding: ExitStack) -> None:
        """Fills self; what must be closed goes to `closing`, which closes the last built first."""
        config, rank = self.config, self.environment.rank
        dtype = getattr(torch, config.training.mixed_precision_param)
        mask = config.training.document_mask
        setup_attention(config.model.attention_backend, self.shape.attention_shape, self.device, dtype, mask)
        mesh = self.mesh = self.dims.build_mesh(self.device.type)
        job.set_timeouts(mesh, config.comm.init_timeout_seconds)
        preflight(mesh, self.device)
        states = saved_states(config.checkpoint, self.dump_folder)
        job.set_timeouts(mesh, job.PREPARING)  # rank 0 may convert data for hours while the others wait
        ranks = DataRanks(job.gather, rank, self.environment.local_rank, states)
        reading = {
            "ranks": ranks,
            "tokenizer_path": ranks.tokenizer(config.model.tokenizer_path),
            "vocab_size": self.vocab_size,
            "data_rank": rank,
            "data_degree": self.dims.data_degree,
            "seed": config.training.seed,
        }
        loader = build_dataloader(self.data_keys, **reading, pin_memory=self.device.type == "cuda")
        closing.callback(loader.close)
        self.loader = loader
        self.held_out = held_out_set(config.validation, self.data_keys, **reading)
        job.set_timeouts(mesh, config.comm.init_timeout_seconds)
        self.model = build_model(config, self.spec, self.shape, mesh, self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self._open_outputs(closing, holding)
        self._restore()
        profiler = Profiler(
            config.profiling, dump_folder=self.dump_folder, rank=rank, device=self.device, step=self.step
        )
        self.train_step = TrainStep(
            self.model,
            self.optimizer,
            config.training,
            self.device,
            beat=self.heartbeat.beat,
            inputs=self.draws.training,
            asked_to_stop=self.stop.received,
            has_saved=self.checkpointer.has_saved,
        )
        self.metrics.start(self.step, self.tokens_seen)  # makes the folder
        if rank == 0:
            config.write(self.dump_folder / "config.toml")
            record = mask_text(json.dumps(loader.record, indent=1))
            (self.dump_folder / "data.json").write_text(record, encoding="utf-8")
        self.profiler = closing.enter_context(profiler)

    def _validate(self) -> dict[str, float]:
        """val_loss, and for a recurrent model val_loss_<depth>; the same on all ranks. Nothing if all agree to stop."""
        self.heartbeat.beat(self.step, "validation")
        read_outs = self.draws.validation(self.config.validation.partial_depth_eval, self.held_out)
        with self.metrics.pause("validation"):
            losses = validate(self.model, self.held_out, self.device, read_outs, self.stop)
        if losses:
            logger.info("step %d: %s", self.step, "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        return losses

    def _open_outputs(self, closing: ExitStack, holding: ExitStack) -> None:
        """The first writing to disk: everything that could be wrong with the input has been checked by now."""
        config, rank, world_size = self.config, self.environment.rank, self.environment.world_size
        # Before anything is written there: a run that is refused leaves no trace in the other one's folder.
        self.lock = holding.enter_context(locked_run_folder(self.dump_folder, stale=EXIT_STATUS))
        self.has_opened_outputs = True
        job.make_traces_folder(self.device, config.comm, self.dump_folder)
        self.heartbeat = Heartbeat(
            self.dump_folder / "heartbeat",
            rank=rank,
            world_size=world_size,
            interval=config.comm.heartbeat_seconds,
            warn_after=config.comm.hang_warning_seconds,
            first_time=config.comm.init_timeout_seconds / 2,
            local_rank=self.environment.local_rank,
            local_world_size=self.environment.local_world_size,
        )
        closing.callback(self.heartbeat.close)
        self.metrics = Metrics(
            config.metrics,
            dump_folder=self.dump_folder,
            job_config=config.as_dict(),
            rank=rank,
            world_size=world_size,
            device=self.device,
            flops=self.spec.flops(self.shape, config.training.seq_len),
            total_steps=config.training.steps,
            flops_drawn=self.draws.flops,
            own_depths=self.draws.own_depths,
            gather=job.gather_numbers,
        )
        closing.callback(self.metrics.close)
        self.checkpointer = Checkpointer(
            config.checkpoint,
            dump_folder=self.dump_folder,
            job_config=config.as_dict(),
            must_match=JobConfig.must_match_keys(),
            model_shape={"name": self.spec.name, "flavor": config.model.flavor, **dataclasses.asdict(self.shape)},
            open_released=lambda path: WeightsReader(open_released(path, model=config.model.name)),
            run_lock=self.lock,
        )
        closing.callback(self.checkpointer.close)
        self.stop.lost = lambda: self.checkpointer.lost_at(self.step)

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }

    def _restore(self) -> None:
        """Goes on from the newest checkpoint, else starts from given weights, else from the initial ones."""
        tensors = self._tensors()
        state = self.checkpointer.load(tensors)
        if state is None:
            loaded = self.checkpointer.load_initial(tensors["model"])
            on_text = check_dataset(self.config.training).kind == "text"
            if loaded is not None and on_text and self.environment.rank == 0:
                warn_of_another_tokenizer(loaded, self.config.model.tokenizer_path)
            logger.info("starting at step 1")
            return
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        if "data" in state:
            self.loader.load_state_dict(state["data"])
        if rng := job.own_rng_state(state.get("rng"), self.environment):
            job.set_rng_state(rng)
        logger.info("resuming after step %d of %d (%d tokens)", self.step, self.config.training.steps, self.tokens_seen)

    def _state(self) -> dict[str, Any]:
        """All that is not a tensor, the same on every rank."""
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "data": merge_states(job.gather(self.loader.state_dict())),
        }

    def _save_seed(self) -> None:
        """`step-0`: the weights that a run starts from, whatever the number of its ranks."""
        if self.step > 0:
            raise CheckpointError("checkpoint.create_seed_checkpoint: this run has checkpoints; use another folder")
        self.checkpointer.save(0, {"model": self._tensors()["model"]}, {})

    def _write_hf(self, checkpoint: Path, folder: Path) -> None:
        """On one rank: a saved step as a Hugging Face folder."""
        weights = cast(open_dcp(checkpoint), getattr(torch, self.config.checkpoint.export_dtype))
        to_hf(with_tokenizer(weights), folder, verify=False)
        logger.info("exported %s", folder)

    def _train(self) -> bool:
        """The loop. Returns False if it ended because of a signal."""
        config, training, total_steps = self.config, self.config.training, self.config.training.steps
        collector = job.GarbageCollector(training.gc_freq)
        tokens_per_stage = self.accumulation * training.local_batch_size * training.seq_len * self.dims.data_degree
        started_at = self.step
        if started_at >= total_steps:
            logger.info("all %d steps are done: raise training.steps to train on", total_steps)
        self.stop.ends_at_once = False

        while self.step < total_steps:
            self.step += 1
            collector.run(self.step)

            self.heartbeat.beat(self.step, "data")
            stages = self.ramp.of_step(self.step)
            with self.metrics.time_data():
                batches = [batch for _ in range(stages) for batch in self.loader.next_step()]
            self.tokens_seen += stages * tokens_per_stage

            lr = set_lr(self.optimizer, lr_factor(config.lr_scheduler, self.step, total_steps))
            is_logged = self.metrics.should_log(self.step) or config.validation.is_due(self.step, total_steps)
            with self.draws.watch(self.model, watching=is_logged and self.environment.rank == 0) as telemetry:
                result = self.train_step(self.step, batches, self.tokens_seen)
            self.metrics.add(result)
            if is_logged:
                self._log(result, batches, stages=stages, lr=lr, telemetry=telemetry)

            # On a GPU the flag is that of the step before, unless this step is logged: on all ranks alike.
            stopping = self.train_step.stop_requested or self.stop.agreed
            self._save_if_due(stopping)
            self.profiler.step()
            if stopping and self.step < total_steps:
                self.train_step.settle()  # a last update that must not be ends the run as such
                saving = "saving a checkpoint" if config.checkpoint.enable else "nothing is saved (checkpoint.enable)"
                logger.info("stopping after step %d: %s", self.step, saving)
                return False
            if self.step == started_at + 1:
                job.shorten_timeouts(config.comm, self.mesh)
        return True

    def _log(self, result: StepResult, batches: list[Batch], *, stages: int, lr: float, telemetry: Any) -> None:
        self.train_step.settle()  # nothing is validated or reported that must not be trained on
        extra = self.draws.describe(telemetry, result.depths)
        if self.config.validation.is_due(self.step, self.config.training.steps):
            extra |= self._validate()
        data_hash = hash_ids(batches, stages) if self.config.metrics.log_data_hash else None
        self.metrics.log(self.step, lr=lr, tokens_seen=self.tokens_seen, data_hash=data_hash, extra=extra)

    def _save_if_due(self, stopping: bool) -> None:
        last_step = self.step == self.config.training.steps
        self.heartbeat.beat(self.step, "checkpoint")
        if self.train_step.saved:
            self.checkpointer.wait()  # for nothing, by then: raises what went wrong, on all ranks at the same step
            self.train_step.saved = False
        if self.checkpointer.should_save(self.step, last_step=last_step or stopping):
            self.train_step.settle()  # counts on the host must be right, and a run that must stop saves nothing
            self.heartbeat.beat(self.step, "saving")
            with self.metrics.pause("checkpoint"):
                own = {"rng": job.rng_state()}
                self.checkpointer.save(self.step, self._tensors(), self._state(), own_state=own, last_step=last_step)
            self.train_step.saved = False  # that was of the save before


if __name__ == "__main__":
    sys.exit(main())
