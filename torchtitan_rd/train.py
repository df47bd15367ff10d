"""The entry that torchrun starts: builds everything in order, then runs the loop. No maths here.

torchrun --nproc_per_node 2 -m torchtitan_rd.train --job.config_file train_configs/debug.toml
python -m torchtitan_rd.train --job.config_file train_configs/debug.toml      # one process, no launcher
"""

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchtitan_rd import job, run_plan, run_state
from torchtitan_rd.batch import Batch
from torchtitan_rd.checkpoint import leave_stuck_saves, locked_run_folder, saved_states
from torchtitan_rd.checkpoint.lock import FolderLock
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.config_loader import Loaded
from torchtitan_rd.data import DataRanks, Tokenizer, load_tokenizer
from torchtitan_rd.errors import RestartLoopError, report
from torchtitan_rd.log import init_logging, logger
from torchtitan_rd.lr_scheduler import lr_factor
from torchtitan_rd.masking import mask_text
from torchtitan_rd.metrics import StepResult
from torchtitan_rd.optimizer import set_lr
from torchtitan_rd.parallelism import sum_over_tokens
from torchtitan_rd.parts import Builder, Parts
from torchtitan_rd.profiling import Profiler
from torchtitan_rd.reliability.launcher import launcher_watched
from torchtitan_rd.reliability.replay import replay
from torchtitan_rd.reliability.restarts import LOOPING, FailureCount
from torchtitan_rd.reliability.rollback import Rollbacks, SpikeWatch
from torchtitan_rd.run_plan import RunPlan
from torchtitan_rd.signals import (
    EXIT_STATUS,
    STOPPED,
    Interrupted,
    Status,
    StopRequest,
    remove_exit_status,
    write_exit_status,
)
from torchtitan_rd.train_step import hash_ids
from torchtitan_rd.validation import validate

USAGE = """Trains what a TOML file describes, on one rank or on those that torchrun starts.

python -m torchtitan_rd.train --job.config_file X.toml [--section.key value ...]
torchrun --nproc_per_node RANKS -m torchtitan_rd.train --job.config_file X.toml [--section.key value ...]

Keys on the command line override those of the file; a flag is --section.flag or --no-section.flag.
For example:

  torchrun --nproc_per_node 2 -m torchtitan_rd.train --job.config_file train_configs/debug.toml \
--training.steps 40

`python -m torchtitan_rd config X.toml` checks a config and says what it runs;
`python -m torchtitan_rd config --schema` (docs/configuration.md) lists every key.
train_*.sh launch the shipped TOMLs, on one node or under Slurm."""


def main(arguments: list[str] | None = None) -> int:
    """Trains; returns the exit status. A user's mistake is one message, another error a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return 0
    # A process that was started by hand may outlive its shell.
    by_torchrun = job.is_started_by_torchrun()

    # First of all and until all is closed: whatever this waits for, a signal must not end it in the midst.
    with StopRequest() as stop, launcher_watched(stop.ask, stop.end, by_torchrun) as stop.look:
        code = _main(arguments, stop)
    leave_stuck_saves(code)
    return code


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
    except BaseException as error:  # torch's CheckpointException is not an Exception
        # No collective here: the other ranks may be anywhere. torchrun ends them when this one exits.
        print(mask_text(report(error, rank)), file=sys.stderr, flush=True)
        return LOOPING if isinstance(error, RestartLoopError) else 1


class Trainer:
    """Everything of one run. `__init__` checks what can be checked without touching a disk or a peer;
    `run` trains.
    """

    def __init__(
        self, loaded: Loaded[JobConfig], environment: job.Environment, stop: StopRequest | None = None
    ):
        """stop: the signals to answer; without it none are."""
        config = self.config = loaded.config
        self.environment, self.stop = environment, stop or StopRequest()
        logger.info("%s", config.job.description or "torchtitan_rd")
        for warning in loaded.warnings:
            logger.warning("%s", warning)
        self.device = environment.device()
        self.dump_folder = Path(config.job.dump_folder)
        # A tokenizer on the hub is fetched by one rank for all:
        # such a run is planned once the ranks have met.
        self._plan = None if run_plan.reads_hub_tokenizer(config) else self._make_plan(tokenizer=None)
        self.step = 0
        self.tokens_seen = 0
        self.has_opened_outputs = False
        self._parts: Parts | None = None
        self._spikes = SpikeWatch(config.training)
        self._rollbacks = Rollbacks(self.dump_folder, config.training, writes=environment.rank == 0)
        self._unjudged: StepResult | None = None  # the last step's, where numbers come late
        self._failures = FailureCount(self.dump_folder, config.as_dict())

    def _make_plan(self, tokenizer: Tokenizer | None) -> RunPlan:
        plan = run_plan.resolve(self.config, self.environment, device=self.device, tokenizer=tokenizer)
        for line in plan.report():
            logger.info("%s", line)
        return plan

    @property
    def plan(self) -> RunPlan:
        """What runs; of a run whose tokenizer is on the hub, once `run` has fetched it."""
        if self._plan is None:
            raise RuntimeError("the tokenizer of this run is fetched by run()")
        return self._plan

    @property
    def parts(self) -> Parts:
        """Of a run that has been built."""
        if self._parts is None:
            raise RuntimeError("the parts of a run are built by run()")
        return self._parts

    def run(self) -> Status:
        """Builds in order, trains to the last step or until all ranks agree to stop; returns how it ended."""
        training, rank = self.config.training, self.environment.rank
        job.set_determinism(training.seed, training.deterministic, self.device)
        try:
            self._failures.refuse_a_loop()
        except RestartLoopError as error:
            self._tell("looping", str(error), replace=True)
            raise
        # An earlier run's status must not stand for this one's, however early this one ends.
        had_status = rank == 0 and remove_exit_status(self.dump_folder)
        self.stop.record = lambda reason: self._tell(self._cut_short(), reason)
        with ExitStack() as holding:  # the dump folder, until this run's status stands in it
            return self._run(holding, had_status)

    def _run(self, holding: ExitStack, had_status: bool) -> Status:
        try:
            job.init_process_group(self.environment, self.device, self.config.comm, self.dump_folder)
            had_status = any(job.gather(had_status))  # from here on any rank may write its own
            ranks = self._data_ranks()
            if self._plan is None:
                self._plan = self._make_plan(
                    load_tokenizer(ranks.tokenizer(self.config.model.tokenizer_path))
                )
            with ExitStack() as closing:
                self._parts = self._build(ranks, closing, holding)
                self._begin()
                is_finished = self._work()
            dist.barrier()  # all ranks have closed, so what rank 0 writes holds for each
        except BaseException as error:
            if self.stop.explains_an_end():  # that of a peer too, which looks like an error of its own
                status = self._cut_short()
                self._tell(status, self.stop.reason())
                return status
            # Nothing is written for a mistake in the input.
            if self.has_opened_outputs or had_status:
                self._tell_failure(error)
            raise
        status = "finished" if is_finished else self._cut_short()
        if self.environment.rank == 0:
            # Rank 0 speaks for all here: a run that was turned away at the lock may have left its own word.
            self._tell(status, "" if is_finished else self.stop.reason(), replace=True)
            if is_finished:
                self._failures.clear()
        dist.destroy_process_group()
        return status

    def _tell(self, status: Status, reason: str, replace: bool = False) -> bool:
        """Returns whether it was this rank that told."""
        replace = replace or not dist.is_initialized()  # before the ranks have met it may be a stale one
        return write_exit_status(self.dump_folder, status, self.step, reason, self.environment.rank, replace)

    def _tell_failure(self, error: BaseException) -> None:
        """Raises RestartLoopError if this step has failed as often as it may."""
        reason = f"{type(error).__name__}: {error}"
        is_in_a_step = not self.stop.ends_at_once
        # The rank that tells is the one that counts: the others fail because it has.
        if self._tell("failed", reason) and is_in_a_step and (loop := self._failures.add(self.step, reason)):
            self._tell("looping", str(loop), replace=True)
            raise RestartLoopError(f"{loop}\n{report(error, self.environment.rank)}") from error

    def _work(self) -> bool:
        """All between building and closing; returns False if a signal cut it short."""
        if self.config.checkpoint.create_seed_checkpoint:
            run_state.save_seed(self.parts, self.step)
            return True
        profiler = Profiler(
            self.config.profiling,
            dump_folder=self.dump_folder,
            rank=self.environment.rank,
            device=self.device,
            step=self.step,
        )
        with profiler:
            is_finished = self._train(profiler)
        if is_finished and self.config.checkpoint.last_save_in_hf:
            with self.stop.at_once(self.device):
                run_state.export_hf(self.parts, self.step, self.config.checkpoint.export_dtype)
        return is_finished

    def _cut_short(self) -> Status:
        """How a run ended that a signal ended: whether it can go on from where it stood."""
        is_saved = self._parts is not None and self._parts.checkpointer.is_committed(self.step)
        return "preempted" if is_saved else "stopped"

    def _data_ranks(self) -> DataRanks:
        states = saved_states(self.config.checkpoint, self.dump_folder)
        return DataRanks(job.gather, self.environment.rank, self.environment.local_rank, states)

    def _build(self, ranks: DataRanks, closing: ExitStack, holding: ExitStack) -> Parts:
        """What must be closed goes to `closing`, which closes the last built first;
        the folder's lock to `holding`.
        """

        def lock_folder() -> FolderLock | None:
            lock = holding.enter_context(locked_run_folder(self.dump_folder, stale=EXIT_STATUS))
            self.has_opened_outputs = True
            return lock

        builder = Builder(self.config, self.environment, self.device, self.plan, ranks, self.stop, closing)
        return builder.build(lock_folder)

    def _begin(self) -> None:
        """From where it stands in its checkpoints, or from the start; then says in its folder what runs."""
        self.stop.lost = lambda: self.parts.checkpointer.lost_at(self.step)
        self._restore()
        self.parts.metrics.start(self.step, self.tokens_seen)  # makes the folder
        if self.environment.rank == 0:
            run_state.write_documents(self.parts, self.config, self.dump_folder)

    def _validate(self) -> dict[str, float]:
        """val_loss, and for a recurrent model val_loss_<depth>; the same on all ranks.
        Nothing if all agree to stop.
        """
        self.parts.heartbeat.beat(self.step, "validation")
        read_outs = self.plan.draws.validation(self.config.validation.partial_depth_eval, self.parts.held_out)
        with self.parts.metrics.pause("validation"):
            losses = validate(
                self.parts.model,
                self.parts.held_out,
                self.device,
                read_outs,
                self.stop,
                self.config.training.loss_chunk_tokens,
                self.plan.positions,
            )
        if losses:
            logger.info(
                "step %d: %s", self.step, "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            )
        return losses

    def _restore(self) -> None:
        state = run_state.restore(self.parts, self.plan, self.config, self.environment)
        if state is not None:
            self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        made = self._rollbacks.read(is_new_run=state is None) if self.environment.rank == 0 else []
        self.parts.queue.pass_over(self._rollbacks.take(job.gather(made)[0]))

    def _train(self, profiler: Profiler) -> bool:
        """The loop. Returns False if it ended because of a signal."""
        config, parts = self.config, self.parts
        total_steps, started_at = config.training.steps, self.step
        collector = job.GarbageCollector(config.training.gc_freq)
        if started_at >= total_steps:
            logger.info("all %d steps are done: raise training.steps to train on", total_steps)
        self.stop.ends_at_once = False

        while self.step < total_steps:
            self.step += 1
            collector.run(self.step)

            parts.heartbeat.beat(self.step, "data")
            with parts.metrics.time_data():
                batches = parts.queue.next()
            self.tokens_seen += parts.queue.rows() * config.training.seq_len

            if config.training.replays_at(self.step):
                self._replay(batches)
            lr = set_lr(parts.optimizer, lr_factor(config.lr_scheduler, self.step, total_steps))
            is_logged = parts.metrics.should_log(self.step) or config.validation.is_due(
                self.step, total_steps
            )
            watching = is_logged and self.plan.dims.data_rank(self.environment.rank) == 0
            with self.plan.draws.watch(parts.model, watching=watching) as telemetry:
                result = parts.train_step(self.step, batches, self.tokens_seen)
            parts.metrics.add(result)
            if config.training.on_spike == "rollback" and self._rolled_back(result):
                continue

            if is_logged:
                self._log(result, batches, lr=lr, telemetry=telemetry)

            # On a GPU the flag is that of the step before, unless this step is logged: on all ranks alike.
            stopping = parts.train_step.stop_requested or self.stop.agreed
            self._save_if_due(stopping)
            profiler.step()
            if stopping and self.step < total_steps:
                self._stop_early()
                return False

            if self.step == started_at + 1:
                job.shorten_timeouts(config.comm, parts.mesh)
        return True

    def _replay(self, batches: list[Batch]) -> None:
        training = self.config.training
        run = partial(self.parts.train_step.rehearse, self.step, batches)
        exact = training.deterministic or self.device.type == "cpu"
        with self.parts.metrics.pause("replay"):
            replay(run, job.gather, training, step=self.step, gradients=exact)

    def _rolled_back(self, result: StepResult) -> bool:
        """Looks at the loss that is known by now, where that is late the step before's: after a spike the run
        stands where a checkpoint from before it does. Collective.
        """
        self._spikes.began(self.step, self.parts.queue.number)
        known, self._unjudged = (self._unjudged, result) if self.parts.train_step.late else (result, None)
        if known is None or known.numbers.skipped:
            return False
        spike = self._spikes.judge(known.step, known.loss, seen_at=self.step)
        if spike is None:
            return False
        self.parts.heartbeat.beat(self.step, "rollback")
        state = run_state.roll_back(self.parts, self._rollbacks, spike, self.environment)
        if state is None:
            return False
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self._unjudged = None
        return True

    def _stop_early(self) -> None:
        self.parts.train_step.settle()  # a last update that must not be ends the run as such
        saved = self.config.checkpoint.enable
        saving = "a checkpoint is saved" if saved else "nothing is saved (checkpoint.enable)"
        logger.info("stopping after step %d: %s", self.step, saving)

    def _log(self, result: StepResult, batches: list[Batch], *, lr: float, telemetry: Any) -> None:
        self.parts.train_step.settle()  # nothing is validated or reported that must not be trained on
        extra = self.plan.draws.describe(telemetry, result.depths, sum_over_tokens(self.parts.mesh))
        if self.config.validation.is_due(self.step, self.config.training.steps):
            extra |= self._validate()
        extra |= self.parts.loader.describe(job.gather_numbers) | self.parts.checkpointer.describe()
        extra |= self.parts.stragglers.report(job.gather_numbers)
        extra |= {"batch": self.parts.queue.number} if self.parts.queue.passes_over else {}
        data_hash = hash_ids(batches) if self.config.metrics.log_data_hash else None
        self.parts.metrics.log(
            self.step, lr=lr, tokens_seen=self.tokens_seen, data_hash=data_hash, extra=extra
        )

    def _save_if_due(self, stopping: bool) -> None:
        heartbeat, train_step, checkpointer = (
            self.parts.heartbeat,
            self.parts.train_step,
            self.parts.checkpointer,
        )
        last_step = self.step == self.config.training.steps
        heartbeat.beat(self.step, "checkpoint")
        if train_step.saved:
            checkpointer.wait()  # for nothing, by then: raises what went wrong, on all ranks at the same step
            train_step.saved = False

        if checkpointer.should_save(self.step, last_step=last_step or stopping):
            train_step.settle()  # counts on the host must be right, and a run that must stop saves nothing
            heartbeat.beat(self.step, "saving")
            with self.parts.metrics.pause("checkpoint"):
                done = (self.step, self.tokens_seen)
                run_state.save(
                    self.parts, self.plan, *done, last_step=last_step, required=last_step or stopping
                )
            train_step.saved = False  # that was of the save before


if __name__ == "__main__":
    sys.exit(main())
