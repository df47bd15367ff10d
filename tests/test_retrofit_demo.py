"""The comparison that train_retrofit_debug.sh makes is one at equal training FLOPs."""

import json
from pathlib import Path

import pytest

from scripts.retrofit_demo import RUNS, equal_steps, rows_of, training_flops
from torchtitan_rd.config import load
from torchtitan_rd.job import Environment
from torchtitan_rd.run_plan import resolve

CONFIGS = Path(__file__).parents[1] / "train_configs"
DENSE, RECURRENT = CONFIGS / "retrofit_debug_dense.toml", CONFIGS / "retrofit_debug.toml"
ONE_RANK = Environment(0, 0, 1, 1, "INFO")


def of_a_layer(dim: int, kv_dim: int, ffn_dim: int, seq_len: int) -> int:
    """Multiply-adds of a token in forward: matrices, then scores and values over the half of all pairs."""
    matrices = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * ffn_dim
    return matrices + dim * (seq_len + 1)


def test_updates_at_equal_flops_are_those_counted_by_hand_at_the_depths_that_are_drawn():
    dense = load(["--job.config_file", str(DENSE)], ONE_RANK).config
    recurrent = load(["--job.config_file", str(RECURRENT)], ONE_RANK).config
    plan = resolve(recurrent, ONE_RANK)
    layer = of_a_layer(dim=128, kv_dim=64, ffn_dim=448, seq_len=128)
    head, adapter = 128 * plan.shape.vocab_size, 2 * 128 * 128

    spent = 0
    for step in range(1, recurrent.training.steps + 1):
        without, with_gradient = plan.draws.family.sampler.draw(step)
        iteration = layer + adapter
        # Forward is 2 operations a multiply-add, backward 4 more.
        spent += 6 * (3 * layer + head + with_gradient * iteration) + 2 * without * iteration
    tokens = plan.tokens_per_step
    assert training_flops(plan, recurrent.training.steps) == pytest.approx(spent * tokens, rel=1e-9)

    of_a_dense_step = 6 * (8 * layer + head)
    assert dense.model.overrides["n_layers"] == 8
    found = equal_steps(str(RECURRENT), str(DENSE), [])
    assert found == round(spent / of_a_dense_step)
    assert equal_steps(str(RECURRENT), str(DENSE), ["--training.steps", "120"]) < found


def test_the_table_has_the_last_validation_of_each_run(tmp_path):
    for number, name in enumerate(RUNS):
        (tmp_path / name).mkdir()
        rows = [
            {"step": 10, "val_loss": 9.0},
            {"step": 20, "val_loss": float(number), "val_loss_4": 1.5},
            {"step": 21},
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rows_of(tmp_path)
    assert [row["run"] for row in found] == list(RUNS.values())
    assert [(row["steps"], row["val_loss"], row["val_loss_4"]) for row in found] == [
        (20, float(number), 1.5) for number in range(4)
    ]
