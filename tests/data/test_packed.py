"""Rows that were packed beforehand."""

import pytest
import torch

from tests.data.helpers import Ranks, build
from torchtitan_rd.data import DatasetKeys
from torchtitan_rd.errors import ConfigError, DataError

PAD, EOS = 99, 7


@pytest.fixture
def write(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows, **keys):
        pq.write_table(
            pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / "rows.parquet"
        )
        return DatasetKeys(dataset="packed", dataset_path=str(tmp_path / "rows.parquet"), seq_len=4, **keys)

    return write


def first(config, **options):
    loader = build(config, vocab_size=100, **options)
    [batch] = loader.next_step()
    loader.close()
    return batch


def test_one_row_is_one_window_and_the_next_epoch_begins_with_whole_rows(write):
    rows = [[10 * i + j for j in range(5)] for i in range(3)]
    with Ranks(write(rows, local_batch_size=2), vocab_size=100) as run:
        batches = run.read(3)
    # Two lanes over three rows: lane 0 reads rows 0, 2 | 1 | 0, 2; lane 1 reads 1 | 0, 2 | 1.
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 10], [20, 0], [10, 20]]
    assert all(batch[:, 4].equal(batch[:, 0] + 4) for batch in batches)


def test_padding_is_eos_in_the_inputs_and_ignored_in_the_labels(write):
    batch = first(write([[1, 2, EOS, PAD, PAD]], local_batch_size=1, pad_id=PAD, eos_id=EOS))
    assert batch.inputs.tolist() == [[1, 2, EOS, EOS]]
    assert batch.labels.tolist() == [[2, EOS, -100, -100]]


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ([1, EOS, 2, EOS, EOS, EOS], [EOS, 2, EOS, -100, -100]),
        ([1, EOS, EOS, 2, 3, EOS], [EOS, EOS, 2, 3, EOS]),
        ([1, EOS, 2, 3, 4, 5], [EOS, 2, 3, 4, 5]),
        ([EOS, EOS, EOS, EOS, EOS, 6], [EOS, EOS, EOS, EOS, 6]),
    ],
)
def test_rows_padded_with_eos_keep_the_ends_of_their_documents(row, labels, write):
    keys = write([row], local_batch_size=1, pad_id=EOS, eos_id=EOS, document_mask=True)
    batch = first(keys.model_copy(update={"seq_len": 5}))
    assert batch.inputs.tolist() == [row[:-1]] and batch.labels.tolist() == [labels]
    ends = [0, *(token == EOS for token in row[:-2])]
    assert batch.document_ids.tolist() == [[sum(ends[: place + 1]) for place in range(5)]]


def test_a_document_after_padding_sees_nothing_of_what_stands_before_it(write):
    config = write([[1, 2, PAD, 3, 4]], local_batch_size=1, pad_id=PAD, eos_id=EOS, document_mask=True)
    assert first(config).document_ids.tolist() == [[0, 0, 0, 1]]


def test_padding_may_lie_outside_the_vocabulary(write):
    batch = first(write([[1, 2, EOS, -1, -1]], local_batch_size=1, pad_id=-1, eos_id=EOS))
    assert batch.labels.tolist() == [[2, EOS, -100, -100]]


def test_columns_that_say_what_is_learned_are_not_read_and_that_is_said(write, tmp_path, caplog):
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = write([[1, 2, 3, 4, 5]], local_batch_size=1)
    masked = {"input_ids": [[1, 2, 3, 4, 5]], "labels": [[-100, -100, 3, 4, 5]], "url": ["u"]}
    for stream in (False, True):
        caplog.clear()
        pq.write_table(pa.table(masked), tmp_path / "rows.parquet")
        batch = first(keys.model_copy(update={"stream": stream}))
        assert batch.labels.tolist() == [[2, 3, 4, 5]]
        [line] = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert "packed rows are read from 'input_ids' alone, and labels beside it are not" in line


def test_documents_of_a_row_end_at_eos(write):
    batch = first(write([[1, EOS, 2, 3, EOS]], local_batch_size=1, eos_id=EOS, document_mask=True))
    assert batch.document_ids.tolist() == [[0, 0, 1, 1]]
    assert batch.document_ids.dtype == torch.int32


def test_a_row_of_another_length_is_refused_with_both_lengths(write):
    with pytest.raises(DataError, match=r"packed: row 1: has 4 ids, but training\.seq_len = 4 needs 5"):
        build(write([[0] * 5, [0] * 4], local_batch_size=2), vocab_size=100)


def test_an_id_beyond_the_vocabulary_is_refused_before_the_first_step(write):
    with pytest.raises(
        DataError, match=r"packed: row 0: token 3 has id 100, but the model's vocabulary is 0\.\.99"
    ):
        build(write([[0, 1, 2, 100, 4]], local_batch_size=1), vocab_size=100)


def test_fewer_rows_than_a_global_batch_are_refused(write):
    with pytest.raises(
        DataError, match=r"packed: holds 1 rows, fewer than the 2 .* training\.global_batch_size"
    ):
        build(write([[0] * 5], local_batch_size=2), vocab_size=100)


def test_another_column_is_refused_with_the_columns_there_are(write):
    with pytest.raises(DataError, match=r"no column 'ids', only input_ids; set training\.column"):
        build(write([[0] * 5], local_batch_size=1, column="ids"), vocab_size=100)


def test_keys_that_contradict_each_other_are_refused(write):
    rows = [[0] * 5]
    with pytest.raises(ConfigError, match=r"needs training\.eos_id"):
        build(write(rows, pad_id=PAD), vocab_size=100)
    with pytest.raises(ConfigError, match=r"needs training\.eos_id"):
        build(write(rows, document_mask=True), vocab_size=100)
    with pytest.raises(ConfigError, match=r"training\.eos_id = 100 is not below model\.vocab_size = 100"):
        build(write(rows, eos_id=100), vocab_size=100)
    with pytest.raises(ConfigError, match=r"needs training\.dataset_path"):
        build(DatasetKeys(dataset="packed"))
    with pytest.raises(ConfigError, match=r"unset training\.pad_id and training\.eos_id"):
        build(DatasetKeys(eos_id=3))
