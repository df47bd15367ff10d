"""`torchtitan-rd plan` as it is called."""

import json
from pathlib import Path

import pytest

from tests.planning.common import LLAMA, config_of
from torchtitan_rd.__main__ import main
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.planning.cards import find_card
from torchtitan_rd.planning.compute import read_pace, stated_pace
from torchtitan_rd.planning.making import make_plan, resolve_without_data
from torchtitan_rd.planning.proposals import apply

CONFIGS = Path(__file__).parent.parent.parent / "train_configs"
SMALL = ["--model.overrides.n_layers=2", "--training.seq_len=64", "--training.local_batch_size=2"]


def plan(capsys, *arguments: str) -> tuple[int, dict]:
    status = main(["plan", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_small_run_fits_a_large_card(capsys):
    toml = str(CONFIGS / "debug.toml")
    status, told = plan(capsys, toml, "--gpu", "h100-80", "--num_gpus", "2", "--mfu", "0.5", *SMALL)
    assert (status, told["fits"], told["gpus"]) == (0, True, 2)
    assert told["tokens_per_step"] == 32 * 64 and told["steps"] == 300
    assert told["checkpoint"]["saves"] == 6
    assert told["duration"]["pace"]["mfu"] == 0.5
    assert told["checkpoint"]["bytes"] == pytest.approx(12 * told["parameters"], rel=0.01)


def test_what_does_not_fit_is_answered_with_a_change_that_fits_when_it_is_applied():
    training = {"seq_len": 16384, "mixed_precision_param": "bfloat16"}
    config = config_of(LLAMA, training=training)
    environment, pace = Environment(0, 0, 2, 2, "INFO"), stated_pace(None)
    options = {"propose": True, "gpus_per_node": 2}
    roomy = make_plan(config, environment, find_card(None, 80.0, None), pace, **options)
    assert roomy.fits and not roomy.proposals

    short = find_card(None, 0.6 * roomy.measured.worst.reserved / 2**30 + 0.4 * 2.0, None)
    tight = make_plan(config, environment, short, pace, **options)
    assert not tight.fits
    best = tight.proposals[0]
    assert best.fits
    changed = make_plan(apply(config, best.change), environment, short, pace, **options)
    assert changed.fits
    assert changed.measured.worst.peak == pytest.approx(best.need.peak, rel=0.01)
    assert "DOES NOT FIT" in tight.text() and best.change.arguments in tight.text()


def test_without_data_the_rest_is_planned_and_the_gap_is_named():
    config = config_of(LLAMA, training={"dataset": "packed", "dataset_path": "/nowhere/rows"})
    resolved = resolve_without_data(config, Environment(0, 0, 2, 2, "INFO"))
    assert "/nowhere/rows" in resolved.gaps[0]
    assert resolved.plan.shape.vocab_size == 256


def test_mistakes_beside_the_data_are_not_hidden():
    config = config_of(
        LLAMA,
        training={"dataset": "packed", "dataset_path": "/nowhere/rows"},
        parallelism={"data_parallel_shard_degree": 3},
    )
    with pytest.raises(ConfigError, match="2 ranks were started"):
        resolve_without_data(config, Environment(0, 0, 2, 2, "INFO"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu", "h100-8O"), "did you mean 'h100-80'"),
        ((), "--gpu_memory_gb"),
        (("--gpu", "h200", "--gpu_memory_gb", "0"), "--gpu_memory_gb 0.0: must be a number above 0"),
        (("--gpu_memory_gb", "nan"), "--gpu_memory_gb nan: must be"),
        (("--gpu_memory_gb", "80", "--gpu_tflops", "0"), "--gpu_tflops 0.0: must be"),
        (("--gpu_memory_gb", "80", "--gpu_tflops", "-3"), "--gpu_tflops -3.0: must be"),
        (("--gpu", "h200", "--mfu", "1.5"), "share of the peak"),
        (("--gpu", "h200", "--calibrate", "/nowhere"), "no run"),
        (("--gpu", "h200", "--num_gpus", "2", "--parallelism.data_parallel_shard_degree=3"), "2 ranks"),
        (("--gpu", "h200", "--num_gpus", "0"), "argument --num_gpus: 0 must be at least 1"),
        (("--gpu", "h200", "--num_gpus", "-1"), "argument --num_gpus: -1 must be at least 1"),
        (("--gpu",), "argument --gpu: expected one argument"),
        (("--gpu", "h200", "--num_gpu", "2"), "num_gpu"),
        (("--gpu", "h200", "--training.sqe_len=5"), "did you mean 'seq_len'"),
    ],
)
def test_a_mistake_is_one_message(arguments, says, capsys):
    assert main(["plan", str(CONFIGS / "debug.toml"), *arguments]) == 1
    assert says in capsys.readouterr().err


def test_a_run_that_was_measured_sets_the_pace(tmp_path):
    shares = [0.1, 0.2, 0.3, 0.5]
    rows = [json.dumps({"step": step, "mfu_causal": mfu}) for step, mfu in enumerate(shares)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    assert read_pace(tmp_path).mfu == pytest.approx(0.4)

    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "mfu_causal": None}))
    with pytest.raises(ConfigError, match="--mfu"):
        read_pace(tmp_path)


@pytest.mark.slow
def test_the_primate_recipe_fits_its_card_and_a_smaller_one_after_the_proposed_change(capsys):
    toml = str(CONFIGS / "primate_8b_131k.toml")
    status, told = plan(capsys, toml, "--num_gpus", "144", "--gpu", "gh200-96")
    assert (status, told["parameters"]) == (0, 6_981_685_248)

    status, told = plan(capsys, toml, "--num_gpus", "144", "--gpu", "mi250x")
    assert status == 2 and told["proposals"][0]["fits"]
    change = told["proposals"][0]["arguments"].split()
    status, told = plan(capsys, toml, "--num_gpus", "144", "--gpu", "mi250x", *change)
    assert status == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "arguments"),
    [
        ("4", ()),
        ("1", ("--training.enable_cpu_offload=true", "--training.mlp_tile_tokens=2048")),
    ],
)
def test_the_8b_at_131072_tokens_fits_few_cards_of_80_gb(gpus, arguments, capsys):
    offloaded = ("--activation_checkpoint.offload=true", "--training.mlp_tile_tokens=2048")
    toml = str(CONFIGS / "primate_8b_131k.toml")
    status, told = plan(capsys, toml, "--num_gpus", gpus, "--gpu", "h100-80", *offloaded, *arguments)
    assert status == 0, told["depths"][0]
