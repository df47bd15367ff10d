"""The commands of docs/preparation.md do what the page says, as they are printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchtitan_rd.commands.data import ACTIONS, main
from torchtitan_rd.preparation.download import SourceKeys
from torchtitan_rd.preparation.tokenizer_training import LAYOUTS, REGEXES

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "preparation.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_page_lead_from_text_to_a_falling_loss(tmp_path):
    (commands,) = blocks("bash")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "demo" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    # A model that knows nothing has ln 4096 = 8.3; the page says what becomes of it.
    assert 8.0 < losses[1] < 9.5 and losses[50] < 6.2
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 8.0
    assert "eos_token  <|end_text|> 4065" in done.stdout and "--training.eos_id=4065" in commands


def test_the_page_names_every_action_that_prepares_and_every_choice():
    for name in ("train-tokenizer", "download", "tokenize", "shuffle"):
        assert name in ACTIONS and f"torchtitan-rd data {name}" in PAGE
    missing = [name for name in (*REGEXES, *LAYOUTS, *SourceKeys.model_fields) if f"{name}" not in PAGE]
    assert not missing


def test_the_sources_file_of_the_page_is_one():
    (text,) = blocks("yaml")
    for keys in yaml.safe_load(text)["sources"].values():
        SourceKeys.model_validate(keys)


@pytest.mark.parametrize("action", [name for name in ACTIONS if name != "check"])
def test_every_action_explains_itself_with_an_example(action, capsys):
    with pytest.raises(SystemExit) as ended:
        main([action, "--help"])
    assert ended.value.code == 0
    assert f"torchtitan-rd data {action} " in capsys.readouterr().out.split("docs/")[0]
