"""Sources are staged row by row: bad rows are counted, kills change nothing, and the result is tokenised."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.data.test_hub import NEW, FakeHub
from tests.preparation.common import contents, documents_of, killed, run, without_room, write_corpus
from torchtitan_rd.data import load_tokenizer
from torchtitan_rd.preparation import download as download_module
from torchtitan_rd.preparation.manifest import Output
from torchtitan_rd.preparation.raw import read_raw

LINES = [
    b'{"text": "one", "title": "a"}',
    b'{"text": "caf\xe9"}',
    b'{"text": "two", "title": "b"}',
    b'{"text": 3, "title": "c"}',
    b"",
    b'{"title": "d"}',
    b'{"text": "broken',
    b'["no object"]',
    b'{"text": null}',
    b'{"text": " "}',
    b'{"text": "\\ud800"}',
    b'{"text": "three \xc3\xa9", "title": "e"}',
]
BAD = {
    "not UTF-8": 2,
    "column 'text' is no text": 1,
    "no column 'text'": 1,
    "not JSON": 1,
    "not a JSON object": 1,
    "column 'text' is null": 1,
    "empty": 1,
}


def sources_file(folder, **sources):
    (folder / "sources.yaml").write_text(yaml.safe_dump({"sources": sources}))
    return folder / "sources.yaml"


def texts_of(folder, name):
    tables = [pq.read_table(file) for file in sorted((folder / name).glob("*.parquet"))]
    assert all(set(table["source"].to_pylist()) == {name} for table in tables)
    return [text for table in tables for text in table["text"].to_pylist()]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def mixed(tmp_path):
    """Sources of every kind that lie here."""
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(LINES))
    (tmp_path / "list.json").write_text(json.dumps([{"text": "x"}, {"text": "y"}, 7]))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "good.txt").write_text("a whole book\n")
    (tmp_path / "books" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "books" / "unit-test-code.txt").write_text("of a test set?\n")
    text = pa.array([b"good", b"caf\xe9", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"a": text, "b": ["1", "2", None]}), tmp_path / "t.parquet")
    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(str(tmp_path / "saved"))
    return sources_file(
        tmp_path,
        rows={"address": "rows.jsonl", "weight": 2.5, "license": "PSF"},
        titled={"address": "rows.jsonl", "features": ["title", "text"]},
        listed={"address": "list.json"},
        zipped={"address": "packed.jsonl.gz"},
        books={"address": "books"},
        columns={"address": "t.parquet", "features": ["a", "b"]},
        saved={"address": str(tmp_path / "saved")},
        unwanted={"address": "nowhere", "weight": 0},
    )


def test_every_kind_of_source_is_staged_and_bad_rows_are_counted(mixed, tmp_path, capsys):
    assert run("download", mixed, "--output", tmp_path / "s") == 0
    expected = {
        "rows": ["one", "two", "three \u00e9"],
        "titled": ["a\n\none", "b\n\ntwo", "e\n\nthree \u00e9"],
        "listed": ["x", "y"],
        "zipped": ["zipped"],
        "books": ["a whole book\n"],
        "columns": ["good\n\n1"],
        "saved": ["saved"],
    }
    assert {name: texts_of(tmp_path / "s", name) for name in expected} == expected
    noted = manifest_of(tmp_path / "s")["sources"]
    assert noted["rows"]["bad"] == BAD and noted["rows"]["license"] == "PSF"
    assert noted["columns"]["bad"] == {"not UTF-8": 1, "column 'b' is null": 1}
    assert noted["books"]["bad"] == {"not UTF-8": 1} and set(noted) == set(expected)
    assert noted["books"]["left_out"] == {"named after another split": ["unit-test-code.txt"]}
    printed = capsys.readouterr()
    assert "rows: 3 rows, 13 characters; left out: 2 not UTF-8, " in printed.out
    assert "rows: left out: rows.jsonl: row 1: not UTF-8" in printed.err
    assert "books does not read 1 files (named after another split): unit-test-code.txt; " in printed.err
    assert "as a source of their own, or their `split` in the sources file" in printed.err


@pytest.mark.parametrize("file", ["rows.jsonl", "list.json", "t.parquet", "packed.jsonl.gz"])
def test_reading_on_from_a_row_gives_the_rest(file, mixed, tmp_path):
    columns = ["a", "b"] if file == "t.parquet" else ["text"]
    rows = list(read_raw(tmp_path / file, columns))
    for start in range(len(rows) + 1):
        assert list(read_raw(tmp_path / file, columns, start)) == rows[start:]


@pytest.mark.parametrize(
    ("method", "call", "after"),
    [("commit", 2, False), ("commit", 4, True), ("save", 3, True), ("save", 8, False), ("finish", 1, True)],
)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(method, call, after, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "ROWS_A_FILE", 2)
    assert run("download", mixed, "--output", tmp_path / "whole") == 0
    line = ("download", mixed, "--output", tmp_path / "s")
    assert killed(line, Output, method, call, tmp_path / "store", after)
    assert run(*line) == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "s" / "rows").iterdir())) == 2


def test_a_full_disk_is_one_message_and_the_same_line_goes_on(corpus, tmp_path, capfd):
    file = sources_file(tmp_path, one={"address": str(corpus)})
    line = ("download", file, "--output", tmp_path / "s")
    error = without_room(line, 20_000, tmp_path, capfd)
    assert "no room to write" in error and "Traceback" not in error
    assert run(*line) == 0
    assert len(texts_of(tmp_path / "s", "one")) == 60


def test_staged_sources_are_tokenised_with_their_weights(corpus, tokenizer, tmp_path, capsys):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    write_corpus(tmp_path / "a.jsonl", texts[:10])
    write_corpus(tmp_path / "b.jsonl", texts[10:20])
    file = sources_file(tmp_path, a={"address": "a.jsonl", "weight": 3}, b={"address": "b.jsonl"})
    assert run("download", file, "--output", tmp_path / "s") == 0
    line = ("tokenize", tmp_path / "s", "--tokenizer", tokenizer, "--block-size", 64, "--tail", "pad")
    assert run(*line, "--val-share", 0, "--output", tmp_path / "p") == 0
    found = documents_of(tmp_path / "p", "train", load_tokenizer(str(tokenizer)), pad_id=573)
    assert found == sorted(texts[:10] * 3 + texts[10:20])
    assert run(*line, "--val-share", 0, "--output", tmp_path / "q", "--weight", "a=0") == 0
    assert len(documents_of(tmp_path / "q", "train", load_tokenizer(str(tokenizer)), pad_id=573)) == 10

    # A staging folder that is damaged or not complete is not read.
    part = tmp_path / "s" / "a" / "00000.parquet"
    part.write_bytes(part.read_bytes() + b"x")
    assert run(*line, "--output", tmp_path / "r") == 1
    assert "00000.parquet: is missing, or not of the" in capsys.readouterr().err


def test_a_repository_on_the_hub_is_staged_at_one_commit(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, tmp_path / "hub")
    hub.moves_on(["new", "data"])
    file = sources_file(tmp_path, web={"address": "some/data", "revision": NEW})
    assert run("download", file, "--output", tmp_path / "s") == 0
    assert texts_of(tmp_path / "s", "web") == ["new", "data"]
    assert manifest_of(tmp_path / "s")["inputs"] == {"web": {"address": "some/data", "commit": NEW}}


def test_other_sources_for_the_same_folder_are_refused(mixed, tmp_path, capsys):
    assert run("download", mixed, "--output", tmp_path / "s") == 0
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(LINES[:3]))
    assert run("download", mixed, "--output", tmp_path / "s") == 1
    assert "input rows/rows.jsonl has another sha256 and size" in capsys.readouterr().err


WRONG = {
    "typo": ({"adress": "x"}, "adress: Extra inputs are not permitted; did you mean 'address'?"),
    "negative": ({"address": "a.jsonl", "weight": -1}, "weight: Input should be greater than or equal to 0"),
    "missing": ({"address": "b.jsonl"}, "no such file or folder"),
    "column": ({"address": "a.jsonl", "features": "body"}, "can be used: no column 'body' (1)"),
    "parquet column": ({"address": "a.parquet", "features": "body"}, "a.parquet: has no column 'body', only"),
    "chat": (
        {"address": "a.jsonl", "needs_chat_templating": True},
        "no row of a.jsonl can be used: no conversation (1)",
    ),
    "weights": ({"address": "a.jsonl", "weight": 0}, "every weight is 0"),
    "empty": ({"address": "empty.jsonl"}, "can be used: it has none"),
    "cut off": ({"address": "cut.jsonl.gz"}, "cut.jsonl.gz: cannot be read: Truncated compressed stream"),
    "deep": ({"address": "deep.jsonl"}, "can be used: not JSON (1)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_source_that_cannot_be_is_named(name, tmp_path, capsys):
    write_corpus(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n')[:-8])
    (tmp_path / "deep.jsonl").write_text('{"text": "a", "more": ' + "[" * 99_999 + "]" * 99_999 + "}\n")
    pq.write_table(pa.table({"text": ["text"]}), tmp_path / "a.parquet")
    keys, message = WRONG[name]
    assert run("download", sources_file(tmp_path, src=keys), "--output", tmp_path / "s") == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_file_without_sources_is_refused(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("- a\n- b\n")
    assert run("download", tmp_path / "s.yaml", "--output", tmp_path / "s") == 1
    assert "expected `sources:`" in capsys.readouterr().err


def test_a_source_is_not_named_as_the_manifest(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text("sources: {manifest.json: {address: a.jsonl}}")
    assert run("download", file, "--output", tmp_path / "s") == 1
    assert "manifest.json: is the name of the file that describes the folder" in capsys.readouterr().err


def test_a_source_that_is_named_twice_is_an_error_and_not_the_last_alone(tmp_path, capsys):
    lines = ("sources:", "  a: {address: a.txt}", "  a: {address: b.txt, weight: 3}")
    (tmp_path / "sources.yaml").write_text("\n".join(lines))
    assert run("download", tmp_path / "sources.yaml", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "the key 'a' stands here twice" in error and "line 3" in error and "Traceback" not in error
