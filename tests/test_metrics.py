"""The metrics: rows, their file across restarts, rates, MFU.
See test_metrics_outputs.py for the other outputs.
"""

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from tests.ranks import run_on_ranks
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.job import gather_numbers
from torchtitan_rd.log import logger
from torchtitan_rd.metrics import Metrics, MetricsConfig, StepNumbers, StepResult, peak_flops
from torchtitan_rd.metrics.devices import peak_flops_by_name
from torchtitan_rd.metrics.journal import Journal

FLOPS = SimpleNamespace(matmul=6e9, attention_full=2e9, attention_causal=1e9)
TOKENS = 4096  # of one step
EXACT = ("step", "loss", "loss_hex", "loss_max", "grad_norm", "lr", "tokens_seen", "data_hash")


def make(
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    total_steps: int = 12,
    across: dict | None = None,
    **keys,
) -> Metrics:
    """across: what Metrics is told of other ranks (gather, own_depths, flops_drawn)."""
    return Metrics(
        MetricsConfig(**keys),
        dump_folder=folder,
        job_config={"training": {"steps": total_steps}},
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        flops=FLOPS,
        total_steps=total_steps,
        **(across or {}),
    )


def known(step: int, loss: float, loss_max: float, grad_norm: float, skips: int = 0, depths=()) -> StepResult:
    numbers = StepNumbers(loss, loss_max, 3, grad_norm, skips > 0, skips, False, False, False, True)
    return StepResult(step, lambda: numbers, depths=depths)


def result_of(step: int) -> StepResult:
    return known(step, 1 / 3 + 1 / step, 1 / 3 + 1 / step + 0.1, 1 / step)


def train(folder: Path, start: int, stop: int, *, differs: bool = False, **keys) -> None:
    """The training loop of steps start + 1 .. stop, ended as by kill -9: nothing is closed."""
    metrics = make(folder, log_freq=5, **keys)
    metrics.start(start, start * TOKENS, differs=differs)
    for step in range(start + 1, stop + 1):
        with metrics.time_data():
            pass
        metrics.add(result_of(step))
        if metrics.should_log(step):
            metrics.log(step, lr=0.1 / step, tokens_seen=step * TOKENS, data_hash=f"{step:x}")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exact(folder: Path) -> list[dict]:
    return [{key: row[key] for key in EXACT} for row in rows(folder)]


@pytest.fixture
def messages(monkeypatch):
    """What the package logs, in order."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    yield found
    logger.setLevel(level)


def test_steps_logged_are_the_first_every_log_freq_th_and_the_last(tmp_path):
    train(tmp_path, 0, 12)
    assert [row["step"] for row in rows(tmp_path)] == [1, 5, 10, 12]


def test_a_row_holds_the_exact_loss_and_the_state_of_the_run(tmp_path):
    train(tmp_path, 0, 1)
    (row,) = rows(tmp_path)
    loss = result_of(1).loss
    assert float.fromhex(row["loss_hex"]) == row["loss"] == loss
    assert row["loss_max"] == result_of(1).loss + 0.1
    assert (row["grad_norm"], row["lr"], row["tokens_seen"], row["data_hash"]) == (1.0, 0.1, TOKENS, "1")
    assert row["mfu_full"] is None and row["mfu_causal"] is None
    assert row["memory_max_rss_gib"] > 0.01


def test_a_loss_that_is_not_finite_keeps_the_file_valid_json(tmp_path, messages):
    metrics = make(tmp_path)
    metrics.start(0, 0)
    metrics.add(known(1, float("nan"), float("inf"), 1.0))
    metrics.log(1, lr=0.1, tokens_seen=TOKENS)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is None and row["loss_max"] is None and row["loss_hex"] == "nan"
    assert "loss: not finite" in messages[-1]


def test_a_resumed_file_equals_the_uninterrupted_one_minus_timing(tmp_path):
    train(tmp_path / "whole", 0, 12)
    train(tmp_path / "cut", 0, 10)  # killed after step 10
    train(tmp_path / "cut", 3, 11)  # resumed from step 3, killed again
    train(tmp_path / "cut", 9, 12)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


def test_the_first_row_after_a_restart_says_where_it_went_on_from(tmp_path):
    train(tmp_path, 0, 20)
    train(tmp_path, 10, 20)
    marks = {row["step"]: row["resumed_from"] for row in rows(tmp_path) if "resumed_from" in row}
    assert len(marks) == 1 and set(marks.values()) == {10}


@pytest.mark.parametrize(
    "torn", [b'{"step": 10, "loss": 0.4', b'{"step": 10}', b"\x00\x00\n", b"[]\n", b"7\n"]
)
def test_a_line_torn_by_a_kill_is_dropped_on_resume(tmp_path, torn, messages):
    train(tmp_path / "whole", 0, 12)
    train(tmp_path / "cut", 0, 5)
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    train(tmp_path / "cut", 10, 12)
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 5, 12]
    train(tmp_path / "cut", 5, 12)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    assert any("dropped unreadable lines [3]" in message for message in messages)


def test_a_crash_while_the_file_is_rewound_leaves_the_old_file(tmp_path, monkeypatch):
    train(tmp_path, 0, 12)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path).start(5, 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_that_starts_at_step_0_keeps_the_rows_of_the_earlier_one_aside(tmp_path, messages):
    train(tmp_path, 0, 12)
    old = (tmp_path / "metrics.jsonl").read_bytes()
    train(tmp_path, 0, 1)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert (tmp_path / "metrics.previous.jsonl").read_bytes() == old
    assert any("metrics.previous.jsonl" in message for message in messages)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_file():
    journal = Journal(Path("/dev/full"))
    journal.open(0)
    with pytest.raises(TrainingError, match="cannot write /dev/full: No space left on device"):
        journal.append({"step": 1})
    journal.close()


def log_on_rank(rank, world_size, folder):
    metrics = make(
        Path(folder), rank=rank, world_size=world_size, peak_tflops=1.0, across={"gather": gather_numbers}
    )
    metrics.start(0, 0)
    with metrics.time_data():
        pass
    metrics.add(result_of(1))
    metrics._memory.read = lambda: {"memory_max_rss_gib": 1.0 + rank}
    metrics.log(1, lr=0.1, tokens_seen=TOKENS)
    metrics.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_rank_0_alone_writes_and_tells_the_highest_peak_of_memory_and_its_rank(tmp_path, world_size):
    run_on_ranks(world_size, log_on_rank, str(tmp_path))
    (row,) = rows(tmp_path)
    assert (row["step"], row["memory_max_rss_gib"], row["memory_max_rank"]) == (1, world_size, world_size - 1)


def test_unlogged_steps_are_not_read(tmp_path):
    def refuse():
        raise AssertionError("read a number of a step that is not logged")

    metrics = make(tmp_path)
    metrics.start(0, 0)
    for step in (1, 2):
        metrics.add(StepResult(step, refuse))


def test_a_row_holds_the_mean_loss_of_its_interval_without_skipped_steps(tmp_path):
    metrics = make(tmp_path)
    metrics.start(0, 0)
    metrics.add(known(1, 9.0, 9.0, 1.0))
    metrics.log(1, lr=0.1, tokens_seen=TOKENS)
    for step, loss in ((2, 5.0), (3, 3.0), (5, 1.0)):
        metrics.add(known(step, loss, loss + step, 1.0))
    metrics.add(known(6, float("nan"), float("nan"), 1.0, skips=1))
    metrics.log(6, lr=0.1, tokens_seen=6 * TOKENS)
    first, second = rows(tmp_path)
    assert (first["loss_mean"], first["loss_max_interval"], first["skipped_steps"]) == (9.0, 9.0, 0)
    assert (second["loss"], second["loss_mean"], second["loss_max_interval"]) == (None, 3.0, 7.0)
    assert (second["skipped_steps"], second["consecutive_skips"], second["loss_max_rank"]) == (1, 1, 3)


def test_the_deepest_draw_of_each_microbatch_counts_whatever_rank_drew_it(tmp_path):
    asked = []

    def gather(numbers):
        assert numbers[1:] == [4, 4, 1, 4]  # behind the memory: (n, k) of this rank's two microbatches
        return [numbers, [numbers[0], 2, 4, 7, 4]]

    def flops_drawn(depths):
        asked.append(depths)
        return FLOPS

    across = {"gather": gather, "own_depths": True, "flops_drawn": flops_drawn}
    metrics = make(tmp_path, across=across)
    metrics.start(0, 0)
    metrics.add(known(1, 1.0, 1.0, 1.0, depths=((4, 4), (1, 4))))
    metrics.log(1, lr=0.1, tokens_seen=TOKENS)
    assert asked == [[[(4, 4), (1, 4)], [(2, 4), (7, 4)]]]


def test_close_may_come_before_start_and_twice(tmp_path):
    metrics = make(tmp_path)
    metrics.close()
    metrics.start(0, 0)
    metrics.close()
    metrics.close()


def fake_clock(monkeypatch, *times):
    """perf_counter returns `times` in turn."""
    monkeypatch.setattr("torchtitan_rd.metrics.metrics.time.perf_counter", iter(times).__next__)


def test_rates_follow_their_definitions(tmp_path, monkeypatch):
    metrics = make(tmp_path, world_size=2, peak_tflops=0.004)
    fake_clock(monkeypatch, 100.0, 101.0, 102.0, 110.0, 110.0)  # start; data from, to; log; next window
    metrics.start(4, 4 * TOKENS)
    with metrics.time_data():
        pass
    metrics.add(result_of(9))
    metrics.log(9, lr=0.1, tokens_seen=9 * TOKENS)
    (row,) = rows(tmp_path)
    tokens_per_second = 5 * TOKENS / 10 / 2
    assert row["tokens_per_second_per_device"] == tokens_per_second
    assert row["step_seconds"] == 2.0
    assert row["data_loading_seconds"] == 0.2 and row["data_loading_share"] == 0.1
    assert row["tflops"] == pytest.approx(tokens_per_second * 8e9 / 1e12)
    assert row["mfu_full"] == pytest.approx(tokens_per_second * 8e9 / 4e9)
    assert row["mfu_causal"] == pytest.approx(tokens_per_second * 7e9 / 4e9)


def test_time_that_data_took_before_a_row_does_not_count_in_the_next(tmp_path, monkeypatch):
    metrics = make(tmp_path)
    fake_clock(monkeypatch, 0.0, 1.0, 2.0, 4.0, 5.0, 7.0, 7.0)
    metrics.start(0, 0)
    with metrics.time_data():
        pass
    for step in (1, 2):
        metrics.add(result_of(step))
        metrics.log(step, lr=0.1, tokens_seen=step * TOKENS)
    assert [row["data_loading_share"] for row in rows(tmp_path)] == [0.25, 0.0]


def test_time_paused_for_is_logged_by_itself_and_stays_out_of_rates_and_eta(tmp_path, monkeypatch, messages):
    metrics = make(tmp_path, peak_tflops=0.004)
    # start; validation; log; next interval; a save that follows the row; log; next interval
    fake_clock(monkeypatch, 0.0, 4.0, 10.0, 10.0, 10.0, 11.0, 18.0, 20.0, 20.0)
    metrics.start(0, 0)
    with metrics.pause("validation"):
        pass
    metrics.add(result_of(2))
    metrics.log(2, lr=0.1, tokens_seen=2 * TOKENS)
    with metrics.pause("checkpoint"):
        pass
    metrics.add(result_of(3))
    metrics.log(3, lr=0.1, tokens_seen=3 * TOKENS)
    first, second = rows(tmp_path)
    assert (first["validation_seconds"], first["step_seconds"]) == (6.0, 2.0)
    assert (second["checkpoint_seconds"], second["step_seconds"]) == (7.0, 3.0)
    assert "validation_seconds" not in second and "checkpoint_seconds" not in first
    assert first["tokens_per_second_per_device"] == TOKENS / 2.0
    assert first["mfu_full"] == pytest.approx(TOKENS / 2.0 * 8e9 / 4e9)
    assert "eta: 0:00:20" in messages[0] and "eta: 0:00:27" in messages[1]


PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 120GB": 990e12,
    "NVIDIA GH200 480GB": 990e12,
    "NVIDIA GH200 144G HBM3e": 990e12,
    "AMD Instinct MI250X": 191.5e12,
    "AMD Instinct MI300X": 1307e12,
    "AMD Instinct MI300X OAM": 1307e12,
    "AMD Instinct MI300X VF": 1307e12,
}
UNKNOWN = [
    "NVIDIA H20",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA B200",
    "AMD Instinct MI250X / MI250",
    "AMD Instinct MI300A",
    "AMD Radeon Graphics",
    "",
]


@pytest.mark.parametrize("name", PEAKS)
def test_a_known_device_has_the_peak_of_its_data_sheet(name):
    assert peak_flops_by_name(name) == PEAKS[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_device_has_no_peak_rather_than_a_guess(name):
    assert peak_flops_by_name(name) is None


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_a_line_elsewhere_than_on_a_terminal_is_plain_and_ends_with_percent_and_eta(
    tmp_path, monkeypatch, messages
):
    metrics = make(tmp_path, total_steps=100)
    fake_clock(monkeypatch, 0.0, 20.0, 20.0)
    metrics.start(0, 0)
    metrics.add(known(10, 2.5, 2.6, 1.25))
    metrics.log(10, lr=3e-4, tokens_seen=10 * TOKENS)
    memory = rows(tmp_path)[0]["memory_max_rss_gib"]
    assert messages == [
        "step: 10  loss: 2.5000  grad_norm: 1.2500  lr: 3.000e-04  tps: 2,048  mfu: n/a  "
        f"memory: {memory:.2f}GiB  10.0% eta: 0:03:00"
    ]


@pytest.mark.parametrize("keys", [{"log_freq": 0}, {"save_tb_folder": "../x"}, {"save_tb_folder": "/x"}])
def test_values_out_of_range_are_refused(keys):
    with pytest.raises(ValidationError):
        MetricsConfig(**keys)


@pytest.mark.gpu
def test_a_cuda_device_reports_peaks_since_the_last_row(tmp_path):
    metrics = make(tmp_path)
    metrics._device = torch.device("cuda", 0)
    metrics.start(0, 0)
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for step in (1, 2):
        metrics.add(result_of(step))
        metrics.log(step, lr=0.1, tokens_seen=step * TOKENS)
    first, second = rows(tmp_path)
    assert first["memory_max_active_gib"] >= 0.25 > second["memory_max_active_gib"]
    assert 0 < first["memory_max_reserved_pct"] <= 100 and first["memory_num_ooms"] == 0
