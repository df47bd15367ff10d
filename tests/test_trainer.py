"""How the trainer joins its parts: what is settled before anything outlives a step,
and what each part is told.
"""

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.launch import rows
from tests.ranks import run_on_ranks
from tests.test_job import master_port
from torchtitan_rd import job, parts, run_state, train, train_step
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.draws import Draws
from torchtitan_rd.errors import CheckpointError, ConfigError, TrainingError
from torchtitan_rd.heartbeat import Heartbeat
from torchtitan_rd.models.raven.shape import count_flops
from torchtitan_rd.signals import StopRequest
from torchtitan_rd.train import Trainer
from torchtitan_rd.train_step import TrainStep

ALONE = job.Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
SMALL = [
    *(
        "--training.seq_len=16",
        "--training.local_batch_size=2",
        "--training.steps=6",
        "--comm.heartbeat_seconds=0",
    ),
    *("--model.overrides.dim=32", "--model.overrides.n_layers=1", "--training.mixed_precision_param=float32"),
]
RAVEN = [
    *(key for key in SMALL if "n_layers" not in key),
    *(
        "--model.name=raven",
        "--model.flavor=debug-demo",
        "--model.overrides.n_heads=2",
        "--no-recurrence.lockstep",
    ),
]
VALIDATION = ["--validation.enable", "--validation.dataset=pydoc-validation", "--validation.sequences=2"]
CHECKPOINTS = ["--checkpoint.enable", "--checkpoint.async_mode=disabled"]


def trainer(tmp_path, *arguments, environment=ALONE, stop=None) -> Trainer:
    return Trainer(
        load([*SMALL, *arguments, f"--job.dump_folder={tmp_path}"], environment), environment, stop
    )


@pytest.fixture
def a_late_nan(monkeypatch):
    """Steps whose numbers the host reads late, as on a GPU, of which the second has a NaN for its loss."""
    plain, backward, now = TrainStep.__init__, TrainStep._backward, {}
    monkeypatch.setattr(train_step, "takes_flag", lambda optimizer, device: True)
    monkeypatch.setattr(TrainStep, "__init__", lambda self, *a, **k: plain(self, *a, **k, late=True))

    def beat(self, step, phase):
        now["step"] = step

    def poisoned(self, *arguments):
        return backward(self, *arguments) * (float("nan") if now["step"] == 2 else 1.0)

    monkeypatch.setattr(Heartbeat, "beat", beat)
    monkeypatch.setattr(TrainStep, "_backward", poisoned)


@pytest.mark.parametrize(
    "what",
    [
        ["--metrics.log_freq=2"],
        [*VALIDATION, "--validation.freq=2", "--metrics.log_freq=100"],
        [*CHECKPOINTS, "--checkpoint.interval=2", "--metrics.log_freq=100"],
        ["--metrics.log_freq=100"],
    ],
    ids=["row", "validation", "checkpoint", "nothing"],
)
def test_a_step_that_must_not_be_trained_on_is_neither_reported_nor_validated_nor_saved(
    what, a_late_nan, tmp_path, monkeypatch
):
    validated = []
    monkeypatch.setattr(train, "validate", lambda *arguments: validated.append(arguments) or {})
    run = trainer(tmp_path, *what)
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        run.run()
    # Where nothing asks, the numbers of step 2 are read in step 3.
    assert run.step == (3 if what == ["--metrics.log_freq=100"] else 2)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert not validated and not list(tmp_path.glob("checkpoint/step-*"))


def test_validation_and_checkpoint_stand_in_their_rows_and_not_in_the_rates(tmp_path, monkeypatch):
    """On a clock that goes one second a look, 100 in a validation and 1000 in a save."""
    clock = {"now": 0.0}

    def perf_counter():
        clock["now"] += 1.0
        return clock["now"]

    def slow(seconds, function):
        def slowed(*arguments, **options):
            clock["now"] += seconds
            return function(*arguments, **options)

        return slowed

    monkeypatch.setattr("torchtitan_rd.metrics.metrics.time.perf_counter", perf_counter)
    monkeypatch.setattr(train, "validate", slow(100.0, train.validate))
    monkeypatch.setattr(parts.Checkpointer, "save", slow(1000.0, parts.Checkpointer.save))
    what = [*VALIDATION, "--validation.freq=2", *CHECKPOINTS, "--checkpoint.interval=2"]
    trainer(tmp_path, *what, "--metrics.log_freq=1", "--training.steps=3").run()
    first, second, third = rows(tmp_path)
    # The last step is validated too.
    assert ["validation_seconds" in row for row in (first, second, third)] == [False, True, True]
    assert ["checkpoint_seconds" in row for row in (first, second, third)] == [False, False, True]
    assert 100 < second["validation_seconds"] < 150 and 1000 < third["checkpoint_seconds"] < 1050
    assert all(row["step_seconds"] < 50 for row in (first, second, third))


def test_the_heartbeat_is_told_the_rank_s_place_in_its_node_and_how_long_start_up_may_take(
    tmp_path, monkeypatch
):
    told = []

    class Told(Heartbeat):
        def __init__(self, folder, **options):
            told.append(options)
            super().__init__(folder, **options)

    monkeypatch.setattr(parts, "Heartbeat", Told)
    monkeypatch.setattr(job, "gather", lambda value: [value] * 4)
    environment = replace(ALONE, local_rank=3, local_world_size=4)
    run = trainer(tmp_path, "--training.steps=1", "--comm.init_timeout_seconds=500", environment=environment)
    run.run()
    (options,) = told
    assert (options["local_rank"], options["local_world_size"], options["first_time"]) == (3, 4, 250.0)


def test_the_heartbeat_passes_every_phase_in_which_a_rank_may_hang(tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(Heartbeat, "beat", lambda self, step, phase: beats.append((step, phase)))
    what = [
        *VALIDATION,
        *CHECKPOINTS,
        "--training.global_batch_size=4",
        "--training.steps=2",
        "--validation.freq=2",
    ]
    trainer(tmp_path, *what).run()
    step = ["data", "microbatch 1 of 2", "microbatch 2 of 2", "update"]
    first, second = [*step, "checkpoint"], [*step, "validation", "checkpoint", "saving"]
    assert beats == [*((1, phase) for phase in first), *((2, phase) for phase in second)]


def test_a_recurrent_state_is_described_in_logged_steps_alone(tmp_path, monkeypatch):
    """It costs operations in every iteration."""
    watched, watch = [], Draws.watch

    def recorded(self, model, *, watching):
        context = watch(self, model, watching=watching)
        watched.append(not isinstance(context, nullcontext))
        return context

    monkeypatch.setattr(Draws, "watch", recorded)
    Trainer(load([*RAVEN, "--metrics.log_freq=3", f"--job.dump_folder={tmp_path}"], ALONE), ALONE).run()
    assert watched == [True, False, True, False, False, True]
    assert all("recurrent_residual" in row for row in rows(tmp_path))


def test_initial_weights_that_were_made_for_other_arithmetic_are_told(tmp_path, caplog):
    trainer(tmp_path / "a", *CHECKPOINTS, "--checkpoint.create_seed_checkpoint").run()
    seed = f"--checkpoint.initial_load_path={tmp_path / 'a' / 'checkpoint' / 'step-0'}"
    trainer(tmp_path / "b", seed, "--training.steps=1", "--model.overrides.norm_eps=0.25").run()
    told = [
        line for line in caplog.messages if line.startswith("initial weights: ") and "in this run" in line
    ]
    assert told == ["initial weights: norm_eps is 0.25 in this run, 1e-05 where the weights were made"]


def test_initial_weights_of_another_split_into_heads_are_refused_though_all_shapes_are_equal(tmp_path):
    trainer(tmp_path / "a", *CHECKPOINTS, "--checkpoint.create_seed_checkpoint").run()
    seed = f"--checkpoint.initial_load_path={tmp_path / 'a' / 'checkpoint' / 'step-0'}"
    sizes = ("--model.overrides.n_heads=2", "--model.overrides.n_kv_heads=1")
    with pytest.raises(CheckpointError, match=r"n_heads: 4 there, 2 here\n  n_kv_heads: 2 there, 1 here"):
        trainer(tmp_path / "b", seed, "--training.steps=1", *sizes).run()


def test_a_signal_stops_the_run_with_a_checkpoint_and_says_so(tmp_path, monkeypatch, caplog):
    def beat(self, step, phase):
        if (step, phase) == (2, "data"):
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Heartbeat, "beat", beat)
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert trainer(tmp_path, *CHECKPOINTS, stop=stop).run() == "preempted"
    assert json.loads((tmp_path / "exit_status.json").read_text())["status"] == "preempted"
    assert [path.name for path in tmp_path.glob("checkpoint/step-*")] == ["step-2"]
    assert "received SIGUSR1: finishing this step, then stopping" in caplog.messages
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(("arguments", "made"), [([], True), (["--model.vocab_size=100"], False)])
def test_the_traces_folder_is_made_with_the_outputs_and_not_for_a_mistake_in_the_input(
    arguments, made, tmp_path, monkeypatch
):
    """As on a GPU; on a CPU there is nothing to trace."""
    make = job.make_traces_folder
    monkeypatch.setattr(job, "make_traces_folder", lambda device, *rest: make(torch.device("cuda"), *rest))
    with nullcontext() if made else pytest.raises(ConfigError):
        trainer(tmp_path / "dump", "--training.steps=1", *arguments).run()
    assert (tmp_path / "dump" / "comm_traces").is_dir() is made is (tmp_path / "dump").exists()


def test_the_rates_of_a_run_in_which_ranks_draw_their_own_depths_count_the_deepest_draw(tmp_path):
    ratios, draws, shape = run_on_ranks(2, run_of_own_depths, str(tmp_path))[0]
    assert any(mine != other for mine, other in draws)
    assert any(sum(other) > sum(mine) for mine, other in draws), "rank 0 does not know it by itself"

    def full(num_steps):
        count = count_flops(shape, 16, num_steps)
        return count.matmul + count.attention_full

    usual = count_flops(shape, 16)
    expected = [max(full(mine), full(other)) / (usual.matmul + usual.attention_full) for mine, other in draws]
    assert ratios == pytest.approx(expected, rel=1e-9)


def test_the_pace_is_set_by_the_costliest_draw_and_not_by_the_longest(tmp_path):
    """An iteration with gradient costs as much as three without."""
    small = [key for key in RAVEN if "lockstep" not in key]
    run = Trainer(load([*small, f"--job.dump_folder={tmp_path}"], ALONE), ALONE)
    found = run.plan.draws.flops([[(10, 1), (0, 1)], [(5, 4), (3, 1)]])
    assert found == count_flops(run.plan.shape, 16, (4, 2.5))  # the mean of (5, 4) and (3, 1)


def run_of_own_depths(rank, world_size, folder):
    """-> the rows' rates at the mean depth over the plain ones;
    each step's draws of the two ranks; the shape.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(master_port()))
    dist.destroy_process_group()  # the harness's; this one is made as a run makes it
    environment = replace(ALONE, rank=rank, local_rank=rank, world_size=2, local_world_size=2)
    arguments = [*RAVEN, "--metrics.log_freq=1", f"--job.dump_folder={folder}"]
    try:
        run = Trainer(load(arguments, environment), environment)
        run.run()
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the harness ends one
    if rank:
        return None
    found = rows(Path(folder))
    key = "tokens_per_second_per_device"
    ratios = [row[f"{key}_at_mean_depth"] / row[key] for row in found]
    sampler = run.plan.draws.family.sampler
    draws = [
        [tuple(sampler.draw(s, microbatch=s, rank=r)) for r in range(2)] for s in range(1, len(found) + 1)
    ]
    return ratios, draws, run.plan.shape


def test_a_save_is_waited_for_once_it_is_done_and_a_new_one_is_not_taken_for_it(monkeypatch):
    """Where the host reads late, the flag of the save before is still up when the next one has just begun."""
    waits, saves = [], []
    trainer = object.__new__(Trainer)
    trainer.config, trainer.step = JobConfig(), 1
    step = SimpleNamespace(saved=False)
    step.settle = lambda: setattr(step, "saved", True)
    checkpointer = SimpleNamespace(
        should_save=lambda step, last_step: step == 1,
        save=lambda step, *_, **__: saves.append(step),
        wait=lambda: waits.append(trainer.step),
    )
    metrics = SimpleNamespace(pause=lambda _: nullcontext())
    heartbeat = SimpleNamespace(beat=lambda *_: None)
    trainer.tokens_seen, trainer._plan = 0, SimpleNamespace()
    trainer._parts = SimpleNamespace(
        heartbeat=heartbeat, metrics=metrics, train_step=step, checkpointer=checkpointer
    )
    monkeypatch.setattr(run_state, "tensors_of", lambda _: {})
    monkeypatch.setattr(run_state, "state_of", lambda *_: {})
    for trainer.step in (1, 2):
        trainer._save_if_due(stopping=False)
    assert saves == [1] and waits == []
    step.saved = True
    for trainer.step in (3, 4):
        trainer._save_if_due(stopping=False)
    assert waits == [3]
