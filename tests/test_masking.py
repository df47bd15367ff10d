"""Credentials that a config or the environment holds appear in nothing that a run writes, logs or exports."""

import json
import os
import sys
from pathlib import Path

import pytest
import tomli

from tests.fork_server import run_python
from tests.test_metrics_outputs import FakeWandb
from torchtitan_rd import train
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.config_loader import section_type
from torchtitan_rd.job import Environment
from torchtitan_rd.masking import is_masked, mask_text, mask_values

ROOT = Path(__file__).parent.parent
ENVIRONMENT = Environment(0, 0, 1, 1, "INFO")
CANARY = "c4n4ry"
ADDRESS = f"https://me:{CANARY}-password@host.org/a/b?token={CANARY}-token&x=1"
SMALL = [
    *("--training.seq_len=16", "--training.local_batch_size=1", "--training.mixed_precision_param=float32"),
    *(
        "--model.overrides.dim=32",
        "--model.overrides.n_layers=1",
        "--training.steps=2",
        "--checkpoint.enable",
    ),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@host/a", "https://***@host/a"),
        ("see s3://key@bucket/a, hf://user:p@ss@h/b.", "see s3://***@bucket/a, hf://***@h/b."),
        (
            "https://host/a.parquet?X-Amz-Signature=1&b=2 was not found",
            "https://host/a.parquet?*** was not found",
        ),
        ("'https://host/a#access_token=1'", "'https://host/a#***'"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("a?b=c, me@host, /a/b?c", "a?b=c, me@host, /a/b?c"),
    ],
)
def test_the_login_and_the_query_of_an_address_are_hidden_and_nothing_else(text, expected):
    assert mask_text(text) == expected
    assert mask_text(expected) == expected


def test_texts_under_names_of_credentials_are_hidden_at_any_depth():
    found = mask_values(
        {
            "hf_token": "a",
            "api-key": "b",
            "data": {"PASSWORD": ["c", "d"], "client.secret": "e", "key": ""},
            "token": 3,
            "AWS_ACCESS_KEY_ID": "f",
        }
    )
    assert found == {
        "hf_token": "***",
        "api-key": "***",
        "data": {"PASSWORD": ["***", "***"], "client.secret": "***", "key": ""},
        "token": 3,
        "AWS_ACCESS_KEY_ID": "***",
    }


def test_names_that_merely_contain_such_a_word_are_not_hidden():
    plain = {"num_tokens": "5", "tokenizer_path": "bytes", "monkey": "x", "keyboard": "y", "tokens": "z"}
    assert mask_values(plain) == plain


def test_no_key_of_a_config_is_taken_for_a_credential():
    """Whatever its value: a run's config.toml loads to the run's own config (the path of
    training.token_weights was hidden in it).
    """
    given = {
        section: dict.fromkeys(section_type(info).model_fields, "/a/path")
        for section, info in JobConfig.model_fields.items()
    }
    assert "token_weights" in given["training"]
    assert mask_values(given) == given


def files_with(folder: Path, canary: str) -> list[str]:
    return [
        str(path) for path in folder.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()
    ]


def run(dump: Path, *arguments: str):
    """A run in a process of its own, with canaries in the environment that its libraries read."""
    environment = {
        name: f"{CANARY}-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    }
    command = ("-m", "torchtitan_rd.train", f"--job.dump_folder={dump}", *SMALL, *arguments)
    return run_python(*command, env={**os.environ, **environment})


def test_no_file_and_no_line_of_a_run_or_of_its_export_holds_a_credential(tmp_path):
    dump = tmp_path / "dump"
    keys = [
        f"--job.description=data of {ADDRESS}",
        "--metrics.enable_tensorboard",
        "--checkpoint.last_save_in_hf",
    ]
    keys += [f"--metrics.wandb_project={ADDRESS}"]
    finished = run(dump, *keys)
    assert finished.returncode == 0, finished.stderr
    assert "data of https://***@host.org/a/b?***" in finished.stderr
    assert CANARY not in finished.stderr + finished.stdout
    written = {path.name for path in dump.rglob("*") if path.is_file()}
    assert {"config.toml", "state.json", "metrics.jsonl", "exit_status.json", "README.md"} <= written
    assert any(name.startswith("events.out") for name in written)
    assert files_with(dump, CANARY) == []
    # the same command goes on, and another credential is no other setting
    again = run(
        dump,
        f"--job.description=data of {ADDRESS.replace('password', 'rotated')}",
        *keys[1:],
        "--training.steps=3",
    )
    assert again.returncode == 0 and "resuming after step 2" in again.stderr
    assert "setting changed since the checkpoint: job.description" not in again.stderr
    assert files_with(dump, CANARY) == []


def test_the_config_that_goes_to_wandb_holds_no_credential(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    keys = [f"--job.dump_folder={tmp_path}", f"--job.description={ADDRESS}", "--metrics.enable_wandb"]
    assert train.main([*SMALL, *keys]) == 0
    (call,) = wandb.calls
    assert call["config"]["job"]["description"] == "https://***@host.org/a/b?***"
    assert CANARY not in str(call)


def test_the_message_of_a_failure_hides_credentials_too(tmp_path, capfd):
    arguments = [f"--job.dump_folder={tmp_path}", *SMALL, "--checkpoint.async_mode=disabled"]
    assert train.main([*arguments, f"--checkpoint.initial_load_path={ADDRESS}"]) == 1
    error = capfd.readouterr().err
    assert "https://***@host.org/a/b?***" in error and CANARY not in error
    assert "***" in json.loads((tmp_path / "exit_status.json").read_text())["reason"]
    assert files_with(tmp_path, CANARY) == []
    assert train.main([*arguments, f"--training.steps={ADDRESS}"]) == 1
    assert CANARY not in capfd.readouterr().err


def test_a_config_that_was_written_loads_and_says_what_was_hidden(tmp_path):
    given = load([f"--training.dataset_path={ADDRESS}", "--training.steps=7"], ENVIRONMENT).config
    path = tmp_path / "config.toml"
    given.write(path)
    assert tomli.loads(path.read_text())["training"]["dataset_path"] == "https://***@host.org/a/b?***"
    loaded = load(["--job.config_file", str(path)], ENVIRONMENT)
    assert loaded.config.training.steps == 7
    (warning,) = loaded.warnings
    assert (
        "training.dataset_path had credentials, which were hidden (***)" in warning and str(path) in warning
    )
    told = load(["--job.config_file", str(path), f"--training.dataset_path={ADDRESS}"], ENVIRONMENT)
    assert told.config.training.dataset_path == ADDRESS and told.warnings == []


@pytest.mark.parametrize(
    ("value", "masked"), [("***", True), ("a*b***", False), ("https://***@h", True), (3, False)]
)
def test_what_was_hidden_is_known_again(value, masked):
    assert is_masked(value) is masked
