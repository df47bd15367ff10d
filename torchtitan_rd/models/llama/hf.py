"""Llama to and from Hugging Face's LlamaForCausalLM, one tensor at a time.

Both sides hold the same numbers. Ours (as Meta's release) turns the rotary pairs (2i, 2i + 1) of a head,
Hugging Face the pairs (i, D/2 + i), so the rows of wq and wk change places within each head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import HuggingFaceLayout
from torchtitan_rd.models.hf_fields import Fields, rope_scaling
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.llama.shape import LlamaShape

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


def key_map(shape: LlamaShape) -> dict[str, str]:
    """Our name -> Hugging Face's, for every tensor that a Hugging Face folder holds
    (a tied head is not stored).
    """
    names = dict(_TOP)
    if shape.tie_word_embeddings:
        del names["output.weight"]
    for layer in range(shape.n_layers):
        names |= {
            f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in _LAYER.items()
        }
    return names


def to_hf(name: str, tensor: torch.Tensor, shape: LlamaShape) -> torch.Tensor:
    """The tensor of our `name` as Hugging Face stores it; the same object unless it is a wq or wk."""
    return _reorder(tensor, shape, (-1, 2)) if _is_rotated(name) else tensor


def from_hf(name: str, tensor: torch.Tensor, shape: LlamaShape) -> torch.Tensor:
    """The inverse of `to_hf`; `name` is ours here too."""
    return _reorder(tensor, shape, (2, -1)) if _is_rotated(name) else tensor


def _is_rotated(name: str) -> bool:
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def _reorder(weight: torch.Tensor, shape: LlamaShape, pairs: tuple[int, int]) -> torch.Tensor:
    """(H * D, E), each head's D rows seen as the matrix `pairs` and transposed."""
    per_head = weight.unflatten(0, (-1, shape.attention_shape.head_dim)).unflatten(1, pairs)
    return per_head.transpose(1, 2).reshape(weight.shape)


def config_fields(shape: LlamaShape) -> dict[str, Any]:
    """The fields of config.json that follow from the shape; conversion/huggingface.py adds the others.

    Raises ConfigError for a shape that LlamaForCausalLM does not have.
    """
    if shape.norm_type != "rmsnorm":
        raise ConfigError(
            f"norm_type = {shape.norm_type!r} has no counterpart in Hugging Face's Llama, only 'rmsnorm'"
        )
    scaling = (
        {"rope_type": "llama3", **dataclasses.asdict(shape.rope_scaling)} if shape.rope_scaling else None
    )

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.attention_shape.head_dim,
        "intermediate_size": shape.hidden_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "initializer_range": shape.init_std,
        # What every Llama has: stated, since the library's defaults are its own to change.
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def shape_of(fields: Mapping[str, Any]) -> LlamaShape:
    """The shape that a config.json describes (of transformers 4, or 5 with its `rope_parameters`).

    What may be left out has the default of transformers' LlamaConfig.
    Raises ConfigError for what our Llama does not compute, and for values of a wrong type.
    """
    read = Fields(fields)
    read.only("model_type", "llama")
    read.only("hidden_act", "silu", "swish")  # two names of one function
    read.only("attention_bias", False)
    read.only("mlp_bias", False)
    if "AutoModelForCausalLM" in read.table("auto_map").given:
        raise ConfigError(
            "config.json: auto_map names a class of its own in place of Hugging Face's Llama: not supported"
        )
    for kind in read.listed("layer_types"):
        if kind != "full_attention":
            raise ConfigError(
                f"config.json: layer_types has {kind!r}, which is not supported, only 'full_attention'"
            )

    heads = read.whole("num_attention_heads", most=2**16)
    theta, scaling = _rotary(read)
    shape = LlamaShape(
        dim=read.whole("hidden_size"),
        n_layers=read.whole("num_hidden_layers", most=10_000),
        n_heads=heads,
        n_kv_heads=read.whole("num_key_value_heads", heads),
        vocab_size=read.whole("vocab_size"),
        head_dim=read.whole("head_dim", None, most=2**16),
        ffn_dim=read.whole("intermediate_size"),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=read.boolean("tie_word_embeddings", False),
        max_seq_len=read.whole("max_position_embeddings", 2048, most=2**31 - 1),
    )

    windowless = read.boolean("use_sliding_window", None) is False
    read.refuse_what_changes_the_computation(*(["sliding_window"] if windowless else []))
    return shape


def _rotary(read: Fields) -> tuple[float, RopeScaling | None]:
    """-> (theta, scaling). Of `rope_parameters` and `rope_scaling` some versions of transformers take the
    one, others the other, so they must agree if both are there; and so must all that state theta.
    """
    tables = {key: read.table(key) for key in ("rope_parameters", "rope_scaling") if key in read.given}
    thetas = {f"{key}.rope_theta": table.number("rope_theta", None) for key, table in tables.items()}
    thetas["rope_theta"] = read.number("rope_theta", None)
    scalings = {key: _scaling(table) for key, table in tables.items()}
    for stated in ({key: theta for key, theta in thetas.items() if theta is not None}, scalings):
        (first, value), *others = stated.items() or [(None, None)]
        for key, other in others:
            if other != value:
                raise ConfigError(
                    f"config.json: {first} and {key} say different things ({value} and {other}), and it "
                    f"depends on the version of transformers which one counts: leave only the right one"
                )
    theta = next((theta for theta in thetas.values() if theta is not None), 10_000.0)
    return theta, next(iter(scalings.values()), None)


def _scaling(rope: Fields) -> RopeScaling | None:
    kind = rope.only("rope_type" if "rope_type" in rope.given else "type", "default", "llama3")
    scaling = rope_scaling(rope) if kind == "llama3" else None
    names = dataclasses.asdict(scaling) if scaling else ()
    for key in rope.given.keys() - {"type", "rope_type", "rope_theta", *names}:
        rope.only(key, *([1] if key == "partial_rotary_factor" else [None]))
    if rope.given.get("type", kind) != kind:
        raise ConfigError(
            f"{rope.where}type = {rope.given['type']!r}, but rope_type = {kind!r}: leave only one"
        )
    return scaling


HF = HuggingFaceLayout(
    model_type="llama",
    key_map=key_map,
    to_hf=to_hf,
    from_hf=from_hf,
    config_fields=config_fields,
    shape_of=shape_of,
    buffers=lambda shape: {},
    derived=r".*rotary_emb\.inv_freq",  # of old transformers
)
