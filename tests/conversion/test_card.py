"""conversion/card.py: the README of an export is true, complete, and tells nothing of the machine."""

import re
from dataclasses import replace

import pytest
import tomli
import torch
import yaml

from tests.conversion.test_verification import export, random_weights
from tests.models.tiny import tiny_config
from torchtitan_rd import __version__
from torchtitan_rd.conversion.card import model_card
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.models import MODELS, get_flavor
from torchtitan_rd.models.layers import RopeScaling

CONFIG = {
    "job": {"dump_folder": "/home/someone/outputs", "description": "a run"},
    "model": {"name": "llama3", "flavor": "debug", "tokenizer_path": "/data/tokenizer", "vocab_size": None},
    "training": {
        "steps": 1000,
        "seed": 0,
        "dataset": "fineweb",
        "dataset_path": "~/data",
        "files": ["a", "/b/c"],
    },
    "optimizer": {"name": "AdamW", "lr": 4e-4, "groups": {"a": None, "path": "/x"}},
    "lr_scheduler": {},
    "metrics": {"wandb_project": "secret-project"},
}


def card(weights=None, **changes):
    weights = weights or random_weights(tiny_config(rope_scaling=RopeScaling(factor=4.0)))
    return model_card(replace(weights, **changes), dtype="bfloat16", config=CONFIG)


def block(text, language):
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)


def test_the_front_matter_is_yaml_that_the_hub_reads():
    front = yaml.safe_load(card().split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "llama3", "torchtitan_rd"],
    }


def test_the_card_says_what_the_model_is():
    weights = random_weights(tiny_config(tie_word_embeddings=True))
    unique = sum(parameter.numel() for parameter in weights.spec.build(weights.shape).parameters())
    text = card(weights, flavor="nano", step=500, origin="/home/someone/outputs/step-500")
    assert "# llama3 nano" in text
    assert f"{unique:,} parameters, in bfloat16, after step 500" in text
    assert f"Converted from `step-500` by torchtitan_rd {__version__}" in text
    assert (
        "| n_kv_heads | 2 |" in text and "| tie_word_embeddings | True |" in text and "head_dim" not in text
    )
    assert "| rope_scaling | factor 4.0, low_freq_factor 1.0," in card()
    assert "after step" not in card()


def test_the_training_is_told_as_toml_without_paths_and_other_sections():
    told = tomli.loads(block(card(), "toml"))
    assert told == {
        "model": {"name": "llama3", "flavor": "debug"},
        "training": {"steps": 1000, "seed": 0, "dataset": "fineweb"},
        "optimizer": {"name": "AdamW", "lr": 4e-4},
    }
    assert "someone" not in card() and "secret" not in card()
    assert "## Training" not in model_card(random_weights(tiny_config()), dtype="float32", config=None)


@pytest.mark.parametrize(
    "value", ["/a", "~/a", "C:\\a", "\\\\host\\a", "file:///a", "x=/a", "s3://k:s@b/a", "az://b/a?sig=k"]
)
def test_a_value_that_may_be_a_path_or_hold_a_key_is_left_out(value):
    text = model_card(
        random_weights(tiny_config()), dtype="float32", config={"training": {"x": value, "y": 1}}
    )
    assert tomli.loads(block(text, "toml")) == {"training": {"y": 1}}


@pytest.mark.parametrize("value", ["bytes", "owner/name", "s3://bucket/name", "a: b", "1/2"])
def test_other_values_are_told(value):
    text = model_card(random_weights(tiny_config()), dtype="float32", config={"training": {"x": value}})
    assert tomli.loads(block(text, "toml")) == {"training": {"x": value}}


@pytest.mark.parametrize("tokenizer", [False, True])
@pytest.mark.parametrize("family", ["llama3", "raven"])
def test_the_code_on_the_card_runs_in_the_folder(family, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    shape = tiny_config(vocab_size=258) if family == "llama3" else get_flavor(MODELS[family], "debug")
    weights = random_weights(shape, MODELS[family])
    folder = export(weights, tmp_path / "exported")
    files = tokenizer_files("bytes").files if tokenizer else {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    code = block(card(weights, files=files), "python")
    assert ("tokenizer" in code) == tokenizer and ("trust_remote_code" in code) == (family == "raven")
    monkeypatch.chdir(folder)
    found = {}
    exec(code, found)
    assert found["logits"].shape == (1, *found["tokens"].shape[1:], shape.vocab_size)
    assert found["tokens"].dtype == torch.int64
    length = found["tokens"].shape[1]
    assert torch.equal(found["answer"][:, :length], found["tokens"])
    assert length < found["answer"].shape[1] <= length + 20
    assert ("criterion='kl'" in code) == (family == "raven")


def test_the_card_of_a_raven_tells_how_labels_are_taken_and_what_generate_takes():
    text = card(random_weights(get_flavor(MODELS["raven"], "debug"), MODELS["raven"]))
    assert "`labels` are the input ids themselves and are shifted inside" in text and "`shift_labels`" in text
    assert "shift_labels" not in card()
    for name in ("criterion", "cache_lookup_strategy", "draft_steps", "continuous_compute"):
        assert f"`{name}" in text and name not in card()
