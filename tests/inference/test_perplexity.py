"""Perplexity of a checkpoint, and of its export by the transformers library, on the same data."""

import argparse
import json
import math

import pytest
import torch

from tests.inference.runs import train
from tests.ranks import run_on_ranks
from torchtitan_rd.__main__ import main
from torchtitan_rd.commands import eval_ppl
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import to_hf
from torchtitan_rd.inference.loading import load_model
from torchtitan_rd.job import Environment

DATA = ["--dataset_name", "pydoc-validation", "--tokenizer_path", "bytes"]
DATA += ["--batch_size", "2", "--num_batches", "4", "--seq_len", "24", "--dtype", "float32"]
FAMILIES = {"aixsim": "debug", "raven": "debug-demo"}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """-> family, the step folder, its export."""
    pytest.importorskip("transformers")
    folder, flavor = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    train(folder, request.param, flavor)
    step = folder / "dump" / "checkpoint" / "step-6"
    to_hf(open_dcp(step), folder / "exported", verify=False)
    return request.param, step, folder / "exported"


def measured(rank: int, world_size: int, kind: str, arguments: list[str]) -> dict:
    chosen: argparse.Namespace = eval_ppl._parser(kind).parse_args(arguments)
    return eval_ppl.measure(kind, chosen, Environment.read())


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_perplexity_of_a_checkpoint_is_that_of_its_export(trained, world_size):
    family, step, exported = trained
    ours = run_on_ranks(world_size, measured, "pt-ppl", [family, FAMILIES[family], str(step), *DATA])
    theirs = run_on_ranks(world_size, measured, "hf-ppl", [str(exported), *DATA])
    for found, expected in zip(ours, theirs, strict=True):
        assert found["tokens"] == expected["tokens"] == 8 * 24
        perplexity = expected["losses"]["val_loss"]["perplexity"]
        assert found["losses"]["val_loss"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize("trained", ["raven"], indirect=True)
def test_a_recurrent_model_is_measured_at_a_depth_of_choice(trained):
    family, step, exported = trained
    losses = []
    for depth in ("1", "6"):
        pair = [
            run_on_ranks(1, measured, kind, [*model, *DATA, "--depth", depth])[0]["losses"]["val_loss"]
            for kind, model in (
                ("pt-ppl", [family, FAMILIES[family], str(step)]),
                ("hf-ppl", [str(exported)]),
            )
        ]
        assert pair[0]["perplexity"] == pytest.approx(pair[1]["perplexity"], rel=1e-4)
        losses.append(pair[0]["nats_per_token"])
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("trained", ["aixsim"], indirect=True)
def test_the_mean_is_over_tokens(trained, tmp_path, capsys):
    """Packed rows, of which one has a single token that counts and the other all."""
    import datasets

    family, step, _ = trained
    rows = [[7, 8] + [99] * 23, list(range(10, 35))]
    data = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(data)
    loaded = load_model(step, dtype=torch.float32)
    labels = torch.tensor(rows)[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        loaded.model(torch.tensor(rows)[:, :-1]).transpose(1, 2), labels, reduction="none"
    )
    path = tmp_path / "result.json"
    arguments = [
        "--dataset_name",
        "packed",
        "--dataset_path",
        str(data),
        "--batch_size",
        "1",
        "--num_batches",
        "2",
    ]
    arguments += ["--seq_len", "24", "--output", str(path)]
    assert main(["eval", "pt-ppl", family, FAMILIES[family], str(step), *arguments]) == 0
    found = json.loads(path.read_text())["losses"]["val_loss"]
    assert found["nats_per_token"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert f"Perplexity: {math.exp(losses.mean()):.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seq_len", "1000000"], "seq_len = 1000000 is more than the model's context"),
        (["--depth", "0"], "depth = 0"),
        (["--output", "/nowhere/result.json"], "--output /nowhere/result.json: there is no such folder"),
        (["--dataset_name", "pydoc-validatoin"], "did you mean 'pydoc-validation'?"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, extra, message):
    family, step, _ = trained
    assert main(["eval", "pt-ppl", family, FAMILIES[family], str(step), *DATA, *extra]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flag", ["--batch_size", "--num_batches", "--seq_len"])
def test_numbers_below_one_are_named(capsys, flag):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "hf-ppl", "exported", flag, "0"])
    assert ended.value.code == 2 and "0 must be at least 1" in capsys.readouterr().err


def test_a_depth_that_cannot_be_is_named_before_data_is_read(trained, capsys, monkeypatch):
    monkeypatch.setattr(eval_ppl, "open_held_out", lambda *args, **keys: pytest.fail("data was read"))
    family, step, exported = trained
    for model in (["pt-ppl", family, FAMILIES[family], str(step)], ["hf-ppl", str(exported)]):
        assert main(["eval", *model, *DATA, "--depth", "0"]) == 1
        assert "ConfigError: depth = 0" in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_family_is_refused(trained, capsys):
    family, step, _ = trained
    other = "raven" if family != "raven" else "llama3"
    assert main(["eval", "pt-ppl", other, FAMILIES[family], str(step), *DATA]) == 1
    assert f"holds a {family}; use --model {family}" in capsys.readouterr().err
