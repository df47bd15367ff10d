"""models/raven/hf.py: names, config.json and rotary table of the Hugging Face layout."""

import math
import re
from dataclasses import replace

import pytest
import torch

from tests.models.raven.tiny import RETROFITTED, tiny_config
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.raven.hf import HF, buffers, config_fields, key_map, shape_of
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.shape import INJECTIONS, RAVEN_FLAVORS, STATE_INITS

RELEASED = {  # the fields that the config of huginn-0125 states
    "name": "nebel-raven-3.5b",
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "torch_dtype": "bfloat16",
    "block_size": 4096,
    "vocab_size": 65536,
    "padding_multiple": 4096,
    "tie_embeddings": True,
    "num_attention_heads": 55,
    "num_key_value_heads": 55,
    "n_embd": 5280,
    "intermediate_size": 17920,
    "bias": False,
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 0.000001,
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "state_init": "like-init",
    "injection_type": "linear",
    "n_layers_in_recurrent_block": 4,
    "mean_recurrence": 32,
    "sampling_scheme": "poisson-lognormal-filling",
    "mean_backprop_depth": 8,
    "n_layers_in_prelude": 2,
    "n_layers_in_coda": 2,
    "qk_bias": True,
    "activation_checkpoint_impl": "per-iteration",
}
OTHER = {  # every field away from its default
    "dim": 48,
    "n_heads": 6,
    "ffn_dim": 40,
    "n_layers_prelude": 3,
    "n_layers_core": 1,
    "n_layers_coda": 0,
    "mean_recurrence": 7,
    "mean_backprop_depth": 5,
    "vocab_size": 77,
    "n_kv_heads": 3,
    "head_dim": 10,
    "final_norm": "once",
    "rope_scaling": RopeScaling(2.0, 0.5, 3.0, 33),
    "block": "post",
    "clip_qkv": 7.0,
    "qk_bias": False,
    "qk_norm": True,
    "injection": "gate",
    "state_init": "unit",
    "sampling_scheme": "full-curriculum-9",
    "init_strategy": "scaled",
    "init_orthogonal": True,
    "norm_eps": 1e-3,
    "rope_theta": 123.0,
    "tie_word_embeddings": False,
    "max_seq_len": 55,
}
PARTS = ("prelude", "recurrent_block", "coda")
VARIANTS = {
    "tiny": {},
    "every field": OTHER,
    "pre-norm": {"block": "pre"},
    "retrofitted": {**RETROFITTED, "adapter_start": "identity"},
    "no prelude": {"n_layers_prelude": 0, "n_layers_coda": 2},
    **{f"injection {kind}": {"injection": kind} for kind in INJECTIONS},
    **{f"state {kind}": {"state_init": kind} for kind in STATE_INITS},
}


@pytest.mark.parametrize("flavor", RAVEN_FLAVORS)
def test_every_flavor_survives_the_way_to_config_json_and_back(flavor):
    assert shape_of(config_fields(RAVEN_FLAVORS[flavor])) == RAVEN_FLAVORS[flavor]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_field_survives_the_way_to_config_json_and_back(variant):
    config = tiny_config(**VARIANTS[variant])
    assert shape_of(config_fields(config)) == config


def test_the_test_above_leaves_no_field_at_its_default():
    ours, other = vars(tiny_config()), vars(tiny_config(**OTHER))
    # An adapter's start needs the linear injection; "retrofitted" has it.
    assert [name for name in ours if ours[name] == other[name]] == ["adapter_start"]


def test_a_public_config_that_sets_the_options_is_the_flavor_with_these_options():
    theirs = {
        "qk_norm": True,
        "clip_qkv": 8,
        "block_class_name": "TransformerPreNormBlock",
        "num_key_value_heads": 11,
    }
    ours = {"qk_norm": True, "clip_qkv": 8.0, "n_kv_heads": 11}
    assert shape_of({**RELEASED, **theirs}) == replace(RAVEN_FLAVORS["corone-raven-3.5b"], **ours)


def test_the_released_config_is_our_large_flavor():
    assert shape_of(RELEASED) == RAVEN_FLAVORS["nebel-raven-3.5b"]


def test_what_a_released_config_leaves_out_has_the_defaults_of_its_class():
    sizes = ("n_embd", "intermediate_size", "vocab_size", "num_attention_heads", "mean_recurrence")
    layers = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda", "mean_backprop_depth")
    assert shape_of({key: RELEASED[key] for key in (*sizes, *layers)}) == RAVEN_FLAVORS["nebel-raven-3.5b"]


def test_the_names_of_the_training_program_and_of_transformers_are_read():
    assert shape_of({**RELEASED, "rope_settings": {"use_rope": True, "rope_base": 7}}).rope_theta == 7.0
    del (fields := dict(RELEASED))["tie_embeddings"]
    assert not shape_of({**fields, "tie_word_embeddings": False}).tie_word_embeddings


def test_an_export_names_the_head_twice_nowhere_and_the_tie_as_the_released_class_takes_it():
    fields = config_fields(tiny_config())
    assert not {"tie_word_embeddings", "num_attention_heads", "num_key_value_heads"} & set(fields)
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_raven.RavenForCausalLM"
    assert fields["n_layers"] == 4 and fields["vocab_size"] == 61 and fields["padding_multiple"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"bias": True},
        {"block_class_name": "TransformerPreNormSwinBlock"},
        {"norm_class_name": "LayerNorm"},
        {"mlp_class_name": "BaseMLP"},
        {"nonlin_name": "GELU"},
        {"injection_type": "ffn"},
        {"injection_type": "modulated"},
        {"state_init": "ones"},
        {"sampling_scheme": "dice"},
        {"init_strategy": "mup"},
        {"qk_norm": "rms"},
        {"clip_qkv": 0},
        {"center_attention": True},
        {"mup_model_scaling_factor": 2},
        {"test_time_noise": 0.5},
    ],
    ids=str,
)
def test_what_our_model_does_not_compute_is_refused_by_name(change):
    (key,) = change
    with pytest.raises(ConfigError, match=f"{key} = "):
        shape_of({**RELEASED, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": "5280"}, "n_embd = '5280' must be a whole number"),
        ({"mean_recurrence": 32.0}, "mean_recurrence = 32.0 must be a whole number"),
        ({"num_attention_heads": [55]}, r"n_heads = \[55\] must be a whole number"),
        ({"qk_bias": "no"}, "qk_bias = 'no' must be true or false"),
        ({"norm_eps": "1e-6"}, "norm_eps = '1e-6' must be a finite number"),
        ({"rope_settings": 3}, "rope_settings = 3 must be a table"),
        ({"rope_settings": {"rope_base": "x"}}, "rope_settings.rope_base = 'x' must be a finite number"),
        ({"sampling_scheme": 3}, "sampling_scheme = 3 must be a text"),
        ({"n_embd": 10**9}, "n_embd = 10+ must be at most 16777216"),
        *(
            ({f"n_layers_in_{part}": 10**9}, f"n_layers_in_{part} = 10+ must be at most 10000")
            for part in PARTS
        ),
        ({"mean_recurrence": 10**9}, "mean_recurrence = 10+ must be at most 10000"),
        ({"block_size": 2**31 - 1}, "block_size = 2147483647 must be at most 16777216"),
        *(
            ({theirs: RELEASED[ours] + 1}, f"{ours} = .* and {theirs} = .* are two names of one thing")
            for ours, theirs in (("n_embd", "hidden_size"), ("block_size", "max_position_embeddings"))
        ),
        ({"n_heads": 11}, "n_heads = 11 and num_attention_heads = 55 are two names of one thing"),
        (
            {"tie_word_embeddings": False},
            "tie_embeddings = True and tie_word_embeddings = False are two names",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"sliding_window": 128}, "sliding_window = 128 is not supported"),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_or_an_unknown_effect_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ConfigError, match=f"^config.json: {message}"):
        shape_of({**RELEASED, **change})


@pytest.mark.parametrize(
    "scheme", ["poisson-lognormal", "bptt", "non-uniform", "gupta", "negative-binomial", "sobol"]
)
def test_every_scheme_of_the_reference_survives_a_conversion(scheme):
    for name in (scheme, f"{scheme}-curriculum-100"):
        assert config_fields(shape_of({**RELEASED, "sampling_scheme": name}))["sampling_scheme"] == name


def test_a_released_config_has_no_unknown_field(caplog):
    shape_of(RELEASED)
    shape_of({**RELEASED, "num_key_value_heads": None, "rope_settings": None})
    assert not caplog.text


def test_fields_that_huginn_lacks_are_written_only_where_they_are_not_its_own():
    new = {"final_norm", "adapter_start", "head_dim", "llama3_rope"}
    for flavor, config in RAVEN_FLAVORS.items():
        assert (new & config_fields(config).keys() != set()) == flavor.startswith("retrofit")
    assert new <= config_fields(tiny_config(**VARIANTS["retrofitted"])).keys()


def test_stretched_rotary_is_refused():
    for change in ({"rope_scaling": {"rope_type": "llama3"}}, {"rope_parameters": {"rope_type": "yarn"}}):
        with pytest.raises(ConfigError, match="is not supported, only None"):
            shape_of({**RELEASED, **change})
    with pytest.raises(ConfigError, match="rope_condense_ratio = 2 is not supported, only 1"):
        shape_of({**RELEASED, "rope_settings": {"rope_condense_ratio": 2}})


@pytest.mark.parametrize(
    "key", ["n_embd", "vocab_size", "n_layers_in_coda", "mean_recurrence", "num_attention_heads"]
)
def test_a_missing_size_is_named(key):
    del (fields := dict(RELEASED))[key]
    with pytest.raises(ConfigError, match=f"config.json: {key.replace('num_attention', 'n')} is missing"):
        shape_of(fields)


@pytest.mark.parametrize("tied", [True, False])
def test_the_key_map_holds_each_weight_once_and_drops_the_loop(tied):
    config = tiny_config(tie_word_embeddings=tied)
    names = key_map(config)
    assert list(names) == [name for name, _ in Raven(config).named_parameters()]
    assert names["transformer.recurrence.iteration.adapter.weight"] == "transformer.adapter.weight"
    assert names["transformer.recurrence.iteration.core_block.1.attn.qk_bias"] == (
        "transformer.core_block.1.attn.qk_bias"
    )
    assert ("lm_head.weight" in names.values()) != tied
    assert len(set(names.values())) == len(names) and not any("iteration" in name for name in names.values())


def test_weights_pass_unchanged():
    tensor = torch.zeros(2)
    assert HF.to_hf("lm_head.weight", tensor, tiny_config()) is tensor
    assert HF.from_hf("lm_head.weight", tensor, tiny_config()) is tensor


def test_the_rotary_table_holds_cosines_and_sines_of_every_position():
    config = tiny_config(max_seq_len=20, rope_theta=100.0)
    (table,) = buffers(config).values()
    assert table.shape == (1, 20, 1, 4, 2) and table.dtype == torch.float32
    angle = 13 * 100.0 ** (-2 * 3 / 8)
    assert table[0, 13, 0, 3].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-5)
    assert set(buffers(config)) == {HF.derived}


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": RETROFITTED["rope_scaling"]}], ids=str)
def test_our_model_turns_by_the_very_bits_of_the_exported_table(fields):
    config = tiny_config(max_seq_len=512, dim=192, n_heads=2, **fields)
    (table,) = buffers(config).values()
    ours = torch.view_as_real(Raven(config).rotary(512))
    assert torch.equal(ours, table[0])


def test_the_remote_code_is_there_and_named_as_auto_map_says():
    """The modeling file names every other one: older transformers copies no others from a local folder."""
    modules = {value.split(".")[0] for value in config_fields(tiny_config())["auto_map"].values()}
    (modeling,) = (path for path in HF.code if path.stem == "modeling_raven")
    imported = re.findall(r"^from \.(\w+) import", modeling.read_text(), re.MULTILINE)
    names = {path.stem for path in HF.code}
    assert names == {*imported, "modeling_raven"} and modules < names and len(names) == len(HF.code)
    assert {path for path in HF.code if path.stem.endswith("_raven")} == set(modeling.parent.glob("*.py"))
