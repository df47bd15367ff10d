"""One table of commands; the lines of the CLM tutorial, as its users type them after `python run.py`."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch import free_port
from torchtitan_rd import __main__, train
from torchtitan_rd.__main__ import COMMANDS, main
from torchtitan_rd.commands import generate, hf_gen
from torchtitan_rd.commands.evaluate import KINDS
from torchtitan_rd.config import load
from torchtitan_rd.config_file import config_text
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment

ROOT = Path(__file__).parent.parent
ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="INFO")
GENERATE = (
    "generate-cfg --model_flavor 60M --batch_size 48 --data_parallel_replicate_degree 2 --compile true "
    "--save_path ./configs/tutorial-60M.yaml"
)
PRETRAIN = "pretrain --config configs/tutorial-60M.yaml --metrics_args.enable_wandb false"
# What makes 60M parameters, 96 rows of 2048 tokens and the hub small enough for two CPU cores.
SHRUNK = (
    "--model.overrides.dim 48 --model.overrides.n_layers 2 --model.overrides.ffn_dim 64 "
    "--compile.enable false --model.tokenizer_path bytes --training.seq_len 16 --training.local_batch_size 2 "
    "--training.global_batch_size 4 --training.steps 3 --lr_scheduler.warmup_steps 1"
)


def said(capsys, *arguments):
    """-> exit status, stdout, stderr."""
    try:
        status = main(list(arguments))
    except SystemExit as end:  # of argparse
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name, capsys):
    status, out, _ = said(capsys, name, "-h")
    assert status == 0
    called = " ".join((name, *COMMANDS[name].leading))
    examples = (
        {called, f"eval {name}", "torchtitan_rd.train"} if name == "train" else {called, f"eval {name}"}
    )
    lines = [line for line in out.splitlines() if any(example in line for example in examples)]
    assert any(len(line.split()) > 2 and not line.startswith("usage:") for line in lines), out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_evaluation_explains_itself(kind, capsys):
    if kind == "lm-eval":  # its own command line
        pytest.importorskip("lm_eval")
    status, out, _ = said(capsys, "eval", kind, "--help")
    assert status == 0 and f"eval {kind}" in out


@pytest.mark.parametrize(("typed", "meant"), [("pretrian", "pretrain"), ("count-param", "count-params")])
def test_an_unknown_command_names_the_nearest_one_in_one_line(typed, meant, capsys):
    status, out, err = said(capsys, typed)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"did you mean {meant!r}?" in err


def test_the_table_imports_nothing_before_a_command_is_called():
    code = "import sys, torchtitan_rd.__main__ as m; m.main([]); print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    listing, modules = found.stdout.split("COMMAND --help")
    assert all(f"  {name} " in listing for name in COMMANDS)
    assert "'torch'" not in modules and "torchtitan_rd.config" not in modules


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_as_head_does_ends_a_command_without_a_traceback(unbuffered):
    """What is printed at once fails in the midst, what is buffered at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "torchtitan_rd"]
    found = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, b"")


def test_another_broken_pipe_is_not_taken_for_a_reader_that_went(monkeypatch):
    def broken(module):
        raise BrokenPipeError

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(BrokenPipeError):
        main(["train"])


@pytest.mark.parametrize("name", ["pt-ppl", "hf-ppl", "hf-lm-eval"])
def test_a_kind_of_evaluation_is_a_command_too(name, monkeypatch):
    called = []
    monkeypatch.setattr("importlib.import_module", lambda module: FakeModule(module, called))
    assert __main__.main([name, "--batch_size", "2"]) == 0
    assert called == [("torchtitan_rd.commands.evaluate", [name, "--batch_size", "2"])]


class FakeModule:
    def __init__(self, name, called):
        self.name, self.called = name, called

    def main(self, arguments):
        self.called.append((self.name, arguments))
        return 0


@pytest.mark.parametrize(
    ("typed", "temperature"),
    [
        ("hf-gen --model_name AICrossSim/x --do_sample true --temperature 0.6 --top_k 40 --top_p 0.8", 0.6),
        ("hf-gen AICrossSim/x --do_sample false", 0.0),
    ],
)
def test_the_tutorials_flags_of_generation_are_those_of_generate(typed, temperature):
    _, *arguments = shlex.split(typed)
    given = generate._parser().parse_args(hf_gen.translated(arguments))
    assert (given.path, given.prompt, given.max_new_tokens) == ("AICrossSim/x", ["London is"], 128)
    assert given.temperature == temperature
    settings, _ = generate.settings_of(given)
    expected = (40, 0.8) if temperature else (None, None)
    assert (settings.sampling.top_k, settings.sampling.top_p, settings.seed) == (*expected, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "x.toml"],
        ["--config=x.toml"],
        ["--job.config_file", "x.toml"],
        ["--job.config_file=x.toml"],
    ],
)
def test_pretrain_is_train_with_the_file_under_either_name(arguments, tmp_path, monkeypatch):
    (tmp_path / "x.toml").write_text("[training]\nsteps = 7\n")
    monkeypatch.chdir(tmp_path)
    read = []
    monkeypatch.setattr(train, "main", lambda given: read.append(load(given, ENVIRONMENT)) or 0)
    assert main(["pretrain", *arguments, "--metrics_args.log_freq", "3"]) == 0
    assert read[0].config.training.steps == 7 and read[0].config.metrics.log_freq == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "--config X.toml"), (["--config=a", "--job.config_file=b"], "2 were named")],
)
def test_pretrain_wants_exactly_one_file(arguments, message, capsys):
    status, _, err = said(capsys, "pretrain", *arguments)
    assert status == 1 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--metrics_args.enable_wandb", "false"], False),
        (["--metrics_args.enable_wandb"], True),
        (["--no-metrics_args.enable_wandb"], False),
        (["--metrics.enable_wandb=true", "--metrics_args.enable_wandb=false"], False),
    ],
)
def test_the_sections_of_overrides_may_end_in_args_as_those_of_files(arguments, expected, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("metrics_args:\n  enable_wandb: true\n")
    loaded = load(["--job.config_file", str(path), *arguments], ENVIRONMENT)
    assert loaded.config.metrics.enable_wandb is expected


def test_a_number_with_an_exponent_is_one_in_yaml_too(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("optimizer:\n  lr: 3e-4\n  eps: 1e-6\ntraining:\n  dataset_path: 1e\n")
    config = load(["--job.config_file", str(path)], ENVIRONMENT).config
    assert (config.optimizer.lr, config.optimizer.eps) == (3e-4, 1e-6)
    assert config.training.dataset_path == "1e"

    # A text that looks like one, as the number of a commit may, stays a text when it is written.
    text = config.model_copy(update={"training": config.training.model_copy(update={"dataset_path": "1e5"})})
    path.write_text(config_text(path, text.changes()))
    assert load(["--job.config_file", str(path)], ENVIRONMENT).config.training == text.training


@pytest.mark.parametrize("nested", ["steps: 3\n  seq_len: 8\n  steps: 7", "{steps: 3, steps: 7}"])
def test_a_key_that_stands_twice_in_yaml_is_refused_as_in_toml(nested, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"training:\n  {nested}\n")
    with pytest.raises(ConfigError, match="the key 'steps' stands here twice"):
        load(["--job.config_file", str(path)], ENVIRONMENT)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """-> the folder in which the tutorial's first two lines were run, and what torchrun said."""
    folder = tmp_path_factory.mktemp("tutorial")
    texts = [
        {"text": f"The {n}th text is about the number {n} and its {n + 1} friends. " * 3} for n in range(60)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    shell(folder, f"python -m torchtitan_rd {GENERATE}")
    line = (
        f"STREAM_HF_DATA=1 python -m torch.distributed.run --nproc_per_node=2 --master_port={free_port()} "
        f"-m torchtitan_rd {PRETRAIN} {SHRUNK} --training.dataset_path texts.jsonl"
    )
    return folder, shell(folder, line)


def shell(folder, line):
    line = line.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    environment = f"export PYTHONPATH={shlex.quote(str(ROOT))} OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=; "
    found = subprocess.run(
        ["bash", "-c", environment + line], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found


@pytest.mark.slow
def test_the_tutorials_lines_train_on_two_ranks_and_end_without_an_abort(tutorial):
    folder, finished = tutorial
    written = yaml.safe_load((folder / "configs" / "tutorial-60M.yaml").read_text())
    assert (written["training"]["steps"], written["lr_scheduler"]["warmup_steps"]) == (7075, 1415)

    run = folder / "outputs" / "aixsim-60M"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3 and 0 < rows[-1]["loss"] < 7
    assert json.loads((run / "exit_status.json").read_text())["status"] == "finished"
    for trace in ("terminate called", "Aborted", "Traceback", "destroy_process_group"):
        assert trace not in finished.stderr
    assert "stream = true" in (run / "config.toml").read_text()


@pytest.mark.slow
def test_the_tutorials_checkpoint_leaves_as_a_folder_that_says_what_it_trained(tutorial, capsys):
    pytest.importorskip("transformers")
    folder, _ = tutorial
    run, out = folder / "outputs" / "aixsim-60M", folder / "exported"
    assert main(["convert-ckpt", "aixsim", "60M", str(run / "checkpoint" / "step-3"), str(out)]) == 0
    assert "verified:" in capsys.readouterr().out
    fields = json.loads((out / "config.json").read_text())
    assert (fields["hidden_size"], fields["num_hidden_layers"], fields["vocab_size"]) == (48, 2, 258)
