"""What a plan says of checkpoints on disk, and of how long the data lasts."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.checkpoint.common import names, save_steps
from tests.planning.common import LLAMA, config_of, plan_of
from torchtitan_rd.checkpoint.folders import CheckpointFolder
from torchtitan_rd.job import Environment
from torchtitan_rd.planning.cards import find_card
from torchtitan_rd.planning.compute import SECONDS_A_DAY, Duration, stated_pace
from torchtitan_rd.planning.making import make_plan
from torchtitan_rd.planning.report import checkpoint_bytes
from torchtitan_rd.planning.supply import supplies


@pytest.fixture(scope="module")
def planned():
    config = config_of(
        {**LLAMA, "overrides": {**LLAMA["overrides"], "n_layers": 1}}, training={"seq_len": 32}
    )
    card, environment = find_card(None, 80.0, None), Environment(0, 0, 1, 1, "INFO")
    return make_plan(config, environment, card, stated_pace(None), propose=False, gpus_per_node=1)


def with_checkpoints(plan, *, steps, step_seconds=None, **keys):
    sections = {"checkpoint": {"enable": True, **keys}, "training": {"steps": steps}}
    took = None
    if step_seconds is not None:
        took = Duration(step_seconds, step_seconds * steps / SECONDS_A_DAY, 1.0, stated_pace(None))
    return replace(plan, config=config_of(LLAMA, **sections), duration=took)


@pytest.mark.parametrize(
    ("steps", "step_seconds", "interval"), [(1000, 2.5, 60), (90, 100.0, 7), (7, 1.0, 500)]
)
def test_saves_by_the_clock_are_counted_by_the_time_of_a_step(steps, step_seconds, interval, planned):
    keys = {"interval_type": "seconds", "interval": interval, "keep_latest_k": 0}
    plan = with_checkpoints(planned, steps=steps, step_seconds=step_seconds, **keys)

    # As a run does, with a clock of its own.
    saves, saved_at = 0, 0.0
    for step in range(1, steps + 1):
        if step == steps or step * step_seconds - saved_at >= interval:
            saves, saved_at = saves + 1, step * step_seconds
    disk = checkpoint_bytes(plan)
    assert disk["saves"] == saves and disk["kept_bytes"] == disk["peak_bytes"] == saves * disk["bytes"]
    assert f"about {saves} of them in the run" in plan.text()


def test_saves_by_the_clock_are_not_known_where_the_time_of_a_step_is_not(planned):
    keys = {"interval_type": "seconds", "interval": 60}
    plan = with_checkpoints(planned, steps=1000, keep_latest_k=0, **keys)
    disk = checkpoint_bytes(plan)
    assert (disk["saves"], disk["kept_bytes"], disk["peak_bytes"]) == (None, None, None)
    assert "how many is not known: pass --gpu_tflops" in plan.text() and "all: not known" in plan.text()

    disk = checkpoint_bytes(with_checkpoints(planned, steps=1000, keep_latest_k=3, **keys))
    assert (disk["kept_bytes"], disk["peak_bytes"]) == (3 * disk["bytes"], 4 * disk["bytes"])


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("saves", [1, 2, 3, 5])
def test_the_disk_holds_what_a_real_folder_holds_while_the_last_of_them_is_written(
    saves, keep, planned, tmp_path, monkeypatch
):
    there, real = [], CheckpointFolder.commit

    def counted(folder, staging, name):
        real(folder, staging, name)
        there.append(len(folder.steps()))

    monkeypatch.setattr(CheckpointFolder, "commit", counted)
    save_steps(tmp_path, range(1, saves + 1), keep_latest_k=keep)
    disk = checkpoint_bytes(with_checkpoints(planned, steps=10 * saves, interval=10, keep_latest_k=keep))
    assert disk["saves"] == saves
    assert disk["peak_bytes"] == max(there) * disk["bytes"]
    assert disk["kept_bytes"] == len(names(tmp_path)) * disk["bytes"]


def test_a_disk_that_holds_what_is_kept_and_not_the_next_one_is_told_to_be_too_small(planned, monkeypatch):
    plan = with_checkpoints(planned, steps=100, interval=10, keep_latest_k=2)
    disk = checkpoint_bytes(plan)
    for free, enough in ((disk["kept_bytes"], False), (disk["peak_bytes"], True)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("torchtitan_rd.planning.report.shutil.disk_usage", lambda _, usage=usage: usage)
        assert ("NOT ENOUGH here" not in plan.text()) is enough


ROWS, NEEDED = 8, 20


@pytest.fixture
def supply_of(tmp_path):
    (tmp_path / "train").mkdir()
    sources = ["a", "b"] * (ROWS // 2)
    table = pa.table({"input_ids": [[1] * 17] * ROWS, "source_dataset": sources})
    pq.write_table(table, tmp_path / "train" / "a.parquet")

    def supply(**keys):
        training = {"dataset": "packed", "dataset_path": str(tmp_path), "seq_len": 16, **keys}
        config = config_of(LLAMA, training=training)
        (found,) = supplies(config, plan_of(config, 1), NEEDED)
        return found

    return supply


@pytest.mark.parametrize("ranges", [[], [[0, 0]], [[7, 30], [2, 3], [1, 2]], [[8, 9]], [[0, 5], [2, 3]]])
def test_rows_that_are_skipped_do_not_last(ranges, supply_of):
    skipped = {row for first, last in ranges for row in range(first, last + 1)}
    left = len(set(range(ROWS)) - skipped)
    found = supply_of(skip_ranges=ranges)
    assert (found.rows, found.epochs) == (left, NEEDED / left)


def test_data_of_which_no_row_is_left_lasts_for_no_known_time(supply_of):
    found = supply_of(skip_ranges=[[0, ROWS - 1]])
    assert (found.rows, found.epochs) == (0, None)


def test_how_many_rows_are_of_one_source_is_not_known(supply_of):
    found = supply_of(source_dataset="a")
    assert (found.files, found.rows, found.epochs) == (1, None, None)
    assert "its rows of a are only counted by reading" in found.note
    assert supply_of(source_dataset="all").rows == ROWS
