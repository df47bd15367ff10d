"""What is evaluated is what training validated: the same set, the same losses, on any number of ranks."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.runs import last_losses, train
from tests.ranks import run_on_ranks
from torchtitan_rd.__main__ import main
from torchtitan_rd.commands import eval_loss
from torchtitan_rd.data import Batch, DatasetKeys
from torchtitan_rd.data.tokenizer import ByteTokenizer
from torchtitan_rd.inference.evaluation import HeldOut, Units, count_units, open_held_out
from torchtitan_rd.job import Environment

ROOT = Path(__file__).parent.parent.parent
ALONE = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raven")
    return train(folder, ranks=2)


def measured(rank, world_size, kind, arguments):
    chosen, overrides = eval_loss._parser(kind).parse_known_args(arguments)
    return eval_loss.measure(kind, chosen, overrides, Environment.read())


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loss_is_the_trainers_own_validation_loss(run, world_size):
    expected = last_losses(run.parent)
    for found in run_on_ranks(world_size, measured, "loss", [str(run), str(run.parent / "dump")]):
        losses = {name: row["nats_per_token"] for name, row in found["losses"].items()}
        assert losses == pytest.approx(expected, abs=1e-6) and losses.keys() == expected.keys()
        assert (found["tokens"], found["sequences"]) == (8 * 32, 8)
        assert found["losses"]["val_loss"]["bits_per_token"] == pytest.approx(
            losses["val_loss"] / math.log(2)
        )


def test_the_loss_of_an_earlier_step_is_another(run):
    step = run.parent / "dump" / "checkpoint" / "step-3"
    (found,) = run_on_ranks(1, measured, "loss", [str(run), str(step)])
    losses = {name: row["nats_per_token"] for name, row in found["losses"].items()}
    last = last_losses(run.parent)
    assert found["weights"] == str(step)
    assert all(abs(losses[name] - last[name]) > 1e-4 for name in last)


def test_every_depth_is_measured_in_one_pass_and_is_what_it_is_alone(run):
    arguments = [str(run), str(run.parent / "dump")]
    (many,) = run_on_ranks(1, measured, "depth", arguments)
    assert list(many["losses"])[1:] == [f"val_loss_{depth}" for depth in range(1, 65)]
    for depth in (2, 64):
        (alone,) = run_on_ranks(1, measured, "depth", [*arguments, "--depths", str(depth)])
        assert alone["losses"][f"val_loss_{depth}"] == many["losses"][f"val_loss_{depth}"]
    expected = last_losses(run.parent)
    assert many["losses"]["val_loss_3"]["nats_per_token"] == pytest.approx(expected["val_loss_3"], abs=1e-6)


def test_the_command_writes_json_with_the_bytes_of_the_text(run, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["eval", "loss", str(run), str(run.parent / "dump"), "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert "nats_per_byte" in printed and "256 tokens of pydoc-validation" in printed
    assert found["tokens"] == found["bytes"] == 256, (
        "of the byte tokenizer, and no text ends in these windows"
    )
    row = found["losses"]["val_loss"]
    assert row["nats_per_byte"] * found["bytes"] == pytest.approx(row["nats_per_token"] * found["tokens"])
    assert row["perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))


def test_the_bytes_of_a_text_are_those_of_its_labels_alone():
    """256 and 257 are the borders of documents, 195 164 one letter, and the first input is no label."""
    labels = torch.tensor([[195, 164, 98, 257, 256, 99], [98, 98, -100, -100, -100, -100]])
    inputs = torch.tensor([[97, 195, 164, 98, 257, 256], [256, 98, 98, 257, 257, 257]])
    keys = DatasetKeys(dataset="pydoc", seq_len=6)
    held_out = HeldOut(keys, "validation", 258, [Batch(inputs, labels)], ByteTokenizer(), None)
    assert run_on_ranks(1, units_of, held_out) == [Units(tokens=8, bytes=6, bins=None)]
    two = run_on_ranks(2, units_of, held_out)
    assert two == [Units(tokens=16, bytes=12, bins=None)] * 2


def units_of(rank, world_size, held_out):
    return count_units(held_out)


def spikes(folder, split="test", seed=0):
    import datasets

    generator = np.random.default_rng(seed)
    rows = [generator.poisson(rate, (7, 80)).astype(np.uint8).tolist() for rate in (0.1, 0.1, 5.0, 5.0)]
    table = {"spike_counts": rows, "source_dataset": ["quiet", "quiet", "loud", "loud"]}
    features = datasets.Features(
        {
            "spike_counts": datasets.Sequence(datasets.Sequence(datasets.Value("uint8"))),
            "source_dataset": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}.parquet")
    return folder / f"{split}.parquet"


@pytest.fixture(scope="module")
def spike_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spikes")
    data, trained = spikes(folder), spikes(folder, "train", seed=1)
    replaced = {
        'dataset = "pydoc-train"': f'dataset = "rodent"\ndataset_path = "{trained}"',
        'dataset = "pydoc-validation"': f'dataset = "rodent"\ndataset_path = "{data}"\nsplit = "test"',
    }
    return train(folder, "llama3", "debug", **replaced)


def test_spikes_have_a_loss_per_time_bin_and_can_be_narrowed_to_a_source(spike_run):
    arguments = [str(spike_run), str(spike_run.parent / "dump"), "--sequences", "4"]
    (all_of_them,) = run_on_ranks(1, measured, "loss", arguments)
    (loud,) = run_on_ranks(1, measured, "loss", [*arguments, "--source-dataset", "loud"])
    (quiet,) = run_on_ranks(1, measured, "loss", [*arguments, "--source-dataset", "quiet"])
    # 4 windows of 32 labels, a separator every 8 tokens.
    assert all_of_them["bins"] == 16 and "bytes" not in all_of_them
    row = all_of_them["losses"]["val_loss"]
    assert row["nats_per_bin"] == pytest.approx(8 * row["nats_per_token"])
    losses = {found["losses"]["val_loss"]["nats_per_token"] for found in (quiet, all_of_them, loud)}
    assert len(losses) == 3
    assert loud["source_dataset"] == "loud" and all_of_them["source_dataset"] is None


@pytest.mark.parametrize(("source", "low", "high"), [("quiet", 0.0, 0.5), ("loud", 4.0, 6.0)])
def test_the_held_out_set_of_a_source_has_no_other_rows(spike_run, source, low, high):
    path = str(spike_run.parent / "test.parquet")
    keys = DatasetKeys(
        dataset="rodent",
        dataset_path=path,
        source_dataset=source,
        seq_len=32,
        local_batch_size=2,
        global_batch_size=20,
    )
    held_out = open_held_out(keys, "test", ALONE, tokenizer_path="bytes")
    ids = torch.cat([batch.labels for batch in held_out.batches])
    assert low < ids[ids != 255].float().mean() < high


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--source-dataset", "lout"], "no row is of training.source_dataset = 'lout'; did you mean 'loud'?"),
        (["--depths", "4"], "depth = 4: a llama3 has no recurrence; leave it out"),
        (["--sequences", "3"], "validation.sequences = 3 is not a multiple of training.local_batch_size = 2"),
        (["--training.seq_len", "200000"], "seq_len = 200000 is more than the model's context of 8192"),
        (["--model.name", "raven"], "holds a llama3; use --model llama3"),
        (["--depths", "0-3"], "--depths 0-3: 0-3: depths must be at least 1"),
        (["--depths", "5-3,7"], "--depths 5-3,7: 5-3: depths must be at least 1, and ranges ascend"),
        (["--split", "dev", "--validation.dataset_path", "{folder}"], "named after the split 'dev'"),
        (["--depths", "1-100000000000"], "--depths 1-100000000000: 1024 at most"),
        (["--split", "train", "--validation.dataset", "synthetic"], "--split train has no effect: synthetic"),
        (["--output", "{folder}"], "is a folder: name a file in it"),
        (["--output", "/nowhere/result.json"], "--output /nowhere/result.json: there is no such folder"),
    ],
)
def test_bad_input_is_one_line(spike_run, capsys, extra, message):
    extra = [part.format(folder=spike_run.parent) for part in extra]
    assert main(["eval", "loss", str(spike_run), str(spike_run.parent / "dump"), *extra]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_depths_of_a_llama_are_named_before_data_is_read(spike_run, capsys, monkeypatch):
    monkeypatch.setattr(eval_loss, "open_validation", lambda *args, **keys: pytest.fail("data was read"))
    assert main(["eval", "depth", str(spike_run), str(spike_run.parent / "dump")]) == 1
    assert "depth = 1: a llama3 has no recurrence; leave it out" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_one_line(spike_run, capsys):
    assert main(["eval", "loss", str(spike_run), "/nowhere"]) == 1
    assert "CheckpointError: /nowhere does not exist" in capsys.readouterr().err
    assert main(["eval", "losses"]) == 2


@pytest.mark.parametrize("name", ["primate", "rodent"])
def test_the_scripts_evaluate_on_the_test_split_of_a_config_that_exists(name, tmp_path):
    """Run with a stand-in for torchrun, which writes down what it was asked."""
    script = ROOT / f"evaluate_{name}_8B_131k.sh"
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CHECKPOINT": "some/step-1"}
    done = subprocess.run(
        ["bash", script, "--sequences", "8"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    given = done.stdout.split()
    arguments = given[given.index("torchtitan_rd") + 1 :]
    chosen, _ = eval_loss._parser("loss").parse_known_args(arguments[2:])
    assert arguments[:2] == ["eval", "loss"] and (ROOT / chosen.config).is_file()
    assert (chosen.checkpoint, chosen.split, chosen.sequences) == ("some/step-1", "test", 8)
