"""`torchtitan-rd data check`: every row that would stop a run, before the run."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.helpers import build
from torchtitan_rd.__main__ import main
from torchtitan_rd.data import DatasetKeys
from torchtitan_rd.data.check import scan
from torchtitan_rd.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def check(tmp_path, *arguments):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nseq_len = 4\nlocal_batch_size = 1\n[model]\nvocab_size = 300\n")
    return main(["data", "check", str(file), *arguments])


@pytest.fixture
def spikes(tmp_path):
    """700 recordings, of which 41, 300 and 301 hold what cannot be trained on and 5 is empty."""
    counts = [np.ones((2, 3), int).tolist() for _ in range(700)]
    counts[41][1][2] = 255
    counts[300] = [[1, 2], [3]]
    counts[301][0][0] = -1
    counts[5] = []
    datasets.Dataset.from_dict({"spike_counts": counts}).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def test_every_bad_row_is_printed_with_its_reason_and_with_what_skips_it(spikes, tmp_path, capsys):
    arguments = ("--training.dataset=primate", f"--training.dataset_path={spikes}", "--model.vocab_size=256")
    assert check(tmp_path, *arguments) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("primate: row 41, neuron 1, time bin 2: spike count 255 is not in 0..254")
    assert printed[1].startswith("primate: row 300: neuron 1 has 1 time bins")
    assert printed[2].startswith("primate: row 301, neuron 0, time bin 0: spike count -1")
    assert printed[3] == (
        "training: 700 rows, 4,176 spike counts; "
        "1 empty, 0 skipped by training.skip_ranges, 3 that would stop a run"
    )
    assert printed[4] == "to leave these out: skip_ranges = [[41, 41], [300, 301]]"
    assert check(tmp_path, *arguments, "--training.skip_ranges=[[41, 41], [300, 301]]") == 0
    assert "3 skipped by training.skip_ranges, 0 that would stop a run" in capsys.readouterr().out


def test_with_the_ranges_that_it_proposes_a_run_reads_everything(spikes):
    keys = DatasetKeys(dataset="primate", dataset_path=spikes, seq_len=300, local_batch_size=1)
    report = scan(keys, tokenizer=None, vocab_size=256, seed=0, split="train")
    loader = build(keys, vocab_size=256)
    with pytest.raises(DataError, match="row 41"):
        [loader.next_step() for _ in range(20)]
    loader.close()
    loader = build(keys.model_copy(update={"skip_ranges": report.skip_ranges}), vocab_size=256)
    while loader.state_dict()["positions"][0][0] == 0:
        loader.next_step()
    loader.close()


def test_missing_texts_and_rows_of_another_length_are_found(tmp_path, capsys):
    pq.write_table(
        pa.table({"text": ["a", None, "", "b"] * 100}), tmp_path / "text.parquet", row_group_size=7
    )
    assert (
        check(tmp_path, "--training.dataset=text", f"--training.dataset_path={tmp_path / 'text.parquet'}")
        == 1
    )
    printed = capsys.readouterr().out
    assert printed.count("expected text") == 50 and "... and 50 more" in printed
    assert "text: row 1: column 'text' holds string None" in printed
    assert "training: 400 rows, 200 characters; 100 empty" in printed

    rows = pa.array([[0] * 5, [0] * 4, [300, 0, 0, 0, 0]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "packed.parquet")
    assert (
        check(tmp_path, "--training.dataset=packed", f"--training.dataset_path={tmp_path / 'packed.parquet'}")
        == 1
    )
    printed = capsys.readouterr().out
    assert "packed: row 1: has 4 ids" in printed and "packed: row 2: token 0 has id 300" in printed


def test_held_out_data_is_checked_too_and_what_has_no_end_is_not(tmp_path, capsys):
    held_out = ("--validation.enable", "--validation.dataset=pydoc-validation", "--validation.sequences=1")
    assert check(tmp_path, *held_out) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["training", "validation"]


def test_what_is_no_check_is_refused(tmp_path, capsys):
    assert main(["data", "chekc"]) == 1 and "did you mean 'check'?" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a")
    stream = ("--training.dataset=text", f"--training.dataset_path={tmp_path / 'a.txt'}", "--training.stream")
    assert check(tmp_path, *stream) == 1
    assert "check it with --training.stream=false" in capsys.readouterr().err
