"""Where data may lie, and what is said when it does not."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.helpers import build
from torchtitan_rd.data import DatasetKeys
from torchtitan_rd.data.arrow import TableSource, open_table
from torchtitan_rd.data.text import TextEncoder
from torchtitan_rd.data.tokenizer import ByteTokenizer
from torchtitan_rd.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(path) -> list[str]:
    source = TableSource(
        "text", open_table("text", str(path), None, stream=False), TextEncoder(ByteTokenizer(), 258)
    )
    return [bytes(source.tokens(i)[1:-1].tolist()).decode() for i in range(len(source))]


def write_arrow(path, values):
    table = pa.table({"text": values})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


def test_a_text_file_is_one_document(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nsecond line\n")
    assert texts(tmp_path) == ["a\n\nsecond line\n", "b\n\nsecond line\n"]
    assert texts(tmp_path / "b.txt") == ["b\n\nsecond line\n"]


def test_files_folders_and_globs_of_every_kind_are_read_in_the_order_of_their_names(tmp_path):
    for i in (2, 1):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": f"j{i}", "other": 1}) + "\n")
        pq.write_table(pa.table({"text": [f"p{i}"]}), tmp_path / f"{i}.parquet")
        write_arrow(tmp_path / f"{i}.arrow", [f"a{i}"])
    assert texts(tmp_path / "*.jsonl") == ["j1", "j2"]
    assert texts(tmp_path / "*.parquet") == ["p1", "p2"]
    assert texts(tmp_path / "*.arrow") == ["a1", "a2"]
    assert texts(tmp_path / "1.parquet") == ["p1"]
    with pytest.raises(DataError, match=r"files of one kind of .*, found \.arrow, \.jsonl, \.parquet"):
        texts(tmp_path)


def test_of_a_folder_with_a_train_split_only_that_is_read(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    assert texts(tmp_path) == ["train-00000-of-00002", "train-00001-of-00002"]


def test_saved_data_sets_are_read_whole_or_by_their_train_split(tmp_path):
    import datasets

    train, test = (datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test"))
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(test=test).save_to_disk(str(tmp_path / "without"))
    assert texts(tmp_path / "one") == texts(tmp_path / "both") == ["train"]
    with pytest.raises(DataError, match="has no split 'train', only test"):
        texts(tmp_path / "without")


def test_arrow_files_are_mapped_and_not_copied_into_the_cache(tmp_path):
    import datasets

    write_arrow(tmp_path / "rows.arrow", ["a"])
    table = open_table("text", str(tmp_path), None, stream=False)
    assert [entry["filename"] for entry in table.cache_files] == [str(tmp_path / "rows.arrow")]
    assert not list(datasets.config.HF_DATASETS_CACHE.iterdir())


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nowhere/*.parquet", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_before_any_library_is_loaded(path, monkeypatch):
    monkeypatch.setattr("torchtitan_rd.data.sources.open_table", None)
    with pytest.raises(DataError, match=r"training\.dataset_path = .*: no such file or folder"):
        build(DatasetKeys(dataset="primate", dataset_path=path), vocab_size=256)


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_that_cannot_be_reached_is_one_error_with_what_was_sought_and_the_remedy(stream, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError(
            "Couldn't reach 'eminorhan/neural-pile-primate' on the Hub (OfflineModeIsEnabled)\nmore"
        )

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        build(DatasetKeys(dataset="primate", stream=stream), vocab_size=256)
    message = str(caught.value)
    assert message.startswith(
        "primate: cannot read 'eminorhan/neural-pile-primate' (subset default, split train)"
    )
    assert "training.dataset_path" in message and "HF_HUB_OFFLINE" in message and "\n" not in message


def test_the_table_names_repositories_and_subsets_as_the_hub_does(monkeypatch):
    import datasets

    asked = []

    def record(path, subset=None, **options):
        asked.append((path, subset, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", record)
    tiny = {"seq_len": 4, "local_batch_size": 1}
    build(DatasetKeys(dataset="fineweb-edu", **tiny))
    build(DatasetKeys(dataset="wikitext", **tiny))
    build(DatasetKeys(dataset="text", dataset_path="someone/something", **tiny))
    options = {"split": "train", "streaming": False}
    assert asked == [
        ("HuggingFaceFW/fineweb-edu", "sample-100BT", options),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", options),
        ("someone/something", None, options),
    ]


def test_a_damaged_file_is_one_error_that_names_it(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"text: cannot read .*rows\.parquet.*damaged") as caught:
        build(DatasetKeys(dataset="text", dataset_path=str(tmp_path / "rows.parquet")))
    assert "\n" not in str(caught.value)


def test_a_table_without_rows_or_without_the_column_is_refused(tmp_path):
    pq.write_table(pa.table({"content": ["a", None]}), tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"text: has no column 'text', only content; set training\.column"):
        build(DatasetKeys(dataset="text", dataset_path=path))
    with pytest.raises(DataError, match=r"text: row 1: column 'content' holds string None; expected text"):
        build(DatasetKeys(dataset="text", dataset_path=path, column="content"))
    write_arrow(tmp_path / "empty.arrow", pa.array([], pa.string()))
    with pytest.raises(DataError, match="text: holds no rows"):
        texts(tmp_path / "empty.arrow")


def test_the_first_window_of_every_row_of_the_batch_is_read_when_the_loader_is_built(tmp_path):
    import datasets

    counts = np.ones((64, 3, 5), np.uint8)
    counts[17] = 255  # the only sample of lane 17, and a count that recordings do not have
    datasets.Dataset.from_dict({"spike_counts": counts.tolist()}).save_to_disk(str(tmp_path / "spikes"))
    config = DatasetKeys(
        dataset="primate", dataset_path=str(tmp_path / "spikes"), seq_len=4, local_batch_size=64
    )
    with pytest.raises(DataError, match="row 17, neuron 0, time bin 0: spike count 255"):
        build(config, vocab_size=256)
