"""`torchtitan-rd layers`: how much each layer changes the residual stream,
against hidden states of the transformers library.
"""

import argparse
import json

import pytest
import torch

from tests.conversion.common import tiny, weights_of
from torchtitan_rd.__main__ import main
from torchtitan_rd.commands import layers
from torchtitan_rd.conversion.pipeline import to_hf, with_tokenizer
from torchtitan_rd.job import Environment

transformers = pytest.importorskip("transformers")

ALONE = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
TEXT = "How much does each layer change what passes through it? " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose third layer adds nothing, and whose second one adds the most."""
    folder = tmp_path_factory.mktemp("layers")
    model = tiny("llama3", vocab_size=258, n_layers=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "wo" in name or "w2" in name:
                parameter *= {"0": 30.0, "1": 300.0, "2": 0.0, "3": 30.0}[name.split(".")[1]]
    to_hf(with_tokenizer(weights_of(model), "bytes"), folder / "llama", verify=False)
    (folder / "text.txt").write_text(TEXT)
    return folder


def table(folder, *arguments):
    output = folder / "layers.json"
    given = ["layers", str(folder / "llama"), "--data", str(folder / "text.txt"), "--device", "cpu"]
    assert main([*given, "--output", str(output), *arguments]) == 0
    return json.loads(output.read_text())["layers"]


@torch.no_grad()
def test_the_table_is_that_of_the_hidden_states_of_transformers(folder, capsys):
    found = table(folder, "--sequences", "4", "--seq-len", "64")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    streams = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
        layer.register_forward_hook(
            lambda module, inputs, outputs: streams.append(
                outputs if torch.is_tensor(outputs) else outputs[0]
            )
        )
    given = {"data": str(folder / "text.txt"), "sequences": 4, "seq_len": 64, "data_path": None}
    given |= {"model": folder / "llama", "split": "train", "tokenizer": None, "dtype": "float32"}
    _, held_out = layers.measure(argparse.Namespace(device="cpu", **given), ALONE)
    ids = torch.cat([batch.inputs for batch in held_out.batches])
    assert ids.shape == (4, 64) and bytes(ids[2, :30].tolist()).decode() in TEXT
    model(ids)
    for row, before, after in zip(found, streams[::2], streams[1::2], strict=True):
        cosines = (before * after).sum(-1) / (before.square().sum(-1) * after.square().sum(-1)).sqrt()
        changes = ((after - before).square().sum(-1) / before.square().sum(-1)).sqrt()
        assert row["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5)
        assert row["change"] == pytest.approx(float(changes.mean()), rel=1e-4, abs=1e-6)
    assert [row["layer"] for row in found] == [0, 1, 2, 3]
    assert found[2]["cosine"] == pytest.approx(1) and found[2]["change"] == pytest.approx(0)
    assert found[1]["cosine"] == min(row["cosine"] for row in found) < 0.98
    assert "4 sequences of 64 tokens of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "pydok"], "--data pydok: there is no such file or folder, and no such data set; did you"),
        (["--data", "pydoc", "--seq-len", "100000"], "is more than the model's context"),
        (["--data", "pydoc", "--output", "/"], "--output / is a folder"),
        (["--data", "pydoc", "--tokenizer", "nowhere/at-all/x"], "nowhere/at-all/x"),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, message, capsys):
    assert main(["layers", str(folder / "llama"), "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_recurrent_model_is_refused(tmp_path, capsys):
    to_hf(weights_of(tiny("raven"), "raven"), tmp_path / "raven", verify=False)
    assert main(["layers", str(tmp_path / "raven"), "--data", "pydoc", "--device", "cpu"]) == 1
    assert "layers describes a dense model, and a raven is recurrent already" in capsys.readouterr().err
