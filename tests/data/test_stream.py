"""Streams of the datasets library, from local files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.helpers import Ranks, build, equal
from torchtitan_rd.data import DatasetKeys
from torchtitan_rd.errors import ConfigError, DataError

DOCUMENTS = [f"document {i}: " + "word " * (i % 7) for i in range(41)]


@pytest.fixture(params=["parquet", "jsonl", "txt", "arrow"])
def folder(request, tmp_path):
    for shard in range(4):
        texts = DOCUMENTS[shard::4]
        if request.param == "parquet":
            pq.write_table(pa.table({"text": texts}), tmp_path / f"{shard}.parquet", row_group_size=3)
        elif request.param == "arrow":
            table = pa.table({"text": texts})
            with (
                pa.OSFile(str(tmp_path / f"{shard}.arrow"), "wb") as file,
                pa.ipc.new_stream(file, table.schema) as out,
            ):
                out.write_table(table, max_chunksize=3)
        elif request.param == "jsonl":
            (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        else:
            for i, text in enumerate(texts):
                (tmp_path / f"{shard}-{i:02}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def parquet(tmp_path):
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "0.parquet", row_group_size=3)
    return tmp_path


def keys(folder, **others):
    others = {"local_batch_size": 2, "seq_len": 40, **others}
    return DatasetKeys(dataset="text", dataset_path=str(folder), stream=True, **others)


def test_a_stream_holds_all_documents_in_order(folder):
    with Ranks(keys(folder)) as run:
        ids = [int(i) for batch in run.read(10) for row in batch for i in row]
    ordered = [text for shard in range(4) for text in DOCUMENTS[shard::4]]
    expected = [i for text in ordered + ordered for i in [256, *text.encode(), 257]]
    assert ids == expected[: len(ids)]


def test_a_resume_of_a_stream_is_exact_within_and_across_epochs(folder):
    _check_resumes(folder, degree=1, workers=0, steps=(1, 5, 13))


def test_a_resume_of_a_stream_is_exact_on_ranks_with_a_worker(parquet):
    _check_resumes(parquet, degree=2, workers=2, steps=(7, 13))


def _check_resumes(folder, degree, workers, steps):
    with Ranks(keys(folder), degree) as run:
        states, batches = [run.save()], []
        for _ in range(16):
            batches += run.read(1)
            states.append(run.save())
    assert states[-1]["positions"][0]["epoch"] >= 1
    for step in steps:
        with Ranks(keys(folder, num_workers=workers), degree) as resumed:
            assert equal(resumed.load(states[step]).read(3), batches[step : step + 3])


def test_ranks_read_different_documents(parquet):
    with Ranks(keys(parquet), 2) as run:
        [batch] = run.read(1)
    assert not batch[:2].equal(batch[2:])


def test_another_number_of_ranks_is_refused_or_restarts_as_told(parquet):
    with Ranks(keys(parquet), 2) as run:
        run.read(3)
        state = run.save()
    with pytest.raises(DataError, match=r"on 2 data ranks .* on 1: .*training\.on_rank_change = 'restart'"):
        build(keys(parquet)).load_state_dict(state)
    with Ranks(keys(parquet)) as fresh, Ranks(keys(parquet, on_rank_change="restart")) as restarted:
        assert equal(restarted.load(state).read(2), fresh.read(2))


def test_a_stream_and_prepared_data_do_not_continue_each_other(parquet):
    with Ranks(keys(parquet)) as run:
        state = run.save()
    prepared = keys(parquet).model_copy(update={"stream": False})
    with pytest.raises(DataError, match=r"stream \(was True, now False\)"):
        build(prepared).load_state_dict(state)


def test_a_share_without_documents_is_refused_instead_of_searched_for_ever(tmp_path):
    pq.write_table(pa.table({"text": ["only one"]}), tmp_path / "one.parquet")
    build(keys(tmp_path), 0, 2).next_step()
    with pytest.raises(DataError, match=r"text: the .*data rank 1"):
        build(keys(tmp_path), 1, 2).next_step()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_streamed_row_names_the_row(workers, tmp_path):
    counts = pa.array([[[1] * 30]] * 4 + [[[255] * 30]], pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table({"spike_counts": counts}), tmp_path / "rows.parquet")
    config = keys(tmp_path, num_workers=workers).model_copy(update={"dataset": "primate"})
    with (
        Ranks(config, vocab_size=256) as run,
        pytest.raises(DataError, match=r"^primate: row 4 of data rank 0, neuron 0"),
    ):
        run.read(5)


def test_a_saved_data_set_can_be_streamed(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(tmp_path / "saved"))
    with Ranks(keys(tmp_path / "saved")) as run:
        [batch] = run.read(1)
    assert bytes(batch[0][1:13].tolist()).decode() == DOCUMENTS[0]


def test_what_cannot_be_streamed_is_refused(parquet):
    with pytest.raises(ConfigError, match=r"unset training\.shuffle_seed or training\.stream"):
        build(keys(parquet, shuffle_seed=1))
    with pytest.raises(
        ConfigError, match=r"'pydoc' is made here: set training\.stream \(STREAM_HF_DATA\) = false"
    ):
        build(DatasetKeys(stream=True))
