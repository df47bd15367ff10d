"""Parameters, the budget that follows from them, and the config that generate-cfg writes.

Expected numbers are those that the CLM models and Huginn were published with, or sums over shapes made here.
"""

import json
import math

import pytest
import tomli
import yaml

from tests.launch import launch
from torchtitan_rd.__main__ import main
from torchtitan_rd.budget import budgeted_run, chinchilla_budget
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.config_loader import load_config
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.models.counting import count_parameters
from torchtitan_rd.run_plan import resolve

ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="INFO")
CLM_MILLIONS = {  # total, without the input embedding
    "60M": (82.1, 63.2),
    "200M": (261.9, 224.2),
    "400M": (455.7, 408.5),
    "600M": (679.6, 622.9),
    "1.1B": (1145.1, 1069.6),
}


def count(family, flavor, **overrides):
    spec = get_spec(family)
    return count_parameters(spec, get_flavor(spec, flavor, overrides))


@pytest.mark.parametrize("flavor", CLM_MILLIONS)
def test_the_flavors_of_the_clm_models_have_the_parameters_they_were_published_with(flavor):
    found = count("aixsim", flavor)
    millions = (round(found.total / 1e6, 1), round(found.without_input_embedding / 1e6, 1))
    assert millions == CLM_MILLIONS[flavor]


def test_a_llamas_parameters_are_the_sum_over_its_matrices():
    dim, layers, heads, kv_heads, hidden, vocab = 384, 22, 6, 2, 1408, 49152
    matrices = 2 * dim * dim + 2 * dim * (dim * kv_heads // heads) + 3 * dim * hidden
    found = count("aixsim", "60M")
    assert found.parts["layers.*.attention"] + found.parts["layers.*.feed_forward"] == layers * matrices
    norms = (2 * layers + 1) * dim
    assert found.total == layers * matrices + norms + 2 * vocab * dim
    assert found.input_embedding == vocab * dim and found.mean_depth is None


def test_the_8b_of_the_neural_pile_has_its_published_parameters():
    found = count("llama3", "8B")
    assert (found.total, found.without_input_embedding) == (6_981_685_248, 6_980_636_672)


def test_huginn_has_its_published_parameters_and_unfolds_to_its_published_sizes():
    found = count("raven", "nebel-raven-3.5b")
    block = 395_398_080
    assert found.total == 3_564_976_800 and found.looped == 4 * block == 1_581_592_320
    assert round(found.unfolded(32) / 1e9, 2) == 52.59 and round(found.unfolded(64) / 1e9, 1) == 103.2
    assert found.unfolded(1) == found.total and found.mean_depth == 32
    assert found.unfolded(5) == found.total + 4 * 4 * block
    assert found.parts["transformer.recurrence.iteration.adapter"] == 2 * 5280**2


def test_a_tied_matrix_counts_once_and_as_the_head():
    tied = count("raven", "nebel-raven-3.5b")
    untied = count("raven", "nebel-raven-3.5b", tie_word_embeddings=False)
    assert untied.total == 3_911_006_880
    assert tied.without_input_embedding == untied.without_input_embedding == tied.total


@pytest.mark.parametrize(
    ("flavor", "rows", "steps", "warmup"),
    [("60M", 96, 7075, 1415), ("200M", 64, 37627, 7525), ("1.1B", 192, 59846, 11969)],
)
def test_the_clm_models_train_for_their_published_steps(flavor, rows, steps, warmup):
    parameters = count("aixsim", flavor).without_input_embedding
    found = chinchilla_budget(parameters, rows * 2048)
    assert (found.steps, found.warmup_steps) == (steps, warmup)
    assert (steps - 1) * rows * 2048 < found.tokens == 22 * parameters <= steps * rows * 2048


def written(tmp_path, *arguments, name="run.toml"):
    path = tmp_path / name
    assert main(["generate-cfg", *arguments, "--save_path", str(path)]) == 0
    return path


def parsed(path):
    text = path.read_text()
    return tomli.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)


SIXTY = ["--model_arch", "aixsim", "--model_flavor", "60M", "--batch_size", "48"]


@pytest.mark.parametrize("name", ["run.toml", "run.yaml", "run.yml"])
def test_the_file_holds_what_differs_from_the_defaults_in_the_format_of_its_name(name, tmp_path, capsys):
    path = written(
        tmp_path,
        *SIXTY,
        "--data_parallel_shard_degree",
        "2",
        "--token_num_scale",
        "22",
        "--compile",
        "true",
        name=name,
    )
    said = capsys.readouterr().out
    for number in ("82,101,120", "63,226,752", "1,390,988,544 tokens", "7,075 steps", "1,415", "49,152"):
        assert number in said
    loaded = load(["--job.config_file", str(path)], ENVIRONMENT)
    assert not loaded.warnings
    config = loaded.config
    assert (config.training.steps, config.lr_scheduler.warmup_steps) == (7075, 1415)
    assert config.parallelism.data_parallel_shard_degree == 2 and config.compile.enable
    assert (config.training.global_batch_size, config.training.seed, config.optimizer.lr) == (96, 42, 1e-4)

    defaults = JobConfig().as_dict()
    shown_anyway = {("model", "name"), ("model", "flavor"), ("training", "dataset"), ("training", "seq_len")}
    content = {(s, key): value for s, keys in parsed(path).items() for key, value in keys.items()}
    assert shown_anyway <= content.keys()
    for (section, key), value in content.items():
        assert value != defaults[section][key] or (section, key) in shown_anyway, (section, key)


@pytest.mark.parametrize(
    ("degrees", "num_gpus", "expected", "steps"),
    [
        ([], 2, (1, 2), 7075),
        ([], 4, (1, 4), 3538),
        (["--data_parallel_replicate_degree", "2"], 8, (2, 4), 1769),
        (["--data_parallel_replicate_degree", "-1", "--data_parallel_shard_degree", "2"], 8, (4, 2), 1769),
        (["--data_parallel_replicate_degree", "2"], None, (2, 1), 7075),
        ([], None, (1, 1), 14150),
    ],
)
def test_a_degree_of_minus_1_is_worked_out_from_the_number_of_gpus(
    degrees, num_gpus, expected, steps, tmp_path
):
    gpus = [] if num_gpus is None else ["--num_gpus", str(num_gpus)]
    config = load(["--job.config_file", str(written(tmp_path, *SIXTY, *degrees, *gpus))], ENVIRONMENT).config
    parallelism = config.parallelism
    found = (parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree)
    assert found == expected and config.training.steps == steps


def test_the_context_is_written_and_changes_the_steps(tmp_path):
    config = load(
        ["--job.config_file", str(written(tmp_path, *SIXTY, "--seq_len", "1024"))], ENVIRONMENT
    ).config
    assert config.training.seq_len == 1024
    assert config.training.steps == math.ceil(22 * 63_226_752 / (48 * 1024))
    assert parsed(written(tmp_path, *SIXTY, name="same.toml"))["training"]["seq_len"] == 2048


@pytest.mark.parametrize("size", ["stored", "effective"])
def test_a_ravens_budget_is_by_its_stored_or_by_its_effective_parameters_and_both_are_told(
    size, tmp_path, capsys
):
    path = written(
        tmp_path,
        "--model_arch",
        "raven",
        "--model_flavor",
        "debug-demo",
        "--tokenizer",
        "bytes",
        "--dataset",
        "pydoc",
        "--budget",
        size,
        "--seq_len",
        "64",
    )
    found = count("raven", "debug-demo", tie_word_embeddings=True)
    rows_added = (258 - 256) * 128  # the flavor has 256 ids, the byte tokenizer 258
    stored = found.total + rows_added
    effective = stored + 7 * found.looped
    said = capsys.readouterr().out
    assert f"stored {stored:,} parameters" in said and f"effective {effective:,} parameters" in said
    (used,) = [line for line in said.splitlines() if line.endswith("(used)")]
    assert f"by the {size} " in used
    steps = math.ceil(22 * {"stored": stored, "effective": effective}[size] / (8 * 64))
    assert parsed(path)["training"]["steps"] == steps


def test_the_count_is_that_of_the_run(tmp_path, capsys):
    """By the vocabulary of the run's own data: what `config` and the trainer say."""
    for family, flavor, data in (
        ("llama3", "debug", ["--dataset", "synthetic"]),
        ("raven", "debug-demo", ["--dataset", "pydoc", "--tokenizer_path", "bytes"]),
    ):
        path = written(
            tmp_path, "--model_arch", family, "--model_flavor", flavor, *data, name=f"{family}.toml"
        )
        first = capsys.readouterr().out.splitlines()[0]
        plan = resolve(load(["--job.config_file", str(path)], ENVIRONMENT).config, ENVIRONMENT)
        assert f": {plan.count_parameters():,} parameters," in first
        assert first.endswith(f"vocabulary {plan.vocab_size}")


@pytest.mark.slow
def test_the_written_config_trains_on_two_ranks_of_which_each_has_its_part(tmp_path):
    path = written(
        tmp_path,
        "--model_arch",
        "raven",
        "--model_flavor",
        "debug-demo",
        "--dataset",
        "pydoc",
        "--tokenizer_path",
        "bytes",
        "--num_gpus",
        "2",
        "--batch_size",
        "2",
        "--seq_len",
        "16",
        "--enable_wandb",
        "false",
        "--dump_folder",
        str(tmp_path / "out"),
        name="run.yaml",
    )
    finished = launch(
        2, ["--job.config_file", str(path), "--training.steps=2", "--lr_scheduler.warmup_steps=1"]
    )
    assert finished.codes == [0, 0], finished.errors
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["tokens_seen"] == 2 * 4 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_arch", "aixsin"], "did you mean 'aixsim'?"),
        (["--model_flavor", "61M"], "did you mean '60M'?"),
        (["--save_path", "x.json"], "x.json: a config ends in .yaml, .yml, .toml"),
        (["--num_gpus", "3", "--data_parallel_replicate_degree", "2"], "--num_gpus 3 does not fit"),
        (["--num_gpus", "4", "--data_parallel_shard_degree", "2"], "--num_gpus 4 does not fit"),
        (["--num_gpus", "0"], "--num_gpus 0"),
        (["--batch_size", "0"], "local_batch_size = 0"),
        (["--learning_rate", "-1"], "lr = "),
        (["--token_num_scale", "0"], "0.0 tokens a parameter"),
        (["--token_num_scale", "nan"], "nan tokens a parameter"),
        (["--budget", "effective"], "aixsim has no recurrence"),
        (["--tensor_parallel_degree", "2"], "no tensor parallelism"),
        (["--dataset", "fineweb-eduu"], "did you mean 'fineweb-edu'?"),
        (["--dataset", "packed"], "training.dataset_path"),
        (["--tokenizer_path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--keep_last_k_ckpts", "1"], "keep_latest_k = 1"),
        (["--tokenizer_path", "bytes", "--vocab_size", "5"], "model.vocab_size = 5: set it to 258 or more"),
        (["--dataset", "gsm8k", "--tokenizer_path", "bytes"], "conversations need the folder of a tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate-cfg", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_file_that_stands_there_is_replaced_only_if_asked(tmp_path, capsys):
    path = written(tmp_path, *SIXTY)
    before = path.read_text()
    assert main(["generate-cfg", "--save_path", str(path)]) == 1
    assert "pass --overwrite" in capsys.readouterr().err and path.read_text() == before
    assert main(["generate-cfg", "--save_path", str(path), "--overwrite"]) == 0
    assert path.read_text() != before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["generate-cfg", "--save_path", str(tmp_path / "file" / "x.yaml")]) == 1
    err = capsys.readouterr().err
    assert "--save_path" in err and err.count("\n") == 1


def test_an_unknown_flag_is_told_before_any_work(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate-cfg", "--batchsize", "3"])
    assert end.value.code == 2 and "--batchsize" in capsys.readouterr().err


def test_a_negative_vocabulary_or_batch_never_reaches_the_count():
    with pytest.raises(ConfigError, match="vocab_size"):
        load_config(JobConfig, ["--model.vocab_size=0"])
    config = load_config(JobConfig, ["--training.dataset=pydoc"]).config
    assert budgeted_run(config, num_gpus=3).config.training.global_batch_size == 24


def test_count_params_tells_the_total_the_rest_and_each_part(capsys):
    assert main(["count-params", "aixsim", "60M"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {" ".join(line.split()[:-1]): line.split()[-1] for line in lines if line.strip()}
    assert cells["total"] == "82,101,120" and cells["without input embedding"] == "63,226,752"
    parts = [int(cells[part].replace(",", "")) for part in count("aixsim", "60M").parts]
    assert sum(parts) == 82_101_120 and len(parts) == 7


def test_count_params_unfolds_a_raven_to_each_depth(capsys):
    assert (
        main(["count-params", "--model_arch=raven", "--model_flavor=nebel-raven-3.5b", "--depths=1,32"]) == 0
    )
    out = capsys.readouterr().out
    assert "3,564,976,800" in out and "52,594,338,720" in out
    assert main(["count-params", "raven", "nebel-raven-3.5b"]) == 0
    assert "52,594,338,720" in capsys.readouterr().out  # its mean depth


def test_count_params_lists_the_flavors_of_a_family(capsys):
    assert main(["count-params", "aixsim"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["debug", *CLM_MILLIONS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aixsim", "61M"], "did you mean '60M'?"),
        (["aixsin"], "did you mean 'aixsim'?"),
        (["aixsim", "60M", "--depths", "4"], "no recurrence"),
        (["raven", "debug", "--depths", "0,4"], "--depths 0,4"),
        (["raven", "debug", "--depths", "all"], "--depths all"),
        (["raven", "--model_arch", "aixsim"], "raven is named already"),
        (["aixsim", "60M", "--vocab_size", "0"], "vocab_size = 0"),
    ],
)
def test_count_params_tells_a_mistake_in_one_line(arguments, message, capsys):
    assert main(["count-params", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
