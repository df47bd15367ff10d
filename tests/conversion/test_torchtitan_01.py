"""Checkpoints of torchtitan 0.1: the rotary table lies among the weights of a step, and the last step of a
run that keeps the weights alone has their bare names.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint.test_initial import start
from tests.conversion.common import same_bits, script, tensors_in, tiny, weights_of
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.huggingface import open_hf
from torchtitan_rd.conversion.pipeline import to_dcp, to_hf
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.inference.loading import load_model
from torchtitan_rd.models import get_flavor, get_spec

FORMS = ("whole", "weights only", "weights only, with its table")
SHAPE = ("--model", "llama3", "--flavor", "debug", "--override", "dim=32", "--override", "ffn_dim=48")
SHAPE += ("--override", "n_layers=2", "--override", "vocab_size=61")
SHAPE += ("--override", "rope_theta=500000.0")


def with_table(model) -> dict[str, torch.Tensor]:
    """The state dict with the buffer that is persistent there: complex, a row a position."""
    heads = model.shape.attention_shape.head_dim // 2
    return model.state_dict() | {"freqs_cis": torch.polar(torch.ones(64, heads), torch.ones(64, heads))}


def save(model, form, folder):
    content = {
        "whole": {"model": with_table(model), "optimizer": {"step": torch.ones(1)}, "train_state": object()},
        "weights only": model.state_dict(),
        "weights only, with its table": with_table(model),
    }
    dcp.save(content[form], checkpoint_id=folder)


@pytest.fixture(params=FORMS)
def step(request, tmp_path):
    model = tiny("llama3")
    save(model, request.param, tmp_path / "step-40")
    return model, tmp_path / "step-40"


def test_a_step_exports_to_both_forms_with_the_same_bits(step, tmp_path):
    model, folder = step
    given = ("--input_dir", folder, "--no-verify", *SHAPE)
    convert = script("dcp_to_llama")
    assert convert(*given, "--output_dir", tmp_path / "pth", "--format", "pth") == 0
    assert convert(*given, "--output_dir", tmp_path / "hf") == 0
    found = torch.load(tmp_path / "pth" / "checkpoint.pth", weights_only=True)
    assert same_bits(found, model.state_dict())
    back = open_hf(tmp_path / "hf")
    assert same_bits({name: back.read(name) for name in back.tensors}, model.state_dict())


def test_a_step_gives_the_initial_weights_of_a_run(step, tmp_path):
    model, folder = step
    for number, source in enumerate((folder, folder.parent)):
        path, found = start(tmp_path / f"new-{number}", source, tiny("llama3", init_std=0.5).state_dict())
        assert path == folder and same_bits(found, model.state_dict())


def test_a_step_becomes_depth_recurrent_as_our_own_does(step, tmp_path):
    model, folder = step
    to_dcp(weights_of(model), tmp_path / "ours", verify=False)
    split = ("--prelude", "none", "--core", "0", "--coda", "1", "--no-verify")
    convert = script("llama_to_raven")
    assert convert("--input_dir", tmp_path / "ours", "--output_dir", tmp_path / "a", *split) == 0
    assert convert("--input_dir", folder, "--output_dir", tmp_path / "b", *split, *SHAPE) == 0
    assert same_bits(tensors_in(tmp_path / "b"), tensors_in(tmp_path / "a"))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_loaded_to_evaluate_and_to_generate(form, tmp_path):
    spec = get_spec("llama3")
    model = spec.build(get_flavor(spec, "debug", {}))
    save(model, form, tmp_path / "step-40")
    loaded = load_model(tmp_path / "step-40", model="llama3", flavor="debug").model
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("outer", [True, False], ids=["under model", "bare"])
def test_a_file_of_torch_save_with_the_rotary_table_exports_with_the_same_bits(outer, tmp_path):
    model = tiny("llama3")
    content = {"model": with_table(model)} if outer else with_table(model)
    torch.save(content, tmp_path / "checkpoint.pth")
    given = ("--input_dir", tmp_path / "checkpoint.pth", "--output_dir", tmp_path / "hf", "--no-verify")
    assert script("dcp_to_hf")(*given, *SHAPE) == 0
    to_hf(weights_of(model), tmp_path / "expected", verify=False)
    assert same_bits(tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "expected"))


def test_a_folder_without_any_weight_of_the_family_is_told_apart_from_one_with_a_surplus(tmp_path):
    shape = {"dim": 32, "ffn_dim": 48, "n_layers": 2, "vocab_size": 61}
    dcp.save({"optimizer": {"lr": torch.ones(1)}, "train_state": object()}, checkpoint_id=tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"none holds no llama3: none of its tensors is named"):
        open_dcp(tmp_path / "none", model="llama3", flavor="debug", overrides=shape)
    dcp.save({**tiny("llama3").state_dict(), "cache": torch.ones(1)}, checkpoint_id=tmp_path / "more")
    with pytest.raises(CheckpointError, match=r"more holds cache, which the model"):
        open_dcp(tmp_path / "more", model="llama3", flavor="debug", overrides=shape)
