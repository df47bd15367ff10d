"""Raven to and from the layout of the released Hugging Face model, one tensor at a time.

Both sides hold the same numbers under the same names, but for the two modules that hold the loop here. The fields of
config.json are those of the released RavenConfig, so that its modelling file reads an export too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.model_spec import HuggingFaceLayout
from torchtitan_rd.models.hf_fields import Fields
from torchtitan_rd.models.raven.config import INJECTIONS, NOT_BUILT, STATE_INITS, RavenConfig
from torchtitan_rd.models.raven.model import Raven

BLOCKS = {"sandwich": "SandwichBlock", "post": "TransformerPostNormBlock", "pre": "TransformerPreNormBlock"}
_FIELDS = {  # ours -> theirs, where both sides hold the same value
    "dim": "n_embd",
    "ffn_dim": "intermediate_size",
    "n_layers_prelude": "n_layers_in_prelude",
    "n_layers_core": "n_layers_in_recurrent_block",
    "n_layers_coda": "n_layers_in_coda",
    "mean_recurrence": "mean_recurrence",
    "mean_backprop_depth": "mean_backprop_depth",
    "vocab_size": "vocab_size",
}
_WITH_DEFAULT = {  # those that a released config may leave out, and what its class then takes
    "injection": ("injection_type", "linear"),
    "state_init": ("state_init", "like-init"),
    "sampling_scheme": ("sampling_scheme", "poisson-lognormal-filling"),
    "init_strategy": ("init_strategy", "takase"),
    "init_orthogonal": ("init_orthogonal", False),
    "clip_qkv": ("clip_qkv", None),
    "qk_bias": ("qk_bias", True),
    "qk_norm": ("qk_norm", False),
    "norm_eps": ("norm_eps", 1e-6),
    "rope_theta": ("rope_base", 50_000.0),
    "tie_word_embeddings": ("tie_embeddings", True),
    "max_seq_len": ("block_size", 4096),
}
_COMPUTED = {  # what our model computes, the default first; the released family has more
    "model_type": ("huginn_raven",),
    "architecture_class_name": ("RecurrentGPT",),
    "block_class_name": tuple(BLOCKS.values()),
    "norm_class_name": ("RMSNorm_llama", "RMSNorm"),
    "injection_type": INJECTIONS,
    "state_init": STATE_INITS,
    "init_strategy": ("takase", "scaled"),
    "qk_norm": (False, True),
    **NOT_BUILT,
}
# What else the released class and transformers write: it says nothing about one forward, or follows from the others.
_UNUSED = (
    *("auto_map", "rope_settings", "n_layers", "num_hidden_layers", "hidden_size", "max_position_embeddings"),
    *("num_attention_heads", "head_dim", "tie_word_embeddings", "padding_multiple", "padded_vocab_size"),
    *("activation_checkpoint_impl", "init_values", "effective_expected_depth", "test_time_noise_type"),
)
_ROTARY = {"use_rope": (True,), "rope_condense_ratio": (1,)}

FOREIGN = {
    **{
        name: f"what {name} = {known[0]!r} means in Huginn's configurations is the only thing built: leave it out"
        for name, known in {**NOT_BUILT, "norm_class_name": _COMPUTED["norm_class_name"]}.items()
    },
    **{theirs: f"{ours} is its name here" for ours, theirs in _FIELDS.items() if ours != theirs},
    **{theirs: f"{ours} is its name here" for ours, (theirs, _) in _WITH_DEFAULT.items() if ours != theirs},
    "block_class_name": "block is its name here",
    "num_attention_heads": "n_heads is its name here",
    "num_key_value_heads": "n_kv_heads is its name here",
    "padding_multiple": "set model.vocab_padding_multiple",
}
"""Names of Huginn's configurations that `[model.overrides]` does not take -> what to do instead."""


def key_map(config: RavenConfig) -> dict[str, str]:
    """Our name -> Hugging Face's, for every tensor that a Hugging Face folder holds (a tied head is not stored)."""
    with torch.device("meta"):
        model = Raven(config)
    return {name: name.replace("recurrence.iteration.", "") for name, _ in model.named_parameters()}


def config_fields(config: RavenConfig) -> dict[str, Any]:
    """The fields of config.json."""
    fields = {
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_raven.RavenConfig",
            "AutoModelForCausalLM": "modeling_raven.RavenForCausalLM",
        },
        **{key: _COMPUTED[key][0] for key in ("model_type", "architecture_class_name", "norm_class_name")},
        **{key: _COMPUTED[key][0] for key in ("mlp_class_name", "nonlin_name", "bias")},
        "block_class_name": BLOCKS[config.block],
        "n_heads": config.n_heads,
        "n_layers": config.n_layers_prelude + config.n_layers_core + config.n_layers_coda,
        "padding_multiple": 1,  # vocab_size is the number of rows
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _WITH_DEFAULT.items()},
    }
    if config.attention_shape.n_kv_heads != config.n_heads:
        fields["num_key_value_heads"] = config.n_kv_heads
    return fields


def shape_of(fields: Mapping[str, Any]) -> RavenConfig:
    """The shape that a config.json describes: an export of ours, a released one, or either as transformers saves it.

    Raises ConfigError for a missing field and for what our model does not compute.
    """
    rotary = Fields(fields).table("rope_settings")
    read = Fields(
        {  # three that have other names in configs of the training program and of other transformers classes
            "n_heads": fields.get("num_attention_heads"),
            "rope_base": rotary.number("rope_base", None),
            "tie_embeddings": fields.get("tie_word_embeddings"),
            **{key: value for key, value in fields.items() if value is not None},
        }
    )
    for table, given in ((_COMPUTED, read), (_ROTARY, rotary)):
        for key, known in table.items():
            given.only(key, *known)
    kinds = {bool: read.boolean, float: read.number, int: read.whole, str: read.text, type(None): read.number}
    heads = read.whole("n_heads")
    kv_heads = read.whole("num_key_value_heads", heads)
    config = RavenConfig(
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        block={theirs: ours for ours, theirs in BLOCKS.items()}[read.text("block_class_name", "SandwichBlock")],
        **{ours: read.whole(theirs) for ours, theirs in _FIELDS.items()},
        **{ours: kinds[type(default)](theirs, default) for ours, (theirs, default) in _WITH_DEFAULT.items()},
    )
    read.refuse_what_changes_the_computation(*_COMPUTED, *_UNUSED, "clip_qkv")
    return config


def buffers(config: RavenConfig) -> dict[str, torch.Tensor]:
    """freqs_cis: (1, block_size, 1, D/2, 2) float32, cosines and sines: the released class loads it as a buffer."""
    head_dim = config.attention_shape.head_dim
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), frequencies)
    return {"freqs_cis": torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None]}


def _same(name: str, tensor: torch.Tensor, config: RavenConfig) -> torch.Tensor:
    return tensor


def _forward_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """num_steps there is the total, and gradient or none is not its business."""
    return {"num_steps": sum(kwargs["num_steps"]), "input_states": kwargs["initial_state"]}


_USAGE = (
    "`num_steps` is the number of iterations of the recurrent part.\n\n"
    "To finetune: `labels` are the input ids themselves and are shifted inside, as in every class of transformers. The "
    "class released with huginn-0125 takes them shifted; labels made for it are to be given as `shift_labels`."
)
_CODE = Path(__file__).parent / "huggingface"

HF = HuggingFaceLayout(
    model_type="huginn_raven",
    key_map=key_map,
    to_hf=_same,
    from_hf=_same,
    config_fields=config_fields,
    shape_of=shape_of,
    buffers=buffers,
    derived="freqs_cis",
    code=tuple(_CODE / f"{name}_raven.py" for name in ("configuration", "blocks", "modeling")),
    forward_arguments=_forward_arguments,
    example_arguments=lambda shape: {"num_steps": shape.mean_recurrence},
    usage=_USAGE,
)
