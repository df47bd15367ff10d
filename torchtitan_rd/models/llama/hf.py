"""Llama to and from Hugging Face's LlamaForCausalLM, one tensor at a time.

Both sides hold the same numbers. Ours (as Meta's release) turns the rotary pairs (2i, 2i + 1) of a head, Hugging Face
the pairs (i, D/2 + i), so the rows of wq and wk change places within each head.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.llama.config import LlamaConfig
from torchtitan_rd.models.spec import HuggingFaceLayout

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}


def key_map(config: LlamaConfig) -> dict[str, str]:
    """Our name -> Hugging Face's, for every tensor that a Hugging Face folder holds (a tied head is not stored)."""
    names = dict(_TOP)
    if config.tie_word_embeddings:
        del names["output.weight"]
    for layer in range(config.n_layers):
        names |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in _LAYER.items()}
    return names


def to_hf(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """The tensor of our `name` as Hugging Face stores it; the same object unless it is a wq or wk."""
    return _reorder(tensor, config, (-1, 2)) if _is_rotated(name) else tensor


def from_hf(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """The inverse of `to_hf`; `name` is ours here too."""
    return _reorder(tensor, config, (2, -1)) if _is_rotated(name) else tensor


def _is_rotated(name: str) -> bool:
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def _reorder(weight: torch.Tensor, config: LlamaConfig, pairs: tuple[int, int]) -> torch.Tensor:
    """(H * D, E), each head's D rows seen as the matrix `pairs` and transposed."""
    per_head = weight.unflatten(0, (-1, config.attention_shape.head_dim)).unflatten(1, pairs)
    return per_head.transpose(1, 2).reshape(weight.shape)


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields of config.json. Raises ConfigError for a shape that LlamaForCausalLM does not have."""
    if config.norm_type != "rmsnorm":
        raise ConfigError(
            f"norm_type = {config.norm_type!r} has no counterpart in Hugging Face's Llama, only 'rmsnorm'"
        )
    scaling = {"rope_type": "llama3", **asdict(config.rope_scaling)} if config.rope_scaling else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.attention_shape.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def from_hf_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """The shape that a config.json describes (of transformers 4, or 5 with its `rope_parameters`).

    Raises ConfigError for what our Llama does not compute.
    """
    for key, only in {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if fields.get(key, only) != only:
            raise ConfigError(f"config.json: {key} = {fields[key]!r} is not supported, only {only!r}")
    try:
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        return LlamaConfig(
            dim=fields["hidden_size"],
            n_layers=fields["num_hidden_layers"],
            n_heads=fields["num_attention_heads"],
            n_kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
            vocab_size=fields["vocab_size"],
            head_dim=fields.get("head_dim"),
            ffn_dim=fields["intermediate_size"],
            norm_eps=fields["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
            rope_scaling=_scaling(rope),
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            max_seq_len=fields["max_position_embeddings"],
        )
    except KeyError as error:
        raise ConfigError(f"config.json: {error.args[0]} is missing") from None


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"config.json: rope_type = {kind!r} is not supported, only 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(**{name: rope[name] for name in names})


HF = HuggingFaceLayout(
    model_type="llama",
    key_map=key_map,
    to_hf=to_hf,
    from_hf=from_hf,
    config_fields=hf_config,
    shape=from_hf_config,
    buffers=lambda config: {},
    derived=r".*rotary_emb\.inv_freq",  # of old transformers
)
