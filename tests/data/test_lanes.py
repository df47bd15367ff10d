"""training.lane_per_file: each row of the global batch is read from files of its own."""

import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.helpers import Ranks, build, equal
from torchtitan_rd.data import BatchDims, DatasetKeys, check_file_lanes
from torchtitan_rd.data.cursor import FileOrder
from torchtitan_rd.data.file_lanes import file_order
from torchtitan_rd.data.files import find_files
from torchtitan_rd.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows_of(file, count):
    """Ids that say the file and the row."""
    return [[file, row, 0] for row in range(count)]


def write(folder, rows_in_files, kind="parquet"):
    """Files whose rows hold (file, row, 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, count in enumerate(rows_in_files):
        table = pa.table({"input_ids": pa.array(rows_of(file, count), pa.list_(pa.int32()))})
        path = folder / f"{file // 4:03d}_{file % 4:05d}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    return folder


def keys(folder, batch, degree=1, **others):
    options = {"lane_per_file": True, "local_batch_size": batch // degree, "global_batch_size": batch}
    return DatasetKeys(dataset="packed", dataset_path=str(folder), seq_len=2, **{**options, **others})


def pairs(batches):
    """(file, row) of every row of each global batch."""
    return [[tuple(row) for row in batch[:, :2].tolist()] for batch in batches]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_step_s_holds_row_s_of_every_file_in_every_epoch(tmp_path, degree, kind):
    with Ranks(keys(write(tmp_path, [3] * 8, kind), 8, degree), degree, vocab_size=10) as run:
        steps = pairs(run.read(7))
    for step, rows in enumerate(steps):
        assert sorted(rows) == [(file, step % 3) for file in range(8)]
    assert steps[0] == [(file, 0) for file in range(8)]


def test_with_several_files_a_row_so_many_steps_hold_row_s_of_every_file(tmp_path):
    with Ranks(keys(write(tmp_path, [2] * 6), 3), vocab_size=10) as run:
        steps = pairs(run.read(4))
    assert steps[0] == [(0, 0), (1, 0), (2, 0)] and steps[1] == [(3, 0), (4, 0), (5, 0)]
    assert steps[2] == [(0, 1), (1, 1), (2, 1)] and steps[3] == [(3, 1), (4, 1), (5, 1)]


@pytest.mark.parametrize("rows_in_files", [[1, 4, 2, 3], [5, 1, 1, 1, 2, 7, 3, 1]])
def test_files_of_different_lengths_give_each_row_once_an_epoch_and_lane(tmp_path, rows_in_files):
    with Ranks(keys(write(tmp_path, rows_in_files), 4), vocab_size=10) as run:
        seen, epochs = Counter(), [0] * 4
        while min(epochs) < 4:  # four lanes: after as many epochs each of them has read each share
            before = epochs
            rows = pairs(run.read(1))[0]
            epochs = [position[0] for position in run.save()["positions"]]
            seen.update(row for lane, row in enumerate(rows) if before[lane] < 4)
    everything = [(file, row) for file, count in enumerate(rows_in_files) for row in range(count)]
    assert seen == dict.fromkeys(everything, 4)


def test_an_order_of_files_is_each_file_in_order_and_all_rows_once():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    order = FileOrder(lengths, shares=2)
    rows = [[order.row(share, i) for i in range(order.rows_in(share))] for share in range(2)]
    assert sorted(rows[0] + rows[1]) == list(range(sum(lengths)))
    assert rows[0][:5] == [0, 4, 9, 23, 1]  # the first rows of files 0, 2, 4, 6; then the second of file 0
    for share in rows:
        files = [next(f for f in range(8) if row < sum(lengths[: f + 1])) for row in share]
        for file in set(files):
            own = [row for row, of in zip(share, files, strict=True) if of == file]
            assert own == sorted(own)


@pytest.mark.parametrize("rows_in_files", [[3] * 8, [1, 4, 2, 3, 5, 1, 2, 2]])
@pytest.mark.parametrize("degrees", [(2, 2), (1, 4), (4, 1)])
def test_a_resume_at_any_step_and_on_other_ranks_continues_the_same_rows(tmp_path, degrees, rows_in_files):
    before, after = degrees
    folder = write(tmp_path, rows_in_files)
    with Ranks(keys(folder, 4, before), before, vocab_size=10) as run:
        states, batches = [run.save()], []
        for _ in range(9):
            batches += run.read(1)
            states.append(run.save())
    with Ranks(keys(folder, 4, after), after, vocab_size=10) as run:
        for step in (1, 3, 6):
            assert equal(run.load(states[step]).read(3), batches[step : step + 3])


def test_files_and_batch_that_do_not_agree_are_named_with_the_sizes_that_work(tmp_path):
    folder = write(tmp_path, [1] * 12)
    with pytest.raises(ConfigError) as caught:
        build(keys(folder, 8, degree=2), 0, 2, vocab_size=20)
    assert str(caught.value) == (
        f"training.lane_per_file: the 12 files of {folder} are not a multiple of the 8 rows of "
        "training.global_batch_size; on 2 data ranks a global batch of 2, 4, 6, 12 works "
        "(local_batch_size must divide it)"
    )


def test_a_number_of_ranks_that_no_size_suits_is_said(tmp_path):
    config = keys(write(tmp_path, [1] * 4), 3, degree=3)
    with pytest.raises(ConfigError, match="no size works on 3 data ranks, which must divide the number"):
        check_file_lanes(config, BatchDims.resolve(config, 0, 3))


def test_what_has_no_files_of_its_own_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    with pytest.raises(ConfigError, match=r"not a folder, glob or file of \.parquet or \.arrow"):
        build(keys(tmp_path, 1), vocab_size=10)
    with pytest.raises(ConfigError, match=r"unset training\.stream, shuffle_seed and source_dataset"):
        build(keys(write(tmp_path / "x", [1]), 1, shuffle_seed=3), vocab_size=10)
    with pytest.raises(ConfigError, match=r"'pydoc' is not packed: unset training\.lane_per_file"):
        build(DatasetKeys(lane_per_file=True))


def test_a_file_without_rows_is_named(tmp_path):
    with pytest.raises(DataError, match=r"000_00001\.arrow holds no rows; remove it"):
        build(keys(write(tmp_path, [2, 0], "arrow"), 2), vocab_size=10)


def test_a_resume_with_the_key_changed_or_rows_moved_between_files_is_refused(tmp_path):
    folder = write(tmp_path / "a", [2, 2])
    with Ranks(keys(folder, 2), vocab_size=10) as run:
        state = run.save()
    with (
        Ranks(keys(folder, 2, lane_per_file=False), vocab_size=10) as run,
        pytest.raises(DataError, match=r"lane_per_file \(was True, now False\)"),
    ):
        run.load(state)
    with Ranks(keys(folder, 2, lane_per_file=False), vocab_size=10) as run:
        plain = run.save()
    with (
        Ranks(keys(folder, 2), vocab_size=10) as run,
        pytest.raises(DataError, match=r"lane_per_file \(was False, now True\)"),
    ):
        run.load(plain)

    rows = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*"))])
    pq.write_table(rows[:3], folder / "000_00000.parquet")
    pq.write_table(rows[3:], folder / "000_00001.parquet")
    with (
        Ranks(keys(folder, 2), vocab_size=10) as run,
        pytest.raises(DataError, match="how many rows lie in which file"),
    ):
        run.load(state)


def test_finding_thousands_of_files_takes_time_in_proportion(tmp_path):
    """It took 6 s of CPU time for 4096 files while each was compared with all others."""
    for file in range(4096):
        (tmp_path / f"{file:05d}.parquet").touch()
    began = time.process_time()
    assert len(find_files(str(tmp_path)).files) == 4096
    assert time.process_time() - began < 3.0


def test_counting_the_rows_of_a_thousand_files_takes_time_in_proportion(tmp_path):
    """4 s of CPU time where each file asks all others of what kind they are."""
    pq.write_table(pa.table({"input_ids": [[1, 2, 3]]}), tmp_path / "one.parquet")
    folder = tmp_path / "files"
    folder.mkdir()
    for file in range(1024):
        (folder / f"{file:05d}.parquet").symlink_to(tmp_path / "one.parquet")
    found = find_files(str(folder))
    began = time.process_time()
    order = file_order(keys(folder, 1024), found, 1024, 1024)
    assert time.process_time() - began < 1.5
    assert [order.row(share, 0) for share in (0, 7, 1023)] == [0, 7, 1023]


def test_a_hundred_files_are_opened_on_two_ranks_in_seconds(tmp_path):
    """Each rank's start-up, conversion included; benchmarks/data.py --files measures 4096."""
    folder = write(tmp_path, [2] * 128)
    began = time.process_time()
    with Ranks(keys(folder, 128, 2), 2, vocab_size=128) as run:
        steps = pairs(run.read(2))
    assert time.process_time() - began < 8.0
    assert [sorted(rows) for rows in steps] == [[(file, step) for file in range(128)] for step in range(2)]
