"""An output folder belongs to one recipe, however many tasks begin it together."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.preparation.common import run, write_corpus
from torchtitan_rd.errors import DataError
from torchtitan_rd.preparation.manifest import Output, Recipe, read_manifest

RECIPE = Recipe("tokenize", {"seed": 0}, {"a": {"size": 1, "sha256": "00"}}, "digest", {"pyarrow": "1"})


def test_tasks_that_begin_a_folder_together_agree(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        for number in range(20):
            folder = tmp_path / str(number)
            opened = list(pool.map(lambda _, folder=folder: Output.open(folder, RECIPE), range(16)))
            assert len(opened) == 16 and not list((folder / ".work").iterdir())
            assert not read_manifest(folder)["complete"]


def test_one_part_of_the_work_has_one_process(tmp_path):
    output = Output.open(tmp_path / "o", RECIPE)
    refused = pytest.raises(DataError, match="another process is making task 0")
    with output.locked("task 0"), output.locked("task 1"), refused, output.locked("task 0"):
        pass
    with output.locked("task 0"):
        pass


def test_only_a_half_done_folder_needs_the_same_versions(tmp_path):
    other = Recipe(**{**vars(RECIPE), "libraries": {"pyarrow": "2"}})
    output = Output.open(tmp_path / "o", RECIPE)
    with pytest.raises(DataError, match="pyarrow was 1 and is 2"):
        Output.open(tmp_path / "o", other)
    output.finish({"rows": 5})
    assert Output.open(tmp_path / "o", other).result["rows"] == 5


@pytest.mark.parametrize("content", ["{", "[]", '{"complete": true}'])
def test_a_manifest_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Output.open(tmp_path, RECIPE)


def test_a_manifest_holds_no_time_and_no_machine(tmp_path):
    texts = []
    for name in ("a", "b"):
        Output.open(tmp_path / name, RECIPE).finish({"rows": 5})
        texts.append((tmp_path / name / "manifest.json").read_text())
    assert texts[0] == texts[1] and json.loads(texts[0])["inputs"] == RECIPE.inputs


@pytest.mark.parametrize("below", ["", "/folder"])
def test_a_folder_that_cannot_be_written_is_one_message(below, tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(DataError, match="cannot be written: Not a directory; name another output folder"):
        Output.open(tmp_path / f"a{below}", RECIPE)


def test_a_folder_that_another_process_finished_meanwhile_is_left_as_it_is(tmp_path):
    """Between the first look at the folder and the lock; the lock itself makes `.work` anew."""
    late, early = (Output.open(tmp_path / "out", RECIPE) for _ in range(2))
    assert late.result is None
    early.finish({"rows": 1})
    with late.locked("rows"):
        assert late.result == early.result
    assert not late.work.exists()


@pytest.mark.parametrize("step", ["train-tokenizer", "download", "tokenize", "shuffle", "prepare-spikes"])
def test_a_step_that_another_process_ends_just_before_the_lock_does_nothing(step, tmp_path, monkeypatch):
    corpus, spikes = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "spikes.txt"
    spikes.write_text("0.1\n0.2\n0.5\n")
    (tmp_path / "sources.yaml").write_text("sources: {a: {address: corpus.jsonl}}")
    packing = ("--tokenizer", "bytes", "--block-size", 64)
    lines = {
        "train-tokenizer": (corpus, "--vocab-size", 300),
        "download": (tmp_path / "sources.yaml",),
        "tokenize": (corpus, *packing),
        "shuffle": (tmp_path / "packed",),
        "prepare-spikes": (spikes,),
    }
    if step == "shuffle":
        assert run("tokenize", corpus, *packing, "--output", tmp_path / "packed") == 0
    line = (step, *lines[step], "--output", tmp_path / "out")
    assert run(*line) == 0

    real_result, real_locked, is_locked = Output.result, Output.locked, []
    monkeypatch.setattr(
        Output, "result", property(lambda output: real_result.fget(output) if is_locked else None)
    )
    monkeypatch.setattr(Output, "locked", lambda *args: is_locked.append(1) or real_locked(*args))
    monkeypatch.setattr(Output, "commit", lambda *args: pytest.fail("something was written"))
    if step == "tokenize":  # what it keeps of its inputs comes before the lock
        monkeypatch.setattr(Output, "save", lambda *args: None)
    assert run(*line) == 0 and is_locked
    assert not (tmp_path / "out" / ".work").exists()
