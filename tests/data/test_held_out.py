"""Held-out data that is what was trained on is refused, before anything is read where names tell it."""

import json
from dataclasses import replace

import datasets
import pytest

from tests.data.helpers import build
from torchtitan_rd import run_plan, train
from torchtitan_rd.__main__ import main
from torchtitan_rd.config import load
from torchtitan_rd.data import BatchDims, DatasetKeys, check_other_rows, load_tokenizer
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.job import Environment
from torchtitan_rd.run_plan import resolve
from torchtitan_rd.validation import ValidationConfig, held_out_set

ALONE = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, log_level="INFO")
SMALL = ["--training.seq_len=8", "--training.local_batch_size=1", "--validation.enable"]
SMALL += ["--model.overrides.dim=32", "--model.overrides.n_layers=1"]
REMEDY = "name other data with validation.dataset, validation.dataset_path or validation.split"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "train-0", "dev", "one"):
        path = tmp_path / "in_one" / f"{name}.jsonl" if name == "one" else tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name * 90}) + "\n")
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "a.jsonl")
    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(str(tmp_path / "saved"))
    parts = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "splits"))
    return tmp_path


def refused(*arguments) -> str | None:
    """What `resolve` says of a run that validates."""
    try:
        resolve(load([*SMALL, *arguments], ALONE).config, ALONE)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("trained", "held", "split", "what"),
    [
        ("a.jsonl", None, "validation", "1 files (a.jsonl)"),
        ("a.jsonl", "linked.jsonl", "validation", "1 files (linked.jsonl)"),
        ("[ab].jsonl", None, "validation", "2 files (a.jsonl, b.jsonl)"),
        ("[ab].jsonl", "b.jsonl", "validation", "1 files (b.jsonl)"),
        ("in_one", "in_one/*.jsonl", "validation", "1 files (one.jsonl)"),
        ("saved", None, "validation", "all of {}/saved"),
        ("splits", None, "train", "all of {}/splits"),
        ("a.jsonl", "b.jsonl", "validation", None),
        ("*.jsonl", None, "validation", None),  # train-0 and dev
        ("splits", "saved", "validation", None),
        ("splits", None, "test", None),
    ],
)
def test_files_that_are_trained_on_are_no_held_out_set(trained, held, split, what, folder):
    arguments = ["--training.dataset=text", f"--training.dataset_path={folder / trained}"]
    arguments += [f"--validation.dataset_path={folder / held}"] if held else []
    found = refused(*arguments, f"--validation.split={split}")
    if what is None:
        assert found is None
    else:
        would_be = f"validation.split = {split!r}: the held-out set would be {what.format(folder)}"
        assert found == f"{would_be}, which training reads too: {REMEDY}"


def test_one_rank_looks_at_the_files_for_all(folder, monkeypatch):
    monkeypatch.setattr(run_plan, "check_held_out", lambda *_: looked.append(rank))
    looked = []
    arguments = ["--training.dataset=text", f"--training.dataset_path={folder / 'a.jsonl'}"]
    for rank in (0, 1):
        there = replace(ALONE, rank=rank, local_rank=rank, world_size=2, local_world_size=2)
        resolve(load([*SMALL, *arguments], there).config, there)
    assert looked == [0]


def test_rows_that_training_skips_may_be_held_out(folder, capfd):
    path = folder / "rows.jsonl"
    path.write_text((json.dumps({"text": "words " * 20}) + "\n") * 8)
    arguments = ["--training.dataset=text", f"--training.dataset_path={path}", "--validation.sequences=2"]
    arguments += ["--training.steps=1", f"--job.dump_folder={folder / 'run'}"]
    assert train.main([*SMALL, *arguments, "--training.skip_ranges=[[0,1]]"]) == 0
    assert train.main([*SMALL, *arguments]) == 1
    assert "(rows.jsonl), which training reads too" in capfd.readouterr().err


def test_the_split_of_the_hub_that_is_trained_on_is_no_held_out_set():
    hub = "--training.dataset=wikitext"
    found = refused(hub, "--validation.split=train")
    assert "would be split 'train' of Salesforce/wikitext, which training" in found
    assert refused(hub, "--validation.split=validation") is None


@pytest.mark.parametrize(("held", "warns"), [("pydoc", True), ("pydoc-validation", False)])
def test_samples_made_here_are_measured_with_a_warning_if_they_are_trained_on(held, warns, tmp_path, capfd):
    arguments = ["--training.dataset=pydoc", f"--validation.dataset={held}", "--validation.sequences=4"]
    arguments += ["--validation.enable", "--training.steps=1", f"--job.dump_folder={tmp_path}"]
    assert train.main([*SMALL, *arguments]) == 0
    assert ("its loss is that of rows that are trained on" in capfd.readouterr().err) == warns


def test_a_source_of_a_mixture_is_no_held_out_set(folder):
    sources = [
        {"name": name, "dataset": "text", "dataset_path": str(folder / f"{name}.jsonl"), "weight": 1}
        for name in ("a", "b")
    ]
    (folder / "run.toml").write_text("[training]\nmixture = " + tables(sources))
    arguments = [f"--job.config_file={folder / 'run.toml'}", "--validation.dataset=text"]
    found = refused(*arguments, f"--validation.dataset_path={folder / 'b.jsonl'}")
    assert "would be 1 files (b.jsonl), which training.mixture.b reads too" in found
    assert refused(*arguments, f"--validation.dataset_path={folder / 'dev.jsonl'}") is None


def tables(sources) -> str:
    rows = (", ".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) for one in sources)
    return f"[{', '.join(f'{{{row}}}' for row in rows)}]\n"


def test_data_check_refuses_it_too(folder, capsys):
    arguments = ["data", "check", "--training.dataset=text", f"--training.dataset_path={folder / 'a.jsonl'}"]
    arguments += ["--validation.enable", f"--job.dump_folder={folder / 'none'}"]
    assert main(arguments) == 1
    assert "the held-out set would be 1 files (a.jsonl), which training" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_copy_of_what_is_trained_on_is_seen_once_both_are_open(stream, folder):
    (folder / "held.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    common = {"dataset": "text", "seq_len": 8, "local_batch_size": 1}
    training = DatasetKeys(**common, dataset_path=str(folder / "a.jsonl"), stream=stream)
    trained = build(training).fingerprint
    reading = {"tokenizer": load_tokenizer("bytes"), "vocab_size": 258, "seed": 0, "trained": trained}

    def held_out(name):
        config = ValidationConfig(enable=True, dataset_path=str(folder / name), sequences=1)
        return held_out_set(config, training, BatchDims.resolve(training, 0, 1), **reading)

    with pytest.raises(DataError, match=r"held\.jsonl: holds the very rows that training reads: name other"):
        held_out("held.jsonl")
    assert len(held_out("b.jsonl")) == 1


def test_the_same_rows_in_another_format_are_seen(folder):
    def fingerprint(path):
        keys = {"dataset": "text", "seq_len": 8, "local_batch_size": 1}
        return build(DatasetKeys(**keys, dataset_path=str(path))).fingerprint

    datasets.Dataset.from_dict({"text": ["a" * 90]}).save_to_disk(str(folder / "as_arrow"))
    held, other = fingerprint(folder / "as_arrow"), fingerprint(folder / "saved")
    trained = fingerprint(folder / "a.jsonl")
    for run in (trained, {"sources": {"b": fingerprint(folder / "b.jsonl"), "a": trained}}):
        with pytest.raises(DataError, match="validation: the held-out set holds the very rows that training"):
            check_other_rows(run, held)
        check_other_rows(run, other)


def test_a_run_is_refused_before_its_first_step(folder, capfd):
    (folder / "held.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    arguments = ["--training.dataset=text", f"--training.dataset_path={folder / 'a.jsonl'}"]
    arguments += [f"--validation.dataset_path={folder / 'held.jsonl'}", "--validation.sequences=1"]
    arguments += ["--training.mixed_precision_param=float32", "--comm.heartbeat_seconds=0"]
    arguments += ["--training.steps=1"]
    assert train.main([*SMALL, *arguments, f"--job.dump_folder={folder / 'run'}"]) == 1
    assert "held.jsonl: holds the very rows that training reads: name other" in capfd.readouterr().err
    assert not (folder / "run" / "metrics.jsonl").exists()
