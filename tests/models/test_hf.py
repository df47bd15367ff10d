"""models/llama/hf.py: logits, names and configs against transformers' LlamaForCausalLM."""

import pytest
import torch

from tests.models.tiny import some_tokens, tiny_config
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.llama.hf import from_hf, from_hf_config, hf_config, key_map, to_hf
from torchtitan_rd.models.llama.model import Llama

SCALING = RopeScaling(factor=4.0, original_max_position_embeddings=16)
SHAPES = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 100.0},
    "mha scaled tied": {"n_kv_heads": 4, "rope_scaling": SCALING, "rope_theta": 100.0, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
}


def hugging_face(config):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(config))).eval()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_those_of_hugging_face(shape):
    config = tiny_config(**SHAPES[shape])
    reference = hugging_face(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model = Llama(config)
    theirs = reference.state_dict()
    loaded = {ours: from_hf(ours, theirs[name], config) for ours, name in key_map(config).items()}
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert (missing, unexpected) == (["output.weight"] if config.tie_word_embeddings else [], [])
    tokens = some_tokens(length=48)
    expected = reference(tokens).logits
    assert expected.std() > 0.1  # a comparison of zeros would prove nothing
    assert (model(tokens) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_key_map_covers_every_tensor_of_both_sides(shape):
    config = tiny_config(**SHAPES[shape])
    names = key_map(config)
    assert set(names) == set(dict(Llama(config).named_parameters()))
    assert set(names.values()) == set(dict(hugging_face(config).named_parameters()))


def test_to_hf_and_from_hf_are_bitwise_inverses_and_change_only_rotated_weights():
    config = tiny_config()
    for name, tensor in Llama(config).state_dict().items():
        exported = to_hf(name, tensor, config)
        assert torch.equal(from_hf(name, exported, config), tensor)
        assert torch.equal(exported, tensor) != name.endswith(("wq.weight", "wk.weight"))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_survives_the_way_to_hugging_face_and_back(shape):
    config = tiny_config(**SHAPES[shape], norm_eps=1e-6, max_seq_len=77)
    transformers = pytest.importorskip("transformers")
    written = transformers.LlamaConfig(**hf_config(config)).to_dict()  # as transformers itself would store it
    assert from_hf_config(written) == from_hf_config(hf_config(config))
    back = from_hf_config(hf_config(config))
    assert (back.attention_shape, back.hidden_dim) == (config.attention_shape, config.hidden_dim)
    assert key_map(back) == key_map(config)
    assert hf_config(back) == hf_config(config)


def test_the_rope_parameters_of_transformers_5_are_read():
    fields = hf_config(tiny_config(rope_scaling=SCALING))
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
    new = {**fields, "rope_parameters": {"rope_theta": theta, **scaling}}
    assert from_hf_config(new) == from_hf_config({**fields, "rope_theta": theta, "rope_scaling": scaling})
    assert from_hf_config({**fields, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}).rope_theta == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type = 'mistral' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config({**hf_config(tiny_config()), **change})


def test_a_missing_field_is_named():
    fields = hf_config(tiny_config())
    del fields["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        from_hf_config(fields)


def test_layernorm_has_no_export():
    with pytest.raises(ConfigError, match="norm_type = 'layernorm' has no counterpart"):
        hf_config(tiny_config(norm_type="layernorm"))
