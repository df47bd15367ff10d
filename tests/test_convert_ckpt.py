"""convert-ckpt: the last line of the CLM tutorial."""

import json
from pathlib import Path

import pytest
import torch

from tests.inference.runs import train
from torchtitan_rd.__main__ import main
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import to_pth
from torchtitan_rd.models import get_spec

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of aixsim debug with 2 layers and a byte tokenizer, at step 6."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, "aixsim", "debug", **{"n_heads = 2\n": "n_heads = 2\nn_kv_heads = 2\nn_layers = 2\n"})
    return folder / "dump"


@pytest.fixture(scope="module")
def step(run) -> Path:
    return run / "checkpoint" / "step-6"


def logits_of(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize("leading", [[], ["pt2hf"]], ids=["plain", "pt2hf"])
@pytest.mark.parametrize("tokenizer", [[], ["none"]], ids=["own", "none"])
def test_a_step_leaves_with_or_without_a_tokenizer_under_both_forms(
    leading, tokenizer, step, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main(["convert-ckpt", *leading, "aixsim", "debug", *tokenizer, str(step), str(out)]) == 0
    assert "verified:" in capsys.readouterr().out
    assert (out / "tokenizer.json").exists() is not bool(tokenizer)
    fields = json.loads((out / "config.json").read_text())
    rope = fields.get("rope_parameters") or fields
    assert rope["rope_theta"] == 10_000.0 and not fields.get("rope_scaling")


def test_the_folder_of_a_run_stands_for_its_latest_step_and_flags_may_stand_anywhere(run, step, tmp_path):
    out = tmp_path / "out"
    assert (
        main(["convert-ckpt", "--no-verify", "aixsim", "debug", "none", str(run), "--force", str(out)]) == 0
    )
    expected = tmp_path / "expected"
    assert main(["convert-ckpt", "aixsim", "debug", "none", str(step), str(expected), "--no-verify"]) == 0
    assert torch.equal(logits_of(out), logits_of(expected))


def test_a_file_of_torch_save_gives_the_same_folder_as_the_step(step, tmp_path):
    to_pth(open_dcp(step), tmp_path / "pth", verify=False)
    file = (tmp_path / "pth" / "checkpoint.pth").rename(tmp_path / "checkpoint.pt")
    shape = ["--override", "dim=32", "--override", "n_heads=2", "--override", "n_kv_heads=2"]
    shape += ["--override", "ffn_dim=48", "--override", "vocab_size=258"]
    for name, source, extra in (("a", step, []), ("b", file, shape)):
        arguments = ["aixsim", "debug", "none", str(source), str(tmp_path / name), "--no-verify", *extra]
        assert main(["convert-ckpt", *arguments]) == 0
    assert torch.equal(logits_of(tmp_path / "a"), logits_of(tmp_path / "b"))


def test_a_longer_context_is_stated_only_if_asked_and_changes_what_the_export_computes(step, tmp_path):
    stretched = ["--ori_max_position_embeddings", "16", "--max_position_embeddings", "131072"]
    for name, extra in (("plain", []), ("stretched", stretched)):
        arguments = ["aixsim", "debug", "none", str(step), str(tmp_path / name), "--no-verify", *extra]
        assert main(["convert-ckpt", *arguments]) == 0
    fields = json.loads((tmp_path / "stretched" / "config.json").read_text())
    rope = fields.get("rope_scaling") or fields["rope_parameters"]
    assert fields["max_position_embeddings"] == 131072
    assert (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]) == (8.0, 1.0, 4.0)
    assert rope["original_max_position_embeddings"] == 16
    assert not torch.allclose(logits_of(tmp_path / "plain"), logits_of(tmp_path / "stretched"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aixsin", "debug"], "did you mean 'aixsim'?"),
        (["aixsim", "61M"], "did you mean '60M'?"),
        (["aixsim", "60M"], "holds a aixsim debug"),
        (["raven", "debug"], "holds a aixsim"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_line_and_nothing_is_written(
    arguments, message, step, tmp_path, capsys
):
    assert main(["convert-ckpt", *arguments, "none", str(step), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["convert-ckpt", "aixsim", "60M", str(tmp_path / "no"), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "no" in err and err.count("\n") == 1


def test_a_file_without_one_of_the_tensors_is_named(tmp_path, capsys):
    torch.save({"tok_embeddings.weight": torch.zeros(258, 32)}, tmp_path / "cut.pt")
    assert (
        main(["convert-ckpt", "aixsim", "debug", "none", str(tmp_path / "cut.pt"), str(tmp_path / "o")]) == 1
    )
    err = capsys.readouterr().err
    assert "cut.pt lacks layers.0" in err and err.count("\n") == 1


def test_a_tied_head_may_be_left_out_of_a_file_but_not_be_another_matrix_nor_a_tensor_too_many(
    tmp_path, capsys
):
    spec = get_spec("raven")
    torch.manual_seed(0)
    with torch.device("meta"):
        wanted = spec.build(spec.flavors["debug-demo"]).state_dict()
    tensors = {name: torch.randn(tensor.shape) for name, tensor in wanted.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    start = ["convert-ckpt", "raven", "debug-demo", "none"]
    torch.save({"model": tensors}, tmp_path / "whole.pt")
    assert main([*start, str(tmp_path / "whole.pt"), str(tmp_path / "whole"), "--no-verify"]) == 0

    cut = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    torch.save(cut, tmp_path / "cut.pt")
    assert main([*start, str(tmp_path / "cut.pt"), str(tmp_path / "cut"), "--no-verify"]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second

    torch.save(cut | {"transformer.extra": torch.zeros(2)}, tmp_path / "more.pt")
    assert main([*start, str(tmp_path / "more.pt"), str(tmp_path / "more")]) == 1
    assert "more.pt holds transformer.extra" in capsys.readouterr().err

    torch.save(cut | {"lm_head.weight": tensors["lm_head.weight"] + 1}, tmp_path / "other.pt")
    assert main([*start, str(tmp_path / "other.pt"), str(tmp_path / "other")]) == 1
    assert "is tied, but lm_head.weight is not" in capsys.readouterr().err
