"""models/llama/hf.py: logits, names and configs against transformers' LlamaForCausalLM."""

import pytest
import torch

from tests.models.tiny import some_tokens, tiny_config
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.llama.hf import config_fields, from_hf, key_map, shape_of, to_hf
from torchtitan_rd.models.llama.model import Llama

SCALING = RopeScaling(factor=4.0, original_max_position_embeddings=16)
SHAPES = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 100.0},
    "mha scaled tied": {
        "n_kv_heads": 4,
        "rope_scaling": SCALING,
        "rope_theta": 100.0,
        "tie_word_embeddings": True,
    },
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
}


def hugging_face(config):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_fields(config))).eval()


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
    # As transformers itself would store it.
    written = transformers.LlamaConfig(**config_fields(config)).to_dict()
    assert shape_of(written) == shape_of(config_fields(config))
    back = shape_of(config_fields(config))
    assert (back.attention_shape, back.hidden_dim) == (config.attention_shape, config.hidden_dim)
    assert key_map(back) == key_map(config)
    assert config_fields(back) == config_fields(config)
    for field in ("dim", "n_layers", "vocab_size", "norm_eps", "rope_theta", "rope_scaling", "max_seq_len"):
        assert getattr(back, field) == getattr(config, field), field


def test_the_rope_parameters_of_transformers_5_are_read():
    fields = config_fields(tiny_config(rope_scaling=SCALING))
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
    new = {**fields, "rope_parameters": {"rope_theta": theta, **scaling}}
    assert shape_of(new) == shape_of({**fields, "rope_theta": theta, "rope_scaling": scaling})
    assert (
        shape_of({**fields, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}).rope_theta == 7.0
    )


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
        shape_of({**config_fields(tiny_config()), **change})


def test_a_missing_field_is_named():
    fields = config_fields(tiny_config())
    del fields["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        shape_of(fields)


def test_layernorm_has_no_export():
    with pytest.raises(ConfigError, match="norm_type = 'layernorm' has no counterpart"):
        config_fields(tiny_config(norm_type="layernorm"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "32"}, r"hidden_size = '32' must be a whole number"),
        ({"hidden_size": 32.0}, r"hidden_size = 32\.0 must be a whole number"),
        ({"num_attention_heads": [4]}, r"num_attention_heads = \[4\] must be a whole number"),
        ({"hidden_size": 10**30}, r"hidden_size = 10+ must be at most 16777216"),
        (
            {"num_attention_heads": 10**5, "head_dim": 10**9},
            r"num_attention_heads = 100000 must be at most 65536",
        ),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 10+ must be at most 10000"),
        ({"num_hidden_layers": True}, r"num_hidden_layers = True must be a whole number"),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps = '1e-5' must be a finite number"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps = nan must be a finite number"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings = 'yes' must be true or false"),
        ({"rope_scaling": "llama3"}, r"rope_scaling = 'llama3' must be a table"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": "8"}},
            r"rope_scaling\.factor = '8' must be a finite",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope_scaling\.factor is missing"),
        ({"layer_types": "full_attention"}, r"layer_types = 'full_attention' must be a list"),
        ({"attention_bias": 0}, r"attention_bias = 0 is not supported, only False"),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ConfigError, match=f"^config.json: {message}") as raised:
        shape_of({**config_fields(tiny_config()), **change})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention_chunk_size": 8192},
        {"residual_multiplier": 0.22},
        {"embedding_multiplier": 12.0},
        {"attention_multiplier": 0.0078125},
        {"logits_scaling": 8.0},
        {"logit_scale": 0.0625},
        {"scale_depth": 1.4},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"query_pre_attn_scalar": 256},
        {"quantization_config": {"quant_method": "fp8"}},
        {"pruned_heads": {"0": [1]}},
        {"is_causal": False},
        {"no_rope_layers": [1, 0]},
        {"qk_norm": True},
        {"num_local_experts": 8},
        {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnLlama"}},
    ],
    ids=str,
)
def test_a_field_that_would_change_the_computation_is_refused_and_named(change):
    (key,) = change
    with pytest.raises(ConfigError, match=f"config.json: {key}"):
        shape_of({**config_fields(tiny_config()), **change})


def test_the_same_fields_with_values_that_change_nothing_are_taken(caplog):
    fields = config_fields(tiny_config())
    config = shape_of(fields)
    neutral = {
        "partial_rotary_factor": 1.0,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "pruned_heads": {},
    }
    neutral |= {
        "residual_multiplier": 1,
        "logits_scaling": 1.0,
        "quantization_config": None,
        "hidden_act": "swish",
    }
    neutral |= {"layer_types": ["full_attention"] * 2, "is_causal": True}
    assert shape_of({**fields, **neutral}) == config and not caplog.text
    assert shape_of({**fields, "tempo": 3, "mood": "calm"}) == config
    assert "config.json: mood, tempo: not known here, and ignored" in caplog.text


def test_both_keys_of_the_rotary_settings_are_taken_if_they_agree_and_refused_if_not():
    fields = config_fields(tiny_config(**SHAPES["scaled"]))
    config, scaling = shape_of(fields), fields["rope_scaling"]
    assert shape_of({**fields, "rope_parameters": {**scaling, "rope_theta": 100.0}}) == config
    assert shape_of({**fields, "rope_scaling": {**scaling, "type": "llama3"}}) == config
    for change, named in (
        ({"rope_parameters": {**scaling, "factor": 8.0}}, "rope_parameters and rope_scaling"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling"),
        (
            {"rope_parameters": {**scaling, "rope_theta": 200.0}},
            r"rope_parameters\.rope_theta and rope_theta",
        ),
        (
            {"rope_scaling": {**scaling, "type": "linear"}},
            r"rope_scaling\.type = 'linear', but rope_type = 'llama3'",
        ),
    ):
        with pytest.raises(ConfigError, match=f"config.json: {named}.*leave only"):
            shape_of({**fields, **change})


def test_what_transformers_has_a_default_for_may_be_left_out():
    transformers = pytest.importorskip("transformers")
    fields, theirs = config_fields(tiny_config()), transformers.LlamaConfig()
    del fields["rms_norm_eps"], fields["max_position_embeddings"], fields["rope_theta"], fields["head_dim"]
    found = shape_of(fields)
    assert (found.norm_eps, found.max_seq_len) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert found.rope_theta == 10_000.0


def test_every_field_that_transformers_itself_writes_is_known(caplog):
    transformers = pytest.importorskip("transformers")
    scaled = config_fields(tiny_config(**SHAPES["scaled"]))
    for config in (transformers.LlamaConfig(), transformers.LlamaConfig(**scaled)):
        shape_of(config.to_dict())
    assert not caplog.text
