"""Which files become training data, and what is said of those that do not."""

import errno
import glob
import gzip
import json
import logging
import os
import re
import resource
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.checkpoint.forked import run_forked
from tests.data.helpers import build
from torchtitan_rd.data import DATASETS, DatasetKeys
from torchtitan_rd.data.arrow import TableSource, open_table
from torchtitan_rd.data.files import find_files
from torchtitan_rd.data.sources import Dataset
from torchtitan_rd.data.text import TextEncoder
from torchtitan_rd.data.tokenizer import ByteTokenizer
from torchtitan_rd.errors import DataError
from torchtitan_rd.log import logger


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "downloads" / "extracted")
    return folder


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts(path, split="train") -> list[str]:
    table = open_table("text", str(path), None, stream=False, split=split)
    source = TableSource("text", table, TextEncoder(ByteTokenizer(), 258))
    return [bytes(source.tokens(i)[1:-1].tolist()).decode() for i in range(len(source))]


def keys(path, **others):
    return DatasetKeys(dataset="text", dataset_path=str(path), seq_len=4, local_batch_size=1, **others)


def test_files_of_other_splits_never_train_and_the_log_and_the_record_say_what_does(tmp_path, caplog):
    write(tmp_path / "b.jsonl", "b")
    write(tmp_path / "a.JSONL", "a")
    write(tmp_path / "c.jsonl.gz", "c")
    write(tmp_path / "test.jsonl", "secret")
    write(tmp_path / "validation" / "x.jsonl", "secret")
    write(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", "copy")
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("text")
    write(tmp_path.parent / "elsewhere" / "d.jsonl", "d")
    (tmp_path / "linked").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path / "linked" / "above").symlink_to(tmp_path)

    logger.propagate = True
    with caplog.at_level(logging.INFO, logger=logger.name):
        loader = build(keys(tmp_path))
    assert texts(tmp_path) == ["a", "b", "c", "d"]
    assert texts(tmp_path, "test") == ["secret"]
    assert loader.record == {
        "dataset": "text",
        "path": str(tmp_path),
        "split": "train",
        "rows": 4,
        "number_of_files": 4,
        "files": ["a.JSONL", "b.jsonl", "c.jsonl.gz", "linked/d.jsonl"],
        "left_out": {
            "hidden": ["._a.jsonl", ".ipynb_checkpoints"],
            "not a data file": ["README.md"],
            "metadata of the datasets library": ["dataset_info.json"],
            "a link to a folder that is read already": ["linked/above"],
            "named after another split": ["test.jsonl", "validation/x.jsonl"],
        },
    }
    assert "4 rows, 4 files: a.JSONL, b.jsonl, c.jsonl.gz, linked/d.jsonl" in caplog.text
    assert "does not read 2 files (named after another split): test.jsonl, validation/x.jsonl" in caplog.text


@pytest.mark.parametrize(
    "names,split,expected",
    [
        (["train.jsonl", "a.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train/a.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl"]),
        (["a.jsonl", "contest.jsonl", "latest.jsonl"], "train", ["a.jsonl", "contest.jsonl", "latest.jsonl"]),
        (["a.jsonl", "dev.jsonl"], "train", ["a.jsonl"]),
        (["a.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (
            ["a.jsonl", "eval.jsonl", "evaluation/x.jsonl", "medieval.jsonl"],
            "train",
            ["a.jsonl", "medieval.jsonl"],
        ),
        (["train-test.jsonl", "a.jsonl"], "train", ["a.jsonl"]),
        (["train/test.jsonl", "train/b.jsonl"], "train", ["train/b.jsonl"]),
        (["a.jsonl", "heldout.jsonl"], "heldout", ["heldout.jsonl"]),
    ],
)
@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl"])
def test_the_split_of_a_file_is_told_by_its_name_or_its_folder(names, split, expected, pattern, tmp_path):
    for name in names:
        write(tmp_path / name, "x")
    found = find_files(f"{tmp_path}{pattern}", split)
    assert [found.name(file) for file in found.files] == expected


def test_a_folder_with_nothing_for_the_split_is_refused_and_files_that_are_written_out_are_read(tmp_path):
    write(tmp_path / "test.jsonl", "x")
    with pytest.raises(
        DataError, match=r"each of its 1 data files is named after another split than 'train' \(test"
    ):
        find_files(str(tmp_path))
    for path in (tmp_path / "test.jsonl", tmp_path / "test*.jsonl"):
        assert texts(path) == ["x"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: a folder without data files"):
        find_files(str(tmp_path / "empty"))


def test_held_out_data_is_never_read_from_files_that_are_named_after_another_split(tmp_path):
    for name in ("train-0", "train-1", "held", "dev"):
        write(tmp_path / f"{name}.jsonl", name)
    with pytest.raises(
        DataError,
        match=r"each of the 2 files that match is named after another split than 'validation' \(train-0",
    ):
        find_files(str(tmp_path / "train-*.jsonl"), "validation")
    assert texts(tmp_path / "[ht]*.jsonl", "validation") == ["held"]
    assert texts(tmp_path / "*.jsonl", "validation") == ["dev"]


def test_the_log_says_which_files_a_name_left_out_and_how_to_read_them(tmp_path, caplog):
    for name in ("books", "trains_manual", "train_manuals", "dev-docs"):
        write(tmp_path / f"{name}.jsonl", name)
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger=logger.name):
        build(keys(tmp_path))
    how = "; a whole word of a name tells the split: rename them, or name them alone in dataset_path"
    for reason, names in (
        ("named after another split", "1 files (named after another split): dev-docs.jsonl"),
        ("not named", "2 files (not named 'train' as others are): books.jsonl, trains_manual.jsonl"),
    ):
        (line,) = [line for line in caplog.messages if reason in line]
        assert line == f"data: text does not read {names}{how}"


def test_what_the_datasets_library_keeps_beside_its_data_doubles_no_row(tmp_path):
    saved = tmp_path / "all" / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(saved))
    datasets.load_from_disk(str(saved)).map(lambda row: {"text": row["text"] * 2}, load_from_cache_file=False)
    (cache,) = saved.glob("cache-*.arrow")
    (saved / "tmp1234.arrow").write_bytes(cache.read_bytes())
    (saved / "of_mine.arrow").write_bytes(cache.read_bytes())
    assert texts(saved) == ["a", "b"]
    # A folder above it, and a glob, look at files.
    for path in (tmp_path / "all", tmp_path / "all" / "*" / "*.arrow"):
        assert texts(path) == ["a", "b"]
    reason = "not among the files that state.json lists"
    left_out = find_files(str(tmp_path / "all")).left_out[reason]
    assert left_out == [f"saved/{name}" for name in (cache.name, "of_mine.arrow", "tmp1234.arrow")]

    # Elsewhere, such as in the cache of the library itself, names alone tell.
    (saved / "state.json").unlink()
    found = find_files(str(tmp_path / "all"))
    assert [file.name for file in found.files] == ["data-00000-of-00001.arrow", "of_mine.arrow"]
    assert texts(saved / "cache-*.arrow") == ["aa", "bb"], "written out"


def test_a_link_to_a_file_that_is_gone_is_an_error_and_not_one_file_less(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl.gz").symlink_to("../blobs/1f2e")
    (tmp_path / "LICENSE").symlink_to("../blobs/3d4c")
    for path in (tmp_path, tmp_path / "*", tmp_path / "b.jsonl.gz"):
        with pytest.raises(
            DataError, match=r"b\.jsonl\.gz: is a link to \.\./blobs/1f2e, which is not there"
        ):
            find_files(str(path))
    # Of another split it is not missed.
    (tmp_path / "b.jsonl.gz").rename(tmp_path / "test.jsonl.gz")
    assert [file.name for file in find_files(str(tmp_path)).files] == ["a.jsonl"]


@pytest.mark.parametrize("name", ["b.parquet.gz", "b.ARROW.ZST"])
def test_a_format_that_is_not_read_compressed_is_refused_by_name(name, tmp_path):
    write(tmp_path / "a.parquet")
    (tmp_path / name).write_bytes(b"")
    suffixes = re.escape(name.removeprefix("b"))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf"{re.escape(name)}: {suffixes} files are not read: unpack it$"):
            find_files(str(path))


def test_compressed_files_that_are_not_read_are_refused_by_name(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl.bz2").write_bytes(b"BZh9")
    with pytest.raises(DataError, match=r"b\.jsonl\.bz2: \.bz2 files are not read: unpack it"):
        find_files(str(tmp_path))
    (tmp_path / "b.jsonl.bz2").rename(tmp_path / "b.jsonl.zst")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DataError, match=r"b\.jsonl\.zst: reading \.zst needs the package zstandard"):
        find_files(str(tmp_path))


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    write(tmp_path / "run[1]" / "a.jsonl", "a")
    assert texts(tmp_path / "run[1]") == texts(tmp_path / "run[1]" / "a.jsonl") == ["a"]


def test_a_gz_file_that_changes_is_unpacked_anew_and_a_change_under_the_same_time_is_seen(tmp_path):
    for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"):
        write(path, "old")
        time = path.stat().st_mtime_ns
        assert texts(path) == ["old"]
        write(path, "new")
        os.utime(path, ns=(time, time))
        assert texts(path) == ["new"]


@pytest.mark.parametrize("bad,shown", [(5, "5"), ({"a": 1}, '{"a":1}'), ([1], r"\[1\]")])
def test_a_file_of_mixed_types_is_refused_with_the_row(bad, shown, tmp_path):
    rows = [{"text": 'She said "hi".\nNew line'}] * 50
    lines = [*rows[:30], {"text": bad}, *rows[30:]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        DataError, match=rf"^.*a\.jsonl: row 30: column 'text' holds {shown}; expected text in every "
    ):
        build(keys(tmp_path))
    with pytest.raises(DataError, match=r"the stream cannot be read.*changed from string .* in row 30"):
        build(keys(tmp_path, stream=True)).next_step()


LONG = {"text": 'She said "hi". ' * 1000}


@pytest.mark.parametrize("bad", [5, {"a": 1}])
def test_a_mixed_type_behind_the_first_10_mb_is_refused_and_escapes_no_text_there(bad, tmp_path):
    lines = [json.dumps(LONG) + "\n"] * 800
    lines[750] = json.dumps({"text": bad}) + "\n"
    (tmp_path / "a.jsonl").write_text("".join(lines))
    for _ in range(2):  # nor is it once it was refused
        with pytest.raises(DataError, match=r"a\.jsonl: row 750: column 'text' holds "):
            build(keys(tmp_path))
    loader = build(DatasetKeys(**{**dict(keys(tmp_path, stream=True)), "seq_len": 100_000}))
    with pytest.raises(DataError, match=r"the stream cannot be read: .* changed from string"):
        for _ in range(130):
            loader.next_step()


def test_a_file_of_numbers_beside_files_of_text_and_a_list_with_one_are_refused(tmp_path):
    write(tmp_path / "two" / "a.jsonl", "a")
    (tmp_path / "two" / "b.jsonl").write_text('{"text": 5}\n' * 3)
    with pytest.raises(DataError, match=r"b\.jsonl: row 0: column 'text' holds 5"):
        build(keys(tmp_path / "two"))
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"other": 1}, {"text": True}]))
    with pytest.raises(DataError, match=r"list\.json: row 2: column 'text' holds true"):
        build(keys(tmp_path / "list.json"))


def test_another_column_may_mix_types_and_a_compressed_file_is_looked_into(tmp_path):
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": "one"}, {"text": "c", "x": {"y": [1]}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(tmp_path / "a.jsonl") == ["a", "b", "c"]
    with gzip.open(tmp_path / "b.jsonl.GZ", "wt") as file:
        file.write('{"text": "a"}\n\n{"text": [2]}\n')
    with pytest.raises(DataError, match=r"b\.jsonl\.GZ: row 1: column 'text' holds \[2\]"):
        build(keys(tmp_path / "b.jsonl.GZ"))


def test_files_without_rows_or_with_other_columns_are_refused_by_what_they_are(tmp_path):
    for name, rows in (("a", ["x"]), ("b", [])):
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: .*a parquet file without rows: remove it"):
        build(keys(tmp_path))
    with pytest.raises(
        DataError, match=r"after row 1 .*the stream cannot be read: .*a parquet file without rows"
    ):
        loader = build(keys(tmp_path, stream=True))
        for _ in range(9):
            loader.next_step()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"none: holds nothing but empty files \(a\.jsonl"):
        build(keys(tmp_path / "none"))
    write(tmp_path / "two" / "a.jsonl", "a")
    (tmp_path / "two" / "b.jsonl").write_text('{"text": "b", "id": 3}\n')
    with pytest.raises(
        DataError, match=r"b\.jsonl: .*different columns: here id more and none less than in the first"
    ):
        build(keys(tmp_path / "two"))
    (tmp_path / "types").mkdir()
    for name, meta in (("a", pa.nulls(1)), ("b", pa.array(["m"]))):
        pq.write_table(pa.table({"text": ["x"], "meta": meta}), tmp_path / "types" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: .*a column has another type than in the first file"):
        build(keys(tmp_path / "types"))


def test_an_arrow_file_that_cannot_be_mapped_is_refused_by_its_kind(tmp_path):
    table = pa.table({"text": ["abc"] * 9})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a\.arrow: an arrow file of the random access kind .*new_stream"):
        texts(tmp_path / "a.arrow")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["abc"] * 9


@pytest.mark.parametrize(
    "kind,expected", [("text", "expected text"), ("spikes", "lists"), ("packed", "lists of int")]
)
def test_a_column_of_another_type_is_refused_when_it_is_opened(kind, expected, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setitem(DATASETS, "mine", Dataset(kind))
    datasets.Dataset.from_dict({"x": [0.5, 1.5]}).save_to_disk(str(tmp_path / "saved"))
    config = DatasetKeys(dataset="mine", dataset_path=str(tmp_path / "saved"), column="x", seq_len=4)
    with pytest.raises(DataError, match=rf"mine: column 'x' holds double; .*{expected}"):
        build(config)


@pytest.mark.parametrize(
    "suffix,content,cause",
    [
        (".jsonl", '{"text": "a"}\n'.encode("utf-16"), "Error"),
        (".jsonl", b'{"text": "a', "JSON parse error"),
        (".txt", b"caf\xe9", "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        (".parquet", b"PAR1 nothing", "Parquet"),
    ],
)
def test_an_error_of_the_library_names_the_file_of_many_and_the_cause(suffix, content, cause, tmp_path):
    for name in ("a", "c"):
        file = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": ["a"]}), file)
        else:
            write(file, "a")
    bad = tmp_path / f"b{suffix}"
    bad.write_bytes(content)
    with pytest.raises(DataError) as caught:
        build(keys(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"text: cannot read {bad}: ")
    assert ", caused by " in message and cause in message and "\n" not in message


def test_a_converted_copy_is_the_one_that_the_library_finds_for_these_files(tmp_path, own_cache):
    """Else a new version of this program would convert anew what an older one has converted."""
    for name in ("a b", "c[1]", "d*", "~e"):
        write(tmp_path / f"{name}.jsonl", name)
    table = open_table("text", f"{tmp_path}/../{tmp_path.name}", None, False)
    assert table["text"][:] == ["a b", "c[1]", "d*", "~e"]

    (mapped,) = table.cache_files
    folder = Path(mapped["filename"]).parent
    content = folder.relative_to(own_cache).parts[1].rsplit("-", 1)[0]
    names = sorted(path.name for path in tmp_path.iterdir())
    files = [glob.escape(f"{tmp_path}/../{tmp_path.name}/{name}") for name in names]
    assert Path(datasets.load_dataset_builder("json", content, data_files=files).cache_dir) == folder


def test_a_full_cache_is_told_as_that_and_not_as_damaged_files(tmp_path, own_cache):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * 1000}) + "\n" for _ in range(200)))

    def body(rank, world_size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(DataError) as told:
            open_table("text", str(path), None, False)
        assert re.search(r"has no room in the cache .*: [\d,]+ bytes are free in", str(told.value))
        assert "set HF_DATASETS_CACHE" in str(told.value) and "damaged" not in str(told.value)

    assert run_forked(1, body, store=tmp_path / "store", timeout=60) == [0]


def test_a_cache_that_cannot_be_written_serves_what_it_holds(tmp_path, own_cache, monkeypatch):
    import datasets.builder

    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "b.jsonl", "b")
    assert texts(tmp_path / "a.jsonl") == ["a"]

    class ReadOnly(datasets.builder.FileLock):
        def __init__(self, path, *args, **kwargs):
            if os.path.realpath(path).startswith(str(own_cache)):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            super().__init__(path, *args, **kwargs)

    monkeypatch.setattr(datasets.builder, "FileLock", ReadOnly)
    assert texts(tmp_path / "a.jsonl") == ["a"]
    with pytest.raises(
        DataError, match=r"cannot be written and holds no converted copy: set HF_DATASETS_CACHE"
    ):
        texts(tmp_path / "b.jsonl")


def test_text_that_is_not_utf_8_inside_a_table_is_refused_with_its_row(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").write_bytes(b'{"text":"\xe9"}\n')
    with pytest.raises(DataError, match="text: row 1: column 'text' is not UTF-8"):
        build(keys(tmp_path))
