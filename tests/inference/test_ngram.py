"""n-gram counts against a plain dictionary of tuples (benchmarks/ngram.py, which also times both)."""

import json

import numpy as np
import pytest

from benchmarks.ngram import plain
from benchmarks.ngram import recording as spikes
from torchtitan_rd.__main__ import main
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.inference import ngram
from torchtitan_rd.inference.ngram import NGram


def found(train, test, n, vocab_size=256, alpha=1.0) -> tuple[float, int]:
    model = NGram(n, vocab_size, alpha)
    model.count(train)
    return tuple(model.score(test))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dense", [True, False], ids=["table", "sorted"])
def test_the_loss_is_that_of_a_plain_reference(n, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(ngram, "_DENSE", 0)
    train = [spikes(30, seed=1), spikes(1, neurons=1), spikes(20, neurons=7, seed=2)]
    test = [spikes(10, seed=3), spikes(5, neurons=3, seed=4), np.array([9, 200, 255], np.uint8)]
    nats, tokens = plain(train, test, n, 256, 0.5)
    assert found(train, test, n, alpha=0.5) == (pytest.approx(nats, rel=1e-12), tokens)


def test_data_that_comes_in_parts_counts_as_a_whole(monkeypatch):
    train, test = [spikes(10, seed=seed) for seed in range(6)], [spikes(10, seed=9)]
    whole = found(train, test, 2)
    monkeypatch.setattr(ngram, "_AT_ONCE", 500)
    assert found(train, test, 2) == (pytest.approx(whole[0], rel=1e-12), whole[1])


def test_ids_of_a_large_vocabulary_are_sorted_not_tabulated():
    generator = np.random.default_rng(0)
    train, test = ([generator.integers(0, 60_000, 3000)] for _ in range(2))
    nats, tokens = plain(train, test, 2, 65_536, 1.0)
    assert found(train, test, 2, vocab_size=65_536) == (pytest.approx(nats, rel=1e-12), tokens)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="n = 8 must be at least 1, and 256"):
        NGram(8, 256)
    with pytest.raises(ConfigError, match="alpha = 0"):
        NGram(1, 256, alpha=0)
    with pytest.raises(DataError, match="no sample to score has 3 tokens"):
        NGram(3, 256).score([np.zeros(2, np.uint8)])


def test_the_command_counts_one_split_and_scores_another(tmp_path, capsys):
    import datasets

    kept = {}
    for split, seed in (("train", 1), ("test", 2)):
        counts = np.random.default_rng(seed).poisson(0.6, (5, 60)).astype(np.uint8)
        features = {"spike_counts": datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))}
        table = datasets.Dataset.from_dict(
            {"spike_counts": [counts.tolist()]}, features=datasets.Features(features)
        )
        table.to_parquet(tmp_path / f"{split}.parquet")
        kept[split] = [np.concatenate((np.full((1, 60), 255), counts)).T.reshape(-1)]
    path = tmp_path / "result.json"
    arguments = ["eval", "ngram", "--n", "2", "--dataset", "rodent", "--path", str(tmp_path)]
    assert main([*arguments, "--output", str(path)]) == 0
    assert "nats_per_token" in capsys.readouterr().out
    nats, tokens = plain(kept["train"], kept["test"], 2, 256, 1.0)
    found = json.loads(path.read_text())
    assert found["tokens"] == tokens == 359 and found["nats_per_token"] == pytest.approx(nats / tokens)
    assert main([*arguments, "--max-tokens", "100", "--output", str(path)]) == 0
    assert json.loads(path.read_text())["tokens"] == 99
    assert main([*arguments, "--test-split", "train"]) == 1
    assert "--test-split: the loss would be that of the data that was counted" in capsys.readouterr().err
    one_file = ["--path", str(tmp_path / "train.parquet")]  # which has no splits
    assert main([*arguments, *one_file]) == 1
    assert "--test-split test: 1 files (train.parquet) would be counted and then" in capsys.readouterr().err
    assert main(["eval", "ngram", "--dataset", "synthetic"]) == 1
    assert "'synthetic', which is made here and has no splits would be counted" in capsys.readouterr().err
    assert main([*arguments, "--tokenizer", "bytes"]) == 1
    assert "--tokenizer has no effect on data that is no text" in capsys.readouterr().err
    assert main([*arguments, "--output", "/nowhere/result.json"]) == 1
    assert "--output /nowhere/result.json: there is no such folder" in capsys.readouterr().err
