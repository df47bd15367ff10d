"""What a data set is, its kind says, and not its name: each kind under a name of the user's own."""

import json

import pytest

from tests.data.helpers import Ranks, equal
from torchtitan_rd import job
from torchtitan_rd.config import load
from torchtitan_rd.data import DATASETS, Dataset, DatasetKeys, dataset_vocab_size, load_tokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.train import Trainer
from torchtitan_rd.train_step import TrainStep

ALONE = job.Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
SHIPPED = {"spikes": "primate", "text": "text", "packed": "packed"}
COLUMNS = {
    "spikes": ("spike_counts", [[[i, 1, 2], [3, i, 5]] for i in range(8)]),
    "text": ("text", [f"document {i} of a few words" for i in range(8)]),
    "packed": ("input_ids", [[10 * i + j for j in range(9)] for i in range(8)]),
}


@pytest.fixture
def folder_of(tmp_path, monkeypatch):
    """kind -> a folder of eight samples. Its data set is called `mine`, and its kind's shipped name stays."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def folder_of(kind: str) -> str:
        column, values = COLUMNS[kind]
        datasets.Dataset.from_dict({column: values}).save_to_disk(str(tmp_path / kind))
        monkeypatch.setitem(DATASETS, "mine", Dataset(kind))
        return str(tmp_path / kind)

    return folder_of


@pytest.mark.parametrize("kind", SHIPPED)
def test_each_kind_reads_the_same_windows_under_another_name(kind, folder_of):
    path, read = folder_of(kind), []
    for name in ("mine", SHIPPED[kind]):
        keys = DatasetKeys(dataset=name, dataset_path=path, seq_len=8, local_batch_size=2)
        with Ranks(keys, vocab_size=258) as run:
            read.append(run.read(4))
    assert equal(*read)


def test_a_second_data_set_of_kind_packed_trains_on_whole_rows(folder_of, tmp_path, monkeypatch):
    trained_on, step = [], TrainStep.__call__

    def recorded(self, number, batches, tokens_seen):
        trained_on.extend(row for batch in batches for row in batch.inputs.tolist())
        return step(self, number, batches, tokens_seen)

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    arguments = {
        "training.dataset": "mine",
        "training.dataset_path": folder_of("packed"),
        "training.seq_len": 8,
        "training.local_batch_size": 2,
        "training.steps": 4,
        "model.vocab_size": 100,
        "model.overrides": json.dumps({"dim": 32, "n_layers": 1}),
        "comm.heartbeat_seconds": 0,
        "job.dump_folder": str(tmp_path / "dump"),
    }
    assert (
        Trainer(load([f"--{key}={value}" for key, value in arguments.items()], ALONE), ALONE).run()
        == "finished"
    )
    _, rows = COLUMNS["packed"]
    assert trained_on == [row[:-1] for row in rows]


def test_the_vocabulary_of_another_name_s_kind_is_that_of_the_kind(folder_of):
    for kind, expected, tokenizer in (("spikes", 256, None), ("text", 258, load_tokenizer("bytes"))):
        assert (
            dataset_vocab_size(DatasetKeys(dataset="mine", dataset_path=folder_of(kind)), tokenizer)
            == expected
        )
    with pytest.raises(ConfigError, match=r"model\.vocab_size must be given for training\.dataset = 'mine'"):
        dataset_vocab_size(DatasetKeys(dataset="mine", dataset_path=folder_of("packed")), None)
