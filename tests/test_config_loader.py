"""TOML, command line and environment -> one validated config;
every mistake is named with its place and remedy.
"""

import pytest
import tomli

from torchtitan_rd.commands.config import schema_page
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.config_loader import load_config
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.old_keys import OLD_KEYS

ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="INFO")


def write(tmp_path, text, name="x.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def read(tmp_path, text, *overrides):
    text = text or '[job]\ndescription = ""\n'  # an empty file is an error of its own
    return load(["--job.config_file", str(write(tmp_path, text)), *overrides], ENVIRONMENT)


def problems(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    return str(caught.value)


def test_the_command_line_overrides_the_environment_which_overrides_the_file(tmp_path):
    path = write(tmp_path, "[training]\nsteps = 5\nseq_len = 64\nstream = false\n")
    environment = Environment(0, 0, 1, 1, "INFO", {"training.stream": True})
    loaded = load(["--job.config_file", str(path), "--training.steps=7"], environment)
    assert (loaded.config.training.steps, loaded.config.training.seq_len) == (7, 64)
    assert loaded.config.training.stream is True
    assert loaded.origins["training.steps"] == "command line"
    assert loaded.origins["training.stream"] == "environment"
    assert loaded.origins["training.seq_len"] == f"{path}:3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--compile.enable"], True),
        (["--compile.enable=true"], True),
        (["--compile.enable", "true"], True),
        (["--no-compile.enable"], False),
        (["--compile.enable=false"], False),
        (["--compile.enable", "--no-compile.enable"], False),
    ],
)
def test_a_boolean_can_be_switched_both_ways_on_the_command_line(tmp_path, arguments, expected):
    assert read(tmp_path, "[compile]\nenable = true\n", *arguments).config.compile.enable is expected


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", "1", 1.0),
        ("training.dataset_path", "12", "12"),
        ("training.shuffle_seed", "none", None),
        ("parallelism.data_parallel_shard_degree", "-1", -1),
        ("activation_checkpoint.selective_ac_option", "3", "3"),
        ("checkpoint.exclude_from_loading", "data,rng", ["data", "rng"]),
        ("checkpoint.exclude_from_loading", '["data", "rng"]', ["data", "rng"]),
        ("checkpoint.exclude_from_loading", "data", ["data"]),
    ],
)
def test_a_command_line_string_becomes_the_type_that_its_key_declares(tmp_path, key, text, expected):
    section, name = key.split(".")
    assert getattr(getattr(read(tmp_path, "", f"--{key}", text).config, section), name) == expected


def test_entries_of_model_overrides_come_from_file_and_command_line_together(tmp_path):
    loaded = read(tmp_path, "[model.overrides]\ndim = 64\nn_layers = 2\n", "--model.overrides.n_layers", "3")
    assert loaded.config.model.overrides == {"dim": 64, "n_layers": 3}


def test_every_problem_is_reported_at_once_with_its_line_and_the_nearest_name(tmp_path):
    text = '[training]\nstepz = 5\nseq_len = "long"\n\n'
    text += '[optimiser]\nlr = 1.0\n\n[optimizer]\nlr = -1.0\nname = "adam"\n'
    message = problems(tmp_path, text, "--training.local_batch_size", "many")
    lines = message.splitlines()
    assert len(lines) == 6
    assert "x.toml:2: unknown key 'stepz' in section [training]; did you mean 'steps'?" in message
    assert "x.toml:3: [training] seq_len = 'long'" in message
    assert "x.toml:6: unknown section [optimiser]; did you mean 'optimizer'?" in message
    assert "x.toml:9: [optimizer] lr = -1.0" in message and "greater than 0" in message
    assert "x.toml:10: [optimizer] name = 'adam'" in message and "'AdamW', 'Adam'" in message
    assert "command line: [training] local_batch_size = 'many'" in message


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(tmp_path):
    assert "did you mean optimizer.lr?" in problems(tmp_path, "[training]\nlr = 1.0\n")


@pytest.mark.parametrize("text", ["steps = 5.0", 'steps = "5"', "steps = true", "seed = -1", "max_norm = 0"])
def test_types_in_a_file_are_strict(tmp_path, text):
    assert "[training]" in problems(tmp_path, f"[training]\n{text}\n")


@pytest.mark.parametrize("arguments", [["steps=5"], ["--steps"], ["--no-compile.enable=1"], ["-x"]])
def test_an_argument_that_is_no_override_is_refused(tmp_path, arguments):
    assert "command line" in problems(tmp_path, "", *arguments)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load(["--job.config_file", "nowhere.toml"], ENVIRONMENT)
    assert "x.toml: not a valid config file" in problems(tmp_path, "[training\n")
    assert "stands outside a [section]" in problems(tmp_path, "steps = 5\n")


def test_a_cool_down_after_a_decay_warns_of_its_jump(tmp_path):
    text = '[lr_scheduler]\nschedule = "cosine"\nwarmup_steps = 0\ncooldown_steps = 2\n'
    assert any("jumps up" in warning for warning in read(tmp_path, text).warnings)
    assert read(tmp_path, text.replace("cosine", "trapezoid")).warnings == []


def test_a_config_is_frozen(tmp_path):
    config = read(tmp_path, "", "--training.steps", "5").config
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 6


def test_a_section_s_own_keys_come_first_wherever_keys_are_shown(tmp_path):
    """In training.* those of train_step.py, then the data's;
    in each room in the order in which they stand there.
    """
    config = read(tmp_path, "").config
    config.write(tmp_path / "written.toml")
    written = tomli.loads((tmp_path / "written.toml").read_text())
    for shown in (config.as_dict(), written):
        keys = list(shown["training"])
        assert keys[:2] == ["steps", "max_norm"] and keys.index("gc_freq") < keys.index("dataset")
        assert keys.index("seq_len") < keys.index("local_batch_size") < keys.index("mixed_precision_param")
        assert list(shown["optimizer"])[:2] == ["name", "lr"]
    assert {s: set(k) for s, k in config.as_dict().items()} == {
        s: set(k) for s, k in config.model_dump().items()
    }
    page = schema_page()
    assert (
        page.index("| `name`*") < page.index("| `lr`") < page.index("| `muon_") < page.index("## [training]")
    )
    assert page.index("## [training]") < page.index("| `steps`") < page.index("| `dataset`*")


def test_the_written_config_loads_to_the_same_config(tmp_path):
    config = read(tmp_path, "[model.overrides]\ndim = 64\n", "--training.dataset_path", 'a "b"').config
    config.write(tmp_path / "resolved.toml")
    again = load(["--job.config_file", str(tmp_path / "resolved.toml")], ENVIRONMENT).config
    assert again.as_dict() == {
        **config.as_dict(),
        "job": {**config.as_dict()["job"], "config_file": str(tmp_path / "resolved.toml")},
    }
    assert tomli.loads((tmp_path / "resolved.toml").read_text())["model"]["overrides"] == {"dim": 64}


def test_every_old_key_leads_to_a_key_that_exists():
    fields = {f"{s}.{k}" for s, info in JobConfig.model_fields.items() for k in info.annotation.model_fields}
    for old, renamed in OLD_KEYS.items():
        assert old not in fields, f"{old} is both old and present"
        if renamed.new is not None:
            section, key, *_ = renamed.new.split(".")
            assert f"{section}.{key}" in fields, f"{old} leads to {renamed.new}"


def test_an_old_key_is_translated_with_a_warning_that_names_the_new_one(tmp_path):
    text = """
        [training]
        batch_size = 3
        warmup_steps = 9
        [checkpoint]
        enable_checkpoint = true
        [optimizer]
        fused = false
        [model]
        norm_type = "layernorm"
    """
    loaded = read(tmp_path, text)
    assert loaded.config.training.local_batch_size == 3
    assert loaded.config.lr_scheduler.warmup_steps == 9
    assert loaded.config.checkpoint.enable is True
    assert loaded.config.optimizer.implementation == "foreach"
    assert loaded.config.model.overrides == {"norm_type": "layernorm"}
    assert any("training.batch_size is now training.local_batch_size" in w for w in loaded.warnings)
    assert len(loaded.warnings) == 5


def test_old_keys_work_on_the_command_line_too(tmp_path):
    config = read(
        tmp_path, "", "--training.batch_size", "2", "--optimizer.fused=false", "--training.compile"
    ).config
    assert config.training.local_batch_size == 2
    assert config.optimizer.implementation == "foreach"
    assert config.compile.enable is True


def test_a_feature_that_is_gone_is_accepted_only_switched_off(tmp_path):
    loaded = read(
        tmp_path, "[experimental]\npipeline_parallel_degree = 1\n[float8]\nenable_float8_linear = false\n"
    )
    assert len(loaded.warnings) == 2
    assert "experimental.pipeline_parallel_degree = 8 is no longer supported" in problems(
        tmp_path, "[experimental]\npipeline_parallel_degree = 8\n"
    )


def test_sections_know_nothing_of_the_loader():
    """The loader takes any schema: it names no section of ours."""
    loaded = load_config(JobConfig, ["--training.steps", "3"])
    assert loaded.config.training.steps == 3


# What was a traceback, or was accepted, and what is said of it today. The file, then the arguments after it.
REFUSED = {
    "no value for the config file": (
        None,
        ["--job.config_file"],
        "--job.config_file needs the name of a file",
    ),
    "an empty name of the config file": (
        None,
        ["--job.config_file="],
        "--job.config_file needs the name of a file",
    ),
    "a value that gets entries": (
        "",
        ["--model.overrides=3", "--model.overrides.dim=4"],
        "command line: model.overrides.dim: model.overrides has a value already and cannot hold entries",
    ),
    "an entry that gets entries": (
        "",
        ["--model.overrides.dim", "--model.overrides.dim.x=3"],
        "model.overrides.dim.x: model.overrides.dim has a value already",
    ),
    "a seed beyond 64 bits": ("", [f"--training.seed={2**64}"], "[training] seed"),
    "a shuffle seed beyond 64 bits": ("", [f"--training.shuffle_seed={2**64}"], "[training] shuffle_seed"),
    "an empty file": ("\n# nothing\n", [], "x.toml: is empty"),
    "sections without keys": ("[job]\n[model]\n", [], "x.toml: has sections and no key in them"),
    "a statement cut off": ("[training]\nsteps =", [], "x.toml: not a valid config file"),
    "a table cut off": ("[training", [], "x.toml: not a valid config file"),
    "an old key of another type": (
        '[optimizer]\nfused = "no"\n',
        [],
        "x.toml:2: optimizer.fused = 'no': must be of type bool",
    ),
    "another old key of another type": ("[metrics]\nenable_color_printing = 1\n", [], "must be of type bool"),
    "a removed degree that is true": (
        "[experimental]\npipeline_parallel_degree = true\n",
        [],
        "no longer supported",
    ),
    "a folder of an unset variable": (
        "",
        ["--job.dump_folder="],
        "is not a path; is a variable of the script unset?",
    ),
    "a zero byte in a path": ("", ["--checkpoint.initial_load_path=a\0b"], "is not a path"),
    "another user's home that is not there": (
        "",
        ["--job.dump_folder=~nosuchuser/x"],
        "there is no such user",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_that_was_a_traceback_or_accepted_is_one_clear_error(tmp_path, name):
    text, arguments, expected = REFUSED[name]
    given = (
        []
        if text is None
        else ["--job.config_file", str(write(tmp_path, text or "[job]\ndescription = 'x'\n"))]
    )
    with pytest.raises(ConfigError) as caught:
        load([*given, *arguments], ENVIRONMENT)
    assert expected in str(caught.value)


def float_keys():
    for section, info in JobConfig.model_fields.items():
        for key, field in info.annotation.model_fields.items():
            if "float" in str(field.annotation) and "Literal" not in str(field.annotation):
                yield f"{section}.{key}"


@pytest.mark.parametrize("number", ["inf", "nan", "-inf"])
def test_no_key_takes_a_number_that_is_not_finite(tmp_path, number):
    keys = sorted(float_keys())
    assert {"optimizer.lr", "training.max_norm"} <= set(keys)
    for key in keys:
        section, name = key.split(".")
        for found in (
            problems(tmp_path, f"[{section}]\n{name} = {number}\n"),
            problems(tmp_path, "", f"--{key}={number}"),
        ):
            assert f"[{section}] {name}" in found, key


@pytest.mark.parametrize("folder", ["../x", "/x", "a/../../x", "", ".", "~/x", "a\\nb"])
def test_every_folder_key_stays_inside_the_dump_folder(tmp_path, folder):
    keys = [
        f"{section}.{key}"
        for section, info in JobConfig.model_fields.items()
        for key in info.annotation.model_fields
        if key.endswith("folder") and key not in ("dump_folder", "cache_folder")  # which say where
    ]
    assert len(keys) == 5
    for key in keys:
        section, name = key.split(".")
        assert "inside job.dump_folder" in problems(tmp_path, f'[{section}]\n{name} = "{folder}"\n'), key
        assert read(tmp_path, f'[{section}]\n{name} = "runs/a"\n')


def test_a_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = [
        f"{section}.{key}"
        for section, info in JobConfig.model_fields.items()
        for key in info.annotation.model_fields
        if key.endswith("_path") or key in ("dump_folder", "config_file")
    ]
    assert len(keys) == 6
    write(tmp_path, "[training]\nsteps = 3\n", "mine.toml")
    overrides = [f"--{key}=~/mine.toml" for key in keys if key != "checkpoint.initial_load_path"]
    loaded = load([*overrides, "--checkpoint.initial_load_path=~/mine.toml"], ENVIRONMENT)
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(loaded.config, section), name) == f"{tmp_path}/mine.toml", key
    assert loaded.config.training.steps == 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_is_named_as_the_cause(tmp_path, encoding):
    path = tmp_path / "x.toml"
    text = "[training]\nsteps = 3\n"
    path.write_bytes(("\ufeff" * encoding.endswith("be") + text).encode(encoding))
    with pytest.raises(ConfigError, match="begins with a byte order mark \\(UTF-"):
        load(["--job.config_file", str(path)], ENVIRONMENT)


@pytest.mark.parametrize("text", ["3:\n  steps: 5\n", "on: true\n"])
def test_yaml_whose_sections_are_no_names_is_refused(tmp_path, text):
    path = write(tmp_path, text, "x.yaml")
    with pytest.raises(ConfigError, match="stands outside a"):
        load(["--job.config_file", str(path)], ENVIRONMENT)


def test_yaml_whose_keys_are_no_names_is_refused(tmp_path):
    path = write(tmp_path, "training:\n  3: 5\n  on: 1\n", "x.yaml")
    with pytest.raises(ConfigError, match="unknown key '3'"):
        load(["--job.config_file", str(path)], ENVIRONMENT)


def test_the_largest_seed_is_one_that_torch_takes():
    import torch

    torch.manual_seed(JobConfig().training.model_validate({"seed": 2**64 - 1}).seed)
