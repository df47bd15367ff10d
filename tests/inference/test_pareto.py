"""What one pass foresees is what an adaptive run does."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.inference.common import loaded
from tests.inference.runs import train
from torchtitan_rd.__main__ import main
from torchtitan_rd.commands.pareto import Row
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import ExitPolicy, Stepper, think
from torchtitan_rd.inference.pareto import (
    JUDGED,
    choose_policy,
    exit_steps,
    outcome,
    record,
    record_singly,
    replay,
    threshold_for,
    thresholds_of,
    write_policy,
)
from torchtitan_rd.inference.pareto_chart import plot
from torchtitan_rd.inference.policy_file import read_policy

DEPTH, BATCH, LENGTH, VOCAB = 9, 2, 7, 61


@pytest.fixture(scope="module")
def model():
    return loaded("raven")


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCAB, (2, BATCH, LENGTH + 1), generator=generator)
    labels = ids[:, :, 1:].clone()
    labels[1, 0, 3:] = -100
    return [(part[:, :-1], label) for part, label in zip(ids, labels, strict=True)]


@pytest.fixture(scope="module")
def seen(model, windows):
    return record(model, windows, DEPTH)


@torch.inference_mode()
def adaptive_run(model, windows, policy, kv):
    """Each position as the token after a prompt at full depth -> mean loss, mean steps."""
    losses, steps = [], []
    for inputs, labels in windows:
        for place in range(LENGTH):
            stepper = Stepper(
                model.spec, model.model, batch=BATCH, positions=LENGTH, depth=DEPTH, strategy=kv
            )
            if place:
                think(stepper, inputs[:, :place])
            thought = think(stepper, inputs[:, place : place + 1], policy=policy)
            valid = labels[:, place] >= 0
            losses += F.cross_entropy(thought.logits, labels[:, place], reduction="none")[valid].tolist()
            steps += thought.steps[valid].tolist()
    return sum(losses) / len(losses), sum(steps) / len(steps)


@pytest.mark.parametrize("kv", ["full", "latest-m4"])
@pytest.mark.parametrize("criterion", JUDGED)
def test_the_prediction_is_what_an_adaptive_run_does(model, windows, seen, criterion, kv):
    threshold = threshold_for(seen, criterion, 6.0)
    policy = ExitPolicy(criterion, threshold, min_steps=5)
    found = outcome(seen, policy, kv)
    loss, steps = adaptive_run(model, windows, policy, kv)
    assert found.steps == steps and 5 < steps < DEPTH
    assert steps > outcome(seen, ExitPolicy(criterion, threshold), kv).steps
    assert found.loss == pytest.approx(loss, abs=1e-5)


def test_a_strategy_that_mixes_iterations_is_recorded_position_by_position(model, windows, seen):
    """The first token after the prompt reads what the deepest iterations have left."""
    exact = record_singly(model, windows, "full", DEPTH)
    assert sorted(exact.losses[-1].tolist()) == pytest.approx(sorted(seen.losses[-1].tolist()), abs=1e-5)
    assert sorted(exact.losses[2].tolist()) == pytest.approx(sorted(seen.losses[2].tolist()), abs=1e-5)
    mixed = record_singly(model, windows, "compress-s4", DEPTH)
    assert abs(mixed.losses[2] - exact.losses[2]).max() > 1e-3


@torch.inference_mode()
def test_a_replay_is_generation_with_given_tokens(model, windows, seen):
    policy = ExitPolicy("latent-diff", threshold_for(seen, "latent-diff", 6.0))
    losses, steps = [], []
    for inputs, labels in windows:
        stepper = Stepper(
            model.spec, model.model, batch=BATCH, positions=LENGTH, depth=DEPTH, strategy="latest-m4"
        )
        for place in range(LENGTH):
            thought = think(stepper, inputs[:, place : place + 1], policy=policy)
            valid = labels[:, place] >= 0
            losses += F.cross_entropy(thought.logits, labels[:, place], reduction="none")[valid].tolist()
            steps += thought.steps[valid].tolist()
    found = replay(model, windows, policy, "latest-m4", DEPTH)
    assert found == pytest.approx((sum(losses) / len(losses), sum(steps) / len(steps)))
    nothing_leaves = replay(model, windows, ExitPolicy("none"), "full", DEPTH)
    assert nothing_leaves == pytest.approx((seen.losses[-1].mean(), DEPTH), abs=1e-5)


@pytest.mark.parametrize("criterion", JUDGED)
def test_thresholds_at_the_ends_give_one_iteration_and_all(seen, criterion):
    ends = {exit_steps(seen, ExitPolicy(criterion, t)).mean() for t in (0.0, 1e30)}
    assert ends == {1.0, float(DEPTH)}
    steps = [exit_steps(seen, ExitPolicy(criterion, t)).mean() for t in thresholds_of(seen, criterion)]
    assert len(set(steps)) > 3 and steps == sorted(steps, reverse=criterion != "argmax-stability")


@pytest.mark.parametrize("criterion", JUDGED)
@pytest.mark.parametrize("target", [3.0, 7.5])
def test_a_chosen_threshold_comes_nearest_to_the_target_from_below(seen, criterion, target):
    chosen = threshold_for(seen, criterion, target)
    found = outcome(seen, ExitPolicy(criterion, chosen)).steps
    values = seen.values[criterion]
    deeper = chosen + 1 if criterion == "argmax-stability" else float(values[values < chosen].max())
    assert found <= target < outcome(seen, ExitPolicy(criterion, deeper)).steps


def test_the_bytes_are_those_of_the_slots_that_a_token_has_written(seen, model):
    """2 (keys and values) * H_kv * D * 4 bytes a slot; prelude and coda always,
    the core as far as it came.
    """
    config = model.model.shape
    heads = config.attention_shape
    a_slot = 2 * heads.n_kv_heads * heads.head_dim * 4
    outside = config.n_layers_prelude + config.n_layers_coda
    full = outcome(seen, ExitPolicy("none"), "full")
    assert full.kv_bytes == a_slot * (outside + DEPTH * config.n_layers_core)
    one = outcome(seen, ExitPolicy("kl", 1e30), "full")
    assert (one.steps, one.kv_bytes) == (1.0, a_slot * (outside + config.n_layers_core))
    assert outcome(seen, ExitPolicy("none"), "always-last-m4").kv_bytes == one.kv_bytes


def test_the_policy_that_is_written_is_the_one_that_generation_reads(seen, tmp_path):
    choice = choose_policy(seen, 5.0)
    best = min(outcome(seen, ExitPolicy(name, threshold_for(seen, name, 5.0))).loss for name in JUDGED)
    assert choice.outcome.loss == best and choice.outcome.steps <= 5.0
    write_policy(tmp_path / "policy.toml", choice.policy, "latest-m4")
    assert read_policy(tmp_path / "policy.toml") == (choice.policy, "latest-m4")


def test_bad_input_is_named(seen, windows):
    with pytest.raises(ConfigError, match=r"kl cannot reach a mean depth of 0\.5"):
        threshold_for(seen, "kl", 0.5)
    with pytest.raises(ConfigError, match="a llama3 has no recurrence to leave"):
        record(loaded("llama3"), windows)
    with pytest.raises(ConfigError, match="every: the record compares neighbouring iterations"):
        exit_steps(seen, ExitPolicy("kl", every=2))
    with pytest.raises(ConfigError, match="there is no data"):
        record(loaded("raven"), [])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("raven"))


def test_the_command_writes_a_table_a_picture_and_a_policy_that_generates(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    dump, policy = str(run.parent / "dump"), tmp_path / "policy.toml"
    arguments = [
        "pareto",
        str(run),
        dump,
        "--depth",
        "6",
        "--sequences",
        "2",
        "--kv",
        "latest-m4,compress-s4",
    ]
    arguments += ["--target", "4", "--policy", str(policy), "--replay", "--png", str(tmp_path / "p.png")]
    assert main([*arguments, "--output", str(tmp_path / "p.json")]) == 0
    printed = capsys.readouterr().out
    assert "latest-m4: replayed with all tokens leaving early" in printed and "argmax-stability" in printed
    found = json.loads((tmp_path / "p.json").read_text())
    assert {row["kv"] for row in found["rows"]} == {"latest-m4", "compress-s4"}
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "p.png").stat().st_size > 20_000
    chosen = found["chosen"][0]
    assert chosen["steps"] <= 4 and read_policy(policy)[0].threshold == chosen["threshold"]
    generating = ["generate", dump, "--prompt", "The", "--max-new-tokens", "5", "--depth", "6", "--json"]
    assert main([*generating, "--exit-policy", str(policy), "--ignore-eos"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"][0] == 6 and len(answer["exit_values"][1]) == answer["steps"][1]


@pytest.mark.parametrize(("criterion", "leaves"), [("kl", "below"), ("argmax-stability", "from")])
def test_a_threshold_is_told_as_what_it_is(run, capsys, criterion, leaves):
    arguments = ["pareto", str(run), str(run.parent / "dump"), "--depth", "4", "--sequences", "2"]
    assert main([*arguments, "--target", "3", "--criterion", criterion]) == 0
    assert f"full: {criterion} {leaves} " in capsys.readouterr().out


def test_a_picture_that_nothing_can_draw_is_refused_before_the_model_is_read(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["pareto", "missing.toml", "missing", "--png", "p.png"]) == 1
    assert "--png needs matplotlib: pip install 'torchtitan_rd[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--kv", "ful"], "kv = 'ful' is no strategy; did you mean 'full'?"),
        (["--depth", "0"], "depth = 0 must be at least 1"),
        (["--policy", "p.toml"], "--policy has no effect without --target"),
        (["--criterion", "kl"], "--criterion has no effect without --target"),
        (["--replay"], "--replay has no effect without --target"),
        (["--target", "0.5"], "cannot reach a mean depth of 0.5"),
        (["--split", "train"], "--split train has no effect: pydoc-validation is made here"),
        (["--target", "nan"], "cannot reach a mean depth of nan"),
        (["--target", "3", "--png", "."], "--png . is a folder: name a file in it"),
        (["--training.seq_len", "300000"], "is more than the model's context"),
        (
            ["--target", "3", "--policy", "/nowhere/p.toml"],
            "--policy /nowhere/p.toml: there is no such folder",
        ),
    ],
)
def test_bad_arguments_are_one_line(run, capsys, extra, message):
    arguments = ["pareto", str(run), str(run.parent / "dump"), "--sequences", "2", *extra]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_chart_shows_what_a_policy_loses_against_all_iterations():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [Row("full", "fixed", d, loss, d, 1024.0 * d) for d, loss in ((1.0, 3.0), (2.0, 2.25), (3.0, 2.0))]
    rows += [Row("full", "kl", 0.5, 2.5, 1.5, 2048.0), Row("skip", "fixed", 3.0, 1.9, 3.0, 3072.0)]
    figure, axes = pyplot.subplots(1, 2)
    plot(axes, rows)
    fixed, kl, skip, _ = axes[0].lines
    assert fixed.get_xdata().tolist() == [1, 2, 3] and fixed.get_ydata().tolist() == [1.0, 0.25, 0.0]
    assert (kl.get_ydata()[0], skip.get_ydata()[0]) == pytest.approx((0.5, -0.1))
    assert axes[1].lines[1].get_xdata().tolist() == [2.0]
    assert "2.0000, the loss at 3 iterations" in axes[0].get_ylabel()
    pyplot.close(figure)
