"""A dense Llama as a depth-recurrent model: conversion/retrofit.py and convert/llama_to_raven.py."""

import json

import pytest
import tomli
import torch

from tests.conversion.common import LLAMAS, same_bits, script, tensors_in, tiny, weights_of
from tests.models.raven.remote import fresh_code, load  # noqa: F401 (a fixture)
from torchtitan_rd.commands import eval_loss
from torchtitan_rd.conversion import cli, retrofit
from torchtitan_rd.conversion.pipeline import to_dcp, to_hf, with_tokenizer
from torchtitan_rd.conversion.retrofit import Split, open_dense, retrofitted, to_raven
from torchtitan_rd.conversion.weights import cast_weights
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.models import MODELS, get_flavor

transformers = pytest.importorskip("transformers")

CONVERT = script("llama_to_raven")
LAYERS = 7
DROPPING = ("--prelude", "0-1", "--core", "3", "--coda", "5-6")
WHOLE = ("--prelude", "0", "--core", "1-4", "--coda", "5-6")
SPLITS = {DROPPING: (2, 4), WHOLE: ()}
ALONE = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")


def dense_weights(**fields):
    return weights_of(tiny("llama3", n_layers=LAYERS, **fields))


def tokens():
    return torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shape", "source"), [*((shape, "hf") for shape in LLAMAS), ("gqa", "dcp")])
@torch.no_grad()
def test_one_iteration_computes_the_dense_model_without_its_dropped_layers(shape, source, tmp_path, capsys):
    """Against transformers with the layers deleted by hand, with some dropped and with none."""
    dense = dense_weights(**LLAMAS[shape])
    to_hf(dense, tmp_path / "hf", verify=False)
    to_dcp(dense, tmp_path / "dcp", verify=False)
    for number, (split, dropped) in enumerate(SPLITS.items()):
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").float().eval()
        for layer in reversed(dropped):
            del theirs.model.layers[layer]
        expected = theirs(tokens(), use_cache=False).logits

        output = tmp_path / f"raven-{number}"
        assert CONVERT("--input_dir", tmp_path / source, "--output_dir", output, *split) == 0
        said = capsys.readouterr().out
        assert f"without {len(dropped)} of 7 layers: max |delta logit|" in said
        assert "equal, whatever the first state\nverified: max |delta logit|" in said
        raven = load(output)
        for seed in (0, 1):
            state = 3 * torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(seed))
            for depth in (1, 5):
                logits = raven(tokens(), num_steps=depth, input_states=state).logits
                assert (logits - expected).abs().max() <= 1e-5
        assert expected.std() > 0.01


def test_a_checkpoint_holds_what_the_hugging_face_folder_holds_and_trains_from_the_section(tmp_path, capsys):
    to_hf(dense_weights(**LLAMAS["scaled"]), tmp_path / "dense", verify=False)
    for kind, flags in (("hf", ()), ("dcp", ("--dcp",))):
        arguments = ("--input_dir", tmp_path / "dense", "--output_dir", tmp_path / kind, *DROPPING, *flags)
        assert CONVERT(*arguments, "--mean_recurrence", 4, "--mean_backprop_depth", 2) == 0
        section = tomli.loads(capsys.readouterr().out.partition("\n\n")[2])
        model = section["model"]
        shape = get_flavor(MODELS[model["name"]], model["flavor"], model.get("overrides"))
        assert (shape.mean_recurrence, shape.mean_backprop_depth, shape.n_layers_core) == (4, 2, 1)
        assert shape.rope_scaling == LLAMAS["scaled"]["rope_scaling"] and model["vocab_size"] == 61
        assert section["checkpoint"]["initial_load_path"] == str(tmp_path / kind)
    to_hf(cli.open_dcp(tmp_path / "dcp"), tmp_path / "again", verify=False)
    assert same_bits(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "hf"))


def test_the_tokenizer_and_the_type_of_the_weights_go_along(tmp_path):
    dense = cast_weights(dense_weights(vocab_size=300), torch.bfloat16)
    to_hf(with_tokenizer(dense, "bytes"), tmp_path / "dense", verify=False)
    assert CONVERT("--input_dir", tmp_path / "dense", "--output_dir", tmp_path / "raven", *WHOLE) == 0
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("dense", "raven")]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "raven")]
    assert files[0] == files[1] and configs[0]["bos_token_id"] == configs[1]["bos_token_id"] == 256
    found = tensors_in(tmp_path / "raven")
    assert {t.dtype for name, t in found.items() if name != "freqs_cis"} == {torch.bfloat16}


@torch.no_grad()
def test_generation_with_a_cache_is_that_without_one(tmp_path):
    dense = dense_weights(**LLAMAS["scaled"])
    to_raven(dense, Split.parse("0-1", "3", "5-6"), tmp_path / "raven", adapter="random")
    raven = load(tmp_path / "raven")
    common = {"num_steps": 3, "max_new_tokens": 8, "do_sample": False, "state_seed": 0}
    cached, uncached = (raven.generate(tokens(), use_cache=use, **common) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape == (2, 32)


def test_a_random_adapter_is_that_of_its_seed_and_all_else_is_as_with_the_identity():
    dense, split = dense_weights(), Split.parse("0-1", "3", "5-6")
    passing, first, again, other = (
        retrofitted(dense, split, **fields)
        for fields in (
            {},
            {"adapter": "random"},
            {"adapter": "random", "seed": 0},
            {"adapter": "random", "seed": 1},
        )
    )
    assert first.shape.adapter_start == "random" and passing.shape.adapter_start == "identity"
    for name in passing.tensors:
        assert torch.equal(first.read(name), passing.read(name)) == (name != retrofit.ADAPTER)
    adapters = [weights.read(retrofit.ADAPTER) for weights in (first, again, other)]
    assert torch.equal(adapters[0], adapters[1]) and not torch.equal(adapters[0], adapters[2])
    assert float(adapters[0].std()) == pytest.approx((2 / (5 * 32)) ** 0.5, rel=0.1)


def test_each_kept_tensor_is_read_once_and_a_dropped_one_never(tmp_path):
    dense, reads = dense_weights(), []
    counting = type(dense)(**{**vars(dense), "read": lambda name: reads.append(name) or dense.read(name)})
    to_raven(counting, Split.parse("0-1", "3", "5-6"), tmp_path / "raven", verify=False)
    kept = [name for name in dense.tensors if not name.startswith(("layers.2.", "layers.4."))]
    assert sorted(reads) == sorted(kept)


def test_a_wrong_conversion_is_not_written(tmp_path, monkeypatch):
    swapped = ("feed_forward.w3.weight", "feed_forward.w1.weight")
    monkeypatch.setitem(retrofit._LAYER, "mlp.fc.weight", swapped)
    with pytest.raises(CheckpointError, match=r"verification failed: one iteration .* DIFFERENT"):
        to_raven(dense_weights(), Split.parse("0-1", "3", "5-6"), tmp_path / "raven")
    assert not list(tmp_path.iterdir())


CONFIG = """
[model]
name = "{family}"
flavor = "{flavor}"
[training]
dataset = "pydoc"
seq_len = 64
local_batch_size = 4
steps = 1
mixed_precision_param = "float32"
[validation]
sequences = 4
"""


def test_before_the_first_update_the_loss_is_the_dense_models_at_every_depth(tmp_path):
    """Nothing dropped, by the command that measures held-out data."""
    dense = dense_weights(vocab_size=258)
    to_dcp(dense, tmp_path / "step-0", verify=False)
    to_raven(dense, Split.parse("0", "1-4", "5-6"), tmp_path / "step-1", dcp=True, verify=False)
    losses = {}
    for family, step, depths in (("llama3", "step-0", None), ("raven", "step-1", "1,2,6")):
        flavor = next(iter(MODELS[family].flavors))
        (tmp_path / "run.toml").write_text(CONFIG.format(family=family, flavor=flavor))
        kind = "loss" if depths is None else "depth"
        arguments = [str(tmp_path / "run.toml"), str(tmp_path / step), "--device", "cpu"]
        arguments += [] if depths is None else ["--depths", depths]
        chosen, overrides = eval_loss._parser(kind).parse_known_args(arguments)
        result = eval_loss.measure(kind, chosen, [*overrides, "--model.vocab_size", "258"], ALONE)
        losses[family] = {name: figures["nats_per_token"] for name, figures in result["losses"].items()}
    (expected,) = losses["llama3"].values()
    assert len(losses["raven"]) >= 3
    assert list(losses["raven"].values()) == pytest.approx([expected] * len(losses["raven"]), abs=1e-5)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (("0-2", "2-4", "5-6"), "--prelude 0-2 and --core 2-4 overlap or are reversed: layers keep"),
        (("0-1", "5-6", "2-4"), "--core 5-6 and --coda 2-4 overlap or are reversed"),
        (("none", "3-1", "5-6"), "--core 3-1 runs backwards: did you mean 1-3?"),
        (("0-1", "2-4", "5-7"), "--coda names layer 7, but the dense model has the layers 0 to 6"),
        (("0-1", "none", "5-6"), "--core none: there must be a layer to iterate"),
        (("0,1", "2-4", "5-6"), "--prelude 0,1: give the first and the last layer, as in 0-3"),
        (("-1", "2-4", "5-6"), "--prelude -1: give the first and the last layer"),
    ],
)
def test_a_split_that_cannot_be_is_one_clear_line(split, message, tmp_path, capsys):
    to_dcp(dense_weights(), tmp_path / "dense", verify=False)
    named = [f"--{name}={value}" for name, value in zip(("prelude", "core", "coda"), split, strict=True)]
    assert CONVERT("--input_dir", tmp_path / "dense", "--output_dir", tmp_path / "raven", *named) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("ConfigError") == 1 and not (tmp_path / "raven").exists()


def test_only_a_whole_dense_llama_is_taken(tmp_path):
    to_hf(weights_of(tiny("raven"), "raven"), tmp_path / "raven", verify=False)
    with pytest.raises(ConfigError, match="holds a raven, which is no dense Llama"):
        open_dense(tmp_path / "raven")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="model_type = 'gpt2' is none of ours"):
        open_dense(tmp_path / "gpt2")
    to_dcp(dense_weights(norm_type="layernorm"), tmp_path / "layernorm", verify=False)
    with pytest.raises(ConfigError, match="norm_type = 'layernorm', which a raven lacks"):
        open_dense(tmp_path / "layernorm")
    with pytest.raises(ConfigError, match="mean_recurrence = 0 must be at least 1"):
        retrofitted(dense_weights(), Split.parse("0", "1-4", "5-6"), mean_recurrence=0)
    part = dense_weights()
    part = type(part)(**{**vars(part), "tensors": {n: t for n, t in part.tensors.items() if "tok" not in n}})
    to_dcp(part, tmp_path / "part", verify=False)
    with pytest.raises(CheckpointError, match=r"lacks tok_embeddings.weight: a whole model is needed"):
        open_dense(tmp_path / "part")
