"""What is wrong with a row is told with the file that it lies in and its number there."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.helpers import build
from torchtitan_rd.__main__ import main
from torchtitan_rd.data import DatasetKeys, files, json_text, row_files
from torchtitan_rd.data.files import find_files
from torchtitan_rd.data.row_files import naming_the_file
from torchtitan_rd.errors import DataError

TEXTS = [["a" * 40, "b" * 40, "c" * 40], ["d" * 40, None]]  # the last is no text


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_parquet(path: Path, texts) -> None:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)


def write_arrow(path: Path, texts) -> None:
    table = pa.table({"text": pa.array(texts, pa.string())})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def lines(texts) -> bytes:
    # An empty line is no row.
    return "\n".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


WRITERS = {
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    ".jsonl": lambda path, texts: path.write_bytes(lines(texts)),
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts))),
    ".json": lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts])),
}


def write_both(folder: Path, suffix: str) -> None:
    folder.mkdir()
    for name, texts in zip("ab", TEXTS, strict=True):
        WRITERS[suffix](folder / f"{name}{suffix}", texts)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_bad_row_of_training_is_named_with_its_file(suffix, tmp_path):
    write_both(tmp_path / "texts", suffix)
    keys = DatasetKeys(dataset="text", dataset_path=str(tmp_path / "texts"), seq_len=8, local_batch_size=1)
    with pytest.raises(DataError, match=r"^text: row 4: .* \(row 1 of \S*texts/b" + suffix + r"\)$"):
        build(keys)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_bad_row_of_preparation_is_named_with_its_file(suffix, tmp_path, capsys):
    write_both(tmp_path / "texts", suffix)
    line = [
        "tokenize",
        tmp_path / "texts",
        "--tokenizer",
        "bytes",
        "--block-size",
        8,
        "--output",
        tmp_path / "o",
    ]
    assert main(["data", *map(str, line)]) == 1
    said, error = capsys.readouterr().err.splitlines()
    assert f"5 rows, 2 files: a{suffix}, b{suffix}" in said
    assert "row 4: column 'text' is null; expected text (row 1 of " in error
    assert f"texts/b{suffix})" in error


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_are_counted_a_block_at_a_time(suffix, tmp_path, monkeypatch):
    texts = ["long " * n for n in range(12)]
    (tmp_path / f"a{suffix}").write_bytes(b"")
    content = b"\xef\xbb\xbf" + b"\n" * 9 + lines(texts) + b"\r\n  \n" + b'{"text": "no line end"}'
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)

    for block in (7, 64, 8 << 20):
        monkeypatch.setattr(json_text, "_BLOCK", block)
        assert json_text.rows_of_json(path) == len(texts) + 1

    sizes, opened = [], json_text.opened

    class Watched:
        def __init__(self, file):
            self.stream = opened(file)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def read(self, *size):
            sizes.extend(size or [None])
            return self.stream.read(*size)

    monkeypatch.setattr(json_text, "opened", Watched)
    json_text.rows_of_json(path)
    assert set(sizes) == {8 << 20}, "never a file as a whole"


def test_of_more_than_can_be_counted_soon_no_file_is_named(tmp_path, monkeypatch):
    write_both(tmp_path / "texts", ".jsonl")
    found = find_files(str(tmp_path / "texts"))
    size = sum(file.stat().st_size for file in found.files)
    monkeypatch.setattr(row_files, "_READABLE_BYTES", size)
    with pytest.raises(DataError, match=r"\(row 1 of \S*b.jsonl\)"), naming_the_file(found, 4, rows=5):
        raise DataError("text: row 4")
    found = find_files(str(tmp_path / "texts"))
    monkeypatch.setattr(row_files, "_READABLE_BYTES", size - 1)
    monkeypatch.setattr(files, "rows_of_json", lambda _: pytest.fail("was read"))
    with pytest.raises(DataError, match=r"^text: row 4$"), naming_the_file(found, 4, rows=5):
        raise DataError("text: row 4")


def test_where_the_files_do_not_add_up_to_the_rows_no_file_is_named(tmp_path):
    write_both(tmp_path / "texts", ".parquet")
    found = find_files(str(tmp_path / "texts"))
    with pytest.raises(DataError, match=r"^wrong$"), naming_the_file(found, 1, rows=4):  # 5 lie there
        raise DataError("wrong")
    with pytest.raises(DataError, match=r"\(row 2 of \S*a.parquet\)"), naming_the_file(found, 2, rows=5):
        raise DataError("wrong")
    found = find_files(str(tmp_path / "texts"))
    (tmp_path / "texts" / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"^wrong$"), naming_the_file(found, 2, rows=5):
        raise DataError("wrong")
