"""Data on the hub is read at one commit: asked by rank 0 alone, kept by the checkpoint,
read again on resume.
"""

import contextlib
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch.distributed as dist
from huggingface_hub.errors import RevisionNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.conversion.common import script
from tests.data.helpers import build, merge_states
from tests.ranks import run_on_ranks
from torchtitan_rd import job, train
from torchtitan_rd.__main__ import main
from torchtitan_rd.commands.data import main as data_command
from torchtitan_rd.config import load
from torchtitan_rd.data import (
    BatchDims,
    DataRanks,
    DatasetKeys,
    build_dataloader,
    get_dataset,
    load_tokenizer,
)
from torchtitan_rd.data.hub import tokenizer_revision
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.inference import load_model
from torchtitan_rd.job import Environment
from torchtitan_rd.log import logger
from torchtitan_rd.validation import ValidationConfig, held_out_set

OLD, NEW = "a" * 40, "b" * 40
KEYS = {"dataset": "text", "dataset_path": "some/data", "seq_len": 8, "local_batch_size": 2}


class FakeHub:
    """A hub whose repository has commits, each with texts;
    `cached` is what is left where it cannot be reached.
    """

    def __init__(self, monkeypatch, folder):
        self.commits = {OLD: ["old"] * 40}
        self.newest, self.cached, self.asked, self.read = OLD, None, 0, []
        self._folder = folder
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=self.info))
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def info(self, name, revision=None, timeout=None):
        self.asked += 1
        if self.cached:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=self.newest if revision in (None, "main") else revision)

    def load(self, name, subset, split, streaming, revision=None):
        """As the datasets library does it: without the hub, the newest copy in the cache,
        whatever is asked for.
        """
        commit = self.cached or revision or self.newest
        self.read.append(commit)
        place = self._folder / commit
        if not place.exists():  # ranks that stream come here together
            staged = place.with_name(f"{commit}.{os.getpid()}")
            datasets.Dataset.from_dict({"text": self.commits[commit]}).save_to_disk(str(staged))
            with contextlib.suppress(OSError):  # another one was first
                staged.rename(place)
        table = datasets.load_from_disk(str(place))
        return table.to_iterable_dataset() if streaming else table

    def moves_on(self, texts):
        self.commits[NEW], self.newest = texts, NEW


def pinned(config, states):
    """As a run of one rank does it."""
    return DataRanks(lambda value: [value], 0, 0, states).pinned(config, get_dataset(config))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return FakeHub(monkeypatch, tmp_path / "hub")


def state_file(folder, config):
    loader = build(config)
    state = merge_states([loader.state_dict()])
    path = folder / "state.json"
    path.write_text(json.dumps({"data": state}))
    return path, json.loads(path.read_text())["data"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_resume_reads_the_commit_that_the_checkpoint_notes_and_asks_no_hub(stream, hub, tmp_path):
    config = DatasetKeys(**KEYS, stream=stream)
    path, state = state_file(tmp_path, pinned(config, []))
    assert state["fingerprint"]["revision"] == {"repository": "some/data", "commit": OLD}
    hub.moves_on(["new"] * 40)
    hub.asked = 0
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    loader = build(pinned(config, [damaged, path]))
    loader.load_state_dict(state)
    assert hub.asked == 0 and set(hub.read) == {OLD}
    assert bytes(loader.next_step()[0].inputs[0, 1:4].tolist()) == b"old"
    loader.close()

    other = build(pinned(config.model_copy(update={"dataset_revision": "main"}), [path]))
    with pytest.raises(
        DataError, match=r"revision.*training\.dataset_revision = 'a{40}'" if stream else "among rows 0"
    ):
        other.load_state_dict(state)


def test_another_commit_with_the_same_rows_is_continued_with_a_warning(hub, tmp_path, caplog, monkeypatch):
    config = DatasetKeys(**KEYS)
    _, state = state_file(tmp_path, pinned(config, []))
    hub.moves_on(hub.commits[OLD])
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        build(pinned(config, [])).load_state_dict(state)
    assert "the rows are the same" in caplog.text and NEW in caplog.text


def test_without_the_hub_the_cached_copy_is_read_and_its_commit_noted_but_never_in_place_of_another(
    hub, tmp_path
):
    hub.moves_on(["new"] * 40)
    hub.cached = OLD
    config = DatasetKeys(**KEYS)
    path, state = state_file(tmp_path, pinned(config, []))
    assert state["fingerprint"]["revision"]["commit"] == OLD
    hub.cached = NEW
    with pytest.raises(DataError, match=r"commit a{40} of the data is to be read.*its cache holds b{40}"):
        build(pinned(config, [path]))
    with pytest.raises(DataError, match="'main': the hub cannot be asked which commit"):
        pinned(config.model_copy(update={"dataset_revision": "main"}), [])


def test_a_revision_of_data_that_is_not_on_the_hub_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for keys in ({"dataset": "pydoc"}, {"dataset": "text", "dataset_path": str(tmp_path / "a.txt")}):
        with pytest.raises(
            ConfigError, match=r"not read from the hub here: unset training\.dataset_revision"
        ):
            get_dataset(DatasetKeys(**keys, dataset_revision="main"))


def test_a_run_that_resumes_goes_on_with_its_commit_after_the_hub_has_moved_on(hub, tmp_path):
    def run(steps):
        arguments = [
            f"--job.dump_folder={tmp_path / 'dump'}",
            "--training.dataset=text",
            "--checkpoint.enable",
        ]
        arguments += [
            "--training.dataset_path=some/data",
            "--training.seq_len=8",
            "--training.local_batch_size=1",
        ]
        arguments += ["--model.overrides.n_layers=1", "--model.overrides.dim=32", f"--training.steps={steps}"]
        assert train.main(arguments) == 0
        return json.loads((tmp_path / "dump" / "data.json").read_text())["commit"]

    assert run(1) == OLD
    hub.moves_on(["new"] * 40)
    assert run(2) == OLD and hub.asked == 1


def fake_tokenizers(patch, folder, newest=(NEW,)):
    """Repositories of a tokenizer on the hub; returns what is fetched of them.

    newest: the commit whenever a new one of them is asked for, the last one from then on.
    """
    fetched, moving = [], list(newest)

    def snapshot_download(name, allow_patterns, revision=None):
        revision = revision or (moving.pop(0) if moving[1:] else moving[0])
        fetched.append((name, revision))
        place = folder / f"models--{name.replace('/', '--')}" / "snapshots" / revision
        place.mkdir(parents=True, exist_ok=True)
        words = ("old", "new") if revision == NEW else ("new", "old")
        backend = Tokenizer(WordLevel({"[UNK]": 0, words[0]: 1, words[1]: 2}, unk_token="[UNK]"))
        backend.save(str(place / "tokenizer.json"))
        return str(place)

    patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


def gather(value):
    return job.gather(value)


@pytest.mark.parametrize(
    "nodes_share,stream,asking", [(True, False, [1, 0]), (False, False, [1, 1]), (True, True, [1, 1])]
)
def test_rank_0_alone_asks_the_hub_and_another_node_only_for_its_own_copy(
    nodes_share, stream, asking, tmp_path
):
    """Each rank is the first of its node. Every rank reads a stream from the hub itself,
    at the commit of rank 0.
    """
    found = run_on_ranks(2, _read_together, tmp_path, nodes_share, stream)
    asked, loads, tokenizers, windows, revisions = zip(*found, strict=True)
    assert asked == (2, 0)  # training's and validation's repository
    assert list(loads) == [2 * count for count in asking]
    assert list(tokenizers) == [1, 0 if nodes_share else 1]
    assert revisions[0] == revisions[1]
    assert revisions[0]["revision"] == {"repository": "some/data", "commit": OLD}
    assert revisions[0]["tokenizer_revision"] == {"repository": "some/words", "commit": NEW}
    assert set(windows[0]) | set(windows[1]) == {1}


def _read_together(rank, world_size, folder, nodes_share, stream):
    with pytest.MonkeyPatch.context() as patch:
        place = folder if nodes_share else folder / str(rank)
        hub, fetched = FakeHub(patch, place / "hub"), fake_tokenizers(patch, place / "words")
        ranks = DataRanks(gather, rank, 0)
        if not nodes_share:  # the other node sees neither file
            patch.setattr(Path, "is_file", _unless(Path.is_file, folder / str(1 - rank)))
            patch.setattr(Path, "is_dir", _unless(Path.is_dir, folder / str(1 - rank)))
        read = {"tokenizer": load_tokenizer(ranks.tokenizer("some/words")), "vocab_size": 3, "seed": 0}
        loaders = []
        for name in ("some/data", "some/other"):
            keys = DatasetKeys(**{**KEYS, "dataset_path": name}, stream=stream)
            dims = BatchDims.resolve(keys, rank, world_size)
            loaders.append(build_dataloader(keys, dims, **read, pin_memory=False, ranks=ranks))
        window = loaders[0].next_step()[0].inputs.flatten().tolist()
        for loader in loaders:
            loader.close()
        return hub.asked, len(hub.read), len(fetched), window, loaders[0].fingerprint


def _unless(test, hidden):
    return lambda path: not path.is_relative_to(hidden) and test(path)


def test_what_fails_on_the_rank_that_asks_fails_on_all(tmp_path):
    messages = run_on_ranks(2, _ask_for_nothing)
    assert messages[0] == messages[1] and "has no such branch" in messages[0]


def _ask_for_nothing(rank, world_size):
    def missing(name, revision=None, timeout=None):
        # Its arguments are another hub version's others.
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=missing))
        keys = DatasetKeys(**KEYS, dataset_revision="none")
        with pytest.raises(DataError) as caught:
            DataRanks(gather, rank, rank).pinned(keys, get_dataset(keys))
        return str(caught.value)


def test_a_rank_whose_held_out_data_is_another_s_is_refused(tmp_path):
    """Training's data is compared too (tests/data/test_changed_data.py)."""
    messages = run_on_ranks(2, _hold_out, tmp_path)
    assert (
        messages[0] == messages[1] and "rank 1: " in messages[0] and "the data: among rows 0" in messages[0]
    )


def _hold_out(rank, world_size, folder):
    held = folder / str(rank)
    held.mkdir()
    # And nothing to train on.
    (held / "validation.jsonl").write_text(json.dumps({"text": f"held out {rank}"}) + "\n")
    reading = {"tokenizer": load_tokenizer("bytes"), "vocab_size": 258, "seed": 0}
    validation = ValidationConfig(enable=True, dataset_path=str(held), sequences=4)
    training = DatasetKeys(dataset="text", dataset_path=str(held), seq_len=2, local_batch_size=1)
    with pytest.raises(DataError) as caught:
        dims = BatchDims.resolve(training, rank, world_size)
        held_out_set(validation, training, dims, **reading, trained={}, ranks=DataRanks(gather, rank, rank))
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2])
def test_files_that_lie_here_are_converted_by_one_rank_of_a_node_and_mapped_by_all(size, tmp_path):
    """The datasets library looks at each file every time: seconds of every rank where there are thousands."""
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"input_ids": [number] * 4}) + "\n")
    calls, windows = zip(*run_on_ranks(size, _read_files, tmp_path), strict=True)
    assert list(calls) == [1, 0][:size]
    assert [window for of_rank in windows for window in of_rank] == [[number] * 3 for number in range(4)]


def _read_files(rank, world_size, folder):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        load_dataset = datasets.load_dataset
        patch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append(1) or load_dataset(*a, **k))
        config = {"dataset": "packed", "dataset_path": str(folder), "seq_len": 3, "global_batch_size": 4}
        keys = DatasetKeys(**config, local_batch_size=1)
        dims = BatchDims.resolve(keys, rank, world_size)
        read = {"tokenizer": None, "vocab_size": 4, "seed": 0, "pin_memory": False}
        loader = build_dataloader(keys, dims, **read, ranks=DataRanks(gather, rank, rank))
        windows = [row for batch in loader.next_step() for row in batch.inputs.tolist()]
        loader.close()
    return len(calls), windows


def test_a_resumed_run_reads_the_tokenizer_at_the_commit_that_its_checkpoint_notes(tmp_path, monkeypatch):
    fetched = fake_tokenizers(monkeypatch, tmp_path)
    ranks = DataRanks(lambda value: [value], 0, 0)
    assert (
        ranks.tokenizer("bytes") == "bytes"
        and ranks.tokenizer(str(tmp_path)) == str(tmp_path)
        and not fetched
    )
    place = ranks.tokenizer("some/words").replace(NEW, OLD)
    noted = tmp_path / "state.json"
    noted.write_text(json.dumps({"data": {"fingerprint": tokenizer_revision(SimpleNamespace(folder=place))}}))
    assert DataRanks(lambda value: [value], 0, 0, [noted]).tokenizer("some/words") == place
    assert fetched == [("some/words", NEW), ("some/words", OLD)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_whose_vocabulary_a_tokenizer_on_the_hub_decides_fetches_it_once(size, tmp_path):
    fetched, vocab_sizes = zip(*run_on_ranks(size, _train_on_words, tmp_path), strict=True)
    assert list(fetched) == [1, 0][:size]
    assert list(vocab_sizes) == [3] * size


def _train_on_words(rank, world_size, folder):
    text = folder / "text"
    text.mkdir(exist_ok=True)
    (text / "a.jsonl").write_text((json.dumps({"text": "old new " * 40}) + "\n") * 8)
    arguments = [
        f"--job.dump_folder={folder / 'dump'}",
        "--training.dataset=text",
        f"--training.dataset_path={text}",
    ]
    arguments += [
        "--model.tokenizer_path=some/words",
        "--training.seq_len=8",
        "--training.local_batch_size=1",
    ]
    arguments += ["--model.overrides.n_layers=1", "--model.overrides.dim=32", "--training.steps=1"]
    environment = Environment(rank, rank, world_size, world_size, "WARNING")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "init_process_group", lambda *_: None)  # there is one
        patch.setattr(dist, "destroy_process_group", lambda: None)
        fetched = fake_tokenizers(patch, folder / "words")
        run = train.Trainer(load(arguments, environment), environment)
        run.run()
        return len(fetched), run.plan.shape.vocab_size


def test_what_comes_of_a_run_has_the_tokenizer_at_its_commit_after_the_hub_has_moved_on(
    tmp_path, monkeypatch, capsys
):
    """The export after training, a converted checkpoint, evaluation, generation, a run that starts there."""
    fetched = fake_tokenizers(monkeypatch, tmp_path / "words", newest=(OLD, NEW))
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "old new " * 40}) + "\n") * 8)
    arguments = ["--training.dataset=text", f"--training.dataset_path={tmp_path / 'a.jsonl'}"]
    arguments += ["--model.tokenizer_path=some/words", "--training.seq_len=8", "--checkpoint.enable"]
    arguments += ["--training.local_batch_size=1", "--training.steps=1", "--checkpoint.last_save_in_hf"]
    arguments += ["--model.overrides.n_layers=1", "--model.overrides.dim=32"]
    assert train.main([*arguments, f"--job.dump_folder={tmp_path / 'first'}"]) == 0

    step = tmp_path / "first" / "checkpoint" / "step-1"
    converted = tmp_path / "converted"
    assert script("dcp_to_hf")("--input_dir", step, "--output_dir", converted, "--no-verify") == 0
    assert load_model(step).tokenizer.encode("old").tolist() == [2]
    evaluating = ["eval", "loss", str(tmp_path / "first" / "config.toml"), str(step), "--sequences", "1"]
    assert main([*evaluating, "--output", str(tmp_path / "loss.json")]) == 0
    assert set(fetched) == {("some/words", OLD)} and len(fetched) == 5
    for folder in (step.with_name("step-1-hf"), converted):
        assert load_tokenizer(str(folder)).encode("old").tolist() == [2]

    capsys.readouterr()
    second = [
        *arguments,
        f"--job.dump_folder={tmp_path / 'second'}",
        f"--checkpoint.initial_load_path={step}",
    ]
    assert train.main(second) == 0
    assert ("some/words", NEW) in fetched
    assert "which gives other ids than model.tokenizer_path = 'some/words'" in capsys.readouterr().err


def test_the_data_check_reads_the_commit_of_the_run_in_its_dump_folder(hub, tmp_path):
    arguments = [f"--job.dump_folder={tmp_path / 'dump'}", "--training.dataset=text", "--checkpoint.enable"]
    arguments += [
        "--training.dataset_path=some/data",
        "--training.seq_len=8",
        "--training.local_batch_size=1",
    ]
    arguments += ["--model.overrides.n_layers=1", "--model.overrides.dim=32", "--training.steps=1"]
    assert train.main(arguments) == 0
    hub.moves_on(["new"] * 40)
    hub.read.clear()
    assert data_command(["check", *arguments]) == 0
    assert hub.read == [OLD] and hub.asked == 1


def test_a_stream_from_the_cache_notes_the_commit_of_the_copy(hub, tmp_path, monkeypatch):
    place = SimpleNamespace(cache_dir=f"/cache/some___data/default/0.0.0/{OLD}")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: place)
    hub.cached = OLD
    config = DatasetKeys(**KEYS, stream=True)
    _, state = state_file(tmp_path, pinned(config, []))
    assert state["fingerprint"]["revision"] == {"repository": "some/data", "commit": OLD}
