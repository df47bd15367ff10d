"""Training from released weights, and a model that leaves: what the lang-primate script does,
with a tiny model.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli
import torch

from tests.conversion.common import same_bits, script, tensors_in, tiny, weights_of
from tests.launch import launch, rows
from torchtitan_rd.checkpoint import SafeReader
from torchtitan_rd.conversion.cli import model_section
from torchtitan_rd.conversion.pipeline import to_hf, warn_of_another_tokenizer, with_tokenizer
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.data import load_tokenizer

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
    """The loss of the exported model, by the transformers library,
    on what the trainer calls its held-out set.
    """
    from transformers import AutoModelForCausalLM

    from torchtitan_rd.config import load
    from torchtitan_rd.data import BatchDims
    from torchtitan_rd.job import Environment
    from torchtitan_rd.validation import read_held_out, validation_keys

    config = load(
        run, Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
    ).config
    keys = validation_keys(config.validation, config.training, 1)
    batches = read_held_out(
        keys,
        BatchDims.resolve(keys, data_rank=0, data_degree=1),
        config.validation.split,
        tokenizer=None,
        vocab_size=256,
        seed=config.training.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [
        torch.nn.functional.cross_entropy(model(b.inputs).logits.flatten(0, 1), b.labels.flatten())
        for b in batches
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


TEXT = """
[lr_scheduler]
warmup_steps = 0
[training]
dataset = "pydoc"
seq_len = 32
local_batch_size = 2
global_batch_size = 2
steps = 1
mixed_precision_param = "float32"
[comm]
heartbeat_seconds = 0
"""


@pytest.fixture
def other_tokenizer(tmp_path):
    """A folder with a tokenizer of 259 ids that are not the bytes."""
    folder = tmp_path / "other-tokenizer"
    folder.mkdir()
    described = json.loads(tokenizer_files("bytes").files["tokenizer.json"])
    vocabulary = described["model"]["vocab"]
    described["model"]["vocab"] = {name: (id_ + 1) % 256 for name, id_ in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def test_the_printed_toml_trains_with_the_tokenizer_of_the_weights(tmp_path, other_tokenizer, capsys):
    weights = with_tokenizer(weights_of(tiny("llama3", vocab_size=258)), str(other_tokenizer))
    to_hf(weights, tmp_path / "hf", verify=False)
    arguments = ("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "seed", "--no-verify")
    assert script("hf_to_dcp")(*arguments, "--model", "llama3") == 0
    toml = tmp_path / "run.toml"
    toml.write_text(capsys.readouterr().out.partition("start a run from it:")[2] + TEXT)
    assert tomli.loads(toml.read_text())["model"]["tokenizer_path"] == str(tmp_path / "seed")
    run = [
        "--job.config_file",
        str(toml),
        f"--job.dump_folder={tmp_path / 'dump'}",
        "--checkpoint.interval=1",
    ]
    done = launch(1, run)
    assert done.codes == [0] and "initial weights: 21 of 21 tensors" in done.errors[0], done.errors
    assert "which gives other ids" not in done.errors[0]

    hf = weights_of(tiny("llama3"))
    assert model_section(hf, tmp_path / "seed").startswith("# No tokenizer came with the weights")
    assert "tokenizer_path" not in tomli.loads(model_section(hf, tmp_path / "seed"))["model"]


def test_a_start_from_weights_of_another_tokenizer_is_warned_of_by_content(tmp_path, other_tokenizer, caplog):
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "tokenizer.json").write_bytes(
        json.dumps(json.loads((other_tokenizer / "tokenizer.json").read_text()), indent=3).encode()
    )

    def warned(folder, path):
        caplog.clear()
        warn_of_another_tokenizer(folder, str(path), load_tokenizer(str(path)))
        return caplog.text

    weights = weights_of(tiny("llama3", vocab_size=258))
    to_hf(with_tokenizer(weights, str(other_tokenizer)), tmp_path / "hf", verify=False)
    to_hf(with_tokenizer(weights, "bytes"), tmp_path / "bytes", verify=False)
    to_hf(weights, tmp_path / "none", verify=False)
    assert not warned(tmp_path / "hf", tmp_path / "same") and not warned(tmp_path / "bytes", "bytes")
    assert not warned(tmp_path / "none", "bytes")
    text = warned(tmp_path / "hf", "bytes")
    assert (
        f"made with the tokenizer {tmp_path / 'hf'}, which gives other ids than model.tokenizer_path = 'by"
        in text
    )
    assert f"set model.tokenizer_path = '{tmp_path / 'hf'}'" in text
    # A checkpoint of a run names its tokenizer in its config.
    own = tmp_path / "step-3"
    own.mkdir()
    (own / "config.toml").write_text('[model]\ntokenizer_path = "bytes"\n[training]\ndataset = "pydoc"\n')
    assert not warned(own, "bytes") and "made with the tokenizer bytes" in warned(own, other_tokenizer)
    (own / "config.toml").write_text('[training]\ndataset = "rodent"\n')
    assert not warned(own, other_tokenizer)


def test_a_run_says_so_when_it_starts(tmp_path, other_tokenizer):
    weights = with_tokenizer(weights_of(tiny("llama3", vocab_size=258)), str(other_tokenizer))
    to_hf(weights, tmp_path / "hf", verify=False)
    toml = tmp_path / "run.toml"
    toml.write_text(model_section(replace(weights, files={}), tmp_path / "hf") + TEXT)
    done = launch(1, ["--job.config_file", str(toml), f"--job.dump_folder={tmp_path / 'dump'}"])
    assert (
        done.codes == [0]
        and f"made with the tokenizer {tmp_path / 'hf'}, which gives other" in done.errors[0]
    )
