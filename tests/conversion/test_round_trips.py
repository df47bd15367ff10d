"""Weights through every pair of folders and back: the same bits, names and shapes."""

import json

import pytest
import torch

from tests.conversion.common import LLAMAS, RAVENS, same_bits, tensors_in, tiny, weights_of
from torchtitan_rd.checkpoint import verify
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.huggingface import open_hf
from torchtitan_rd.conversion.pipeline import open_released, to_dcp, to_hf, to_pth, with_tokenizer
from torchtitan_rd.conversion.weights import cast_weights
from torchtitan_rd.errors import CheckpointError, ConfigError

MODELS = {f"llama {name}": ("llama3", fields) for name, fields in LLAMAS.items()}
MODELS |= {f"raven {name}": ("raven", fields) for name, fields in RAVENS.items()}
MODELS |= {"aixsim": ("aixsim", {"rope_theta": 10_000.0})}


def state(weights):
    return {name: weights.read(name) for name in weights.tensors}


@pytest.fixture(params=MODELS)
def case(request):
    family, fields = MODELS[request.param]
    return family, tiny(family, **fields)


def test_dcp_to_hugging_face_to_dcp_gives_the_same_bits_and_shape(case, tmp_path):
    family, model = case
    to_dcp(weights_of(model, family), tmp_path / "step-0", verify=False)
    assert verify(tmp_path / "step-0") == []
    to_hf(open_dcp(tmp_path / "step-0"), tmp_path / "hf", verify=False)
    to_dcp(open_hf(tmp_path / "hf", model=family), tmp_path / "again", verify=False)
    again = open_dcp(tmp_path / "again")
    assert again.spec.name == family
    assert same_bits(state(again), model.state_dict())
    assert type(again.shape)(**vars(again.shape)).attention_shape == model.shape.attention_shape
    assert again.spec.hf.config_fields(again.shape) == again.spec.hf.config_fields(model.shape)


def test_hugging_face_to_dcp_to_hugging_face_gives_the_same_bits_and_config(case, tmp_path):
    family, model = case
    bf16 = cast_weights(weights_of(model, family), torch.bfloat16)  # as weights are released
    to_hf(bf16, tmp_path / "hf", verify=False)
    to_dcp(open_hf(tmp_path / "hf", model=family), tmp_path / "step-0", verify=False)
    to_hf(open_dcp(tmp_path / "step-0"), tmp_path / "again", verify=False)
    assert same_bits(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "hf"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again")]
    assert configs[0] == configs[1] and configs[0]["torch_dtype"] == "bfloat16"


KNOWN = {"none": {}, "spikes": {"bos_token_id": 60, "eos_token_id": None}, "text": {"eos_token_id": [3, 4]}}


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("family", ["llama3", "raven"])
def test_token_ids_that_are_not_known_are_none_to_transformers_and_after_a_round_trip(
    family, known, tmp_path
):
    """LlamaConfig has 1 and 2 by default: spikes would end at the first count of 2."""
    transformers = pytest.importorskip("transformers")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    expected = [KNOWN[known].get(name) for name in names]
    to_hf(weights_of(tiny(family), family, token_ids=KNOWN[known]), tmp_path / "hf", verify=False)

    code = {"trust_remote_code": True} if family == "raven" else {}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf", **code)
    generation = transformers.GenerationConfig.from_model_config(config)
    for found in (config, generation):
        assert [getattr(found, name) for name in names] == expected

    to_dcp(open_hf(tmp_path / "hf", model=family), tmp_path / "step-0", verify=False)
    to_hf(open_dcp(tmp_path / "step-0"), tmp_path / "again", verify=False)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "README.md"}
        for name in ("hf", "again")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("shape", LLAMAS)
def test_a_folder_that_transformers_wrote_comes_back_with_the_same_bits(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    spec = weights_of(tiny("llama3")).spec
    config = transformers.LlamaConfig(**spec.hf.config_fields(tiny("llama3", **LLAMAS[shape]).shape))
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    to_dcp(open_released(tmp_path / "hf"), tmp_path / "step-0", verify=False)
    to_hf(open_dcp(tmp_path / "step-0"), tmp_path / "again", verify=False)
    assert same_bits(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "hf"))


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_meta_files_become_the_same_folder_as_the_unsharded_model(shards, tmp_path):
    from tests.conversion import test_meta as meta

    model = meta.llama()
    meta.write(tmp_path / "meta", model, shards)
    proof = to_dcp(open_released(tmp_path / "meta", model="llama3"), tmp_path / "step-0")
    assert proof.startswith("verified: max |delta logit|")
    to_hf(open_dcp(tmp_path / "step-0"), tmp_path / "hf", verify=False)
    to_hf(weights_of(model), tmp_path / "expected", verify=False)
    assert same_bits(tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "expected"))


def test_a_training_file_of_huginn_becomes_a_folder_for_transformers(tmp_path):
    from tests.conversion import test_huginn as huginn
    from tests.models.raven.tiny import tiny_raven

    model = tiny_raven()
    file = tmp_path / "step-00000012-run_0.pth"
    huginn.write(file, huginn.state_of(model))
    proof = to_dcp(open_released(file, model="raven"), tmp_path / "step-0")
    assert proof.startswith("verified: max |delta logit|") and "4 iterations" in proof
    to_hf(open_dcp(tmp_path / "step-0"), tmp_path / "hf")
    assert same_bits(state(open_hf(tmp_path / "hf")), model.state_dict())


def test_a_tokenizer_beyond_the_vocabulary_is_refused():
    with pytest.raises(
        ConfigError, match="'bytes' has bos_token_id = 256, beyond the model's vocabulary of 61"
    ):
        with_tokenizer(weights_of(tiny("llama3")), "bytes")


def test_large_models_are_written_in_shards_with_an_index(tmp_path, monkeypatch):
    from torchtitan_rd.conversion import huggingface

    model = tiny("llama3")
    to_hf(weights_of(model), tmp_path / "one", verify=False)
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 20_000)
    to_hf(weights_of(model), tmp_path / "many", verify=False)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(tmp_path / "one").values())
    assert same_bits(tensors_in(tmp_path / "many"), tensors_in(tmp_path / "one"))
    assert same_bits(state(open_hf(tmp_path / "many")), model.state_dict())


def test_pickled_hugging_face_weights_and_old_rotary_tables_are_read(tmp_path):
    model = tiny("llama3")
    to_hf(weights_of(model), tmp_path / "hf", verify=False)
    tensors = tensors_in(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    assert same_bits(state(open_hf(tmp_path / "hf")), model.state_dict())


def test_a_tied_head_that_is_stored_must_equal_the_embedding(tmp_path):
    from safetensors.torch import save_file

    model = tiny("llama3", tie_word_embeddings=True)
    to_hf(weights_of(model), tmp_path / "hf", verify=False)
    tensors = tensors_in(tmp_path / "hf")
    assert "lm_head.weight" not in tensors
    for head, passes in ((tensors["model.embed_tokens.weight"].clone(), True), (torch.zeros(61, 32), False)):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "hf" / "model.safetensors")
        if passes:
            assert same_bits(state(open_hf(tmp_path / "hf")), model.state_dict())
        else:
            with pytest.raises(
                CheckpointError, match=r"is tied to model.embed_tokens.weight, and yet they differ"
            ):
                open_hf(tmp_path / "hf")


def test_a_tied_checkpoint_whose_two_tensors_differ_is_refused(tmp_path):
    model = tiny("llama3", tie_word_embeddings=True)
    tensors = model.state_dict() | {"output.weight": torch.zeros(61, 32)}
    weights = weights_of(model)
    with pytest.raises(CheckpointError, match=r"tok_embeddings.weight and output.weight are tied .* differ"):
        to_hf(type(weights)(**{**vars(weights), "read": tensors.__getitem__}), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_torch_file_holds_the_bare_state_dict(tmp_path):
    model = tiny("llama3")
    to_dcp(weights_of(model), tmp_path / "step-7", verify=False)
    sentence = to_pth(open_dcp(tmp_path / "step-7"), tmp_path / "out")
    assert sentence == f"verified: all {len(model.state_dict())} tensors are equal"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint.pth"]
    assert same_bits(torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True), model.state_dict())


def test_a_checkpoint_is_described_by_its_own_shape_not_by_the_flavor_table(tmp_path):
    model = tiny("llama3", rope_theta=12345.0, norm_eps=3e-6)
    to_dcp(weights_of(model), tmp_path / "step-12", verify=False)
    weights = open_dcp(tmp_path / "step-12")
    assert (weights.shape, weights.flavor, weights.step) == (model.shape, "custom", 12)
    shown = open_dcp(tmp_path / "step-12", overrides={"rope_theta": 7.0}).shape
    assert shown.rope_theta == 7.0 and shown.norm_eps == 3e-6
