"""Training from released weights, and a model that leaves: what the lang-primate script does, with a tiny model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conversion.common import same_bits, script, tensors_in, tiny, weights_of
from tests.launch import launch, rows
from torchtitan_rd.checkpoint import SafeReader
from torchtitan_rd.conversion.pipeline import to_hf

CONFIG = """
[job]
dump_folder = "{dump}"
[model]
name = "llama3"
flavor = "debug"
[model.overrides]
dim = 32
n_layers = 2
n_heads = 4
n_kv_heads = 2
ffn_dim = 48
[lr_scheduler]
warmup_steps = 2
[training]
dataset = "rodent"
dataset_path = "{data}"
seq_len = 32
local_batch_size = 2
global_batch_size = 4
steps = 3
mixed_precision_param = "float32"
[validation]
enable = true
dataset = "rodent"
dataset_path = "{held_out}"
split = "train"
sequences = 4
freq = 3
[checkpoint]
enable = true
interval = 3
[metrics]
log_freq = 1
[comm]
init_timeout_seconds = 60
train_timeout_seconds = 20
heartbeat_seconds = 0
"""


def recordings(folder: Path, seed: int) -> Path:
    """Spike counts of 7 neurons in the Neural Pile's layout."""
    import datasets

    generator = np.random.default_rng(seed)
    rows = [generator.poisson(0.5, (7, 80)).astype(np.uint8) for _ in range(6)]
    features = datasets.Features(
        {
            "spike_counts": datasets.Sequence(datasets.Sequence(datasets.Value("uint8"))),
            "source_dataset": datasets.Value("string"),
        }
    )
    table = {"spike_counts": [row.tolist() for row in rows], "source_dataset": ["made"] * len(rows)}
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"train-{seed}.parquet")
    return folder / f"train-{seed}.parquet"


@pytest.fixture
def run(tmp_path):
    """Arguments of a run on spikes whose output goes to tmp_path / "dump"."""
    path = tmp_path / "run.toml"
    data = recordings(tmp_path, 1), recordings(tmp_path, 2)
    path.write_text(CONFIG.format(dump=tmp_path / "dump", data=data[0], held_out=data[1]))
    return ["--job.config_file", str(path)]


def language_model(folder: Path) -> Path:
    """A Hugging Face Llama with a vocabulary of its own, of the shape of the run."""
    to_hf(weights_of(tiny("llama3", rope_theta=10_000.0)), folder, verify=False)
    return folder


def test_released_weights_train_on_spikes_and_leave_with_the_trainers_own_loss(tmp_path, run, capsys):
    pytest.importorskip("transformers")
    hf, seed = language_model(tmp_path / "language"), tmp_path / "dump" / "checkpoint" / "step-0"
    assert script("llama_to_dcp")("--input_dir", hf, "--output_dir", seed) == 0
    printed = capsys.readouterr().out
    assert re.search(r"verified: max \|delta logit\|", printed) and 'flavor = "debug"' in printed
    assert "model.tok_embeddings.weight" not in SafeReader(seed).tensors()

    done = launch(2, run)
    assert done.codes == [0, 0], done.errors
    assert "initial weights: 19 of 21 tensors" in done.errors[0]
    assert "model.output.weight keeps its initial value" in done.errors[0]

    step, out = tmp_path / "dump" / "checkpoint" / "step-3", tmp_path / "exported"
    assert script("dcp_to_llama")("--input_dir", step, "--output_dir", out) == 0
    assert "verified: max |delta logit|" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["rope_theta"], config["bos_token_id"]) == (256, 10_000.0, 255)
    val_loss = rows(tmp_path / "dump")[-1]["val_loss"]
    assert exported_loss(out, run) == pytest.approx(val_loss, abs=1e-5)


@torch.no_grad()
def exported_loss(folder: Path, run: list[str]) -> float:
    """The loss of the exported model, by the transformers library, on what the trainer calls its held-out set."""
    from transformers import AutoModelForCausalLM

    from torchtitan_rd.config import load
    from torchtitan_rd.job import Environment
    from torchtitan_rd.validation import read_held_out, validation_keys

    config = load(run, Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")).config
    batches = read_held_out(
        validation_keys(config.validation, config.training, 1),
        config.validation.split,
        tokenizer_path="bytes",
        vocab_size=256,
        data_rank=0,
        data_degree=1,
        seed=config.training.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [
        torch.nn.functional.cross_entropy(model(b.inputs).logits.flatten(0, 1), b.labels.flatten()) for b in batches
    ]
    return torch.stack(losses).mean().item()


def test_a_run_starts_from_a_hugging_face_folder_and_leaves_one_behind(tmp_path, run):
    hf = language_model(tmp_path / "language")
    arguments = [*run, f"--checkpoint.initial_load_path={hf}", "--checkpoint.last_save_in_hf"]
    refused = launch(2, arguments)
    assert refused.codes == [1, 1] and "model.output.weight: float32 (61, 32) there" in refused.errors[0]
    arguments += ['--checkpoint.exclude_from_loading=["model.output", "model.tok_embeddings"]']
    done = launch(2, [*arguments, "--model.overrides.rope_theta=5000", "--training.steps=1"])
    assert done.codes == [0, 0], done.errors
    assert "initial weights: 19 of 21 tensors" in done.errors[0]
    assert "rope_theta is 5000.0 in this run, 10000.0 where the weights were made" in done.errors[0]
    exported = tmp_path / "dump" / "checkpoint" / "step-1-hf"
    assert json.loads((exported / "config.json").read_text())["rope_theta"] == 5000.0
    assert tensors_in(exported)["model.embed_tokens.weight"].shape == (256, 32)
    again = launch(2, [*arguments, "--model.overrides.rope_theta=5000", "--training.steps=1"])
    assert again.codes == [0, 0] and "step-1-hf is there already" in again.errors[0]


def test_every_rank_takes_its_part_of_reordered_rows(tmp_path):
    """Rows of wq and wk change places on the way, across the borders of the shards."""
    from tests.ranks import run_on_ranks

    expected = tiny("llama3", vocab_size=64)
    to_hf(weights_of(expected), tmp_path / "hf", verify=False)
    for world_size in (1, 2):
        for found in run_on_ranks(world_size, initial_body, tmp_path / "hf", tmp_path / f"new{world_size}"):
            assert same_bits(found, expected.state_dict())


def initial_body(rank, world_size, folder, dump):
    from tests.small_run import Setup, make
    from torchtitan_rd.checkpoint import CheckpointConfig, Checkpointer
    from torchtitan_rd.conversion.pipeline import open_released
    from torchtitan_rd.conversion.reader import WeightsReader

    _, model, _ = make(Setup(overrides={"n_layers": 2, "n_heads": 4, "n_kv_heads": 2}), world_size)
    checkpoints = Checkpointer(
        CheckpointConfig(initial_load_path=str(folder)),
        dump_folder=dump,
        job_config={},
        must_match=frozenset(),
        model_shape={},
        open_released=lambda path: WeightsReader(open_released(path)),
    )
    tensors = dict(model.state_dict())
    checkpoints.load_initial(tensors)
    checkpoints.close()
    return {name: tensor.full_tensor() for name, tensor in tensors.items()}
