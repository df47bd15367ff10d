"""Lists of tables in a config, `[[training.mixture]]`: from file and command line, and written again."""

import pytest

from tests.test_config_loader import ENVIRONMENT, problems, read
from torchtitan_rd.commands.config import main as config_command
from torchtitan_rd.commands.config import schema_page
from torchtitan_rd.config import load
from torchtitan_rd.config_values import with_field, without_none
from torchtitan_rd.data.config import MixtureSource

TWO = """
[training]
seq_len = 16

[[training.mixture]]
name = "web"
dataset = "pydoc-train"
weight = 0.7

[[training.mixture]]
name = "code"
dataset = "text"
dataset_path = "12"
weight = 1
"""


def weights(loaded):
    return {source.name: source.weight for source in loaded.config.training.mixture}


def test_a_file_gives_the_entries_in_order(tmp_path):
    loaded = read(tmp_path, TWO)
    assert weights(loaded) == {"web": 0.7, "code": 1.0}
    assert loaded.config.training.mixture[1].dataset_path == "12"
    assert loaded.origins["training.mixture"] == f"{tmp_path / 'x.toml'}:5"


@pytest.mark.parametrize("entry", ["1", "code"])
def test_the_command_line_sets_a_field_by_the_number_or_the_name_of_its_entry(tmp_path, entry):
    arguments = [f"--training.mixture.{entry}.weight", "0.5", f"--training.mixture.{entry}.dataset_path=7"]
    loaded = read(tmp_path, TWO, *arguments)
    assert weights(loaded) == {"web": 0.7, "code": 0.5}
    assert loaded.config.training.mixture[1].dataset_path == "7", "a path stays a string"
    assert loaded.origins["training.mixture.code.weight"] == "command line"


def test_the_command_line_can_give_the_whole_list_and_then_a_field(tmp_path):
    whole = '[{name = "a", dataset = "pydoc", weight = 1.0}]'
    loaded = read(tmp_path, TWO, "--training.mixture", whole, "--training.mixture.a.weight=3")
    assert weights(loaded) == {"a": 3.0}


def test_what_is_wrong_in_an_entry_is_named_with_the_entry(tmp_path):
    text = TWO.replace("weight = 0.7", "weight = -0.7").replace("dataset_path", "data_path")
    found = problems(tmp_path, text).split("\n")
    assert [line.partition(": ")[2] for line in found] == [
        "[training] mixture.web.weight = -0.7: Input should be greater than or equal to 0",
        "[training] mixture.code.data_path = '12': is no key of it; did you mean 'dataset_path'?",
    ]
    assert "mixture.1.name" in problems(tmp_path, TWO.replace('name = "code"\n', ""))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--training.mixture.books.weight=1", "there is no entry 'books'; there are: web, code"),
        ("--training.mixture.2.weight=1", "there is no entry '2'; there are: web, code"),
        (
            "--training.mixture.web.wieght=1",
            "unknown key 'wieght' in [[training.mixture]]; did you mean 'weight'?",
        ),
        ("--training.mixture.web.weight=much", "mixture.web.weight = 'much'"),
        ("--training.mixture.web=1", "unknown key 'mixture.web'"),
    ],
)
def test_a_slip_on_the_command_line_is_named(tmp_path, argument, message):
    assert message in problems(tmp_path, TWO, argument)


def test_a_field_of_what_is_no_list_of_tables_is_refused(tmp_path):
    text = "[training]\nmixture = 3\n"
    assert "there is no list of tables" in problems(tmp_path, text, "--training.mixture.web.weight=1")


def test_setting_a_field_leaves_what_was_read_as_it_was():
    read_before = [{"name": "a", "weight": 1.0}]
    changed, name = with_field(read_before, list[MixtureSource], ("a", "weight"), "2")
    assert (changed, name) == ([{"name": "a", "weight": 2.0}], "a")
    assert read_before == [{"name": "a", "weight": 1.0}]


def test_the_written_config_loads_to_the_same_list_and_hides_credentials(tmp_path):
    text = TWO.replace('"12"', '"https://me:secret@host/data?token=x"')
    config = read(tmp_path, text).config
    config.write(tmp_path / "written.toml")
    assert "secret" not in (tmp_path / "written.toml").read_text()
    again = load(["--job.config_file", str(tmp_path / "written.toml")], ENVIRONMENT)
    assert weights(again) == {"web": 0.7, "code": 1.0}
    assert any("had credentials" in warning for warning in again.warnings)


def test_none_is_left_out_at_any_depth():
    assert without_none({"a": None, "b": [{"c": None, "d": 1}], "e": {"f": None}}) == {
        "b": [{"d": 1}],
        "e": {},
    }


def test_the_config_command_and_the_page_of_keys_show_each_field(tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text(TWO.replace('"text"\ndataset_path = "12"', '"pydoc-validation"'))
    assert config_command([str(path), "--training.mixture.code.weight=0.25", "--model.vocab_size=300"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["training.mixture.web.weight", "0.7", f"{path}:5"] in lines
    assert ["training.mixture.code.weight", "0.25", "command", "line"] in lines
    assert config_command([str(path), "--print-key", "training.mixture.web.weight"]) == 0
    assert capsys.readouterr().out == "0.7\n"
    page = schema_page()
    heading, next_one = page.index("## [[training.mixture]]"), page.index("## [parallelism]")
    assert heading < page.index("| `max_epochs`") < next_one
