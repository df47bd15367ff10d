"""Data on the hub is read at one commit: asked by rank 0 alone, kept by the checkpoint, read again on resume."""

import json
import logging
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from tests.data.helpers import build, merge_states
from tests.ranks import run_on_ranks
from torchtitan_rd import job, train
from torchtitan_rd.data import DatasetKeys, get_dataset, pinned
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger

OLD, NEW = "a" * 40, "b" * 40
KEYS = {"dataset": "text", "dataset_path": "some/data", "seq_len": 8, "local_batch_size": 2}


class FakeHub:
    """A hub whose repository has commits, each with texts; `cached` is what is left where it cannot be reached."""

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
        """As the datasets library does it: without the hub, the newest copy in the cache, whatever is asked for."""
        commit = self.cached or revision or self.newest
        self.read.append(commit)
        place = self._folder / commit
        if not place.exists():
            datasets.Dataset.from_dict({"text": self.commits[commit]}).save_to_disk(str(place))
        table = datasets.load_from_disk(str(place))
        return table.to_iterable_dataset() if streaming else table

    def moves_on(self, texts):
        self.commits[NEW], self.newest = texts, NEW


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


def test_without_the_hub_the_cached_copy_is_read_and_its_commit_noted_but_never_in_place_of_another(hub, tmp_path):
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
        with pytest.raises(ConfigError, match=r"not read from the hub here: unset training\.dataset_revision"):
            get_dataset(DatasetKeys(**keys, dataset_revision="main"))


def test_a_run_that_resumes_goes_on_with_its_commit_after_the_hub_has_moved_on(hub, tmp_path):
    def run(steps):
        arguments = [f"--job.dump_folder={tmp_path / 'dump'}", "--training.dataset=text", "--checkpoint.enable"]
        arguments += ["--training.dataset_path=some/data", "--training.seq_len=8", "--training.local_batch_size=1"]
        arguments += ["--model.overrides.n_layers=1", "--model.overrides.dim=32", f"--training.steps={steps}"]
        assert train.main(arguments) == 0
        return json.loads((tmp_path / "dump" / "data.json").read_text())["commit"]

    assert run(1) == OLD
    hub.moves_on(["new"] * 40)
    assert run(2) == OLD and hub.asked == 1


def test_rank_0_alone_asks_which_commit_and_all_read_it(tmp_path):
    assert run_on_ranks(2, _pin) == [(1, OLD), (0, OLD)]


def _pin(rank, world_size):
    with pytest.MonkeyPatch.context() as patch:
        hub = FakeHub(patch, None)
        keys = job.gather(pinned(DatasetKeys(**KEYS), []) if rank == 0 else None)[0]
        return hub.asked, keys.dataset_revision
