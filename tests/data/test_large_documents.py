"""Documents that lanes share are encoded once; recordings are cut between time bins."""

import errno
import json
import os

import numpy as np
import pytest

from tests.data import helpers
from tests.data.helpers import Ranks, build, equal
from tests.ranks import run_on_ranks
from torchtitan_rd.data import DATASETS, DatasetKeys, ids
from torchtitan_rd.data.arrow import SampleSource
from torchtitan_rd.data.sources import Dataset
from torchtitan_rd.data.text import TextEncoder
from torchtitan_rd.data.tokenizer import ByteTokenizer
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger

TEXT = "".join(f"line {i} of a long document\n" for i in range(400))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def encodes(monkeypatch):
    """The length of every text that is encoded in this process."""
    lengths = []

    class Counting(ByteTokenizer):
        def encode(self, text):
            lengths.append(len(text))
            return super().encode(text)

    monkeypatch.setattr(helpers, "load_tokenizer", lambda path: Counting())
    return lengths


def keys(folder, **others):
    (folder / "book.txt").write_text(TEXT)
    others = {"seq_len": 32, "local_batch_size": 8, "global_batch_size": 32, **others}
    return DatasetKeys(dataset="text", dataset_path=str(folder), **others)


def first_batch(config):
    with Ranks(config) as run:
        return run.read(1)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_document_is_encoded_once_whatever_the_lanes_the_ranks_and_the_workers(workers, encodes, tmp_path):
    config = keys(tmp_path, num_workers=workers)
    with Ranks(config, 2) as run:
        first = run.read(4)
        state = run.save()
        following = run.read(2)
    assert encodes == [len(TEXT)]
    with Ranks(config, 1) as run:  # another start, on another number of ranks
        assert equal(run.load(state).read(2), following)
    assert encodes == [len(TEXT)]
    ids = [256, *TEXT.encode(), 257]
    for lane in (0, 5, 31):  # lane g begins with piece g of 512
        begin = len(ids) * lane // 512
        piece = ids[begin : len(ids) * (lane + 1) // 512]
        assert first[0][lane].tolist()[: len(piece)] == piece


def test_two_ranks_of_a_node_write_one_file(tmp_path, own_cache):
    config = keys(tmp_path, cache_folder=str(own_cache / "ids"))
    found = run_on_ranks(2, _first_rows, config)
    assert found[0] != found[1]
    folders = [entry for entry in (own_cache / "ids" / "encoded_documents").iterdir() if entry.is_dir()]
    assert [sorted(file.name for file in folder.iterdir()) for folder in folders] == [["ends.npy", "ids.bin"]]
    assert (folders[0] / "ids.bin").stat().st_size == 2 * (len(TEXT) + 2)


def _first_rows(rank, world_size, config):
    loader = build(config, rank, world_size)
    [batch, *_] = loader.next_step()
    loader.close()
    return batch.inputs.tolist()


def test_a_file_of_ids_that_was_cut_short_or_left_behind_is_written_anew(encodes, tmp_path, own_cache):
    expected = first_batch(keys(tmp_path))
    [folder] = [entry for entry in (own_cache / "encoded_documents").iterdir() if entry.is_dir()]
    os.truncate(folder / "ids.bin", 100)
    (folder.with_name(f"{folder.name}.{os.uname().nodename}.staged")).mkdir()
    assert first_batch(keys(tmp_path)).equal(expected)
    assert encodes == [len(TEXT)] * 2


def test_another_text_or_another_tokenizer_has_a_file_of_its_own(encodes, tmp_path):
    config = keys(tmp_path)
    build(config)
    (tmp_path / "book.txt").write_text(TEXT.upper())
    assert bytes(first_batch(config)[0][1:5].tolist()) == b"LINE"
    assert len(encodes) == 2


def test_a_folder_that_cannot_be_written_costs_memory_and_a_warning(encodes, tmp_path, caplog):
    expected = first_batch(keys(tmp_path))
    (tmp_path / "file").touch()
    logger.propagate = True
    assert first_batch(keys(tmp_path, cache_folder=str(tmp_path / "file"))).equal(expected)
    assert "encoded documents cannot be kept" in caplog.text and "training.cache_folder" in caplog.text


def test_a_disk_that_fills_up_keeps_nothing_of_the_ids_that_did_not_fit(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ids, "_sync", full)
    source = SampleSource("mine", ["some text"] * 3, TextEncoder(ByteTokenizer(), 258))
    encoded = ids.encode_once(source, np.dtype(np.uint16), tmp_path / "cache", "key")
    assert len(encoded) == 3 and encoded.tokens(2).tolist() == source.tokens(2).tolist()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key.lock"]


def test_small_recordings_are_cut_between_time_bins(tmp_path):
    import datasets

    counts = np.random.default_rng(0).poisson(1, (3, 3, 10)).astype(np.uint8)
    datasets.Dataset.from_dict({"spike_counts": counts.tolist()}).save_to_disk(str(tmp_path / "saved"))
    config = DatasetKeys(
        dataset="primate", dataset_path=str(tmp_path / "saved"), seq_len=4, local_batch_size=4
    )
    reader = build(config, vocab_size=256)._readers
    units = [unit for lane in reader for unit in (lane._unit(0, i) for i in range(lane._units_in(0)))]
    assert len(units) == 66 and reader[0].pieces == 22
    for unit in units:
        bins = unit.reshape(-1, 4)  # the separator and three neurons
        assert (bins[:, 0] == 255).all() and (bins[:, 1:] < 255).all()
    order = [lane._unit(0, i) for i in range(17) for lane in reader if i < lane._units_in(0)]
    expected = [sample.T.tolist() for sample in counts]
    assert np.concatenate(order).reshape(3, 10, 4)[:, :, 1:].tolist() == expected


def test_packed_rows_are_known_by_their_kind_and_not_by_their_name(tmp_path, monkeypatch):
    import datasets

    rows = [[10 * i + j for j in range(5)] for i in range(3)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setitem(DATASETS, "huginn", Dataset("packed", hub="some/repository"))
    config = DatasetKeys(
        dataset="huginn", dataset_path=str(tmp_path / "saved"), seq_len=4, local_batch_size=2
    )
    with Ranks(config, vocab_size=100) as run:
        assert [batch[:, 0].tolist() for batch in run.read(2)] == [[0, 10], [20, 0]]
    with pytest.raises(DataError, match="huginn: holds 3 rows, fewer than the 4 of one global batch"):
        build(config.model_copy(update={"local_batch_size": 4}), vocab_size=100)


def jsonl(folder, rows, **others):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    others = {"seq_len": 3, "local_batch_size": 1, **others}
    return DatasetKeys(dataset="text", dataset_path=str(path), **others)


@pytest.mark.parametrize("batch", [1, 4])
def test_skipped_rows_are_never_read_and_all_others_keep_their_place(batch, tmp_path):
    rows = [f"{i:02}" for i in range(20)]  # four ids each: a window; with four lanes each is cut into pieces
    ranges = [[3, 3], [7, 9]]
    config = jsonl(tmp_path, rows, local_batch_size=batch, skip_ranges=ranges)
    without = jsonl(
        tmp_path, ["" if i in (3, 7, 8, 9) else row for i, row in enumerate(rows)], local_batch_size=batch
    )
    with Ranks(without) as run:
        expected = run.read(12)
    config = jsonl(tmp_path, rows, local_batch_size=batch, skip_ranges=ranges)
    with Ranks(config) as run:
        assert equal(run.read(5), expected[:5])
        state = run.save()
    with Ranks(config.model_copy(update={"num_workers": 1})) as run:
        assert equal(run.load(state).read(7), expected[5:])


def test_a_row_found_bad_can_be_skipped_on_resume_even_from_its_middle(tmp_path, caplog):
    rows = [f"{i:02}" for i in range(20)]
    config = jsonl(tmp_path, rows, seq_len=2)
    loader = build(config)
    for _ in range(5):
        loader.next_step()
    state = loader.state_dict()
    loader.close()
    assert state["positions"] == [[0, 3, 3]]  # 15 ids: three of the four of row 3
    logger.propagate = True
    with Ranks(config.model_copy(update={"skip_ranges": [[3, 3]]})) as run:
        [batch] = run.load({"fingerprint": state["fingerprint"], "positions": state["positions"]}).read(1)
    assert batch.tolist() == [[256, *b"04"]]
    assert "training.skip_ranges was [] and is now [[3, 3]]" in caplog.text


def test_ranges_that_name_no_row_or_a_stream_are_refused(tmp_path):
    with pytest.raises(DataError, match="skip_ranges: text has no row 2, its last is 1"):
        build(jsonl(tmp_path, ["a", "b"], skip_ranges=[[1, 2]]))
    with pytest.raises(ConfigError, match=r"unset training\.skip_ranges"):
        build(jsonl(tmp_path, ["a", "b"], skip_ranges=[[1, 1]], stream=True))
    for pair in ([3, 1], [1], [-1, 2]):
        with pytest.raises(ValueError, match="is not a pair of the first and the last row"):
            DatasetKeys(skip_ranges=[pair])
    with pytest.raises(DataError, match="none of its 2 samples holds a token"):
        build(jsonl(tmp_path, ["a", "b"], skip_ranges=[[0, 1]]))
