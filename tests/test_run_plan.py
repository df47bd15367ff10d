"""What will run, as a value: every contradiction of a config at once, before anything starts."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from tests.fork_server import run_python
from torchtitan_rd import __main__, data, run_plan, train
from torchtitan_rd.config import load
from torchtitan_rd.data.tokenizer import ByteTokenizer
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment

ROOT = Path(__file__).parent.parent
FOUR = """
[model]
flavor = "debgu"
[training]
dataset = "pydocs"
throttle = true
local_batch_size = 16
global_batch_size = 40
"""
EACH = (
    "training.global_batch_size = 40 is not a multiple of "
    "training.local_batch_size = 16 times the {ranks} data ranks",
    "training.dataset = 'pydocs' is not a data set; did you mean 'pydoc'?",
    "model.flavor = 'debgu' is no flavor of llama3; did you mean 'debug'?",
    "training.throttle is for recurrent models, not for llama3",
)


def environment(ranks: int = 1) -> Environment:
    return Environment(rank=0, local_rank=0, world_size=ranks, local_world_size=ranks, log_level="WARNING")


def plan(*arguments: str, ranks: int = 1, **options) -> run_plan.RunPlan:
    return run_plan.resolve(load(list(arguments), environment(ranks)).config, environment(ranks), **options)


def problems(*arguments: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as error:
        plan(*arguments, **options)
    return str(error.value).split("\n")


@pytest.fixture
def four(tmp_path) -> str:
    (tmp_path / "four.toml").write_text(FOUR)
    return str(tmp_path / "four.toml")


def lists_the_four(text: str, ranks: int) -> bool:
    lines = text.strip().removeprefix("ConfigError: ").split("\n")
    found = zip(lines, EACH, strict=True)
    return all(line.startswith(start.format(ranks=ranks)) for line, start in found)


def test_the_command_lists_all_four_contradictions_of_a_config_below_its_keys(four, capfd):
    assert __main__.main(["config", "--ranks", "2", four]) == 1
    output, error = capfd.readouterr()
    assert lists_the_four(error, ranks=2), error
    assert "training.throttle" in output and "four.toml" in output


def test_training_lists_all_four_and_writes_nothing(four, tmp_path, capfd):
    assert train.main(["--job.config_file", four, f"--job.dump_folder={tmp_path / 'dump'}"]) == 1
    error = capfd.readouterr().err
    assert lists_the_four(error[error.index("ConfigError") :], ranks=1), error
    assert not (tmp_path / "dump").exists()


def test_the_launch_script_lists_all_four_alone_for_its_ranks_before_torchrun_starts(four, tmp_path):
    found = subprocess.run(
        ["bash", "train_debug.sh", f"--job.dump_folder={tmp_path / 'dump'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NPROC": "3"}
        | {"CONFIG_FILE": four},
    )
    assert found.returncode == 1 and lists_the_four(found.stderr, ranks=3), found.stderr
    assert not (tmp_path / "dump").exists()


def test_a_plan_says_what_runs(capfd):
    arguments = ["--ranks", "2", "train_configs/recurrent_debug.toml", "--training.batch_ramp_steps=9"]
    assert (
        __main__.main(
            ["config", *arguments, "--training.batch_ramp_stages=2", "--training.local_batch_size=2"]
        )
        == 0
    )
    lines = capfd.readouterr().out.split("\n\n")[-1].splitlines()
    found = plan("--job.config_file=train_configs/recurrent_debug.toml", ranks=2)
    with torch.device("meta"):
        count = sum(p.numel() for p in found.spec.build(found.shape).parameters())
    assert lines == [
        "ranks: 2, 1 of the model's copies, each sharded over 2",
        "batch: 16 sequences, 2,048 tokens a step; 4 x 2 sequences of 128 tokens on each rank",
        "batch: grows in 2 stages over the first 9 steps",
        "depths: poisson-lognormal-filling, mean 8, with gradient 4",
        f"model: raven debug-demo, {count:,} parameters, vocabulary 258",
    ]


def test_a_sequence_and_heads_that_ranks_cannot_share_are_a_line_each():
    keys = ("--training.seq_len=15", "--parallelism.context_parallel_degree=2", "--model.overrides.n_heads=3")
    config = "--job.config_file=train_configs/recurrent_debug.toml"
    assert problems(config, *keys, "--model.overrides.dim=24", ranks=2) == [
        "[parallelism] context_parallel_degree = 2 does not divide training.seq_len = 15: change one of them",
        "[parallelism] context_parallel_degree = 2 does not divide the 3 attention heads of the model: "
        "use one of 1, 3",
    ]


def test_ranks_that_share_rows_are_one_reader_of_parts_of_the_positions():
    config = load(["--job.config_file=train_configs/debug.toml"], environment(4)).config
    sharing = config.model_copy(
        update={"parallelism": config.parallelism.model_copy(update={"context_parallel_degree": 2})}
    )
    plans = [run_plan.resolve(sharing, replace(environment(4), rank=rank)) for rank in range(4)]
    assert [(found.batch.data_rank, found.batch.data_degree) for found in plans] == [
        (0, 2),
        (0, 2),
        (1, 2),
        (1, 2),
    ]
    half = config.training.seq_len // 2
    assert [found.positions for found in plans] == 2 * [range(half), range(half, 2 * half)]
    assert "each row is shared by 2 ranks: its tokens (context) by 2" in plans[0].report()


@pytest.mark.parametrize("ranks", ["0", "many", "-1"])
def test_a_number_of_ranks_that_is_none_is_refused(ranks, capfd):
    assert __main__.main(["config", "--ranks", ranks, "train_configs/debug.toml"]) == 1
    assert f"--ranks {ranks}: must be a positive whole number" in capfd.readouterr().err


def test_the_number_of_ranks_may_stand_behind_the_file(capfd):
    assert __main__.main(["config", "train_configs/debug.toml", "--ranks", "2"]) == 0
    assert "ranks: 2, 1 of the model's copies, each sharded over 2" in capfd.readouterr().out


def test_without_a_number_the_ranks_are_those_of_the_degrees(capfd):
    degrees = ["--parallelism.data_parallel_shard_degree=4", "--parallelism.data_parallel_replicate_degree=2"]
    assert (
        __main__.main(["config", "train_configs/debug.toml", *degrees, "--training.local_batch_size=4"]) == 0
    )
    assert "ranks: 8, 2 of the model's copies, each sharded over 4" in capfd.readouterr().out


def test_a_mistake_in_one_section_does_not_hide_those_of_others():
    validation = ["--validation.enable", "--validation.dataset=pydocs-validation", "--validation.sequences=8"]
    lines = problems(
        *(
            "--parallelism.data_parallel_shard_degree=3",
            "--model.overrides.dimm=3",
            "--no-recurrence.lockstep",
        ),
        *(
            "--training.dataset=primate",
            "--training.eos_id=5",
            "--training.stream",
            "--training.shuffle_seed=1",
        ),
        *validation,
        *("--lr_scheduler.schedule=trapezoid", "--lr_scheduler.cooldown_steps=9", "--training.steps=5"),
    )
    starts = (
        "[lr_scheduler] warmup_steps (200) + cooldown_steps (9) is more than [training] steps (5)",
        "[parallelism] data_parallel_replicate_degree (1) x data_parallel_shard_degree (3) is 3, but 1 ranks",
        "training.dataset = 'primate' is streamed in order",
        "training.dataset = 'primate' is not packed",
        "validation.dataset = 'pydocs-validation' is not a data set; did you mean 'pydoc-validation'?",
        "model.overrides.dimm is no field",
        "[recurrence] is for recurrent models",
    )
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def test_packed_rows_are_validated_on_text_too(tmp_path):
    """The ids of padding and of a document's end are those of packed rows alone."""
    (tmp_path / "train.parquet").touch()
    packed = [f"--training.dataset_path={tmp_path}", "--training.pad_id=0", "--training.eos_id=1"]
    packed += ["--training.dataset=packed", "--model.vocab_size=258", "--validation.enable"]
    plan(*packed, "--validation.dataset=pydoc-validation", "--validation.sequences=8")


def test_a_mistake_in_the_held_out_data_is_told_of_its_own_keys():
    found = problems("--validation.enable", "--validation.dataset=text", "--validation.sequences=8")
    assert found == ["validation.dataset = 'text' needs validation.dataset_path"]


def test_the_machine_is_asked_only_where_it_is_the_one_that_trains():
    offload, snapshot = "--training.enable_cpu_offload", "--profiling.enable_memory_snapshot"
    flash = "--model.attention_backend=fa3"
    assert plan(offload, snapshot, flash).batch.global_batch_size == 8
    lines = problems(offload, snapshot, flash, device=torch.device("cpu"))
    expected = (
        "enable_cpu_offload needs a GPU",
        "enable_memory_snapshot = true needs a CUDA device",
        "FA3 needs a",
    )
    assert all(part in line for part, line in zip(expected, lines, strict=True)), lines


def test_a_vocabulary_that_does_not_hold_the_data_is_found_without_the_data():
    (line,) = problems("--model.vocab_size=100")
    assert "has ids up to 257, but model.vocab_size = 100" in line


def test_the_tokenizer_is_read_once_and_not_at_all_where_it_is_handed_in(monkeypatch, tmp_path):
    read = []

    def counted(path):
        read.append(path)
        return ByteTokenizer()

    for place in (run_plan, data):
        monkeypatch.setattr(place, "load_tokenizer", counted)
    small = [
        "--training.seq_len=16",
        "--training.local_batch_size=1",
        "--training.steps=1",
        "--model.overrides.dim=32",
    ]
    small += ["--model.overrides.n_layers=1", "--validation.enable", "--validation.dataset=pydoc-validation"]
    arguments = [
        *small,
        "--validation.sequences=1",
        "--comm.heartbeat_seconds=0",
        f"--job.dump_folder={tmp_path}",
    ]
    train.Trainer(load(arguments, environment()), environment()).run()
    assert read == ["bytes"]
    assert plan("--model.tokenizer_path=nowhere", tokenizer=ByteTokenizer(vocab_size=300)).vocab_size == 300
    assert read == ["bytes"]
    assert plan("--training.dataset=synthetic", "--model.tokenizer_path=nowhere").tokenizer is None


@pytest.mark.parametrize(
    "program",
    [["-m", "torchtitan_rd", "train"], pytest.param(["-m", "torchtitan_rd.train"], marks=pytest.mark.slow)],
)
def test_asked_for_help_the_trainer_shows_an_example_that_can_be_typed(program):
    found = run_python(*program, "--help")
    assert found.returncode == 0 and not found.stderr
    shown = found.stdout.replace("\\\n", " ").splitlines()  # as a shell joins them
    (example,) = [line.split() for line in shown if line.startswith("  torchrun")]
    arguments = example[example.index("torchtitan_rd.train") + 1 :]
    assert arguments[0] == "--job.config_file"
    assert plan(*arguments, ranks=2).batch.global_batch_size == 32


@pytest.mark.parametrize(("trained", "stated"), [(1024, 8192), (16384, 16384)])
def test_the_context_that_an_export_states_covers_what_was_trained(trained, stated):
    assert plan(f"--training.seq_len={trained}").shape.max_seq_len == stated


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        plan("--training.steps=1").vocab_size = 5
