"""Every key of a config is in the table of what a resume may change: row 23 of docs/reliability.md."""

from pathlib import Path

import pytest
import tomli

from torchtitan_rd.checkpoint.contract import check_config
from torchtitan_rd.config import JobConfig
from torchtitan_rd.errors import CheckpointError

TABLE = tomli.loads(Path(__file__).with_name("resume_keys.toml").read_text())
KEYS = [
    f"{section}.{key}"
    for section, info in JobConfig.model_fields.items()
    for key in info.annotation.model_fields
]


def with_another_value(key: str) -> dict[str, dict]:
    """The default config as a checkpoint has it, but for one key."""
    section, _, name = key.partition(".")
    config = JobConfig().as_dict()
    config[section][name] = "another" if config[section][name] != "another" else "yet another"
    return config


def test_each_key_stands_in_the_table_once():
    """A new key needs a decision: whoever adds one writes it there."""
    assert sorted(TABLE["refused"] + TABLE["taken"]) == sorted(KEYS)


@pytest.mark.parametrize("kind", ["refused", "taken"])
def test_each_key_of_the_table_is_treated_so_when_it_changes(kind):
    now, must_match = JobConfig().as_dict(), JobConfig.must_match_keys()
    for key in TABLE[kind]:
        if kind == "refused":
            with pytest.raises(CheckpointError, match=f"{key}: 'another' there"):
                check_config(with_another_value(key), now, must_match, "step-1")
        else:
            (line,) = check_config(with_another_value(key), now, must_match, "step-1")
            assert line.startswith(f"{key}: 'another' there")
