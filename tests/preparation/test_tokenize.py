"""Documents become packed rows: none is lost or doubled, whatever the processes, tasks and kills."""

import errno
import json
import os
import signal
import time
from collections import Counter

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import preparation as benchmark
from tests.data.helpers import build
from tests.fork_server import start_python
from tests.preparation.common import (
    contents,
    documents_of,
    killed,
    rows_of,
    run,
    without_room,
    write_corpus,
)
from torchtitan_rd.data import DatasetKeys, load_tokenizer
from torchtitan_rd.preparation import inputs as inputs_module
from torchtitan_rd.preparation.manifest import Output
from torchtitan_rd.preparation.tokenize import Encoder

PAD = 573


def texts_of(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def arguments(corpus, tokenizer, folder, *more):
    small = ("--block-size", 64, "--files", 3, "--val-share", 0.2, "--tail", "pad")
    return ("tokenize", corpus, "--tokenizer", tokenizer, "--output", folder, *small, *more)


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "packed"
    assert run(*arguments(corpus, tokenizer, folder)) == 0
    return folder


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_every_document_is_there_once_with_its_borders(packed, corpus, tokenizer):
    ours = load_tokenizer(str(tokenizer))
    train, val = (documents_of(packed, split, ours, PAD) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts_of(corpus)) and not set(train) & set(val)
    assert 3 <= len(val) <= 25  # of 60, at a share of 0.2
    noted = manifest_of(packed)
    assert noted["complete"] and noted["rows"] == {s: len(rows_of(packed, s)) for s in ("train", "val")}
    tokens = sum(len(ours.encode(text)) + 2 for text in train)
    (source,) = noted["sources"].values()
    assert (source["documents"], source["held_out"], source["train_tokens"]) == (60, len(val), tokens)
    assert sorted(noted["files"]) == sorted(set(contents(packed)) - {"manifest.json"})


def test_files_that_a_name_leaves_out_are_told_and_noted(tokenizer, tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("books", "trains_manual", "train_manuals", "dev-docs"):
        write_corpus(folder / f"{name}.jsonl", [f"{name} " * 40])
    line = ("tokenize", folder, "--tokenizer", tokenizer, "--block-size", 8, "--val-share", 0)
    assert run(*line, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "1 rows, 1 files: train_manuals.jsonl" in said
    assert "does not read 2 files (not named 'train' as others are): books.jsonl, trains_manual.jsonl" in said
    assert "name them as a further input, or their split with --split" in said
    (source,) = manifest_of(tmp_path / "out")["sources"].values()
    assert source["documents"] == 1 and source["left_out"] == {
        "named after another split": ["dev-docs.jsonl"],
        "not named 'train' as others are": ["books.jsonl", "trains_manual.jsonl"],
    }
    assert run(*line, "--split", "validation", "--output", tmp_path / "dev") == 0
    (source,) = manifest_of(tmp_path / "dev")["sources"].values()
    assert source["documents"] == 1 and len(source["left_out"]["named after another split"]) == 1


def test_two_processes_write_the_same_files_as_one(packed, corpus, tokenizer, tmp_path):
    assert run(*arguments(corpus, tokenizer, tmp_path / "p", "--processes", 2)) == 0
    assert contents(tmp_path / "p") == contents(packed)


@pytest.mark.parametrize(
    ("owner", "method", "call", "after"),
    [
        (Output, "commit", 2, True),  # the first file has its name, and nothing is noted
        pytest.param(Output, "commit", 5, False, marks=pytest.mark.slow),
        (Output, "save", 2, True),
        (Encoder, "__call__", 2, False),
        pytest.param(Output, "save", 4, True, marks=pytest.mark.slow),
        (Output, "finish", 1, False),
        pytest.param(Output, "finish", 1, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    owner, method, call, after, packed, corpus, tokenizer, tmp_path
):
    line = arguments(corpus, tokenizer, tmp_path / "p")
    assert killed(line, owner, method, call, tmp_path / "store", after)
    assert run(*line) == 0
    assert contents(tmp_path / "p") == contents(packed)


def test_what_is_done_is_not_encoded_again(corpus, tokenizer, tmp_path, monkeypatch):
    line = arguments(corpus, tokenizer, tmp_path / "p")
    assert killed(line, Output, "save", 3, tmp_path / "store", after=True)
    jobs, real = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, runs: jobs.append(runs) or real(self, runs))
    assert run(*line) == 0
    assert jobs == [range(40, 60)]  # of the last file


def test_tasks_together_hold_every_document_once(corpus, tokenizer, tmp_path, capsys):
    folder = tmp_path / "p"
    for task in (2, 0, 1):
        assert run(*arguments(corpus, tokenizer, folder, "--tasks", 3, "--task", task, "--files", 6)) == 0
        assert manifest_of(folder)["complete"] is (task == 1)
    assert "complete when all are" in capsys.readouterr().out
    ours = load_tokenizer(str(tokenizer))
    both = [text for split in ("train", "val") for text in documents_of(folder, split, ours, PAD)]
    assert sorted(both) == sorted(texts_of(corpus))
    assert {name[:9] for name in contents(folder) if name[:5] == "train"} == {
        f"train/00{t}" for t in range(3)
    }
    assert not (folder / ".work").exists()


def test_weights_repeat_documents_and_sample_the_fraction(corpus, tokenizer, tmp_path):
    texts = texts_of(corpus)
    parts = [write_corpus(tmp_path / f"{i}.jsonl", texts[20 * i : 20 * i + 20]) for i in range(3)]
    weights = [f"--weight={part}={w}" for part, w in zip(parts, (2.5, 0, 0.5), strict=True)]
    line = arguments(parts[0], tokenizer, tmp_path / "p", *weights)
    assert run("tokenize", *parts[1:], *line[1:]) == 0

    ours = load_tokenizer(str(tokenizer))
    train, val = (Counter(documents_of(tmp_path / "p", s, ours, PAD)) for s in ("train", "val"))
    assert set(val.values()) == {1} and not set(train) & set(val)
    repeated = [train[text] for text in texts[:20] if text not in val]
    assert set(repeated) == {2, 3} and len(repeated) + sum(text in val for text in texts[:20]) == 20
    assert not any(train[text] or val[text] for text in texts[20:40])
    assert sum(train[text] + val[text] for text in texts[40:]) == 10


def test_equal_texts_are_on_one_side(tokenizer, tmp_path):
    texts = [f"number {i % 40}, which stands here more than once" for i in range(400)]
    corpus = write_corpus(tmp_path / "a.jsonl", texts)
    assert run(*arguments(corpus, tokenizer, tmp_path / "p")) == 0
    ours = load_tokenizer(str(tokenizer))
    train, val = (Counter(documents_of(tmp_path / "p", s, ours, PAD)) for s in ("train", "val"))
    assert set(train) | set(val) == set(texts) and not set(train) & set(val) and val
    assert set((train + val).values()) == {10}


def test_a_tail_that_fills_no_row_is_counted(packed, corpus, tokenizer, tmp_path):
    assert run(*arguments(corpus, tokenizer, tmp_path / "p", "--tail", "drop")) == 0
    dropped, padded = manifest_of(tmp_path / "p"), manifest_of(packed)
    for split in ("train", "val"):
        (source,) = dropped["sources"].values()
        left = source[f"{split}_tokens"] - dropped["tokens"][split]
        assert 0 < left == dropped["left_over"][split] < 65
        assert dropped["rows"][split] == padded["rows"][split] - 1 and padded["left_over"][split] == 0
        assert np.array_equal(rows_of(tmp_path / "p", split), rows_of(packed, split)[:-1])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_trainer_reads_them_with_documents_apart(split, packed, tokenizer):
    ours = load_tokenizer(str(tokenizer))
    keys = {"dataset": "packed", "dataset_path": str(packed), "seq_len": 64, "local_batch_size": 2}
    config = DatasetKeys(**keys, pad_id=PAD, eos_id=ours.eos_id, document_mask=True)
    loader = build(config, vocab_size=600) if split == "train" else None
    if loader is None:  # held out: named by its own folder
        config = config.model_copy(update={"dataset_path": str(packed / "val")})
        loader = build(config, vocab_size=600)
    (batch,) = loader.next_step()
    # A row each of the two lanes, whatever their order: rows are windows.
    rows = {tuple(row) for row in rows_of(packed, "train" if split == "train" else "val").tolist()}
    for inputs, labels, documents in zip(batch.inputs, batch.labels, batch.document_ids, strict=True):
        assert (inputs[0].item(), *labels.tolist()) in rows
        assert documents[-1] == (inputs[:-1] == ours.eos_id).sum()
    loader.close()


BAD = {
    "empty.jsonl": (b"", "nothing but empty files"),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}\n', "row 1: column 'text' is null"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n', "row 1: column 'text' holds 3"),
    "column.jsonl": (b'{"body": "a"}\n', "has no column 'text', only body; set --column"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl"),
    "latin.txt": (b"caf\xe9", "latin.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_named(name, tokenizer, tmp_path, capsys):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    assert run(*arguments(tmp_path / name, tokenizer, tmp_path / "p")) == 1
    error = capsys.readouterr().err
    assert message in error and name in error and "Traceback" not in error


def test_text_in_parquet_that_is_not_utf_8_is_named(tokenizer, tmp_path, capsys):
    text = pa.array([b"good", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert run(*arguments(tmp_path / "a.parquet", tokenizer, tmp_path / "p")) == 1
    error = capsys.readouterr().err
    assert "a.parquet: row 1: column 'text' is not UTF-8" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--weight", "{corpus}=0"), "all weights are 0"),
        (("--weight", "{corpus}=-1"), "expected 0 or more"),
        (("--weight", "{corpus}=1e30"), "at most 1048576 is possible"),
        (("--weight", "corpus=2"), "--weight corpus=2: is no source; known: "),
        (("--tasks", 2, "--task", 2), "tasks are 0..1"),
        (("--val-share", 1), "less than 1"),
        (("--block-size", 100000, "--tail", "drop"), "do not fill one row of 100001 ids"),
        (("--tokenizer", "bytes"), "names no pad_token"),
        (("--files", 0), "--files 0: must be at least 1"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_refused(more, message, corpus, tokenizer, tmp_path, capsys):
    more = [str(one).format(corpus=corpus) for one in more]
    assert run(*arguments(corpus, tokenizer, tmp_path / "p", *more)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_folder_of_another_recipe_is_refused(unfinished, packed, corpus, tokenizer, tmp_path, capsys):
    folder = packed
    if unfinished:
        folder = tmp_path / "p"
        assert killed(arguments(corpus, tokenizer, folder), Output, "save", 2, tmp_path / "store")
    before = contents(folder)
    assert run(*arguments(corpus, tokenizer, folder, "--seed", 1)) == 1
    assert "--seed was 0 and is 1" in capsys.readouterr().err
    assert run(*arguments(corpus, "bytes", folder, "--tail", "drop")) == 1
    error = capsys.readouterr().err
    assert "the tokenizer is another one" in error and '--tail was "pad" and is "drop"' in error
    assert contents(folder) == before


def test_a_folder_with_other_things_is_left_alone(corpus, tokenizer, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert run(*arguments(corpus, tokenizer, tmp_path)) == 1
    assert "is not empty (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_one_message_and_the_same_line_goes_on(packed, corpus, tokenizer, tmp_path, capfd):
    line = arguments(corpus, tokenizer, tmp_path / "p")
    error = without_room(line, 6000, tmp_path, capfd)
    assert "no room to write" in error and "Traceback" not in error
    assert run(*line) == 0
    assert contents(tmp_path / "p") == contents(packed)


@pytest.mark.parametrize("place", ["save", "locked"])
def test_no_room_for_what_only_the_work_needs_is_the_same_message(
    place, corpus, tokenizer, tmp_path, capsys, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Output, place, full)
    assert run(*arguments(corpus, tokenizer, tmp_path / "p")) == 1
    error = capsys.readouterr().err
    assert "no room to write (No space left on device: " in error and "Traceback" not in error


def test_inputs_are_read_once_for_their_sha256(corpus, tokenizer, tmp_path, monkeypatch):
    line = arguments(corpus, tokenizer, tmp_path / "p")
    assert killed(line, Output, "save", 3, tmp_path / "store")
    read, real = [], inputs_module.describe
    monkeypatch.setattr(inputs_module, "describe", lambda file: read.append(file) or real(file))
    assert run(*line) == 0
    assert not read


@pytest.mark.slow
def test_a_real_kill_ends_all_processes_and_the_same_line_goes_on(corpus, tokenizer, tmp_path):
    many = (f"--weight={corpus}=40", "--files", 40)
    assert run(*arguments(corpus, tokenizer, tmp_path / "whole", *many)) == 0
    line = arguments(corpus, tokenizer, tmp_path / "p", *many)
    command = ("-m", "torchtitan_rd", "data", *line, "--processes", "2")
    program = start_python(*map(str, command))
    note = tmp_path / "p" / ".work" / "task-000.json"
    wait_until(lambda: note.exists(), seconds=120)
    others = psutil.Process(program.pid).children(recursive=True)
    program.kill()
    assert program.wait(30) == -signal.SIGKILL and len(others) >= 3
    wait_until(lambda: not any(alive(process) for process in others), seconds=60)

    assert 0 < json.loads(note.read_text())["files_done"] < 40
    assert run(*line) == 0
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_output_folder_within_the_input_is_refused(tokenizer, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    corpus = write_corpus(tmp_path / "texts" / "a.jsonl")
    assert run(*arguments(corpus.parent, tokenizer, corpus.parent / "packed")) == 1
    assert "lies in the input" in capsys.readouterr().err
    assert list(corpus.parent.iterdir()) == [corpus]


def test_a_byte_order_mark_and_the_kind_of_line_ends_are_no_text(tokenizer, tmp_path):
    (tmp_path / "plain.txt").write_bytes(b"one line\nand another\n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfone line\r\nand another\r\n")
    rows = {}
    for name in ("plain", "marked"):
        path = tmp_path / f"{name}.txt"
        sources = tmp_path / f"{name}.yaml"
        sources.write_text(f"sources: {{src: {{address: {path}}}}}")
        assert run("download", sources, "--output", tmp_path / f"{name}-staged") == 0
        for source in (path, tmp_path / f"{name}-staged"):
            folder = tmp_path / f"{source.name}-packed"
            line = ("tokenize", source, "--tokenizer", tokenizer, "--block-size", 8, "--val-share", 0)
            assert run(*line, "--tail", "pad", "--output", folder) == 0
            table = pq.read_table(folder / "train" / "000_00000.parquet")
            rows[source.name] = table["input_ids"].to_pylist()
    assert all(found == rows["plain.txt"] for found in rows.values())


def test_the_benchmark_compares_ways_that_make_the_same_number_of_tokens(tokenizer, tmp_path):
    *_, source = benchmark.make_sources(tmp_path, megabytes=0.4)
    ours = benchmark.by_us(source, str(tokenizer), tmp_path, processes=1)
    # What fills no row is encoded too, and stands in the counts.
    assert benchmark.by_library(source, str(tokenizer)) == ours > 50_000
