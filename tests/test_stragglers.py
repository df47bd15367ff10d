"""A rank that keeps the others waiting is named, with by how much; noise and single stalls are not."""

import logging
import random

import pytest

from tests.launch import launch, rows
from torchtitan_rd.reliability.stragglers import Stragglers, slowest

SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.mixed_precision_param=float32",
    "--training.steps=8",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--metrics.log_freq=1",
    "--comm.heartbeat_seconds=0",
]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_step(rank: Stragglers, clock: Clock, step: int, own: float, shared: float) -> None:
    """A step whose first collective is reached after `own` seconds, and that ends `shared` later."""
    rank.beat(step, "data")
    clock.now += own
    rank.beat(step, "microbatch 1 of 1")
    clock.now += shared
    rank.beat(step, "update")
    rank.beat(step, "checkpoint")
    clock.now += 7.0  # a save is nobody's own time
    rank.beat(step, "saving")


def compare(own: list[list[float]], steps: int) -> dict:
    """The last report of ranks with these own times: own[rank][step]."""
    clocks = [Clock() for _ in own]
    ranks = [Stragglers(clock) for clock in clocks]
    report = {}
    for step in range(steps):
        for number, (rank, clock) in enumerate(zip(ranks, clocks, strict=True)):
            run_step(rank, clock, step, own[number][step], shared=1.0)
        sent: list[list[float]] = []
        for rank in ranks[1:]:
            assert rank.report(lambda numbers: sent.append(numbers)) == {}  # noqa: B023
        report = ranks[0].report(lambda numbers: [numbers, *sent])  # noqa: B023
    return report


def test_the_slowest_is_compared_with_the_median_rank():
    assert slowest([0.1, 0.1, 0.7, 0.2]) == (2, pytest.approx(0.6))
    assert slowest([0.5, 0.1]) == (0, pytest.approx(0.4))


def test_a_slow_rank_is_warned_of_once_within_20_steps_and_again_when_it_is_twice_as_slow(caplog):
    noise = random.Random(0)
    own = [[0.01 + noise.random() / 100 for _ in range(60)] for _ in range(4)]
    for step in range(60):
        own[2][step] += 0.5 if step < 30 else 2.0
    with caplog.at_level(logging.INFO, logger="torchtitan_rd"):
        report = compare(own, steps=20)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "rank 2 keeps the others waiting: 0.50 s in each step of 1.51 s" in warning
    assert report["slowest_rank"] == 2 and report["slowest_rank_seconds"] == pytest.approx(0.5, abs=0.02)

    caplog.clear()
    with caplog.at_level(logging.INFO, logger="torchtitan_rd"):
        compare(own, steps=60)
    first, second = [record.getMessage() for record in caplog.records]
    assert "waiting: 0.50 s" in first
    assert "rank 2" in second and float(second.split("waiting: ")[1].split()[0]) >= 1.0


def test_noise_and_stalls_of_200_steps_are_no_straggler(caplog):
    noise = random.Random(1)
    own = [[0.01 + noise.random() / 20 for _ in range(200)] for _ in range(8)]
    for step in range(0, 200, 7):  # a collection here, a checkpoint's thread there
        own[noise.randrange(8)][step] += 3.0
    with caplog.at_level(logging.INFO, logger="torchtitan_rd"):
        compare(own, steps=200)
    assert not caplog.records


def test_a_rank_that_is_well_again_is_told_and_may_be_named_again(caplog):
    own = [[0.01] * 120, [0.01] * 30 + [0.4] * 30 + [0.01] * 30 + [0.4] * 30]
    with caplog.at_level(logging.INFO, logger="torchtitan_rd"):
        compare(own, steps=120)
    kinds = ["keeps" if "rank 1 keeps" in record.getMessage() else "well" for record in caplog.records]
    assert kinds == ["keeps", "well", "keeps"]


def test_one_rank_alone_has_nobody_to_keep_waiting():
    rank = Stragglers()
    rank.beat(1, "data")
    rank.beat(1, "microbatch 1 of 1")
    assert rank.report(lambda numbers: [numbers]) == {}


def test_a_run_names_its_slow_rank_and_the_row_has_its_delay(tmp_path):
    arguments = [*SMALL, f"--job.dump_folder={tmp_path}"]
    done = launch(2, arguments, ("--slow-rank", "1", "0.3"))
    assert done.codes == [0, 0], done.errors
    assert "rank 1 keeps the others waiting: 0." in done.errors[0]
    last = rows(tmp_path)[-1]
    assert last["slowest_rank"] == 1 and 0.15 < last["slowest_rank_seconds"] < 2.0, last
