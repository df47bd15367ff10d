"""Weights that a run starts from: a seed, another run's checkpoint, or a folder that
another program wrote.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from tests.ranks import run_on_ranks
from torchtitan_rd.errors import CheckpointError


def start(dump, source, model=None, **config):
    """(what load_initial returned, the model) of a fresh run in `dump`."""
    model = training_state(5)["model"] if model is None else model
    checkpoints = checkpointer(dump, initial_load_path=None if source is None else str(source), **config)
    try:
        return checkpoints.load_initial(model), model
    finally:
        checkpoints.close()


@pytest.fixture
def run(tmp_path):
    save_steps(tmp_path / "run", [1, 2])
    return tmp_path / "run" / "checkpoint"


def test_a_step_folder_or_the_newest_of_a_checkpoint_folder_gives_the_model_only(tmp_path, run):
    for source, step in ((run / "step-1", 1), (run, 2)):
        path, model = start(tmp_path / f"new{step}", source)
        assert path == run / f"step-{step}"
        assert digest({"model": model}) == digest({"model": training_state(step)["model"]})


def initial_body(rank, world_size, dump, source):
    _, model = start(dump, source)
    assert all(isinstance(tensor, DTensor) for tensor in model.values())
    return digest({"model": model})


def test_two_ranks_start_from_the_weights_of_one(tmp_path, run):
    expected = digest({"model": training_state(2)["model"]})
    assert run_on_ranks(2, initial_body, tmp_path / "new", run) == [expected] * 2


def test_tensors_that_a_foreign_folder_lacks_keep_their_values_and_are_logged(tmp_path, log_lines):
    foreign = {
        name: t for name, t in training_state(1)["model"].items() if name.startswith(("layers", "norm"))
    }
    dcp.save({"model": foreign | {"freqs": torch.zeros(3)}, "lr": object}, checkpoint_id=tmp_path / "llama")
    _, model = start(tmp_path / "new", tmp_path / "llama")
    assert torch.equal(model["norm.weight"], training_state(1)["model"]["norm.weight"])
    assert torch.equal(model["output.weight"], training_state(5)["model"]["output.weight"])
    assert f"model.output.weight keeps its initial value: not in {tmp_path / 'llama'}" in log_lines
    assert any(line.startswith("model.tok_embeddings.weight keeps") for line in log_lines)
    assert any("also holds model.freqs" in line for line in log_lines)
    assert any("has no checksums" in line for line in log_lines)


def test_a_shape_may_differ_only_where_it_is_excluded_by_name(tmp_path, run, log_lines):
    model = training_state(5)["model"] | {
        "output.weight": torch.ones(7, 4),
        "tok_embeddings.weight": torch.ones(7, 4),
    }
    with pytest.raises(CheckpointError) as raised:
        start(tmp_path / "new", run, model)
    assert "model.output.weight: float32 (5, 4) there, float32 (7, 4) here" in str(raised.value)
    remedy = ["model.output", "model.tok_embeddings"]
    assert f"checkpoint.exclude_from_loading = {remedy}" in str(raised.value)
    start(tmp_path / "new", run, model, exclude_from_loading=remedy)
    assert torch.equal(model["output.weight"], torch.ones(7, 4))
    assert torch.equal(model["norm.weight"], training_state(2)["model"]["norm.weight"])
    assert (
        "model.output.weight keeps its initial value: excluded by checkpoint.exclude_from_loading"
        in log_lines
    )


def test_another_type_is_converted_and_said(tmp_path, log_lines):
    weights = {name: tensor.bfloat16() for name, tensor in training_state(1)["model"].items()}
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "bf16")
    _, model = start(tmp_path / "new", tmp_path / "bf16")
    assert all(torch.equal(model[name], weights[name].float()) for name in weights)
    assert any(line.startswith("converted from bfloat16: model.") for line in log_lines)


def test_a_folder_without_any_wanted_tensor_is_refused(tmp_path):
    dcp.save({"a": torch.zeros(2)}, checkpoint_id=tmp_path / "flat")
    with pytest.raises(CheckpointError, match=r"has none of the wanted tensors model\.tok_embeddings"):
        start(tmp_path / "new", tmp_path / "flat")


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "empty", "is neither a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=f"checkpoint.initial_load_path = .*{message}"):
            start(tmp_path / "new", source)


def test_damaged_weights_are_not_used_and_not_touched(tmp_path, run, log_lines):
    (run / "step-2" / "manifest.json").unlink()
    path, _ = start(tmp_path / "new", run)
    assert path == run / "step-1" and any("step-2 is damaged" in line for line in log_lines)
    shard = run / "step-1" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(
        CheckpointError, match=r"no initial weights:\n.*step-2 is damaged.*\n.*step-1 is damaged"
    ):
        start(tmp_path / "other", run)
    assert sorted(p.name for p in run.iterdir()) == ["step-1", "step-2"]


def test_a_seed_holds_only_the_model_is_loaded_first_and_never_resumed_from(tmp_path, run, log_lines):
    seed = checkpointer(tmp_path / "new", create_seed_checkpoint=True)
    seed.save(0, training_state(7), {})
    seed.close()
    assert names(tmp_path / "new") == ["step-0"]
    assert load_once(tmp_path / "new")[0] is None
    path, model = start(tmp_path / "new", run)
    assert path.name == "step-0" and digest({"model": model}) == digest({"model": training_state(7)["model"]})
    assert any("initial_load_path is not used" in line for line in log_lines)


def test_an_export_of_the_last_step_can_be_started_from(tmp_path):
    last = checkpointer(tmp_path / "run", last_save_model_only=True)
    last.save(3, training_state(3), {"step": 3}, last_step=True)
    last.close()
    path, model = start(tmp_path / "new", tmp_path / "run" / "checkpoint")
    assert path.name == "step-3-model" and digest({"model": model}) == digest(
        {"model": training_state(3)["model"]}
    )


def test_initial_weights_load_even_where_saving_is_disabled(tmp_path, run):
    path, model = start(tmp_path / "new", run, enable=False)
    assert path == run / "step-2" and not (tmp_path / "new").exists()
    assert digest({"model": model}) == digest({"model": training_state(2)["model"]})
