"""A checkpoint is resumed only by the run it belongs to."""

import pytest
import torch

from tests.checkpoint.common import JOB, SHAPE, checkpointer, digest, load_once, save_steps, training_state
from torchtitan_rd.checkpoint.contract import arithmetic_differences, check_heads
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.models.raven import RAVEN
from torchtitan_rd.parts import field_defaults


def load_into(dump, tensors, **options):
    checkpoints = checkpointer(dump, **options)
    try:
        return checkpoints.load(tensors)
    finally:
        checkpoints.close()


@pytest.fixture
def saved(tmp_path):
    save_steps(tmp_path, [1])
    return tmp_path


def test_another_model_shape_is_refused_with_every_field_that_differs(saved):
    with pytest.raises(CheckpointError) as raised:
        load_once(saved, shape={**SHAPE, "dim": 8, "n_layers": 2})
    assert "dim: 4 there, 8 here" in str(raised.value) and "n_layers: 1 there, 2 here" in str(raised.value)
    assert "flavor" not in str(raised.value)


@pytest.mark.parametrize("value", [None, False])
def test_a_field_that_an_older_checkpoint_does_not_know_is_at_rest_there(saved, value):
    assert load_once(saved, shape={**SHAPE, "qk_norm": value})
    with pytest.raises(CheckpointError, match="qk_norm: None there, True here"):
        load_once(saved, shape={**SHAPE, "qk_norm": True})


def test_a_field_that_an_older_checkpoint_does_not_know_has_its_default_there(saved):
    """Such a checkpoint of a raven was computed as fields that came later say by default."""
    defaults = field_defaults(RAVEN.flavors["debug"])
    assert defaults["final_norm"] == "twice" and "dim" not in defaults
    assert load_once(saved, shape={**SHAPE, "final_norm": "twice"}, defaults=defaults)
    with pytest.raises(CheckpointError, match="final_norm: None there, 'once' here"):
        load_once(saved, shape={**SHAPE, "final_norm": "once"}, defaults=defaults)
    with pytest.raises(CheckpointError, match="final_norm: None there, 'twice' here"):
        load_once(saved, shape={**SHAPE, "final_norm": "twice"})


def test_initial_weights_of_other_arithmetic_in_the_attention_are_told():
    plain, other = {"clip_qkv": None, "qk_norm": False}, {"clip_qkv": 8.0, "qk_norm": True}
    assert [line.split()[0] for line in arithmetic_differences(plain, other, RAVEN.arithmetic)] == [
        "clip_qkv",
        "qk_norm",
    ]
    assert arithmetic_differences(other, other, RAVEN.arithmetic) == []


def test_heads_of_another_width_are_refused_and_sizes_that_follow_from_others_are_not():
    stated = {"dim": 2048, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64}
    left_out = {**stated, "head_dim": None}
    for saved, wanted in ((stated, left_out), (left_out, stated), ({}, stated), (stated, {})):
        check_heads(saved, wanted, "step-1")
    check_heads({**stated, "n_kv_heads": 32}, {**stated, "n_kv_heads": None}, "step-1")
    for other_shape in ({"n_kv_heads": 4}, {"dim": 1024, "head_dim": 32}):  # they have a remedy of their own
        check_heads(stated, {**stated, **other_shape}, "step-1")
    with pytest.raises(CheckpointError) as raised:
        check_heads(left_out, {**left_out, "n_heads": 16, "n_kv_heads": None}, "step-1")
    lines = ("n_heads: 32 there, 16 here", "n_kv_heads: 8 there, 16 here", "head_dim: 64 there, 128 here")
    assert all(line in str(raised.value) for line in lines) and "step-1 was made" in str(raised.value)


def test_settings_that_must_match_are_refused_all_at_once_with_the_remedy(saved):
    job = {"training": {"seq_len": 256, "steps": 100, "dataset": "c4"}, "model": JOB["model"]}
    with pytest.raises(CheckpointError) as raised:
        load_once(saved, job=job, must_match=("training.seq_len", "training.dataset"))
    text = str(raised.value)
    assert (
        "training.seq_len: 128 there, 256 here" in text
        and "training.dataset: 'pydoc' there, 'c4' here" in text
    )
    assert "another checkpoint.folder" in text


def test_a_must_match_key_that_gains_or_loses_its_value_is_refused(saved):
    job = {**JOB, "model": {"flavor": "debug", "extra": 3}}
    with pytest.raises(CheckpointError, match=r"model\.extra: None there, 3 here"):
        load_once(saved, job=job, must_match=("model.extra",))


def test_other_settings_may_change_and_each_is_logged(saved, log_lines):
    job = {**JOB, "training": {**JOB["training"], "steps": 200}}
    assert load_once(saved, job=job)[0] == {"step": 1}
    assert "setting changed since the checkpoint: training.steps: 100 there, 200 here" in log_lines


def test_a_run_that_asks_for_no_optimizer_state_is_refused_unless_it_says_so(saved, log_lines):
    for tensors in (
        {"model": training_state(9)["model"]},
        {"model": training_state(9)["model"], "optimizer": {}},
    ):
        with pytest.raises(CheckpointError) as raised:
            load_into(saved, tensors)
        assert "holds optimizer.layers.0.w1.weight.exp_avg" in str(raised.value)
        assert "checkpoint.exclude_from_loading = ['optimizer']" in str(raised.value)
    tensors = training_state(9)
    load_into(saved, tensors, exclude_from_loading=["optimizer"])
    assert digest({"model": tensors["model"]}) == digest({"model": training_state(1)["model"]})
    assert digest({"optimizer": tensors["optimizer"]}) == digest(
        {"optimizer": training_state(9)["optimizer"]}
    )
    assert "not loading optimizer: checkpoint.exclude_from_loading" in log_lines


def test_a_tensor_that_the_checkpoint_lacks_is_refused(saved):
    tensors = training_state(9)
    tensors["model"]["new.weight"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"has no model\.new\.weight"):
        load_into(saved, tensors)


def test_another_type_or_shape_is_refused_where_torch_would_cast_in_silence(saved):
    tensors = training_state(9)
    tensors["model"]["output.weight"] = tensors["model"]["output.weight"].bfloat16()
    tensors["model"]["norm.weight"] = torch.zeros(2, 4)
    with pytest.raises(CheckpointError) as raised:
        load_into(saved, tensors)
    assert "model.output.weight: float32 (5, 4) there, bfloat16 (5, 4) here" in str(raised.value)
    assert "model.norm.weight: float32 (1, 4) there, float32 (2, 4) here" in str(raised.value)


def test_parts_of_the_state_can_be_left_out_by_name(tmp_path):
    checkpoints = checkpointer(tmp_path)
    checkpoints.save(
        1, training_state(1), {"step": 1, "data": {"epoch": 2, "offset": 3}, "rng": {"torch": "00"}}
    )
    checkpoints.close()
    assert load_once(tmp_path, exclude_from_loading=["rng", "data.epoch"])[0] == {
        "step": 1,
        "data": {"offset": 3},
    }


def test_a_misspelt_exclusion_is_refused(saved):
    with pytest.raises(
        CheckpointError, match=r"'optimiser' names nothing in .*, which holds model, optimizer, step"
    ):
        load_once(saved, exclude_from_loading=["optimiser"])


def test_an_exclusion_for_the_initial_weights_does_not_reset_them_at_a_resume(saved):
    assert load_once(saved, exclude_from_loading=["model.output"])[1] == digest(training_state(1))
