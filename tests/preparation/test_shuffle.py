"""Shuffling changes the order of packed rows and nothing else, in any memory and through any kill."""

import json
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.preparation.common import contents, killed, rows_of, run, without_room
from torchtitan_rd.preparation import shuffle as shuffle_module
from torchtitan_rd.preparation.manifest import Output, Recipe
from torchtitan_rd.preparation.rows import ROWS_TOGETHER, RowWriter, digest_of_rows, read_rows
from torchtitan_rd.preparation.shuffle import Order, Packed, _Buckets, keys_of
from torchtitan_rd.preparation.shuffle import shuffle as shuffle_rows

SMALL = 1e-5  # GiB: some buckets, each of some rows


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    small = ("--block-size", 64, "--files", 3, "--val-share", 0.2)
    assert run("tokenize", corpus, "--tokenizer", tokenizer, "--output", folder, *small) == 0
    return folder


@pytest.fixture(scope="module")
def shuffled(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shuffled") / "shuffled"
    assert run("shuffle", packed, "--output", folder, "--files", 4, "--memory", SMALL) == 0
    return folder


def sorted_rows(folder, split):
    return sorted(map(tuple, rows_of(folder, split).tolist()))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_rows_are_the_same_and_their_order_is_another(split, packed, shuffled):
    assert sorted_rows(shuffled, split) == sorted_rows(packed, split)
    before, after = rows_of(packed, split), rows_of(shuffled, split)
    unmoved = (before == after).all(axis=1).mean()
    assert unmoved < 0.1


def test_the_files_are_of_nearly_equal_size_and_the_manifest_counts_them(packed, shuffled):
    noted, source = (json.loads((f / "manifest.json").read_text()) for f in (shuffled, packed))
    sizes = [entry["rows"] for name, entry in noted["files"].items() if name.startswith("train")]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 1 and sum(sizes) == noted["rows"]["train"]
    assert noted["rows_digest"] == source["rows_digest"] and noted["tokenizer"] == source["tokenizer"]
    found = {split: f"{digest_of_rows(rows_of(shuffled, split)):016x}" for split in ("train", "val")}
    assert found == noted["rows_digest"]


def test_the_order_depends_on_the_seed_and_not_on_the_memory(packed, shuffled, tmp_path):
    assert run("shuffle", packed, "--output", tmp_path / "large", "--files", 4) == 0
    assert contents(tmp_path / "large") == contents(shuffled)
    assert run("shuffle", packed, "--output", tmp_path / "other", "--files", 4, "--seed", 1) == 0
    assert not np.array_equal(rows_of(tmp_path / "other", "train"), rows_of(shuffled, "train"))


def test_rows_go_everywhere():
    """Of 100 000 rows, those of each tenth of the old order are spread evenly over the new one."""
    order = np.argsort(keys_of(0, 100_000, seed=3, split="train"))
    old = order.reshape(10, -1) // 10_000
    counts = np.array([np.bincount(part, minlength=10) for part in old])
    # 100 cells of 1000 expected: a chi-square of 81 degrees of freedom is below 140 but for 1 case in 10 000.
    assert ((counts - 1000) ** 2 / 1000).sum() < 140
    assert len(np.unique(keys_of(0, 100_000, 3, "train"))) == 100_000
    assert np.array_equal(keys_of(500, 10, 3, "val"), keys_of(0, 1000, 3, "val")[500:510])


@pytest.mark.parametrize(
    ("owner", "method", "call", "after"),
    [
        pytest.param(_Buckets, "_deal", 2, False, marks=pytest.mark.slow),
        (_Buckets, "_deal", 2, True),  # rows are read, and in no bucket
        (_Buckets, "_flush", 2, True),  # rows are in buckets, and not noted
        (_Buckets, "_keep", 2, True),
        pytest.param(Output, "commit", 5, False, marks=pytest.mark.slow),
        (Output, "commit", 5, True),
        pytest.param(Output, "save", 4, True, marks=pytest.mark.slow),
        (_Buckets, "deal", 2, False),  # training rows are done
        (Output, "finish", 1, False),
    ],
    ids=str,
)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    owner, method, call, after, packed, shuffled, tmp_path, monkeypatch
):
    monkeypatch.setattr(shuffle_module, "_NOTED_SECONDS", 0.0)
    line = ("shuffle", packed, "--output", tmp_path / "s", "--files", 4, "--memory", SMALL)
    assert killed(line, owner, method, call, tmp_path / "store", after)
    assert run(*line) == 0
    assert contents(tmp_path / "s") == contents(shuffled)


def test_other_memory_for_the_rest_of_a_killed_run_is_allowed(packed, shuffled, tmp_path):
    line = ("shuffle", packed, "--output", tmp_path / "s", "--files", 4)
    assert killed((*line, "--memory", SMALL), Output, "save", 3, tmp_path / "store")
    assert run(*line, "--memory", 2 * SMALL) == 0
    assert contents(tmp_path / "s") == contents(shuffled)


def test_a_full_disk_is_one_message_and_the_same_line_goes_on(packed, shuffled, tmp_path, capfd):
    line = ("shuffle", packed, "--output", tmp_path / "s", "--files", 4, "--memory", SMALL)
    error = without_room(line, 9000, tmp_path, capfd)
    assert "no room to write" in error and "Traceback" not in error
    assert run(*line) == 0
    assert contents(tmp_path / "s") == contents(shuffled)


RECORDS = 40 * ROWS_TOGETHER  # of 64 bytes: a key and 14 ids


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with one file of many rows that do not compress, and what it would take in memory."""
    folder = tmp_path_factory.mktemp("many") / "rows"
    output, rows = open_output(folder), some_rows(RECORDS, 14)
    with output.locked("write"):
        writer = RowWriter(output, folder / "train" / "a.parquet")
        writer.write(rows)
        writer.commit()
    (folder / "manifest.json").unlink()
    return folder


def open_output(folder):
    return Output.open(folder, Recipe("shuffle", {}, {}, None, {}))


def some_rows(number, width):
    return np.random.default_rng(0).integers(0, 2**31 - 1, (number, width), dtype=np.int32)


def peak_of(work):
    """Bytes that NumPy and Python hold at most while `work` runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_file_is_the_same_in_whatever_pieces_its_rows_come_and_one_group_of_them_is_held(tmp_path):
    rows = some_rows(16 * ROWS_TOGETHER + 5, 64)
    output = open_output(tmp_path / "out")

    def write(name, pieces):
        writer = RowWriter(output, tmp_path / "out" / name)
        for piece in pieces:
            writer.write(piece)
        writer.commit()

    with output.locked("write"):
        peak = peak_of(lambda: write("a", [rows]))
        write("b", np.split(rows, [1, 700, ROWS_TOGETHER + 1, 9000, 9000]))
    assert peak < rows.nbytes / 2  # a group, and the 1 MiB at a time of which the sha256 is taken
    assert (tmp_path / "out" / "a").read_bytes() == (tmp_path / "out" / "b").read_bytes()
    assert np.array_equal(np.concatenate([*read_rows(tmp_path / "out" / "a")]), rows)


def test_a_file_is_read_without_keeping_it_in_memory(many):
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_rows(many / "train" / "a.parquet")]
    assert len(held) == RECORDS / ROWS_TOGETHER
    assert 0 < max(held) < (many / "train" / "a.parquet").stat().st_size / 4


@pytest.mark.parametrize("buckets", [1, 4])
def test_memory_is_what_was_allowed_and_a_bucket_is_opened_once_for_many_rows(
    buckets, many, tmp_path, monkeypatch
):
    opened, real = [], Path.open
    memory = 64 * RECORDS // buckets
    packed, output = Packed.open(many), open_output(tmp_path / "s")

    def counted(path, *args, **kwargs):
        opened.extend([path.name] if path.name.startswith("bucket-") else [])
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    peak = peak_of(lambda: shuffle_rows(packed, Order(0, {"train": 1, "val": 0}, memory), output))
    # Beside a bucket: its order, some groups of rows, and the program's own.
    assert peak < 1.4 * memory + 16 * 64 * ROWS_TOGETHER
    # A bucket is opened when dealing begins, when it is forced to storage, and for each half of the memory.
    assert len(opened) == buckets * (2 + 2 * buckets)


def test_a_terminal_is_shown_how_long_it_takes(packed, tmp_path, capsys, monkeypatch):
    assert run("shuffle", packed, "--output", tmp_path / "s") == 0
    assert "deal train" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("shuffle", packed, "--output", tmp_path / "t") == 0
    shown = capsys.readouterr().err
    for stage in ("deal train", "write train", "deal val", "write val"):
        assert re.search(rf"{stage}: 100%.*<00:00", shown), shown


def test_rows_that_are_lost_on_the_way_are_noticed(packed, tmp_path, capsys, monkeypatch):
    real = _Buckets.deal

    def damaged(self):
        real(self)
        path = next(path for path in self._output.work.glob("bucket-train-*") if path.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(_Buckets, "deal", damaged)
    assert run("shuffle", packed, "--output", tmp_path / "s") == 1
    assert "are not those that were read" in capsys.readouterr().err
    assert not json.loads((tmp_path / "s" / "manifest.json").read_text())["complete"]


def without_manifest(packed, folder):
    shutil.copytree(packed, folder)
    (folder / "manifest.json").unlink()
    return folder


def write(path, rows, column="input_ids"):
    pq.write_table(pa.table({column: rows}), path)


BAD = {
    "other length": (lambda f: write(f, [[1] * 65, [2] * 64]), "row 1: has 64 ids"),
    "other width": (lambda f: write(f, [[1] * 64]), "has rows of 64 ids"),
    "other column": (lambda f: write(f, [[1] * 65], "ids"), "has no column 'input_ids', only ids"),
    "text": (lambda f: write(f, ["a"]), "holds string; expected lists of integers"),
    "null": (lambda f: write(f, [None, [1] * 65]), "holds nulls"),
    "too large": (lambda f: write(f, [[2**40] * 65]), "does not fit into 32 bits"),
    "no parquet": (lambda f: f.write_bytes(b"x" * 100), "is no readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(name, packed, tmp_path, capsys):
    folder = without_manifest(packed, tmp_path / "p")
    make, message = BAD[name]
    make(folder / "train" / "000_00001.parquet")
    assert run("shuffle", folder, "--output", tmp_path / "s") == 1
    error = capsys.readouterr().err
    assert message in error and "000_00001.parquet" in error and "Traceback" not in error


def test_a_folder_without_a_manifest_is_read_too(packed, shuffled, tmp_path):
    folder = without_manifest(packed, tmp_path / "p")
    # As the datasets library writes a Sequence(length=65), or whoever else has rows of one length.
    file = folder / "train" / "000_00000.parquet"
    rows = np.concatenate(list(read_rows(file)))
    write(file, pa.FixedSizeListArray.from_arrays(rows.reshape(-1), rows.shape[1]))
    assert run("shuffle", folder, "--output", tmp_path / "s", "--files", 4) == 0
    assert sorted_rows(tmp_path / "s", "train") == sorted_rows(shuffled, "train")


def test_a_file_that_is_not_the_one_of_the_manifest_is_refused(packed, tmp_path, capsys):
    shutil.copytree(packed, tmp_path / "p")
    path = tmp_path / "p" / "train" / "000_00000.parquet"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    assert run("shuffle", tmp_path / "p", "--output", tmp_path / "s") == 1
    assert "is not the file that manifest.json describes" in capsys.readouterr().err
    path.unlink()
    assert run("shuffle", tmp_path / "p", "--output", tmp_path / "s") == 1
    assert "is missing" in capsys.readouterr().err


def test_what_cannot_be_is_refused(packed, shuffled, corpus, tokenizer, tmp_path, capsys):
    assert run("shuffle", packed, "--output", tmp_path / "s", "--files", 100_000) == 1
    assert "--files 100000" in capsys.readouterr().err
    assert run("shuffle", packed, "--output", shuffled, "--files", 4, "--seed", 5) == 1
    assert "--seed was 0 and is 5" in capsys.readouterr().err
    line = ("tokenize", corpus, "--tokenizer", tokenizer, "--block-size", 64, "--output", tmp_path / "half")
    assert killed(line, Output, "finish", 1, tmp_path / "store")
    assert run("shuffle", tmp_path / "half", "--output", tmp_path / "s") == 1
    assert "is not complete; run `torchtitan-rd data tokenize` to its end" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("flag", "value"), [("--memory", "nan"), ("--memory", "inf"), ("--memory", 0), ("--files", 0)]
)
def test_a_number_that_is_none_is_refused(flag, value, packed, tmp_path, capsys):
    assert run("shuffle", packed, "--output", tmp_path / "s", flag, value) == 1
    assert f"ConfigError: {flag} {value}: " in capsys.readouterr().err
